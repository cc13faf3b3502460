"""How many steps can the tiny model skip?  Passes saved, distance from the plain film, and obedience.

    python guides/figures/cache_curve.py --calibrate tiny-t2v  # or tiny-i2v: the numbers of the package
    python guides/figures/cache_curve.py -n 64 -o guides/figures/cache.json

The prompts are the held-out ones of `moddiff score`, one object each, seed i for prompt i. Each policy runs
at five thresholds; "fewer steps" is the plain model with a coarser schedule, the rival of all of them;
"early" and "late" skip so many steps in a row. Every film is kept as soon as it is judged, in a folder beside
the JSON, so that a command which was interrupted goes on.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import numpy as np
import torch
from kept import Keep, mark_of
from quantize_curve import ASKED

import moddiff
from moddiff.extensions import cached, calibrate
from moddiff.extensions.cache_coefficients import FOLDER, calibrations
from moddiff.saving import write_whole
from moddiff.tiny import score, world

FIRST = 4  # of 20 steps, as easycache's 10 are of 50
POLICIES = {  # name: (thresholds, other options)
    "teacache": ((0.05, 0.1, 0.2, 0.3, 0.5), {}),
    "magcache": ((0.02, 0.06, 0.12, 0.24, 0.5), {}),
    "easycache": ((0.02, 0.05, 0.1, 0.2, 0.4), {"first": FIRST}),
    "first-block": ((0.03, 0.05, 0.1, 0.2, 0.3), {}),
}
STEPS = 16, 13, 10, 8, 6  # of the rival
WHEN = {"early": ((1, 9), (1, 12)), "late": ((11, 19), (8, 19))}  # first step and end of what is skipped
SETTINGS = [(policy, threshold) for policy, (all_of_it, _) in POLICIES.items() for threshold in all_of_it]


def film(pipe, options, text, seed, scene):
    """One video, what the judge says of it, and the share of passes saved.   -> arrays, as Keep takes them"""
    frames = np.asarray(pipe(text, seed=seed, **options).frames)
    verdict = score.judge(frames, scene)
    saved = pipe.dit.report().saved if hasattr(pipe.dit, "report") else 0.0
    return {"frames": frames, "saved": np.array(saved)} | {name: np.array(verdict[name]) for name in ASKED}


def within(span, now, here):
    """A policy that skips the steps of a span."""
    return now.step in range(*span)


def tried(pipe):
    """{name: (pipeline, options)} of all that is run, the plain one first."""
    runs = {"plain": (pipe, {})}
    for policy, threshold in SETTINGS:
        dit = cached(pipe.dit, policy, threshold=threshold, **POLICIES[policy][1])
        runs[f"{policy} {threshold:g}"] = pipe.replace(dit=dit), {}
    for when, spans in WHEN.items():
        for span in spans:
            dit = cached(pipe.dit, partial(within, span))
            runs[f"{when} {span[1] - span[0]}"] = pipe.replace(dit=dit), {}
    return runs | {f"fewer {steps}": (pipe, {"steps": steps}) for steps in STEPS}


def measure(pipe, n, keep):
    """All films, prompt by prompt, so that a stop leaves every setting with the same prompts.   -> facts"""
    runs = tried(pipe)
    films = {name: [] for name in runs}
    for i, (text, scene) in enumerate(world.prompts(n, split="heldout")):
        for name, (run, options) in runs.items():
            films[name].append(
                keep(f"{name.replace(' ', '-')}-{i:03}", partial(film, run, options, text, i, scene))
            )
        print(i, sum(bool(made[-1]["all"]) for made in films.values()), "of", len(films), flush=True)
    full = pipe.defaults["steps"]
    rows = []
    for name, made in films.items():
        kind, _, number = name.partition(" ")
        saved = 1 - int(number) / full if kind == "fewer" else float(np.mean([one["saved"] for one in made]))
        rows.append(
            {"policy": "fewer steps" if kind == "fewer" else kind, "at": float(number or 0), "saved": saved}
            | {"films": len(made)}
            | figures(made, films["plain"])
        )
    return {"prompts": n, "steps": full, "rows": rows}


def figures(films, plain):
    """Shares of what was obeyed; and the median PSNR in dB to the plain films, None where most are equal."""
    pairs = zip(plain, films, strict=True)
    psnr = float(np.median([score.psnr(a["frames"], b["frames"]) for a, b in pairs]))
    rates = {name: float(np.mean([one[name] for one in films])) for name in ASKED}
    return {"psnr": psnr if np.isfinite(psnr) else None} | rates


def tables(facts):
    """The two tables of the guide: every setting, and early against late.   -> markdown"""
    names = "passes saved | PSNR, dB | obeyed | motion right |\n" + "|---" * 6 + "|"
    head, when = f"| policy | threshold | {names}", f"| skipped | steps | {names}"
    lines = {True: [when], False: [head]}
    for row in facts["rows"]:
        at = "" if row["policy"] == "plain" else f"{row['at']:g}"
        at = f"{at} steps" if row["policy"] == "fewer steps" else at
        psnr = "equal" if row["psnr"] is None else f"{row['psnr']:.1f}"
        rates = " | ".join(f"{row[name]:.0%}".replace("%", " %") for name in ("all", "motion"))
        saved = f"{row['saved']:.0%}".replace("%", " %")
        lines[row["policy"] in WHEN].append(f"| {row['policy']} | {at} | {saved} | {psnr} | {rates} |")
    return "\n".join(lines[False]), "\n".join(lines[True])


def measure_tiny(name, prompts=32):
    """The calibration of a tiny model, written into the package."""
    pipe = moddiff.load(name)
    asked = [{"prompt": text} for text, _ in world.prompts(prompts, split="train")]
    if pipe.dit.task == "i2v":
        for seed, (_, scene) in enumerate(world.prompts(prompts, split="train")):
            asked[seed]["image"] = world.clip(scene, seed)[0]
    for policy in ("teacache", "magcache"):
        calibrate(pipe, asked, policy, to=FOLDER / f"{name}.json")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("-n", "--number", type=int, default=64, help="prompts")
    parser.add_argument("-o", "--out", type=Path, default=Path("cache.json"))
    parser.add_argument("--model", default="tiny-t2v")
    parser.add_argument("--calibrate", metavar="MODEL", help="measure a tiny model's numbers instead")
    options = parser.parse_args(arguments)
    if options.calibrate:
        return measure_tiny(options.calibrate)
    pipe = moddiff.load(options.model)
    numbers = json.dumps(calibrations().get(options.model))  # other numbers, other films
    keep = Keep(options.out.with_suffix(".parts"), mark_of(pipe, pipe.defaults, numbers))
    with torch.no_grad():
        facts = measure(pipe, options.number, keep)
    write_whole(options.out, json.dumps(facts, indent=1).encode() + b"\n")
    print(*tables(facts), sep="\n\n")


if __name__ == "__main__":
    main()
