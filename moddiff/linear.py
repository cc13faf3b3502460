"""How is a matrix product computed?  Linear layers that know their dtype, and the fastest exact way here.

A layer's weight is a Parameter, or a storage of fewer bytes in its place (storage/): the layer expands it
when it runs, and everything else, taps, adapters and offloading among it, asks `dense`.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import register_flop_formula

from .storage import Dynamic, Stored

HAS_ONEDNN = torch.backends.mkldnn.is_available()


class Linear(nn.Linear):
    """A linear layer that takes any dtype and computes in that of its weights, or what they stand for."""

    def forward(self, x):
        if isinstance(self.weight, Dynamic):
            return self.weight.product(x.to(self.weight.dtype), self.bias)
        weight = dense(self)
        bias = None if self.bias is None else self.bias.to(weight.dtype)
        return product(x.to(weight.dtype), weight, bias)


class Linear32(nn.Linear):
    """A linear layer in float32 whatever its weights' dtype: time and the last layer are exact in Wan."""

    def forward(self, x):
        # Official Wan switches autocast off around just these: 16 bits cannot tell timestep 998 from 999.
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
            return product(x.float(), dense(self, torch.float32), self.bias.float())


class Embedding(nn.Embedding):
    """A table of vectors, of which only the rows that are asked for are ever expanded."""

    def forward(self, ids):
        return self.weight(rows=ids) if isinstance(self.weight, Stored) else super().forward(ids)


def dense(layer, dtype=None):
    """The weight of a layer as plain numbers, whatever it is kept as.

    layer   anything with a `weight`: a Parameter or a Stored
    dtype   what to give; None: as it is, or what it stands for
    ->      [out, in]; the Parameter itself where nothing has to be done
    """
    weight = layer.weight
    if isinstance(weight, Stored):
        return weight(dtype)
    return weight if dtype is None else weight.to(dtype)


def store(layer, weight):
    """Put another weight in the place of a layer's: a Stored, or a Parameter again.   -> the layer

    Raises ValueError for one of another shape.
    """
    if tuple(weight.shape) != tuple(layer.weight.shape):
        raise ValueError(
            f"the weight is {list(weight.shape)}; expected {list(layer.weight.shape)}, as the layer has"
        )
    del layer.weight  # torch takes no module for what was a parameter, nor the other way round
    layer.weight = weight
    return layer


def product(x, weight, bias=None):
    """x weight^T + bias.   x [..., c_in], weight [c_out, c_in], bias [c_out] -> [..., c_out]

    In float32 on a CPU torch asks MKL, which on processors not made by Intel reaches half of what oneDNN
    does (measured in guides/dit.md). The values differ in the last digit.
    """
    if x.dtype != torch.float32 or not onednn(x, weight):
        return F.linear(x, weight, bias)
    if torch.compiler.is_compiling():
        return compiled_product(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def onednn(*tensors):
    """May oneDNN, which torch has on board, take these?  On a CPU, and if nobody wants a derivative."""
    if tensors[0].device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    if any(type(x) not in (torch.Tensor, nn.Parameter) for x in tensors):
        return False  # of another package, such as torchao, with a product of its own
    learning = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    return HAS_ONEDNN and not learning


@torch.library.custom_op("moddiff::product", mutates_args=())
def compiled_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The same for torch.compile, which takes that operator for its own and wants packed weights."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@compiled_product.register_fake
def _(x, weight, bias):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@register_flop_formula([torch.ops.mkldnn._linear_pointwise, torch.ops.moddiff.product])
def _(x_shape, weight_shape, *others, out_shape=None, **options):
    """For torch's counter of operations, which does not know this product: n * c_in * c_out, twice."""
    return 2 * math.prod(x_shape) * weight_shape[0]
