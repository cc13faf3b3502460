"""What do the bytes of a GGUF block mean?  One function a type: blocks of bytes to float32.

A row of a matrix is cut into blocks of 32, 64 or 256 numbers. A block holds small whole numbers, packed, and
what turns them back: a scale in 16 bits, in some a least value too, and in the large ones (K) scales of 4 to
8 bits for every 16 or 32 numbers. The order of the float operations is that of llama.cpp's reference, so the
results are equal to the bit. Source: ggml-quants.c of llama.cpp, and the package `gguf`, the tests' oracle.
"""

from typing import NamedTuple

import torch

# 16 levels that lie denser around zero, fitted to the weights of language models.
LEVELS_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
# Floats of 4 bits (sign, two of exponent, one of mantissa), doubled so that they are whole.
LEVELS_FP4 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


def unpack(x, bits, group):
    """Small whole numbers out of bytes.   uint8 [n, bytes] -> uint8 [n, bytes * 8 / bits]

    A group of bytes gives first the lowest bits of each, then the next ones of each, and so on.
    """
    groups = x.reshape(len(x), -1, group)
    # One shift for all at a time: several at once, as a tensor of shifts, are four to twenty times as slow.
    fields = [groups >> shift & (2**bits - 1) for shift in range(0, 8, bits)]
    return torch.stack(fields, 2).reshape(len(x), -1)


def half(x):
    """16 bit floats.   uint8 [n, 2 k] -> float32 [n, k]"""
    return x.contiguous().view(torch.float16).float()


def runs(q, scale, least=None):
    """Runs of numbers, each with a scale of its own.   q [n, m], scale and least [n, k] -> scale q - least"""
    q = q.float().unflatten(1, (scale.shape[1], -1)) * scale.unsqueeze(2)  # [n, k, m / k]
    return (q if least is None else q - least.unsqueeze(2)).flatten(1)


def pick(levels, index):
    """Those of 16 levels that are meant, as float32."""
    levels = torch.tensor(levels, dtype=torch.float32, device=index.device)
    return levels.index_select(0, index.reshape(-1).int()).reshape(index.shape)


def q8_0(blocks):
    scale, q = blocks.split((2, 32), 1)
    return half(scale) * q.view(torch.int8).float()


def q4_0(blocks):
    scale, q = blocks.split((2, 16), 1)
    return half(scale) * (unpack(q, 4, 16).float() - 8)


def q4_1(blocks):
    scale, least, q = blocks.split((2, 2, 16), 1)
    return half(scale) * unpack(q, 4, 16).float() + half(least)


def q5_0(blocks):
    scale, high, q = blocks.split((2, 4, 16), 1)
    q = unpack(q, 4, 16) | unpack(high, 1, 1) << 4
    return half(scale) * (q.float() - 16)


def q5_1(blocks):
    scale, least, high, q = blocks.split((2, 2, 4, 16), 1)
    q = unpack(q, 4, 16) | unpack(high, 1, 1) << 4
    return half(scale) * q.float() + half(least)


def q2_k(blocks):
    both, q, scale, least = blocks.split((16, 64, 2, 2), 1)
    scale, least = half(scale) * (both & 15).float(), half(least) * (both >> 4).float()  # [n, 16]
    return runs(unpack(q, 2, 32), scale, least)


def q3_k(blocks):
    high, q, low4, high2, scale = blocks.split((32, 64, 8, 4, 2), 1)
    fine = (unpack(low4, 4, 8) | unpack(high2, 2, 4) << 4).float() - 32  # [n, 16], 6 bits each
    q = (unpack(q, 2, 32) | unpack(high, 1, 32) << 2).float() - 4
    return runs(q, half(scale) * fine)


def fine_scales(packed):
    """Eight scales and eight least values of 6 bits each.   uint8 [n, 12] -> two float32 [n, 8]"""
    a, b, rest = packed.split((4, 4, 4), 1)  # the first four, the second four, and the bits that are over
    scale = torch.cat([a & 63, (rest & 15) | ((a >> 2) & 48)], 1)
    least = torch.cat([b & 63, (rest >> 4) | ((b >> 2) & 48)], 1)
    return scale.float(), least.float()


def k_block(scale, least, packed, q):
    """scale * fine scale * q - least * fine least, a pair for every 32 numbers."""
    fine, low = fine_scales(packed)
    return runs(q, half(scale) * fine, half(least) * low)


def q4_k(blocks):
    scale, least, packed, q = blocks.split((2, 2, 12, 128), 1)
    return k_block(scale, least, packed, unpack(q, 4, 32))


def q5_k(blocks):
    scale, least, packed, high, q = blocks.split((2, 2, 12, 32, 128), 1)
    return k_block(scale, least, packed, unpack(q, 4, 32) | unpack(high, 1, 32) << 4)


def q6_k(blocks):
    low, high, fine, scale = blocks.split((128, 64, 16, 2), 1)
    q = (unpack(low, 4, 64) | unpack(high, 2, 32) << 4).float() - 32
    return runs(q, half(scale) * fine.contiguous().view(torch.int8).float())


def iq4_nl(blocks):
    scale, q = blocks.split((2, 16), 1)
    return half(scale) * pick(LEVELS_IQ4, unpack(q, 4, 16))


def iq4_xs(blocks):
    scale, high, low, q = blocks.split((2, 2, 4, 128), 1)
    fine = (unpack(low, 4, 1) | unpack(high, 2, 1) << 4).float() - 32  # [n, 8], 6 bits each
    return runs(pick(LEVELS_IQ4, unpack(q, 4, 16)), half(scale) * fine)


def mxfp4(blocks):
    exponent, q = blocks.split((1, 16), 1)
    # The scale is a power of two, halved because the levels are doubled.
    scale = torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent.int() - 128)
    return scale * pick(LEVELS_FP4, unpack(q, 4, 16))


def nvfp4(blocks):
    exponent, q = blocks.split((4, 32), 1)  # scales in e4m3 whose sign is not used, halved as above
    scale = (exponent & 127).contiguous().view(torch.float8_e4m3fn).float().nan_to_num(0.0) * 0.5
    return runs(pick(LEVELS_FP4, unpack(q, 4, 8)), scale)


class Type(NamedTuple):
    """A kind of block: its number in files, how many values it has in how many bytes, where floats lie."""

    number: int
    values: int
    bytes: int
    halves: tuple
    decode: object


TYPES = {
    "q4_0": Type(2, 32, 18, (0,), q4_0),
    "q4_1": Type(3, 32, 20, (0, 2), q4_1),
    "q5_0": Type(6, 32, 22, (0,), q5_0),
    "q5_1": Type(7, 32, 24, (0, 2), q5_1),
    "q8_0": Type(8, 32, 34, (0,), q8_0),
    "q2_k": Type(10, 256, 84, (80, 82), q2_k),
    "q3_k": Type(11, 256, 110, (108,), q3_k),
    "q4_k": Type(12, 256, 144, (0, 2), q4_k),
    "q5_k": Type(13, 256, 176, (0, 2), q5_k),
    "q6_k": Type(14, 256, 210, (208,), q6_k),
    "iq4_nl": Type(20, 32, 18, (0,), iq4_nl),
    "iq4_xs": Type(23, 256, 136, (0,), iq4_xs),
    "mxfp4": Type(39, 32, 17, (), mxfp4),
    "nvfp4": Type(40, 64, 36, (), nvfp4),
}
