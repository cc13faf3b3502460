"""What changes at full size?  Nothing but the weights: names, files, configs, releases, and what fits.

names.py       our names, the official ones, those of Diffusers and transformers
files.py       which files hold a component: one, shards and their index, a folder
formats.py     what is in one: safetensors and .pth
gguf.py        and GGUF
packing.py     8 bit weights and their scales, in every spelling
foreign.py     what a file is that is not one of ours
configs.py     the sizes of a component, in any dialect (dialects.py: Diffusers; fields.py: types)
sizes.py       or told by the shapes of a file that has none
building.py    a component from a config and a state (complaints.py: why they do not fit)
releases.py    what is in a folder or a preset
fit.py         what it will take
single.py      single files as parts of a release (pieces.py: the tokenizer inside)
loading.py     a pipeline from all that
profiles.py    what is done to its parts by name: quantized, offloaded, ...
contents.py    what one file holds, and what it would take
converting.py  the same weights as another file
quoting.py     strangers' words in our messages
"""

from .building import WeightsError, as_dtype, build, detect, load_component, rename
from .contents import Contents, contents
from .converting import convert
from .files import CheckpointError
from .fit import Inspection, inspect
from .loading import ALIASES, load
from .profiles import profile, profiles
from .releases import open_release, preset, presets
