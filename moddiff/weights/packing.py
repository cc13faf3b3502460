"""Which scale belongs to which 8 bit weight?  Quantized weights in every spelling, as one storage each.

The spellings, of a layer X (the weight itself is X.weight in all of them):

    old ComfyUI      X.scale_weight, X.scale_input, and one marker `scaled_fp8` for the file
    new ComfyUI      X.weight_scale, X.input_scale, X.comfy_quant (JSON in bytes), or the same JSON for all
                     layers in the head of the file, which `formats` hands on as X.comfy_quant
    others           X.weight_scale_inv (it is multiplied too), X.scale_weight [out, blocks, 1] of musubi
    ours             X.weight.codes and X.weight.scale, X.weight.q4_k, as a state_dict has them

A scale of the input is for a product in 8 bits; here inputs keep 16 bits or more, so it changes nothing.
"""

import json

import torch

from ..storage import Blocks, Scaled, Stored
from ..storage.decoders import TYPES
from ..storage.scaled import KINDS
from .complaints import PLAIN_FP8, WeightsError
from .quoting import first_line, quoted

SCALES = ("scale_weight", "weight_scale", "weight_scale_inv", "weight.scale")
OF_INPUT = ("scale_input", "input_scale")
NOTE, MARKER = "comfy_quant", "scaled_fp8"
FORMATS = {
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
    "int8_tensorwise": torch.int8,
}


def packed(state):
    """A state in which every quantized weight is one Stored, and what belongs to it is used up.

    state   {name: tensor}, as a file has it
    ->      {name: tensor or Stored}

    Raises WeightsError for a weight without its scale, a scale that does not fit, and a format that is not
    among FORMATS. Scales that belong to no weight stay, for `match` to complain about.
    """
    state, dtype = dict(state), stands_for(state)
    marked = [name for name in state if name.rpartition(".")[2] == MARKER]
    for name in marked:
        del state[name]
    for name in list(state):
        stem, _, leaf = name.rpartition(".")
        if leaf == NOTE:
            _check_note(stem, state.pop(name), state.get(f"{stem}.weight"))
            marked.append(stem)
        elif leaf in TYPES and stem.endswith(".weight"):
            state[stem] = _made(stem, Blocks, state.pop(name), leaf, dtype)
        elif leaf == "codes" and stem.endswith(".weight"):
            state[stem] = state.pop(name)
    for name, x in list(state.items()):
        if name.rpartition(".")[2] == "weight" and not isinstance(x, Stored) and x.dtype in KINDS:
            _pack(name, state, dtype, marked)
    return state


def stands_for(state):
    """What the 8 bit weights of a state stand for: bf16, or fp16 where the rest of the file is that."""
    counts = {torch.bfloat16: 0, torch.float16: 0}
    for x in state.values():
        if torch.is_tensor(x) and x.dtype in counts:
            counts[x.dtype] += x.numel()
    return max(counts, key=counts.get)


def _pack(name, state, dtype, marked):
    """One weight and its scale, in place of both."""
    stem, codes = name.removesuffix(".weight"), state[name]
    scales = [f"{stem}.{leaf}" for leaf in SCALES if f"{stem}.{leaf}" in state]
    if len(scales) > 1:
        raise WeightsError(f"{quoted(name)} has several scales: {', '.join(map(quoted, scales))}")
    if not scales:
        if marked or codes.dtype not in PLAIN_FP8:
            raise WeightsError(
                f"{quoted(name)} is {codes.dtype} and its scale is not here; expected {quoted(stem)} with "
                f"{', '.join(SCALES[:3])}. Without it the numbers mean nothing: fetch the file again"
            )
    scale = state.pop(scales[0]) if scales else None
    for leaf in OF_INPUT:
        state.pop(f"{stem}.{leaf}", None)
    if codes.ndim == 2:
        state[name] = _made(name, Scaled, codes, scale, dtype)
    elif scale is not None and scale.numel() == 1:
        state[name] = (codes.float() * scale.float().reshape(())).to(dtype)
    elif scale is not None:
        raise WeightsError(f"{quoted(name)} {list(codes.shape)} has a scale of {list(scale.shape)}")


def _made(name, storage, *arguments):
    try:
        return storage(*arguments)
    except (ValueError, TypeError) as error:
        raise WeightsError(f"{quoted(name)}: {error}") from error


def _check_note(stem, note, weight):
    """Refuse a layer of a format that is not read here, and one that is not what its note says."""
    if note.is_meta:
        return
    try:
        said = json.loads(bytes(note.tolist()))
    except (ValueError, TypeError, RecursionError) as error:
        raise WeightsError(f"{quoted(stem)}.{NOTE} is not JSON ({first_line(error)})") from error
    kind = said.get("format") if isinstance(said, dict) else None
    if kind not in FORMATS or said.get("convrot"):
        turned = " with rotated columns" if kind in FORMATS else ""
        raise WeightsError(
            f"{quoted(stem)} is quantized as {quoted(kind)}{turned}, which is not read here; there are "
            f"{', '.join(FORMATS)} without rotation, and GGUF. Take one of those, or the bf16 release"
        )
    if weight is None or weight.dtype != FORMATS[kind]:
        got = "absent" if weight is None else weight.dtype
        raise WeightsError(f"{quoted(stem)} should be {kind} by its note, but its weight is {got}")
