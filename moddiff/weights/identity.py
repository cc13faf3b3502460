"""Is this the same model?  A fingerprint of a component: what it computes with, and nothing of where."""

import hashlib
from pathlib import Path

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..hooks import walk

LARGE = 64 << 20  # bytes of a tensor that is read once, and again when torch counts a change in it
_known = WeakTensorKeyDictionary()  # large tensor -> (its memory and count of changes, its fingerprint)


def fingerprint(part):
    """32 hex digits: the same for the same weights, config, tokenizer and extensions, on any machine.

    part  a component, with all extensions around it; or anything else, which is then known by its class, and
          by the `fingerprint` that it says itself, as a component that computes elsewhere does

    Device, taps and what is remembered of a run are not in it. Large tensors are remembered: one changed
    through `.data`, which torch does not count, keeps its fingerprint.
    """
    digest = hashlib.blake2b(digest_size=16)
    met = set()
    for path, piece in walk(part):
        if id(piece) in met:
            continue
        met.add(id(piece))
        digest.update(f"{path} {_description(piece)}\n".encode())
        if isinstance(piece, nn.Module):
            for name, tensor in [*piece._parameters.items(), *piece._buffers.items()]:
                if tensor is not None:
                    digest.update(f"{name} {_of_tensor(tensor)}\n".encode())
    return digest.hexdigest()


def tensor_fingerprint(tensor):
    """16 hex digits of a tensor's bytes, shape and dtype; one without values (meta) has only the latter."""
    digest = hashlib.blake2b(f"{tuple(tensor.shape)} {tensor.dtype}".encode(), digest_size=8)
    if not tensor.is_meta:
        for part in tensor.detach().reshape(-1).split(1 << 24):
            digest.update(part.contiguous().view(torch.uint8).cpu().numpy())
    return digest.hexdigest()


def _of_tensor(tensor):
    if tensor.nbytes < LARGE or tensor.is_meta:
        return tensor_fingerprint(tensor)
    here = tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor._version
    if tensor not in _known or _known[tensor][0] != here:
        _known[tensor] = here, tensor_fingerprint(tensor)
    return _known[tensor][1]


def _description(piece):
    """What of a piece is no tensor and yet in what it computes."""
    kind = type(piece)
    said = [f"{kind.__module__}.{kind.__qualname__}", repr(getattr(piece, "config", ""))]
    own = getattr(piece, "__dict__", {})
    if isinstance(own.get("fingerprint"), str):
        said.append(own["fingerprint"])
    if own.get("_tokenizer") is not None:
        words = own["_tokenizer"].model.to_str()
        said.append(hashlib.blake2b(words.encode(), digest_size=8).hexdigest())
    if isinstance(own.get("call"), tuple):  # an Extension: name, arguments, options
        said.append(repr(_in_words(own["call"])))
    return " ".join(said)


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
