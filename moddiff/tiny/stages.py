"""What does each training stage learn, from which data, by which loss?"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..vae import VAE, VAEConfig
from . import world

VAE_CONFIG = dict(dim=16, z_dim=16, dim_mult=(1, 2, 4, 4), num_res_blocks=1, temperal_downsample=(False, True, True),
                  mean=(0.0,) * 16, std=(1.0,) * 16)


def to_tensor(clips):
    """uint8 [b, F, H, W, 3] -> float [b, 3, F, H, W] in [-1, 1]"""
    return torch.from_numpy(np.ascontiguousarray(clips)).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def start_as_image_model(vae):
    """Zero every kernel's earlier time taps and make the time convolutions copies: at the start each frame is coded alone."""
    for name, p in vae.named_parameters():
        if p.ndim == 5 and p.shape[2] == 3:
            p.data[:, :, :2] = 0
            if "time_conv" in name:
                p.data[:, :, 2, 0, 0] = torch.eye(p.shape[1]).repeat(p.shape[0] // p.shape[1], 1)


class VAEStage:
    """First single frames, then full-length clips in spatial crops, mixed with frames. Fixed latent noise instead of a learned variance."""

    name, embeddings, ema = "vae", (), 0.998

    def __init__(self, frame_steps=700, crop=32, seed=0):
        torch.manual_seed(seed)
        self.model = VAE(VAEConfig(**VAE_CONFIG))
        start_as_image_model(self.model)
        self.muon_lr, self.adam_lr, self.frame_steps, self.crop = 0.008, 2e-3, frame_steps, crop

    def batch(self, step, rng):
        if step < self.frame_steps or step % 8 == 0:
            clips = [world.clip(world.sample_scene(rng), seed=int(rng.integers(2**31))) for _ in range(4)]
            picks = np.concatenate([clip[rng.choice(len(clip), 6, replace=False)] for clip in clips])[:, None]  # [24, 1, H, W, 3]
            if step % 8:
                picks = np.stack([interesting_crop(frame, 48, rng) for frame in picks])
            else:
                picks = picks[:8]
            return to_tensor(picks)  # [24, 3, 1, 48, 48], now and then [8, 3, 1, H, W]
        clips, c = [], self.crop
        for _ in range(6):
            clip = world.clip(world.sample_scene(rng), seed=int(rng.integers(2**31)))
            for _ in range(2):
                clips.append(interesting_crop(clip, c, rng))
        return to_tensor(np.stack(clips))  # [12, 3, 17, c, c]

    def loss(self, step, rng):
        video = self.batch(step, rng)
        generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
        latent = self.model.encode(video, chunked=False)
        noisy = latent + 0.1 * torch.randn(latent.shape, generator=generator)
        error = self.model.decode_raw(noisy, chunked=False) - video
        mse = error.square().mean()
        loss = error.abs().mean() + 4 * mse + 3e-3 * latent.square().mean()
        kind = "psnr_frames" if video.shape[2] == 1 else "psnr_clips"
        return loss, {kind: float(10 * torch.log10(4 / mse.detach())), "latent_rms": float(latent.detach().square().mean().sqrt())}


def interesting_crop(clip, size, rng):
    """A spatial crop of the whole clip, chosen of four for the most change against its own corner colour."""
    def content(y, x):
        part = clip[:, y : y + size, x : x + size].astype(np.float32)
        return part.std(axis=(0, 1, 2)).sum()
    room = clip.shape[1] - size
    spots = [(int(rng.integers(room + 1)), int(rng.integers(room + 1))) for _ in range(4)]
    y, x = max(spots, key=lambda spot: content(*spot))
    return clip[:, y : y + size, x : x + size]
