"""What does not fit between a state and a component, in words, and what would explain it?"""

import re
from difflib import get_close_matches

import torch

from ..storage import Stored
from .foreign import quantized
from .quoting import listed, quoted

# Which config field a weight's shape gives away: kind -> ((our name, axis, field), ...).
TELLTALES = {
    "dit": (
        ("patch_embedding.weight", 0, "dim"),
        ("patch_embedding.weight", 1, "in_dim"),
        ("blocks.0.ffn.0.weight", 0, "ffn_dim"),
        ("text_mlp.0.weight", 1, "text_dim"),
        ("time_mlp.0.weight", 1, "freq_dim"),
        ("image_mlp.norm_in.weight", 0, "image_dim"),
        ("vace_patch_embedding.weight", 1, "vace_in_dim"),
    ),
    "text": (
        ("token_embedding.weight", 0, "vocab"),
        ("token_embedding.weight", 1, "dim"),
        ("layers.0.attn.q.weight", 0, "dim_attn"),
        ("layers.0.ffn.up.weight", 0, "dim_ffn"),
        ("layers.0.attn.relative_bias.weight", 0, "num_buckets"),
        ("layers.0.attn.relative_bias.weight", 1, "num_heads"),
    ),
    "image": (
        ("patch_embedding.weight", 0, "dim"),
        ("patch_embedding.weight", 2, "patch_size"),
        ("head", 1, "out_dim"),
    ),
    "vae": (("conv2.weight", 0, "z_dim"), ("encoder.conv1.weight", 0, "dim")),
}
# Floats of 8 bits that mean what they say; beside scales they are quantized weights, as other narrow types.
PLAIN_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# At most four digits: a stranger's file may have a number of any length in a name.
LAYER = re.compile(r"(?:^|\.)(?:blocks?|layers|transformer)\.(\d{1,4})\.")


class WeightsError(ValueError):
    """The weights do not fit the component; the message lists every tensor that does not."""


def complaints(kind, config, table, theirs, wanted, check_values):
    """What keeps a state from being a component, all of it in the state's own naming.

    table    {our name: Counterpart}
    theirs   {name: tensor}, what the state has;  wanted: {name: shape}, what the component has
    check_values  look for NaN and infinite values
    ->       [str], one line for each kind of trouble, and hints; empty when everything fits
    """
    present = {name: x for name, x in theirs.items() if name in wanted}
    missing = [there for counterpart in table.values() for there in counterpart.missing(theirs)]
    surplus = [name for name in theirs if name not in wanted]
    # name: (its shape, the wanted one)
    misshapen = {name: (x.shape, wanted[name]) for name, x in present.items() if x.shape != wanted[name]}
    shapes = [f"{name} is {list(got)}, expected {list(want)}" for name, (got, want) in misshapen.items()]
    lines = [
        *_about_names(missing, surplus, wanted),
        *([f"- {len(shapes)} misshapen: {listed(shapes, between='; ')}"] if shapes else []),
        *_about_types(present),
        *_about_values(present, table, check_values),
    ]
    if lines:
        lines += [f"Hint: {hint}" for hint in _wrong_fields(kind, config, table, theirs, misshapen)]
        if quantized(surplus):
            lines.append(
                "Hint: scale tensors mark a quantized or packed file, and these belong to no 8 bit weight "
                "here; take an fp8_scaled or GGUF file, or the bf16 release"
            )
        if re.search(r"lora_|hada_|lokr_|\.diff", " ".join(surplus)):
            lines.append(
                "Hint: lora tensors are a change to a model, not a model; load the model they belong to first"
            )
    return lines


def _about_names(missing, surplus, wanted):
    if missing:
        shown = [f"{name} {list(wanted[name])}" for name in missing]
        yield f"- {len(shown)} missing: {listed(shown, between='; ')}"
        # Likeness takes time that grows with the square of a name, and these names are a stranger's.
        short = [name for name in surplus if len(name) < 200]
        for name in missing[:6]:
            for near in get_close_matches(name, short, n=1, cutoff=0.8):
                yield f"  is {quoted(near)} meant for {name}?"
    if surplus:
        yield f"- {len(surplus)} surplus, no place for: {listed(surplus, between='; ')}"


def _about_types(present):
    narrow = [
        f"{name} ({x.dtype})"
        for name, x in present.items()
        if x.dtype not in PLAIN_FP8 and (not x.dtype.is_floating_point or x.dtype.itemsize < 2)
    ]
    if narrow:
        yield (
            f"- {len(narrow)} neither floats nor a quantization that is read here: "
            f"{listed(narrow, between='; ')}. Take an fp8_scaled or GGUF file, or the bf16 release"
        )


def _about_values(present, table, check_values):
    # transformers has UMT5's table of words under two names, as its encoder and decoder share it.
    tied = [counterpart.names for counterpart in table.values() if counterpart.form == "tied"]
    broken = [
        f"{a} and {b} should be one tensor, but differ"
        for a, b in tied
        if {a, b} <= present.keys() and not _equal(present[a], present[b])
    ]
    if check_values:
        counts = {name: _not_finite(x) for name, x in present.items()}
        broken += [f"{name} ({n} of {present[name].numel()} values)" for name, n in counts.items() if n]
    if broken:
        yield (
            f"- {len(broken)} broken, NaN, infinite or torn: {listed(broken, between='; ')}. The file "
            "is damaged, or its training diverged; fetch it again"
        )


def _wrong_fields(kind, config, table, theirs, misshapen):
    """Numbers of the config that would explain the complaints: the weights say others."""
    said = {}
    for name, axis, field in TELLTALES[kind]:
        there = table[name].names[0] if name in table else None
        # Where several are stacked or turned an axis means something else.
        if there in misshapen and table[name].form == "same" and len(misshapen[there][0]) > axis:
            got, want = (shape[axis] for shape in misshapen[there])
            if got != want:
                said[field] = f"{got} (axis {axis} of {there})"
    numbers = [int(layer[1]) for name in theirs if (layer := LAYER.search(name))]
    # A vae has stages instead of num_layers.
    if kind != "vae" and numbers and max(numbers) + 1 != config.num_layers:
        said["num_layers"] = max(numbers) + 1
    for field, got in said.items():
        yield (
            f"the config says {field} = {getattr(config, field)}, the weights say {got}. Correct the "
            f"config's {field}; where the folder has no config.json for this part (an official one has it "
            f"for the dit alone), build the part with load_component(file, {kind!r}, config) and give "
            f"it to load as {kind}="
        )


def _not_finite(x):
    """How many values are NaN or infinite.

    Least and greatest tell at once, in a fortieth of the time of looking at each value.
    """
    if x.is_meta or not x.numel() or not x.dtype.is_floating_point:
        return 0
    if isinstance(x, Stored):
        return x.flaws()
    if x.element_size() < 2:
        x = x.half()  # 8 bit floats know no comparison; 16 bits hold each of them
    if all(extreme.isfinite() for extreme in torch.aminmax(x)):
        return 0
    return int((~x.isfinite()).sum())


def _equal(a, b):
    """Are these one tensor? A difference in shape is reported elsewhere."""
    if a.shape != b.shape or a.is_meta or b.is_meta:
        return True
    if isinstance(a, Stored) or isinstance(b, Stored):
        return type(a) is type(b) and all(map(torch.equal, _bytes_of(a), _bytes_of(b)))
    return a.data_ptr() == b.data_ptr() or torch.equal(a, b)


def _bytes_of(stored):
    return [x.contiguous().view(torch.uint8) for x in stored.buffers() if x.ndim]
