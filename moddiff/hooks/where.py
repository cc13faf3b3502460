"""Where is the run?  The coordinates of a value, and `at`, by which a loop says where it is.

A value has a module, a tap and a block, and while a loop runs a step, a noise level (sigma) and a branch; in
models of two experts the expert, in a long video the window of frames. `position` also says which run it is.
"""

import operator
from contextvars import ContextVar
from dataclasses import dataclass

_position = ContextVar("moddiff_position", default=())  # the `at` blocks this thread is inside of
PLAIN_WORDS = {"tokens": "n", "words": "m"}


class OneRun:
    """Stands for one run and for no other, in `at(run=...)`: what is kept under it (weakly) goes with it.

    times  the timesteps that it will visit, 0..1000, where they are known: how long it is, and which expert
           takes which step
    """

    def __init__(self, times=None):
        self.times = None if times is None else tuple(map(float, times))


def _one_run(value):
    if not isinstance(value, OneRun):
        raise TypeError
    return value


def _frames(value):
    return tuple(operator.index(frame) for frame in value)


COORDINATES = {  # what takes a value of it, or raises; and what it is
    "run": (_one_run, "a OneRun"),
    "step": (operator.index, "the number of the step, a whole number from 0"),
    "sigma": (float, "a noise level, a number from 0 to 1"),
    "branch": (str.__str__, "the branch's name, such as 'cond'"),
    "expert": (str.__str__, "the expert's name, 'high' or 'low'"),
    "window": (_frames, "the latent frames of a window, whole numbers"),
}


@dataclass(frozen=True)
class Where:
    """The address of a value: module (`path`), tap (`name`) and its axes (`layout`), and the moment."""

    path: str
    name: str
    layout: str
    block: int | None = None
    step: int | None = None
    sigma: float | None = None
    branch: str | None = None
    call: int = 0  # how often this session met the same tap, step and branch before
    expert: str | None = None
    window: tuple | None = None

    def __str__(self):
        return f"{self.path}.{self.name}" if self.path else self.name

    def axis(self, name):
        """The dim of a named axis: `where.axis("heads")` -> 1 in "b heads n d".

        Also in plain words: tokens (n), words (m).
        """
        axes = self.layout.split()
        letter = name if name in axes else PLAIN_WORDS.get(name, name)
        if letter not in axes:
            raise ValueError(f"{self} has the axes {', '.join(axes)}; there is no {name!r}")
        return axes.index(letter)


class at:
    """Say where the run is: `with at(step=3, sigma=0.7):`; nested blocks add up, and each thread has its own.

    step a whole number, sigma a number, branch a name such as "cond", expert "high" or "low", window the
    frames it is about, run a OneRun; TypeError for anything else.
    """

    def __init__(self, *, step=None, sigma=None, branch=None, expert=None, window=None, run=None):
        self.said, self.open = {}, False
        said = dict(step=step, sigma=sigma, branch=branch, expert=expert, window=window, run=run)
        for name, value in said.items():
            take, expected = COORDINATES[name]
            try:
                if value is not None:
                    self.said[name] = take(value)
            except (TypeError, ValueError, RuntimeError):  # the last is torch's
                raise TypeError(f"at({name}={value!r}): expected {expected}") from None

    def __enter__(self):
        if self.open:
            raise RuntimeError("this at(...) is open already; make a new one for each `with` block")
        try:
            self.open = True
            _position.set((*open_blocks(), self))
            return self
        except BaseException:  # an interrupt, in the middle of it
            self.open = False
            raise

    def __exit__(self, *_):
        # Another thread may close the generator that this block stands in: its own then sees it has ended.
        self.open = False
        _position.set(open_blocks())


def open_blocks():
    return tuple(block for block in _position.get() if block.open)


def position():
    """{coordinate: value} of where this thread is, as far as announced; the names are those of `at`."""
    now = {}
    for block in open_blocks():
        now |= block.said
    return now


def forget_position():
    """Leave every `at` block of this thread."""
    for block in _position.get():
        block.open = False
    _position.set(())
