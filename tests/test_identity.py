"""Does a fingerprint tell two models apart, and one model from itself never?"""

import copy
import subprocess
import sys

import pytest
import small
import torch

import moddiff
from moddiff.extensions import adapted, offloaded, quantized, tiled
from moddiff.weights import fingerprint
from moddiff.weights.identity import tensor_fingerprint


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return small.pipeline(tmp_path_factory.mktemp("tokenizer"))


def test_the_same_model_has_the_same_fingerprint_in_another_process(tmp_path):
    folder = small.release(tmp_path)
    code = """
import sys, moddiff
from moddiff.weights import fingerprint
print(*(fingerprint(part) for part in moddiff.load(sys.argv[1]).components.values()))
"""
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True)
    here = [fingerprint(part) for part in moddiff.load(folder).components.values()]
    assert done.stdout.split() == here and len(set(here)) == len(here) and len(here[0]) == 32


def test_any_change_in_what_is_computed_is_another_fingerprint(pipe):
    dit, before = copy.deepcopy(pipe.dit), fingerprint(pipe.dit)
    assert fingerprint(dit) == before
    weight = dit.blocks[1].ffn[0].weight
    with torch.no_grad():
        weight[[0, 1]] = weight[[1, 0]]  # the same numbers in another order
    assert fingerprint(dit) != before
    stacks = [
        quantized(pipe.dit, "int8"),
        quantized(pipe.dit, "q8_0"),
        offloaded(pipe.dit, keep=1),
        offloaded(quantized(pipe.dit, "int8"), keep=1),
        adapted(pipe.dit, rank=2),
        pipe.dit,
        small.dit(seed=1),
        small.dit(eps=1e-5),
        copy.deepcopy(pipe.dit).bfloat16(),
    ]
    assert len({fingerprint(part) for part in stacks}) == len(stacks)
    assert fingerprint(tiled(pipe.vae, size=(32, 32), overlap=(8, 8))) != fingerprint(pipe.vae)


def test_a_run_leaves_the_fingerprints_as_they_were(pipe):
    small_one = pipe.replace(dit=offloaded(quantized(pipe.dit, "int8"), keep=0), vae=offloaded(pipe.vae))
    before = [fingerprint(part) for part in small_one.components.values()]
    small_one("a star", steps=1, frames=5)
    assert [fingerprint(part) for part in small_one.components.values()] == before
    again = pipe.replace(dit=offloaded(quantized(pipe.dit, "int8"), keep=0), vae=offloaded(pipe.vae))
    assert [fingerprint(part) for part in again.components.values()] == before


def test_another_tokenizer_is_another_text_encoder(pipe, tmp_path):
    before = fingerprint(pipe.text)
    builder = copy.deepcopy(pipe.text.tokenizer.model)
    builder.add_tokens(["moving"])
    text = copy.copy(pipe.text)
    tokenizer = copy.copy(pipe.text.tokenizer)
    tokenizer.model = builder
    object.__setattr__(text, "_tokenizer", tokenizer)
    assert fingerprint(text) != before == fingerprint(pipe.text)


def test_where_a_file_lies_is_not_in_it():
    class Part:
        def __init__(self, call):
            self.call = call

    assert fingerprint(Part(("adapted", ("/a/x.safetensors",), {}))) == fingerprint(
        Part(("adapted", ("/b/c/x.safetensors",), {}))
    )
    assert fingerprint(Part(("adapted", (), {"strength": 1.0}))) != fingerprint(
        Part(("adapted", (), {"strength": 0.5}))
    )


def test_what_computes_elsewhere_says_its_fingerprint_itself():
    class Far:
        def __init__(self, fingerprint):
            self.fingerprint = fingerprint

    assert fingerprint(Far("a")) == fingerprint(Far("a")) != fingerprint(Far("b"))


def test_a_large_tensor_is_read_once_until_it_changes(monkeypatch):
    from moddiff.weights import identity

    monkeypatch.setattr(identity, "LARGE", 100)
    layer, read = torch.nn.Linear(16, 16), []
    real = identity.tensor_fingerprint
    monkeypatch.setattr(identity, "tensor_fingerprint", lambda x: read.append(x) or real(x))
    first = fingerprint(layer)
    assert fingerprint(layer) == first and [x.shape for x in read].count((16, 16)) == 1
    with torch.no_grad():
        layer.weight[0, 0] += 1
    assert fingerprint(layer) != first


def test_tensors_tell_bytes_shapes_and_dtypes_apart():
    x = torch.arange(6.0)
    prints = {
        tensor_fingerprint(y)
        for y in (
            x,
            x + 1e-6,
            x.reshape(2, 3),
            x.double(),
            x.bfloat16(),
            x.to("meta"),
            x.flip(0),
            x.nan_to_num(0).mul(-1),
        )
    }
    assert (
        len(prints) == 8
        and tensor_fingerprint(x) == tensor_fingerprint(x.clone())
        and tensor_fingerprint(x.reshape(2, 3).T.contiguous().T) == tensor_fingerprint(x.reshape(2, 3))
    )
    assert (
        tensor_fingerprint(torch.tensor(1.0))
        == tensor_fingerprint(torch.tensor(1.0))
        != tensor_fingerprint(torch.tensor(2.0))
    )
