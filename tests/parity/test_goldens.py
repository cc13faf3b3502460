"""Do the official weights, under any name, give the numbers of the official code?  All by moddiff.build."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors import safe_open
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    UMT5Config,
    UMT5EncoderModel,
)

from moddiff import weights
from moddiff.image import preprocess

GOLDENS = Path(__file__).parents[1] / "goldens"
KIND = {
    "t5_encoder": "text",
    "clip_visual": "image",
    "dit_t2v": "dit",
    "dit_i2v": "dit",
    "dit_flf2v": "dit",
    "dit_ti2v": "dit",
    "vae2_1": "vae",
    "vae2_2": "vae",
}
BAR = {"text": 2e-5, "dit": 2e-5, "image": 1e-5, "vae": 1e-5}
NAMING = ["official", "diffusers", "ours", "comfy"]


def golden(name):
    """(config, official state, the other tensors)"""
    with safe_open(GOLDENS / f"{name}.safetensors", "pt") as file:
        tensors = {each: file.get_tensor(each) for each in file.keys()}
        config = json.loads(file.metadata()["config"])
    state = {each.removeprefix("weight."): x for each, x in tensors.items() if each.startswith("weight.")}
    return config, state, {each: x for each, x in tensors.items() if not each.startswith("weight.")}


def under(naming, kind, config, state):
    """The official state under other names."""
    if naming == "official":
        return state
    if naming == "comfy":
        prefix = {
            "dit": "model.diffusion_model.",
            "vae": "first_stage_model.",
            "text": "text_encoder.",
            "image": "visual.",
        }[kind]
        return {prefix + name: x for name, x in state.items()}
    return weights.rename(state, kind, naming, config)


def outputs(kind, module, seen):
    """[(what we compute, what the official code computed)]"""
    if kind == "text":
        ids, mask = seen["in.ids"], seen["in.mask"]
        return [(module(ids, mask) * mask[..., None], seen["out.hidden"] * mask[..., None])]
    if kind == "image":
        pictures = [seen[f"in.video{i}"].transpose(0, 1) for i in (0, 1)]  # each [1, 3, H, W]
        return [(torch.cat([module.encode(picture) for picture in pictures]), seen["out.features"])]
    if kind == "vae":
        return [
            (module.encode(seen["in.video"]), seen["out.mu_normalized"]),
            (module.decode(seen["in.z"]), seen["out.video"]),
            (module.encode(seen["in.video"], chunked=True), seen["out.mu_normalized"]),
            (module.decode(seen["in.z"], chunked=True), seen["out.video"]),
        ]
    text = [seen["in.context0"], seen["in.context1"]]
    return [
        (
            module(seen["in.x"], seen["in.t"], text, image=seen.get("in.clip_fea"), y=seen.get("in.y")),
            seen["out.v"],
        )
    ]


@pytest.mark.parametrize("naming", NAMING)
@pytest.mark.parametrize("name", KIND)
def test_golden_weights_give_golden_outputs_under_every_naming(name, naming):
    kind = KIND[name]
    config, state, seen = golden(name)
    module = weights.build(kind, config, under(naming, kind, config, state))
    with torch.inference_mode():
        for ours, official in outputs(kind, module, seen):
            assert ours.shape == official.shape
            off = (ours.float() - official).abs().max().item()
            print(f"{name}, {naming} names: at most {off:.1e} off")
            assert off <= BAR[kind]


@pytest.mark.parametrize("name", KIND)
def test_a_round_trip_through_every_naming_loses_nothing(name):
    kind = KIND[name]
    config, state, _ = golden(name)
    ours = weights.rename(state, kind, "ours", config)
    there = weights.rename(ours, kind, "diffusers", config)
    back = weights.rename(there, kind, "ours", config)
    official = weights.rename(back, kind, "official", config)
    prefix = "visual." if kind == "image" else ""
    assert ours.keys() == back.keys() and all(torch.equal(ours[each], back[each]) for each in ours)
    assert official.keys() == {prefix + each for each in state} and all(
        torch.equal(official[prefix + each], state[each]) for each in state
    )


# The same states, renamed by us, in the modules of other people, which read them strictly.


def diffusers_dit(config):
    image = config["model_type"] in ("i2v", "flf2v")
    return WanTransformer3DModel(
        patch_size=tuple(config["patch_size"]),
        num_attention_heads=config["num_heads"],
        attention_head_dim=config["dim"] // config["num_heads"],
        in_channels=config["in_dim"],
        out_channels=config["out_dim"],
        text_dim=config["text_dim"],
        freq_dim=config["freq_dim"],
        ffn_dim=config["ffn_dim"],
        num_layers=config["num_layers"],
        image_dim=config["image_dim"] if image else None,
        added_kv_proj_dim=config["dim"] if image else None,
        pos_embed_seq_len=514 if config["model_type"] == "flf2v" else None,
    )


def diffusers_vae(config):
    two = "dec_dim" in config
    return AutoencoderKLWan(
        base_dim=config["dim"],
        decoder_base_dim=config.get("dec_dim"),
        z_dim=config["z_dim"],
        dim_mult=config["dim_mult"],
        num_res_blocks=config["num_res_blocks"],
        temperal_downsample=config["temperal_downsample"],
        is_residual=two,
        latents_mean=[0.0] * config["z_dim"],
        latents_std=[1.0] * config["z_dim"],
        **(dict(in_channels=12, out_channels=12, patch_size=2, scale_factor_spatial=16) if two else {}),
    )


@pytest.mark.parametrize("name", ["dit_t2v", "dit_i2v", "dit_flf2v"])
def test_diffusers_reads_our_renamed_dit_and_agrees(name):
    config, state, seen = golden(name)
    theirs = diffusers_dit(config).eval()
    theirs.load_state_dict(weights.rename(state, "dit", "diffusers", config), strict=True)
    text = torch.stack(
        [
            torch.nn.functional.pad(seen[f"in.context{i}"], (0, 0, 0, 512 - len(seen[f"in.context{i}"])))
            for i in (0, 1)
        ]
    )
    x = torch.cat([seen["in.x"], seen["in.y"]], 1) if "in.y" in seen else seen["in.x"]
    with torch.inference_mode():
        v = theirs(
            x, seen["in.t"], text, encoder_hidden_states_image=seen.get("in.clip_fea"), return_dict=False
        )[0]
    assert (v - seen["out.v"]).abs().max().item() <= 5e-5  # its sinusoid is float32


@pytest.mark.parametrize("name", ["vae2_1", "vae2_2"])
def test_diffusers_reads_our_renamed_vae_and_agrees(name):
    config, state, seen = golden(name)
    theirs = diffusers_vae(config).eval()
    theirs.load_state_dict(weights.rename(state, "vae", "diffusers", config), strict=True)
    with torch.inference_mode():
        assert (
            theirs.encode(seen["in.video"]).latent_dist.parameters - seen["mid.moments"]
        ).abs().max().item() <= 1e-5


def test_transformers_reads_our_renamed_text_encoder_and_agrees():
    config, state, seen = golden("t5_encoder")
    theirs = UMT5EncoderModel(
        UMT5Config(
            vocab_size=96,
            d_model=48,
            d_kv=16,
            d_ff=80,
            num_layers=3,
            num_heads=4,
            feed_forward_proj="gated-gelu",
        )
    ).eval()
    theirs.load_state_dict(weights.rename(state, "text", "diffusers", config), strict=True)
    with torch.inference_mode():
        out = theirs(input_ids=seen["in.ids"], attention_mask=seen["in.mask"]).last_hidden_state
    assert ((out - seen["out.hidden"]) * seen["in.mask"][..., None]).abs().max().item() <= 2e-5


def test_transformers_reads_our_renamed_vision_tower_and_agrees():
    config, state, seen = golden("clip_visual")
    theirs = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=256,
            projection_dim=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=56,
            patch_size=14,
            hidden_act="gelu",
        )
    ).eval()
    theirs.load_state_dict(weights.rename(state, "image", "diffusers", config), strict=True)
    with torch.inference_mode():
        out = theirs(pixel_values=seen["mid.pixel_values"], output_hidden_states=True).hidden_states[-2]
    assert (out - seen["out.features"]).abs().max().item() <= 1e-5


# The configs that Diffusers and transformers write say the same as the official ones.


@pytest.mark.parametrize("name", ["dit_t2v", "dit_i2v", "dit_flf2v", "vae2_1", "vae2_2"])
def test_a_config_that_diffusers_saved_builds_the_same_module(name, tmp_path):
    kind = KIND[name]
    config, state, seen = golden(name)
    theirs = (diffusers_dit if kind == "dit" else diffusers_vae)(config)
    theirs.load_state_dict(weights.rename(state, kind, "diffusers", config))
    theirs.save_pretrained(tmp_path)
    module = weights.load_component(tmp_path, kind)
    with torch.inference_mode():
        ours, official = outputs(kind, module, seen)[
            -1
        ]  # for the vae: decode, whose mean and std differ, see below
        if kind == "vae":
            mean, std = torch.zeros(config["z_dim"]), torch.ones(config["z_dim"])
            assert module.config.mean == tuple(mean.tolist()) and module.config.std == tuple(std.tolist())
            z = seen["in.z"] * seen["in.std"].view(1, -1, 1, 1, 1) + seen["in.mean"].view(1, -1, 1, 1, 1)
            ours = module.decode(z)
    assert (ours - official).abs().max().item() <= 2e-5


def test_configs_that_transformers_saved_build_the_same_modules(tmp_path):
    config, state, seen = golden("t5_encoder")
    theirs = UMT5EncoderModel(
        UMT5Config(
            vocab_size=96,
            d_model=48,
            d_kv=16,
            d_ff=80,
            num_layers=3,
            num_heads=4,
            feed_forward_proj="gated-gelu",
        )
    )
    theirs.load_state_dict(weights.rename(state, "text", "diffusers", config))
    theirs.save_pretrained(tmp_path / "text")  # holds the tied embedding once
    module = weights.load_component(tmp_path / "text", "text")
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            module.state_dict().values(),
            weights.build("text", config, state).state_dict().values(),
            strict=True,
        )
    )

    config, state, seen = golden("clip_visual")
    theirs = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=256,
            projection_dim=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=56,
            patch_size=14,
            hidden_act="gelu",
        )
    )
    theirs.save_pretrained(tmp_path / "image")  # has no projection: Wan never uses it
    module = weights.load_component(tmp_path / "image", "image")
    assert module.head is None
    pictures = seen["in.video0"].transpose(0, 1)
    with torch.inference_mode():
        expected = theirs(pixel_values=preprocess(pictures, 56), output_hidden_states=True).hidden_states[-2]
        assert (module.encode(pictures) - expected).abs().max().item() <= 1e-5
