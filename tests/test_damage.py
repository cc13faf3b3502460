"""Does no damage to a quantized file ever give wrong numbers?  A clear error, or what the file says.

What loads is compared, number by number, with what the `gguf` package or a formula written here reads from
the same damaged bytes. Damage among the weights themselves cannot be seen: there the damaged numbers count.
"""

import random

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from test_gguf import DIT as GGUF_DIT
from test_gguf import state_of, theirs, write
from test_packing import DIT as FP8_DIT
from test_packing import quantized

from moddiff.linear import dense
from moddiff.weights import CheckpointError, WeightsError, build, rename
from moddiff.weights.files import describe, read

DIT = GGUF_DIT | dict(dim=64, ffn_dim=96, text_dim=32, num_layers=1)


def damaged(rng, data, head):
    """A few bytes changed, most of them in the head; or a piece cut out, doubled, or put elsewhere."""
    data, how = bytearray(data), rng.random()
    area = head if rng.random() < 0.8 else len(data)
    at = rng.randrange(area)
    if how < 0.6:
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            data[rng.randrange(area)] = rng.choice((0, 1, 2, 8, 127, 255, rng.randrange(256)))
    elif how < 0.7:
        data[at] ^= 1 << rng.randrange(8)
    elif how < 0.8:
        del data[at : at + rng.choice((1, 4, 8, 32, len(data)))]
    elif how < 0.9:
        data[at:at] = data[at : at + rng.choice((1, 4, 8, 32))]
    else:
        to, size = rng.randrange(area), rng.choice((1, 2, 4, 8))
        data[to : to + size] = data[at : at + size]
    return bytes(data)


def numbers(dit, config):
    """{official name: what the model computes with}"""
    state = {}
    for path, module in dit.named_modules():
        for leaf, x in module._parameters.items():
            if x is not None:
                state[f"{path}.{leaf}" if path else leaf] = x
        if isinstance(module, torch.nn.Linear):
            state[f"{path}.weight"] = dense(module, torch.float32)
    return rename(state, "dit", "official", config)


def same(ours, wanted):
    """Equal, and where one is no number the other is none."""
    ours, wanted = ours.float().reshape(wanted.shape), wanted.float()
    return torch.equal(ours.nan_to_num(1e9, 2e9, -2e9), wanted.nan_to_num(1e9, 2e9, -2e9))


@pytest.mark.parametrize("seed", range(10))
def test_a_hundred_damaged_gguf_files(tmp_path, seed):
    rng = random.Random(seed)
    kind = ("q8_0", "q4_0", "q5_1", "q4_1", "mxfp4")[seed % 5]
    whole = write(tmp_path / "x.gguf", state_of("dit", DIT), kind=kind).read_bytes()
    head = whole.index(b"head.head.bias") + 100
    before = theirs(tmp_path / "x.gguf")
    loaded = refused = 0
    for _ in range(100):
        (tmp_path / "x.gguf").write_bytes(damaged(rng, whole, head))
        try:
            dit = build("dit", DIT, read(tmp_path / "x.gguf"))
            describe(tmp_path / "x.gguf")
        except (CheckpointError, WeightsError) as error:
            refused += 1
            assert len(str(error)) < 5000
            continue
        loaded += 1
        try:
            wanted = theirs(tmp_path / "x.gguf")
        except (ValueError, KeyError, IndexError, OverflowError, TypeError):
            wanted = before  # the package trips over a fact that is no weight
        ours = numbers(dit, DIT)
        assert all(same(ours[name], wanted[name]) for name in ours)
    assert loaded > 1 and refused > 30


def eight_bits(x):
    """8 bit floats by their bytes: e5m2 is the upper half of a float16, e4m3 is counted out."""
    bits = x.contiguous().view(torch.uint8).numpy()
    if x.dtype == torch.float8_e5m2:
        return torch.from_numpy((bits.astype(np.uint16) << 8).view(np.float16).astype(np.float32))
    sign, exponent, mantissa = np.where(bits & 128, -1.0, 1.0), (bits >> 3) & 15, bits & 7
    size = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent.astype(float) - 10))
    return torch.from_numpy(np.where(bits & 127 == 127, np.nan, sign * size).astype(np.float32))


def formula(state):
    """{name: the numbers}, of a state in the old or the new spelling of ComfyUI."""
    found = {}
    for name, x in state.items():
        stem = name.removesuffix(".weight")
        scale = state.get(f"{stem}.scale_weight", state.get(f"{stem}.weight_scale"))
        if x.dtype in (torch.float8_e4m3fn, torch.float8_e5m2) and name.endswith(".weight"):
            found[name] = eight_bits(x).reshape(x.shape) * (1.0 if scale is None else scale.float())
        else:
            found[name] = x
    return found


def test_the_formula_knows_all_that_8_bits_can_say():
    every = torch.arange(256, dtype=torch.uint8)
    for dtype, largest in ((torch.float8_e4m3fn, 448), (torch.float8_e5m2, 57344)):
        found = eight_bits(every.view(dtype))
        assert same(every.view(dtype).float(), found) and found[found.isfinite()].max() == largest
    assert not same(eight_bits(every.view(torch.float8_e4m3fn)), eight_bits(every.view(torch.float8_e5m2)))


@pytest.mark.parametrize("seed", range(10))
def test_a_hundred_damaged_fp8_files(tmp_path, seed):
    rng, spelling = random.Random(seed), ("old", "new", "head")[seed % 3]
    codes = (torch.float8_e4m3fn, torch.float8_e5m2)[seed % 2]
    state, told, _ = quantized(spelling, codes=codes)
    path = tmp_path / "x.safetensors"
    save_file(state, path, metadata=told)
    whole = path.read_bytes()
    head = 8 + int.from_bytes(whole[:8], "little")
    loaded = refused = 0
    for _ in range(100):
        path.write_bytes(damaged(rng, whole, head))
        try:
            dit = build("dit", FP8_DIT, read(path))
            describe(path)
        except (CheckpointError, WeightsError) as error:
            refused += 1
            assert len(str(error)) < 5000
            continue
        loaded += 1
        try:
            wanted = formula(load_file(path))
        except SafetensorError as error:
            raise AssertionError("read what the library of the format does not") from error
        ours = numbers(dit, FP8_DIT)
        for name, x in ours.items():
            assert same(x, wanted[name]), name
    assert loaded > 1 and refused > 30
