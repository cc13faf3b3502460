"""Does the reader take a message apart, and refuse the ones that lie?"""

import json

import torch

from .verdict import NOT_ATTEMPTED, Ended, Verdict, attempted, exercise, expect, shape_of


@exercise("what came is what went, and each lie is a ValueError before anything is made of it.")
def read_message(answer):
    """The exercise of 21_remote.

    answer(data) -> {name: float32 tensor} of a message: 8 bytes with the length of its head, little end
    first; the head, JSON of {name: {"dtype": "F32", "shape": [..], "data_offsets": [first, end]}}; the
    values, in which the offsets count. Raises ValueError for bytes that are no such message.
    """
    tensors = {
        "x": torch.randn(2, 3, generator=torch.Generator().manual_seed(21)),
        "t": torch.tensor([500.0]),
    }
    for part in ({"t": tensors["t"]}, tensors):
        found = attempted(answer, message(part))
        expect(isinstance(found, dict), f"got {shape_of(found)}; expected {{name: tensor}}")
        expect(found.keys() == part.keys(), f"got the names {sorted(found)}; expected {sorted(part)}")
        for name, x in part.items():
            got = found[name]
            expect(
                torch.is_tensor(got) and got.shape == x.shape,
                f"{name}: got {shape_of(got)}; expected {shape_of(x)}, as the head says",
            )
            expect(
                torch.equal(got, x), f"{name}: other numbers came than went; offsets count behind the head"
            )
    for lie, data in lies(message(tensors)).items():
        _refused(answer, lie, data)


def message(tensors, **changes):
    """The bytes of a message.   changes: of what the head tells of x"""
    head, values = {}, b""
    for name, x in tensors.items():
        raw = x.numpy().tobytes()
        told = {"dtype": "F32", "shape": list(x.shape), "data_offsets": [len(values), len(values) + len(raw)]}
        head[name], values = told | (changes if name == "x" else {}), values + raw
    written = json.dumps(head).encode()
    return len(written).to_bytes(8, "little") + written + values


def lies(good):
    """{what is wrong: bytes}"""
    x = {"x": torch.ones(2, 3)}
    return {
        "that has 5 bytes, too few for the length of a head": good[:5],
        "whose head is said to be longer than all of it": (10**6).to_bytes(8, "little") + good[8:],
        "that was cut off within its last tensor": good[:-2],
        "of numbers that are no F32": message(x, dtype="F64"),
        "that has 24 bytes for a tensor of 240": message(x, shape=[2, 30]),
        "with an offset below 0, which Python counts from the end": message(x, data_offsets=[-24, 24]),
        "with an offset beyond its end": message(x, data_offsets=[0, 48], shape=[4, 3]),
        "with sizes below 0, whose product fits": message(x, shape=[-2, -3]),
    }


def _refused(answer, lie, data):
    try:
        found = answer(data)
    except ValueError:
        return
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        raise Ended(
            Verdict(
                False,
                f"a message {lie} ended in {type(error).__name__}; look before you take, and raise "
                "ValueError, by which the caller knows that it was no message",
            )
        ) from error
    if found is None:
        raise Ended(NOT_ATTEMPTED)
    raise Ended(Verdict(False, f"it took a message {lie}; expected a ValueError"))
