"""How long does our VAE decode, and in how much memory, beside Diffusers'?  Wan 2.1's full width.

    python tests/benchmark/test_vae_speed.py                      # float32, 17 frames of 96 x 128
    python tests/benchmark/test_vae_speed.py --dtype bfloat16 --frames 9 --size 256 256

Both have the same random weights and decode chunk by chunk, in turn in one process. Processor time counts,
and of it the smallest, since noise only adds. Memory is what torch's allocator held at most, weights aside.
"""

import argparse
import json
import time

import torch

from moddiff import weights
from moddiff.bench import peak_bytes

SIDES = ("ours", "diffusers")


def decoders(dtype):
    """{side: a function latent -> video [b, 3, F, H, W]}, on equal weights."""
    from diffusers import AutoencoderKLWan

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
def measure(dtype=torch.float32, frames=17, size=(96, 128), runs=3):
    sides, z = decoders(dtype), latent(frames, *size)
    videos = {side: sides[side](z) for side in SIDES}  # warms up, too
    seconds = dict.fromkeys(SIDES, float("inf"))
    for i in range(runs):
        for side in SIDES if i % 2 else reversed(SIDES):
            start = time.process_time()
            sides[side](z)
            seconds[side] = min(seconds[side], time.process_time() - start)
    memory = {side: peak_bytes(lambda side=side: sides[side](z), "cpu") for side in SIDES}
    return dict(
        dtype=str(dtype),
        frames=frames,
        size=list(size),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        seconds=seconds,
        memory=memory,
        time_ratio=seconds["ours"] / seconds["diffusers"],
        memory_ratio=memory["ours"] / memory["diffusers"],
        largest_difference=float((videos["ours"] - videos["diffusers"]).abs().max()),
    )


def test_decoding_takes_at_most_seven_tenths_of_the_time_of_diffusers_and_less_memory():
    found = measure()
    print(json.dumps(found, indent=2))
    assert found["largest_difference"] < 1e-4
    assert found["time_ratio"] <= 0.7
    assert found["memory_ratio"] <= 0.9


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--size", type=int, nargs=2, default=(96, 128), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--runs", type=int, default=3)
    asked = parser.parse_args()
    print(json.dumps(measure(getattr(torch, asked.dtype), asked.frames, asked.size, asked.runs), indent=2))
