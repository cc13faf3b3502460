"""Do the shipped models do what they should?  Every figure of the README's table, with its target.

moddiff score --split heldout -n 256 -o scores.json
"""

import json
import os
from functools import partial
from pathlib import Path
from timeit import repeat

import numpy as np
import torch
from tqdm.auto import tqdm

from ..saving import write_whole
from ..video import Video
from . import score, world

TARGETS = {
    "vae_psnr": ("VAE reconstruction, mean PSNR of held-out clips, dB", 38.5, "≥"),
    "one_all": ("one object: all four attributes right", 0.98, "≥"),
    "one_shape": ("one object: shape", 0.98, "≥"),
    "one_colour": ("one object: colour", 0.98, "≥"),
    "one_motion": ("one object: motion", 0.98, "≥"),
    "one_background": ("one object: background", 0.98, "≥"),
    "two_all": ("two objects: all seven attributes right", 0.97, "≥"),
    "es_all": ("the same in Spanish, one object: all four", 0.98, "≥"),
    "de_all": ("the same in German, one object: all four", 0.98, "≥"),
    "zh_all": ("the same in Chinese, one object: all four", 0.98, "≥"),
    "i2v_psnr": ("image-to-video: first frame kept, mean PSNR, dB", 34.0, "≥"),
    "i2v_motion": ("image-to-video: motion obeyed", 0.99, "≥"),
    "seconds": ("sentence to video, warm, 2 cores, seconds", 1.3, "≤"),
}
# What four steps without guidance have to reach.
FAST = {"seconds": 0.45, "two_all": 0.90, "i2v_psnr": 30.0, "i2v_motion": 0.95} | {
    name: 0.95 for name in TARGETS if name.startswith(("one_", "es_", "de_", "zh_"))
}
FAST = {name: (TARGETS[name][0], FAST[name], TARGETS[name][2]) for name in TARGETS if name in FAST}
RATES = "_all", "_shape", "_colour", "_motion", "_background"  # how the names of those end that are shares
TARGETS_OF = {"tiny-fast": FAST}


@torch.no_grad()
def vae_psnr(vae, n=100):
    """Mean PSNR in dB of decoded against true pixels over n held-out clips, peak to peak 255."""
    values = []
    for i in tqdm(range(n), desc="vae", leave=False, disable=None):
        scene = world.sample_scene(np.random.default_rng([77, i]), split="heldout")
        clip = world.clip(scene, seed=world.stable_seed("vae", i))
        decoded = vae.decode(vae.encode(Video(clip).tensor()))
        values.append(score.psnr(clip, Video.from_tensor(decoded).frames))
    return float(np.mean(values))


def t2v(pipe, things=1, n=256, split="heldout", language="en", **settings):
    """Judge the videos of n fixed prompts, seed i for prompt i.   -> one verdict of `score.judge` each"""
    prompts = world.prompts(n, things, split, language)
    return [
        score.judge(np.asarray(pipe(text, seed=i, **settings).frames), scene)
        for i, (text, scene) in enumerate(
            tqdm(prompts, desc=f"{language}, {things} thing(s)", leave=False, disable=None)
        )
    ]


def i2v(pipe, n=256, split="heldout", **settings):
    """First-frame PSNR and motion of n one-object clips continued from their first frame.

    -> [(psnr, is right)]
    """
    results = []
    prompts = world.prompts(n, 1, split)
    for i, (text, scene) in enumerate(tqdm(prompts, desc="i2v", leave=False, disable=None)):
        first = world.clip(scene, seed=world.stable_seed("i2v", i))[0]
        frames = np.asarray(pipe(text, image=first, seed=i, **settings).frames)
        results.append((score.psnr(first, frames[0]), score.judge(frames, scene)["motion"]))
    return results


def seconds(pipe, runs=5):
    """Fastest of a few warm runs from prompt to frames, seconds."""
    run = partial(pipe, "a red circle moving left on a black background", seed=0)
    run()  # the first one is cold
    return min(repeat(run, number=1, repeat=runs))  # the others are this one and what else the machine did


def measure(t2v_pipe=None, i2v_pipe=None, n=256, split="heldout", targets=TARGETS):
    """All figures of `targets` that the given pipelines allow.   -> {name: value}"""
    figures = {}
    if t2v_pipe is not None:
        figures |= dict(seconds=seconds(t2v_pipe))
        if "vae_psnr" in targets:
            figures |= dict(vae_psnr=vae_psnr(t2v_pipe.vae, min(n, 100)))
        one = score.summarise(t2v(t2v_pipe, 1, n, split))
        figures |= {f"one_{name}": one[name] for name in ("all", "shape", "colour", "motion", "background")}
        figures["two_all"] = score.summarise(t2v(t2v_pipe, 2, n, split))["all"]
        figures |= {
            f"{language}_all": score.summarise(t2v(t2v_pipe, 1, n, split, language))["all"]
            for language in ("es", "de", "zh")
        }
    if i2v_pipe is not None:
        psnr, motion = np.mean(i2v(i2v_pipe, n, split), axis=0).tolist()
        figures |= dict(i2v_psnr=psnr, i2v_motion=motion)
    return figures


def table(figures, targets=TARGETS):
    """The figures beside their targets, as Markdown."""
    rows = ["| | measured | target | |", "|---|---|---|---|"]
    for name, (words, target, sense) in targets.items():
        if name in figures:
            value = figures[name]
            met = value >= target if sense == "≥" else value <= target
            form = "{:.1%}" if name.endswith(RATES) else "{:.2f}"
            measured, wanted = map(form.format, (value, target))
            rows.append(f"| {words} | {measured} | {sense} {wanted} | {'met' if met else 'not met'} |")
    return "\n".join(rows)


def main(load, n=256, split="heldout", out=None, model=None):
    """Measure the shipped models, print the table, write the figures as JSON if asked.   -> the figures

    load   moddiff.load, by whose names the models come
    model  the name or folder of one model alone; None: tiny-t2v and tiny-i2v

    Raises ValueError for no prompts and for a split that there is not, before a model is loaded.
    """
    if n < 1:
        raise ValueError(f"n={n}; expected 1 or more prompts")
    world.prompts(1, split=split)  # knows which splits there are
    if model is None:
        shipped = (Path(__file__).parent / "weights" / "i2v.safetensors").exists()
        pipes = load("tiny-t2v"), load("tiny-i2v") if shipped else None
    else:
        pipe = load(model)
        pipes = (None, pipe) if pipe.task == "i2v" else (pipe, None)
    wanted = TARGETS_OF.get(model, TARGETS)
    figures = measure(*pipes, n, split, wanted)
    if out is not None:
        machine = dict(threads=torch.get_num_threads(), cores=os.cpu_count(), torch=torch.__version__)
        record = dict(figures=figures, model=model, n=n, split=split, **machine)
        write_whole(out, json.dumps(record, indent=2).encode() + b"\n")
    print(table(figures, wanted))
    return figures
