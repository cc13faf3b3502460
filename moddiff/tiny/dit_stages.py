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
from .training_set import Latents, draw_captions, generator_on, training_scene

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


# How a noise level is shifted: one of these for each sample. Where a thing is and how it moves is decided at
# levels of 0.85 to 0.97, where a shift of 5 or 7 puts most draws; outlines are decided below: hence 1.5.
SHIFTS = (5.0, 5.0, 7.0, 1.5)


def new_dit(config):
    dit = DiT(DiTConfig(**config))
    dit.use_kernel("math")  # at 180 tokens a CPU is faster so, the backward pass included
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


def noise_levels(count, generator, device, shifts=SHIFTS):
    """One level from each equal part of a logit-normal, shifted by one of `shifts`.   -> sigma [count]"""
    within = torch.rand(count, generator=generator, device=device)
    level = (torch.arange(count, device=device) + within) / count
    which = torch.randint(len(shifts), (1, count), generator=generator, device=device)
    sigma = torch.special.ndtri(level).sigmoid()
    return torch.stack([shift_sigmas(sigma, shift) for shift in shifts]).gather(0, which)[0]


def noisy(x0, seed):
    """A noise level per sample, x there, and the velocity to learn.

    ->  sigma [b], x and velocity [b, z, f, h, w]
    """
    generator = generator_on(x0.device, seed)
    noise = torch.randn(x0.shape, generator=generator, device=x0.device)
    sigma = noise_levels(len(x0), generator, x0.device)
    s = sigma.view(-1, 1, 1, 1, 1)
    return sigma, (1 - s) * x0 + s * noise, noise - x0


def errors(velocity, target, sigma):
    """Mean squared error, and the same at low, middle and high noise for the log (NaN where nothing is)."""
    each = (velocity - target).square().mean((1, 2, 3, 4))  # [b]
    parts = dict(low=sigma < 0.5, mid=(sigma >= 0.5) & (sigma < 0.85), high=sigma >= 0.85)
    # Sums and no selection, whose size a GPU would have to wait for.
    figures = {f"mse_{name}": (each.detach() * part).sum() / part.sum() for name, part in parts.items()}
    return each.mean(), figures


class T2VStage:
    """Learn the velocity of cached latents given their captions; the text encoder learns along."""

    name = "t2v"
    recipe = Recipe(
        muon=0.004,
        adam=1e-3,
        ema=0.999,
        embeddings=("token_embedding", "relative_bias", "modulation", "final", "patch_embedding"),
    )

    def __init__(self, tokenizer, latents, text_state, seed=0, batch=32):
        torch.manual_seed(seed)
        text, dit = new_text_encoder(tokenizer), new_dit(DIT_CONFIG)
        init_dit(dit)
        text.load_state_dict(text_state)
        self.model = nn.ModuleDict(dict(text=text, dit=dit))
        self.batch, self.latents = batch, Latents(latents)

    def draw(self, step, rng):
        picks = rng.integers(len(self.latents), size=self.batch)
        words = captioned(self.model["text"].tokenizer, picks, rng)
        return dict(x0=self.latents[picks], **words, seed=int(rng.integers(2**31)))

    def loss(self, x0, ids, mask, lengths, seed):
        sigma, x, target = noisy(x0.float(), seed)
        with fast(x.device):
            features = self.model["text"](ids, mask)  # [b, l, d]
            velocity = self.model["dit"](x, 1000 * sigma, rows_of(features, lengths))
        return errors(velocity.float(), target, sigma)


def captioned(tokenizer, picks, rng):
    """Captions of training clips: ids and mask [b, l], and how many tokens each has, as plain numbers."""
    ids, mask = tokenizer.batch(draw_captions(picks, rng))
    return dict(ids=ids, mask=mask, lengths=mask.sum(1).tolist())


def rows_of(features, lengths):
    """The rows of the real tokens.   [b, l, d] -> b times [its length, d]"""
    return [each[:length] for each, length in zip(features, lengths)]


class I2VStage:
    """From the t2v DiT: learn to see a first frame, through mask and latent channels and CLIP features.

    text, image  frozen encoders
    """

    name = "i2v"
    recipe = Recipe(muon=0.003, adam=1e-3, ema=0.999, embeddings=("modulation", "final", "patch_embedding"))

    def __init__(self, text, image, t2v_state, latents, first_latents, seed=0, batch=32):
        torch.manual_seed(seed)
        dit = new_dit(I2V_CONFIG)
        state, noise = dit.state_dict(), t2v_state["patch_embedding.weight"]
        patch = torch.zeros_like(state["patch_embedding.weight"])
        patch[:, : noise.shape[1]] = noise  # its channels come first, then those of mask and latent
        # The image path starts silent.
        silent = {name: torch.zeros_like(value) for name, value in state.items() if "image_v" in name}
        dit.load_state_dict({**state, **t2v_state, **silent, "patch_embedding.weight": patch})
        self.model = nn.ModuleDict(dict(dit=dit))
        self.text, self.image, self.batch = text.eval(), image.eval(), batch
        self.latents, self.first = Latents(latents), Latents(first_latents)

    def draw(self, step, rng):
        picks = rng.integers(min(len(self.latents), len(self.first)), size=self.batch)
        frames = to_tensor([world.clip(*training_scene(i), frames=1) for i in picks])[:, :, 0]
        words = captioned(self.text.tokenizer, picks, rng)
        latents = dict(x0=self.latents[picks], first=self.first[picks])
        return dict(**latents, frames=frames, **words, seed=int(rng.integers(2**31)))

    def loss(self, x0, first, frames, ids, mask, lengths, seed):
        sigma, x, target = noisy(x0.float(), seed)
        given = first_frame_mask(world.FRAMES, first.shape[2:], ft=4).to(x)
        y = torch.cat([given.expand(len(x), -1, -1, -1, -1), first.float()], 1)  # [b, 4 + z, f, h, w]
        with torch.no_grad():
            features = rows_of(self.text(ids, mask), lengths)
            seen = self.image.encode(frames)
        with fast(x.device):
            velocity = self.model["dit"](x, 1000 * sigma, features, image=seen, y=y)
        return errors(velocity.float(), target, sigma)
