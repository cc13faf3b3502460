"""How few steps can we take?  One step of Euler, DPM-Solver++ and UniPC, from one noise level to the next.

The loop belongs to you; a solver only knows how to take one step:

    solver, memory = UniPC(), None
    for i, (t, sigma, sigma_next) in enumerate(schedule):
        velocity = ...                                   # what the model says at x
        x, memory = solver.step(x, velocity, sigma, sigma_next, memory, left=len(schedule) - i)

A step is pure: the same inputs give the same outputs and nothing is changed in place, so a run can be paused,
rewound, edited and compared. What a multistep solver needs from earlier steps travels in `memory`, None at
the start.

Symbols, as in the papers and in the code below:

    x, x0        the latent at `sigma`; the clean latent that the velocity points at (m in the papers)
    alpha        1 - sigma, how much of x is signal
    lambda       log_snr(sigma) = ln(alpha / sigma), the clock that both papers use
    h            lambda_next - lambda, the length of the step on that clock; infinite for a step to sigma 0
    phi          e^-h - 1: a step with x0 constant is  x sigma_next / sigma - alpha_next phi x0
    gap          how far an older x0 estimate lies behind, in steps: 1 if that step was as long as this one
    slope, bend  how much x0 changes in one step, and how much its change changes (D1, D2 in the papers)
    r            where another x0 estimate lies: 0 here, 1 at the end of the step, below 0 in the past
    order        how many x0 estimates the step uses: 1 takes x0 as constant, 2 as a straight line, 3 as a
                 parabola in lambda
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

    x0s: tuple = ()
    sigmas: tuple = ()
    done: int = 0
    x: torch.Tensor | None = None
    order: int = 0

    def __repr__(self):
        levels = ", ".join(f"{sigma:.4f}" for sigma in self.sigmas)
        return f"Memory({self.done} steps done; x0 kept at sigma {levels})"


def log_snr(sigma):
    """lambda = ln(1 - sigma) - ln(sigma), half the log signal-to-noise ratio: -inf at sigma 1, inf at 0."""
    return torch.log((1 - sigma).clamp_min(0)) - torch.log(sigma)


@dataclass(frozen=True)
class Euler:
    """Follow the velocity in a straight line: exact when the path is straight, else of order 1. No memory."""

    grid = "euler"

    def step(self, x, velocity, sigma, sigma_next, memory=None, left=None):
        """x + (sigma_next - sigma) velocity.   x, velocity [b, ...] -> (x [b, ...], None)"""
        x, velocity, sigma, sigma_next, _ = _check(x, velocity, sigma, sigma_next, memory, left)
        return x + (sigma_next - sigma) * velocity, None


@dataclass(frozen=True)
class DPMSolverPP:
    """DPM-Solver++, multistep: what is linear in x is solved exactly, x0 is extrapolated from past steps.

    order    1, 2 (Wan's "dpm++") or 3; order 3 of the reference gives the parabola half its weight, and so
             its error falls like that of order 2
    variant  "midpoint" (Wan) or "heun": how order 2 weighs the line
    grid     "dpm++" starts at sigma 1, where h is infinite; the formulas have a finite limit there, and the
             arithmetic reaches it

    Source: Lu et al. 2022 (DPM-Solver++), algorithm 2; order 3 and heun as in its reference code.
    """

    order: int = 2
    variant: str = "midpoint"
    grid = "dpm++"

    def __post_init__(self):
        _options(self, self.order, ("midpoint", "heun"))

    def step(self, x, velocity, sigma, sigma_next, memory=None, left=None):
        """One step down.   x, velocity [b, ...] -> (x [b, ...], memory)

        left  the steps that remain, this one included. Only order 3 needs it: in runs under 15 steps the one
              before last is of order 2.
        """
        x, velocity, sigma, sigma_next, left = _check(x, velocity, sigma, sigma_next, memory, left)
        memory = memory or Memory()
        x0s = (x0_from(x, velocity, sigma), *memory.x0s)[: self.order]
        sigmas = (sigma, *memory.sigmas)[: self.order]
        order = min(len(x0s), self._highest(memory.done, left))

        lambdas = [log_snr(s) for s in sigmas]
        h, alpha = log_snr(sigma_next) - lambdas[0], 1 - sigma_next
        # Not expm1, as in UniPC: each is computed as its reference does it, and so equal to the last digit.
        phi = torch.exp(-h) - 1
        x = sigma_next / sigma * x - alpha * phi * x0s[0]
        if order == 2:
            slope = (x0s[0] - x0s[1]) / ((lambdas[0] - lambdas[1]) / h)
            # The two weights agree, but for higher powers of h.
            weight = -phi / 2 if self.variant == "midpoint" else phi / h + 1
            x = x + alpha * weight * slope
        if order == 3:
            slope, bend = _parabola(x0s, lambdas, h)
            x = x + alpha * (phi / h + 1) * slope - alpha * ((phi + h) / h**2 - 0.5) * bend
        return x, Memory(x0s, sigmas, memory.done + 1)

    def _highest(self, done, left):
        """A run ends with lower orders: 1 for the last step, in a short run 2 for the one before."""
        if left == 1:
            return 1
        return 2 if left == 2 and done + left < 15 else 3


def _parabola(x0s, lambdas, h):
    """Slope and bend, here, of the parabola through three x0 estimates."""
    gap, older_gap = (lambdas[0] - lambdas[1]) / h, (lambdas[1] - lambdas[2]) / h
    slope, older_slope = (x0s[0] - x0s[1]) / gap, (x0s[1] - x0s[2]) / older_gap
    change = slope - older_slope
    return slope + gap / (gap + older_gap) * change, change / (gap + older_gap)


@dataclass(frozen=True)
class UniPC:
    """Predict, and once the model has been asked at the new place, correct: one more order for no extra call.

    order    1, 2 (Wan's default solver) or 3: how many x0 estimates the predictor uses; the corrector has the
             new one too
    variant  "bh2" (Wan) or "bh1": B = phi, or B = -h. A step to sigma 0 uses no B, so bh1 is finite there too
             (the official code multiplies 0 by an infinite B and returns NaN)
    grid     "unipc", which starts just below sigma 1; at sigma 1 itself the corrector has no finite weights

    An edit that you make to x between two steps reaches the rest of the run only through the velocity that it
    causes, because the corrector goes back to where the last step set out from. To keep the edit itself, go
    on with memory=None.
    Source: Zhao et al. 2023 (UniPC), multistep, with the model read as a prediction of x0.
    """

    order: int = 2
    variant: str = "bh2"
    grid = "unipc"

    def __post_init__(self):
        _options(self, self.order, ("bh1", "bh2"))

    def step(self, x, velocity, sigma, sigma_next, memory=None, left=None):
        """Correct the last step, then predict the next.   x, velocity [b, ...] -> (x, memory)

        left  the steps that remain, this one included: the order falls to it at the end. Orders
              1 and 2 can tell from sigma_next = 0.
        """
        x, velocity, sigma, sigma_next, left = _check(x, velocity, sigma, sigma_next, memory, left)
        if sigma >= 1:
            raise ValueError(
                "UniPC cannot start at sigma 1, where the log signal-to-noise ratio is infinite; "
                'take the sigmas from flow.schedule(steps, shift, grid="unipc"), which starts just '
                "below, or use DPMSolverPP."
            )
        x0 = x0_from(x, velocity, sigma)  # of the x that the model saw, not of the corrected one
        if memory is None:
            memory = Memory()
            x = x.clone()  # so that an edit of the caller's x cannot reach into memory
        elif memory.x is None:
            raise ValueError("this memory is of another solver; UniPC needs its own, or None to start.")
        else:
            x = self._move(memory.x, memory.x0s, memory.sigmas, sigma, memory.order, x0_next=x0)
        x0s, sigmas = (x0, *memory.x0s)[: self.order], (sigma, *memory.sigmas)[: self.order]
        order = min(len(x0s), left or self.order)  # no `left`: the caller did not say
        kept = Memory(x0s, sigmas, memory.done + 1, x, order)
        return self._move(x, x0s, sigmas, sigma_next, order), kept

    def _move(self, x, x0s, sigmas, sigma_next, order, x0_next=None):
        """From x at sigmas[0] to sigma_next, along the polynomial through `order` past x0s; the corrector
        knows x0_next too."""
        here = log_snr(sigmas[0])
        h, alpha = log_snr(sigma_next) - here, 1 - sigma_next
        phi = torch.expm1(-h)
        r = [(log_snr(s) - here) / h for s in sigmas[1:order]]
        slopes = [(x0 - x0s[0]) / r_k for x0, r_k in zip(x0s[1:order], r)]  # change per step
        if x0_next is not None:
            r, slopes = [*r, torch.ones_like(h)], [*slopes, x0_next - x0s[0]]
        x = sigma_next / sigmas[0] * x - alpha * phi * x0s[0]
        if not slopes:
            return x
        B = phi if self.variant == "bh2" else -h
        weighed = [weight * slope for weight, slope in zip(_weights(r, h, phi, B), slopes)]
        return x - alpha * B * sum(weighed)


def _weights(r, h, phi, B):
    """How much each slope counts, so that a polynomial x0 of that degree is integrated exactly.   [n] -> [n]

    r, ..., r^n at the places of the estimates must give the integrals that e^-h weighs them with (`moments`).
    A single slope counts one half, whatever h: near enough, and what the reference does.
    """
    if len(r) == 1:
        return [torch.full_like(h, 0.5)]
    r, rows, moments = torch.stack(r), [], []  # [n]
    term, factorial = phi / -h - 1, 1  # z phi_2(z), then z phi_3(z) of the paper, with z = -h
    for k in range(1, len(r) + 1):
        rows.append(r ** (k - 1))
        moments.append(term * factorial / B)
        factorial *= k + 1
        term = term / -h - 1 / factorial
    return torch.linalg.solve(torch.stack(rows), torch.stack(moments))


SOLVERS = {"unipc": UniPC, "dpm++": DPMSolverPP, "euler": Euler}


def solver(name, **options):
    """A solver by name: "unipc", "dpm++" or "euler"; `order=` and `variant=` go to it.

    Its `grid` names the flow.schedule to use. Raises ValueError for an unknown name, order or variant.
    """
    if name not in SOLVERS:
        near = get_close_matches(str(name), SOLVERS, n=1, cutoff=0.3) or list(SOLVERS)
        raise ValueError(
            f"unknown solver {name!r}; did you mean {' or '.join(map(repr, near))}? All solvers: "
            f"{', '.join(SOLVERS)}."
        )
    return SOLVERS[name](**options)


# ---- checks ------------------------------------------------------------------------------------------------


def _check(x, velocity, sigma, sigma_next, memory, left):
    """Refuse what would give nonsense quietly; the state in float32 (or float64), the scalars on the CPU."""
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
            f"left={left} for a step to sigma {sigma_next:.6g}; left counts the steps that remain, this one "
            "included: 1 for the step to sigma 0."
        )
    if memory is not None:
        _check_memory(memory, x, sigma)
    left = 1 if sigma_next == 0 else left
    return x.to(dtype), velocity.to(dtype), sigma, sigma_next, left


def _check_memory(memory, x, sigma):
    if not isinstance(memory, Memory):
        raise TypeError(
            f"memory is {type(memory).__name__}; expected what the last step returned, or None to start a "
            "run."
        )
    if memory.x0s[0].shape != x.shape:
        raise ValueError(
            f"memory is of a latent {list(memory.x0s[0].shape)} but x is {list(x.shape)}; "
            "pass memory=None to start a new run."
        )
    if not sigma < memory.sigmas[0]:
        raise ValueError(
            f"memory is of a step at sigma {memory.sigmas[0]:.6g}, and this one begins at {sigma:.6g}; sigma "
            "must fall. Pass memory=None to start a new run, or the memory that belongs to this x."
        )


def _options(solver, order, variants):
    if order not in (1, 2, 3):
        raise ValueError(f"order={order!r}; {type(solver).__name__} has orders 1, 2 and 3.")
    if solver.variant not in variants:
        raise ValueError(
            f"variant={solver.variant!r}; {type(solver).__name__} has {', '.join(map(repr, variants))}."
        )
