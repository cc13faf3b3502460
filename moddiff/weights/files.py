"""Which files hold a component?  One, an index and its shards, or a folder with either; and config.json."""

import json
import os
import re
from pathlib import Path

from . import formats, gguf
from .formats import CheckpointError, first_bytes
from .quoting import first_line, listed, quoted

SUFFIXES = ("safetensors", "pth", "pt", "bin", "gguf")
# model.safetensors.index.json; with a variant model.safetensors.index.fp16.json, or as Diffusers once wrote
# it model.safetensors.fp16.index.json; with pickled shards pytorch_model.bin.index.json.
INDEX = re.compile(r"(?P<stem>.+)\.(?P<suffix>safetensors|pth|pt|bin)(\.\w+)?\.index(\.\w+)?\.json")


def files(where):
    """The weight files at a path: a file, an index of shards, or a folder that holds one or the other.

    ->  tuple of Path, all of which exist. Of a folder, safetensors before .pth, .pt and .bin, and the
        release's own precision before a variant such as model.fp16.safetensors

    Raises CheckpointError when there is none, when several could be meant, or when the index names a shard
    that is absent.
    """
    where = _one(Path(where))
    # An index names a shard once for each tensor in it; dict.fromkeys keeps the order and drops repeats.
    shards = tuple(where.parent / shard for shard in dict.fromkeys(_weight_map(where).values())) or (where,)
    absent = [shard.name for shard in shards if not shard.is_file()]
    if absent:
        raise CheckpointError(
            f"{where.name} names {len(shards)} shards but {listed(absent)} "
            f"{'is' if len(absent) == 1 else 'are'} not in {where.parent}; download "
            f"{'it' if len(absent) == 1 else 'them'} into that folder"
        )
    return shards


def describe(where):
    """What is stored, without loading it.   path -> {name: meta tensor with its shape and dtype}"""
    return _whole(where, "described")


def read(where):
    """The tensors, mapped into memory.   path -> {name: tensor}

    Raises CheckpointError for a file that is absent or cut off, for a shard that lacks what the index
    promises, and for a pickle that holds anything but tensors (it is never run).
    """
    return _whole(where, "mapped")


def list_folder(folder):
    """The names in a folder, sorted.   Raises CheckpointError for one that may not be read."""
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be looked into: {error.strerror}") from error


def read_json(path):
    """The dictionary in a JSON file.   Raises CheckpointError for a file that holds none."""
    try:
        content = json.loads(first_bytes(path))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON ({first_line(error)}); fetch it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path} holds a {type(content).__name__}; expected an object in braces. Fetch it again"
        )
    return content


def folder_of(where):
    """The folder that a component lies in: it may be given as that, as its index, a shard or the weights."""
    where = Path(where)
    return where if where.is_dir() else where.parent


def config_beside(where):
    """The config.json in a folder, or beside a file.   -> dict"""
    path = folder_of(where) / "config.json"
    if not path.is_file():
        raise CheckpointError(
            f"there is no config.json in {path.parent}; it came with the weights: copy it there, "
            "or pass config=, as single files need: preset('wan2.1-t2v-1.3b')['dit'] or its like"
        )
    return read_json(path)


def size_of(tensors):
    """Bytes of a dictionary of tensors, meta or not."""
    return sum(x.nbytes for x in tensors.values())


def _one(where):
    """The one file or index that is meant by a path or a folder."""
    if not where.is_dir():
        if not where.is_file():
            raise CheckpointError(f"there is no weights file at {where}; check the path, or download it")
        return where
    names = [name for name in list_folder(where) if (where / name).is_file()]
    for suffix in SUFFIXES:
        indexes = [name for name in names if (index := INDEX.fullmatch(name)) and index["suffix"] == suffix]
        fitting = indexes or [name for name in names if name.endswith(f".{suffix}")]
        if fitting:
            break
    # Variants such as model.fp16.safetensors are taken only where the file without that word is not.
    plain = [name for name in fitting if re.fullmatch(r"[^.]+\.\w+(\.index\.json)?", name)]
    candidates = plain or fitting
    if len(candidates) == 1:
        return where / candidates[0]
    cure = "Name the file you mean" if candidates else "Is this the folder of the component itself?"
    # Several files without an index: "model-00001-of-00003" is how shards are called everywhere.
    if any("-of-" in name for name in candidates):
        cure = "These look like shards: fetch their index too"
    raise CheckpointError(
        f"{where} holds {listed(candidates) or 'no weights'}; expected one *.safetensors.index.json with its "
        f"shards, or one *.safetensors, *.pth or *.bin file. {cure}"
    )


def _weight_map(index):
    """{tensor name: file name of its shard}, as an index says it; empty for a file of weights"""
    if not INDEX.fullmatch(index.name):
        return {}
    shards = read_json(index).get("weight_map")
    whole = isinstance(shards, dict) and shards and all(isinstance(shard, str) for shard in shards.values())
    if not whole:
        raise CheckpointError(
            f"{index} is not an index of shards: expected a `weight_map` of file names. Fetch it again"
        )
    # An index is a file from a stranger, and must not make us open others anywhere on the disk.
    outside = [shard for shard in shards.values() if re.search(r"[/\\:\0]|^\.*$", shard)]
    if outside:
        raise CheckpointError(
            f"{index} names the shard {quoted(outside[0])!r}; expected files beside the index, not paths. "
            "Fetch it again"
        )
    return shards


def _whole(where, form):
    """{name: tensor} of all files at a path, "mapped" or "described".

    What the index gives to one shard is not taken from another.
    """
    where, state = _one(Path(where)), {}
    home = _weight_map(where)
    for path in files(where):
        look = getattr(gguf if gguf.is_gguf(path) else formats, form)
        state |= {name: x for name, x in look(path).items() if home.get(name, path.name) == path.name}
    lacking = [f"{name} (in {shard})" for name, shard in home.items() if name not in state]
    if lacking:
        raise CheckpointError(
            f"{where.name} promises {listed(lacking, 1)}, which the shards do not hold; are index and shards "
            "from the same release? download them together"
        )
    return state
