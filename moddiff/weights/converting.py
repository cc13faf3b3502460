"""How do these weights become a file that others read?  Other names, another type, one tensor at a time."""

import json

import torch

from ..saving import write_whole
from ..storage import Blocks, Stored
from . import building, files
from .formats import STORED
from .packing import FORMATS
from .quoting import listed
from .single import part_of

CODES = {dtype: code for code, dtype in STORED.items()}


def convert(source, target, to="official", dtype=None, config=None):
    """Write the weights of a file, in any format that is read, as one safetensors file.

    source  file, index or folder of one component
    target  the file to write
    to      whose names: "official", "diffusers" or "ours"
    dtype   what to convert to; None: as stored. fp8 and int8 are then written as ComfyUI's newer files have
            them, a weight_scale and a comfy_quant beside each weight; GGUF blocks need a dtype
    config  a dict, or the path of a config.json, where the sizes cannot be told from the shapes
    ->      (kind, tensors written, bytes)

    Never more than one tensor is in memory. Raises what reading raises, and ValueError for blocks without a
    dtype.
    """
    dtype = building.as_dtype(dtype)
    part = part_of(source, config=config)
    state = building.rename(files.read(source), part.kind, to, part.config)
    blocks = [name for name, x in state.items() if isinstance(x, Blocks)]
    if blocks and dtype is None:
        raise ValueError(
            f"{len(blocks)} weights are GGUF blocks, which no other file holds ({listed(blocks, 2)}); say "
            "what to expand them to: dtype='bf16'"
        )
    entries = {}
    for name, x in state.items():
        entries |= _entries(name, x, dtype)
    size = sum(width for _, _, width, _ in entries.values())
    write_whole(target, lambda path: _write(path, entries))
    return part.kind, len(entries), size


def _entries(name, x, dtype):
    """{name in the file: (type, shape, bytes, a function that makes the tensor)}"""
    if isinstance(x, Stored) and dtype is None:
        stem = name.removesuffix(".weight")
        scale = x.scale.reshape(()) if x.scale.numel() == 1 else x.scale
        kind = next(kind for kind, codes in FORMATS.items() if codes == x.codes.dtype)
        note = torch.tensor(list(json.dumps({"format": kind}).encode()), dtype=torch.uint8)
        made = {name: x.codes, f"{stem}.weight_scale": scale, f"{stem}.comfy_quant": note}
        return {there: _entry(part, part.dtype, part.clone) for there, part in made.items()}
    wanted = dtype or x.dtype
    if isinstance(x, Stored):
        return {name: _entry(x, wanted, lambda: x.expand(wanted))}
    return {name: _entry(x, wanted, lambda: x.to(wanted))}


def _entry(x, dtype, make):
    return dtype, list(x.shape), x.numel() * dtype.itemsize, make


def _write(path, entries):
    """The format of safetensors: the length of a head, the head in JSON, and the bytes in its order."""
    head, at = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, shape, size, _) in entries.items():
        head[name] = {"dtype": CODES[dtype], "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, _, _, make in entries.values():
            file.write(make().contiguous().reshape(-1).view(torch.uint8).numpy().data)
