"""How alike are a model's steps?  Measured on runs of its own, as TeaCache and MagCache need it.

Curve and polynomial depend on the model, the number of steps, the shift and the solver, so measure with the
settings that will be used.
"""

import json
from pathlib import Path

import numpy as np
import torch

from ..saving import writable, write_whole
from .cache import cached
from .cache_coefficients import FILE, SIGNALS, read
from .cache_policies import relative
from .promises import bare

FEWEST = 7  # steps: six changes for the five numbers of a polynomial


def calibrate(pipe, prompts, policy="teacache", to=None, **options):
    """Run without skipping, and measure what the policy needs.   -> the calibration, a dict

    prompts  a list; run i has seed i. Each a text, or a dict of what its run takes: prompt, image, ...
    policy   "teacache": for each of its two signals the polynomial of degree 4 that goes through (how far the
             signal moved, how far the stream behind the blocks moved); "magcache": for each branch the mean
             ratio of what the blocks add to what they added a step before
    to       a JSON file, or the folder of the weights, where it becomes cache.json; what another policy has
             in there stays
    options  of the runs: steps, shift, solver, scale, size, ...

    `cached(pipe.dit, policy, coefficients=to)` (or curve=to) reads it.

    Raises ValueError for another policy, no prompts, a run without one or with steps of its own, or of fewer
    than seven steps.
    """
    if policy not in ("teacache", "magcache"):
        raise ValueError(
            f'calibrate(policy={policy!r}); expected "teacache" or "magcache", others need nothing'
        )
    if isinstance(prompts, str | dict) or not len(prompts):
        raise ValueError(f"calibrate(prompts={prompts!r}); expected a list of prompts")
    runs = [one if isinstance(one, dict) else {"prompt": one} for one in prompts]
    for run in runs:
        if "prompt" not in run or "steps" in run:
            raise ValueError(
                f"calibrate got a run of {', '.join(run) or 'nothing'}; expected a prompt, and no steps, "
                "which are the same for all: calibrate(..., steps=20)"
            )
    path = None if to is None else writable(as_file(to))
    recorder = Recorder()
    watched = pipe.replace(dit=cached(pipe.dit, recorder))
    for seed, run in enumerate(runs):
        for state in watched.steps(**({"seed": seed} | options | run)):
            steps = state.steps
        if steps < FEWEST:
            raise ValueError(f"a run of {steps} steps has too few changes to fit; expected {FEWEST} or more")
    found = read(path) if path is not None and path.exists() else {}
    config = getattr(bare(pipe.dit), "config", None)
    sizes = {key: getattr(config, key) for key in ("model_type", "dim", "num_layers") if hasattr(config, key)}
    found |= {"model": sizes, "source": f"calibrate, {len(prompts)} prompts, {steps} steps"}
    found[policy] = polynomials(recorder.rows) if policy == "teacache" else curves(recorder.rows, steps)
    if path is not None:
        write_whole(path, json.dumps(found, indent=1).encode() + b"\n")
    return found


def as_file(to):
    to = Path(to).expanduser()
    return to / FILE if to.is_dir() else to


class Recorder:
    """A policy that skips nothing and measures: a row for each pass that has one before it.

    ratio   mean over the tokens of |residual| / |residual before|
    output  how far the stream behind the blocks moved, and so for the two signals of TeaCache
    """

    over, blocks = "blocks", 0

    def __init__(self):
        self.rows = []

    def __call__(self, now, here):
        return False

    def after(self, now, out, here):
        new = dict(time=now.time, projected=now.time6, output=out)
        sizes = torch.linalg.vector_norm(out - now.x, dim=-1)  # [b, n]
        if "sizes" in here:
            row = {name: relative(x, here[name]) for name, x in new.items()}
            ratio = float((sizes / here["sizes"].clamp_min(1e-12)).mean())
            self.rows.append(row | dict(step=now.step, branch=now.branch, ratio=ratio))
        here |= new | {"sizes": sizes}


def polynomials(rows):
    """{signal: five numbers, highest power first}, least squares"""
    moved = [row["output"] for row in rows]
    fits = {name: np.polyfit([row[name] for row in rows], moved, 4) for name in SIGNALS}
    return {name: [float(f"{number:.9g}") for number in fit] for name, fit in fits.items()}


def curves(rows, steps):
    """{branch: [ratio of each step to the one before]}; 1 where there is none before"""
    found = {}
    for branch in dict.fromkeys(row["branch"] for row in rows):
        by_step = [
            [row["ratio"] for row in rows if (row["branch"], row["step"]) == (branch, i)]
            for i in range(steps)
        ]
        found[branch] = [round(float(np.mean(ratios)), 5) if ratios else 1.0 for ratios in by_step]
    return found
