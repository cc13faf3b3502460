"""What if the first step, or the length of the push, does the harm?  CFG-Zero* and APG.

Both are CFG with another way to combine, and both must know where in its run they are: `at(step=)` says it,
as a Pipeline does.
"""

import math
from dataclasses import dataclass, field
from numbers import Real

import torch
from torch.linalg import vector_norm

from ..hooks import Memory, position
from .free import CFG, cfg_zero


@dataclass(frozen=True)
class CFGZero(CFG):
    """CFG-Zero*: uncond is first scaled to what cond agrees with, and the first steps do not move at all.

    zeros  how many of the first steps answer with a velocity of zero. At sigma 1 a model sees noise alone,
           and what an undertrained one says there is worse than nothing

    The other arguments as in CFG. Source: Fan et al. 2025 (CFG-Zero*), arXiv 2503.18886, algorithm 1.
    """

    combine: object = cfg_zero
    zeros: int = 1

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.zeros, int) or self.zeros < 0:
            raise ValueError(f"zeros={self.zeros!r}; expected a whole number of steps from 0 on")

    def __call__(self, predict, sigma, t=None):
        if not self.zeros or step_of(self) >= self.zeros:
            return super().__call__(predict, sigma, t)
        return torch.zeros_like(predict("cond"), dtype=torch.float32)  # asked for its shape alone


def projected(cond, push, along=0.0):
    """A push without what is parallel to cond, which makes colours louder and nothing else clearer.

    cond, push  [b, ...];  along: how much of the parallel part is kept, 1 for all of it
    ->          [b, ...], the dtype of push

    Computed in float64, as a small part is taken from a large one.
    """
    axes = list(range(1, cond.ndim))
    unit = cond.double() / vector_norm(cond.double(), dim=axes, keepdim=True).clamp_min(1e-12)
    parallel = (push.double() * unit).sum(axes, keepdim=True) * unit
    return (push.double() - (1 - along) * parallel).to(push.dtype)


@dataclass(frozen=True)
class APG(CFG):
    """Adaptive projected guidance: cond + (scale - 1) projected(clipped(cond - uncond + momentum last push)).

    along     how much of the part parallel to cond is kept; 1, no momentum and no limit: CFG
    momentum  how much of the push of the step before is added; below 0 it takes back what was pushed already
    limit     the longest push, as its length over all numbers of a latent. Lengths grow with the root of the
              latent's size: 15 is for an image of 64 x 64 cells; None: no limit

    The other arguments as in CFG, but `combine`. Source: Sadat et al. 2024 (APG), arXiv 2410.02416,
    algorithm 1.
    """

    along: float = 0.0
    momentum: float = -0.5
    limit: float | None = 15.0
    combine: object = field(default=None, repr=False)
    memory: Memory = field(default_factory=Memory, init=False, repr=False, compare=False)

    def __post_init__(self):
        if self.combine not in (None, self._push):
            raise TypeError(f"APG combines in its own way; leave combine={self.combine!r} out")
        object.__setattr__(self, "combine", self._push)
        super().__post_init__()
        for name in ("along", "momentum"):
            if not _is_number(getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)!r}; expected a number")
        if self.limit is not None and not (_is_number(self.limit) and self.limit > 0):
            raise ValueError(f"limit={self.limit!r}; expected a length above 0, or None for no limit")

    def _push(self, cond, uncond, scale):
        cond, push = cond.float(), cond.float() - uncond.float()
        if self.momentum:
            step_of(self)  # else nothing is remembered, and nobody would notice
            last = self.memory.here()
            push = last["push"] = push + self.momentum * last.get("push", 0)
        if self.limit is not None:
            length = vector_norm(push, dim=list(range(1, push.ndim)), keepdim=True)
            push = push * (self.limit / length.clamp_min(1e-12)).clamp_max(1)
        return cond + (scale - 1) * projected(cond, push, self.along)


def _is_number(value):
    return isinstance(value, Real) and math.isfinite(value)


def step_of(guide):
    """The number of the step that runs.   ValueError where nobody says it"""
    step = position().get("step")
    if step is None:
        raise ValueError(
            f"{type(guide).__name__} must know which step it is asked in, and nobody says so: in a loop of "
            "your own write `with at(step=i):` around the step"
        )
    return step
