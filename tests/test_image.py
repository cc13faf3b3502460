"""Does image.py see the picture as CLIP does, and refuse what is no picture?"""

import copy

import accelerate
import pytest
import torch

from moddiff import bench
from moddiff.attention import math_kernel, use_kernel
from moddiff.hooks import capture, patch, zero
from moddiff.image import CLIP_MEAN, CLIP_STD, ImageConfig, ImageEncoder, LayerNorm, preprocess

SIZES = dict(image_size=28, patch_size=7, dim=24, mlp_ratio=2, out_dim=10, num_heads=3, num_layers=3)


def encoder(**changes):
    torch.manual_seed(0)
    return ImageEncoder(ImageConfig(**{**SIZES, **changes})).eval()


def picture(b=1, h=28, w=28):
    return torch.rand(b, 3, h, w) * 2 - 1


def test_a_flat_picture_keeps_its_colour_in_clip_units():
    colour = torch.tensor([0.2, 0.5, 0.9])
    pixels = preprocess((colour * 2 - 1)[None, :, None, None].expand(1, 3, 17, 31), 14)
    expected = (colour - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)
    torch.testing.assert_close(pixels, expected[None, :, None, None].expand(1, 3, 14, 14), atol=1e-5, rtol=0)


def test_any_picture_is_squashed_to_the_square_and_its_overshoot_kept():
    edge = torch.cat([-torch.ones(1, 3, 20, 25), torch.ones(1, 3, 20, 25)], dim=3)
    pixels = preprocess(edge, 112)
    white = (1 - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)
    assert pixels.shape == (1, 3, 112, 112)
    assert (pixels.amax((0, 2, 3)) > white + 0.01).all()


def test_encode_gives_the_class_token_and_every_patch():
    image = encoder()
    features = image.encode(picture(2, 40, 31))
    assert features.shape == (2, 17, 24) == (2, image.config.num_tokens, 24) and not features.requires_grad


def test_encode_stops_before_the_last_layer():
    image, x = encoder(), picture()
    before = image.encode(x), image.project(x)
    for p in [*image.layers[-1].parameters(), *image.post_norm.parameters(), image.head]:
        p.data.mul_(1.5)
    assert torch.equal(image.encode(x), before[0]) and not torch.allclose(image.project(x), before[1])


def test_patches_are_counted_row_by_row():
    image = encoder(num_layers=1)
    x = picture()
    other = x.clone()
    other[:, :, 0:7, 21:28] *= -1
    changed = (image.encode(x) - image.encode(other)).abs().amax((0, 2)) > 1e-6
    assert changed.nonzero().flatten().tolist() == [1 + 3]


def test_every_layer_is_called_as_a_module():
    image = encoder()
    layers = {name for name, module in image.named_modules() if module._parameters}
    fired = []
    for name in layers:
        image.get_submodule(name).register_forward_hook(lambda *_, name=name: fired.append(name))
    image.project(picture())
    assert sorted(fired) == sorted(layers)


@torch.no_grad()
def test_weights_that_an_offloader_brings_layer_by_layer_give_the_same_bits():
    image, x = encoder(), picture()
    moved = accelerate.cpu_offload(copy.deepcopy(image), execution_device=torch.device("cpu"))
    assert moved.head.is_meta
    assert torch.equal(moved.encode(x), image.encode(x)) and torch.equal(moved.project(x), image.project(x))


@torch.no_grad()
def test_under_autocast_the_stream_its_norms_and_the_pixels_stay_float32():
    image, x = encoder(), picture(1, 50, 40)
    plain, pixels = image.encode(x), preprocess(x, 28)
    with torch.autocast("cpu", dtype=torch.bfloat16), capture(image, "layers.*.resid_post") as seen:
        cast = image.encode(x)
        assert torch.equal(preprocess(x, 28), pixels)
        norm = image.layers[0].norm_attn
        assert torch.equal(norm(plain), torch.nn.functional.layer_norm(plain, (24,)))
    assert {value.dtype for _, value in seen} == {cast.dtype} == {torch.float32}
    assert (cast - plain).abs().max() < 0.02 * plain.abs().max()


@pytest.mark.parametrize("size", [(1, 65_000), (65_000, 1), (3000, 3000)])
def test_a_picture_of_any_shape_is_squashed_and_takes_no_more_memory_than_itself(size):
    x = picture(1, *size)
    with torch.no_grad():
        held = bench.peak_bytes(lambda: preprocess(x, 28), "cpu")
    assert held < 2**20


def test_dim_is_the_width_of_what_encode_gives():
    assert encoder().encode(picture()).shape[2] == encoder().dim


def test_batch_mates_change_nothing():
    image, x = encoder(), picture(3, 35, 35)
    torch.testing.assert_close(image.encode(x)[1:2], image.encode(x[1:2]), atol=2e-6, rtol=0)


def test_contrastive_training_reaches_every_weight():
    image = encoder()
    vectors = image.project(picture(2))
    assert vectors.shape == (2, 10)
    vectors.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in image.parameters())


def test_norms_compute_in_float32_and_return_the_dtype_they_were_given():
    norm, x = LayerNorm(64).bfloat16(), (torch.randn(5, 64) * 300 + 1000).bfloat16()
    assert norm(x).dtype == torch.bfloat16
    assert torch.equal(norm(x), torch.nn.functional.layer_norm(x.float(), (64,)).bfloat16())


def test_a_half_precision_tower_takes_float32_pictures():
    assert encoder().bfloat16().encode(picture()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "images, error, message",
    [
        (
            torch.zeros(3, 8, 8),
            ValueError,
            r"images arrived as \[3, 8, 8\]; expected \[b, 3, H, W\]: add the batch axis",
        ),
        (torch.zeros(1, 8, 8, 3), ValueError, r"images arrived as \[1, 8, 8, 3\].*put colours before"),
        ("cat.png", ValueError, r"images arrived as str; expected \[b, 3, H, W\]"),
        (
            torch.zeros(1, 3, 8, 8, dtype=torch.uint8),
            TypeError,
            r"images are torch.uint8; expected floats in \[-1, 1\].*127.5",
        ),
        (
            torch.full((1, 3, 8, 8), 255.0),
            ValueError,
            r"images run from 255 to 255; expected \[-1, 1\]: images / 127.5 - 1",
        ),
        (torch.full((1, 3, 8, 8), float("nan")), ValueError, "images run from nan to nan.*no NaN"),
        (torch.zeros(1, 3, 0, 8), ValueError, r"images are \[1, 3, 0, 8\]: there is no pixel"),
    ],
)
def test_what_is_no_picture_is_named(images, error, message):
    with pytest.raises(error, match=message):
        encoder().encode(images)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(patch_size=8), "image_size=28 cannot be cut into patches of patch_size=8"),
        (dict(num_heads=5), "dim=24 cannot be split into num_heads=5"),
        (
            dict(pool_type="linear"),
            "pool_type='linear' is another kind of CLIP tower; expected pool_type='token'",
        ),
        (dict(pre_norm=False), "pre_norm=False"),
        (dict(post_norm=True), "post_norm=True"),
        (dict(activation="quick_gelu"), "activation='quick_gelu'"),
    ],
)
def test_a_config_of_another_tower_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        encoder(**change)


def test_the_weights_have_the_agreed_names():
    norms = [
        f"{n}.{p}"
        for n in ["pre_norm", "post_norm", "layers.0.norm_attn", "layers.0.norm_ffn"]
        for p in ["weight", "bias"]
    ]
    linear = [
        f"layers.0.{n}.{p}"
        for n in ["attn.qkv", "attn.out", "ffn.up", "ffn.down"]
        for p in ["weight", "bias"]
    ]
    alone = ["class_token", "position_embedding", "patch_embedding.weight", "head"]
    assert set(encoder(num_layers=1).state_dict()) == {*norms, *linear, *alone}


@torch.no_grad()
def test_looking_inside_shows_the_softmax_and_changes_no_bit():
    image, x = encoder(), picture(2)
    plain = image.encode(x)
    with capture(image, "layers.1.*") as seen:
        looked = image.encode(x)
    assert torch.equal(plain, looked)
    q, k, v, probs, heads = (seen[f"layers.1.attn.{name}"] for name in ["q", "k", "v", "probs", "heads"])
    expected = (q @ k.mT * 8**-0.5).softmax(-1)
    torch.testing.assert_close(probs, expected)
    torch.testing.assert_close(heads, expected @ v)
    assert torch.equal(seen["layers.1.resid_post"], plain) and {"resid_pre", "resid_mid"} <= set(
        image.layers[1].tap.layouts
    )


@torch.no_grad()
def test_a_head_set_to_zero_equals_a_head_cut_out_of_the_weights():
    image, x = encoder(num_layers=2), picture()
    cut = copy.deepcopy(image)
    cut.layers[0].attn.out.weight[:, 8:16] = 0
    with patch(image, "layers.0.attn.heads", zero(heads=1)):
        assert torch.equal(image.encode(x), cut.encode(x))


def test_one_call_puts_every_attention_on_another_kernel():
    image, x = encoder(), picture()
    plain, calls = image.encode(x), []

    def kernel(q, k, v, bias, scale):
        calls.append(q.shape)
        return math_kernel(q, k, v, bias, scale)

    torch.testing.assert_close(use_kernel(image, kernel).encode(x), plain, atol=1e-5, rtol=0)
    assert calls == [(1, 3, 17, 8)] * 2  # the last layer is not asked
