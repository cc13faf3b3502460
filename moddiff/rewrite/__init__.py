"""How does a plain wish become a caption that the model was trained on?  A language model writes it anew."""

import os
from pathlib import Path

from .answers import Rewriter
from .chat import Chat
from .instructions import TINY, WAN, Instructions
from .local import MLX, Transformers

KEY = "MODDIFF_LLM_KEY"  # the variable with the key of a server, which a command line would show to others


def opened(where, model=None, instructions="wan", sees=False):
    """What `moddiff generate --rewrite` means: a server's address, a folder (or .gguf file), or a name.

    model  the model's name on a server
    sees   does a server's model take pictures?
    ->     a Rewriter, or the name as it came
    """
    if where.startswith(("http://", "https://")):
        if model is None:
            raise ValueError(
                f"--rewrite {where} also needs --rewrite-model NAME; GET {where}/models lists the names"
            )
        return Chat(where, model, os.environ.get(KEY), instructions=instructions, sees=sees)
    if model is not None or sees:
        raise ValueError(f"--rewrite {where} is no address of a server; leave --rewrite-model and -sees out")
    path = Path(where).expanduser()
    if path.is_dir() or path.suffix == ".gguf" or os.sep in where:
        return Transformers(path, instructions=instructions)
    return where
