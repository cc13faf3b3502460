"""How can a weight take fewer bytes than its numbers?  What stands in a layer's `weight` in place of them.

stored.py     what every storage has: shape, dtype, expand
scaled.py     8 bit numbers (floats or integers) and the scales they are multiplied by
blocks.py     the blocks of GGUF files (decoders.py: what the bytes of each type mean)
"""

from .blocks import Blocks
from .scaled import Scaled
from .stored import Stored
