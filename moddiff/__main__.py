"""python -m moddiff: the same as the command `moddiff`."""

from .cli import main

main()
