"""What do these config fields mean?  One dictionary, in any of three dialects, to a component's own config.

The dialects: ours (the fields of the config dataclasses, which are the official ones), the official
`config.json` (which leaves out whatever all Wan models share), and the `config.json` of Diffusers and
transformers.
"""

from dataclasses import MISSING, fields

import torch
from torch.overrides import TorchFunctionMode

from ..dit import DiT, DiTConfig
from ..image import ImageConfig, ImageEncoder
from ..text import TextConfig, TextEncoder
from ..vae import VAE, VAEConfig
from .dialects import MARK, from_diffusers
from .fields import check_value, differs, refuse_unknown
from .foreign import OURS, cousin_by_config
from .quoting import quoted

MODULES = {
    "dit": (DiT, DiTConfig),
    "text": (TextEncoder, TextConfig),
    "image": (ImageEncoder, ImageConfig),
    "vae": (VAE, VAEConfig),
}

# What every Wan DiT has in common, and its config.json therefore does not say.
COMMON = {
    "patch_size": (1, 2, 2),
    "text_len": 512,
    "text_dim": 4096,
    "freq_dim": 256,
    "qk_norm": True,
    "cross_attn_norm": True,
    "eps": 1e-6,
}

TASKS = ("t2v", "i2v", "flf2v", "ti2v", "vace")
CLIP_DIM = 1280
# Names that only a DiT with image tokens has, in any naming.
IMAGE_NAMES = ("img_emb.", "image_embedder.", "image_mlp.")


def read(kind, raw, names=()):
    """The config of one component, from a dictionary in any dialect.

    kind    "dit", "text", "image" or "vae"
    raw     dict, or the config dataclass itself
    names   parameter names of the weights, if known: they settle whether an i2v DiT has image tokens (Wan
            2.1) or not (2.2)
    ->      DiTConfig, TextConfig, ImageConfig or VAEConfig

    Raises ValueError for an unknown kind, for unknown, missing or contradictory fields, and for relatives of
    Wan.
    """
    if kind not in MODULES:
        raise ValueError(f"kind is {kind!r}; expected one of {', '.join(MODULES)}")
    config_class = MODULES[kind][1]
    if isinstance(raw, config_class):
        return raw
    if not isinstance(raw, dict):
        raise TypeError(
            f"the {kind} config is a {type(raw).__name__}; expected a dict such as "
            "json.load(open('config.json')) gives"
        )
    # transformers may write one config for both towers of CLIP; that of the words is not used here.
    if kind == "image" and isinstance(raw.get("vision_config"), dict):
        raw = raw["vision_config"]
    _refuse_strangers(kind, raw)
    types = {field.name: field.type for field in fields(config_class)}
    # Diffusers' remarks about itself, such as _class_name and _diffusers_version.
    values = {name: value for name, value in raw.items() if not str(name).startswith("_")}
    if MARK[kind] in values:
        values = from_diffusers(kind, values, types)
    elif kind == "dit":
        values = _complete_official(values, names)
    if kind == "dit":
        # What a config says wins over what the family has in common.
        values = COMMON | values
    refuse_unknown(kind, values, types)
    _refuse_missing(kind, values, config_class)
    for name, value in values.items():
        check_value(kind, name, value, types[name])
    if kind == "dit":
        values = _refuse_contradictions(values)
    # JSON knows lists only; with tuples a config is equal to a preset's and can be the key of a cache.
    return config_class(**{name: tuple(x) if isinstance(x, list) else x for name, x in values.items()})


class NoInit(TorchFunctionMode):
    """Leave random initialisation out, because weights are about to be put in.

    On the meta device it would cost more than time for nothing: `normal_` and `randn` import 800 modules of
    torch there.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(function, "__name__", "")
        if name in ("normal_", "uniform_", "trunc_normal_", "kaiming_uniform_", "zeros_", "ones_"):
            return args[0] if args else kwargs["tensor"]
        if name in ("randn", "rand"):
            return torch.empty(*args, **kwargs)
        scales = name in ("__truediv__", "div", "true_divide", "__mul__", "mul")
        if scales and isinstance(args[1], int | float):
            return args[0]  # a random start, scaled
        return function(*args, **kwargs)


def empty(kind, config):
    """The module on the meta device: every name and shape, no memory."""
    with torch.device("meta"), NoInit():
        return MODULES[kind][0](read(kind, config)).eval()


def _refuse_strangers(kind, raw):
    """Raise ValueError for a config of quantized weights, and for a relative of Wan."""
    packing = raw.get("quantization_config")
    if packing is not None:
        method = packing.get("quant_method", "?") if isinstance(packing, dict) else "?"
        raise ValueError(
            f"the {kind} config describes quantized weights ({quoted(method)}): they are packed and cannot "
            "be loaded here; take the bf16 or fp32 release"
        )
    cousin = cousin_by_config(raw) if kind == "dit" else None
    if cousin:
        raise ValueError(f"the dit config is that of {cousin}, which is not among the models here. {OURS}")


def _refuse_missing(kind, values, config_class):
    """Raise ValueError when a field without a default is absent."""
    missing = [
        each.name for each in fields(config_class) if each.default is MISSING and each.name not in values
    ]
    if missing:
        raise ValueError(
            f"the {kind} config lacks {', '.join(missing)}; it has {', '.join(sorted(values)) or 'nothing'}. "
            "Take the config.json that came with the weights, or a preset's config"
        )


def _complete_official(values, names):
    """What an official config.json leaves to be known, and a word it has that says nothing."""
    window = values.pop("window_size", None)
    if window not in (None, [-1, -1], (-1, -1)):
        raise differs("dit", "window_size", window, "(-1, -1): every Wan model attends globally")
    if values.get("model_type") in ("i2v", "flf2v"):
        # Wan 2.1 and 2.2 call both models i2v; only the weights tell whether there is an image path.
        has_image = any(mark in name for name in names for mark in IMAGE_NAMES) if names else True
        values.setdefault("image_dim", CLIP_DIM if has_image else None)
    return values


def _refuse_contradictions(values):
    """The fields of a dit, VACE's layers filled in.   Raises ValueError where they contradict each other."""
    task, reads, writes = values["model_type"], values["in_dim"], values["out_dim"]
    if task not in TASKS:
        raise differs("dit", "model_type", task, f"{', '.join(TASKS[:-1])} or {TASKS[-1]}")
    if values["freq_dim"] % 2:
        raise differs("dit", "freq_dim", values["freq_dim"], "an even number, half cosines and half sines")
    sees_picture = task in ("i2v", "flf2v")
    # Beside the noise: the encoded picture, and a mask with a channel for each frame of a latent frame.
    with_picture = 2 * writes + 4
    if sees_picture and reads != with_picture:
        raise ValueError(
            f"the dit config says in_dim = {reads}; an {task} model reads {with_picture} channels: {writes} "
            f"of noise, 4 of mask, {writes} of the encoded picture. Wan-Fun control and camera models read "
            f"others. {OURS}"
        )
    if not sees_picture and reads != writes:
        # The channels of an i2v model under the word t2v: the word is more likely wrong than the number.
        confused = task == "t2v" and reads == with_picture
        guess = "Was model_type = 'i2v' meant?" if confused else f"Wan-Fun models read more. {OURS}"
        raise ValueError(
            f"the dit config contradicts itself: a {task} model reads what it writes, but in_dim = {reads} "
            f"and out_dim = {writes}. {guess}"
        )
    if not sees_picture and values.get("image_dim") is not None:
        raise differs("dit", "image_dim", values["image_dim"], f"None: a {task} model reads no CLIP features")
    layers = list(values.get("vace_layers", ()))
    if task == "vace":
        # Wan's own default, which its config.json may leave out: a hint after every second block.
        layers = layers or list(range(0, values["num_layers"], 2))
        if layers != sorted(set(layers)):
            raise differs("dit", "vace_layers", layers, "layers that rise, each block named once")
    elif layers:
        raise ValueError(
            "the dit config contradicts itself: vace_layers belong to model_type = 'vace', but it says "
            f"{task!r}"
        )
    return values | {"vace_layers": tuple(layers)}
