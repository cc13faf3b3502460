"""Is the memory under each profile what the extensions really hold?"""

import json
from itertools import pairwise

import pytest
import small
import torch
from safetensors.torch import save_file
from test_contents import hollow
from test_single import scaled

import moddiff
from moddiff.cli import main
from moddiff.weights import build, contents, inspect, profiles

FEW = dict(seed=0, steps=2, frames=5, size=(32, 48))


@pytest.fixture
def folder(tmp_path):
    folder = small.release(tmp_path)
    config = small.dit_config(num_layers=6)  # enough of them to stream
    (folder / "transformer" / "config.json").write_text(json.dumps(config))
    save_file(build("dit", config).state_dict(), folder / "transformer" / "model.safetensors")
    return folder


def held(part):
    """Bytes of a component's weights, each once, counted without the package's help."""
    found = {}
    for module in part.modules():
        for x in [*module._parameters.values(), *module._buffers.values()]:
            if x is not None:
                found[id(x)] = x.nbytes
    return sum(found.values())


def test_base_and_high_quality_hold_what_a_loaded_pipeline_holds(folder):
    cast = inspect(folder, size=(32, 48), frames=5).forecast["profiles"]
    assert list(cast) == profiles()
    for name in ("base", "high_quality"):
        pipe = moddiff.load(folder, profile=name)
        for kind in ("dit", "text", "vae"):
            assert cast[name]["parts"][kind]["weights"] == held(pipe.components[kind]), (name, kind)
        assert cast[name]["waiting"] == 0


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_low_memory_holds_what_its_extensions_hold(folder, dtype):
    cast = inspect(folder, size=(32, 48), frames=5, dtype=dtype).forecast["profiles"]["low_memory"]
    pipe = moddiff.load(folder, profile="low_memory", dtype=dict.fromkeys(("dit", "text", "vae"), dtype))
    for kind in ("dit", "text"):
        part = pipe.components[kind]
        sizes = [held(module) for module in part.streamed]
        at_once = max(map(sum, pairwise(sizes)))  # the one that computes and the one after it
        row = cast["parts"][kind]
        assert row["weights"] == held(part) - sum(sizes) + at_once
        assert row["waiting"] == (sum(sizes) if kind == "dit" else 0)
    assert cast["parts"]["vae"]["weights"] == held(pipe.vae)


def test_no_more_is_ever_here_than_was_forecast(folder):
    """What streams is counted as it comes and goes, in a run."""
    cast = inspect(folder, size=(32, 48), frames=5, dtype="fp32").forecast["profiles"]["low_memory"]
    pipe = moddiff.load(folder, profile="low_memory", dtype="fp32")
    dit, most = pipe.dit, [0]
    stays = held(dit) - sum(map(held, dit.streamed))

    def count(module, inputs):
        most[0] = max(most[0], stays + sum(visit.nbytes for visit in dit.here.values()))

    for block in dit.streamed:
        block.register_forward_pre_hook(count)
    pipe("a red circle", **FEW)
    forecast = cast["parts"]["dit"]["weights"]
    assert forecast - held(dit.streamed[0]) <= most[0] <= forecast


def test_windows_are_forecast_as_calls_and_as_the_memory_of_one(folder, tmp_path):
    """Under a profile of one's own: a film of any length takes what a window takes, and more calls."""
    (tmp_path / "long.json").write_text('{"dit": [["windowed", {"length": 3, "overlap": 1}], ["offloaded"]]}')
    ways = str(tmp_path / "long.json"), {"dit": [["windowed", 3, 1]]}
    for own in ways:
        cast = {
            frames: inspect(folder, size=(32, 48), frames=frames, profile=own).forecast["profiles"]
            for frames in (9, 33, 65)
        }
        rows = {frames: [*x.values()][-1]["parts"]["dit"] for frames, x in cast.items()}
        # 3, 9 and 17 latent frames in windows of 3 that step by 2.
        assert [row["calls"] for row in rows.values()] == [1, 4, 8]
        latent = 2 * 4 * small.Z * 4 * 6  # the film and the sum of windows, bytes of a latent frame
        assert rows[33]["working"] == rows[9]["working"] + 9 * latent
        assert rows[65]["working"] == rows[9]["working"] + 17 * latent
        assert rows[65]["working"] < cast[65]["base"]["parts"]["dit"]["working"] / 2
        assert all(x["base"]["parts"]["dit"]["calls"] == 1 for x in cast.values())
    found = inspect(folder, size=(32, 48), frames=65, profile=ways[1])
    assert "yours" in repr(found) and "calls a branch" in repr(found)
    assert "calls a branch" not in repr(inspect(folder, size=(32, 48), frames=65))
    with pytest.raises(ValueError, match="no profile 'longer'"):
        inspect(folder, profile="longer")


def test_a_profile_that_needs_less_says_less():
    cast = inspect("wan2.2-t2v-a14b").forecast["profiles"]
    assert cast["low_memory"]["peak"] < 0.3 * cast["base"]["peak"] < 0.3 * cast["high_quality"]["peak"]
    assert cast["high_quality"]["weights"] > 1.9 * cast["base"]["weights"]
    # Two experts are one component, whose first two blocks stay: not two of each.
    block = 14_288_901_184 / 40
    assert cast["low_memory"]["parts"]["dit"]["weights"] < 6 * 1.1 * block
    assert cast["base"]["weights"] == inspect("wan2.2-t2v-a14b").forecast["weights"]


def test_a_tile_and_not_the_picture_is_decoded_at_once():
    cast = inspect("wan2.1-t2v-14b").forecast["profiles"]
    whole, tile = (cast[name]["parts"]["vae"]["working"] for name in ("base", "low_memory"))
    video = 4 * 3 * 81 * 720 * 1280
    assert tile - video < 256 * 256 / (720 * 1280) * whole + 10e6


def test_a_single_file_too_and_quantized_weights_stay(tmp_path, capsys):
    path = hollow(tmp_path / "x.safetensors", "wan2.1-t2v-1.3b")
    cast = contents(path).forecast["profiles"]
    dit = contents(path).forecast["parts"]["dit"]["weights"]
    assert abs(cast["base"]["parts"]["dit"]["weights"] - dit) < 0.01 * dit
    assert cast["high_quality"]["parts"]["dit"]["weights"] == 4 * 1_418_996_800
    with pytest.raises(SystemExit):
        main(["inspect", str(path), "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told["forecast"]["profiles"] == cast
    assert "low_memory" in repr(contents(path)) and "low_memory" in contents(path)._repr_html_()


def test_a_profile_leaves_alone_what_a_file_brings_quantized(folder, tmp_path):
    state = scaled(build("dit", small.dit_config(num_layers=6)).state_dict())
    save_file(state, folder / "transformer" / "model.safetensors")
    cast = inspect(folder, size=(32, 48), frames=5).forecast["profiles"]["low_memory"]["parts"]["dit"]
    dit = moddiff.load(folder, profile="low_memory").dit
    assert repr(dit) == "offloaded(DiT, keep=2)"
    sizes = [held(module) for module in dit.streamed]
    assert cast["weights"] == held(dit) - sum(sizes) + max(map(sum, pairwise(sizes)))


def test_a_profile_that_cannot_be_is_said_so_and_the_others_are_forecast(tmp_path):
    folder = small.release(tmp_path)
    config = small.TEXT | dict(num_layers=1)
    (folder / "text_encoder" / "config.json").write_text(json.dumps(config))
    save_file(build("text", config).state_dict(), folder / "text_encoder" / "model.safetensors")
    found = inspect(folder, size=(32, 48), frames=5)
    assert "no list of blocks to stream" in found.forecast["profiles"]["low_memory"]["trouble"]
    assert found.forecast["profiles"]["base"]["peak"] > 0 and "no list of blocks" in repr(found)


def test_nothing_is_made_for_it(folder, monkeypatch):
    monkeypatch.setattr(torch, "from_file", None)
    assert inspect(folder).forecast["profiles"]
