"""Where are the lessons?  `moddiff lab` opens them in JupyterLab."""

from pathlib import Path
from typing import Annotated
from urllib.parse import quote

import typer

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


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
