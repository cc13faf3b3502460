"""What does the tiny model lose when its tokens listen to fewer others?  Pairs kept, distance, obedience.

    python guides/figures/sparse_curve.py -n 32 -o guides/figures/sparse.json

    python guides/figures/sparse_curve.py --picture guides/figures/sparse.png  # the patterns, no films

The prompts are the held-out ones of `moddiff score`, one object each, seed i for prompt i. Every film is kept
as soon as it is judged, in a folder beside the JSON, so that a command which was interrupted goes on.
"""

import argparse
import json
import math
import re
from functools import partial
from pathlib import Path

import numpy as np
import torch
from cache_curve import figures
from kept import Keep, mark_of
from quantize_curve import ASKED

import moddiff
from moddiff import viz
from moddiff.extensions import sparse
from moddiff.extensions.sparse import PATTERNS, radial, sliding
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
    "by chance, 0.5": (by_chance, dict(share=0.5)),
}


WAN = 21, 30, 52  # tokens of 81 frames of 480 x 832
AT_FULL_SIZE = {  # at Wan's size, with tiles as kernels have them
    "sliding: 4 frames": ("sliding", dict(time=4, space=None)),
    "sliding: 4 frames, 8 rows and columns": ("sliding", dict(time=4, space=8)),
    "radial, decay 1": ("radial", {}),
    "radial, decay 0.2": ("radial", dict(decay=0.2)),
    "by chance, 0.3": (by_chance, dict(share=0.3)),
    "by chance, 0.001": (by_chance, dict(share=0.001)),
}


def full_size(pattern, grid, tile=128, **how):
    """How many pairs of tokens a pattern keeps, and how many tiles have one.   -> two shares"""
    tokens = torch.arange(math.prod(grid))
    pairs, tiles, rows = 0, 0, 0
    for queries in tokens.split(tile):
        kept = pattern(queries[:, None], tokens, grid, **how)
        pairs += int(kept.sum())
        columns = kept.any(0)
        tiles += int(torch.stack([part.any() for part in columns.split(tile)]).sum())
        rows += 1
    return {"pairs": pairs / len(tokens) ** 2, "tiles": tiles / rows**2}


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
            films[name].append(keep(f"{key(name)}-{i:03}", partial(film, run, text, i, scene)))
        print(i, sum(bool(made[-1]["all"]) for made in films.values()), "of", len(films), flush=True)
    rows = []
    for name, made in films.items():
        kept = float(np.mean([one["kept"] for one in made]))
        rows.append({"pattern": name, "kept": kept} | figures(made, films["all pairs"]))
    wan = [
        {"pattern": name} | full_size(PATTERNS.get(pattern, pattern), WAN, **how)
        for name, (pattern, how) in AT_FULL_SIZE.items()
    ]
    return {"prompts": n, "rows": rows, "full size": wan}


def key(name):
    """What a film is kept under: the name of its pattern and the numbers of it."""
    said = f"{name} {TRIED[name][1]}" if name in TRIED else name
    return "-".join(re.findall(r"[\w.]+", said))


def tables(facts):
    """The two tables of the guide: films of the tiny model, and tiles at full size.   -> markdown"""
    lines = ["| pattern | pairs kept, % | PSNR, dB | obeyed, % | shape, % | motion, % |"]
    lines.append("|---" * 6 + "|")
    for row in facts["rows"]:
        psnr = "equal" if row["psnr"] is None else f"{row['psnr']:.1f}"
        kept, *right = (percent(row[name]) for name in ("kept", "all", "shape", "motion"))
        lines.append(f"| {row['pattern']} | {kept} | {psnr} | {' | '.join(right)} |")
    wan = ["| pattern | pairs kept, % | tiles with a pair, % |", "|---|---|---|"]
    wan += [
        f"| {row['pattern']} | {percent(row['pairs'])} | {percent(row['tiles'])} |"
        for row in facts["full size"]
    ]
    return "\n".join(lines), "\n".join(wan)


DRAWN = {  # of nine frames of 4 x 4 tokens
    "sliding: 1 frame": (sliding, dict(time=1, space=None)),
    "sliding: 1 row and column": (sliding, dict(time=None, space=1)),
    "radial, decay 1": (radial, dict(block=1)),
}


def picture(grid=(9, 4, 4)):
    """Who looks at whom: a row for each query, bright where it may look.   -> Figure"""
    drawn, axes = viz.figure(1, len(DRAWN), size=(8.4, 3.0))
    tokens, frame = torch.arange(math.prod(grid)), grid[1] * grid[2]
    for ax, (name, (pattern, how)) in zip(axes, DRAWN.items()):
        kept = pattern(tokens[:, None], tokens, grid, **how)
        ax.imshow(kept, cmap="viridis", interpolation="nearest")
        starts, frames = range(0, len(tokens), 2 * frame), range(0, grid[0], 2)
        ax.set_xticks(starts, frames)
        ax.set_yticks(starts, frames)
        share = f"{percent(float(kept.float().mean()))} %"
        viz.dress(ax, f"{name}: {share}", "frame of the key", "frame of the query")
    return drawn


def percent(share):
    digits = 0 if share > 0.02 else 1
    return f"{100 * share:.{digits}f}"


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("-n", "--number", type=int, default=32, help="prompts")
    parser.add_argument("-o", "--out", type=Path, default=Path("sparse.json"))
    parser.add_argument("--model", default="tiny-t2v")
    parser.add_argument("--picture", type=Path, help="draw the patterns instead")
    options = parser.parse_args(arguments)
    if options.picture:
        return write_whole(options.picture, viz.png(picture()))
    pipe = moddiff.load(options.model)
    keep = Keep(options.out.with_suffix(".parts"), mark_of(pipe, pipe.defaults))
    with torch.no_grad():
        facts = measure(pipe, options.number, keep)
    write_whole(options.out, json.dumps(facts, indent=1).encode() + b"\n")
    print(*tables(facts), sep="\n\n")


if __name__ == "__main__":
    main()
