"""How does a noisy latent become a velocity?  Patches, a stack of blocks, and the last layer.

Guide: guides/dit.md
"""

import sys
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from ..attention import repeat_last, use_kernel
from ..hooks import Taps
from ..linear import Linear, Linear32
from ..rope import angles, turns
from .arguments import check, check_image, check_text
from .block import Block, LayerNorm, modulated
from .vace import VaceBlock


class Context(NamedTuple):
    """What the tokens can read, prepared once per prompt.

    text     for each cross-attention its (k, v)
    image    for each its (image_k, image_v), or None
    padding  how many rows the last one of the text stands for, a tensor; 0: none, every row is there

    Rows behind the longest prompt of a batch are all the same. In float32 one is kept for all; in half
    precision every one is, for the fast kernels take no bias that would count them.
    """

    text: list
    image: list | None
    padding: torch.Tensor | int

    def of(self, i):
        """What block i reads: its words, how many rows the last of them stands for, and its picture."""
        return self.text[i], self.padding, None if self.image is None else self.image[i]


class ImageMLP(nn.Module):
    """CLIP features to the DiT's width.   [b, n, image_dim] -> [b, n, c]

    `position` tells the first image's tokens from the last one's, where the model reads two.
    """

    def __init__(self, image_dim, dim, two_images):
        super().__init__()
        self.position = nn.Parameter(torch.zeros(1, 2 * 257, image_dim)) if two_images else None
        self.norm_in, self.up = LayerNorm(image_dim), Linear(image_dim, image_dim)
        self.down, self.norm_out = Linear(image_dim, dim), LayerNorm(dim)

    def forward(self, image):
        if self.position is not None:  # two pictures of one video come one after the other in the batch
            pairs = image.reshape(-1, self.position.shape[1], image.shape[-1])  # [b, 514, image_dim]
            image = pairs + self.position
        h = F.gelu(self.up(self.norm_in(image)))
        return self.norm_out(self.down(h))


class Final(nn.Module):
    """The last layer: shift and scale by time once more, then each token's patch of velocity, all in float32.

    It reads the time embedding itself, not the sixfold projection that the blocks share, and has no gate.
    """

    def __init__(self, config):
        super().__init__()
        pt, ph, pw = config.patch_size
        self.eps = config.eps
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)
        self.linear = Linear32(config.dim, pt * ph * pw * config.out_dim)

    def forward(self, x, time):
        shift, scale = (self.modulation.float() + time.unsqueeze(2)).unbind(2)  # [b, 1 or n, c]
        return self.linear(modulated(x, shift, scale, self.eps))  # [b, n, patch * c_out]


class DiT(nn.Module):
    """velocity = dit(x, t, text): which way from data to noise, at noise level t, given the text.

    x      [b, c, f, h, w]  noisy latent; h and w multiples of the patch
    t      [b] or [b, n]    Wan's timestep 0..1000, one per sample or one per token (Wan 2.2 TI2V)
    text   list of b tensors [l, text_dim], raw features of the real tokens; or what `prepare` returned
    image  [b, n, image_dim] CLIP features (Wan 2.1 i2v; flf2v [2 b, 257, image_dim], first and last image in
           turn)
    y      [b, c_y, f, h, w] conditioning latent and mask, joined to x along channels
    control, control_scale
           [b, vace_in_dim, f, h, w], what a VACE model reads beside x (vace.py), zeros for none; and how much
           of its hints is added
    ->     [b, c_out, f, h, w] velocity = noise - x0, float32

    Raises ValueError, with the shape that arrived and the one expected. Source: Wan 2.1, wan/modules/model.py
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        # What a pipeline asks of any dit (roles.Denoiser).
        self.task, self.patch, self.channels = config.model_type, config.patch_size, config.out_dim
        self.text_dim, self.image_dim = config.text_dim, config.image_dim
        dim, patch = config.dim, config.patch_size
        self.patch_embedding = nn.Conv3d(config.in_dim, dim, patch, stride=patch)
        self.text_mlp = nn.Sequential(Linear(config.text_dim, dim), nn.GELU("tanh"), Linear(dim, dim))
        self.image_mlp = None
        if config.image_dim is not None:
            self.image_mlp = ImageMLP(config.image_dim, dim, two_images=config.model_type == "flf2v")
        self.time_mlp = nn.Sequential(Linear32(config.freq_dim, dim), nn.SiLU(), Linear32(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), Linear32(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final = Final(config)
        self.vace_patch_embedding = self.vace_blocks = None
        if config.vace_layers:
            self.vace_patch_embedding = nn.Conv3d(config.vace_in_dim, dim, patch, stride=patch)
            self.vace_blocks = nn.ModuleList(VaceBlock(config, layer) for layer in config.vace_layers)
        self.tap = Taps(
            patches="b n c", time="b n c", text="b l c", image="b m c", angles="n pairs", final="b n c"
        )

    def forward(self, x, t, text, image=None, y=None, control=None, control_scale=1.0):
        context = text if isinstance(text, Context) else self.prepare(text, image)
        check(self.config, x, t, y, context, control)
        x = x if y is None else torch.cat([x, y.to(x)], 1)
        grid = tuple(size // p for size, p in zip(x.shape[2:], self.config.patch_size))

        # The stream that the blocks add to is float32 from here to the end, whatever they compute in.
        x = self.tap("patches", patchify(self.patch_embedding, x)).float()  # [b, n, c]
        time = self.tap("time", self.time(t))  # [b, 1 or n, c]
        time6 = self.time_projection(time).unflatten(-1, (6, -1))  # [b, 1 or n, 6, c]
        angle = self.tap("angles", self.angles(grid))  # [n, pairs] float64
        rotation = turns(angle, x.device)  # once, not in each block

        for stream in self.each_block(x, time, time6, rotation, context, control, control_scale):
            x = stream
        velocity = self.tap("final", self.final(x, time))  # [b, n, patch * c_out]
        return unpatchify(velocity, grid, self.config.patch_size)  # [b, c_out, f, h, w]

    def each_block(self, x, time, time6, rotation, context, control=None, control_scale=1.0):
        """The stream after each block in turn, with what VACE adds.   yields [b, n, c]

        A block runs when its stream is asked for, so whoever stops earlier saves the rest.
        """
        hints = self.hints(control, x, time6, rotation, context)
        for i, block in enumerate(self.blocks):
            x = block(x, time6, rotation, *context.of(i))
            if i in hints:
                x = x + hints[i] * control_scale
            yield x

    def angles(self, grid):
        """By how much the positions of these tokens turn each pair of a head.   -> float64 [n, pairs]"""
        return angles(grid, self.config.dim // self.config.num_heads)

    def hints(self, control, x, time6, rotation, context):
        """What VACE adds to the stream after which block.   -> {block: [b, n, c]}, {} without a control"""
        if control is None:
            return {}
        stream, hints = self.control_tokens(control), {}
        for i, (layer, block) in enumerate(zip(self.config.vace_layers, self.vace_blocks), len(self.blocks)):
            stream, hints[layer] = block(stream, x, time6, rotation, *context.of(i))
        return hints

    def control_tokens(self, control):
        """VACE's control as tokens.   [b, vace_in_dim, f, h, w] -> [b, n, c]"""
        return patchify(self.vace_patch_embedding, control)

    def time(self, t):
        """Timestep 0..1000 -> its embedding in float32.   [b] -> [b, 1, c]; [b, n] -> [b, n, c]"""
        if t.ndim == 2:  # a video has few different times, one or two: each is embedded once
            distinct, where = t.unique(return_inverse=True)
            return self.time(distinct)[where, 0]
        wave = sinusoid(t, self.config.freq_dim).to(t.device)  # [b, freq_dim]
        return self.time_mlp(wave).unsqueeze(1)

    def prepare(self, text, image=None):
        """All about prompt and image that no step changes: keys and values for each block.

        -> Context, for `text`
        """
        check_text(self.config, text)
        check_image(self.config, image, len(text))
        features, padding = self.pad(text)
        text = self.tap("text", self.text_mlp(features))  # [b, l, c]
        image = None if image is None else self.tap("image", self.image_mlp(image))  # [b, m, c]
        readers = [block.cross_attn for block in (*self.blocks, *(self.vace_blocks or ()))]
        text_kv = [reader.text_kv(text) for reader in readers]
        image_kv = None if image is None else [reader.image_kv(image) for reader in readers]
        if padding and text_kv[0][0].dtype.itemsize < 4:  # see Context: half precision keeps every row
            text_kv = [(repeat_last(k, padding), repeat_last(v, padding)) for k, v in text_kv]
            padding = 0
        expect_other_lengths(text_kv)
        # A tensor, because torch.compile would make another graph for each new number.
        count = torch.tensor(float(padding), device="cpu") if padding else 0
        return Context(text_kv, image_kv, count)

    def pad(self, text):
        """Zero-pad prompts to the longest, plus one row for the rest up to text_len.

        -> [b, l, text_dim], count
        """
        longest = max(len(features) for features in text)
        padding = self.config.text_len - longest
        rows = longest + (padding > 0)
        return torch.stack([F.pad(features, (0, 0, 0, rows - len(features))) for features in text]), padding

    def use_kernel(self, kernel):
        """Let every attention run on that kernel: a name of attention.KERNELS, or a function.   -> self"""
        return use_kernel(self, kernel)

    def example(self, size=(480, 832), frames=81, words=32, batch=1):
        """Empty inputs for a video of that size in pixels, to forecast shapes and memory.

        -> forward's arguments
        """
        c = self.config
        stride = 16 if c.model_type == "ti2v" else 8
        cells = (frames + 3) // 4, size[0] // stride, size[1] // stride

        def latent(channels):
            return torch.zeros(1).expand(batch, channels, *cells)  # one number in memory

        text = [torch.zeros(words, c.text_dim)] * batch
        pictures = 2 * batch if c.model_type == "flf2v" else batch
        image = None if c.image_dim is None else torch.zeros(pictures, 257, c.image_dim)
        y = None if c.in_dim == c.out_dim else latent(c.in_dim - c.out_dim)
        control = latent(c.vace_in_dim) if c.vace_layers else None
        return latent(c.out_dim), torch.zeros(batch), text, image, y, control


def expect_other_lengths(text_kv):
    """Tell torch.compile, where someone uses it, that the next prompt may have another length.

    Axis 2 of each.
    """
    if "torch._dynamo" in sys.modules:  # importing it takes seconds, and nothing is compiled without it
        for k, v in text_kv:
            torch._dynamo.maybe_mark_dynamic(k, 2)
            torch._dynamo.maybe_mark_dynamic(v, 2)


def sinusoid(t, width):
    """cos and sin of t at width / 2 frequencies from 1 down to 1 / 10000.

    [k] -> float32 [k, width], cosines first; computed in float64
    """
    half = width // 2
    t = t.cpu() if t.device.type == "mps" else t  # that device has no float64
    frequency = 10000.0 ** -(torch.arange(half, dtype=torch.float64, device=t.device) / half)
    angle = torch.outer(t.double(), frequency)  # [k, half]
    return torch.cat([angle.cos(), angle.sin()], 1).float()


def patchify(embedding, x):
    """One token per patch, width fastest.   [b, c, f, h, w] -> [b, n, d]"""
    patches = embedding(x.to(embedding.weight.dtype))
    return rearrange(patches, "b d f h w -> b (f h w) d").contiguous()  # else every norm and linear copies it


def unpatchify(x, grid, patch):
    """Tokens back to their place in the latent.   [b, n, patch * c] -> [b, c, f, h, w]"""
    (f, h, w), (pt, ph, pw) = grid, patch
    return rearrange(
        x, "b (f h w) (pt ph pw c) -> b c (f pt) (h ph) (w pw)", f=f, h=h, w=w, pt=pt, ph=ph, pw=pw
    )
