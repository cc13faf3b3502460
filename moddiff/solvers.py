"""How few steps can we take?  One step each of Euler, DPM-Solver++ and UniPC, from one noise level to the next.

The loop belongs to you; a solver only knows how to take one step:

    solver, memory = UniPC(), None
    for i, (t, sigma, sigma_next) in enumerate(schedule):
        velocity = ...                                   # what the model says at x
        x, memory = solver.step(x, velocity, sigma, sigma_next, memory, left=len(schedule) - i)

A step is pure: the same inputs give the same outputs and nothing is changed in place, so a run can be paused, rewound, edited
and compared. What a multistep solver needs from earlier steps travels in `memory`, None at the start.

Symbols, as in the papers and in the code below:

    x, x0        the latent at `sigma`; the clean latent that the velocity points at (m in the papers)
    alpha        1 - sigma, how much of x is signal
    lambda       log_snr(sigma) = ln(alpha / sigma), the clock that both papers use
    h            lambda_next - lambda, the length of the step on that clock; infinite for a step to sigma 0
    r            where another x0 estimate lies on that clock: 0 here, 1 at the end of the step, below 0 in the past
    order        how many x0 estimates the step uses: 1 takes x0 as constant, 2 as a straight line, 3 as a parabola in lambda
"""

from dataclasses import dataclass
from difflib import get_close_matches

import torch

from .flow import x0_from


@dataclass(frozen=True, eq=False)
class Memory:
    """What a multistep solver remembers. Never changed: every step returns a new one.

    x0s     past x0 estimates, the newest first;   sigmas: the levels where they were made
    done    steps taken so far
    x       where the last step set out from, after its correction (UniPC)
    order   the order of the last step (UniPC)
    """

    x0s: tuple
    sigmas: tuple
    done: int
    x: torch.Tensor | None = None
    order: int = 0

    def __repr__(self):
        return f"Memory({self.done} steps done; x0 kept at sigma {', '.join(f'{sigma:.4f}' for sigma in self.sigmas)})"


def log_snr(sigma):
    """lambda = ln(1 - sigma) - ln(sigma), half the log signal-to-noise ratio; -inf at sigma 1, inf at sigma 0."""
    return torch.log((1 - sigma).clamp_min(0)) - torch.log(sigma)


def _check(x, velocity, sigma, sigma_next, memory, left):
    """Refuse what would give nonsense quietly; put the state in float32 (or float64) and the scalars beside it, on the CPU."""
    if velocity.shape != x.shape:
        raise ValueError(
            f"velocity is {list(velocity.shape)} but x is {list(x.shape)}; they must have the same shape."
        )
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    sigma, sigma_next = (torch.as_tensor(level, dtype=dtype, device="cpu") for level in (sigma, sigma_next))
    if not 0 <= sigma_next < sigma <= 1 + 1e-6:  # in float32 a shifted 1 can come out one rounding above 1
        raise ValueError(
            f"a step from sigma {sigma:.6g} to {sigma_next:.6g}; expected 1 >= sigma > sigma_next >= 0, "
            "as noise falls along a run. Take both from flow.schedule(...).sigmas."
        )
    if left is not None and (left < 1 or (left > 1 and sigma_next == 0)):
        raise ValueError(
            f"left={left} for a step to sigma {sigma_next:.6g}; left counts the steps that remain, this one included: "
            "1 for the step to sigma 0."
        )
    if memory is not None:
        if not isinstance(memory, Memory):
            raise TypeError(
                f"memory is {type(memory).__name__}; expected what the last step returned, or None to start a run."
            )
        if memory.x0s[0].shape != x.shape:
            raise ValueError(
                f"memory is of a latent {list(memory.x0s[0].shape)} but x is {list(x.shape)}; "
                "pass memory=None to start a new run."
            )
        if not sigma < memory.sigmas[0]:
            raise ValueError(
                f"memory is of a step at sigma {memory.sigmas[0]:.6g}, and this one begins at {sigma:.6g}; sigma must fall. "
                "Pass memory=None to start a new run, or the memory that belongs to this x."
            )
    left = 1 if sigma_next == 0 else left
    return x.to(dtype), velocity.to(dtype), sigma, sigma_next, left


def _options(solver, order, variants):
    if order not in (1, 2, 3):
        raise ValueError(f"order={order!r}; {type(solver).__name__} has orders 1, 2 and 3.")
    if solver.variant not in variants:
        raise ValueError(
            f"variant={solver.variant!r}; {type(solver).__name__} has {', '.join(map(repr, variants))}."
        )


@dataclass(frozen=True)
class Euler:
    """Follow the velocity in a straight line: exact when the path is straight, order 1 otherwise. Remembers nothing."""

    grid = "euler"

    def step(self, x, velocity, sigma, sigma_next, memory=None, left=None):
        """x + (sigma_next - sigma) velocity.   x, velocity [b, ...] -> (x [b, ...], None)"""
        x, velocity, sigma, sigma_next, _ = _check(x, velocity, sigma, sigma_next, memory, left)
        return x + (sigma_next - sigma) * velocity, None


@dataclass(frozen=True)
class DPMSolverPP:
    """DPM-Solver++, multistep: the part of the path that is linear in x is solved exactly, x0 is extrapolated from past steps.

    order    1, 2 (Wan's "dpm++") or 3
    variant  "midpoint" (Wan), "heun" or "taylor": how the line and the parabola are weighted. Order 3 of the reference, and so of the
             first two, halves the parabola's term and converges like order 2; "taylor" integrates it in full, and order 3 is order 3
    grid     "dpm++" starts at sigma 1, where h is infinite; the formulas have a finite limit there, and the arithmetic reaches it

    Source: Lu et al. 2022 (DPM-Solver++), algorithm 2; order 3 and heun as in its reference code.
    """

    order: int = 2
    variant: str = "midpoint"
    grid = "dpm++"

    def __post_init__(self):
        _options(self, self.order, ("midpoint", "heun", "taylor"))

    def step(self, x, velocity, sigma, sigma_next, memory=None, left=None):
        """One step down.   x, velocity [b, ...] -> (x [b, ...], memory)

        left  the steps that remain, this one included. Only order 3 needs it: in runs under 15 steps the one before last is order 2.
        """
        x, velocity, sigma, sigma_next, left = _check(x, velocity, sigma, sigma_next, memory, left)
        done = memory.done if memory else 0
        x0s, sigmas = (x0_from(x, velocity, sigma),), (sigma,)
        if memory:
            x0s, sigmas = (x0s + memory.x0s)[: self.order], (sigmas + memory.sigmas)[: self.order]
        order = 1 if left == 1 else min(self.order, len(x0s), 2 if left == 2 and done + left < 15 else 3)

        lambdas = [log_snr(s) for s in sigmas]
        h, alpha = log_snr(sigma_next) - lambdas[0], 1 - sigma_next
        phi = torch.exp(-h) - 1
        x = sigma_next / sigma * x - alpha * phi * x0s[0]
        if order > 1:
            gap = (lambdas[0] - lambdas[1]) / h
            slope = (x0s[0] - x0s[1]) / gap
        if order == 2:
            x = (
                x - 0.5 * alpha * phi * slope
                if self.variant == "midpoint"
                else x + alpha * (phi / h + 1) * slope
            )
        if order == 3:
            older_gap = (lambdas[1] - lambdas[2]) / h
            older_slope = (x0s[1] - x0s[2]) / older_gap
            bend = (slope - older_slope) / (gap + older_gap)
            slope = slope + gap / (gap + older_gap) * (slope - older_slope)
            bend = 2 * bend if self.variant == "taylor" else bend
            x = x + alpha * (phi / h + 1) * slope - alpha * ((phi + h) / h**2 - 0.5) * bend
        return x, Memory(x0s, sigmas, done + 1)


@dataclass(frozen=True)
class UniPC:
    """Predict, and once the model has been asked at the new place, correct: one more order for no extra model call.

    order    1, 2 (Wan's default solver) or 3: how many x0 estimates the predictor uses; the corrector also has the new one
    variant  "bh2" (Wan) or "bh1": B = e^-h - 1, or B = -h. A step to sigma 0 uses no B, so bh1 is finite there too (the
             official code multiplies 0 by an infinite B and returns NaN)
    grid     "unipc", which starts just below sigma 1; at sigma 1 itself the corrector has no finite weights

    An edit that you make to x between two steps reaches the rest of the run only through the velocity that it causes, because the
    corrector goes back to where the last step set out from. To keep the edit itself, go on with memory=None.
    Source: Zhao et al. 2023 (UniPC), multistep, with the model read as a prediction of x0.
    """

    order: int = 2
    variant: str = "bh2"
    grid = "unipc"

    def __post_init__(self):
        _options(self, self.order, ("bh1", "bh2"))

    def step(self, x, velocity, sigma, sigma_next, memory=None, left=None):
        """Correct the last step, then predict the next.   x, velocity [b, ...] -> (x [b, ...], memory)

        left  the steps that remain, this one included: the order falls to it at the end. Orders 1 and 2 can tell from sigma_next = 0.
        """
        x, velocity, sigma, sigma_next, left = _check(x, velocity, sigma, sigma_next, memory, left)
        if sigma >= 1:
            raise ValueError(
                "UniPC cannot start at sigma 1, where the log signal-to-noise ratio is infinite; take the sigmas from "
                'flow.schedule(steps, shift, grid="unipc"), which starts just below, or use DPMSolverPP.'
            )
        x0 = x0_from(x, velocity, sigma)  # of the x that the model saw; the correction does not change it
        if memory is None:
            x, x0s, sigmas, done = (
                x.clone(),
                (x0,),
                (sigma,),
                0,
            )  # a copy, so that an edit of the caller's x cannot reach into memory
        else:
            if memory.x is None:
                raise ValueError(
                    "this memory is of another solver; UniPC needs its own, or None to start a run."
                )
            x = self._move(memory.x, memory.x0s, memory.sigmas, sigma, memory.order, x0_next=x0)
            x0s, sigmas = ((x0,) + memory.x0s)[: self.order], ((sigma,) + memory.sigmas)[: self.order]
            done = memory.done
        order = min(len(x0s), left or self.order)
        return self._move(x, x0s, sigmas, sigma_next, order), Memory(x0s, sigmas, done + 1, x, order)

    def _move(self, x, x0s, sigmas, sigma_next, order, x0_next=None):
        """From x at sigmas[0] to sigma_next, along the polynomial through `order` past x0s, and through x0_next when it is known."""
        here = log_snr(sigmas[0])
        h, alpha = log_snr(sigma_next) - here, 1 - sigma_next
        phi = torch.expm1(-h)
        r = [(log_snr(s) - here) / h for s in sigmas[1:order]]
        slopes = [(x0 - x0s[0]) / r_k for x0, r_k in zip(x0s[1:order], r)]
        if x0_next is not None:
            r, slopes = r + [torch.ones_like(h)], slopes + [x0_next - x0s[0]]
        x = sigma_next / sigmas[0] * x - alpha * phi * x0s[0]
        if not slopes:
            return x
        B = phi if self.variant == "bh2" else -h
        return x - alpha * B * sum(weight * slope for weight, slope in zip(_weights(r, h, phi, B), slopes))


def _weights(r, h, phi, B):
    """How much each slope counts, so that a polynomial x0 of that degree is integrated exactly.   r: n numbers -> [n]

    A single slope counts one half, whatever h: near enough, and what the reference does.
    """
    if len(r) == 1:
        return [torch.full_like(h, 0.5)]
    r, rows, moments = torch.stack(r), [], []  # [n]
    term, factorial = phi / -h - 1, 1
    for k in range(1, len(r) + 1):
        rows.append(r ** (k - 1))
        moments.append(term * factorial / B)
        factorial *= k + 1
        term = term / -h - 1 / factorial
    return torch.linalg.solve(torch.stack(rows), torch.stack(moments))


SOLVERS = {"unipc": UniPC, "dpm++": DPMSolverPP, "euler": Euler}


def solver(name, **options):
    """A solver by name: "unipc", "dpm++" or "euler"; `order=` and `variant=` go to it. Its `grid` names the flow.schedule to use."""
    if name not in SOLVERS:
        near = get_close_matches(str(name), SOLVERS, n=1, cutoff=0.3) or list(SOLVERS)
        raise ValueError(
            f"unknown solver {name!r}; did you mean {' or '.join(map(repr, near))}? All solvers: {', '.join(SOLVERS)}."
        )
    return SOLVERS[name](**options)
