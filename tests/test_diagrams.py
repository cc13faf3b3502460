"""Do the drawings say what is true: the right room lit, each token in its box, valves as open as gates?"""

from itertools import combinations, pairwise, product

import numpy as np
import pytest
import small
import torch
from matplotlib.colors import to_hex
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Wedge

from moddiff import capture
from moddiff.viz.canvas import LIT, title_of
from moddiff.viz.diagrams import (
    ROOMS,
    gates_of,
    journey,
    modulation_valves,
    strip,
    tap_valve,
    tokens_picture,
)

PROMPT = "a red circle moving left"


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return small.pipeline(tmp_path_factory.mktemp("tokenizer"))


def texts(ax):
    return [text.get_text() for text in ax.texts]


def lit_boxes(drawn):
    """The words that stand in the middle of a lit box."""
    ax = drawn.axes[0]
    boxes = [
        patch.get_bbox()
        for patch in ax.patches
        if isinstance(patch, FancyBboxPatch) and to_hex(patch.get_facecolor()) == LIT.lower()
    ]
    return {
        text.get_text()
        for text in ax.texts
        for box in boxes
        if box.x0 < text.get_position()[0] < box.x1 and box.y0 < text.get_position()[1] < box.y1
    }


# ---- the pipeline ----


def test_the_strip_names_every_room_and_lights_the_one_asked_for():
    assert set(ROOMS) <= set(texts(strip().axes[0])) and lit_boxes(strip()) == set()
    for room in ROOMS:
        found = lit_boxes(strip(room))
        assert found == ({"dit", "rope", "attention"} if room == "dit" else {room})
    assert lit_boxes(strip("tracing")) == set(ROOMS)
    with pytest.raises(ValueError, match="lit='unet'; expected one of text, image, flow, dit"):
        strip("unet")
    with pytest.raises(TypeError, match="str is no Pipeline; expected one, such as moddiff.load"):
        strip("vae", "tiny")


def test_no_words_of_the_strip_lie_over_a_border_or_over_each_other(pipe):
    for drawn in (strip(), strip("vae", pipe)):
        ax = drawn.axes[0]
        drawn.draw_without_rendering()
        words = [text.get_window_extent() for text in ax.texts if text.get_text()]
        assert not [1 for a, b in combinations(words, 2) if a.overlaps(b)]
        borders = [
            patch.get_window_extent() for patch in ax.patches if not isinstance(patch, FancyArrowPatch)
        ]
        for word, box in product(words, borders):
            inside = box.x0 < word.x0 and word.x1 < box.x1 and box.y0 < word.y0 and word.y1 < box.y1
            assert inside or not word.overlaps(box)


def test_the_strip_of_a_pipeline_has_its_shapes(pipe):
    words = " ".join(texts(strip("vae", pipe).axes[0]))
    for shape in ("[l, 16]", "[4, 3, 4, 6]", "9 x 32 x 48", "the loop: 3 steps"):
        assert shape in words


def test_a_journey_goes_from_vectors_through_latents_to_the_frames_of_the_call(pipe):
    drawn = journey(pipe, PROMPT, seed=3, steps=6)
    first, *latents, last = drawn.axes
    vectors = pipe.text.encode([PROMPT])[0]
    assert np.allclose(first.images[0].get_array(), vectors, atol=1e-6)
    assert [label.get_text() for label in first.get_yticklabels()] == [
        word.text for word in pipe.words(PROMPT)
    ]
    states = list(pipe.steps(PROMPT, seed=3, steps=6))
    sigmas = [*(states[i].sigma for i in (0, 2, 3, 5)), 0]  # four of the six, evenly, and the end
    assert [ax.get_xlabel() for ax in latents] == [f"sigma {sigma:.2f}" for sigma in sigmas]
    expected = (states[0].x[0, :3, 1].permute(1, 2, 0) / 5 + 0.5).clamp(0, 1)
    assert np.allclose(latents[0].images[0].get_array(), expected, atol=1e-6)
    assert (
        np.array_equal(last.images[0].get_array(), pipe(PROMPT, seed=3, steps=6).frames[4])
        and last.get_xlabel() == "frame 4 of 9"
    )
    with pytest.raises(ValueError, match="journey of str; expected a Pipeline"):
        journey("tiny", PROMPT)


# ---- words ----


def test_every_token_has_its_box_and_its_number(pipe):
    tokens = pipe.text.tokens(PROMPT * 3)
    drawn = tokens_picture(tokens)
    shown = texts(drawn.axes[0])
    assert shown[::2] == [piece.replace("▁", "_") for _, piece in tokens] and shown[1::2] == [
        str(number) for number, _ in tokens
    ]
    boxes = [patch.get_bbox() for patch in drawn.axes[0].patches]
    for a, b in pairwise(boxes):
        assert a.x1 < b.x0 or b.y1 < a.y0  # to the right, or on a lower line
    assert title_of(drawn).startswith(f"{len(tokens)} tokens")
    for bad in (["red", "circle"], ["ab"], [1, 2], []):
        with pytest.raises(ValueError, match="tokens_picture needs pairs"):
            tokens_picture(bad)


# ---- valves ----


def test_a_tap_is_closed_watched_or_edited():
    assert {"closed", "watched", "edited", "copy", "f(x)", "new x"} <= set(texts(tap_valve().axes[0]))


def test_gates_are_those_that_time_sets(pipe):
    x, t = torch.randn(1, small.Z, 3, 4, 6), torch.tensor([700.0])
    with torch.no_grad():
        with capture(pipe.dit, "blocks.*.modulation") as seen:
            pipe.dit(x, t, pipe.text.encode([PROMPT]))
        time = pipe.dit.time_projection(pipe.dit.time(t)).reshape(6, -1)
        expected = {
            i: tuple((block.modulation[0] + time).abs().mean(1)[[2, 5]].tolist())
            for i, block in enumerate(pipe.dit.blocks)
        }
    found = gates_of(seen)
    assert found.keys() == expected.keys() and np.allclose(
        [found[i] for i in found], [expected[i] for i in found], atol=1e-6
    )


def test_valves_are_as_open_as_the_gates():
    modulation = np.zeros((2, 6, 4))
    modulation[0, 2], modulation[0, 5], modulation[1, 2], modulation[1, 5] = 0.5, -1.0, 0.25, 0.0
    modulation[:, [0, 1, 3, 4]] = 9  # shifts and scales are not gates
    drawn = modulation_valves(modulation)
    wedges = [patch for patch in drawn.axes[0].patches if isinstance(patch, Wedge)]
    assert np.allclose([wedge.theta2 - wedge.theta1 for wedge in wedges], [180, 360, 90, 0])
    shown = texts(drawn.axes[0])
    assert (
        [text for text in shown if "." in text] == ["0.50", "1.00", "0.25", "0.00"]
        and "block 1" in shown
        and "full at 1.00" in title_of(drawn)
    )
    with pytest.raises(
        ValueError, match=r"modulation arrived with shape \[2, 5, 4\]; expected \[block, 6, c\]"
    ):
        modulation_valves(modulation[:, :5])


def test_writers_are_as_thick_as_what_they_write(pipe):
    with capture(pipe.dit, "blocks.*.resid_*") as seen, capture(pipe.dit, "blocks.*.modulation") as gates:
        pipe(PROMPT, steps=1)
    lines = modulation_valves(gates, seen).axes[0].lines[1:]
    held = {(w.block, w.name): value for w, value in seen if w.branch == "cond"}

    def size(block, a, b):
        return (held[block, b] - held[block, a]).square().mean().sqrt().item()

    cond = [
        size(block, *pair)
        for block in (0, 1)
        for pair in (("resid_pre", "resid_mid"), ("resid_mid", "resid_cross"), ("resid_cross", "resid_post"))
    ]
    assert (
        np.corrcoef(cond, [line.get_linewidth() for line in lines])[0, 1] > 0.95
        and max(line.get_linewidth() for line in lines) == 5
    )
    with capture(pipe.dit, "final") as other:
        pipe(PROMPT, steps=1)
    with pytest.raises(ValueError, match='no modulation in this record; it holds final. Capture "blocks'):
        modulation_valves(other)


def test_every_drawing_has_a_title():
    assert title_of(strip("vae")) == "From words to frames: the vae room is lit" and title_of(
        tap_valve()
    ).startswith("A tap")
