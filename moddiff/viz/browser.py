"""What is in this capture?  A browser over its taps, blocks, steps, heads and words; the picture follows.

Each tap is drawn as suits its value:

    words   cross-attention, as a map for each word        tokens  vectors of tokens, as their sizes
    row     self-attention, as what one token listens to   plain   anything else, as it is
    sheet   latents, channel by channel
"""

import re

import numpy as np

from ..hooks import Record
from .canvas import colour_bar, dress, entitle, figure, sheet, title_of
from .controls import Live
from .maps import attention_rows, show_heads, show_words
from .sheets import latent_sheet

AXES = {  # in words, of the letters in a layout
    "n": "token",
    "m": "token listened to",
    "c": "channel",
    "d": "channel of the head",
    "l": "text token",
}


def explore(seen, words=None, grid=None, video=None):
    """Browse a capture: which tap, block, step, head and word, and the picture follows.   -> Live

    seen   Record of a capture;  words: pipe.words(prompt), for cross-attention
    grid   pipe.grid, to fold tokens into frames;  video: of this run, to lay the maps over its frames

    Cross-attention is drawn as word maps, self-attention as what one token listens to, streams and outputs as
    the size of each token's vector, latents as sheets. Each control is there only where there is a choice.
    """
    if not isinstance(seen, Record) or not len(seen):
        got = "an empty one" if isinstance(seen, Record) else type(seen).__name__
        raise ValueError(
            f"explore needs a Record with something in it, got {got}: "
            'with capture(dit, "blocks.*.cross_attn.probs") as seen: ...'
        )
    if grid is not None and (np.ndim(grid) != 1 or len(grid) != 3):
        raise ValueError(f"grid={grid!r}; expected (frames, height, width) in tokens: pipe.grid")
    if not all(hasattr(word, "tokens") for word in words or ()):
        raise ValueError("words= holds something else than words; expected pipe.words(prompt)")
    browser = _Browser(seen, words or (), grid, video)
    return Live(browser.draw, browser.controls(), uses=browser.uses)


def _kind(where):
    """The tap's name without its block's number: blocks.3.cross_attn.probs -> "cross_attn.probs"."""
    # All up to the first number: blocks, and which of them.
    return str(where) if where.block is None else re.sub(r"^(.*?\.)?\d+\.", "", str(where))


def _distinct(values):
    """Each once, in order, without None."""
    return [value for value in dict.fromkeys(values) if value is not None]


class _Browser:
    """The visits of a capture by kind of tap, what can be chosen among them, and the picture of a choice."""

    def __init__(self, seen, words, grid, video):
        self.grid, self.video = grid, video
        kinds = {}
        for where, value in seen:
            kinds.setdefault(_kind(where), []).append((where, value))
        # The word maps first, where there are any.
        self.kinds = dict(sorted(kinds.items(), key=lambda kind: "cross_attn.probs" not in kind[0]))
        texts = [word.text for word in words]
        # A word that stands twice in the prompt is two choices: "red (1)" and "red (4)".
        self.words = {
            text if texts.count(text) == 1 else f"{text} ({i})": word
            for i, (text, word) in enumerate(zip(texts, words))
        }
        self.choices = {tap: self._choices(visits) for tap, visits in self.kinds.items()}

    def _choices(self, visits):
        """{control: what it can be} for one kind of tap."""
        where, value = visits[0]
        choices = {
            axis: _distinct(getattr(where, axis) for where, _ in visits)
            for axis in ("block", "step", "branch")
        }
        heads = value.shape[where.axis("heads")] if "heads" in where.layout.split() else 1
        if heads > 1:
            choices["head"] = ["mean", *["each"] * bool(self.words), *map(str, range(heads))]
        picture = self._picture_of(where, value)
        if picture == "words":
            choices["word"] = ["all", *self.words]
        if picture == "row":
            choices["query"] = list(range(int(np.prod(self.grid))))
        return choices

    def controls(self):
        """{control: what it can be} for all of them, where there is more than one choice."""
        controls = {"tap": list(self.kinds)}
        for choices in self.choices.values():
            for name, values in choices.items():
                # The same control serves every tap that has it: what can be chosen is what any of them has.
                merged = _distinct([*controls.get(name, ()), *values])
                controls[name] = sorted(merged) if name in ("block", "step") else merged
        return {name: values for name, values in controls.items() if len(values) > 1}

    def uses(self, tap=None, **now):
        """The controls that matter for the tap in view."""
        choices = self.choices[tap or next(iter(self.kinds))]
        return {"tap", *(name for name, values in choices.items() if values)}

    def _picture_of(self, where, value):
        """Which picture suits a value: see the top of this file."""
        # -1 fits no axis: without a grid nothing can be folded into frames.
        axes, tokens = where.layout.split(), int(np.prod(self.grid)) if self.grid else -1
        if axes[-2:] == ["n", "m"] and value.shape[-2] == tokens:
            return "row" if value.shape[-1] == tokens else "words" if self.words else "plain"
        if axes[1:] == ["c", "f", "h", "w"]:
            return "sheet"
        return "tokens" if axes[-2:] == ["n", "c"] and value.shape[-2] == tokens else "plain"

    def draw(self, tap=None, block=None, step=None, branch=None, head="mean", word="all", query=0):
        """The picture of one visit; a coordinate that no visit of this tap has is passed over.   -> Figure"""
        visits = self.kinds[tap or next(iter(self.kinds))]
        for axis, wanted in (("block", block), ("step", step), ("branch", branch)):
            # Sliders are shared by all taps: a step of one may be none of another, then all of it stays.
            visits = [visit for visit in visits if getattr(visit[0], axis) == wanted] or visits
        where, value = visits[0]
        drawn = self._picture(where, value.float()[0], head, word, query)
        run = {"step": where.step, "branch": where.branch}
        known = [f"{axis} {value}" for axis, value in run.items() if value is not None]
        entitle(drawn, f"{title_of(drawn)}\n{', '.join([str(where), *known])}")
        return drawn

    def _picture(self, where, value, head, word, query):
        """head: "mean", "each" or a number as text;  word: "all" or a key of words;  value: without batch"""
        kind = self._picture_of(where, value)
        with_heads = "heads" in where.layout.split()
        number = min(int(head), len(value) - 1) if with_heads and head.isdigit() else None
        if kind == "row":
            which = {"mean": "mean", "each": None}.get(head, number)
            return attention_rows(value, self.grid, query, self.video, which)
        if kind == "words" and head == "each":
            one = self.words.get(word, next(iter(self.words.values())))
            return show_heads(value, one, self.grid, self.video)
        if kind == "words":
            words = list(self.words.values()) if word == "all" else [self.words[word]]
            return show_words(value, words, self.grid, self.video, number)
        if kind == "sheet":
            return latent_sheet(value)
        if kind == "tokens":
            return _sizes(value, self.grid)
        if with_heads:
            value = value.mean(0) if number is None else value[number]
        return _as_it_is(value, where.layout.split())


def _sizes(value, grid):
    """The size of each token's vector [n, c], frame beside frame.   -> Figure"""
    tiles = value.square().mean(1).sqrt().reshape(1, *grid).numpy()  # [1, f, h, w]
    image, _ = sheet(tiles, [""], range(grid[0]), 1.1, left=1.0)
    colour_bar(image.axes, image, "root mean square")
    return dress(image.axes, "Size of each token's vector", "latent frame", "height").figure


def _as_it_is(value, axes):
    """The last two axes of a value as colours, the mean over the others.   -> Figure"""
    value = value.reshape(1, -1) if value.ndim < 2 else value.reshape(-1, *value.shape[-2:]).mean(0)
    _, ax = figure(size=(5.6, 2.6))
    image = ax.imshow(value.numpy(), cmap="viridis", aspect="auto", interpolation="nearest")
    colour_bar(ax, image, "value")
    y, x = ["", *(AXES.get(axis, axis) for axis in axes)][-2:]
    return dress(ax, "As it is", x, y if len(axes) > 2 else "").figure
