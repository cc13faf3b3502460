"""How do numbers become a chart?  Curves, bars and heat maps."""

from collections.abc import Mapping
from fnmatch import fnmatchcase

import numpy as np
import torch

from ..hooks import Record, in_words
from .canvas import COLOURS, INK, MARKS, dress, figure, heat_figure, label_columns, numbers, sheet

# ---- curves -----------------------------------------------------------------------------------------------


def curves(named, title, x, y, log="", falling=False):
    """Several curves in one picture, for an idea that has no figure of its own.

    named    {name: {x: y}}; up to 40 points are marked, more are drawn as a line alone
    title, x, y   what is shown, and the words of the axes;  log: "x", "y" or "xy"
    falling  x runs from large to small, as sigma does
    """
    ax = _lines(named, log)
    if "x" not in log and all(float(at).is_integer() for line in named.values() for at in line):
        ax.xaxis.get_major_locator().set_params(integer=True)  # there is no step 2.5
    if falling:
        ax.invert_xaxis()
    return dress(ax, title, x, y, lines=True, legend=len(named) > 1).figure


def _lines(named, log=""):
    """{name: {x: y}} as labelled lines of a new figure.   -> its axes"""
    if not isinstance(named, Mapping) or not named:
        raise ValueError(f"{str(named)[:80]} arrived to be drawn as curves; expected {{name: {{x: y}}}}")
    _, ax = figure(size=(5.6, 3.0))
    for i, (name, line) in enumerate(named.items()):
        points = np.array([*line.items()], dtype=float) if isinstance(line, Mapping) else np.zeros(0)
        if not points.size or not np.isfinite(points).all():
            raise ValueError(
                f"{name}: expected {{x: y}} with at least one point and finite numbers, got {str(line)[:80]}"
            )
        if any(points[:, "xy".index(axis)].min() <= 0 for axis in log):
            raise ValueError(
                f"{name} holds numbers of 0 or less, which have no place on a logarithmic axis; "
                "leave them out, or log='' for straight axes"
            )
        mark = MARKS[i % len(MARKS)] if len(points) <= 40 else None
        look = {"marker": mark, "markersize": 3.5, "linewidth": 1.3, "color": COLOURS[i % len(COLOURS)]}
        ax.plot(points[:, 0], points[:, 1], label=name, **look)
    ax.set(**{f"{axis}scale": "log" for axis in log})
    return ax


def schedule_plot(*schedules, **named):
    """Where a run stops on its way from noise to data.

    schedules  flow.Schedule objects, labelled by their shift and grid
    named      label=Schedule or label=[sigmas]
    """
    plans = {f"shift {one.shift:g}, {one.grid}": one for one in schedules if hasattr(one, "sigmas")}
    plans |= {name.replace("_", " "): one for name, one in named.items()}
    if not plans or not all(hasattr(one, "sigmas") for one in schedules):
        raise ValueError(
            "schedule_plot has nothing to draw; give it schedules: "
            "schedule_plot(schedule(20, shift=1), schedule(20, shift=5)), and lists of sigmas by name"
        )
    levels = {
        name: numbers(getattr(one, "sigmas", one), f"schedule {name!r}", "steps")
        for name, one in plans.items()
    }
    ax = _lines({name: dict(enumerate(sigmas)) for name, sigmas in levels.items()})
    ax.xaxis.get_major_locator().set_params(integer=True)
    return dress(
        ax,
        "Noise level at each step: how long a run stays in the noise",
        "step",
        "sigma (1 noise, 0 data)",
        lines=True,
        legend=True,
    ).figure


def error_vs_steps(errors):
    """How fast each solver comes to the truth: error against steps, both logarithmic.

    errors  {solver: {steps: error}};  a slope of 2 means half the step, a quarter of the error
    """
    lines = {}
    for name, of_steps in errors.items():
        steps, values = zip(*sorted(of_steps.items())) if of_steps else ((), ())
        if len(steps) < 2 or min(values) <= 0 or min(steps) < 1:
            raise ValueError(
                f"{name}: {of_steps}; expected {{steps: error}} with two or more steps, "
                "and every error above 0, since the axes are logarithmic"
            )
        # A power law is a straight line on two logarithmic axes, and its slope the order of the solver.
        slope = -np.polyfit(np.log(steps), np.log(values), 1)[0]
        lines[f"{name}: slope {slope:.1f}"] = dict(zip(steps, values))
    ax = _lines(lines, "xy")
    ticks = sorted({steps for line in lines.values() for steps in line})
    ax.set_xticks(ticks, ticks)
    # A logarithmic axis brings ticks of its own between ours, which nobody measured.
    ax.set_xticks([], minor=True)
    return dress(
        ax,
        "Error against steps: the slope is the order of the solver",
        "steps (log)",
        "error (log)",
        lines=True,
        legend=True,
    ).figure


# ---- bars -------------------------------------------------------------------------------------------------


def bars(sizes, title="Memory"):
    """Bytes side by side, with their sizes in words.

    sizes  {label: bytes}, or {label: {"weights": bytes, "working": bytes}} for stacked bars; or what
           moddiff.weights.inspect returned
    """
    if forecast := getattr(sizes, "forecast", None):
        title = "{}: memory for {} frames of {} x {}".format(
            sizes.name, forecast["frames"], *forecast["size"]
        )
        sizes = forecast["parts"]
    pairs = sizes.items() if isinstance(sizes, Mapping) else ()
    rows = {label: value if isinstance(value, Mapping) else {"": value} for label, value in pairs}
    if not rows or not all(value >= 0 for row in rows.values() for value in row.values()):
        raise ValueError(f"bars of {sizes!r}; expected {{label: bytes}} with every number 0 or more")
    kinds = list(dict.fromkeys(kind for row in rows.values() for kind in row))
    sums = [sum(row.values()) for row in rows.values()]
    units = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("bytes", 1))
    unit, divisor = next((pair for pair in units if max(sums) >= pair[1]), units[-1])
    _, ax = figure(size=(5.6, 0.9 + 0.34 * len(rows)))
    table = np.array([[row.get(kind, 0) for row in rows.values()] for kind in kinds]) / divisor
    for i, (kind, widths, ends) in enumerate(zip(kinds, table, table.cumsum(0))):
        look = {"height": 0.65, "color": COLOURS[i % len(COLOURS)], "label": kind}
        drawn = ax.barh(range(len(rows)), widths, left=ends - widths, **look)
    # The last kind drawn ends where the whole bar does; the words behind it need a fifth of the width.
    ax.bar_label(drawn, [in_words(round(total)) for total in sums], padding=3, fontsize=8, color=INK)
    ax.set_yticks(range(len(rows)), list(map(str, rows)))
    ax.set_xlim(0, max(sums) / divisor * 1.18 or 1)
    ax.invert_yaxis()
    return dress(ax, title, unit, legend=kinds != [""]).figure


# ---- heat maps --------------------------------------------------------------------------------------------


def heat_map(values, rows, columns, title, x, y, bar, signed=False):
    """A grid of numbers as colours, for an idea that has no figure of its own.

    values   [rows, columns];  rows, columns: the labels of its lines
    x, y, bar   the words of the axes and of the colours;  signed: white is 0
    """
    values = numbers(values, "values", "rows columns")
    rows, columns = list(rows), list(columns)
    if values.shape != (len(rows), len(columns)):
        raise ValueError(
            f"values {list(values.shape)} for {len(rows)} rows and {len(columns)} columns; "
            "expected one label for each line"
        )
    return heat_figure(values, rows, columns, title, x, y, bar, signed=signed)


def distances(vectors, labels, what="prompt"):
    """How far apart prompts, or words, are: the cosine distance between their mean vectors.

    0 is the same direction, 1 unrelated.
    vectors  one per label: [l, d] as text.encode gives, or [d]
    what     what a label names, for the title and the axes
    """
    vectors, labels = list(vectors), list(labels)
    means = [
        numbers(v, f"the vectors of {label!r}", "l d", "d").reshape(-1, np.shape(v)[-1]).mean(0)
        for v, label in zip(vectors, labels)
    ]
    if len(vectors) != len(labels) or len({mean.shape for mean in means}) != 1:
        raise ValueError(
            f"{len(vectors)} vectors and {len(labels)} labels, "
            f"of widths {sorted({len(mean) for mean in means})}; expected one label for each, and one width"
        )
    unit = np.stack(means)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True).clip(1e-12)
    apart = (1 - unit @ unit.T).clip(0)  # [k, k]
    side = 2.0 + 0.42 * len(labels)
    return heat_figure(
        apart,
        labels,
        labels,
        f"Distance between {what}s, as the encoder hears them",
        what,
        what,
        "cosine distance",
        size=(side + 1.4, side),
        low=0,
        colours="viridis_r",
    )


def head_grid(values, title="", what="value", signed=False):
    """One number, or one small map, for every block and head.

    values  [block, heads] numbers, or [block, heads, h, w] maps, each map on a scale of its own
    what    what the numbers are, for the colour bar
    """
    values = numbers(values, "values", "block heads", "block heads h w")
    blocks, heads = values.shape[:2]
    if values.ndim == 2:
        labels = range(blocks), range(heads)
        return heat_map(values, *labels, title or f"{what} of each head", "head", "block", what, signed)
    tiles = values / np.abs(values).max((2, 3), keepdims=True).clip(1e-12)
    colours, low = ("RdBu", -1) if signed else ("viridis", 0)
    image, _ = sheet(tiles, range(blocks), range(heads), 0.62, left=1.2, cmap=colours, vmin=low, vmax=1)
    title = title or f"{what} of each head, each map on its own scale"
    return dress(image.axes, title, "head", "block").figure


def recovery_map(sweep, low=None, high=None):
    """A sweep over two axes as a heat map, or over one as bars.

    Blue is 1, what the other run has; white is 0, nothing changed.

    sweep  a tracing.Sweep; its controls stand below the title;  low, high: the ends of the colours
    """
    if not hasattr(sweep, "axes") or not hasattr(sweep, "controls"):
        raise TypeError(f"recovery_map of {type(sweep).__name__}; expected a Sweep, as tracing.sweep gives")
    names = list(sweep.axes)
    if len(names) not in (1, 2):
        raise ValueError(
            f"a picture has one or two axes, this sweep has {len(names)}; "
            f"pick with .at({next(iter(names), 'axis')}=...)"
        )
    controls = ", ".join(f"{name} {value:z.2f}" for name, value in sweep.controls.items())
    title = (sweep.title or "sweep") + (f"\ncontrols: {controls}" if controls else "")
    values = np.asarray(sweep.values, dtype=float)
    if len(names) == 1:
        _, ax = figure(size=(max(3.2, 1.4 + 0.45 * values.size), 2.4))
        ax.bar(range(values.size), values, color=COLOURS[0])
        ax.axhline(0, color=INK, linewidth=0.8)
        label_columns(ax, sweep.axes[names[0]])
        return dress(ax, title, names[0], "value").figure
    bar = "recovered (1: the other run)" if "recover" in title else "value"
    ends = {"signed": True} if low is None and high is None else {"low": low, "high": high}
    return heat_figure(values, *sweep.axes.values(), title, *reversed(names), bar, colours="RdBu", **ends)


# ---- the residual stream ----------------------------------------------------------------------------------

# Who writes between two taps of a block: with cross-attention in it, and without.
WRITERS = {
    "self-attention": ("resid_pre", "resid_mid"),
    "cross-attention": ("resid_mid", "resid_cross"),
    "feed-forward": ("resid_cross", "resid_post"),
}
TWO_WRITERS = {"attention": ("resid_pre", "resid_mid"), "feed-forward": ("resid_mid", "resid_post")}


def residual_norms(seen):
    """How long the residual stream is after each block, and how much each sublayer wrote into it.

    seen  Record of a capture of "blocks.*.resid_*" (with only resid_post, the stream alone); values are
          averaged over steps, branches and tokens, as root mean squares per channel
    """
    stream, writes = norms_of(seen)
    _, ax = figure(size=(5.6, 2.8))
    blocks = list(stream)
    for i, (name, sizes) in enumerate(writes.items()):
        width = 0.8 / len(writes)
        left = np.arange(len(blocks)) + (i + 0.5) * width - 0.4
        ax.bar(left, list(sizes.values()), width * 0.9, color=COLOURS[i], label=f"written by {name}")
    label = "the stream after the block"
    ax.plot(range(len(blocks)), list(stream.values()), "o-k", markersize=3.5, linewidth=1.3, label=label)
    ax.set_xticks(range(len(blocks)), blocks)
    ax.set_ylim(0)
    return dress(
        ax,
        "The residual stream, and what each block writes into it",
        "block",
        "size (root mean square)",
        lines=True,
        legend=True,
    ).figure


def norms_of(seen):
    """Sizes from a Record of streams.   -> {block: the stream's}, {writer: {block: what it wrote}}"""
    held = by_block(seen, "resid_*", "resid_post")
    blocks = sorted(block for block, name in held if name == "resid_post")
    names = {name for _, name in held}
    writes = {
        writer: {block: _size(map(torch.sub, held[block, after], held[block, before])) for block in blocks}
        for writer, (before, after) in (WRITERS if "resid_cross" in names else TWO_WRITERS).items()
        if {before, after} <= names
    }
    return {block: _size(held[block, "resid_post"]) for block in blocks}, writes


def by_block(seen, names, needed):
    """What a Record holds of some taps of blocks.   -> {(block, name): values of all steps and branches}

    names  a pattern;  needed: the one among them that must be there
    """
    if not isinstance(seen, Record):
        raise TypeError(
            f"expected the Record of a capture, got {type(seen).__name__}: "
            f'with capture(dit, "blocks.*.{names}") as seen: ...'
        )
    held = {}
    for where, value in seen:
        if where.block is not None and fnmatchcase(where.name, names):
            held.setdefault((where.block, where.name), []).append(value.float())
    if not any(name == needed for _, name in held):
        raise ValueError(
            f"no {needed} in this record; it holds {', '.join(seen.names[:6]) or 'nothing'}. "
            f'Capture "blocks.*.{names}"'
        )
    return held


def _size(values):
    """The mean over tensors of their root mean squares."""
    return float(np.mean([value.square().mean().sqrt().item() for value in values]))
