"""CFG-Zero*, APG, skip-layer guidance and NAG: their papers' formulas, and what they do to a run."""

import pytest
import small
import torch
import torch.nn.functional as F
from diffusers.guiders import (
    AdaptiveProjectedGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
    SkipLayerGuidance,
)

from moddiff import capture
from moddiff.guidance import APG, CFG, NAG, CFGZero, SkipLayer, normalized_attention, projected
from moddiff.hooks import OneRun, at, live_handles


def velocities(count=6, shape=(2, 3, 2, 4, 5)):
    source = torch.Generator().manual_seed(0)
    return [[torch.randn(shape, generator=source) for _ in range(3)] for _ in range(count)]


def asked(cond, uncond, skipped=None):
    answers = {"cond": cond, "uncond": uncond, "cond.skipped": skipped}

    def predict(branch):
        predict.branches.append(branch)
        return answers[branch]

    predict.branches = []
    return predict


def steps_of(guide, run=None):
    """What a guide makes of the velocities, step by step."""
    made = []
    for step, (cond, uncond, _) in enumerate(velocities()):
        with at(step=step, run=run):
            made.append(guide(asked(cond, uncond), 0.9))
    return made


def theirs(guider):
    made = []
    for step, (cond, uncond, _) in enumerate(velocities()):
        guider.set_state(step=step, num_inference_steps=6, timestep=torch.tensor(1))
        guider.prepare_inputs({"x": (cond, uncond)})
        made.append(guider.forward(cond, uncond).pred)
    return made


@pytest.mark.parametrize("zeros", [0, 1, 2])
def test_cfg_zero_as_diffusers(zeros):
    ours = steps_of(CFGZero(5.0, zeros=zeros))
    for a, b in zip(ours, theirs(ClassifierFreeZeroStarGuidance(5.0, zero_init_steps=zeros))):
        torch.testing.assert_close(a, b)
    assert not any(ours[i].any() for i in range(zeros)) and ours[zeros].any()


@pytest.mark.parametrize("momentum", [0.0, -0.5, 0.4])
@pytest.mark.parametrize("along, limit", [(0.0, 5.0), (1.0, 15.0), (0.3, None)])
def test_apg_as_diffusers_in_the_form_of_its_paper(momentum, along, limit):
    """Theirs counts the scale from 0 in that form, the paper and we from 1."""
    options = dict(eta=along, use_original_formulation=True, adaptive_projected_guidance_rescale=limit or 0.0)
    guider = AdaptiveProjectedGuidance(4.0, momentum or None, **options)
    for a, b in zip(steps_of(APG(5.0, along=along, momentum=momentum, limit=limit)), theirs(guider)):
        torch.testing.assert_close(a, b)


def test_apg_with_everything_kept_is_cfg_and_at_scale_1_is_cond():
    plain = APG(5.0, along=1.0, momentum=0.0, limit=None)
    for a, b in zip(steps_of(plain), steps_of(CFG(5.0))):
        torch.testing.assert_close(a, b)
    cond, uncond, _ = velocities(1)[0]
    with at(step=0):
        assert torch.equal(APG(1.0, skip=False)(asked(cond, uncond), 0.5), cond)


def test_what_is_projected_out_is_parallel_to_cond():
    cond, push, _ = velocities(1)[0]
    rest = projected(cond, push)
    assert F.cosine_similarity(rest.flatten(1), cond.flatten(1)).abs().max() < 1e-6
    torch.testing.assert_close(projected(cond, push, 1.0), push)


def test_the_momentum_of_two_runs_taken_in_turn_does_not_mix():
    guide, runs = APG(5.0), (OneRun(), OneRun())
    alone = steps_of(APG(5.0))
    made = {run: [] for run in runs}
    for step, (cond, uncond, _) in enumerate(velocities()):
        for run, factor in zip(runs, (1.0, 3.0)):
            with at(step=step, run=run):
                made[run].append(guide(asked(cond, factor * uncond), 0.9))
    for a, b in zip(made[runs[0]], alone):
        assert torch.equal(a, b)
    assert all(torch.equal(a, b) for a, b in zip(steps_of(guide), alone))  # and a run after it begins anew
    assert all(torch.equal(a, b) for a, b in zip(steps_of(guide), alone))


@pytest.mark.parametrize("guide", [CFGZero(5.0), APG(5.0), NAG(dit=object())])
def test_a_guide_that_must_know_its_step_says_so_where_nobody_tells(guide):
    cond, uncond, _ = velocities(1)[0]
    with pytest.raises(ValueError, match=r"must know which step .* write `with at\(step=i\):`"):
        guide(asked(cond, uncond), 0.9)


def test_the_formula_of_skip_layer_guidance_as_diffusers():
    whole = dict(skip_layer_guidance_start=0.0, skip_layer_guidance_stop=1.0)
    guider = SkipLayerGuidance(5.0, 2.0, skip_layer_guidance_layers=[0], **whole)
    guider.set_state(step=2, num_inference_steps=6, timestep=torch.tensor(1))
    guide = SkipLayer(5.0, push=2.0, during=(0.0, 1.0))
    object.__setattr__(guide, "without_blocks", lambda predict, branch: predict(branch))
    for cond, uncond, skipped in velocities():
        predict = asked(cond, uncond, skipped)
        torch.testing.assert_close(guide(predict, 0.9), guider.forward(cond, uncond, skipped).pred)
        assert predict.branches == ["cond", "uncond", "cond.skipped"]


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return small.pipeline(tmp_path_factory.mktemp("tokenizer"))


def cut(dit, blocks):
    """The same dit without some blocks: an independent way to leave them out."""
    import copy

    less = copy.deepcopy(dit)
    for block in blocks:
        less.blocks[block].forward = lambda x, *rest: x
    return less


@pytest.mark.parametrize("blocks", [(0,), (1,), (0, 1)])
def test_a_skipped_block_hands_on_what_it_was_given(pipe, blocks):
    guide = SkipLayer(1.0, blocks=blocks, push=1.5, during=(0.0, 1.0))
    run = pipe.prepare("red", steps=2, scale=1)
    t, sigma, _ = next(iter(run.schedule))
    x = run.noise
    with torch.no_grad(), at(step=0, run=run.mark):
        guided = guide(pipe.predictor(run, x, t), sigma, t)
        cond = pipe.predictor(run, x, t)("cond")
        less = pipe.replace(dit=cut(pipe.dit, blocks)).predictor(run, x, t)("cond")
    torch.testing.assert_close(guided, cond + 1.5 * (cond - less))
    assert not torch.allclose(cond, less) and not live_handles()


def test_without_a_push_the_blocks_are_left_out_of_the_second_pass(pipe):
    run = pipe.prepare("red", steps=2)
    t, sigma, _ = next(iter(run.schedule))
    guide = SkipLayer(3.0, blocks=(1,), push=None, during=(0.0, 1.0))
    with torch.no_grad(), at(step=0, run=run.mark), capture(pipe, "velocity.*") as seen:
        guided = guide(pipe.predictor(run, run.noise, t), sigma, t)
    less = pipe.replace(dit=cut(pipe.dit, (1,)))
    with torch.no_grad():
        uncond = less.predictor(run, run.noise, t)("uncond")
    torch.testing.assert_close(seen["velocity.uncond"], uncond)
    torch.testing.assert_close(guided, uncond + 3 * (seen["velocity.cond"] - uncond))


def test_outside_its_interval_skip_layer_guidance_is_cfg(pipe):
    options = dict(steps=3, solver="euler", seed=1)
    plain = pipe("red", scale=3.0, **options)
    same = pipe("red", scale=SkipLayer(3.0, blocks=(1,), during=(0.0, 0.0)), **options)
    other = pipe("red", scale=SkipLayer(3.0, blocks=(1,), during=(0.0, 1.0)), **options)
    assert (plain.frames == same.frames).all() and (plain.frames != other.frames).any()


def written_out(z_pos, z_neg, scale, tau, alpha):
    """The paper's equations, token by token, on features [n, c]."""
    rows = []
    for plus, minus in zip(z_pos, z_neg):
        away = plus * scale - minus * (scale - 1)
        ratio = away.abs().sum() / plus.abs().sum()
        if ratio > tau:
            away = away * tau / ratio
        rows.append(alpha * away + (1 - alpha) * plus)
    return torch.stack(rows)


@pytest.mark.parametrize("scale, tau, alpha", [(11.0, 2.5, 0.25), (3.0, 3.5, 0.5), (1.0, 1.0, 1.0)])
def test_normalized_attention_is_its_papers_formula(scale, tau, alpha):
    source = torch.Generator().manual_seed(0)
    plus, minus = (torch.randn(2, 3, 7, 4, generator=source) for _ in range(2))
    ours = normalized_attention(plus, minus, scale, tau, alpha)
    for b in range(2):
        rows = [x[b].transpose(0, 1).reshape(7, 12) for x in (plus, minus, ours)]
        torch.testing.assert_close(rows[2], written_out(rows[0], rows[1], scale, tau, alpha))


def test_nag_is_the_formula_in_every_cross_attention(pipe):
    """Against a dit whose cross-attentions were rewritten by hand to read both prompts."""
    import copy

    run = pipe.prepare("red", steps=2, negative="blue thing")
    t, sigma, _ = next(iter(run.schedule))
    guide = NAG(4.0, limit=1.5, share=0.5)
    with torch.no_grad(), at(step=0, run=run.mark):
        ours = guide(pipe.predictor(run, run.noise, t), sigma, t)
        again = guide(pipe.predictor(run, run.noise, t), sigma, t)
    by_hand = copy.deepcopy(pipe.dit)
    for i, block in enumerate(by_hand.blocks):
        block.cross_attn.forward = both_prompts(block.cross_attn, run.context["uncond"].of(i))
    with torch.no_grad():
        wanted = pipe.replace(dit=by_hand).predictor(run, run.noise, t)("cond")
    torch.testing.assert_close(ours, wanted)
    assert torch.equal(ours, again) and not live_handles()


def both_prompts(attention, negative):
    def heads(q, k, v, padding):
        count = int(padding)
        k, v = (
            torch.cat([x, x[:, :, -1:].expand(-1, -1, count - 1, -1)], 2) if count > 1 else x for x in (k, v)
        )
        return F.scaled_dot_product_attention(q, k, v)

    def forward(x, text_kv, padding=0, image_kv=None):
        b, n, c = x.shape
        q = attention.norm_q(attention.q(x)).view(b, n, attention.num_heads, -1).transpose(1, 2)
        plus, minus = (
            heads(q, *kv, pad).transpose(1, 2).reshape(n, c) for kv, pad in ((text_kv, padding), negative[:2])
        )
        return attention.out(written_out(plus, minus, 4.0, 1.5, 0.5))[None]

    return forward


def test_nag_asks_the_negative_prompt_once_a_run(pipe):
    guide = NAG(4.0)
    with capture(pipe, "velocity.*") as seen:
        first = pipe("red", negative="blue", steps=3, seed=0, scale=guide)
    assert [w.branch for w, _ in seen if str(w).endswith("uncond")] == ["uncond"]
    again = pipe("red", negative="blue", steps=3, seed=0, scale=guide)
    other = pipe("red", negative="a large star", steps=3, seed=0, scale=guide)
    assert (first.frames == again.frames).all() and (first.frames != other.frames).any()


@pytest.mark.parametrize("name", ["cfg-zero", "apg", "skip-layer", "nag"])
def test_each_has_a_name_and_a_repr_that_a_video_can_keep(pipe, name):
    if name == "skip-layer":  # the small dit has two blocks
        with pytest.raises(ValueError, match=r"blocks=\(4,\): no 4; the dit has 0 to 1"):
            pipe("red", steps=8, scale=name)
        return
    video = pipe("red", steps=2, scale=name)
    assert video.settings["scale"] == name
    assert "memory" not in repr(APG()) and "dit" not in repr(NAG(dit=pipe.dit))


def test_a_predict_that_does_not_say_its_dit_is_told_what_to_do():
    cond, uncond, _ = velocities(1)[0]
    for guide in (SkipLayer(during=(0.0, 1.0)), NAG()):
        with at(step=0), pytest.raises(ValueError, match=rf"give it: {type(guide).__name__}\(dit=dit\)"):
            guide(asked(cond, uncond, cond), 0.9)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: APG(limit=0), "limit=0; expected a length above 0"),
        (lambda: APG(combine=max), "APG combines in its own way"),
        (lambda: APG(momentum="much"), "momentum='much'; expected a number"),
        (lambda: APG(along=float("nan")), "along=nan; expected a number"),
        (lambda: APG(limit="far"), "limit='far'; expected a length above 0"),
        (lambda: CFGZero(zeros=-1), "zeros=-1; expected a whole number of steps from 0 on"),
        (lambda: CFGZero(zeros="a"), "zeros='a'; expected a whole number of steps from 0 on"),
        (lambda: SkipLayer(blocks=()), r"blocks=\(\); expected numbers of blocks"),
        (lambda: SkipLayer(blocks=4), "blocks=4; expected numbers of blocks"),
        (lambda: SkipLayer(push="hard"), "push='hard'; expected a number"),
        (lambda: SkipLayer(during=(0.9, 0.1)), r"interval=\(0.9, 0.1\)"),
        (lambda: NAG(-1), "scale=-1; expected a number from 0"),
        (lambda: NAG(share=None), "share=None; expected a number from 0"),
    ],
)
def test_what_makes_no_sense_is_refused_at_the_call(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_plain_cfg_is_what_diffusers_calls_so():
    for a, b in zip(steps_of(CFG(5.0)), theirs(ClassifierFreeGuidance(5.0))):
        torch.testing.assert_close(a, b)
