"""Is the model as it was?  What a model is made of, remembered, compared and put back."""

import hashlib

import torch
from torch import nn

from ..hooks import bytes_of

SLOTS = ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks")


class Leaked(RuntimeError):
    """Something could not be put back."""


class Snapshot:
    """Everything in a module, or in the `components` of a pipeline, that a run or a patch could leave changed.

    obj     a module or pipeline
    copies  up to this size the values are copied, and can be put back; larger models are only fingerprinted, and a change is an error
    """

    def __init__(self, obj, copies="500 MB"):
        self.obj = obj
        if not isinstance(obj, nn.Module) and not isinstance(getattr(obj, "components", None), dict):
            raise TypeError(
                f"cannot watch a {type(obj).__name__}; expected a module, or a pipeline with its components"
            )
        self.components = None if isinstance(obj, nn.Module) else dict(obj.components)
        parts = {"": obj} if self.components is None else self.components
        self.modules, self.tensors = [], {}
        for role, part in parts.items():
            for path, module in part.named_modules() if isinstance(part, nn.Module) else ():
                path = ".".join(filter(None, (role, path)))
                self.modules.append(
                    (path, module, {slot: dict(getattr(module, slot)) for slot in SLOTS}, attributes(module))
                )
                for slot in ("_parameters", "_buffers"):
                    for name, tensor in getattr(module, slot).items():
                        if tensor is not None:
                            self.tensors.setdefault(
                                id(tensor),
                                (f"{path}.{name}".strip("."), tensor, tensor.data, tensor.requires_grad),
                            )
        self.bytes = sum(data.numel() * data.element_size() for _, _, data, _ in self.tensors.values())
        keep = bytes_of(copies) is None or self.bytes <= bytes_of(copies)
        self.prints = {key: fingerprint(data) for key, (_, _, data, _) in self.tensors.items()}
        self.copies = {key: data.clone() for key, (_, _, data, _) in self.tensors.items()} if keep else {}
        self.fingerprint = hashlib.blake2b(
            repr([(name, self.prints[key]) for key, (name, *_) in self.tensors.items()]).encode(),
            digest_size=8,
        ).hexdigest()

    def restore(self):
        """Put everything back.   -> the names of what had changed; raises Leaked for a change in values that were not copied"""
        changed, lost = [], []
        if self.components is not None and self.components != self.obj.components:
            changed.append("components")
            self.obj.components.clear()
            self.obj.components.update(self.components)
        for path, module, slots, plain in self.modules:
            for slot, held in slots.items():
                now = getattr(module, slot)
                if list(now) != list(held) or any(now[name] is not held[name] for name in held):
                    changed.append(f"{path}: {slot.removeprefix('_').replace('_', ' ')}".removeprefix(": "))
                    now.clear()
                    now.update(held)
            now = attributes(module)
            for name in {**plain, **now}:
                if name not in plain:
                    delattr(module, name)
                elif name not in now or now[name] is not plain[name]:
                    module.__dict__[name] = plain[name]
                else:
                    continue
                changed.append(f"{path}.{name}".strip("."))
        for key, (name, tensor, data, requires_grad) in self.tensors.items():
            moved = (
                tensor.data_ptr() != data.data_ptr()
                or tensor.shape != data.shape
                or tensor.dtype != data.dtype
                or tensor.device != data.device
            )
            if moved:
                tensor.data = data
            tensor.requires_grad_(requires_grad)
            wrong = fingerprint(data) != self.prints[key]
            if wrong and self.copies:
                data.copy_(self.copies[key])
            if moved or wrong:
                changed.append(name)
            if wrong and not self.copies:
                lost.append(name)
        if lost:
            raise Leaked(
                f"weights were changed in place and no copy was kept: {', '.join(lost[:5])}{', ...' if len(lost) > 5 else ''}; load the model "
                "again, and patch activations or change a copy (copy.deepcopy, pipe.replace) instead, or raise copies="
            )
        return changed


def attributes(module):
    """What is set on a module besides its parameters, buffers and parts: its kernel, its mode, its taps."""
    return {name: value for name, value in vars(module).items() if not name.startswith("_")}


def fingerprint(tensor):
    """A short hash of a tensor's bytes, shape and dtype; a tensor without values (meta) has only the latter."""
    digest = hashlib.blake2b(f"{tuple(tensor.shape)} {tensor.dtype}".encode(), digest_size=8)
    if not tensor.is_meta:
        for part in tensor.detach().reshape(-1).split(1 << 24):
            digest.update(part.contiguous().view(torch.uint8).cpu().numpy())
    return digest.hexdigest()
