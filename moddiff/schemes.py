"""How do I draw an idea?  The pipeline as a strip of rooms, taps and gates as valves, rotary clocks, guidance as arrows, words as tokens."""

import numpy as np
import torch

from .charts import COLOURS, FAINT, INK, LIT, dress, figure, heat, norms_of, numbers, readable
from .rope import axis_pairs, clock_speeds, rotate


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
    ax.add_patch(FancyBboxPatch((x, y), wide, high, boxstyle=style, facecolor=colour, edgecolor="#999999", linewidth=0.8))
    ax.text(x + wide / 2, y + high / 2, text, ha="center", va="center", fontsize=size, color=INK)


def _arrow(ax, start, end, colour=INK, width=1.2):
    ax.annotate("", end, start, arrowprops=dict(arrowstyle="-|>", color=colour, linewidth=width, shrinkA=0, shrinkB=0, mutation_scale=9))


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
        vectors, latent, frames, repeat = "[l, c]", "[c, f, h, w]", "[F, H, W, 3]", "steps"
    else:
        c, (f, h, w), d = pipe.channels, pipe.latent_shape(), pipe.defaults
        width = getattr(getattr(pipe.text, "config", None), "dim", "c")
        vectors, latent, repeat = f"[l, {width}]", f"[{c}, {f}, {h}, {w}]", f"{d['steps']} steps"
        frames = f"[{d['frames']}, {d['size'][0]}, {d['size'][1]}, 3]"
    drawn, ax = _blank((9.2, 2.3), (18.4, 4.6))
    note = lambda x, y, text, **how: ax.text(x, y, text, ha="center", va="center", fontsize=8, color=INK, **how)
    note(0.75, 3.1, "words"), note(0.75, 1.1, "a picture\n(i2v only)", style="italic")
    _box(ax, 1.9, 2.7, 1.4, 0.8, "text", colour("text")), _box(ax, 1.9, 0.7, 1.4, 0.8, "image", colour("image"))
    _arrow(ax, (1.3, 3.1), (1.9, 3.1)), _arrow(ax, (1.4, 1.1), (1.9, 1.1))
    ax.add_patch(__import__("matplotlib.patches", fromlist=["x"]).Rectangle((4.55, 0.3), 8.0, 3.75, fill=False, edgecolor="#999999", linestyle="--", linewidth=0.9))
    note(8.5, 4.3, f"the loop: {repeat}")
    _arrow(ax, (3.3, 3.1), (6.35, 3.1)), note(3.93, 3.42, "vectors\n" + vectors, linespacing=1.4, backgroundcolor="white")
    _arrow(ax, (3.3, 1.1), (6.35, 2.35))
    _box(ax, 4.8, 0.6, 1.3, 0.7, "flow", colour("flow")), note(5.45, 0.02, "")
    _box(ax, 6.35, 1.75, 2.3, 1.9, "", colour("dit"))
    note(7.5, 3.4, "dit"), _box(ax, 6.5, 1.9, 0.95, 0.6, "rope", colour("rope"), 8), _box(ax, 7.55, 1.9, 1.0, 0.6, "attention", colour("attention"), 7)
    _box(ax, 9.3, 2.7, 1.5, 0.8, "guidance", colour("guidance"), 8), _box(ax, 11.0, 0.75, 1.4, 0.8, "solvers", colour("solvers"), 8)
    _arrow(ax, (8.65, 3.1), (9.3, 3.1)), _arrow(ax, (10.8, 3.1), (11.7, 1.6)), note(11.75, 2.75, "velocity")
    _arrow(ax, (6.1, 0.85), (11.0, 0.85)), note(8.3, 0.58, "sigma: noise level of this step and of the next")
    _arrow(ax, (11.0, 1.3), (8.0, 1.75)), note(9.75, 1.85, "x, a little less noisy")
    _arrow(ax, (12.4, 1.15), (14.4, 2.5)), note(13.7, 3.3, "latent\n" + latent, linespacing=1.4)
    _box(ax, 14.4, 2.2, 1.3, 0.8, "vae", colour("vae")), _arrow(ax, (15.7, 2.6), (16.3, 2.6)), note(17.35, 2.6, "frames\n" + frames, linespacing=1.4)
    return drawn


def journey(pipe, prompt, stops=4, **options):
    """Words, vectors, noise becoming a latent, frames: one run of the pipeline, with what stands at each station.   -> Figure

    options  of the call, such as seed=0;  stops: how many latents between noise and the end are drawn
    """
    with torch.no_grad():
        vectors = pipe.text.encode([prompt])[0].float().cpu().numpy()  # [l, c]
    states = list(pipe.steps(prompt, **options))
    frames = pipe.decode(states[-1].next).frames
    chosen = [states[i].x for i in sorted({round(i) for i in np.linspace(0, len(states) - 1, stops)})] + [states[-1].next]
    drawn, axes = figure(1, len(chosen) + 2, size=(9.2, 2.1), width_ratios=[1.5, *[1] * (len(chosen) + 1)])
    words = readable(word.text for word in pipe.words(prompt))
    axes[0].imshow(vectors[:, :32], cmap="RdBu", vmin=-3, vmax=3, aspect="auto", interpolation="nearest")
    rows = [word.tokens[0] for word in pipe.words(prompt)]
    axes[0].set_yticks(rows, words)
    dress(axes[0], "words as vectors", f"first 32 of {vectors.shape[1]} channels")
    axes[0].set_xticks([])
    for i, (ax, latent) in enumerate(zip(axes[1:-1], chosen)):
        cells = latent[0, :3, latent.shape[2] // 2].float().cpu().numpy().transpose(1, 2, 0)
        ax.imshow((cells / 5 + 0.5).clip(0, 1), interpolation="nearest")
        sigma = states[-1].sigma_next if i == len(chosen) - 1 else states[round(np.linspace(0, len(states) - 1, stops)[i])].sigma if len(chosen) == stops + 1 else None
        dress(ax, "noise" if i == 0 else "the latent" if i == len(chosen) - 1 else "", "" if sigma is None else f"sigma {sigma:.2f}")
    axes[-1].imshow(frames[len(frames) // 2], interpolation="nearest")
    dress(axes[-1], "frames", f"frame {len(frames) // 2} of {len(frames)}")
    for ax in axes[1:]:
        ax.set_xticks([]), ax.set_yticks([])
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
    drawn, ax = _blank((max(3.6, reach * 0.092), 0.45 + 0.62 * len(lines)), (reach, 2.6 * len(lines)))
    word = -1
    for row, line in enumerate(lines):
        y = 2.6 * (len(lines) - 1 - row) + 0.3
        for x, wide, piece, number in line:
            word += piece.startswith("_") or piece == "</s>"
            _box(ax, x, y + 0.75, wide, 1.25, piece, ("#DCEBF7", "#FCEBC8")[word % 2] if piece != "</s>" else FAINT, 9, round_corners=False)
            ax.text(x + wide / 2, y + 0.2, str(number), ha="center", va="center", fontsize=7, color="#777777")
    ax.set_title(f"{len(tokens)} tokens (_ starts a word, </s> ends the prompt); below, each one's number in the table", fontsize=9, loc="left", color=INK)
    return drawn


# ---- valves -----------------------------------------------------------------------------------------------------------


def tap_valve():
    """What a tap is: a pipe with a valve, left alone, watched, or edited."""
    from matplotlib.patches import Circle

    drawn, ax = _blank((7.4, 1.7), (14.8, 3.4))
    for i, (name, text) in enumerate((("closed", "x goes through: no cost"), ("watched", "x goes through;\na copy goes to the record"), ("edited", "your function's result\ngoes on in its place"))):
        x = 0.3 + 4.95 * i
        ax.plot([x, x + 4.2], [1.9, 1.9], color="#AAAAAA", linewidth=9, solid_capstyle="butt", zorder=1)
        ax.plot([x + 2.1, x + 4.2] if name == "edited" else [], [1.9, 1.9] if name == "edited" else [], color=LIT, linewidth=9, solid_capstyle="butt", zorder=1)
        ax.add_patch(Circle((x + 2.1, 1.9), 0.42, facecolor="white" if name == "closed" else LIT, edgecolor=INK, linewidth=1.2, zorder=2))
        ax.text(x + 2.1, 1.9, {"closed": "", "watched": "copy", "edited": "f(x)"}[name], ha="center", va="center", fontsize=7, color=INK, zorder=3)
        if name == "watched":
            _arrow(ax, (x + 2.1, 2.32), (x + 2.1, 3.0))
        ax.text(x + 0.1, 2.35, "x", fontsize=9, color=INK), ax.text(x + 3.55, 2.35, "new x" if name == "edited" else "x", fontsize=9, color=INK)
        ax.text(x + 2.1, 1.15, name, ha="center", fontsize=9, color=INK, weight="bold"), ax.text(x + 2.1, 0.9, text, ha="center", va="top", fontsize=8, color=INK)
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
            raise ValueError(f'no modulation in this record; it holds {", ".join(modulation.names[:6]) or "nothing"}. Capture "blocks.*.modulation"')
        return {block: tuple(np.mean(values, 0)) for block, values in sorted(found.items())}
    values = numbers(modulation, "modulation", "block six c")
    if values.shape[1] != 6:
        raise ValueError(f"modulation arrived with shape {list(values.shape)}; expected [block, 6, c]: shift, scale and gate, twice")
    return {block: (float(np.abs(one[2]).mean()), float(np.abs(one[5]).mean())) for block, one in enumerate(values)}


def modulation_valves(modulation, seen=None):
    """The residual stream with its three writers; how far time opens the gates of two of them. Cross-attention has no gate.   -> Figure

    modulation  a Record of "blocks.*.modulation", or [block, six, c];  seen: a Record of "blocks.*.resid_*", which sets how thick the writers are
    """
    gates = gates_of(modulation)
    writes = norms_of(seen)[1] if seen is not None else {}
    most_gate = max(max(pair) for pair in gates.values()) or 1.0
    most_write = max((size for found in writes.values() for size in found.values()), default=0) or 1.0
    from matplotlib.patches import Circle, Wedge

    drawn, ax = _blank((1.3 + 1.02 * len(gates), 2.5), (1.6 + 3 * len(gates), 6.2))
    ax.set_aspect("equal")
    ax.plot([0.2, 1.4 + 3 * len(gates)], [4.6, 4.6], color="#999999", linewidth=7, solid_capstyle="butt", zorder=1)
    ax.text(0.2, 5.15, "residual stream", fontsize=8, color=INK)
    for i, (block, (attention, feed)) in enumerate(gates.items()):
        for j, (name, gate) in enumerate((("self-attention", attention), ("cross-attention", None), ("feed-forward", feed))):
            x = 1.5 + 3 * i + 0.9 * j
            thick = 1 + 4 * writes[name][block] / most_write if name in writes and block in writes[name] else 2
            ax.plot([x, x], [1.9, 4.45], color=COLOURS[j], linewidth=thick, solid_capstyle="butt", zorder=1)
            if gate is not None:
                ax.add_patch(Circle((x, 3.2), 0.4, facecolor="white", edgecolor=INK, linewidth=0.9, zorder=2))
                ax.add_patch(Wedge((x, 3.2), 0.4, 90 - 360 * gate / most_gate, 90, facecolor=COLOURS[j], zorder=3))
                ax.text(x, 1.45, f"{gate:.2f}", ha="center", fontsize=6.5, color=INK)
            ax.text(x, 0.95, ("S", "C", "F")[j], ha="center", fontsize=8, color=COLOURS[j], weight="bold")
        ax.text(2.4 + 3 * i, 0.15, f"block {block}", ha="center", fontsize=8, color=INK)
    ax.set_title(f"Gates as valves, full at {most_gate:.2f}: S self-attention, C cross-attention (no gate), F feed-forward" if len(gates) > 4 else
                 f"Gates as valves, full at {most_gate:.2f}", fontsize=9.5, loc="left", color=INK)
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
    drawn, axes = figure(1, 3, size=(6.6, 2.6))
    for ax, name, pairs, here, there in zip(axes, CLOCKS, axis_pairs(d), position, other or position):
        speeds = clock_speeds(pairs, theta).tolist()
        turn = np.linspace(0, 2 * np.pi, 100)
        ax.plot(np.cos(turn), np.sin(turn), color="#BBBBBB", linewidth=1)
        for j, speed in enumerate(speeds):
            length, colour = 0.95 - 0.6 * j / max(len(speeds) - 1, 1), COLOURS[j % 6]
            for place, line in ((here, "-"), (there, (0, (2, 1.5)))) if other is not None else ((here, "-"),):
                x, y = length * np.sin(place * speed), length * np.cos(place * speed)
                ax.plot([0, x], [0, y], color=colour, linewidth=1.7 if line == "-" else 1.2, linestyle=line)
                ax.plot([x], [y], "o", color=colour, markersize=3.4, fillstyle="full" if line == "-" else "none")
        ax.set_aspect("equal")
        ax.set_xlim(-1.1, 1.1), ax.set_ylim(-1.1, 1.1)
        dress(ax, f"{name} clock", f"position {here}" + (f", dashed {there}" if other is not None else "") + f"; {len(speeds)} hands")
        ax.set_xticks([]), ax.set_yticks([])
        for side in ax.spines.values():
            side.set_visible(False)
    return drawn


def score_by_offset(d, far=16, q=None, k=None, theta=10000.0):
    """How the score of two tokens falls with the distance between them, along each axis; 1 where they stand in the same place.

    d     width of a head;  far: largest offset;  q, k: a query and a key [d]; None: each channel pair counts alike
    """
    q, k = (torch.ones(d, dtype=torch.float64) if one is None else torch.as_tensor(one).detach().double().cpu() for one in (q, k))
    if q.shape != (d,) or k.shape != (d,):
        raise ValueError(f"q and k have shapes {list(q.shape)} and {list(k.shape)}; expected one query and one key of width d={d}")
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
        ax.plot(offsets, turned @ q / start, marker="os^"[i], markersize=3, linewidth=1.3, color=COLOURS[i], label=f"{name} ({pairs[i]} pairs)")
    ax.legend(fontsize=8, frameon=False)
    dress(ax, "Score against offset: position alone, same content", "offset between the two tokens", "score, 1 at offset 0", lines=True)
    return drawn


# ---- arrows -----------------------------------------------------------------------------------------------------------


def in_plane(*vectors):
    """Vectors in the plane of the first two, unturned: the first lies along x.   -> [(x, y)], in the first one's lengths"""
    flat = [v.detach().double().cpu().flatten() if isinstance(v, torch.Tensor) else torch.as_tensor(v).double().flatten() for v in vectors]
    if len({len(v) for v in flat}) != 1:
        raise ValueError(f"arrows of {', '.join(str(list(np.shape(v))) for v in vectors)} numbers cannot lie in one plane; expected equal shapes")
    long = flat[0].norm()
    if long == 0:
        raise ValueError("the first arrow has length 0, so it points nowhere; is the model's output all zeros?")
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
            ax.annotate(f"scale {s:g}", (x, y), textcoords="offset points", xytext=(5, 3), fontsize=8, color=COLOURS[5])
    everyone = np.array([(0, 0), (ux, uy), (cx, cy), *tips])
    low, high = everyone.min(0), everyone.max(0)
    pad = 0.12 * max(high - low)
    ax.set_xlim(low[0] - pad, high[0] + 2.2 * pad), ax.set_ylim(low[1] - pad, high[1] + pad)
    ax.legend(fontsize=8, frameon=False)
    return dress(ax, "Guidance: start without the prompt, go beyond with it", "along uncond (its length = 1)", "what the prompt changes", lines=True).figure


def flow_path(states, noise=None):
    """A run as a path from noise to data, seen in the plane of its start and its end; arrows are the model's velocities.   -> Figure

    states  of pipe.steps(...), all of them.  The dotted line is the straight path that training uses
    """
    states = list(states)
    if len(states) < 2 or not hasattr(states[0], "velocity"):
        raise ValueError("flow_path needs two or more States of a run: flow_path(list(pipe.steps(prompt)))")
    start, end = states[0].x, states[-1].next
    points = in_plane(start, end, *[s.x for s in states], end)[2:]
    ahead = in_plane(start, end, *[s.x0 for s in states])[2:]
    drawn, ax = figure(size=(5.6, 3.2))
    ax.plot([points[0][0], points[-1][0]], [points[0][1], points[-1][1]], ":", color="#777777", linewidth=1.2, label="the straight path")
    for (x, y), (gx, gy) in zip(points, ahead):
        _arrow(ax, (x, y), (x + (gx - x) * 0.25, y + (gy - y) * 0.25), COLOURS[1], 1.1)
    ax.plot(*zip(*points), "o-", color=COLOURS[0], markersize=3.5, linewidth=1.3, label="x, step by step")
    ax.plot(*zip(*ahead), "x", color=COLOURS[5], markersize=5, label="x0, where each step points")
    ax.annotate("noise", points[0], textcoords="offset points", xytext=(6, 4), fontsize=8), ax.annotate("data", points[-1], textcoords="offset points", xytext=(6, 4), fontsize=8)
    ax.legend(fontsize=8, frameon=False)
    return dress(ax, "From noise to data", "along the noise (its length = 1)", "across it", lines=True).figure
