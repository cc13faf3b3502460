"""Do hands stand at the angle of the position, and do arrows and paths have their true lengths?"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from moddiff.rope import angles, rotate
from moddiff.viz.vectors import along_and_off, flow_path, guidance_arrows, rope_clocks, score_by_offset


def texts(ax):
    return [text.get_text() for text in ax.texts]


def test_hands_stand_at_position_times_speed():
    drawn = rope_clocks((2, 3, 5), 16, other=(0, 0, 0))
    pairs = (4, 2, 2)  # 8 pairs: a third each, the rest to the frame
    for ax, count, place in zip(drawn.axes, pairs, (2, 3, 5)):
        hands = [line.get_xydata() for line in ax.lines if len(line.get_xdata()) == 2]
        tips = [hand[1].tolist() for hand in hands]
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


def test_the_score_of_an_offset_is_that_of_rotated_tokens():
    """As the model itself rotates them: 16 channels, 4 pairs for the frame, 2 each for the others."""
    ones, grid = torch.ones(1, 1, 8, 16), [(8, 1, 1), (1, 8, 1), (1, 1, 8)]
    for line, cells in zip(score_by_offset(16, far=7).axes[0].lines, grid):
        turned = rotate(ones, angles(cells, 16))[0, 0]  # [8 positions along one axis, 16]
        scores = (turned @ turned[0] / 16).numpy()
        assert np.allclose(line.get_ydata()[7:], scores, atol=1e-6)


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
    assert " scale 4" in texts(ax) and ax.get_aspect() == 1
    with pytest.raises(ValueError, match=r"arrows of \[1, 4\], \[2, 4\] numbers cannot lie in one plane"):
        guidance_arrows(torch.ones(2, 4), torch.ones(1, 4))
    with pytest.raises(ValueError, match="an arrow holds NaN or infinity"):
        guidance_arrows(torch.tensor([1.0, float("nan")]), torch.ones(2))
    with pytest.raises(ValueError, match="the first arrow has length 0"):
        guidance_arrows(torch.ones(4), torch.zeros(4))


def test_the_same_velocity_twice_makes_arrows_of_one_direction():
    v = torch.randn(1, 8)
    ax = guidance_arrows(v, v).axes[0]
    assert all(np.allclose(text.xy, (1, 0), atol=1e-6) for text in ax.texts if text.arrow_patch is not None)


def test_a_straight_run_lies_on_the_line_and_a_detour_off_it():
    noise, data, aside = torch.tensor([0.0, 0, 0]), torch.tensor([4.0, 0, 0]), torch.tensor([2.0, 1, 0])

    def state(x, x0, after):
        return SimpleNamespace(x=x, x0=x0, next=after, velocity=x - x0)

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
