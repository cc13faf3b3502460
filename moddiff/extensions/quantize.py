"""How few bits does a weight need?  Linear layers whose weights are kept in 8 or 4, and what that costs."""

import re

import torch

from ..linear import Linear, Linear32, dense, store
from ..storage import ENCODERS, Stored
from ..storage.pages import give_back
from .promises import Extension, extension, layers

IN_A_BLOCK = re.compile(r"\b(blocks|vace_blocks|layers)\.\d+\.")


@extension
def quantized(part, kind, skip=()):
    """A component whose linear layers keep their weights in fewer bits.   -> the component; approximate

    kind  "int8"          8 bit whole numbers and a scale for each row; computes in the layer's own dtype
          "int8-dynamic"  the inputs are rounded, too, and whole numbers multiplied
          "fp8"           8 bit floats (e4m3) and a scale for each row
          "fp8-dynamic"   the inputs too, on GPUs that multiply them (8.9 and up); elsewhere only rounded
          "q8_0", "q4_0"  blocks of 32 with a scale each, as in GGUF files: 8.5 and 4.5 bits
          or a config of torchao, which is handed on to torchao
    skip  patterns (regular expressions) of layers that stay, such as r"blocks\\.0\\."

    What is in no block stays: patch and time embeddings, modulation, the text and image projections and the
    last layer are few numbers, and all others depend on them. `report()` says of each layer how far its
    weight is from what it was (root mean square, as a share of the weight's own).

    Raises ValueError for another kind, a pattern that meets no layer, or a component without such layers.
    """
    if isinstance(kind, str) and kind not in ENCODERS:
        raise ValueError(f"quantized(kind={kind!r}); expected one of {', '.join(ENCODERS)}")
    patterns = [skip] if isinstance(skip, str) else list(skip)
    there = {path: layer for path, layer in layers(part).items() if path}
    for pattern in patterns:
        if not any(re.search(pattern, path) for path in there):
            raise ValueError(f"quantized(skip={pattern!r}) meets no layer; {some(there)}")
    rows = [{"layer": path} | treat(path, layer, kind, patterns) for path, layer in there.items()]
    if not any("error" in row for row in rows):
        whys = sorted({row["stays"] for row in rows if "stays" in row})
        raise ValueError(
            f"quantized found no layer of {type(part).__name__} to quantize"
            + (f": all stay ({'; '.join(whys)})" if whys else ", it has no linear layers")
        )
    return Extension(part, exact=False, rows=rows)


def treat(path, layer, kind, patterns):
    """Quantize one layer, or say why it stays.   -> the row of the report"""
    why = reason_to_stay(path, layer, kind, patterns)
    if why:
        return {"stays": why}
    weight, before = dense(layer).detach(), layer.weight.nbytes
    if isinstance(kind, str):
        store(layer, ENCODERS[kind](weight))
        after, new = layer.weight.nbytes, dense(layer)
    else:
        after, new = through_torchao(layer, kind)
    if weight.is_meta:  # a forecast
        return {"MB_before": before / 1e6, "MB": after / 1e6, "error": float("nan")}
    error = (new.float() - weight.float()).square().mean().sqrt() / weight.float().square().mean().sqrt()
    give_back([weight])  # a file that is larger than the memory is quantized layer by layer
    return {"MB_before": before / 1e6, "MB": after / 1e6, "error": float(error)}


def reason_to_stay(path, layer, kind, patterns):
    """Why this layer is not quantized, in words; None if it is."""
    if any(re.search(pattern, path) for pattern in patterns):
        return "skipped"
    if isinstance(layer, Linear32) or not IN_A_BLOCK.search(path):
        return "in no block: few numbers, on which all others depend"
    if not isinstance(layer, Linear):
        return f"is a {type(layer).__name__} of its own, which may compute otherwise"
    if isinstance(layer.weight, Stored):
        return "its weight is quantized already"
    if isinstance(kind, str) and kind.startswith("q") and layer.in_features % 32:
        return f"{layer.in_features} columns are no whole blocks of 32"
    return None


def through_torchao(layer, config):
    """Let torchao quantize one layer, in place.   -> bytes of the weight, the weight as numbers"""
    try:
        from torchao.quantization import quantize_
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"quantized(kind={config!r}) needs torchao: pip install torchao; the kinds that need nothing are "
            f"{', '.join(ENCODERS)}"
        ) from error
    quantize_(layer, config, filter_fn=lambda module, name: module is layer)
    weight = layer.weight
    held = [getattr(weight, name) for name in weight.__tensor_flatten__()[0]]
    return sum(x.nbytes for x in held if torch.is_tensor(x)), weight.dequantize()


def some(there):
    return f"the layers are {', '.join([*there][:3])}, ..." if there else "there are no linear layers"
