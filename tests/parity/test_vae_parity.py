"""Do our video autoencoders, 2.1 and 2.2, compute what Diffusers' does?"""

import pytest
import torch
from diffusers import AutoencoderKLWan
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from moddiff import weights

sizes = st.fixed_dictionaries(
    dict(
        dim=st.sampled_from([4, 6]),
        mult=st.sampled_from([(1, 2, 4, 4), (1, 2, 2, 2), (1, 1, 2, 2)]),
        blocks=st.integers(1, 2),
        z=st.integers(1, 5),
        time=st.permutations([True, True, False]),
        batch=st.integers(1, 2),
        frames=st.sampled_from([1, 5, 9]),
        rows=st.integers(1, 2),
        columns=st.integers(1, 3),
        chunked=st.booleans(),
        seed=st.integers(0, 99),
    )
)


def oracle(version, dim=4, mult=(1, 2, 4, 4), blocks=1, z=3, time=(False, True, True), **_):
    """Diffusers' autoencoder with random weights."""
    more = dict(base_dim=dim)
    if version == "2.2":
        more = dict(
            base_dim=dim,
            decoder_base_dim=2 * dim,
            is_residual=True,
            in_channels=12,
            out_channels=12,
            patch_size=2,
            scale_factor_spatial=16,
        )
    model = AutoencoderKLWan(
        z_dim=z,
        dim_mult=list(mult),
        num_res_blocks=blocks,
        temperal_downsample=list(time),
        latents_mean=torch.randn(z).tolist(),
        latents_std=(0.5 + torch.rand(z)).tolist(),
        **more,
    ).eval()
    for name, p in model.named_parameters():
        p.data += 0.1 * torch.randn_like(p)
        if "conv" in name and p.ndim > 3:
            p.data *= 1.5  # so that the signal does not die on its way
    return model


def ours_of(model):
    """Our VAE from Diffusers' config and names, weights shared."""
    return weights.build("vae", dict(model.config), dict(model.state_dict()))


def stride(version):
    return 8 if version == "2.1" else 16


def statistics(model):
    return (
        torch.tensor(values).view(1, -1, 1, 1, 1)
        for values in (model.config.latents_mean, model.config.latents_std)
    )


def encode(model, video):
    mean, std = statistics(model)
    latent = model.encode(video).latent_dist.mode()
    return (latent - mean.to(latent)) / std.to(latent)


def decode(model, latent):
    mean, std = statistics(model)
    return model.decode(latent * std.to(latent) + mean.to(latent)).sample


@pytest.mark.parametrize("version", ["2.1", "2.2"])
@settings(
    max_examples=6, deadline=None, derandomize=True, phases=[Phase.generate]
)  # shrinking takes minutes here
@given(size=sizes)
@torch.no_grad()
def test_latent_and_video_equal_diffusers(version, size):
    torch.manual_seed(size["seed"])
    # Float64, because random weights amplify: in float32 the order of a sum alone moves some pixels by 3e-5.
    theirs, s = oracle(version, **size).double(), stride(version)
    ours = ours_of(theirs)
    video = (
        torch.rand(
            size["batch"], 3, size["frames"], s * size["rows"], s * size["columns"], dtype=torch.float64
        )
        * 2
        - 1
    )
    expected = encode(theirs, video)
    latent = ours.encode(video, chunked=size["chunked"])
    assert latent.shape == expected.shape and (latent - expected).abs().max() <= 1e-6 * max(
        1, expected.abs().max()
    )
    z = torch.randn_like(expected)
    expected = decode(theirs, z)
    decoded = ours.decode(z, chunked=size["chunked"])
    assert decoded.shape == expected.shape == video.shape and (decoded - expected).abs().max() <= 1e-5
    assert 0.02 < expected.std() and expected.abs().lt(1).float().mean() > 0.3


@pytest.mark.parametrize("version", ["2.1", "2.2"])
def test_gradients_of_every_weight_equal_diffusers(version):
    torch.manual_seed(0)
    theirs = oracle(version)
    ours, s = ours_of(theirs), stride(version)
    video, z = torch.rand(1, 3, 5, s, 2 * s) * 2 - 1, torch.randn(1, 3, 2, 1, 2)
    ours.encode(video).square().mean().backward()
    ours.decode(z).square().mean().backward()
    encode(theirs, video).square().mean().backward()
    decode(theirs, z).square().mean().backward()
    found = weights.rename(
        {name: p.grad for name, p in ours.named_parameters()}, "vae", "diffusers", ours.config
    )
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        size = expected[name].abs().max()
        assert size > 0 and (grad - expected[name]).abs().max() <= 1e-4 * size, name


def bfloat16_errors(version, seeds=range(2)):
    """Root mean square distance of both bfloat16 runs from the float32 oracle: of the latent, the video."""
    off = {side: {"latent": [], "video": []} for side in ("ours", "theirs")}
    for seed in seeds:
        torch.manual_seed(seed)
        theirs, s = oracle(version, z=4), stride(version)
        for p in theirs.parameters():
            p.data = p.data.bfloat16().float()
        video, z = (
            (torch.rand(1, 3, 5, 2 * s, 2 * s) * 2 - 1).bfloat16(),
            torch.randn(1, 4, 2, 2, 2).bfloat16(),
        )
        with torch.no_grad():
            latent, decoded = encode(theirs, video.float()), decode(theirs, z.float())
            ours, half = ours_of(theirs).to(torch.bfloat16), theirs.to(torch.bfloat16)
            off["ours"]["latent"].append(ours.encode(video).float() - latent)
            off["ours"]["video"].append(ours.decode(z).float() - decoded)
            off["theirs"]["latent"].append(encode(half, video).float() - latent)
            off["theirs"]["video"].append(decode(half, z).float() - decoded)
    return {
        side: {what: torch.cat(e).square().mean().sqrt().item() for what, e in errors.items()}
        for side, errors in off.items()
    }


@pytest.mark.parametrize("version", ["2.1", "2.2"])
def test_bfloat16_is_as_exact_as_diffusers(version):
    errors = bfloat16_errors(version)
    for what in ("latent", "video"):
        print(f"\nVAE {version} {what}: ours {errors['ours'][what]:.4f}, theirs {errors['theirs'][what]:.4f}")
        assert errors["theirs"][what] > 1e-4
        assert errors["ours"][what] <= errors["theirs"][what] * 1.25
