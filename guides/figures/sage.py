"""How far is SageAttention from float64, on queries and keys of the tiny model, with and without smoothing?

    python guides/figures/sage.py -n 16 -o guides/figures/sage.json

Queries, keys and values of every self-attention are captured in five of the steps, for held-out prompts of
one object; then the same on random ones whose keys have more and more in common; last, whole films.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import numpy as np
import torch

import moddiff
from moddiff import capture
from moddiff.attention import attend
from moddiff.sage import sage_math
from moddiff.saving import write_whole
from moddiff.tiny import score, world

STEPS = 0, 5, 10, 15, 19  # of 20
WAYS = {
    "smoothed": sage_math,
    "as they are": partial(sage_math, smooth=False),
    "smoothed, fp8 values": partial(sage_math, values="fp8"),
}
COMMON = 0, 1, 3, 10, 30  # the length of what keys have in common, beside their own


def errors(q, k, v):
    """How far each way is from float64: root mean square, relative; and what the keys have in common."""
    exact = attend(q.double(), k.double(), v.double(), kernel="math")
    found = {way: rms(kernel(q, k, v) - exact) / rms(exact) for way, kernel in WAYS.items()}
    mean = k.double().mean(-2, keepdim=True)
    return {"common": rms(mean) / rms(k.double() - mean)} | found


def rms(x):
    return float(x.square().mean().sqrt())


def of_the_model(pipe, prompts, steps=STEPS):
    """Of each block and step the median over prompts.   -> rows"""
    seen = {}
    for i, (text, _) in enumerate(prompts):
        taps = ("blocks.*.self_attn." + name for name in "qkv")
        with capture(pipe.dit, *taps, steps=steps, branch="cond") as caught:
            pipe(text, seed=i)
        heads = {}
        for where, value in caught:
            heads.setdefault((where.block, where.step), {})[where.name] = value
        for at, three in heads.items():
            seen.setdefault(at, []).append(errors(**three))
    rows = []
    for (block, step), found in sorted(seen.items()):
        middle = {name: float(np.median([one[name] for one in found])) for name in found[0]}
        rows.append({"block": block, "step": step} | middle)
    return rows


def of_random_numbers(common, tokens=512, d=128):
    """Heads as wide as those of Wan. All keys of one share a vector, `common` times as long as their own."""
    made = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 4, tokens, d, generator=made) for _ in range(3))
    return errors(q, k + common * torch.randn(1, 4, 1, d, generator=made), v)


def films(pipe, prompts):
    """Whole films with each way in every attention of the dit, beside the plain ones.   -> {way: figures}"""
    plain = [np.asarray(pipe(text, seed=i).frames) for i, (text, _) in enumerate(prompts)]
    rows = {"sdpa": judged(plain, plain, prompts)}
    for way, kernel in WAYS.items():
        pipe.dit.use_kernel(kernel)
        made = [np.asarray(pipe(text, seed=i).frames) for i, (text, _) in enumerate(prompts)]
        rows[way] = judged(made, plain, prompts)
    pipe.dit.use_kernel("sdpa")
    return rows


def judged(made, plain, prompts):
    """How many obey, and the median PSNR in dB to the plain films; None for themselves."""
    obeyed = [bool(score.judge(frames, scene)["all"]) for frames, (_, scene) in zip(made, prompts)]
    psnr = float(np.median([score.psnr(a, b) for a, b in zip(plain, made)]))
    return {"obeyed": sum(obeyed), "psnr": psnr if np.isfinite(psnr) else None}


def tables(facts):
    """The two tables of the guide: errors, and whole films.   -> markdown"""
    lines = [f"| keys | in common | {', % | '.join(WAYS)}, % |", "|---" * (2 + len(WAYS)) + "|"]
    for step in sorted({row["step"] for row in facts["model"]}):
        rows = [row for row in facts["model"] if row["step"] == step]
        common = float(np.median([row["common"] for row in rows]))
        off = [[100 * row[way] for row in rows] for way in WAYS]
        cells = [f"{np.median(each):.2f} ({max(each):.2f})" for each in off]
        lines.append(f"| tiny, step {step} | {common:.1f} | {' | '.join(cells)} |")
    for common, row in facts["random"].items():
        cells = [f"{100 * row[way]:.2f}" for way in WAYS]
        lines.append(f"| random, {common} | {row['common']:.1f} | {' | '.join(cells)} |")
    films = ["| attention | PSNR to the plain films, dB | obeyed |", "|---|---|---|"]
    for way, row in facts["films"].items():
        psnr = "" if row["psnr"] is None else f"{row['psnr']:.1f}"
        films.append(f"| {way} | {psnr} | {row['obeyed']} of {facts['prompts']} |")
    return "\n".join(lines), "\n".join(films)


def measure(n):
    pipe, prompts = moddiff.load("tiny-t2v"), world.prompts(n, split="heldout")
    return {
        "prompts": n,
        "model": of_the_model(pipe, prompts),
        "random": {str(common): of_random_numbers(common) for common in COMMON},
        "films": films(pipe, prompts),
    }


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("-n", "--number", type=int, default=16, help="prompts")
    parser.add_argument("-o", "--out", type=Path, default=Path("sage.json"))
    options = parser.parse_args(arguments)
    with torch.no_grad():
        facts = measure(options.number)
    write_whole(options.out, json.dumps(facts, indent=1).encode() + b"\n")
    print(*tables(facts), sep="\n\n")


if __name__ == "__main__":
    main()
