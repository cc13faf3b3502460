"""What happens inside one block?  Tokens listen to each other, then to the text, and think, as time allows.

Guide: guides/dit.md
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ..attention import attend, attention_taps, merge_heads, split_heads, tap_repeated
from ..hooks import Taps
from ..linear import Linear
from ..rope import turn


class Modulation(NamedTuple):
    """What time says to one block: shift, scale and gate, for both its halves. Each [b, 1 or n, c]."""

    attn_shift: torch.Tensor
    attn_scale: torch.Tensor
    attn_gate: torch.Tensor
    ffn_shift: torch.Tensor
    ffn_scale: torch.Tensor
    ffn_gate: torch.Tensor


class LayerNorm(nn.LayerNorm):
    """Layer norm with gain and bias, in float32, as the stream that it reads."""

    def forward(self, x):
        return F.layer_norm(
            x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps
        )


class RMSNorm(nn.Module):
    """x / rms(x), times a gain, over the whole width; computed in float32, rounded once at the end."""

    def __init__(self, dim, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x):
        if x.is_cuda:  # one kernel; on a CPU this call is many, and fifteen times slower in 16 bits
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = torch.rsqrt(length.square() / x.shape[-1] + self.eps)
        return (x * scale * self.weight).to(x.dtype)


def modulated(x, shift, scale, eps):
    """layer_norm(x) * (1 + scale) + shift, in float32.   x [b, n, c], shift and scale [b, 1 or n, c]"""
    x, gain = x.float(), 1 + scale
    if gain.shape[:2] == (1, 1):  # one time for all tokens: a layer norm with that gain and bias, in one pass
        return F.layer_norm(x, x.shape[-1:], gain[0, 0], shift[0, 0], eps)
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=eps), gain)


def gated(x, branch, gate):
    """x + branch * gate, in one pass.

    The stream x is float32, so the sum is, whatever the branch computed in.
    """
    return torch.addcmul(x, branch, gate)


class SelfAttention(nn.Module):
    """Every token listens to every token of the video; queries and keys are turned by their position."""

    def __init__(self, config):
        super().__init__()
        dim = config.dim
        self.num_heads, self.kernel = config.num_heads, "sdpa"
        self.q, self.k, self.v, self.out = (Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = qk_norm(config), qk_norm(config)
        self.tap = attention_taps()

    def forward(self, x, rotation):
        tap = self.tap
        # Normalised over the whole width first, then split: Wan's order, not that of most models.
        q = split_heads(self.norm_q(self.q(x)), self.num_heads)  # [b, heads, n, d]
        k = split_heads(self.norm_k(self.k(x)), self.num_heads)
        v = split_heads(self.v(x), self.num_heads)
        q = tap("q", turn(q, rotation).to(v.dtype))  # turned in float32
        k = tap("k", turn(k, rotation).to(v.dtype))
        v = tap("v", v)
        return tap("out", self.out(merge_heads(self.listen(q, k, v))))  # [b, n, c]

    def listen(self, q, k, v):
        """Every token to every token. An extension may put something else in this place."""
        return attend(q, k, v, tap=self.tap, kernel=self.kernel)


class CrossAttention(nn.Module):
    """Every video token listens to the words and, in Wan 2.1's image-to-video, to the picture.

    The picture has keys, values and a softmax of its own; the two results add.
    """

    def __init__(self, config):
        super().__init__()
        dim = config.dim
        self.num_heads, self.kernel = config.num_heads, "sdpa"
        self.q, self.k, self.v, self.out = (Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = qk_norm(config), qk_norm(config)
        self.tap = attention_taps()
        if config.image_dim is not None:
            self.image_k, self.image_v = Linear(dim, dim), Linear(dim, dim)
            self.image_norm_k = qk_norm(config)
            image_layouts = attention_taps("image_").layouts
            del image_layouts["image_q"], image_layouts["image_out"]  # one query and one output serve both
            self.tap = attention_taps(**image_layouts)

    def forward(self, x, text_kv, padding=0, image_kv=None):
        tap = self.tap
        q = tap("q", split_heads(self.norm_q(self.q(x)), self.num_heads))  # [b, heads, n, d]
        # The last text row stands for `padding` equal ones: Wan pads prompts and masks no padding.
        k, v, repeat = tap_repeated(tap, *text_kv, padding)
        heads = attend(q, k, v, tap=tap, kernel=self.kernel, repeat=repeat)
        if image_kv is not None:
            k, v = tap("image_k", image_kv[0]), tap("image_v", image_kv[1])
            heads = heads + attend(q, k, v, tap=tap, kernel=self.kernel, prefix="image_")
        return tap("out", self.out(merge_heads(heads)))  # [b, n, c]

    def text_kv(self, text):
        """Keys and values of the words.   [b, l, c] -> two [b, heads, l, d]"""
        k, v = self.norm_k(self.k(text)), self.v(text)
        return split_heads(k, self.num_heads), split_heads(v, self.num_heads)

    def image_kv(self, image):
        """Keys and values of the picture.   [b, m, c] -> two [b, heads, m, d]"""
        k, v = self.image_norm_k(self.image_k(image)), self.image_v(image)
        return split_heads(k, self.num_heads), split_heads(v, self.num_heads)


def qk_norm(config):
    """What queries and keys pass before they meet: an RMS norm in every released model."""
    return RMSNorm(config.dim, config.eps) if config.qk_norm else nn.Identity()


class Block(nn.Module):
    """Attend to the video, attend to the text, think; time shifts, scales and gates the first and the last.

    x          [b, n, c]          the residual stream; float32 from here on, however the rest computes
    time       [b, 1 or n, 6, c]  float32, shared by all blocks; each adds a table of its own
    rotation   [n, pairs, 2]      cosines and sines of the positions, from rope.turns
    text_kv    two [b, heads, l, d], keys and values of the words
    padding    how many rows the last of them stands for
    image_kv   two [b, heads, m, d], keys and values of the picture
    """

    def __init__(self, config):
        super().__init__()
        self.eps = config.eps
        self.modulation = nn.Parameter(torch.randn(1, 6, config.dim) / config.dim**0.5)
        self.self_attn = SelfAttention(config)
        # The official code calls these norms 1, 3 and 2 in the order of use; only the middle one has weights.
        self.norm_cross = LayerNorm(config.dim, eps=config.eps) if config.cross_attn_norm else nn.Identity()
        self.cross_attn = CrossAttention(config)
        self.ffn = nn.Sequential(
            Linear(config.dim, config.ffn_dim), nn.GELU("tanh"), Linear(config.ffn_dim, config.dim)
        )
        self.tap = Taps(
            modulation="b n six c",
            resid_pre="b n c",
            resid_mid="b n c",
            resid_cross="b n c",
            ffn="b n c",
            resid_post="b n c",
        )

    def forward(self, x, time, rotation, text_kv, padding=0, image_kv=None):
        tap = self.tap
        x = tap("resid_pre", x)
        m = Modulation(*tap("modulation", self.modulation.float() + time).unbind(2))
        h = modulated(x, m.attn_shift, m.attn_scale, self.eps)
        x = tap("resid_mid", gated(x, self.self_attn(h, rotation), m.attn_gate))
        # Cross-attention has neither shift, scale nor gate: time does not decide how loudly
        # the text speaks.
        x = tap("resid_cross", x + self.cross_attn(self.norm_cross(x), text_kv, padding, image_kv))
        h = modulated(x, m.ffn_shift, m.ffn_scale, self.eps)
        x = gated(x, tap("ffn", self.ffn(h)), m.ffn_gate)
        return tap("resid_post", x)
