"""Which numbers does a cache need of a model, and how are they measured?  Published ones, and `calibrate`.

A calibration is a JSON file: "model", the part of a config by which it is found; "teacache", a polynomial for
each of its two signals; "magcache", a curve for each branch. Those of the package lie in calibrations/.
"""

import json
from functools import cache as once
from pathlib import Path

import numpy as np

from ..experts import Experts
from .promises import bare

FOLDER = Path(__file__).parent / "calibrations"
FILE = "cache.json"  # in a folder of weights
SIGNALS = "time", "projected"


@once
def calibrations():
    """{name of a model: its calibration}, those of the package"""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.json"))}


def chosen(policy, dit, given, model, ret_steps=False):
    """The numbers of a policy: those given, those of a file, or the published ones of this model.

    Raises ValueError where there are none, or several and nobody said which.
    """
    if given == "plain" and policy == "teacache":
        return None
    if given is None:
        found = published(policy, dit, model)
    elif isinstance(given, str | Path):
        found = read(given)
        if policy not in found:
            raise ValueError(
                f"{given} holds no {policy}; calibrate(pipe, prompts, {policy!r}, to=...) adds it"
            )
    else:
        found = {policy: {"time": given, "projected": given} if policy == "teacache" else given}
    numbers = found[policy]
    if policy == "magcache":
        return check_curve(numbers)
    return check_polynomial(numbers[SIGNALS[bool(ret_steps)]])


def published(policy, dit, model=None):
    """The calibration of the package for a model, by name or as its config tells."""
    there = {name: found for name, found in calibrations().items() if policy in found}
    if model is not None:
        if model not in there:
            raise ValueError(f"no numbers of {policy} for model={model!r}; there are {', '.join(there)}")
        return there[model]
    cure = (
        f'calibrate(pipe, prompts, {policy!r}, to=folder) measures them, cached(dit, "easycache") needs none'
    )
    inner = bare(dit)
    if isinstance(inner, Experts):
        raise ValueError(
            f"nothing is published for the {policy} of two experts; {cure}, model= borrows others'"
        )
    config = getattr(inner, "config", None)
    names = [
        name
        for name, found in there.items()
        if all(getattr(config, key, None) == value for key, value in found["model"].items())
    ]
    if len(names) == 1:
        return there[names[0]]
    if names:
        raise ValueError(
            f"a model of this size may be {' or '.join(names)}, whose numbers differ; say model={names[0]!r}"
        )
    raise ValueError(f"nothing is published for the {policy} of this {type(inner).__name__}; {cure}")


def read(path):
    """A calibration that `calibrate` wrote: the file, or the folder with it."""
    path = Path(path).expanduser()
    path = path / FILE if path.is_dir() else path
    if not path.is_file():
        raise ValueError(
            f"there is no calibration at {path}; calibrate(pipe, prompts, to={str(path)!r}) writes one"
        )
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no calibration: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is no calibration; expected the JSON that calibrate writes")
    return found


def check_polynomial(numbers):
    if not isinstance(numbers, list | tuple) or not numbers or not all(map(is_number, numbers)):
        raise ValueError(f"coefficients={numbers!r}; expected numbers, the highest power first")
    return [float(number) for number in numbers]


def check_curve(curve):
    if not isinstance(curve, dict) or not isinstance(curve.get("cond"), list | tuple):
        raise ValueError(f'curve={curve!r}; expected {{"cond": [ratios], "uncond": [ratios]}}')
    for branch, ratios in curve.items():
        if not ratios or not all(is_number(ratio) and ratio > 0 for ratio in ratios):
            raise ValueError(f"curve of {branch}: expected ratios above 0, one for each step; got {ratios!r}")
    return {branch: [float(ratio) for ratio in ratios] for branch, ratios in curve.items()}


def is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool) and bool(np.isfinite(value))
