"""How does it come together?  An encoder and a decoder of stages, and the two as one component."""

import torch
from einops import rearrange
from torch import nn

from ..hooks import Taps
from .causal import CausalConv3d, channels_last
from .layers import AttentionBlock, Down, DownStage, ResidualBlock, RMSNorm, Up, UpStage, residual_blocks


class Encoder(nn.Module):
    """video [b, 3 * patch^2, F, H, W] -> mean and log variance [b, 2z, f, h, w]"""

    def __init__(self, config):
        super().__init__()
        widths = [config.dim * m for m in (1, *config.dim_mult)]
        stages = down_stages_21 if config.dec_dim is None else down_stages_22
        layers = [*stages(widths, [*config.temperal_downsample, None], config.num_res_blocks)]
        self.conv1 = CausalConv3d(3 * config.patch**2, widths[0], 3, padding=1)
        self.downsamples = nn.Sequential(*layers)
        self.middle = middle(widths[-1])
        self.head = head(widths[-1], 2 * config.z_dim)
        names = [f"stage.{i}" for i in range(len(layers))] + ["moments", "middle.out"]
        self.tap = Taps(pixels="b c F H W", **dict.fromkeys(names, "b c f h w"))

    def forward(self, x, cache=None):
        x = self.conv1(self.tap("pixels", x), cache)
        for i, layer in enumerate(self.downsamples):
            x = self.tap(f"stage.{i}", layer(x, cache))
        x = self.tap("middle.out", through_middle(self.middle, x, cache))
        return self.tap("moments", through_head(self.head, x, cache))


class Decoder(nn.Module):
    """latent [b, z, f, h, w] -> video [b, 3 * patch^2, F, H, W]"""

    def __init__(self, config):
        super().__init__()
        base = config.dim if config.dec_dim is None else config.dec_dim
        widths = [base * m for m in (config.dim_mult[-1], *reversed(config.dim_mult))]
        stages = up_stages_21 if config.dec_dim is None else up_stages_22
        times = [*reversed(config.temperal_downsample), None]
        layers = [*stages(widths, times, config.num_res_blocks + 1)]  # one block more than on the way down
        self.conv1 = CausalConv3d(config.z_dim, widths[0], 3, padding=1)
        self.middle = middle(widths[0])
        self.upsamples = nn.Sequential(*layers)
        self.head = head(widths[-1], 3 * config.patch**2)
        names = ["latent", *(f"stage.{i}" for i in range(len(layers))), "middle.out"]
        self.tap = Taps(**dict.fromkeys(names, "b c f h w"), pixels="b c F H W")

    def forward(self, z, cache=None):
        x = self.conv1(self.tap("latent", z), cache)
        x = self.tap("middle.out", through_middle(self.middle, x, cache))
        for i, layer in enumerate(self.upsamples):
            x = self.tap(f"stage.{i}", layer(x, cache))
        return self.tap("pixels", through_head(self.head, x, cache))


# The stages. widths: before the first and after each; times: after each, is the frame rate halved (doubled)
# too, as height and width are?  None, after the last one: nothing is. In 2.1 blocks and resampling stand in
# one flat list, as its parameter names want it; in 2.2 each stage is a module with a shortcut.


def down_stages_21(widths, times, blocks):
    for c_in, c_out, time in zip(widths, widths[1:], times):
        yield from residual_blocks(c_in, c_out, blocks)
        if time is not None:
            yield Down(c_out, time)


def up_stages_21(widths, times, blocks):
    c_in = widths[0]
    for c_out, time in zip(widths[1:], times):
        yield from residual_blocks(c_in, c_out, blocks)
        if time is not None:
            yield Up(c_out, c_out // 2, time)
        c_in = c_out // 2  # 2.1 halves the width on the way up


def down_stages_22(widths, times, blocks):
    for c_in, c_out, time in zip(widths, widths[1:], times):
        yield DownStage(c_in, c_out, blocks, down=time is not None, time=time)


def up_stages_22(widths, times, blocks):
    for c_in, c_out, time in zip(widths, widths[1:], times):
        yield UpStage(c_in, c_out, blocks, up=time is not None, time=time)


def middle(c):
    return nn.Sequential(ResidualBlock(c, c), AttentionBlock(c), ResidualBlock(c, c))


def through_middle(layers, x, cache):
    before, attention, after = layers
    return after(attention(before(x, cache)), cache)


def head(c_in, c_out):
    # In place: it writes into what the norm made, which nobody else reads.
    return nn.Sequential(RMSNorm(c_in), nn.SiLU(inplace=True), CausalConv3d(c_in, c_out, 3, padding=1))


def through_head(layers, x, cache):
    norm, silu, conv = layers
    return conv(silu(norm(x)), cache)


def fold(video, patch):
    """Pixel patches into channels, the width offset slower than the height offset, as 2.2 was trained."""
    return rearrange(video, "b c F (H q) (W r) -> b (c r q) F H W", q=patch, r=patch)


def unfold(x, patch):
    """Undoes fold."""
    return rearrange(x, "b (c r q) F H W -> b c F (H q) (W r)", q=patch, r=patch)


class VAE(nn.Module):
    """video [b, 3, F, H, W] in [-1, 1]  <->  latent [b, z, f, h, w], each channel normalised for Wan's DiT.

    F = 4 f - 3 frames (1, 5, 9, ...), H and W multiples of the stride (8; 16 for 2.2).

    stride        (time, height, width) pixels per latent cell
    channels      z
    memory_limit  bytes of activations above which encode and decode go chunk by chunk
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.stride, self.channels = config.stride, config.z_dim
        self.encoder = Encoder(config)
        self.conv1 = CausalConv3d(2 * config.z_dim, 2 * config.z_dim, 1)
        self.conv2 = CausalConv3d(config.z_dim, config.z_dim, 1)
        self.decoder = Decoder(config)
        # Above this chunks are as fast: 17 frames of 96 x 128 on a CPU, 0.95 of the time of one pass.
        self.memory_limit = 2**28

    def encode(self, video, chunked=None):
        """video [b, 3, F, H, W] in [-1, 1] -> normalised latent mean [b, z, f, h, w].

        chunked  True: one frame, then four at a time with the time cache; False: in one pass; None: by
                 `memory_limit`. Equal results.
        Raises ValueError for a wrong rank, channel count, frame count (4n + 1) or size (a multiple of the
        stride).
        """
        self.check_video(video)
        ft, frames = self.stride[0], video.shape[2]
        lengths = [1] + [ft] * (frames // ft) if self.in_chunks(chunked, video.shape) else [frames]
        cache = {} if len(lengths) > 1 else None
        x = channels_last(fold(video.to(self.conv1.weight.dtype), self.config.patch))
        moments = torch.cat([self.encoder(chunk, cache) for chunk in x.split(lengths, 2)], 2)
        latent = self.conv1(moments).chunk(2, 1)[0]  # the mean; the log variance is not used
        mean, std = self.statistics(latent)
        return ((latent - mean) * (1 / std)).to(latent.dtype)  # the official code keeps 1 / std, rounded

    def decode(self, latent, chunked=None):
        """normalised latent [b, z, f, h, w] -> video [b, 3, F, H, W] in [-1, 1], clamped.

        chunked  True: latent frame by latent frame with the time cache; False: in one pass; None: by
                 `memory_limit`. Equal results.
        Raises ValueError for a wrong rank, channel count, or no values.
        """
        self.check_latent(latent)
        return self.decode_raw(latent, chunked).clamp(-1, 1)

    def stream(self, latent):
        """The frames of `decode` as they come: yields [b, 3, n, H, W], n = 1 from the first latent frame,
        then 4 from each.

        latent  or an iterator of latents, each of the next frames, which may still be in the making

        Needs the memory of one latent frame, however long the video. Equal to `decode(chunked=True)`.
        Raises ValueError as decode does, at the call; for a later latent when it comes.
        """
        if torch.is_tensor(latent):
            self.check_latent(latent)
        return self.streamed([latent] if torch.is_tensor(latent) else latent)

    def streamed(self, latents):
        cache = {}
        for latent in latents:
            self.check_latent(latent)
            for frames in self.decoded_chunks(latent, 1, cache):
                yield frames.clamp(-1, 1)

    def decode_raw(self, latent, chunked=None):
        """As decode, before the clamp."""
        ft, fh, fw = self.stride
        b, _, f, h, w = latent.shape
        chunked = self.in_chunks(chunked, (b, 3, (f - 1) * ft + 1, h * fh, w * fw))
        return torch.cat([*self.decoded_chunks(latent, 1 if chunked else f)], 2)

    def decoded_chunks(self, latent, length, cache=None):
        """Decode so many latent frames at a time; yields the pixels of each chunk, before the clamp.

        cache  what earlier frames of the film left, if these are not its first
        """
        mean, std = self.statistics(latent)
        z = self.conv2((latent / (1 / std) + mean).to(self.conv2.weight.dtype))
        if cache is None and length < z.shape[2]:
            cache = {}
        for chunk in channels_last(z).split(length, 2):
            yield unfold(self.decoder(chunk, cache), self.config.patch)

    def statistics(self, like):
        """Mean and standard deviation of the raw latent, each [1, z, 1, 1, 1]; always float32."""
        both = torch.tensor([self.config.mean, self.config.std], dtype=torch.float32, device=like.device)
        return both.view(2, 1, -1, 1, 1, 1)

    def in_chunks(self, asked, video_shape):
        return self.activation_bytes(video_shape) > self.memory_limit if asked is None else asked

    def activation_bytes(self, video_shape):
        """Forecast of what one whole pass over a video of this shape holds at its peak, workspaces of the
        convolutions not counted.

        At full resolution 2.1 holds four feature maps at once: the residual input, two around the padding,
        the output. In 2.2 the shortcut around the whole stage keeps a map of twice the width as well: seven.
        """
        config = self.config
        b, _, frames, height, width = video_shape
        maps, base = (4, config.dim) if config.dec_dim is None else (7, max(config.dim, config.dec_dim))
        channels = maps * base * max(config.dim_mult[0], config.dim_mult[1] / 2)
        cells = b * frames * height * width / config.patch**2
        return int(channels * cells * self.conv1.weight.element_size())

    def check_latent(self, latent):
        if latent.ndim != 5 or latent.shape[1] != self.channels or not latent.numel():
            raise ValueError(
                f"vae.decode got a latent of shape {list(latent.shape)}; expected [b, {self.channels}, f, h, "
                "w], five axes. Add a batch axis with latent[None] if it has four"
            )

    def check_video(self, video):
        ft, fh, fw = self.stride
        if video.ndim != 5 or video.shape[1] != 3:
            raise ValueError(
                f"vae.encode got a video of shape {list(video.shape)}; expected [b, 3, F, H, W], five axes "
                "with 3 colours"
            )
        if not video.is_floating_point():
            raise ValueError(
                f"vae.encode got {video.dtype} values; expected floats in [-1, 1]. For uint8 frames use "
                "frames / 127.5 - 1"
            )
        frames, height, width = video.shape[2:]
        if frames % ft != 1 % ft or not frames:
            lower = max(frames - 1, 0) // ft * ft + 1
            raise ValueError(
                f"vae.encode got {frames} frames; expected {ft}n + 1 of them, such as {lower} or "
                f"{lower + ft}: cut or repeat frames"
            )
        if height % fh or width % fw or not height or not width:
            raise ValueError(
                f"vae.encode got frames of {height} x {width} (height x width); expected multiples of {fh}: "
                f"resize to {max(height // fh, 1) * fh} x {max(width // fw, 1) * fw}"
            )
