"""How long does our VAE decode, and in how much memory, beside Diffusers'?  Wan 2.1's full width.

    python tests/benchmark/test_vae_speed.py                      # float32, 17 frames of 96 x 128
    python tests/benchmark/test_vae_speed.py --dtype bfloat16 --frames 9 --size 256 256

Both have the same random weights and decode chunk by chunk, in turn in one process. Processor time counts,
and of it the smallest, since noise only adds. Memory is the growth of a fresh process over what it held with
the weights in place, for each side a process of its own.
"""

import argparse
import gc
import json
import subprocess
import sys
import time
from pathlib import Path

import torch

SIDES = ("ours", "diffusers")


def decoders(dtype):
    """{side: a function latent -> video [b, 3, F, H, W]}, on equal weights."""
    from diffusers import AutoencoderKLWan

    from moddiff import weights

    torch.manual_seed(0)
    theirs = AutoencoderKLWan().eval().to(dtype)
    ours = weights.build("vae", dict(theirs.config), dict(theirs.state_dict())).to(dtype)
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1)
        for values in (theirs.config.latents_mean, theirs.config.latents_std)
    )
    return {
        "ours": lambda z: ours.decode(z, chunked=True),
        "diffusers": lambda z: theirs.decode((z * std + mean).to(dtype)).sample,
    }


def latent(frames, height, width):
    shape = (1, 16, (frames - 1) // 4 + 1, height // 8, width // 8)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def seconds(dtype, z, runs):
    """{side: the smallest time of `runs`}, and the largest difference of the two videos."""
    sides = decoders(dtype)
    videos = {side: decode(z) for side, decode in sides.items()}  # warms up, too
    times = {side: [] for side in SIDES}
    for i in range(runs):
        for side in SIDES if i % 2 else reversed(SIDES):
            start = time.process_time()
            sides[side](z)
            times[side].append(time.process_time() - start)
    difference = float((videos["ours"] - videos["diffusers"]).abs().max())
    return {side: min(times[side]) for side in SIDES}, difference


@torch.no_grad()
def growth(side, dtype, z):
    """Bytes by which this process grows at most while it decodes."""
    decode = decoders(dtype)[side]
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts from what is held now
    before = resident("VmRSS")
    decode(z)
    return resident("VmHWM") - before


def resident(which):
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(which))
    return 1024 * int(line.split()[1])


def measure(dtype=torch.float32, frames=17, size=(96, 128), runs=3):
    times, difference = seconds(dtype, latent(frames, *size), runs)
    how = [f"--dtype={str(dtype).removeprefix('torch.')}", f"--frames={frames}", "--size", *map(str, size)]
    memory = {
        side: int(subprocess.check_output([sys.executable, __file__, *how, f"--growth={side}"]))
        for side in SIDES
    }
    return dict(
        dtype=str(dtype),
        frames=frames,
        size=list(size),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        seconds=times,
        memory=memory,
        time_ratio=times["ours"] / times["diffusers"],
        memory_ratio=memory["ours"] / memory["diffusers"],
        largest_difference=difference,
    )


def test_decoding_takes_at_most_three_quarters_of_the_time_and_half_of_the_memory_of_diffusers():
    found = measure()
    print(json.dumps(found, indent=2))
    assert found["largest_difference"] < 1e-4
    assert found["time_ratio"] <= 0.75
    assert found["memory_ratio"] <= 0.5


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--size", type=int, nargs=2, default=(96, 128), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--growth", choices=SIDES, help="print the memory of one side alone")
    asked = parser.parse_args()
    dtype = getattr(torch, asked.dtype)
    if asked.growth:
        print(growth(asked.growth, dtype, latent(asked.frames, *asked.size)))
    else:
        print(json.dumps(measure(dtype, asked.frames, asked.size, asked.runs), indent=2))
