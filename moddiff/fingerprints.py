"""Is it the same model?  A short hash of a component's weights, config and tokenizer: its fingerprint.

    fingerprint(pipe.dit) -> "9f0c...": the same in each process and on each device, another one as soon as a
                             weight, a size, the tokenizer or an extension around it is another

Caches keep what a component computed under it, a run says by it what it was made with, and a remote component
by which model it expects. Kernels and devices, which do not say what is computed, are not in it.
"""

import dataclasses
import hashlib
from pathlib import Path

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from .hooks import walk

_known = WeakIdKeyDictionary()  # tensor or tokenizer -> (what it was like, its hash): each is read once


def fingerprint(part):
    """The fingerprint of a component, or of one tensor: 16 hex digits.

    part  a component, in any stack of extensions; or a tensor, for its bytes, shape and dtype alone
    ->    str

    Weights are read once, about a second for each GB, and again only when torch has counted a change in place
    or one of eight values looked at is another: a write through `tensor.data`, which torch does not count, to
    a few values between those is not seen. Weights on the meta device have a shape alone, and a plain
    function its name alone.
    """
    if torch.is_tensor(part):
        return _of_tensor(part)
    if (told := _told(part)) is not None:
        return told
    digest = hashlib.blake2b(digest_size=8)
    for path, inside in walk(part):
        for word in _words(path, inside):
            digest.update(word.encode() + b"\0")
    return digest.hexdigest()


def _words(path, part):
    """What one part of a component says of itself, its modules apart."""
    kind = part if callable(part) and hasattr(part, "__qualname__") else type(part)
    yield f"{path} {kind.__module__}.{kind.__qualname__}"
    if (told := _told(part)) is not None:
        yield told
    if not isinstance(part, nn.Module):
        return
    own = vars(part)
    if dataclasses.is_dataclass(config := own.get("config")):
        yield repr(config)
    if "call" in own:  # an extension: the call that made it
        yield repr(_in_words(own["call"]))
    if hasattr(tokenizer := own.get("_tokenizer"), "model"):
        yield _once(tokenizer, id(tokenizer.model), lambda: _of(tokenizer.model.to_str().encode()))
    for name, tensor in [*part._parameters.items(), *part._buffers.items()]:
        if tensor is not None:
            yield f"{name} {_of_weight(tensor)}"


def _in_words(value):
    """An argument, the same in every process: of an object its class, of a path the file's name alone.

    What the file holds is in the weights, and it may lie elsewhere on another machine.
    """
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str | Path):
        return Path(value).name
    if isinstance(value, tuple | list):
        return [_in_words(item) for item in value]
    if isinstance(value, dict):
        return {key: _in_words(item) for key, item in value.items()}
    if isinstance(value, torch.device | torch.dtype):
        return str(value)
    return getattr(value, "__qualname__", type(value).__qualname__)


def _told(part):
    """What a component that runs elsewhere, or holds no torch module, says of itself."""
    # Its own word: an extension passes on what the one inside it says.
    if "fingerprint" in getattr(part, "__dict__", {}) or hasattr(type(part), "fingerprint"):
        return part.fingerprint if isinstance(part.fingerprint, str) else None
    return None


def _of_weight(tensor):
    if tensor.is_inference():  # torch counts no changes of these
        return _of_tensor(tensor)
    like = tensor.data_ptr(), tensor._version, tensor.shape, tensor.dtype, _few(tensor)
    return _once(tensor, like, lambda: _of_tensor(tensor))


def _few(tensor):
    """Eight values, evenly spread."""
    if tensor.is_meta or not tensor.is_contiguous():
        return None
    return str(tensor.detach().view(-1)[:: max(tensor.numel() // 8, 1)].tolist())  # text: NaN is like NaN


def _once(thing, like, read):
    """read(), or what it gave when the thing was last like this."""
    if thing not in _known or _known[thing][0] != like:
        _known[thing] = like, read()
    return _known[thing][1]


def _of(data):
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def _of_tensor(tensor):
    digest = hashlib.blake2b(f"{tuple(tensor.shape)} {tensor.dtype}".encode(), digest_size=8)
    if not tensor.is_meta:
        for piece in tensor.detach().reshape(-1).split(1 << 24):
            digest.update(piece.contiguous().view(torch.uint8).cpu().numpy())
    return digest.hexdigest()
