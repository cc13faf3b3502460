"""What changes at full size?  Nothing but the weights: names, files, configs, releases, and what fits.

names.py     our names, the official ones, those of Diffusers and transformers
files.py     safetensors and .pth files, shards and their index
configs.py   the sizes of a component, in any dialect
building.py  a component from a config and a state
releases.py  what is in a folder or a preset
fit.py       what it will take
loading.py   a pipeline from all that
"""

from .building import WeightsError, as_dtype, build, detect, load_component, rename
from .files import CheckpointError
from .fit import Inspection, inspect
from .loading import ALIASES, load
from .releases import open_release, preset, presets
