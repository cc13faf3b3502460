"""Do the name tables say what they should of single names, and do their forms turn tensors without loss?"""

import pytest
import torch
from moddiff.keymaps import Counterpart, counterparts, ignored

from moddiff import configs

DIT = configs.read(
    "dit", dict(model_type="t2v", in_dim=4, dim=16, ffn_dim=24, out_dim=4, num_heads=2, num_layers=2)
)
VAE21 = configs.read("vae", dict(dim=4, z_dim=16, num_res_blocks=2))
VAE22 = configs.read("vae", dict(dim=4, dec_dim=4, z_dim=48, num_res_blocks=2))


def there(kind, config, name, style):
    return counterparts(kind, config, [name], style)[name].names


@pytest.mark.parametrize(
    "ours, official, diffusers",
    [
        ("blocks.7.norm_cross.bias", "blocks.7.norm3.bias", "blocks.7.norm2.bias"),
        (
            "blocks.12.cross_attn.image_norm_k.weight",
            "blocks.12.cross_attn.norm_k_img.weight",
            "blocks.12.attn2.norm_added_k.weight",
        ),
        ("vace_blocks.0.before.weight", "vace_blocks.0.before_proj.weight", "vace_blocks.0.proj_in.weight"),
        ("final.modulation", "head.modulation", "scale_shift_table"),
        ("blocks.3.modulation", "blocks.3.modulation", "blocks.3.scale_shift_table"),
    ],
)
def test_dit_names(ours, official, diffusers):
    assert there("dit", DIT, ours, "official") == (official,) and there("dit", DIT, ours, "diffusers") == (
        diffusers,
    )


@pytest.mark.parametrize(
    "config, ours, diffusers",
    [
        (VAE21, "decoder.upsamples.5.residual.2.weight", "decoder.up_blocks.1.resnets.1.conv1.weight"),
        (VAE21, "decoder.upsamples.7.time_conv.bias", "decoder.up_blocks.1.upsamplers.0.time_conv.bias"),
        (VAE21, "encoder.downsamples.5.resample.1.weight", "encoder.down_blocks.5.resample.1.weight"),
        (VAE21, "encoder.middle.1.norm.gamma", "encoder.mid_block.attentions.0.norm.gamma"),
        (
            VAE22,
            "encoder.downsamples.1.downsamples.2.time_conv.weight",
            "encoder.down_blocks.1.downsampler.time_conv.weight",
        ),
        (
            VAE22,
            "decoder.upsamples.2.upsamples.0.shortcut.weight",
            "decoder.up_blocks.2.resnets.0.conv_shortcut.weight",
        ),
    ],
)
def test_vae_names(config, ours, diffusers):
    assert there("vae", config, ours, "official") == (ours,) and there("vae", config, ours, "diffusers") == (
        diffusers,
    )


@pytest.mark.parametrize(
    "place, shape",
    [
        (Counterpart(("a",)), (2, 3)),
        (Counterpart(("q", "k", "v"), "stacked"), (6, 4)),
        (Counterpart(("a",), "transposed"), (3, 5)),
        (Counterpart(("a",), "without 2"), (1, 1, 5)),
        (Counterpart(("a",), "without 1"), (1, 4, 5)),
        (Counterpart(("a", "b"), "tied"), (4, 2)),
    ],
)
def test_writing_then_reading_gives_the_tensor_back(place, shape):
    x = torch.randn(shape)
    written = place.theirs(x)
    assert tuple(written) == place.names and torch.equal(place.ours(written), x)
    assert all(value.is_contiguous() for value in written.values())


def test_a_name_that_no_row_covers_is_an_error():
    with pytest.raises(KeyError, match="no row of the dit name table covers blocks.0.extra.weight"):
        counterparts("dit", DIT, ["blocks.0.extra.weight"], "official")


def test_only_what_a_rule_names_is_ignored():
    assert ignored("image", "textual.head.0.weight") and ignored("image", "log_scale")
    assert ignored("dit", "blocks.0.attn2.norm_added_q.weight") == "an unused norm in early Diffusers exports"
    assert (
        ignored("dit", "textual.head.0.weight") is None
        and ignored("dit", "blocks.0.attn2.norm_added_k.weight") is None
    )
