"""What can I do from the terminal?  The command `moddiff`: generate, inspect, lab, train-tiny, score, bench.

Torch is imported inside the commands, so that `moddiff --help` answers at once.
"""

import importlib.util
import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Diffusion-transformer video models: small enough to read, exact enough to load.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

MODEL = "a model that ships with the package (tiny-t2v, tiny-i2v), or a folder of downloaded weights"
# What a user can get wrong. Anything else is our fault, and keeps its traceback.
MISTAKES = (ValueError, TypeError, LookupError, OSError, ImportError, MemoryError)


def main(arguments=None):
    """Run one command. A mistake of the user's ends with one sentence and exit code 2; MODDIFF_TRACEBACK=1 shows where it came from."""
    try:
        app(arguments)
    except MISTAKES as error:
        if os.environ.get("MODDIFF_TRACEBACK"):
            raise
        print(f"error: {_sentence(error)}", file=sys.stderr)
        sys.exit(2)


def _sentence(error):
    if isinstance(error, KeyError) and error.args:
        return str(error.args[0])  # str() would put it in quotes
    return str(error) or type(error).__name__


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="what the video shows")],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="the file to write: .mp4, .webm, .gif, .webp, or .png for a sheet of frames",
        ),
    ] = Path("out.mp4"),
    model: Annotated[
        str | None, typer.Option(help=MODEL + "; by default tiny-t2v, with --image tiny-i2v")
    ] = None,
    image: Annotated[Path | None, typer.Option(help="the first frame, for image-to-video models")] = None,
    last_image: Annotated[Path | None, typer.Option(help="the last frame, for models that take one")] = None,
    seed: Annotated[int, typer.Option(help="the same seed gives the same file; -1 draws one")] = 0,
    steps: Annotated[int | None, typer.Option(help="denoising steps")] = None,
    solver: Annotated[str | None, typer.Option(help="unipc, dpm++ or euler")] = None,
    scale: Annotated[float | None, typer.Option(help="guidance: how hard to push towards the prompt")] = None,
    shift: Annotated[float | None, typer.Option(help="how many of the steps go to high noise")] = None,
    negative: Annotated[str | None, typer.Option(help="what the video shall not show")] = None,
    frames: Annotated[int | None, typer.Option(help="4n + 1: 17, 21, 81, ...")] = None,
    size: Annotated[str | None, typer.Option(help="HEIGHTxWIDTH in pixels, such as 96x96")] = None,
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16; by default as stored")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps")] = "cpu",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="no progress bar, no report")] = False,
):
    """Turn a sentence, and perhaps a picture, into a video file."""
    from .pipeline import Note
    from .video import check_path
    from .weights import load

    check_path(output)
    pixels = _size(size)
    pipe = load(model or ("tiny-t2v" if image is None else "tiny-i2v"), dtype=dtype, device=device)
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Note)  # printed below
        video = pipe(
            prompt,
            seed=seed,
            steps=steps,
            solver=solver,
            scale=scale,
            shift=shift,
            negative=negative,
            frames=frames,
            size=pixels,
            image=image,
            last_image=last_image,
            progress=not quiet,
        )
    took = time.perf_counter() - started
    video.save(output)
    for note in video.notes:
        print(f"note: {note}", file=sys.stderr)
    if not quiet:
        height, width = video.frames.shape[1:3]
        print(
            f"{output}: {len(video)} frames of {height} x {width}, {video.fps:g} a second, made in {took:.1f} s with seed {video.settings['seed']}"
        )


@app.command()
def inspect(
    where: Annotated[
        str | None, typer.Argument(help=MODEL + "; without it, all known models are listed")
    ] = None,
    size: Annotated[str | None, typer.Option(help="HEIGHTxWIDTH of the video to forecast")] = None,
    frames: Annotated[int | None, typer.Option(help="frames of the video to forecast")] = None,
    dtype: Annotated[str | None, typer.Option(help="dtype of the weights in memory")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
):
    """What a model is, what is missing, and the memory it will take. Nothing is loaded."""
    from . import weights
    from .weights import ALIASES

    if where is None:
        rows = {name: weights.preset(name)["about"] for name in weights.presets()}
        print(
            json.dumps(rows, indent=2, ensure_ascii=False)
            if as_json
            else "\n".join(f"{name:24} {about}" for name, about in rows.items())
        )
        return
    found = weights.inspect(ALIASES.get(where, where), size=_size(size), frames=frames, dtype=dtype)
    print(json.dumps(found.to_dict(), indent=2, ensure_ascii=False, default=str) if as_json else found)


@app.command()
def lab(
    folder: Annotated[
        Path | None, typer.Argument(help="the notebooks; by default those beside the package")
    ] = None,
    browser: Annotated[bool, typer.Option(help="open a browser window")] = True,
    allow_root: Annotated[
        bool,
        typer.Option(
            "--allow-root",
            help="start although you are root, as in a container; Jupyter refuses that otherwise",
        ),
    ] = False,
):
    """Open the notebooks in JupyterLab."""
    folder = folder or Path(__file__).parent.parent / "notebooks"
    if not any(folder.glob("*.ipynb")):
        raise FileNotFoundError(
            f"there are no notebooks in {folder}; clone the repository and install from there (pip install -e '.[notebooks]'), "
            "or name their folder: moddiff lab FOLDER"
        )
    if importlib.util.find_spec("jupyterlab") is None:
        raise ModuleNotFoundError(
            "JupyterLab is not installed; run: pip install 'moddiff[notebooks]' (in a clone: pip install -e '.[notebooks]')"
        )
    options = [
        option for option, wanted in (("--no-browser", not browser), ("--allow-root", allow_root)) if wanted
    ]
    raise typer.Exit(subprocess.run([sys.executable, "-m", "jupyterlab", str(folder), *options]).returncode)


@app.command()
def train_tiny(
    stage: Annotated[
        str | None, typer.Option(help="vae, text, t2v, decoder, clip or i2v, in this order")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="train up to this step; by default as the shipped weights were")
    ] = None,
    folder: Annotated[
        Path, typer.Option(help="where checkpoints and the log go; a run that was stopped goes on from there")
    ] = Path("runs"),
    seed: Annotated[int, typer.Option(help="of weights and data")] = 0,
    workers: Annotated[
        int, typer.Option(help="processes that train one model together, with a thread and a batch each")
    ] = 1,
    from_shipped: Annotated[
        bool,
        typer.Option(
            "--from-shipped", help="put the package's weights into the folder first, to go on from them"
        ),
    ] = False,
    export: Annotated[
        bool,
        typer.Option(
            "--export", help="copy what has been trained in the folder into the package, for moddiff.load"
        ),
    ] = False,
):
    """Train the tiny models as the shipped ones were. Resumable: stop with Ctrl-C, start again with the same command."""
    from .tiny import train

    if stage is None and not export and not from_shipped:
        raise ValueError(f"nothing to do: give --stage ({', '.join(train.STEPS)}), --export, or both")
    if from_shipped:
        train.begin_from_shipped(folder)
    if stage is not None:
        train.run_stage(stage, steps, folder, seed, workers=workers)
    if export:
        print("\n".join(train.export(folder)))


@app.command()
def score(
    split: Annotated[
        str, typer.Option(help="heldout: combinations that training never showed; any: all")
    ] = "heldout",
    number: Annotated[int, typer.Option("--number", "-n", help="prompts for each figure")] = 256,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="also write the figures as JSON")
    ] = None,
):
    """Measure the tiny models against the bars of the project: generate, and let the judge read the videos."""
    from .tiny import bars

    bars.main(n=number, split=split, out=output)


@app.command()
def bench(
    model: Annotated[str, typer.Option(help=MODEL)] = "tiny-t2v",
    runs: Annotated[int, typer.Option(help="repetitions; the median is reported")] = 3,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="also write the figures to this file")
    ] = None,
):
    """Time a sentence to a video, warm and cold, and the DiT against diffusers where it is installed. Prints JSON."""
    from .bench import measure
    from .video import write_whole

    text = json.dumps(measure(model, runs), indent=2)
    if output is not None:
        write_whole(output, text.encode() + b"\n")
    print(text)


@app.callback(invoke_without_command=True)
def options(version: Annotated[bool, typer.Option("--version", help="print the version")] = False):
    if version:
        from . import __version__

        print(f"moddiff {__version__}")
        raise typer.Exit()


def _size(text):
    """ "480x832" -> (480, 832), None -> None"""
    if text is None:
        return None
    sides = text.lower().replace("*", "x").split("x")
    if len(sides) != 2 or not all(side.strip().isdigit() for side in sides):
        raise ValueError(f"--size {text}; expected HEIGHTxWIDTH in pixels, such as 96x96 or 480x832")
    return tuple(int(side) for side in sides)
