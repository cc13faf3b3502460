"""What if the second answer came from within?  Guidance that reaches into the model: skip-layer and NAG.

Both patch the taps of the dit, so they work for any denoiser that has ours: blocks with `resid_pre` and
`resid_post`, cross-attention that is called at `attend`. A Pipeline says which dit it is (`predict.dit`); in
a loop of your own give it: SkipLayer(dit=dit).
"""

import re
from dataclasses import dataclass, field
from numbers import Real
from reprlib import repr as brief
from typing import Any

from ..contracts import fact
from ..flow import high_noise
from ..hooks import Memory, capture, patch, points
from .free import CFG
from .relatives import step_of

SKIPPED = "cond.skipped"  # the branch: cond's prompt, asked another way, so caches keep it apart


@dataclass(frozen=True)
class SkipLayer(CFG):
    """Skip-layer guidance: away from what the model says with some of its blocks left out.

    CFG's velocity + push (cond - cond without the blocks): a third pass, in the steps within `during`. A
    model without its middle blocks makes the mistakes of a worse model, which a different prompt does not.

    blocks  which are left out: their numbers
    push    how far away from it; None: no third pass, but the blocks are left out of the second one, uncond,
            as Wan's users do
    during  (lowest, highest) sigma at which to do it: layouts are decided high up
    dit     where no Pipeline says it

    The other arguments as in CFG. Sources: Hyung et al. 2024 (spatiotemporal skip guidance), arXiv
    2411.18664; Diffusers' SkipLayerGuidance, the formula with CFG beside it.
    """

    blocks: tuple[int, ...] = (4,)
    push: float | None = 2.8
    during: tuple[float, float] = (0.85, 0.99)
    dit: Any = field(default=None, repr=False)

    def __post_init__(self):
        super().__post_init__()
        blocks = self.blocks if isinstance(self.blocks, (tuple, list)) else ()
        if not blocks or not all(isinstance(block, int) and block >= 0 for block in blocks):
            raise ValueError(f"blocks={brief(self.blocks)}; expected numbers of blocks, such as (4,)")
        if self.push is not None and not isinstance(self.push, Real):
            raise ValueError(f"push={brief(self.push)}; expected a number such as 2.8, or None")
        CFG(interval=self.during)  # or its error

    def __call__(self, predict, sigma, t=None):
        if not self.during[0] <= float(sigma) <= self.during[1]:
            return super().__call__(predict, sigma, t)
        if self.push is None:

            def ask(branch):
                return predict(branch) if branch == "cond" else self.without_blocks(predict, branch)

            return super().__call__(ask, sigma, t)
        asked = {}

        def remember(branch):
            asked[branch] = predict(branch)
            return asked[branch]

        guided = super().__call__(remember, sigma, t)
        return guided + self.push * (asked["cond"].float() - self.without_blocks(predict, SKIPPED).float())

    def without_blocks(self, predict, branch):
        """What the dit says where these blocks hand on what they were given."""
        dit, came_in = dit_of(self, predict), {}
        skipped = paths_of(dit, self.blocks)

        def keep(x, where):
            came_in[where.path] = x
            return x

        def hand_on(x, where):
            return came_in[where.path] if where.path in skipped else x

        with patch(dit, "*resid_pre", keep, blocks=self.blocks):
            with patch(dit, "*resid_post", hand_on, blocks=self.blocks):
                return predict(branch)


def normalized_attention(asked, unasked, scale, limit=2.5, share=0.25):
    """One cross-attention pushed away from the negative prompt, kept from growing, and mixed in.

    asked, unasked  [b, heads, n, d], what the queries got from the prompt and from the negative one
    scale   how hard;  limit: how many times longer a token may become, in the sum of its absolute numbers
    share   of the result that is the pushed one
    ->      [b, heads, n, d]

    Source: Chen et al. 2025 (NAG), arXiv 2505.21179, equations 7 to 10.
    """
    pushed = scale * asked - (scale - 1) * unasked  # as CFG: scale 1 is `asked` alone
    long, short = (x.float().abs().sum((1, 3), keepdim=True) for x in (pushed, asked))  # of each token
    growth = long / short.clamp_min(1e-6)
    pushed = pushed * (growth.clamp_max(limit) / growth.clamp_min(1e-6)).to(pushed.dtype)
    return share * pushed + (1 - share) * asked


@dataclass(frozen=True)
class NAG:
    """Normalized attention guidance: the push happens in each cross-attention, and needs no second pass.

    So negative prompts work at scale 1 and in distilled models, whose velocities nobody can push.

    scale, limit, share  as in `normalized_attention`; Wan: 11, 2.5, 0.25
    interval  (lowest, highest) sigma at which to do it
    dit       where no Pipeline says it

    It costs one pass of the negative prompt at the first step of a run, for its keys and values.
    """

    scale: float = 11.0
    limit: float = 2.5
    share: float = 0.25
    interval: tuple[float, float] = (0.0, 1.0)
    dit: Any = field(default=None, repr=False)
    memory: Memory = field(default_factory=Memory, init=False, repr=False, compare=False)

    def __post_init__(self):
        for name in ("scale", "limit", "share"):
            if not isinstance(getattr(self, name), Real) or not 0 <= getattr(self, name) <= 1e6:
                raise ValueError(f"{name}={brief(getattr(self, name))}; expected a number from 0")
        CFG(interval=self.interval)  # or its error

    def runs(self, sigma, t=None):
        return ("cond",)

    def __call__(self, predict, sigma, t=None):
        if not self.interval[0] <= float(sigma) <= self.interval[1]:
            return predict("cond").float()
        step_of(self)  # else nothing is remembered
        dit, kept = dit_of(self, predict), self.memory.here()
        boundary = fact("dit", dit, "boundary")
        side = None if boundary is None else high_noise(1000 * float(sigma) if t is None else t, boundary)
        if side not in kept:  # each expert has keys and values of its own
            kept[side] = self.read_negative(dit, predict)
        unasked = kept[side]

        def attention(attend, q, k, v, where):
            return normalized_attention(
                attend(q, k, v), attend(q, *unasked[where.path]), self.scale, self.limit, self.share
            )

        with patch(dit, "*cross_attn.attend", attention):
            return predict("cond").float()

    def read_negative(self, dit, predict):
        """The keys and values that each cross-attention has of the negative prompt.   -> {path: (k, v)}"""
        with capture(dit, "*cross_attn.k", "*cross_attn.v", limit=None) as record:
            predict("uncond")
        found = {}
        for where, value in record:
            found.setdefault(where.path, {})[where.name] = value
        return {path: (both["k"], both["v"]) for path, both in found.items()}


def dit_of(guide, predict):
    """The denoiser behind `predict`.   ValueError where nobody says it"""
    dit = getattr(predict, "dit", None) if guide.dit is None else guide.dit
    if dit is None:
        raise ValueError(
            f"{type(guide).__name__} reaches into the dit, and this predict does not say which it is "
            f"(predict.dit); in a loop of your own give it: {type(guide).__name__}(dit=dit)"
        )
    return dit


def paths_of(dit, numbers):
    """The paths of these blocks, in each expert if there are two.   ValueError for one that is not there"""
    paths = {where.path: where.block for where in points(dit, "*resid_post")}
    known = {path: block for path, block in paths.items() if re.search(r"(^|\.)blocks\.\d+$", path)}
    if absent := set(numbers) - set(known.values()):
        raise ValueError(f"blocks={numbers}: no {min(absent)}; the dit has 0 to {max(known.values())}")
    return {path for path, block in known.items() if block in numbers}
