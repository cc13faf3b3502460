"""What is in a GGUF file?  Tensors as blocks that stay mapped, and what the file says about itself.

A head (facts by name, then a name, shape, type and position for each tensor), and behind it the bytes of all
tensors in that order, each at a multiple of the alignment. Source: docs/gguf.md of the ggml project.
"""

import mmap
import re
import struct
from math import prod

import torch

from ..storage import Blocks
from ..storage.decoders import TYPES
from .formats import CheckpointError, first_bytes
from .quoting import quoted

MAGIC = b"GGUF"
# Numbers of types in a file -> how a fact of that type is written, as struct writes it; and dense tensors.
FACTS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, LIST = 8, 9
DENSE = {
    0: torch.float32,
    1: torch.float16,
    24: torch.int8,
    25: torch.int16,
    26: torch.int32,
    27: torch.int64,
    28: torch.float64,
    30: torch.bfloat16,
}
KINDS = {kind.number: name for name, kind in TYPES.items()}
# Those that ggml has and that are not read here.
UNREAD = {
    9: "q8_1",
    15: "q8_k",
    16: "iq2_xxs",
    17: "iq2_xs",
    18: "iq3_xxs",
    19: "iq1_s",
    21: "iq3_s",
    22: "iq2_s",
    29: "iq1_m",
    34: "tq1_0",
    35: "tq2_0",
}
# Counts beyond these are those of a damaged file.
MOST_ENTRIES, MOST_AXES, MOST_NESTED = 100_000, 6, 4
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."

# The names that llama.cpp gives to a T5 encoder -> the official ones.
T5 = {
    "token_embd": "token_embedding",
    "enc.output_norm": "norm",
    "attn_norm": "norm1",
    "attn_q": "attn.q",
    "attn_k": "attn.k",
    "attn_v": "attn.v",
    "attn_o": "attn.o",
    "attn_rel_b": "pos_embedding.embedding",
    "ffn_norm": "norm2",
    "ffn_gate": "ffn.gate.0",
    "ffn_up": "ffn.fc1",
    "ffn_down": "ffn.fc2",
}


def is_gguf(path):
    """Do the first bytes say so?"""
    return first_bytes(path, 4) == MAGIC


def facts(path):
    """What a file says about itself: architecture, tokenizer, ...   -> {name: number, str or list}"""
    return _head(path)[0]


def described(path):
    """{name: meta tensor or Blocks without memory}, with shape and type"""
    return _named(path, lambda start, count: torch.empty(count, dtype=torch.uint8, device="meta"))


def mapped(path):
    """{name: tensor or Blocks}, windows into the file"""
    size = path.stat().st_size
    whole = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8) if size else None
    return _named(path, lambda start, count: whole[start : start + count])


def _named(path, window):
    """All tensors under the names of Wan, their bytes from `window(start, count)`."""
    known, entries = _head(path)
    state = {}
    for name, (shape, number, start, count) in entries.items():
        x = _tensor(window(start, count), shape, number)
        x = _reshaped(path, name, x, known.get(ORIGINAL_SHAPE + name))
        name = _official(name)
        if name in state:
            raise CheckpointError(f"{path} holds {quoted(name)} twice; fetch it again")
        state[name] = x
    return state


def _tensor(data, shape, number):
    """Bytes as what they are: a dense tensor, a matrix of blocks, or other blocks as their numbers."""
    if number in DENSE:
        dtype = DENSE[number]
        aligned = data.is_meta or data.storage_offset() % dtype.itemsize == 0
        return (data if aligned else data.clone()).view(dtype).reshape(shape)
    kind = KINDS[number]
    rows = data.reshape(prod(shape[:-1]), shape[-1] // TYPES[kind].values * TYPES[kind].bytes)
    blocks = Blocks(rows, kind)
    return blocks if len(shape) == 2 else blocks.expand().reshape(shape)


def _reshaped(path, name, x, original):
    """A tensor in the shape that the model has: GGUF keeps no leading axes of length one, and few axes."""
    if original is None:
        # One table for each time embedding; Wan has an axis for the batch in front.
        lone = re.search(r"(modulation|emb_pos)$", name) and x.ndim == 2
        original = (1, *x.shape) if lone else x.shape
    if tuple(original) == tuple(x.shape):
        return x
    sizes = isinstance(original, list | tuple) and all(isinstance(n, int) and n > 0 for n in original)
    if not sizes or prod(original) != x.numel():
        raise CheckpointError(
            f"{path} is damaged: it says that {quoted(name)} of {list(x.shape)} has the shape "
            f"{quoted(original)}. Fetch it again"
        )
    return (x.expand() if isinstance(x, Blocks) else x).reshape(original)


def _official(name):
    """The official name of a tensor that llama.cpp names; others as they are."""
    found = re.fullmatch(r"(?:enc\.blk\.(\d{1,4})\.)?(\w+|enc\.output_norm)\.weight", name)
    if name.startswith("dec."):
        return "decoder." + name
    if not found or found[2] not in T5:
        return name
    layer = "" if found[1] is None else f"blocks.{found[1]}."
    return f"{layer}{T5[found[2]]}.weight"


# ---- the head ----


def _head(path):
    """({fact: value}, {tensor: (shape, number of its type, start, bytes)}).   Raises CheckpointError"""
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parse(path, data)
    except _Unread as error:
        raise CheckpointError(
            f"{path} holds {error}, which cannot be read here; there are {', '.join(KINDS.values())} and "
            "dense floats. Take another quantization of this model"
        ) from error
    except (struct.error, UnicodeDecodeError, OverflowError, OSError, _Damage) as error:
        raise CheckpointError(
            f"{path} is a GGUF file that is damaged or cut off: {error}. Was the download interrupted? "
            "fetch it again"
        ) from error


class _Damage(Exception):
    """Something in a head that cannot be."""


class _Unread(Exception):
    """A type of blocks that is known by name alone."""


class _Cursor:
    """Reads one value after the other."""

    def __init__(self, data):
        self.data, self.at = data, 0

    def take(self, code, count=1):
        code = f"<{count}{code}"
        self.need(struct.calcsize(code))
        values = struct.unpack_from(code, self.data, self.at)
        self.at += struct.calcsize(code)
        return values

    def number(self, code):
        return self.take(code)[0]

    def need(self, count):
        if count > len(self.data) - self.at:
            raise _Damage(f"{count:,} bytes are promised at {self.at:,}, where {len(self.data):,} is the end")

    def text(self):
        count = self.number("Q")
        self.need(count)
        self.at += count
        return self.data[self.at - count : self.at].decode()

    def value(self, kind, depth=0):
        if kind in FACTS:
            return self.number(FACTS[kind])
        if kind == TEXT:
            return self.text()
        if kind != LIST or depth > MOST_NESTED:
            raise _Damage(f"a fact has the type {kind}, lists within {depth} lists")
        inner, count = self.number("I"), self.number("Q")
        if inner in FACTS:
            return list(self.take(FACTS[inner], count)) if count < len(self.data) else self.need(count)
        self.need(8 * count)  # a text or a list takes that much at least
        return [self.value(inner, depth + 1) for _ in range(count)]


def _parse(path, data):
    cursor = _Cursor(data)
    magic, version = cursor.take("s", 4)[0], cursor.number("I")
    if magic != MAGIC or version not in (2, 3):
        raise _Damage(f"it says version {version}; expected 2 or 3, with the least byte first")
    tensors, count = cursor.number("Q"), cursor.number("Q")
    if max(tensors, count) > MOST_ENTRIES:
        raise _Damage(f"it promises {tensors:,} tensors and {count:,} facts")
    known = {}
    for _ in range(count):
        name = cursor.text()
        known[name] = cursor.value(cursor.number("I"))
    rows = [_entry(cursor) for _ in range(tensors)]
    align = known.get("general.alignment", 32)
    if not isinstance(align, int) or align < 1 or align > 2**20:
        raise _Damage(f"general.alignment is {quoted(align)}")
    return known, _laid_out(rows, -(-cursor.at // align) * align, align, len(data))


def _entry(cursor):
    """(name, shape, number of the type, offset)"""
    name, axes = cursor.text(), cursor.number("I")
    if axes > MOST_AXES:
        raise _Damage(f"{quoted(name)} has {axes} axes")
    shape = cursor.take("Q", axes)[::-1]  # the one that runs fastest comes first there
    return name, shape, cursor.number("I"), cursor.number("Q")


def _laid_out(rows, begin, align, end):
    """{name: (shape, number, start, bytes)}, if the tensors fill what is behind the head, in order."""
    entries, place = {}, 0
    for name, shape, number, offset in rows:
        if number in UNREAD:
            raise _Unread(f"{quoted(name)} as {UNREAD[number]} (type {number})")
        if number not in DENSE and number not in KINDS:
            raise _Damage(f"{quoted(name)} is of the type number {number}, which ggml does not have")
        values, size = 1, DENSE[number].itemsize if number in DENSE else 0
        if number in KINDS:
            values, size = TYPES[KINDS[number]].values, TYPES[KINDS[number]].bytes
        # Within 2**40 numbers nothing overflows on the way; no weight has as many.
        if not shape or 0 in shape or prod(shape) > 2**40 or shape[-1] % values:
            raise _Damage(f"{quoted(name)} has the shape {list(shape)}, no whole blocks of {values}")
        count = prod(shape) // values * size
        if name in entries or offset != place or begin + offset + count > end:
            raise _Damage(f"{quoted(name)} does not lie where it should")
        entries[name] = shape, number, begin + offset, count
        place = -(-(offset + count) // align) * align
    if end > begin + place + align:
        raise _Damage(f"{end - begin - place:,} bytes at its end belong to no tensor")
    return entries
