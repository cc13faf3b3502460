"""What is in these files?  `moddiff inspect` and `moddiff convert`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from .words import CONFIG, MODEL, SIZE, plain, size_of


def inspect(
    where: Annotated[
        str | None,
        typer.Argument(help=MODEL + ", or one file of weights; without it, all known models are listed"),
    ] = None,
    size: Annotated[str | None, typer.Option(help="of the video to forecast: " + SIZE)] = None,
    frames: Annotated[int | None, typer.Option(help="frames of the video to forecast")] = None,
    dtype: Annotated[str | None, typer.Option(help="dtype of the weights in memory")] = None,
    config: Annotated[Path | None, typer.Option(help=CONFIG)] = None,
    profile: Annotated[str | None, typer.Option(help="a JSON file of extensions to forecast, too")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
):
    """What a model is, what is missing, and the memory it will take. Nothing is loaded."""
    from .. import weights

    if where is None:
        facts = {name: weights.preset(name)["about"] for name in weights.presets()}
        report = "\n".join(f"{name:24} {about}" for name, about in facts.items())
    else:
        # A part in a file of its own, or a whole model.
        asked = dict(size=size_of(size), frames=frames, dtype=dtype, profile=profile)
        if Path(where).expanduser().is_file() or config is not None:
            report = weights.contents(where, **asked, config=config)
        else:
            report = weights.inspect(weights.ALIASES.get(where, where), **asked)
        facts = report.to_dict()
    print(json.dumps(facts, indent=2, default=str) if as_json else plain(str(report)))


def convert(
    source: Annotated[Path, typer.Argument(help="a file of weights in any format, an index, or a folder")],
    target: Annotated[Path, typer.Argument(help="the .safetensors file to write")],
    to: Annotated[str, typer.Option(help="whose names: official, diffusers or ours")] = "official",
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16; by default as stored")] = None,
    config: Annotated[Path | None, typer.Option(help=CONFIG)] = None,
):
    """Write the weights of a file under other names, or as another type, one tensor at a time."""
    from .. import weights
    from ..saving import writable

    kind, count, size = weights.convert(source, writable(target), to, dtype, config)
    print(f"{target}: a {kind} of {count} tensors, {size:,} bytes, {to} names")
