"""How large is the model in this file?  Kind, variant and every size, from names and shapes alone.

A few numbers leave no mark in any shape. They are what all of Wan has in common: heads of 128 channels in
the DiT, 512 rows of text, the distances of UMT5's bias, VACE's hints at equal steps.
"""

import re
from math import ceil, isqrt, prod

from . import configs, foreign
from .complaints import LAYER, WeightsError
from .names import PREFIXES, STYLES, counterpart_of, ignored, unwrapped
from .quoting import listed

HEAD = 128
# The vision tower of Wan is OpenCLIP's ViT-H, of which only the width is in the shapes.
CLIP_HEAD = 80
# Layers of a DiT, not of its VACE half.
BLOCK = re.compile(r"(?:^|\.)blocks\.(\d{1,4})\.")
# Fields of a config that leave no mark in any shape.
UNMARKED = {
    "dit": ("text_len", "eps"),
    "text": ("max_dist", "eps", "text_len"),
    "image": ("norm_eps",),
    "vae": ("dim_mult", "temperal_downsample", "mean", "std"),
}


class Sizes:
    """The shapes of a state, asked for by our names, whatever names it has."""

    def __init__(self, kind, state, like=None):
        self.kind, self.like = kind, like
        self.shapes = {}
        for name, x in state.items():
            name = unwrapped(name)
            if ignored(kind, name) is None:
                self.shapes[name] = tuple(x.shape)

    def of(self, ours):
        """The shape of one of our tensors as it is there; None where it is not."""
        for style in STYLES:
            for theirs in counterpart_of(self.kind, ours, style).names:
                for prefix in PREFIXES[self.kind]:
                    if prefix + theirs in self.shapes:
                        return self.shapes[prefix + theirs]
        return None

    def axis(self, ours, axis):
        """One axis of a tensor that has to be there."""
        shape = self.of(ours)
        if shape is None or len(shape) <= axis:
            raise WeightsError(
                f"the sizes of this {self.kind} cannot be told: {ours} "
                f"{'is not there' if shape is None else f'is {list(shape)}'}, under any name. Is the file "
                "whole? Else give config=, such as a preset's"
            )
        return shape[axis]

    def heads(self, dim, wide):
        """How many heads: as many as a known model of this width has, or `wide` channels each; else 0."""
        if self.like is not None and self.like.dim == dim:
            return self.like.num_heads
        return 0 if dim % wide else dim // wide

    def count(self, pattern):
        """One more than the highest number that a pattern finds in the names."""
        return 1 + max((int(found[1]) for name in self.shapes if (found := pattern.search(name))), default=-1)


def kind_of(names):
    """ "dit", "text", "image" or "vae".   Raises WeightsError for adapters, relatives of Wan, and the rest"""
    names = [unwrapped(name) for name in names]
    change = foreign.adapter(names)
    if change:
        raise WeightsError(
            f"these {len(names)} tensors are {change}: a change to a model, not a model. Load the model that "
            "it was trained on, and give it this: moddiff.extensions.adapted(pipe.dit, file)"
        )
    cousin = foreign.cousin_by_names(names)
    if cousin:
        raise WeightsError(
            f"these weights are those of {cousin}, which is not among the models here. {foreign.OURS}"
        )
    kind = foreign.looks_like(names)
    if kind is None:
        raise WeightsError(
            f"none of the {len(names)} names is one of Wan's; they begin with "
            f"{listed(sorted(names)[:3]) or 'nothing'}. Expected the weights of a dit, a text encoder "
            "(UMT5), an image encoder (CLIP) or a vae"
        )
    return kind


def sizes(state, like=(), kind=None):
    """(kind, config) of the component that a state is.

    state   {name: anything with a shape}, under any names
    like    configs of a model that this is a part of: they say what leaves no mark in a shape
    kind    which component, of a state that holds several; None: told by the names
    ->      "dit", "text", "image" or "vae", and its config dataclass

    Raises WeightsError for what is no component of Wan, or lacks what its sizes are told by; ValueError for
    sizes that no model here has.
    """
    kind = kind or kind_of(state)
    model = next((config for config in like if isinstance(config, configs.MODULES[kind][1])), None)
    fields = {"dit": dit, "text": text, "image": image, "vae": vae}[kind](Sizes(kind, state, model))
    # A vae of other latents has other statistics too.
    if model is not None and (kind != "vae" or model.z_dim == fields["z_dim"]):
        fields |= {name: getattr(model, name) for name in UNMARKED[kind]}
    return kind, configs.read(kind, fields, state)


def dit(sizes):
    dim, reads, *patch = (sizes.axis("patch_embedding.weight", i) for i in range(5))
    heads = sizes.heads(dim, HEAD)
    if not heads:
        raise WeightsError(
            f"this dit is {dim} wide, and how many heads it has is in no shape: Wan's have {HEAD} channels "
            f"each, which {dim} is no multiple of. Give its config: load_component(file, 'dit', config), "
            "or --config FILE on the command line"
        )
    writes = sizes.axis("final.linear.weight", 0) // prod(patch)
    layers, hints = sizes.count(BLOCK), sizes.of("vace_patch_embedding.weight")
    picture = sizes.of("image_mlp.norm_in.weight")
    fields = {
        "model_type": _task(sizes, reads, writes),
        "patch_size": patch,
        "in_dim": reads,
        "dim": dim,
        "ffn_dim": sizes.axis("blocks.0.ffn.0.weight", 0),
        "freq_dim": sizes.axis("time_mlp.0.weight", 1),
        "text_dim": sizes.axis("text_mlp.0.weight", 1),
        "out_dim": writes,
        "num_heads": heads,
        "num_layers": layers,
        "image_dim": picture and picture[0],
        "qk_norm": sizes.of("blocks.0.self_attn.norm_q.weight") is not None,
        "cross_attn_norm": sizes.of("blocks.0.norm_cross.weight") is not None,
    }
    if hints is not None:
        count = sizes.count(re.compile(r"(?:^|\.)vace_blocks\.(\d{1,4})\."))
        steps = range(0, layers, ceil(layers / max(1, count)))
        if len(steps) != count:
            raise WeightsError(
                f"this dit has {layers} layers and {count} for VACE, and which take hints is in no shape: "
                f"equal steps would make {len(steps)}. Give its config: load_component(file, 'dit', config), "
                "or --config FILE on the command line"
            )
        fields |= {"vace_layers": list(steps), "vace_in_dim": hints[1]}
    return fields


def _task(sizes, reads, writes):
    """Which kind of video model it is."""
    if sizes.of("vace_patch_embedding.weight") is not None:
        return "vace"
    if sizes.of("image_mlp.position") is not None:
        return "flf2v"
    if reads != writes:  # `configs` says what is wrong where they differ by anything but picture and mask
        return "i2v"
    return "ti2v" if writes == 48 else "t2v"


def text(sizes):
    layers = sizes.count(LAYER)
    if layers > 1 and sizes.of("layers.1.attn.relative_bias.weight") is None:
        raise WeightsError(
            "this text encoder has one relative bias for all its layers: a T5; Wan's is UMT5, with one a "
            "layer. Take umt5-xxl"
        )
    return {
        "vocab": sizes.axis("token_embedding.weight", 0),
        "dim": sizes.axis("token_embedding.weight", 1),
        "dim_attn": sizes.axis("layers.0.attn.q.weight", 0),
        "dim_ffn": sizes.axis("layers.0.ffn.up.weight", 0),
        "num_heads": sizes.axis("layers.0.attn.relative_bias.weight", 1),
        "num_layers": layers,
        "num_buckets": sizes.axis("layers.0.attn.relative_bias.weight", 0),
    }


def image(sizes):
    dim, patch = sizes.axis("patch_embedding.weight", 0), sizes.axis("patch_embedding.weight", 2)
    heads = sizes.heads(dim, CLIP_HEAD)
    if not heads:
        raise WeightsError(
            f"this image encoder is {dim} wide, and how many heads it has is in no shape; Wan's (ViT-H) is "
            "1280 wide. Give its config: preset('wan2.1-i2v-14b-480p')['image'] or its like"
        )
    # One row a patch and one for the class token, with an axis for the batch in front in some files.
    rows = sizes.of("position_embedding")[-2]
    wide, head = sizes.axis("layers.0.ffn.up.weight", 0), sizes.of("head")
    # transformers turns this one, so the other axis is the model's width.
    out = next((size for size in head if size != dim), dim) if head else 1024
    return {
        "image_size": patch * isqrt(rows - 1),
        "patch_size": patch,
        "dim": dim,
        "mlp_ratio": wide // dim if wide % dim == 0 else wide / dim,
        "out_dim": out,
        "num_heads": heads,
        "num_layers": sizes.count(LAYER),
    }


def vae(sizes):
    second = sizes.axis("encoder.conv1.weight", 1) > 3  # the 2.2 form begins by folding pixels
    dim, stages = sizes.axis("encoder.conv1.weight", 0), 4
    # 2.1 numbers on through its stages, with a resampling between; 2.2 begins anew in each.
    side = r"(?:^|\.)encoder\.(?:downsamples|down_blocks)\."
    inner = re.compile(side + (r"0\.(?:downsamples|resnets)\.(\d{1,4})\." if second else r"(\d{1,4})\."))
    found = sizes.count(inner)
    has_down = any(re.search(side + r"0\.downsamples\.\d+\.resample", name) for name in sizes.shapes)
    fields = {
        "dim": dim,
        "z_dim": sizes.axis("conv2.weight", 0),
        "num_res_blocks": found - has_down if second else (found - stages + 1) // stages,
    }
    if second:
        fields["dec_dim"] = sizes.axis("decoder.conv1.weight", 0) // 4
    return fields
