"""Do words point at things, and can a colour move without its shape?  Two claims, each with its figure.

    python guides/figures/lessons.py words --seeds 50 -o guides/figures/word_map.png
    python guides/figures/lessons.py transplant --pairs 20 -o guides/figures/transplant.png

Heads and blocks are chosen on seeds of their own and measured on others. Every run is kept as soon as it is
done, in a folder beside the picture, so that a command which was interrupted goes on where it stopped.
"""

import argparse
from pathlib import Path

import torch
from colour_claim import transplants
from word_claim import words

import moddiff


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python guides/figures/lessons.py", description=__doc__.split("\n\n")[0]
    )
    claims = parser.add_subparsers(dest="claim", required=True)
    for name, count, most, choosing, out in (
        ("words", "seeds", 50, 12, "word_map.png"),
        ("transplant", "pairs", 20, 5, "transplant.png"),
    ):
        claim = claims.add_parser(name)
        claim.add_argument(f"--{count}", type=int, default=most, help="to measure on")
        claim.add_argument("--choosing", type=int, default=choosing, help="others, to choose on")
        claim.add_argument(
            "-o", "--out", type=Path, default=out, help="the picture; the numbers go beside it"
        )
        claim.add_argument("--model", default="tiny")
    options = vars(parser.parse_args(arguments))
    measure = {"words": words, "transplant": transplants}[options.pop("claim")]
    with torch.no_grad():
        print(measure(moddiff.load(options.pop("model")), **options))


if __name__ == "__main__":
    main()
