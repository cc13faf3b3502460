"""Is what is not a model of ours called by its name: pages, adapters, quantized weights, cousins?"""

import pytest
import torch

from moddiff import configs
from moddiff.weights import WeightsError, build
from moddiff.weights.foreign import adapter, cousin_by_names, not_weights, quantized

DIT = dict(
    model_type="t2v",
    in_dim=4,
    dim=16,
    ffn_dim=24,
    freq_dim=8,
    text_dim=12,
    out_dim=4,
    num_heads=2,
    num_layers=2,
)


@pytest.mark.parametrize(
    "head, words",
    [
        (b"", "is empty"),
        (b"\0" * 512, "begins with zeros"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS pointer"),
        (b"\n<!DOCTYPE html><html>", "web page"),
        (b"<?xml version='1.0'?><Error>", "web page"),
        (b"\x1f\x8b\x08\0", "gzip"),
        (b"\x93NUMPY\x01\0", "NumPy"),
        (b'{"error": "not found"}', "is text, not weights"),
    ],
)
def test_the_first_bytes_say_what_is_no_file_of_weights(head, words):
    assert words in not_weights(head)


@pytest.mark.parametrize("head", [b"GGUF\3\0\0\0", b"PK\3\4\0\0", b"\x80\x02}q\0", b"\x10\0\0\0\0\0\0\0{}"])
def test_what_may_be_weights_passes(head):
    assert not_weights(head) is None


STEM = "blocks.0.self_attn.q"
ADAPTERS = {
    "lora_unet_blocks_0_self_attn_q": (".lora_down.weight", ".lora_up.weight", ".alpha"),
    "lora_unet__blocks_0_self_attn_q": (".lora_down.weight", ".lora_up.weight", ".alpha"),
    f"diffusion_model.{STEM}": (".lora_A.weight", ".lora_B.weight"),
    f"diffusion_model.{STEM}.": ("lora_down.weight", "lora_up.weight", "diff_b"),
    "transformer.blocks.0.attn1.to_q": (".lora_A.weight", ".lora_B.weight"),
    f"base_model.model.{STEM}": (".lora_A.default.weight", ".lora_B.default.weight"),
    f"pipe.dit.{STEM}": (".lora_A.default.weight", ".lora_B.default.weight"),
    STEM: (".lora_A", ".lora_B"),
    f"{STEM}_lora": (".up.weight", ".down.weight"),
    f"{STEM}.": ("lora.up.weight", "lora.down.weight"),
}


@pytest.mark.parametrize("stem", ADAPTERS)
def test_a_lora_is_named_whoever_trained_it(stem):
    with pytest.raises(
        WeightsError, match="tensors are a LoRA.*: a change to a model, not a model. Load the"
    ):
        build("dit", DIT, {stem + end: torch.ones(2, 2) for end in ADAPTERS[stem]})


@pytest.mark.parametrize(
    "ends, what",
    [
        (("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "alpha"), "a LoHa"),
        (("lokr_w1", "lokr_w2", "alpha"), "a LoKr"),
        (("lora_A.weight", "lora_B.weight", "dora_scale"), "a DoRA"),
        (("diff", "diff_b"), "a set of weight differences"),
    ],
)
def test_other_adapters_are_told_apart(ends, what):
    assert (
        adapter([f"lycoris_blocks_0_ffn_0.{end}" for end in ends])
        == f"{what} with names as LyCORIS spells them"
    )


def test_a_model_is_no_adapter():
    assert adapter(build("dit", DIT).state_dict()) is None


@pytest.mark.parametrize(
    "name, words",
    [
        ("ref_conv.weight", "Wan-Fun control"),
        ("control_adapter.conv.weight", "Wan-Fun camera"),
        ("casual_audio_encoder.encoder.final_linear.weight", "Wan S2V"),
        ("face_adapter.fuser_blocks.0.k_norm.weight", "Wan Animate"),
        ("audio_proj.audio_proj_glob_1.layer.bias", "HuMo"),
    ],
)
def test_a_cousin_is_refused_by_its_tensors(name, words):
    state = build("dit", DIT).state_dict()
    for prefix in ("", "model.diffusion_model."):
        cousin = {prefix + each: x for each, x in (state | {name: torch.ones(1)}).items()}
        with pytest.raises(WeightsError, match=f"those of .*{words}.*not among the models here"):
            build("dit", DIT, cousin)
    assert cousin_by_names(state) is None


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            dict(model_type="i2v", in_dim=8),
            "an i2v model reads 12 channels: .*Wan-Fun control and camera models",
        ),
        (dict(model_type="ti2v", in_dim=100, out_dim=48), "Wan-Fun models read more"),
        (dict(add_ref_conv=True), "Wan-Fun control"),
        (dict(add_control_adapter=True), "Wan-Fun camera"),
        (dict(model_type="s2v"), "Wan S2V"),
        (dict(_class_name="WanAnimateTransformer3DModel"), "Wan Animate"),
        (dict(_class_name="SkyReelsV2Transformer3DModel"), "SkyReels"),
    ],
)
def test_a_cousin_is_refused_by_its_config(changes, words):
    with pytest.raises(ValueError, match=words) as error:
        configs.read("dit", DIT | changes)
    assert "Remove or rename it" not in str(error.value) and "meant?" not in str(error.value)


@pytest.mark.parametrize(
    "name",
    [
        "a.scale_weight",
        "a.weight_scale",
        "scaled_fp8",
        "a.comfy_quant",
        "a.weight.absmax",
        "a.qweight",
        "a.SCB",
    ],
)
def test_scales_and_tables_mark_quantized_weights(name):
    assert quantized(["a.weight", name]) == [name]


def test_our_own_names_do_not_look_quantized():
    for style in ("dit", "text", "image", "vae"):
        sizes = {
            "dit": DIT,
            "text": dict(vocab=20, dim=8, dim_attn=8, dim_ffn=12, num_heads=2, num_layers=2),
            "image": dict(
                image_size=8, patch_size=4, dim=8, mlp_ratio=2, out_dim=6, num_heads=2, num_layers=2
            ),
            "vae": dict(dim=4, z_dim=16),
        }[style]
        names = list(configs.empty(style, sizes).state_dict())
        assert quantized(names) == [] and adapter(names) is None
