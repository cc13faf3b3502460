"""What does a server that batches gain?  16 rewritings, one by one and 8 at once, of each server given.

    python tests/benchmark/rewriting.py FOLDER [URL ...]

FOLDER holds the language model, in this process through `rewrite.Transformers`; a URL is a server that has
the same model by the name FOLDER. Each answer is cut off at 32 tokens, so that all have as many. The rounds
of all ways take turns, and the best of each counts.
"""

import argparse
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import torch

from moddiff.pipeline import Note
from moddiff.rewrite import WAN, Chat, Transformers, local

TOKENS, AT_ONCE = 32, 8
WISHES = [
    f"{who} {what}"
    for who, what in product(
        ("a cat", "an old man", "two children", "a red tram"),
        ("on a roof at dusk", "in the snow", "by the sea", "seen from far above"),
    )
]


def seconds(rewriter, at_once):
    """For all wishes. A server's answer counts only where it was cut off: then it has all its tokens."""
    started = time.perf_counter()
    with warnings.catch_warnings(record=True) as notes, ThreadPoolExecutor(at_once) as threads:
        warnings.simplefilter("always", Note)
        answers = list(threads.map(rewriter, WISHES))
    took = time.perf_counter() - started
    if isinstance(rewriter, Chat):
        cut = sum("cut off (length)" in str(note.message) for note in notes)
    else:
        cut = sum(len(rewriter.tokenizer.encode(answer)) >= TOKENS - 2 for answer in answers)
    told = [str(note.message) for note in notes] or answers
    assert cut == len(WISHES), f"{rewriter}: {cut} of {len(WISHES)} answers have {TOKENS} tokens: {told}"
    return took


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("urls", nargs="*", metavar="URL")
    parser.add_argument("--rounds", type=int, default=3)
    told = parser.parse_args()
    local.TOKENS = TOKENS
    how = {"instructions": WAN["en"], "tries": 1}
    # One by one in this process: its model has no queue, and threads would only share its one core.
    ways = {"in this process": (Transformers(told.folder, dtype=torch.bfloat16, **how), (1,))}
    for url in told.urls:
        chat = Chat(url, told.folder, timeout=600, options={"max_tokens": TOKENS}, **how)
        ways[url] = chat, (1, AT_ONCE)
    best = {}
    for _ in range(told.rounds):
        for name, (rewriter, widths) in ways.items():
            for at_once in widths:
                took = seconds(rewriter, at_once)
                best[name, at_once] = min(took, best.get((name, at_once), took))
    first = best["in this process", 1]
    for (name, at_once), took in best.items():
        each, rate = took / len(WISHES), len(WISHES) / took
        print(f"{name:30s} {at_once} at once: {each:.2f} s, {rate:.2f}/s, {first / took:.2f} times")


if __name__ == "__main__":
    main()
