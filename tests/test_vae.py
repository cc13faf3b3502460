"""Is the video autoencoder causal, the same whole and in chunks, and clear about what it cannot take?"""

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from moddiff import configs
from moddiff.hooks import capture, patch
from moddiff.vae import LATENT_STATISTICS, VAE, CausalConv3d, VAEConfig, fold, unfold
from moddiff.vae.causal import channels_last, in_pairs
from moddiff.vae.layers import UpsamplingConv2d

VERSIONS = {
    "2.1": {},
    "2.2": {"dec_dim": 8},
    "2.1, time halved once": {"temperal_downsample": (False, False, True)},
    "2.2, time halved early": {"dec_dim": 6, "temperal_downsample": (True, True, False)},
}


def vae_of(version, seed=0, **more):
    """A small VAE with random weights, gains and biases too, and z = 3."""
    torch.manual_seed(seed)
    vae = VAE(
        VAEConfig(
            **{
                "z_dim": 3,
                "dim": 4,
                "num_res_blocks": 1,
                "mean": (0.1, -0.2, 0.3),
                "std": (0.5, 1.5, 2.0),
                **VERSIONS[version],
                **more,
            }
        )
    ).eval()
    for p in vae.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return vae


def video_for(vae, frames=5, batch=1, rows=1, columns=2):
    torch.manual_seed(1)
    return torch.rand(batch, 3, frames, rows * vae.config.stride[1], columns * vae.config.stride[2]) * 2 - 1


def latent_for(vae, frames=3, batch=1):
    torch.manual_seed(2)
    return torch.randn(batch, vae.config.z_dim, frames, 1, 2)


@pytest.fixture(params=VERSIONS)
def vae(request):
    return vae_of(request.param)


@torch.no_grad()
def test_shapes_are_a_latent_cell_for_each_stride_and_back(vae):
    ft, fh, fw = vae.config.stride
    video = video_for(vae, frames=2 * ft + 1)
    latent = vae.encode(video)
    assert latent.shape == (1, 3, 3, video.shape[3] // fh, video.shape[4] // fw)
    assert vae.decode(latent).shape == video.shape


def test_the_strides_of_the_two_releases_are_their_published_ones():
    assert VAEConfig(z_dim=16, dim=96).stride == (4, 8, 8)
    assert VAEConfig(z_dim=48, dim=160, dec_dim=256).stride == (4, 16, 16)


@pytest.mark.parametrize("cells", [1, 2, 3, 4])  # with a stride of 4: 1, 5, 9, 13 frames
@torch.no_grad()
def test_chunks_equal_the_whole(vae, cells):
    video = video_for(vae, frames=(cells - 1) * vae.config.stride[0] + 1, batch=2)
    whole = vae.encode(video, chunked=False)
    assert (vae.encode(video, chunked=True) - whole).abs().max() <= 1e-5 * max(1, whole.abs().max())
    z = latent_for(vae, cells, batch=2)
    assert (vae.decode(z, chunked=True) - vae.decode(z, chunked=False)).abs().max() <= 1e-5


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_a_stream_gives_the_frames_of_decode_as_they_come(vae, frames):
    torch.manual_seed(frames)
    z = torch.randn(1, vae.channels, frames, 3, 2)
    chunks = list(vae.stream(z))
    assert [chunk.shape[2] for chunk in chunks] == [1] + [vae.stride[0]] * (frames - 1)
    assert torch.equal(torch.cat(chunks, 2), vae.decode(z, chunked=True))


def test_a_stream_is_checked_at_the_call_and_two_do_not_mix(vae):
    with pytest.raises(ValueError, match="expected .b, .*, f, h, w., five axes"):
        vae.stream(torch.zeros(vae.channels, 1, 2, 2))
    torch.manual_seed(0)
    one, two = torch.randn(2, 1, vae.channels, 3, 2, 2)
    pairs = list(zip(vae.stream(one), vae.stream(two), strict=True))
    for z, chunks in zip((one, two), zip(*pairs), strict=True):
        assert torch.equal(torch.cat(chunks, 2), vae.decode(z, chunked=True))


@torch.no_grad()
def test_the_memory_limit_chooses_between_chunks_and_the_whole(vae):
    z, passes = latent_for(vae), []
    vae.decoder.register_forward_hook(lambda module, args, out: passes.append(out.shape[2]))
    vae.decode(z)
    assert len(passes) == 1
    vae.memory_limit = 1
    vae.decode(z)
    assert len(passes) == 4


@torch.no_grad()
def test_no_frame_depends_on_a_later_one(vae):
    ft = vae.config.stride[0]
    video, z = video_for(vae, frames=3 * ft + 1), latent_for(vae, 4)
    latent, decoded = vae.encode(video, chunked=False), vae.decode_raw(z, chunked=False)
    for cell in range(3):
        later, z_later = video.clone(), z.clone()
        later[:, :, cell * ft + 1 :] = 0.7
        z_later[:, :, cell + 1 :] = -1.3
        changed = (vae.encode(later, chunked=False) - latent).abs().amax((0, 1, 3, 4))  # per latent frame
        assert changed[: cell + 1].max() <= 1e-5 and changed[cell + 1 :].min() > 1e-4
        changed = (
            (vae.decode_raw(z_later, chunked=False) - decoded).abs().amax((0, 1, 3, 4))
        )  # per video frame
        assert changed[: cell * ft + 1].max() <= 1e-5 and changed[cell * ft + 1 :].min() > 1e-4


@torch.no_grad()
def test_the_past_is_seen(vae):
    video, z = video_for(vae, frames=vae.config.stride[0] + 1), latent_for(vae, 2)
    other, z_other = video.clone(), z.clone()
    other[:, :, 0], z_other[:, :, 0] = 0.7, -1.3
    assert (vae.encode(other) - vae.encode(video))[:, :, 1].abs().max() > 1e-4
    assert (vae.decode_raw(z_other) - vae.decode_raw(z))[:, :, 1:].abs().max() > 1e-4


@torch.no_grad()
def test_batch_mates_change_nothing(vae):
    video, z = video_for(vae, batch=3, frames=vae.config.stride[0] + 1), latent_for(vae, 2, batch=3)
    for chunked in (False, True):
        together, apart = (
            vae.encode(video, chunked),
            torch.cat([vae.encode(one[None], chunked) for one in video]),
        )
        assert (together - apart).abs().max() <= 1e-5
        together, apart = vae.decode(z, chunked), torch.cat([vae.decode(one[None], chunked) for one in z])
        assert (together - apart).abs().max() <= 1e-5


@torch.no_grad()
def test_kernels_agree(vae):
    video, z = video_for(vae), latent_for(vae)
    latent, decoded = vae.encode(video), vae.decode(z)
    middles = [vae.encoder.middle[1], vae.decoder.middle[1]]
    for middle in middles:
        middle.kernel = "math"
    assert (vae.encode(video) - latent).abs().max() <= 1e-5 and (vae.decode(z) - decoded).abs().max() <= 1e-5
    middles[1].kernel = lambda q, k, v, bias, scale: v * 3  # and it is this attribute that chooses
    assert (vae.decode(z) - decoded).abs().max() > 1e-4


# the same numbers with less work


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("batch", [1, 2])
@torch.no_grad()
def test_two_frames_that_share_products_are_the_plain_convolution(frames, batch):
    conv = CausalConv3d(3, 4, 3, padding=1).double()
    x = torch.randn(batch, 3, frames, 6, 5, dtype=torch.float64)
    history = torch.randn(batch, 3, 2, 6, 5, dtype=torch.float64)
    plain = F.conv3d(torch.cat([history, x], 2), conv.weight, conv.bias, padding=(0, 1, 1))
    for given in (x, channels_last(x)):
        shared = in_pairs(history, given, conv.weight, conv.bias, 1)
        torch.testing.assert_close(shared, plain, rtol=0, atol=1e-12)


def test_with_and_without_gradients_the_numbers_agree(vae):
    video, z = video_for(vae, frames=2 * vae.config.stride[0] + 1), latent_for(vae)
    with_gradients = vae.encode(video), vae.decode(z)
    with torch.no_grad():
        without = vae.encode(video), vae.decode(z)
    assert with_gradients[0].requires_grad
    for one, other in zip(with_gradients, without, strict=True):
        torch.testing.assert_close(one.detach(), other, rtol=0, atol=2e-5)


def test_a_frame_shares_products_with_none_after_it():
    conv = CausalConv3d(2, 2, 3, padding=1)
    x = torch.randn(1, 2, 4, 5, 5)
    later = x.clone()
    later[:, :, 2:] += 1
    with torch.no_grad():
        assert torch.equal(conv(x)[:, :, :2], conv(later)[:, :, :2])  # to the bit


@pytest.mark.parametrize("size", [(1, 1), (3, 5)])
def test_upsampling_in_one_convolution_is_repeating_pixels_and_then_convolving(size):
    layer = UpsamplingConv2d(3, 4, 3, padding=1).double()
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    repeated = F.interpolate(x, scale_factor=2, mode="nearest-exact")
    expected = F.conv2d(repeated, layer.weight, layer.bias, padding=1)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)
    layer(x).square().sum().backward()
    found = layer.weight.grad.clone()
    layer.weight.grad = None
    F.conv2d(repeated, layer.weight, layer.bias, padding=1).square().sum().backward()
    torch.testing.assert_close(found, layer.weight.grad, rtol=1e-10, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("chunked", [False, True])
def test_between_all_layers_the_channels_of_a_pixel_lie_side_by_side(vae, chunked):
    """In another order every convolution would turn its frames around and back."""
    seen = []

    def note(module, inputs, output):
        order = torch.channels_last_3d
        if isinstance(output, torch.Tensor) and output.ndim == 5:
            seen.append(output.is_contiguous(memory_format=order))

    for layer in vae.modules():
        if isinstance(layer, CausalConv3d):
            layer.register_forward_hook(note)
    with torch.no_grad():
        vae.bfloat16().decode(latent_for(vae), chunked=chunked)
    assert len(seen) > 20 and all(seen)


def test_one_pass_multiplies_no_zeros_before_the_first_frame():
    """Three frames through a kernel of three: one product and 2 x 3, as with the first frame alone."""
    conv = CausalConv3d(2, 2, 3, padding=1).bfloat16()
    frames = torch.randn(1, 2, 3, 4, 4, dtype=torch.bfloat16)
    counts = []
    for lengths in ([3], [1, 2]):
        with FlopCounterMode(display=False) as counted, torch.no_grad():
            cache = {}
            for chunk in frames.split(lengths, 2):
                conv(chunk, cache)
        counts.append(counted.get_total_flops())
    assert counts[0] == counts[1] == 7 * (2 * 2 * 9 * 16 * 2)


def test_an_edited_history_of_the_very_first_frame_is_heard():
    conv = CausalConv3d(2, 3, 3, padding=1)
    x = torch.randn(1, 2, 1, 4, 4)
    with patch(conv, "history", lambda zeros, where: zeros + 1):
        heard = conv(x)
    frames = torch.cat([torch.ones(1, 2, 2, 4, 4), x], 2)
    torch.testing.assert_close(heard, F.conv3d(frames, conv.weight, conv.bias, padding=(0, 1, 1)))
    silent = torch.cat([torch.zeros(1, 2, 2, 4, 4), x], 2)
    torch.testing.assert_close(conv(x), F.conv3d(silent, conv.weight, conv.bias, padding=(0, 1, 1)))


@torch.no_grad()
def test_hooks_of_torch_fire_on_every_layer(vae):
    """So that what moves weights in before a layer runs, as offloaders do, can work."""
    fired = set()
    for name, module in vae.named_modules():
        if any(True for _ in module.parameters(recurse=False)):
            module.register_forward_pre_hook(lambda *args, name=name: fired.add(name))
    vae.decode(vae.encode(video_for(vae, frames=2 * vae.config.stride[0] + 1)))
    quiet = {name.rsplit(".", 1)[0] for name, _ in vae.named_parameters()} - fired
    assert quiet == set()


def test_what_a_pipeline_must_know_are_attributes(vae):
    assert vae.stride == vae.config.stride and vae.channels == 3


@torch.no_grad()
def test_latents_are_normalised_by_mean_and_standard_deviation():
    # Float64, because random weights amplify the last bit of a latent; powers of two, which 1 / std keeps.
    vae = vae_of("2.1", std=(0.5, 1.0, 2.0)).double()
    plain = vae_of("2.1", mean=(0.0,) * 3, std=(1.0,) * 3).double()
    video = video_for(vae).double()
    mean, std = (torch.tensor(values).view(1, 3, 1, 1, 1) for values in (vae.config.mean, vae.config.std))
    raw = plain.encode(video)
    torch.testing.assert_close(vae.encode(video), (raw - mean) / std)
    torch.testing.assert_close(vae.decode((raw - mean) / std), plain.decode(raw), atol=1e-9, rtol=0)


@torch.no_grad()
def test_decode_is_the_raw_decode_between_minus_one_and_one():
    vae, z = vae_of("2.1"), latent_for(vae_of("2.1"))
    vae.decoder.head[2].weight.data *= 8
    raw = vae.decode_raw(z)
    assert raw.abs().max() > 1
    assert torch.equal(vae.decode(z), raw.clamp(-1, 1))


def test_the_published_statistics_are_the_default():
    for z, version in ((16, {}), (48, {"dec_dim": 8})):
        config = VAEConfig(z_dim=z, dim=4, **version)
        assert (config.mean, config.std) == LATENT_STATISTICS[z] and len(config.mean) == len(config.std) == z
    assert LATENT_STATISTICS[16][0][0] == -0.7571 and LATENT_STATISTICS[48][1][-1] == 0.7744


def test_folding_puts_the_height_offset_fastest_and_unfolding_undoes_it():
    video = torch.arange(2 * 3 * 1 * 4 * 6.0).reshape(2, 3, 1, 4, 6)
    folded = fold(video, 2)
    assert folded.shape == (2, 12, 1, 2, 3)
    for c in range(3):
        for column in range(2):
            for row in range(2):
                assert torch.equal(folded[:, 4 * c + 2 * column + row], video[:, c, :, row::2, column::2])
    assert torch.equal(unfold(folded, 2), video)


def test_every_weight_gets_a_gradient(vae):
    video, z = video_for(vae, frames=2 * vae.config.stride[0] + 1), latent_for(vae)
    (vae.encode(video).square().mean() + vae.decode_raw(z).square().mean()).backward()
    without = [name for name, p in vae.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


@torch.no_grad()
def test_double_precision_goes_through(vae):
    video = video_for(vae)
    expected = vae.encode(video)
    vae.double()
    assert vae.encode(video).dtype == torch.float64
    torch.testing.assert_close(vae.encode(video.double()).float(), expected, atol=1e-4, rtol=0)


# taps


@torch.no_grad()
def test_the_time_cache_is_seen_and_editing_it_changes_later_frames_only():
    vae = vae_of("2.1")
    z = latent_for(vae, 3)
    plain = vae.decode_raw(z, chunked=True)
    with capture(vae, "decoder.conv1.history") as seen:
        assert torch.equal(vae.decode_raw(z, chunked=True), plain)
    history = [record for _, record in seen]
    assert (
        len(history) == 3
        and not history[0].any()
        and torch.equal(history[1][:, :, 0], torch.zeros_like(history[1][:, :, 0]))
    )
    assert torch.equal(history[1][:, :, 1], history[2][:, :, 0]) and history[2].any()
    with patch(vae, "decoder.conv1.history", lambda x, where: torch.zeros_like(x)):
        forgetful = vae.decode_raw(z, chunked=True)
    assert (
        torch.equal(forgetful[:, :, :1], plain[:, :, :1])
        and (forgetful[:, :, 1:] - plain[:, :, 1:]).abs().max() > 1e-4
    )


@torch.no_grad()
def test_stages_and_attention_are_seen_without_a_change_of_output(vae):
    z = latent_for(vae)
    plain = vae.decode(z)
    with capture(vae, "decoder.*") as seen:
        assert torch.equal(vae.decode(z), plain)
    names = {where.name for where, _ in seen}
    assert {"latent", "stage.0", "middle.out", "pixels", "q", "probs", "heads"} <= names


# memory


def storages(values):
    return {x.untyped_storage() for x in tree_leaves(values) if isinstance(x, torch.Tensor)}


class Peak(TorchDispatchMode):
    """The most bytes of tensors alive at once."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.alive = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = {id(storage) for storage in storages(args)}  # a view, of a weight or of a map, takes nothing
        for storage in storages(out):
            if id(storage) not in self.alive | given:
                self.alive.add(id(storage))
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.forget, id(storage), storage.nbytes())
        return out

    def forget(self, key, size):
        self.alive.discard(key)
        self.now -= size


@pytest.mark.parametrize(
    "release",
    [dict(z_dim=16, dim=96, num_res_blocks=1), dict(z_dim=48, dim=160, dec_dim=256, num_res_blocks=1)],
    ids=["2.1", "2.2"],
)
@torch.no_grad()
def test_the_forecast_of_a_full_width_decode_is_near_its_true_peak(release):
    vae = configs.empty("vae", release)
    _, fh, fw = vae.config.stride
    z = torch.zeros(1, release["z_dim"], 7, 240 // fh, 416 // fw, device="meta")
    with Peak() as memory:
        video = vae.decode(z, chunked=False)
    assert 0.9 <= vae.activation_bytes(video.shape) / memory.peak <= 1.3
    with Peak() as in_chunks:
        vae.decode(z, chunked=True)
    assert in_chunks.peak < 0.6 * memory.peak


# what is refused


@pytest.mark.parametrize(
    "frames, words",
    [
        (4, "got 4 frames; expected 4n [+] 1 of them, such as 1 or 5"),
        (7, "such as 5 or 9"),
        (0, "got 0 frames"),
    ],
)
def test_a_wrong_number_of_frames_is_refused(frames, words):
    vae = vae_of("2.1")
    with pytest.raises(ValueError, match=words + ".*cut or repeat"):
        vae.encode(torch.zeros(1, 3, frames, 8, 8))


@pytest.mark.parametrize(
    "version, size, words",
    [
        ("2.1", (12, 8), "12 x 8 .*multiples of 8: resize to 8 x 8"),
        ("2.2", (32, 40), "32 x 40 .*multiples of 16: resize to 32 x 32"),
        ("2.1", (8, 0), "8 x 0"),
    ],
)
def test_a_size_off_the_stride_is_refused(version, size, words):
    with pytest.raises(ValueError, match=words):
        vae_of(version).encode(torch.zeros(1, 3, 5, *size))


@pytest.mark.parametrize("shape", [(3, 5, 8, 8), (1, 4, 5, 8, 8), (1, 1, 3, 5, 8, 8)])
def test_a_video_of_the_wrong_rank_or_colours_is_refused(shape):
    with pytest.raises(
        ValueError, match=r"got a video of shape \[.*expected \[b, 3, F, H, W\], five axes with 3 colours"
    ):
        vae_of("2.1").encode(torch.zeros(shape))


def test_bytes_are_refused_with_the_way_to_floats():
    with pytest.raises(ValueError, match=r"torch.uint8.*floats in \[-1, 1\].*frames / 127.5 - 1"):
        vae_of("2.1").encode(torch.zeros(1, 3, 5, 8, 8, dtype=torch.uint8))


@pytest.mark.parametrize("shape", [(3, 2, 1, 1), (1, 16, 2, 1, 1), (1, 3, 0, 1, 1)])
def test_a_latent_of_the_wrong_rank_or_channels_or_without_frames_is_refused(shape):
    with pytest.raises(ValueError, match=r"got a latent of shape \[.*expected \[b, 3, f, h, w\], five axes"):
        vae_of("2.1").decode(torch.zeros(shape))


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(z_dim=3), "no published latent mean and std for z_dim 3.*16 and 48.*`mean` and `std`"),
        (dict(z_dim=3, mean=(0, 0, 0)), "no published latent mean and std"),
        (
            dict(z_dim=16, mean=(0,) * 15, std=(1,) * 16),
            "mean has 15 and std 16 entries; expected z_dim = 16",
        ),
        (dict(z_dim=16, std=(0.0,) * 16), "std.*positive"),
        (dict(z_dim=16, std=(float("nan"),) * 16), "nan.*finite"),
        (dict(z_dim=16, mean=(float("inf"),) * 16), "inf.*finite"),
        (
            dict(z_dim=16, temperal_downsample=(True, False)),
            "2 entries for 4 stages.*expected one flag between each two stages, 3",
        ),
        (dict(z_dim=16, attn_scales=(0.5,)), "attn_scales .*leave it out"),
        (dict(z_dim=16, dec_dim=8, dim_mult=(1, 2, 4, 8)), "last two entries of dim_mult.*4 and 8"),
    ],
)
def test_a_config_that_no_vae_can_have_is_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        VAEConfig(**{"dim": 4, **fields})
