"""Which steps need no thinking?  A denoiser that reuses what its blocks added a step before.

Neighbouring steps see nearly the same latent, and what the blocks add to the stream changes little between
them. On a skipped step that residual, kept from an earlier one, is added instead. Guide: guides/cache.md
"""

import html

from ..contracts import fact
from ..experts import Experts
from ..hooks import at, open_sessions, parts, position, walk
from .cache_coefficients import chosen
from .cache_policies import EasyCache, FirstBlock, MagCache, Pass, TeaCache
from .promises import Extension, Report, bare, expect, extension, whole_number

DEFAULTS = {"teacache": 0.1, "magcache": 0.12, "easycache": 0.05, "first-block": 0.05}
OPTIONS = {
    "teacache": ("threshold", "coefficients", "model", "ret_steps"),
    "magcache": ("threshold", "curve", "model", "most", "retain"),
    "easycache": ("threshold", "first"),
    "first-block": ("threshold", "blocks", "warmup"),
}
BOX = (  # of the report in a notebook
    '<span style="display:inline-block; width:0.8em; height:0.8em; border:1px solid #2b6ca3; '
    'background:{}">&nbsp;</span>'
)
OF_A_FUNCTION = "over", "blocks"


@extension
def cached(dit, policy, **how):
    """A denoiser that skips steps.   -> the component; approximate

    policy     "teacache", "magcache", "easycache", "first-block", or a function (now, here) -> skip?
    threshold  how much change, as the policy counts it, may add up before a step is computed; 0: all are

    teacache     coefficients: five numbers, highest power first; "plain": the distance itself; a file that
                 `calibrate` wrote; None: the published ones of this model, which its config tells, or model=
                 its name. ret_steps=True: the variant that keeps the first five steps
    magcache     curve: {"cond": [...], "uncond": [...]}, or a file, or model=, as above. most=2 skips in a
                 row; retain=0.2: the share of a run, of each expert, that is computed first
    easycache    first=10 steps are computed first. Works with any denoiser, one that runs elsewhere, too
    first-block  blocks=1 run always; warmup=0 steps are computed first
    a function   over="blocks" or "call": what is skipped; blocks=0 run always. See cache_policies.Pass

    Taps of what is skipped do not fire: a capture has no such step, and raises NeverFired if it asked for
    that one. Nothing that an open patch wants to change is skipped, and what it changed is not reused.
    What is kept costs one hidden state for each branch, expert and window.

    Raises ValueError for another policy or option, for a model that has no published numbers, for a denoiser
    without blocks to skip, and for one that is cached already.
    """
    expect("dit", dit, "cached")
    if any(isinstance(part, Cached) for _, part in walk(dit)):
        raise ValueError("cached got a denoiser that is cached already; one cache is enough")
    policy = policy_of(policy, dit, how)
    sites = [part for _, part in walk(dit) if hasattr(type(part), "each_block")]
    if policy.over == "blocks" and not sites:
        raise ValueError(
            f"cached got {type(bare(dit)).__name__}, whose blocks it does not see; this policy skips blocks. "
            'Use cached(dit, "easycache"), which skips the whole call'
        )
    if policy.over == "blocks" and any("each_block" in vars(part) for part in sites):
        raise ValueError(f"cached skips blocks, and those of {dit!r} are shared out; put it inside that one")
    fewest = min((len(part.blocks) for part in sites), default=0)
    whole_number("cached", "blocks", policy.blocks)
    if policy.over == "blocks" and not policy.blocks < fewest:
        raise ValueError(f"cached(blocks={policy.blocks!r}); expected 0 to {fewest - 1}, of {fewest} blocks")
    return Cached(dit, policy, sites if policy.over == "blocks" else ())


def policy_of(policy, dit, how):
    """The policy that the arguments of `cached` mean."""
    if hasattr(policy, "over"):  # an object, such as cache_policies.TeaCache(0.1)
        check_options((), how, type(policy).__name__)
        return policy
    if callable(policy):
        check_options(OF_A_FUNCTION, how, "of your own")
        return Own(policy, **how)
    if policy not in OPTIONS:
        raise ValueError(f"cached(policy={policy!r}); expected {', '.join(OPTIONS)}, or a function")
    check_options(OPTIONS[policy], how, policy)
    how = {"threshold": DEFAULTS[policy]} | how
    if not isinstance(how["threshold"], int | float) or not how["threshold"] >= 0:
        raise ValueError(f"cached(threshold={how['threshold']!r}); expected a number from 0")
    for option in {"first", "most", "warmup"} & set(how):
        whole_number("cached", option, how[option], of="steps")
    if not 0 <= how.get("retain", 0.0) <= 1:
        raise ValueError(f"cached(retain={how['retain']!r}); expected a share of the run, from 0 to 1")
    model = how.pop("model", None)
    if policy == "teacache":
        how["coefficients"] = chosen("teacache", dit, how.get("coefficients"), model, how.get("ret_steps"))
        return TeaCache(**how)
    if policy == "magcache":
        how["curve"] = chosen("magcache", dit, how.get("curve"), model)
        return MagCache(**how, keep_high=fact("dit", dit, "task") == "i2v")
    return EasyCache(**how) if policy == "easycache" else FirstBlock(**how)


def check_options(known, how, policy):
    if odd := [name for name in how if name not in known]:
        raise ValueError(f"cached(..., {odd[0]}=): the policy {policy} takes {', '.join(known) or 'none'}")


class Own:
    """A function as a policy."""

    def __init__(self, function, over="blocks", blocks=0):
        if over not in ("blocks", "call"):
            raise ValueError(f'cached(over={over!r}); expected "blocks" or "call"')
        self.function, self.over, self.blocks = function, over, blocks

    def __call__(self, now, here):
        return self.function(now, here)


class Cached(Extension):
    """See `cached`.  policy: what decides"""

    def __init__(self, dit, policy, sites=()):
        super().__init__(dit, exact=False)
        self.policy, self.boundary = policy, fact("dit", dit, "boundary")
        # As bound methods of objects that a copy of this component copies, too.
        for site in sites:
            site.each_block = Shortcut(self, site).each_block

    def forward(self, x, t, *inputs, **options):
        if self.policy.over == "blocks" or not in_a_run():
            return self.wraps(x, t, *inputs, **options)
        with at(expert=self.expert(t)):
            now, here, skips = self.ask(self.wraps, x=x)
            out = x + here["kept"] if skips else self.wraps(x, t, *inputs, **options)
            return out if skips else self.keep(now, here, x, out)

    def expert(self, t):
        """Which expert will take this call, where there are two that can be seen."""
        inner = bare(self.wraps)
        if not isinstance(inner, Experts):
            return None
        return "high" if inner.expert(t) is inner.high else "low"

    def ask(self, *skipped, **seen):
        """Ask the policy about this pass, in which these parts may be skipped.   -> now, here, skip?"""
        here = self.memory.here()
        if "kept" in here and here["kept"].shape != seen["x"].shape:
            here.clear()  # a video of another size, in a loop by hand
        here["patched"], patched = is_patched(skipped), here.get("patched", False)
        kept = "kept" in here and not patched and not here["patched"]
        now = Pass(**seen, kept=kept, boundary=self.boundary, memory=self.memory)
        skips = bool(self.policy(now, here.setdefault("policy", {}))) and kept
        where = {name: position()[name] for name in ("branch", "expert", "window") if name in position()}
        self.memory.note(step=now.step, **where, **now.row, skipped=skips)
        return now, here, skips

    def keep(self, now, here, before, out):
        """After a pass that was computed: what was added, for the next ones.   -> out"""
        here["kept"] = (out - before).detach()
        if hasattr(self.policy, "after"):
            self.policy.after(now, out, here["policy"])
        return out

    def report(self):
        return Skips(self.memory.notes, self.in_words())


class Shortcut:
    """A way past the blocks of one DiT, in the place of its `each_block`."""

    def __init__(self, cache, dit):
        self.cache, self.blocks, self.dit = cache, dit.each_block, dit

    def skipped(self):
        """What does not run on a skipped step."""
        return self.dit.blocks[self.cache.policy.blocks :], self.dit.vace_blocks

    def each_block(self, x, time, time6, *rest):
        blocks = self.blocks(x, time, time6, *rest)
        if not in_a_run():
            yield from blocks
            return
        first = x
        for _ in range(self.cache.policy.blocks):
            first = next(blocks)
            yield first
        now, here, skips = self.cache.ask(*self.skipped(), x=x, first=first, time=time, time6=time6)
        if skips:
            yield first + here["kept"]
            return
        out = first
        for out in blocks:
            yield out
        self.cache.keep(now, here, first, out)


def in_a_run():
    """Is this a step of a run?  Not so a call that says no step, nor the look at a chunk that is clean."""
    now = position()
    run, step = now.get("run"), now.get("step")
    return step is not None and (run is None or run.times is None or step < len(run.times))


def is_patched(skipped):
    """Does an open session of this thread want to change something in there, here and now?"""
    if not any(session.edits for session in open_sessions()):
        return False
    return any(tap.edited(*tap.layouts) for part in skipped for _, tap in parts(part))


class Skips(Report):
    """What a cache did in the last run: a row for each pass, and below it a line for each branch.

    saved  the share of the passes that were skipped, 0 to 1
    """

    @property
    def saved(self):
        return sum(row["skipped"] for row in self.rows) / max(len(self.rows), 1)

    def lines(self):
        """{branch, with expert and window where there are several: {step: was it skipped}}"""
        found = {}
        for row in self.rows:
            name = " ".join(
                str(row[key]) for key in ("expert", "branch", "window") if row.get(key) is not None
            )
            found.setdefault(name, {})[row["step"]] = row["skipped"]
        return found

    def drawn(self):
        """{branch: one sign a step}: # computed, . skipped, a blank where the step had no such pass"""
        signs, steps = {False: "#", True: ".", None: " "}, max((row["step"] for row in self.rows), default=-1)
        return {
            name: "".join(signs[line.get(step)] for step in range(steps + 1))
            for name, line in self.lines().items()
        }

    def table(self):
        table = super().table()
        strips = "; ".join(f"{name} {signs}" for name, signs in self.drawn().items())
        words = f"{self.saved:.0%} of the passes skipped (.): {strips}\n" if self.rows else ""
        table.caption = words + self.caption
        return table

    def _repr_html_(self):
        """The strips as boxes, a filled one for each step that was computed; the rows folded below."""
        boxes = {"#": BOX.format("#2b6ca3"), ".": BOX.format("none"), " ": "&nbsp;"}
        lines = "".join(
            f"<tr><td>{html.escape(name)}</td><td>{''.join(map(boxes.get, signs))}</td></tr>"
            for name, signs in self.drawn().items()
        )
        head = f"<p>{self.saved:.0%} of the passes skipped (empty boxes), steps from left to right</p>"
        rows = f"<details><summary>each pass</summary>{self.table()._repr_html_()}</details>"
        return f"{head}<table>{lines}</table>{rows}"
