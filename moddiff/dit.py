"""What happens inside one block?  Wan's diffusion transformer: noisy latent, time and text in, velocity out.

A latent is cut into patches, one token each. Every block lets the tokens attend to each other, then to the text, then thinks per
token; time enters through shift, scale and gate around the first and the third. Wan 2.1 and 2.2: t2v, i2v, flf2v, ti2v, VACE.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from .attention import attend, attention_taps, kernel_named, merge_heads, split_heads, tap_repeated
from .hooks import Taps
from .rope import angles, rotate


@dataclass(frozen=True)
class DiTConfig:
    """One row of Wan's model table. `image_dim` is the width of the CLIP features; None where the model has no image path (Wan 2.2)."""

    model_type: str
    in_dim: int
    dim: int
    ffn_dim: int
    freq_dim: int
    text_dim: int
    out_dim: int
    num_heads: int
    num_layers: int
    image_dim: int | None = None
    patch_size: tuple = (1, 2, 2)
    text_len: int = 512
    qk_norm: bool = True
    cross_attn_norm: bool = True
    eps: float = 1e-6
    vace_layers: tuple = ()
    vace_in_dim: int = 96

    def __post_init__(self):
        object.__setattr__(self, "patch_size", tuple(self.patch_size))
        object.__setattr__(self, "vace_layers", tuple(self.vace_layers))
        if self.dim % self.num_heads or self.dim // self.num_heads % 2:
            raise ValueError(
                f"dim {self.dim} over {self.num_heads} heads gives {self.dim / self.num_heads:g} channels a head; "
                "expected an even whole number"
            )
        if any(not 0 <= layer < self.num_layers for layer in self.vace_layers):
            raise ValueError(
                f"vace_layers {self.vace_layers} names a block outside 0..{self.num_layers - 1} (num_layers {self.num_layers})"
            )


class Modulation(NamedTuple):
    """What time says to one block: shift, scale and gate for self-attention, then for the feed-forward part. Each [b, 1 or n, c]."""

    attn_shift: torch.Tensor
    attn_scale: torch.Tensor
    attn_gate: torch.Tensor
    ffn_shift: torch.Tensor
    ffn_scale: torch.Tensor
    ffn_gate: torch.Tensor


class Context(NamedTuple):
    """What the tokens can read, prepared once per prompt: for every cross-attention its (k, v), and (image_k, image_v) or None.

    The text rows after the longest prompt of the batch are all the same padding row; it is kept once, and `padding` says how often it stands for.
    """

    text: list
    image: list | None
    padding: int


def linear32(layer, x):
    """A linear layer in float32 whatever its weights' dtype: time and the final layer are exact in Wan."""
    return F.linear(x.float(), layer.weight.float(), layer.bias.float())


def in_dtype_of(layer, x):
    return layer(x.to(layer.weight.dtype))


def layer_norm(x, eps):
    """Layer norm without gain or bias, in float32."""
    return F.layer_norm(x.float(), x.shape[-1:], eps=eps)


class RMSNorm(nn.Module):
    """x / rms(x) over the whole width, before heads are split; statistics in float32."""

    def __init__(self, dim, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x):
        return (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)).to(
            x.dtype
        ) * self.weight


class LayerNorm(nn.LayerNorm):
    def forward(self, x):
        return F.layer_norm(
            x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps
        )


class SelfAttention(nn.Module):
    """Every token listens to every token of the video; queries and keys are turned by their position."""

    def __init__(self, config):
        super().__init__()
        dim = config.dim
        self.heads, self.kernel = config.num_heads, "sdpa"
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = (
            RMSNorm(dim, config.eps) if config.qk_norm else nn.Identity() for _ in range(2)
        )
        self.tap = attention_taps()

    def forward(self, x, angle):
        tap, dtype = self.tap, self.v.weight.dtype
        q = rotate(split_heads(self.norm_q(in_dtype_of(self.q, x)), self.heads), angle).to(
            dtype
        )  # [b, heads, n, d]
        k = rotate(split_heads(self.norm_k(in_dtype_of(self.k, x)), self.heads), angle).to(dtype)
        v = split_heads(in_dtype_of(self.v, x), self.heads)
        heads = attend(tap("q", q), tap("k", k), tap("v", v), tap=tap, kernel=self.kernel)
        return tap("out", self.out(merge_heads(heads)))  # [b, n, c]


class CrossAttention(nn.Module):
    """Every video token listens to the words and, in image-to-video models, to the image through a second key/value pair; results add."""

    def __init__(self, config):
        super().__init__()
        dim = config.dim
        self.heads, self.kernel = config.num_heads, "sdpa"
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = (
            RMSNorm(dim, config.eps) if config.qk_norm else nn.Identity() for _ in range(2)
        )
        if config.image_dim is not None:
            self.image_k, self.image_v = nn.Linear(dim, dim), nn.Linear(dim, dim)
            self.image_norm_k = RMSNorm(dim, config.eps) if config.qk_norm else nn.Identity()
        image_layouts = attention_taps("image_").layouts if config.image_dim is not None else {}
        self.tap = attention_taps(
            **{name: layout for name, layout in image_layouts.items() if name not in ("image_q", "image_out")}
        )

    def text_kv(self, text):
        """k, v of the text rows.   [b, l, c] -> two [b, heads, l, d]"""
        return split_heads(self.norm_k(in_dtype_of(self.k, text)), self.heads), split_heads(
            in_dtype_of(self.v, text), self.heads
        )

    def image_kv(self, image):
        return split_heads(self.image_norm_k(in_dtype_of(self.image_k, image)), self.heads), split_heads(
            in_dtype_of(self.image_v, image), self.heads
        )

    def forward(self, x, text_kv, padding, image_kv=None):
        tap = self.tap
        q = tap("q", split_heads(self.norm_q(in_dtype_of(self.q, x)), self.heads))  # [b, heads, n, d]
        k, v, repeat = tap_repeated(
            tap, *text_kv, padding
        )  # the last text row stands for `padding` equal ones
        heads = attend(q, k, v, tap=tap, kernel=self.kernel, repeat=repeat)
        if image_kv is not None:
            k, v = tap("image_k", image_kv[0]), tap("image_v", image_kv[1])
            heads = heads + attend(q, k, v, tap=tap, kernel=self.kernel, prefix="image_")
        return tap("out", self.out(merge_heads(heads)))  # [b, n, c]


class Block(nn.Module):
    """Attend to the video, attend to the text, think; the first and last between a shift, a scale and a gate that time sets."""

    def __init__(self, config):
        super().__init__()
        self.eps = config.eps
        self.modulation = nn.Parameter(torch.randn(1, 6, config.dim) / config.dim**0.5)
        self.self_attn = SelfAttention(config)
        self.norm_cross = LayerNorm(config.dim, eps=config.eps) if config.cross_attn_norm else nn.Identity()
        self.cross_attn = CrossAttention(config)
        self.ffn = nn.Sequential(
            nn.Linear(config.dim, config.ffn_dim), nn.GELU("tanh"), nn.Linear(config.ffn_dim, config.dim)
        )
        self.tap = Taps(
            modulation="b n six c",
            resid_pre="b n c",
            resid_mid="b n c",
            resid_cross="b n c",
            ffn="b n c",
            resid_post="b n c",
        )

    def forward(self, x, time, angle, text_kv, padding, image_kv=None):
        tap = self.tap
        x = tap("resid_pre", x)
        m = Modulation(*tap("modulation", self.modulation.float() + time).unbind(2))
        h = layer_norm(x, self.eps) * (1 + m.attn_scale) + m.attn_shift
        x = tap("resid_mid", x + self.self_attn(h, angle) * m.attn_gate)
        x = tap("resid_cross", x + self.cross_attn(self.norm_cross(x), text_kv, padding, image_kv))
        h = layer_norm(x, self.eps) * (1 + m.ffn_scale) + m.ffn_shift
        x = x + tap("ffn", self.ffn(h.to(self.ffn[0].weight.dtype))) * m.ffn_gate
        return tap("resid_post", x)


class VaceBlock(Block):
    """A block that reads the control latent beside the video and leaves a hint for the main stack."""

    def __init__(self, config, first):
        super().__init__(config)
        self.before = nn.Linear(config.dim, config.dim) if first else None
        self.after = nn.Linear(config.dim, config.dim)

    def forward(self, control, x, *rest):
        if self.before is not None:
            control = in_dtype_of(self.before, control) + x
        control = super().forward(control, *rest)
        return control, in_dtype_of(self.after, control)


class ImageMLP(nn.Module):
    """CLIP features to the DiT's width.   [b, n, image_dim] -> [b, n, c]; `position` tells the first image's tokens from the last one's."""

    def __init__(self, image_dim, dim, two_images):
        super().__init__()
        self.position = nn.Parameter(torch.zeros(1, 2 * 257, image_dim)) if two_images else None
        self.norm_in, self.up = LayerNorm(image_dim), nn.Linear(image_dim, image_dim)
        self.down, self.norm_out = nn.Linear(image_dim, dim), LayerNorm(dim)

    def forward(self, image):
        if self.position is not None:
            image = (
                image.reshape(-1, self.position.shape[1], image.shape[-1]) + self.position
            )  # [b, 514, image_dim]
        return self.norm_out(in_dtype_of(self.down, F.gelu(in_dtype_of(self.up, self.norm_in(image)))))


class Final(nn.Module):
    """The last layer: shift and scale by time once more, then each token's patch of velocity, all in float32."""

    def __init__(self, config):
        super().__init__()
        pt, ph, pw = config.patch_size
        self.eps = config.eps
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)
        self.linear = nn.Linear(config.dim, pt * ph * pw * config.out_dim)

    def forward(self, x, time):
        shift, scale = (self.modulation.float() + time.unsqueeze(2)).unbind(2)  # each [b, 1 or n, c]
        return linear32(self.linear, layer_norm(x, self.eps) * (1 + scale) + shift)  # [b, n, patch * c_out]


class DiT(nn.Module):
    """velocity = dit(x, t, text): which way from data to noise, at noise level t, given the text.

    x      [b, c, f, h, w]  noisy latent; h and w multiples of the patch
    t      [b] or [b, n]    Wan's timestep 0..1000, one per sample or one per token (Wan 2.2 TI2V)
    text   list of b tensors [l, text_dim], raw features of the real tokens; or what `prepare` returned
    image  [b, n, image_dim] CLIP features (Wan 2.1 i2v; flf2v [2 b, 257, image_dim], first and last image in turn)
    y      [b, c_y, f, h, w] conditioning latent and mask, joined to x along channels
    ->     [b, c_out, f, h, w] velocity = noise - x0, float32
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        # What a pipeline asks of any dit (roles.Denoiser).
        self.task, self.patch, self.channels = config.model_type, config.patch_size, config.out_dim
        self.text_dim, self.image_dim = config.text_dim, config.image_dim
        dim = config.dim
        self.patch_embedding = nn.Conv3d(config.in_dim, dim, config.patch_size, stride=config.patch_size)
        self.text_mlp = nn.Sequential(nn.Linear(config.text_dim, dim), nn.GELU("tanh"), nn.Linear(dim, dim))
        self.image_mlp = (
            ImageMLP(config.image_dim, dim, config.model_type == "flf2v")
            if config.image_dim is not None
            else None
        )
        self.time_mlp = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final = Final(config)
        if config.vace_layers:
            self.vace_patch_embedding = nn.Conv3d(
                config.vace_in_dim, dim, config.patch_size, stride=config.patch_size
            )
            self.vace_blocks = nn.ModuleList(
                VaceBlock(config, first=i == 0) for i in range(len(config.vace_layers))
            )
        self.tap = Taps(
            patches="b n c", time="b n c", text="b l c", image="b m c", angles="n pairs", final="b n c"
        )

    def forward(self, x, t, text, image=None, y=None, control=None, control_scale=1.0):
        context = text if isinstance(text, Context) else self.prepare(text, image)
        self.check(x, t, y, control, context)
        x = x if y is None else torch.cat([x, y.to(x)], 1)
        grid = tuple(size // p for size, p in zip(x.shape[2:], self.config.patch_size))
        x = self.tap("patches", patchify(self.patch_embedding, x))  # [b, n, c]
        time = self.tap("time", self.time(t))  # [b, 1 or n, c]
        time6 = linear32(self.time_projection[1], self.time_projection[0](time)).unflatten(
            -1, (6, -1)
        )  # [b, 1 or n, 6, c]
        angle = self.tap(
            "angles", angles(grid, self.config.dim // self.config.num_heads)
        )  # [n, pairs], float64, on the CPU

        context_of = lambda i: (
            context.text[i],
            context.padding,
            context.image[i] if context.image is not None else None,
        )
        hints = self.hints(control, x, time6, angle, context) if self.config.vace_layers else {}
        for i, block in enumerate(self.blocks):
            x = block(x, time6, angle, *context_of(i))  # [b, n, c]
            if i in hints:
                x = x + hints[i] * control_scale
        return unpatchify(
            self.tap("final", self.final(x, time)), grid, self.config.patch_size
        )  # [b, c_out, f, h, w]

    def time(self, t):
        """Timestep 0..1000 -> its embedding in float32.   [b] -> [b, 1, c]; [b, n] -> [b, n, c]"""
        if t.ndim == 2:  # a video has few different times, one or two: each is embedded once
            distinct, where = t.unique(return_inverse=True)
            return self.time(distinct)[where, 0]
        wave = sinusoid(t, self.config.freq_dim).to(t.device)  # [b, freq_dim]
        return linear32(self.time_mlp[2], self.time_mlp[1](linear32(self.time_mlp[0], wave))).unsqueeze(1)

    def prepare(self, text, image=None):
        """Everything about prompt and image that no step changes: keys and values for each block.   -> Context, which forward takes as `text`"""
        features, padding = self.pad(text)
        self.check_image(image, len(features))
        text = self.tap("text", self.text_mlp(features.to(self.text_mlp[0].weight.dtype)))  # [b, l, c]
        image = self.tap("image", self.image_mlp(image)) if image is not None else None  # [b, m, c]
        blocks = [*self.blocks, *(self.vace_blocks if self.config.vace_layers else ())]
        return Context(
            [block.cross_attn.text_kv(text) for block in blocks],
            [block.cross_attn.image_kv(image) for block in blocks] if image is not None else None,
            padding,
        )

    def use_kernel(self, kernel):
        """Let every attention of this model run on that kernel: "sdpa", "math", "flash", "flex" or a function.   -> self"""
        kernel_named(kernel)  # an unknown name is an error now, not in the first forward
        for module in self.modules():
            if isinstance(module, SelfAttention | CrossAttention):
                module.kernel = kernel
        return self

    def example(self, size=(480, 832), frames=81, words=32, batch=1):
        """Empty inputs for a video of that size in pixels, to forecast shapes and memory.   -> (x, t, text, image, y, control)"""
        c = self.config
        stride = 16 if c.model_type == "ti2v" else 8
        cells = (frames + 3) // 4, size[0] // stride, size[1] // stride
        latent = lambda channels: torch.zeros(1).expand(batch, channels, *cells)
        pictures = 2 * batch if c.model_type == "flf2v" else batch
        return (
            latent(c.out_dim),
            torch.zeros(batch),
            [torch.zeros(words, c.text_dim)] * batch,
            None if c.image_dim is None else torch.zeros(pictures, 257, c.image_dim),
            None if c.in_dim == c.out_dim else latent(c.in_dim - c.out_dim),
            latent(c.vace_in_dim) if c.vace_layers else None,
        )

    def pad(self, text):
        """Zero-pad each prompt's features to the longest, plus one row that stands for the rest up to text_len.   -> [b, l, text_dim], count"""
        limit, width = self.config.text_len, self.config.text_dim
        if len(text) == 0 or isinstance(text, str):
            raise ValueError(
                f"text is {text!r}; expected a list of [l, {width}] features, one per sample, as text.encode([prompt]) gives"
            )
        for features in text:
            if features.ndim != 2 or features.shape[1] != width or len(features) > limit:
                raise ValueError(
                    f"text features of shape {list(features.shape)} arrived; expected a list of [l, {width}], one per sample, "
                    f"with l at most {limit}. A long prompt is cut by text.encode; another width is another text encoder's"
                )
        longest = max(len(features) for features in text)
        padding = limit - longest
        rows = longest + (padding > 0)
        return torch.stack([F.pad(features, (0, 0, 0, rows - len(features))) for features in text]), padding

    def hints(self, control, x, time6, angle, context):
        """What the VACE blocks add after which main block.   control [b, vace_in_dim, f, h, w] -> {block: [b, n, c]}"""
        control, hints = patchify(self.vace_patch_embedding, control), {}
        for i, (layer, block) in enumerate(
            zip(self.config.vace_layers, self.vace_blocks), start=len(self.blocks)
        ):
            control, hints[layer] = block(control, x, time6, angle, context.text[i], context.padding)
        return hints

    def check_image(self, image, batch):
        """Raise ValueError unless there are image features just where the model reads some, one set (flf2v: two) per prompt."""
        config = self.config
        if config.image_dim is None:
            if image is not None:
                raise ValueError(
                    f"image features were given, but this {config.model_type} model has no image path; leave image out, "
                    "or load a Wan 2.1 i2v model"
                )
            return
        pair = config.model_type == "flf2v"
        expected = (
            f"[{2 * batch}, 257, {config.image_dim}] (first and last image in turn)"
            if pair
            else f"[{batch}, n, {config.image_dim}]"
        )
        if image is None:
            raise ValueError(
                f"this {config.model_type} model reads CLIP features; pass image={expected}, as image.encode(pictures) gives"
            )
        fits = image.ndim == 3 and image.shape[2] == config.image_dim
        if not fits or (image.shape[:2] != (2 * batch, 257) if pair else image.shape[0] not in (1, batch)):
            raise ValueError(f"image features of shape {list(image.shape)} arrived; expected {expected}")

    def check(self, x, t, y, control, context):
        """Raise ValueError, with the shape that arrived and the one expected, unless x, t, y and control fit this model."""
        config = self.config
        if x.ndim != 5 or (y is not None and y.ndim != 5):
            x = x if x.ndim != 5 else y
            raise ValueError(
                f"a latent of shape {list(x.shape)} arrived; expected five axes [b, c, f, h, w] (a single latent needs x[None])"
            )
        channels = x.shape[1] + (0 if y is None else y.shape[1])
        if channels != config.in_dim:
            given = f"x has {x.shape[1]} channels" + ("" if y is None else f" and y {y.shape[1]}")
            cure = (
                "pass the conditioning latent as y"
                if y is None and config.in_dim > config.out_dim
                else "check which model this latent is for"
            )
            raise ValueError(
                f"{given}; this {config.model_type} model takes {config.in_dim} together: {cure}"
            )
        if y is not None and (y.shape[0], *y.shape[2:]) != (x.shape[0], *x.shape[2:]):
            raise ValueError(
                f"y of shape {list(y.shape)} does not lie over x of shape {list(x.shape)}; batch, frames, height and width "
                "must agree"
            )
        for name, size, p in zip(("frames", "height", "width"), x.shape[2:], config.patch_size):
            if size % p:
                raise ValueError(
                    f"latent {name} {size} is not a multiple of the patch {p}; choose a video size that is a multiple of {8 * p} pixels "
                    f"({16 * p} with the Wan 2.2 VAE)"
                )
        tokens = x[0, 0].numel() // torch.Size(config.patch_size).numel()
        if tuple(t.shape) not in ((x.shape[0],), (x.shape[0], tokens)):
            raise ValueError(
                f"t of shape {list(t.shape)} arrived; expected [{x.shape[0]}] (one per sample) or [{x.shape[0]}, {tokens}] "
                "(one per token)"
            )
        if control is not None and not config.vace_layers:
            raise ValueError(
                f"a control latent was given, but this {config.model_type} model has no VACE blocks; leave control out"
            )
        if control is None and config.vace_layers:
            raise ValueError(
                f"this VACE model reads a control latent; pass control=[b, {config.vace_in_dim}, f, h, w] (zeros for none)"
            )
        expected = (x.shape[0], config.vace_in_dim, *x.shape[2:])
        if control is not None and control.shape != expected:
            raise ValueError(
                f"control of shape {list(control.shape)} arrived; expected {list(expected)}, lying over x"
            )
        if len(context.text) != len(self.blocks) + len(config.vace_layers) or (context.image is None) != (
            config.image_dim is None
        ):
            raise ValueError("what came as text was prepared by another model; call prepare of this one")
        if context.text[0][0].shape[0] not in (1, x.shape[0]):
            raise ValueError(
                f"{context.text[0][0].shape[0]} prompts for a batch of {x.shape[0]}; expected one prompt per sample"
            )


def sinusoid(t, width):
    """cos and sin of t at width / 2 frequencies from 1 down to 1 / 10000.   [k] -> float32 [k, width], cosines first; computed in float64"""
    half = width // 2
    t = t.cpu() if t.device.type == "mps" else t  # that device has no float64
    frequency = 10000.0 ** -(torch.arange(half, dtype=torch.float64, device=t.device) / half)
    angle = torch.outer(t.double(), frequency)  # [k, half]
    return torch.cat([angle.cos(), angle.sin()], 1).float()


def patchify(embedding, x):
    """One token per patch, width fastest.   [b, c, f, h, w] -> [b, n, d]"""
    return rearrange(
        embedding(x.to(embedding.weight.dtype)), "b d f h w -> b (f h w) d"
    ).contiguous()  # else every norm and linear copies it


def unpatchify(x, grid, patch):
    """Tokens back to their place in the latent.   [b, n, patch * c] -> [b, c, f, h, w]"""
    (f, h, w), (pt, ph, pw) = grid, patch
    return rearrange(
        x, "b (f h w) (pt ph pw c) -> b c (f pt) (h ph) (w pw)", f=f, h=h, w=w, pt=pt, ph=ph, pw=pw
    )


class Experts(nn.Module):
    """Wan 2.2 A14B: one DiT for high noise, one for low; the timestep decides. Called as a DiT."""

    def __init__(self, high, low, boundary):
        super().__init__()
        self.high, self.low, self.boundary = high, low, boundary  # boundary: a part of 1000, 0.875 or 0.9
        self.config = high.config
        self.task, self.patch, self.channels = high.task, high.patch, high.channels  # roles.Denoiser
        self.text_dim, self.image_dim = high.text_dim, high.image_dim

    def expert(self, t):
        """The DiT for timestep t (0..1000): high noise from boundary * 1000 on."""
        return self.high if float(t.max()) >= self.boundary * 1000 else self.low

    def prepare(self, text, image=None):
        """For `text` in forward. An expert's keys and values are made when its turn comes, in the place of the other's."""
        return Prompt(text, image)

    def forward(self, x, t, text, image=None, **rest):
        expert = self.expert(t)
        return (
            expert(x, t, text.read_by(expert), **rest)
            if isinstance(text, Prompt)
            else expert(x, t, text, image, **rest)
        )

    def use_kernel(self, kernel):
        """As DiT.use_kernel, for both experts."""
        self.high.use_kernel(kernel), self.low.use_kernel(kernel)
        return self

    def example(self, **how):
        """As DiT.example."""
        return self.high.example(**how)


class Prompt:
    """Prompt and image for two experts, of which one works at a time: only the working one's keys and values are kept."""

    def __init__(self, text, image):
        self.text, self.image = text, image
        self.reader = self.context = None

    def read_by(self, expert):
        if self.reader is not expert:
            self.reader, self.context = expert, expert.prepare(self.text, self.image)
        return self.context
