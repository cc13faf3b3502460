"""Do the caches of others skip the same passes on the same weights, and give the same velocities?

Diffusers' hooks and cache-dit, where they follow a rule that is ours, too. What they have beyond it (last
blocks that run always, Taylor predictors of order one and more, pruning) has no counterpart here.
"""

import cache_dit
import diffusers.hooks
import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel

from moddiff import weights
from moddiff.extensions import cached
from moddiff.hooks import OneRun, at


def times(steps):
    return np.linspace(999, 1000 / steps, steps).tolist()


# ---- diffusers' caches ----------------------------------------------------------------------------------


def two_models(layers=3):
    """The same random weights in Diffusers' transformer and in ours."""
    torch.manual_seed(0)
    theirs = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=12,
        freq_dim=16,
        ffn_dim=40,
        num_layers=layers,
    ).eval()
    for weight in theirs.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    return theirs, weights.build("dit", dict(theirs.config), dict(theirs.state_dict()))


def side_by_side(theirs, ours, steps, move):
    """Both on the same falling times and wandering latents, two branches.   -> the largest difference"""
    g = torch.Generator().manual_seed(0)
    texts = {branch: torch.randn(512, 12, generator=g) for branch in ("cond", "uncond")}
    x, run, furthest = torch.randn(1, 4, 2, 4, 6, generator=g), OneRun(times(steps)), 0.0
    for step, time in enumerate(run.times):
        x = x + move * torch.randn(x.shape, generator=g)
        for branch, text in texts.items():
            t = torch.tensor([float(int(time))])
            with theirs.cache_context(branch):
                expected = theirs(x, t, text[None], return_dict=False)[0]
            with at(step=step, branch=branch, run=run):
                furthest = max(furthest, float((ours(x, t, [text]) - expected).abs().max()))
    return furthest


@pytest.mark.parametrize("threshold", (0.18, 0.22, 0.26))
@torch.no_grad()
def test_first_block_equals_the_cache_of_diffusers(threshold):
    theirs, ours = two_models()
    theirs.enable_cache(diffusers.hooks.FirstBlockCacheConfig(threshold=threshold))
    new = cached(ours, "first-block", threshold=threshold)
    assert side_by_side(theirs, new, 12, move=0.2) < 2e-3
    assert 0.1 < new.report().saved < 0.9


@pytest.mark.parametrize(("threshold", "most", "retain"), ((0.06, 3, 0.2), (0.3, 4, 0.0), (0.15, 1, 0.5)))
@torch.no_grad()
def test_magcache_equals_the_cache_of_diffusers(threshold, most, retain):
    theirs, ours = two_models()
    ratios = [1.0, *(1 - 0.1 * np.random.default_rng(1).random(6)).tolist()]  # resampled from 7 to 10 steps
    theirs.enable_cache(
        diffusers.hooks.MagCacheConfig(
            threshold=threshold,
            max_skip_steps=most,
            retention_ratio=retain,
            num_inference_steps=10,
            mag_ratios=ratios,
        )
    )
    curve = {"cond": ratios, "uncond": ratios}
    new = cached(ours, "magcache", threshold=threshold, most=most, retain=retain, curve=curve)
    assert side_by_side(theirs, new, 10, move=0.2) < 2e-3
    assert 0.1 < new.report().saved < 0.9


# ---- cache-dit ------------------------------------------------------------------------------------------


def by_cache_dit(theirs, steps, blocks, calibrator=None, **how):
    """Diffusers' transformer with the cache of cache-dit, no last blocks. It counts two passes a step."""
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=blocks, Bn_compute_blocks=0, num_inference_steps=steps, **how
    )
    cache_dit.enable_cache(theirs, cache_config=config, calibrator_config=calibrator)


def said(theirs):
    """What cache-dit says that it did.   -> {branch: skipped steps}, {branch: {step: signal}}"""
    stats = cache_dit.summary(theirs, logging=False)[0]
    signals = {"cond": stats.residual_diffs, "uncond": stats.cfg_residual_diffs}
    return (
        {"cond": stats.cached_steps, "uncond": stats.cfg_cached_steps},
        {branch: {int(step): diff for step, diff in found.items()} for branch, found in signals.items()},
    )


def skipped(report):
    found = {"cond": [], "uncond": []}
    for row in report:
        if row["skipped"]:
            found[row["branch"]].append(row["step"])
    return found


@pytest.mark.parametrize(
    ("threshold", "blocks", "warmup"), ((0.18, 1, 0), (0.22, 1, 0), (0.2, 2, 3), (0.3, 3, 1), (0.0, 1, 0))
)
@torch.no_grad()
def test_first_block_equals_the_cache_of_cache_dit(threshold, blocks, warmup):
    """The same passes skipped, by the same signals; on a skipped step the velocity shows what was reused."""
    theirs, ours = two_models(layers=4)
    by_cache_dit(theirs, 12, blocks, residual_diff_threshold=threshold, max_warmup_steps=warmup)
    new = cached(ours, "first-block", threshold=threshold, blocks=blocks, warmup=warmup)
    assert side_by_side(theirs, new, 12, move=0.2) < 1e-4
    report = new.report()
    steps, signals = said(theirs)
    assert skipped(report) == steps
    assert (0.1 < report.saved < 0.9) if threshold else report.saved == 0
    if threshold:  # at 0 cache-dit compares nothing
        for branch, found in signals.items():
            mine = {
                row["step"]: row["signal"] for row in report if row["branch"] == branch and "signal" in row
            }
            assert mine == pytest.approx(found, rel=1e-4)


@torch.no_grad()
def test_a_function_of_ones_own_equals_a_mask_of_steps_in_cache_dit():
    computed = [1, 1, 0, 1, 0, 0, 1, 0, 0, 1]
    theirs, ours = two_models()
    mask = dict(steps_computation_mask=computed, steps_computation_policy="static", max_warmup_steps=0)
    by_cache_dit(theirs, 10, 1, **mask)
    new = cached(ours, lambda now, here: not computed[now.step], blocks=1)
    assert side_by_side(theirs, new, 10, move=0.2) < 1e-4
    assert skipped(new.report()) == said(theirs)[0] == {b: [2, 4, 5, 7, 8] for b in ("cond", "uncond")}


@torch.no_grad()
def test_a_taylor_series_of_order_0_is_what_we_reuse_and_of_order_1_is_not():
    steps, passes = 10, {}
    for order in (0, 1):
        theirs, ours = two_models()
        series = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=order)
        by_cache_dit(theirs, steps, 1, series, residual_diff_threshold=0.22, max_warmup_steps=2)
        new = cached(ours, "first-block", threshold=0.22, warmup=2)
        passes[order] = side_by_side(theirs, new, steps, move=0.2)
        assert skipped(new.report()) == said(theirs)[0]
    assert passes[0] < 1e-4 < 1e-2 < passes[1]
