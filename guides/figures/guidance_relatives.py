"""What guides do to obedience: the tiny model, held-out prompts of one object, read by the judge.

    python guides/figures/guidance_relatives.py -n 64 -o guides/figures/guidance_relatives.json

Goes on where a call stopped. In few steps, where a hard push does harm that a guide may prevent.
"""

import argparse
import json
from pathlib import Path

import torch

import moddiff
from moddiff.guidance import APG, CFG, NAG, CFGZero, SkipLayer, rescaled
from moddiff.saving import write_whole
from moddiff.tiny import score, targets

GUIDES = {
    "cond alone": [CFG(1.0)],
    "CFG": [CFG(2.0), CFG(4.0), CFG(8.0)],
    "CFG, sigma 0.5 to 0.95": [CFG(scale, interval=(0.5, 0.95)) for scale in (4.0, 8.0)],
    "CFG, rescaled 0.7": [CFG(scale, combine=rescaled(0.7)) for scale in (4.0, 8.0)],
    "CFG-Zero*": [CFGZero(scale) for scale in (4.0, 8.0)],
    "CFG-Zero*, no step at zero": [CFGZero(scale, zeros=0) for scale in (4.0, 8.0)],
    "APG": [APG(scale) for scale in (4.0, 8.0, 16.0)],
    "skip-layer, a third pass": [SkipLayer(1.0, push=push) for push in (1.0, 2.8)],
    "skip-layer, in uncond": [SkipLayer(scale, push=None) for scale in (2.0, 4.0)],
    "NAG, no second pass": [NAG(scale) for scale in (2.0, 4.0, 11.0)],
}


def main():
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("-n", type=int, default=64, help="prompts for each")
    options.add_argument("--steps", type=int, default=8)
    options.add_argument("-o", type=Path, required=True, help="the JSON file")
    asked = options.parse_args()
    made = json.loads(asked.o.read_text()) if asked.o.exists() else {"rows": []}
    made |= {"n": asked.n, "steps": asked.steps, "torch": torch.__version__}
    done = {(row["name"], row["scale"], row["push"]) for row in made["rows"]}
    pipe = moddiff.load("tiny")
    for name, guides in GUIDES.items():
        for guide in guides:
            if (name, guide.scale, getattr(guide, "push", None)) not in done:
                made["rows"].append(measure(pipe, name, guide, asked))
                print(made["rows"][-1], flush=True)
                write_whole(asked.o, json.dumps(made, indent=2).encode() + b"\n")


def measure(pipe, name, guide, asked):
    verdicts = targets.t2v(pipe, n=asked.n, steps=asked.steps, scale=guide)
    rates = score.summarise(verdicts)
    return {
        "name": name,
        "scale": guide.scale,
        "push": getattr(guide, "push", None),
        "passes": passes(pipe, guide, asked.steps),
        **{part: round(rates[part], 4) for part in ("all", "count", "shape", "colour", "motion")},
    }


def passes(pipe, guide, steps):
    """How often the dit is asked for one video."""
    dit, count = pipe.dit, []
    hook = dit.register_forward_pre_hook(lambda *_: count.append(1))
    pipe("a red circle moving left", steps=steps, scale=guide)
    hook.remove()
    return len(count)


if __name__ == "__main__":
    main()
