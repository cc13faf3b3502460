"""What does the model see in my first frame?  The CLIP vision tower, with Wan's own preprocessing."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from .attention import attend, attention_taps, merge_heads, split_heads
from .hooks import Taps

# Mean and standard deviation of the pictures that CLIP was trained on, per colour. Source: Radford et al. 2021.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class ImageConfig:
    """Sizes of a CLIP vision tower. `mlp_ratio` is feed-forward width over `dim`; `out_dim` the width shared with CLIP's text tower."""

    image_size: int
    patch_size: int
    dim: int
    mlp_ratio: float
    out_dim: int
    num_heads: int
    num_layers: int
    pool_type: str = "token"
    pre_norm: bool = True
    post_norm: bool = False
    activation: str = "gelu"
    norm_eps: float = 1e-5

    def __post_init__(self):
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size={self.image_size} cannot be cut into patches of patch_size={self.patch_size}; expected a multiple"
            )
        if self.dim % self.num_heads:
            raise ValueError(
                f"dim={self.dim} cannot be split into num_heads={self.num_heads}; expected a multiple"
            )
        for name, only in dict(pool_type="token", pre_norm=True, post_norm=False, activation="gelu").items():
            if getattr(self, name) != only:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is another kind of CLIP tower; expected {name}={only!r}, as Wan's has"
                )

    @property
    def num_tokens(self):
        """The class token and one token per patch."""
        return 1 + (self.image_size // self.patch_size) ** 2


def preprocess(images, size):
    """Pictures as CLIP wants them: squashed to a square, then shifted and scaled per colour.

    images  [b, 3, H, W] float in [-1, 1], any H and W; best the original picture, before it is cut to the video's size
    size    side of the square in pixels
    ->      [b, 3, size, size] float32

    Aspect is not kept, large pictures are not smoothed first, and bicubic overshoot is not clamped: Wan was trained so.

    Raises TypeError for integers, ValueError for another rank, channel count or range.
    """
    _check(images)
    images = F.interpolate(images.float(), (size, size), mode="bicubic", align_corners=False)
    mean, std = (images.new_tensor(value)[:, None, None] for value in (CLIP_MEAN, CLIP_STD))
    return (images * 0.5 + 0.5 - mean) / std


class LayerNorm(nn.LayerNorm):
    """Layer norm in float32, whatever the dtype of x."""

    def forward(self, x):
        return F.layer_norm(
            x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps
        ).to(x.dtype)


class Attention(nn.Module):
    """Every patch looks at every other. One matrix makes q, k and v."""

    kernel = "sdpa"

    def __init__(self, config):
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.out = nn.Linear(config.dim, config.dim)
        self.tap = attention_taps()

    def forward(self, x):
        q, k, v = (
            split_heads(part, self.num_heads) for part in self.qkv(x).chunk(3, dim=-1)
        )  # [b, heads, n, d] each
        q, k, v = self.tap("q", q), self.tap("k", k), self.tap("v", v)
        heads = attend(q, k, v, tap=self.tap, kernel=self.kernel)
        return self.tap("out", self.out(merge_heads(heads)))  # [b, n, c]


class FeedForward(nn.Module):
    """down(gelu(up(x)))"""

    def __init__(self, config):
        super().__init__()
        self.up = nn.Linear(config.dim, int(config.dim * config.mlp_ratio))
        self.down = nn.Linear(int(config.dim * config.mlp_ratio), config.dim)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


class Layer(nn.Module):
    """x + attention, then x + feed-forward, each on a normalised copy of the stream."""

    def __init__(self, config):
        super().__init__()
        self.norm_attn = LayerNorm(config.dim, config.norm_eps)
        self.attn = Attention(config)
        self.norm_ffn = LayerNorm(config.dim, config.norm_eps)
        self.ffn = FeedForward(config)
        self.tap = Taps(resid_pre="b n c", resid_mid="b n c", ffn="b n c", resid_post="b n c")

    def forward(self, x):
        x = self.tap("resid_pre", x)
        x = self.tap("resid_mid", x + self.attn(self.norm_attn(x)))
        return self.tap("resid_post", x + self.tap("ffn", self.ffn(self.norm_ffn(x))))


class ImageEncoder(nn.Module):
    """The picture half of CLIP.

    Wan reads the tokens before the last layer (`encode`); CLIP's own training compares one vector per picture (`project`).

    Source: Radford et al. 2021 (CLIP); Dosovitskiy et al. 2021 (ViT). Guide: guides/image.md
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.patch_embedding = nn.Conv2d(
            3, config.dim, config.patch_size, stride=config.patch_size, bias=False
        )
        self.class_token = nn.Parameter(torch.randn(1, 1, config.dim) * config.dim**-0.5)
        self.position_embedding = nn.Parameter(
            torch.randn(1, config.num_tokens, config.dim) * config.dim**-0.5
        )
        self.pre_norm = LayerNorm(config.dim, config.norm_eps)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.post_norm = LayerNorm(config.dim, config.norm_eps)
        self.head = nn.Parameter(torch.randn(config.dim, config.out_dim) * config.dim**-0.5)

    def embed(self, images):
        """What the first layer reads.   images [b, 3, H, W] in [-1, 1]   ->   [b, n, d], the class token first"""
        pixels = preprocess(images, self.config.image_size).to(self.patch_embedding.weight.dtype)
        x = rearrange(self.patch_embedding(pixels), "b d h w -> b (h w) d")  # [b, n - 1, d]
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], dim=1)  # [b, n, d]
        return self.pre_norm(x + self.position_embedding)

    def forward(self, images):
        """The tokens before the last layer, gradients included.   images [b, 3, H, W] in [-1, 1]   ->   [b, n, d]"""
        x = self.embed(images)
        for layer in self.layers[:-1]:
            x = layer(x)
        return x

    @torch.no_grad()
    def encode(self, images):
        """What the video model reads: the tokens before the last layer, without gradients.

        images  [b, 3, H, W] float in [-1, 1], of any size; pictures of different sizes go in one call each
        ->      [b, n, d]    the class token, then the patches row by row

        Raises TypeError for integers, ValueError for another rank, channel count or range.
        """
        return self(images)

    def project(self, images):
        """One vector per picture, to be compared with CLIP's text vectors; gradients included.   [b, 3, H, W] -> [b, out_dim]"""
        x = self.layers[-1](self(images))
        return self.post_norm(x[:, 0]) @ self.head  # [b, out_dim]


def _check(images):
    if not isinstance(images, torch.Tensor) or images.ndim != 4 or images.shape[1] != 3:
        arrived = list(images.shape) if isinstance(images, torch.Tensor) else type(images).__name__
        raise ValueError(
            f"images arrived as {arrived}; expected [b, 3, H, W]: add the batch axis, and put colours before height and width"
        )
    if not images.is_floating_point():
        raise TypeError(
            f"images are {images.dtype}; expected floats in [-1, 1]: images.float() / 127.5 - 1 for values 0 to 255"
        )
    if 0 in images.shape:
        raise ValueError(f"images are {list(images.shape)}: there is no pixel in them")
    # Resizing may overshoot the range a little, so only values well outside are refused.
    if not (images.is_meta or torch.compiler.is_compiling()) and not images.abs().max() <= 2:
        raise ValueError(
            f"images run from {images.min():.3g} to {images.max():.3g}; expected [-1, 1]: images / 127.5 - 1 for values 0 to 255, and no NaN"
        )
