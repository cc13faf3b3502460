"""What is this, if not a model of ours?  Archives, adapters, quantized weights, cousins of Wan, by name.

A file is known by its first bytes, a state by the names of its tensors, a model by its config; never by a
file's name.
"""

import re

from .quoting import quoted

# The first bytes of what is found under names that end in .safetensors or .pth.
BEGINNINGS = (
    (b"\x1f\x8b", "is a gzip archive; unpack it first"),
    (b"\x28\xb5\x2f\xfd", "is a zstandard archive; unpack it first"),
    (b"7z\xbc\xaf", "is a 7z archive; unpack it first"),
    (b"Rar!", "is a rar archive; unpack it first"),
    (b"\x89HDF", "is an HDF5 file; take the safetensors form of these weights"),
    (b"\x93NUMPY", "is a NumPy array; take the safetensors form of these weights"),
)

# What a file of changes to a model is called, by endings that only its tensors have. The first that is met
# counts.
ADAPTERS = (
    ("LoKr", r"\.lokr_(w1|w2|t2)"),
    ("LoHa", r"\.hada_(w1|w2|t1|t2)"),
    ("DoRA", r"\.dora_scale|lora_magnitude_vector"),
    ("LoRA", r"\.lora_(A|B|down|up|mid)\b|_lora\.(down|up)\b|\.lora\.(down|up)\b|lora_linear_layer"),
    ("OFT", r"\.oft_(blocks|diag)"),
    ("set of weight differences", r"\.diff(_b|_m)?$|\.set_weight$"),
)
# Who spells an adapter's names so.
TRAINERS = (
    ("lora_unet__", "VideoX-Fun"),
    ("lora_unet_", "kohya"),
    ("lycoris_", "LyCORIS"),
    ("base_model.model.", "PEFT"),
    ("transformer.", "Diffusers"),
    ("diffusion_model.", "ComfyUI"),
    ("pipe.dit.", "DiffSynth"),
)

# Tensors that a file of quantized weights has beside them.
QUANTIZED = re.compile(
    r"scale_weight|weight_scale|scale_input|input_scale|scaled_fp8|comfy_quant"
    r"|\.(absmax|quant_map|nested_absmax)$"
    r"|\.quant_state\.|\.(qweight|qzeros|SCB|weight_format)$"
)

# Relatives of Wan that are not among our models: by tensors only they have ...
COUSIN_TENSORS = (
    (r"control_adapter\.", "a Wan-Fun camera model"),
    (r"ref_conv\.", "a Wan-Fun control model"),
    (r"casual_audio_encoder\.|audio_injector\.", "Wan S2V, which follows speech"),
    (
        r"face_adapter\.|motion_encoder\.|pose_patch_embedding\.",
        "Wan Animate, which follows a face and a pose",
    ),
    (r"audio_proj\.", "HuMo, which follows speech"),
    (r"fps_(embedding|projection)\.", "SkyReels"),
)
# ... and by words of their config.json: fields, class names and model types.
COUSIN_FIELDS = {
    "add_ref_conv": "a Wan-Fun control model",
    "in_dim_ref_conv": "a Wan-Fun control model",
    "add_control_adapter": "a Wan-Fun camera model",
    "in_dim_control_adapter": "a Wan-Fun camera model",
    "audio_inject_layers": "Wan S2V, which follows speech",
    "audio_dim": "Wan S2V, which follows speech",
    "motion_encoder_dim": "Wan Animate, which follows a face and a pose",
    "inject_sample_info": "SkyReels",
}
COUSIN_CLASSES = {
    "animate": "Wan Animate, which follows a face and a pose",
    "s2v": "Wan S2V, which follows speech",
    "skyreels": "SkyReels",
    "chronoedit": "ChronoEdit",
    "humo": "HuMo, which follows speech",
}
OURS = "Ours are text, image, first-and-last-frame and text-or-image to video, and VACE"

# A few words that only one kind of component has in its names.
FINGERPRINTS = {
    "dit": ("self_attn.norm_q", "attn1.norm_q", "scale_shift_table", "time_mlp."),
    "text": ("relative_attention_bias", "relative_bias", "pos_embedding.embedding"),
    "image": ("attn.to_qkv", "attn.qkv", "layer_norm1", "cls_embedding"),
    "vae": ("encoder.downsamples", "encoder.down_blocks", "decoder.upsamples"),
}


def not_weights(head):
    """What a file is that begins so and holds no tensors, with the cure; None for what may be weights.

    head  its first bytes, a few hundred; b"" for an empty file
    """
    if not head:
        return "is empty. Fetch it again"
    if not head.strip(b"\0"):
        return "begins with zeros: its place was reserved, but the download did not come. Fetch it again"
    if head.startswith(b"version https://git-lfs"):
        return (
            "is a Git LFS pointer, not the weights: a note of where they are. Fetch it again with git-lfs "
            "installed (git lfs pull), or with hf download"
        )
    if re.match(rb"\s*<(!doctype|html|\?xml)", head, re.IGNORECASE):
        return "is a web page, not the weights: perhaps one that asks you to sign in. Fetch it again"
    for beginning, what in BEGINNINGS:
        if head.startswith(beginning):
            return what
    if all(32 <= byte < 127 or byte in b"\t\r\n" for byte in head):
        return f"is text, not weights: it begins with {quoted(head[:40].decode())!r}. Fetch it again"
    return None


def adapter(names):
    """What kind of adapter most of these tensors are, in words; None for a model."""
    marks = re.compile("|".join(pattern for _, pattern in ADAPTERS) + r"|\.alpha$")
    changes = [name for name in names if marks.search(name)]
    if 2 * len(changes) <= len(names):
        return None
    kinds = [what for what, pattern in ADAPTERS if any(re.search(pattern, name) for name in changes)]
    trainers = [trainer for start, trainer in TRAINERS if changes[0].startswith(start)]
    spelling = f" with names as {trainers[0]} spells them" if trainers else ""
    return f"a {kinds[0] if kinds else 'LoRA'}{spelling}"


def cousin_by_names(names):
    """Which relative of Wan a transformer's tensors belong to, in words; None for ours."""
    marks = ((re.compile(rf"(?:^|\.)(?:{pattern})"), what) for pattern, what in COUSIN_TENSORS)
    return next((what for mark, what in marks if any(map(mark.search, names))), None)


def cousin_by_config(fields):
    """Which relative of Wan a transformer's config.json describes, in words; None for ours."""
    words = f"{fields.get('_class_name', '')} {fields.get('model_type', '')}".lower()
    cousins = [what for name, what in COUSIN_FIELDS.items() if name in fields]
    cousins += [what for mark, what in COUSIN_CLASSES.items() if mark in words]
    return cousins[0] if cousins else None


def quantized(names):
    """The names of tensors that only a file of quantized weights has."""
    return [name for name in names if QUANTIZED.search(name)]


def looks_like(names):
    """ "dit", "text", "image" or "vae": which kind of component has such names; None when none has."""
    joined = "\n".join(names)
    return next((kind for kind, marks in FINGERPRINTS.items() if any(mark in joined for mark in marks)), None)
