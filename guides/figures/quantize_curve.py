"""How few bits does the tiny model need?  Obedience and distance from the plain film, one row for each kind.

    python guides/figures/quantize_curve.py -n 25 -o guides/figures/quantize_curve.json
    python guides/figures/quantize_curve.py --widths  # one block of Wan 1.3B, random weights

The prompts are the held-out ones of `moddiff score`, one object each, seed i for prompt i. Every film is kept
as soon as it is judged, in a folder beside the JSON, so that a command which was interrupted goes on.
"""

import argparse
import dataclasses
import json
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from kept import Keep, mark_of

import moddiff
from moddiff.extensions import quantized
from moddiff.saving import write_whole
from moddiff.storage import ENCODERS
from moddiff.tiny import score, world
from moddiff.weights.releases import open_release

KINDS = ("plain", *ENCODERS)
ASKED = ("all", "shape", "colour", "motion", "background")


def film(pipe, text, seed, scene):
    """One video and what the judge says of it.   -> dict of arrays, as Keep takes them"""
    frames = np.asarray(pipe(text, seed=seed).frames)
    verdict = score.judge(frames, scene)
    return {"frames": frames} | {name: np.array(verdict[name]) for name in ASKED}


def figures(films, plain):
    """Shares of what was obeyed, and the mean PSNR in dB to the films of the plain model; none for itself."""
    rows = {name: float(np.mean([one[name] for one in films])) for name in ASKED}
    if films is not plain:
        pairs = zip(plain, films, strict=True)
        rows["psnr"] = float(np.mean([score.psnr(a["frames"], b["frames"]) for a, b in pairs]))
    return rows


def sizes(part):
    """What the report of a quantized component adds up to."""
    rows = [row for row in part.report().rows if "error" in row]
    errors = [row["error"] for row in rows]
    return {"layers": len(rows), "MB": sum(row["MB"] for row in rows), "error": float(np.mean(errors))}


def measure(pipe, n, keep):
    """All films, prompt by prompt, so that a stop leaves every kind with the same prompts.   -> the facts"""
    parts = {kind: pipe.dit if kind == "plain" else quantized(pipe.dit, kind) for kind in KINDS}
    pipes = {kind: pipe.replace(dit=part) for kind, part in parts.items()}
    films = {kind: [] for kind in KINDS}
    for i, (text, scene) in enumerate(world.prompts(n, split="heldout")):
        for kind in KINDS:
            made = keep(f"{kind}-{i:03}", partial(film, pipes[kind], text, i, scene))
            films[kind].append(made)
        print(i, {kind: bool(films[kind][-1]["all"]) for kind in KINDS}, flush=True)
    rows = {kind: figures(films[kind], films["plain"]) for kind in KINDS}
    for kind in ENCODERS:
        rows[kind] |= sizes(parts[kind])
    return {"prompts": n, "kinds": rows}


def widths(runs=5):
    """One block of Wan 1.3B with random weights, in bfloat16, on 1560 tokens.   -> {kind: facts}"""
    config = dataclasses.replace(open_release("wan2.1-t2v-1.3b").parts["dit"].config, num_layers=1)
    torch.manual_seed(0)
    dit = moddiff.build("dit", config).to(torch.bfloat16)
    for weight in dit.parameters():  # what starts at zero would hide the others
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
    x, text = torch.randn(1, 16, 1, 60, 104), [torch.randn(32, config.text_dim)]
    inputs = x, torch.tensor([700.0]), text
    parts = {kind: dit if kind == "plain" else quantized(dit, kind) for kind in KINDS}
    exact = dit(*inputs).float()
    rows = {kind: {} if kind == "plain" else sizes(part) for kind, part in parts.items()}
    for kind, part in parts.items():
        rows[kind]["output"] = float((part(*inputs).float() - exact).norm() / exact.norm())
    taken = {kind: [] for kind in KINDS}
    for _ in range(runs):  # in turn, so that whatever else the machine does meets all of them
        for kind, part in parts.items():
            start = time.perf_counter()
            part(*inputs)
            taken[kind].append(time.perf_counter() - start)
    for kind, row in rows.items():
        row["seconds"] = min(taken[kind])
        print(kind, {name: round(value, 4) for name, value in row.items()})
    return rows


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("-n", "--number", type=int, default=64, help="prompts")
    parser.add_argument("-o", "--out", type=Path, default=Path("quantize_curve.json"))
    parser.add_argument("--model", default="tiny-t2v")
    parser.add_argument("--widths", action="store_true", help="one large block instead")
    options = parser.parse_args(arguments)
    if options.widths:
        with torch.no_grad():
            widths()
        return
    pipe = moddiff.load(options.model)
    keep = Keep(options.out.with_suffix(".parts"), mark_of(pipe, pipe.defaults))
    with torch.no_grad():
        facts = measure(pipe, options.number, keep)
    write_whole(options.out, json.dumps(facts, indent=2).encode() + b"\n")
    for kind, row in facts["kinds"].items():
        print(kind, {name: round(value, 4) for name, value in row.items()})


if __name__ == "__main__":
    main()
