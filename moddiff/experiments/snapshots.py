"""Is the model as it was?  What a model is made of, remembered, compared and put back."""

import hashlib

from torch import nn

from ..fingerprints import fingerprint
from ..hooks import bytes_of, members, walk

SLOTS = (
    "parameters",
    "buffers",
    "modules",
    "forward hooks",
    "forward pre hooks",
    "backward hooks",
    "backward pre hooks",
)


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
        self.names = [names for path, part in parts for names in names_of(path, part)]
        tensors = {}
        for path, module in modules:
            for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
                if tensor is not None:
                    tensors.setdefault(id(tensor), Values(f"{path}.{name}".strip("."), tensor))
        self.tensors = list(tensors.values())
        self.bytes = sum(values.data.nbytes for values in self.tensors)
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
        changed = [name for part in (*self.names, *self.tensors) for name in part.restore()]
        if lost := [values.name for values in self.tensors if values.lost]:
            shown = ", ".join(lost[:5]) + ", ..." * (len(lost) > 5)
            raise Leaked(
                f"weights were changed in place and no copy was kept: {shown}; load the model again, "
                "and patch activations or change a copy (copy.deepcopy, pipe.replace), or raise copies="
            )
        return changed


def names_of(path, part):
    """The Names to watch on one part of a model: what hangs on a module, what a pipeline or wrapper holds."""
    if isinstance(part, nn.Module):
        hanging = [
            Names(path, vars(part)["_" + slot.replace(" ", "_")], title=f"{path}: {slot}".removeprefix(": "))
            for slot in SLOTS
        ]
        # Beside these its kernel, its mode, its taps: what has a public name.
        return [*hanging, Names(path, vars(part), is_public)]
    if isinstance(getattr(part, "components", None), dict):
        return [Names(path, part.components, title=f"{path}.components".strip("."))]
    return [Names(path, getattr(part, "__dict__", {}), members(part).__contains__)]


class Names:
    """What stands under which names in one dict: components, parts, hooks, or the attributes of an object.

    ours    says of a name whether it is watched
    title   how a change is called, whichever name it concerns; by default each is called by its name
    """

    def __init__(self, path, held, ours=None, title=None):
        self.path, self.held, self.ours, self.title = path, held, ours, title
        self.before = self.now()

    def now(self):
        return {name: part for name, part in self.held.items() if self.ours is None or self.ours(name)}

    def restore(self):
        before, now = self.before, self.now()
        if list(now) == list(before) and all(now[name] is before[name] for name in before):
            return []
        for name in now:
            del self.held[name]
        self.held.update(before)
        changed = [name for name in before | now if now.get(name, self) is not before.get(name, self)]
        return [self.title] if self.title else [f"{self.path}.{name}".strip(".") for name in changed]


def is_public(name):
    return not name.startswith("_")


class Values:
    """The numbers of one tensor: where they lie, their fingerprint and, where there was room, a copy."""

    def __init__(self, name, tensor):
        self.name, self.tensor = name, tensor
        self.data, self.requires_grad = tensor.data, tensor.requires_grad
        self.print, self.copy, self.lost = fingerprint(tensor.data), None, False

    def restore(self):
        moved = memory(self.tensor) != memory(self.data)
        if moved:
            self.tensor.data = self.data
        self.tensor.requires_grad_(self.requires_grad)
        overwritten = fingerprint(self.data) != self.print
        if overwritten and self.copy is not None:
            self.data.copy_(self.copy)
        self.lost = overwritten and self.copy is None
        return [self.name] if moved or overwritten else []


def memory(tensor):
    """Where the numbers of a tensor lie, and in which order and kind."""
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
