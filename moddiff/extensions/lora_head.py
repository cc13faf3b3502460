"""What does an adapter file say of itself, beside its tensors?  Its alphas, and the run it was distilled for.

The first is PEFT's and Diffusers' word, the second ours: the step list of a few-step adapter is as much a
part of it as its numbers are, and is lost where it stands only in a text beside them.
"""

import json
import math

from safetensors import SafetensorError, safe_open

from ..flow import step_list
from ..weights import files
from ..weights.building import WeightsError
from ..weights.quoting import quoted

FOLDER_NAME = "adapter_config.json"  # PEFT's: it lies beside the weights and says their alpha
SAMPLING = "moddiff.sampling"  # our key in the head of a file, JSON


def said_beside(where):
    """PEFT's config of a file: in its head, where Diffusers puts it, or in adapter_config.json beside it."""
    if isinstance(where, dict):
        return None
    path = files.files(where)[0]
    beside = path.parent / FOLDER_NAME
    if path.name.startswith("adapter_model") and beside.is_file():
        return files.read_json(beside)
    head = _head(path, "lora_adapter_metadata")
    # A pipeline's begin with the component, "transformer.lora_alpha"; a model's do not.
    return {key.rpartition(".")[2]: value for key, value in head.items()} if isinstance(head, dict) else None


def _head(path, key):
    """What the head of a file says under a key, as JSON; None where it says nothing, or has no head."""
    try:
        with safe_open(path, framework="np") as file:
            return json.loads((file.metadata() or {}).get(key, "null"))
    except (SafetensorError, OSError, ValueError):  # a .pth, which has no head, or a head that is no JSON
        return None


def sampling_in(where):
    """The settings of a run that an adapter was distilled for: its step list, solver and scale.

    ->  {"steps": a tuple of noise levels, or a number, "solver": name, "scale": number}, or some of them; {}
        where the file says none, as other programs' do
    """
    said = {} if isinstance(where, dict) else _head(files.files(where)[0], SAMPLING)
    return checked_sampling(said) if isinstance(said, dict) else {}


def checked_sampling(said):
    """The same, if it is that.   Raises WeightsError"""
    kinds = {"steps": (int, list, tuple), "solver": str, "scale": (int, float), "shift": (int, float)}
    wrong = [name for name, value in said.items() if not isinstance(value, kinds.get(name, ()))]
    if wrong:
        raise WeightsError(
            f"sampling has {', '.join(f'{name}={quoted(said[name])}' for name in wrong)}; expected steps, a "
            "number or a list of noise levels, solver, a name, scale and shift, numbers"
        )
    if not isinstance(said.get("steps"), (list, tuple)):
        return said
    try:
        return said | {"steps": step_list(said["steps"])}
    except ValueError as error:
        raise WeightsError(f"sampling: {error}") from error


def alpha_of(said, key, rank):
    """The alpha that PEFT's config gives a layer; rsLoRA divides by the root of the rank, and is put so that
    alpha / rank is right."""
    alpha = said.get("lora_alpha", rank)
    for pattern, value in (said.get("alpha_pattern") or {}).items():
        # As PEFT reads them: a layer's name, or how it ends.
        alpha = value if key == pattern or key.endswith("." + pattern) else alpha
    if not isinstance(alpha, int | float):
        raise WeightsError(f"lora_alpha is {quoted(alpha)}; expected a number")
    return float(alpha) * math.sqrt(rank) if said.get("use_rslora") else float(alpha)
