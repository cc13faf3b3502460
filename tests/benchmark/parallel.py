"""How much faster are several processes than one?   python tests/benchmark/parallel.py -o FILE

Passes of a DiT with the widths of Wan 1.3B and random weights, the same in every process. On CPUs one process
with one thread and with two, then two processes with a thread each. The least of some passes counts: other
programs only ever add to a pass. accelerator.py starts the same on GPUs, with torchrun.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from moddiff import weights
from moddiff.extensions import parallel, ranks
from moddiff.weights import configs

WAYS = {  # what is printed: (processes, threads of each, options of `parallel`)
    "one process, one thread": (1, 1, {}),
    "one process, two threads": (1, 2, {}),
    "ulysses=2": (2, 1, {"ulysses": 2}),
    "ring=2": (2, 1, {"ring": 2}),
}


@torch.no_grad()
def passes(how, device, layers, cells, number):
    """One of the processes: seconds of its fastest pass, bytes that it sent in each, and the difference to
    the pass of one process, as a share of the largest value."""
    device = ranks.begin(device) if "RANK" in os.environ else torch.device(device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    dit = configs.empty("dit", weights.preset("wan2.1-t2v-1.3b")["dit"] | {"num_layers": layers})
    dit = dit.to(dtype).to_empty(device=device).requires_grad_(False)
    made = torch.Generator(device).manual_seed(0)
    for value in dit.parameters():
        value.normal_(0, 0.02, generator=made)
    x = torch.randn(1, dit.config.in_dim, *cells, generator=made, device=device)
    words = torch.randn(64, dit.config.text_dim, generator=made, device=device, dtype=dtype)
    given = x, torch.tensor([500.0], device=device), dit.prepare([words])

    shared = parallel(dit, **how)
    seconds, plain, ours = [], dit(*given), shared(*given)
    for _ in range(number):
        start = time.perf_counter()
        shared(*given)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    sent = {name: value for name, value in shared.report().rows[-1].items() if name in how}
    ranks.end()
    difference = float((ours - plain).abs().max() / plain.abs().max())
    return {"seconds": min(seconds), "sent": sent, "difference": difference}


def started(world, how, *options, threads=1):
    """So many processes of this file under torchrun, and what the first of them found."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    command = [*run, __file__, "--how", json.dumps(how), *map(str, options)]
    env = os.environ | {"OMP_NUM_THREADS": str(threads)}
    said = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(said.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=Path("parallel.json"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--cells", type=int, nargs=3, default=(4, 32, 52), help="of the latent: f h w")
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--how", type=json.loads, help="be one of the processes that torchrun started")
    asked = parser.parse_args()
    if asked.how is not None:
        found = passes(asked.how, asked.device, asked.layers, asked.cells, asked.passes)
        if os.environ["RANK"] == "0":
            print(json.dumps(found))
        return
    options = "--layers", asked.layers, "--passes", asked.passes, "--cells", *asked.cells
    found = {"load before": os.getloadavg()[0]}
    for name, (world, threads, how) in WAYS.items():
        found[name] = started(world, how, *options, threads=threads)
        print(f"{name}: {json.dumps(found[name])}", flush=True)
    found["load after"] = os.getloadavg()[0]
    asked.output.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
