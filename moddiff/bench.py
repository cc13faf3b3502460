"""How long does it take?  A sentence to a video, warm and cold, part by part, and the DiT against diffusers on the same weights."""

import importlib.util
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from . import at, weights

PROMPT = "a red circle moving left on a black background"


def measure(model="tiny-t2v", runs=3):
    """All figures as plain data, times in seconds.   model: as for moddiff.load; runs: repetitions, the median counts"""
    if runs < 1:
        raise ValueError(f"runs={runs}; expected 1 or more")
    pipe = weights.load(model)
    if pipe.task not in ("t2v", "ti2v"):
        raise ValueError(
            f"{pipe.name} is a {pipe.task} model; the bench writes a sentence only. Choose a text-to-video model"
        )
    figures = dict(
        model=pipe.name,
        machine=machine(),
        prompt=PROMPT,
        steps=pipe.defaults["steps"],
        solver=pipe.defaults["solver"],
        frames=pipe.defaults["frames"],
        size=list(pipe.defaults["size"]),
    )
    figures["seconds"] = dict(
        first=timed(lambda: pipe(PROMPT), 1), warm=timed(lambda: write(pipe), runs), cold_process=cold(model)
    )
    figures["parts"] = parts(pipe, runs)
    figures["dit_against_diffusers"] = against_diffusers(pipe, runs)
    return figures


def machine():
    """What the figures depend on."""
    return dict(
        processor=platform.machine(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        python=platform.python_version(),
    )


def timed(work, runs):
    """Median seconds of calling work()."""
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return round(statistics.median(times), 4)


def write(pipe):
    """The whole way to a playable file."""
    return pipe(PROMPT).encode(".mp4")


def cold(model):
    """Seconds of `moddiff generate` in a fresh process, file included."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "moddiff",
            "generate",
            PROMPT,
            "--model",
            str(model),
            "--quiet",
            "-o",
            str(Path(folder) / "out.mp4"),
        ]
        return timed(lambda: subprocess.run(command, check=True, capture_output=True), 1)


@torch.no_grad()
def parts(pipe, runs):
    """Seconds of each component's share of one video."""
    run = pipe.prepare(PROMPT)
    t = torch.tensor([500], device=run.noise.device)
    latent = run.noise[:, : pipe.vae.config.z_dim]
    video = pipe.decode(latent)
    return dict(
        prepare=timed(lambda: pipe.prepare(PROMPT), runs),
        text=timed(lambda: pipe.text.encode([PROMPT]), runs),
        dit_forward=timed(lambda: pipe.dit(run.noise, t, run.context["cond"]), runs),
        solver_step=timed(lambda: run.solver.step(run.noise, run.noise, *run.schedule.sigmas[:2]), runs),
        vae_decode=timed(lambda: pipe.vae.decode(latent), runs),
        mp4=timed(lambda: video.encode(".mp4"), runs),
    )


@torch.no_grad()
def against_diffusers(pipe, runs):
    """Our DiT and diffusers' on the same weights and inputs, in turn in one process; None where diffusers is not installed."""
    if importlib.util.find_spec("diffusers") is None:
        return None
    from diffusers import WanTransformer3DModel

    config = pipe.dit.config
    theirs = WanTransformer3DModel(
        patch_size=config.patch_size,
        num_attention_heads=config.num_heads,
        attention_head_dim=config.dim // config.num_heads,
        in_channels=config.in_dim,
        out_channels=config.out_dim,
        text_dim=config.text_dim,
        freq_dim=config.freq_dim,
        ffn_dim=config.ffn_dim,
        num_layers=config.num_layers,
        cross_attn_norm=config.cross_attn_norm,
        eps=config.eps,
    ).eval()
    theirs.load_state_dict(weights.rename(pipe.dit.state_dict(), "dit", "diffusers", config), strict=True)
    theirs = theirs.to(pipe.dit.patch_embedding.weight.dtype)
    run = pipe.prepare(PROMPT)
    text = pipe.text.encode([PROMPT])
    rows = torch.cat([text[0], text[0].new_zeros(config.text_len - len(text[0]), config.text_dim)])[
        None
    ]  # [1, text_len, d]
    t, dtype = torch.tensor([500], device=run.noise.device), theirs.dtype

    def ours():
        with at(branch="cond"):
            return pipe.dit(run.noise, t, run.context["cond"])

    def reference():
        return theirs(run.noise.to(dtype), t, rows.to(dtype), return_dict=False)[0]

    difference = (ours() - reference()).abs().max()
    times = {"ours": [], "diffusers": []}
    for _ in range(max(runs, 5)):
        times["ours"].append(timed(ours, 1))
        times["diffusers"].append(timed(reference, 1))
    middle = {name: round(statistics.median(values), 5) for name, values in times.items()}
    return middle | dict(
        ratio=round(middle["ours"] / middle["diffusers"], 3), largest_difference=float(difference)
    )
