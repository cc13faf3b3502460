"""Does the diffusion transformer keep its promises.

Exact folding, exact preparation, and clear words for what it cannot take?
"""

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moddiff.dit import DiT, DiTConfig, sinusoid
from moddiff.experts import Experts
from moddiff.hooks import capture, patch

SMALL = dict(
    model_type="t2v",
    in_dim=4,
    dim=24,
    ffn_dim=40,
    freq_dim=16,
    text_dim=10,
    out_dim=4,
    num_heads=2,
    num_layers=2,
    text_len=12,
)
KINDS = {
    "t2v": {},
    "i2v": dict(model_type="i2v", in_dim=9, image_dim=6),
    "i2v22": dict(model_type="i2v", in_dim=9),
    "flf2v": dict(model_type="flf2v", in_dim=9, image_dim=6),
    "ti2v": dict(model_type="ti2v"),
    "vace": dict(model_type="vace", vace_layers=(0, 1), vace_in_dim=5),
    "plain": dict(qk_norm=False, cross_attn_norm=False),
}


def dit_of(kind="t2v", seed=0, **more):
    """A small DiT with random weights, gains and biases too."""
    torch.manual_seed(seed)
    config = DiTConfig(**{**SMALL, **KINDS[kind], **more})
    dit = DiT(config).eval()
    for p in dit.parameters():
        p.data += 0.2 * torch.randn_like(p)
    return dit


def inputs(kind="t2v", batch=2, cells=(2, 4, 6), lengths=(3, 7), seed=1):
    torch.manual_seed(seed)
    config = DiTConfig(**{**SMALL, **KINDS[kind]})
    extra = config.in_dim - config.out_dim
    return dict(
        x=torch.randn(batch, 4, *cells),
        t=torch.tensor([900.0, 37.0])[:batch],
        text=[torch.randn(length, 10) for length in lengths[:batch]],
        image=torch.randn(2 * batch if kind == "flf2v" else batch, 257, 6) if config.image_dim else None,
        y=torch.randn(batch, extra, *cells) if extra else None,
        control=torch.randn(batch, 5, *cells) if kind == "vace" else None,
    )


def far(a, b):
    return (a - b).abs().max().item()


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


# what must change nothing


@torch.no_grad()
def test_velocity_has_the_shape_of_the_latent_and_is_float32(kind):
    velocity = dit_of(kind)(**inputs(kind))
    assert velocity.shape == (2, 4, 2, 4, 6) and velocity.dtype == torch.float32 and velocity.std() > 0.1


@torch.no_grad()
def test_preparing_the_prompt_once_equals_giving_it_each_time(kind):
    dit, given_ = dit_of(kind), inputs(kind)
    expected = dit(**given_)
    given_["text"] = dit.prepare(given_["text"], given_.pop("image"))
    assert torch.equal(dit(**given_), expected)
    assert torch.equal(dit(**given_), expected)  # and preparing is not used up


@torch.no_grad()
def test_batch_mates_change_nothing_though_their_prompts_are_longer(kind):
    dit, given_ = dit_of(kind), inputs(kind)
    together = dit(**given_)
    per = {name: 2 if name == "image" and kind == "flf2v" else 1 for name in given_}
    for i in range(2):
        alone = {
            name: value if value is None else value[i * per[name] : (i + 1) * per[name]]
            for name, value in given_.items()
        }
        assert far(dit(**alone), together[i : i + 1]) <= 1e-5


@torch.no_grad()
def test_one_prompt_serves_a_batch():
    dit, given_ = dit_of(), inputs()
    given_["text"] = [given_["text"][0]] * 2
    expected = dit(**given_)
    given_["text"] = given_["text"][:1]
    for kernel in ("sdpa", "math"):
        assert far(dit.use_kernel(kernel)(**given_), expected) <= 1e-5


@torch.no_grad()
def test_kernels_agree(kind):
    dit, given_ = dit_of(kind), inputs(kind)
    expected = dit(**given_)
    assert far(dit.use_kernel("math")(**given_), expected) <= 1e-5
    assert (
        {block.self_attn.kernel for block in dit.blocks}
        == {block.cross_attn.kernel for block in dit.blocks}
        == {"math"}
    )


@torch.no_grad()
def test_a_kernel_of_ones_own_is_used_everywhere():
    dit, seen = dit_of("vace"), []

    def spy(q, k, v, bias, scale):
        seen.append(q.shape)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, bias, scale=scale)

    dit.use_kernel(spy)(**inputs("vace"))
    assert len(seen) == 2 * (2 + 2)


def test_an_unknown_kernel_is_refused_at_once():
    with pytest.raises(ValueError, match="no attention kernel 'fast'; there are sdpa, math"):
        dit_of().use_kernel("fast")


# the text and its padding


@pytest.mark.parametrize("kernel", ["sdpa", "math"])
@settings(max_examples=8, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(0, 12), min_size=2, max_size=2))
@torch.no_grad()
def test_folded_padding_equals_padding_written_out(kernel, lengths):
    dit, given_ = dit_of().use_kernel(kernel), inputs(lengths=lengths)
    folded = dit(**given_)
    given_["text"] = [torch.nn.functional.pad(rows, (0, 0, 0, 12 - len(rows))) for rows in given_["text"]]
    assert far(dit(**given_), folded) <= 2e-6


@torch.no_grad()
def test_padding_takes_part_in_cross_attention():
    given_ = inputs()
    assert far(dit_of(text_len=12)(**given_), dit_of(text_len=24)(**given_)) > 1e-3


@torch.no_grad()
def test_a_prompt_as_long_as_it_may_be_has_no_padding():
    dit = dit_of()
    full = [torch.randn(12, 10)]
    assert dit.prepare(full).padding == 0 and dit.prepare(full).text[0][0].shape == (1, 2, 12, 12)
    assert dit.prepare([full[0][:4]]).padding == 8 and dit.prepare([full[0][:4]]).text[0][0].shape == (
        1,
        2,
        5,
        12,
    )


@torch.no_grad()
def test_watching_probabilities_shows_a_column_for_every_text_row_and_leaves_the_output():
    dit, given_ = dit_of(), inputs()
    plain = dit(**given_)
    with capture(dit, "blocks.1.cross_attn.probs", "blocks.1.cross_attn.k") as seen:
        assert far(dit(**given_), plain) <= 1e-6
    probs = seen["blocks.1.cross_attn.probs"]
    assert probs.shape == (2, 2, 12, 12) and seen["blocks.1.cross_attn.k"].shape == (2, 2, 12, 12)
    torch.testing.assert_close(probs.sum(-1), torch.ones(2, 2, 12))
    assert (
        far(probs[:, :, :, 7:], probs[:, :, :, 7:8].expand(-1, -1, -1, 5)) <= 1e-7
    )  # every padding row gets the same share
    with patch(dit, "blocks.1.cross_attn.probs", lambda x, where: x):  # written out in full
        assert far(dit(**given_), plain) <= 2e-6


@torch.no_grad()
def test_words_can_be_swapped_for_padding_through_the_probabilities():
    dit, given_ = dit_of(), inputs(batch=1)
    plain = dit(**given_)

    def deaf(x, where):
        x = x.clone()
        x[..., :3] = 0  # the three real words
        return x

    with patch(dit, "blocks.*.cross_attn.probs", deaf):
        assert far(dit(**given_), plain) > 1e-3
    assert torch.equal(dit(**given_), plain)


# time


def test_the_sinusoid_is_cosines_then_sines_down_to_one_ten_thousandth():
    wave = sinusoid(torch.tensor([0.0, 999.0]), 8)
    assert wave.dtype == torch.float32 and torch.equal(wave[0], torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 0]))
    for i in range(4):
        angle = 999.0 * 10000 ** (-i / 4)
        assert (
            abs(wave[1, i].item() - math.cos(angle)) < 1e-7
            and abs(wave[1, 4 + i].item() - math.sin(angle)) < 1e-7
        )


@torch.no_grad()
def test_time_per_token_equal_everywhere_is_time_per_sample(kind):
    dit, given_ = dit_of(kind), inputs(kind)
    expected = dit(**given_)
    given_["t"] = given_["t"][:, None].expand(2, 2 * 2 * 3)
    assert far(dit(**given_), expected) <= 1e-5


@torch.no_grad()
def test_whole_numbers_are_times_too():
    dit, given_ = dit_of(), inputs()
    expected = dit(**given_)
    assert torch.equal(dit(**{**given_, "t": given_["t"].long()}), expected)


@torch.no_grad()
def test_a_token_with_its_own_time_is_modulated_by_it_alone():
    dit, given_ = dit_of("ti2v", num_layers=1), inputs("ti2v", batch=1)
    t = torch.full((1, 12), 500.0)
    with capture(dit, "blocks.0.modulation") as before:
        dit(**{**given_, "t": t})
    t[0, 5] = 0
    with capture(dit, "blocks.0.modulation") as after:
        dit(**{**given_, "t": t})
    changed = (before["blocks.0.modulation"] - after["blocks.0.modulation"]).abs().amax((0, 2, 3))
    assert changed.shape == (12,) and changed[5] > 1e-3 and changed[torch.arange(12) != 5].max() <= 1e-6


@torch.no_grad()
def test_the_moment_decides_which_expert_works():
    high, low = dit_of(seed=0), dit_of(seed=1)
    experts, given_ = Experts(high, low, boundary=0.9), inputs()
    for t, expert in ((1000.0, high), (900.0, high), (899.9, low), (0.0, low)):
        given_["t"] = torch.full((2,), t)
        assert experts.expert(given_["t"]) is expert
        assert torch.equal(experts(**given_), expert(**given_))
    given_["t"] = torch.tensor([100.0, 950.0])  # a mixed batch belongs to its noisiest sample
    assert torch.equal(experts(**given_), high(**given_))


@torch.no_grad()
def test_experts_prepare_a_prompt_when_it_is_their_turn_and_keep_one():
    experts, given_ = Experts(dit_of("i2v", seed=0), dit_of("i2v", seed=1), boundary=0.9), inputs("i2v")
    expected = {t: experts(**{**given_, "t": torch.full((2,), t)}) for t in (950.0, 100.0)}
    calls = []
    for expert in (experts.high, experts.low):
        expert.text_mlp.register_forward_hook(lambda module, args, out: calls.append(module))
    prompt = experts.prepare(given_["text"], given_.pop("image"))
    assert calls == []
    for t in (950.0, 950.0, 100.0, 100.0):
        given_ |= dict(t=torch.full((2,), t), text=prompt)
        assert torch.equal(experts(**given_), expected[t])
    assert calls == [experts.high.text_mlp, experts.low.text_mlp]


def test_experts_use_one_kernel_and_one_example():
    experts = Experts(dit_of(), dit_of(), 0.875).use_kernel("math")
    assert experts.high.blocks[0].self_attn.kernel == experts.low.blocks[1].cross_attn.kernel == "math"
    assert experts.example(size=(64, 64), frames=5)[0].shape == (1, 4, 2, 8, 8)


# image, control, position


@torch.no_grad()
def test_image_features_matter_and_in_a_pair_their_order_too():
    for kind in ("i2v", "flf2v"):
        dit, given_ = dit_of(kind), inputs(kind)
        plain = dit(**given_)
        assert far(dit(**{**given_, "image": torch.randn_like(given_["image"])}), plain) > 1e-3
    assert far(dit(**{**given_, "image": given_["image"][[1, 0, 3, 2]]}), plain) > 1e-4


@torch.no_grad()
def test_control_of_strength_zero_is_no_control():
    dit, given_ = dit_of("vace"), inputs("vace")
    off = dit(**given_, control_scale=0.0)
    assert far(dit(**{**given_, "control": given_["control"] * 5}, control_scale=0.0), off) == 0
    assert far(dit(**given_), off) > 1e-3


@torch.no_grad()
def test_moving_every_position_changes_nothing_and_moving_them_apart_does():
    dit, given_ = dit_of(), inputs()
    plain = dit(**given_)
    shift = torch.rand(6, dtype=torch.float64)  # one angle for each pair, the same for all tokens
    with patch(dit, "angles", lambda x, where: x + shift):
        assert far(dit(**given_), plain) <= 2e-5
    with patch(dit, "angles", lambda x, where: x * 2):
        assert far(dit(**given_), plain) > 1e-3
    assert torch.equal(dit(**given_), plain)


def test_every_weight_gets_a_gradient(kind):
    dit, given_ = dit_of(kind), inputs(kind)
    dit(**given_).square().mean().backward()
    without = [name for name, p in dit.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


def test_a_few_steps_of_descent_lower_the_loss():
    dit, given_ = dit_of(), inputs()
    target, losses = torch.randn(2, 4, 2, 4, 6), []
    descent = torch.optim.Adam(dit.parameters(), 3e-3)
    for _ in range(20):
        loss = (dit(**given_) - target).square().mean()
        descent.zero_grad()
        loss.backward()
        descent.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


@torch.no_grad()
def test_the_example_runs_on_the_meta_device_with_the_shapes_it_promises(kind):
    x, t, text, image, y, control = dit_of(kind).example(size=(64, 96), frames=9, words=4, batch=2)
    stride = 16 if kind == "ti2v" else 8
    assert x.shape == (2, 4, 3, 64 // stride, 96 // stride)
    ghost = dit_of(kind).to("meta")
    text = [features.to("meta") for features in text]
    image, y, control = (None if value is None else value.to("meta") for value in (image, y, control))
    assert ghost(x.to("meta"), t.to("meta"), text, image, y, control).shape == x.shape


# what is refused


BAD = {
    "one axis short": (
        "t2v",
        dict(x=torch.zeros(4, 2, 4, 6)),
        "a latent of shape [4, 2, 4, 6] arrived; expected five axes [b, c, f, h, w] (a single latent needs "
        "x[None])",
    ),
    "channels": (
        "t2v",
        dict(x=torch.zeros(2, 5, 2, 4, 6)),
        "x has 5 channels; this t2v model takes 4 together: check which model this latent is for",
    ),
    "no y": (
        "i2v",
        dict(y=None),
        "x has 4 channels; this i2v model takes 9 together: pass the conditioning latent as y",
    ),
    "y of another length": (
        "i2v",
        dict(y=torch.zeros(2, 5, 3, 4, 6)),
        "y of shape [2, 5, 3, 4, 6] does not lie over x of shape [2, 4, 2, 4, 6]",
    ),
    "y without batch": ("i2v", dict(y=torch.zeros(5, 2, 4, 6)), "a latent of shape [5, 2, 4, 6] arrived"),
    "odd width": (
        "t2v",
        dict(x=torch.zeros(2, 4, 2, 4, 5)),
        "latent width 5 is not a multiple of the patch 2; choose a video size that is a multiple of 16",
    ),
    "t too long": (
        "t2v",
        dict(t=torch.zeros(3)),
        "t of shape [3] arrived; expected [2] (one per sample) or [2, 12] (one per token)",
    ),
    "t without batch": (
        "t2v",
        dict(t=torch.tensor(5.0)),
        "t of shape [] arrived; expected [2] (one per sample)",
    ),
    "t for the wrong tokens": ("ti2v", dict(t=torch.zeros(2, 11)), "t of shape [2, 11] arrived"),
    "text of another encoder": (
        "t2v",
        dict(text=[torch.zeros(3, 11)] * 2),
        "text features of shape [3, 11] arrived; expected a list of [l, 10], one per sample, with l at most "
        "12",
    ),
    "text too long": (
        "t2v",
        dict(text=[torch.zeros(13, 10)] * 2),
        "text features of shape [13, 10] arrived; expected a list of [l, 10], one per sample, with l at "
        "most 12",
    ),
    "one tensor for text": (
        "t2v",
        dict(text=torch.zeros(3, 10)),
        "text is a tensor [3, 10]; expected a list of [l, 10], one per sample",
    ),
    "a string for text": (
        "t2v",
        dict(text="a red circle"),
        "text is 'a red circle'; expected a list of [l, 10], one per sample, as text.encode([prompt]) gives",
    ),
    "a number for t": ("t2v", dict(t=500), "t is 500; expected a tensor [2] (one per sample)"),
    "no text": ("t2v", dict(text=[]), "text is []; expected a list of [l, 10], one per sample"),
    "too many prompts": (
        "t2v",
        dict(text=[torch.zeros(3, 10)] * 3),
        "3 prompts for a batch of 2; expected one prompt per sample",
    ),
    "an image for t2v": (
        "t2v",
        dict(image=torch.zeros(2, 257, 6)),
        "image features were given, but this t2v model has no image path; leave image out, or load a Wan "
        "2.1 i2v model",
    ),
    "no image": (
        "i2v",
        dict(image=None),
        "this i2v model reads CLIP features; pass image=[2, n, 6], as image.encode(pictures) gives",
    ),
    "image of another tower": (
        "i2v",
        dict(image=torch.zeros(2, 257, 7)),
        "image features of shape [2, 257, 7] arrived; expected [2, n, 6]",
    ),
    "image without batch": (
        "i2v",
        dict(image=torch.zeros(257, 6)),
        "image features of shape [257, 6] arrived; expected [2, n, 6]",
    ),
    "one image of two": (
        "flf2v",
        dict(image=torch.zeros(2, 257, 6)),
        "image features of shape [2, 257, 6] arrived; expected [4, 257, 6] (first and last image in turn)",
    ),
    "no control": (
        "vace",
        dict(control=None),
        "this VACE model reads a control latent; pass control=[b, 5, f, h, w] (zeros for none)",
    ),
    "control for t2v": (
        "t2v",
        dict(control=torch.zeros(2, 5, 2, 4, 6)),
        "a control latent was given, but this t2v model has no VACE blocks; leave control out",
    ),
    "small control": (
        "vace",
        dict(control=torch.zeros(2, 5, 2, 4, 4)),
        "control of shape [2, 5, 2, 4, 4] arrived; expected [2, 5, 2, 4, 6], lying over x",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_with_what_was_expected(name):
    kind, wrong, words = BAD[name]
    with pytest.raises(ValueError, match=re.escape(words)):
        dit_of(kind)(**{**inputs(kind), **wrong})


@torch.no_grad()
def test_a_prompt_prepared_by_another_model_is_refused():
    given_ = inputs("i2v")
    for other in (dit_of("t2v"), dit_of("i2v", num_layers=1)):
        context = other.prepare(given_["text"], given_["image"] if other.image_mlp is not None else None)
        with pytest.raises(ValueError, match="prepared by another model; call prepare of this one"):
            dit_of("i2v")(**{**given_, "text": context})


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(num_heads=5), "dim 24 over 5 heads gives 4.8 channels a head; expected an even whole number"),
        (dict(num_heads=8), "dim 24 over 8 heads gives 3 channels a head; expected an even whole number"),
        (dict(vace_layers=(0, 2)), "vace_layers (0, 2) names a block outside 0..1 (num_layers 2)"),
    ],
)
def test_a_config_that_no_dit_can_have_is_refused(fields, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        DiTConfig(**{**SMALL, **fields})


# what others call it with: hooks of torch, autocast, offloaders, compilers


def test_every_layer_is_called_as_a_module(kind):
    """So that the hooks of torch, of accelerate and of profilers see all that happens."""
    dit, called = dit_of(kind), set()
    holders = [module for module in dit.modules() if list(module.parameters(recurse=False))]
    for module in holders:
        module.register_forward_hook(lambda module, *_: called.add(module))
    dit(**inputs(kind))
    assert called == set(holders)


@torch.no_grad()
def test_under_autocast_time_and_velocity_stay_float32():
    dit, given_ = dit_of(), inputs()
    plain, time = dit(**given_), dit.time(given_["t"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = dit(**given_)
        assert torch.equal(dit.time(given_["t"]), time)
    assert cast.dtype == torch.float32 and 0 < far(cast, plain) < 0.1 * plain.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["t2v", "i2v"])
def test_layers_whose_weights_come_when_they_are_called_give_the_same(kind):
    accelerate = pytest.importorskip("accelerate")
    dit, given_ = dit_of(kind), inputs(kind)
    plain = dit(**given_)
    moved = accelerate.cpu_offload(dit, execution_device=torch.device("cpu"))
    torch.testing.assert_close(moved(**given_), plain, atol=1e-6, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["t2v", "i2v"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_block_by_block_there_is_one_graph_for_all_steps_branches_and_prompts(kind, dtype):
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter, dit = CompileCounter(), dit_of(kind, text_len=30, num_layers=3).to(dtype)
    given_ = inputs(kind, batch=1)
    image, steps = given_.pop("image"), torch.linspace(999, 1, 20)
    for block in dit.blocks:
        block.compile(backend=counter, fullgraph=True)
    for length in (3, 11, 7):  # words of three prompts, each beside an empty one
        prompts = [
            dit.prepare([torch.randn(words, 10)], None if image is None else image) for words in (length, 1)
        ]
        for t in steps:
            for context in prompts:
                dit(**given_ | dict(t=t[None], text=context))
    assert counter.frame_count == 1
    torch._dynamo.reset()
