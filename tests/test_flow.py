"""Conversions on the straight path, and the grids of noise levels."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from moddiff import flow

GOLDEN = "schedulers.safetensors"
PAIR = [
    torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=torch.float64),
    torch.tensor([[0.3, 0.1], [-1.0, 2.0]], dtype=torch.float64),
]


@pytest.fixture(scope="module")
def golden(request):
    with safe_open(request.path.parent / "goldens" / GOLDEN, "pt") as file:
        runs = json.loads(file.metadata()["config"])["runs"]
        return [
            (
                run,
                file.get_tensor(f"out.{run['name']}.sigmas"),
                file.get_tensor(f"out.{run['name']}.timesteps"),
            )
            for run in runs
        ]


@settings(deadline=None, max_examples=50)
@given(st.floats(0.01, 0.99))
def test_any_two_of_x_x0_noise_and_velocity_give_the_others(sigma):
    x0, noise = PAIR
    x, velocity = flow.add_noise(x0, noise, sigma), flow.velocity_from(x0, noise)
    torch.testing.assert_close(flow.x0_from(x, velocity, sigma), x0)
    torch.testing.assert_close(flow.noise_from(x, velocity, sigma), noise)
    torch.testing.assert_close(flow.velocity_to(x0, x, sigma), velocity)


def test_the_path_begins_at_the_noise_and_ends_at_the_clean_latent():
    x0, noise = PAIR
    assert torch.equal(flow.add_noise(x0, noise, 1.0), noise) and torch.equal(
        flow.add_noise(x0, noise, 0.0), x0
    )


def test_the_velocity_is_the_derivative_of_the_path():
    x0, noise = PAIR
    sigma = torch.tensor(0.3, dtype=torch.float64)
    slope = torch.autograd.functional.jacobian(lambda s: flow.add_noise(x0, noise, s), sigma)
    torch.testing.assert_close(slope, flow.velocity_from(x0, noise))


def test_a_sigma_per_item_of_the_batch_is_as_one_item_at_a_time():
    x0, noise = torch.randn(2, 3, 4, 5, 6), torch.randn(2, 3, 4, 5, 6)
    sigmas = torch.tensor([0.25, 0.75])
    x = flow.add_noise(x0, noise, sigmas)
    for i in range(2):
        assert torch.equal(x[i], flow.add_noise(x0[i], noise[i], sigmas[i]))
    torch.testing.assert_close(flow.x0_from(x, noise - x0, sigmas), x0)


def test_three_sigmas_for_a_batch_of_two_are_refused():
    with pytest.raises(
        ValueError, match="3 sigmas for a batch of 2; expected one number, or one sigma per item"
    ):
        flow.add_noise(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(3))


@settings(deadline=None, max_examples=50)
@given(st.floats(0.05, 20), st.floats(0.05, 20), st.floats(0, 1))
def test_shifting_keeps_the_ends_and_two_shifts_multiply(a, b, sigma):
    assert flow.shift_sigmas(0.0, a) == 0 and math.isclose(flow.shift_sigmas(1.0, a), 1)
    assert math.isclose(
        flow.shift_sigmas(flow.shift_sigmas(sigma, a), b), flow.shift_sigmas(sigma, a * b), abs_tol=1e-12
    )
    assert math.isclose(flow.shift_sigmas(sigma, 1), sigma)


def test_shift_5_puts_a_half_at_five_sixths():
    assert math.isclose(flow.shift_sigmas(0.5, 5), 5 / 6)


def test_every_official_grid_is_bit_equal(golden):
    for run, sigmas, timesteps in golden:
        made = flow.schedule(
            run["steps"], run["shift"], grid={"unipc": "unipc", "dpmpp": "dpm++"}[run["solver"]]
        )
        assert made.sigmas.dtype == torch.float32 and torch.equal(made.sigmas, sigmas)
        assert made.timesteps.dtype == torch.int64 and torch.equal(made.timesteps, timesteps)


@settings(deadline=None, max_examples=50)
@given(st.sampled_from(sorted(flow.GRIDS)), st.integers(1, 60), st.floats(0.5, 16))
def test_every_grid_falls_from_near_1_to_0_and_tells_the_dit_the_same_place(grid, steps, shift):
    made = flow.schedule(steps, shift, grid)
    assert len(made) == steps == len(list(made)) and made.sigmas.shape == (steps + 1,)
    assert made.sigmas[-1] == 0 and made.sigmas[0] > 0.99 and (made.sigmas.diff() < 0).all()
    assert ((made.timesteps - 1000 * made.sigmas[:-1]).abs() <= 1).all()


def test_euler_walks_the_unipc_grid():
    assert torch.equal(flow.schedule(9, 3.0, "euler").sigmas, flow.schedule(9, 3.0, "unipc").sigmas)


def test_timesteps_are_cut_from_the_float64_values():
    made = flow.schedule(5, 1, "dpm++")
    # The fourth level is 0.3999999999999999 in float64, and 0.4 once it is rounded to float32.
    assert made.timesteps.tolist() == [1000, 800, 600, 399, 199]
    assert (1000 * made.sigmas[:-1]).long().tolist() == [1000, 800, 600, 400, 200]


def test_a_schedule_shows_its_levels():
    assert repr(flow.schedule(2, 5, "dpm++")) == "Schedule(2 steps, shift 5, grid 'dpm++': 1.000 0.833 0.000)"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((0, 5), "steps=0; expected at least 1"),
        ((10**9, 5), "steps=1000000000; expected at least 1 and at most 1000"),
        ((8, 5, "diffusers-unipc"), "unknown grid"),
        ((8, 5, ["unipc"]), "unknown grid"),
        ((-3, 5), "steps=-3; expected at least 1"),
        ((2.5, 5), "steps=2.5; expected a whole number"),
        ((8, 0), "shift=0; expected a number above 0"),
        ((8, -1.0), "shift=-1.0; expected a number above 0"),
        ((8, math.nan), "shift=nan; expected a number above 0"),
        ((8, math.inf), "shift=inf; expected a number above 0"),
        ((8, 5, "unipic"), "unknown grid 'unipic'; did you mean 'unipc'"),
        ((8, 5, "dpmpp"), r"unknown grid 'dpmpp'; did you mean 'dpm\+\+'"),
        ((8, "5"), "shift='5'; expected a number above 0"),
        ((8, 10**400), r"shift=1000.*\.\.\..*000; expected a number above 0"),
        ((8, 5, []), r"unknown grid \[\]"),
        ((8, 5, "zzz"), "All grids: unipc, dpm"),
    ],
)
def test_a_bad_schedule_is_refused_with_the_cure(arguments, message):
    with pytest.raises(ValueError, match=message):
        flow.schedule(*arguments)


def test_the_high_noise_expert_works_from_the_boundary_up():
    assert flow.high_noise(900, 0.9) and flow.high_noise(torch.tensor(875), 0.875)
    assert not flow.high_noise(899, 0.9) and not flow.high_noise(874, 0.875)


@pytest.mark.parametrize("end", [(), (0,)])
def test_a_step_list_is_walked_as_it_is(end):
    """FastWan's and Lightning's lists, and a list equal to a shifted grid: the same schedule."""
    walked = flow.schedule([1.0, 0.757, 0.522, *end], 5.0)
    assert walked.timesteps.tolist() == [1000, 757, 522] and walked.sigmas[-1] == 0 and len(walked) == 3
    lightning = flow.schedule(4, 5.0, "dpm++")
    assert (
        flow.schedule((1.0, 0.9375, 0.83333, 0.625), 3.0).timesteps.tolist() == lightning.timesteps.tolist()
    )


@pytest.mark.parametrize(
    "steps", [[], [0], [0.5, 0.5], [0.5, 0.7], [1.2, 0.5], [1.0, -0.1], [1000, 750], ["a"], [float("nan")]]
)
def test_a_list_that_does_not_fall_is_refused(steps):
    with pytest.raises(ValueError, match="as a step list; expected noise levels that fall from at most 1"):
        flow.schedule(steps, 5.0)
