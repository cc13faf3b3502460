"""What if the inputs have 8 bits, too?  Then whole numbers are multiplied, and only the sums are floats."""

import torch
import torch.nn.functional as F

from .scaled import Scaled, rounded


class Dynamic(Scaled):
    """8 bit numbers with a scale for each row, multiplied with inputs that are rounded likewise, row by row.

    codes, scale, dtype: as Scaled; the scale is [out, 1]
    """

    def product(self, x, bias):
        """x weight^T + bias, x rounded to 8 bits a row.   [..., in] -> [..., out] of the type of x"""
        if torch.is_grad_enabled() and x.requires_grad:  # rounding has no derivative
            return F.linear(x, self(x.dtype), bias)
        rows = x.reshape(-1, x.shape[-1])
        codes, scale = rounded(rows, self.codes.dtype)
        if self.codes.dtype == torch.int8:
            sums = whole_product(codes, self.codes)
            out = (sums * scale * self.scale.float().T).to(x.dtype)
        elif has_fp8(x.device):
            # With a scale for each row it gives bfloat16 and no other type.
            out = torch._scaled_mm(
                codes, self.codes.T, scale, self.scale.float().T, out_dtype=torch.bfloat16
            ).to(x.dtype)
        else:
            out = (codes.float() * scale).to(x.dtype) @ self(x.dtype).T
        out = out if bias is None else out + bias.to(x.dtype)
        return out.reshape(*x.shape[:-1], -1)


def whole_product(a, b):
    """a b^T of int8, exactly.   [n, k], [m, k] -> float32 [n, m]"""
    n, k = a.shape
    if a.device.type == "cuda":
        if k % 8 or len(b) % 8:  # which its kernel does not take
            return (a.double() @ b.double().T).float()  # whole numbers far below 2 ** 53, so exact
        if n <= 16:  # nor that, so zeros are added and their rows cut off
            a = torch.cat([a, a.new_zeros(17 - n, k)])
    return torch._int_mm(a, b.T)[:n].float()


def has_fp8(device):
    """Does this device multiply 8 bit floats?  NVIDIA's do from 8.9 on (Ada, Hopper)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
