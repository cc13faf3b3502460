"""Fingerprints: equal where the same is computed, another one at the first thing that is different."""

import copy
import subprocess
import sys

import pytest
import torch
from small import pipeline

from moddiff.extensions import offloaded, quantized
from moddiff.fingerprints import fingerprint


@pytest.fixture
def pipe(tmp_path):
    return pipeline(tmp_path)


@pytest.mark.parametrize("role", ("text", "dit", "vae"))
def test_a_copy_is_the_same_model(pipe, role):
    part = pipe.components[role]
    assert len(fingerprint(part)) == 16
    assert fingerprint(part) == fingerprint(part) == fingerprint(copy.deepcopy(part))


@pytest.mark.parametrize("role", ("text", "dit", "vae"))
def test_one_changed_weight_is_another_model_and_changed_back_the_same(pipe, role):
    part = pipe.components[role]
    before, weight = fingerprint(part), [*part.parameters()][-1]
    with torch.no_grad():
        old = weight.clone()
        weight.view(-1)[0] += 1e-3
        changed = fingerprint(part)
        weight.copy_(old)
    assert changed != before == fingerprint(part)
    weight.data.add_(1)
    assert fingerprint(part) != before


def test_dtypes_configs_tokenizers_and_extensions_count(pipe):
    dit, text = pipe.dit, pipe.text
    prints = {fingerprint(dit), fingerprint(copy.deepcopy(dit).half()), fingerprint(quantized(dit, "int8"))}
    other = copy.deepcopy(dit)
    object.__setattr__(other.config, "eps", 1e-3)  # it is frozen, and no weight tells of it
    prints.add(fingerprint(other))
    shorter = copy.deepcopy(text)
    shorter.tokenizer.model.add_tokens(["purple"])
    assert len(prints | {fingerprint(text), fingerprint(shorter)}) == 6


def test_a_moved_component_and_one_with_another_kernel_is_the_same(pipe):
    assert fingerprint(copy.deepcopy(pipe.dit).use_kernel("math")) == fingerprint(pipe.dit)


def test_it_is_the_same_in_another_process():
    code = (
        "import moddiff; from moddiff.fingerprints import fingerprint; "
        "print(fingerprint(moddiff.load('tiny').vae))"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    import moddiff

    assert there.stdout.strip() == fingerprint(moddiff.load("tiny").vae)


def test_what_tells_its_own_fingerprint_is_asked_for_it_also_inside_a_wrapper():
    class Elsewhere:
        def __init__(self, told):
            self.fingerprint = told

        def encode(self, prompts):
            return [torch.zeros(1, 4) for _ in prompts]

    class Slow:
        def __init__(self, inner):
            self.wraps = inner

    assert fingerprint(Elsewhere("a")) == "a"
    assert fingerprint(Slow(Elsewhere("a"))) != fingerprint(Slow(Elsewhere("b")))


def test_a_run_leaves_the_fingerprints_as_they_were(pipe):
    small_one = pipe.replace(dit=offloaded(quantized(pipe.dit, "int8"), keep=0), vae=offloaded(pipe.vae))
    before = [fingerprint(part) for part in small_one.components.values()]
    small_one("a star", steps=1, frames=5)
    assert [fingerprint(part) for part in small_one.components.values()] == before
    again = pipe.replace(dit=offloaded(quantized(pipe.dit, "int8"), keep=0), vae=offloaded(pipe.vae))
    assert [fingerprint(part) for part in again.components.values()] == before


def test_where_a_file_lies_is_not_in_it():
    class Part(torch.nn.Module):
        def __init__(self, call):
            super().__init__()
            self.call = call

    assert fingerprint(Part(("adapted", ("/a/x.safetensors",), {}))) == fingerprint(
        Part(("adapted", ("/b/c/x.safetensors",), {}))
    )
    assert fingerprint(Part(("adapted", (), {"strength": 1.0}))) != fingerprint(
        Part(("adapted", (), {"strength": 0.5}))
    )


def test_tensors_tell_bytes_shapes_and_dtypes_apart():
    x = torch.arange(6.0)
    prints = {
        fingerprint(y)
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
        and fingerprint(x) == fingerprint(x.clone())
        and fingerprint(x.reshape(2, 3).T.contiguous().T) == fingerprint(x.reshape(2, 3))
    )
    assert fingerprint(torch.tensor(1.0)) == fingerprint(torch.tensor(1.0)) != fingerprint(torch.tensor(2.0))
