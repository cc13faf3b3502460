"""How large is it?  One row of Wan's model table."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DiTConfig:
    """One row of Wan's model table.

    model_type   "t2v", "i2v", "flf2v", "ti2v" or "vace"
    in_dim       latent channels that come in: noise, and in image-to-video mask and conditioning latent
    image_dim    width of the CLIP features; None where the model has no image path (Wan 2.2)
    text_len     rows that a prompt is padded to
    vace_layers  the blocks that a VACE model adds a hint after, and vace_in_dim the channels of its control
                 latent
    """

    model_type: str
    in_dim: int
    dim: int
    ffn_dim: int
    freq_dim: int
    text_dim: int
    out_dim: int
    num_heads: int
    num_layers: int
    image_dim: int | None = None
    patch_size: tuple = (1, 2, 2)
    text_len: int = 512
    qk_norm: bool = True
    cross_attn_norm: bool = True
    eps: float = 1e-6
    vace_layers: tuple = ()
    vace_in_dim: int = 96

    def __post_init__(self):
        # JSON has lists; a frozen config is to be a key, and so has tuples.
        object.__setattr__(self, "patch_size", tuple(self.patch_size))
        object.__setattr__(self, "vace_layers", tuple(self.vace_layers))
        if self.dim % self.num_heads or self.dim // self.num_heads % 2:
            raise ValueError(
                f"dim {self.dim} over {self.num_heads} heads gives {self.dim / self.num_heads:g} channels a "
                "head; expected an even whole number"
            )
        if any(not 0 <= layer < self.num_layers for layer in self.vace_layers):
            raise ValueError(
                f"vace_layers {self.vace_layers} names a block outside 0..{self.num_layers - 1} "
                f"(num_layers {self.num_layers})"
            )
