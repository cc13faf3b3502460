"""What is in these files?  Names, shapes and tensors of safetensors files, sharded or not, and of `.pth` files.

Nothing here copies weights: a tensor is a window into the file, and the system reads its pages when they are first touched.
"""

import json
import pickle
import struct
from math import prod
from pathlib import Path

import torch
from safetensors import safe_open

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
INDEX = ".safetensors.index.json"


class CheckpointError(ValueError):
    """A weights file is absent, cut off, or not a file of plain tensors."""


def files(where, variant=None):
    """The weight files at a place: a file, an index of shards, or a folder that holds one or the other.

    variant  the word between dots, such as "fp16" in model.fp16.safetensors, where a folder has several
    ->       tuple of Path, all of which exist

    Raises CheckpointError when there is none, when several could be meant, or when the index names a shard that is absent.
    """
    where = Path(where)
    if where.is_dir():
        found = next(filter(None, (sorted(where.glob(f"*{suffix}")) for suffix in (INDEX, *SUFFIXES))), [])
        words = [path for path in found if variant and f".{variant}." in path.name]
        found = (
            words
            if variant
            else [path for path in found if path.name.removesuffix(INDEX).count(".") <= 1] or found
        )
        if len(found) != 1:
            what = ", ".join(path.name for path in found) or "no weights"
            raise CheckpointError(
                f"{where} holds {what}; expected one *{INDEX} with its shards, or one *.safetensors, *.pth or *.bin file. "
                + ("Name the file you mean" if found else "Is this the folder of the component itself?")
            )
        where = found[0]
    if not where.is_file():
        raise CheckpointError(f"there is no weights file at {where}; check the path, or download it")
    if not where.name.endswith(INDEX):
        return (where,)
    shards = tuple(where.parent / name for name in dict.fromkeys(_weight_map(where).values()))
    absent = [path.name for path in shards if not path.is_file()]
    if absent:
        raise CheckpointError(
            f"{where.name} names {len(shards)} shards but {', '.join(absent)} {'is' if len(absent) == 1 else 'are'} not in "
            f"{where.parent}; download {'it' if len(absent) == 1 else 'them'} into that folder"
        )
    return shards


def describe(where):
    """What is stored, without loading it.   path -> {name: meta tensor with its shape and dtype}"""
    found = {}
    for path in files(where):
        found |= _header(path) if path.suffix == ".safetensors" else _unpickle(path, map_location="meta")
    return found


def read(where):
    """The tensors, mapped into memory.   path -> {name: tensor}

    Raises CheckpointError for a file that is absent or cut off, for a shard that lacks what the index promises, and for a pickle
    that holds anything but tensors (it is never run).
    """
    paths, state = files(where), {}
    for path in paths:
        if path.suffix == ".safetensors":
            _header(path)  # says in words what is wrong with a damaged file
            with safe_open(path, framework="pt", device="cpu") as file:
                state |= {name: file.get_tensor(name) for name in file.keys()}
        else:
            state |= _unpickle(path, map_location="cpu")
    index = _index_beside(where)
    lacking = [
        f"{name} (in {shard})"
        for name, shard in (_weight_map(index).items() if index else ())
        if name not in state
    ]
    if lacking:
        raise CheckpointError(
            f"{index.name} promises {lacking[0]}"
            + (f" and {len(lacking) - 1} more tensors" if lacking[1:] else "")
            + ", which the shards do not hold; are index and shards from the same release? download them together"
        )
    return state


def _index_beside(where):
    where = Path(where)
    found = (
        sorted(where.glob(f"*{INDEX}")) if where.is_dir() else [where] if where.name.endswith(INDEX) else []
    )
    return found[0] if found else None


def _weight_map(index):
    try:
        return json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{index} is not an index of shards ({error!r}); expected JSON with a `weight_map`. Download it again"
        ) from error


def _header(path):
    """{name: meta tensor} from the head of one safetensors file, whose length must be what the head says."""
    length = path.stat().st_size
    with open(path, "rb") as file:
        size = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))[0]
        if not 2 <= size <= length - 8:
            raise CheckpointError(
                f"{path} is not a whole safetensors file: its head should take {size} bytes and the file has {length}. "
                "Was the download cut off, or is it a page of text (a Git LFS pointer)? fetch it again"
            )
        try:
            head = json.loads(file.read(size))
        except ValueError as error:
            raise CheckpointError(
                f"{path} is not a safetensors file: its head cannot be read ({error}). Fetch it again"
            ) from error
    head.pop("__metadata__", None)
    expected = 8 + size + max((entry["data_offsets"][1] for entry in head.values()), default=0)
    if length != expected:
        raise CheckpointError(
            f"{path} is {'cut off' if length < expected else 'too long'}: it has {length} bytes and its head describes "
            f"{expected}. Was the download interrupted? fetch it again"
        )
    odd = {entry["dtype"] for entry in head.values()} - DTYPES.keys()
    if odd:
        raise CheckpointError(
            f"{path} holds tensors of type {', '.join(sorted(odd))}, which this library cannot read; expected one of "
            f"{', '.join(DTYPES)}. Take a bf16 or fp32 release"
        )
    return {
        name: torch.empty(entry["shape"], dtype=DTYPES[entry["dtype"]], device="meta")
        for name, entry in head.items()
    }


def _unpickle(path, map_location):
    """The tensors of one torch.save file. Only tensors are ever built: weights_only refuses code."""
    with open(path, "rb") as file:
        zipped = file.read(2) == b"PK"
    try:
        state = torch.load(
            path, map_location=map_location, weights_only=True, mmap=zipped and map_location == "cpu"
        )
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than tensors, so it was not opened: {_first_line(error)}. A pickle can run code when it is "
            "loaded. Take the safetensors form of these weights, or a file from a source you trust that holds tensors only"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path} is damaged or cut off: {_first_line(error)}. Fetch it again"
        ) from error
    for wrapper in ("state_dict", "model_state_dict"):
        state = state[wrapper] if isinstance(state, dict) and isinstance(state.get(wrapper), dict) else state
    odd = (
        [name for name, value in state.items() if not torch.is_tensor(value)]
        if isinstance(state, dict)
        else None
    )
    if odd is None or odd:
        what = f"{odd[0]} is a {type(state[odd[0]]).__name__}" if odd else f"it is a {type(state).__name__}"
        raise CheckpointError(
            f"{path} is not a flat dictionary of tensors: {what}. Save only model.state_dict()"
        )
    return state


def _first_line(error):
    return str(error).strip().split("\n")[0][:200] or type(error).__name__


def size_of(tensors):
    """Bytes of a dictionary of tensors, meta or not."""
    return sum(prod(x.shape) * x.element_size() for x in tensors.values())


def config_beside(where):
    """The config.json in a folder, or beside a file.   -> dict"""
    where = Path(where)
    path = (where if where.is_dir() else where.parent) / "config.json"
    if not path.is_file():
        raise CheckpointError(
            f"there is no config.json in {path.parent}; it came with the weights, copy it there or pass config="
        )
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not readable JSON ({error}); fetch it again") from error
