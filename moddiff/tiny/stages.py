"""What does each training stage learn, from which data, by which loss?"""

import json
import math
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from tqdm.auto import tqdm

from ..dit import DiT, DiTConfig
from ..flow import shift_sigmas
from ..image import ImageConfig, ImageEncoder
from ..text import TextConfig, TextEncoder, Tokenizer
from ..vae import VAE, VAEConfig
from . import world
from .muon import half_pays
from .reading import TEXT_CONFIG, TextStage, answers, draw_language, train_tokenizer, word_answers  # noqa: F401

VAE_CONFIG = dict(
    dim=16,
    z_dim=16,
    dim_mult=(1, 2, 4, 4),
    num_res_blocks=1,
    temperal_downsample=(False, True, True),
    mean=(0.0,) * 16,
    std=(1.0,) * 16,
)


def to_tensor(clips):
    """uint8 [b, F, H, W, 3] -> float [b, 3, F, H, W] in [-1, 1]"""
    return torch.from_numpy(np.ascontiguousarray(clips)).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def fast():
    """Forward passes in bfloat16 where this CPU is faster in it; weights, losses and averages stay in float32."""
    return torch.autocast("cpu", torch.bfloat16, enabled=half_pays())


def start_as_image_model(vae):
    """Zero every kernel's earlier time taps and make the time convolutions copies: at the start each frame is coded alone."""
    for name, p in vae.named_parameters():
        if p.ndim == 5 and p.shape[2] == 3:
            p.data[:, :, :2] = 0
            if "time_conv" in name:
                p.data[:, :, 2, 0, 0] = torch.eye(p.shape[1]).repeat(p.shape[0] // p.shape[1], 1)
        elif "time_conv" in name:
            p.data.zero_()


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
            picks = np.concatenate([clip[rng.choice(len(clip), 6, replace=False)] for clip in clips])[
                :, None
            ]  # [24, 1, H, W, 3]
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
        with fast():
            latent = self.model.encode(video, chunked=False).float()
            noisy = latent + 0.1 * torch.randn(latent.shape, generator=generator)
            error = self.model.decode_raw(noisy, chunked=False).float() - video
        mse = error.square().mean()
        loss = error.abs().mean() + 4 * mse + 3e-3 * latent.square().mean()
        kind = "psnr_frames" if video.shape[2] == 1 else "psnr_clips"
        return loss, {
            kind: float(10 * torch.log10(4 / mse.detach())),
            "latent_rms": float(latent.detach().square().mean().sqrt()),
        }


def interesting_crop(clip, size, rng):
    """A spatial crop of the whole clip, chosen of four for the most change against its own corner colour."""

    def content(y, x):
        part = clip[:, y : y + size, x : x + size].astype(np.float32)
        return part.std(axis=(0, 1, 2)).sum()

    room = clip.shape[1] - size
    spots = [(int(rng.integers(room + 1)), int(rng.integers(room + 1))) for _ in range(4)]
    y, x = max(spots, key=lambda spot: content(*spot))
    return clip[:, y : y + size, x : x + size]


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


def training_scene(i):
    """Scene i of the t2v training set, with the seed of its clip; four in ten hold one thing."""
    rng = np.random.default_rng([2024, i])
    return world.sample_scene(rng, things=1 if i % 5 < 2 else 2), int(rng.integers(2**31))


@torch.no_grad()
def cache_latents(vae, folder, count, what="clip", batch=4):
    """Encode the first `count` training clips to `<folder>/latents.npy` (float16), going on where an earlier call stopped.

    what  "clip": the whole clip; "first": its first frame followed by mid gray, which is what image-to-video is conditioned on
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shape = (count, vae.config.z_dim, (world.FRAMES - 1) // 4 + 1, world.SIZE // 8, world.SIZE // 8)
    path, done_path = folder / "latents.npy", folder / "latents.done"
    if not path.exists():
        np.lib.format.open_memmap(path, "w+", np.float16, shape).flush()
    latents = np.lib.format.open_memmap(path, "r+")
    done = int(done_path.read_text()) if done_path.exists() else 0
    for start in tqdm(range(done, len(latents), batch), desc=f"latents ({what})", mininterval=10):
        clips = to_tensor(
            np.stack([world.clip(*training_scene(i)) for i in range(start, min(start + batch, len(latents)))])
        )
        if what == "first":
            clips[:, :, 1:] = 0
        with fast():
            latents[start : start + len(clips)] = vae.encode(clips, chunked=False).half().numpy()
        counted = done_path.with_name("latents.done.part")
        counted.write_text(str(start + len(clips)))
        os.replace(counted, done_path)  # whole or not at all: a training run may be reading it


class Latents:
    """The cached latents of training clips; more may be added while a run reads them."""

    def __init__(self, folder):
        self.folder, self.array = Path(folder), np.load(Path(folder) / "latents.npy", mmap_mode="r")

    def __len__(self):
        return int((self.folder / "latents.done").read_text())

    def __getitem__(self, picks):
        return torch.from_numpy(self.array[picks].astype(np.float32))  # [b, z, f, h, w]


class DecoderStage:
    """Sharpen the VAE's decoder on cached latents, the encoder held fixed: latents, and every DiT trained on them, stay valid.

    towers  (text, dit): half of the latents then come as this guided DiT returns them, so that the decoder learns to mend what it leaves ragged
    noise   on the other half, in standard deviations of the latent
    """

    name, embeddings, ema, muon_lr, adam_lr = "decoder", (), 0.995, 0.004, 1e-3

    def __init__(self, vae, latents, towers=None, seed=0, batch=6, cells=6, noise=0.03):
        torch.manual_seed(seed)
        self.towers, self.noise = towers, noise
        self.model = vae.requires_grad_(False)
        for part in (vae.decoder, vae.conv2):
            part.requires_grad_(True)
        self.latents, self.batch, self.cells = Latents(latents), batch, cells

    def loss(self, step, rng):
        """A window of cells is decoded and compared two cells in from its cut edges, where the decoder has seen all it would in the whole clip."""
        z, target, side = [], [], world.SIZE // 8
        generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
        picks = rng.integers(len(self.latents), size=self.batch)
        latents = self.latents[picks]  # [b, z, f, h, w]
        latents += self.noise * torch.randn(latents.shape, generator=generator)
        if self.towers is not None:
            half = self.batch // 2
            latents[:half] = self.returned(picks[:half], rng, generator)
        for i, latent in zip(picks, latents):
            clip = world.clip(*training_scene(i))
            moving = (np.abs(clip.astype(np.int16) - clip[:, :1, :1]).max((0, 3)) > 40).nonzero()
            y, x = (
                int(
                    np.clip(
                        rng.choice(axis) // 8 + rng.integers(-2, 3) - self.cells // 2, 0, side - self.cells
                    )
                )
                for axis in moving
            )
            window = np.s_[8 * y : 8 * (y + self.cells), 8 * x : 8 * (x + self.cells)]
            z.append(latent[..., y : y + self.cells, x : x + self.cells])
            target.append(clip[:, *window])
        with fast():
            video = self.model.decode_raw(
                torch.stack(z), chunked=False
            ).float()  # [b, 3, F, 8 cells, 8 cells]
        error = (video - to_tensor(np.stack(target)))[..., 8:-8, 8:-8]
        mse = error.square().mean()
        return 4 * mse + 0.25 * error.abs().mean(), dict(psnr=float(10 * torch.log10(4 / mse.detach())))

    @torch.no_grad()
    def returned(self, picks, rng, generator, scale=4.0):
        """Latents as the last step of a run returns them: a little noise, and the guided DiT's guess of what was under it."""
        text, dit = self.towers
        z0, captions = self.latents[picks], draw_captions(picks, rng, empty=0)
        sigma = 0.05 + 0.35 * torch.rand(len(z0), generator=generator)
        s = sigma.view(-1, 1, 1, 1, 1)
        x = (1 - s) * z0 + s * torch.randn(z0.shape, generator=generator)
        with fast():
            with_caption, without = (
                dit(
                    torch.cat([x, x]),
                    1000 * torch.cat([sigma, sigma]),
                    text.encode([*captions, *[""] * len(captions)]),
                )
                .float()
                .chunk(2)
            )
        return x - s * (without + scale * (with_caption - without))


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
    """A noise level per sample (logit-normal, then shifted), the noisy latent and the velocity to learn.   -> sigma [b], x, velocity"""
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    noise = torch.randn(x0.shape, generator=generator)
    level = (torch.arange(len(x0)) + torch.rand(len(x0), generator=generator)) / len(
        x0
    )  # one draw from each equal part of the distribution
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


def draw_captions(picks, rng, empty=0.1):
    """One caption for each training clip, now and then an empty one, which teaches the unguided branch."""
    return [
        world.caption(training_scene(i)[0], draw_language(rng), rng) if rng.random() > empty else ""
        for i in picks
    ]


class T2VStage:
    """Learn the velocity of cached latents given their captions; the text encoder, which can read by now, learns along.

    shift  7: where a thing is, and how it moves, is decided at noise levels of 0.85 to 0.97, and there most of the draws must lie
    """

    name, ema, muon_lr, adam_lr = "t2v", 0.998, 0.005, 1.5e-3
    embeddings = ("token_embedding", "relative_bias", "modulation", "final", "patch_embedding")

    def __init__(self, tokenizer, latents, text_state=None, dit_state=None, seed=0, batch=32, shift=7.0):
        torch.manual_seed(seed)
        text, dit = (
            TextEncoder(TextConfig(**TEXT_CONFIG), Tokenizer(tokenizer, TEXT_CONFIG["text_len"])),
            DiT(DiTConfig(**DIT_CONFIG)),
        )
        init_dit(dit)
        dit.use_kernel("math")  # at 180 tokens faster than the fused kernel, the backward pass included
        if text_state is not None:
            text.load_state_dict(text_state)
        if dit_state is not None:
            dit.load_state_dict(dit_state)
        self.model, self.batch, self.shift, self.latents = (
            nn.ModuleDict(dict(text=text, dit=dit)),
            batch,
            shift,
            Latents(latents),
        )

    def loss(self, step, rng):
        picks = rng.integers(len(self.latents), size=self.batch)
        sigma, x, target = noisy(self.latents[picks], self.shift, rng)
        ids, mask = self.model["text"].tokenizer.batch(draw_captions(picks, rng))
        with fast():
            features = self.model["text"](ids, mask)  # [b, l, d]
            velocity = self.model["dit"](x, 1000 * sigma, [f[m] for f, m in zip(features, mask)])
        return errors(velocity.float(), target, sigma)


IMAGE_CONFIG = dict(image_size=64, patch_size=8, dim=128, mlp_ratio=4, out_dim=64, num_heads=4, num_layers=4)


def still_caption(scene):
    """What one frame shows: shapes, colours, background; no motion."""
    return (
        " above ".join(f"a {t.colour} {t.shape}" for t in scene.things)
        + f" on a {scene.background} background"
    )


class CLIPStage:
    """Match frames with sentences about them. The small text tower is thrown away; pairs that share a sentence count as right."""

    name, embeddings, ema, muon_lr, adam_lr = (
        "clip",
        ("token_embedding", "relative_bias", "position_embedding", "class_token"),
        0.995,
        0.005,
        1.5e-3,
    )

    def __init__(self, tokenizer, seed=0, batch=48):
        torch.manual_seed(seed)
        image = ImageEncoder(ImageConfig(**IMAGE_CONFIG))
        text = TextEncoder(
            TextConfig(**{**TEXT_CONFIG, "dim": 64, "dim_attn": 64, "dim_ffn": 128, "num_layers": 2}),
            Tokenizer(tokenizer, TEXT_CONFIG["text_len"]),
        )
        self.model, self.batch = nn.ModuleDict(dict(image=image, text=text)), batch
        self.model.register_parameter("log_scale", nn.Parameter(torch.tensor(math.log(10.0))))

    def loss(self, step, rng):
        scenes = [world.sample_scene(rng) for _ in range(self.batch)]
        frames = np.stack(
            [world.clip(scene, int(rng.integers(2**31)), frames=3)[int(rng.integers(3))] for scene in scenes]
        )[:, None]
        captions = [still_caption(scene) for scene in scenes]
        ids, mask = self.model["text"].tokenizer.batch(captions)
        words = self.model["text"](ids, mask)
        text = F.normalize((words * mask[..., None]).sum(1), dim=-1)  # [b, d]
        image = F.normalize(self.model["image"].project(to_tensor(frames)[:, :, 0]), dim=-1)  # [b, d]
        logits = self.model.log_scale.exp().clamp(max=100) * image @ text.T  # [b, b]
        same = torch.tensor([[float(a == b) for b in captions] for a in captions])
        target = same / same.sum(1, keepdim=True)
        loss = (
            -(target * logits.log_softmax(1)).sum(1).mean() - (target * logits.T.log_softmax(1)).sum(1).mean()
        )
        return loss, dict(matched=float(same.gather(1, logits.argmax(1, keepdim=True)).mean()))


I2V_CONFIG = {**DIT_CONFIG, "model_type": "i2v", "in_dim": 36, "image_dim": IMAGE_CONFIG["dim"]}


def condition(first):
    """What an i2v DiT gets beside the noise: a mask (1 in all four channels of latent frame 0) and the latent of image-then-gray."""
    mask = torch.zeros(first.shape[0], 4, *first.shape[2:])
    mask[:, :, 0] = 1
    return torch.cat([mask, first], 1)  # [b, 4 + z, f, h, w]


class I2VStage:
    """From the t2v DiT: learn to read a first frame, through the mask and latent channels and through CLIP features. Text stays frozen."""

    name, ema, muon_lr, adam_lr = "i2v", 0.998, 0.003, 1e-3
    embeddings = ("modulation", "final", "patch_embedding")

    def __init__(self, text, image, t2v_state, latents, first_latents, seed=0, batch=32, shift=5.0):
        torch.manual_seed(seed)
        dit = DiT(DiTConfig(**I2V_CONFIG))
        dit.use_kernel("math")
        state = dit.state_dict()
        for name, value in t2v_state.items():
            if name == "patch_embedding.weight":
                state[name].zero_()[:, : value.shape[1]] = value
            else:
                state[name].copy_(value)
        for name, value in state.items():
            if "image_v" in name:
                value.zero_()  # the image path starts silent
        self.model, self.text, self.image, self.batch, self.shift = (
            nn.ModuleDict(dict(dit=dit)),
            text.eval(),
            image.eval(),
            batch,
            shift,
        )
        self.latents, self.first = Latents(latents), Latents(first_latents)

    def loss(self, step, rng):
        picks = rng.integers(min(len(self.latents), len(self.first)), size=self.batch)
        sigma, x, target = noisy(self.latents[picks], self.shift, rng)
        with torch.no_grad():
            features = self.text.encode(draw_captions(picks, rng))
            frames = np.stack([world.clip(*training_scene(i))[:1] for i in picks])
            seen = self.image.encode(to_tensor(frames)[:, :, 0])
        with fast():
            velocity = self.model["dit"](
                x, 1000 * sigma, features, image=seen, y=condition(self.first[picks])
            )
        return errors(velocity.float(), target, sigma)


def part(folder, stage, kind=None):
    """The averaged weights of a stage, or of one of its models (`kind`), with the kind's prefix taken off."""
    path = Path(folder) / stage / "ema.safetensors"
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is not there: run `moddiff train-tiny --stage {stage}` in the same folder first"
        )
    state = load_file(path)
    prefix = "" if kind is None else kind + "."
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def load_vae(folder):
    """The trained VAE, with the measured mean and standard deviation of its latents in its config."""
    vae = VAE(VAEConfig(**config_of("vae", folder))).eval().requires_grad_(False)
    vae.load_state_dict(part(folder, "vae"))
    return vae


@torch.no_grad()
def measure_latents(folder, clips=256):
    """Mean and standard deviation of each latent channel over training clips, for the VAE's config.   -> {mean: [...], std: [...]}"""
    vae = VAE(VAEConfig(**VAE_CONFIG)).eval()
    vae.load_state_dict(part(folder, "vae"))
    latents = torch.cat([vae.encode(to_tensor(world.clip(*training_scene(i))[None])) for i in range(clips)])
    return dict(
        mean=[round(x, 4) for x in latents.mean((0, 2, 3, 4)).tolist()],
        std=[round(x, 4) for x in latents.std((0, 2, 3, 4)).tolist()],
    )


def config_of(name, folder):
    """The config that is stored beside the weights of vae, text, t2v, image or i2v."""
    if name != "vae":
        return dict(text=TEXT_CONFIG, t2v=DIT_CONFIG, image=IMAGE_CONFIG, i2v=I2V_CONFIG)[name]
    path = Path(folder) / "vae" / "statistics.json"
    if not path.exists():
        path.write_text(json.dumps(measure_latents(folder)))
    return {**VAE_CONFIG, **json.loads(path.read_text())}


def towers(folder, tokenizer):
    """The text encoder and the DiT as t2v left them, for the decoder."""
    text, dit = (
        TextEncoder(TextConfig(**TEXT_CONFIG), Tokenizer(tokenizer, TEXT_CONFIG["text_len"])),
        DiT(DiTConfig(**DIT_CONFIG)),
    )
    for name, model in (("text", text), ("dit", dit)):
        model.load_state_dict(part(folder, "t2v", name))
        model.eval().requires_grad_(False)
    return text, dit


def frozen_towers(folder, tokenizer):
    """The text encoder as t2v left it, and the image tower, for i2v."""
    text = TextEncoder(TextConfig(**TEXT_CONFIG), Tokenizer(tokenizer, TEXT_CONFIG["text_len"]))
    text.load_state_dict(part(folder, "t2v", "text"))
    image = ImageEncoder(ImageConfig(**IMAGE_CONFIG))
    image.load_state_dict(part(folder, "clip", "image"))
    return text, image
