"""Which part causes what I see?  Sweeps over patches, with the controls beside the metric.

An effect is the difference that a patch makes.  The baseline is the identity patch (patching scores or
probs also changes the kernel), and a metric is scaled so that 0 is the run left alone and 1 the other run.
Guide: guides/tracing.md
"""

import hashlib
import itertools
import json
import os
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from .hooks import identity, noise, patch, points, transplant, zero


def recovered(value, low, high):
    """How far from low to high, (value - low) / (high - low): 0 unchanged, 1 where the other run is restored.

    Raises ValueError if low and high are the same or no numbers: then the metric does not tell the two
    runs apart.
    """
    value, low, high = float(value), float(low), float(high)
    if not np.isfinite([value, low, high]).all() or low == high:
        raise ValueError(
            f"recovered({value:g}, low={low:g}, high={high:g}): "
            "low and high must differ and all be finite numbers; "
            "choose a metric that tells the two runs apart"
        )
    return (value - low) / (high - low)


class Sweep:
    """Numbers on labelled axes: `.values` [len(axis), ...] float64, `.axes` name -> labels, `.controls`."""

    def __init__(self, values, axes, title="", controls=None):
        self.values, self.title = np.asarray(values, dtype=float), title
        self.axes = {name: list(labels) for name, labels in axes.items()}
        self.controls = controls or {}  # name -> number: what the figure is to be read against

    def at(self, **labels):
        """The number, or the Sweep over the axes left, at these labels: `grid.at(block=2, step=4)`."""
        if unknown := set(labels) - set(self.axes):
            raise ValueError(f"no axis {', '.join(sorted(unknown))}; this sweep has {', '.join(self.axes)}")
        for name, label in labels.items():
            if label not in self.axes[name]:
                swept = ", ".join(map(str, self.axes[name]))
                raise ValueError(f"{name}={label!r} was not swept; {name} has {swept}")
        axes = {name: known for name, known in self.axes.items() if name not in labels}
        index = [slice(None) if name in axes else self.axes[name].index(labels[name]) for name in self.axes]
        values = self.values[tuple(index)]
        return Sweep(values, axes, self.title, self.controls) if axes else float(values)

    def best(self):
        """The labels of the largest number: {"block": 2, "step": 4}."""
        # A metric may be NaN where it has no answer, such as the place of a thing that is not there.
        largest = np.unravel_index(np.nanargmax(self.values), self.values.shape)
        return {name: labels[i] for (name, labels), i in zip(self.axes.items(), largest)}

    def show(self, low=None, high=None):
        """A heat map of two axes, or bars of one, on white = 0; the controls stand in the title.

        -> matplotlib Figure
        """
        from .viz.charts import recovery_map

        return recovery_map(self, low, high)

    def __repr__(self):
        lines = [self.title] if self.title else []
        lines += self._grid() if self.values.ndim == 2 else self._list()
        lines += [f"{name}: {value:.4f}" for name, value in self.controls.items()]
        return "\n".join(lines)

    def _grid(self):
        (down, rows), (across, columns) = self.axes.items()
        width = max(8, *(len(str(label)) + 1 for label in columns))
        head = "".join(str(label).rjust(width) for label in columns)
        numbers = ["".join(f"{value:.3f}".rjust(width) for value in row) for row in self.values]
        return [f"{down} \\ {across}".ljust(14) + head] + [
            str(label).ljust(14) + row for label, row in zip(rows, numbers)
        ]

    def _list(self):
        cells = itertools.product(*self.axes.values())
        return [f"{dict(zip(self.axes, cell))}: {value:.4f}" for cell, value in zip(cells, self.values.flat)]


def sweep(run, *, file=None, progress=True, title="", seed=0, **axes):
    """run(block=0, step=0), run(block=0, step=4), ...: one number for every combination of labels.

    run       a function of the axes, by name, that returns a number
    file      a path: each number is written as soon as it is there, and a sweep that was interrupted goes
              on where it stopped
    axes      name=labels, any iterable of numbers or strings: block=range(4), step=range(0, 20, 4)
    ->        Sweep

    Each cell starts from its own random seed, made from `seed` and its labels, so neither order nor
    resuming changes a number. Raises ValueError (no axes, a file of another sweep), TypeError (run did not
    return a number).
    """
    axes = {
        # repr of a numpy 3 is not that of a Python 3, and the repr makes the seed; JSON takes Python's only.
        name: [label.item() if isinstance(label, (np.generic, torch.Tensor)) else label for label in labels]
        for name, labels in axes.items()
    }
    if not axes or not all(axes.values()):
        empty = ", ".join(name for name in axes if not axes[name]) or "no axis"
        raise ValueError(f"sweep needs labels on every axis, such as block=range(4); {empty} has none")
    for name, labels in axes.items():
        if odd := [label for label in labels if not isinstance(label, (str, int, float))]:
            raise TypeError(f"sweep over {name}: the label {odd[0]!r} is no number or text; give each a name")
    cells = list(itertools.product(*axes.values()))
    done = _resume(file, axes, seed) if file is not None else {}
    for cell in tqdm(cells, desc=title or "sweep", disable=not progress):
        if cell in done:
            continue
        labels = dict(zip(axes, cell))
        # The caller's own random state is left as it was.
        with torch.random.fork_rng():
            # Not hash(), which for text differs from one process to the next.
            digest = hashlib.sha256(repr((seed, labels)).encode()).digest()
            torch.manual_seed(int.from_bytes(digest[:7], "big"))
            value = run(**labels)
        try:
            done[cell] = float(value)
        except (TypeError, ValueError, RuntimeError) as wrong:  # the last is torch's, for several numbers
            said = ", ".join(f"{name}={label!r}" for name, label in labels.items())
            raise TypeError(
                f"run({said}) returned {type(value).__name__}; expected one number. "
                "Did the function forget to return?"
            ) from wrong
        if file is not None:
            _append(file, {"cell": cell, "value": done[cell]})
    values = np.array([done[cell] for cell in cells])
    return Sweep(values.reshape([len(labels) for labels in axes.values()]), axes, title)


def _append(file, line):
    try:
        with open(file, "a", encoding="utf-8") as out:
            out.write(json.dumps(line) + "\n")
            # A process that is killed, or a power cut, loses the number at hand and none before it.
            out.flush()
            os.fsync(out.fileno())
    except OSError as error:  # a full disk names no file; what is on disk so far is not lost
        raise OSError(error.errno, error.strerror, os.fspath(file)) from error


def _resume(file, axes, seed):
    """What an earlier sweep over the same axes left in the file, without a last line that a crash cut off.

    A file that holds anything else stays as it is.
    """
    head = {"axes": axes, "seed": seed}
    first_line = json.dumps(head).encode()
    data = Path(file).read_bytes() if os.path.exists(file) else b""
    *lines, cut = data.split(b"\n")  # the last is empty, or what a crash left of a line
    is_new = not lines and first_line.startswith(cut)
    try:
        first, *numbers = [json.loads(line) for line in ([first_line] if is_new else lines)]
        # Compared as JSON gives it back, in which a tuple has become a list.
        if first == json.loads(first_line):
            done = {tuple(line["cell"]): float(line["value"]) for line in numbers}
            if cut:
                # Whatever is appended next would else go on in the middle of the line that was cut off.
                os.truncate(file, len(data) - len(cut))
            if is_new:
                _append(file, head)
            return done
        held = f"another sweep, over {first['axes']}"
    except (ValueError, KeyError, TypeError):  # not JSON, or other JSON
        held = "something else"
    raise ValueError(f"{file} holds {held}; this one is over {axes} with seed {seed}. Give it its own file")


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
    """Activation patching: one value of another run is put here; how much of its result comes back?

    model    what the run runs, such as pipe.dit, or the pipeline itself (then
             tap="dit.blocks.{block}.resid_post")
    run      () -> the run to be changed, all else fixed: `lambda: pipe("a blue square", seed=0)`
    record   capture of the other run at those taps, steps and branch
    metric   result of run -> number;  high: the metric of the other run
    steps    which steps;  blocks: by default all of them;  tokens: a part of the video only, as
             pipe.region gives
    ->       Sweep over block and step, of recovered(): 0 unchanged, 1 the other run.
             `.controls`: what the identity patch (must be 0) and noise of equal size at the best
             cell (should not help) recover
    """
    blocks = blocks_of(model, tap, blocks)
    part = {} if tokens is None else {"tokens": tokens}
    steps = list(steps)

    # One run under one patch; the map is many of these, the baseline and the control one each.
    def under(edit, block, at_steps):
        with patch(model, tap.format(block=block), edit, steps=at_steps, branch=branch):
            return metric(run())

    # The identity patch makes the baseline; `plain` shows how little that patch itself does.
    plain = float(metric(run()))
    low = float(under(identity, blocks[0], steps))
    effects = sweep(
        lambda block, step: recovered(under(transplant(record, **part), block, [step]), low, high),
        block=blocks,
        step=steps,
        file=file,
        progress=progress,
        title=f"recovered by {tap.replace('{block}', '*')}",
    )
    best = effects.best()
    effects.controls = {
        "identity": recovered(plain, low, high),
        "noise": recovered(under(noise(**part), best["block"], [best["step"]]), low, high),
    }
    return effects


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
    """What each head contributes: the metric without the head, minus that under the identity patch.

    heads    how many, or which;  edit: a maker of edits by axis name, such as zero or partial(mean_over,
             "tokens")
    run      () -> a result;  metric: result -> number
    ->       Sweep over block and head: negative where the head was needed.  `.controls`: the baseline itself
    """
    blocks = blocks_of(model, tap, blocks)
    heads = range(heads) if isinstance(heads, int) else heads

    def under(change, block):
        with patch(model, tap.format(block=block), change, steps=steps, branch=branch):
            return float(metric(run()))

    # Under the identity patch, so that only the head differs and not how attention is computed.
    baseline = under(identity, blocks[0])
    effects = sweep(
        lambda block, head: under(edit(heads=head), block) - baseline,
        block=blocks,
        head=heads,
        file=file,
        progress=progress,
        title=f"metric without a head of {tap.replace('{block}', '*')}, minus with all",
    )
    effects.controls = {"baseline": baseline}
    return effects


def blocks_of(model, tap, blocks=None):
    """The numbers of the blocks that have such a tap; or those asked for, if there are any."""
    if blocks is None:
        # A tap outside the blocks has no number, and a pattern such as * may hit one.
        hits = points(model, tap.replace("{block}", "*"))
        blocks = sorted({where.block for where in hits if where.block is not None})
    if not list(blocks):
        raise ValueError(f"there are no blocks to patch at {tap}; leave blocks= out, or name some")
    return list(blocks)
