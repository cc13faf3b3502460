"""How were the tiny models trained?  Stage by stage, resumable, seeded and logged.

    moddiff train-tiny --stage vae

Every stage writes `<folder>/<stage>/`: `checkpoint.pt` (all that a resumed run needs), `log.csv`, and the
averaged weights that `moddiff train-tiny --export` copies into the package. Data of step n depend on (seed,
n) alone, so a resumed run sees what an unbroken one would have seen. With `--workers 2` two processes of one
thread each train one model, each on a batch of its own: on a CPU that is faster than one process with two
threads. With `--device cuda` one process computes on the GPU and others draw clips for it.
"""

import csv
import math
import os
import time
from copy import deepcopy
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save
from torch.nn.utils import clip_grad_norm_, parameters_to_vector, vector_to_parameters
from tqdm.auto import tqdm

from ..saving import write_whole
from .muon import optimisers
from .stages import STEPS, make_stage
from .training_set import device_of, drawn_for

CHECKPOINT_SECONDS, LOG_SECONDS = 120, 15
WITHOUT_END = 10**12  # steps
replace_file = write_whole  # its name in version 0.1


def learning_rate(step, steps, warmup=50, decay=0.4):
    """Factor on the rates: a linear rise, a plateau, and a linear fall over the last `decay` of the run."""
    return min(1.0, (step + 1) / warmup, (steps - step) / max(1.0, decay * steps))


def learning_rate_in_time(share, rise=0.02, fall=0.6):
    """The same where the time is given: `share` of it is over, `rise` and `fall` are shares too."""
    return max(0.0, min(1.0, share / rise, (1 - share) / fall))


def average_gradients(model):
    """Replace every gradient by its mean over the processes that train this model."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = parameters_to_vector(gradients)
    dist.all_reduce(flat)
    vector_to_parameters(flat / dist.get_world_size(), gradients)


class Progress:
    """Where a run of a stage stands, in memory and on disk: models, optimisers, steps done, seconds spent."""

    def __init__(self, stage, folder):
        self.folder, self.step, self.seconds = folder, 0, 0.0
        self.model, self.ema = stage.model.train(), deepcopy(stage.model).eval().requires_grad_(False)
        self.optims = optimisers(self.model, stage.recipe)
        self.rates = [group["lr"] for group in self.groups()]
        checkpoint, start = folder / "checkpoint.pt", folder / "start.safetensors"
        if checkpoint.exists():
            saved = torch.load(checkpoint, weights_only=True, map_location=device_of(self.model))
            self.model.load_state_dict(saved["model"])
            self.ema.load_state_dict(saved["ema"])
            for optim, state in zip(self.optims, saved["optims"]):
                optim.load_state_dict(state)
            self.step, self.seconds = saved["step"], saved["seconds"]
        elif start.exists():
            for model in (self.model, self.ema):
                model.load_state_dict(load_file(start))

    def groups(self):
        return [group for optim in self.optims for group in optim.param_groups]

    def save(self):
        state = dict(
            model=self.model.state_dict(),
            ema=self.ema.state_dict(),
            optims=[optim.state_dict() for optim in self.optims],
            step=self.step,
            seconds=self.seconds,
        )
        write_whole(self.folder / "checkpoint.pt", partial(torch.save, state))
        write_whole(self.folder / "ema.safetensors", save(state["ema"]))

    def log(self, recent):
        """Add the means of some steps to the log.   -> them"""
        means = means_of(recent)
        append_figures(self.folder / "log.csv", self.step, round(self.seconds), means)
        return means

    def update(self, factor, keep):
        """One step along the gradients, with `factor` on the rates; the average keeps `keep` of itself."""
        for group, rate in zip(self.groups(), self.rates):
            group["lr"] = rate * factor
        for optim in self.optims:
            optim.step()
            optim.zero_grad(set_to_none=True)
        with torch.no_grad():
            for average, p in zip(self.ema.parameters(), self.model.parameters()):
                average.lerp_(p, 1 - keep)
        self.step += 1


def train(stage, folder, steps=None, seed=0, seconds=None):
    """Run `stage` from its checkpoint, or `start.safetensors`, or from nothing.

    stage    an object with name, model, recipe, draw(step, rng) -> {name: value}, the data of a step, and
             loss(**them) -> (loss, {figure: value})
    folder   where `<stage>/checkpoint.pt`, `log.csv` and `ema.safetensors` go
    steps    up to this step
    seconds  or, in place of steps: for this time, that of the runs before included
    ->       the averaged (EMA) model

    Raises FloatingPointError before a gradient that is not finite spoils the weights.
    """
    folder = Path(folder) / stage.name
    folder.mkdir(parents=True, exist_ok=True)
    run, recent = Progress(stage, folder), []
    rank, workers = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    todo = range(run.step, WITHOUT_END if steps is None else steps)
    shown = tqdm(
        todo,
        initial=run.step,
        total=steps,
        desc=stage.name,
        mininterval=10,
        disable=rank > 0 or None,  # no bar where there is no terminal
    )

    def draw(step):
        return stage.draw(step, np.random.default_rng([seed, step] if workers == 1 else [seed, step, rank]))

    tick = last_save = last_log = time.monotonic()
    for step, drawn in zip(shown, drawn_for(draw, todo, device_of(run.model))):
        if seconds is not None and run.seconds >= seconds:
            break
        loss, figures = stage.loss(**drawn)
        loss.backward()
        if workers > 1:
            average_gradients(run.model)
        norm = clip_grad_norm_(run.model.parameters(), 1.0)
        if not math.isfinite(float(norm)):
            raise FloatingPointError(
                f"{stage.name}: the gradient at step {step} is not finite; "
                "resume from checkpoint.pt with a lower rate"
            )
        factor = (
            learning_rate(step, steps) if seconds is None else learning_rate_in_time(run.seconds / seconds)
        )
        keep = min(stage.recipe.ema, (step + 1) / (step + 10))  # a young average forgets its start sooner
        run.update(factor, keep)
        recent.append(dict(loss=loss.detach(), **figures))
        now = time.monotonic()
        run.seconds, tick = run.seconds + now - tick, now
        if rank == 0 and now - last_log > LOG_SECONDS:
            shown.set_postfix(run.log(recent))
            recent, last_log = [], now
        if rank == 0 and now - last_save > CHECKPOINT_SECONDS:
            run.save()
            last_save = time.monotonic()
    if rank == 0:
        if recent:
            run.log(recent)
        run.save()
    return run.ema


def means_of(rows):
    """The mean of each figure over the rows that have it.   [{figure: value}] -> {figure: value}

    A figure that is not a number there, as the loss at a noise level that no sample had, is not there.
    """
    keys = dict.fromkeys(key for row in rows for key in row)
    values = {key: [float(row[key]) for row in rows if key in row] for key in keys}
    known = {key: [value for value in each if not math.isnan(value)] for key, each in values.items()}
    return {key: round(float(np.mean(each)), 5) for key, each in known.items() if each}


def append_figures(path, step, seconds, figures):
    """Add a line for each figure to a CSV of (step, seconds, figure, value): figures may come and go."""
    new = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(["step", "seconds", "figure", "value"])
        writer.writerows([step, seconds, *figure] for figure in figures.items())


def run_stage(
    name,
    steps=None,
    folder="runs",
    seed=0,
    clips=None,
    workers=1,
    device="cpu",
    batch=None,
    seconds=None,
):
    """Train one stage in `folder`, from where it was left; those before it must have run there.

    name     "vae", "text", "clip", "t2v" (caches its latents first), "decoder" (on the same latents), "i2v"
             or "fast" (caches what t2v does first)
    steps    up to this step; None: as many as the stage has in STEPS, or as fit in `seconds`
    clips    how many clips t2v, decoder and i2v learn from; None: all that are cached, or 8000. Of fast, how
             many videos of t2v; None: 1024
    workers  how many processes train it together; more than 1: one thread and a batch each, gradients
             averaged, on the CPU
    device   "cpu", "cuda", "cuda:1"
    batch    how many clips, captions or windows a step learns from; None: as many as are right on a CPU
    seconds  train for this time, caches not counted; the rates then go by the share of it that is over
    """
    folder, kind = Path(folder), torch.device(device).type
    if name not in STEPS:
        raise ValueError(f"stage {name!r} is not one of {', '.join(STEPS)}")
    if steps is not None and seconds is not None:
        raise ValueError(f"steps = {steps} and seconds = {seconds:g}: give one of them")
    if workers > 1 and (kind != "cpu" or seconds is not None):
        raise ValueError(
            f"workers = {workers} processes train together on the CPU, for a number of steps; "
            f"with device={str(device)!r} or seconds give workers=1"
        )
    steps = STEPS[name] if steps is None and seconds is None else steps
    for option, number in dict(steps=steps, workers=workers, batch=batch, seconds=seconds).items():
        if number is not None and not number >= 1:
            raise ValueError(f"{option} = {number}; expected 1 or more")
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "cuda":
        torch.set_float32_matmul_precision("high")
    stage = make_stage(name, folder, seed, clips, device, batch)  # with workers too: it caches once
    if workers == 1:
        return train(stage, folder, steps, seed, seconds)
    together(run_stage, workers, name, steps, folder, seed, clips, 1, device, batch)


def together(work, workers, *arguments):
    """Run `work(*arguments)` in several processes of one thread each that can average what they learn.

    A process that fails stops them all.
    """
    # Where the processes find one another.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    torch.multiprocessing.spawn(_join, (workers, store.port, work, arguments), workers)


def _join(rank, workers, port, work, arguments):
    # Before there is a group: functions in here have the group of their import as a default argument. An
    # optimiser imports them too, and then group and threads outlive the interpreter, which may abort it.
    import torch.distributed.nn

    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the processes are all on this machine
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=workers)
    try:
        work(*arguments)
        dist.barrier()  # nobody leaves while another still listens
    finally:
        dist.destroy_process_group()
