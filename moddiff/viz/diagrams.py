"""How do I draw an idea?  The pipeline as rooms, a run as a journey, words as tokens, taps as valves."""

import numpy as np
import torch

from ..hooks import Record
from .canvas import (
    BARE,
    COLOURS,
    FAINT,
    INK,
    LIT,
    arrow,
    dress,
    entitle,
    extra,
    figure,
    framed,
    note,
    numbers,
    readable,
    spread,
)
from .charts import by_block, norms_of


def _blank(size, reach):
    """An axes without frame or ticks, from (0, 0) to reach."""
    return figure(size=size, subplot_kw={"xlim": (0, reach[0]), "ylim": (0, reach[1])} | BARE)


def _box(ax, x, y, wide, high, text, colour, size=9):
    """A box from its lower left corner, with a word in its middle."""
    look = {"boxstyle": "round,pad=0,rounding_size=0.08", "edgecolor": "#999999", "linewidth": 0.8}
    ax.add_patch(extra("matplotlib.patches").FancyBboxPatch((x, y), wide, high, facecolor=colour, **look))
    if text:
        note(ax, x + wide / 2, y + high / 2, text, size=size)


# ---- the pipeline -----------------------------------------------------------------------------------------

ROOMS = {  # room: left, bottom, width and height of its box, size of its letters
    "text": (1.3, 3.6, 1.2, 0.8, 9),
    "image": (1.3, 1.1, 1.2, 0.8, 9),
    "flow": (7.4, 0.7, 1.3, 0.75, 9),
    "dit": (4.2, 3.1, 2.8, 1.7, 9),
    "rope": (4.35, 3.25, 1.0, 0.75, 8),
    "attention": (5.45, 3.25, 1.4, 0.75, 8),
    "guidance": (7.75, 3.6, 1.45, 0.8, 8),
    "solvers": (10.1, 3.6, 1.2, 0.8, 8),
    "vae": (13.9, 3.6, 1.2, 0.8, 9),
}
WHOLE = ("pipeline", "hooks", "weights", "tracing")  # lessons about all of it
ARROWS = (
    ((1.0, 4.0), (1.3, 4.0)),  # words -> text
    ((2.5, 4.0), (4.2, 4.0)),  # text -> dit
    ((1.15, 1.5), (1.3, 1.5)),  # a picture -> image
    ((2.5, 1.5), (4.35, 3.1)),  # image -> dit
    ((7.0, 4.0), (7.75, 4.0)),  # dit -> guidance
    ((9.2, 4.0), (10.1, 4.0)),  # guidance -> solvers
    ((10.4, 3.6), (10.4, 2.5), (5.2, 2.5), (5.2, 3.1)),  # solvers -> dit, for the next step
    ((7.4, 1.08), (6.2, 1.08), (6.2, 3.1)),  # flow -> dit
    ((8.7, 1.08), (11.0, 1.08), (11.0, 3.6)),  # flow -> solvers
    ((11.3, 4.0), (13.9, 4.0)),  # solvers -> vae, after the last step
    ((14.5, 3.6), (14.5, 2.9)),  # vae -> frames
)


NOTES = (
    (0.5, 4.0, "words"),
    (0.55, 1.5, "a picture\n(i2v only)"),
    (3.1, 4.65, "vectors\n{vectors}"),
    (5.6, 4.42, "dit"),  # above the two rooms inside it
    (7.68, 5.35, "the loop: {loop}"),
    (9.65, 4.7, "velocity"),
    (8.35, 2.8, "x: noise at first, less at every step"),
    (8.05, 1.75, "sigma, the noise level"),
    (12.75, 4.65, "latent\n{latent}"),
    (14.5, 2.4, "frames\n{frames}"),
)
LETTERS = {  # where no pipeline says the numbers
    "vectors": "[l, c]",
    "latent": "[c, f, h, w]",
    "frames": "F x H x W",
    "loop": "as many times as there are steps",
}


def strip(lit=None, pipe=None):
    """The rooms of the pipeline, from words to frames, and what passes between them.   -> Figure

    lit   the room that is lit: text, image, flow, dit, rope, attention, guidance, solvers, vae; pipeline,
          hooks, weights and tracing light all
    pipe  a Pipeline, whose shapes are written in; None: letters instead of numbers
    """
    if lit not in (None, *ROOMS, *WHOLE):
        raise ValueError(f"lit={lit!r}; expected one of {', '.join((*ROOMS, *WHOLE))}")
    shapes = LETTERS if pipe is None else _shapes_of(pipe)
    drawn, ax = _blank((7.8, 3.15), (15.6, 5.6))
    framed(ax, (3.75, 0.35), 7.85, 4.75, "#999999", linestyle="--", linewidth=0.9)  # the loop
    for room, (x, y, wide, high, size) in ROOMS.items():
        colour = LIT if lit == room or lit in WHOLE else FAINT
        _box(ax, x, y, wide, high, "" if room == "dit" else room, colour, size)
    for points in ARROWS:
        arrow(ax, *points)
    for x, y, text in NOTES:
        note(ax, x, y, text.format(**shapes), size=9 if text == "dit" else 8)
    entitle(drawn, "From words to frames" + (f": the {lit} room is lit" if lit in ROOMS else ""))
    return drawn


def _shapes_of(pipe):
    """What passes between the rooms of a pipeline, in its own numbers: as LETTERS."""
    if not hasattr(pipe, "latent_shape"):
        raise TypeError(f'{type(pipe).__name__} is no Pipeline; expected one, such as moddiff.load("tiny")')
    (f, h, w), d = pipe.latent_shape(), pipe.defaults
    steps = d["steps"] if isinstance(d["steps"], int) else len(d["steps"])  # a number or a step list
    width = getattr(getattr(pipe.text, "config", None), "dim", "c")
    return {
        "vectors": f"[l, {width}]",
        "latent": f"[{pipe.channels}, {f}, {h}, {w}]",
        "frames": f"{d['frames']} x {d['size'][0]} x {d['size'][1]}",
        "loop": f"{steps} steps",
    }


def journey(pipe, prompt, **options):
    """Words, vectors, noise becoming a latent, frames: what stands at each station of one run.   -> Figure

    options  of the call, such as seed=0
    """
    if not hasattr(pipe, "steps"):
        raise ValueError(f"journey of {type(pipe).__name__}; expected a Pipeline")
    with torch.no_grad():
        vectors = pipe.text.encode([prompt])[0].float().cpu().numpy()  # [l, c]
    states = list(pipe.steps(prompt, **options))
    frames = pipe.decode(states[-1].next).frames
    shown = [states[i] for i in spread(len(states), 4)]
    latents = [*((state.x, state.sigma) for state in shown), (states[-1].next, states[-1].sigma_next)]
    names = ["noise", *["less noise"] * (len(shown) - 1), "the latent"]
    widths = [1.5, *[1] * (len(latents) + 1)]
    bare = {"width_ratios": widths, "subplot_kw": {"xticks": [], "yticks": []}}
    drawn, (first, *middle, last) = figure(1, len(widths), size=(9.2, 2.3), **bare)
    few, words = vectors[:, :32], pipe.words(prompt)
    first.imshow(few, cmap="RdBu", vmin=-3, vmax=3, aspect="auto", interpolation="nearest")
    dress(first, "words as vectors", f"{few.shape[1]} of {vectors.shape[1]} channels")
    for ax, name, (latent, sigma) in zip(middle, names, latents):
        cells = latent[0, :3, latent.shape[2] // 2].float().cpu().numpy().transpose(1, 2, 0)  # [h, w, 3]
        ax.imshow((cells / 5 + 0.5).clip(0, 1), interpolation="nearest")
        dress(ax, name, f"sigma {sigma:.2f}")
    last.imshow(frames[len(frames) // 2], interpolation="nearest")
    dress(last, "frames", f"frame {len(frames) // 2} of {len(frames)}")
    first.set_yticks([np.mean(word.tokens) for word in words], readable(word.text for word in words))
    entitle(drawn, f"From words to frames in {len(states)} steps")
    return drawn


# ---- words ------------------------------------------------------------------------------------------------


def tokens_picture(tokens):
    """The pieces a prompt is cut into, each in a box with its number.

    tokens  [(id, piece)], as text.tokens(prompt) gives; a piece that starts a word begins with a low line
    """
    if not tokens or not all(isinstance(token, tuple | list) and len(token) == 2 for token in tokens):
        raise ValueError("tokens_picture needs pairs (id, piece): tokens_picture(pipe.text.tokens(prompt))")
    pieces = readable(piece.replace("▁", "_") for _, piece in tokens)
    boxes, row, x, word = [], 0, 0, -1
    for (number, _), piece in zip(tokens, pieces):
        wide = max(len(piece), len(str(number))) + 1.6
        if x and x + wide > 72:  # letters in a line
            row, x = row + 1, 0
        word += piece.startswith("_") or piece == "</s>"
        boxes.append((row, x, wide, piece, number, word))
        x += wide + 0.5
    reach = max(44, *(x + wide for _, x, wide, *_ in boxes))
    drawn, ax = _blank((reach * 0.092, 0.45 + 0.62 * (row + 1)), (reach + 0.4, 2.6 * (row + 1)))
    ax.set_xlim(-0.4)
    for line, x, wide, piece, number, word in boxes:
        y = 2.6 * (row - line) + 0.3
        colour = FAINT if piece == "</s>" else ("#DCEBF7", "#FCEBC8")[word % 2]
        _box(ax, x, y + 0.75, wide, 1.25, piece, colour)
        note(ax, x + wide / 2, y + 0.2, str(number), size=7)
    entitle(drawn, f"{len(tokens)} tokens and their numbers; _ starts a word, </s> ends the prompt")
    return drawn


# ---- valves -----------------------------------------------------------------------------------------------

VALVES = (  # a tap's state, what stands in the valve, what comes out, what it means
    ("closed", "", "x", "x goes through: no cost"),
    ("watched", "copy", "x", "x goes through;\na copy goes to the record"),
    ("edited", "f(x)", "new x", "your function's result\ngoes on in its place"),
)


def tap_valve():
    """What a tap is: a pipe with a valve, left alone, watched, or edited."""
    drawn, ax = _blank((7.4, 1.9), (14.8, 3.4))
    tube = {"linewidth": 9, "solid_capstyle": "butt", "zorder": 1}
    for i, (name, inside, out, meaning) in enumerate(VALVES):
        x = 0.3 + 4.95 * i
        valve = x + 2.1
        ax.plot([x, valve], [1.9, 1.9], color="#AAAAAA", **tube)
        ax.plot([valve, x + 4.2], [1.9, 1.9], color=LIT if name == "edited" else "#AAAAAA", **tube)
        colour = LIT if inside else "white"
        rim = {"facecolor": colour, "edgecolor": INK, "linewidth": 1.2, "zorder": 2}
        ax.add_patch(extra("matplotlib.patches").Circle((valve, 1.9), 0.42, **rim))
        note(ax, valve, 1.9, inside, size=7, zorder=3)
        if name == "watched":
            arrow(ax, (valve, 2.32), (valve, 3.0))
        ax.text(x + 0.1, 2.35, "x", fontsize=9, color=INK)
        ax.text(x + 4.1, 2.35, out, fontsize=9, color=INK, ha="right")
        ax.text(valve, 1.15, name, ha="center", fontsize=9, color=INK, weight="bold")
        ax.text(valve, 0.9, meaning, ha="center", va="top", fontsize=8, color=INK)
    entitle(drawn, "A tap: a named place that a value flows through")
    return drawn


GATES = [2, 5]  # of the six vectors: shift, scale and gate of self-attention, then of the feed-forward


def gates_of(modulation):
    """How far the gates of each block stand open: their mean size.   -> {block: (self-attention's, ffn's)}

    modulation  a Record of "blocks.*.modulation" (averaged over what it holds), or [block, six, c]
    """
    if isinstance(modulation, Record):
        seen = sorted(by_block(modulation, "modulation", "modulation").items())
        return {
            block: np.mean([value.abs().mean((0, 1, 3))[GATES].tolist() for value in values], 0).tolist()
            for (block, _), values in seen
        }
    values = numbers(modulation, "modulation", "block six c")
    if values.shape[1] != 6:
        raise ValueError(
            f"modulation arrived with shape {list(values.shape)}; "
            "expected [block, 6, c]: shift, scale and gate, twice"
        )
    return dict(enumerate(np.abs(values).mean(2)[:, GATES].tolist()))


def modulation_valves(modulation, seen=None):
    """The residual stream with its three writers; how far time opens the gates of two of them.   -> Figure

    modulation  a Record of "blocks.*.modulation", or [block, six, c]; cross-attention has no gate
    seen        a Record of "blocks.*.resid_*", which sets how thick the writers are
    """
    gates = gates_of(modulation)
    writes = norms_of(seen)[1] if seen is not None else {}
    most_gate = max(map(max, gates.values())) or 1.0
    most_write = max((size for sizes in writes.values() for size in sizes.values()), default=0) or 1.0
    patches, reach = extra("matplotlib.patches"), 1.6 + 3 * len(gates)
    drawn, ax = _blank((max(3.6, 1.0 + 0.9 * len(gates)), 2.5), (reach, 6.2))
    ax.set_aspect("equal")
    tube = {"solid_capstyle": "butt", "zorder": 1}
    ax.plot([0.2, reach - 0.2], [4.6, 4.6], color="#999999", linewidth=7, **tube)
    ax.text(0.2, 5.15, "residual stream", fontsize=8, color=INK)
    for i, (block, (attention, feed)) in enumerate(gates.items()):
        writers = (("self-attention", attention), ("cross-attention", None), ("feed-forward", feed))
        for x, colour, (name, gate) in zip((1.5 + 3 * i, 2.4 + 3 * i, 3.3 + 3 * i), COLOURS, writers):
            size = writes.get(name, {}).get(block)
            thick = 2 if size is None else 1 + 4 * size / most_write
            ax.plot([x, x], [1.9, 4.45], color=colour, linewidth=thick, **tube)
            note(ax, x, 1.05, name[0].upper(), color=colour, weight="bold")
            if gate is not None:
                start = 90 - 360 * gate / most_gate  # clockwise from the top
                rim = {"facecolor": "white", "edgecolor": INK, "linewidth": 0.9, "zorder": 2}
                ax.add_patch(patches.Circle((x, 3.2), 0.4, **rim))
                ax.add_patch(patches.Wedge((x, 3.2), 0.4, start, 90, facecolor=colour, zorder=3))
                note(ax, x, 1.55, f"{gate:.2f}", size=6.5)
        note(ax, 2.4 + 3 * i, 0.3, f"block {block}")
    legend = "S self-attention, C cross-attention (no gate), F feed-forward"
    entitle(drawn, f"Gates as valves, full at {most_gate:.2f}: {legend}")
    return drawn
