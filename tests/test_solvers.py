"""The steps as mathematics: exactness, order, purity, the two ends, refusals. Parity is in parity/."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moddiff import flow, solvers
from moddiff.solvers import DPMSolverPP, Euler, Memory, UniPC

F64 = torch.float64
MEAN, SPREAD = torch.tensor([0.5, -0.3, 1.2], dtype=F64), torch.tensor([0.3, 1.5, 0.7], dtype=F64)
START = torch.tensor([1.0, -2.0, 0.5], dtype=F64)
ALL = (
    [Euler()]
    + [DPMSolverPP(order, variant) for order in (1, 2, 3) for variant in ("midpoint", "heun")]
    + [UniPC(order, variant) for order in (1, 2, 3) for variant in ("bh1", "bh2")]
)
each_solver = pytest.mark.parametrize("solver", ALL, ids=str)


def std(sigma):
    """For Gaussian data x at sigma is Gaussian, of mean (1 - sigma) MEAN and this standard deviation."""
    return ((1 - sigma) ** 2 * SPREAD**2 + sigma**2).sqrt()


def gaussian_velocity(x, sigma):
    """E[noise - x0 | x] for Gaussian data."""
    pull = (x - (1 - sigma) * MEAN) / std(sigma) ** 2
    return sigma * pull - (MEAN + (1 - sigma) * SPREAD**2 * pull)


def exact(sigma, begin):
    """Where the flow that passes START at level `begin` is at sigma: as many deviations from the mean."""
    return (1 - sigma) * MEAN + std(sigma) / std(begin) * (START - (1 - begin) * MEAN)


def run(solver, velocity, x, levels, left=True):
    states = [(x, None)]
    for i, (sigma, sigma_next) in enumerate(pairwise(levels)):
        x, memory = states[-1]
        states.append(
            solver.step(
                x, velocity(x, sigma), sigma, sigma_next, memory, left=len(levels) - 1 - i if left else None
            )
        )
    return states


def test_the_oracle_flow_obeys_its_own_velocity():
    sigma, begin = torch.tensor(0.4, dtype=F64), torch.tensor(0.9, dtype=F64)
    slope = torch.autograd.functional.jacobian(lambda s: exact(s, begin), sigma)
    torch.testing.assert_close(slope, gaussian_velocity(exact(sigma, begin), sigma))


@each_solver
def test_a_straight_path_is_followed_exactly_in_one_step_and_in_many(solver):
    x0, noise = torch.randn(2, 3, 4, dtype=F64), torch.randn(2, 3, 4, dtype=F64)
    for levels in ([0.97, 0.2], [0.97, 0.8, 0.5, 0.3, 0.0]):
        x, _ = run(
            solver, lambda x, sigma: noise - x0, flow.add_noise(x0, noise, levels[0]), levels, left=False
        )[-1]
        torch.testing.assert_close(x, flow.add_noise(x0, noise, levels[-1]))


def measured_order(solver, coarse=80):
    """The slope of log error against log step. The history starts exact: only the step itself is measured."""
    errors = []
    for steps in (coarse, 2 * coarse):
        levels = torch.sigmoid(torch.linspace(math.log(9), -math.log(9), steps + 1, dtype=F64))
        points = [exact(sigma, levels[0]) for sigma in levels]
        x0s = [flow.x0_from(x, gaussian_velocity(x, sigma), sigma) for x, sigma in zip(points, levels)]
        done = getattr(solver, "order", 1) - 1
        x, memory = points[done], None
        if done:
            memory = Memory(
                tuple(x0s[:done][::-1]), tuple(levels[:done].flip(0)), done, points[done - 1], done
            )
        for sigma, sigma_next in zip(levels[done:], levels[done + 1 :]):
            x, memory = solver.step(x, gaussian_velocity(x, sigma), sigma, sigma_next, memory, left=100)
        errors.append((x - points[-1]).abs().max().item())
    return math.log2(errors[0] / errors[1])


@pytest.mark.parametrize(
    "solver, order",
    [
        (Euler(), 1),
        (DPMSolverPP(1), 1),
        (DPMSolverPP(2), 2),
        (DPMSolverPP(2, "heun"), 2),
        # The corrector is worth one order more than the number of estimates that the predictor uses.
        (UniPC(1, "bh1"), 2),
        (UniPC(1, "bh2"), 2),
        (UniPC(2, "bh1"), 3),
        (UniPC(2, "bh2"), 3),
        (UniPC(3, "bh1"), 4),
        (UniPC(3, "bh2"), 4),
    ],
    ids=str,
)
def test_halving_the_step_divides_the_error_by_two_to_the_order(solver, order):
    assert abs(measured_order(solver) - order) < 0.3


@pytest.mark.parametrize("variant", ["midpoint", "heun"])
def test_order_3_of_the_reference_dpm_solver_converges_like_order_2(variant):
    assert abs(measured_order(DPMSolverPP(3, variant)) - 2) < 0.15


@each_solver
def test_the_same_inputs_give_the_same_outputs_and_nothing_is_changed(solver):
    levels = flow.schedule(6, 3.0, "unipc").sigmas
    states = run(solver, lambda x, sigma: torch.sin(x + sigma), torch.randn(1, 4, 3, 2), levels)
    for i, (x, memory) in enumerate(states[:-1]):
        velocity = torch.sin(x + levels[i])
        before = (x.clone(), velocity.clone(), *(x0.clone() for x0 in (memory.x0s if memory else ())))
        for _ in range(2):
            again, remembered = solver.step(x, velocity, levels[i], levels[i + 1], memory, left=6 - i)
            assert torch.equal(again, states[i + 1][0])
            if remembered is not None:
                assert remembered is not memory and remembered.done == i + 1
        after = (x, velocity, *(memory.x0s if memory else ()))
        assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


@each_solver
def test_a_run_rewound_to_any_step_repeats_itself(solver):
    levels = flow.schedule(7, 5.0, "unipc").sigmas
    states = run(solver, lambda x, sigma: torch.cos(x * sigma), torch.randn(1, 4, 3, 2), levels)
    x, memory = states[3]
    for i in range(3, 7):
        x, memory = solver.step(x, torch.cos(x * levels[i]), levels[i], levels[i + 1], memory, left=7 - i)
        assert torch.equal(x, states[i + 1][0])


@each_solver
def test_editing_x_in_place_cannot_reach_into_memory(solver):
    levels = flow.schedule(4, 5.0, "unipc").sigmas
    noise = torch.randn(1, 4, 2, 2)
    expected = run(solver, lambda x, sigma: torch.sin(x), noise, levels)[2][0]
    x, first_velocity = noise.clone(), torch.sin(noise)
    x_next, memory = solver.step(x, first_velocity, levels[0], levels[1], None, left=4)
    velocity = torch.sin(x_next)
    x.zero_(), first_velocity.zero_()
    assert torch.equal(solver.step(x_next, velocity, levels[1], levels[2], memory, left=3)[0], expected)


@each_solver
def test_the_step_to_sigma_0_returns_a_finite_answer_even_at_bh1(solver):
    for steps in (1, 2, 3, 5):
        levels = flow.schedule(steps, 5.0, "unipc").sigmas
        assert (
            run(solver, lambda x, sigma: torch.sin(x), torch.randn(1, 4, 2, 2), levels)[-1][0]
            .isfinite()
            .all()
        )


@pytest.mark.parametrize("solver", ALL[1:], ids=str)
def test_the_step_to_sigma_0_is_the_last_x0_estimate(solver):
    levels = flow.schedule(5, 5.0, "unipc").sigmas
    states = run(solver, lambda x, sigma: torch.sin(x), torch.randn(1, 4, 2, 2), levels)
    before = states[-2][0]
    assert torch.equal(states[-1][0], flow.x0_from(before, torch.sin(before), levels[-2]))


@pytest.mark.parametrize("solver", [s for s in ALL if isinstance(s, (Euler, DPMSolverPP))], ids=str)
def test_a_start_at_sigma_1_stays_finite(solver):
    levels = flow.schedule(5, 5.0, "dpm++").sigmas
    assert levels[0] == 1
    assert all(
        x.isfinite().all()
        for x, _ in run(solver, lambda x, sigma: torch.sin(x), torch.randn(1, 4, 2, 2), levels)
    )


@pytest.mark.parametrize("solver", [Euler(), DPMSolverPP()], ids=str)
def test_a_grid_that_starts_one_rounding_above_1_is_accepted(solver):
    levels = flow.schedule(51, 1.0, "dpm++").sigmas
    levels[0] = torch.nextafter(levels[0], torch.tensor(2.0))
    assert levels[0] > 1
    assert run(solver, lambda x, sigma: torch.sin(x), torch.randn(1, 4, 2, 2), levels)[-1][0].isfinite().all()


@pytest.mark.parametrize("solver", [s for s in ALL if getattr(s, "order", 1) < 3], ids=str)
def test_up_to_order_2_left_need_not_be_given(solver):
    levels, x = flow.schedule(5, 5.0, "unipc").sigmas, torch.randn(1, 4, 2, 2)
    with_left, without = (
        run(solver, lambda x, sigma: torch.sin(x), x, levels, left=left)[-1][0] for left in (True, False)
    )
    assert torch.equal(with_left, without)


@pytest.mark.parametrize("solver", [UniPC(3), DPMSolverPP(3)], ids=str)
def test_at_order_3_left_lowers_the_step_before_last(solver):
    levels, x = flow.schedule(5, 5.0, "unipc").sigmas, torch.randn(1, 4, 2, 2)
    with_left, without = (
        run(solver, lambda x, sigma: torch.sin(x), x, levels, left=left)[-2][0] for left in (True, False)
    )
    assert not torch.equal(with_left, without)


def test_dpm_at_order_3_keeps_its_order_before_last_in_runs_of_15_steps():
    levels, x = flow.schedule(15, 5.0, "dpm++").sigmas, torch.randn(1, 4, 2, 2)
    with_left, without = (
        run(DPMSolverPP(3), lambda x, sigma: torch.sin(x), x, levels, left=left)[-1][0]
        for left in (True, False)
    )
    assert torch.equal(with_left, without)


@settings(deadline=None, max_examples=20)
@given(st.sampled_from(ALL), st.integers(0, 1000))
def test_batch_mates_do_not_meet(solver, seed):
    levels, x = (
        flow.schedule(4, 3.0, "unipc").sigmas,
        torch.randn(2, 3, 2, generator=torch.Generator().manual_seed(seed)),
    )
    both = run(solver, lambda x, sigma: torch.sin(x), x, levels)[-1][0]
    alone = [run(solver, lambda x, sigma: torch.sin(x), x[i : i + 1], levels)[-1][0] for i in range(2)]
    torch.testing.assert_close(both, torch.cat(alone), atol=1e-6, rtol=1e-6)


@each_solver
def test_a_half_precision_state_is_carried_in_float32(solver):
    x, memory = solver.step(torch.ones(1, 2).bfloat16(), torch.ones(1, 2).bfloat16(), 0.9, 0.5)
    assert x.dtype == torch.float32 and (memory is None or memory.x0s[0].dtype == torch.float32)


def test_floats_and_tensors_are_the_same_sigma():
    levels, x = flow.schedule(4, 5.0).sigmas, torch.randn(1, 3)
    by_tensor, by_float = (
        run(UniPC(), lambda x, sigma: torch.sin(x), x, given)[-1][0] for given in (levels, levels.tolist())
    )
    assert torch.equal(by_tensor, by_float)


def test_unipc_goes_back_to_its_own_x_unless_memory_is_dropped():
    x, velocity, other = torch.randn(1, 3), torch.randn(1, 3), torch.randn(1, 3)
    x_next, memory = UniPC().step(x, velocity, 0.9, 0.8)
    edited = x_next + 1
    # This velocity leaves x0, and with it all that the corrector is told, as it was before the edit.
    same_x0 = other + 1 / 0.8
    kept, _ = UniPC().step(x_next, other, 0.8, 0.7, memory)
    torch.testing.assert_close(UniPC().step(edited, same_x0, 0.8, 0.7, memory)[0], kept)
    assert not torch.allclose(
        UniPC().step(edited, same_x0, 0.8, 0.7)[0], UniPC().step(x_next, other, 0.8, 0.7)[0]
    )


def test_memory_says_what_it_holds():
    _, memory = UniPC().step(torch.zeros(1), torch.zeros(1), 0.75, 0.5)
    assert repr(memory) == "Memory(1 steps done; x0 kept at sigma 0.7500)"


def test_a_solver_is_found_by_name_and_names_its_grid():
    assert solvers.solver("unipc") == UniPC(2, "bh2") and solvers.solver("euler") == Euler()
    assert solvers.solver("dpm++", order=3, variant="heun") == DPMSolverPP(3, "heun")
    assert [solvers.solver(name).grid for name in ("unipc", "dpm++", "euler")] == ["unipc", "dpm++", "euler"]
    assert all(solvers.solver(name).grid in flow.GRIDS for name in solvers.SOLVERS)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: solvers.solver("unipic"), "unknown solver 'unipic'; did you mean 'unipc'"),
        (lambda: solvers.solver("dpmpp"), r"unknown solver 'dpmpp'; did you mean 'dpm\+\+'"),
        (lambda: UniPC(order=4), "order=4; UniPC has orders 1, 2 and 3"),
        (lambda: DPMSolverPP(variant="bh2"), "variant='bh2'; DPMSolverPP has 'midpoint', 'heun'"),
        (lambda: UniPC(variant="heun"), "variant='heun'; UniPC has 'bh1', 'bh2'"),
    ],
)
def test_an_unknown_solver_or_option_is_refused_with_the_cure(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@each_solver
@pytest.mark.parametrize(
    "sigma, sigma_next", [(0.5, 0.5), (0.5, 0.6), (0.0, 0.0), (1.2, 0.5), (0.5, -0.1), (math.nan, 0.1)]
)
def test_sigmas_that_do_not_fall_within_0_and_1_are_refused(solver, sigma, sigma_next):
    with pytest.raises(ValueError, match="expected 1 >= sigma > sigma_next >= 0.*flow.schedule"):
        solver.step(torch.zeros(1, 2), torch.zeros(1, 2), sigma, sigma_next)


def flat(n=2):
    return torch.zeros(1, n)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda memory: UniPC().step(flat(), torch.zeros(2), 0.5, 0.4),
            ValueError,
            r"velocity is \[2\] but x is \[1, 2\]",
        ),
        (
            lambda memory: UniPC().step(flat(), flat(), 1.0, 0.4),
            ValueError,
            'UniPC cannot start at sigma 1.*grid="unipc"',
        ),
        (
            lambda memory: UniPC().step(flat(), flat(), 0.5, 0.0, memory, left=3),
            ValueError,
            "left=3 for a step to sigma 0",
        ),
        (
            lambda memory: UniPC().step(flat(), flat(), 0.5, 0.1, memory, left=0),
            ValueError,
            "left=0 for a step",
        ),
        (
            lambda memory: UniPC().step(flat(3), flat(3), 0.5, 0.1, memory),
            ValueError,
            r"memory is of a latent \[1, 2\] but x is \[1, 3\]",
        ),
        (
            lambda memory: UniPC().step(flat(), flat(), 0.9, 0.1, memory),
            ValueError,
            "at sigma 0.8, and this one begins at 0.9",
        ),
        (
            lambda memory: DPMSolverPP().step(flat(), flat(), 0.5, 0.1, []),
            TypeError,
            "memory is list; expected what the last step",
        ),
        (
            lambda memory: UniPC().step(flat(), flat(), 0.5, 0.1, Memory((flat(),), (0.8,), 1)),
            ValueError,
            "memory is of another solver",
        ),
    ],
)
def test_a_step_that_would_give_nonsense_is_refused(call, error, message):
    _, memory = UniPC().step(flat(), flat(), 0.8, 0.6)
    with pytest.raises(error, match=message):
        call(memory)
