"""How does a convolution look back only?  Before the video stand zeros, or the frames a cache remembers.

The time cache is a dictionary that the caller makes, one for each video: {layer: the last frames it saw}.
Nothing stays on the modules, so an interrupted run cannot leak into the next one.
"""

import torch
import torch.nn.functional as F
from torch import nn

from ..hooks import Taps


def channels_last(x):
    """The same values, the channels of a pixel side by side in memory.

    The convolutions of CPUs (oneDNN) and of tensor cores (cuDNN) want this order; in any other each of them
    would turn its input and its output around. And a norm over channels then reads one stretch of memory
    instead of c. Other devices keep the order that they have.
    """
    known = x.device.type in ("cpu", "cuda")
    return x.contiguous(memory_format=torch.channels_last_3d) if known else x


def joined(before, x):
    """Frames, and those that come next.   two [b, c, f, h, w] -> one, the channels last

    Of two orders in memory torch.cat would make the plain one.
    """
    return torch.cat([channels_last(before), channels_last(x)], 2)


class CausalConv3d(nn.Conv3d):
    """A 3-D convolution that looks back in time only: with kernel k, at a frame and the k - 1 before it.

    padding  zeros at each side of height and width; time is never padded at its end
    """

    def __init__(self, c_in, c_out, kernel, padding=0):
        super().__init__(c_in, c_out, kernel)
        self.past, self.side = self.kernel_size[0] - 1, padding
        self.tap = Taps(history="b c t h w")

    def forward(self, x, cache=None):
        """[b, c_in, f, h, w] -> [b, c_out, f, h, w].

        cache  has the frames before x, and is left those of x
        """
        if self.past == 0:
            return channels_last(F.conv3d(x, self.weight, self.bias))
        known = None if cache is None else cache.get(self)
        before = self.silence(x) if known is None else known
        history = self.tap("history", before)  # [b, c_in, past, h, w]
        if cache is not None:
            cache[self] = last_frames(history, x)
        if known is not None or history is not before:
            return self.after(history, x)
        # Zeros, and nobody edited them: of the kernel only the last slice meets the first frame.
        first = F.conv2d(x[:, :, 0], self.weight[:, :, -1], self.bias, padding=self.side).unsqueeze(2)
        if x.shape[2] == 1:
            return first
        history = joined(history[:, :, 1:], x[:, :, :1])
        return joined(first, self.after(history, x[:, :, 1:]))

    def after(self, history, x):
        """The frames of x, behind those of the history.   [b, c_in, past, h, w], [b, c_in, f, h, w]"""
        if in_pairs_is_faster(x, self):
            return in_pairs(history, x, self.weight, self.bias, self.side)
        frames = joined(history, x)  # [b, c_in, past + f, h, w]
        sides = (0, self.side, self.side)  # time is padded already
        return channels_last(F.conv3d(frames, self.weight, self.bias, padding=sides))

    def silence(self, x):
        """What stands before the first frame: zeros."""
        return x.new_zeros(*x.shape[:2], self.past, *x.shape[3:])


def last_frames(history, x):
    """As many of the newest frames as the history has, in memory of their own."""
    past = history.shape[2]
    seen = x if x.shape[2] >= past else joined(history, x)
    return seen[:, :, -past:].clone()


def in_pairs_is_faster(x, conv):
    """On a CPU, in float32, when nobody wants gradients.

    In 16 bits the sums of frames would be rounded before they are multiplied. A GPU computes one large
    convolution faster than several small ones.
    """
    exact = x.device.type == "cpu" and x.dtype.itemsize >= 4 and not torch.is_grad_enabled()
    return exact and conv.kernel_size == (3, 3, 3)


def in_pairs(history, x, weight, bias, side):
    """The causal convolution with a third fewer multiplications: two frames cost four products, not six.

    With the frames a b c d and the slices u v w of the kernel in time, the two outputs are
        a u + b v + c w   =   (a - c) u + p + q          p = (b + c) (u + v + w) / 2
        b u + c v + d w   =   (d - b) w + p - q          q = (c - b) (u - v + w) / 2
    where each product is a convolution in height and width. An odd frame out comes first and costs three.

    Source: Winograd 1980, F(2, 3); Lavin & Gray 2015 (Fast Algorithms for Convolutional Neural Networks).
    """
    u, v, w = weight.unbind(2)  # [c_out, c_in, 3, 3] each, the oldest frame's first
    mean = (u + w) / 2
    plus, minus = mean + v / 2, mean - v / 2
    frames = [*history.unbind(2), *x.unbind(2)]  # 2 + f of [b, c_in, h, w]
    shape = len(x), len(u), *x.shape[2:]
    out = torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last_3d)
    odd = x.shape[2] % 2
    if odd:
        newest = F.conv2d(frames[2], w, bias, padding=side)
        newest.add_(F.conv2d(frames[1], v, padding=side))
        out[:, :, 0] = newest.add_(F.conv2d(frames[0], u, padding=side))
    for i in range(odd, x.shape[2], 2):
        a, b, c, d = frames[i : i + 4]
        mixed = b + c  # one piece of memory for all four: to get new memory takes longer than to fill it
        p = F.conv2d(mixed, plus, padding=side)
        q = F.conv2d(torch.sub(c, b, out=mixed), minus, padding=side)
        alone = F.conv2d(torch.sub(a, c, out=mixed), u, bias, padding=side)
        torch.add(alone.add_(p), q, out=out[:, :, i])
        alone = F.conv2d(torch.sub(d, b, out=mixed), w, bias, padding=side)
        torch.sub(alone.add_(p), q, out=out[:, :, i + 1])
    return out
