"""Does our CLIP tower see what the official one and transformers' see?"""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from moddiff.image import ImageConfig, ImageEncoder, preprocess

GOLDEN = Path(__file__).parents[1] / "goldens" / "clip_visual.safetensors"

OFFICIAL = {
    "transformer.": "layers.",
    "norm1": "norm_attn",
    "norm2": "norm_ffn",
    "attn.to_qkv": "attn.qkv",
    "attn.proj": "attn.out",
    "mlp.0": "ffn.up",
    "mlp.2": "ffn.down",
    "cls_embedding": "class_token",
    "pos_embedding": "position_embedding",
}
TRANSFORMERS = {
    "norm_attn": "layer_norm1",
    "norm_ffn": "layer_norm2",
    "attn.out": "self_attn.out_proj",
    "ffn.up": "mlp.fc1",
    "ffn.down": "mlp.fc2",
    "pre_norm": "pre_layrnorm",
    "post_norm": "post_layernorm",
    "patch_embedding": "embeddings.patch_embedding",
    "layers.": "encoder.layers.",
}


def renamed(name, table):
    for old, new in table.items():
        name = name.replace(old, new)
    return name


def as_transformers(state):
    """Our state dict in transformers' names, q, k and v apart."""
    theirs = {}
    for name, t in state.items():
        new = "vision_model." + renamed(name, TRANSFORMERS)
        if "qkv" in name:
            theirs |= {
                new.replace("attn.qkv", f"self_attn.{part}_proj"): rows
                for part, rows in zip("qkv", t.chunk(3), strict=True)
            }
        elif name == "class_token":
            theirs["vision_model.embeddings.class_embedding"] = t[0, 0]
        elif name == "position_embedding":
            theirs["vision_model.embeddings.position_embedding.weight"] = t[0]
        elif name == "head":
            theirs["visual_projection.weight"] = t.T
        else:
            theirs[new] = t
    return theirs


def pair(heads=3, width=8, patch=7, side=3, layers=3, ratio=2, seed=0):
    """Our tower and transformers', with the same random weights."""
    torch.manual_seed(seed)
    dim = heads * width
    ours = ImageEncoder(ImageConfig(patch * side, patch, dim, ratio, 10, heads, layers)).eval()
    for weight in ours.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    theirs = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=dim,
            intermediate_size=dim * ratio,
            projection_dim=10,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            image_size=patch * side,
            patch_size=patch,
            hidden_act="gelu",
            layer_norm_eps=1e-5,
            attention_dropout=0.0,
        )
    ).eval()
    theirs.load_state_dict(as_transformers(ours.state_dict()), strict=True)
    return ours, theirs


@pytest.fixture(scope="module")
def golden():
    with safe_open(GOLDEN, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        config = json.loads(file.metadata()["config"])
    image = ImageEncoder(ImageConfig(**config)).eval()
    image.load_state_dict(
        {
            renamed(n.removeprefix("weight."), OFFICIAL): t
            for n, t in tensors.items()
            if n.startswith("weight.")
        },
        strict=True,
    )
    return image, tensors


def pictures(file):
    """The stored pictures, [c, 1, h, w] each, as batches of one."""
    return [file[name].transpose(0, 1) for name in ("in.video0", "in.video1")]


def test_preprocessing_equals_the_official_one_for_two_odd_sizes(golden):
    image, file = golden
    pixels = torch.cat([preprocess(x, image.config.image_size) for x in pictures(file)])
    assert (pixels - file["mid.pixel_values"]).abs().max() <= 1e-6


def test_features_equal_the_official_ones(golden):
    image, file = golden
    features = torch.cat([image.encode(x) for x in pictures(file)])
    assert (features - file["out.features"]).abs().max() <= 1e-5


@settings(max_examples=12, deadline=None)
@given(
    heads=st.integers(1, 5),
    width=st.integers(1, 9),
    patch=st.integers(1, 9),
    side=st.integers(1, 5),
    layers=st.integers(1, 4),
    h=st.integers(1, 50),
    w=st.integers(1, 50),
    seed=st.integers(0, 9),
)
@torch.no_grad()
def test_features_and_projection_equal_transformers(heads, width, patch, side, layers, h, w, seed):
    ours, theirs = pair(heads, width, patch, side, layers, seed=seed)
    images = torch.rand(2, 3, h, w) * 2 - 1
    expected = theirs(preprocess(images, patch * side), output_hidden_states=True)
    assert (ours.encode(images) - expected.hidden_states[-2]).abs().max() <= 1e-5
    assert (ours.project(images) - expected.image_embeds).abs().max() <= 1e-5


def test_gradients_equal_transformers():
    ours, theirs = pair()
    images = torch.rand(2, 3, 21, 21) * 2 - 1
    ours.project(images).square().mean().backward()
    theirs(preprocess(images, 21)).image_embeds.square().mean().backward()
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    for name, grad in as_transformers({name: p.grad for name, p in ours.named_parameters()}).items():
        torch.testing.assert_close(grad, expected[name], atol=1e-5, rtol=1e-4)


def half_errors(dtype, seeds=range(4)):
    """How far both half precision runs are from the float32 oracle: root mean squares, and largest."""
    ours_off, theirs_off = [], []
    for seed in seeds:
        ours, theirs = pair(layers=4, seed=seed)
        images = torch.rand(2, 3, 30, 40) * 2 - 1
        pixels = preprocess(images, 21)
        with torch.no_grad():
            truth = theirs(pixels, output_hidden_states=True).hidden_states[-2]
            ours_off.append(ours.to(dtype).encode(images).float() - truth)
            theirs_off.append(
                theirs.to(dtype)(pixels.to(dtype), output_hidden_states=True).hidden_states[-2].float()
                - truth
            )
    return [
        (torch.cat(off).square().mean().sqrt().item(), torch.cat(off).abs().max().item())
        for off in (ours_off, theirs_off)
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_exact_as_transformers(dtype):
    ours, theirs = half_errors(dtype)
    print(f"\nCLIP {dtype}: ours {ours[0]:.5f}, theirs {theirs[0]:.5f}, ratio {ours[0] / theirs[0]:.2f}")
    assert ours[0] <= theirs[0] * 1.05
