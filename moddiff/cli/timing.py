"""How long does it take?  `moddiff bench`."""

from pathlib import Path
from typing import Annotated

import typer

from .words import MODEL, output_file


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
        typer.Option(
            "--output", "-o", callback=output_file, help="also write the figures to this file, as JSON"
        ),
    ] = None,
):
    """Time a sentence to a video, warm and cold; with --against diffusers, each part beside theirs."""
    # The module of the same name as this command.
    from .. import bench

    bench.main(model, runs, against, only, device, output)
