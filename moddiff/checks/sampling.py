"""Does the reader's run end where it should?  The exercises on the loop, flow, solvers and guidance."""

import torch

from ..flow import schedule
from ..solvers import UniPC
from .verdict import attempted, exercise, expect, expect_close, shape_of


@exercise("noise, words, two answers, guidance and a step, once for each level: that is the whole of it")
def denoising_loop(answer):
    """The exercise of 01_first_video.

    answer(dit, solver, schedule, cond, uncond, noise, scale) -> the latent at the end of the run.
    """
    levels, solver, scale = schedule(5, 3.0), UniPC(), 3.0
    noise, cond, uncond = torch.randn(3, 1, 2, 1, 3, 3, generator=torch.Generator().manual_seed(0))

    def dit(x, t, text):
        expect(
            shape_of(t) == [1],
            f"the dit was told t of shape {shape_of(t)}; expected [1], one time for each video: t[None]",
        )
        # Stands in for a model: bent, so that no run comes out right by luck, and it hears x, text and t.
        return torch.tanh(x - text) * (0.5 + t / 1000)

    def guided(with_words, without):
        return without + scale * (with_words - without)

    # Right as it stands; each argument makes one usual mistake, whose result is then recognised.
    def run(guide=guided, carry=True, clock=lambda t, sigma: t, seen=lambda x: x, last=None):
        x, memory = noise, None
        for t, sigma, sigma_next in list(levels)[:last]:
            velocity = guide(*(dit(seen(x), clock(t, sigma)[None], text) for text in (cond, uncond)))
            x, memory = solver.step(x, velocity, sigma, sigma_next, memory if carry else None)
        return x

    latent = attempted(answer, dit, solver, levels, cond, uncond, noise, scale)
    expect(
        not isinstance(latent, tuple),
        "it returns several things; the solver returns x and its memory, and only x is asked for",
    )
    expect_close(
        latent,
        run(),
        {
            "there is no guidance in it: the answer without the words is missing": run(lambda c, u: c),
            "cond and uncond are swapped: it walks away from the words": run(lambda c, u: guided(u, c)),
            "scale * (cond - uncond) is only the change; add it to the answer without the words": (
                run(lambda c, u: scale * (c - u))
            ),
            "the change is added to the answer with the words; start from the one without them": (
                run(lambda c, u: c + scale * (c - u))
            ),
            "the solver's memory is lost between steps; hand back to it what it returned": run(carry=False),
            "the dit is told sigma; its clock is t, from 0 to 1000": run(clock=lambda t, sigma: sigma),
            "the dit always sees the noise; after a step it must see the new x": run(seen=lambda x: noise),
            "it returns after the first step; return when the schedule is at its end": run(last=1),
            "the noise came back unchanged; put what the solver returns into x": noise,
        },
        f"the latent ({shape_of(latent)}) is not the one expected ({list(noise.shape)}); "
        "compare with rooms 2, 3 and 4",
    )


@exercise("noise it, look once, walk straight to the end: the model's belief at that level.")
def one_look(answer):
    """The exercise of 06_flow.

    answer(predict, x0, noise, sigma) -> the x0 that one look of the model at level sigma points at.

    predict(x, t) is the model.
    """
    x0, noise = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(6))
    looks = []

    def predict(x, t):
        looks.append((x, float(t)))
        return torch.tanh(x) + 0.3

    # The second level tells 1000 sigma cut to a whole number from 1000 sigma as it is.
    for sigma in (0.75, 0.2005):
        looks.clear()
        belief = attempted(answer, predict, x0, noise, sigma)
        expect(looks, "predict was never called; without the model nobody knows where x came from")
        # Only the last look counts: who asks twice wastes a pass, but is not wrong.
        (seen, t), x = looks[-1], (1 - sigma) * x0 + sigma * noise
        expect_close(
            seen,
            x,
            {
                "x0 and noise have changed places: sigma is the part of the noise, 1 at the start of a run": (
                    sigma * x0 + (1 - sigma) * noise
                )
            },
            f"the model was shown something else than x at sigma {sigma}: add_noise(x0, noise, sigma)",
        )
        expect(
            abs(t - sigma) >= 1e-6,
            "the model was told sigma; its clock t runs from 0 to 1000, and 0.75 would mean nearly clean",
        )
        expect(
            0 <= 1000 * sigma - t < 1,
            f"at sigma {sigma} the model was told t = {t:g}; expected 1000 sigma, cut to a whole number",
        )
        velocity = torch.tanh(seen) + 0.3
        expect_close(
            belief,
            x - sigma * velocity,
            {
                "the sign: velocity points towards the noise, and the way to x0 is against it": (
                    x + sigma * velocity
                ),
                "a whole velocity was taken off; only sigma of the way is left": x - velocity,
                "that is the noise end of the path": x + (1 - sigma) * velocity,
                "that is the velocity itself; walk along it to x0": velocity,
                "that is the x0 you were given, not the one the model points at": x0,
            },
            f"expected x - sigma * velocity, of shape {shape_of(x)}; got {shape_of(belief)}",
        )


@exercise("this is DPM-Solver++(2M). One remembered x0 buys a whole order.")
def second_order_step(answer):
    """The exercise of 09_solvers.

    answer(x, x0, x0_old, sigma, sigma_next, sigma_old) -> x at sigma_next, by DPM-Solver++(2M).
    """
    source = torch.Generator().manual_seed(9)
    x, x0, x0_old = torch.randn(3, 2, 4, generator=source, dtype=torch.float64)
    # Three unequal steps on purpose: with equal ones two of the mistakes below give the right number.
    old, now, new = levels = torch.tensor([0.9, 0.7, 0.3], dtype=torch.float64)
    last_step, this_step = ((1 - levels) / levels).log().diff()  # lengths on the lambda clock
    # keep: how much of x outlives the step, sigma_next / sigma; the rest is filled with x0.
    pace, keep = this_step / last_step, new / now

    def reached(ahead):
        """The step with x0 followed along its trend by `ahead` of the last step's length."""
        return keep * x + (1 - keep) * (x0 + ahead * (x0 - x0_old))

    stepped, right = attempted(answer, x, x0, x0_old, now, new, old), reached(pace / 2)
    mistakes = {
        "that is Euler: x0 as it is. Use x0_old to guess what x0 will be halfway": 0.0,
        "the trend is followed over the whole step; the mean of a line is at its middle: half as far": pace,
        "the trend runs backwards: it goes from x0_old to x0, and on": -pace / 2,
        "both steps are taken as equally long; scale the trend by their lengths on the lambda clock": 0.5,
        "lengths are measured in sigma; measure them on the lambda clock, log_snr(sigma)": (
            (now - new) / (old - now) / 2
        ),
        "that is a step towards x0_old alone": -1.0,
        "the ratio of the two lengths is upside down: new length over old one": 0.5 / pace,
    }
    numbers = isinstance(stepped, torch.Tensor) and stepped.numel()
    begins = f" with {float(stepped.flatten()[0]):.3f}" if numbers else ""
    expect_close(
        stepped,
        right,
        {hint: reached(ahead) for hint, ahead in mistakes.items()},
        f"expected a tensor {shape_of(x)} that begins with {float(right[0, 0]):.3f}, "
        f"got {shape_of(stepped)}{begins}; is it towards(x, halfway, ...)?",
        tolerance=1e-6,
    )


@exercise("guided inside, cond alone outside, and not one pass too many.")
def interval_guidance(answer):
    """The exercise of 10_guidance.

    answer(predict, sigma, scale, lowest, highest) -> the guided velocity.

    predict("cond") and predict("uncond") are passes of the model; the second is wanted inside only.
    """
    cond, uncond = torch.randn(2, 1, 3, 4, generator=torch.Generator().manual_seed(10))
    push, asked = 4 * (cond - uncond), []

    def predict(branch):
        asked.append(branch)
        return {"cond": cond, "uncond": uncond}[branch]

    # Both ends of the interval are among the levels: "less than" and "at most" differ only there.
    for sigma, inside in ((0.5, True), (0.9, True), (0.3, True), (0.95, False), (0.1, False)):
        asked.clear()
        velocity = attempted(answer, predict, sigma, 4.0, 0.3, 0.9)
        where = f"at sigma {sigma}, {'inside' if inside else 'outside'} 0.3 to 0.9: "
        belongs = "both ends belong to the interval" if sigma in (0.3, 0.9) else "here the push belongs"
        guided = {
            "that pushes away from the prompt; cond and uncond have changed places": cond - push,
            f"that is cond alone; {belongs}": cond,
            "the push starts from cond, so scale 1 would push already; start from uncond": cond + push,
        }
        plain = {
            "that is 4 times cond; outside, nothing is scaled": 4 * cond,
            "that is uncond; outside, follow the prompt as it is": uncond,
            "it is still guided; outside, return cond": uncond + push,
        }
        expect_close(
            velocity,
            uncond + push if inside else cond,
            {where + hint: wrong for hint, wrong in (guided if inside else plain).items()},
            f"{where}the velocity is not right; got {shape_of(velocity)}",
        )
        expect(
            inside or "uncond" not in asked,
            f'{where}right velocity, but predict("uncond") was still called: a pass of the model for nothing',
        )
        expect(
            len(asked) <= 1 + inside,
            f"{where}predict was called {len(asked)} times; each call is a pass of the model",
        )
