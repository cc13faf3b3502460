"""What can I do from the terminal?  The command `moddiff`: generate, inspect, convert, lab, ...

A file holds a command or two. Torch is imported inside the commands, so that `moddiff --help` answers fast.
"""

import os
import sys
from typing import Annotated

import typer

from .generate import generate
from .kernels import kernels
from .lab import lab
from .runs import app as runs
from .serve import serve
from .timing import bench
from .tiny import score, train_tiny
from .weights import convert, inspect
from .words import plain

# What diffusers and Wan's own scripts call it -> what it is called here.
THEIRS = {
    "--ckpt-dir": "--model FOLDER",
    "--frame-num": "--frames",
    "--generator": "--seed",
    "--guidance-scale": "--scale",
    "--height": "--size HEIGHTxWIDTH",
    "--negative-prompt": "--negative",
    "--num-frames": "--frames",
    "--num-inference-steps": "--steps",
    "--output-type": "the ending of --output",
    "--prompt": "the first word after generate, in quotes",
    "--sample-guide-scale": "--scale",
    "--sample-shift": "--shift",
    "--sample-solver": "--solver",
    "--sample-steps": "--steps",
    "--save-file": "--output",
    "--task": "--model",
    "--torch-dtype": "--dtype",
    "--width": "--size HEIGHTxWIDTH",
}
# What a user can get wrong. Anything else is our fault, and keeps its traceback.
MISTAKES = (ValueError, TypeError, LookupError, OSError, ImportError, MemoryError)

app = typer.Typer(
    help="Diffusion-transformer video models: small enough to read, exact enough to load.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    # A fault of ours shows as Python's own traceback, and not as one that typer has drawn.
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

app.command()(generate)
app.command()(inspect)
app.command()(convert)
# Jupyter's options are not ours to know: they come as words, and go on to it as they are.
app.command(context_settings={"ignore_unknown_options": True})(lab)
app.add_typer(runs, name="runs")
app.command()(serve)
app.command()(train_tiny)
app.command()(score)
app.command()(bench)
app.command()(kernels)


def main(arguments=None):
    """Run one command. A mistake of the user's ends with one sentence and exit code 2.

    MODDIFF_TRACEBACK=1 shows where it came from.
    """
    for stream in (sys.stdout, sys.stderr):
        # A terminal that lacks a letter, as with an old code page of Windows, shows its number instead.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        # Before typer sees them, since it could only say that there is no such option.
        for word in sys.argv[1:] if arguments is None else arguments:
            # Wan's scripts write --frame_num, and --frame_num=81 is one word.
            option = word.partition("=")[0].replace("_", "-")
            if option in THEIRS:
                raise ValueError(f"there is no option {option}; here it is {THEIRS[option]}")
        app(arguments)
    except MISTAKES as error:
        if os.environ.get("MODDIFF_TRACEBACK"):
            raise
        print(f"error: {plain(_sentence(error))}", file=sys.stderr)
        sys.exit(2)


def _sentence(error):
    if isinstance(error, KeyError) and error.args:
        return str(error.args[0])  # str() would put it in quotes
    return str(error) or type(error).__name__


@app.callback(invoke_without_command=True)
def options(version: Annotated[bool, typer.Option("--version", help="print the version")] = False):
    # The option stands before any command, as in `moddiff --version`.
    if version:
        from .. import __version__

        print(f"moddiff {__version__}")
        raise typer.Exit()
