"""Is one file, as ComfyUI has it, the same model here as for Diffusers' from_single_file?

Diffusers is given a config and nothing from a network. Here the shapes of the file have to say the sizes.
Two things it cannot read: the positions of both pictures in a flf2v model, a vae of Wan 2.2.
"""

import gguf
import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    GGUFQuantizationConfig,
    WanTransformer3DModel,
    WanVACETransformer3DModel,
)
from diffusers.quantizers.gguf.utils import GGUFParameter
from safetensors.torch import save_file

from moddiff import weights
from moddiff.storage import Blocks

PREFIX = "model.diffusion_model."
TEXT_LEN, CLIP_TOKENS = 512, 257
# kind -> (channels in, channels out); "i2v22" is Wan 2.2's image-to-video, which has no image tokens
KINDS = {
    "t2v": (16, 16),
    "i2v": (36, 16),
    "i2v22": (36, 16),
    "flf2v": (36, 16),
    "ti2v": (48, 48),
    "vace": (16, 16),
}


def transformer(kind):
    """Diffusers' model with random weights, none of them zero or one, in heads as wide as Wan's."""
    torch.manual_seed(0)
    reads, writes = KINDS[kind]
    more = {}
    if kind in ("i2v", "flf2v"):
        tokens = 2 * CLIP_TOKENS if kind == "flf2v" else None
        more = dict(image_dim=24, added_kv_proj_dim=256, pos_embed_seq_len=tokens)
    if kind == "vace":
        more = dict(vace_layers=[0, 2], vace_in_channels=20)
    model = (WanVACETransformer3DModel if kind == "vace" else WanTransformer3DModel)(
        num_attention_heads=2,
        attention_head_dim=128,
        in_channels=reads,
        out_channels=writes,
        text_dim=32,
        freq_dim=32,
        ffn_dim=96,
        num_layers=3,
        **more,
    ).eval()
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return model


def official(model, kind="dit"):
    """The weights under Wan's own names."""
    ours = weights.build(kind, dict(model.config), dict(model.state_dict()))
    state = weights.rename(ours.state_dict(), kind, "official", ours.config)
    return {name: x.contiguous().clone() for name, x in state.items()}


def for_diffusers(state):
    """The same state, one tensor under Diffusers' name: its reading of single files leaves that one out."""
    return {name.replace("img_emb.emb_pos", "condition_embedder.image_embedder.pos_embed"): x
            for name, x in state.items()}  # fmt: skip


def from_single_file(model, path, **options):
    """Diffusers' own reading of a file."""
    folder = path.parent / "for_diffusers"
    model.save_config(folder)
    return type(model).from_single_file(str(path), config=str(folder), local_files_only=True, **options)


def inputs(kind):
    """For both: x, t, texts of odd lengths, image features, y, control."""
    torch.manual_seed(1)
    reads, writes = KINDS[kind]
    cells = (3, 4, 6)
    pictures = {"i2v": 2, "flf2v": 4}.get(kind)
    return dict(
        x=torch.randn(2, writes, *cells),
        t=torch.tensor([925.0, 318.0])[:, None].expand(2, 18)
        if kind == "ti2v"
        else torch.tensor([925.0, 318.0]),
        text=[torch.randn(7, 32), torch.randn(23, 32)],
        image=torch.randn(pictures, CLIP_TOKENS, 24) if pictures else None,
        y=torch.randn(2, reads - writes, *cells) if reads > writes else None,
        control=torch.randn(2, 20, *cells) if kind == "vace" else None,
    )


def velocity(model, x, t, text, image, y, control):
    """Diffusers wants all its padding written out and x and y joined."""
    more = {} if control is None else dict(control_hidden_states=control)
    return model(
        hidden_states=x if y is None else torch.cat([x, y], 1),
        timestep=t,
        encoder_hidden_states=torch.stack(
            [torch.nn.functional.pad(rows, (0, 0, 0, TEXT_LEN - len(rows))) for rows in text]
        ),
        encoder_hidden_states_image=image,
        return_dict=False,
        **more,
    )[0]


def error(found, expected):
    """The largest difference, as a part of the largest value."""
    assert found.shape == expected.shape and expected.std() > 0.05
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("prefix", [PREFIX, ""])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_dit_in_one_file_is_read_as_diffusers_reads_it(kind, prefix, tmp_path):
    model, mine, its = transformer(kind), tmp_path / "dit.safetensors", tmp_path / "its.safetensors"
    state = {prefix + name: x for name, x in official(model).items()}
    save_file(state, mine), save_file(for_diffusers(state), its)
    theirs, given = from_single_file(model, its), inputs(kind)
    expected = velocity(theirs, **given)
    assert error(expected, velocity(model, **given)) < 1e-6  # Diffusers reads what was written
    assert error(weights.load_component(mine, "dit")(**given), expected) < 1e-4


def write_gguf(path, state):
    """Matrices of the blocks in 8 bits, all else in 32, as those who quantize Wan write it.

    Diffusers rounds a code times its scale to float16. With a scale of 1/512 for all that is exact.
    """
    writer, q8_0 = gguf.GGUFWriter(str(path), "wan"), gguf.GGMLQuantizationType.Q8_0
    for name, x in state.items():
        if "blocks." in name and name.endswith(".weight") and x.ndim == 2:
            rows = x.clamp(-127 / 512, 127 / 512).view(-1, 32)
            rows[:, 0] = rows[:, 0].sign() * 127 / 512
            codes = gguf.quants.quantize(rows.view(x.shape).numpy(), q8_0)
            writer.add_tensor(name, codes, raw_dtype=q8_0)
        else:
            writer.add_tensor(name, x.numpy())
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("prefix", [PREFIX, ""])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_gguf_of_8_bits_is_read_as_diffusers_reads_it(kind, prefix, tmp_path):
    model, mine, its = transformer(kind), tmp_path / "dit.gguf", tmp_path / "its.gguf"
    state = {prefix + name: x for name, x in official(model).items()}
    write_gguf(mine, state), write_gguf(its, for_diffusers(state))
    wide = GGUFQuantizationConfig(compute_dtype=torch.float32)
    theirs, given = from_single_file(model, its, quantization_config=wide), inputs(kind)
    assert isinstance(theirs.blocks[1].ffn.net[2].weight, GGUFParameter)
    expected = velocity(theirs, **given)
    kept = weights.load_component(mine, "dit").float()
    assert isinstance(kept.blocks[1].ffn[0].weight, Blocks)
    assert error(kept(**given), expected) < 1e-4
    assert error(weights.load_component(mine, "dit", dtype="fp32")(**given), expected) < 1e-4


def autoencoder(version):
    """Diffusers' autoencoder, narrow, with random weights."""
    torch.manual_seed(0)
    more = {}
    if version == "2.2":
        more = dict(
            decoder_base_dim=8,
            is_residual=True,
            in_channels=12,
            out_channels=12,
            patch_size=2,
            scale_factor_spatial=16,
            latents_mean=[0.0] * 48,
            latents_std=[1.0] * 48,
        )
    model = AutoencoderKLWan(base_dim=4, z_dim=48 if version == "2.2" else 16, **more).eval()
    for name, p in model.named_parameters():
        p.data += 0.1 * torch.randn_like(p)
        if "conv" in name and p.ndim > 3:
            p.data *= 1.5  # so that the signal does not die on its way
    return model


@pytest.mark.parametrize("version, ending", [("2.1", "safetensors"), ("2.1", "pth"), ("2.2", "safetensors")])
@torch.no_grad()
def test_a_vae_in_one_file_is_read_as_diffusers_reads_it(version, ending, tmp_path):
    model, path = autoencoder(version), tmp_path / f"vae.{ending}"
    (torch.save if ending == "pth" else save_file)(official(model, "vae"), path)
    ours = weights.load_component(path, "vae")
    # Of Wan 2.2 the oracle is the model that wrote the file.
    theirs = from_single_file(model, path) if version == "2.1" else model
    video = torch.rand(1, 3, 5, 32, 48) * 2 - 1
    mean, std = (torch.tensor(x).view(1, -1, 1, 1, 1) for x in (ours.config.mean, ours.config.std))
    latent = theirs.encode(video).latent_dist.mode()
    assert error(ours.encode(video), (latent - mean) / std) < 1e-4
    z = torch.randn_like(latent)
    assert error(ours.decode(z), theirs.decode(z * std + mean).sample) < 1e-4
