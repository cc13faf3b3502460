"""Is what was encoded before given out again, to the bit, and never when something changed?"""

from copy import deepcopy

import pytest
import small
import torch

from moddiff import capture, hooks, patch
from moddiff.extensions import quantized
from moddiff.remembered import MOST

PROMPT = "a red circle moving left on a black background"


@pytest.fixture
def text(tmp_path):
    return small.pipeline(tmp_path).text


class Counted:
    """How often the encoder computed."""

    def __init__(self, text, monkeypatch):
        self.passes, read = 0, type(text).read

        def counted(encoder, ids):
            self.passes += 1
            return read(encoder, ids)

        monkeypatch.setattr(type(text), "read", counted)


def test_a_prompt_is_encoded_once_and_given_out_unchanged(text, monkeypatch):
    counted = Counted(text, monkeypatch)
    first = text.encode([PROMPT, "a blue square"])
    first[0].zero_()  # somebody writes into what they were given
    again = text.encode([PROMPT])[0]
    assert counted.passes == 2 and torch.equal(again, deepcopy(text).encode([PROMPT])[0]) and again.any()
    assert counted.passes == 3, "a copy begins with nothing"


def test_a_run_encodes_each_prompt_once(tmp_path, monkeypatch):
    pipe = small.pipeline(tmp_path)
    counted = Counted(pipe.text, monkeypatch)
    films = [pipe(PROMPT, seed=0, steps=2) for _ in range(2)]
    assert counted.passes == 2 and films[0] == films[1]  # the prompt, and the negative one


CHANGES = {
    "in place": lambda layer: layer.weight.detach().mul_(2),
    "through data": lambda layer: layer.weight.data.mul_(2),
    "one number through data": lambda layer: layer.weight.data.view(-1)[7:8].add_(1),
    "another tensor": lambda layer: setattr(layer, "weight", torch.nn.Parameter(layer.weight.detach() * 2)),
    "another memory": lambda layer: setattr(layer.weight, "data", layer.weight.detach() * 2),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changed_is_computed_again(text, change):
    before = text.encode([PROMPT])[0]
    with torch.no_grad():
        CHANGES[change](text.layers[1].ffn.down)
        after = text.encode([PROMPT])[0]
    assert not torch.equal(before, after) and torch.equal(after, deepcopy(text).encode([PROMPT])[0])


def test_whoever_looks_sees_it_computed(text, monkeypatch):
    plain, counted = text.encode([PROMPT])[0], Counted(text, monkeypatch)
    with capture(text, "layers.0.attn.probs") as seen:
        assert torch.equal(text.encode([PROMPT])[0], plain)
    assert len(seen) == counted.passes == 1
    with patch(text, "layers.0.attn.out", hooks.zero()):
        assert not torch.equal(text.encode([PROMPT])[0], plain)
    assert torch.equal(text.encode([PROMPT])[0], plain)
    handle = text.layers[0].register_forward_hook(lambda module, inputs, out: out * 2)
    assert not torch.equal(text.encode([PROMPT])[0], plain)
    handle.remove()
    assert torch.equal(text.encode([PROMPT])[0], plain)


def test_other_parts_kernels_and_types_are_computed_again(text, monkeypatch):
    counted = Counted(text, monkeypatch)
    text.encode([PROMPT])
    text.layers[0].attn.kernel = "math"
    text.encode([PROMPT])
    text.layers[0].ffn = deepcopy(text.layers[0].ffn)
    text.encode([PROMPT])
    assert counted.passes == 3
    assert text.to(torch.bfloat16).encode([PROMPT])[0].dtype == torch.bfloat16 and counted.passes == 4
    small_one = quantized(text, "fp8")
    for _ in range(2):
        small_one.encode([PROMPT])
    assert counted.passes == 5


def test_no_more_than_so_many_are_kept(text):
    for i in range(MOST + 5):
        text.remembered(text, (i,), lambda i=i: torch.tensor([float(i)]))
    assert list(text.remembered.held) == [(i,) for i in range(5, MOST + 5)]
