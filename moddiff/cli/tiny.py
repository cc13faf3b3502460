"""How are the tiny models made, and how good are they?  `moddiff train-tiny` and `moddiff score`."""

from pathlib import Path
from typing import Annotated

import typer

from .words import MODEL, output_file


def train_tiny(
    stage: Annotated[
        str | None, typer.Option(help="vae, text, t2v, decoder, clip, i2v or fast, in this order")
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
        int | None,
        typer.Option(
            help="clips that t2v, decoder and i2v learn from, by default 8000; videos that fast does, 1024"
        ),
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
    from ..tiny import shipping, train
    from ..weights.loading import as_device

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


def score(
    model: Annotated[
        str | None, typer.Option(help=MODEL + "; by default tiny-t2v and tiny-i2v, one after the other")
    ] = None,
    split: Annotated[
        str, typer.Option(help="heldout: combinations that training never showed; any: all")
    ] = "heldout",
    number: Annotated[int, typer.Option("--number", "-n", help="prompts for each figure")] = 256,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", callback=output_file, help="also write the figures as JSON"),
    ] = None,
):
    """Measure the tiny models against their targets: generate, and let the judge look at the videos."""
    from ..tiny import targets
    from ..weights import load

    targets.main(load, n=number, split=split, out=output, model=model)
