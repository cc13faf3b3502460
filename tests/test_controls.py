"""Does the picture follow its controls, in a notebook and without one, and does the browser draw the value that was asked for?"""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import small
import torch

from moddiff import capture
from moddiff.hooks.records import Record
from moddiff.video import Video
from moddiff.viz import controls as module
from moddiff.viz.canvas import figure, title_of
from moddiff.viz.controls import compare, explore, live
from moddiff.viz.maps import attention_rows, latent_sheet, show_heads, show_words

PROMPT = "a red circle moving left"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A pipeline, what was seen in it, and its video."""
    pipe = small.pipeline(tmp_path_factory.mktemp("tokenizer"))
    taps = (
        "dit.blocks.*.cross_attn.probs",
        "dit.blocks.*.self_attn.probs",
        "dit.blocks.*.resid_post",
        "x0",
        "text.layers.*.attn.probs",
    )
    with capture(pipe, *taps) as seen:
        video = pipe(PROMPT)
    return SimpleNamespace(pipe=pipe, seen=seen, video=video, words=pipe.words(PROMPT))


def pixels(drawn):
    return np.ma.filled(np.ma.masked_invalid(drawn.axes[0].images[0].get_array()), -1)


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


# ---- controls ---------------------------------------------------------------------------------------------------------


def test_a_live_picture_is_drawn_with_the_first_of_each_choice():
    knob = live(lambda **now: now, step=range(3), shift=(1, 3, 0.5), solver=["euler", "unipc"], guided=True)
    assert knob.picture == dict(step=0, shift=1, solver="euler", guided=True)
    assert (
        knob.set(shift=2.5, guided=False)
        == dict(step=0, shift=2.5, solver="euler", guided=False)
        == knob.picture
    )
    assert [len(values) for values, _ in knob.choices.values()] == [3, 5, 2, 2] and repr(knob).startswith(
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
        assert live(lambda step: step, step=control).choices["step"][0] == [3, 1, 1]
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
    assert picture == "red at 0" and [type(w).__name__ for w in panel.children] == [
        "SelectionSlider",
        "Dropdown",
        "Output",
    ]
    knob.widgets["step"].value = 3
    knob.widgets["word"].value = "circle"
    assert shown.updated == ["red at 3", "circle at 3"] and knob.picture == "circle at 3"
    assert knob.widgets["step"].description == "step" and not knob.widgets["step"].continuous_update


def test_without_widgets_the_picture_stands_alone(shown, monkeypatch):
    monkeypatch.setattr(module, "_has_widgets", lambda: False)
    live(lambda step: f"step {step}", step=range(4))._ipython_display_()
    assert shown.displayed == ["step 0"]


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


# ---- a capture --------------------------------------------------------------------------------------------------------


def test_the_browser_offers_what_was_captured_and_starts_with_word_maps(run):
    browser = explore(run.seen, run.words, run.pipe.grid, run.video)
    choices = {name: values for name, (values, _) in browser.choices.items()}
    assert choices["tap"][0] == "cross_attn.probs" and set(choices["tap"]) == {
        "cross_attn.probs",
        "self_attn.probs",
        "resid_post",
        "x0",
        "attn.probs",
    }
    assert (
        choices["block"] == [0, 1]
        and choices["step"] == [0, 1, 2]
        and choices["branch"] == ["cond", "uncond"]
    )
    assert (
        choices["head"] == ["mean", "each", "0", "1"]
        and choices["word"] == ["all", *(w.text for w in run.words)]
        and len(choices["query"]) == 18
    )
    probs = run.seen.get("dit.blocks.0.cross_attn.probs", step=0, branch="cond")
    assert np.array_equal(
        pixels(browser.picture), pixels(show_words(probs, run.words, run.pipe.grid, run.video))
    )
    assert title_of(browser.picture).endswith("\ndit.blocks.0.cross_attn.probs, step 0, branch cond")


def test_every_choice_reaches_the_picture(run):
    browser, grid = explore(run.seen, run.words, run.pipe.grid), run.pipe.grid
    circle = run.words[2]
    assert circle.text == "circle"
    probs = run.seen.get("dit.blocks.1.cross_attn.probs", step=2, branch="uncond")[0]
    drawn = browser.set(block=1, step=2, branch="uncond", word="circle", head="1")
    assert np.array_equal(pixels(drawn), pixels(show_words(probs, circle, grid, head=1)))
    assert np.array_equal(pixels(browser.set(head="each")), pixels(show_heads(probs, circle, grid)))
    own = run.seen.get("dit.blocks.1.self_attn.probs", step=2, branch="uncond")[0]
    assert np.array_equal(
        pixels(browser.set(tap="self_attn.probs", query=7)), pixels(attention_rows(own, grid, 7))
    )
    assert np.array_equal(
        pixels(browser.set(head="mean")), pixels(attention_rows(own.mean(0, keepdim=True), grid, 7))
    )
    stream = run.seen.get("dit.blocks.1.resid_post", step=2, branch="uncond")[0]
    expected = torch.cat(
        [frame for frame in stream.square().mean(1).sqrt().reshape(3, 2, 3)], 1
    )  # frames beside each other
    assert np.allclose(pixels(browser.set(tap="resid_post")), expected)
    assert np.array_equal(pixels(browser.set(tap="x0")), pixels(latent_sheet(run.seen.get("x0", step=2))))
    text = run.seen.get("text.layers.1.attn.probs", branch="uncond")[0]
    assert np.allclose(pixels(browser.set(tap="attn.probs")), text.mean(0))


def test_controls_that_do_not_matter_are_hidden(run):
    browser = explore(run.seen, run.words, run.pipe.grid)
    browser.panel()
    seen = lambda: {name for name, widget in browser.widgets.items() if widget.layout.display != "none"}
    assert seen() == {"tap", "block", "step", "branch", "head", "word"}
    browser.widgets["tap"].value = "self_attn.probs"
    assert seen() == {"tap", "block", "step", "branch", "head", "query"}
    browser.widgets["tap"].value = "x0"
    assert seen() == {"tap", "step"}


def test_a_word_that_comes_twice_can_be_told_apart(run):
    words = run.pipe.words("a red circle above a red star")
    browser = explore(run.seen, words, run.pipe.grid)
    assert browser.choices["word"][0][1:6] == ["a (0)", "red (1)", "circle", "above", "a (4)"]


def test_without_words_or_grid_the_values_are_shown_as_they_are(run):
    browser = explore(run.seen)
    assert "word" not in browser.choices and np.allclose(
        pixels(browser.picture),
        run.seen.get("dit.blocks.0.cross_attn.probs", step=0, branch="cond")[0].mean(0),
    )
    assert browser.picture.axes[0].get_xlabel() == "token listened to"


def test_a_capture_with_nothing_to_choose_is_a_single_picture(run):
    with capture(run.pipe, "x0", steps=0) as seen:
        run.pipe(PROMPT)
    assert explore(seen).choices == {}
    for nothing, name in ((Record(), "an empty one"), ([1, 2], "list")):
        with pytest.raises(ValueError, match=f"explore needs a Record with something in it, got {name}"):
            explore(nothing)


# ---- two videos -------------------------------------------------------------------------------------------------------


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
    assert compare(a, a).frames.shape == (5, 118, 300, 3)


def test_videos_of_other_sizes_or_speeds_are_not_compared():
    a = Video(np.zeros((2, 8, 8, 3), np.uint8), 8)
    with pytest.raises(
        ValueError,
        match="compare got videos of 8 x 8 at 8 fps and 8 x 16 at 16 fps; expected the same height, width and fps",
    ):
        compare(a, Video(np.zeros((2, 8, 16, 3), np.uint8), 16))
    with pytest.raises(ValueError, match="labels=.'a',.; expected two"):
        compare(a, a, ("a",))
