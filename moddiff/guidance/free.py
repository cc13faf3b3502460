"""How hard should we push?  Classifier-free guidance, and relatives that cost or distort less.

The model is asked twice: with the prompt (cond) and with the negative prompt (uncond). Their difference is
what the prompt changes; guidance walks further in that direction than the model itself would.
"""

import numbers
from collections.abc import Callable
from dataclasses import dataclass
from reprlib import repr as brief

import torch

from ..flow import high_noise


def cfg(cond, uncond, scale):
    """uncond + scale (cond - uncond), in float32: scale 0 ignores the prompt, 1 follows it, above 1
    exaggerates it.

    cond, uncond  [b, ...] velocities
    Source: Ho & Salimans 2022, eq. 6, with scale = 1 + w.
    """
    cond, uncond = cond.float(), uncond.float()
    return uncond + scale * (cond - uncond)


def cfg_zero(cond, uncond, scale):
    """Guidance from the part of uncond that cond agrees with: uncond is first scaled by <cond, uncond> /
    |uncond|^2.

    Source: Fan et al. 2025 (CFG-Zero*), the optimised scale; batch items are scaled one by one.
    """
    cond, uncond = cond.float(), uncond.float()
    flat_cond, flat_uncond = cond.flatten(1), uncond.flatten(1)  # [b, n]
    best = (flat_cond * flat_uncond).sum(1) / flat_uncond.square().sum(1).clamp_min(1e-12)  # [b]
    return cfg(cond, best.reshape(-1, *[1] * (cond.ndim - 1)) * uncond, scale)


def rescaled(amount=0.7, combine=cfg):
    """Guidance whose result is brought back towards the spread of cond, against washed-out or burnt colours.

    amount  0 leaves `combine` alone, 1 restores the standard deviation of cond in full
    ->      a function (cond, uncond, scale) -> velocity, for CFG(combine=...)
    Source: Lin et al. 2023 (Common Diffusion Noise Schedules), section 3.4.
    """

    def rescale(cond, uncond, scale):
        guided = combine(cond, uncond, scale)
        axes = list(range(1, guided.ndim))
        spread = cond.float().std(axes, keepdim=True) / guided.std(axes, keepdim=True).clamp_min(1e-12)
        return guided * (amount * spread + 1 - amount)

    return rescale


@dataclass(frozen=True)
class CFG:
    """Guidance as the loop uses it: velocity = guide(predict, sigma, t).

    scale     how hard to push; Wan: 5. A pair (low noise, high noise) gives each expert of Wan 2.2 A14B its
              own, and needs `boundary`
    boundary  where the high-noise expert takes over, in [0, 1] (0.875 or 0.9)
    interval  (lowest, highest) sigma at which to guide; outside it only cond runs, at half the cost
              (Kynkaanniemi et al. 2024)
    combine   (cond, uncond, scale) -> velocity: `cfg`, `cfg_zero`, `rescaled(0.7)` or your own; at scale 1 it
              must return cond
    skip      at scale 1 run only cond: algebraically the same, different by float32 rounding at most.
              Official Wan runs both: skip=False
    """

    scale: float | tuple[float, float] = 5.0
    boundary: float | None = None
    interval: tuple[float, float] = (0.0, 1.0)
    combine: Callable = cfg
    skip: bool = True

    def __post_init__(self):
        # All is asked here, once, so that a wrong number ends before the run and not in its tenth step.
        pair = isinstance(self.scale, (tuple, list))
        scales = self.scale if pair else (self.scale,)
        if len(scales) != (2 if pair else 1) or not all(_between(-1e6, scale, 1e6) for scale in scales):
            raise ValueError(
                f"scale={brief(self.scale)}; expected a number such as 5.0, or a pair (low noise, high "
                "noise)."
            )
        if pair and self.boundary is None:
            raise ValueError(
                f"scale={self.scale} is a pair (low noise, high noise), so the guide must know where one "
                "becomes the other: add boundary=0.875 (text-to-video) or 0.9 (image-to-video), or pass one "
                "number."
            )
        if self.boundary is not None and not _between(0, self.boundary, 1):
            raise ValueError(f"boundary={brief(self.boundary)}; expected a sigma in [0, 1], such as 0.875.")
        ends = self.interval if isinstance(self.interval, (tuple, list)) else ()
        if len(ends) != 2 or not all(_between(0, end, 1) for end in ends) or ends[0] > ends[1]:
            raise ValueError(
                f"interval={brief(self.interval)}; expected (lowest, highest) with 0 <= lowest <= highest <= "
                "1."
            )
        if not callable(self.combine):
            raise TypeError(
                f"combine={brief(self.combine)}; expected a function (cond, uncond, scale), such as "
                "guidance.cfg_zero."
            )

    def scale_at(self, sigma, t=None):
        """The scale in force at this noise level: 1 outside the interval, else `scale`, or that of the expert
        at work.

        t decides between experts, as it does in the pipeline; without it, 1000 sigma.
        """
        if not self.interval[0] <= float(sigma) <= self.interval[1]:
            # Guidance of scale 1 is cond alone: outside the interval nothing is pushed.
            return 1.0
        if isinstance(self.scale, (tuple, list)):
            # The pair is (low, high), and the question has the answer False or True: 0 or 1.
            return self.scale[high_noise(float(sigma) * 1000 if t is None else t, self.boundary)]
        return self.scale

    def runs(self, sigma, t=None):
        """The branches that this step will ask for: ("cond", "uncond"), or ("cond",)."""
        outside = not self.interval[0] <= float(sigma) <= self.interval[1]
        if outside or (self.skip and self.scale_at(sigma, t) == 1):
            return ("cond",)
        return ("cond", "uncond")  # in Wan's order, by which caches compare a step with the last one

    def __call__(self, predict, sigma, t=None):
        """Ask for one branch or for both, and combine.

        predict  "cond" or "uncond" -> the velocity [b, ...] of that branch
        sigma    the noise level, in [0, 1];  t: the DiT's time, 0..1000
        ->       [b, ...] float32
        """
        velocities = {branch: predict(branch) for branch in self.runs(sigma, t)}
        for branch, velocity in velocities.items():
            if not torch.is_tensor(velocity):
                raise TypeError(
                    f"predict({branch!r}) returned {type(velocity).__name__}; "
                    "expected a velocity tensor. Did the function forget to return?"
                )
        cond, uncond = velocities["cond"], velocities.get("uncond")
        if uncond is None:
            return cond.float()
        if cond.shape != uncond.shape:
            raise ValueError(
                f'predict("uncond") returned {list(uncond.shape)} '
                f'but predict("cond") {list(cond.shape)}; '
                "both are velocities of the same x, so their shapes must agree."
            )
        return self.combine(cond, uncond, self.scale_at(sigma, t))


def _between(low, value, high):
    """Is it a number there? NaN and what is no number are not."""
    return isinstance(value, numbers.Real) and low <= value <= high
