"""How does a control video steer?  VACE: blocks that read it beside the noisy latent and leave hints for the
others.

The control latent (conditioning.vace_control) says what to keep and what to change. Every second block of the
DiT has a twin that reads it; what the twin has to say is added to the stream after its block. Source: Jiang
et al. 2025 (VACE), section 3.3.
"""

from torch import nn

from ..linear import Linear
from .block import Block
from .model import DiT, patchify


class VaceBlock(Block):
    """A block whose stream is the control; it returns that stream, and a hint for the main one."""

    def __init__(self, config, first):
        super().__init__(config)
        self.before = Linear(config.dim, config.dim) if first else None
        self.after = Linear(config.dim, config.dim)

    def forward(self, control, x, *heard):
        if self.before is not None:  # the first one brings the two streams together, once
            control = self.before(control) + x
        control = super().forward(control, *heard)
        return control, self.after(control)


class VaceDiT(DiT):
    """A DiT that takes two more arguments.

    control        [b, vace_in_dim, f, h, w]  from conditioning.vace_control; zeros for none
    control_scale  number: how much of the hints is added
    """

    def __init__(self, config):
        super().__init__(config)
        patch, count = config.patch_size, len(config.vace_layers)
        self.vace_patch_embedding = nn.Conv3d(config.vace_in_dim, config.dim, patch, stride=patch)
        self.vace_blocks = nn.ModuleList(VaceBlock(config, first=i == 0) for i in range(count))

    def stack(self, x, time6, rotation, context, control=None, control_scale=1.0):
        """The blocks, with the hints between them.   [b, n, c] -> [b, n, c]"""
        hints = self.hints(control, x, time6, rotation, context)
        for i, block in enumerate(self.blocks):
            x = block(x, time6, rotation, *context.of(i))
            if i in hints:
                x = x + hints[i] * control_scale
        return x

    def hints(self, control, x, time6, rotation, context):
        """What is to be added after which block.   -> {block: [b, n, c]}"""
        control, hints = patchify(self.vace_patch_embedding, control), {}
        for i, (layer, block) in enumerate(zip(self.config.vace_layers, self.vace_blocks)):
            heard = context.of(len(self.blocks) + i)
            control, hints[layer] = block(control, x, time6, rotation, *heard)
        return hints

    def readers(self):
        return [*self.blocks, *self.vace_blocks]

    def example(self, **how):
        """As DiT.example, and an empty control latent."""
        x, *rest, _ = super().example(**how)
        return x, *rest, x[:, :1].expand(-1, self.config.vace_in_dim, -1, -1, -1)

    def check_control(self, x, control):
        """Raise ValueError unless the control lies over x."""
        expected = [x.shape[0], self.config.vace_in_dim, *x.shape[2:]]
        if control is None:
            raise ValueError(
                "this VACE model reads a control latent; pass "
                f"control=[b, {self.config.vace_in_dim}, f, h, w] (zeros for none)"
            )
        if list(control.shape) != expected:
            raise ValueError(
                f"control of shape {list(control.shape)} arrived; expected {expected}, lying over x"
            )


DiT.with_control = VaceDiT
