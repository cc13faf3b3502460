"""What is the autoencoder built of?  Residual blocks, attention, and layers that halve or double.

All but the norm and the attention reach across frames, and so take the time cache: forward(x, cache=None).
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from ..attention import attend, attention_taps
from .causal import CausalConv3d, channels_last, joined


def by_frame(layer, x):
    """Apply a layer of pictures to every frame.   [b, c, f, h, w] -> [b, c', f, h', w']"""
    frames = layer(rearrange(x, "b c f h w -> (b f) c h w"))
    return channels_last(rearrange(frames, "(b f) c h w -> b c f h w", b=len(x)))


class RMSNorm(nn.Module):
    """Each pixel's channel vector scaled to length sqrt(c), times a gain.

    Unlike the norms of the other models it runs over axis 1, and has a floor under the length instead of an
    epsilon under the root: so it was trained. In float32, since the 8 bits of a bfloat16 cannot hold the sum
    of hundreds of squares; rounded once, at the end.
    """

    def __init__(self, c, space_time=True):
        super().__init__()
        # One axis for each of x behind c: frames, height, width, or in pictures the last two alone.
        self.gamma = nn.Parameter(torch.ones(c, *[1] * (3 if space_time else 2)))

    def forward(self, x):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        length = torch.linalg.vector_norm(wide, dim=1, keepdim=True)  # [b, 1, f, h, w]
        scale = x.shape[1] ** 0.5 / length.clamp_min(1e-12)
        ours = wide is not x and not torch.is_grad_enabled()  # a copy that nobody reads again
        scaled = wide.mul_(scale) if ours else wide * scale
        return scaled.mul_(self.gamma).to(x.dtype)


class ResidualBlock(nn.Module):
    """x plus twice (norm, SiLU, convolution).   [b, c_in, f, h, w] -> [b, c_out, f, h, w]"""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.residual = nn.Sequential(
            RMSNorm(c_in),
            nn.SiLU(inplace=True),
            CausalConv3d(c_in, c_out, 3, padding=1),
            RMSNorm(c_out),
            nn.SiLU(inplace=True),
            nn.Identity(),  # dropout in training; it keeps the official numbers of the layers
            CausalConv3d(c_out, c_out, 3, padding=1),
        )
        self.shortcut = CausalConv3d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, cache=None):
        norm1, silu1, conv1, norm2, silu2, _, conv2 = self.residual
        inner = silu1(norm1(x))
        inner = conv1(inner, cache)
        inner = silu2(norm2(inner))
        inner = conv2(inner, cache)
        return inner + self.shortcut(x)


def residual_blocks(c_in, c_out, count):
    """A row of them, of which the first changes the width."""
    return [ResidualBlock(c_in if i == 0 else c_out, c_out) for i in range(count)]


class AttentionBlock(nn.Module):
    """One head over the cells of each frame; frames do not see each other here.   [b, c, f, h, w]"""

    def __init__(self, c):
        super().__init__()
        self.norm = RMSNorm(c, space_time=False)
        self.to_qkv = nn.Conv2d(c, 3 * c, 1)
        self.proj = nn.Conv2d(c, c, 1)
        self.kernel, self.tap = "sdpa", attention_taps(out="b c f h w")

    def forward(self, x):
        return x + self.tap("out", by_frame(self.attention, x))

    def attention(self, frames):
        height, tap = frames.shape[2], self.tap
        qkv = self.to_qkv(self.norm(frames))  # [b f, 3 c, h, w]
        q, k, v = rearrange(qkv, "b (qkv c) h w -> qkv b 1 (h w) c", qkv=3)  # each [b f, 1, h w, c]
        heads = attend(tap("q", q), tap("k", k), tap("v", v), tap=tap, kernel=self.kernel)
        return self.proj(rearrange(heads, "b 1 (h w) c -> b c h w", h=height))


class Down(nn.Module):
    """Halve height and width, then, with `time`, the frame rate.   [b, c, f, h, w] -> [b, c, f/2, h/2, w/2]

    The very first frame stands alone and skips the time convolution: 1 + 2n frames become 1 + n.
    """

    def __init__(self, c, time):
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(c, c, 3, stride=2))
        self.time_conv = nn.Conv3d(c, c, (3, 1, 1), stride=(2, 1, 1)) if time else None

    def forward(self, x, cache=None):
        x = by_frame(self.resample, x)  # [b, c, f, h/2, w/2]
        return x if self.time_conv is None else self.halve_frames(x, cache)

    def halve_frames(self, x, cache):
        before = None if cache is None else cache.get(self)
        if cache is not None:
            cache[self] = x[:, :, -1:].clone()
        if before is not None:
            return self.time_conv(joined(before, x))
        if x.shape[2] == 1:
            return x
        return joined(x[:, :, :1], self.time_conv(x))


class UpsamplingConv2d(nn.Conv2d):
    """Double height and width by repeating pixels, then convolve 3 x 3: both in one transposed convolution.

    A pixel becomes 2 x 2 equal ones, and each of those reaches 3 x 3: together a stamp of 4 x 4, set down at
    every second place. The large picture of repeated pixels is never made, and of 36 products 16 are left.
    """

    def forward(self, x):
        """[b, c_in, h, w] -> [b, c_out, 2h, 2w]"""
        # Summed in float32, so that a stamp in 16 bits is rounded once.
        wide = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        stamp = wide.flip(2, 3).transpose(0, 1)  # [c_in, c_out, 3, 3]
        stamp = F.pad(stamp, (0, 0, 0, 1)) + F.pad(stamp, (0, 0, 1, 0))
        stamp = F.pad(stamp, (0, 1)) + F.pad(stamp, (1, 0))  # [c_in, c_out, 4, 4]
        return F.conv_transpose2d(x, stamp.to(x.dtype), self.bias, stride=2, padding=1)


class Up(nn.Module):
    """Double the frame rate (with `time`), then height and width.   [b, c, f, h, w] -> [b, c', 2f, 2h, 2w]

    The very first frame is not doubled, 1 + n frames become 1 + 2n, and the time convolution never sees it:
    for the frames after it there are zeros in its place.
    """

    def __init__(self, c_in, c_out, time):
        super().__init__()
        # The official 0 is the upsampling, which the convolution here does itself.
        self.resample = nn.Sequential(nn.Identity(), UpsamplingConv2d(c_in, c_out, 3, padding=1))
        self.time_conv = CausalConv3d(c_in, 2 * c_in, (3, 1, 1)) if time else None

    def forward(self, x, cache=None):
        if self.time_conv is not None:
            x = self.double_frames(x, cache)
        return by_frame(self.resample, x)

    def double_frames(self, x, cache):
        if not self.begins(cache):
            return self.doubled(x, cache)
        first, rest = x[:, :, :1], x[:, :, 1:]
        if cache is not None:
            cache[self.time_conv] = self.time_conv.silence(x)
        if not rest.shape[2]:
            return first
        return joined(first, self.doubled(rest, cache))  # [b, c, 1 + 2 (f - 1), h, w]

    def doubled(self, x, cache):
        pairs = self.time_conv(x, cache)  # [b, 2 c, f, h, w]: each frame's two successors as channels
        return channels_last(rearrange(pairs, "b (two c) f h w -> b c (f two) h w", two=2))

    def begins(self, cache):
        """Is this the chunk with the very first frame?  Afterwards the time convolution has a memory."""
        return cache is None or self.time_conv not in cache


class DownStage(nn.Module):
    """2.2: residual blocks and a Down; around them a shortcut that averages what the stage folds together.

    [b, c_in, f, h, w] -> [b, c_out, f/ft, h/fs, w/fs], with ft = 2 if `time` and fs = 2 if `down`, else 1
    """

    def __init__(self, c_in, c_out, blocks, down, time):
        super().__init__()
        self.c_out = c_out
        self.ft = 2 if time else 1  # frames folded into one
        self.fs = 2 if down else 1  # rows, and columns
        layers = residual_blocks(c_in, c_out, blocks)
        self.downsamples = nn.Sequential(*layers, *([Down(c_out, time)] if down else []))

    def forward(self, x, cache=None):
        inner = x
        for layer in self.downsamples:
            inner = layer(inner, cache)
        return inner + self.average(x)

    def average(self, x):
        """The mean of groups of (channel, frame, row, column) neighbours, as many as leave c_out channels."""
        x = F.pad(x, (0, 0, 0, 0, -x.shape[2] % self.ft, 0))  # zeros before an odd first frame
        folded = "b c (f ft) (h fh) (w fw) -> b (c ft fh fw) f h w"
        x = rearrange(x, folded, ft=self.ft, fh=self.fs, fw=self.fs)
        return rearrange(x, "b (c group) f h w -> b c group f h w", c=self.c_out).mean(2)


class UpStage(nn.Module):
    """2.2: residual blocks and an Up; around them a shortcut that spreads channels over time and space.

    [b, c_in, f, h, w] -> [b, c_out, ft f, 2h, 2w], with ft = 2 if `time`, else 1; no `up`: same size
    """

    def __init__(self, c_in, c_out, blocks, up, time):
        super().__init__()
        self.c_out, self.up = c_out, up
        self.ft = 2 if time else 1  # frames made of one
        layers = residual_blocks(c_in, c_out, blocks)
        self.upsamples = nn.Sequential(*layers, *([Up(c_out, c_out, time)] if up else []))

    def forward(self, x, cache=None):
        begins = self.up and self.upsamples[-1].begins(cache)  # asked before the layers fill the cache
        inner = x
        for layer in self.upsamples:
            inner = layer(inner, cache)
        return inner + self.spread(x, begins) if self.up else inner

    def spread(self, x, begins):
        """Each channel repeated, and the copies laid out as frames, rows and columns."""
        x = x.repeat_interleave(self.c_out * self.ft * 2 * 2 // x.shape[1], dim=1)
        laid_out = "b (c ft fh fw) f h w -> b c (f ft) (h fh) (w fw)"
        x = rearrange(x, laid_out, c=self.c_out, ft=self.ft, fh=2, fw=2)
        return x[:, :, self.ft - 1 :] if begins else x  # the very first frame is one, not two
