"""The exercises that sample: right ones pass, and usual wrong ones are told their mistake."""

import pytest
import torch
from answers import rejected, solution

from moddiff import checks


def guided_loop(dit, solver, schedule, cond, uncond, noise, scale, carry=True, swap=False, base=True):
    x, memory = noise, None
    for t, sigma, sigma_next in schedule:
        with_words, without = dit(x, t[None], cond), dit(x, t[None], uncond)
        with_words, without = (without, with_words) if swap else (with_words, without)
        x, memory = solver.step(
            x, without * base + scale * (with_words - without), sigma, sigma_next, memory if carry else None
        )
    return x


def test_the_whole_loop_passes_and_a_loop_with_a_part_missing_is_told_which():
    assert checks.pipeline(guided_loop).right is True
    assert checks.pipeline(lambda *given: None) is checks.NOT_ATTEMPTED
    rejected(checks.pipeline(lambda *given: guided_loop(*given, carry=False)), "memory is lost")
    rejected(checks.pipeline(lambda *given: guided_loop(*given, swap=True)), "swapped")
    rejected(checks.pipeline(lambda *given: guided_loop(*given, base=False)), "only the change")
    rejected(checks.pipeline(lambda *given: given[5]), "came back unchanged")
    rejected(checks.pipeline(lambda *given: (guided_loop(*given), None)), "only x is asked for")
    rejected(
        checks.pipeline(
            lambda dit, solver, schedule, cond, uncond, noise, scale: dit(noise, schedule.timesteps[0], cond)
        ),
        "t[None]",
    )


def test_one_look_at_any_level_of_the_solution_is_right():
    assert checks.flow(solution("06_flow", "one_look")).right is True
    assert checks.flow(lambda predict, x0, noise, sigma: None).right is None


def look_by(
    clock=lambda sigma: int(1000 * sigma),
    mix=lambda x0, noise, sigma: (1 - sigma) * x0 + sigma * noise,
    walk=lambda x, v, sigma: x - sigma * v,
):
    def look(predict, x0, noise, sigma):
        x = mix(x0, noise, sigma)
        return walk(x, predict(x, clock(sigma)), sigma)

    return look


@pytest.mark.parametrize(
    "change, hint",
    [
        (dict(clock=lambda sigma: sigma), "told sigma"),
        (dict(clock=lambda sigma: 1000 * (1 - sigma)), "expected 1000 sigma"),
        (dict(mix=lambda x0, noise, sigma: sigma * x0 + (1 - sigma) * noise), "changed places"),
        (dict(mix=lambda x0, noise, sigma: x0 + sigma * noise), "something else than x"),
        (dict(walk=lambda x, v, sigma: x + sigma * v), "the sign"),
        (dict(walk=lambda x, v, sigma: x - v), "only sigma of the way"),
        (dict(walk=lambda x, v, sigma: v), "velocity itself"),
    ],
)
def test_a_wrong_look_is_told_what_it_is(change, hint):
    rejected(checks.flow(look_by(**change)), hint)


def test_an_x0_that_never_asked_the_model_is_refused():
    rejected(checks.flow(lambda predict, x0, noise, sigma: x0), "never called")


def second_order(weight):
    """A step towards x0 + weight * (x0 - x0_old), where weight may look at (h, h_old, the same in sigma)."""

    def step(x, x0, x0_old, sigma, sigma_next, sigma_old):
        levels = torch.stack([sigma_old, sigma, sigma_next])
        h_old, h = ((1 - levels) / levels).log().diff()
        w = weight(h, h_old, (sigma - sigma_next) / (sigma_old - sigma))
        keep = sigma_next / sigma
        return keep * x + (1 - keep) * (x0 + w * (x0 - x0_old))

    return step


def test_the_second_order_step_of_the_solution_is_right():
    assert checks.solvers(solution("09_solvers", "my_step")).right is True
    assert checks.solvers(lambda *arguments: None).right is None


@pytest.mark.parametrize(
    "weight, hint",
    [
        (lambda h, old, ratio: 0.0, "that is Euler"),
        (lambda h, old, ratio: h / old, "whole step"),
        (lambda h, old, ratio: -0.5 * h / old, "backwards"),
        (lambda h, old, ratio: 0.5, "equally long"),
        (lambda h, old, ratio: 0.5 * ratio, "log_snr"),
        (lambda h, old, ratio: 0.5 * old / h, "upside down"),
        (lambda h, old, ratio: 7.0, "expected a tensor [2, 4]"),
    ],
)
def test_a_wrong_second_order_step_is_told_what_it_is(weight, hint):
    rejected(checks.solvers(second_order(weight)), hint)


def test_guidance_on_an_interval_of_the_solution_is_right():
    assert checks.guidance(solution("10_guidance", "my_guide")).right is True
    assert checks.guidance(lambda *arguments: None).right is None


@pytest.mark.parametrize(
    "outside, hint",
    [
        (lambda predict, scale: predict("cond") + 0 * predict("uncond"), "a pass of the model for nothing"),
        (lambda predict, scale: scale * predict("cond"), "4 times cond"),
        (lambda predict, scale: predict("uncond"), "that is uncond"),
        (
            lambda predict, scale: predict("uncond") + scale * (predict("cond") - predict("uncond")),
            "still guided",
        ),
        (lambda predict, scale: predict("cond") / 2 + predict("cond") / 2, "called 2 times"),
    ],
)
def test_what_is_wrong_outside_the_interval_is_named(outside, hint):
    def guide(predict, sigma, scale, lowest, highest):
        if not lowest <= sigma <= highest:
            return outside(predict, scale)
        cond, uncond = predict("cond"), predict("uncond")
        return uncond + scale * (cond - uncond)

    rejected(checks.guidance(guide), hint)


@pytest.mark.parametrize(
    "combine, inside, hint",
    [
        (lambda c, u, s: c + s * (u - c), lambda s, a, b: a <= s <= b, "changed places"),
        (lambda c, u, s: c + s * (c - u), lambda s, a, b: a <= s <= b, "starts from cond"),
        (lambda c, u, s: u + s * (c - u), lambda s, a, b: a < s < b, "both ends belong"),
        (lambda c, u, s: u + s * (c - u), lambda s, a, b: not a <= s <= b, "here the push belongs"),
    ],
)
def test_what_is_wrong_inside_the_interval_is_named(combine, inside, hint):
    def guide(predict, sigma, scale, lowest, highest):
        cond = predict("cond")
        return combine(cond, predict("uncond"), scale) if inside(sigma, lowest, highest) else cond

    rejected(checks.guidance(guide), hint)
