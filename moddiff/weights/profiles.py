"""What is done to the parts before they run?  A profile: extensions, by name, for each of them.

    {"dit": [["quantized", "int8"], ["offloaded", {"keep": 2}]], "vae": [["tiled"]]}

A name in place of a list is a registered component, instead of the model's own: {"text": "my-encoder"}.
"solver" in it is the name of the solver that runs take where they say no other, and "dtype" what `load`
takes as dtype= where nobody says another. Those that come with the package are
in presets/profiles/.
"""

import json
from importlib.resources import files
from pathlib import Path

from torch import nn

from ..roles import apply, get, names
from ..storage import Stored
from .names import KINDS


def profiles():
    """Names of the profiles that come with the package."""
    return sorted(path.name.removesuffix(".json") for path in _folder().iterdir())


def profile(which):
    """The calls of a profile.   -> {kind of component: [[name, argument, ..., {options}], ...]}, "dtype" too

    which  a name, a JSON file, or such a dictionary

    Raises ValueError for a name or file that there is not, an unknown kind of component or extension, before
    anything is loaded.
    """
    calls = which if isinstance(which, dict) else _from_file(which)
    for kind, listed in calls.items():
        if kind == "dtype":
            continue  # which load checks
        if kind not in (*KINDS, "solver"):
            raise ValueError(
                f"the profile has calls for {kind!r}; expected {', '.join(KINDS)}, solver, dtype"
            )
        if kind == "solver" or (isinstance(listed, str) and listed in names(kind)):
            get(kind, listed)  # or its error, which names those there are
            continue
        if not isinstance(listed, list) or not all(isinstance(call, list) and call for call in listed):
            raise ValueError(
                f"the profile's calls for {kind} are {listed!r}; expected a list of lists, such as "
                '[["quantized", "int8"], ["offloaded", {"keep": 2}]], or the name of a registered component'
            )
        for name, *_ in listed:
            get("extension", name)  # or its error, which names those there are
    return calls


def applied(part, calls):
    """A component with a profile's calls done to it; one whose file is quantized is not quantized again."""
    modules = part.modules() if isinstance(part, nn.Module) else ()
    if any(isinstance(module, Stored) for module in modules):
        calls = [call for call in calls if call[0] != "quantized"]
    return apply(part, calls)


def _folder():
    return files(__package__) / "presets" / "profiles"


def _from_file(which):
    path = Path(which) if str(which).endswith(".json") else _folder() / f"{which}.json"
    if not path.is_file():
        raise ValueError(
            f"there is no profile {str(which)!r}; there are {', '.join(profiles())}, or the path of a .json "
            "file"
        )
    try:
        calls = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"the profile {path} is not readable JSON: {error}") from error
    if not isinstance(calls, dict):
        raise ValueError(f"the profile {path} holds a {type(calls).__name__}; expected an object in braces")
    return calls
