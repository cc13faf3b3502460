"""How do I turn the knobs?  A picture with sliders, and two videos side by side.

The picture is an ordinary output with the controls above it: with a kernel it follows them, without one (an
exported page, a notebook read on the web, no ipywidgets) it stays as it was last drawn.

It is drawn in a thread of its own, so that the kernel hears the next move of the hand, and Stop, meanwhile.
"""

import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from contextvars import copy_context

import numpy as np
import torch

from ..run import Stop, watch
from ..video import Video
from .canvas import captioned, extra, frames_of, png

QUICK = 0.5  # seconds: a picture that takes longer is drawn when the slider is let go, not while it moves
PATIENCE = 0.3  # seconds that a run may take before it shows how far it is


class Live:
    """A picture that follows its controls: see `live`.  `set(step=3)` does by program what a slider does.

    picture  the present one;  now: {control: its value};  choices: {control: [what it can be]}

    The newest move of the hand counts: a run that an older one began ends at its next step. `stop()`, and the
    button that comes with a run's progress, end it too. What was drawn last then stays, with its settings.
    """

    def __init__(self, draw, controls, start=None, uses=None):
        self.draw, self.uses = draw, uses  # uses: which controls matter now; the others are hidden
        self.choices = {name: _choices(name, value) for name, value in controls.items()}
        self._check(start or {})
        self.widgets, self._panel, self._handle = {}, None, None
        self._pen = threading.RLock()  # who holds it draws
        self._turn = threading.Lock()  # guards the next two
        self._wanted = None  # the newest settings, as long as nobody draws them
        self._ended = False  # is the run that is being drawn to end?
        self._thread = ThreadPoolExecutor(1, "live")
        self._gradients = torch.is_grad_enabled()  # a thread begins with them on
        self.now, self.picture = {}, None
        self._draw({name: choices[0] for name, choices in self.choices.items()} | (start or {}))

    def set(self, **changes):
        """Redraw with some controls changed.   -> the picture.  ValueError for what cannot be chosen"""
        self._check(changes)
        self.stop()
        with self._pen:
            self._ended = False
            with suppress(Stop):
                self._draw(self.now | changes)
            if self._panel:
                self._panel.put(self.now)
        return self.picture

    def stop(self):
        """End the run that is being drawn, at its next step; the last picture stays."""
        with self._turn:
            self._wanted, self._ended = None, True

    def wait(self):
        """Until what the controls asked for is drawn.   -> the picture"""
        self._thread.submit(self._check, {}).result()  # its turn comes after all that was asked for
        return self.picture

    def _check(self, changes):
        for name, value in changes.items():
            if name not in self.choices:
                raise ValueError(f"no control {name!r}; there are {', '.join(self.choices)}")
            known = self.choices[name]
            if value not in known:
                some = ", ".join(map(str, known[:12])) + ", ..." * (len(known) > 12)
                raise ValueError(f"{name}={value!r}; expected one of {some}")

    # ---- drawing, in the thread of `set` or of the controls

    def _draw(self, wanted):
        """Draw and show; the settings change only when the picture could be drawn."""
        with self._pen:
            self._began = time.perf_counter()
            try:
                with torch.set_grad_enabled(self._gradients), watch(self._at_step):
                    picture = self.draw(**wanted)
                self.picture, self.now = picture, wanted
                if self._handle is not None:
                    # Updated in place, so that a slider does not add a picture at each move.
                    self._handle.update(picture)
            finally:
                self.seconds = time.perf_counter() - self._began
                self._refresh()

    def _at_step(self, step, steps):
        """A run in the picture begins a step: show how far it is, or end it."""
        if self._ended or self._wanted is not None:
            raise Stop
        if self._panel and step and time.perf_counter() - self._began > PATIENCE:
            self._panel.show_step(step, steps)

    def _refresh(self):
        """Bring the controls up to date."""
        if self._panel:
            needed = self.choices if self.uses is None else self.uses(**self.now)
            self._panel.refresh(needed, follows=self.seconds < QUICK)

    # ---- what the controls do

    def _moved(self):
        """A control has another value: draw it soon, in place of what else waits to be drawn."""
        with self._turn:
            self._wanted = self.now | {name: widget.value for name, widget in self.widgets.items()}
        # In the context of the cell that shows the picture: what `draw` prints comes out there.
        self._thread.submit(self._context.copy().run, self._next).add_done_callback(self._drawn)

    def _next(self):
        """Draw what is wanted now; the moves before it find nothing left to do."""
        with self._turn:
            wanted, self._wanted, self._ended = self._wanted, None, False
        if wanted is None:
            return
        self._panel.say("")
        if wanted != self.now:
            self._draw(wanted)

    def _drawn(self, future):
        """What went wrong is shown below the controls; after a stop they say again what the picture is."""
        error = future.exception()
        if isinstance(error, Stop):
            if self._wanted is None:
                self._panel.say("stopped: the picture is the one before")
                self._panel.put(self.now)
        elif error is not None:
            self._panel.say(_of_the_reader(error))

    def panel(self):
        """The controls as widgets, the progress of a run, and room for messages.   -> ipywidgets.VBox"""
        self._context = copy_context()
        self._panel = _Panel(self)
        self.widgets = self._panel.controls
        self._refresh()
        return self._panel.box

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


class _Panel:
    """The widgets of a Live: a control for each of its choices, a run's progress with Stop, messages."""

    def __init__(self, live):
        widgets = extra("ipywidgets")
        self.controls, self.being_put = {}, False
        for name, choices in live.choices.items():
            shown = [(f"{v:g}" if isinstance(v, float) else str(v), v) for v in choices]
            # Words are picked from a list, numbers slid along.
            words = any(isinstance(v, str) for v in choices)
            kind = widgets.Dropdown if words else widgets.SelectionSlider
            control = kind(options=shown, value=live.now[name], description=name.replace("_", " "))
            control.observe(lambda _: self.being_put or live._moved(), "value")
            self.controls[name] = control
        self.bar, self.count = widgets.IntProgress(layout={"width": "10em"}), widgets.Label()
        self.button = widgets.Button(description="Stop", icon="stop", layout={"width": "6em"})
        self.button.on_click(lambda _: live.stop())
        self.run = widgets.HBox([self.bar, self.count, self.button], layout={"display": "none"})
        self.messages = widgets.Output()
        self.box = widgets.VBox([*self.controls.values(), self.run, self.messages])

    def show_step(self, step, steps):
        self.bar.max, self.bar.value = steps, step
        self.count.value = f"step {step + 1} of {steps}"
        self.run.layout.display = None

    def refresh(self, needed, follows):
        """needed: the controls that matter now;  follows: is a picture drawn while the hand moves?"""
        self.run.layout.display = "none"
        for name, control in self.controls.items():
            control.layout.display = None if name in needed else "none"
            if hasattr(control, "continuous_update"):
                control.continuous_update = follows

    def say(self, text):
        # Set as a whole: `with messages:` would catch what the kernel's own thread prints meanwhile.
        self.messages.outputs = [{"output_type": "stream", "name": "stderr", "text": text}] if text else []

    def put(self, values):
        """Show these values on the controls, which is no move of the hand."""
        self.being_put = True
        try:
            for name, value in values.items():
                self.controls[name].value = value
        finally:
            self.being_put = False


def _of_the_reader(error):
    """The traceback of an error from the reader's own function on, without the frames that called it."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [i for i, frame in enumerate(frames) if frame.filename == __file__]
    told = [*traceback.format_list(frames[ours[-1] + 1 :]), *traceback.format_exception_only(error)]
    return "".join(told)


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
