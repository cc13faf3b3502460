"""What travels between the two ends?  One message each way: a header, and tensors as they lie in memory.

A message is a safetensors file: nothing in it can be run, and any language reads it. The header is JSON in
its metadata, under "moddiff":

    version       of this protocol
    role          "text", "image", "dit" or "vae"
    fingerprint   of the component that is asked, and of the one that answered
    op            what is asked: "encode", "decode", "prepare", "call", "tokens", "counts"
    deadline      seconds that the asking end goes on waiting: the clocks of two machines differ
    traceparent   the span that the answer belongs to (W3C), or null
    at            where the run is: step, sigma, branch, expert, window, run
    options       plain values for the component;  looks: who looks inside (see looking.py)

Shapes and dtypes stand in the file itself, and both ends check all of it.
"""

import json
import math

import safetensors.torch
import torch
from safetensors import SafetensorError

from ..weights.formats import STORED

VERSION = 1
LARGEST_HEADER = 2**20
CODES = {dtype: code for code, dtype in STORED.items()}  # what safetensors calls a dtype


class RemoteError(ConnectionError):
    """A component that runs elsewhere did not answer, or not as it must.

    status  of HTTP, where there was an answer; None: there was none
    """

    def __init__(self, message, status=None):
        super().__init__(message)
        self.status = status


class Malformed(ValueError):
    """What arrived is no message."""


# ---- a message as bytes ----------------------------------------------------------------------------------


def packed(header, tensors):
    """A message.   header dict, tensors {name: tensor} -> (pieces, their bytes in all)

    The pieces are the tensors' own memory, where it lies in one run: they are sent from there.
    """
    # The widest numbers first, so that each begins where its kind may begin.
    order = sorted(tensors, key=lambda name: -tensors[name].element_size())
    told, axes, pieces, end = {}, {}, [], 0
    for name in order:
        x, axes[name] = _in_memory(tensors[name].detach().cpu())
        if x.dtype not in CODES:
            raise TypeError(f"{name} is of {x.dtype}, which does not travel; expected one of {_dtypes()}")
        begin, end = end, end + x.nbytes
        told[name] = {"dtype": CODES[x.dtype], "shape": list(x.shape), "data_offsets": [begin, end]}
        if x.nbytes:
            pieces.append(memoryview(x.reshape(-1).view(torch.uint8).numpy()))
    told["__metadata__"] = {"moddiff": json.dumps(header), "axes": json.dumps(axes)}
    head = json.dumps(told).encode()
    head += b" " * (-len(head) % 8)
    pieces.insert(0, len(head).to_bytes(8, "little") + head)
    return pieces, len(pieces[0]) + end


def _in_memory(x):
    """A tensor with its axes as they lie in memory, the slowest first, and which of its own these are.

    A convolution rounds otherwise where the channels lie last, so that they do goes along.
    """
    axes = sorted(range(x.ndim), key=lambda axis: -x.stride(axis))
    if not x.permute(axes).is_contiguous():  # a part of something larger, or expanded
        axes = list(range(x.ndim))
    return x.permute(axes).contiguous(), axes


def unpacked(data):
    """(header, {name: tensor}) of a message.   Raises Malformed.

    data  bytes
    """
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or not 2 <= size <= min(len(data) - 8, LARGEST_HEADER):
        raise Malformed(f"{len(data)} bytes that do not begin as a safetensors file does")
    try:
        told = json.loads(data[8 : 8 + size])["__metadata__"]
        header, axes = json.loads(told["moddiff"]), json.loads(told["axes"])
        tensors = {name: _back(x, axes[name]) for name, x in safetensors.torch.load(data).items()}
    # Strangers' bytes: JSON of another shape, or nested too deep; sizes that no tensor has.
    except (ValueError, KeyError, TypeError, RecursionError, SafetensorError, RuntimeError) as error:
        raise Malformed(f"no message: {type(error).__name__}: {str(error)[:200]}") from None
    if not isinstance(header, dict):
        raise Malformed(f"a header that is a {type(header).__name__}; expected an object")
    return header, tensors


def _back(x, axes):
    """What `_in_memory` was given.

    A copy begins at a round address, as all memory of torch does: elsewhere a product rounds otherwise.
    """
    if sorted(axes) != list(range(x.ndim)):
        raise ValueError(f"axes {brief(axes)} for a tensor of {x.ndim}")
    return x.clone().permute([axes.index(axis) for axis in range(x.ndim)])


def _dtypes():
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in CODES)


# ---- what both ends check --------------------------------------------------------------------------------


def misfit(header, role, fingerprint):
    """Why a message is not for this component, or not from it, as a sentence; "" when it fits."""
    if header.get("version") != VERSION:
        return (
            f"it speaks version {brief(header.get('version'))} of the protocol, here it is {VERSION}; "
            "install the same moddiff on both ends"
        )
    if header.get("role") != role:
        return f"it is about the role {brief(header.get('role'))}; expected {role!r}"
    if header.get("fingerprint") != fingerprint:
        return (
            f"the model's fingerprint is {brief(header.get('fingerprint'))}; expected {fingerprint!r}: these "
            "are other weights or another config; connect again (moddiff.remote) to go on with the new ones"
        )
    return ""


def brief(value):
    """A stranger's value, as short as an error needs it."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def number(value, name, low=0.0, high=math.inf):
    """A number from the wire.   Raises Malformed unless it is one, and there."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise Malformed(f"{name} is {brief(value)}; expected a number from {low:g} to {high:g}")
    return value


def names(value, name, count=None):
    """A list of texts from the wire, of so many.   Raises Malformed for anything else."""
    texts = isinstance(value, list) and all(isinstance(item, str) for item in value)
    if not texts or count not in (None, len(value)):
        raise Malformed(
            f"{name} is {brief(value)}; expected a list of {count or ''} texts".replace("  ", " ")
        )
    return value
