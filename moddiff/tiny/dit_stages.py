"""How do the DiTs learn to denoise?  From text alone first, and from there with a first frame too."""

import torch
from torch import nn

from ..conditioning import first_frame_mask
from ..dit import DiT, DiTConfig
from ..flow import shift_sigmas
from ..video import to_tensor
from . import world
from .encoder_stages import IMAGE_CONFIG, new_text_encoder
from .muon import Recipe, fast
from .training_set import Latents, draw_captions, training_scene

DIT_CONFIG = dict(
    model_type="t2v",
    in_dim=16,
    out_dim=16,
    dim=192,
    ffn_dim=768,
    freq_dim=128,
    text_dim=192,
    text_len=64,
    num_heads=4,
    num_layers=8,
)
I2V_CONFIG = {**DIT_CONFIG, "model_type": "i2v", "in_dim": 36, "image_dim": IMAGE_CONFIG["dim"]}


def new_dit(config):
    dit = DiT(DiTConfig(**config))
    dit.use_kernel("math")  # at 180 tokens faster than the fused kernel, the backward pass included
    return dit


def init_dit(dit):
    """Wan's own start: Xavier matrices, small time and text projections, a final layer that says nothing."""
    for module in dit.modules():
        if isinstance(module, (nn.Linear, nn.Conv3d)):
            nn.init.xavier_uniform_(module.weight.flatten(1))
            nn.init.zeros_(module.bias)
    for module in (*dit.text_mlp, *dit.time_mlp):
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
    nn.init.zeros_(dit.final.linear.weight)


def noisy(x0, shift, rng):
    """A noise level per sample (logit-normal, then shifted), x there, and the velocity to learn.

    ->  sigma [b], x and velocity [b, z, f, h, w]
    """
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    noise = torch.randn(x0.shape, generator=generator)
    # One draw from each equal part of the distribution.
    level = (torch.arange(len(x0)) + torch.rand(len(x0), generator=generator)) / len(x0)
    sigma = shift_sigmas(torch.special.ndtri(level).sigmoid(), shift)
    s = sigma.view(-1, 1, 1, 1, 1)
    return sigma, (1 - s) * x0 + s * noise, noise - x0


def errors(velocity, target, sigma):
    """Mean squared error, and the same at low, middle and high noise for the log."""
    each = (velocity - target).square().mean((1, 2, 3, 4))  # [b]
    parts = (("low", sigma < 0.5), ("mid", (sigma >= 0.5) & (sigma < 0.85)), ("high", sigma >= 0.85))
    return each.mean(), {
        f"mse_{name}": float(each[part].mean().detach()) for name, part in parts if part.any()
    }


class T2VStage:
    """Learn the velocity of cached latents given their captions; the text encoder learns along.

    shift  7: where a thing is, and how it moves, is decided at noise levels of 0.85 to 0.97, and there most
           of the draws must lie
    """

    name = "t2v"
    recipe = Recipe(
        muon=0.005,
        adam=1.5e-3,
        ema=0.998,
        embeddings=("token_embedding", "relative_bias", "modulation", "final", "patch_embedding"),
    )

    def __init__(self, tokenizer, latents, text_state, seed=0, batch=32, shift=7.0):
        torch.manual_seed(seed)
        text, dit = new_text_encoder(tokenizer), new_dit(DIT_CONFIG)
        init_dit(dit)
        text.load_state_dict(text_state)
        self.model = nn.ModuleDict(dict(text=text, dit=dit))
        self.batch, self.shift, self.latents = batch, shift, Latents(latents)

    def loss(self, step, rng):
        picks = rng.integers(len(self.latents), size=self.batch)
        sigma, x, target = noisy(self.latents[picks], self.shift, rng)
        ids, mask = self.model["text"].tokenizer.batch(draw_captions(picks, rng))
        with fast():
            features = self.model["text"](ids, mask)  # [b, l, d]
            velocity = self.model["dit"](x, 1000 * sigma, [f[m] for f, m in zip(features, mask)])
        return errors(velocity.float(), target, sigma)


class I2VStage:
    """From the t2v DiT: learn to see a first frame, through mask and latent channels and CLIP features.

    text, image  frozen encoders
    """

    name = "i2v"
    recipe = Recipe(muon=0.003, adam=1e-3, ema=0.998, embeddings=("modulation", "final", "patch_embedding"))

    def __init__(self, text, image, t2v_state, latents, first_latents, seed=0, batch=32, shift=5.0):
        torch.manual_seed(seed)
        dit = new_dit(I2V_CONFIG)
        state, noise = dit.state_dict(), t2v_state["patch_embedding.weight"]
        patch = torch.zeros_like(state["patch_embedding.weight"])
        patch[:, : noise.shape[1]] = noise  # its channels come first, then those of mask and latent
        # The image path starts silent.
        silent = {name: torch.zeros_like(value) for name, value in state.items() if "image_v" in name}
        dit.load_state_dict({**state, **t2v_state, **silent, "patch_embedding.weight": patch})
        self.model = nn.ModuleDict(dict(dit=dit))
        self.text, self.image, self.batch, self.shift = text.eval(), image.eval(), batch, shift
        self.latents, self.first = Latents(latents), Latents(first_latents)

    def loss(self, step, rng):
        picks = rng.integers(min(len(self.latents), len(self.first)), size=self.batch)
        sigma, x, target = noisy(self.latents[picks], self.shift, rng)
        first = self.first[picks]
        mask = first_frame_mask(world.FRAMES, first.shape[2:], ft=4).expand(len(first), -1, -1, -1, -1)
        with torch.no_grad():
            features = self.text.encode(draw_captions(picks, rng))
            frames = to_tensor([world.clip(*training_scene(i))[:1] for i in picks])
            seen = self.image.encode(frames[:, :, 0])
        with fast():
            y = torch.cat([mask, first], 1)  # [b, 4 + z, f, h, w]
            velocity = self.model["dit"](x, 1000 * sigma, features, image=seen, y=y)
        return errors(velocity.float(), target, sigma)
