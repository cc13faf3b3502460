"""How do I draw an idea?  The pipeline as a strip of rooms, taps and gates as valves, rotary clocks, guidance as arrows, words as tokens."""

import numpy as np
import torch

from ..rope import axis_pairs, clock_speeds, rotate
from .canvas import COLOURS, FAINT, INK, LIT, dress, entitle, figure, numbers, readable
from .charts import norms_of


def _blank(size, reach):
    """An axes without frame or ticks, reaching from (0, 0)."""
    drawn, ax = figure(size=size)
    ax.set_xlim(0, reach[0])
    ax.set_ylim(0, reach[1])
    ax.axis("off")
    return drawn, ax


def _box(ax, x, y, wide, high, text, colour=FAINT, size=9, round_corners=True):
    from matplotlib.patches import FancyBboxPatch

    style = "round,pad=0,rounding_size=0.08" if round_corners else "square,pad=0"
    ax.add_patch(
        FancyBboxPatch(
            (x, y), wide, high, boxstyle=style, facecolor=colour, edgecolor="#999999", linewidth=0.8
        )
    )
    if text:
        ax.text(x + wide / 2, y + high / 2, text, ha="center", va="center", fontsize=size, color=INK)


def _arrow(ax, start, end, colour=INK, width=1.2):
    ax.annotate(
        "",
        end,
        start,
        arrowprops=dict(
            arrowstyle="-|>", color=colour, linewidth=width, shrinkA=0, shrinkB=0, mutation_scale=9
        ),
    )


# ---- the pipeline -----------------------------------------------------------------------------------------------------

ROOMS = ("text", "image", "flow", "dit", "rope", "attention", "guidance", "solvers", "vae")
WHOLE = ("pipeline", "hooks", "weights", "tracing")


def strip(lit=None, pipe=None):
    """The rooms of the pipeline, from words to frames, and what passes between them.   -> Figure

    lit   the room that is lit: text, image, flow, dit, rope, attention, guidance, solvers, vae; pipeline, hooks, weights and tracing light all
    pipe  a Pipeline, whose shapes are written in; None: letters instead of numbers
    """
    if lit not in (None, *ROOMS, *WHOLE):
        raise ValueError(f"lit={lit!r}; expected one of {', '.join((*ROOMS, *WHOLE))}")
    colour = lambda room: LIT if lit == room or lit in WHOLE else FAINT
    if pipe is None:
        vectors, latent, frames, repeat = (
            "[l, c]",
            "[c, f, h, w]",
            "F x H x W",
            "as many times as there are steps",
        )
    else:
        c, (f, h, w), d = pipe.channels, pipe.latent_shape(), pipe.defaults
        width = getattr(getattr(pipe.text, "config", None), "dim", "c")
        vectors, latent, repeat = f"[l, {width}]", f"[{c}, {f}, {h}, {w}]", f"{d['steps']} steps"
        frames = f"{d['frames']} x {d['size'][0]} x {d['size'][1]}"
    from matplotlib.patches import Rectangle

    drawn, ax = _blank((9.2, 2.7), (18.4, 5.0))
    note = lambda x, y, text, **how: ax.text(
        x, y, text, ha="center", va="center", fontsize=8, color=INK, linespacing=1.4, **how
    )
    ax.add_patch(
        Rectangle((4.1, 0.35), 9.1, 4.1, fill=False, edgecolor="#999999", linestyle="--", linewidth=0.9)
    )
    note(8.65, 4.72, f"the loop: {repeat}")

    (
        note(0.65, 3.5, "words"),
        _arrow(ax, (1.15, 3.5), (1.5, 3.5)),
        _box(ax, 1.5, 3.1, 1.2, 0.8, "text", colour("text")),
    )
    _arrow(ax, (2.7, 3.5), (4.6, 3.5)), note(3.4, 4.1, "vectors\n" + vectors)
    note(0.65, 1.3, "a picture\n(i2v only)", style="italic"), _arrow(ax, (1.3, 1.3), (1.5, 1.3))
    _box(ax, 1.5, 0.9, 1.2, 0.8, "image", colour("image")), _arrow(ax, (2.7, 1.4), (4.75, 2.75))

    _box(ax, 4.6, 2.75, 2.6, 1.5, "", colour("dit")), note(5.9, 3.95, "dit")
    (
        _box(ax, 4.75, 2.9, 1.05, 0.65, "rope", colour("rope"), 8),
        _box(ax, 5.9, 2.9, 1.2, 0.65, "attention", colour("attention"), 7),
    )
    _arrow(ax, (7.2, 3.5), (8.2, 3.5)), _box(ax, 8.2, 3.1, 1.5, 0.8, "guidance", colour("guidance"), 8)
    (
        _arrow(ax, (9.7, 3.5), (11.4, 3.5)),
        note(10.5, 3.75, "velocity"),
        _box(ax, 11.4, 3.1, 1.4, 0.8, "solvers", colour("solvers"), 8),
    )
    ax.plot([12.4, 12.4, 5.6], [3.1, 2.1, 2.1], color=INK, linewidth=1.2), _arrow(ax, (5.6, 2.1), (5.6, 2.75))
    note(9.2, 2.37, "x: noise at first, less at every step")
    _box(ax, 8.2, 0.6, 1.3, 0.75, "flow", colour("flow")), note(8.85, 1.62, "sigma, the noise level")
    ax.plot([8.2, 6.6], [0.98, 0.98], color=INK, linewidth=1.2), _arrow(ax, (6.6, 0.98), (6.6, 2.75))
    ax.plot([9.5, 11.8], [0.98, 0.98], color=INK, linewidth=1.2), _arrow(ax, (11.8, 0.98), (11.8, 3.1))

    _arrow(ax, (12.8, 3.5), (14.9, 3.5)), note(14.0, 4.1, "latent\n" + latent)
    _box(ax, 14.9, 3.1, 1.2, 0.8, "vae", colour("vae")), _arrow(ax, (16.1, 3.5), (16.6, 3.5))
    note(17.4, 3.5, "frames\n" + frames)
    entitle(drawn, "From words to frames" + (f": the {lit} room is lit" if lit in ROOMS else ""))
    return drawn


def journey(pipe, prompt, stops=4, **options):
    """Words, vectors, noise becoming a latent, frames: one run of the pipeline, with what stands at each station.   -> Figure

    options  of the call, such as seed=0;  stops: how many latents between noise and the end are drawn
    """
    with torch.no_grad():
        vectors = pipe.text.encode([prompt])[0].float().cpu().numpy()  # [l, c]
    states = list(pipe.steps(prompt, **options))
    frames = pipe.decode(states[-1].next).frames
    chosen = [
        (states[i].x, states[i].sigma)
        for i in sorted({round(i) for i in np.linspace(0, len(states) - 1, stops)})
    ]
    chosen.append((states[-1].next, states[-1].sigma_next))
    drawn, axes = figure(1, len(chosen) + 2, size=(9.2, 2.3), width_ratios=[1.5, *[1] * (len(chosen) + 1)])
    words = pipe.words(prompt)
    axes[0].imshow(vectors[:, :32], cmap="RdBu", vmin=-3, vmax=3, aspect="auto", interpolation="nearest")
    axes[0].set_yticks([np.mean(word.tokens) for word in words], readable(word.text for word in words))
    dress(axes[0], "words as vectors", f"{min(32, vectors.shape[1])} of {vectors.shape[1]} channels")
    axes[0].set_xticks([])
    for i, (ax, (latent, sigma)) in enumerate(zip(axes[1:-1], chosen)):
        cells = latent[0, :3, latent.shape[2] // 2].float().cpu().numpy().transpose(1, 2, 0)
        ax.imshow((cells / 5 + 0.5).clip(0, 1), interpolation="nearest")
        dress(
            ax,
            "noise" if i == 0 else "the latent" if i == len(chosen) - 1 else "less noise",
            f"sigma {sigma:.2f}",
        )
    axes[-1].imshow(frames[len(frames) // 2], interpolation="nearest")
    dress(axes[-1], "frames", f"frame {len(frames) // 2} of {len(frames)}")
    for ax in axes[1:]:
        ax.set_xticks([]), ax.set_yticks([])
    entitle(drawn, f"From words to frames in {len(states)} steps")
    return drawn


# ---- words ------------------------------------------------------------------------------------------------------------


def tokens_picture(tokens, width=72):
    """The pieces a prompt is cut into, each in a box with its number.

    tokens  [(id, piece)], as text.tokens(prompt) gives; a piece that starts a word begins with a low line;  width: letters per line
    """
    tokens = list(tokens)
    if not tokens or any(len(token) != 2 for token in tokens):
        raise ValueError("tokens_picture needs pairs (id, piece): tokens_picture(pipe.text.tokens(prompt))")
    pieces = readable(piece.replace("▁", "_") for _, piece in tokens)
    lines, x = [[]], 0
    for (number, _), piece in zip(tokens, pieces):
        wide = max(len(piece), len(str(number))) + 1.6
        if x + wide > width and lines[-1]:
            lines, x = [*lines, []], 0
        lines[-1].append((x, wide, piece, number))
        x += wide + 0.5
    reach = max(max(line[-1][0] + line[-1][1] for line in lines), 44)
    drawn, ax = _blank((max(3.6, reach * 0.092), 0.45 + 0.62 * len(lines)), (reach + 0.4, 2.6 * len(lines)))
    ax.set_xlim(-0.4)
    word = -1
    for row, line in enumerate(lines):
        y = 2.6 * (len(lines) - 1 - row) + 0.3
        for x, wide, piece, number in line:
            word += piece.startswith("_") or piece == "</s>"
            _box(
                ax,
                x,
                y + 0.75,
                wide,
                1.25,
                piece,
                ("#DCEBF7", "#FCEBC8")[word % 2] if piece != "</s>" else FAINT,
                9,
                round_corners=False,
            )
            ax.text(x + wide / 2, y + 0.2, str(number), ha="center", va="center", fontsize=7, color="#777777")
    entitle(drawn, f"{len(tokens)} tokens and their numbers; _ starts a word, </s> ends the prompt")
    return drawn


# ---- valves -----------------------------------------------------------------------------------------------------------


def tap_valve():
    """What a tap is: a pipe with a valve, left alone, watched, or edited."""
    from matplotlib.patches import Circle

    drawn, ax = _blank((7.4, 1.9), (14.8, 3.4))
    kinds = (
        ("closed", "x goes through: no cost"),
        ("watched", "x goes through;\na copy goes to the record"),
        ("edited", "your function's result\ngoes on in its place"),
    )
    for i, (name, text) in enumerate(kinds):
        x = 0.3 + 4.95 * i
        ax.plot([x, x + 4.2], [1.9, 1.9], color="#AAAAAA", linewidth=9, solid_capstyle="butt", zorder=1)
        if name == "edited":
            ax.plot([x + 2.1, x + 4.2], [1.9, 1.9], color=LIT, linewidth=9, solid_capstyle="butt", zorder=1)
        ax.add_patch(
            Circle(
                (x + 2.1, 1.9),
                0.42,
                facecolor="white" if name == "closed" else LIT,
                edgecolor=INK,
                linewidth=1.2,
                zorder=2,
            )
        )
        ax.text(
            x + 2.1,
            1.9,
            {"closed": "", "watched": "copy", "edited": "f(x)"}[name],
            ha="center",
            va="center",
            fontsize=7,
            color=INK,
            zorder=3,
        )
        if name == "watched":
            _arrow(ax, (x + 2.1, 2.32), (x + 2.1, 3.0))
        ax.text(x + 0.1, 2.35, "x", fontsize=9, color=INK)
        ax.text(x + 4.1, 2.35, "new x" if name == "edited" else "x", fontsize=9, color=INK, ha="right")
        ax.text(x + 2.1, 1.15, name, ha="center", fontsize=9, color=INK, weight="bold")
        ax.text(x + 2.1, 0.9, text, ha="center", va="top", fontsize=8, color=INK)
    entitle(drawn, "A tap: a named place that a value flows through")
    return drawn


def gates_of(modulation):
    """How far the gates of each block stand open: the mean size of attn_gate and ffn_gate.   -> {block: (attention, feed-forward)}

    modulation  a Record of "blocks.*.modulation" (averaged over what it holds), or [block, six, c]
    """
    if hasattr(modulation, "visits"):
        found = {}
        for where, value in modulation:
            if where.name == "modulation" and where.block is not None:
                found.setdefault(where.block, []).append(value.float().abs().mean((0, 1, 3))[[2, 5]].tolist())
        if not found:
            raise ValueError(
                f'no modulation in this record; it holds {", ".join(modulation.names[:6]) or "nothing"}. Capture "blocks.*.modulation"'
            )
        return {block: tuple(np.mean(values, 0)) for block, values in sorted(found.items())}
    values = numbers(modulation, "modulation", "block six c")
    if values.shape[1] != 6:
        raise ValueError(
            f"modulation arrived with shape {list(values.shape)}; expected [block, 6, c]: shift, scale and gate, twice"
        )
    return {
        block: (float(np.abs(one[2]).mean()), float(np.abs(one[5]).mean()))
        for block, one in enumerate(values)
    }


def modulation_valves(modulation, seen=None):
    """The residual stream with its three writers; how far time opens the gates of two of them. Cross-attention has no gate.   -> Figure

    modulation  a Record of "blocks.*.modulation", or [block, six, c]
    seen        a Record of "blocks.*.resid_*", which sets how thick the writers are
    """
    gates = gates_of(modulation)
    writes = norms_of(seen)[1] if seen is not None else {}
    most_gate = max(max(pair) for pair in gates.values()) or 1.0
    most_write = max((size for found in writes.values() for size in found.values()), default=0) or 1.0
    from matplotlib.patches import Circle, Wedge

    drawn, ax = _blank((max(3.6, 1.0 + 0.9 * len(gates)), 2.5), (1.6 + 3 * len(gates), 6.2))
    ax.set_aspect("equal")
    ax.plot(
        [0.2, 1.4 + 3 * len(gates)], [4.6, 4.6], color="#999999", linewidth=7, solid_capstyle="butt", zorder=1
    )
    ax.text(0.2, 5.15, "residual stream", fontsize=8, color=INK)
    for i, (block, (attention, feed)) in enumerate(gates.items()):
        for j, (name, gate) in enumerate(
            (("self-attention", attention), ("cross-attention", None), ("feed-forward", feed))
        ):
            x = 1.5 + 3 * i + 0.9 * j
            thick = (
                1 + 4 * writes[name][block] / most_write if name in writes and block in writes[name] else 2
            )
            ax.plot([x, x], [1.9, 4.45], color=COLOURS[j], linewidth=thick, solid_capstyle="butt", zorder=1)
            if gate is not None:
                ax.add_patch(Circle((x, 3.2), 0.4, facecolor="white", edgecolor=INK, linewidth=0.9, zorder=2))
                ax.add_patch(
                    Wedge((x, 3.2), 0.4, 90 - 360 * gate / most_gate, 90, facecolor=COLOURS[j], zorder=3)
                )
                ax.text(x, 1.45, f"{gate:.2f}", ha="center", fontsize=6.5, color=INK)
            ax.text(x, 0.95, ("S", "C", "F")[j], ha="center", fontsize=8, color=COLOURS[j], weight="bold")
        ax.text(2.4 + 3 * i, 0.15, f"block {block}", ha="center", fontsize=8, color=INK)
    entitle(
        drawn,
        f"Gates as valves, full at {most_gate:.2f}: S self-attention, C cross-attention (no gate), F feed-forward",
    )
    return drawn


# ---- rotary positions -------------------------------------------------------------------------------------------------

CLOCKS = ("frame", "height", "width")


def rope_clocks(position, d, other=None, theta=10000.0):
    """The three clocks of a token: on each, a hand per channel pair, turned by its position; the long hand is the fastest.   -> Figure

    position  (frame, row, column);  d: width of a head;  other: a second token, drawn dashed: scores see only the angles between the two
    """
    for one in (position, other) if other is not None else (position,):
        if len(one) != 3:
            raise ValueError(f"position={tuple(one)}; expected (frame, row, column)")
    drawn, axes = figure(1, 3, size=(6.6, 2.9))
    for ax, name, pairs, here, there in zip(axes, CLOCKS, axis_pairs(d), position, other or position):
        speeds = clock_speeds(pairs, theta).tolist()
        turn = np.linspace(0, 2 * np.pi, 100)
        ax.plot(np.cos(turn), np.sin(turn), color="#BBBBBB", linewidth=1)
        for j, speed in enumerate(speeds):
            length, colour = 0.95 - 0.6 * j / max(len(speeds) - 1, 1), COLOURS[j % 6]
            for place, line in ((here, "-"), (there, (0, (2, 1.5)))) if other is not None else ((here, "-"),):
                x, y = length * np.sin(place * speed), length * np.cos(place * speed)
                ax.plot([0, x], [0, y], color=colour, linewidth=1.7 if line == "-" else 1.2, linestyle=line)
                ax.plot(
                    [x], [y], "o", color=colour, markersize=3.4, fillstyle="full" if line == "-" else "none"
                )
        ax.set_aspect("equal")
        ax.set_xlim(-1.1, 1.1), ax.set_ylim(-1.1, 1.1)
        dress(
            ax,
            f"{name} clock",
            f"position {here}"
            + (f", dashed {there}" if other is not None else "")
            + f"; {len(speeds)} hands",
        )
        ax.set_xticks([]), ax.set_yticks([])
        for side in ax.spines.values():
            side.set_visible(False)
    entitle(drawn, "Where a token is: a hand for each pair of channels, the longest turns fastest")
    return drawn


def score_by_offset(d, far=16, q=None, k=None, theta=10000.0):
    """How the score of two tokens falls with the distance between them, along each axis; 1 where they stand in the same place.

    d     width of a head;  far: largest offset;  q, k: a query and a key [d]; None: each channel pair counts alike
    """
    q, k = (
        torch.ones(d, dtype=torch.float64) if one is None else torch.as_tensor(one).detach().double().cpu()
        for one in (q, k)
    )
    if q.shape != (d,) or k.shape != (d,):
        raise ValueError(
            f"q and k have shapes {list(q.shape)} and {list(k.shape)}; expected one query and one key of width d={d}"
        )
    offsets = torch.arange(-far, far + 1, dtype=torch.float64)
    start = float(q @ k)
    if start == 0:
        raise ValueError("q and k are at right angles, so there is no score to compare with; choose others")
    pairs = axis_pairs(d)
    drawn, ax = figure()
    for i, (name, first) in enumerate(zip(CLOCKS, np.cumsum((0, *pairs)))):
        angle = torch.zeros(len(offsets), d // 2, dtype=torch.float64)
        angle[:, first : first + pairs[i]] = torch.outer(offsets, clock_speeds(pairs[i], theta))
        turned = rotate(k.expand(1, 1, len(offsets), d), angle)[0, 0].double()  # [offsets, d]
        ax.plot(
            offsets,
            turned @ q / start,
            marker="os^"[i],
            markersize=(3, 5, 2.5)[i],
            linewidth=(1.3, 2.6, 1.2)[i],
            linestyle=("-", "-", "--")[i],
            color=COLOURS[i],
            label=f"{name} ({pairs[i]} pairs)",
        )
    ax.legend(loc="best", fontsize=8, frameon=False)
    dress(
        ax,
        "Score against offset: position alone, same content",
        "offset between the two tokens",
        "score, 1 at offset 0",
        lines=True,
    )
    return drawn


# ---- arrows -----------------------------------------------------------------------------------------------------------


def in_plane(*vectors):
    """Vectors in the plane of the first two, unturned: the first lies along x.   -> [(x, y)], in the first one's lengths"""
    flat = [
        v.detach().double().cpu().flatten()
        if isinstance(v, torch.Tensor)
        else torch.as_tensor(v).double().flatten()
        for v in vectors
    ]
    if len({len(v) for v in flat}) != 1:
        raise ValueError(
            f"arrows of {', '.join(str(list(np.shape(v))) for v in vectors)} numbers cannot lie in one plane; expected equal shapes"
        )
    long = flat[0].norm()
    if long == 0:
        raise ValueError(
            "the first arrow has length 0, so it points nowhere; is the model's output all zeros?"
        )
    across = flat[1] - flat[0] * (flat[0] @ flat[1]) / long**2
    side = across / across.norm() if across.norm() > 1e-12 * long else torch.zeros_like(across)
    return [(float(v @ flat[0] / long**2), float(v @ side / long)) for v in flat]


def guidance_arrows(cond, uncond, scales=(1, 3, 5)):
    """Guidance as arrows: from the velocity without the prompt, through the one with it, and beyond.   -> Figure

    cond, uncond  velocities of one shape, drawn in the plane they span; the angle and lengths are the true ones
    """
    (ux, uy), (cx, cy) = in_plane(uncond, cond)
    drawn, ax = figure(size=(5.2, 3.0))
    tips = [(ux + s * (cx - ux), uy + s * (cy - uy)) for s in scales]
    for (x, y), name, colour in (((ux, uy), "uncond", COLOURS[0]), ((cx, cy), "cond", COLOURS[2])):
        _arrow(ax, (0, 0), (x, y), colour, 2)
        ax.plot([], [], color=colour, linewidth=2, label=f"{name}, scale {0 if name == 'uncond' else 1}")
    ax.plot([ux, *[x for x, _ in tips]], [uy, *[y for _, y in tips]], "--", color="#999999", linewidth=1)
    for s, (x, y) in zip(scales, tips):
        if s != 1:
            _arrow(ax, (0, 0), (x, y), COLOURS[5], 1.3)
            ax.annotate(
                f"scale {s:g}",
                (x, y),
                textcoords="offset points",
                xytext=(5, 3),
                fontsize=8,
                color=COLOURS[5],
            )
    everyone = np.array([(0, 0), (ux, uy), (cx, cy), *tips])
    ax.plot(*everyone.T, linestyle="none")  # arrows alone do not stretch the axes
    ax.margins(0.15)
    ax.set_aspect("equal", adjustable="datalim")
    ax.legend(loc="best", fontsize=8, frameon=False)
    dress(
        ax,
        "Guidance: start without the prompt, go beyond with it",
        "along uncond (its length = 1)",
        "what the prompt changes",
        lines=True,
    )
    return drawn


def along_and_off(point, start, end):
    """(how far along the straight line from start to end, 0 to 1; how far off it, in lengths of that line)"""
    line, way = (end - start).double().flatten(), (point - start).double().flatten()
    part = float(way @ line / line.square().sum())
    return part, float((way - part * line).norm() / line.norm())


def flow_path(states):
    """A run from noise to data: how far along the straight line between them each step is, how far off it, and where each step points.

    states  of pipe.steps(...), all of them.  Training uses straight lines only, which is the floor of this picture
    """
    states = list(states)
    if len(states) < 2 or not hasattr(states[0], "velocity"):
        raise ValueError("flow_path needs two or more States of a run: flow_path(list(pipe.steps(prompt)))")
    start, end = states[0].x, states[-1].next
    if torch.equal(start, end):
        raise ValueError("this run ended where it began, so there is no path; is the velocity all zeros?")
    place = lambda point: along_and_off(point, start, end)
    points, ahead = [place(s.x) for s in states] + [place(end)], [place(s.x0) for s in states]
    drawn, ax = figure(size=(5.6, 3.0))
    ax.axhline(0, color="#777777", linestyle=":", linewidth=1.2, label="the straight path of training")
    for s, point in zip(states, points):
        _arrow(ax, point, place(s.x + 0.25 * (s.x0 - s.x)), COLOURS[1], 1.1)
    ax.plot(
        *zip(*points),
        "o-",
        color=COLOURS[0],
        markersize=3.5,
        linewidth=1.3,
        label="x, step by step (arrows: velocity)",
    )
    ax.plot(*zip(*ahead), "x", color=COLOURS[5], markersize=5, label="x0, where each step points")
    ax.annotate("0", ahead[0], textcoords="offset points", xytext=(4, 4), fontsize=7, color=COLOURS[5])
    ax.legend(loc="best", fontsize=8, frameon=False)
    return dress(
        ax, "From noise to data", "along the way (0 noise, 1 data)", "off the straight line", lines=True
    ).figure
