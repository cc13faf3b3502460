"""How do I turn the knobs?  A picture with sliders, a browser for what a capture saw, and two videos side by side.

The picture is an ordinary output with the controls above it: with a kernel it follows them, without one (an exported page, a
notebook read on the web, no ipywidgets) it stays as it was last drawn.
"""

import numpy as np

from ..hooks import Record
from ..video import Video
from .canvas import dress, entitle, figure, frames_of, heat, png, title_of
from .maps import attention_rows, captioned, latent_sheet, show_heads, show_words


class Live:
    """A picture that follows its controls: see `live`.  `set(step=3)` does by program what a slider does; `picture` is the present one."""

    def __init__(self, draw, controls, uses=None):
        self.uses = uses or (lambda **now: set(controls))  # which controls matter now; the others are hidden
        self.draw, self.choices = draw, {name: _options(name, value) for name, value in controls.items()}
        self.now = {name: start for name, (_, start) in self.choices.items()}
        self.picture = draw(**self.now)
        self.widgets, self._handle = {}, None

    def set(self, **changes):
        """Redraw with some controls changed.   -> the picture.   ValueError for a control or a value that does not exist"""
        for name, value in changes.items():
            if name not in self.choices:
                raise ValueError(f"no control {name!r}; there are {', '.join(self.choices)}")
            known = self.choices[name][0]
            if not any(value is other or value == other for other in known):
                raise ValueError(
                    f"{name}={value!r}; expected one of {', '.join(map(str, known[:12]))}{', ...' * (len(known) > 12)}"
                )
        self.picture = self.draw(**(self.now | changes))
        self.now |= changes
        self._refresh()
        return self.picture

    def _refresh(self):
        """Bring what is on the page up to date: the picture, and which controls are there."""
        if self._handle is not None:
            self._handle.update(self.picture)
        needed = self.uses(**self.now)
        for name, widget in self.widgets.items():
            widget.layout.display = None if name in needed else "none"

    def panel(self):
        """The controls as widgets, and a place for error messages.   -> ipywidgets.VBox"""
        import ipywidgets

        messages = ipywidgets.Output()

        def follow(name):
            def changed(change):
                messages.clear_output()
                with messages:  # an error in the student's own function is shown below the controls, not lost
                    self.picture = self.draw(**(self.now | {name: change["new"]}))
                    self.now[name] = change["new"]
                self._refresh()

            return changed

        for name, (values, _) in self.choices.items():
            shown = [
                (f"{v:g}" if isinstance(v, float) else "all" if v is None else str(v), v) for v in values
            ]
            how = dict(options=shown, value=self.now[name], description=name.replace("_", " "))
            words = any(isinstance(v, str) for v in values)
            self.widgets[name] = (
                ipywidgets.Dropdown(**how)
                if words
                else ipywidgets.SelectionSlider(**how, continuous_update=False)
            )
            self.widgets[name].observe(follow(name), "value")
        self._refresh()
        return ipywidgets.VBox([*self.widgets.values(), messages])

    def _ipython_display_(self):
        from IPython.display import display

        if self.choices and _has_widgets():
            display(self.panel())
        self._handle = display(self.picture, display_id=True)

    def _repr_png_(self):
        return png(self.picture) if hasattr(self.picture, "savefig") else None

    def __repr__(self):
        return f"Live({', '.join(f'{name}={value!r}' for name, value in self.now.items())}): set(name=value) redraws"


def _has_widgets():
    from importlib.util import find_spec

    return find_spec("ipywidgets") is not None


def _options(name, value):
    """(what a control can be, where it starts) of a range, a list, a (value, value, step) triple, or a bool."""
    if isinstance(value, bool):
        return [False, True], value
    if (
        isinstance(value, tuple)
        and len(value) == 3
        and all(isinstance(v, (int, float)) for v in value)
        and value[0] < value[1]
        and value[2] > 0
    ):
        low, high, step = value
        values = [round(low + i * step, 10) for i in range(int((high - low) / step + 1e-9) + 1)]
        return values, values[0]
    values = list(value) if isinstance(value, (range, list, tuple)) else []
    if not values:
        raise ValueError(
            f"control {name}={value!r}; expected a range, a list of choices, (low, high, step), or True or False"
        )
    return values, values[0]


def live(draw, **controls):
    """A picture with controls: `live(lambda shift: schedule_plot(schedule(20, shift)), shift=(1, 10, 0.5))`.   -> Live

    draw      a function of the controls, by name, that returns a Figure, a Video or anything a notebook can show
    controls  name=range(...), name=[choices], name=(low, high, step), or name=True; each starts at its first value
    """
    return Live(draw, controls)


# ---- a capture --------------------------------------------------------------------------------------------------------


def explore(seen, words=None, grid=None, video=None):
    """Browse a capture: which tap, block, step, head and word, and the picture follows.   -> Live

    seen   Record of a capture;  words: pipe.words(prompt), for cross-attention;  grid: pipe.grid;  video: to lay the maps over its frames

    Cross-attention is drawn as word maps, self-attention as what one token listens to, streams and outputs as the size of each token's
    vector, latents as sheets. Each control is there only where there is a choice.
    """
    if not isinstance(seen, Record) or not len(seen):
        got = "an empty one" if isinstance(seen, Record) else type(seen).__name__
        raise ValueError(
            f'explore needs a Record with something in it, got {got}: with capture(dit, "blocks.*.cross_attn.probs") as seen: ...'
        )
    kinds = {}
    for where, value in seen:
        kinds.setdefault(_kind(where), []).append((where, value))
    kinds = dict(
        sorted(kinds.items(), key=lambda kind: "cross_attn.probs" not in kind[0])
    )  # the word maps first, where there are any
    browser = _Browser(kinds, list(words or []), grid, video)
    return Live(browser.draw, browser.controls(), browser.uses)


def _kind(where):
    """The tap's name without its block's number: blocks.*.cross_attn.probs -> "cross_attn.probs"."""
    parts = str(where).split(".")
    numbered = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[numbered[0] + 1 :]) if numbered and where.block is not None else str(where)


class _Browser:
    def __init__(self, kinds, words, grid, video):
        self.kinds, self.grid, self.video = kinds, grid, video
        texts = [word.text for word in words]
        self.words = {
            text if texts.count(text) == 1 else f"{text} ({i})": word
            for i, (text, word) in enumerate(zip(texts, words))
        }

    def controls(self):
        visits = [visit for found in self.kinds.values() for visit in found]
        distinct = lambda of: list(dict.fromkeys(value for value in map(of, visits) if value is not None))
        choices = {
            "tap": list(self.kinds),
            "block": sorted(distinct(lambda v: v[0].block)),
            "step": sorted(distinct(lambda v: v[0].step)),
            "branch": distinct(lambda v: v[0].branch),
        }
        layouts = [where.layout.split() for where, _ in visits]
        if any("heads" in axes for axes in layouts):
            most = max(
                value.shape[where.axis("heads")] for where, value in visits if "heads" in where.layout.split()
            )
            choices["head"] = (
                ["mean", *(["each"] if self.words else []), *map(str, range(most))] if most > 1 else []
            )
        drawn_as = {self._how(where, value) for where, value in visits}
        if "words" in drawn_as:
            choices["word"] = ["all", *self.words]
        if "row" in drawn_as:
            choices["query"] = list(range(int(np.prod(self.grid))))
        return {name: values for name, values in choices.items() if len(values) > 1}

    def uses(self, tap=None, word="all", **now):
        """The controls that matter for the tap in view."""
        found = self.kinds[next(iter(self.kinds)) if tap is None else tap]
        where, value = found[0]
        there = {
            axis
            for axis in ("block", "step", "branch")
            if any(getattr(w, axis) is not None for w, _ in found)
        }
        more = {"words": {"word"}, "row": {"query"}}.get(self._how(where, value), set())
        return {"tap"} | there | more | ({"head"} if "heads" in where.layout.split() else set())

    def _how(self, where, value):
        """Which picture suits a value: words, row, sheet, tokens or plain."""
        axes, tokens = where.layout.split(), int(np.prod(self.grid)) if self.grid else -1
        if axes[-2:] == ["n", "m"] and value.shape[-2] == tokens:
            return "row" if value.shape[-1] == tokens else "words" if self.words else "plain"
        if axes[1:] == ["c", "f", "h", "w"]:
            return "sheet"
        return "tokens" if axes[-2:] == ["n", "c"] and value.shape[-2] == tokens else "plain"

    def draw(self, tap=None, block=None, step=None, branch=None, head="mean", word="all", query=0):
        found = self.kinds[next(iter(self.kinds)) if tap is None else tap]
        for axis, wanted in (("block", block), ("step", step), ("branch", branch)):
            same = [visit for visit in found if getattr(visit[0], axis) == wanted]
            found = same if wanted is not None and same else found
        where, value = found[0]
        place = ", ".join(
            [
                str(where),
                *(
                    f"{axis} {getattr(where, axis)}"
                    for axis in ("step", "branch")
                    if getattr(where, axis) is not None
                ),
            ]
        )
        drawn = self._picture(where, value.float()[0], head, word, query)
        entitle(drawn, f"{title_of(drawn)}\n{place}")
        return drawn

    def _picture(self, where, value, head, word, query):
        axes, how = where.layout.split()[1:], self._how(where, value)
        number = None if head in ("mean", "each") else min(int(head), value.shape[0] - 1)
        if how == "row":
            picked = (
                value.mean(0, keepdim=True)
                if head == "mean"
                else value
                if number is None
                else value[number : number + 1]
            )
            return attention_rows(picked, self.grid, query, self.video)
        if how == "words" and head == "each":
            return show_heads(
                value, self.words.get(word, next(iter(self.words.values()))), self.grid, self.video
            )
        if how == "words":
            return show_words(
                value,
                list(self.words.values()) if word == "all" else [self.words[word]],
                self.grid,
                self.video,
                number,
            )
        if how == "sheet":
            return latent_sheet(value)
        if how == "tokens":
            return self._sizes(value)
        if "heads" in axes:
            value = value.mean(0) if number is None else value[number]
        while value.ndim > 2:
            value = value.mean(0)
        drawn, ax = figure(size=(5.6, 2.6))
        value = value.numpy() if value.ndim == 2 else value.numpy()[None]
        image = ax.imshow(value, cmap="viridis", aspect="auto", interpolation="nearest")
        drawn.colorbar(image, ax=ax).ax.tick_params(labelsize=7)
        names = {
            "n": "token",
            "m": "token listened to",
            "c": "channel",
            "d": "channel of the head",
            "l": "text token",
        }
        return dress(
            ax,
            "As it is",
            names.get(axes[-1], axes[-1]),
            names.get(axes[-2], axes[-2]) if len(axes) > 1 else "",
        ).figure

    def _sizes(self, value):
        """The size of each token's vector, frame beside frame.   value [n, c]"""
        f, h, w = self.grid
        drawn, ax = figure(size=(5.6, 1.9))
        size = value.square().mean(1).sqrt().reshape(f, h, w).permute(1, 0, 2).reshape(h, f * w).numpy()
        heat(ax, size, [""] * h, [""] * (f * w), bar="root mean square", write="")
        ax.set_xticks([w * k + (w - 1) / 2 for k in range(f)], range(f)), ax.set_yticks([])
        for k in range(1, f):
            ax.axvline(w * k - 0.5, color="white", linewidth=2)
        return dress(ax, "Size of each token's vector", "latent frame", "height").figure


# ---- two videos -------------------------------------------------------------------------------------------------------


def compare(a, b, labels=("a", "b"), difference=False):
    """Two videos side by side, in step, as one Video; the shorter one waits on its last frame.

    labels  what stands above each;  difference: a third panel, how far apart the colours are (0 black)
    Raises ValueError for other heights, widths or speeds.
    """
    left, right = frames_of(a), frames_of(b)
    kinds = [(*frames.shape[1:3], getattr(video, "fps", 16)) for frames, video in ((left, a), (right, b))]
    if kinds[0] != kinds[1]:
        got = " and ".join("{} x {} at {:g} fps".format(*kind) for kind in kinds)
        raise ValueError(f"compare got videos of {got}; expected the same height, width and fps")
    if len(labels) != 2:
        raise ValueError(f"labels={labels!r}; expected two")
    count = max(len(left), len(right))
    left, right = (frames[np.minimum(np.arange(count), len(frames) - 1)] for frames in (left, right))
    panels, names = [left, right], list(labels)
    if difference:
        panels.append(np.abs(left.astype(int) - right).astype(np.uint8))
        names.append("difference")
    times = max(1, round(160 / left.shape[2]))
    panels = [panel.repeat(times, 1).repeat(times, 2) for panel in panels]
    return Video(captioned(np.concatenate(panels, 2), names), kinds[0][2])
