"""What do the seams of tiles cost?  Their error over overlaps, how far a seam is heard, and the memory.

    python guides/figures/seams.py error -o guides/figures/seams.json      # minutes
    python guides/figures/seams.py memory -o seams_memory.json

`error` decodes latents of the tiny model, whole and in tiles, with the blending that `tiled` has and with a
plain ramp over the whole overlap. `memory` decodes random latents with Wan's own vae, random weights, each
way in a process of its own; Linux tells the most memory that it had.
"""

import argparse
import json
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from pathlib import Path

import torch
from torch import nn

import moddiff
from moddiff import weights
from moddiff.extensions import tile, tiled
from moddiff.saving import write_whole
from moddiff.tiny import world
from moddiff.weights.building import empty

OVERLAPS = (0, 8, 16, 24, 32, 40)


def plain_ramp(first, end, before, after):
    """The other blending: a straight line over the whole overlap.   As tile.ramp"""
    middle = torch.arange(end - first) + 0.5
    rising = (middle / before).clamp(0, 1) if before else torch.ones(end - first)
    falling = (middle.flip(0) / after).clamp(0, 1) if after else torch.ones(end - first)
    return rising * falling


def seen_near_only(vae):
    """The same vae without the attention in the middle of its decoder, which sees the whole picture."""
    vae = deepcopy(vae)
    out = vae.decoder.middle[1].proj
    nn.init.zeros_(out.weight)
    nn.init.zeros_(out.bias)
    return vae


def difference(vae, latents, size, overlap, ramp=tile.ramp):
    """How far from the whole decode.   latents: [(latent, whole)] -> {"max", "mean"}, tiles of a picture"""
    kept, tile.ramp = tile.ramp, ramp
    try:
        new = tiled(vae, (size, size), (overlap, overlap))
        apart = torch.stack([(new.decode(latent) - whole).abs() for latent, whole in latents])
    finally:
        tile.ramp = kept
    return {"max": float(apart.max()), "mean": float(apart.mean())}, new.report().rows[-1]["tiles"]


def heard(vae, seed=0):
    """How much a picture changes so many pixels before a seam, when all beyond the seam becomes another.

    -> {pixels from the seam: largest change at that distance and farther}
    """
    made = torch.Generator().manual_seed(seed)
    latent = torch.randn(1, vae.channels, 1, 4, 48, generator=made)
    other = latent.clone()
    other[..., 24:] = torch.randn(other[..., 24:].shape, generator=made)
    change = (vae.decode(latent) - vae.decode(other)).abs().amax((0, 1, 2, 3))[: 24 * vae.stride[2]].flip(0)
    return {pixels: float(change[pixels:].max()) for pixels in range(0, len(change), 16)}


def error(pipe, prompts=4, size=48, steps=8):
    """The table.   -> facts"""
    far, near = [], []
    other = seen_near_only(pipe.vae)
    for seed, (text, _) in enumerate(world.prompts(prompts)):
        *_, last = pipe.steps(text, seed=seed, steps=steps)
        far.append((last.next, pipe.vae.decode(last.next)))
        near.append((last.next, other.decode(last.next)))
    rows = []
    for overlap in (overlap for overlap in OVERLAPS if overlap < size):
        ours, tiles = difference(pipe.vae, far, size, overlap)
        plain, _ = difference(pipe.vae, far, size, overlap, plain_ramp)
        convolutions, _ = difference(other, near, size, overlap)
        pixels = tiles * size**2 / (far[0][1].shape[-1] * far[0][1].shape[-2])
        row = dict(overlap=overlap, tiles=tiles, work=pixels, ours=ours, plain_ramp=plain)
        rows.append(row | dict(without_attention=convolutions))
    reach = dict(with_attention=heard(pipe.vae), without_attention=heard(other))
    return dict(prompts=prompts, size=size, steps=steps, rows=rows, heard=reach)


WAYS = ("decode, one pass", "decode, in chunks", "stream", "stream of tiles")


def one_way(way, frames, size):
    """Decode once, in a process of its own.   -> facts"""
    torch.manual_seed(0)
    with torch.no_grad():
        vae = empty("vae", weights.preset("wan2.1-t2v-1.3b")["vae"]).to_empty(device="cpu")
        for x in vae.parameters():
            x.normal_(0, 0.02)
        latent = torch.randn(1, vae.channels, (frames - 1) // 4 + 1, size[0] // 8, size[1] // 8)
        before, started = most(), time.perf_counter()
        if way == "stream":
            count = sum(part.shape[2] for part in vae.stream(latent))
        elif way == "stream of tiles":
            count = sum(part.shape[2] for part in tiled(vae).stream(latent))
        else:
            count = vae.decode(latent, chunked=way == "decode, in chunks").shape[2]
    seconds = time.perf_counter() - started
    return dict(way=way, frames=count, GB=(most() - before) / 1e9, seconds=seconds)


def most():
    """The most memory that this process has had, bytes."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def memory(frames=5, size=(320, 512)):
    """-> facts"""
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=fresh, max_tasks_per_child=1) as pool:
        rows = [pool.submit(one_way, way, frames, size).result() for way in WAYS]
    return dict(size=size, rows=rows)


def error_table(facts):
    """The rows as the guide shows them."""
    lines = [
        "| overlap | tiles | pixels | max | mean | plain ramp: max | mean | without attention: max | mean |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in facts["rows"]:
        pairs = [row[way] for way in ("ours", "plain_ramp", "without_attention")]
        cells = [f"{pair['max']:.2f} | {pair['mean']:.5f}" for pair in pairs]
        lines += [f"| {row['overlap']} | {row['tiles']} | {row['work']:.1f} x | {' | '.join(cells)} |"]
    return "\n".join(lines)


def memory_table(facts):
    lines = ["| | frames | memory | time |", "|---|---|---|---|"]
    for row in facts["rows"]:
        lines += [f"| {row['way']} | {row['frames']} | {row['GB']:.2f} GB | {row['seconds']:.0f} s |"]
    return "\n".join(lines)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=["error", "memory"])
    parser.add_argument("-o", "--out", type=Path, required=True, help="the numbers, JSON")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--frames", type=int, default=5)
    options = parser.parse_args(arguments)
    with torch.no_grad():
        facts = (
            memory(options.frames)
            if options.what == "memory"
            else error(moddiff.load("tiny"), options.prompts)
        )
    text = json.dumps(facts, indent=1)
    write_whole(options.out, lambda path: Path(path).write_text(text + "\n", encoding="utf-8"))
    print(memory_table(facts) if options.what == "memory" else error_table(facts))


if __name__ == "__main__":
    main()
