"""UMT5 in mlx beside torch: seconds, bytes and errors for a sentence of 20 words, with random weights.

    python tests/benchmark/mlx_encoder.py                      # one of 24 layers in the released width
    python tests/benchmark/mlx_encoder.py --layers 24          # all of it: 23 GB in float32 at first
    python tests/benchmark/mlx_encoder.py --narrow 8 --layers 24    # an eighth of the width

Smallest time of the passes: of the processor where mlx computes on one, else of the clock. Errors are root
mean squares, as a share of the hidden states' own, against torch in float32.
"""

import argparse
import copy
import time

import mlx.core as mx
import torch

from moddiff.remote.mlx import TextEncoder
from moddiff.text import TextConfig
from moddiff.text import TextEncoder as InTorch
from moddiff.weights import preset

TOKENS = 26  # of 20 words, about
# mlx's kernels for few bits are slow on processors, and in 16 bits eight times slower still.
FEW = "fp32" if mx.default_device() == mx.cpu else "bf16"
FORMS = [
    *(dict(dtype=dtype) for dtype in ("fp32", "bf16", "fp16")),
    *(dict(dtype=FEW, bits=bits, group_size=group) for bits in (8, 4) for group in (64, 32)),
]


def sizes(narrow, layers, vocab):
    whole = preset("wan2.1-t2v-1.3b")["text"]
    less = {name: whole[name] // narrow for name in ("dim", "dim_attn", "dim_ffn", "num_heads")}
    return TextConfig(**whole | less | dict(num_layers=layers, vocab=vocab))


def seconds(encoder, ids, passes):
    clock = time.process_time if mx.default_device() == mx.cpu else time.perf_counter
    encoder(ids)
    taken = []
    for _ in range(passes):
        started = clock()
        encoder(ids)
        taken.append(clock() - started)
    return min(taken)


def error(found, truth):
    return ((found.float() - truth).square().mean() / truth.square().mean()).sqrt().item()


@torch.no_grad()
def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name, default in dict(narrow=1, layers=1, vocab=1000, passes=5).items():
        options.add_argument(f"--{name}", type=int, default=default)
    asked = options.parse_args()
    torch.manual_seed(0)
    text = InTorch(sizes(asked.narrow, asked.layers, asked.vocab)).eval()
    ids = torch.randint(0, asked.vocab, (1, TOKENS))
    truth = text(ids)
    print(f"mlx {mx.__version__} on {mx.default_device()}, torch {torch.__version__} on the processor")
    print(f"{sum(x.numel() for x in text.parameters()) / 1e6:.0f} million numbers, {TOKENS} tokens")
    for dtype in (torch.float32, torch.bfloat16):
        mine = text if dtype == torch.float32 else copy.deepcopy(text).to(dtype)
        held = sum(x.nbytes for x in mine.parameters())
        line(f"torch, {dtype}", seconds(mine, ids, asked.passes), held, error(mine(ids), truth))
    for form in FORMS:
        before = mx.get_active_memory()
        there = TextEncoder(text, **form)
        held = mx.get_active_memory() - before
        name = ", ".join(f"{key}={value}" for key, value in form.items())
        line(f"mlx, {name}", seconds(there, ids, asked.passes), held, error(there(ids), truth))
        del there


def line(name, taken, held, off):
    print(f"{name:44} {taken:8.3f} s {held / 1e6:8.0f} MB   error {off:.1e}", flush=True)


if __name__ == "__main__":
    main()
