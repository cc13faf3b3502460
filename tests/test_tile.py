"""Are tiles where they should be, do they add up, and what do they cost at the seams?"""

import re
from itertools import pairwise

import pytest
import small
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moddiff
from moddiff.extensions import tiled
from moddiff.extensions.tile import ramp, spans
from moddiff.vae import VAE, VAEConfig


def vae(seed=0, **changes):
    torch.manual_seed(seed)
    return VAE(VAEConfig(**(small.VAE_SIZES | changes))).eval()


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 19))
def test_tiles_cover_a_length_and_their_weights_add_up(length, size, overlap):
    overlap = min(overlap, size - 1)
    there = spans(length, size, overlap)
    assert there[0][0] == 0 and there[-1][1] == length
    total = torch.zeros(length)
    for (_, end, _, after), (start, _, before, _) in pairwise(there):
        assert end - start == before == after >= overlap
    for first, end, before, after in there:
        assert end - first == min(size, length)
        total[first:end] += ramp(first, end, before, after)
    # Three tiles meet only where the last slid back over more than one; there the sum is divided by.
    assert (total > 0).all()
    if len(there) < 3 or (2 * overlap <= size and there[-1][2] + there[-2][2] <= size):
        torch.testing.assert_close(total, torch.ones(length))


@torch.no_grad()
@pytest.mark.parametrize("shape", [(32, 48), (24, 40), (40, 24)])
def test_a_constant_stays_constant(shape):
    """With all weights of the convolutions zero but the last bias, every tile is the same everywhere."""
    one = vae()
    for p in one.parameters():
        p.zero_()
    one.decoder.head[2].bias.copy_(torch.tensor([0.1, -0.2, 0.3]))
    latent = torch.randn(1, small.Z, 2, shape[0] // 8, shape[1] // 8)
    new = tiled(one, size=(16, 16), overlap=(8, 8))
    torch.testing.assert_close(new.decode(latent), one.decode(latent), atol=1e-6, rtol=0)


@torch.no_grad()
def test_one_tile_is_the_whole_to_the_bit():
    one = vae()
    new, video = tiled(one), torch.rand(1, 3, 5, 32, 48) * 2 - 1
    latent = one.encode(video)
    assert torch.equal(new.encode(video), latent) and torch.equal(new.decode(latent), one.decode(latent))
    assert torch.equal(torch.cat([*new.stream(latent)], 2), torch.cat([*one.stream(latent)], 2))


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 3])
def test_a_stream_of_tiles_is_their_decode(frames):
    new = tiled(vae(), size=(16, 24), overlap=(8, 8))
    latent = torch.randn(1, small.Z, frames, 4, 5)
    torch.testing.assert_close(torch.cat([*new.stream(latent)], 2), new.decode(latent), atol=1e-5, rtol=0)


def without_attention(one):
    """The attention in the middle sees the whole picture; with its output zero what is left looks near."""
    for part in (one.encoder, one.decoder):
        torch.nn.init.zeros_(part.middle[1].proj.weight)
        torch.nn.init.zeros_(part.middle[1].proj.bias)
    return one


def reach(function, x, stride):
    """How many pixels beyond a seam the other side is heard: what changes when that side does."""
    other, middle = x.clone(), x.shape[-1] // 2
    other[..., middle:] += 1
    changed = (function(x) - function(other)).abs().amax((0, 1, 2, 3)) > 0
    return middle * stride - int(changed.nonzero()[0])


@torch.no_grad()
def test_where_the_overlap_covers_what_convolutions_see_tiles_are_exact():
    one = without_attention(vae(dim_mult=[1, 1], temperal_downsample=[False], num_res_blocks=1))
    stride = one.stride[2]
    latent = torch.randn(1, small.Z, 1, 4, 150)  # no multiple of the tiles: the last one slides back a little
    seen = reach(one.decode, torch.randn(1, small.Z, 1, 4, 64), stride)
    enough = -(-4 * seen // stride) * stride
    plain = one.decode(latent)
    size = (4 * stride, enough + 4 * stride)
    exact = tiled(one, size=size, overlap=(0, enough)).decode(latent)
    assert 2 * size[1] < plain.shape[-1] and (exact - plain).abs().max() < 1e-5
    worse = tiled(one, size=size, overlap=(0, stride)).decode(latent)
    assert (worse - plain).abs().max() > 1e-3


@torch.no_grad()
def test_on_the_tiny_model_seams_fade_as_the_overlap_grows():
    pipe = moddiff.load("tiny")
    latent = [*pipe.steps("a red circle moving left on a black background", seed=0, steps=8)][-1].next
    plain = pipe.vae.decode(latent)
    errors = [
        float((tiled(pipe.vae, (48, 48), (o, o)).decode(latent) - plain).abs().mean()) for o in (0, 16, 32)
    ]
    assert errors[0] > errors[1] > errors[2] > 0


@pytest.mark.parametrize("each", ["decode", "encode"])
def test_a_wrong_shape_is_the_vaes_own_error(each):
    with pytest.raises((ValueError, IndexError), match="five axes|index"):
        getattr(tiled(vae()), each)(torch.zeros(3, 4, 4))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(size=(100, 256)), "size=(100, 256)); expected (height, width) in pixels, multiples of 8 and 8"),
        (dict(size=(0, 256)), "size=(0, 256))"),
        (dict(overlap=(64, 3)), "overlap=(64, 3))"),
        (dict(overlap=(64,)), "overlap=(64,))"),
        (dict(size=256), "size=256); expected (height, width)"),
        (dict(size=(256.0, 256)), "size=(256.0, 256))"),
        (dict(size=(64, 64)), "overlap=(64, 64)) is not smaller than the tiles, size=(64, 64)"),
    ],
)
def test_a_slip_is_told(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        tiled(vae(), **options)


def test_it_reports_its_tiles():
    new = tiled(vae(), size=(16, 16), overlap=(8, 8))
    new.decode(torch.randn(1, small.Z, 1, 4, 3))
    assert new.report().rows == [dict(call="decode", tiles=6, size=(16, 16), overlap=(8, 8))]
