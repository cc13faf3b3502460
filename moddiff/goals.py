"""Is it as fast as it is meant to be?  The goals on a CPU, each with what was measured, met or not.

Three figures that need no other program are measured here: how much of a step is lost beside plain matrix
products, what closed taps cost, and what an import costs. The others are rows of `moddiff bench`.
"""

import statistics
import subprocess
import sys
import time
import timeit
from contextlib import ExitStack
from typing import NamedTuple
from unittest.mock import patch

import torch

from .hooks import Taps
from .linear import Linear

SMALL_DIT = dict(  # in which taps are dear, since what they stand beside takes little time
    model_type="t2v", in_dim=16, dim=256, ffn_dim=1024, freq_dim=128, text_dim=256, out_dim=16, num_heads=4,
    num_layers=6, text_len=64,
)  # fmt: skip


class Goal(NamedTuple):
    """What a figure is meant to be: at most, or at least, so much."""

    name: str  # of the row, without its dtype
    figure: str  # of that row
    most: float | None = None
    least: float | None = None

    def met(self, value):
        return value <= self.most if self.least is None else value >= self.least

    def line(self, row):
        """One line of the table: the goal, what was measured, met or not."""
        value, verdict = row[self.figure], "met" if self.met(row[self.figure]) else "missed"
        wanted = f"<= {self.most}" if self.least is None else f">= {self.least}"
        return f"{row['name']:26} {self.figure:14} {wanted:>8} {value:9.4f}   {verdict}"


ON_A_CPU = (
    Goal("dit, eager", "ratio", most=0.80),
    Goal("dit, eager", "of_products", least=0.85),
    Goal("vae, decode", "ratio", most=0.70),
    Goal("vae, decode", "peak_ratio", most=0.5),
    Goal("text, 20 tokens", "ratio", most=0.1),
    Goal("closed taps", "share", most=0.01),
    Goal("import", "ratio", most=1.15),
    Goal("import", "with_load", most=1.15),
)


def lines(rows):
    """What the rows say to the goals.   -> a line for each goal and dtype that was measured"""
    for goal in ON_A_CPU:
        for row in rows:
            if row["name"].startswith(goal.name) and goal.figure in row:
                yield goal.line(row)


def step_flops(config, tokens, words=512):
    """Multiplications and additions of one step over so many tokens, the prompt prepared.

    The products of the blocks and both attentions; what else a step does is less than a hundredth.
    """
    products = 2 * tokens * (6 * config.dim**2 + 2 * config.dim * config.ffn_dim)
    attention = 4 * tokens * (tokens + words) * config.dim  # scores, and values summed by them
    return config.num_layers * (products + attention)


def of_products(step, config, tokens, words, dtype, runs):
    """At which share of the rate of a plain matrix product does a step of a dit work?   -> 1: nothing is lost

    The product is the wide layer of a block, [tokens, dim] x [dim, ffn_dim], by the same library call.
    """
    wide, x = Linear(config.dim, config.ffn_dim).to(dtype), torch.randn(tokens, config.dim, dtype=dtype)
    work = step_flops(config, tokens, words) / (2 * tokens * config.dim * config.ffn_dim)  # in such products
    turns = [(seconds(lambda: wide(x), 5), seconds(step, 1)) for _ in range(runs)]
    return statistics.median(work * product / whole for product, whole in turns)


def seconds(work, number):
    """Mean seconds of one call."""
    return timeit.timeit(work, number=number) / number


@torch.no_grad()
def taps_row():
    """What the taps of one forward cost while nobody looks: their calls, times what each takes."""
    from .dit import DiT, DiTConfig

    dit = DiT(DiTConfig(**SMALL_DIT)).eval()
    inputs = torch.randn(1, 16, 5, 12, 12), torch.tensor([500.0]), [torch.randn(12, 256)]
    calls = []
    with ExitStack() as noted:
        for name in ("__call__", "edited", "watched", "call"):
            noted.enter_context(patch.object(Taps, name, noting(calls, name, getattr(Taps, name))))
        dit(*inputs)
    tap, x = Taps(x="n"), torch.zeros(1)
    each = {
        "__call__": fastest(lambda: tap("x", x), 2000),
        "call": fastest(lambda: tap.call("x", id, x), 2000),
        "edited": fastest(lambda: tap.edited("x", "y", "z"), 2000),
        "watched": fastest(lambda: tap.watched("x", "y"), 2000),
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that wait for each other take processor time as well
    try:
        forward = fastest(lambda: dit(*inputs), 1)
    finally:
        torch.set_num_threads(threads)
    return dict(name="closed taps", calls=len(calls), share=sum(each[name] for name in calls) / forward)


def noting(calls, name, method):
    """The method, which puts its name down each time it is called."""

    def noted(*arguments):
        calls.append(name)
        return method(*arguments)

    return noted


def fastest(work, number):
    """Processor seconds of one call, the least of nine tries: what others do on the machine only adds."""
    return min(timeit.repeat(work, timer=time.process_time, number=number, repeat=9)) / number


def import_row(runs):
    """`import moddiff` beside `import torch`, each in fresh processes.

    moddiff imports a name when it is first used; `with_load` is the ratio with `moddiff.load` and torch.
    """
    ours, theirs, used = "import moddiff", "import torch", "import moddiff; moddiff.load; import torch"
    for code in (ours, theirs, used):
        started(code)  # the files are read and compiled once
    turns = [(started(ours), started(theirs), started(used)) for _ in range(runs)]
    return dict(
        name="import",
        ours=statistics.median(a for a, _, _ in turns),
        theirs=statistics.median(b for _, b, _ in turns),
        ratio=statistics.median(a / b for a, b, _ in turns),
        with_load=statistics.median(c / b for _, b, c in turns),
    )


def started(code):
    """Seconds until a fresh Python has run it."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - start
