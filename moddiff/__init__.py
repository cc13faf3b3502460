"""moddiff: diffusion-transformer video models, small enough to read and exact enough to load.

    import moddiff
    pipe = moddiff.load("tiny")
    video = pipe("a red circle moving left on a black background", seed=0)

A name is imported when it is first used, so that `import moddiff` costs nothing.
"""

from importlib import import_module

__version__ = "0.1.0"

# Name -> the module that holds it.
_NAMES = {
    "load": "loading", "Pipeline": "pipeline", "Note": "pipeline", "Video": "video", "build": "weights", "register": "components",
    "taps": "hooks", "capture": "hooks", "patch": "hooks", "at": "places", "experiment": "experiments",
}
_MODULES = (
    "attention", "components", "conditioning", "dit", "edits", "experiments", "flow", "forecast", "guidance", "hooks", "image", "inspection", "pipeline",
    "places", "records", "releases", "rope", "snapshots", "solvers", "text", "tiny", "tracing", "vae", "video", "viz", "weights",
)
__all__ = list(_NAMES)


def __getattr__(name):
    if name in _NAMES:
        return getattr(import_module(f".{_NAMES[name]}", __name__), name)
    if name in _MODULES:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"moddiff has no {name!r}; it has {', '.join(_NAMES)}, and the modules {', '.join(_MODULES)}")


def __dir__():
    return sorted({*globals(), *_NAMES, *_MODULES})
