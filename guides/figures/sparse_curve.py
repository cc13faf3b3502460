"""What does the tiny model lose when its tokens listen to fewer others?  Pairs kept, distance, obedience.

    python guides/figures/sparse_curve.py -n 32 -o guides/figures/sparse.json

The prompts are the held-out ones of `moddiff score`, one object each, seed i for prompt i. Every film is kept
as soon as it is judged, in a folder beside the JSON, so that a command which was interrupted goes on.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import numpy as np
import torch
from cache_curve import figures
from kept import Keep, mark_of
from quantize_curve import ASKED

import moddiff
from moddiff.extensions import sparse
from moddiff.extensions.sparse import sliding
from moddiff.saving import write_whole
from moddiff.tiny import score, world


def by_chance(query, key, grid, share=0.5):
    """So many of all pairs, no matter which: what a pattern has to be better than. A token hears itself."""
    mixed = (query * 7919 + key * 104729 + (query ^ key) * 15485863) % 10007
    return (mixed < share * 10007) | (query == key)


def with_the_first(query, key, grid, time=1, space=None):
    """The sliding window, and the first frame for all."""
    return sliding(query, key, grid, time, space) | (key < grid[1] * grid[2])


TRIED = {  # name: (pattern, how)
    "sliding: 3 frames": ("sliding", dict(time=3, space=None)),
    "sliding: 2 frames": ("sliding", dict(time=2, space=None)),
    "sliding: 1 frame": ("sliding", dict(time=1, space=None)),
    "sliding: 1 frame, and the first": (with_the_first, dict(time=1)),
    "sliding: 3 rows and columns": ("sliding", dict(time=None, space=3)),
    "sliding: 1 frame, 2 rows and columns": ("sliding", dict(time=1, space=2)),
    "radial, decay 1": ("radial", dict(block=8)),
    "radial, decay 0.5": ("radial", dict(block=8, decay=0.5)),
    "radial, decay 0.2": ("radial", dict(block=2, decay=0.2)),
    "radial, decay 0.2, first 5 steps dense": ("radial", dict(block=2, decay=0.2, dense_steps=5)),
    "radial, decay 0.2, first block dense": ("radial", dict(block=2, decay=0.2, dense_blocks=1)),
    "by chance, 0.9": (by_chance, dict(share=0.9)),
    "by chance, 0.7": (by_chance, dict(share=0.7)),
}


def film(pipe, text, seed, scene):
    """One video, what the judge says of it, and the share of pairs kept.   -> arrays, as Keep takes them"""
    frames = np.asarray(pipe(text, seed=seed).frames)
    verdict = score.judge(frames, scene)
    rows = pipe.dit.report().rows if hasattr(pipe.dit, "report") else [{"kept": 1.0}]
    kept = np.mean([row["kept"] for row in rows if "kept" in row])
    return {"frames": frames, "kept": kept} | {name: np.array(verdict[name]) for name in ASKED}


def measure(pipe, n, keep):
    """All films, prompt by prompt, so that a stop leaves every setting with the same prompts.   -> facts"""
    runs = {"all pairs": pipe}
    for name, (pattern, how) in TRIED.items():
        runs[name] = pipe.replace(dit=sparse(pipe.dit, pattern, **how))
    films = {name: [] for name in runs}
    for i, (text, scene) in enumerate(world.prompts(n, split="heldout")):
        for name, run in runs.items():
            key = "".join(letter if letter.isalnum() else "-" for letter in name)
            films[name].append(keep(f"{key}-{i:03}", partial(film, run, text, i, scene)))
        print(i, sum(bool(made[-1]["all"]) for made in films.values()), "of", len(films), flush=True)
    rows = []
    for name, made in films.items():
        kept = float(np.mean([one["kept"] for one in made]))
        rows.append({"pattern": name, "kept": kept} | figures(made, films["all pairs"]))
    return {"prompts": n, "rows": rows}


def table(facts):
    """The table of the guide.   -> markdown"""
    lines = ["| pattern | pairs kept | PSNR, dB | obeyed | motion right |", "|---|---|---|---|---|"]
    for row in facts["rows"]:
        psnr = "equal" if row["psnr"] is None else f"{row['psnr']:.1f}"
        shares = [f"{row[name]:.0%}".replace("%", " %") for name in ("kept", "all", "motion")]
        lines.append(f"| {row['pattern']} | {shares[0]} | {psnr} | {shares[1]} | {shares[2]} |")
    return "\n".join(lines)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("-n", "--number", type=int, default=32, help="prompts")
    parser.add_argument("-o", "--out", type=Path, default=Path("sparse.json"))
    parser.add_argument("--model", default="tiny-t2v")
    options = parser.parse_args(arguments)
    pipe = moddiff.load(options.model)
    tried = repr(
        [(name, getattr(pattern, "__name__", pattern), how) for name, (pattern, how) in TRIED.items()]
    )
    keep = Keep(options.out.with_suffix(".parts"), mark_of(pipe, pipe.defaults, tried))
    with torch.no_grad():
        facts = measure(pipe, options.number, keep)
    write_whole(options.out, json.dumps(facts, indent=1).encode() + b"\n")
    print(table(facts))


if __name__ == "__main__":
    main()
