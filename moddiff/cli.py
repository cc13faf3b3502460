"""What can I do from the terminal?  The command `moddiff`: generate, inspect, convert, lab, ...

Torch is imported inside the commands, so that `moddiff --help` answers at once.
"""

import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Annotated
from urllib.parse import quote

import typer

app = typer.Typer(
    help="Diffusion-transformer video models: small enough to read, exact enough to load.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    # A fault of ours shows as Python's own traceback, and not as one that typer has drawn.
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

MODEL = "a model that ships with the package (tiny-t2v, tiny-i2v), or a folder of downloaded weights"
CONFIG = "a config.json, where the sizes of one file cannot be told from its shapes"
SIZE = "HEIGHTxWIDTH in pixels, such as 480x832; with a star it is Wan's WIDTH*HEIGHT, such as 832*480"
NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
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
        print(f"error: {_plain(_sentence(error))}", file=sys.stderr)
        sys.exit(2)


def _sentence(error):
    if isinstance(error, KeyError) and error.args:
        return str(error.args[0])  # str() would put it in quotes
    return str(error) or type(error).__name__


def _plain(text):
    """Names out of files may hold codes that steer a terminal: those are shown and not obeyed."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


# ---- what words become -------------------------------------------------------------------------------------


def _size(text):
    """ "480x832" and Wan's "832*480" -> (480, 832), None -> None"""
    if text is None:
        return None
    sides = text.lower().replace("*", "x").split("x")
    if len(sides) != 2 or not all(side.strip().isdecimal() for side in sides):
        raise ValueError(f"--size {text}; expected {SIZE}")
    first, second = map(int, sides)
    return (second, first) if "*" in text else (first, second)


def _output(path: Path | None):
    """A file for figures, tried before the work that makes them."""
    from .saving import writable

    # Called by typer while it reads the options; a command without --output brings None.
    return path and writable(path)


def _scale(text):
    """ "5" -> 5.0; "3,4", for low and high noise, -> (3.0, 4.0); any other word is the name of a guide."""
    try:
        numbers = [float(number) for number in text.split(",")]
    except ValueError:
        return text
    return numbers[0] if len(numbers) == 1 else tuple(numbers)


def _part(text):
    """ "text=my-encoder" -> ("text", "my-encoder")"""
    role, sign, name = text.partition("=")
    if not sign:
        raise ValueError(f"--use {text}; expected ROLE=NAME, such as text=my-encoder")
    return role, name


def _rewriter(where, name, sees, model):
    """What rewrites prompts for this model: to captions of the tiny world for a tiny one, else of Wan."""
    if where is None:
        if name or sees:
            raise ValueError("--rewrite-model and --rewrite-sees need --rewrite URL")
        return None
    from .rewrite import opened

    return opened(where, name, "tiny" if model.startswith("tiny") else "wan", sees)


# ---- the commands ------------------------------------------------------------------------------------------


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
    solver: Annotated[str | None, typer.Option(help="unipc, dpm++, euler, or one of a plugin")] = None,
    scale: Annotated[
        str | None,
        typer.Option(
            help="guidance: how hard to push towards the prompt; a number, two for low and high noise (3,4), "
            "or the name of a guide"
        ),
    ] = None,
    shift: Annotated[float | None, typer.Option(help="how many of the steps go to high noise")] = None,
    negative: Annotated[str | None, typer.Option(help="what the video shall not show")] = None,
    frames: Annotated[int | None, typer.Option(help="4n + 1: 17, 21, 81, ...")] = None,
    size: Annotated[str | None, typer.Option(help=SIZE)] = None,
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16; by default as stored")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps")] = "cpu",
    profile: Annotated[
        str | None, typer.Option(help="base, low_memory, high_quality, or a JSON file of extensions by name")
    ] = None,
    rewrite: Annotated[
        str | None,
        typer.Option(
            metavar="URL|FOLDER|NAME",
            help="the language model that rewrites the prompt: an OpenAI-compatible server such as "
            "http://127.0.0.1:8000/v1, a folder for transformers, or a plugin's name",
        ),
    ] = None,
    rewrite_model: Annotated[
        str | None, typer.Option(metavar="NAME", help="the language model's name on that server")
    ] = None,
    rewrite_sees: Annotated[
        bool, typer.Option("--rewrite-sees", help="it takes pictures: show it the first frame")
    ] = False,
    use: Annotated[
        list[str] | None,
        typer.Option(metavar="ROLE=NAME", help="a component of a plugin instead of the model's own"),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="no progress bar, no report")] = False,
):
    """Turn a sentence, and perhaps a picture, into a video file."""
    from .settings import Note, check_words
    from .video import check_path
    from .weights import load

    # What the words alone show to be wrong is said before minutes go into loading and denoising.
    output = check_path(output)
    check_words("prompt", prompt)
    check_words("negative prompt", negative or "")
    pixels, parts = _size(size), dict(map(_part, use or ()))
    model = model or ("tiny-t2v" if image is None else "tiny-i2v")
    rewriter = _rewriter(rewrite, rewrite_model, rewrite_sees, model)
    pipe = load(model, dtype=dtype, device=device, profile=profile).replace(**parts)
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Note)  # printed below
        video = pipe(
            prompt,
            seed=seed,
            steps=steps,
            solver=solver,
            scale=None if scale is None else _scale(scale),
            shift=shift,
            negative=negative,
            frames=frames,
            size=pixels,
            image=image,
            last_image=last_image,
            rewrite=rewriter,
            # A bar is for a terminal; in a log each of its updates would be a line.
            progress=not quiet and sys.stderr.isatty(),
        )
    took = time.perf_counter() - started
    video.save(output)
    for note in video.notes:
        print(f"note: {_plain(note)}", file=sys.stderr)
    if not quiet:
        height, width = video.frames.shape[1:3]
        print(
            f"{output}: {len(video)} frames of {height} x {width}, {video.fps:g} a second, "
            f"made in {took:.1f} s with seed {video.settings['seed']}"
        )


@app.command()
def inspect(
    where: Annotated[
        str | None,
        typer.Argument(help=MODEL + ", or one file of weights; without it, all known models are listed"),
    ] = None,
    size: Annotated[str | None, typer.Option(help="of the video to forecast: " + SIZE)] = None,
    frames: Annotated[int | None, typer.Option(help="frames of the video to forecast")] = None,
    dtype: Annotated[str | None, typer.Option(help="dtype of the weights in memory")] = None,
    config: Annotated[Path | None, typer.Option(help=CONFIG)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
):
    """What a model is, what is missing, and the memory it will take. Nothing is loaded."""
    from . import weights

    if where is None:
        facts = {name: weights.preset(name)["about"] for name in weights.presets()}
        report = "\n".join(f"{name:24} {about}" for name, about in facts.items())
    else:
        # A part in a file of its own, or a whole model.
        asked = dict(size=_size(size), frames=frames, dtype=dtype)
        if Path(where).expanduser().is_file() or config is not None:
            report = weights.contents(where, **asked, config=config)
        else:
            report = weights.inspect(weights.ALIASES.get(where, where), **asked)
        facts = report.to_dict()
    print(json.dumps(facts, indent=2, default=str) if as_json else _plain(str(report)))


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="a file of weights in any format, an index, or a folder")],
    target: Annotated[Path, typer.Argument(help="the .safetensors file to write")],
    to: Annotated[str, typer.Option(help="whose names: official, diffusers or ours")] = "official",
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16; by default as stored")] = None,
    config: Annotated[Path | None, typer.Option(help=CONFIG)] = None,
):
    """Write the weights of a file under other names, or as another type, one tensor at a time."""
    from . import weights
    from .saving import writable

    kind, count, size = weights.convert(source, writable(target), to, dtype, config)
    print(f"{target}: a {kind} of {count} tensors, {size:,} bytes, {to} names")


# Jupyter's options are not ours to know: they come as words, and go on to it as they are.
@app.command(context_settings={"ignore_unknown_options": True})
def lab(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="WHERE",
            help="a notebook or a folder of them, by default those beside the package; after it, whatever "
            "`jupyter lab` takes, such as --port 8890, --no-browser, or --allow-root in a container",
        ),
    ] = None,
):
    """Open the notebooks in JupyterLab, with the guides that they link to."""
    options = list(words or [])
    where = NOTEBOOKS if not options or options[0].startswith("-") else Path(options.pop(0)).expanduser()
    books = [where] if where.suffix == ".ipynb" and where.is_file() else sorted(where.glob("*.ipynb"))
    if not books:
        raise FileNotFoundError(
            f"there are no notebooks in {where}; clone the repository and install from there "
            "(pip install -e '.[notebooks]'), or name their folder: moddiff lab FOLDER"
        )
    try:
        from jupyterlab.labapp import main as jupyter_lab
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "JupyterLab is not installed; run: pip install 'moddiff[notebooks]' "
            "(in a clone: pip install -e '.[notebooks]')"
        ) from error
    first = books[0].resolve()
    # Jupyter shows nothing above its root, and the notebooks link to ../guides.
    root = first.parents[1] if (first.parents[1] / "guides").is_dir() else first.parent
    address = quote(f"/lab/tree/{first.relative_to(root).as_posix()}")
    jupyter_lab([f"--ServerApp.root_dir={root}", f"--LabApp.default_url={address}", *options])


@app.command()
def train_tiny(
    stage: Annotated[
        str | None, typer.Option(help="vae, text, t2v, decoder, clip or i2v, in this order")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="train up to this step; by default as the shipped weights were")
    ] = None,
    folder: Annotated[
        Path,
        typer.Option(help="where checkpoints and the log go; a run that was stopped goes on from there"),
    ] = Path("runs"),
    seed: Annotated[int, typer.Option(help="of weights and data")] = 0,
    workers: Annotated[
        int, typer.Option(help="processes that train one model together, with a thread and a batch each")
    ] = 1,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:1")] = "cpu",
    batch: Annotated[
        int | None, typer.Option(help="clips of a step (captions, windows); by default what suits a CPU")
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(help="train for this time, in place of --steps; caches come on top")
    ] = None,
    clips: Annotated[
        int | None, typer.Option(help="clips that t2v, decoder and i2v learn from; by default 8000")
    ] = None,
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
    """Train the tiny models as the shipped ones were. Ctrl-C stops; the same command goes on from there."""
    from .tiny import shipping, train
    from .weights.loading import as_device

    folder, device = folder.expanduser(), as_device(device)
    if stage is None and not export and not from_shipped:
        raise ValueError(f"nothing to do: give --stage ({', '.join(train.STEPS)}), --export, or both")
    # In this order one call can begin from the shipped weights, train on, and put the result back.
    if from_shipped:
        shipping.begin_from_shipped(folder)
    if stage is not None:
        train.run_stage(stage, steps, folder, seed, clips, workers, device, batch, seconds)
    if export:
        print("\n".join(shipping.export(folder)))


@app.command()
def score(
    split: Annotated[
        str, typer.Option(help="heldout: combinations that training never showed; any: all")
    ] = "heldout",
    number: Annotated[int, typer.Option("--number", "-n", help="prompts for each figure")] = 256,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", callback=_output, help="also write the figures as JSON")
    ] = None,
):
    """Measure the tiny models against their targets: generate, and let the judge look at the videos."""
    from .tiny import targets
    from .weights import load

    targets.main(load, n=number, split=split, out=output)


@app.command()
def bench(
    model: Annotated[str, typer.Option(help=MODEL)] = "tiny-t2v",
    runs: Annotated[int, typer.Option(help="repetitions; the median is reported")] = 3,
    against: Annotated[
        str | None, typer.Option(help="diffusers: our parts beside theirs, at the widths of Wan 1.3B")
    ] = None,
    only: Annotated[str, typer.Option(help="with --against: dit, vae or text; by default all")] = "",
    device: Annotated[str, typer.Option(help="with --against: cpu, cuda, cuda:1")] = "cpu",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", callback=_output, help="also write the figures to this file, as JSON"),
    ] = None,
):
    """Time a sentence to a video, warm and cold; with --against diffusers, each part beside theirs."""
    # The module of the same name as this command.
    from . import bench

    bench.main(model, runs, against, only, device, output)


@app.callback(invoke_without_command=True)
def options(version: Annotated[bool, typer.Option("--version", help="print the version")] = False):
    # The option stands before any command, as in `moddiff --version`.
    if version:
        from . import __version__

        print(f"moddiff {__version__}")
        raise typer.Exit()
