"""Do our modules have exactly the tensors of every released file?  Names and shapes, in both namings."""

import gzip
import json
from pathlib import Path

import pytest
import torch
from moddiff.keymaps import ignored

from moddiff import configs, releases, weights

KEYS = Path(__file__).parents[1] / "keys"
LISTS = {  # key list -> (kind, the presets that use it)
    "wan2.1-t2v-1.3b": ("dit", ["wan2.1-t2v-1.3b"]),
    "wan2.1-t2v-14b": ("dit", ["wan2.1-t2v-14b"]),
    "wan2.1-i2v-14b": ("dit", ["wan2.1-i2v-14b-480p", "wan2.1-i2v-14b-720p"]),
    "wan2.1-flf2v-14b": ("dit", ["wan2.1-flf2v-14b-720p"]),
    "wan2.1-vace-1.3b": ("dit", ["wan2.1-vace-1.3b"]),
    "wan2.1-vace-14b": ("dit", ["wan2.1-vace-14b"]),
    "wan2.2-t2v-a14b": ("dit", ["wan2.2-t2v-a14b"]),
    "wan2.2-i2v-a14b": ("dit", ["wan2.2-i2v-a14b"]),
    "wan2.2-ti2v-5b": ("dit", ["wan2.2-ti2v-5b"]),
    "umt5-xxl-encoder": ("text", ["wan2.1-t2v-1.3b", "wan2.2-ti2v-5b"]),
    "clip-vit-h14": ("image", ["wan2.1-i2v-14b-480p", "wan2.1-flf2v-14b-720p"]),
    "vae2.1": ("vae", ["wan2.1-t2v-1.3b", "wan2.2-t2v-a14b"]),
    "vae2.2": ("vae", ["wan2.2-ti2v-5b"]),
}
PARAMETERS = {  # the fact sheet's table
    "wan2.1-t2v-1.3b": 1_418_996_800,
    "wan2.1-t2v-14b": 14_288_491_584,
    "wan2.1-i2v-14b": 16_394_878_784,
    "wan2.1-flf2v-14b": 16_395_536_704,
    "wan2.1-vace-1.3b": 2_153_972_032,
    "wan2.1-vace-14b": 17_337_592_896,
    "wan2.2-t2v-a14b": 14_288_491_584,
    "wan2.2-i2v-a14b": 14_288_901_184,
    "wan2.2-ti2v-5b": 4_999_787_712,
    "umt5-xxl-encoder": 5_680_910_336,
    "clip-vit-h14": 632_076_800,
    "vae2.1": 126_892_531,
    "vae2.2": 704_688_668,
}
EVERY = [(keys, kind, name) for keys, (kind, names) in LISTS.items() for name in names]


def listed(keys, style):
    """{name: shape} of a released file"""
    return {
        name: tuple(shape)
        for name, shape in json.loads(
            gzip.decompress((KEYS / f"{keys}.{style}.json.gz").read_bytes())
        ).items()
    }


def shapes(state):
    return {name: tuple(x.shape) for name, x in state.items()}


def stored(keys, style):
    """The file as it would arrive, without its values."""
    return {name: torch.empty(shape, device="meta") for name, shape in listed(keys, style).items()}


@pytest.mark.parametrize("keys, kind, name", EVERY)
@pytest.mark.parametrize("style", ["official", "diffusers"])
def test_names_and_shapes_are_those_of_the_released_file(keys, kind, name, style):
    config = releases.preset(name)[kind]
    ours = configs.empty(kind, config).state_dict()
    assert shapes(weights.rename(ours, kind, style, config)) == listed(keys, style)


@pytest.mark.parametrize("keys, kind, name", EVERY)
@pytest.mark.parametrize("style", ["official", "diffusers"])
def test_a_released_file_finds_its_place_in_our_module(keys, kind, name, style):
    config = releases.preset(name)[kind]
    module = weights.build(kind, config, stored(keys, style))
    assert sum(p.numel() for p in module.parameters()) == PARAMETERS[keys]
    assert not module.training


@pytest.mark.parametrize("keys", LISTS)
def test_the_file_tells_its_naming_and_prefix(keys):
    kind, names = LISTS[keys]
    config = configs.read(kind, releases.preset(names[0])[kind])
    module = configs.empty(kind, config)
    for style in ("official", "diffusers"):
        found, prefix, _ = weights.detect(kind, config, module, listed(keys, style))
        expected = (
            "ours" if kind == "vae" and style == "official" else style
        )  # our VAE names are the official ones
        assert (found, prefix) == (
            expected,
            {("image", "official"): "visual.", ("image", "diffusers"): "vision_model."}.get(
                (kind, style), ""
            ),
        )


def test_the_whole_clip_file_gives_its_picture_tower_and_the_rest_is_known():
    config, whole = releases.preset("wan2.1-i2v-14b-480p")["image"], stored("clip-vit-h14", "official-full")
    aside = {name for name in whole if ignored("image", name)}
    assert len(whole) == 784 and len(aside) == 784 - 392
    assert aside == {name for name in whole if not name.startswith("visual.")}
    module = weights.build("image", config, whole)
    assert sum(p.numel() for p in module.parameters()) == 632_076_800


def test_the_key_lists_are_all_used():
    assert {
        path.name.split(".official")[0].split(".diffusers")[0] for path in KEYS.glob("*.json.gz")
    } == LISTS.keys()
