"""Is one file described truly: what it is, how it is stored, what it would take?"""

import gzip
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_gguf import UMT5, llama, state_of, write
from test_single import DIT, VAE, scaled
from test_single import state_of as dit_state

from moddiff.cli import main
from moddiff.weights import CheckpointError, WeightsError, contents
from moddiff.weights.files import read

KEYS = Path(__file__).parent / "keys"


def command(*words):
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    assert end.value.code == 0


def hollow(path, keys, dtype=torch.float8_e4m3fn):
    """A released file as sparse as a disk can hold it: a head, and nothing but holes behind it."""
    shapes = json.loads(gzip.decompress((KEYS / f"{keys}.official.json.gz").read_bytes()))
    head, at = {}, 0
    for name, shape in shapes.items():
        matrix = len(shape) == 2 and ".weight" in name and "blocks." in name
        size = torch.Size(shape).numel() * (1 if matrix else 2)
        code = "F8_E4M3" if matrix else "BF16"
        head[name] = {"dtype": code, "shape": shape, "data_offsets": [at, at + size]}
        at += size
        if matrix:
            head[name.replace(".weight", ".scale_weight")] = {
                "dtype": "F32",
                "shape": [],
                "data_offsets": [at, at + 4],
            }
            at += 4
    head["scaled_fp8"] = {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [at, at + 2]}
    text = json.dumps(head).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at + 2)
    return path


@pytest.mark.parametrize(
    "keys, releases, needs",
    [
        ("wan2.1-t2v-1.3b", ["wan2.1-t2v-1.3b"], ["text", "vae"]),
        ("wan2.1-t2v-14b", ["wan2.1-t2v-14b", "wan2.2-t2v-a14b"], ["text", "vae"]),
        ("wan2.1-i2v-14b", ["wan2.1-i2v-14b-480p", "wan2.1-i2v-14b-720p"], ["text", "image", "vae"]),
        ("wan2.2-ti2v-5b", ["wan2.2-ti2v-5b"], ["text", "vae"]),
        ("wan2.1-vace-14b", ["wan2.1-vace-14b"], ["text", "vae"]),
    ],
)
def test_a_released_model_as_fp8_is_described_with_its_true_size(tmp_path, keys, releases, needs):
    found = contents(hollow(tmp_path / "x.safetensors", keys))
    assert (found.kind, found.equal, found.releases, found.needs) == ("dit", True, releases, needs)
    ffn = found.layers["feed-forward"]
    assert set(ffn) == {"fp8 e4m3"} and ffn["fp8 e4m3"][1] <= ffn["fp8 e4m3"][2]
    total = sum(size for kinds in found.layers.values() for _, _, size in kinds.values())
    # All but the marker of two bytes is a weight or its scale.
    assert found.bytes - total == 2 and 8 < 8 * total / found.parameters < 10.2
    cast = found.forecast["parts"]
    assert abs(cast["dit"]["weights"] - total) < 0.01 * total
    wide = contents(tmp_path / "x.safetensors", dtype="bf16").forecast["parts"]["dit"]
    assert wide["weights"] == 2 * found.parameters
    said = repr(found)
    assert f"moddiff.load('{releases[0]}', dit=FILE, text=FILE" in said and "fp8 e4m3" in said
    assert json.dumps(found.to_dict()) and found._repr_html_().count("<table>") == 3


def test_blocks_text_and_autoencoder(tmp_path):
    text = write(tmp_path / "t5.gguf", {llama(n): x for n, x in state_of("text", UMT5).items()}, "t5")
    found = contents(text)
    assert found.kind == "text" and found.layers["feed-forward"]["q8_0"][0] == 6
    assert any("no tokenizer" in note for note in found.notes)
    torch.save(dit_state("vae", VAE), tmp_path / "vae.pth")
    found = contents(tmp_path / "vae.pth")
    assert found.kind == "vae" and not found.equal and set(found.layers["norms, biases, modulation"])
    assert "float32" in repr(found)


def test_what_is_no_part_of_ours_is_refused_by_name(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(dit_state("dit", DIT) | {"ref_conv.weight": torch.ones(1)}, path)
    with pytest.raises(WeightsError, match="Wan-Fun control"):
        contents(path)
    save_file(dit_state("dit", DIT) | {"blocks.5.ffn.0.scale_weight": torch.ones(())}, path)
    with pytest.raises(WeightsError, match="surplus"):
        contents(path)
    with pytest.raises(CheckpointError, match="no weights file at"):
        contents(tmp_path / "nowhere")


def test_the_command_line_inspects_and_converts_one_file(tmp_path, capsys):
    path = tmp_path / "x.safetensors"
    save_file(scaled(dit_state("dit", DIT)), path)
    command("inspect", path, "--json")
    assert json.loads(capsys.readouterr().out)["kind"] == "dit"
    command("convert", path, tmp_path / "y.safetensors", "--to", "diffusers", "--dtype", "fp32")
    assert f"a dit of {len(dit_state('dit', DIT))} tensors" in capsys.readouterr().out
    assert "blocks.0.attn1.to_q.weight" in read(tmp_path / "y.safetensors")
