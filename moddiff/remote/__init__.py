"""Where does each part of a pipeline run?  In other processes, on other machines, through other frameworks.

    moddiff serve --model tiny --roles text,vae,dit --port 8000       # there

    text = moddiff.remote("http://there:8000", "text", token=TOKEN)   # here
    pipe = moddiff.load("tiny").replace(text=text)

A component that runs elsewhere is a component like any other: equal to the bit, with the same taps. What
travels are numbers and names, never code: a question is a safetensors file with a header, which both ends
check (version, role, fingerprint of the model, shapes).

    wire.py        what travels
    client.py      asking, within a time, and what went wrong
    components.py  what stands in the pipeline: Text, Image, Dit, Vae
    branches.py    one question for all branches of a step
    looking.py     captures and edits, through the wire
    encodings.py   a folder of what was encoded once
    server.py      HTTP; served.py: what a component does for a question; work.py: whose turn it is
    mlx.py         the text encoder through mlx, for a Mac

Guide: guides/remote.md
"""

import sys
from types import ModuleType


class _Remote(ModuleType):
    """This module, which may be called: `moddiff.remote(url, role)`."""

    def __call__(self, url, role, token=None, timeout=60.0, cache=None):
        """The component of that role that runs at `url`, for `pipe.replace(text=...)`.

        url      of a `moddiff serve`, such as "http://127.0.0.1:8000"
        role     "text", "image", "dit" or "vae"
        token    what the server was given as its --token-file
        timeout  seconds for each question, all in all
        cache    a folder in which encodings are kept, under the hash of model and inputs; None: none are
        ->       a component of that role

        Raises RemoteError (an OSError) for a server that is not there, slow, lying, or serves another model,
        here and at each call; what the component itself raises about its inputs is raised as it is. Gradients
        do not travel.
        """
        from .components import connect

        return connect(url, role, token, timeout, cache)


sys.modules[__name__].__class__ = _Remote


def __getattr__(name):
    from importlib import import_module

    if name == "mlx":  # only when it is asked for: it brings the whole of mlx
        return import_module(".mlx", __name__)
    if name in ("RemoteError", "serving"):
        return getattr(import_module(f".{'wire' if name == 'RemoteError' else 'server'}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
