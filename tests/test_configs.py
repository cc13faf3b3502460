"""Are configs in every dialect understood, and is a field that is unknown, absent or contradictory named?"""

import dataclasses
import time

import pytest
from moddiff.configs import read

from moddiff import configs, releases

DIT = dict(model_type="t2v", in_dim=16, dim=64, ffn_dim=96, out_dim=16, num_heads=2, num_layers=2)
OFFICIAL = {
    "_class_name": "WanModel",
    "_diffusers_version": "0.33.0",
    "dim": 1536,
    "eps": 1e-06,
    "ffn_dim": 8960,
    "freq_dim": 256,
    "in_dim": 16,
    "model_type": "t2v",
    "num_heads": 12,
    "num_layers": 30,
    "out_dim": 16,
    "text_len": 512,
}
DIFFUSERS = {
    "_class_name": "WanTransformer3DModel",
    "_diffusers_version": "0.35.0",
    "added_kv_proj_dim": None,
    "attention_head_dim": 128,
    "cross_attn_norm": True,
    "eps": 1e-06,
    "ffn_dim": 8960,
    "freq_dim": 256,
    "image_dim": None,
    "in_channels": 16,
    "num_attention_heads": 12,
    "num_layers": 30,
    "out_channels": 16,
    "patch_size": [1, 2, 2],
    "pos_embed_seq_len": None,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 1024,
    "text_dim": 4096,
}
UMT5 = {
    "architectures": ["UMT5EncoderModel"],
    "d_ff": 10240,
    "d_kv": 64,
    "d_model": 4096,
    "dropout_rate": 0.1,
    "feed_forward_proj": "gated-gelu",
    "is_gated_act": True,
    "layer_norm_epsilon": 1e-06,
    "model_type": "umt5",
    "num_heads": 64,
    "num_layers": 24,
    "relative_attention_max_distance": 128,
    "relative_attention_num_buckets": 32,
    "torch_dtype": "float32",
    "vocab_size": 256384,
}
CLIP = {
    "architectures": ["CLIPVisionModel"],
    "hidden_act": "gelu",
    "hidden_size": 1280,
    "image_size": 224,
    "intermediate_size": 5120,
    "layer_norm_eps": 1e-05,
    "model_type": "clip_vision_model",
    "num_attention_heads": 16,
    "num_channels": 3,
    "num_hidden_layers": 32,
    "patch_size": 14,
    "projection_dim": 1024,
}
VAE21 = {
    "_class_name": "AutoencoderKLWan",
    "attn_scales": [],
    "base_dim": 96,
    "dim_mult": [1, 2, 4, 4],
    "dropout": 0.0,
    "num_res_blocks": 2,
    "temperal_downsample": [False, True, True],
    "z_dim": 16,
}
VAE22 = {
    "_class_name": "AutoencoderKLWan",
    "base_dim": 160,
    "decoder_base_dim": 256,
    "dim_mult": [1, 2, 4, 4],
    "in_channels": 12,
    "is_residual": True,
    "num_res_blocks": 2,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    "scale_factor_temporal": 4,
    "temperal_downsample": [False, True, True],
    "z_dim": 48,
}


def refused(kind, raw):
    with pytest.raises(ValueError) as error:
        read(kind, raw)
    return str(error.value)


@pytest.mark.parametrize(
    "kind, raw, name",
    [
        ("dit", OFFICIAL, "wan2.1-t2v-1.3b"),
        ("dit", DIFFUSERS, "wan2.1-t2v-1.3b"),
        ("text", UMT5, "wan2.1-t2v-1.3b"),
        ("vae", VAE21, "wan2.1-t2v-1.3b"),
        ("image", CLIP, "wan2.1-i2v-14b-480p"),
        ("image", {"vision_config": CLIP, "text_config": {}}, "wan2.1-i2v-14b-480p"),
        ("vae", VAE22, "wan2.2-ti2v-5b"),
    ],
)
def test_a_released_config_json_says_what_the_preset_says(kind, raw, name):
    assert read(kind, raw) == read(kind, releases.preset(name)[kind])


@pytest.mark.parametrize(
    "name",
    [
        "wan2.1-i2v-14b-480p",
        "wan2.1-flf2v-14b-720p",
        "wan2.1-vace-14b",
        "wan2.2-t2v-a14b",
        "wan2.2-i2v-a14b",
        "wan2.2-ti2v-5b",
    ],
)
def test_the_diffusers_form_of_every_transformer_is_recognised(name):
    ours = read("dit", releases.preset(name)["dit"])
    clip = ours.image_dim is not None
    raw = DIFFUSERS | {
        "num_attention_heads": ours.num_heads,
        "ffn_dim": ours.ffn_dim,
        "num_layers": ours.num_layers,
        "in_channels": ours.in_dim,
        "out_channels": ours.out_dim,
        "image_dim": ours.image_dim,
        "added_kv_proj_dim": ours.dim if clip else None,
        "pos_embed_seq_len": 514 if ours.model_type == "flf2v" else None,
    }
    raw |= {"vace_layers": list(ours.vace_layers), "vace_in_channels": 96} if ours.vace_layers else {}
    assert read("dit", raw) == ours


def test_a_config_dataclass_and_its_fields_are_read_as_they_are():
    for kind, raw in (("dit", OFFICIAL), ("text", UMT5), ("image", CLIP), ("vae", VAE22)):
        config = read(kind, raw)
        assert read(kind, config) is config
        assert read(kind, dataclasses.asdict(config)) == config


def test_the_fields_that_all_wan_models_share_may_be_left_out():
    config = read("dit", DIT)
    assert (config.patch_size, config.text_len, config.text_dim, config.freq_dim, config.eps) == (
        (1, 2, 2),
        512,
        4096,
        256,
        1e-6,
    )
    assert config.qk_norm and config.cross_attn_norm and config.image_dim is None
    assert read("dit", DIT | dict(window_size=[-1, -1])) == config


def test_a_vace_config_without_layers_has_every_second_one():
    assert read("dit", DIT | dict(model_type="vace", num_layers=5)).vace_layers == (0, 2, 4)


def test_the_names_of_the_weights_settle_whether_an_i2v_model_reads_clip():
    i2v = DIT | dict(model_type="i2v", in_dim=36)
    assert read("dit", i2v).image_dim == 1280
    assert read("dit", i2v, ["blocks.0.modulation", "img_emb.proj.0.weight"]).image_dim == 1280
    assert read("dit", i2v, ["blocks.0.modulation"]).image_dim is None
    assert read("dit", i2v | dict(image_dim=40)).image_dim == 40


@pytest.mark.parametrize(
    "kind, raw, words",
    [
        ("dit", DIT | dict(num_head=2), "unknown field: 'num_head' (did you mean 'num_heads'?)"),
        ("dit", DIFFUSERS | dict(tea_cache=True), "unknown field: 'tea_cache'"),
        ("text", dict(vocab=9, dim=8, depth=2), "unknown field: 'depth'"),
        ("text", UMT5 | dict(relative_bias=1), "unknown field: 'relative_bias'"),
        ("vae", dict(dim=8, z_dim=16, tiling=True), "unknown field: 'tiling'"),
        (
            "dit",
            {name: value for name, value in DIT.items() if name != "ffn_dim"},
            "the dit config lacks ffn_dim; it has",
        ),
        ("dit", {}, "lacks model_type, in_dim, dim, ffn_dim"),
        ("text", dict(vocab=9), "the text config lacks dim, dim_attn, dim_ffn, num_heads, num_layers"),
        (
            "dit",
            {name: value for name, value in DIFFUSERS.items() if name != "attention_head_dim"},
            "lacks attention_head_dim",
        ),
        (
            "image",
            {name: value for name, value in CLIP.items() if name != "intermediate_size"},
            "lacks intermediate_size",
        ),
        ("dit", DIT | dict(num_layers=0), "num_layers = 0; expected a whole number from 1 to 256"),
        (
            "dit",
            DIT | dict(model_type="video"),
            "model_type = 'video'; expected t2v, i2v, flf2v, ti2v or vace",
        ),
        ("dit", DIT | dict(dim=66, num_heads=4), "dim 66 over 4 heads"),
        (
            "dit",
            DIT | dict(in_dim=36),
            "reads what it writes, but in_dim = 36 and out_dim = 16. Was model_type = 'i2v' meant?",
        ),
        (
            "dit",
            DIT | dict(model_type="i2v"),
            "in_dim = 16; an i2v model reads 36 channels: 16 of noise, 4 of mask, 16 of the encoded picture",
        ),
        ("dit", DIT | dict(vace_layers=[0]), "vace_layers belong to model_type = 'vace', but it says 't2v'"),
        ("dit", DIT | dict(model_type="vace", vace_layers=[0, 9]), "names a block outside 0..1"),
        ("dit", DIT | dict(model_type="vace", vace_layers=[1, 0]), "layers that rise, each block named once"),
        ("dit", DIT | dict(window_size=[8, 8]), "every Wan model attends globally"),
        ("dit", DIT | dict(freq_dim=31), "freq_dim = 31; expected an even number"),
        (
            "dit",
            DIFFUSERS | dict(qk_norm="layer_norm"),
            "qk_norm = 'layer_norm'; expected 'rms_norm_across_heads'",
        ),
        (
            "dit",
            DIFFUSERS | dict(image_dim=1280),
            "image_dim = 1280 but added_kv_proj_dim = None; a model has both",
        ),
        ("text", UMT5 | dict(model_type="t5"), "plain T5 shares one relative bias"),
        ("text", UMT5 | dict(feed_forward_proj="relu"), "feed_forward_proj = 'relu'; expected 'gated-gelu'"),
        (
            "text",
            dict(vocab=9, dim=8, dim_attn=9, dim_ffn=8, num_heads=2, num_layers=1),
            "dim_attn=9 cannot be split into num_heads=2",
        ),
        (
            "image",
            CLIP | dict(hidden_act="quick_gelu"),
            "activation='quick_gelu' is another kind of CLIP tower",
        ),
        ("image", CLIP | dict(patch_size=15), "cannot be cut into patches"),
        ("vae", VAE21 | dict(decoder_base_dim=256), "decoder_base_dim = 256 differs from base_dim = 96"),
        ("vae", VAE22 | dict(in_channels=3), "in_channels = 3; expected 12"),
        ("vae", VAE22 | dict(scale_factor_spatial=8), "scale_factor_spatial = 8; expected 16"),
        ("vae", dict(dim=8, z_dim=4), "no published latent mean and std for z_dim 4"),
        (
            "vae",
            dict(dim=8, z_dim=4, mean=[0, 0], std=[1, 1]),
            "mean has 2 and std 2 entries; expected z_dim = 4",
        ),
        ("vae", VAE21 | dict(temperal_downsample=[True]), "temperal_downsample has 1 entries for 4 stages"),
    ],
)
def test_a_config_that_cannot_be_right_is_refused_in_words(kind, raw, words):
    assert words in refused(kind, raw)


def test_a_config_that_is_no_dictionary_is_refused():
    with pytest.raises(TypeError, match="the dit config is a str; expected a dict"):
        read("dit", "config.json")


def test_an_empty_module_has_every_shape_and_no_memory():
    module = configs.empty("dit", releases.preset("wan2.1-vace-14b")["dit"])
    assert all(p.is_meta for p in module.parameters()) and not module.training
    assert sum(p.numel() for p in module.parameters()) == 17_337_592_896


@pytest.mark.parametrize(
    "kind, field, value",
    [
        ("dit", "dim", "16"),
        ("dit", "in_dim", [1]),
        ("dit", "freq_dim", None),
        ("dit", "num_layers", 2.0),
        ("dit", "num_layers", 10**9),
        ("dit", "num_layers", True),
        ("dit", "patch_size", 2),
        ("dit", "patch_size", [1, 2]),
        ("dit", "patch_size", [10**6] * 3),
        ("dit", "patch_size", [1, 2, "2"]),
        ("dit", "eps", "1e-6"),
        ("dit", "eps", -1.0),
        ("dit", "text_len", float("nan")),
        ("dit", "qk_norm", 1),
        ("dit", "window_size", 5),
        ("dit", "dim", 2**31),
        ("dit", "ffn_dim", 10**30),
        ("dit", "image_dim", "1280"),
        ("dit", "model_type", 3),
        ("dit", "model_type", "a" * 10**6),
        ("text", "num_heads", {}),
        ("text", "shared_pos", "no"),
        ("vae", "dim_mult", 4),
        ("vae", "dim_mult", [1, 2, 4, 10**12]),
        ("vae", "temperal_downsample", [0, 1, 1]),
        ("vae", "mean", [float("nan")] * 16),
        ("vae", "std", ["x"] * 16),
        ("vae", "std", [float("inf")] * 16),
        ("image", "mlp_ratio", "4"),
    ],
    ids=str,
)
def test_a_value_of_another_type_or_size_is_named_with_what_is_expected(kind, field, value):
    base = {"dit": DIT, "text": releases.preset("wan2.1-t2v-1.3b")["text"], "vae": dict(dim=4, z_dim=16)}
    base["image"] = releases.preset("wan2.1-i2v-14b-480p")["image"]
    said = refused(kind, base[kind] | {field: value})
    assert said.startswith(f"the {kind} config says {field} = ") and "expected" in said and len(said) < 300


@pytest.mark.parametrize(
    "kind, raw",
    [
        ("dit", DIFFUSERS | dict(attention_head_dim="128")),
        ("dit", DIFFUSERS | dict(num_attention_heads=None)),
        ("text", UMT5 | dict(d_kv=[64])),
        ("text", UMT5 | dict(d_model="4096")),
        ("image", CLIP | dict(intermediate_size="5120")),
        ("image", CLIP | dict(hidden_size=0)),
        ("vae", VAE22 | dict(base_dim=None)),
        ("vae", VAE22 | dict(is_residual="yes")),
        ("vae", VAE22 | dict(temperal_downsample=3)),
        ("vae", VAE22 | dict(dim_mult={})),
    ],
    ids=range(10),
)
def test_values_of_the_other_dialects_are_checked_before_anything_is_derived_from_them(kind, raw):
    assert f"the {kind} config says " in refused(kind, raw)


def test_a_config_of_quantized_weights_says_so_and_not_to_remove_the_field():
    packing = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    for kind, raw in (("dit", DIFFUSERS), ("text", UMT5), ("dit", OFFICIAL)):
        said = refused(kind, raw | dict(quantization_config=packing))
        assert "quantized weights (bitsandbytes)" in said and "take the bf16" in said and "Remove" not in said


def test_a_huge_field_name_is_answered_at_once_and_in_short():
    started = time.perf_counter()
    assert len(refused("dit", DIT | {"a" * 20_000_000: 1, 5: 2})) < 600
    assert time.perf_counter() - started < 2


def test_a_model_without_an_image_path_has_no_width_for_it():
    assert "image_dim = 1280; expected None: a t2v model reads no CLIP" in refused(
        "dit", DIT | dict(image_dim=1280)
    )


def test_the_largest_values_that_pass_still_have_a_shape():
    dit = DIT | dict(
        dim=2**20, ffn_dim=2**20, in_dim=2**20, out_dim=2**20, patch_size=[256] * 3, num_layers=1
    )
    assert configs.empty("dit", dit | dict(in_dim=64, out_dim=64)).patch_embedding.weight.numel() == 2**50
    with pytest.raises(ValueError, match="expected"):
        configs.empty("dit", dit | dict(dim=2**21))
    vae = configs.empty("vae", dict(dim=2**20, z_dim=16, dim_mult=[256] * 4, num_res_blocks=1))
    assert max(p.numel() for p in vae.parameters()) == 27 * 2**56
