"""How is a matrix product computed?  Linear layers that know their dtype, and the fastest exact way here."""

import torch
import torch.nn.functional as F
from torch import nn

HAS_ONEDNN = torch.backends.mkldnn.is_available()


class Linear(nn.Linear):
    """A linear layer that takes any dtype and computes in that of its weights."""

    def forward(self, x):
        return product(x.to(self.weight.dtype), self.weight, self.bias)


class Linear32(nn.Linear):
    """A linear layer in float32 whatever its weights' dtype: time and the last layer are exact in Wan."""

    def forward(self, x):
        # Official Wan switches autocast off around just these: 16 bits cannot tell timestep 998 from 999.
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
            return product(x.float(), self.weight.float(), self.bias.float())


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
    learning = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    return HAS_ONEDNN and not learning


@torch.library.custom_op("moddiff::product", mutates_args=())
def compiled_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The same for torch.compile, which takes that operator for its own and wants packed weights."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@compiled_product.register_fake
def _(x, weight, bias):
    return x.new_empty(*x.shape[:-1], weight.shape[0])
