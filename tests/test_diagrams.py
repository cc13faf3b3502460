"""Do the drawings say what is true: the right room lit, hands at the angle of the position, arrows of the right length, valves as open as the gates?"""

from types import SimpleNamespace

import numpy as np
import pytest
import small
import torch
from matplotlib.colors import to_hex
from matplotlib.patches import FancyBboxPatch, Wedge

from moddiff import capture
from moddiff.viz.canvas import LIT, title_of
from moddiff.viz.diagrams import (
    ROOMS,
    along_and_off,
    flow_path,
    gates_of,
    guidance_arrows,
    journey,
    modulation_valves,
    rope_clocks,
    score_by_offset,
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


# ---- the pipeline -----------------------------------------------------------------------------------------------------


def test_the_strip_names_every_room_and_lights_the_one_asked_for():
    assert set(ROOMS) <= set(texts(strip().axes[0])) and lit_boxes(strip()) == set()
    for room in ROOMS:
        found = lit_boxes(strip(room))
        assert found == ({"dit", "rope", "attention"} if room == "dit" else {room})
    assert lit_boxes(strip("tracing")) == set(ROOMS)
    with pytest.raises(ValueError, match="lit='unet'; expected one of text, image, flow, dit"):
        strip("unet")


def test_the_strip_of_a_pipeline_has_its_shapes(pipe):
    words = " ".join(texts(strip("vae", pipe).axes[0]))
    for shape in ("[l, 16]", "[4, 3, 4, 6]", "9 x 32 x 48", "the loop: 3 steps"):
        assert shape in words


def test_a_journey_goes_from_vectors_through_latents_to_the_frames_of_the_call(pipe):
    drawn = journey(pipe, PROMPT, stops=2, seed=3)
    first, *latents, last = drawn.axes
    vectors = pipe.text.encode([PROMPT])[0]
    assert np.allclose(first.images[0].get_array(), vectors, atol=1e-6)
    assert [label.get_text() for label in first.get_yticklabels()] == [
        word.text for word in pipe.words(PROMPT)
    ]
    states = list(pipe.steps(PROMPT, seed=3))
    assert [ax.get_xlabel() for ax in latents] == [
        f"sigma {sigma:.2f}" for sigma in (states[0].sigma, states[2].sigma, 0)
    ]
    expected = (states[0].x[0, :3, 1].permute(1, 2, 0) / 5 + 0.5).clamp(0, 1)
    assert np.allclose(latents[0].images[0].get_array(), expected, atol=1e-6)
    assert (
        np.array_equal(last.images[0].get_array(), pipe(PROMPT, seed=3).frames[4])
        and last.get_xlabel() == "frame 4 of 9"
    )


# ---- words ------------------------------------------------------------------------------------------------------------


def test_every_token_has_its_box_and_its_number(pipe):
    tokens = pipe.text.tokens(PROMPT * 3)
    drawn = tokens_picture(tokens)
    shown = texts(drawn.axes[0])
    assert shown[::2] == [piece.replace("▁", "_") for _, piece in tokens] and shown[1::2] == [
        str(number) for number, _ in tokens
    ]
    boxes = [patch.get_bbox() for patch in drawn.axes[0].patches]
    for a, b in zip(boxes, boxes[1:]):
        assert a.x1 < b.x0 or b.y1 < a.y0  # to the right, or on a lower line
    assert title_of(drawn).startswith(f"{len(tokens)} tokens")
    with pytest.raises(ValueError, match="tokens_picture needs pairs"):
        tokens_picture(["red", "circle"])
    with pytest.raises(ValueError, match="tokens_picture needs pairs"):
        tokens_picture([])


# ---- valves -----------------------------------------------------------------------------------------------------------


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
    size = lambda block, a, b: (held[block, b] - held[block, a]).square().mean().sqrt().item()
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


# ---- rotary positions -------------------------------------------------------------------------------------------------


def test_hands_stand_at_position_times_speed():
    drawn = rope_clocks((2, 3, 5), 16, other=(0, 0, 0))
    pairs = (4, 2, 2)  # 8 pairs: a third each, the rest to the frame
    for ax, count, place in zip(drawn.axes, pairs, (2, 3, 5)):
        tips = [
            (float(line.get_xdata()[0]), float(line.get_ydata()[0]))
            for line in ax.lines
            if len(line.get_xdata()) == 1
        ]
        assert len(tips) == 2 * count
        for j, (x, y) in enumerate(tips[::2]):
            turned = (place * 10000 ** (-j / count)) % (2 * np.pi)
            assert np.isclose(np.arctan2(x, y) % (2 * np.pi), turned)
        assert np.allclose([x for x, _ in tips[1::2]], 0)  # the other token stands at 0: straight up
    assert [ax.get_title(loc="left") for ax in drawn.axes] == ["frame clock", "height clock", "width clock"]
    assert drawn.axes[0].get_xlabel() == "position 2, dashed 0; 4 hands"
    with pytest.raises(ValueError, match=r"position=\(1, 2\); expected \(frame, row, column\)"):
        rope_clocks((1, 2), 16)


def test_the_score_of_an_offset_is_a_sum_of_cosines():
    ax = score_by_offset(12, far=5).axes[0]
    offsets = np.arange(-5, 6)
    for line in ax.lines:  # 2 pairs of 6 on each axis; the other 4 do not turn
        expected = (4 + np.cos(offsets) + np.cos(offsets * 0.01)) / 6
        assert np.allclose(line.get_ydata(), expected, atol=1e-6) and np.array_equal(
            line.get_xdata(), offsets
        )
    assert ax.get_xlabel() == "offset between the two tokens"
    q = torch.zeros(12)
    q[4:6] = torch.tensor([1.0, 0.0])  # only the first pair of height
    lines = score_by_offset(12, 5, q, q).axes[0].lines
    assert np.allclose(lines[1].get_ydata(), np.cos(offsets), atol=1e-6) and np.allclose(
        lines[0].get_ydata(), 1
    )
    with pytest.raises(
        ValueError,
        match=r"q and k have shapes \[5\] and \[12\]; expected one query and one key of width d=12",
    ):
        score_by_offset(12, q=torch.ones(5))


# ---- arrows -----------------------------------------------------------------------------------------------------------


def test_arrows_of_guidance_have_their_true_lengths_and_angles():
    cond, uncond = torch.randn(2, 1, 4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    ax = guidance_arrows(cond, uncond, scales=(1, 4)).axes[0]
    tips = [np.array(text.xy) for text in ax.texts if text.arrow_patch is not None]
    vectors = [uncond, cond, uncond + 4 * (cond - uncond)]
    for tip, vector in zip(tips, vectors):
        assert np.isclose(np.linalg.norm(tip), (vector.norm() / uncond.norm()).item(), atol=1e-5)
    cosine = torch.cosine_similarity(cond.flatten(), uncond.flatten(), 0).item()
    assert np.isclose(
        tips[0] @ tips[1] / np.linalg.norm(tips[0]) / np.linalg.norm(tips[1]), cosine, atol=1e-5
    )
    assert "scale 4" in texts(ax) and ax.get_aspect() == 1
    with pytest.raises(ValueError, match=r"arrows of \[1, 4\], \[2, 4\] numbers cannot lie in one plane"):
        guidance_arrows(torch.ones(2, 4), torch.ones(1, 4))
    with pytest.raises(ValueError, match="the first arrow has length 0"):
        guidance_arrows(torch.ones(4), torch.zeros(4))


def test_the_same_velocity_twice_makes_arrows_of_one_direction():
    v = torch.randn(1, 8)
    ax = guidance_arrows(v, v).axes[0]
    assert all(np.allclose(text.xy, (1, 0), atol=1e-6) for text in ax.texts if text.arrow_patch is not None)


def test_a_straight_run_lies_on_the_line_and_a_detour_off_it():
    noise, data, aside = torch.tensor([0.0, 0, 0]), torch.tensor([4.0, 0, 0]), torch.tensor([2.0, 1, 0])
    state = lambda x, x0, after: SimpleNamespace(x=x, x0=x0, next=after, velocity=x - x0)
    straight = flow_path(
        [state(noise, data, noise + (data - noise) / 2), state((noise + data) / 2, data, data)]
    ).axes[0]
    path, ahead = straight.lines[1:3]
    assert (
        np.allclose(path.get_xdata(), [0, 0.5, 1])
        and np.allclose(path.get_ydata(), 0)
        and np.allclose(ahead.get_xdata(), 1)
    )
    bent = flow_path([state(noise, data, aside), state(aside, data, data)]).axes[0]
    assert (
        np.allclose(bent.lines[1].get_ydata(), [0, 0.25, 0])
        and bent.get_xlabel() == "along the way (0 noise, 1 data)"
    )
    assert along_and_off(aside, noise, data) == (0.5, 0.25)
    with pytest.raises(ValueError, match="two or more States of a run"):
        flow_path([state(noise, data, data)])
    with pytest.raises(ValueError, match="ended where it began"):
        flow_path([state(noise, noise, noise)] * 2)


def test_every_drawing_has_a_title():
    assert title_of(strip("vae")) == "From words to frames: the vae room is lit" and title_of(
        tap_valve()
    ).startswith("A tap")
    assert title_of(rope_clocks((0, 0, 0), 12)).startswith("Where a token is")
