"""What changes at full size?  Nothing but the weights: build a component from a config and a state, whatever names the state uses.

A state is a dictionary {parameter name: tensor}. It may use our names, the official ones, those of Diffusers and transformers,
or any of these behind a prefix (ComfyUI's `model.diffusion_model.`); which one is found out, never guessed silently: every
tensor must find its place, and what does not is reported in words.
"""

from difflib import get_close_matches

import torch

from . import configs
from . import files as checkpoints
from .configs import empty
from .names import KINDS, PREFIXES, RELEASED_PREFIX, STYLES, ignored, places

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
# A few words that only one kind of component has in its names: to say what a file is when it is not what was asked for.
FINGERPRINTS = {
    "dit": ("self_attn.norm_q", "attn1.norm_q", "scale_shift_table", "time_mlp."),
    "text": ("relative_attention_bias", "relative_bias", "pos_embedding.embedding"),
    "image": ("attn.to_qkv", "attn.qkv", "layer_norm1", "cls_embedding"),
    "vae": ("encoder.downsamples", "encoder.down_blocks", "decoder.upsamples"),
}
DTYPES = {
    "fp32": torch.float32,
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
    "fp64": torch.float64,
    "float64": torch.float64,
}


class WeightsError(ValueError):
    """The weights do not fit the component; the message lists every tensor that does not."""


def build(kind, config, state=None, dtype=None, check_values=True):
    """One component, in eval mode.

    kind          "dit", "text", "image" or "vae"
    config        its fields, in any dialect that `configs.read` knows
    state         {name: tensor}, any naming; None: fresh random weights
    dtype         "bf16", "fp32", "fp16" or a torch.dtype to convert to; None: as stored
    check_values  refuse NaN and infinite weights. It reads every weight once; False leaves mapped files untouched until used
    ->            the module. Its parameters are the tensors of `state` themselves where nothing had to be converted

    Raises WeightsError for missing, surplus, misshapen, non-finite or integer weights, ValueError for a config that is not understood.
    Guide: guides/weights.md
    """
    dtype = as_dtype(dtype)
    config = configs.read(kind, config, () if state is None else state)
    if state is None:
        return configs.module_for(kind, config).to(dtype=dtype).eval()
    module = empty(kind, config)
    ours, unused = _ours(kind, config, module, state, check_values)
    for name in unused:
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, None)
    ours = {name: x if dtype is None else x.to(dtype) for name, x in ours.items()}
    module.load_state_dict(ours, strict=True, assign=True)
    return module


def rename(state, kind, to, config):
    """The same weights under other names.

    state   {name: tensor} in any naming; it must be complete and fit `config`
    to      "ours", "official" or "diffusers"
    ->      {name: tensor}. Nothing is lost: renaming back gives the same tensors

    Raises WeightsError as `build` does, ValueError for an unknown naming.
    """
    if to not in STYLES:
        raise ValueError(f"to = {to!r}; expected one of {', '.join(STYLES)}")
    config = configs.read(kind, config, state)
    ours, _ = _ours(kind, config, empty(kind, config), state, check_values=False)
    prefix = RELEASED_PREFIX.get((kind, to), "")
    written = {}
    for name, place in places(kind, config, ours, to).items():
        for there, x in place.write(ours[name]).items():
            written[there if there.startswith("visual_projection") else prefix + there] = x
    return written


def load_component(where, kind, config=None, dtype=None, check_values=True):
    """One component from a file or a folder: its weights mapped, not copied.

    where   a .safetensors or .pth file, an index of shards, or a folder that holds one of these
    config  dict; None: the config.json beside the weights

    Raises CheckpointError for files that cannot be read, else as `build`.
    """
    if config is None:
        config = checkpoints.config_beside(where)
    return build(kind, config, checkpoints.read(where), dtype, check_values)


def as_dtype(dtype):
    """ "bf16" -> torch.bfloat16; a floating torch.dtype or None as it is."""
    if isinstance(dtype, str) and dtype in DTYPES:
        return DTYPES[dtype]
    if dtype is None or (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        return dtype
    raise ValueError(f"dtype is {dtype!r}; expected one of fp32, bf16, fp16, fp64, or a floating torch.dtype")


def detect(kind, config, module, names):
    """The naming that a set of names uses.   -> (style, prefix, {our name: Place})

    Raises WeightsError when none fits at all, saying what the names look like instead.
    """
    ours, best = list(module.state_dict()), (0, None)
    for style in STYLES:
        table = places(kind, config, ours, style)
        there = {name for place in table.values() for name in place.names}
        for prefix in PREFIXES[kind]:
            hits = len(there & {name.removeprefix(prefix) for name in names})
            if hits > best[0]:
                best = (hits, (style, prefix, table))
    if best[1] is None:
        likely = [k for k in KINDS if any(mark in name for name in names for mark in FINGERPRINTS[k])]
        looks = f" They look like a {likely[0]} component." if likely and likely[0] != kind else ""
        raise WeightsError(
            f"none of the {len(names)} names belongs to a {kind} component, in any naming; they begin with "
            f"{', '.join(sorted(names)[:3]) or 'nothing'}.{looks} Expected names such as {', '.join(ours[:2])}"
        )
    return best[1]


def _ours(kind, config, module, state, check_values):
    """({our name: tensor}, our names that the file may lack and lacks), or WeightsError with every complaint at once."""
    style, prefix, table = detect(kind, config, module, state)
    theirs = {name.removeprefix(prefix): name for name in state if ignored(kind, name) is None}
    shapes = {name: x.shape for name, x in module.state_dict().items()}
    ours, unused, missing, wrong, dtypes, values = {}, [], {}, {}, [], []
    for name, place in table.items():
        expected = {
            there: x.shape for there, x in place.write(torch.empty(shapes[name], device="meta")).items()
        }
        found = {there: state[theirs.pop(there)] for there in place.names if there in theirs}
        if not found and place.optional:
            unused.append(name)
            continue
        absent = (
            [] if place.form == "tied" and found else [there for there in place.names if there not in found]
        )
        missing |= {there: expected[there] for there in absent}
        misfits = {
            there: (x.shape, expected[there]) for there, x in found.items() if x.shape != expected[there]
        }
        wrong |= misfits
        dtypes += [
            f"{there} ({x.dtype})"
            for there, x in found.items()
            if not x.is_floating_point() or x.element_size() < 2
        ]
        if place.form == "tied" and len(found) == 2 and not misfits and not _equal(*found.values()):
            values.append(f"{' and '.join(found)} should be one tensor, but differ")
        if check_values:
            values += [
                f"{there} ({count} of {x.numel()} values)" for there, x in found.items() if (count := _bad(x))
            ]
        if found and not absent and not misfits:
            ours[name] = place.read(found)
    complaints = _complaints(missing, list(theirs), wrong, dtypes, values)
    if complaints:
        hints = "".join(
            f"\nHint: {hint}"
            for hint in _hints(kind, config, style, prefix, table, state, missing, theirs, wrong)
        )
        naming = {"ours": "our own names", "official": "official names", "diffusers": "Diffusers names"}[
            style
        ]
        naming += f" behind {prefix!r}" if prefix else ""
        raise WeightsError(
            f"these weights ({len(state)} tensors, {naming}) do not fit the {kind} config:\n"
            + "\n".join(complaints)
            + hints
        )
    return ours, unused


def _complaints(missing, surplus, wrong, dtypes, values):
    """One line per kind of trouble."""
    found = []
    if missing:
        shown = [f"{name} {list(shape)}" for name, shape in missing.items()]
        near = {
            name: match[0]
            for name in list(missing)[:6]
            if (match := get_close_matches(name, surplus, 1, 0.8))
        }
        found.append(
            f"- {len(missing)} missing: {_some(shown)}"
            + "".join(f"\n  is {b} meant for {a}?" for a, b in near.items())
        )
    if surplus:
        found.append(f"- {len(surplus)} surplus, no place for: {_some(surplus)}")
    if wrong:
        shown = [f"{name} is {list(got)}, expected {list(want)}" for name, (got, want) in wrong.items()]
        found.append(f"- {len(wrong)} misshapen: {_some(shown)}")
    if dtypes:
        found.append(
            f"- {len(dtypes)} not 16 bit floats or wider: {_some(dtypes)}. Quantized files cannot be loaded here; take a bf16 or "
            "fp32 release"
        )
    if values:
        found.append(
            f"- {len(values)} broken, NaN, infinite or torn: {_some(values)}. The file is damaged, or its training diverged; "
            "fetch it again"
        )
    return found


def _hints(kind, config, style, prefix, table, state, missing, surplus, wrong):
    """What a wrong config would explain."""
    stripped = {name.removeprefix(prefix): x for name, x in state.items()}
    for name, axis, field in TELLTALES[kind]:
        there = table[name].names[0] if name in table else None
        if there in wrong and table[name].form == "same" and stripped[there].ndim > axis:
            got = stripped[there].shape[axis]
            if got != wrong[there][1][axis]:
                yield (
                    f"the config says {field} = {getattr(config, field)}, the weights say {got} (axis {axis} of {there}). "
                    f"Correct the config's {field}"
                )
    stack = {"dit": "blocks.", "text": "block", "image": "layers."}.get(kind)
    numbers = [
        int(part)
        for name in stripped
        for before, part in zip(name.split("."), name.split(".")[1:])
        if part.isdigit() and before in ("blocks", "block", "layers", "transformer")
    ]
    if stack and numbers and max(numbers) + 1 != config.num_layers and (missing or surplus):
        yield f"the config says num_layers = {config.num_layers}, the weights have {max(numbers) + 1}. Correct the config's num_layers"
    if any(name.endswith(("scale_weight", "scaled_fp8", "weight_scale", "scale_input")) for name in surplus):
        yield "scale tensors mark a quantized (fp8) file; take the bf16 or fp32 release"
    if any("lora_" in name for name in surplus):
        yield "lora tensors are a change to a model, not a model; load the model they belong to first"


def _some(items, most=6):
    items = list(items)
    return "; ".join(items[:most]) + (f"; and {len(items) - most} more" if len(items) > most else "")


def _bad(x):
    """How many values are NaN or infinite. Least and greatest tell at once, in a fortieth of the time of looking at each value."""
    if x.is_meta or not x.numel() or not x.is_floating_point() or x.element_size() < 2:
        return 0
    if all(extreme.isfinite() for extreme in torch.aminmax(x)):
        return 0
    return int((~x.isfinite()).sum())


def _equal(a, b):
    return a.is_meta or b.is_meta or a.data_ptr() == b.data_ptr() or torch.equal(a, b)
