"""When is a step so like the one before that its work can be spared?  Four published rules.

Each is asked once a pass, before the blocks run: policy(now, here) -> skip? `now` is the Pass, `here` a dict
of its own, which starts empty with each run and is kept apart per branch, expert and window. One that has a
method `after(now, out, here)` is told what a pass that was computed gave. A function of your own may be a
policy, too.
"""

from dataclasses import dataclass, field

import torch

from ..hooks import at, position


@dataclass
class Pass:
    """One pass of a denoiser, as a policy is told of it.

    x        what goes in: tokens [b, n, c], or over the whole call the latent [b, c, f, h, w]
    first    [b, n, c] tokens after the first blocks, those that always run; x where there are none
    time     [b, 1 or n, c] the embedding of the timestep;  time6: its projection [b, 1 or n, 6, c]; over the
             whole call neither is known
    kept     is there anything to reuse, and may it be?
    """

    x: torch.Tensor
    first: torch.Tensor | None = None
    time: torch.Tensor | None = None
    time6: torch.Tensor | None = None
    kept: bool = False
    boundary: float | None = None
    memory: object = None
    row: dict = field(default_factory=dict)

    step = property(lambda self: position()["step"], doc="which step, from 0")
    branch = property(lambda self: position().get("branch"), doc='"cond", "uncond", or what the guide says')
    expert = property(lambda self: position().get("expert"), doc='"high", "low" or None')

    @property
    def times(self):
        """The timesteps of the run.   Raises ValueError where nobody said them."""
        run = position().get("run")
        if run is None or run.times is None:
            raise ValueError(
                "this cache must know how many steps the run has. A pipeline says so; around a loop of your "
                "own write `with at(run=OneRun(times)):`, with one OneRun (moddiff.hooks) for the whole run"
            )
        return run.times

    steps = property(lambda self: len(self.times), doc="of how many")

    @property
    def segment(self):
        """(first, end): the steps of the expert at work; of a single model, all."""
        if self.expert is None or self.boundary is None:
            return 0, self.steps
        high = sum(t >= self.boundary * 1000 for t in self.times)
        return (0, high) if self.expert == "high" else (high, self.steps)

    def tell(self, **columns):
        """Add columns to this pass's row of the report."""
        self.row |= columns

    def here_of(self, branch):
        """What the policy remembers in another branch."""
        with at(branch=branch):
            return self.memory.here().setdefault("policy", {})


def relative(new, old):
    """mean |new - old| / mean |old|"""
    return float((new - old).abs().mean() / old.abs().mean().clamp_min(1e-12))


class TeaCache:
    """The timestep tells how much the output will change: a polynomial of how far its embedding moved.

    coefficients  of the polynomial, highest power first; None: the distance itself
    ret_steps     read the projected embedding, and compute the first five steps and never the last for sure;
                  otherwise the embedding, the first step and the last

    Source: Liu et al. 2024 (TeaCache), arXiv:2411.19108; ali-vilab/TeaCache
    """

    over, blocks = "blocks", 0

    def __init__(self, threshold, coefficients=None, ret_steps=False):
        self.threshold, self.coefficients, self.ret_steps = threshold, coefficients, ret_steps

    def __call__(self, now, here):
        moment = now.time6 if self.ret_steps else now.time
        before, here["moment"] = here.get("moment"), moment  # moves on whether the step is skipped or not
        first, end = (5, now.steps) if self.ret_steps else (1, now.steps - 1)
        if before is None or not first <= now.step < end:
            here["sum"] = 0.0
            return False
        change = self.polynomial(relative(moment, before))
        here["sum"] += change
        now.tell(signal=change, accumulated=here["sum"])
        # The polynomial may be negative, and so the sum; a threshold of 0 means never all the same.
        if now.kept and here["sum"] < self.threshold and self.threshold > 0:
            return True
        here["sum"] = 0.0
        return False

    def polynomial(self, x):
        if self.coefficients is None:
            return x
        total = 0.0
        for coefficient in self.coefficients:
            total = total * x + coefficient
        return total


class MagCache:
    """What the blocks add shrinks from step to step by a ratio that hardly depends on the prompt.

    curve   {branch: [ratio of each step to the one before]}, of any number of steps
    most    skips in a row;  retain: the share of the passes, of each expert, that are computed first
    keep_high  compute all steps of the high-noise expert (Wan 2.2 image-to-video)

    Source: Ma et al. 2025 (MagCache), arXiv:2506.09045; Zehong-Ma/MagCache
    """

    over, blocks = "blocks", 0

    def __init__(self, threshold, curve, most=2, retain=0.2, keep_high=False):
        self.threshold, self.curve, self.most = threshold, curve, most
        self.retain, self.keep_high = retain, keep_high

    def __call__(self, now, here):
        start, end = now.segment
        passes = 2 * now.step + (now.branch == "uncond")  # the published counter: two a step
        begin = 2 * start + int(2 * (end - start) * self.retain)
        if self.keep_high and now.expert == "high":
            begin = 2 * end  # past its last pass
        if passes < begin:
            return False
        # What was kept shrank by all ratios since: by so much it would be too long now, and that adds up.
        ratio = here.get("ratio", 1.0) * self.ratio_at(now)
        error, count = here.get("error", 0.0) + abs(1 - ratio), here.get("count", 0) + 1
        now.tell(signal=abs(1 - ratio), accumulated=error)
        skips = now.kept and error < self.threshold and count <= self.most
        here |= dict(ratio=ratio, error=error, count=count) if skips else dict(ratio=1.0, error=0.0, count=0)
        return skips

    def ratio_at(self, now):
        """The ratio at this step: the nearest of the curve, which may have been measured at another count."""
        curve = self.curve.get(now.branch) or self.curve["cond"]
        if now.steps == 1:
            return curve[-1]
        return curve[round(now.step * (len(curve) - 1) / (now.steps - 1))]


class EasyCache:
    """The output changes as the latent does, by a factor that the run itself shows. Nothing is calibrated.

    first   steps that are computed first; the last one always is

    It needs no blocks, so any denoiser will do. The pass with the prompt decides, the other follows.
    Source: Zhou et al. 2025 (EasyCache), arXiv:2507.02860; H-EmbodVis/EasyCache
    """

    over, blocks = "call", 0

    def __init__(self, threshold, first=10):
        self.threshold, self.first = threshold, first

    def __call__(self, now, here):
        if now.branch == "uncond":
            cond = now.here_of("cond")
            if cond.get("step") == now.step:
                return now.kept and cond["skips"]
        here |= dict(step=now.step, skips=self.decides(now, here), x=now.x)
        return here["skips"]

    def decides(self, now, here):
        if not self.first <= now.step < now.steps - 1 or "factor" not in here:
            here["sum"] = 0.0
            return False
        moved = float((now.x - here["x"]).abs().mean())
        # If out moves as x does, times the factor seen last (the paper's k_t): how much that is of out.
        change = here["factor"] * moved / max(float(here["out"].abs().mean()), 1e-12)
        here["sum"] += change
        now.tell(signal=change, accumulated=here["sum"])
        if now.kept and here["sum"] < self.threshold:
            return True
        here["sum"] = 0.0
        return False

    def after(self, now, out, here):
        if "out" in here:
            moved = float((now.x - here["x_then"]).abs().mean())
            here["factor"] = float((out - here["out"]).abs().mean()) / max(moved, 1e-12)
        here |= dict(out=out, x_then=now.x)  # `x` is that of the last pass, skipped or not


class FirstBlock:
    """The first blocks run always; if they add what they added at the last full pass, so would the others.

    blocks  how many those are;  warmup: steps that are computed first

    Source: FBCache (chengzeyi/ParaAttention); with several blocks, DBCache (vipshop/cache-dit)
    """

    over = "blocks"

    def __init__(self, threshold, blocks=1, warmup=0):
        self.threshold, self.blocks, self.warmup = threshold, blocks, warmup

    def __call__(self, now, here):
        added = now.first - now.x
        if "added" in here and now.step >= self.warmup:
            change = relative(added, here["added"])
            now.tell(signal=change, accumulated=change)
            if now.kept and change <= self.threshold and self.threshold > 0:
                return True
        here["added"] = added  # not moved on by a skip: the last full pass stays the measure
        return False
