"""Which part causes what I see?  Sweeps over patches, with a metric that means something and the controls beside it.

An effect is the difference that a patch makes.  The baseline is the identity patch (patching scores or probs also changes the kernel),
and a metric is scaled so that 0 is the run left alone and 1 the other run.  Guide: guides/tracing.md
"""

import hashlib
import itertools
import json
import os
from pathlib import Path

import numpy as np
import torch

from .hooks import identity, noise, patch, points, transplant, zero


def recovered(value, low, high):
    """How far from low to high: 0 where nothing changed, 1 where the other run is restored.   (value - low) / (high - low)

    Raises ValueError if low and high are the same or no numbers: then the metric does not tell the two runs apart.
    """
    value, low, high = float(value), float(low), float(high)
    if not np.isfinite([value, low, high]).all() or low == high:
        raise ValueError(
            f"recovered({value:g}, low={low:g}, high={high:g}): low and high must differ and all be finite numbers; "
            "choose a metric that tells the two runs apart"
        )
    return (value - low) / (high - low)


class Sweep:
    """Numbers on labelled axes: `.values` [len(axis), ...] float64, `.axes` name -> labels, `.at(block=2)`, `.show()`."""

    def __init__(self, values, axes, title="", controls=None):
        self.values, self.axes, self.title = (
            np.asarray(values, dtype=float),
            {name: list(labels) for name, labels in axes.items()},
            title,
        )
        self.controls = controls or {}  # name -> number: what the figure is to be read against

    def at(self, **labels):
        """The number, or the Sweep over the axes left, at these labels: `grid.at(block=2, step=4)`."""
        index, axes = [], {}
        unknown = set(labels) - set(self.axes)
        if unknown:
            raise ValueError(f"no axis {', '.join(sorted(unknown))}; this sweep has {', '.join(self.axes)}")
        for name, known in self.axes.items():
            if name not in labels:
                axes[name] = known
                index.append(slice(None))
            elif labels[name] in known:
                index.append(known.index(labels[name]))
            else:
                raise ValueError(
                    f"{name}={labels[name]!r} was not swept; {name} has {', '.join(map(str, known))}"
                )
        found = self.values[tuple(index)]
        return Sweep(found, axes, self.title, self.controls) if axes else float(found)

    def best(self):
        """The labels of the largest number: {"block": 2, "step": 4}."""
        place = np.unravel_index(np.nanargmax(self.values), self.values.shape)
        return {name: labels[i] for (name, labels), i in zip(self.axes.items(), place)}

    def show(self, low=None, high=None):
        """A heat map of two axes, or bars of one, on white = 0; the controls stand in the title.   -> matplotlib Figure"""
        from .viz.charts import recovery_map

        return recovery_map(self, low, high)

    def __repr__(self):
        names = list(self.axes)
        text = [self.title] if self.title else []
        if self.values.ndim == 2:
            width = max(8, *(len(str(label)) + 1 for label in self.axes[names[1]]))
            text.append(
                f"{names[0]} \\ {names[1]}".ljust(14)
                + "".join(str(label).rjust(width) for label in self.axes[names[1]])
            )
            text += [
                str(label).ljust(14) + "".join(f"{value:.3f}".rjust(width) for value in row)
                for label, row in zip(self.axes[names[0]], self.values)
            ]
        else:
            text += [
                f"{dict(zip(names, key))}: {self.values[tuple(place)]:.4f}"
                for place, key in zip(np.ndindex(self.values.shape), itertools.product(*self.axes.values()))
            ]
        return "\n".join(text + [f"{name}: {value:.4f}" for name, value in self.controls.items()])


def sweep(run, *, file=None, progress=True, title="", seed=0, **axes):
    """run(block=0, step=0), run(block=0, step=4), ...: one number for every combination of labels.

    run       a function of the axes, by name, that returns a number
    file      a path: each number is written as soon as it is there, and a sweep that was interrupted goes on where it stopped
    axes      name=labels, any iterable of numbers or strings: block=range(4), step=range(0, 20, 4)
    ->        Sweep

    Each cell starts from its own random seed, made from `seed` and its labels, so neither order nor resuming changes a number.
    Raises ValueError (no axes, a file of another sweep), TypeError (run did not return a number).
    """
    axes = {
        name: [label.item() if isinstance(label, (np.generic, torch.Tensor)) else label for label in labels]
        for name, labels in axes.items()
    }
    empty = [name for name, labels in axes.items() if not labels]
    if not axes or empty:
        raise ValueError(
            f"sweep needs labels on every axis, such as block=range(4); {', '.join(empty) or 'no axis'} has none"
        )
    cells = list(itertools.product(*axes.values()))
    done = _resume(file, axes, seed) if file is not None else {}
    if progress:
        from tqdm.auto import tqdm

        bar = tqdm(cells, desc=title or "sweep")
    for cell in bar if progress else cells:
        if cell in done:
            continue
        labels = dict(zip(axes, cell))
        with torch.random.fork_rng():
            torch.manual_seed(
                int.from_bytes(hashlib.sha256(repr((seed, labels)).encode()).digest()[:7], "big")
            )
            value = run(**labels)
        try:
            done[cell] = float(value)
        except (TypeError, ValueError) as wrong:
            raise TypeError(
                f"run({', '.join(f'{k}={v!r}' for k, v in labels.items())}) returned {type(value).__name__}; expected one number. "
                "Did the function forget to return?"
            ) from wrong
        if file is not None:
            _append(file, {"cell": cell, "value": done[cell]})
    return Sweep(
        np.array([done[cell] for cell in cells]).reshape([len(labels) for labels in axes.values()]),
        axes,
        title,
    )


def _append(file, line):
    with open(file, "a", encoding="utf-8") as out:
        out.write(json.dumps(line) + "\n")
        out.flush()
        os.fsync(out.fileno())


def _resume(file, axes, seed):
    """What an earlier sweep over the same axes left in the file; a last line cut off by a crash is dropped."""
    head = {"axes": axes, "seed": seed}
    path = Path(file)
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    lines = [json.loads(line) for line in whole.splitlines()]
    if not lines:
        _append(file, head)
        return {}
    if lines[0] != json.loads(json.dumps(head)):
        held = lines[0].get("axes", "something else")
        raise ValueError(
            f"{file} holds another sweep, over {held}; this one is over {axes} with seed {seed}. Give it its own file"
        )
    return {tuple(line["cell"]): line["value"] for line in lines[1:]}


def patching_map(
    model,
    run,
    record,
    metric,
    *,
    high,
    steps,
    blocks=None,
    tap="blocks.{block}.resid_post",
    branch="cond",
    tokens=None,
    file=None,
    progress=True,
):
    """Activation patching: what another run had at one block and one step is put in its place here; how much of its result comes back?

    model    what the run runs, such as pipe.dit, or the pipeline itself (then tap="dit.blocks.{block}.resid_post")
    run      () -> the run to be changed, with everything else fixed: `lambda: pipe("a blue square moving left", seed=0)`
    record   capture of the other run at those taps, steps and branch
    metric   result of run -> number;  high: the metric of the other run
    steps    which steps;  blocks: by default all of them;  tokens: a part of the video only, as pipe.region gives
    ->       Sweep over block and step, of recovered(): 0 unchanged, 1 the other run.  `.controls`: what the identity patch (must be 0)
             and noise of equal size at the best place (should not help) recover
    """
    blocks = blocks_of(model, tap.replace("{block}", "*")) if blocks is None else blocks
    part = {} if tokens is None else {"tokens": tokens}
    steps = list(steps)

    def under(edit, block, at_steps):
        with patch(model, tap.format(block=block), edit, steps=at_steps, branch=branch):
            return metric(run())

    plain = float(metric(run()))
    low = float(under(identity, list(blocks)[0], steps))
    found = sweep(
        lambda block, step: recovered(under(transplant(record, **part), block, [step]), low, high),
        block=blocks,
        step=steps,
        file=file,
        progress=progress,
        title=f"recovered by {tap.replace('{block}', '*')}",
    )
    best = found.best()
    found.controls = {
        "identity": recovered(plain, low, high),
        "noise": recovered(under(noise(**part), best["block"], [best["step"]]), low, high),
    }
    return found


def head_ablation(
    model,
    run,
    metric,
    *,
    heads,
    blocks=None,
    tap="blocks.{block}.cross_attn.heads",
    edit=zero,
    steps=None,
    branch=None,
    file=None,
    progress=True,
):
    """What each head contributes: the metric with the head taken away, minus the metric under the identity patch.

    heads    how many, or which;  edit: a maker of edits by axis name, such as zero or partial(mean_over, "tokens")
    run      () -> a result;  metric: result -> number
    ->       Sweep over block and head: negative where the head was needed.  `.controls`: the baseline itself
    """
    blocks = blocks_of(model, tap.replace("{block}", "*")) if blocks is None else blocks
    heads = range(heads) if isinstance(heads, int) else heads

    def under(change, block):
        with patch(model, tap.format(block=block), change, steps=steps, branch=branch):
            return float(metric(run()))

    baseline = under(identity, list(blocks)[0])
    found = sweep(
        lambda block, head: under(edit(heads=head), block) - baseline,
        block=blocks,
        head=heads,
        file=file,
        progress=progress,
        title=f"metric without a head of {tap.replace('{block}', '*')}, minus with all",
    )
    found.controls = {"baseline": baseline}
    return found


def blocks_of(model, pattern):
    """The numbers of the blocks that have such a tap."""
    return sorted({where.block for where in points(model, pattern) if where.block is not None})
