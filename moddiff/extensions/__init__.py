"""What can be changed about a component without changing the component?  Extensions: adapted, quantized, ...

    from moddiff.extensions import adapted
    pipe = pipe.replace(dit=adapted(pipe.dit, "style.safetensors"))

    promises.py  what every extension promises, and the tools that keep it
    lora.py      adapted: LoRA and its relatives (lora_families.py: the formulas, lora_files.py: spellings,
                 lora_layers.py: layers with changes beside their weights)
    parallel.py  parallel: several processes that think one thought (ranks.py: what travels between them)
    quantize.py  quantized: weights in 8 or 4 bits (storage/ keeps them)
    offload.py   offloaded: blocks come when they compute
    compile.py   compiled: blocks that torch.compile has fused
    relay.py     relay: an edit by which each part of a clip hears its own words
    sparse.py    sparse: tokens that listen to some others, by where those lie in the film
    streaming.py causal: frames that look back only, and keep what they have seen
    tile.py      tiled: a vae that sees a tile at a time
    windows.py   windowed: films longer than the model ever saw, a window at a time
    cache.py     cached: steps that reuse what the one before found (cache_policies.py: when they do,
                 cache_coefficients.py and cache_calibration.py: the numbers that takes)

An extension is a function from a component to a component of the same role; it needs no registry to be used.
By a name, as profiles use them: `moddiff.register("extension", "name", function)`, or an entry point of the
group "moddiff.extensions".
"""

from ..roles import apply
from .cache import cached
from .cache_calibration import calibrate
from .compile import compiled
from .lora import adapted
from .offload import offloaded
from .parallel import parallel
from .promises import Extension, Memory, Report, bare, expect, extension, layers, stack, twin
from .quantize import quantized
from .sparse import sparse
from .streaming import causal
from .tile import tiled
from .windows import windowed
