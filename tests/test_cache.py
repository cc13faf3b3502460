"""Does a cache skip what the published rules skip, keep runs and branches apart, and say what it did?

The rules are written here once more, from the papers' pseudo-code, over recorded signals. Caches of
others are the oracle in test_cache_oracles.py.
"""

import json
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import small
import torch

import moddiff
from moddiff import capture, hooks, patch, weights
from moddiff.experts import Experts
from moddiff.extensions import cache_coefficients, cached, calibrate, causal, offloaded, tiled, windowed
from moddiff.extensions.cache import Cached
from moddiff.extensions.cache_calibration import Recorder, curves, polynomials
from moddiff.extensions.cache_policies import EasyCache, FirstBlock, MagCache, Pass, TeaCache
from moddiff.hooks import NeverFired, OneRun, at
from moddiff.roles import ContractError
from moddiff.tiny import score, world

PROMPT = "a red circle moving left on a black background"
CUBIC = [30.0, -4.0, 1.5, 0.02]
CURVE = {"cond": [1.0, 1.1, 0.97, 0.95, 0.9], "uncond": [1.0, 1.2, 0.98, 0.93, 0.8]}
# A way to make each policy that skips something of a few steps of the small model.
EAGER = {
    "teacache": dict(threshold=2.0, coefficients="plain"),
    "magcache": dict(threshold=0.5, curve=CURVE),
    "easycache": dict(threshold=9.0, first=1),
    "first-block": dict(threshold=0.5),
}
by_policy = pytest.mark.parametrize("policy", EAGER)


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return small.pipeline(tmp_path_factory.mktemp("tokenizer"))


def latents(pipe, seed=3, steps=8, **options):
    return torch.stack([state.next for state in pipe.steps(PROMPT, seed=seed, steps=steps, **options)])


def eager(pipe, policy, **how):
    return pipe.replace(dit=cached(pipe.dit, policy, **(EAGER[policy] | how)))


def times(steps):
    return np.linspace(999, 1000 / steps, steps).tolist()


def drive(policy, steps, signals, memory=None, experts=None):
    """Which passes a policy skips, over recorded signals.

    signals  (step, branch) -> dict of what the Pass is given;  experts: steps of the high-noise one
    ->       {(step, branch): was it skipped}
    """
    run, places, found = OneRun(times(steps)), {}, {}
    boundary = None if experts is None else (run.times[experts - 1] + run.times[experts]) / 2000
    memory = SimpleNamespace(here=lambda: places.setdefault(key(), {}))

    def key():
        now = hooks.position()
        return now.get("branch"), now.get("expert")

    for step in range(steps):
        expert = None if experts is None else "high" if step < experts else "low"
        for branch in ("cond", "uncond"):
            with at(step=step, branch=branch, run=run, expert=expert):
                here = memory.here()
                seen, out = signals(step, branch)
                now = Pass(**seen, kept="kept" in here, boundary=boundary, memory=memory)
                skips = policy(now, here.setdefault("policy", {}))
                found[step, branch] = skips
                if not skips:
                    here["kept"] = True
                    if hasattr(policy, "after"):
                        policy.after(now, out, here["policy"])
    return found


# ---- the rules, once more -------------------------------------------------------------------------------


def teacache_again(moments, steps, threshold, coefficients, ret_steps):
    """moments (step, branch) -> array.  Counted in passes, as the published code does."""
    ret, cutoff = (10, steps * 2) if ret_steps else (2, steps * 2 - 2)
    found, before, total = {}, {}, {"cond": 0.0, "uncond": 0.0}
    for count in range(2 * steps):
        branch = ("cond", "uncond")[count % 2]
        moment = moments(count // 2, branch)
        if count < ret or count >= cutoff:
            skips, total[branch] = False, 0.0
        else:
            rel = np.abs(moment - before[branch]).mean() / np.abs(before[branch]).mean()
            total[branch] += rel if coefficients is None else np.poly1d(coefficients)(rel)
            skips = threshold > 0 and total[branch] < threshold
            total[branch] = total[branch] if skips else 0.0
        before[branch] = moment
        found[count // 2, branch] = skips
    return found


@pytest.mark.parametrize("ret_steps", (False, True))
@pytest.mark.parametrize("coefficients", (None, CUBIC))
@pytest.mark.parametrize("threshold", (0, 0.05, 0.2, 1.0))
def test_teacache_skips_what_its_rule_skips(ret_steps, coefficients, threshold):
    for seed in range(10):
        g = np.random.default_rng(seed)
        steps = int(g.integers(6, 30))
        walk = np.cumsum(g.normal(size=(steps, 2, 5)) * g.uniform(0.01, 0.3), 0) + 2

        def moments(step, branch, walk=walk):
            return walk[step, int(branch == "uncond")]

        def signals(step, branch):
            moment, wrong = torch.from_numpy(moments(step, branch)), torch.full((5,), float(step + 1))
            named = dict(time=wrong, time6=moment) if ret_steps else dict(time=moment, time6=wrong)
            return dict(x=torch.zeros(1), **named), None

        expected = teacache_again(moments, steps, threshold, coefficients, ret_steps)
        assert drive(TeaCache(threshold, coefficients, ret_steps), steps, signals) == expected
        if threshold == 0:
            assert not any(expected.values())
        if threshold == 1.0 and coefficients is None:
            assert any(expected.values())


def magcache_again(curve, steps, threshold, most, retain, segments):
    """segments [(first pass, end, is it computed as a whole)]"""
    ratios = [curve[branch] for branch in ("cond", "uncond")]
    grid = [[r[int(np.round(i * (len(r) - 1) / (steps - 1)))] for i in range(steps)] for r in ratios]
    flat = [ratio for pair in zip(*grid) for ratio in pair]
    found, state = {}, {}
    for first, end, whole in segments:
        kept = set()
        for count in range(first, end):
            branch, skips = ("cond", "uncond")[count % 2], False
            if not whole and count >= first + int((end - first) * retain):
                ratio, error, n = state.get((first, branch), (1.0, 0.0, 0))
                ratio *= flat[count]
                error, n = error + abs(1 - ratio), n + 1
                skips = branch in kept and error < threshold and n <= most
                state[first, branch] = (ratio, error, n) if skips else (1.0, 0.0, 0)
            kept |= set() if skips else {branch}
            found[count // 2, branch] = skips
    return found


@pytest.mark.parametrize("threshold", (0, 0.03, 0.12, 0.5))
@pytest.mark.parametrize("experts", ("one", "two", "two, the high one computed"))
def test_magcache_skips_what_its_rule_skips(threshold, experts):
    for seed in range(10):
        g = np.random.default_rng(seed)
        steps, most, retain = (
            int(g.integers(4, 60)),
            int(g.integers(1, 6)),
            float(g.choice([0, 0.1, 0.2, 0.33])),
        )
        curve = {b: (1 - g.uniform(0, 0.1, int(g.integers(2, 50)))).tolist() for b in ("cond", "uncond")}
        switch = int(g.integers(1, steps - 1))
        whole = experts.endswith("computed")
        segments = [(0, 2 * switch, whole), (2 * switch, 2 * steps, False)]
        segments = [(0, 2 * steps, False)] if experts == "one" else segments
        policy = MagCache(threshold, curve, most, retain, keep_high=whole)

        def signals(step, branch):
            return dict(x=torch.zeros(1)), None

        found = drive(policy, steps, signals, experts=None if experts == "one" else switch)
        assert found == magcache_again(curve, steps, threshold, most, retain, segments)
        assert any(found.values()) or threshold < 0.5


def easycache_again(x, y, steps, threshold, first):
    """x, y (step, branch) -> array."""
    found, total, k, then, previous = {}, 0.0, None, None, None
    for step in range(steps):
        here = x(step, "cond")
        skips = False
        if first <= step < steps - 1 and k is not None:
            total += k * np.abs(here - previous).mean() / np.abs(then[1]).mean()
            skips = total < threshold
        total = total if skips else 0.0
        if not skips:
            out = y(step, "cond")
            if then is not None:
                k = np.abs(out - then[1]).mean() / np.abs(here - then[0]).mean()
            then = here, out
        previous = here
        found[step, "cond"] = found[step, "uncond"] = skips
    return found


@pytest.mark.parametrize("threshold", (0, 0.05, 0.3, 3.0))
def test_easycache_skips_what_its_rule_skips(threshold):
    for seed in range(10):
        g = np.random.default_rng(seed)
        steps, first = int(g.integers(3, 40)), int(g.integers(1, 8))
        walks = np.cumsum(g.normal(size=(2, steps, 2, 6)) * g.uniform(0.02, 0.5), 1)

        def x(step, branch, walks=walks):
            return walks[0, step, int(branch == "uncond")]

        def y(step, branch, walks=walks):
            return walks[1, step, int(branch == "uncond")]

        def signals(step, branch):
            return dict(x=torch.from_numpy(x(step, branch))), torch.from_numpy(y(step, branch))

        found = drive(EasyCache(threshold, first), steps, signals)
        assert found == easycache_again(x, y, steps, threshold, first)
        assert threshold or not any(found.values())


def first_block_again(before, after, steps, threshold, warmup):
    found, last = {}, {}
    for step in range(steps):
        for branch in ("cond", "uncond"):
            added = after(step, branch) - before(step, branch)
            skips = False
            if branch in last and step >= warmup:
                rel = np.abs(added - last[branch]).mean() / np.abs(last[branch]).mean()
                skips = not rel > threshold and threshold > 0
            if not skips:
                last[branch] = added
            found[step, branch] = skips
    return found


@pytest.mark.parametrize("threshold", (0, 0.1, 0.5))
def test_first_block_skips_what_its_rule_skips(threshold):
    for seed in range(10):
        g = np.random.default_rng(seed)
        steps, warmup = int(g.integers(2, 30)), int(g.integers(0, 5))
        walks = np.cumsum(g.normal(size=(2, steps, 2, 6)) * g.uniform(0.02, 0.3), 1)

        def before(step, branch, walks=walks):
            return walks[0, step, int(branch == "uncond")]

        def after(step, branch, walks=walks):
            return walks[1, step, int(branch == "uncond")]

        def signals(step, branch):
            x, first = torch.from_numpy(before(step, branch)), torch.from_numpy(after(step, branch))
            return dict(x=x, first=first), None

        found = drive(FirstBlock(threshold, warmup=warmup), steps, signals)
        assert found == first_block_again(before, after, steps, threshold, warmup)


# ---- the whole component --------------------------------------------------------------------------------


@by_policy
def test_a_threshold_of_0_is_the_plain_run_to_the_bit(pipe, policy):
    new = eager(pipe, policy, threshold=0)
    assert torch.equal(latents(new), latents(pipe))
    assert new.dit.report().saved == 0 and len(new.dit.report().rows) == 16


@by_policy
def test_the_report_says_what_was_skipped(pipe, policy):
    new = eager(pipe, policy)
    result = latents(new)
    report = new.dit.report()
    assert 0 < report.saved < 1 and not torch.equal(result, latents(pipe)) and result.isfinite().all()
    assert [(row["step"], row["branch"]) for row in report] == [
        (i, b) for i in range(8) for b in ("cond", "uncond")
    ]
    skipped = [row for row in report if row["skipped"]]
    if policy != "easycache":  # there the second branch follows the first
        assert all(row["signal"] <= row["accumulated"] for row in skipped)
    drawn = "".join(".#"[not row["skipped"]] for row in report if row["branch"] == "cond")
    assert report.drawn()["cond"] == drawn and "none" in report._repr_html_()
    assert f"cond {drawn}" in repr(report) and f"{report.saved:.0%} of the passes skipped" in repr(report)


@pytest.mark.parametrize("policy", ("teacache", "magcache", "first-block"))
def test_a_capture_sees_the_steps_that_were_computed_and_changes_nothing(pipe, policy):
    new = eager(pipe, policy)
    plain = latents(new)
    with capture(new.dit, "blocks.1.resid_post", "final") as seen:
        assert torch.equal(latents(new), plain)
    rows = new.dit.report().rows
    fired = [(where.step, where.branch) for where, _ in seen if where.path]
    assert fired == [(row["step"], row["branch"]) for row in rows if not row["skipped"]]
    assert sum(not where.path for where, _ in seen) == 16  # the last layer runs always
    step = next(row["step"] for row in rows if row["skipped"] and row["branch"] == "cond")
    with pytest.raises(NeverFired, match=f"at steps {step}"):
        with capture(new.dit, "blocks.1.resid_post", steps=[0, step], branch="cond"):
            latents(new)


@by_policy
def test_a_patch_is_never_skipped_and_not_reused(pipe, policy):
    new = eager(pipe, policy)
    latents(new)
    steps = sorted({row["step"] for row in new.dit.report() if row["skipped"]})
    visited = []
    with patch(
        new.dit, "blocks.1.cross_attn.out", lambda x, where: visited.append(where.step) or x, steps=steps
    ):
        latents(new)
    assert sorted({*visited}) == steps
    with patch(new.dit, "blocks.1.cross_attn.out", hooks.zero()):
        everything = latents(new)
    assert new.dit.report().saved == 0
    with patch(pipe.dit, "blocks.1.cross_attn.out", hooks.zero()):
        assert torch.equal(everything, latents(pipe))
    # At one step only: the step after it does not reuse what was patched.
    with patch(new.dit, "blocks.1.cross_attn.out", hooks.zero(), steps=steps[0]):
        latents(new)
    assert {row["step"] for row in new.dit.report() if row["skipped"]}.isdisjoint({steps[0], steps[0] + 1})


def test_a_patch_of_what_always_runs_does_not_hold_it_back(pipe):
    new = eager(pipe, "first-block")
    latents(new)
    saved = new.dit.report().saved
    for tap in ("final", "blocks.0.resid_post"):
        with patch(new.dit, tap, lambda x, where: x):
            latents(new)
        assert new.dit.report().saved == saved


@by_policy
def test_runs_branches_and_windows_do_not_share_what_is_kept(pipe, policy):
    new = eager(pipe, policy)
    alone = latents(new, seed=1), latents(new, seed=2, scale=1.0)
    turns = zip(new.steps(PROMPT, seed=1, steps=8), new.steps(PROMPT, seed=2, steps=8, scale=1.0))
    for i, (first, second) in enumerate(turns):
        assert torch.equal(first.next, alone[0][i]) and torch.equal(second.next, alone[1][i])


def by_hand(dit, places, first=0, steps=8):
    """A loop without a pipeline: at each step from the first one, all places in turn.

    places  dicts of what hooks.at says, branch and window;  ->  {place: its outputs}, keyed by its number
    """
    g = torch.Generator().manual_seed(0)
    x = torch.randn(steps, 2, 1, small.Z, 2, 4, 6, generator=g)  # [step, which window, b, c, f, h, w]
    texts = {branch: [torch.randn(5, 16, generator=g)] for branch in ("cond", "uncond")}
    run, found = OneRun(times(steps)), {}
    for step in range(first, steps):
        for place in places:
            where, window = dict(step=step, run=run) | place, place.get("window", (0,))[0]
            with at(**where):
                out = dit(x[step, window], torch.tensor([run.times[step]]), texts[place["branch"]])
            found.setdefault(str(place), []).append(out)
    return found


@pytest.mark.parametrize("other", ({"branch": "uncond"}, {"branch": "cond", "window": (1,)}), ids=str)
@by_policy
@torch.no_grad()
def test_each_branch_and_window_has_a_state_of_its_own(pipe, policy, other):
    """With the other in turn, and without: the same to the bit."""
    one = {"branch": "cond", "window": (0,)}
    other = {"window": (0,)} | other
    new = eager(pipe, policy).dit
    together = by_hand(new, [one, other])
    report = new.report()
    assert len(report.lines()) == 2 and report.saved > 0
    for place in (one, other):
        if policy == "easycache" and place["branch"] == "uncond":
            continue  # the pass with the prompt decides for it
        assert all(map(torch.equal, by_hand(new, [place])[str(place)], together[str(place)]))


@by_policy
@torch.no_grad()
def test_the_second_expert_knows_nothing_of_the_first(pipe, policy):
    """What the low-noise expert says does not depend on whether the high-noise one ran before it."""
    dit = cached(Experts(pipe.dit, small.dit(seed=4), boundary=0.65), policy, **EAGER[policy])
    places = [{"branch": "cond"}, {"branch": "uncond"}]
    switch = next(i for i, t in enumerate(times(14)) if t < 650)
    whole, second = by_hand(dit, places, steps=14), by_hand(dit, places, first=switch, steps=14)
    assert dit.report().saved > 0
    for place, outs in second.items():
        assert all(map(torch.equal, outs, whole[place][switch:]))


@by_policy
def test_each_expert_has_a_state_of_its_own(pipe, policy):
    both = pipe.replace(dit=Experts(pipe.dit, small.dit(seed=4), boundary=0.8))
    assert torch.equal(latents(eager(both, policy, threshold=0), steps=14), latents(both, steps=14))
    new = eager(both, policy)
    latents(new, steps=14)
    report = new.dit.report()
    for expert in ("high", "low"):
        rows = [row for row in report if row["expert"] == expert and row["branch"] == "cond"]
        assert not rows[0]["skipped"] and any(row["skipped"] for row in rows), expert
    assert set(report.lines()) == {f"{e} {b}" for e in ("high", "low") for b in ("cond", "uncond")}


def test_the_high_noise_expert_of_image_to_video_is_computed():
    high, low = (small.dit("i2v", clip=False, seed=seed) for seed in (0, 4))
    assert cached(Experts(high, low, 0.9), "magcache", curve=CURVE).policy.keep_high
    assert not cached(Experts(small.dit(), small.dit(), 0.9), "magcache", curve=CURVE).policy.keep_high


@torch.no_grad()
def test_the_hints_of_vace_are_spared_too(tmp_path):
    dit = small.dit("vace")
    new = cached(dit, "teacache", **EAGER["teacache"])
    g = torch.Generator().manual_seed(0)
    x, control = (
        torch.randn(1, small.Z, 2, 4, 6, generator=g),
        torch.randn(1, 2 * small.Z + 64, 2, 4, 6, generator=g),
    )
    run = OneRun(times(6))
    with capture(new, "vace_blocks.0.resid_post") as seen:
        for step, t in enumerate(run.times):
            with at(step=step, run=run):
                out = new(x, torch.tensor([t]), [torch.ones(3, 16)], control=control)
    assert len(seen) == sum(not row["skipped"] for row in new.report()) < 6 and out.isfinite().all()


def test_a_call_that_says_no_step_is_computed(pipe):
    x, text = (
        torch.randn(1, small.Z, 2, 4, 6, generator=torch.Generator().manual_seed(0)),
        [torch.ones(3, 16)],
    )
    for policy in EAGER:
        new = eager(pipe, policy).dit
        for _ in range(2):
            assert torch.equal(new(x, torch.tensor([500.0]), text), pipe.dit(x, torch.tensor([500.0]), text))
        assert not new.report().rows


@torch.no_grad()
def test_a_loop_by_hand_says_its_times_or_is_told_so(pipe):
    x, text = (
        torch.randn(1, small.Z, 2, 4, 6, generator=torch.Generator().manual_seed(0)),
        [torch.ones(3, 16)],
    )
    for policy in ("teacache", "magcache", "easycache"):
        with pytest.raises(ValueError, match="how many steps the run has.*OneRun"):
            for step in range(3):
                with at(step=step, branch="cond"):
                    eager(pipe, policy).dit(x, torch.tensor([500.0]), text)
    new = eager(pipe, "first-block").dit  # needs to know no number of steps
    for step in range(3):
        with at(step=step, branch="cond"):
            new(x, torch.tensor([500.0 - step]), text)
    assert new.report().saved > 0
    with at(step=3, branch="cond"):  # another size in the same loop
        assert new(torch.randn(1, small.Z, 2, 4, 4), torch.tensor([500.0]), text).shape[-1] == 4


def test_windows_inside_and_outside_are_the_same(pipe):
    inside = pipe.replace(dit=cached(windowed(pipe.dit, 2, 1), "first-block", threshold=0.5))
    outside = pipe.replace(dit=windowed(cached(pipe.dit, "first-block", threshold=0.5), 2, 1))
    assert torch.equal(latents(inside), latents(outside))
    assert inside.dit.report().saved == outside.dit.wraps.report().saved > 0
    assert len(inside.dit.report().lines()) == 4  # two windows, two branches


@pytest.mark.parametrize("policy", ("teacache", "easycache"))
def test_with_parts_that_wait_elsewhere_and_a_vae_in_tiles(pipe, policy):
    """Blocks that come and go, and tiles of a film, neither count as passes nor change what is skipped."""
    tile = partial(tiled, size=(16, 32), overlap=(8, 16))
    plain = eager(pipe, policy).replace(vae=tile(pipe.vae))
    film, said = plain(PROMPT, seed=3, steps=5), plain.dit.report()
    inner, outer = offloaded(pipe.dit, keep=0), cached(pipe.dit, policy, **EAGER[policy])
    for dit, vae in (
        (cached(inner, policy, **EAGER[policy]), tile(offloaded(pipe.vae))),
        (offloaded(outer, keep=0), offloaded(tile(pipe.vae))),
    ):
        assert pipe.replace(dit=dit, vae=vae)(PROMPT, seed=3, steps=5) == film
        report = next(part for _, part in hooks.walk(dit) if isinstance(part, Cached)).report()
        assert report.drawn() == said.drawn() and said.saved > 0


@pytest.mark.parametrize("policy", ("magcache", "first-block"))
def test_a_clean_chunk_is_always_looked_at(pipe, policy):
    """What later chunks look back at must not be left out, or be that of a noisy step."""
    both = pipe.replace(dit=cached(causal(pipe.dit, chunk=1), policy, **EAGER[policy]))
    with capture(both.dit, "blocks.1.resid_post", branch="cond") as seen:
        list(both.stream(PROMPT, seed=0, steps=4))
    assert sum(where.step == 4 for where, _ in seen) >= 2
    assert any(row["skipped"] for row in both.dit.report())


# ---- policies of one's own, and denoisers of others -----------------------------------------------------


def every_second(now, here):
    here["count"] = here.get("count", -1) + 1
    now.tell(signal=here["count"])
    return here["count"] % 2 == 1


@pytest.mark.parametrize("how", ({}, {"over": "call"}, {"blocks": 1}), ids=str)
def test_a_function_is_a_policy(pipe, how):
    new = pipe.replace(dit=cached(pipe.dit, every_second, **how))
    latents(new)
    report = new.dit.report()
    assert report.saved == 0.5 and all(row["skipped"] == row["step"] % 2 for row in report)
    assert repr(new.dit).startswith("cached(DiT, every_second")


class Foreign:
    """A denoiser of somebody else: no modules, no blocks."""

    task, patch, channels = "t2v", (1, 2, 2), small.Z

    def __call__(self, x, t, text, image=None, y=None):
        return x * 0.9 + float(t.max()) / 1000


def test_a_denoiser_without_blocks(pipe):
    for policy in ("teacache", "magcache", "first-block"):
        with pytest.raises(ValueError, match="cached got Foreign, whose blocks it does not see.*easycache"):
            cached(Foreign(), policy, **EAGER[policy])
    plain, new = (
        pipe.replace(dit=Foreign()),
        pipe.replace(dit=cached(Foreign(), "easycache", **EAGER["easycache"])),
    )
    latents(new)
    assert new.dit.report().saved > 0
    assert torch.equal(latents(new.replace(dit=cached(Foreign(), "easycache", threshold=0))), latents(plain))


def test_what_cannot_be_is_an_error_at_the_call(pipe):
    plain = dict(coefficients="plain")
    for arguments, how, words in (
        (("teacash",), {}, "policy='teacash'.*teacache, magcache, easycache, first-block, or a function"),
        (("teacache",), {"treshold": 1}, "policy teacache takes threshold, coefficients"),
        (("easycache",), {"curve": 1}, "policy easycache takes threshold, first"),
        (("teacache",), plain | {"threshold": -1}, "threshold=-1"),
        (("teacache",), plain | {"threshold": float("nan")}, "threshold=nan"),
        (("teacache",), {"coefficients": ["a"]}, "highest power first"),
        (("teacache",), {"model": "wan9"}, "model='wan9'; there are .*wan2.1-t2v-1.3b"),
        (("teacache",), {"coefficients": "nowhere.json"}, "there is no calibration at nowhere.json"),
        (("teacache",), {}, "nothing is published for the teacache of this DiT; calibrate"),
        (("magcache",), {"curve": {"uncond": [1.0]}}, "expected .*cond"),
        (("magcache",), {"curve": {"cond": [1.0, -1]}}, "ratios above 0"),
        (("first-block",), {"blocks": 2}, "expected 0 to 1, of 2 blocks"),
        (("first-block",), {"blocks": 1.5}, r"cached\(blocks=1.5\); expected a whole number"),
        (("first-block",), {"warmup": "a"}, r"cached\(warmup='a'\); expected a whole number of steps"),
        (("easycache",), {"first": -1}, r"cached\(first=-1\); expected a whole number of steps"),
        (("magcache",), {"curve": {"cond": [1.0]}, "most": 1.5}, "most=1.5.*whole number of steps"),
        (("magcache",), {"curve": {"cond": [1.0]}, "retain": 20}, "retain=20.*from 0 to 1"),
        ((every_second,), {"over": "all"}, "over='all'"),
        ((every_second,), {"threshold": 1}, "of your own takes over, blocks"),
    ):
        with pytest.raises(ValueError, match=words):
            cached(pipe.dit, *arguments, **how)
    with pytest.raises(ValueError, match="cached already"):
        cached(offloaded(cached(pipe.dit, "first-block"), device="cpu"), "easycache")
    with pytest.raises(ContractError, match="cached takes"):
        cached(pipe.vae, "easycache")


# ---- the numbers of models ------------------------------------------------------------------------------


RELEASES = [name for name in cache_coefficients.calibrations() if not name.startswith("tiny")]


def like(name):
    """Something whose config is that of a release: a cache reads no weight of it."""
    dit = small.dit()
    dit.config = weights.preset(name)["dit"]
    dit.config = SimpleNamespace(**dit.config)
    return dit


@pytest.mark.parametrize("name", RELEASES)
def test_published_numbers_are_found_by_config_or_by_name(name):
    held = cache_coefficients.calibrations()[name]
    steps = weights.preset(name)["sampling"]["steps"]
    several = "i2v" in name
    for policy in {"teacache", "magcache"} & set(held):
        if several:
            with pytest.raises(
                ValueError, match="480p or wan2.1-i2v-14b-720p, whose numbers differ; say model="
            ):
                cached(like(name), policy)
        by_name = cached(like(name), policy, **({"model": name} if several else {})).policy
        if policy == "teacache":
            assert by_name.coefficients == held[policy]["time"]
            ret = cached(small.dit(), policy, model=name, ret_steps=True).policy
            assert ret.coefficients == held[policy]["projected"] and len(ret.coefficients) == 5
        else:
            # One ratio for each step of the release's own schedule, after the first one's 1.
            assert {len(ratios) for ratios in by_name.curve.values()} == {50 if "vace" in name else steps}
            assert all(ratios[0] == 1.0 for ratios in by_name.curve.values())


def test_published_numbers_are_those_of_the_papers_code():
    held = cache_coefficients.calibrations()
    assert held["wan2.1-t2v-14b"]["teacache"]["time"][::4] == [-5784.54975374, -13.02252404]
    assert held["wan2.1-t2v-1.3b"]["teacache"]["projected"][::4] == [-5.21862437e4, -4.99875664e-2]
    assert held["wan2.1-i2v-14b-720p"]["teacache"]["time"][2] == -18.82220707
    assert held["wan2.1-t2v-1.3b"]["magcache"]["cond"][1] == 1.0124
    assert held["wan2.1-i2v-14b-480p"]["magcache"]["uncond"][-1] == 0.92616
    assert held["wan2.1-vace-14b"]["magcache"] == held["wan2.1-t2v-14b"]["magcache"]


def test_two_experts_have_no_published_numbers_and_borrow_by_name():
    both = Experts(like("wan2.1-t2v-14b"), like("wan2.1-t2v-14b"), 0.875)
    with pytest.raises(ValueError, match="nothing is published for the teacache of two experts; calibrate"):
        cached(both, "teacache")
    assert cached(both, "teacache", model="wan2.1-t2v-14b").policy.coefficients[0] == -5784.54975374
    with pytest.raises(ValueError, match="no numbers of teacache for model='wan2.1-vace-14b'"):
        cached(both, "teacache", model="wan2.1-vace-14b")


@pytest.mark.parametrize("policy, how", (("teacache", {"threshold": 0.2}), ("magcache", {"threshold": 0.24})))
@pytest.mark.parametrize("model", ("tiny-t2v", "tiny-i2v"))
def test_the_tiny_models_have_numbers_in_the_package(model, policy, how):
    pipe, (text, scene) = moddiff.load(model), world.prompts(1)[0]
    asked = dict(seed=0) | (dict(image=world.clip(scene, 0)[0]) if model == "tiny-i2v" else {})
    fast = pipe.replace(dit=cached(pipe.dit, policy, **how))
    video = fast(text, **asked)
    assert 0.4 < fast.dit.report().saved < 0.8
    assert score.psnr(video.frames, pipe(text, **asked).frames) > 25


def test_calibration_measures_what_captures_see(pipe, tmp_path):
    found = calibrate(pipe, [PROMPT, "a blue square"], "magcache", to=tmp_path, steps=8)
    ratios = []
    for seed, prompt in enumerate([PROMPT, "a blue square"]):
        with capture(pipe.dit, "patches", "blocks.1.resid_post", branch="uncond") as seen:
            list(pipe.steps(prompt, seed=seed, steps=8))
        residual = seen.stack("blocks.1.resid_post")[0] - seen.stack("patches").float()  # [step, b, n, c]
        sizes = residual.norm(dim=-1)
        ratios.append((sizes[1:] / sizes[:-1]).mean((1, 2)))
    expected = [1.0, *torch.stack(ratios).mean(0).tolist()]
    assert found["magcache"]["uncond"] == pytest.approx(expected, abs=2e-5)
    assert cached(pipe.dit, "magcache", curve=tmp_path).policy.curve == found["magcache"]
    assert cached(pipe.dit, "magcache", curve=tmp_path / "cache.json").policy.curve == found["magcache"]
    with pytest.raises(ValueError, match="holds no teacache; calibrate.*adds it"):
        cached(pipe.dit, "teacache", coefficients=tmp_path)
    both = calibrate(pipe, [PROMPT], "teacache", to=tmp_path, steps=8)
    assert json.loads((tmp_path / "cache.json").read_text()) == both and both["magcache"] == found["magcache"]
    for ret_steps, signal in ((False, "time"), (True, "projected")):
        used = cached(pipe.dit, "teacache", coefficients=tmp_path, ret_steps=ret_steps).policy
        assert used.coefficients == both["teacache"][signal]
    assert [path.name for path in tmp_path.iterdir()] == ["cache.json"]


def test_a_calibration_takes_for_each_run_what_a_run_takes(pipe):
    texts = calibrate(pipe, [PROMPT, "a blue square"], "magcache", steps=8)
    runs = [{"prompt": "a blue square", "seed": 1}, {"prompt": PROMPT, "seed": 0}]
    found = calibrate(pipe, runs, "magcache", steps=8)
    for branch, ratios in texts["magcache"].items():
        assert found["magcache"][branch] == pytest.approx(ratios, abs=2e-5)


def test_a_polynomial_is_fitted_through_the_changes():
    g = np.random.default_rng(0)
    planted = [2.0, -1.0, 0.5, 3.0, 0.1]
    rows = [{"time": x, "projected": x / 2, "output": np.polyval(planted, x)} for x in g.random(30)]
    fitted = polynomials(rows)
    assert fitted["time"] == pytest.approx(planted, abs=1e-6)
    assert fitted["projected"] == pytest.approx(np.array(planted) * [16, 8, 4, 2, 1], abs=1e-5)


def test_a_curve_has_a_number_for_each_step():
    rows = [dict(branch="cond", step=i, ratio=r) for i, r in ((1, 0.9), (1, 0.8), (3, 0.5))]
    assert curves(rows, 4) == {"cond": [1.0, 0.85, 1.0, 0.5]}


def test_what_cannot_be_calibrated_is_an_error_before_any_run(pipe, tmp_path):
    for how, words in (
        (dict(prompts=[PROMPT], policy="easycache"), "policy='easycache'.*others need nothing"),
        (dict(prompts=[]), "expected a list of prompts"),
        (dict(prompts=PROMPT), "expected a list of prompts"),
        (dict(prompts={"prompt": PROMPT}), "expected a list of prompts"),
        (dict(prompts=[PROMPT, {"seed": 1}]), "a run of seed; expected a prompt"),
        (dict(prompts=[{"prompt": PROMPT, "steps": 9}]), "no steps, which are the same for all"),
        (dict(prompts=[PROMPT], steps=3), "a run of 3 steps has too few changes"),
    ):
        with pytest.raises(ValueError, match=words):
            calibrate(pipe, **how, to=tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="cached already"):
        calibrate(pipe.replace(dit=cached(pipe.dit, "first-block")), [PROMPT])
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match=r"broken.json is no calibration"):
        cached(pipe.dit, "magcache", curve=tmp_path / "broken.json")


def test_a_recorder_skips_nothing(pipe):
    new = pipe.replace(dit=cached(pipe.dit, Recorder()))
    assert torch.equal(latents(new), latents(pipe)) and new.dit.report().saved == 0
