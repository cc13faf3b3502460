"""What is the model asked to predict?  The straight path from noise to data, and where along it we stop.

x       the noisy latent at level sigma:  x = (1 - sigma) x0 + sigma noise
x0      the clean latent, where the path ends (sigma = 0)
noise   the Gaussian start of the path (sigma = 1)
velocity  = dx / dsigma = noise - x0, what Wan predicts; along one straight path it never changes
sigma   the noise level in [0, 1]; for this path it is also the time
t       1000 sigma, cut to a whole number: the time scale that the DiT was trained on
"""

import numbers
import operator
from dataclasses import dataclass
from difflib import get_close_matches
from reprlib import repr as brief

import numpy as np
import torch

MOST_STEPS = 1000

# ---- three views of one point on the path ---------------------------------------------------------------


def _beside(sigma, x):
    """One sigma for all of x, or one per item of the batch, shaped so that it multiplies x."""
    if torch.is_tensor(sigma) and sigma.ndim == 1:
        if len(sigma) not in (1, len(x)):
            raise ValueError(
                f"{len(sigma)} sigmas for a batch of {len(x)}; expected one number, or one sigma per item."
            )
        return sigma.reshape(-1, *[1] * (x.ndim - 1))  # [b, 1, 1, ...]
    return sigma


def add_noise(x0, noise, sigma):
    """Walk from the clean latent towards the noise: x = (1 - sigma) x0 + sigma noise.

    x0, noise  [b, ...]     same shape
    sigma      number, or [b] for a level per item, in [0, 1]
    ->         [b, ...]

    Source: Liu et al. 2022 (Rectified Flow), with time running from data to noise.
    """
    sigma = _beside(sigma, x0)
    return (1 - sigma) * x0 + sigma * noise


def velocity_from(x0, noise):
    """The direction of the path, noise - x0: the target in training, and what the DiT returns."""
    return noise - x0


def x0_from(x, velocity, sigma):
    """Where the path ends if we keep this direction down to sigma 0: x - sigma velocity."""
    return x - _beside(sigma, x) * velocity


def noise_from(x, velocity, sigma):
    """Where the path began if it always had this direction: x + (1 - sigma) velocity."""
    return x + (1 - _beside(sigma, x)) * velocity


def velocity_to(x0, x, sigma):
    """The direction that leads from x at level sigma > 0 straight to x0: how an edited x0 becomes a velocity
    again."""
    return (x - x0) / _beside(sigma, x)


# ---- where to stop on the way --------------------------------------------------------------------------


def shift_sigmas(sigmas, shift):
    """Spend more of the steps at high noise, as larger videos need: shift u / (1 + (shift - 1) u).

    sigmas  number, array or tensor of noise levels in [0, 1]
    shift   > 0; 1 leaves them alone. Wan: 5, or 3 for image-to-video at 480p
    ->      the same kind and shape; 0 stays 0 and 1 stays 1

    Source: Esser et al. 2024 (Stable Diffusion 3), section 5.3.2, resolution-dependent shifting.
    """
    if not (isinstance(shift, numbers.Real) and 0 < shift <= 1e6):
        raise ValueError(f"shift={brief(shift)}; expected a number above 0. Wan uses 3 to 16.")
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def _unipc(steps, shift):
    # The float32 of 0.999: the first sigma is below 1, its log signal-to-noise ratio finite.
    return shift_sigmas(np.linspace(float(np.float32(0.999)), 0, steps + 1)[:-1], shift)


def _dpmpp(steps, shift):
    return shift_sigmas(np.linspace(1.0, 0, steps + 1)[:-1], shift)


# name: (steps, shift) -> float64 [steps], the levels of a run without the 0 at its end
GRIDS = {"unipc": _unipc, "dpm++": _dpmpp, "euler": _unipc}


@dataclass(frozen=True, eq=False)
class Schedule:
    """The levels that a run visits. Iterating gives (t, sigma, sigma_next) for each step.

    sigmas     float32 [steps + 1]  falling, the last one 0; on the CPU, where the solvers do their scalar
               arithmetic
    timesteps  int64   [steps]      trunc(1000 sigma), what the DiT is told
    """

    sigmas: torch.Tensor
    timesteps: torch.Tensor
    grid: str
    shift: float

    def __len__(self):
        return len(self.timesteps)

    def __iter__(self):
        return zip(self.timesteps, self.sigmas[:-1], self.sigmas[1:])

    def __repr__(self):
        levels = " ".join(f"{sigma:.3f}" for sigma in self.sigmas.tolist())
        return f"Schedule({len(self)} steps, shift {self.shift:g}, grid {self.grid!r}: {levels})"


def schedule(steps, shift, grid="unipc", device=None):
    """Choose the noise levels of a run.

    steps   whole number, 1 to 1000; or a step list, the levels themselves, as few-step models have one:
            (1.0, 0.9375, 0.8333, 0.625). They are taken as they are; shift and grid then choose nothing
    shift   > 0, see `shift_sigmas`
    grid    "unipc" or "dpm++": evenly spaced, then shifted, as official Wan does for that solver.
            "euler" is the "unipc" grid, as official Wan has no Euler
    device  where `timesteps` go; `sigmas` stay on the CPU
    ->      Schedule

    Computed in float64; the whole-number timesteps are cut from the float64 values, the sigmas
    then rounded to float32.
    Raises ValueError for an unknown grid, steps out of bounds or shift <= 0.
    Guide: guides/flow.md, "Why shift".
    """
    if isinstance(steps, (tuple, list)):
        levels, grid, shift = np.array(step_list(steps)), "list", 1.0
    else:
        steps = _checked(steps, grid)
        levels = GRIDS[grid](steps, shift)  # float64 [steps]: evenly spaced, then shifted
    sigmas = torch.from_numpy(np.append(levels, 0.0).astype(np.float32))
    timesteps = torch.from_numpy(np.trunc(levels * 1000).astype(np.int64))
    return Schedule(sigmas, timesteps.to(device=device), grid, float(shift))


def step_list(steps):
    """A step list that can be walked: falling levels in (0, 1]; a 0 at its end, where every run ends, is
    taken off.   -> tuple of floats

    Raises ValueError for anything else.
    """
    known = all(isinstance(level, numbers.Real) for level in steps)
    levels = tuple(map(float, steps)) if known else ()
    levels = levels[:-1] if levels and levels[-1] == 0 else levels
    falling = all(high > low for high, low in zip((1.0 + 1e-9, *levels), (*levels, 0.0)))
    if not levels or not falling or len(levels) > MOST_STEPS:
        raise ValueError(
            f"steps={brief(steps)} as a step list; expected noise levels that fall from at most 1 to above "
            "0, such as (1.0, 0.9375, 0.8333, 0.625). Times 0..1000 are a thousand times those."
        )
    return levels


def _checked(steps, grid):
    """A grid that there is, and steps that can be taken.   -> steps, a plain whole number"""
    if not isinstance(grid, str) or grid not in GRIDS:
        near = get_close_matches(str(grid), GRIDS, n=2, cutoff=0.4) or list(GRIDS)
        raise ValueError(
            f"unknown grid {brief(grid)}; did you mean {' or '.join(map(repr, near))}? All grids: "
            f"{', '.join(GRIDS)}."
        )
    try:
        steps = operator.index(steps)
    except TypeError:
        raise ValueError(f"steps={brief(steps)}; expected a whole number such as 20.") from None
    if not 1 <= steps <= MOST_STEPS:
        raise ValueError(
            f"steps={brief(steps)}; expected at least 1 and at most {MOST_STEPS}, for t tells no more levels "
            "apart. Wan uses 40 to 50, a draft can do with 8."
        )
    return steps


def high_noise(t, boundary):
    """Does the high-noise expert of a two-expert model (Wan 2.2 A14B) take this step?

    t         the DiT's time, 0..1000: pass the whole-number timestep, so that rounding cannot move the switch
    boundary  in [0, 1]: 0.875 for text-to-video, 0.9 for image-to-video
    """
    return float(t) >= boundary * 1000


# ---- the noise of a long film ---------------------------------------------------------------------------


def free_noise(noise, length, overlap):
    """Noise that repeats from window to window, in another order: all windows begin alike, and agree more.

    noise            [b, c, f, h, w]; the first `length` frames stay
    length, overlap  latent frames of a window, and that neighbours share
    ->               [b, c, f, h, w]

    The new frames of each window are those of the window before it, shuffled. The order is drawn from the
    noise itself, so the same noise gives the same again. Source: Qiu et al. 2023, FreeNoise
    """
    noise, frames, new = noise.clone(), noise.shape[2], length - overlap
    source = torch.Generator().manual_seed(int(noise.view(torch.int32).flatten()[0]))
    for first in range(0, frames - length, new):
        order = first + torch.randperm(new, generator=source)
        there = noise[:, :, first + length : first + length + new]  # the last may be short
        there.copy_(noise[:, :, order[: there.shape[2]]])
    return noise
