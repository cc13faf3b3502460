"""What is in one file of weights?  Its tensors or their description, from safetensors and from `.pth`.

Nothing here copies weights: a tensor is a window into the file, and the system reads its pages when they are
first touched. Whatever a damaged file does, it ends in a CheckpointError that names the file.
"""

import json
import mmap
import pickle
import re
import struct
import sys
import zipfile

import torch
from safetensors import SafetensorError, safe_open

from ..storage import Stored
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


def described(path):
    """{name: meta tensor with its shape and dtype}"""
    if not _is_safetensors(path):
        return {name: x.to("meta") for name, x in _unpickle(path).items()}
    # Not "pt": that maps the whole file for writing, which a machine with less memory may refuse.
    with _opened(path, "np") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}
        state = {name: _meta(path, name, x.get_shape(), x.get_dtype()) for name, x in slices.items()}
        return state | _noted(path, file, state)


def mapped(path):
    """{name: tensor}, windows into the file"""
    if not _is_safetensors(path):
        return _unpickle(path)
    wanted = described(path)  # says in words which types cannot be read
    try:
        with _opened(path, "pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}
            return state | _noted(path, file, state)
    except RuntimeError:  # torch reserves memory for all of a file, which may be more than there is
        return wanted | _windows(path)


def _is_safetensors(path):
    """What the first bytes say a file is.   Raises CheckpointError for what is no file of weights at all."""
    head = first_bytes(path, 512)
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


def first_bytes(path, size=-1):
    """The first bytes of a file, or all."""
    try:
        with open(path, "rb") as file:
            return file.read(size)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


def oddity(state):
    """What keeps a state from being names and plain tensors, in words; None when nothing does."""
    if not isinstance(state, dict):
        return f"it is a {type(state).__name__}"
    for name, x in state.items():
        if not isinstance(name, str):
            return f"{quoted(name)} is not a name"
        if isinstance(x, Stored):
            continue
        if not torch.is_tensor(x):
            return f"{quoted(name)} is a {type(x).__name__}"
        if x.is_nested or x.is_quantized or x.layout != torch.strided:
            kind = "nested" if x.is_nested else "quantized" if x.is_quantized else str(x.layout)
            return f"{quoted(name)} is a {kind} tensor"
    return None


# ---- safetensors ----


def _opened(path, framework):
    """A safetensors file. The library compares its head with itself and with the file's length."""
    try:
        return safe_open(path, framework=framework, device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} of {path.stat().st_size} bytes is damaged or cut off: {first_line(error)}. Was the "
            "download interrupted? fetch it again"
        ) from error


def _windows(path):
    """{name: tensor} of a file larger than the memory, whose head has been checked.

    Pages that somebody writes into become memory; nothing is reserved for the others, and the file stays.
    """
    # 0x4000 is MAP_NORESERVE, which Python names from 3.13 on.
    flags = mmap.MAP_PRIVATE | (0x4000 if sys.platform == "linux" else 0)
    with open(path, "rb") as file:
        whole = mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    start = 8 + int.from_bytes(whole[:8], "little")
    state = {}
    for name, entry in json.loads(whole[8:start]).items():
        if name != "__metadata__":
            (first, end), dtype = entry["data_offsets"], STORED[entry["dtype"]]
            inside = memoryview(whole)[start + first : start + end]
            x = torch.frombuffer(inside, dtype=torch.uint8) if len(inside) else torch.empty(0).byte()
            # Numbers may begin anywhere; torch wants them at multiples of their size.
            x = x if (start + first) % dtype.itemsize == 0 else x.clone()
            state[name] = x.view(dtype).view(entry["shape"])
    return state


def _meta(path, name, shape, code):
    """The meta tensor that one entry of a head describes."""
    if code not in STORED:
        raise CheckpointError(
            f"{path} holds {quoted(name)} as {quoted(code)}, a type this library cannot read; expected one "
            f"of {', '.join(STORED)}. Take a bf16 or fp32 release"
        )
    return torch.empty(shape, dtype=STORED[code], device="meta")


def _noted(path, file, state):
    """How layers are quantized, where the head says so, as newer files of ComfyUI say it beside each layer.

    -> {layer.comfy_quant: JSON as bytes}
    """
    text = (file.metadata() or {}).get("_quantization_metadata")
    if text is None:
        return {}
    try:
        layers = json.loads(text)["layers"]
        notes = {name: json.dumps(note).encode() for name, note in layers.items()}
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        raise CheckpointError(
            f"{path} has _quantization_metadata that cannot be read ({first_line(error)}); fetch it again"
        ) from error
    found = {}
    for layer, note in notes.items():
        # Some writers leave the prefix out that the tensors have.
        ends = [name for name in state if f".{name}".endswith(f".{layer}.weight")]
        if len(ends) != 1:
            raise CheckpointError(
                f"{path} says how {quoted(layer)} is quantized, but holds {len(ends)} such weights"
            )
        found[ends[0].removesuffix("weight") + "comfy_quant"] = torch.frombuffer(
            bytearray(note), dtype=torch.uint8
        )
    return found


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
    archive = first_bytes(path, 2) == b"PK"
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
