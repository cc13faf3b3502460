"""Guidance: the formula, which branches run, and what is refused."""

import pytest
import torch

from moddiff.guidance import CFG, cfg, cfg_zero, rescaled

COND, UNCOND = torch.randn(2, 2, 4, 3, generator=torch.Generator().manual_seed(1))


class Model:
    """A predict that remembers what it was asked."""

    def __init__(self, cond=COND, uncond=UNCOND):
        self.answers, self.asked = dict(cond=cond, uncond=uncond), []

    def __call__(self, branch):
        self.asked.append(branch)
        return self.answers[branch]


def test_guidance_walks_from_uncond_through_cond_and_beyond():
    torch.testing.assert_close(CFG(5.0)(Model(), 0.5), -4 * UNCOND + 5 * COND)
    torch.testing.assert_close(cfg(COND, UNCOND, 0.0), UNCOND)
    torch.testing.assert_close(cfg(COND, UNCOND, 1.0), COND)


def test_cond_is_asked_before_uncond_as_in_wan():
    model = Model()
    CFG(5.0)(model, 0.5)
    assert model.asked == ["cond", "uncond"]


def test_at_scale_1_only_cond_runs_unless_skip_is_off():
    model, official = Model(), Model()
    assert torch.equal(CFG(1.0)(model, 0.5), COND) and model.asked == ["cond"]
    torch.testing.assert_close(CFG(1.0, skip=False)(official, 0.5), COND)
    assert official.asked == ["cond", "uncond"]


@pytest.mark.parametrize(
    "combine",
    [cfg, cfg_zero, rescaled(0.7), rescaled(1.0, cfg_zero)],
    ids=["cfg", "cfg_zero", "rescaled", "both"],
)
def test_every_way_to_combine_returns_cond_at_scale_1_so_that_skipping_is_exact(combine):
    torch.testing.assert_close(combine(COND, UNCOND, 1.0), COND)
    torch.testing.assert_close(CFG(1.0, combine=combine, skip=False)(Model(), 0.5), COND)


@pytest.mark.parametrize("combine", [cfg, cfg_zero, rescaled(0.7)], ids=["cfg", "cfg_zero", "rescaled"])
def test_when_both_branches_agree_guidance_changes_nothing(combine):
    torch.testing.assert_close(combine(COND, COND, 7.0), COND, atol=1e-5, rtol=1e-5)


def test_half_precision_branches_are_combined_in_float32():
    cond, uncond = COND.bfloat16(), UNCOND.bfloat16()
    guided = CFG(5.0)(Model(cond, uncond), 0.5)
    assert guided.dtype == torch.float32
    torch.testing.assert_close(guided, uncond.float() + 5 * (cond.float() - uncond.float()))
    assert CFG(1.0)(Model(cond, uncond), 0.5).dtype == torch.float32


def test_each_expert_has_its_own_scale():
    guide = CFG(scale=(3.0, 4.0), boundary=0.875)
    assert guide.scale_at(0.9, t=900) == 4.0 and guide.scale_at(0.8, t=800) == 3.0
    torch.testing.assert_close(guide(Model(), 0.95, 950), cfg(COND, UNCOND, 4.0))
    torch.testing.assert_close(guide(Model(), 0.3), cfg(COND, UNCOND, 3.0))


def test_the_whole_number_timestep_decides_between_experts():
    guide = CFG(scale=(3.0, 4.0), boundary=0.9)
    sigma = torch.tensor(0.9)  # a little less than 0.9 in float32
    assert guide.scale_at(sigma, t=900) == 4.0 and guide.scale_at(sigma) == 3.0


def test_outside_its_interval_guidance_costs_nothing():
    guide = CFG(5.0, interval=(0.2, 0.8), skip=False)
    for sigma, asked in [(0.9, 1), (0.8, 2), (0.5, 2), (0.2, 2), (0.1, 1)]:
        model = Model()
        velocity = guide(model, sigma)
        assert len(model.asked) == asked == len(guide.runs(sigma))
        torch.testing.assert_close(velocity, COND if asked == 1 else cfg(COND, UNCOND, 5.0))


def test_cfg_zero_first_fits_uncond_to_cond_item_by_item():
    guided = cfg_zero(COND, UNCOND, 4.0)
    for i in range(2):
        best = torch.linalg.lstsq(UNCOND[i].reshape(-1, 1), COND[i].reshape(-1, 1)).solution
        torch.testing.assert_close(guided[i], 4 * COND[i] - 3 * best * UNCOND[i])
    torch.testing.assert_close(cfg_zero(COND, 0 * UNCOND, 4.0), 4 * COND)


def test_rescaling_in_full_restores_the_spread_of_cond_item_by_item():
    guided = rescaled(1.0)(COND, UNCOND, 8.0)
    for i in range(2):
        assert COND[i].std() * 1.5 < cfg(COND, UNCOND, 8.0)[i].std()
        torch.testing.assert_close(guided[i].std(), COND[i].std())
    torch.testing.assert_close(rescaled(0.0)(COND, UNCOND, 8.0), cfg(COND, UNCOND, 8.0))


def test_a_students_own_way_to_combine_is_used():
    guide = CFG(2.0, combine=lambda cond, uncond, scale: scale * cond)
    torch.testing.assert_close(guide(Model(), 0.5), 2 * COND)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(scale=(3.0, 4.0)), r"scale=\(3.0, 4.0\) is a pair .* add boundary=0.875"),
        (dict(scale=(1.0, 2.0, 3.0), boundary=0.9), "expected a number such as 5.0, or a pair"),
        (dict(scale=float("nan")), "scale=nan; expected a number"),
        (dict(scale="5"), "scale='5'; expected a number such as 5.0"),
        (dict(scale=10**400), r"scale=1000.*\.\.\..*000; expected a number"),
        (dict(boundary="x"), r"boundary='x'; expected a sigma"),
        (dict(interval=5), r"interval=5; expected \(lowest, highest\)"),
        (dict(interval=("a", "b")), r"interval=\('a', 'b'\); expected \(lowest, highest\)"),
        (dict(combine="cfg"), "combine='cfg'; expected a function"),
        (dict(boundary=875), r"boundary=875; expected a sigma in \[0, 1\]"),
        (dict(interval=(0.8, 0.2)), r"interval=\(0.8, 0.2\); expected \(lowest, highest\)"),
    ],
)
def test_bad_settings_are_refused_with_the_cure(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        CFG(**options)


def test_a_predict_that_forgets_to_return_is_told_so():
    with pytest.raises(TypeError, match=r"predict\('cond'\) returned NoneType.*forget to return"):
        CFG()(lambda branch: None, 0.5)


def test_branches_of_different_shapes_are_refused():
    with pytest.raises(
        ValueError, match=r'predict\("uncond"\) returned \[1, 4, 3\] but predict\("cond"\) \[2, 4, 3\]'
    ):
        CFG()(Model(COND, UNCOND[:1]), 0.5)
