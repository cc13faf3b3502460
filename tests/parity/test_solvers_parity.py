"""Our steps against the official trajectories (goldens) and against the diffusers schedulers."""

import json
from pathlib import Path

import diffusers_grids
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from moddiff import flow, solvers

GOLDEN = Path(__file__).parents[1] / "goldens" / "schedulers.safetensors"
with safe_open(GOLDEN, "pt") as file:
    RUNS = json.loads(file.metadata()["config"])["runs"]


def our_solver(run):
    options = {
        ours: run[theirs]
        for ours, theirs in (("order", "solver_order"), ("variant", "solver_type"))
        if theirs in run
    }
    return solvers.solver({"unipc": "unipc", "dpmpp": "dpm++"}[run["solver"]], **options)


@pytest.mark.parametrize("run", RUNS, ids=lambda run: " ".join(str(value) for value in run.values()))
def test_fed_with_the_official_velocities_every_step_is_the_official_one(run):
    with safe_open(GOLDEN, "pt") as file:
        velocities, samples = (file.get_tensor(f"out.{run['name']}.{key}") for key in ("v", "x"))
    solver = our_solver(run)
    made = flow.schedule(run["steps"], run["shift"], solver.grid)
    assert len(made) == len(velocities) and len(samples) == len(made) + (run.get("solver_type") != "bh1")
    x, memory = samples[0], None
    for i, (_, sigma, sigma_next) in enumerate(made):
        x, memory = solver.step(x, velocities[i], sigma, sigma_next, memory, left=len(made) - i)
        if i + 1 < len(samples):
            assert (x - samples[i + 1]).abs().max() <= 1e-6
    assert x.isfinite().all()  # also the last step of bh1, which is NaN in the official code


@pytest.fixture(autouse=True, scope="module")
def their_grids():
    with pytest.MonkeyPatch.context() as patch:
        for name, grid in diffusers_grids.GRIDS.items():
            patch.setitem(flow.GRIDS, name, grid)
        yield


def theirs(solver, steps, shift):
    if isinstance(solver, solvers.Euler):
        return FlowMatchEulerDiscreteScheduler(shift=shift)
    kind, more = (
        (UniPCMultistepScheduler, {})
        if isinstance(solver, solvers.UniPC)
        else (DPMSolverMultistepScheduler, dict(algorithm_type="dpmsolver++"))
    )
    return kind(
        solver_order=solver.order,
        solver_type=solver.variant,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=shift,
        **more,
    )


SOLVERS = st.one_of(
    st.just(solvers.Euler()),
    st.builds(solvers.DPMSolverPP, st.sampled_from([1, 2, 3]), st.sampled_from(["midpoint", "heun"])),
    st.builds(solvers.UniPC, st.sampled_from([1, 2, 3]), st.sampled_from(["bh1", "bh2"])),
)


@settings(deadline=None, max_examples=40)
@given(SOLVERS, st.integers(1, 22), st.floats(1, 12), st.booleans(), st.integers(0, 99))
def test_given_equal_sigmas_every_step_is_that_of_diffusers(solver, steps, shift, official_grid, seed):
    made = flow.schedule(steps, shift, solver.grid if official_grid else "diffusers-" + solver.grid)
    scheduler = theirs(solver, steps, shift)
    scheduler.set_timesteps(steps)
    scheduler.set_begin_index(0)
    scheduler.sigmas = made.sigmas.clone()
    draw = torch.Generator().manual_seed(seed)
    x, memory = torch.randn(1, 4, 2, 3, 3, generator=draw), None
    expected = x.clone()
    for i, (_, sigma, sigma_next) in enumerate(made):
        velocity = torch.randn(x.shape, generator=draw)
        expected = scheduler.step(velocity, scheduler.timesteps[i], expected, return_dict=False)[0]
        x, memory = solver.step(x, velocity, sigma, sigma_next, memory, left=steps - i)
        if getattr(solver, "variant", "") == "bh1" and sigma_next == 0:
            assert x.isfinite().all()  # diffusers returns NaN here
        else:
            assert (x - expected).abs().max() <= 1e-6 * expected.abs().max().clamp_min(1)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 60), st.floats(0.5, 16))
@example(51, 0.9955141843937731)  # 1, shifted in float32, is one rounding above 1
@example(7, 4.677735024361853)  # and here one below
def test_the_diffusers_grids_are_bit_equal_to_diffusers(steps, shift):
    for solver in (solvers.UniPC(), solvers.DPMSolverPP(), solvers.Euler()):
        scheduler = theirs(solver, steps, shift)
        scheduler.set_timesteps(steps)
        made = flow.schedule(steps, shift, "diffusers-" + solver.grid)
        assert torch.equal(made.sigmas, scheduler.sigmas), solver
        if isinstance(solver, solvers.Euler):  # theirs does not cut them
            assert (made.timesteps - scheduler.timesteps).abs().max() <= 1
        else:
            assert torch.equal(made.timesteps, scheduler.timesteps), solver


def test_the_double_shift_of_the_diffusers_euler_grid_is_kept():
    expected = torch.tensor([1.0, 0.909707, 0.717317, 0.024414, 0.0])
    torch.testing.assert_close(flow.schedule(4, 5.0, "diffusers-euler").sigmas, expected, atol=1e-6, rtol=0)
