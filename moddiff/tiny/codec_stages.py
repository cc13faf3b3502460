"""How does the VAE learn to keep a clip in few numbers?  From pixels; then its decoder, on fixed latents."""

import numpy as np
import torch

from ..vae import VAE, VAEConfig
from ..video import to_tensor
from . import world
from .muon import Recipe, fast
from .training_set import Latents, generator_on, training_scene

VAE_CONFIG = dict(
    dim=16,
    z_dim=16,
    dim_mult=(1, 2, 4, 4),
    num_res_blocks=1,
    temperal_downsample=(False, True, True),
    mean=(0.0,) * 16,
    std=(1.0,) * 16,
)


def start_as_image_model(vae):
    """Zero the earlier time taps and make the time convolutions copies: each frame is coded alone."""
    for name, p in vae.named_parameters():
        if p.ndim == 5 and p.shape[2] == 3:
            p.data[:, :, :2] = 0
            if "time_conv" in name:
                p.data[:, :, 2, 0, 0] = torch.eye(p.shape[1]).repeat(p.shape[0] // p.shape[1], 1)
        elif "time_conv" in name:
            p.data.zero_()


def decibels(mse):
    """PSNR of pixels in [-1, 1], for the log."""
    return 10 * torch.log10(4 / mse.detach())


class VAEStage:
    """First single frames, then full-length clips in spatial crops, mixed with frames.

    Fixed latent noise stands for a learned variance.
    """

    name = "vae"
    recipe = Recipe(muon=0.008, adam=2e-3, ema=0.998)

    def __init__(self, frame_steps=700, crop=32, seed=0, batch=12):
        torch.manual_seed(seed)
        self.model = VAE(VAEConfig(**VAE_CONFIG))
        start_as_image_model(self.model)
        self.frame_steps, self.crop, self.batch = frame_steps, crop, batch

    def draw(self, step, rng):
        return dict(video=self.video(step, rng), seed=int(rng.integers(2**31)))

    def video(self, step, rng):
        """[2 b, 3, 1, 48, 48], now and then [8, 3, 1, H, W]; later mostly [b, 3, F, crop, crop]"""
        if step >= self.frame_steps and step % 8:
            clips = (drawn_clip(rng) for _ in range(self.batch // 2))
            return to_tensor([interesting_crop(clip, self.crop, rng) for clip in clips for _ in range(2)])
        clips = [drawn_clip(rng) for _ in range(self.batch // 3)]
        frames = np.concatenate([clip[rng.choice(len(clip), 6, replace=False)] for clip in clips])[:, None]
        if step % 8:
            return to_tensor([interesting_crop(frame, 48, rng) for frame in frames])
        return to_tensor(frames[:8])

    def loss(self, video, seed):
        with fast(video.device):
            latent = self.model.encode(video, chunked=False).float()
            generator = generator_on(video.device, seed)
            noise = torch.randn(latent.shape, generator=generator, device=video.device)
            error = self.model.decode_raw(latent + 0.1 * noise, chunked=False).float() - video
        mse = error.square().mean()
        loss = error.abs().mean() + 4 * mse + 3e-3 * latent.square().mean()
        kind = "psnr_frames" if video.shape[2] == 1 else "psnr_clips"
        return loss, {kind: decibels(mse), "latent_rms": latent.detach().square().mean().sqrt()}


def drawn_clip(rng):
    return world.clip(world.sample_scene(rng), seed=int(rng.integers(2**31)))


def interesting_crop(clip, size, rng):
    """A spatial crop of the whole clip, of four the one in which most changes."""

    def variety(crop):
        return crop.astype(np.float32).std(axis=(0, 1, 2)).sum()

    room = clip.shape[1] - size
    spots = [(int(rng.integers(room + 1)), int(rng.integers(room + 1))) for _ in range(4)]
    return max((clip[:, y : y + size, x : x + size] for y, x in spots), key=variety)


class DecoderStage:
    """Sharpen the VAE's decoder on cached latents; with the encoder held, the DiTs stay valid.

    batch  windows, each of another clip
    noise  the most that is added to a window's latents, in their standard deviations; the least is none
    """

    name = "decoder"
    recipe = Recipe(muon=0.003, adam=7e-4, ema=0.998)

    def __init__(self, vae, latents, seed=0, batch=6, cells=6, noise=0.06):
        torch.manual_seed(seed)
        self.model = vae.requires_grad_(False)
        for part in (vae.decoder, vae.conv2):
            part.requires_grad_(True)
        self.latents, self.batch, self.cells, self.noise = Latents(latents), batch, cells, noise

    def draw(self, step, rng):
        """Windows of some cells: latents z [b, z, f, cells, cells], pixels [b, 3, F, 8 cells, 8 cells]"""
        picks = rng.integers(len(self.latents), size=self.batch)
        z, target = [], []
        for i, latent in zip(picks, self.latents[picks]):
            clip = world.clip(*training_scene(i))
            y, x = self.window(clip, rng)
            z.append(latent[..., y : y + self.cells, x : x + self.cells])
            target.append(clip[:, 8 * y : 8 * (y + self.cells), 8 * x : 8 * (x + self.cells)])
        return dict(z=torch.stack(z), target=to_tensor(target), seed=int(rng.integers(2**31)))

    def loss(self, z, target, seed):
        """A window is decoded and compared one cell in from its edges.

        There the decoder has seen nearly all that it would see in the whole clip.
        """
        generator, device = generator_on(z.device, seed), z.device
        strength = self.noise * torch.rand(len(z), 1, 1, 1, 1, generator=generator, device=device)
        z = z.float() + strength * torch.randn(z.shape, generator=generator, device=device)
        with fast(device):
            video = self.model.decode_raw(z, chunked=False).float()
        error = (video - target)[..., 8:-8, 8:-8]
        mse = error.square().mean()
        return 4 * mse + 0.25 * error.abs().mean(), dict(psnr=decibels(mse))

    def window(self, clip, rng):
        """The upper left cell of a window near something that is not background."""
        drawn = np.abs(clip.astype(np.int16) - clip[:, :1, :1]).max((0, 3)) > 40  # [H, W]
        furthest = world.SIZE // 8 - self.cells
        middles = [rng.choice(axis) // 8 + rng.integers(-2, 3) for axis in drawn.nonzero()]
        return [int(np.clip(middle - self.cells // 2, 0, furthest)) for middle in middles]
