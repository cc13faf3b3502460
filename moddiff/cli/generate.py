"""How do I make a video from the terminal?  `moddiff generate`."""

import sys
import time
import warnings
from pathlib import Path
from typing import Annotated

import typer

from .spans import command
from .together import together
from .words import MODEL, SIZE, part_of, plain, scale_of, size_of, steps_of


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
    steps: Annotated[
        str | None,
        typer.Option(help="denoising steps: how many, or their noise levels, as few-step models have a list"),
    ] = None,
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
    ulysses: Annotated[
        int, typer.Option(help="under torchrun: over how many processes heads of attention are shared")
    ] = 1,
    ring: Annotated[
        int, typer.Option(help="under torchrun: how many processes keys and values go round")
    ] = 1,
    branches: Annotated[
        int, typer.Option(help="under torchrun: 2, and half of the processes compute each branch of guidance")
    ] = 1,
    shard: Annotated[
        bool, typer.Option("--shard", help="under torchrun: each process keeps a share of the dit's weights")
    ] = False,
    trace: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="write when each piece of the run was done, as OTLP/JSON (moddiff.viz.waterfall draws it, "
            "Jaeger and others open it)",
        ),
    ] = None,
    store: Annotated[Path | None, typer.Option(help="keep the run in this file; see `moddiff runs`")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="no progress bar, no report")] = False,
):
    """Turn a sentence, and perhaps a picture, into a video file."""
    # Imported here and not above: `moddiff --help` need not wait for torch.
    from ..settings import Note, check_words
    from ..video import check_path
    from ..weights import load

    # What the words alone show to be wrong is said before minutes go into loading and denoising.
    output = check_path(output)
    if trace is not None and trace.resolve() == output.resolve():
        raise ValueError(f"--trace and --output are the same file, {output}; give one of them another name")
    check_words("prompt", prompt)
    check_words("negative prompt", negative or "")
    kept = None if store is None else _store(store)
    pixels, parts = size_of(size), dict(map(part_of, use or ()))
    model = model or ("tiny-t2v" if image is None else "tiny-i2v")
    rewriter = _rewriter(rewrite, rewrite_model, rewrite_sees, model)
    how = {"ulysses": ulysses, "ring": ring, "branches": branches, "shard": shard}
    with together(device, **how) as group, command("generate", trace if group.first else None):
        pipe = load(model, dtype=dtype, device=str(group.device), profile=profile).replace(**parts)
        pipe = group.shared(pipe)
        started = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Note)  # printed below
            video = pipe(
                prompt,
                seed=group.seed(seed),
                steps=None if steps is None else steps_of(steps),
                solver=solver,
                scale=None if scale is None else scale_of(scale),
                shift=shift,
                negative=negative,
                frames=frames,
                size=pixels,
                image=image,
                last_image=last_image,
                rewrite=group.agreed(rewriter),
                store=kept if group.first else None,  # all make the same video, and one writes it
                # A bar is for a terminal; in a log each of its updates would be a line.
                progress=group.first and not quiet and sys.stderr.isatty(),
            )
        took = time.perf_counter() - started
    if not group.first:
        return
    video.save(output)
    for note in video.notes:
        print(f"note: {plain(note)}", file=sys.stderr)
    if not quiet:
        height, width = video.frames.shape[1:3]
        print(
            f"{output}: {len(video)} frames of {height} x {width}, {video.fps:g} a second, "
            f"made in {took:.1f} s with seed {video.settings['seed']}"
            + (f", kept as run {video.run}" if video.run else "")
        )


def _store(file):
    """The file of runs, tried before minutes go into loading."""
    from ..experiments import Store

    return Store(file)


def _rewriter(where, name, sees, model):
    """What rewrites prompts for this model: to captions of the tiny world for a tiny one, else of Wan."""
    if where is None:
        if name or sees:
            raise ValueError("--rewrite-model and --rewrite-sees need --rewrite URL")
        return None
    from ..rewrite import opened

    return opened(where, name, "tiny" if model.startswith("tiny") else "wan", sees)
