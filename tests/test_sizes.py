"""Is every released model recognised, with every size, from the names and shapes of one file?"""

import gzip
import json
from pathlib import Path

import pytest
import torch

from moddiff import configs
from moddiff.weights import WeightsError, build, preset, rename
from moddiff.weights.sizes import sizes

KEYS = Path(__file__).parent / "keys"
FILES = {  # key list -> (kind, a preset that says its sizes)
    "wan2.1-t2v-1.3b": ("dit", "wan2.1-t2v-1.3b"),
    "wan2.1-t2v-14b": ("dit", "wan2.1-t2v-14b"),
    "wan2.1-i2v-14b": ("dit", "wan2.1-i2v-14b-480p"),
    "wan2.1-flf2v-14b": ("dit", "wan2.1-flf2v-14b-720p"),
    "wan2.1-vace-1.3b": ("dit", "wan2.1-vace-1.3b"),
    "wan2.1-vace-14b": ("dit", "wan2.1-vace-14b"),
    "wan2.2-t2v-a14b": ("dit", "wan2.2-t2v-a14b"),
    "wan2.2-i2v-a14b": ("dit", "wan2.2-i2v-a14b"),
    "wan2.2-ti2v-5b": ("dit", "wan2.2-ti2v-5b"),
    "umt5-xxl-encoder": ("text", "wan2.1-t2v-1.3b"),
    "clip-vit-h14": ("image", "wan2.1-i2v-14b-480p"),
    "vae2.1": ("vae", "wan2.1-t2v-1.3b"),
    "vae2.2": ("vae", "wan2.2-ti2v-5b"),
}
COMFY = {"dit": "model.diffusion_model.", "text": "", "image": "", "vae": ""}


def released(keys, style):
    """{name: meta tensor} of a released file"""
    shapes = json.loads(gzip.decompress((KEYS / f"{keys}.{style}.json.gz").read_bytes()))
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


@pytest.mark.parametrize("style", ["official", "diffusers"])
@pytest.mark.parametrize("keys", FILES)
def test_every_size_of_a_single_file_is_told_by_its_shapes(keys, style):
    kind, name = FILES[keys]
    state = {COMFY[kind] + key: x for key, x in released(keys, style).items()}
    wanted = configs.read(kind, preset(name)[kind], state)
    assert sizes(state) == (kind, wanted)
    # As a ComfyUI file of fp8: with scales beside the weights, a marker and the tokenizer.
    beside = {key.removesuffix("weight") + "scale_weight": torch.ones(()) for key in state if "ffn" in key}
    beside |= {COMFY[kind] + "scaled_fp8": torch.zeros(0), "spiece_model": torch.zeros(9)}
    assert sizes(state | (beside if kind in ("dit", "text") else {})) == (kind, wanted)


def test_the_whole_file_of_clip_is_known_by_its_vision_half():
    assert (
        sizes(released("clip-vit-h14", "official-full"))[1] == sizes(released("clip-vit-h14", "official"))[1]
    )


@pytest.mark.parametrize("naming", ["ours", "official", "diffusers"])
@pytest.mark.parametrize(
    "kind, config",
    [
        ("dit", dict(model_type="t2v", in_dim=4, dim=256, ffn_dim=384, freq_dim=32, text_dim=24, out_dim=4,
                     num_heads=2, num_layers=3)),
        ("text", dict(vocab=20, dim=8, dim_attn=12, dim_ffn=16, num_heads=2, num_layers=1)),
        ("image", dict(image_size=8, patch_size=4, dim=80, mlp_ratio=2, out_dim=6, num_heads=1,
                       num_layers=2)),
        ("vae", dict(dim=8, z_dim=16, num_res_blocks=1)),
        ("vae", dict(dim=8, z_dim=48, num_res_blocks=1, dec_dim=12)),
    ],
    ids=["dit", "text", "image", "vae2.1", "vae2.2"],
)  # fmt: skip
def test_models_of_other_sizes_are_known_too(kind, config, naming):
    state = rename(build(kind, config).state_dict(), kind, naming, config)
    assert sizes(state) == (kind, configs.read(kind, config, state))


DIT = dict(
    model_type="t2v", in_dim=4, dim=128, ffn_dim=24, freq_dim=8, text_dim=12, out_dim=4, num_heads=1,
    num_layers=1,
)  # fmt: skip


def dit_state(**changes):
    return rename(build("dit", DIT | changes).state_dict(), "dit", "official", DIT | changes)


@pytest.mark.parametrize(
    "extra, words",
    [
        ("control_adapter.conv.weight", "Wan-Fun camera"),
        ("casual_audio_encoder.encoder.final_linear.weight", "Wan S2V"),
        ("audio_proj.audio_proj_glob_1.layer.bias", "HuMo"),
        ("face_adapter.fuser_blocks.0.k_norm.weight", "Wan Animate"),
        ("ref_conv.weight", "Wan-Fun control"),
    ],
)
def test_relatives_are_refused_by_name(extra, words):
    with pytest.raises(WeightsError, match=f"those of .*{words}"):
        sizes(dit_state() | {extra: torch.ones(1)})


def test_a_control_model_without_marks_is_refused_by_its_channels():
    state = dit_state()
    state["patch_embedding.weight"] = torch.zeros(128, 12 - 4, 1, 2, 2)
    with pytest.raises(ValueError, match="reads 12 channels.*Wan-Fun control"):
        sizes(state)


@pytest.mark.parametrize("layers, step", [(1, 1), (3, 2), (5, 2), (7, 3), (8, 3), (6, 2)])
def test_the_hints_of_vace_come_at_equal_steps_also_when_the_last_is_short(layers, step):
    steps = list(range(0, layers, step))
    state = dit_state(num_layers=layers, model_type="vace", vace_layers=steps, vace_in_dim=8)
    assert list(sizes(state)[1].vace_layers) == steps


def test_what_no_shape_tells_is_said():
    unequal = dit_state(num_layers=5, model_type="vace", vace_layers=[0, 1, 2, 4], vace_in_dim=8)
    with pytest.raises(WeightsError, match="5 layers and 4 for VACE.*equal steps would make 3"):
        sizes(unequal)
    with pytest.raises(WeightsError, match="132 wide, and how many heads it has is in no shape"):
        sizes(dit_state(dim=132))
    t5 = rename(
        build("text", dict(vocab=9, dim=8, dim_attn=8, dim_ffn=8, num_heads=2, num_layers=2)).state_dict(),
        "text",
        "diffusers",
        dict(vocab=9, dim=8, dim_attn=8, dim_ffn=8, num_heads=2, num_layers=2),
    )
    del t5["encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"]
    with pytest.raises(WeightsError, match="a T5; Wan's is UMT5"):
        sizes(t5)
    with pytest.raises(WeightsError, match="none of the 1 names is one of Wan's; they begin with a.b"):
        sizes({"a.b": torch.ones(1)})
    with pytest.raises(WeightsError, match="are a LoRA.*adapted"):
        sizes({"diffusion_model.blocks.0.ffn.0.lora_A.weight": torch.ones(1)})
    with pytest.raises(WeightsError, match="text_mlp.0.weight is not there"):
        sizes({name: x for name, x in dit_state().items() if "text_emb" not in name})
