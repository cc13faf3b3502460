"""How hard should we push?  Classifier-free guidance, and relatives that cost or distort less.

free.py has the method and what combines two velocities; relatives.py those that look back at earlier steps
or leave one out; inside.py those that reach into the model. Each is a guide: `pipe(prompt, scale=guide)`.
Guide: guides/guidance.md
"""

from .free import CFG, cfg, cfg_zero, rescaled
from .inside import NAG, SkipLayer, normalized_attention
from .relatives import APG, CFGZero, projected

__all__ = [
    "APG",
    "CFG",
    "NAG",
    "CFGZero",
    "SkipLayer",
    "cfg",
    "cfg_zero",
    "normalized_attention",
    "projected",
    "rescaled",
]
