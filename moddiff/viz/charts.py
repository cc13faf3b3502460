"""How do numbers become a chart?  Curves, bars and heat maps."""

import csv

import numpy as np

from ..hooks import Record, in_words
from .canvas import COLOURS, INK, dress, figure, heat, mosaic, numbers, place_tiles, readable

# ---- curves -----------------------------------------------------------------------------------------------------------


def schedule_plot(*schedules, **named):
    """Where a run stops on its way from noise to data.

    schedules  flow.Schedule objects, labelled by their shift and grid;  named: label=Schedule or label=[sigmas]
    """
    curves = {f"shift {one.shift:g}, {one.grid}": one for one in schedules} | {
        name.replace("_", " "): one for name, one in named.items()
    }
    if not curves:
        raise ValueError(
            "schedule_plot has nothing to draw; give it schedules: schedule_plot(schedule(20, shift=1), schedule(20, shift=5))"
        )
    drawn, ax = figure()
    for (name, one), colour, mark in zip(curves.items(), COLOURS * len(curves), "os^Dvxp" * len(curves)):
        sigmas = numbers(getattr(one, "sigmas", one), f"schedule {name!r}", "steps")
        ax.plot(
            range(len(sigmas)), sigmas, marker=mark, markersize=3.5, linewidth=1.3, color=colour, label=name
        )
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.legend(loc="best", fontsize=8, frameon=False)
    dress(
        ax,
        "Noise level at each step: how long a run stays in the noise",
        "step",
        "sigma (1 noise, 0 data)",
        lines=True,
    )
    return drawn


def error_vs_steps(errors):
    """How fast each solver comes to the truth: error against steps, both logarithmic; a slope of 2 means half the step, a quarter of the error.

    errors  {solver: {steps: error}}
    """
    drawn, ax = figure(size=(5.6, 3.2))
    for (name, found), colour, mark in zip(errors.items(), COLOURS * len(errors), "os^Dvxp" * len(errors)):
        steps, values = zip(*sorted(found.items())) if found else ((), ())
        if len(steps) < 2 or min(values) <= 0 or min(steps) < 1:
            raise ValueError(
                f"{name}: {dict(found)}; expected {{steps: error}} with two or more steps, and every error above 0, "
                "since the axes are logarithmic"
            )
        slope = -np.polyfit(np.log(steps), np.log(values), 1)[0]
        ax.loglog(
            steps,
            values,
            marker=mark,
            markersize=4,
            linewidth=1.3,
            color=colour,
            label=f"{name}: slope {slope:.1f}",
        )
    ticks = sorted({steps for found in errors.values() for steps in found})
    ax.set_xticks(ticks, ticks)
    ax.set_xticks([], minor=True)
    ax.legend(loc="best", fontsize=8, frameon=False)
    return dress(
        ax,
        "Error against steps: the slope is the order of the solver",
        "steps (log)",
        "error (log)",
        lines=True,
    ).figure


def curves(named, title, x, y, log="", falling=False):
    """Several curves in one picture, for an idea that has no figure of its own.

    named    {name: {x: y}}; up to 40 points are marked, more are drawn as a line alone
    title, x, y   what is shown, and the words of the axes;  log: "x", "y" or "xy";  falling: x runs from large to small, as sigma does
    """
    drawn, ax = figure(size=(5.6, 3.0))
    for (name, found), colour, mark in zip(named.items(), COLOURS * len(named), "os^Dvxp" * len(named)):
        if not found or not np.isfinite([*map(float, found), *map(float, found.values())]).all():
            raise ValueError(
                f"{name}: expected {{x: y}} with at least one point and finite numbers, got {str(found)[:80]}"
            )
        points = [*map(float, found)], [*map(float, found.values())]
        ax.plot(
            *points,
            marker=mark if len(found) <= 40 else None,
            markersize=3.5,
            linewidth=1.3,
            color=colour,
            label=name,
        )
    for axis, scale in (("x", ax.set_xscale), ("y", ax.set_yscale)):
        if axis in log:
            scale("log")
    if falling:
        ax.invert_xaxis()
    if len(named) > 1:
        ax.legend(loc="best", fontsize=8, frameon=False)
    return dress(ax, title, x, y, lines=True).figure


def loss_curve(path, figures=None):
    """The log of a training run: `step, seconds, figure, value`, as `moddiff train-tiny` writes it.

    figures  which of the logged figures; None: all.  Each has its own panel, since their sizes differ
    """
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if not {"step", "figure", "value"} <= set(reader.fieldnames or ()):
            raise ValueError(
                f"{path} has the columns {', '.join(reader.fieldnames or ['none'])}; expected step, seconds, figure, value"
            )
        curves = {}
        for row in reader:
            curves.setdefault(row["figure"], []).append((int(row["step"]), float(row["value"])))
    lost = set(figures or ()) - set(curves)
    if lost or not curves:
        raise ValueError(
            f"{path} has no {', '.join(sorted(lost)) or 'rows'}; it logs {', '.join(curves) or 'nothing yet'}"
        )
    chosen = list(figures or curves)
    drawn, axes = figure(1, len(chosen), size=(max(3.4, 2.6 * len(chosen)), 2.6), squeeze=False)
    for ax, name, colour in zip(axes[0], chosen, COLOURS * len(chosen)):
        steps, values = zip(*curves[name])
        ax.plot(steps, values, color=colour, linewidth=1.3)
        if min(values) > 0 and max(values) > 20 * min(values):
            ax.set_yscale("log")
        dress(ax, f"{name}: {values[-1]:.3g} at the end", "training step", name, lines=True)
    return drawn


# ---- bars -------------------------------------------------------------------------------------------------------------


def bars(sizes, title="Memory"):
    """Bytes side by side, with their sizes in words.

    sizes  {label: bytes}, or {label: {"weights": bytes, "working": bytes}} for stacked bars; or what moddiff.weights.inspect returned
    """
    cast = getattr(sizes, "forecast", None)
    if cast is not None:
        title = f"{sizes.name}: memory for {cast['frames']} frames of {cast['size'][0]} x {cast['size'][1]}"
        sizes = cast["parts"]
    rows = {label: value if isinstance(value, dict) else {"": value} for label, value in sizes.items()}
    kinds = list(dict.fromkeys(kind for row in rows.values() for kind in row))
    if not rows or any(value < 0 for row in rows.values() for value in row.values()):
        raise ValueError(f"bars of {sizes!r}; expected {{label: bytes}} with every number 0 or more")
    drawn, ax = figure(size=(5.6, 0.9 + 0.34 * len(rows)))
    start, most = np.zeros(len(rows)), max(sum(row.values()) for row in rows.values())
    unit, divisor = next(
        ((name, size) for name, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if most >= size), ("bytes", 1)
    )
    for kind, colour in zip(kinds, COLOURS):
        widths = np.array([row.get(kind, 0) for row in rows.values()]) / divisor
        ax.barh(range(len(rows)), widths, left=start, height=0.65, color=colour, label=kind)
        start = start + widths
    for i, row in enumerate(rows.values()):
        ax.text(start[i], i, " " + in_words(round(sum(row.values()))), va="center", fontsize=8, color=INK)
    ax.set_yticks(range(len(rows)), list(rows))
    ax.set_xlim(0, most / divisor * 1.18 or 1)
    ax.invert_yaxis()
    if kinds != [""]:
        ax.legend(loc="best", fontsize=8, frameon=False)
    dress(ax, title, unit)
    return drawn


# ---- heat maps --------------------------------------------------------------------------------------------------------


def distances(vectors, labels):
    """How far apart prompts are: the cosine distance between their mean vectors; 0 is the same direction, 1 unrelated.

    vectors  one per label: [l, d] as text.encode gives, or [d]
    """
    means = [
        numbers(v, f"the vectors of {label!r}", "l d", "d").reshape(-1, np.shape(v)[-1]).mean(0)
        for v, label in zip(vectors, labels)
    ]
    if len(vectors) != len(labels) or len({mean.shape for mean in means}) != 1:
        raise ValueError(
            f"{len(vectors)} vectors and {len(labels)} labels, of widths {sorted({mean.shape[-1] for mean in means})}; "
            "expected one label for each, and one width"
        )
    unit = np.stack(means)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True).clip(1e-12)
    apart = (1 - unit @ unit.T).clip(0)  # [k, k]
    side = 2.0 + 0.42 * len(labels)
    drawn, ax = figure(size=(side + 1.4, side))
    names = readable(labels)
    heat(ax, apart, names, names, low=0, colours="viridis_r", bar="cosine distance")
    ax.set_xticks(range(len(names)), names, rotation=35, ha="right", rotation_mode="anchor")
    dress(ax, "Distance between prompts, as the encoder hears them")
    return drawn


def heat_map(values, rows, columns, title, x, y, bar, signed=False):
    """A grid of numbers as colours, for an idea that has no figure of its own.

    values   [rows, columns];  rows, columns: the labels of its lines;  x, y, bar: the words of the axes and of the colours;  signed: white is 0
    """
    values, rows, columns = (
        numbers(values, "values", "rows columns"),
        list(map(str, rows)),
        list(map(str, columns)),
    )
    if values.shape != (len(rows), len(columns)):
        raise ValueError(
            f"values {list(values.shape)} for {len(rows)} rows and {len(columns)} columns; expected one label for each line"
        )
    drawn, ax = figure(
        size=(min(8.0, max(3.6, 2.2 + 0.42 * len(columns))), min(6.0, max(2.0, 1.2 + 0.3 * len(rows))))
    )
    heat(ax, values, rows, columns, signed=signed, bar=bar)
    return dress(ax, title, x, y).figure


def head_grid(values, title="", what="value", signed=False):
    """One number, or one small map, for every block and head.

    values  [block, heads] numbers, or [block, heads, h, w] maps, each map on a scale of its own
    what    what the numbers are, for the colour bar
    """
    values = numbers(values, "values", "block heads", "block heads h w")
    blocks, heads = values.shape[:2]
    labels = [str(i) for i in range(heads)], [str(i) for i in range(blocks)]
    if values.ndim == 2:
        drawn, ax = figure(size=(2.2 + 0.42 * heads, 1.0 + 0.3 * blocks))
        heat(ax, values, labels[1], labels[0], signed=signed, bar=what)
        dress(ax, title or f"{what} of each head", "head", "block")
        return drawn
    tiles = values / np.abs(values).max((2, 3), keepdims=True).clip(1e-12)
    drawn, ax = figure(size=(1.2 + 0.62 * heads, 0.9 + 0.62 * blocks * values.shape[2] / values.shape[3]))
    picture, places = mosaic(tiles)
    ax.imshow(
        picture,
        cmap="RdBu" if signed else "viridis",
        vmin=-1 if signed else 0,
        vmax=1,
        interpolation="nearest",
    )
    place_tiles(ax, places, labels[1], labels[0])
    dress(ax, title or f"{what} of each head, each map on its own scale", "head", "block")
    return drawn


WRITERS = (
    ("self-attention", "resid_pre", "resid_mid"),
    ("cross-attention", "resid_mid", "resid_cross"),
    ("feed-forward", "resid_cross", "resid_post"),
    ("attention", "resid_pre", "resid_mid"),
    ("feed-forward", "resid_mid", "resid_post"),
)


def residual_norms(seen):
    """How long the residual stream is after each block, and how much each sublayer wrote into it.

    seen  Record of a capture of "blocks.*.resid_*" (with only resid_post, the stream alone); values are averaged over steps, branches and
          tokens, as root mean squares per channel
    """
    stream, writes = norms_of(seen)
    drawn, ax = figure(size=(5.6, 2.8))
    blocks = sorted(stream)
    for i, (name, found) in enumerate(writes.items()):
        width = 0.8 / len(writes)
        places = np.arange(len(blocks)) + (i + 0.5) * width - 0.4
        ax.bar(
            places,
            [found[block] for block in blocks],
            width * 0.9,
            color=COLOURS[i],
            label=f"written by {name}",
        )
    ax.plot(
        range(len(blocks)),
        [stream[block] for block in blocks],
        "o-k",
        markersize=3.5,
        linewidth=1.3,
        label="the stream after the block",
    )
    ax.set_xticks(range(len(blocks)), blocks)
    ax.set_ylim(0)
    ax.legend(loc="best", fontsize=8, frameon=False)
    dress(
        ax,
        "The residual stream, and what each block writes into it",
        "block",
        "size (root mean square)",
        lines=True,
    )
    return drawn


def norms_of(seen):
    """({block: size of the stream after it}, {writer: {block: size of what it wrote}}) of a Record of residual streams."""
    if not isinstance(seen, Record):
        raise TypeError(
            f'expected the Record of a capture, got {type(seen).__name__}: with capture(dit, "blocks.*.resid_*") as seen: ...'
        )
    held = {}
    for where, value in seen:
        if where.name.startswith("resid_") and where.block is not None:
            held.setdefault((where.block, where.name), []).append(value.float())
    size = lambda values: float(np.mean([value.square().mean().sqrt().item() for value in values]))
    blocks = sorted({block for block, name in held if name == "resid_post"})
    if not blocks:
        raise ValueError(
            f'no resid_post in this record; it holds {", ".join(seen.names[:6]) or "nothing"}. Capture "blocks.*.resid_*"'
        )
    names = {name for _, name in held}
    chosen = [w for w in (WRITERS[:3] if "resid_cross" in names else WRITERS[3:]) if {w[1], w[2]} <= names]
    writes = {
        writer: {
            block: size([b - a for a, b in zip(held[block, before], held[block, after])]) for block in blocks
        }
        for writer, before, after in chosen
    }
    return {block: size(held[block, "resid_post"]) for block in blocks}, writes


def recovery_map(found, low=None, high=None):
    """A sweep over two axes as a heat map, or over one as bars: blue is 1, what the other run has; white 0, nothing changed.

    found  a tracing.Sweep; its controls stand below the title
    """
    names = list(found.axes)
    labels = [[str(label) for label in found.axes[name]] for name in names]
    controls = ", ".join(f"{name} {value:.2f}" for name, value in found.controls.items())
    title = (found.title or "sweep") + (f"\ncontrols: {controls}" if controls else "")
    if len(names) not in (1, 2):
        raise ValueError(
            f"a picture has one or two axes, this sweep has {len(names)}; pick with .at({next(iter(names), 'axis')}=...)"
        )
    values = np.asarray(found.values, dtype=float)
    if len(names) == 1:
        drawn, ax = figure(size=(max(3.2, 1.4 + 0.45 * values.size), 2.4))
        ax.bar(range(values.size), values, color=COLOURS[0])
        ax.axhline(0, color=INK, linewidth=0.8)
        ax.set_xticks(range(values.size), labels[0])
        dress(ax, title, names[0], "value")
        return drawn
    drawn, ax = figure(size=(max(3.6, 2.2 + 0.42 * values.shape[1]), max(2.0, 1.2 + 0.3 * values.shape[0])))
    image = heat(
        ax,
        values,
        labels[0],
        labels[1],
        signed=True,
        bar="recovered (1: the other run)" if "recover" in title else "value",
    )
    if low is not None or high is not None:
        image.set_clim(low, high)
    dress(ax, title, names[1], names[0])
    return drawn
