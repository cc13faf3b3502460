"""How can a weight take fewer bytes than its numbers?  What stands in a layer's `weight` in place of them.

stored.py     what every storage has: shape, dtype, expand
scaled.py     8 bit numbers (floats or integers) and the scales they are multiplied by
dynamic.py    the same, whose inputs are rounded to 8 bits, too
pages.py      memory that is a file, and how it is given back
blocks.py     the blocks of GGUF files (decoders.py: what the bytes of each type mean)
encoders.py   how numbers become each of these
"""

from .blocks import Blocks
from .dynamic import Dynamic
from .encoders import ENCODERS
from .scaled import Scaled
from .stored import Stored
