"""What does the model see in my first frame?  The CLIP vision tower, with Wan's own preprocessing."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from .attention import attend, attention_taps, merge_heads, split_heads
from .hooks import Taps
from .linear import Linear

# Mean and standard deviation of the pictures that CLIP was trained on, per colour (Radford et al. 2021).
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class ImageConfig:
    """Sizes of a CLIP vision tower.

    mlp_ratio  width of the feed-forward layers over `dim`
    out_dim    width of the vectors that are compared with those of CLIP's text tower
    pool_type, pre_norm, post_norm, activation
               what other CLIP towers have otherwise; only Wan's kind is here
    """

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
                f"image_size={self.image_size} cannot be cut into patches of patch_size={self.patch_size}; "
                "expected a multiple"
            )
        if self.dim % self.num_heads:
            raise ValueError(
                f"dim={self.dim} cannot be split into num_heads={self.num_heads}; expected a multiple"
            )
        for name, only in dict(pool_type="token", pre_norm=True, post_norm=False, activation="gelu").items():
            if getattr(self, name) != only:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is another kind of CLIP tower; expected "
                    f"{name}={only!r}, as Wan's has"
                )

    @property
    def num_tokens(self):
        """The class token and one token per patch."""
        return 1 + (self.image_size // self.patch_size) ** 2


def preprocess(images, size):
    """Pictures as CLIP wants them: squashed to a square, then shifted and scaled per colour.

    images  [b, 3, H, W] float in [-1, 1], any H and W: the original picture, not cut to the video's size
    size    side of the square in pixels
    ->      [b, 3, size, size] float32

    Aspect is not kept, large pictures are not smoothed first, and bicubic overshoot is not clamped: CLIP was
    not trained so, but Wan was.

    Raises TypeError for integers, ValueError for another rank, channel count or range.
    """
    _check(images)
    images = F.interpolate(images.float(), (size, size), mode="bicubic", align_corners=False)
    mean, std = (images.new_tensor(value)[:, None, None] for value in (CLIP_MEAN, CLIP_STD))
    return (images * 0.5 + 0.5 - mean) / std


class LayerNorm(nn.LayerNorm):
    """Layer norm in float32, whatever the dtype of x, and back.

    The stream of this tower has its weights' dtype. (The DiT's stream is float32, and stays so.)
    """

    def forward(self, x):
        weight, bias = self.weight.float(), self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class Attention(nn.Module):
    """Every patch looks at every other. One matrix makes q, k and v."""

    def __init__(self, config):
        super().__init__()
        self.num_heads, self.kernel = config.num_heads, "sdpa"
        self.qkv = Linear(config.dim, 3 * config.dim)
        self.out = Linear(config.dim, config.dim)
        self.tap = attention_taps()

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)  # [b, n, c] each
        q = self.tap("q", split_heads(q, self.num_heads))  # [b, heads, n, d]
        k = self.tap("k", split_heads(k, self.num_heads))
        v = self.tap("v", split_heads(v, self.num_heads))
        heads = attend(q, k, v, tap=self.tap, kernel=self.kernel)
        return self.tap("out", self.out(merge_heads(heads)))  # [b, n, c]


class FeedForward(nn.Module):
    """down(gelu(up(x))), with the exact gelu: the tower is OpenCLIP's. OpenAI's has a faster, other one."""

    def __init__(self, config):
        super().__init__()
        self.up = Linear(config.dim, int(config.dim * config.mlp_ratio))
        self.down = Linear(int(config.dim * config.mlp_ratio), config.dim)

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

    Wan reads the tokens before the last layer (`encode`); CLIP's own training compares one vector per
    picture (`project`). `dim` is the width of what `encode` gives.

    Source: Radford et al. 2021 (CLIP); Dosovitskiy et al. 2021 (ViT). Guide: guides/image.md
    """

    def __init__(self, config):
        super().__init__()
        self.config, self.dim = config, config.dim
        size, width = config.patch_size, config.dim**-0.5
        self.patch_embedding = nn.Conv2d(3, config.dim, size, stride=size, bias=False)
        self.class_token = nn.Parameter(torch.randn(1, 1, config.dim) * width)
        self.position_embedding = nn.Parameter(torch.randn(1, config.num_tokens, config.dim) * width)
        self.pre_norm = LayerNorm(config.dim, config.norm_eps)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.post_norm = LayerNorm(config.dim, config.norm_eps)
        self.head = nn.Parameter(torch.randn(config.dim, config.out_dim) * width)

    def forward(self, images, project=False):
        """The tokens before the last layer, gradients included.

        images  [b, 3, H, W] float in [-1, 1]
        ->      [b, n, d], the class token and then the patches; project=True: what `project` gives
        """
        x = self.embed(images)
        # CLIP's training looks at the last layer's class token alone (`project`), never at its patches.
        for layer in self.layers[:-1]:
            x = layer(x)
        if not project:
            return x
        x = self.layers[-1](x)
        return self.post_norm(x[:, 0]) @ self.head  # [b, out_dim]

    def embed(self, images):
        """What the first layer reads.   images [b, 3, H, W] in [-1, 1]   ->   [b, n, d], class token first"""
        pixels = preprocess(images, self.config.image_size).to(self.patch_embedding.weight.dtype)
        x = rearrange(self.patch_embedding(pixels), "b d h w -> b (h w) d")  # [b, n - 1, d]
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], dim=1)  # [b, n, d]
        return self.pre_norm(x + self.position_embedding)

    @torch.no_grad()
    def encode(self, images):
        """What the video model reads: the tokens before the last layer, without gradients.

        images  [b, 3, H, W] float in [-1, 1], of any size; pictures of different sizes go in one call each
        ->      [b, n, d]    the class token, then the patches row by row

        Raises TypeError for integers, ValueError for another rank, channel count or range.
        """
        return self(images)

    def project(self, images):
        """One vector per picture, to be compared with CLIP's text vectors; gradients included.

        images  [b, 3, H, W] float in [-1, 1]
        ->      [b, out_dim]
        """
        # By way of the call, so that what hangs on it (torch's hooks, an offloader's) also works here.
        return self(images, project=True)


def _check(images):
    if not isinstance(images, torch.Tensor) or images.ndim != 4 or images.shape[1] != 3:
        arrived = list(images.shape) if isinstance(images, torch.Tensor) else type(images).__name__
        raise ValueError(
            f"images arrived as {arrived}; expected [b, 3, H, W]: add the batch axis, and put colours before "
            "height and width"
        )
    if not images.is_floating_point():
        raise TypeError(
            f"images are {images.dtype}; expected floats in [-1, 1]: images.float() / 127.5 - 1 for values "
            "0 to 255"
        )
    if 0 in images.shape:
        raise ValueError(f"images are {list(images.shape)}: there is no pixel in them")
    if images.is_meta or torch.compiler.is_compiling():
        return
    low, high = images.aminmax()
    # Resizing may overshoot the range a little, so only values well outside are refused.
    if not -2 <= low <= high <= 2:
        raise ValueError(
            f"images run from {low:.3g} to {high:.3g}; expected [-1, 1]: images / 127.5 - 1 for values 0 to "
            "255, and no NaN"
        )
