"""Is the step list part of the checkpoint?  tiny-fast along its own list and along others, read by the judge.

    python guides/figures/step_lists.py -n 64 -o guides/figures/step_lists.json

Goes on where a call stopped.
"""

import argparse
import json
from pathlib import Path

import torch

import moddiff
from moddiff.saving import write_whole
from moddiff.tiny import score, targets

OWN = {}
ROWS = {
    "its own list": OWN,
    "4 steps, shift 1": dict(steps=4, shift=1.0),
    "2 steps": dict(steps=2, shift=5.0),
    "8 steps": dict(steps=8, shift=5.0),
    "20 steps": dict(steps=20, shift=5.0),
    "its own list, scale 4": dict(scale=4.0),
    "its own list, unipc": dict(solver="unipc"),
}


def main():
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("-n", type=int, default=64, help="prompts of one object, and as many of two")
    options.add_argument("-o", type=Path, required=True, help="the JSON file")
    asked = options.parse_args()
    made = json.loads(asked.o.read_text()) if asked.o.exists() else {"rows": []}
    made |= {"n": asked.n, "torch": torch.__version__}
    fast = moddiff.load("tiny-fast")
    made["list"] = fast.defaults["steps"]
    plain = {name: fast.defaults[name] for name in ("steps", "solver")}
    cases = [(name, fast, how) for name, how in ROWS.items()]
    tiny = moddiff.load("tiny")
    cases += [(f"no adapter, scale {scale:g}", tiny, plain | dict(scale=scale)) for scale in (1.0, 4.0)]
    done = {row["name"] for row in made["rows"]}
    for name, pipe, how in cases:
        if name not in done:
            rates = {
                f"{word}_all": score.summarise(targets.t2v(pipe, things, asked.n, **how))["all"]
                for word, things in (("one", 1), ("two", 2))
            }
            made["rows"].append(dict(name=name, **rates))
            print(made["rows"][-1], flush=True)
            write_whole(asked.o, json.dumps(made, indent=2).encode() + b"\n")


if __name__ == "__main__":
    main()
