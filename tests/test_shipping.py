"""From training into the package and out again: every stage once, on models small enough for a second."""

import json

import pytest
import torch
from safetensors.torch import load_file, safe_open
from tiny_stages import empty_package, shrink, train_all

from moddiff.tiny import dit_stages, encoder_stages, shipping, stages, train
from moddiff.weights import build


def test_all_stages_run_in_order_and_export_models_that_load(tmp_path, monkeypatch):
    shrink(monkeypatch)
    train_all(tmp_path / "runs")
    package = empty_package(tmp_path / "package")
    written = shipping.export(tmp_path / "runs", package)
    assert sorted(written) == sorted(str(p.relative_to(package)) for p in package.rglob("*.*"))
    preset = json.loads((package / "weights" / "presets" / "tiny-i2v.json").read_text())
    assert preset["vae"]["mean"] == [0.5] * 16 and preset["dit"]["in_dim"] == 36
    state = load_file(package / "tiny" / "weights" / "i2v.safetensors")
    assert all(value.dtype == torch.float16 for value in state.values())
    assert build("dit", preset["dit"], state).config.image_dim == encoder_stages.IMAGE_CONFIG["dim"]


def test_an_export_of_nothing_says_what_to_train_first(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing trained to export.*train-tiny --stage"):
        shipping.export(tmp_path, empty_package(tmp_path / "package"))


def test_an_export_keeps_the_decoder_that_was_sharpened_later(tmp_path, monkeypatch):
    shrink(monkeypatch)
    train_all(tmp_path, ("vae", "text", "t2v", "decoder"))
    before, after = stages.part(tmp_path, "vae"), stages.part(tmp_path, "decoder")
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed <= {"decoder", "conv2"} and "decoder" in changed


def test_shipped_weights_can_be_gone_on_from(tmp_path, monkeypatch):
    """The next stage starts at the shipped weights, half precision and all."""
    shrink(monkeypatch)
    train_all(tmp_path / "first")
    package = empty_package(tmp_path / "package")
    shipping.export(tmp_path / "first", package)
    shipping.begin_from_shipped(tmp_path / "second", package)
    shipped = stages.part(tmp_path / "first", "i2v", "dit")
    for name, value in stages.part(tmp_path / "second", "i2v", "dit").items():
        torch.testing.assert_close(value, shipped[name].half().float(), rtol=0, atol=0)
    assert stages.config_of("vae", tmp_path / "second")["std"] == [2.0] * 16
    begins = {}

    def loss(self, **drawn):
        begins.update({name: value.clone() for name, value in self.model["dit"].state_dict().items()})
        return 0 * next(self.model.parameters()).sum(), {}

    monkeypatch.setattr(dit_stages.T2VStage, "loss", loss)
    train.run_stage("t2v", steps=1, folder=tmp_path / "second", clips=2)
    for name, value in stages.part(tmp_path / "first", "t2v", "dit").items():
        torch.testing.assert_close(begins[name], value.half().float(), rtol=0, atol=0)
    with pytest.raises(FileExistsError, match="second is not empty"):
        shipping.begin_from_shipped(tmp_path / "second", package)
    (package / "tiny" / "weights" / "image.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="image.safetensors not in tiny/weights"):
        shipping.begin_from_shipped(tmp_path / "third", package)
    assert not (tmp_path / "third").exists()


def test_what_ships_comes_back_as_it_was(tmp_path):
    """The package's own weights, laid out for training and exported: the same values, configs, presets."""
    shipping.begin_from_shipped(tmp_path / "folder")
    package = empty_package(tmp_path / "package")
    for name in shipping.export(tmp_path / "folder", package):
        old, new = shipping.PACKAGE / name, package / name
        if new.suffix == ".json":
            assert json.loads(new.read_text()) == json.loads(old.read_text()), name
            continue
        a, b = load_file(old), load_file(new)
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a), name
        with safe_open(old, "pt") as one, safe_open(new, "pt") as other:
            assert one.metadata() == other.metadata(), name
