"""How does a control video steer?  VACE: blocks that read it beside the noisy latent and leave hints for the
others.

The control latent (conditioning.vace_control) says what to keep and what to change. Every second block of the
DiT has a twin that reads it; what the twin has to say is added to the stream after its block (DiT.hints).
Source: Jiang et al. 2025 (VACE), section 3.3.
"""

from ..linear import Linear
from .block import Block


class VaceBlock(Block):
    """A block whose stream is the control; it returns that stream, and a hint for the main one."""

    def __init__(self, config, layer):
        super().__init__(config)
        self.before = Linear(config.dim, config.dim) if layer == config.vace_layers[0] else None
        self.after = Linear(config.dim, config.dim)

    def forward(self, control, x, *heard):
        if self.before is not None:  # the first one brings the two streams together, once
            control = self.before(control) + x
        control = super().forward(control, *heard)
        return control, self.after(control)
