"""Which way does it point?  Positions as hands of clocks, guidance as arrows, a run as a path to data."""

import numpy as np
import torch

from ..rope import axis_pairs, clock_speeds
from .canvas import BARE, COLOURS, arrow, dress, entitle, figure

# ---- rotary positions -------------------------------------------------------------------------------------

CLOCKS = ("frame", "height", "width")
HAND, OTHER_HAND = ("-", 1.7, "full"), ((0, (2, 1.5)), 1.2, "none")  # line, its width, how its tip is filled


def rope_clocks(position, d, other=None):
    """The three clocks of a token: on each, a hand per channel pair, turned by its position.   -> Figure

    position  (frame, row, column);  d: width of a head
    other     a second token, drawn dashed: scores see only the angles between the two
    The longest hand turns fastest.
    """
    tokens = [position] if other is None else [position, other]
    for one in tokens:
        if np.ndim(one) != 1 or len(one) != 3:
            raise ValueError(f"position={one}; expected (frame, row, column)")
    round_face = {"aspect": "equal", "xlim": (-1.1, 1.1), "ylim": (-1.1, 1.1)} | BARE
    drawn, axes = figure(1, 3, size=(6.6, 2.9), subplot_kw=round_face)
    turn = np.linspace(0, 2 * np.pi, 100)
    for axis, (ax, name, pairs) in enumerate(zip(axes, CLOCKS, axis_pairs(d))):
        ax.plot(np.cos(turn), np.sin(turn), color="#BBBBBB", linewidth=1)
        for j, speed in enumerate(clock_speeds(pairs).tolist()):
            length, colour = 0.95 - 0.6 * j / max(pairs - 1, 1), COLOURS[j % 6]
            for token, (line, width, fill) in zip(tokens, (HAND, OTHER_HAND)):
                angle = token[axis] * speed
                tip = {"marker": "o", "markersize": 3.4, "markevery": [1], "fillstyle": fill}
                look = {"color": colour, "linewidth": width, "linestyle": line}
                ax.plot([0, length * np.sin(angle)], [0, length * np.cos(angle)], **look, **tip)
        dashed = "" if other is None else f", dashed {other[axis]}"
        dress(ax, f"{name} clock", f"position {position[axis]}{dashed}; {pairs} hands")
    entitle(drawn, "Where a token is: a hand for each pair of channels, the longest turns fastest")
    return drawn


def score_by_offset(d, far=16):
    """How the score of two tokens falls with the distance between them, along each axis; 1 at distance 0.

    d  width of a head, in which each channel pair counts alike;  far: largest offset
    """
    offsets, pairs = torch.arange(-far, far + 1, dtype=torch.float64), axis_pairs(d)
    _, ax = figure()
    # Axes with equally many pairs have one curve: the second is drawn wide and the third dashed.
    for i, (mark, size, width) in enumerate((("o-", 3, 1.3), ("s-", 5, 2.6), ("^--", 2.5, 1.2))):
        # Two equal pairs, turned apart by an angle, score its cosine; those of the other axes do not turn.
        turned = torch.outer(offsets, clock_speeds(pairs[i])).cos().sum(1)  # [offsets]
        score = (turned + sum(pairs) - pairs[i]) / sum(pairs)
        look = {"markersize": size, "linewidth": width, "color": COLOURS[i]}
        ax.plot(offsets, score, mark, label=f"{CLOCKS[i]} ({pairs[i]} pairs)", **look)
    return dress(
        ax,
        "Score against offset: position alone, same content",
        "offset between the two tokens",
        "score, 1 at offset 0",
        lines=True,
        legend=True,
    ).figure


# ---- arrows -----------------------------------------------------------------------------------------------


def in_plane(*vectors):
    """Vectors in the plane of the first two; the first lies along x and has length 1.   -> [(x, y)]"""
    flat = [torch.as_tensor(v).detach().double().cpu().flatten() for v in vectors]
    if len({len(v) for v in flat}) != 1:
        shapes = ", ".join(str(list(np.shape(v))) for v in vectors)
        raise ValueError(f"arrows of {shapes} numbers cannot lie in one plane; expected equal shapes")
    long = flat[0].norm()
    if long == 0 or not all(v.isfinite().all() for v in flat):
        wrong = "the first arrow has length 0" if long == 0 else "an arrow holds NaN or infinity"
        raise ValueError(f"{wrong}, so it points nowhere; is the model's output all zeros, or out of range?")
    across = flat[1] - flat[0] * (flat[0] @ flat[1]) / long**2
    side = across / across.norm() if across.norm() > 1e-12 * long else torch.zeros_like(across)
    return [(float(v @ flat[0] / long**2), float(v @ side / long)) for v in flat]


def guidance_arrows(cond, uncond, scales=(1, 3, 5)):
    """Guidance as arrows: from the velocity without the prompt, through the one with it, and beyond.

    cond, uncond  velocities of one shape, drawn in the plane they span, with their true angle and lengths
    """
    without, within = map(np.array, in_plane(uncond, cond))
    tips = {scale: without + scale * (within - without) for scale in scales}
    _, ax = figure(size=(5.2, 3.0))
    for tip, name, colour in (
        (without, "uncond, scale 0", COLOURS[0]),
        (within, "cond, scale 1", COLOURS[2]),
    ):
        arrow(ax, (0, 0), tip, colour=colour, width=2)
        ax.plot([], [], color=colour, linewidth=2, label=name)
    ax.plot(*zip(without, *tips.values()), "--", color="#999999", linewidth=1)
    for scale, tip in tips.items():
        if scale != 1:
            arrow(ax, (0, 0), tip, colour=COLOURS[5], width=1.3)
            ax.annotate(f" scale {scale:g}", tip, va="bottom", fontsize=8, color=COLOURS[5])
    ax.plot(*zip((0, 0), without, within, *tips.values()), linestyle="none")  # arrows do not stretch the axes
    ax.margins(0.15)
    ax.set_aspect("equal", adjustable="datalim")
    return dress(
        ax,
        "Guidance: start without the prompt, go beyond with it",
        "along uncond (its length = 1)",
        "what the prompt changes",
        lines=True,
        legend=True,
    ).figure


# ---- a run ------------------------------------------------------------------------------------------------


def along_and_off(point, start, end):
    """(how far along the straight line from start to end, 0 to 1; how far off it, in lengths of that line)"""
    line, way = (end - start).double().flatten(), (point - start).double().flatten()
    part = float(way @ line / line.square().sum())
    return part, float((way - part * line).norm() / line.norm())


def flow_path(states):
    """A run from noise to data: how far along the straight line each step is, how far off, where it points.

    states  of pipe.steps(...), all of them.  Training uses straight lines only: the floor of this picture
    """
    states = list(states)
    if len(states) < 2 or not hasattr(states[0], "velocity"):
        raise ValueError("flow_path needs two or more States of a run: flow_path(list(pipe.steps(prompt)))")
    ends = states[0].x, states[-1].next
    if torch.equal(*ends):
        raise ValueError("this run ended where it began, so there is no path; is the velocity all zeros?")
    points = [along_and_off(x, *ends) for x in (*(state.x for state in states), ends[1])]
    ahead = [along_and_off(state.x0, *ends) for state in states]
    _, ax = figure(size=(5.6, 3.0))
    ax.axhline(0, color="#777777", linestyle=":", linewidth=1.2, label="the straight path of training")
    for point, goal in zip(points, ahead):
        arrow(ax, point, goal, colour=COLOURS[1], width=0.6)
    label = "x, step by step (arrows: velocity)"
    ax.plot(*zip(*points), "o-", color=COLOURS[0], markersize=3.5, linewidth=1.3, label=label)
    ax.plot(*zip(*ahead), "x", color=COLOURS[5], markersize=5, label="x0, where each step points")
    ax.annotate(" 0", ahead[0], va="bottom", fontsize=7, color=COLOURS[5])  # the first step's
    return dress(
        ax,
        "From noise to data",
        "along the way (0 noise, 1 data)",
        "off the straight line",
        lines=True,
        legend=True,
    ).figure
