"""Do the shipped models clear their bars?  Every figure of the README's table, measured from the committed weights.

moddiff score --split heldout -n 256 -o scores.json
"""

import json
import os
import time
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from . import score, world
from .stages import to_tensor
from .train import replace_file

BARS = {
    "vae_psnr": ("VAE reconstruction, mean PSNR of held-out clips, dB", 35.0, ">="),
    "one_all": ("one object: all four attributes right", 0.95, ">="),
    "one_shape": ("one object: shape", 0.97, ">="),
    "one_colour": ("one object: colour", 0.97, ">="),
    "one_motion": ("one object: motion", 0.97, ">="),
    "one_background": ("one object: background", 0.97, ">="),
    "two_all": ("two objects: all seven attributes right", 0.80, ">="),
    "es_all": ("the same in Spanish, one object: all four", 0.90, ">="),
    "de_all": ("the same in German, one object: all four", 0.90, ">="),
    "zh_all": ("the same in Chinese, one object: all four", 0.90, ">="),
    "i2v_psnr": ("image-to-video: first frame kept, mean PSNR, dB", 28.0, ">="),
    "i2v_motion": ("image-to-video: motion obeyed", 0.95, ">="),
    "seconds": ("sentence to video, warm, 2 cores, seconds", 2.0, "<="),
}


def vae_psnr(vae, n=100):
    """Mean PSNR in dB of decoded against true pixels over n held-out clips, peak to peak 255."""
    values = []
    for i in tqdm(range(n), desc="vae", leave=False, disable=None):
        clip = world.clip(
            world.sample_scene(np.random.default_rng([77, i]), split="heldout"),
            seed=world.stable_seed("vae", i),
        )
        with torch.no_grad():
            decoded = vae.decode(vae.encode(to_tensor(clip[None])))
        values.append(score.psnr(clip, to_uint8(decoded)))
    return float(np.mean(values))


def to_uint8(video):
    """[1, 3, F, H, W] in [-1, 1] -> uint8 [F, H, W, 3]"""
    return ((video[0].permute(1, 2, 3, 0) + 1) / 2 * 255).clamp(0, 255).byte().numpy()


def t2v(pipe, things=1, n=256, split="heldout", language="en", **settings):
    """Judge the videos of n fixed prompts, seed i for prompt i.   -> one verdict each: {attribute: bool, ..., "all": bool}"""
    prompts = world.prompts(n, things, split, language)
    return [
        score.judge(np.asarray(pipe(text, seed=i, **settings).frames), scene)
        for i, (text, scene) in enumerate(
            tqdm(prompts, desc=f"{language}, {things} thing(s)", leave=False, disable=None)
        )
    ]


def i2v(pipe, n=256, split="heldout", **settings):
    """First-frame PSNR and motion of n one-object clips continued from their true first frame.   -> [(psnr, motion right)]"""
    results = []
    prompts = world.prompts(n, 1, split)
    for i, (text, scene) in enumerate(tqdm(prompts, desc="i2v", leave=False, disable=None)):
        first = world.clip(scene, seed=world.stable_seed("i2v", i))[0]
        frames = np.asarray(pipe(text, image=first, seed=i, **settings).frames)
        results.append((score.psnr(first, frames[0]), score.judge(frames, scene)["motion"]))
    return results


def seconds(pipe, runs=5):
    """Fastest of a few warm runs from prompt to frames, seconds."""

    def once():
        start = time.perf_counter()
        pipe("a red circle moving left on a black background", seed=0)
        return time.perf_counter() - start

    once()
    return min(once() for _ in range(runs))


def measure(t2v_pipe, i2v_pipe=None, n=256, split="heldout"):
    """All figures of `BARS` that the given pipelines allow.   -> {name: value}"""
    figures = dict(seconds=seconds(t2v_pipe), vae_psnr=vae_psnr(t2v_pipe.vae, min(n, 100)))
    one = score.summarise(t2v(t2v_pipe, 1, n, split))
    figures |= {f"one_{name}": one[name] for name in ("all", "shape", "colour", "motion", "background")}
    figures["two_all"] = score.summarise(t2v(t2v_pipe, 2, n, split))["all"]
    for language in ("es", "de", "zh"):
        figures[f"{language}_all"] = score.summarise(t2v(t2v_pipe, 1, n, split, language))["all"]
    if i2v_pipe is not None:
        kept = i2v(i2v_pipe, n, split)
        figures |= dict(
            i2v_psnr=float(np.mean([p for p, _ in kept])), i2v_motion=float(np.mean([m for _, m in kept]))
        )
    return figures


def table(figures):
    """The figures against their bars, as Markdown."""
    rows = ["| | measured | bar | |", "|---|---|---|---|"]
    for name, (words, bar, sense) in BARS.items():
        if name in figures:
            value = figures[name]
            met = value >= bar if sense == ">=" else value <= bar
            show = (lambda x: f"{100 * x:.1f}%") if bar < 1 else (lambda x: f"{x:.2f}")
            rows.append(
                f"| {words} | {show(value)} | {'≥' if sense == '>=' else '≤'} {show(bar)} | {'met' if met else 'not met'} |"
            )
    return "\n".join(rows)


def main(n=256, split="heldout", out=None):
    """Measure the shipped models, print the table, write the figures as JSON if asked.   -> the figures"""
    import moddiff

    weights = Path(__file__).parent / "weights"
    i2v_pipe = moddiff.load("tiny-i2v") if (weights / "i2v.safetensors").exists() else None
    figures = measure(moddiff.load("tiny-t2v"), i2v_pipe, n, split)
    if out is not None:
        record = dict(
            figures=figures,
            n=n,
            split=split,
            threads=torch.get_num_threads(),
            cores=os.cpu_count(),
            torch=torch.__version__,
        )
        replace_file(Path(out), lambda path: path.write_text(json.dumps(record, indent=2) + "\n"))
    print(table(figures))
    return figures
