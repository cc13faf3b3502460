"""Does the picture follow its controls, in a notebook and without one, and do two videos play in step?"""

import re
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import small
import torch

from moddiff.hooks import live_handles, patch, scale_by
from moddiff.run import begin_step
from moddiff.video import Video
from moddiff.viz import controls
from moddiff.viz.canvas import figure
from moddiff.viz.controls import compare, live

PROMPT = "a red circle moving left"


@pytest.fixture
def shown(monkeypatch):
    """What a notebook would show: display() calls, and the pictures put in the place of earlier ones."""
    import IPython.display

    calls = SimpleNamespace(displayed=[], updated=[])

    def display(thing, display_id=None):
        calls.displayed.append(thing)
        return SimpleNamespace(update=calls.updated.append) if display_id else None

    monkeypatch.setattr(IPython.display, "display", display)
    return calls


# ---- controls ----


def test_a_live_picture_is_drawn_with_the_first_of_each_choice():
    knob = live(lambda **now: now, step=range(3), shift=(1, 3, 0.5), solver=["euler", "unipc"], guided=True)
    assert knob.picture == dict(step=0, shift=1, solver="euler", guided=True)
    assert (
        knob.set(shift=2.5, guided=False)
        == dict(step=0, shift=2.5, solver="euler", guided=False)
        == knob.picture
    )
    assert [len(values) for values in knob.choices.values()] == [3, 5, 2, 2] and repr(knob).startswith(
        "Live(step=0, shift=2.5, solver='euler'"
    )


@pytest.mark.parametrize(
    "bad, message",
    [
        (dict(step=7), "step=7; expected one of 0, 1, 2"),
        (dict(stap=1), "no control 'stap'; there are step"),
    ],
)
def test_a_control_that_does_not_exist_is_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        live(lambda step: step, step=range(3)).set(**bad)


@pytest.mark.parametrize("control", [[], (3, 1, 1), "euler", 3])
def test_a_control_without_choices_is_refused(control):
    if control == (3, 1, 1):  # a plain choice of three
        assert live(lambda step: step, step=control).choices["step"] == [3, 1, 1]
        return
    with pytest.raises(
        ValueError,
        match=re.escape(f"control step={control!r}; expected a range, a list of choices, (low, high, step)"),
    ):
        live(lambda step: step, step=control)


def test_moving_a_slider_puts_a_new_picture_in_the_place_of_the_old(shown):
    knob = live(lambda step, word: f"{word} at {step}", step=range(4), word=["red", "circle"])
    knob._ipython_display_()
    panel, picture = shown.displayed
    assert picture == "red at 0"
    kinds = [type(widget).__name__ for widget in panel.children]
    assert kinds == ["SelectionSlider", "Dropdown", "HBox", "Output"]
    knob.widgets["step"].value = 3
    assert knob.wait() == "red at 3"
    knob.widgets["word"].value = "circle"
    assert knob.wait() == "circle at 3" and shown.updated == ["red at 3", "circle at 3"]
    assert knob.widgets["step"].description == "step"


class Slow:
    """A picture that takes a run of five steps, each of which waits for `go`; it keeps what was begun."""

    def __init__(self):
        self.go, self.begun = threading.Semaphore(5), []  # the first picture is drawn at once

    def __call__(self, seed):
        for step in range(5):
            begin_step(step, 5)
            self.begun.append((seed, step))
            assert self.go.acquire(timeout=60)
        return f"seed {seed}"


def until(true):
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture
def slow(shown):
    draw = Slow()
    knob = live(draw, seed=range(9))
    knob._ipython_display_()
    draw.begun.clear()
    yield SimpleNamespace(knob=knob, draw=draw, slider=knob.widgets["seed"], shown=shown)
    draw.go.release(100)
    knob.wait()


def test_only_the_newest_move_is_drawn_and_the_run_of_an_older_one_ends(slow):
    slow.slider.value = 1
    until(lambda: (1, 0) in slow.draw.begun)
    for seed in (2, 3, 4):  # the hand goes on while the picture of 1 is at its first step
        slow.slider.value = seed
    slow.draw.go.release(100)
    assert slow.knob.wait() == "seed 4" and slow.knob.now == {"seed": 4}
    assert slow.draw.begun == [(1, 0), *((4, step) for step in range(5))]
    assert slow.shown.updated == ["seed 4"]


def test_stop_ends_the_run_and_leaves_the_last_picture_with_its_settings(slow, monkeypatch):
    monkeypatch.setattr(controls, "PATIENCE", 0)
    panel = slow.knob._panel
    assert panel.run.layout.display == "none"
    slow.slider.value = 1
    slow.draw.go.release(2)
    until(lambda: (1, 2) in slow.draw.begun)
    assert panel.run.layout.display is None and panel.count.value == "step 3 of 5"
    assert (panel.bar.value, panel.bar.max) == (2, 5)
    panel.button.click()
    slow.draw.go.release(1)
    assert slow.knob.wait() == "seed 0" and slow.knob.now == {"seed": 0} and slow.slider.value == 0
    assert slow.draw.begun == [(1, 0), (1, 1), (1, 2)] and slow.shown.updated == []
    assert panel.run.layout.display == "none" and "stopped" in panel.messages.outputs[0]["text"]
    slow.draw.go.release(100)
    slow.slider.value = 5  # and it goes on as before
    assert slow.knob.wait() == "seed 5" and not panel.messages.outputs


def test_set_comes_before_what_the_hand_has_begun(slow):
    slow.slider.value = 1
    until(lambda: (1, 0) in slow.draw.begun)
    slow.draw.go.release(100)
    assert slow.knob.set(seed=7) == "seed 7" == slow.knob.wait()
    assert slow.slider.value == 7 and slow.shown.updated[-1] == "seed 7"


def test_a_run_that_is_stopped_in_a_picture_leaves_no_patch_behind(shown, tmp_path):
    pipe, stopped = small.pipeline(tmp_path), []
    plain = pipe(PROMPT)

    def draw(loudness):
        with patch(pipe.dit, "blocks.*.cross_attn.out", scale_by(loudness)):
            for state in pipe.steps(PROMPT):
                if state.step == 1 and loudness:
                    knob.stop()
                    stopped.append(live_handles())
        return state.next

    knob = live(draw, loudness=range(3))
    first = knob.picture
    knob._ipython_display_()
    knob.widgets["loudness"].value = 2
    assert knob.wait() is first and len(stopped) == 1 and stopped[0]
    assert not live_handles() and pipe(PROMPT) == plain


def test_an_error_in_the_readers_function_is_shown_below_the_controls(shown):
    def draw(step):
        if step == 2:
            raise ZeroDivisionError("the student's own mistake")
        return f"step {step}"

    knob = live(draw, step=range(4))
    knob._ipython_display_()
    knob.widgets["step"].value = 2
    assert knob.wait() == "step 0"
    (said,) = knob._panel.messages.outputs
    assert "the student's own mistake" in said["text"] and "in draw\n" in said["text"]
    assert "controls.py" not in said["text"].replace("test_controls.py", "")
    knob.widgets["step"].value = 3
    assert knob.wait() == "step 3" and not knob._panel.messages.outputs


def test_a_picture_follows_the_moving_hand_only_where_it_is_quick(shown, monkeypatch):
    knob = live(lambda step: step, step=range(4))
    knob.panel()
    assert knob.widgets["step"].continuous_update
    monkeypatch.setattr(controls, "QUICK", 0)
    knob.set(step=1)
    assert not knob.widgets["step"].continuous_update and knob.widgets["step"].value == 1


def test_a_picture_is_drawn_with_the_gradients_of_the_notebook(shown):
    """A thread begins with gradients on, whatever the notebook has said at its top."""
    before = torch.is_grad_enabled()
    torch.set_grad_enabled(False)
    try:
        knob = live(lambda step: (step, torch.is_grad_enabled()), step=range(4))
        knob._ipython_display_()
        knob.widgets["step"].value = 1
        assert knob.wait() == (1, False)
    finally:
        torch.set_grad_enabled(before)


def test_without_widgets_the_picture_stands_alone(shown, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)  # as where it is not installed
    knob = live(lambda step: f"step {step}", step=range(4))
    knob._ipython_display_()
    assert shown.displayed == ["step 0"]
    said = capsys.readouterr().out
    assert "No sliders: " in said and "ipywidgets" in said and 'pip install "moddiff[notebooks]"' in said
    with pytest.raises(ModuleNotFoundError, match="pip install"):
        knob.panel()


def test_a_control_may_start_elsewhere_than_at_its_first_value(shown):
    knob = live(
        lambda **now: dict(now), {"step": 5, "word": "blue"}, step=range(8), word=["red", "blue"], on=True
    )
    assert knob.picture == dict(step=5, word="blue", on=True)
    assert knob.choices["step"] == list(range(8))  # in their own order
    knob.panel()
    assert knob.widgets["step"].value == 5 and knob.widgets["word"].value == "blue"
    with pytest.raises(ValueError, match="step=9; expected one of 0, 1, 2"):
        live(lambda step: step, start={"step": 9}, step=range(3))
    with pytest.raises(ValueError, match="no control 'stap'; there are step"):
        live(lambda step: step, start={"stap": 1}, step=range(3))
    with pytest.raises(TypeError, match="live got str; expected a function that draws"):
        live("a picture", step=range(3))


def test_a_failed_redraw_leaves_the_last_picture_and_its_settings():
    def draw(step):
        if step == 2:
            raise ZeroDivisionError("the student's own mistake")
        return step

    knob = live(draw, step=range(4))
    knob.set(step=1)
    with pytest.raises(ZeroDivisionError):
        knob.set(step=2)
    assert knob.picture == 1 and knob.now == {"step": 1}


def test_a_live_figure_is_a_png_where_nothing_else_can_show_it():
    knob = live(lambda: figure()[0])
    assert knob._repr_png_().startswith(b"\x89PNG") and live(lambda: "text")._repr_png_() is None


# ---- two videos ----


def test_two_videos_play_side_by_side_and_the_shorter_waits():
    rng = np.random.default_rng(0)
    a, b = (Video(rng.integers(0, 256, (count, 20, 30, 3), np.uint8), 8) for count in (5, 3))
    both = compare(a, b, ("seed 0", "seed 1"), difference=True)
    assert both.frames.shape == (5, 18 + 100, 3 * 150, 3) and both.fps == 8
    small_again = both.frames[:, 18::5, ::5]
    assert np.array_equal(small_again[:, :, :30], a.frames) and np.array_equal(
        small_again[3:, :, 30:60], b.frames[[2, 2]]
    )
    assert np.array_equal(small_again[:3, :, 60:], np.abs(a.frames[:3].astype(int) - b.frames))
    captions = both.frames[0, :18].min(-1)
    assert (captions[:, :150] < 128).any() and (captions[:, 150:300] < 128).any()
    assert compare(a, a, labels=(0, 1)).frames.shape == (5, 118, 300, 3)


def test_videos_of_other_sizes_or_speeds_are_not_compared():
    a = Video(np.zeros((2, 8, 8, 3), np.uint8), 8)
    with pytest.raises(
        ValueError,
        match="compare got videos of 8 x 8 at 8 fps and 8 x 16 at 16 fps; expected the same height",
    ):
        compare(a, Video(np.zeros((2, 8, 16, 3), np.uint8), 16))
    with pytest.raises(ValueError, match="labels=.'a',.; expected two"):
        compare(a, a, ("a",))
