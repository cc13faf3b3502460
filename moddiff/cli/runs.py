"""What did I run, and can I have it again?  `moddiff runs list | show | compare | again | export`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from .words import output_file, plain

STORE = Annotated[Path, typer.Option("--store", help="the file of runs")]
NUMBER = Annotated[int, typer.Argument(metavar="N", help="the number of a run")]
JSON = Annotated[bool, typer.Option("--json", help="print JSON")]
FILE = Path("runs.sqlite")

app = typer.Typer(help="Runs on record, as `moddiff generate --store FILE` keeps them.", no_args_is_help=True)


@app.command("list")
def list_runs(
    words: Annotated[
        str | None, typer.Argument(help="only those with this text in the prompt, an error or a note")
    ] = None,
    store: STORE = FILE,
    model: Annotated[
        str | None, typer.Option(help="only those of a model, or with a part, whose name has this in it")
    ] = None,
    since: Annotated[
        str | None, typer.Option(help="2026-11-01, '2026-11-01 14:30', or an age: 90m, 12h, 3d, 2w")
    ] = None,
    last: Annotated[int | None, typer.Option(help="so many at most")] = None,
    as_json: JSON = False,
):
    """All runs, the last first."""
    from .. import experiments

    found = experiments.runs(store, model, since, words, last)
    if as_json:
        _print_json([one.to_dict() for one in found])
    else:
        print(plain(str(experiments.listed_runs(found))))


@app.command()
def show(number: NUMBER, store: STORE = FILE, as_json: JSON = False):
    """Everything about one run."""
    from .. import experiments

    past = experiments.run(store, number)
    if as_json:
        _print_json(past.to_dict())
    else:
        print(plain(str(past)))


@app.command()
def compare(
    first: NUMBER,
    second: Annotated[int, typer.Argument(metavar="M", help="the number of another")],
    store: STORE = FILE,
):
    """What differs between two runs, how long each took, and how close their videos are."""
    from .. import experiments

    print(plain(str(experiments.differing(experiments.run(store, first), experiments.run(store, second)))))


@app.command()
def again(
    number: NUMBER,
    store: STORE = FILE,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="also write the video to this file"),
    ] = None,
    anyway: Annotated[
        bool, typer.Option("--anyway", help="also with other weights than it was made with")
    ] = False,
):
    """Make a run once more. Exit code 0: the same bytes; 1: others, and what differs is said."""
    from .. import experiments
    from ..video import check_path

    output = output and check_path(output)
    result = experiments.again(store, number, anyway, progress=False)
    if output:
        result.video.save(output)
    print(plain(str(result)))
    raise typer.Exit(0 if result.same else 1)


@app.command()
def export(
    number: NUMBER,
    store: STORE = FILE,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", callback=output_file, help="the JSON file; by default it is printed"),
    ] = None,
    video: Annotated[Path | None, typer.Option(help="also write the video to this file")] = None,
):
    """A run as JSON, and its video as a file."""
    from .. import experiments
    from ..saving import write_whole
    from ..video import check_path

    past, video = experiments.run(store, number), video and check_path(video)
    if video and past.video is None:
        raise ValueError(f"run {number} {past.status}, so it has no video; leave --video out")
    text = json.dumps(past.to_dict(), indent=2, ensure_ascii=False)
    if video:
        past.video.save(video)
    if output:
        write_whole(output, (text + "\n").encode())
    else:
        print(text)


def _print_json(value):
    print(json.dumps(value, indent=2))
