"""The exercise of 21_remote: the right one passes, and usual wrong ones are told their mistake."""

import json
import math

import pytest
import torch
from answers import rejected, solution
from safetensors import SafetensorError
from safetensors.torch import load

from moddiff import checks
from moddiff.checks.messages import lies, message


def by_safetensors(data):
    try:
        return load(data)
    except SafetensorError as error:
        raise ValueError(str(error)) from None


def read(data, head=True, end=True, low=True, size=True, below=True, dtype=True):
    """The exercise, with some of its checks left out."""
    length = int.from_bytes(data[:8], "little")
    if head and (len(data) < 8 or length > len(data) - 8):
        raise ValueError
    values, found = data[8 + length :], {}
    for name, told in json.loads(data[8 : 8 + length]).items():
        first, last = told["data_offsets"]
        if (dtype and told["dtype"] != "F32") or (low and first < 0) or (end and last > len(values)):
            raise ValueError
        if size and math.prod(told["shape"]) * 4 != last - first:
            raise ValueError
        if below and min(told["shape"]) < 0:
            raise ValueError
        found[name] = torch.frombuffer(bytearray(values[first:last]), dtype=torch.float32)
        found[name] = found[name].reshape(told["shape"])
    return found


def test_the_solution_is_right_and_an_empty_function_is_not_attempted():
    assert checks.remote(solution("21_remote", "my_read")).right is True
    assert checks.remote(read).right is True
    assert checks.remote(lambda data: None).right is None


@pytest.mark.parametrize(
    "wrong, hint",
    [
        (lambda data: read(data, end=False), "an offset beyond its end ended in RuntimeError"),
        (lambda data: read(data, dtype=False), "took a message of numbers that are no F32"),
        (
            lambda data: read(data, low=False, size=False),
            "24 bytes for a tensor of 240 ended in RuntimeError",
        ),
        (lambda data: read(data, below=False), "sizes below 0, whose product fits ended in RuntimeError"),
        (lambda data: list(read(data).values()), "expected {name: tensor}"),
        (lambda data: {name: x.reshape(-1) for name, x in read(data).items()}, "x: got [6]; expected [2, 3]"),
        (lambda data: {name: x * 2 for name, x in read(data).items()}, "other numbers came"),
        (lambda data: {"x": 0}, "got the names"),
        (lambda data: data[9000], "IndexError"),
    ],
)
def test_a_wrong_reader_is_told_its_mistake(wrong, hint):
    rejected(checks.remote(wrong), hint)


def test_the_format_is_that_of_safetensors_and_each_lie_is_one_there_too():
    x = {"x": torch.randn(2, 3)}
    assert torch.equal(by_safetensors(message(x))["x"], x["x"])
    for lie, data in lies(message(x)).items():
        with pytest.raises(ValueError):
            by_safetensors(data)
            raise AssertionError(lie)
