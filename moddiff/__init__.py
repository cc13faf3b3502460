"""moddiff: diffusion-transformer video models, small enough to read and exact enough to load.

    import moddiff
    pipe = moddiff.load("tiny")
    video = pipe("a red circle moving left on a black background", seed=0)

A name is imported when it is first used, so that `import moddiff` costs nothing.

It sets one environment variable, GOMP_SPINCOUNT=1000, unless you have set it or OMP_WAIT_POLICY. Torch reads
it when torch is imported: a script that imports torch before moddiff has to set it by itself.
"""

import os
import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from pkgutil import iter_modules
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what an editor shows and completes; when a program runs, __getattr__ below does it
    from .experiments import experiment
    from .hooks import at, capture, patch, taps
    from .pipeline import Note, Pipeline
    from .roles import register
    from .run import resume
    from .video import Video
    from .weights import build, load

__version__ = "0.1.0"

# Torch's threads wait for each other in a loop that holds the processor, 300,000 turns long. Two programs at
# once then starve each other: 20 to 60 times slower. With 1,000 turns two on two cores take about twice as
# long as one alone, which loses a tenth; with 3,000 they take five times as long.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

# Name -> the room that holds it.
_NAMES = {
    "load": "weights",
    "build": "weights",
    "Pipeline": "pipeline",
    "Note": "pipeline",
    "Video": "video",
    "register": "roles",
    "resume": "run",
    "taps": "hooks",
    "capture": "hooks",
    "patch": "hooks",
    "at": "hooks",
    "experiment": "experiments",
}
_ROOMS = sorted(module.name for module in iter_modules(__path__) if module.name != "__main__")
# Where a module of version 0.1 is now: its old name goes on working.
_MOVED = {
    "charts": "viz",
    "checkpoints": "weights.files",
    "components": "roles",
    "configs": "weights.configs",
    "edits": "hooks.edits",
    "explore": "viz",
    "forecast": "hooks.forecast",
    "inspection": "weights.fit",
    "keymaps": "weights.names",
    "loading": "weights.loading",
    "maps": "viz",
    "places": "hooks.where",
    "records": "hooks.records",
    "releases": "weights.releases",
    "schemes": "viz",
    "snapshots": "experiments.snapshots",
    "trees": "viz.trees",
    "vace": "dit.vace",
}
__all__ = list(_NAMES)


def __getattr__(name):
    if name in _NAMES:
        return getattr(import_module(f".{_NAMES[name]}", __name__), name)
    if name in _ROOMS or name in _MOVED:
        return import_module(f".{_MOVED.get(name, name)}", __name__)
    raise AttributeError(
        f"moddiff has no {name!r}; it has {', '.join(_NAMES)}, and the modules {', '.join(_ROOMS)}"
    )


def __dir__():
    return sorted({*globals(), *_NAMES, *_ROOMS})


class _OldNames:
    """Finds `moddiff.places` where it is now, as `moddiff.hooks.where`: one module, not a second one."""

    def find_spec(self, name, path=None, target=None):
        package, _, room = name.rpartition(".")
        return ModuleSpec(name, self) if package == __name__ and room in _MOVED else None

    def create_module(self, spec):
        return None  # the usual empty one, which exec_module exchanges for the real one

    def exec_module(self, module):
        sys.modules[module.__name__] = import_module(
            "." + _MOVED[module.__name__.rpartition(".")[2]], __name__
        )


sys.meta_path.append(_OldNames())
