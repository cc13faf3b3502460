"""Is the one model in a folder of ComfyUI loaded, and is it said what to type where there are more?"""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file
from test_pieces import model  # noqa: F401
from test_single import DIT, parts, run, state_of  # noqa: F401

from moddiff import load
from moddiff.weights import comfy


@pytest.fixture
def folder(parts, tmp_path):  # noqa: F811
    """A model's three files among those of others, as ComfyUI has them."""
    folder = tmp_path / "models"
    for kind, (place, *_) in comfy.FOLDERS.items():
        (folder / place).mkdir(parents=True)
        (folder / place / f"put_{kind}_here").touch()
    shutil.copy(parts["dit"], folder / "diffusion_models" / "wan.safetensors")
    shutil.copy(parts["text"], folder / "text_encoders" / "umt5.safetensors")
    shutil.copy(parts["vae"], folder / "vae" / "wan_vae.pth")
    save_file({"text_model.x": torch.ones(2)}, folder / "text_encoders" / "clip_l.safetensors")
    save_file({"decoder.up.0.weight": torch.ones(2)}, folder / "vae" / "other.safetensors")
    (folder / "vae" / "broken.safetensors").write_bytes(b"<html>")
    return folder


def test_the_one_model_is_loaded(folder, parts):  # noqa: F811
    assert comfy.release_in(folder)[0] == "wan2.1-t2v-1.3b"
    assert (run(load(folder)) == run(load("wan2.1-t2v-1.3b", **parts))).all()
    (folder / "diffusion_models").rename(folder / "unet")
    assert run(load(str(folder))).shape == (5, 32, 32, 3)


def test_two_experts_whose_names_say_so_are_one_model(folder, monkeypatch):
    (folder / "diffusion_models" / "wan.safetensors").unlink()
    for i, noise in enumerate(("high", "low")):
        state = state_of("dit", DIT, seed=i)
        save_file(state, folder / "diffusion_models" / f"wan2.2_{noise}_noise.safetensors")
    monkeypatch.setattr(comfy, "goes_with", lambda part: (["wan2.1-t2v-14b", "wan2.2-t2v-a14b"], True))
    name, files = comfy.release_in(folder)
    assert name == "wan2.2-t2v-a14b" and files["dit"]["low"].name == "wan2.2_low_noise.safetensors"
    assert run(load(folder)).shape == (5, 32, 32, 3)


def test_what_is_not_clear_is_said_with_what_to_type(folder, monkeypatch):
    monkeypatch.setattr(
        comfy, "goes_with", lambda part: (["wan2.1-i2v-14b-480p", "wan2.1-i2v-14b-720p"], True)
    )
    with pytest.raises(
        ValueError, match="fits wan2.1-i2v-14b-480p, .*720p.*(?s:.*)moddiff.load.RELEASE, dit"
    ):
        load(folder)
    monkeypatch.undo()
    shutil.copy(folder / "vae" / "wan_vae.pth", folder / "vae" / "again.pth")
    with pytest.raises(ValueError, match=r"(?s)vae: vae/again.pth.*moddiff.load\('wan2.1-t2v-1.3b'"):
        load(folder)
    with pytest.raises(ValueError, match="broken.safetensors"):  # what cannot be read is not passed over
        load(folder)
    shutil.rmtree(folder / "vae")
    with pytest.raises(ValueError, match="vae: none"):
        load(folder)
    shutil.copy(
        folder / "diffusion_models" / "wan.safetensors", folder / "diffusion_models" / "b.safetensors"
    )
    with pytest.raises(ValueError, match="dit: diffusion_models/b.safetensors"):
        load(folder)


def test_a_folder_of_diffusers_is_none(tmp_path):
    (tmp_path / "vae").mkdir()
    (tmp_path / "model_index.json").write_text(json.dumps({}))
    assert not comfy.is_comfy(tmp_path) and not comfy.is_comfy("wan2.1-t2v-1.3b")
