"""Is a GGUF file read as the `gguf` package reads it, stays it mapped, and is damage said in words?"""

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from test_decoders import random_blocks
from test_files import resident

from moddiff.storage import Blocks
from moddiff.storage.decoders import TYPES
from moddiff.weights import CheckpointError, build, rename
from moddiff.weights.files import describe, read
from moddiff.weights.gguf import facts

DIT = dict(
    model_type="t2v",
    in_dim=4,
    dim=256,
    ffn_dim=512,
    freq_dim=32,
    text_dim=64,
    out_dim=4,
    num_heads=2,
    num_layers=2,
    text_len=16,
)
UMT5 = dict(vocab=40, dim=64, dim_attn=32, dim_ffn=96, num_heads=4, num_layers=2)
KEPT_DENSE = ("modulation", "patch_embedding", "text_embedding", "time_", "head.")


def write(path, state, arch="wan", kind="q8_0", **more):
    """A state as a converter writes it: matrices of blocks as `kind`, the others in 32 bits."""
    writer = gguf.GGUFWriter(str(path), arch)
    for name, value in more.items():
        writer.add_string(name, value)
    number = gguf.GGMLQuantizationType(TYPES[kind].number)
    for name, x in state.items():
        x = x.float().numpy()
        dense = x.ndim != 2 or name.endswith("bias") or any(mark in name for mark in KEPT_DENSE)
        if dense or x.shape[-1] % TYPES[kind].values:
            writer.add_tensor(name, x.squeeze(0) if name.endswith("modulation") else x)
        elif TYPES[kind].values == 256 or kind in ("iq4_nl", "nvfp4"):  # gguf cannot make these
            codes = random_blocks(kind, x.size // TYPES[kind].values).reshape(len(x), -1)
            writer.add_tensor(name, codes, raw_dtype=number)
        else:
            writer.add_tensor(name, gguf.quants.quantize(x, number), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def state_of(kind, config):
    torch.manual_seed(0)
    return rename(build(kind, config).state_dict(), kind, "official", config)


def theirs(path):
    """{name: float32 tensor} by the package."""
    return {
        tensor.name: torch.from_numpy(
            np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        ).reshape([*map(int, tensor.shape[::-1])])
        for tensor in gguf.GGUFReader(str(path)).tensors
    }


@pytest.mark.parametrize("kind", TYPES)
def test_every_tensor_is_what_the_package_reads(tmp_path, kind):
    path = write(tmp_path / "x.bin", state_of("dit", DIT), kind=kind)  # content decides, not the suffix
    ours, wanted = read(path), theirs(path)
    assert ours.keys() == wanted.keys() and sum(isinstance(x, Blocks) for x in ours.values()) == 20
    for name, x in ours.items():
        numbers = x.expand(torch.float32) if isinstance(x, Blocks) else x
        assert torch.equal(numbers.reshape(wanted[name].shape), wanted[name]), name
    hollow = describe(path)
    assert all(x.is_meta and x.shape == ours[name].shape for name, x in hollow.items())


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_dit_is_built_from_it_kept_or_expanded(tmp_path, prefix):
    state = {prefix + name: x for name, x in state_of("dit", DIT).items()}
    path = write(tmp_path / "x.gguf", state)
    kept, dense = build("dit", DIT, read(path)), build("dit", DIT, read(path), dtype="fp32")
    assert isinstance(kept.blocks[1].ffn[0].weight, Blocks)
    assert not any(isinstance(module, Blocks) for module in dense.modules())
    inputs = torch.randn(1, 4, 2, 4, 4), torch.tensor([500.0]), [torch.randn(5, 64)]
    with torch.no_grad():
        assert torch.equal(kept.float()(*inputs), dense(*inputs))
        plain = build("dit", DIT, state)(*inputs)
    error = (dense(*inputs) - plain).norm() / plain.norm()
    assert 0 < error < 0.05


def test_types_without_blocks_come_as_they_are(tmp_path):
    writer = gguf.GGUFWriter(str(tmp_path / "x.gguf"), "wan")
    writer.add_tensor("a", np.ones((3, 5), np.float16))
    bf16 = torch.randn(3, 4).bfloat16()
    writer.add_tensor("b", bf16.view(torch.uint8).numpy(), raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.add_tensor("c.modulation", np.ones((6, 8), np.float32))
    writer.add_tensor("d", np.ones((2, 24), np.float32))
    writer.add_array("comfy.gguf.orig_shape.d", [2, 2, 1, 3, 4])
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file()
    writer.close()
    state = read(tmp_path / "x.gguf")
    assert state["a"].dtype == torch.float16 and torch.equal(state["b"], bf16)
    assert state["c.modulation"].shape == (1, 6, 8) and state["d"].shape == (2, 2, 1, 3, 4)
    assert facts(tmp_path / "x.gguf")["general.architecture"] == "wan"


LLAMA = {  # official -> llama.cpp
    "token_embedding": "token_embd",
    "norm1": "attn_norm",
    "attn.q": "attn_q",
    "attn.k": "attn_k",
    "attn.v": "attn_v",
    "attn.o": "attn_o",
    "pos_embedding.embedding": "attn_rel_b",
    "norm2": "ffn_norm",
    "ffn.gate.0": "ffn_gate",
    "ffn.fc1": "ffn_up",
    "ffn.fc2": "ffn_down",
}


def llama(name):
    """The name that llama.cpp's converter gives to a tensor of UMT5."""
    name = name.removesuffix(".weight")
    if name == "norm":
        return "enc.output_norm.weight"
    if name.startswith("blocks."):
        _, number, rest = name.split(".", 2)
        return f"enc.blk.{number}.{LLAMA[rest]}.weight"
    return f"{LLAMA[name]}.weight"


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_umt5_is_read_under_the_names_of_llama_cpp(tmp_path, kind):
    state = {llama(name): x for name, x in state_of("text", UMT5).items()}
    path = write(tmp_path / "t5.gguf", state | {"dec.blk.0.attn_q.weight": torch.ones(32, 64)}, "t5", kind)
    text, wanted = build("text", UMT5, read(path)).float(), theirs(path)
    assert isinstance(text.token_embedding.weight, Blocks)
    assert torch.equal(text.layers[1].ffn.up.weight.expand(), wanted["enc.blk.1.ffn_up.weight"])
    dense = build("text", UMT5, read(path), dtype="fp32")
    ids = torch.tensor([[1, 5, 39]])
    with torch.no_grad():
        assert torch.equal(text(ids), dense(ids))


def test_damage_is_said_in_words(tmp_path):
    whole = write(tmp_path / "x.gguf", state_of("dit", DIT)).read_bytes()

    def said(data):
        (tmp_path / "y.gguf").write_bytes(data)
        with pytest.raises(CheckpointError) as error:
            read(tmp_path / "y.gguf")
        return str(error.value)

    assert "version 1" in said(whole[:4] + struct.pack("<I", 1) + whole[8:])
    assert "version 50331648" in said(whole[:4] + struct.pack(">I", 3) + whole[8:])
    assert "promises" in said(whole[:8] + struct.pack("<Q", 2**60) + whole[16:])
    assert "does not lie where it should" in said(whole[:-64])
    assert "bytes at its end belong to no tensor" in said(whole + b"\0" * 4096)
    for size in (5, 20, 200, 2000):
        assert "cut off" in said(whole[:size])
    at = whole.index(b"blocks.0.ffn.0.weight") + len(b"blocks.0.ffn.0.weight") + 4
    assert "shape" in said(whole[:at] + struct.pack("<Q", 257) + whole[at + 8 :])
    kind = at + 16
    theirs = {x.value: x.name.lower() for x in gguf.GGMLQuantizationType}
    for number in (9, 15, 16, 17, 18, 19, 21, 22, 29, 34, 35):
        told = said(whole[:kind] + struct.pack("<I", number) + whole[kind + 4 :])
        assert f"as {theirs[number]} (type {number}), which cannot be read here; there are " in told
        assert "Take another quantization" in told and "damaged" not in told
    assert "type number 99, which ggml does not have" in said(
        whole[:kind] + struct.pack("<I", 99) + whole[kind + 4 :]
    )


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="resident memory is read from Linux's /proc"
)
def test_reading_maps_the_file_and_expanding_needs_one_matrix(tmp_path):
    codes = np.zeros((4096, 8192 // 32 * 34), np.uint8)  # 36 MB a matrix, 134 MB as float32
    writer = gguf.GGUFWriter(str(tmp_path / "x.gguf"), "wan")
    for i in range(3):
        writer.add_tensor(f"{i}.weight", codes, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file()
    writer.close()
    del codes
    before = resident()
    state = read(tmp_path / "x.gguf")
    assert sum(x.flaws() for x in state.values()) == 0 and resident() - before < 16e6
    whole = state["1.weight"].expand(torch.bfloat16)  # 67 MB
    assert float(whole.sum()) == 0 and resident() - before < 67e6 + 64e6
