"""One pass of a model that is larger than the memory: Wan 14B, random weights, in a file of 28 GB.

    python tests/benchmark/streaming.py make wan-14b.safetensors        # once: 3 minutes, 28 GB of disk
    python tests/benchmark/streaming.py run wan-14b.safetensors         # streamed straight from the file
    python tests/benchmark/streaming.py run wan-14b.safetensors --kind int8    # quantized block by block

`--release wan2.1-t2v-1.3b` makes a smaller one. Prints the time of a pass and the most memory that the
process had (VmHWM), pages of the file included.
"""

import argparse
import json
import time

import torch

from moddiff import weights
from moddiff.extensions import offloaded, quantized
from moddiff.weights.building import empty


def make(path, release):
    """A file of random weights of a release's dit, written tensor by tensor."""
    shapes = {
        name: list(x.shape) for name, x in empty("dit", weights.preset(release)["dit"]).state_dict().items()
    }
    head, start = {}, 0
    for name, shape in shapes.items():
        end = start + 2 * torch.Size(shape).numel()
        head[name] = dict(dtype="BF16", shape=shape, data_offsets=[start, end])
        start = end
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)
    made = torch.Generator().manual_seed(0)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            x = torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=made)
            file.write(x.view(torch.int16).numpy().data)
    print(f"{path}: {len(shapes)} tensors, {(8 + len(text) + start) / 1e9:.1f} GB")


@torch.no_grad()
def run(path, release, kind, frames, size, passes):
    """Load, stream, and run; print what it took."""
    started = time.perf_counter()
    dit = weights.load_component(path, "dit", weights.preset(release)["dit"], check_values=False)
    dit.requires_grad_(False)
    if kind is not None:
        dit = quantized(dit, kind)
    dit = offloaded(dit, device="cpu", keep=0, source="disk")
    print(f"{dit!r}: {time.perf_counter() - started:.0f} s to load, {peak():.2f} GB so far")
    made = torch.Generator().manual_seed(0)
    x = torch.randn(1, 16, (frames - 1) // 4 + 1, size[0] // 8, size[1] // 8, generator=made)
    text = [torch.randn(32, dit.config.text_dim, generator=made)]
    for _ in range(passes):
        started = time.perf_counter()
        out = dit(x, torch.tensor([500.0]), text)
        seconds = time.perf_counter() - started
        tokens = x[0, 0].numel() // 4
        print(f"a pass over {tokens} tokens: {seconds:.1f} s, at most {peak():.2f} GB")
        assert out.isfinite().all()


def peak():
    """The most memory this process has had, GB."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1e6


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=["make", "run"])
    parser.add_argument("path")
    parser.add_argument("--release", default="wan2.1-t2v-14b")
    parser.add_argument("--kind", help="quantize to this before: int8, fp8, q8_0, q4_0")
    parser.add_argument("--frames", type=int, default=5)
    parser.add_argument("--size", type=int, nargs=2, default=(128, 128), help="height width")
    parser.add_argument("--passes", type=int, default=1)
    options = parser.parse_args()
    if options.what == "make":
        make(options.path, options.release)
    else:
        run(options.path, options.release, options.kind, options.frames, options.size, options.passes)


if __name__ == "__main__":
    main()
