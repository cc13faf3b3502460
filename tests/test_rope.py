"""Does rotating say where a token is, and nothing else?"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moddiff.rope import angles, axis_pairs, clock_speeds, rotate


def naive(x, grid, start=(0, 0, 0)):
    """One token, one pair at a time, with Python's complex numbers.   x [n, d]"""
    half = x.shape[1] // 2
    side = half // 3
    out, cells = (
        x.clone(),
        [(f, h, w) for f in range(grid[0]) for h in range(grid[1]) for w in range(grid[2])],
    )
    for row, cell in enumerate(cells):
        j = 0
        for axis, pairs in enumerate((half - 2 * side, side, side)):
            for i in range(pairs):
                turn = (cell[axis] + start[axis]) / 10000 ** (i / pairs)
                z = complex(x[row, 2 * j], x[row, 2 * j + 1]) * complex(math.cos(turn), math.sin(turn))
                out[row, 2 * j], out[row, 2 * j + 1] = z.real, z.imag
                j += 1
    return out


def test_a_head_of_128_gives_the_frame_22_pairs_and_height_and_width_21():
    assert axis_pairs(128) == (22, 21, 21)


@given(half=st.integers(1, 200))
def test_every_pair_has_an_axis_and_the_frame_never_has_fewer(half):
    frame, height, width = axis_pairs(2 * half)
    assert frame + height + width == half and height == width and 0 <= frame - height <= 2


def test_an_odd_head_is_refused():
    with pytest.raises(ValueError, match="head of width 7 has no whole number of channel pairs.*even"):
        axis_pairs(7)


def test_clocks_go_from_one_radian_a_step_down_in_equal_ratios():
    speeds = clock_speeds(5)
    assert speeds[0] == 1 and speeds.dtype == torch.float64
    torch.testing.assert_close(
        speeds[1:] / speeds[:-1], torch.full((4,), 10000 ** (-1 / 5), dtype=torch.float64)
    )


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    grid=st.tuples(*[st.integers(1, 4)] * 3),
    half=st.integers(1, 9),
    start=st.tuples(*[st.integers(0, 30)] * 3),
)
def test_rotation_equals_complex_numbers_one_by_one(grid, half, start):
    torch.manual_seed(half)
    x = torch.randn(1, 2, math.prod(grid), 2 * half)
    turned = rotate(x, angles(grid, 2 * half, start=start))
    assert turned.dtype == torch.float32 and turned.shape == x.shape
    for head in range(2):
        torch.testing.assert_close(turned[0, head], naive(x[0, head], grid, start), atol=2e-6, rtol=0)


def test_scores_depend_on_offsets_only():
    torch.manual_seed(0)
    grid, d = (3, 4, 5), 24
    q, k = torch.randn(1, 2, 60, d), torch.randn(1, 2, 60, d)

    def score(start, start_of_keys=None):
        keys = angles(grid, d, start=start_of_keys or start)
        return rotate(q, angles(grid, d, start=start)) @ rotate(k, keys).mT

    for start in ((7, 0, 0), (0, 11, 0), (0, 0, 13), (100, 50, 25)):
        assert (score(start) - score((0, 0, 0))).abs().max() <= 1e-4
    moved = score((1, 0, 0), (0, 0, 0))  # the queries alone
    assert (moved - score((0, 0, 0))).abs().max() > 0.1


def test_each_axis_turns_only_its_own_pairs():
    d = 24
    still = angles((4, 1, 1), d), angles((1, 4, 1), d), angles((1, 1, 4), d)
    turning = [(table != 0).any(0) for table in still]  # per pair
    first, second, third = axis_pairs(d)
    assert turning[0].tolist() == [True] * first + [False] * (second + third)
    assert turning[1].tolist() == [False] * first + [True] * second + [False] * third
    assert turning[2].tolist() == [False] * (first + second) + [True] * third


def test_the_first_token_is_not_turned_and_no_length_changes():
    x = torch.randn(2, 3, 24, 10)
    turned = rotate(x, angles((2, 3, 4), 10))
    assert torch.equal(turned[:, :, 0], x[:, :, 0])
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))


def test_stretched_positions_lie_between_the_usual_ones():
    torch.testing.assert_close(angles((5, 1, 1), 12, stretch=(0.5, 1, 1))[::2], angles((3, 1, 1), 12))


def test_far_positions_are_exact_to_float32():
    x = torch.zeros(1, 1, 1, 12)
    x[..., 2] = 1  # the frame's second pair, which turns 10000 ** (-1 / 2) a frame
    far = rotate(x, angles((1, 1, 1), 12, start=(100_003, 0, 0)))
    assert abs(far[0, 0, 0, 2].item() - math.cos(1000.03)) < 1e-7  # a float32 angle is off by 1e-5 here
    assert abs(far[0, 0, 0, 3].item() - math.sin(1000.03)) < 1e-7


def test_what_inference_mode_remembers_can_still_be_trained_through():
    grid, x = (2, 7, 3), torch.randn(1, 1, 42, 14, requires_grad=True)  # a grid that no other test asks for
    with torch.inference_mode():
        rotate(x, angles(grid, 14))
    rotate(x, angles(grid, 14)).square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach())


def test_riflex_slows_one_clock_of_the_frames_until_it_does_not_come_round():
    """Wan at twice its length: the sixth clock has a period of 51 latent frames, where films repeat."""
    plain, slowed = (angles((80, 1, 2), 128, riflex=k) for k in (0, 6))
    period = 2 * math.pi / float(plain[2, 5])  # the third token is the first of frame 1
    assert period == pytest.approx(2 * math.pi * 10000 ** (10 / 44)) and 50 < period < 52
    assert float(slowed[2, 5]) == pytest.approx(0.9 * 2 * math.pi / 80)
    assert torch.equal(slowed[:, :5], plain[:, :5]) and torch.equal(slowed[:, 6:], plain[:, 6:])
    # A clock that does not come round within the film is left alone.
    assert torch.equal(angles((21, 1, 2), 128, riflex=6), angles((21, 1, 2), 128))
