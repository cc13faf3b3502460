"""How does a layer run with changes beside it?  As a subclass of its class that adds them, or merged.

A change is never written into the weight unless it is asked for: so it works on weights of any storage, can
be stronger in one step than in another, and is gone with the component.
"""

import functools
import math
from dataclasses import replace
from numbers import Real

from torch import nn

from ..hooks import Where, position
from ..linear import dense, product
from ..weights.building import WeightsError
from .lora_families import gain


class Applied(nn.Module):
    """One change at one layer, and how much of it is wanted.

    where     the parameter's address
    planned   lora_files.Planned: the change to the weight, the addition to the bias
    strength  a number, or a function of a Where to one
    factors   of DoRA, and the axis that they lie along; see lora_families.gain
    """

    def __init__(self, where, planned, strength, factors, axis):
        super().__init__()
        self.where, self.strength, self.axis = where, strength, axis
        self.change = planned.change
        self.register_buffer("bias", planned.bias)
        self.register_buffer("gain", factors)  # of DoRA

    def now(self):
        """The strength at this moment."""
        if not callable(self.strength):
            return self.strength
        here = {name: value for name, value in position().items() if name != "run"}
        strength = self.strength(replace(self.where, **here))
        if not isinstance(strength, Real) or not math.isfinite(strength):
            raise TypeError(f"strength= gave {strength!r} for {self.where}; expected a finite number")
        return float(strength)

    def added(self, layer, x, plain):
        """What the layer's output gains at strength 1.   x: its input; plain: its output without changes"""
        x = x.to(plain.dtype)
        y = 0 if self.bias is None else self.bias.to(plain.dtype)
        if self.gain is None:
            return y if self.change is None else y + self.change(x)
        factor = self.gain.to(plain.dtype)
        if self.axis == 1:  # lengths of columns scale what comes in: (W + dW) (g x) - W x
            return y + product((factor - 1) * x, dense(layer, x.dtype)) + self.change(factor * x)
        own = plain if layer.bias is None else plain - layer.bias.to(plain.dtype)
        return y + (factor - 1) * own + factor * self.change(x)

    def whole(self, leaf, value):
        """The change to a parameter at strength 1, as a tensor of its shape in float32."""
        if leaf == "bias":
            return self.bias.float()
        delta = self.change.delta()
        if self.gain is None:
            return delta
        factor = self.gain.reshape([-1 if i == self.axis else 1 for i in range(value.ndim)])
        return factor * (value.float() + delta) - value.float()


class Adapting:
    """A linear layer's forward with changes beside it; and DoRA's lengths."""

    def forward(self, x):
        y = plain = super().forward(x)
        for one in self.changes["weight"]:
            strength = one.now()
            if strength != 0:  # at 0 the layer is the plain one, to the bit
                y = y + strength * one.added(self, x, plain)
        return y


@functools.cache
def _class_with(kind, leaf):
    """A subclass of a layer's class in which changes are applied: a linear layer's in its forward, those of
    any other parameter (modulation, norms, the patch embedding) whenever it is read."""
    name = "Adapted" + kind.__name__.removeprefix("Adapted")
    if leaf == "weight" and issubclass(kind, nn.Linear):
        return type(name, (Adapting, kind), {})

    def changed(self):
        value = self._parameters[leaf]
        for one in self.changes[leaf]:
            if (strength := one.now()) != 0:
                value = (value.float() + strength * one.whole(leaf, value)).to(value.dtype)
        return value

    return type(name, (kind,), {leaf: property(changed)})


def attach(modules, path, planned, strength, merge):
    """Put a change where it belongs.

    modules  {path: module} of the whole component;  path: of the layer, or of a parameter
    ->       Applied
    """
    # A parameter such as blocks.3.modulation is no module: it belongs to the one it is in.
    path, leaf = (path, "weight") if path in modules else path.rsplit(".", 1)
    layer = modules[path]
    block = next((int(piece) for piece in path.split(".") if piece.isdigit()), None)
    factors, axis = None, 0
    if planned.magnitude is not None:
        try:
            factors, axis = gain(dense(layer), planned.change, planned.magnitude)
        except ValueError as error:
            raise WeightsError(f"{path}: {error}") from error
    one = Applied(Where(path, leaf, "out in", block), planned, strength, factors, axis)
    changed = [leaf] * (planned.change is not None) + ["bias"] * (planned.bias is not None)
    if merge:
        for leaf in changed:
            _merge(layer, leaf, one)
    else:
        for leaf in ["weight"] if isinstance(layer, nn.Linear) else changed:
            _beside(layer, leaf, one)
    return one


def _beside(layer, leaf, one):
    """Let a layer apply a change whenever it runs."""
    if "forward" in vars(layer):
        raise ValueError(
            f"{one.where.path} has a forward of its own, which would pass an adapter by; put adapters on "
            "before whatever gave it that"
        )
    if not hasattr(layer, "changes"):
        layer.changes = nn.ModuleDict()
    if leaf not in layer.changes:
        layer.changes[leaf] = nn.ModuleList()
        # The same object with the same tensors, as a subclass: hooks, taps and whoever holds it stay.
        layer.__class__ = _class_with(type(layer), leaf)
    layer.changes[leaf].append(one)


def _merge(layer, leaf, one):
    """Add a change to a layer's own numbers, as new ones."""
    value = layer._parameters.get(leaf)
    if value is None:  # not a Parameter, so a storage
        raise ValueError(
            f"{one.where.path} is kept as {type(layer.weight).__name__}, whose few bits cannot take the sum; "
            "merge first, quantized(adapted(part, file, merge=True), ...), or leave merge out"
        )
    total = (value.detach().float() + one.strength * one.whole(leaf, value)).to(value.dtype)
    layer._parameters[leaf] = nn.Parameter(total, value.requires_grad)
