"""How do numbers become fewer bits?  One function a kind: a matrix to what stands in its place.

Nothing is searched for: a scale is what the largest number of its row (or block) needs, and the others are
rounded. Source: for q8_0 and q4_0 the reference of llama.cpp (ggml-quants.c), to the bit.
"""

import torch

from .blocks import Blocks
from .dynamic import Dynamic
from .scaled import Scaled, rounded


def int8(weight):
    return Scaled(*rounded(weight, torch.int8), weight.dtype)


def fp8(weight):
    return Scaled(*rounded(weight, torch.float8_e4m3fn), weight.dtype)


def int8_dynamic(weight):
    return Dynamic(*rounded(weight, torch.int8), weight.dtype)


def fp8_dynamic(weight):
    return Dynamic(*rounded(weight, torch.float8_e4m3fn), weight.dtype)


def q8_0(weight):
    blocks = weight.float().reshape(-1, 32)
    scale = blocks.abs().amax(1, keepdim=True) / 127
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    scaled = blocks * inverse
    # Halves are rounded away from zero here, not to the even neighbour.
    q = (scaled.abs() + 0.5).floor() * scaled.sign()
    return packed(weight, "q8_0", scale, q.to(torch.int8).view(torch.uint8))


def q4_0(weight):
    blocks = weight.float().reshape(-1, 32)
    # The number furthest from zero becomes -8, which has no positive counterpart among 16 values.
    furthest = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
    scale = furthest / -8
    inverse = torch.where(scale != 0, 1 / scale, 0.0)
    q = (blocks * inverse + 8.5).to(torch.uint8).clamp(max=15)
    low, high = q.chunk(2, 1)
    return packed(weight, "q4_0", scale, low | high << 4)


def packed(weight, kind, scale, q):
    """Each block: its scale in 16 bits, then its numbers."""
    codes = torch.cat([scale.half().view(torch.uint8), q], 1)
    return Blocks(codes.reshape(len(weight), -1), kind, weight.dtype)


ENCODERS = {
    "int8": int8,
    "int8-dynamic": int8_dynamic,
    "fp8": fp8,
    "fp8-dynamic": fp8_dynamic,
    "q8_0": q8_0,
    "q4_0": q4_0,
}
