"""What is this tensor called elsewhere?  Our names beside the official and the Diffusers ones, as tables.

One row per tensor (or pair of weight and bias): ours, official, Diffusers. The cells use these signs:

    #           any number; where there are several, the first is the first in every cell
    *           each part of a residual block, as in RESIDUAL
    {q,k,v}     several tensors there, stacked row block by row block into one of ours
    name[0,0]   the same tensor there without its leading axes of length one
    name.T      transposed there
    a|b         one tensor under two names; either is enough when reading, both are written
    ?           (at the end) may be absent: the tensor is never used by Wan
"""

import re
from dataclasses import dataclass

import torch

KINDS = ("text", "image", "dit", "vae")
STYLES = ("ours", "official", "diffusers")

# Within blocks and vace_blocks, which have the same name in all three.
BLOCK = """
    #.modulation             #.modulation             #.scale_shift_table
    #.self_attn.q            #.self_attn.q            #.attn1.to_q
    #.self_attn.k            #.self_attn.k            #.attn1.to_k
    #.self_attn.v            #.self_attn.v            #.attn1.to_v
    #.self_attn.out          #.self_attn.o            #.attn1.to_out.0
    #.self_attn.norm_q       #.self_attn.norm_q       #.attn1.norm_q
    #.self_attn.norm_k       #.self_attn.norm_k       #.attn1.norm_k
    #.norm_cross             #.norm3                  #.norm2
    #.cross_attn.q           #.cross_attn.q           #.attn2.to_q
    #.cross_attn.k           #.cross_attn.k           #.attn2.to_k
    #.cross_attn.v           #.cross_attn.v           #.attn2.to_v
    #.cross_attn.out         #.cross_attn.o           #.attn2.to_out.0
    #.cross_attn.norm_q      #.cross_attn.norm_q      #.attn2.norm_q
    #.cross_attn.norm_k      #.cross_attn.norm_k      #.attn2.norm_k
    #.cross_attn.image_k     #.cross_attn.k_img       #.attn2.add_k_proj
    #.cross_attn.image_v     #.cross_attn.v_img       #.attn2.add_v_proj
    #.cross_attn.image_norm_k  #.cross_attn.norm_k_img  #.attn2.norm_added_k
    #.ffn.0                  #.ffn.0                  #.ffn.net.0.proj
    #.ffn.2                  #.ffn.2                  #.ffn.net.2
    #.before                 #.before_proj            #.proj_in
    #.after                  #.after_proj             #.proj_out
"""

DIT = """
    patch_embedding          patch_embedding          patch_embedding
    vace_patch_embedding     vace_patch_embedding     vace_patch_embedding
    time_mlp.0               time_embedding.0         condition_embedder.time_embedder.linear_1
    time_mlp.2               time_embedding.2         condition_embedder.time_embedder.linear_2
    time_projection.1        time_projection.1        condition_embedder.time_proj
    text_mlp.0               text_embedding.0         condition_embedder.text_embedder.linear_1
    text_mlp.2               text_embedding.2         condition_embedder.text_embedder.linear_2
    image_mlp.norm_in        img_emb.proj.0           condition_embedder.image_embedder.norm1
    image_mlp.up             img_emb.proj.1           condition_embedder.image_embedder.ff.net.0.proj
    image_mlp.down           img_emb.proj.3           condition_embedder.image_embedder.ff.net.2
    image_mlp.norm_out       img_emb.proj.4           condition_embedder.image_embedder.norm2
    image_mlp.position       img_emb.emb_pos          condition_embedder.image_embedder.pos_embed
    final.modulation         head.modulation          scale_shift_table
    final.linear             head.head                proj_out
"""

TEXT = """
    token_embedding    token_embedding    shared|encoder.embed_tokens
    norm               norm               encoder.final_layer_norm
"""

# Within layers.# (ours), blocks.# (official) and encoder.block.# (transformers).
TEXT_LAYER = """
    norm_attn           norm1                     layer.0.layer_norm
    attn.q              attn.q                    layer.0.SelfAttention.q
    attn.k              attn.k                    layer.0.SelfAttention.k
    attn.v              attn.v                    layer.0.SelfAttention.v
    attn.out            attn.o                    layer.0.SelfAttention.o
    attn.relative_bias  pos_embedding.embedding   layer.0.SelfAttention.relative_attention_bias
    norm_ffn            norm2                     layer.1.layer_norm
    ffn.gate            ffn.gate.0                layer.1.DenseReluDense.wi_0
    ffn.up              ffn.fc1                   layer.1.DenseReluDense.wi_1
    ffn.down            ffn.fc2                   layer.1.DenseReluDense.wo
"""

IMAGE = """
    class_token              cls_embedding                  embeddings.class_embedding[0,0]
    position_embedding       pos_embedding                  embeddings.position_embedding.weight[0]
    patch_embedding          patch_embedding                embeddings.patch_embedding
    pre_norm                 pre_norm                       pre_layrnorm
    layers.#.norm_attn       transformer.#.norm1            encoder.layers.#.layer_norm1
    layers.#.attn.qkv        transformer.#.attn.to_qkv      encoder.layers.#.self_attn.{q,k,v}_proj
    layers.#.attn.out        transformer.#.attn.proj        encoder.layers.#.self_attn.out_proj
    layers.#.norm_ffn        transformer.#.norm2            encoder.layers.#.layer_norm2
    layers.#.ffn.up          transformer.#.mlp.0            encoder.layers.#.mlp.fc1
    layers.#.ffn.down        transformer.#.mlp.2            encoder.layers.#.mlp.fc2
    post_norm                post_norm                      post_layernorm
    head                     head                           visual_projection.weight.T?
"""

# Our VAE names are the official ones: these rows have two cells, ours and that of Diffusers.
VAE = """
    conv1                quant_conv
    conv2                post_quant_conv
"""

# Within encoder and decoder, which have the same name in both.
VAE_SIDE = """
    conv1                conv_in
    middle.0.*           mid_block.resnets.0.*
    middle.1.norm        mid_block.attentions.0.norm
    middle.1.to_qkv      mid_block.attentions.0.to_qkv
    middle.1.proj        mid_block.attentions.0.proj
    middle.2.*           mid_block.resnets.1.*
    head.0               norm_out
    head.2               conv_out
"""

# The stages, where the two generations differ.
VAE21 = """
    encoder.downsamples.#.*                       encoder.down_blocks.#.*
    encoder.downsamples.#.resample.1              encoder.down_blocks.#.resample.1
    encoder.downsamples.#.time_conv               encoder.down_blocks.#.time_conv
    decoder.upsamples.#.*                         decoder.up_blocks.#.resnets.#.*
    decoder.upsamples.#.resample.1                decoder.up_blocks.#.upsamplers.0.resample.1
    decoder.upsamples.#.time_conv                 decoder.up_blocks.#.upsamplers.0.time_conv
"""
VAE22 = """
    encoder.downsamples.#.downsamples.#.*           encoder.down_blocks.#.resnets.#.*
    encoder.downsamples.#.downsamples.#.resample.1  encoder.down_blocks.#.downsampler.resample.1
    encoder.downsamples.#.downsamples.#.time_conv   encoder.down_blocks.#.downsampler.time_conv
    decoder.upsamples.#.upsamples.#.*               decoder.up_blocks.#.resnets.#.*
    decoder.upsamples.#.upsamples.#.resample.1      decoder.up_blocks.#.upsampler.resample.1
    decoder.upsamples.#.upsamples.#.time_conv       decoder.up_blocks.#.upsampler.time_conv
"""

# The parts of a residual block: ours, Diffusers.
RESIDUAL = {
    "residual.0": "norm1",
    "residual.2": "conv1",
    "residual.3": "norm2",
    "residual.6": "conv2",
    "shortcut": "conv_shortcut",
}

# Kind -> what stands once, what is repeated, and in front of what it stands then, in each naming.
TABLES = {
    "dit": (DIT, BLOCK, ("blocks.",) * 3, ("vace_blocks.",) * 3),
    "text": (TEXT, TEXT_LAYER, ("layers.#.", "blocks.#.", "encoder.block.#.")),
    "image": (IMAGE, ""),
    "vae": (VAE, VAE_SIDE, ("encoder.",) * 2, ("decoder.",) * 2),
}

# What a file may put before every name. The first one fits the names in the tables above.
PREFIXES = {
    "dit": ("", "model.diffusion_model.", "diffusion_model.", "model."),
    "text": ("", "text_encoder.", "model.", "text_encoders.umt5xxl.transformer."),
    "image": ("", "visual.", "vision_model."),
    "vae": ("", "first_stage_model.", "vae."),
}
# Where the released files put one, so that `rename` writes it too (the projection stands outside the vision
# model).
RELEASED_PREFIX = {("image", "official"): "visual.", ("image", "diffusers"): "vision_model."}

# Tensors that real files carry and Wan never uses: (kind, pattern of the whole name, why).
IGNORED = (
    ("dit", r".*\.norm_added_q\.weight", "an unused norm in early Diffusers exports"),
    (
        "dit",
        r"(first_stage_model|cond_stage_model|text_encoders|vae)\..*",
        "another component of an all-in-one file",
    ),
    (
        "text",
        r"(model\.diffusion_model|first_stage_model|vae)\..*|text_encoders\.umt5xxl\.(?!transformer\.).*",
        "another component of an all-in-one file",
    ),
    ("text", r"decoder\..*|lm_head\.weight", "the decoder half of UMT5"),
    ("text", r"spiece_model", "the tokenizer, packed into the file by ComfyUI"),
    ("image", r"(textual|text_model)\..*|text_projection\.weight", "the text tower of CLIP"),
    ("image", r"log_scale|logit_scale", "the temperature of CLIP's training loss"),
    ("image", r".*embeddings\.position_ids", "a counter, not a weight"),
    (
        "vae",
        r"(model\.diffusion_model|cond_stage_model|text_encoders)\..*",
        "another component of an all-in-one file",
    ),
)


def unwrapped(name):
    """A name without what torch.compile (`_orig_mod.`) and DataParallel (`module.`, in front) add to it."""
    return name.replace("_orig_mod.", "").removeprefix("module.")


def ignored(kind, name):
    """Why this tensor is left aside on purpose, or None when it is not."""
    return next((why for k, pattern, why in IGNORED if k == kind and re.fullmatch(pattern, name)), None)


@dataclass(frozen=True)
class Counterpart:
    """What one of our tensors is elsewhere: under which names, and in which form."""

    names: tuple
    form: str = "same"  # "same", "stacked", "tied", "transposed", "without 1", "without 2" leading axes
    optional: bool = False

    def missing(self, state):
        """The names that a state needs and lacks: a tied tensor needs one of two, an optional one none."""
        absent = [name for name in self.names if name not in state]
        enough = self.form == "tied" if len(absent) < len(self.names) else self.optional
        return [] if enough else absent

    def theirs(self, x):
        """Our tensor -> {name there: tensor there}"""
        if self.form == "stacked":
            return {name: part.clone() for name, part in zip(self.names, x.chunk(len(self.names)))}
        if self.form == "transposed":
            x = x.T.contiguous()
        if self.form.startswith("without"):
            x = x.reshape(x.shape[int(self.form[-1]) :])
        return dict.fromkeys(self.names, x)

    def ours(self, state):
        """{name there: tensor there}, of all tensors -> our tensor"""
        tensors = [state[name] for name in self.names if name in state]
        if self.form == "stacked":
            return torch.cat(tensors)
        if self.form == "transposed":
            return tensors[0].T.contiguous()
        if self.form.startswith("without"):
            return tensors[0].reshape(*[1] * int(self.form[-1]), *tensors[0].shape)
        return tensors[0]


def counterparts(kind, config, ours, style):
    """Each of our names, and what it is in another naming.

    config  the component's config dataclass (the VAE's flat numbering depends on it)
    ours    our parameter names
    style   "ours", "official" or "diffusers"
    ->      {our name: Counterpart}

    Raises KeyError for a name that no row covers.
    """
    if style == "ours" or (style == "official" and kind == "vae"):
        return {name: Counterpart((name,)) for name in ours}
    column, rows, table = -1 if style == "diffusers" else 1, _rows(kind, config), {}
    for name in ours:
        base = re.sub(r"\.(weight|bias|gamma)$", "", name)
        numbers = re.findall(r"\.(\d+)(?=\.)", base)
        row = rows.get(base) or rows.get(re.sub(r"\.\d+(?=\.)", ".#", base))
        if row is None:
            raise KeyError(f"no row of the {kind} name table covers {name}")
        if row[0].startswith("decoder.upsamples.#") and config.dec_dim is None:
            # In 2.1 our numbers go on through all stages; theirs are the stage and the number within it.
            numbers = divmod(int(numbers[0]), config.num_res_blocks + 2)
        cell = row[column]
        for number in numbers if base != row[0] else ():
            cell = cell.replace("#", str(number), 1)
        table[name] = _counterpart(cell, name.removeprefix(base))
    return table


def counterpart_of(kind, name, style):
    """What one of our tensors is in another naming, if its row depends on no config.   -> Counterpart"""
    if style == "ours" or (style == "official" and kind == "vae"):
        return Counterpart((name,))
    base = re.sub(r"\.(weight|bias|gamma)$", "", name)
    rows = _rows(kind)
    row = rows.get(base) or rows[re.sub(r"\.\d+(?=\.)", ".#", base)]
    cell = row[-1 if style == "diffusers" else 1]
    for number in re.findall(r"\.(\d+)(?=\.)", base) if base != row[0] else ():
        cell = cell.replace("#", number, 1)
    return _counterpart(cell, name.removeprefix(base))


def _rows(kind, config=None):
    """{our cell: the whole row}"""
    once, repeated, *stacks = TABLES[kind]
    if kind == "vae" and config is not None:
        once += VAE21 if config.dec_dim is None else VAE22
    rows = _split(once)
    rows += [[a + cell for a, cell in zip(stack, row)] for stack in stacks for row in _split(repeated)]
    return {row[0]: row for whole in rows for row in _unfolded(whole)}


def _unfolded(row):
    """A row, or one for each part of a residual block."""
    if not row[0].endswith("*"):
        return [row]
    return [[row[0][:-1] + ours, row[1][:-1] + theirs] for ours, theirs in RESIDUAL.items()]


def _split(table):
    return [line.split() for line in table.splitlines() if line.strip()]


def _counterpart(cell, leaf):
    """One cell of a table, with the `weight` or `bias` that ours ends in."""
    optional = cell.endswith("?")
    cell = cell.removesuffix("?")
    if cell.endswith(".T"):
        return Counterpart((cell.removesuffix(".T"),), "transposed", optional)
    if cell.endswith("]"):
        cell, axes = cell[:-1].split("[")
        return Counterpart((cell,), f"without {len(axes.split(','))}", optional)
    if "|" in cell:
        return Counterpart(tuple(name + leaf for name in cell.split("|")), "tied", optional)
    several = re.fullmatch(r"(.*)\{(.*)\}(.*)", cell)
    if several:
        before, words, after = several.groups()
        return Counterpart(
            tuple(before + word + after + leaf for word in words.split(",")), "stacked", optional
        )
    return Counterpart((cell + leaf,), "same", optional)
