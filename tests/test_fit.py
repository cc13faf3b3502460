"""Does the inspection tell the truth about files, and does the forecast match what our modules take?"""

import json
import weakref

import pytest
import torch
from moddiff.inspection import inspect
from safetensors.torch import load_file, save_file
from test_releases import DIT, diffusers, official, use_small_parts
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moddiff import viz, weights
from moddiff.weights import working


class Live(TorchDispatchMode):
    """Counts the bytes of every tensor that is alive, and remembers the most there were."""

    def __init__(self, module):
        super().__init__()
        self.now = self.peak = 0
        self.seen = {p.untyped_storage()._cdata for p in module.parameters()}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if torch.is_tensor(x) and (key := x.untyped_storage()._cdata) not in self.seen:
                self.seen.add(key)
                size = x.untyped_storage().nbytes()
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(x.untyped_storage(), self.forget, key, size)
        return out

    def forget(self, key, size):
        self.now -= size
        self.seen.discard(key)


def peak(module, run):
    with torch.inference_mode(), Live(module) as live:
        run()
    return live.peak


# The forecast against a count of live tensors, on models small enough to run and large enough that what grows
# with the video dominates.


@pytest.mark.parametrize(
    "task, ratio, dtype",
    [("t2v", 2, "fp32"), ("t2v", 6, "fp32"), ("t2v", 2, "bf16"), ("t2v", 6, "bf16"), ("ti2v", 4, "fp32")],
)
def test_the_forecast_of_a_dit_pass_is_near_the_count_of_live_bytes(task, ratio, dtype):
    config = dict(
        model_type=task,
        in_dim=16,
        dim=192,
        ffn_dim=192 * ratio,
        freq_dim=32,
        text_dim=24,
        out_dim=16,
        num_heads=4,
        num_layers=1,
        text_len=32,
    )
    dit = weights.build("dit", config, dtype=dtype)
    x, tokens = torch.randn(1, 16, 3, 16, 16), 3 * 8 * 8
    t = torch.full((1, tokens), 500.0) if task == "ti2v" else torch.tensor([500.0])
    counted = peak(dit, lambda: dit(x, t, [torch.randn(6, 24)]))
    forecast = working.dit_bytes(dit.config, tokens, weights.as_dtype(dtype).itemsize)
    assert 0.75 < forecast / counted < 1.35, (forecast, counted)


@pytest.mark.parametrize("which", ["2.1", "2.2"])
@pytest.mark.parametrize("chunked", [False, True])
def test_the_forecast_of_decoding_is_near_the_count_of_live_bytes(which, chunked):
    config = (
        dict(dim=16, z_dim=16, num_res_blocks=2)
        if which == "2.1"
        else dict(dim=10, dec_dim=16, z_dim=48, num_res_blocks=2)
    )
    vae = weights.build("vae", config)
    cells, frames = 5, 17
    z = torch.randn(1, vae.config.z_dim, cells, 4, 4)
    size = (4 * vae.config.stride[1], 4 * vae.config.stride[2])
    counted = peak(vae, lambda: vae.decode(z, chunked=chunked))
    forecast = working.decode_bytes(vae.config, size, frames, 4)[chunked]
    assert 0.75 < forecast / counted < 1.35, (forecast, counted)


def test_attention_written_out_takes_what_is_said():
    config = dict(
        model_type="t2v",
        in_dim=4,
        dim=32,
        ffn_dim=32,
        freq_dim=32,
        text_dim=8,
        out_dim=4,
        num_heads=4,
        num_layers=1,
        text_len=8,
    )
    dit = weights.build("dit", config)
    for block in dit.blocks:
        block.self_attn.kernel = "math"
    tokens = 3 * 16 * 16
    counted = peak(dit, lambda: dit(torch.randn(1, 4, 3, 32, 32), torch.tensor([1.0]), [torch.randn(2, 8)]))
    said = working.forecast(
        {"dit": dit.config, "vae": weights.build("vae", dict(dim=4, z_dim=16)).config}, (256, 256), 9
    )
    assert said["tokens"] == tokens
    assert 0.7 < (said["written_out"] + working.dit_bytes(dit.config, tokens, 4)) / counted < 1.4


# What it says about presets and folders.


def test_a_preset_is_described_with_its_true_sizes():
    found = inspect("wan2.2-i2v-a14b")
    assert {name: part["parameters"] for name, part in found.parts.items()} == {
        "dit": 14_288_901_184,
        "dit_low": 14_288_901_184,
        "text": 5_680_910_336,
        "vae": 126_892_531,
    }
    assert found.forecast["tokens"] == 75_600 and found.forecast["size"] == [720, 1280]
    assert found.forecast["parts"]["dit"]["weights"] == 2 * 14_288_901_184
    assert found.missing == [] and found.folder is None


def test_dtype_size_and_frames_change_the_forecast_as_they_should():
    a, b = (inspect("wan2.1-t2v-1.3b", dtype=dtype).forecast for dtype in ("bf16", "fp32"))
    assert b["weights"] == 2 * a["weights"] and a["dtype"] == "bfloat16"
    small, large = (inspect("wan2.1-t2v-1.3b", size=(480, 832), frames=frames).forecast for frames in (1, 81))
    assert (small["tokens"], large["tokens"]) == (1560, 32760)
    assert (
        small["parts"]["dit"]["working"] < large["parts"]["dit"]["working"]
        and small["weights"] == large["weights"]
    )
    assert large["peak_one_at_a_time"] < large["peak"]


@pytest.mark.parametrize("make, naming", [(official, "official"), (diffusers, "diffusers")])
def test_a_whole_folder_is_described_and_nothing_is_missing(tmp_path, make, naming, monkeypatch):
    use_small_parts(monkeypatch)
    found = inspect(
        make(tmp_path / "x"),
        size=(64, 64),
        frames=5,
    )
    assert (
        found.missing == []
        and found.parts["dit"]["naming"] == naming
        and found.parts["dit"]["stored"] == "float32"
    )
    dit = weights.build("dit", DIT)
    assert (
        found.parts["dit"]["bytes"]
        == 4 * found.parts["dit"]["parameters"]
        == 4 * sum(p.numel() for p in dit.parameters())
    )
    assert len(found.parts["dit"]["files"]) == 1 and len(found.parts["dit"]["shapes"]) == found.parts["dit"][
        "tensors"
    ] == len(dit.state_dict())


def test_what_is_missing_and_what_does_not_fit_is_listed(tmp_path, monkeypatch):
    use_small_parts(monkeypatch)
    folder = official(tmp_path / "x")
    (folder / "Wan2.1_VAE.pth").unlink()
    text = torch.load(folder / "models_t5_umt5-xxl-enc-bf16.pth", weights_only=True)
    text["blocks.0.odd.weight"] = text.pop("blocks.0.attn.q.weight")
    torch.save(text, folder / "models_t5_umt5-xxl-enc-bf16.pth")
    found = inspect(folder)
    assert len(found.missing) == 2
    assert found.missing[0].startswith("vae: there is no weights file at")
    assert (
        "1 missing: blocks.0.attn.q.weight [8, 8]" in found.missing[1]
        and "blocks.0.odd.weight" in found.missing[1]
    )


def test_the_tower_left_aside_is_mentioned(tmp_path, monkeypatch):
    use_small_parts(monkeypatch)
    folder = official(tmp_path / "x", DIT | dict(model_type="i2v", in_dim=36, image_dim=1280), clip=True)
    path = next(folder.glob("models_clip*"))
    torch.save(torch.load(path, weights_only=True) | {"textual.head.0.weight": torch.zeros(2)}, path)
    assert "image: the text tower of CLIP, left aside" in inspect(folder).notes


def test_it_shows_itself_as_text_as_html_and_as_plain_data(tmp_path):
    found = inspect("wan2.1-t2v-1.3b")
    assert (
        "1,418,996,800" in repr(found) and "32,760 tokens" in repr(found) and "one at a time" in repr(found)
    )
    assert found._repr_html_().count("<table>") == 3 and "attention written out" in found._repr_html_()
    assert json.loads(json.dumps(found.to_dict()))["parts"]["vae"]["parameters"] == 126_892_531


@pytest.mark.parametrize("sub", ["vae", "transformer"])
def test_an_incomplete_download_is_described_as_far_as_it_is_known(tmp_path, sub):
    folder = diffusers(tmp_path / "x")
    (folder / sub / "config.json").unlink()
    found = inspect(folder)
    part = {"vae": "vae", "transformer": "dit"}[sub]
    assert found.missing[0].startswith(f"{part}: there is no config.json in ")
    assert found.parts.keys() == {"dit", "text", "vae"} - {part} and found.forecast == {}
    assert "no forecast: it needs the configs of the dit and the vae" in repr(found)
    assert found._repr_html_().count("<table>") == 1 and json.dumps(found.to_dict())
    with pytest.raises(ValueError, match="(?s)bars of .*; expected"):
        viz.bars(found)


def test_a_plain_8_bit_file_fits_as_it_is_and_widened(tmp_path):
    folder = diffusers(tmp_path / "x")
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({name: x.to(torch.float8_e4m3fn) for name, x in load_file(path).items()}, path)
    assert inspect(folder).missing == [] == inspect(folder, dtype="bf16").missing
    narrow, wide = (inspect(folder, dtype=dtype).forecast["parts"]["dit"] for dtype in (None, "bf16"))
    assert wide["weights"] == 2 * narrow["weights"]


def test_names_of_a_file_reach_the_terminal_harmless(tmp_path):
    folder = diffusers(tmp_path / "x")
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(path) | {"\x1b[2J": torch.zeros(1), "\x9b2J": torch.zeros(1)}, path)
    found = inspect(folder)
    assert "2 surplus" in found.missing[0]
    assert json.dumps(found.to_dict(), ensure_ascii=False).isprintable()
    assert repr(found).replace("\n", "").isprintable()


def test_a_hub_id_is_described_as_its_preset():
    assert inspect("Wan-AI/Wan2.2-TI2V-5B").to_dict() == inspect("wan2.2-ti2v-5b").to_dict()


def test_the_forecast_of_a_tiny_model_is_of_the_dtype_that_load_gives_it():
    cast, pipe = inspect("tiny-t2v").forecast, weights.load("tiny-t2v")
    for part in ("dit", "text", "vae"):
        parameters = pipe.components[part].parameters()
        assert cast["parts"][part]["weights"] == sum(p.numel() * p.element_size() for p in parameters)
