"""Which training stages are there, and what does each take from those before it?"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save

from ..attention import use_kernel
from ..image import ImageConfig, ImageEncoder
from ..saving import write_whole
from ..vae import VAE, VAEConfig
from ..video import to_tensor
from . import world
from .codec_stages import VAE_CONFIG, DecoderStage, VAEStage
from .distilling import FastStage, cache_paths
from .dit_stages import DIT_CONFIG, I2V_CONFIG, I2VStage, T2VStage, new_dit
from .encoder_stages import IMAGE_CONFIG, TEXT_CONFIG, CLIPStage, TextStage, new_text_encoder, train_tokenizer
from .training_set import Latents, cache_latents, training_scene

# About what the weights before the shipped ones were given, in batches of 32; of fast what the shipped one
# was, in batches of 16. See CARD.md.
STEPS = dict(vae=1200, text=650, t2v=5900, decoder=2180, clip=350, i2v=1700, fast=1289)
NEEDS = dict(
    t2v=("vae", "text"), decoder=("vae",), i2v=("vae", "t2v", "clip"), fast=("t2v",)
)  # stages that come before


def make_stage(name, folder, seed=0, clips=None, device="cpu", batch=None):
    """The stage `name` with its model, on the device, and its data.

    What it needs first (tokenizer, cached latents) is made if it is not in `folder` yet; what an earlier
    stage has to leave there is a FileNotFoundError that says how to make it.

    batch  how many clips, captions or windows a step learns from; None: as many as are right on a CPU
    """
    device = torch.device(device)
    stage = _stage(name, Path(folder), clips, device, dict(seed=seed, **({"batch": batch} if batch else {})))
    stage.model.to(device)
    if device.type == "cuda" and name in ("t2v", "i2v", "fast"):
        use_kernel(stage.model["dit"], "sdpa")  # there the fused kernel is the faster one
    return stage


def _stage(name, folder, clips, device, options):
    for earlier in NEEDS.get(name, ()):
        part(folder, earlier)  # before hours of caching, not after
    tokenizer = folder / "tokenizer.json"
    if not tokenizer.exists():
        write_whole(tokenizer, train_tokenizer().encode())
    if name == "vae":
        return VAEStage(**options)
    if name == "text":
        return TextStage(tokenizer, **options)
    if name == "clip":
        return CLIPStage(tokenizer, **options)
    if name == "fast":
        text = frozen(new_text_encoder(tokenizer), folder, "t2v", "text").to(device)
        dit = frozen(new_dit(DIT_CONFIG), folder, "t2v", "dit").to(device)
        cache_paths(text, dit, folder / "paths", clips)
        return FastStage(text, dit, folder / "paths", **options)
    vae = frozen(VAE(VAEConfig(**config_of("vae", folder))), folder, "vae").to(device)
    together = 64 if device.type == "cuda" else 4  # clips
    cache_latents(vae, folder / "clips", clips, batch=together)
    if name == "decoder":
        return DecoderStage(vae, folder / "clips", **options)
    if name == "t2v":
        return T2VStage(tokenizer, folder / "clips", part(folder, "text", "text"), **options)
    text = frozen(new_text_encoder(tokenizer), folder, "t2v", "text").to(device)
    image = frozen(ImageEncoder(ImageConfig(**IMAGE_CONFIG)), folder, "clip", "image").to(device)
    t2v = part(folder, "t2v", "dit")
    clips = clips or len(Latents(folder / "clips").array)  # no more first frames than there are clips
    cache_latents(vae, folder / "firsts", clips, what="first", batch=together)
    follow_t2v(folder)
    return I2VStage(text, image, t2v, folder / "clips", folder / "firsts", **options)


def follow_t2v(folder):
    """Let an i2v stage that goes on from weights of its own begin at those plus what t2v has learnt since.

    Both were one model once, and what one learns about words and motion the other can use. Weights that i2v
    has and t2v has not stay; of its wider first layer, the channels of the noise follow.
    """
    starts = [folder / stage / "start.safetensors" for stage in ("i2v", "t2v")]
    if (folder / "i2v" / "checkpoint.pt").exists() or not all(start.exists() for start in starts):
        return
    # Until i2v has a checkpoint, its averages are the weights it was begun with.
    i2v, old = load_file(folder / "i2v" / "ema.safetensors"), load_file(starts[1])
    for name, new in load_file(folder / "t2v" / "ema.safetensors").items():
        if name in i2v:  # the dit's, and not the text encoder's
            learnt = new - old[name]
            i2v[name][tuple(map(slice, learnt.shape))] += learnt
    write_whole(starts[0], save(i2v))


def part(folder, stage, kind=None):
    """The averaged weights of a stage, or of one of its models (`kind`), with the kind's prefix taken off."""
    path = Path(folder) / stage / "ema.safetensors"
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is not there: run `moddiff train-tiny --stage {stage}` in the same folder first"
        )
    prefix = "" if kind is None else kind + "."
    state = load_file(path)
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def frozen(model, folder, stage, kind=None):
    """The model with the weights that a stage has left, not to be trained any more."""
    model.load_state_dict(part(folder, stage, kind))
    return model.eval().requires_grad_(False)


@torch.no_grad()
def measure_latents(folder, clips=256):
    """Mean and standard deviation of each latent channel over training clips.

    -> {mean: [...], std: [...]}
    """
    vae = frozen(VAE(VAEConfig(**VAE_CONFIG)), folder, "vae")
    latents = torch.cat([vae.encode(to_tensor([world.clip(*training_scene(i))])) for i in range(clips)])
    mean, std = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
    return dict(mean=[round(x, 4) for x in mean.tolist()], std=[round(x, 4) for x in std.tolist()])


def config_of(name, folder):
    """The config that is stored beside the weights of vae, text, t2v, image or i2v."""
    if name != "vae":
        return dict(text=TEXT_CONFIG, t2v=DIT_CONFIG, image=IMAGE_CONFIG, i2v=I2V_CONFIG)[name]
    path = Path(folder) / "vae" / "statistics.json"
    if not path.exists():
        path.write_text(json.dumps(measure_latents(folder)))
    return {**VAE_CONFIG, **json.loads(path.read_text())}
