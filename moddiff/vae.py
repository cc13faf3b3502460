"""Where does the video live?  Wan's causal video autoencoders, 2.1 and 2.2: pixels to a small latent and back.

Time is causal: a frame is coded from itself and earlier frames only. So a video can be coded whole, or in chunks that hand
each other the last frames they saw (the time cache), and both give the same numbers. Parameter names are the official ones.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from .attention import attend, attention_taps
from .hooks import Taps

# Published per-channel mean and standard deviation of the raw latent; the DiT sees (latent - mean) / std.
LATENT_STATISTICS = {
    16: (
        (
            -0.7571,
            -0.7089,
            -0.9113,
            0.1075,
            -0.1745,
            0.9653,
            -0.1517,
            1.5508,
            0.4134,
            -0.0715,
            0.5517,
            -0.3632,
            -0.1922,
            -0.9497,
            0.2503,
            -0.2921,
        ),
        (
            2.8184,
            1.4541,
            2.3275,
            2.6558,
            1.2196,
            1.7708,
            2.6052,
            2.0743,
            3.2687,
            2.1526,
            2.8652,
            1.5579,
            1.6382,
            1.1253,
            2.8251,
            1.9160,
        ),
    ),
    48: (
        (
            -0.2289,
            -0.0052,
            -0.1323,
            -0.2339,
            -0.2799,
            0.0174,
            0.1838,
            0.1557,
            -0.1382,
            0.0542,
            0.2813,
            0.0891,
            0.1570,
            -0.0098,
            0.0375,
            -0.1825,
            -0.2246,
            -0.1207,
            -0.0698,
            0.5109,
            0.2665,
            -0.2108,
            -0.2158,
            0.2502,
            -0.2055,
            -0.0322,
            0.1109,
            0.1567,
            -0.0729,
            0.0899,
            -0.2799,
            -0.1230,
            -0.0313,
            -0.1649,
            0.0117,
            0.0723,
            -0.2839,
            -0.2083,
            -0.0520,
            0.3748,
            0.0152,
            0.1957,
            0.1433,
            -0.2944,
            0.3573,
            -0.0548,
            -0.1681,
            -0.0667,
        ),
        (
            0.4765,
            1.0364,
            0.4514,
            1.1677,
            0.5313,
            0.4990,
            0.4818,
            0.5013,
            0.8158,
            1.0344,
            0.5894,
            1.0901,
            0.6885,
            0.6165,
            0.8454,
            0.4978,
            0.5759,
            0.3523,
            0.7135,
            0.6804,
            0.5833,
            1.4146,
            0.8986,
            0.5659,
            0.7069,
            0.5338,
            0.4889,
            0.4917,
            0.4069,
            0.4999,
            0.6866,
            0.4093,
            0.5709,
            0.6065,
            0.6415,
            0.4944,
            0.5726,
            1.2042,
            0.5458,
            1.6887,
            0.3971,
            1.0600,
            0.3943,
            0.5537,
            0.5444,
            0.4089,
            0.7468,
            0.7744,
        ),
    ),
}


@dataclass(frozen=True)
class VAEConfig:
    """dim and dec_dim are the widths at full resolution; a config with `dec_dim` is the 2.2 form (2 x 2 pixel patches, average shortcuts)."""

    z_dim: int
    dim: int
    dim_mult: tuple = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temperal_downsample: tuple = (False, True, True)  # the checkpoints spell it so
    attn_scales: tuple = ()
    dec_dim: int | None = None
    mean: tuple | None = None
    std: tuple | None = None

    def __post_init__(self):
        for name in ("dim_mult", "temperal_downsample", "attn_scales", "mean", "std"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else tuple(value))
        if len(self.temperal_downsample) != len(self.dim_mult) - 1:
            raise ValueError(
                f"temperal_downsample has {len(self.temperal_downsample)} entries for {len(self.dim_mult)} stages (dim_mult "
                f"{self.dim_mult}); expected one flag between each two stages, {len(self.dim_mult) - 1}"
            )
        if self.attn_scales:
            raise ValueError(
                f"attn_scales is {self.attn_scales}; every Wan VAE has it empty (attention only in the middle), leave it out"
            )
        if self.mean is None or self.std is None:
            if self.z_dim not in LATENT_STATISTICS:
                raise ValueError(
                    f"no published latent mean and std for z_dim {self.z_dim} (they are known for 16 and 48); put `mean` and "
                    "`std`, one number per latent channel, into the config"
                )
            mean, std = LATENT_STATISTICS[self.z_dim]
            object.__setattr__(self, "mean", self.mean or mean)
            object.__setattr__(self, "std", self.std or std)
        if not len(self.mean) == len(self.std) == self.z_dim:
            raise ValueError(
                f"mean has {len(self.mean)} and std {len(self.std)} entries; expected z_dim = {self.z_dim} of each"
            )
        if min(self.std) <= 0:
            raise ValueError(
                f"the config's std has {min(self.std)} in it; a standard deviation is positive, latents are divided by it"
            )
        if self.dec_dim is not None and self.dim_mult[-2] % self.dim_mult[-1]:
            raise ValueError(
                "the 2.2 autoencoder (dec_dim) averages channels past its last stage and so cannot widen there; the last two entries of "
                f"dim_mult must be equal, but are {self.dim_mult[-2]} and {self.dim_mult[-1]}"
            )

    @property
    def patch(self):
        """Side of the pixel patch folded into channels before the first convolution."""
        return 1 if self.dec_dim is None else 2

    @property
    def stride(self):
        """(time, height, width) pixels per latent cell."""
        space = 2 ** (len(self.dim_mult) - 1) * self.patch
        return (2 ** sum(self.temperal_downsample), space, space)


def channels_last(x):
    """The same values; on a CPU, in the memory order that its convolutions and channel norms are fastest in."""
    return x.contiguous(memory_format=torch.channels_last_3d) if x.device.type == "cpu" else x


class CausalConv3d(nn.Conv3d):
    """A 3-D convolution that looks back in time only: zeros before the first frame, or the frames the cache remembers."""

    def __init__(self, c_in, c_out, kernel, padding=0):
        super().__init__(c_in, c_out, kernel)
        self.past, self.side = self.kernel_size[0] - 1, padding
        self.tap = Taps(history="b c t h w")

    def forward(self, x, cache=None):
        if self.past == 0:
            return channels_last(F.conv3d(x, self.weight, self.bias, padding=self.padding_space))
        history = None if cache is None else cache.get(self)
        if history is None and x.shape[2] == 1 and cache is None:
            # One frame and nothing before it: only the last time tap meets anything but zeros.
            return F.conv2d(x[:, :, 0], self.weight[:, :, -1], self.bias, padding=self.side).unsqueeze(2)
        x = (
            F.pad(x, (0, 0, 0, 0, self.past, 0)) if history is None else torch.cat([history, x], 2)
        )  # [b, c, past + f, h, w]
        past, now = x[:, :, : self.past], x[:, :, self.past :]
        seen = self.tap("history", past)
        x = x if seen is past else torch.cat([seen, now], 2)
        if cache is not None:
            cache[self] = x[:, :, -self.past :].clone()
        return channels_last(F.conv3d(x, self.weight, self.bias, padding=self.padding_space))

    @property
    def padding_space(self):
        return (0, self.side, self.side)


class RMSNorm(nn.Module):
    """Each position's channel vector scaled to length sqrt(c), in float32, times a gain."""

    def __init__(self, c, space_time=True):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(c, *(1, 1, 1)[: 3 if space_time else 2]))

    def forward(self, x):
        length = torch.linalg.vector_norm(
            x, dim=1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32)
        )  # [b, 1, f, h, w]
        return (x * (x.shape[1] ** 0.5 / length.clamp_min(1e-12))).to(x.dtype) * self.gamma


def run(layers, x, cache):
    """Apply layers in order; those that reach across frames also get the time cache."""
    for layer in layers:
        x = layer(x, cache) if isinstance(layer, CROSS_FRAME) else layer(x)
    return x


class ResidualBlock(nn.Module):
    def __init__(self, c_in, c_out):
        super().__init__()
        self.residual = nn.Sequential(
            RMSNorm(c_in),
            nn.SiLU(),
            CausalConv3d(c_in, c_out, 3, padding=1),
            RMSNorm(c_out),
            nn.SiLU(),
            nn.Identity(),
            CausalConv3d(c_out, c_out, 3, padding=1),
        )
        self.shortcut = CausalConv3d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, cache=None):
        return run(self.residual, x, cache) + self.shortcut(x)


class AttentionBlock(nn.Module):
    """One head over the cells of each frame; frames do not see each other here."""

    def __init__(self, c):
        super().__init__()
        self.norm = RMSNorm(c, space_time=False)
        self.to_qkv = nn.Conv2d(c, 3 * c, 1)
        self.proj = nn.Conv2d(c, c, 1)
        self.kernel, self.tap = "sdpa", attention_taps(out="b c f h w")

    def forward(self, x):
        b, c, f, h, w = x.shape
        frames = rearrange(x, "b c f h w -> (b f) c h w")
        q, k, v = rearrange(
            self.to_qkv(self.norm(frames)), "b (qkv c) h w -> qkv b 1 (h w) c", qkv=3
        )  # each [b f, 1, h w, c]
        heads = attend(self.tap("q", q), self.tap("k", k), self.tap("v", v), tap=self.tap, kernel=self.kernel)
        out = self.proj(rearrange(heads, "b 1 (h w) c -> b c h w", h=h))  # [b f, c, h, w]
        return x + self.tap("out", rearrange(out, "(b f) c h w -> b c f h w", b=b))


class Upsample(nn.Upsample):
    def forward(self, x):
        return super().forward(x.float()).type_as(x)


class Down(nn.Module):
    """Halve height and width, then, with `time`, the frame rate. The very first frame stands alone and skips the time convolution."""

    def __init__(self, c, time):
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(c, c, 3, stride=2))
        self.time_conv = nn.Conv3d(c, c, (3, 1, 1), stride=(2, 1, 1)) if time else None

    def forward(self, x, cache=None):
        b = x.shape[0]
        x = rearrange(
            self.resample(rearrange(x, "b c f h w -> (b f) c h w")), "(b f) c h w -> b c f h w", b=b
        )  # [b, c, f, h/2, w/2]
        if self.time_conv is None:
            return x
        last = None if cache is None else cache.get(self)
        if cache is not None:
            cache[self] = x[:, :, -1:].clone()
        if last is not None:
            return self.time_conv(torch.cat([last, x], 2))  # [b, c, f/2, h/2, w/2]
        if x.shape[2] == 1:
            return x
        return torch.cat([x[:, :, :1], self.time_conv(x)], 2)  # [b, c, 1 + (f-1)/2, h/2, w/2]


class Up(nn.Module):
    """Double the frame rate (with `time`), then height and width. The very first frame is neither doubled nor seen by the time convolution."""

    def __init__(self, c_in, c_out, time):
        super().__init__()
        self.resample = nn.Sequential(
            Upsample(scale_factor=(2.0, 2.0), mode="nearest-exact"), nn.Conv2d(c_in, c_out, 3, padding=1)
        )
        self.time_conv = CausalConv3d(c_in, 2 * c_in, (3, 1, 1)) if time else None

    def forward(self, x, cache=None):
        if self.time_conv is not None:
            first = cache is None or self not in cache
            alone, x = (x[:, :, :1], x[:, :, 1:]) if first else (x[:, :, :0], x)
            if cache is not None:
                cache[self] = True
            if x.shape[2]:
                x = channels_last(
                    rearrange(self.time_conv(x, cache), "b (two c) f h w -> b c (f two) h w", two=2)
                )
            x = torch.cat([alone, x], 2)  # [b, c, 1 + 2 (f-1), h, w]
        b = x.shape[0]
        return rearrange(
            self.resample(rearrange(x, "b c f h w -> (b f) c h w")), "(b f) c h w -> b c f h w", b=b
        )  # [.., 2h, 2w]


class DownStage(nn.Module):
    """2.2: residual blocks and a Down, around them a shortcut that averages groups of (channel, time, height, width) cells."""

    def __init__(self, c_in, c_out, blocks, down, time):
        super().__init__()
        self.c_out, self.ft, self.fs = c_out, 2 if time else 1, 2 if down else 1
        layers = [ResidualBlock(c_in if i == 0 else c_out, c_out) for i in range(blocks)]
        self.downsamples = nn.Sequential(*layers, *([Down(c_out, time)] if down else []))

    def forward(self, x, cache=None):
        return run(self.downsamples, x, cache) + self.average(x)

    def average(self, x):
        x = F.pad(x, (0, 0, 0, 0, -x.shape[2] % self.ft, 0))  # zeros before an odd first frame
        x = rearrange(
            x, "b c (f ft) (h fh) (w fw) -> b (c ft fh fw) f h w", ft=self.ft, fh=self.fs, fw=self.fs
        )
        return rearrange(x, "b (c group) f h w -> b c group f h w", c=self.c_out).mean(
            2
        )  # [b, c_out, f/ft, h/fs, w/fs]


class UpStage(nn.Module):
    """2.2: residual blocks and an Up, around them a shortcut that repeats channels and spreads them over time, height and width."""

    def __init__(self, c_in, c_out, blocks, up, time):
        super().__init__()
        self.c_out, self.ft, self.up = c_out, 2 if time else 1, up
        layers = [ResidualBlock(c_in if i == 0 else c_out, c_out) for i in range(blocks)]
        self.upsamples = nn.Sequential(*layers, *([Up(c_out, c_out, time)] if up else []))

    def forward(self, x, cache=None):
        first = cache is None or self not in cache
        if cache is not None:
            cache[self] = True
        out = run(self.upsamples, x, cache)
        return out + self.spread(x, first) if self.up else out

    def spread(self, x, first):
        x = x.repeat_interleave(self.c_out * self.ft * 4 // x.shape[1], dim=1)
        x = rearrange(
            x, "b (c ft fh fw) f h w -> b c (f ft) (h fh) (w fw)", c=self.c_out, ft=self.ft, fh=2, fw=2
        )
        return x[:, :, self.ft - 1 :] if first else x


def middle(c):
    return nn.Sequential(ResidualBlock(c, c), AttentionBlock(c), ResidualBlock(c, c))


def head(c_in, c_out):
    return nn.Sequential(RMSNorm(c_in), nn.SiLU(), CausalConv3d(c_in, c_out, 3, padding=1))


class Encoder(nn.Module):
    """video [b, 3 * patch^2, F, H, W] -> mean and log variance [b, 2z, f, h, w]"""

    def __init__(self, config):
        super().__init__()
        widths = [config.dim * m for m in (1, *config.dim_mult)]
        times = (*config.temperal_downsample, None)  # None: the last stage keeps its size
        self.conv1 = CausalConv3d(3 * config.patch**2, widths[0], 3, padding=1)
        layers = []
        for c_in, c_out, time in zip(widths, widths[1:], times):
            if config.dec_dim is not None:
                layers.append(DownStage(c_in, c_out, config.num_res_blocks, time is not None, bool(time)))
                continue
            layers += [ResidualBlock(c_in if i == 0 else c_out, c_out) for i in range(config.num_res_blocks)]
            layers += [Down(c_out, time)] if time is not None else []
        self.downsamples = nn.Sequential(*layers)
        self.middle = middle(widths[-1])
        self.head = head(widths[-1], 2 * config.z_dim)
        self.tap = Taps(
            pixels="b c F H W",
            **{f"stage.{i}": "b c f h w" for i in range(len(layers))},
            moments="b c f h w",
            **{"middle.out": "b c f h w"},
        )

    def forward(self, x, cache=None):
        x = self.conv1(self.tap("pixels", x), cache)
        for i, layer in enumerate(self.downsamples):
            x = self.tap(f"stage.{i}", layer(x, cache))
        x = self.tap("middle.out", run(self.middle, x, cache))
        return self.tap("moments", run(self.head, x, cache))


class Decoder(nn.Module):
    """latent [b, z, f, h, w] -> video [b, 3 * patch^2, F, H, W]"""

    def __init__(self, config):
        super().__init__()
        base = config.dim if config.dec_dim is None else config.dec_dim
        widths = [base * m for m in (config.dim_mult[-1], *reversed(config.dim_mult))]
        times = (*reversed(config.temperal_downsample), None)
        self.conv1 = CausalConv3d(config.z_dim, widths[0], 3, padding=1)
        self.middle = middle(widths[0])
        layers, c_in = [], widths[0]
        for c_out, time in zip(widths[1:], times):
            if config.dec_dim is not None:
                layers.append(UpStage(c_in, c_out, config.num_res_blocks + 1, time is not None, bool(time)))
                c_in = c_out
                continue
            layers += [
                ResidualBlock(c_in if i == 0 else c_out, c_out) for i in range(config.num_res_blocks + 1)
            ]
            layers += (
                [Up(c_out, c_out // 2, time)] if time is not None else []
            )  # 2.1 halves the width on the way up
            c_in = c_out // 2
        self.upsamples = nn.Sequential(*layers)
        self.head = head(widths[-1], 3 * config.patch**2)
        self.tap = Taps(
            latent="b c f h w",
            **{f"stage.{i}": "b c f h w" for i in range(len(layers))},
            pixels="b c F H W",
            **{"middle.out": "b c f h w"},
        )

    def forward(self, z, cache=None):
        x = self.conv1(self.tap("latent", z), cache)
        x = self.tap("middle.out", run(self.middle, x, cache))
        for i, layer in enumerate(self.upsamples):
            x = self.tap(f"stage.{i}", layer(x, cache))
        return self.tap("pixels", run(self.head, x, cache))


CROSS_FRAME = (CausalConv3d, ResidualBlock, Down, Up, DownStage, UpStage)


def fold(video, patch):
    """Pixel patches into channels, the width offset slower than the height offset, as the 2.2 checkpoints expect."""
    return rearrange(video, "b c F (H q) (W r) -> b (c r q) F H W", q=patch, r=patch)


def unfold(x, patch):
    return rearrange(x, "b (c r q) F H W -> b c F (H q) (W r)", q=patch, r=patch)


class VAE(nn.Module):
    """video [b, 3, F, H, W] in [-1, 1]  <->  latent [b, z, f, h, w], each channel normalised as Wan's DiT expects.

    F = 4 f - 3 frames (1, 5, 9, ...), H and W multiples of the stride (8; 16 for 2.2).
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.stride, self.channels = config.stride, config.z_dim  # what a pipeline asks of any vae
        self.encoder = Encoder(config)
        self.conv1 = CausalConv3d(2 * config.z_dim, 2 * config.z_dim, 1)
        self.conv2 = CausalConv3d(config.z_dim, config.z_dim, 1)
        self.decoder = Decoder(config)
        self.memory_limit = 4 * 2**30  # bytes of activations above which decode and encode go chunk by chunk

    def statistics(self, like):
        """mean and 1 / std of the raw latent, [1, z, 1, 1, 1] in float32, so that a half precision latent is normalised in float32."""
        mean, std = (
            torch.tensor(s, dtype=torch.float32, device=like.device).view(1, -1, 1, 1, 1)
            for s in (self.config.mean, self.config.std)
        )
        return mean, 1 / std

    def encode(self, video, chunked=None):
        """video [b, 3, F, H, W] in [-1, 1] -> normalised latent mean [b, z, f, h, w].

        chunked  True: one frame, then four at a time with the time cache; False: in one pass; None: by `memory_limit`. Equal results.
        Raises ValueError for a wrong rank, channel count, frame count (4n + 1) or size (a multiple of the stride).
        """
        self.check_video(video)
        ft, frames = self.config.stride[0], video.shape[2]
        frames = [1] + [ft] * (frames // ft) if self.chunks(chunked, video.shape) else [frames]
        cache = {} if len(frames) > 1 else None
        x = channels_last(fold(video.to(self.conv1.weight.dtype), self.config.patch))
        moments = torch.cat(
            [self.encoder(chunk, cache) for chunk in x.split(frames, 2)], 2
        )  # [b, 2z, f, h, w]
        latent = self.conv1(moments).chunk(2, 1)[0]  # the mean; the log variance is not used
        mean, inverse_std = self.statistics(latent)
        return ((latent - mean) * inverse_std).to(latent.dtype)

    def decode(self, latent, chunked=None):
        """normalised latent [b, z, f, h, w] -> video [b, 3, F, H, W] in [-1, 1], clamped.

        chunked  True: latent frame by latent frame with the time cache; False: in one pass; None: by `memory_limit`. Equal results.
        """
        if latent.ndim != 5 or latent.shape[1] != self.config.z_dim or not latent.numel():
            raise ValueError(
                f"vae.decode got a latent of shape {list(latent.shape)}; expected [b, {self.config.z_dim}, f, h, w], five axes"
            )
        return self.decode_raw(latent, chunked).clamp(-1, 1)

    def decode_raw(self, latent, chunked=None):
        """As decode, before the clamp."""
        mean, inverse_std = self.statistics(latent)
        z = self.conv2((latent / inverse_std + mean).to(self.conv2.weight.dtype))
        ft, fh, fw = self.config.stride
        video_shape = (z.shape[0], 3, (z.shape[2] - 1) * ft + 1, z.shape[3] * fh, z.shape[4] * fw)
        parts = channels_last(z).split(1, 2) if self.chunks(chunked, video_shape) else [channels_last(z)]
        cache = {} if len(parts) > 1 else None
        return unfold(torch.cat([self.decoder(part, cache) for part in parts], 2), self.config.patch)

    def chunks(self, asked, video_shape):
        if asked is not None:
            return asked
        return self.activation_bytes(video_shape) > self.memory_limit

    def activation_bytes(self, video_shape):
        """Forecast of what one whole pass over a video of this shape holds at its peak, convolution workspaces not counted.

        At full resolution 2.1 holds four feature maps at once (its residual input, two around the padding, the output). In 2.2 the shortcut around
        the whole stage keeps a map of twice the width as well: seven.
        """
        b, _, frames, height, width = video_shape
        maps, base = (
            (4, self.config.dim)
            if self.config.dec_dim is None
            else (7, max(self.config.dim, self.config.dec_dim))
        )
        channels = maps * base * max(self.config.dim_mult[0], self.config.dim_mult[1] / 2)
        return int(
            b * channels * frames * height * width / self.config.patch**2 * self.conv1.weight.element_size()
        )

    def check_video(self, video):
        ft, fh, fw = self.config.stride
        if video.ndim != 5 or video.shape[1] != 3:
            raise ValueError(
                f"vae.encode got a video of shape {list(video.shape)}; expected [b, 3, F, H, W], five axes with 3 colours"
            )
        if not video.is_floating_point():
            raise ValueError(
                f"vae.encode got {video.dtype} values; expected floats in [-1, 1]. For uint8 frames use frames / 127.5 - 1"
            )
        frames, height, width = video.shape[2:]
        if frames % ft != 1 % ft or not frames:
            lower = max(frames - 1, 0) // ft * ft + 1
            raise ValueError(
                f"vae.encode got {frames} frames; expected {ft}n + 1 of them, such as {lower} or {lower + ft}: cut or repeat frames"
            )
        if height % fh or width % fw or not height or not width:
            raise ValueError(
                f"vae.encode got frames of {height} x {width} (height x width); expected multiples of {fh}: resize to "
                f"{max(height // fh, 1) * fh} x {max(width // fw, 1) * fw}"
            )
