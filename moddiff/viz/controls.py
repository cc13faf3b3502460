"""How do I turn the knobs?  A picture with sliders, and two videos side by side.

The picture is an ordinary output with the controls above it: with a kernel it follows them, without one (an
exported page, a notebook read on the web, no ipywidgets) it stays as it was last drawn.
"""

from functools import partial

import numpy as np

from ..video import Video
from .canvas import captioned, extra, frames_of, png


class Live:
    """A picture that follows its controls: see `live`.  `set(step=3)` does by program what a slider does.

    picture  the present one;  now: {control: its value};  choices: {control: [what it can be]}
    """

    def __init__(self, draw, controls, start=None, uses=None):
        self.draw, self.uses = draw, uses  # uses: which controls matter now; the others are hidden
        self.choices = {name: _choices(name, value) for name, value in controls.items()}
        self._check(start or {})
        self.now = {name: choices[0] for name, choices in self.choices.items()} | (start or {})
        self.picture = draw(**self.now)
        self.widgets, self._handle = {}, None

    def set(self, **changes):
        """Redraw with some controls changed.   -> the picture.  ValueError for what cannot be chosen"""
        self._check(changes)
        self._redraw(changes)
        self._refresh()
        return self.picture

    def _redraw(self, changes):
        """The settings change only when the picture could be drawn."""
        self.picture = self.draw(**(self.now | changes))
        self.now |= changes

    def _check(self, changes):
        for name, value in changes.items():
            if name not in self.choices:
                raise ValueError(f"no control {name!r}; there are {', '.join(self.choices)}")
            known = self.choices[name]
            if value not in known:
                some = ", ".join(map(str, known[:12])) + ", ..." * (len(known) > 12)
                raise ValueError(f"{name}={value!r}; expected one of {some}")

    def _refresh(self):
        """Bring what is on the page up to date: the picture, and which controls are there."""
        if self._handle is not None:
            # A display that is updated in place, so that a slider does not add a picture at each move.
            self._handle.update(self.picture)
        needed = self.choices if self.uses is None else self.uses(**self.now)
        for name, widget in self.widgets.items():
            widget.layout.display = None if name in needed else "none"

    def panel(self):
        """The controls as widgets, and a place for error messages.   -> ipywidgets.VBox"""
        ipywidgets = extra("ipywidgets")
        messages = ipywidgets.Output()

        def follow(name, change):
            messages.clear_output()
            with messages:  # an error in the student's own function is shown below the controls, not lost
                self._redraw({name: change["new"]})
            self._refresh()

        for name, choices in self.choices.items():
            shown = [(f"{v:g}" if isinstance(v, float) else str(v), v) for v in choices]
            # Words are picked from a list, numbers slid along and drawn when let go: a picture takes time.
            words = any(isinstance(v, str) for v in choices)
            kind = (
                ipywidgets.Dropdown if words else partial(ipywidgets.SelectionSlider, continuous_update=False)
            )
            widget = kind(options=shown, value=self.now[name], description=name.replace("_", " "))
            widget.observe(partial(follow, name), "value")
            self.widgets[name] = widget
        self._refresh()
        return ipywidgets.VBox([*self.widgets.values(), messages])

    def _ipython_display_(self):
        from IPython.display import display

        if self.choices:
            try:
                display(self.panel())
            except ModuleNotFoundError as error:  # the picture is worth showing without them
                print(f"No sliders: {error}")
        self._handle = display(self.picture, display_id=True)

    def _repr_png_(self):
        return png(self.picture) if hasattr(self.picture, "savefig") else None

    def __repr__(self):
        now = ", ".join(f"{name}={value!r}" for name, value in self.now.items())
        return f"Live({now}): set(name=value) redraws"


def _choices(name, value):
    """What a control can be, its start first: of a range, a list, a (low, high, step) triple, or a bool."""
    if isinstance(value, bool):
        return [value, not value]
    choices = list(value) if isinstance(value, range | list | tuple) else []
    three = (
        isinstance(value, tuple) and len(choices) == 3 and all(isinstance(v, int | float) for v in choices)
    )
    if three and choices[0] < choices[1] and choices[2] > 0:
        low, high, step = choices
        # Counted, not added up: 0.1 ten times is not 1. The 1e-9 keeps a last value lost in rounding.
        return [round(low + i * step, 10) for i in range(int((high - low) / step + 1e-9) + 1)]
    if not choices:
        raise ValueError(
            f"control {name}={value!r}; expected a range, a list of choices, (low, high, step), "
            "or True or False"
        )
    return choices


def live(draw, start=None, **controls):
    """A picture with controls.   -> Live

    live(lambda shift: schedule_plot(schedule(20, shift)), shift=(1, 10, 0.5))

    draw      a function of the controls, by name, that returns a Figure, a Video or what a notebook shows
    start     {name: value} where a control does not start at its first value: start={"shift": 5}
    controls  name=range(...), name=[choices], name=(low, high, step), or name=True
    """
    if not callable(draw):
        raise TypeError(
            f"live got {type(draw).__name__}; expected a function that draws, such as lambda step: ..."
        )
    return Live(draw, controls, start)


# ---- two videos -------------------------------------------------------------------------------------------


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
    panels, names = [left, right], list(map(str, labels))
    if difference:
        panels.append(np.abs(left.astype(int) - right).astype(np.uint8))
        names.append("difference")
    times = max(1, round(160 / left.shape[2]))
    side_by_side = np.concatenate(panels, 2).repeat(times, 1).repeat(times, 2)
    return Video(captioned(side_by_side, names), kinds[0][2])
