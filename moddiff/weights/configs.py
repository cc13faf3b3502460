"""What do these config fields mean?  One dictionary from a checkpoint, in any of three dialects, to a component's own config.

The dialects: ours (the fields of the config dataclasses, which are the official ones), the official `config.json`
(which leaves out whatever all Wan models share), and the `config.json` of Diffusers and transformers.
"""

import dataclasses
from difflib import get_close_matches

import torch
from torch.overrides import TorchFunctionMode

from ..dit import DiT, DiTConfig
from ..image import ImageConfig, ImageEncoder
from ..text import TextConfig, TextEncoder
from ..vace import VaceDiT
from ..vae import VAE, VAEConfig

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

# Field there -> field here. A field that is missing on the right side of these tables is derived below.
DIFFUSERS = {
    "dit": {
        "patch_size": "patch_size",
        "num_attention_heads": "num_heads",
        "attention_head_dim": None,
        "in_channels": "in_dim",
        "out_channels": "out_dim",
        "text_dim": "text_dim",
        "freq_dim": "freq_dim",
        "ffn_dim": "ffn_dim",
        "num_layers": "num_layers",
        "cross_attn_norm": "cross_attn_norm",
        "qk_norm": None,
        "eps": "eps",
        "image_dim": None,
        "added_kv_proj_dim": None,
        "rope_max_seq_len": None,
        "pos_embed_seq_len": None,
        "vace_layers": "vace_layers",
        "vace_in_channels": "vace_in_dim",
    },
    "text": {
        "vocab_size": "vocab",
        "d_model": "dim",
        "d_kv": None,
        "d_ff": "dim_ffn",
        "num_heads": "num_heads",
        "num_layers": "num_layers",
        "relative_attention_num_buckets": "num_buckets",
        "relative_attention_max_distance": "max_dist",
        "layer_norm_epsilon": "eps",
        "feed_forward_proj": None,
    },
    "image": {
        "hidden_size": "dim",
        "intermediate_size": None,
        "projection_dim": "out_dim",
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "image_size": "image_size",
        "patch_size": "patch_size",
        "hidden_act": "activation",
        "layer_norm_eps": "norm_eps",
        "num_channels": None,
    },
    "vae": {
        "base_dim": "dim",
        "decoder_base_dim": "dec_dim",
        "z_dim": "z_dim",
        "dim_mult": "dim_mult",
        "num_res_blocks": "num_res_blocks",
        "attn_scales": "attn_scales",
        "temperal_downsample": "temperal_downsample",
        "latents_mean": "mean",
        "latents_std": "std",
        "is_residual": None,
        "dropout": None,
        "in_channels": None,
        "out_channels": None,
        "patch_size": None,
        "scale_factor_temporal": None,
        "scale_factor_spatial": None,
        "clip_output": None,
    },
}
# A field that only the Diffusers or transformers dialect has tells it apart.
MARK = {"dit": "num_attention_heads", "text": "d_model", "image": "hidden_size", "vae": "base_dim"}

# transformers writes much that is about other models or about training; these change nothing in an encoder.
IRRELEVANT = set(
    "architectures attention_dropout bos_token_id chunk_size_feed_forward classifier_dropout decoder_start_token_id dense_act_fn dropout "
    "dropout_rate dtype eos_token_id id2label initializer_factor initializer_range is_decoder is_encoder_decoder is_gated_act label2id "
    "model_type num_decoder_layers output_attentions output_hidden_states output_past pad_token_id problem_type return_dict scalable_attention "
    "tie_word_embeddings tokenizer_class torch_dtype transformers_version use_cache".split()
)

CLIP_DIM = 1280
# Names that only a DiT with image tokens has, in any naming.
IMAGE_NAMES = ("img_emb.", "image_embedder.", "image_mlp.")


def read(kind, raw, names=()):
    """The config of one component, from a dictionary in any dialect.

    kind    "dit", "text", "image" or "vae"
    raw     dict, or the config dataclass itself
    names   parameter names of the weights, if known: they settle whether an i2v DiT has image tokens (Wan 2.1) or not (2.2)
    ->      DiTConfig, TextConfig, ImageConfig or VAEConfig

    Raises ValueError for an unknown kind, and for unknown, missing or contradictory fields.
    """
    if kind not in MODULES:
        raise ValueError(f"kind is {kind!r}; expected one of {', '.join(MODULES)}")
    config_class = MODULES[kind][1]
    if isinstance(raw, config_class):
        return raw
    if not isinstance(raw, dict):
        raise TypeError(
            f"the {kind} config is a {type(raw).__name__}; expected a dict such as json.load(open('config.json')) gives"
        )
    fields = dict(
        raw["vision_config"] if kind == "image" and isinstance(raw.get("vision_config"), dict) else raw
    )
    foreign = MARK[kind] in fields
    if foreign:
        fields = _from_diffusers(kind, fields)
    else:
        fields = {name: value for name, value in fields.items() if not name.startswith("_")}
    if kind == "dit":
        fields = _complete_dit(fields, names, foreign)
    known = {field.name: field for field in dataclasses.fields(config_class)}
    _refuse_unknown(kind, fields, known)
    needed = [
        name
        for name, field in known.items()
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    missing = [name for name in needed if name not in fields]
    if missing:
        raise ValueError(
            f"the {kind} config lacks {', '.join(missing)}; it has {', '.join(sorted(fields)) or 'nothing'}. "
            "Take the config.json that came with the weights, or a preset's config"
        )
    _check_sizes(kind, fields)
    return config_class(
        **{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    )


class NoInit(TorchFunctionMode):
    """Leave random initialisation out, because weights are about to be put in.

    On the meta device it would cost more than time for nothing: `normal_` and `randn` import 800 modules of torch there.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(function, "__name__", "")
        if name in ("normal_", "uniform_", "trunc_normal_", "kaiming_uniform_", "zeros_", "ones_"):
            return args[0] if args else kwargs["tensor"]
        if name in ("randn", "rand"):
            return torch.empty(*args, **kwargs)
        if name in ("__truediv__", "div", "true_divide", "__mul__", "mul") and isinstance(
            args[1], (int, float)
        ):
            return args[0]  # a random start, scaled
        return function(*args, **kwargs)


def module_for(kind, config):
    """The module that plays this kind, with fresh random weights."""
    if kind == "dit" and config.vace_layers:
        return VaceDiT(config)
    return MODULES[kind][0](config)


def empty(kind, config):
    """The module on the meta device: every name and shape, no memory."""
    with torch.device("meta"), NoInit():
        return module_for(kind, read(kind, config)).eval()


def _refuse_unknown(kind, fields, known):
    unknown = [name for name in fields if name not in known]
    if not unknown:
        return
    hints = [
        f"{name!r}" + (f" (did you mean {near[0]!r}?)" if (near := get_close_matches(name, known, 1)) else "")
        for name in unknown
    ]
    raise ValueError(
        f"the {kind} config has an unknown field: {', '.join(hints)}. Known fields: {', '.join(known)}. "
        "Remove or rename it; a field that is not understood is never ignored"
    )


def _check_sizes(kind, fields):
    for name, value in fields.items():
        if isinstance(value, int) and not isinstance(value, bool) and value < 1:
            raise ValueError(f"the {kind} config says {name} = {value}; expected a positive number")


def _complete_dit(fields, names, foreign):
    """Fill in what all Wan DiTs share, derive what only the weights know, and refuse what contradicts itself."""
    if tuple(fields.pop("window_size", None) or (-1, -1)) != (-1, -1):
        raise ValueError(
            "the dit config has a local attention window; every Wan model attends globally: window_size is (-1, -1)"
        )
    fields = COMMON | fields
    kind = fields.get("model_type")
    if kind not in ("t2v", "i2v", "flf2v", "ti2v", "vace", None):
        raise ValueError(f"the dit config says model_type = {kind!r}; expected t2v, i2v, flf2v, ti2v or vace")
    if fields["freq_dim"] % 2:
        raise ValueError(
            f"the dit config says freq_dim = {fields['freq_dim']}; expected an even number, half cosines and half sines"
        )
    if (
        kind in ("t2v", "ti2v", "vace")
        and {"in_dim", "out_dim"} <= fields.keys()
        and fields["in_dim"] != fields["out_dim"]
    ):
        raise ValueError(
            f"the dit config contradicts itself: a {kind} model reads what it writes, but in_dim = {fields['in_dim']} and "
            f"out_dim = {fields['out_dim']}. Was model_type = 'i2v' meant?"
        )
    if (
        kind in ("i2v", "flf2v")
        and {"in_dim", "out_dim"} <= fields.keys()
        and fields["in_dim"] <= fields["out_dim"]
    ):
        raise ValueError(
            f"the dit config contradicts itself: an {kind} model also reads a mask and the encoded image, so in_dim must be "
            f"larger than out_dim = {fields['out_dim']}, but it is {fields['in_dim']}"
        )
    if kind == "vace":
        fields["vace_layers"] = tuple(fields.get("vace_layers") or range(0, fields.get("num_layers", 0), 2))
        if list(fields["vace_layers"]) != sorted(set(fields["vace_layers"])):
            raise ValueError(
                f"the dit config contradicts itself: vace_layers = {list(fields['vace_layers'])} must rise, each block named "
                "once"
            )
    elif fields.get("vace_layers"):
        raise ValueError(
            f"the dit config contradicts itself: vace_layers belong to model_type = 'vace', but it says {kind!r}"
        )
    if kind in ("i2v", "flf2v") and not foreign:
        # Wan 2.1 and 2.2 call both models i2v; only the weights tell whether there is an image path.
        has_image = any(mark in name for name in names for mark in IMAGE_NAMES) if names else True
        fields.setdefault("image_dim", CLIP_DIM if has_image else None)
    return fields


def _same(kind, name, value, expected, why):
    if value not in expected:
        raise ValueError(
            f"the {kind} config says {name} = {value!r}; expected {' or '.join(map(repr, expected))}: {why}"
        )


def _from_diffusers(kind, raw):
    """The fields of a Diffusers or transformers config.json, by the tables above; what is fixed in Wan is checked, not ignored."""
    table = DIFFUSERS[kind]
    raw = {name: value for name, value in raw.items() if not name.startswith("_")}
    skip = IRRELEVANT if kind in ("text", "image") else set()
    _refuse_unknown(kind, [name for name in raw if name not in skip], table)
    fields = {table[name]: value for name, value in raw.items() if table.get(name)}
    derive = {
        "dit": _diffusers_dit,
        "text": _diffusers_text,
        "image": _diffusers_image,
        "vae": _diffusers_vae,
    }[kind]
    return derive(raw, fields)


def _diffusers_dit(raw, fields):
    if "attention_head_dim" not in raw:
        raise ValueError(
            "the dit config has num_attention_heads but lacks attention_head_dim; together they give the width"
        )
    fields["dim"] = raw["num_attention_heads"] * raw["attention_head_dim"]
    norm = "rms_norm_across_heads"
    _same("dit", "qk_norm", raw.get("qk_norm", norm), [norm], "Wan normalises q and k over all heads at once")
    _same(
        "dit",
        "rope_max_seq_len",
        raw.get("rope_max_seq_len", 1024),
        [1024],
        "Wan's rotary tables have 1024 places an axis",
    )
    _same(
        "dit",
        "added_kv_proj_dim",
        raw.get("added_kv_proj_dim"),
        [None, fields["dim"]],
        "image keys and values have the model's width",
    )
    image_dim, pairs = raw.get("image_dim"), raw.get("pos_embed_seq_len")
    _same("dit", "pos_embed_seq_len", pairs, [None, 514], "two pictures of 257 tokens, first and last frame")
    fields["image_dim"] = image_dim
    if (image_dim is None) != (raw.get("added_kv_proj_dim") is None):
        raise ValueError(
            f"the dit config contradicts itself: image_dim = {image_dim} but added_kv_proj_dim = {raw.get('added_kv_proj_dim')}; "
            "a model has both (Wan 2.1 image-to-video) or neither"
        )
    channels, out = raw.get("in_channels"), raw.get("out_channels")
    fields["model_type"] = (
        "vace"
        if raw.get("vace_layers")
        else "flf2v"
        if pairs
        else "i2v"
        if image_dim or channels != out
        else "ti2v"
        if channels == 48
        else "t2v"
    )
    return fields


def _diffusers_text(raw, fields):
    _same(
        "text",
        "model_type",
        raw.get("model_type", "umt5"),
        ["umt5"],
        "plain T5 shares one relative bias among all layers, Wan's UMT5 has one per layer",
    )
    _same(
        "text",
        "feed_forward_proj",
        raw.get("feed_forward_proj", "gated-gelu"),
        ["gated-gelu"],
        "Wan's text encoder has a gated tanh-GELU",
    )
    if "d_kv" not in raw or "num_heads" not in raw:
        raise ValueError(
            "the text config has d_model but lacks d_kv or num_heads; together they give the attention width"
        )
    return fields | {"dim_attn": raw["d_kv"] * raw["num_heads"]}


def _diffusers_image(raw, fields):
    _same("image", "num_channels", raw.get("num_channels", 3), [3], "the vision tower reads colour pictures")
    if "intermediate_size" not in raw:
        raise ValueError(
            "the image config has hidden_size but lacks intermediate_size, the width of the feed-forward layers"
        )
    ratio = raw["intermediate_size"] / raw["hidden_size"]
    return {"out_dim": 512} | fields | {"mlp_ratio": int(ratio) if ratio == int(ratio) else ratio}


def _diffusers_vae(raw, fields):
    residual, base, decoder = raw.get("is_residual", False), raw["base_dim"], raw.get("decoder_base_dim")
    if residual:
        fields["dec_dim"] = decoder or base
    elif decoder not in (None, base):
        raise ValueError(
            f"the vae config contradicts itself: decoder_base_dim = {decoder} differs from base_dim = {base}, which only the "
            "2.2 autoencoder allows (is_residual = true)"
        )
    else:
        fields.pop("dec_dim", None)
    patch = 2 if residual else 1
    _same(
        "vae",
        "patch_size",
        raw.get("patch_size"),
        [patch] if residual else [None, 1],
        f"is_residual = {residual}",
    )
    _same(
        "vae",
        "in_channels",
        raw.get("in_channels", 3 * patch**2),
        [3 * patch**2],
        f"patches of {patch} x {patch} colour pixels",
    )
    _same(
        "vae",
        "out_channels",
        raw.get("out_channels", 3 * patch**2),
        [3 * patch**2],
        f"patches of {patch} x {patch} colour pixels",
    )
    time, space = (
        2 ** sum(raw.get("temperal_downsample", (0, 1, 1))),
        2 ** (len(raw.get("dim_mult", (1, 2, 4, 4))) - 1) * patch,
    )
    _same(
        "vae",
        "scale_factor_temporal",
        raw.get("scale_factor_temporal", time),
        [time, None],
        "it follows from temperal_downsample",
    )
    _same(
        "vae",
        "scale_factor_spatial",
        raw.get("scale_factor_spatial", space),
        [space, None],
        "it follows from dim_mult and patch_size",
    )
    return fields
