"""What do Diffusers and transformers call our config fields?  Their config.json, as fields of our own.

What their files say about things that are fixed in Wan is compared, never ignored.
"""

from .fields import check_value, differs, refuse_unknown

# Field there -> field here, which then has the type that ours has. A type instead: it is used below, to
# derive a field of ours. None: it says what is fixed in Wan, and is only compared.
FIELDS = {
    "dit": {
        "patch_size": "patch_size",
        "num_attention_heads": "num_heads",
        "attention_head_dim": int,
        "in_channels": "in_dim",
        "out_channels": "out_dim",
        "text_dim": "text_dim",
        "freq_dim": "freq_dim",
        "ffn_dim": "ffn_dim",
        "num_layers": "num_layers",
        "cross_attn_norm": "cross_attn_norm",
        "qk_norm": None,
        "eps": "eps",
        "image_dim": int | None,
        "added_kv_proj_dim": int | None,
        "rope_max_seq_len": None,
        "pos_embed_seq_len": None,
        "vace_layers": "vace_layers",
        "vace_in_channels": "vace_in_dim",
    },
    "text": {
        "vocab_size": "vocab",
        "d_model": "dim",
        "d_kv": int,
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
        "intermediate_size": int,
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
        "is_residual": bool,
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

# What is the same in all Wan models: the values a field may have, and why. A field that is not there has the
# first.
FIXED = {
    "dit": {
        "qk_norm": (["rms_norm_across_heads"], "Wan normalises q and k over all heads at once"),
        "rope_max_seq_len": ([1024], "Wan's rotary tables have 1024 positions an axis"),
        "pos_embed_seq_len": ([None, 514], "two pictures of 257 tokens, first and last frame"),
    },
    "text": {
        "model_type": (
            ["umt5"],
            "plain T5 shares one relative bias among all layers, Wan's UMT5 has one per layer",
        ),
        "feed_forward_proj": (["gated-gelu"], "Wan's text encoder has a gated tanh-GELU"),
    },
    "image": {"num_channels": ([3], "the vision tower reads colour pictures")},
    "vae": {},
}
# transformers writes much that is about other models or about training; these change nothing in an encoder.
IRRELEVANT = set(
    "architectures attention_dropout bos_token_id chunk_size_feed_forward classifier_dropout "
    "decoder_start_token_id dense_act_fn dropout dropout_rate dtype eos_token_id id2label initializer_factor "
    "initializer_range is_decoder is_encoder_decoder is_gated_act label2id model_type num_decoder_layers "
    "output_attentions output_hidden_states output_past pad_token_id problem_type return_dict "
    "scalable_attention tie_word_embeddings tokenizer_class torch_dtype transformers_version "
    "use_cache".split()
)


def from_diffusers(kind, raw, types):
    """The fields of a Diffusers or transformers config.json as ours.

    raw     {their field: value}
    types   {our field: its type}
    ->      {our field: value}

    Raises ValueError for a field that is unknown, of another type, or says what no Wan model has.
    """
    table = FIELDS[kind]
    for name, (expected, why) in FIXED[kind].items():
        _same(kind, name, raw.get(name, expected[0]), expected, why)
    raw = {name: value for name, value in raw.items() if name in table or name not in IRRELEVANT}
    refuse_unknown(kind, raw, table)
    for name, value in raw.items():
        wanted = types[table[name]] if isinstance(table[name], str) else table[name]
        if wanted is not None:
            check_value(kind, name, value, wanted)
    fields = {table[name]: value for name, value in raw.items() if isinstance(table[name], str)}
    if kind == "dit":
        return fields | _derive_dit(raw)
    if kind == "text":
        return fields | {"dim_attn": _needed(kind, raw, "d_kv") * _needed(kind, raw, "num_heads")}
    if kind == "image":
        ratio = _needed(kind, raw, "intermediate_size") / raw["hidden_size"]
        return {"out_dim": 512} | fields | {"mlp_ratio": int(ratio) if ratio == int(ratio) else ratio}
    return _derive_vae(raw, fields)


def _derive_dit(raw):
    """The width, the kind of model, and whether it reads CLIP features."""
    dim = raw["num_attention_heads"] * _needed("dit", raw, "attention_head_dim")
    image_dim, image_keys = raw.get("image_dim"), raw.get("added_kv_proj_dim")
    _same("dit", "added_kv_proj_dim", image_keys, [None, dim], "image keys and values have the model's width")
    if (image_dim is None) != (image_keys is None):
        raise ValueError(
            f"the dit config contradicts itself: image_dim = {image_dim} but added_kv_proj_dim = "
            f"{image_keys}; a model has both (Wan 2.1 image-to-video) or neither"
        )
    channels, out = raw.get("in_channels"), raw.get("out_channels")
    if raw.get("vace_layers"):
        task = "vace"
    elif raw.get("pos_embed_seq_len"):
        task = "flf2v"
    elif image_dim or channels != out:
        task = "i2v"
    else:
        task = "ti2v" if channels == 48 else "t2v"
    return {"dim": dim, "image_dim": image_dim, "model_type": task}


def _derive_vae(raw, fields):
    """2.1 or 2.2 (`is_residual`), and that all else follows from it."""
    residual, base, decoder = raw.get("is_residual", False), raw["base_dim"], raw.get("decoder_base_dim")
    if residual:
        fields["dec_dim"] = decoder or base
    elif decoder not in (None, base):
        raise ValueError(
            f"the vae config contradicts itself: decoder_base_dim = {decoder} differs from base_dim = "
            f"{base}, which only the 2.2 autoencoder allows (is_residual = true)"
        )
    else:
        fields.pop("dec_dim", None)
    patch = 2 if residual else 1  # the 2.2 form begins by folding 2 x 2 pixels into channels
    colours, why = 3 * patch**2, f"patches of {patch} x {patch} colour pixels"
    frames = 2 ** sum(raw.get("temperal_downsample", (0, 1, 1)))
    pixels = 2 ** (len(raw.get("dim_mult", (1, 2, 4, 4))) - 1) * patch
    follows = {
        "patch_size": ([patch] if residual else [None, 1], f"is_residual = {residual}"),
        "in_channels": ([colours], why),
        "out_channels": ([colours], why),
        "scale_factor_temporal": ([frames, None], "it follows from temperal_downsample"),
        "scale_factor_spatial": ([pixels, None], "it follows from dim_mult and patch_size"),
    }
    for name, (expected, reason) in follows.items():
        # Only the patch size must be said: without it a 2.2 config is no 2.2 config.
        value = raw.get(name, None if name == "patch_size" else expected[0])
        _same("vae", name, value, expected, reason)
    return fields


def _needed(kind, raw, name):
    if name not in raw:
        raise ValueError(
            f"the {kind} config has {MARK[kind]} but lacks {name}; the model's widths follow from both. "
            "Take the config.json that came with the weights"
        )
    return raw[name]


def _same(kind, name, value, expected, why):
    if value not in expected:
        raise differs(kind, name, value, f"{' or '.join(map(repr, expected))}: {why}")
