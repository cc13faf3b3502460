"""How does a token know where and when it is?  Rotary positions on three clocks: frame, height and width.

Each head's channels are taken in neighbouring pairs, read as one complex number, and turned by an angle that
grows with the token's position. Some pairs turn with the frame, some with the row, some with the column. The
score of two tokens then depends on the difference of their positions alone.
"""

import math
from functools import lru_cache

import torch


def axis_pairs(d):
    """How many of a head's d / 2 channel pairs turn with (frame, height, width).

    What a third leaves over goes to the frame.
    """
    if d % 2:
        raise ValueError(
            f"a head of width {d} has no whole number of channel pairs to rotate; expected an even width"
        )
    third = d // 2 // 3
    return d // 2 - 2 * third, third, third


def clock_speeds(pairs, theta=10000.0):
    """Angle per position of each pair on one axis: theta^(-j / pairs), j = 0 .. pairs - 1.

    -> float64 [pairs]

    The first pair turns one radian a position, the last about 1 / theta.
    Source: Su et al. 2021, RoFormer, eq. 15.
    """
    return theta ** -(torch.arange(pairs, dtype=torch.float64) / max(pairs, 1))


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # what is remembered must also serve a later run that trains
def angles(grid, d, start=(0, 0, 0), stretch=(1.0, 1.0, 1.0), theta=10000.0, riflex=0):
    """The angle by which each pair of each token is turned.

    grid     (frames, height, width) in tokens
    d        width of one head; its pairs are laid out frame, height, width
    start    position of the first token on each axis (for experiments; Wan: 0)
    stretch  multiplies the positions of each axis (for experiments; Wan: 1)
    riflex   which of the frame's speeds, counted from 1, is slowed down until its period exceeds the film, so
             that the film does not repeat itself; 0: none. Source: Zhao et al. 2025, RIFLEx
    ->       float64 [n, d / 2], n = frames * height * width, width fastest
    """
    frames, height, width = grid
    clocks = []
    for count, pairs, first, factor in zip(grid, axis_pairs(d), start, stretch):
        positions = (torch.arange(count, dtype=torch.float64) + first) * factor
        speeds = clock_speeds(pairs, theta)
        if riflex and not clocks:  # the first axis are the frames
            # A tenth short of a whole turn; a clock that is slow enough stays as it was.
            speeds[riflex - 1] = min(float(speeds[riflex - 1]), 0.9 * 2 * math.pi / count)
        clocks.append(torch.outer(positions, speeds))  # [count, pairs]
    t, y, x = clocks
    return torch.cat(
        [
            t[:, None, None].expand(-1, height, width, -1),
            y[None, :, None].expand(frames, -1, width, -1),
            x[None, None, :].expand(frames, height, -1, -1),
        ],
        -1,
    ).flatten(0, 2)  # [n, d / 2]


@lru_cache(maxsize=4)  # every step of a run asks again, with the very table that `angles` remembers
@torch.inference_mode(False)
def turns(angle, device="cpu"):
    """cos and sin of an angle table.   float64 [n, pairs] -> float32 [n, pairs, 2] on that device"""
    return torch.stack([angle.cos(), angle.sin()], -1).float().to(device)


def turn(x, table):
    """Turn neighbouring channel pairs (2j, 2j + 1) of each token: one product with cos + i sin.

    x      [b, heads, n, d]
    table  [n, d / 2, 2], what `turns` made of the angles
    ->     [b, heads, n, d] float32
    """
    pairs = x.float().unflatten(-1, (-1, 2))  # [b, heads, n, d / 2, 2]
    if not torch.compiler.is_compiling():
        turned = torch.view_as_complex(pairs) * torch.view_as_complex(table)
        return torch.view_as_real(turned).flatten(-2)
    # The same product in real numbers, for a compiler: it knows no complex ones.
    real, imag = pairs.unbind(-1)
    cos, sin = table.unbind(-1)  # each [n, d / 2]
    return torch.stack([real * cos - imag * sin, real * sin + imag * cos], -1).flatten(-2)


def rotate(x, angle):
    """`turn` by angles.   x [b, heads, n, d], angle float64 [n, d / 2] -> [b, heads, n, d] float32

    Angles are float64 (a float32 angle of position 1,000 is off in the seventh digit); sine, cosine and the
    turn itself are float32, which differs from Wan's complex128 arithmetic by at most the last float32 digit.
    """
    return turn(x, turns(angle, x.device))
