"""What is in an adapter file, whoever wrote it?  Its tensors by our layers, and the same in three spellings.

A key is a prefix, a layer and a part: `diffusion_model.` `blocks.3.self_attn.q` `.lora_down.weight`. The
layer may be called as in the official code, as Diffusers calls it, as here, or any of these with `_` for `.`
(kohya, LyCORIS); the tables of weights/names.py say which is which.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..weights import configs, files
from ..weights.building import WeightsError
from ..weights.names import STYLES, counterparts
from ..weights.quoting import listed, quoted
from .lora_families import change_for
from .lora_head import alpha_of, said_beside, sampling_in

# What may stand before a layer's name, any number of them: who wrote the file, and which component it is for.
PREFIXES = {
    "dit": (
        "model.diffusion_model.", "diffusion_model.", "transformer.", "base_model.model.", "pipe.dit.",
        "dit.", "unet.", "model.", "module.", "lora_unet__", "lora_unet_", "lycoris_", "lora_transformer_",
    ),
    "text": (
        "text_encoders.umt5xxl.transformer.", "text_encoders.umt5xxl.", "text_encoders.", "text_encoder.",
        "umt5xxl.", "transformer.", "base_model.model.", "pipe.text_encoder.", "lora_te1_", "lora_te_",
        "lycoris_",
    ),
}  # fmt: skip
TEXT = re.compile(r"(text_encoders?\.|umt5xxl\.|pipe\.text_encoder\.|lora_te\d?_)")

# How a key ends -> the family and the part of it that the tensor is. The first that fits counts. PEFT puts a
# name in between (.lora_A.default.weight); .diff and its like are whole differences, as distilled files have.
ENDINGS = (
    (r"\.lora_(?:B|up)(?:\.[\w-]+)?\.bias", "bias", "scaled"),
    (r"\.lora_(?:A|down)(?:\.(?!bias)[\w-]+){0,2}", "lora", "down"),
    (r"\.lora_(?:B|up)(?:\.(?!bias)[\w-]+){0,2}", "lora", "up"),
    (r"\.lora_mid(?:\.weight)?", "lora", "mid"),
    (r"(?:\.lora|_lora|\.lora_linear_layer)\.down(?:\.weight)?", "lora", "down"),
    (r"(?:\.lora|_lora|\.lora_linear_layer)\.up(?:\.weight)?", "lora", "up"),
    (r"\.hada_(w[12]_[ab]|t[12])", "hada", None),
    (r"\.lokr_(w[12](?:_[ab])?|t2)", "lokr", None),
    (r"\.(?:dora_scale|lora_magnitude_vector(?:\.[\w-]+){0,2})", "dora", "magnitude"),
    (r"\.alpha", "alpha", "alpha"),
    (r"\.diff_b", "bias", "diff"),
    (r"\.diff_m", "modulation", "diff"),
    (r"\.diff", "full", "diff"),
    (r"\.set_weight", "set", "value"),
    (r"\.reshape_weight", "reshape", "shape"),
)
ENDINGS = tuple((re.compile(f"^(.+?){ending}$"), family, part) for ending, family, part in ENDINGS)


@dataclass
class Adapter:
    """What one file changes.

    name       of the file, for reports
    parts      {our layer, or parameter: {(family, part): tensor}}
    keys       {our layer: what the file calls it}
    unmatched  {layer as the file calls it: why}, of layers that this component does not have
    alphas     {our layer: alpha}, from the tensors, the file's head, or the config beside it
    folded     was it written by a tool that has no alpha, because it multiplies it into the weights?
    sampling   {setting: value} of the run that it was distilled for, as the file's head says them
    """

    name: str
    parts: dict = field(default_factory=dict)
    keys: dict = field(default_factory=dict)
    unmatched: dict = field(default_factory=dict)
    alphas: dict = field(default_factory=dict)
    folded: bool = False
    sampling: dict = field(default_factory=dict)


def read_adapter(where, kind, config, expert=""):
    """A file of changes, by the names of a component's layers.

    where   a file, a folder with one, or {key: tensor}
    kind    "dit" or "text";  config: that component's
    expert  "high" or "low", for one of two: of a file with both of them, only its own keys are read
    ->      Adapter

    Raises CheckpointError for a file that cannot be read; WeightsError for one that holds no adapter, one of
    a family that is not ours, or none of whose layers the component has.
    """
    state, name = (where, "the state") if isinstance(where, dict) else (files.read(where), Path(where).name)
    adapter, state = Adapter(name), _of_expert(state, expert)
    layers, parameters = spellings(kind, config)
    strangers = []
    for key, x in state.items():
        found = _ending(key)
        if found is None:
            strangers.append(key)
            continue
        spelt, family, part = found
        of_text = bool(TEXT.match(spelt))
        ours = None if of_text and kind == "dit" else _ours(spelt, family, kind, layers, parameters)
        if ours is None:
            zeros = torch.is_tensor(x) and x.is_floating_point() and not x.float().any()
            why = "for the text encoder" if of_text else "all zeros" if zeros else "no such layer"
            adapter.unmatched[spelt] = why
            continue
        if family == "full" and ours.endswith(".bias"):
            family = "bias"
        ours = re.sub(r"\.(weight|bias)$", "", ours)
        known = adapter.parts.setdefault(ours, {})
        if (family, part) in known:
            raise WeightsError(
                f"{name} has {quoted(key)}, and {family} {part} of {ours} under another name, too: it holds "
                "two adapters. Keep the tensors of one"
            )
        known[family, part] = _checked(name, key, x)
        adapter.keys[ours] = spelt
    _refuse(adapter, kind, state, strangers)
    _alphas(adapter, where)
    adapter.sampling = sampling_in(where)
    return adapter


def _of_expert(state, expert):
    """A state; of one in which Diffusers has put both experts, the half that is meant."""
    if not expert or not any(str(key).startswith("transformer_2.") for key in state):
        return state
    before = {"high": "transformer.", "low": "transformer_2."}[expert]
    return {
        "transformer." + key.removeprefix(before): x
        for key, x in state.items()
        if str(key).startswith(before)
    }


def _ending(key):
    """ "blocks.0.ffn.0.lora_A.weight" -> ("blocks.0.ffn.0", "lora", "down"); None for what is no change"""
    if not isinstance(key, str):
        return None
    for pattern, family, part in ENDINGS:
        if match := pattern.match(key):
            return match[1], family, part or match[2]
    return None


def _ours(spelt, family, kind, layers, parameters):
    """Our name for what the file calls so, behind any of the known prefixes; None where there is none."""
    while True:
        if family == "modulation":  # its key names the block alone
            ours = parameters.get(f"{spelt}.modulation") or parameters.get(spelt)
        else:
            ours = layers.get(spelt) or parameters.get(spelt)
        before = next((prefix for prefix in PREFIXES[kind] if spelt.startswith(prefix)), None)
        if ours is not None or before is None:
            return ours
        spelt = spelt.removeprefix(before)


def spellings(kind, config):
    """Every name of every layer and parameter.   -> {any name: our layer}, {any name: our parameter}"""
    layers, parameters = {}, {}
    names = list(configs.empty(kind, config).state_dict())
    for style in STYLES:
        for ours, there in counterparts(kind, config, names, style).items():
            for name in there.names:
                parameters[name] = ours
                if name.endswith((".weight", ".bias")) and ours.endswith((".weight", ".bias")):
                    layers[name.rpartition(".")[0]] = ours.rpartition(".")[0]
    for table in (layers, parameters):
        table |= {name.replace(".", "_"): ours for name, ours in table.items()}
    return layers, parameters


def _checked(name, key, x):
    """The tensor, if it holds numbers."""
    if not torch.is_tensor(x) or not (x.is_floating_point() or key.endswith((".alpha", ".reshape_weight"))):
        what = str(x.dtype) if torch.is_tensor(x) else type(x).__name__
        raise WeightsError(
            f"{name}: {quoted(key)} is {what}; expected floating numbers. Fetch the file again"
        )
    if not x.float().isfinite().all():
        raise WeightsError(f"{name}: {quoted(key)} has NaN or infinite values: the file is damaged")
    return x


def _refuse(adapter, kind, state, strangers):
    """Raise WeightsError for what is no adapter, not ours to apply, or for another model."""
    if strangers and not adapter.parts and not adapter.unmatched:
        raise WeightsError(
            f"{adapter.name} is no adapter: none of its {len(state)} tensors is a change to a weight; they "
            f"begin with {listed(sorted(map(str, strangers))[:3])}. A whole model is loaded with moddiff.load"
        )
    if strangers:
        raise WeightsError(
            f"{adapter.name} has {len(strangers)} tensors that nobody here can read, such as "
            f"{listed(strangers, 3)}: expected LoRA, DoRA, LoHa, LoKr or .diff. Leaving them out would give "
            "another adapter than was trained"
        )
    if any(family == "reshape" for parts in adapter.parts.values() for family, _ in parts):
        raise WeightsError(
            f"{adapter.name} widens a layer (reshape_weight): it is made for a control model, which is not "
            "among the models here"
        )
    if not adapter.parts:
        raise WeightsError(
            f"none of the {len(adapter.unmatched)} layers in {adapter.name} is one of this {kind}'s; they "
            f"begin with {listed(adapter.unmatched, 3)}. Was it trained for another model"
            + ("?" if kind == "text" else ", or for the text encoder, as in adapted(pipe.text, ...)?")
        )


def _alphas(adapter, where):
    """Fill in each layer's alpha: its own tensor, or else what Diffusers and PEFT say of the whole file."""
    said = said_beside(where)
    # Diffusers' own names: its exporters multiply alpha into lora_B, so that none is missing.
    adapter.folded = said is not None or all("transformer." in key for key in adapter.keys.values())
    for ours, parts in adapter.parts.items():
        own = parts.pop(("alpha", "alpha"), None)
        if own is not None:
            if own.numel() != 1:
                raise WeightsError(
                    f"{adapter.name}: alpha of {ours} is {list(own.shape)}; expected one number"
                )
            adapter.alphas[ours] = float(own)
        elif said is not None and ("lora", "down") in parts:
            rank = parts["lora", "down"].shape[0]
            adapter.alphas[ours] = alpha_of(said, adapter.keys[ours], rank)


@dataclass
class Planned:
    """What one file does to one layer: a change to its weight, an addition to its bias, DoRA's lengths."""

    layer: str
    change: object = None
    bias: torch.Tensor | None = None
    magnitude: torch.Tensor | None = None


def plan(adapter, shapes):
    """The changes of a file, each seen to fit its layer.

    shapes  {our parameter: its shape}
    ->      [Planned]

    Raises WeightsError with every complaint at once.
    """
    planned, complaints = [], []
    for ours, parts in adapter.parts.items():
        shape = tuple(shapes.get(f"{ours}.weight", shapes.get(ours, ())))
        try:
            planned += _planned(ours, parts, shape, shapes.get(f"{ours}.bias"), adapter.alphas.get(ours))
        except ValueError as error:
            complaints.append(f"- {quoted(adapter.keys[ours])}: {error}; {ours} has a weight {list(shape)}")
    if complaints:
        raise WeightsError(
            f"{adapter.name} does not fit ({len(complaints)} of {len(adapter.parts)} layers):\n"
            + "\n".join(complaints[:6])
            + "\nIs it an adapter of a model of this size, and whole?"
        )
    return planned


def _planned(ours, parts, shape, bias_shape, alpha):
    """One Planned for each family that a file has for a layer, nearly always one."""
    families = {family: {} for family, _ in parts}
    for (family, part), x in parts.items():
        families[family][part] = x
    magnitude = families.pop("dora", {}).get("magnitude")
    biases = families.pop("bias", {})
    if "modulation" in families:  # a parameter of its own in a block, changed like any weight
        families["full"] = families.pop("modulation")
    if "set" in families:
        raise ValueError("a whole new weight (set_weight), which is no change to the one there is")
    changes = [change_for(family, tensors, shape, alpha) for family, tensors in families.items()]
    if not changes and (magnitude is not None or not biases):
        raise ValueError("an alpha or lengths, and no change that they belong to")
    # PEFT's bias is that of `up`, so alpha / rank is on it, too; a .diff_b is added as it is.
    bias = sum(
        (changes[0].scale if part == "scaled" and changes else 1.0) * x.float() for part, x in biases.items()
    )
    if biases and (bias_shape is None or tuple(bias.shape) != tuple(bias_shape)):
        there = "none" if bias_shape is None else list(bias_shape)
        raise ValueError(f"a change to the bias, {list(bias.shape)}, where the bias is {there}")
    planned = [Planned(ours, change) for change in changes] or [Planned(ours)]
    planned[0].bias, planned[0].magnitude = bias if biases else None, magnitude
    return planned


# ---- writing --------------------------------------------------------------------------------------------

# Style -> before a dit's layers, before the text encoder's, and what the two halves are called.
WRITTEN = {
    "official": ("diffusion_model.", "text_encoders.umt5xxl.transformer.", "lora_A", "lora_B"),
    "diffusers": ("transformer.", "text_encoder.", "lora_A", "lora_B"),
    "kohya": ("lora_unet_", "lora_te_", "lora_down", "lora_up"),
}


def spelt(kind, config, changes, style):
    """LoRAs as a file has them.

    changes  {our layer: LoRA};  style: a key of WRITTEN
    ->       {key: tensor}. Diffusers knows no alpha: there it is multiplied into lora_B
    """
    # transformers' names are the ones that adapters of the text encoder have in all three.
    naming = "diffusers" if style == "diffusers" or kind == "text" else "official"
    table = counterparts(kind, config, [f"{layer}.weight" for layer in changes], naming)
    before, down, up = WRITTEN[style][kind == "text"], *WRITTEN[style][2:]
    state = {}
    for layer, change in changes.items():
        there = table[f"{layer}.weight"].names[0].removesuffix(".weight")
        there = before + (there.replace(".", "_") if style == "kohya" else there)
        halves = change.down.detach(), change.up.detach()
        if style == "diffusers":
            halves = halves[0], change.scale * halves[1]
        else:
            alpha = change.rank if change.alpha is None else change.alpha
            state[f"{there}.alpha"] = torch.tensor(float(alpha))
        state[f"{there}.{down}.weight"], state[f"{there}.{up}.weight"] = (x.contiguous() for x in halves)
    return state
