"""Does the browser draw the value that was asked for, and offer only what can be chosen?"""

from types import SimpleNamespace

import numpy as np
import pytest
import small
import torch

from moddiff import capture
from moddiff.hooks.records import Record
from moddiff.viz.browser import explore
from moddiff.viz.canvas import title_of
from moddiff.viz.maps import attention_rows, show_heads, show_words
from moddiff.viz.sheets import latent_sheet

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


def test_the_browser_offers_what_was_captured_and_starts_with_word_maps(run):
    browser = explore(run.seen, run.words, run.pipe.grid, run.video)
    choices = browser.choices
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
    second = browser.set(head="1")
    assert [label.get_text().split("\n")[0] for label in second.axes[0].get_yticklabels()] == ["head 1"]
    assert np.array_equal(pixels(second), pixels(attention_rows(own, grid, 7, head=1)))
    mean = browser.set(head="mean")
    assert np.array_equal(pixels(mean), pixels(attention_rows(own, grid, 7, head="mean")))
    assert mean.axes[0].get_yticklabels()[0].get_text().startswith("mean over heads\n")
    stream = run.seen.get("dit.blocks.1.resid_post", step=2, branch="uncond")[0]
    sizes = stream.square().mean(1).sqrt().reshape(3, 2, 3)
    shown = pixels(browser.set(tap="resid_post"))  # frames beside each other, with a line between
    assert np.allclose(shown[:, [0, 1, 2, 4, 5, 6, 8, 9, 10]], torch.cat(list(sizes), 1))
    assert np.array_equal(pixels(browser.set(tap="x0")), pixels(latent_sheet(run.seen.get("x0", step=2))))
    text = run.seen.get("text.layers.1.attn.probs", branch="uncond")[0]
    assert np.allclose(pixels(browser.set(tap="attn.probs")), text.mean(0))


def test_controls_that_do_not_matter_are_hidden(run):
    browser = explore(run.seen, run.words, run.pipe.grid)
    browser.panel()

    def seen():
        return {name for name, widget in browser.widgets.items() if widget.layout.display != "none"}

    assert seen() == {"tap", "block", "step", "branch", "head", "word"}
    browser.widgets["tap"].value = "self_attn.probs"
    browser.wait()
    assert seen() == {"tap", "block", "step", "branch", "head", "query"}
    browser.widgets["tap"].value = "x0"
    browser.wait()
    assert seen() == {"tap", "step"}


def test_a_word_that_comes_twice_can_be_told_apart(run):
    words = run.pipe.words("a red circle above a red star")
    browser = explore(run.seen, words, run.pipe.grid)
    assert browser.choices["word"][1:6] == ["a (0)", "red (1)", "circle", "above", "a (4)"]


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
    with pytest.raises(ValueError, match=r"grid=\(3, 4\); expected \(frames, height, width\) in tokens"):
        explore(seen, grid=(3, 4))
    with pytest.raises(ValueError, match="words= holds something else than words; expected pipe.words"):
        explore(seen, words=["red"])
    for nothing, name in ((Record(), "an empty one"), ([1, 2], "list")):
        with pytest.raises(ValueError, match=f"explore needs a Record with something in it, got {name}"):
            explore(nothing)
