"""What is in these files?  Names, shapes and tensors of safetensors and `.pth` files, in shards or whole.

Nothing here copies weights: a tensor is a window into the file, and the system reads its pages when they are
first touched. Whatever a damaged file does, it ends in a CheckpointError that names the file.
"""

import json
import os
import pickle
import re
import struct
import zipfile
from math import prod
from pathlib import Path

import torch
from safetensors import safe_open

from .foreign import not_weights
from .quoting import first_line, listed, quoted

# What safetensors calls a type, and torch.
STORED = {
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
SUFFIXES = ("safetensors", "pth", "pt", "bin")
# model.safetensors.index.json; with a variant model.safetensors.index.fp16.json, or as Diffusers once wrote
# it model.safetensors.fp16.index.json; with pickled shards pytorch_model.bin.index.json.
INDEX = re.compile(r"(?P<stem>.+)\.(?P<suffix>safetensors|pth|pt|bin)(\.\w+)?\.index(\.\w+)?\.json")
HEAD_LIMIT = 100_000_000  # bytes; the safetensors library reads no longer head either
# What unpickling a damaged file can end in.
DAMAGE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
    zipfile.BadZipFile,
)


class CheckpointError(ValueError):
    """A weights file is absent, cut off, or not a file of plain tensors."""


def files(where):
    """The weight files at a path: a file, an index of shards, or a folder that holds one or the other.

    ->  tuple of Path, all of which exist. Of a folder, safetensors before .pth, .pt and .bin, and the
        release's own precision before a variant such as model.fp16.safetensors

    Raises CheckpointError when there is none, when several could be meant, or when the index names a shard
    that is absent.
    """
    where = _one(Path(where))
    if not INDEX.fullmatch(where.name):
        return (where,)
    shards = tuple(where.parent / shard for shard in dict.fromkeys(_weight_map(where).values()))
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
    return _whole(where, _described)


def read(where):
    """The tensors, mapped into memory.   path -> {name: tensor}

    Raises CheckpointError for a file that is absent or cut off, for a shard that lacks what the index
    promises, and for a pickle that holds anything but tensors (it is never run).
    """
    return _whole(where, _mapped)


def list_folder(folder):
    """The names in a folder, sorted.   Raises CheckpointError for one that may not be read."""
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be looked into: {error.strerror}") from error


def read_json(path):
    """The dictionary in a JSON file.   Raises CheckpointError for a file that holds none."""
    return _table(path, _bytes(path))


def config_beside(where):
    """The config.json in a folder, or beside a file.   -> dict"""
    where = Path(where)
    path = (where if where.is_dir() else where.parent) / "config.json"
    if not path.is_file():
        raise CheckpointError(
            f"there is no config.json in {path.parent}; it came with the weights: copy it there, "
            "or pass config=, as single files need: preset('wan2.1-t2v-1.3b')['dit'] or its like"
        )
    return read_json(path)


def size_of(tensors):
    """Bytes of a dictionary of tensors, meta or not."""
    return sum(prod(x.shape) * x.element_size() for x in tensors.values())


def oddity(state):
    """What keeps a state from being names and plain tensors, in words; None when nothing does."""
    if not isinstance(state, dict):
        return f"it is a {type(state).__name__}"
    for name, x in state.items():
        if not isinstance(name, str):
            return f"{quoted(name)} is not a name"
        if not torch.is_tensor(x):
            return f"{quoted(name)} is a {type(x).__name__}"
        if x.is_nested or x.is_quantized or x.layout != torch.strided:
            kind = "nested" if x.is_nested else "quantized" if x.is_quantized else str(x.layout)
            return f"{quoted(name)} is a {kind} tensor"
    return None


# ---- one path, one or many files ----


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
    if any("-of-" in name for name in candidates):
        cure = "These look like shards: fetch their index too"
    raise CheckpointError(
        f"{where} holds {listed(candidates) or 'no weights'}; expected one *.safetensors.index.json with its "
        f"shards, or one *.safetensors, *.pth or *.bin file. {cure}"
    )


def _weight_map(index):
    """{tensor name: file name of its shard}, as an index says it"""
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        raise CheckpointError(
            f"{index} is not an index of shards: expected a `weight_map` of file names. Fetch it again"
        )
    outside = [shard for shard in shards.values() if re.search(r"[/\\:\0]|^\.*$", shard)]
    if outside:
        raise CheckpointError(
            f"{index} names the shard {quoted(outside[0])!r}; expected files beside the index, not paths. "
            "Fetch it again"
        )
    return shards


def _whole(where, look):
    """{name: tensor} of all files at a path. What the index gives to one shard is not taken from another."""
    where, state = _one(Path(where)), {}
    home = _weight_map(where) if INDEX.fullmatch(where.name) else {}
    for path in files(where):
        state |= {name: x for name, x in look(path).items() if home.get(name, path.name) == path.name}
    lacking = [f"{quoted(name)} (in {quoted(shard)})" for name, shard in home.items() if name not in state]
    if lacking:
        more = f" and {len(lacking) - 1} more tensors" if lacking[1:] else ""
        raise CheckpointError(
            f"{where.name} promises {lacking[0]}{more}, which the shards do not hold; are index and shards "
            "from the same release? download them together"
        )
    return state


def _described(path):
    if _is_safetensors(path):
        return _head(path)
    return {name: x.to("meta") for name, x in _unpickle(path).items()}


def _mapped(path):
    if not _is_safetensors(path):
        return _unpickle(path)
    _head(path)  # says in words what is wrong with a damaged file
    with safe_open(path, framework="pt", device="cpu") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def _is_safetensors(path):
    """What the first bytes say a file is.   Raises CheckpointError for what is no file of weights at all."""
    head = _bytes(path, 512)
    what = not_weights(head)
    if what:
        raise CheckpointError(f"{path} {what}")
    if head[8:9] == b"{":  # after the length of its head, which may begin with any byte, a pickle's too
        return True
    named = path.suffix == ".safetensors"
    if named and head.startswith((b"PK\3\4", b"\x80")):
        raise CheckpointError(
            f"{path} was written by torch.save and is no safetensors file; rename it to .pth"
        )
    return named


def _bytes(path, size=-1):
    """The first bytes of a file, or all."""
    try:
        with open(path, "rb") as file:
            return file.read(size)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


def _table(path, data):
    """The dictionary that some bytes of a file spell in JSON."""
    try:
        table = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON ({first_line(error)}); fetch it again") from error
    if not isinstance(table, dict):
        raise CheckpointError(
            f"{path} holds a {type(table).__name__}; expected an object in braces. Fetch it again"
        )
    return table


# ---- safetensors ----


def _head(path):
    """{name: meta tensor} from the head of a safetensors file; it must fit itself and the file's length."""
    length, size = path.stat().st_size, int.from_bytes(_bytes(path, 8), "little")
    if not 2 <= size <= min(length - 8, HEAD_LIMIT):
        raise CheckpointError(
            f"{path} is not a whole safetensors file: its head should take {size} bytes and the file has "
            f"{length}. Was the download cut off? fetch it again"
        )
    head = _table(path, _bytes(path, 8 + size)[8:])
    notes = head.pop("__metadata__", {})
    if not isinstance(notes, dict) or not all(isinstance(note, str) for note in notes.values()):
        raise CheckpointError(f"{path} is damaged: its __metadata__ is not a table of words. Fetch it again")
    tensors = {name: _entry(path, name, entry) for name, entry in head.items()}
    end = 0
    for start, stop, name in sorted((*entry["data_offsets"], name) for name, entry in head.items()):
        if start != end:
            raise CheckpointError(
                f"{path} is damaged: {quoted(name)} should begin at byte {end} of the data and begins at "
                f"{start}. Fetch it again"
            )
        end = stop
    expected = 8 + size + end
    if length != expected:
        raise CheckpointError(
            f"{path} is {'cut off' if length < expected else 'too long'}: it has {length} bytes and its head "
            f"describes {expected}. Was the download interrupted? fetch it again"
        )
    return tensors


def _entry(path, name, entry):
    """The meta tensor that one entry of a head describes."""
    fields = entry if isinstance(entry, dict) else {}
    code, shape, window = (fields.get(field) for field in ("dtype", "shape", "data_offsets"))
    if isinstance(code, str) and code not in STORED:
        raise CheckpointError(
            f"{path} holds {quoted(name)} as {quoted(code)}, a type this library cannot read; expected one "
            f"of {', '.join(STORED)}. Take a bf16 or fp32 release"
        )
    whole = _counts(shape) and _counts(window) and len(window) == 2 and isinstance(code, str)
    if not whole or prod(shape) * STORED[code].itemsize != window[1] - window[0]:
        raise CheckpointError(
            f"{path} is damaged: {quoted(name)} is described as {quoted(entry)}; expected a dtype, a shape, "
            "and two data_offsets as far apart as these take. Fetch it again"
        )
    return torch.empty(shape, dtype=STORED[code], device="meta")


def _counts(values):
    """Is this a list of whole numbers from 0 on, none beyond any disk?"""
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**50 for value in values)


# ---- pickles ----


def _unpickle(path):
    """The tensors of one torch.save file, mapped where it is an archive, as since torch 1.6."""
    state = _load(path)
    for wrapper in ("state_dict", "model_state_dict"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    odd = oddity(state)
    if odd:
        raise CheckpointError(
            f"{path} is not a flat dictionary of tensors: {odd}. Save only model.state_dict()"
        )
    hollow = [name for name, x in state.items() if x.is_meta]
    if hollow:
        raise CheckpointError(
            f"{path} holds shapes without values: {listed(hollow)}. It was saved from the meta device; "
            "fetch the weights themselves"
        )
    return state


def _load(path):
    """What torch.load gives. Only tensors are ever built: weights_only refuses code."""
    archive = _bytes(path, 2) == b"PK"
    windows = []  # (address, bytes) of every storage that the pickle asks for

    def note(storage, location):
        windows.append((storage.data_ptr(), storage.nbytes()))
        return storage

    try:
        records = _records(path) if archive else []
        state = torch.load(path, map_location=note if archive else "cpu", weights_only=True, mmap=archive)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than tensors, or is damaged, so it was not opened: {_refusal(error)}. A "
            "pickle can run code when it is loaded. Take the safetensors form of these weights, or a file "
            "from a source you trust that holds tensors only"
        ) from error
    except CheckpointError:
        raise
    except DAMAGE as error:
        raise CheckpointError(f"{path} is damaged or cut off: {first_line(error)}. Fetch it again") from error
    # Mapped, a storage is a window from where its record begins, as long as the pickle says. A record that is
    # shorter would go on into its neighbour: so compare, in the order in which they lie.
    if archive and [size for _, size in sorted(windows) if size] != records:
        raise CheckpointError(
            f"{path} is damaged: its {len(records)} records of values do not have the sizes that its "
            "tensors need. Fetch it again"
        )
    return state


def _records(path):
    """Sizes of the records of values, as they lie in a torch.save archive, which may be mapped as it is.

    Raises CheckpointError for an archive of something else, and for a compressed one: mapped, its bytes would
    not be the values.
    """
    with zipfile.ZipFile(path) as archive:
        entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
    names = [entry.filename for entry in entries]
    inside = {name.split("/")[-1] for name in names}
    if "data.pkl" not in inside or "constants.pkl" in inside:
        what = (
            "a TorchScript program" if "constants.pkl" in inside else f"a zip archive of {listed(names, 3)}"
        )
        raise CheckpointError(
            f"{path} is {what}; expected an archive that torch.save wrote of a state_dict()"
        )
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise CheckpointError(
            f"{path} is a compressed archive, which torch.save never writes and which cannot be mapped; "
            "unpack it and save the state again with torch.save or safetensors"
        )
    return [entry.file_size for entry in entries if "/data/" in entry.filename and entry.file_size]


def _refusal(error):
    """What torch refused, without its advice on how to switch the refusal off."""
    asked = re.search(r"(?:GLOBAL|REDUCE|function) (\S+\.\S+)", str(error))
    return f"it asks for {quoted(asked[1])}" if asked else "its pickle is not one of tensors"
