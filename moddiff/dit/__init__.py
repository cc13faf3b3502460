"""What happens inside one block?  Wan's diffusion transformer: noisy latent, time and text in, velocity out.

A latent is cut into patches, one token each. Every block lets the tokens attend to each other, then to the
text, then thinks per token; time enters through shift, scale and gate around the first and the third. Wan 2.1
and 2.2: t2v, i2v, flf2v, ti2v.

    model.py      the whole: patches, time, prompt, blocks, last layer
    block.py      one block, and the layers in it
    vace.py       the blocks that read a control video
    config.py     one row of Wan's model table
    arguments.py  what the model may be given

Guide: guides/dit.md
"""

from .block import Block, CrossAttention, LayerNorm, Modulation, RMSNorm, SelfAttention, gated, modulated
from .config import DiTConfig
from .model import Context, DiT, Final, ImageMLP, patchify, sinusoid, unpatchify
from .vace import VaceBlock
