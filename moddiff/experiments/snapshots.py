"""Is the model as it was?  What a model is made of, remembered, compared and put back."""

import hashlib

import torch
from torch import nn

from ..hooks import bytes_of, members, walk

SLOTS = ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks")


class Leaked(RuntimeError):
    """Something could not be put back."""


class Snapshot:
    """Everything in a module, a pipeline or a wrapper that a run or a patch could leave changed.

    obj     a module, a pipeline with its `components`, or a wrapper around one
    copies  up to this size the values are copied, and can be put back; larger models are only
            fingerprinted, and a change is an error
    """

    def __init__(self, obj, copies="500 MB"):
        self.obj = obj
        first = {}  # a part that stands in two places is meant by its first name
        for path, part in walk(obj):
            first.setdefault(id(part), (path, part))
        parts = list(first.values())
        modules = [(path, part) for path, part in parts if isinstance(part, nn.Module)]
        if not modules and not isinstance(getattr(obj, "components", None), dict):
            raise TypeError(
                f"cannot watch a {type(obj).__name__}; expected a module, or a pipeline with its components"
            )
        self.holders = [Holder(path, part) for path, part in parts if not isinstance(part, nn.Module)]
        self.modules = [Module(path, module) for path, module in modules]
        tensors = {}
        for path, module in modules:
            for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
                if tensor is not None:
                    tensors.setdefault(id(tensor), Values(f"{path}.{name}".strip("."), tensor))
        self.tensors = list(tensors.values())
        self.bytes = sum(values.data.numel() * values.data.element_size() for values in self.tensors)
        limit = bytes_of(copies, "copies")
        if limit is None or self.bytes <= limit:
            for values in self.tensors:
                values.copy = values.data.clone()
        prints = [(values.name, values.print) for values in self.tensors]
        self.fingerprint = hashlib.blake2b(repr(prints).encode(), digest_size=8).hexdigest()

    def restore(self):
        """Put everything back.   -> the names of what had changed

        Raises Leaked for a change in values that were not copied.
        """
        changed = []
        for part in (*self.holders, *self.modules, *self.tensors):
            changed += part.restore()
        lost = [values.name for values in self.tensors if values.lost]
        if lost:
            shown = ", ".join(lost[:5]) + ", ..." * (len(lost) > 5)
            raise Leaked(
                f"weights were changed in place and no copy was kept: {shown}; load the model again, "
                "and patch activations or change a copy (copy.deepcopy, pipe.replace), or raise copies="
            )
        return changed


class Holder:
    """Which components a pipeline has, or what a wrapper wraps."""

    def __init__(self, path, obj):
        self.path, self.pipeline = path, isinstance(getattr(obj, "components", None), dict)
        self.now = obj.components if self.pipeline else vars(obj)
        names = self.now if self.pipeline else members(obj)
        self.before = {name: self.now[name] for name in names if name in self.now}

    def restore(self):
        names = set(self.before) | (set(self.now) if self.pipeline else set())
        changed = [name for name in names if self.now.get(name) is not self.before.get(name)]
        for name in names - set(self.before):
            del self.now[name]
        self.now.update(self.before)
        if self.pipeline and changed:
            changed = ["components"]
        return [f"{self.path}.{name}".strip(".") for name in changed]


class Module:
    """What hangs on one module: its parameters, buffers, parts and hooks, its kernel, its mode, its taps."""

    def __init__(self, path, module):
        self.path, self.module = path, module
        self.slots = {slot: dict(getattr(module, slot)) for slot in SLOTS}
        self.attributes = attributes(module)

    def restore(self):
        changed = []
        for slot, before in self.slots.items():
            now = getattr(self.module, slot)
            if list(now) != list(before) or any(now[name] is not before[name] for name in before):
                words = slot.removeprefix("_").replace("_", " ")
                changed.append(f"{self.path}: {words}".removeprefix(": "))
                now.clear()
                now.update(before)
        before, now = self.attributes, attributes(self.module)
        for name in now.keys() - before.keys():
            delattr(self.module, name)
        differing = [name for name in before if name not in now or now[name] is not before[name]]
        for name in differing:
            self.module.__dict__[name] = before[name]
        differing += now.keys() - before.keys()
        return changed + [f"{self.path}.{name}".strip(".") for name in differing]


class Values:
    """The numbers of one tensor: where they lie, their fingerprint and, where there was room, a copy."""

    def __init__(self, name, tensor):
        self.name, self.tensor = name, tensor
        self.data, self.requires_grad = tensor.data, tensor.requires_grad
        self.print, self.copy, self.lost = fingerprint(tensor.data), None, False

    def restore(self):
        moved = not self.lies_there()
        if moved:
            self.tensor.data = self.data
        self.tensor.requires_grad_(self.requires_grad)
        overwritten = fingerprint(self.data) != self.print
        if overwritten and self.copy is not None:
            self.data.copy_(self.copy)
        self.lost = overwritten and self.copy is None
        return [self.name] if moved or overwritten else []

    def lies_there(self):
        """Does the tensor still look at the memory it looked at?"""
        now, before = self.tensor, self.data
        same_kind = now.shape == before.shape and now.dtype == before.dtype and now.device == before.device
        return same_kind and now.data_ptr() == before.data_ptr()


def attributes(module):
    """What is set on a module besides its parameters, buffers and parts: its kernel, its mode, its taps."""
    return {name: value for name, value in vars(module).items() if not name.startswith("_")}


def fingerprint(tensor):
    """A short hash of a tensor's bytes, shape and dtype; one without values (meta) has only the latter."""
    digest = hashlib.blake2b(f"{tuple(tensor.shape)} {tensor.dtype}".encode(), digest_size=8)
    if not tensor.is_meta:
        for part in tensor.detach().reshape(-1).split(1 << 24):
            digest.update(part.contiguous().view(torch.uint8).cpu().numpy())
    return digest.hexdigest()
