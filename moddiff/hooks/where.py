"""Where is the run?  The coordinates of a value: module, tap, block, step, sigma, branch; and `at`, by which a loop announces them."""

from contextvars import ContextVar
from dataclasses import dataclass

_position = ContextVar("moddiff_position", default=())  # the `at` blocks this thread is inside of


@dataclass(frozen=True)
class Where:
    """The place of a value: `path` of its module, `name` of its tap, `layout` of its axes, and the run's coordinates."""

    path: str
    name: str
    layout: str
    block: int | None = None
    step: int | None = None
    sigma: float | None = None
    branch: str | None = None
    call: int = 0  # how often this session met the same place, step and branch before

    def __str__(self):
        return f"{self.path}.{self.name}" if self.path else self.name

    def axis(self, name):
        """The dim of a named axis: `where.axis("heads")` -> 1 in "b heads n d".  Also in plain words: tokens (n), words (m)."""
        axes = self.layout.split()
        plain = name if name in axes else {"tokens": "n", "words": "m"}.get(name, name)
        if plain not in axes:
            raise ValueError(f"{self} has the axes {', '.join(axes)}; there is no {name!r}")
        return axes.index(plain)


class at:
    """Say where the run is: `with at(step=3, sigma=0.7):`; nested blocks add up, and each thread has its own."""

    def __init__(self, *, step=None, sigma=None, branch=None):
        self.given = {
            k: v
            for k, v in dict(step=None if step is None else int(step), sigma=sigma, branch=branch).items()
            if v is not None
        }

    def __enter__(self):
        _position.set((*_position.get(), self))
        return self

    def __exit__(self, *_):
        _position.set(tuple(a for a in _position.get() if a is not self))


def position():
    """The step, sigma and branch this thread is at, as far as announced."""
    given = {}
    for a in _position.get():
        given |= a.given
    return given
