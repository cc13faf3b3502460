"""What do windows do to a film?  The tiny model, trained on 17 frames, makes 33 and 65.

    python guides/figures/windows.py -n 16 -o guides/figures/windows.json            # 20 minutes of a core
    python guides/figures/windows.py --sheet guides/figures/windows.webp             # a minute

Goes on where a call stopped. A row for each way: obedience of the whole film and of its pieces of 17 frames,
read by the judge, and how the film changes from frame to frame.
"""

import argparse
import json
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import moddiff
from moddiff.extensions import windowed
from moddiff.saving import write_whole
from moddiff.tiny import score, world

LENGTH = 5  # latent frames of a window: the 17 frames that the model was trained on


def ways():
    """(name, frames, windowed's options or None, noise), the important ones first"""
    yield "as trained", 17, None, None
    for frames in (33, 65):
        latents = (frames - 1) // 4 + 1
        yield "one pass", frames, None, None
        for overlap in (0, 2, 3, 1, 4):
            yield f"static, overlap {overlap}", frames, dict(overlap=overlap), None
        yield "static, overlap 2, freenoise", frames, dict(overlap=2), "freenoise"
        yield "looped, overlap 2", frames, dict(overlap=2, schedule="looped"), None
        yield "uniform, overlap 2", frames, dict(overlap=2, schedule="uniform"), None
        yield "one pass, stretch", frames, dict(length=latents, overlap=0, stretch=LENGTH / latents), None
        yield "one pass, riflex 1", frames, dict(length=latents, overlap=0, riflex=1), None
    for overlap in (0, 1, 3):
        yield f"static, overlap {overlap}, freenoise", 33, dict(overlap=overlap), "freenoise"
    for overlap in (2, 4):
        yield f"static, overlap {overlap}, pyramid", 33, dict(overlap=overlap, blend="pyramid"), None
    for overlap in (1, 3):
        yield f"looped, overlap {overlap}", 33, dict(overlap=overlap, schedule="looped"), None
        yield f"uniform, overlap {overlap}", 33, dict(overlap=overlap, schedule="uniform"), None


def film(pipe, prompt, seed, frames, how, noise, steps=8):
    """uint8 [frames, 96, 96, 3]"""
    dit = pipe.dit if how is None else windowed(pipe.dit, **dict(length=LENGTH) | how)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", moddiff.Note)  # that the model never saw so many frames is the point
        made = pipe.replace(dit=dit)(prompt, seed=seed, steps=steps, frames=frames, noise=noise)
    return np.asarray(made.frames)


def changes(frames):
    """How much each frame differs from the one before it, the first from the last.   -> [frames]

    Mean over pixels and colours, in levels of 255.
    """
    frames = frames.astype(np.float32)
    return np.abs(frames - np.roll(frames, 1, 0)).mean((1, 2, 3))


def measure(pipe, way, n, steps):
    """A row."""
    name, frames, how, noise = way
    films, pieces, apart = [], [], []
    for seed, (prompt, scene) in enumerate(world.prompts(n)):
        made = film(pipe, prompt, seed, frames, how, noise, steps)
        films.append(score.judge(made, scene))
        pieces += [score.judge(made[i : i + 17], scene) for i in range(0, frames - 1, 16)]
        apart.append(changes(made))
    apart = np.stack(apart)  # [n, frames]
    inside = apart[:, 1:]
    return {
        "name": name,
        "frames": frames,
        "film": {k: round(x, 4) for k, x in score.summarise(films).items()},
        "pieces": {k: round(x, 4) for k, x in score.summarise(pieces).items()},
        # The largest change of each film, and that from its last frame to its first, by its mean change.
        "jump": round(float((inside.max(1) / inside.mean(1)).mean()), 3),
        "closing": round(float(apart[:, 0].mean() / inside.mean()), 3),
        "mean change": round(float(inside.mean()), 3),
        "changes": [round(float(x), 3) for x in apart.mean(0)],
    }


def sheet(pipe, path, seed=0, prompt="a red circle moving right on a black background", frames=33):
    """Every third frame of a film, a row for each way."""
    static = "static, overlap 0", "static, overlap 2", "static, overlap 2, freenoise"
    chosen = "one pass", *static, "one pass, stretch"
    rows = [way for way in ways() if way[1] == frames and way[0] in chosen]
    tiles = [np.concatenate([*film(pipe, prompt, seed, *way[1:])[::3]], 1) for way in rows]
    gap = np.full((6, tiles[0].shape[1], 3), 255, np.uint8)
    stacked = np.concatenate([part for tile in tiles for part in (tile, gap)][:-1])
    write_whole(path, lambda there: Image.fromarray(stacked).save(there, "webp", quality=85))
    return [way[0] for way in rows]


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    options.add_argument("-n", type=int, default=16, help="prompts for each")
    options.add_argument("--steps", type=int, default=8)
    options.add_argument("-o", type=Path, help="the JSON file")
    options.add_argument("--sheet", type=Path, help="a picture of some films instead")
    asked = options.parse_args()
    pipe = moddiff.load("tiny")
    if asked.sheet:
        return print(*sheet(pipe, asked.sheet), sep="\n")
    made = json.loads(asked.o.read_text()) if asked.o.exists() else {"rows": []}
    made |= {"n": asked.n, "steps": asked.steps, "torch": torch.__version__}
    done = {(row["name"], row["frames"]) for row in made["rows"]}
    for way in ways():
        if way[:2] not in done:
            made["rows"].append(row := measure(pipe, way, asked.n, asked.steps))
            print(
                row["name"], row["frames"], row["film"]["all"], row["pieces"]["all"], row["jump"], flush=True
            )
            write_whole(asked.o, json.dumps(made, indent=1).encode() + b"\n")


if __name__ == "__main__":
    main()
