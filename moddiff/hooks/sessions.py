"""Who is looking?  Sessions: `capture` reads, `patch` writes, both are all or nothing; `taps` lists what there is.

A session lives inside a `with` block and sees the runs of the thread that opened it.
"""

import re
import sys
import threading
from collections import Counter
from contextlib import ExitStack
from contextvars import ContextVar
from dataclasses import replace

import torch

from . import forecast
from .edits import Edit, indices
from .records import Record, Table, bytes_of, in_words, span, what_is
from .tap import UnknownTap, points
from .where import position

_lock = threading.Lock()
_open = []  # every open session of the process
_eager = []  # what holds torch.compile back while any session is open
_sessions = ContextVar("moddiff_sessions", default=())  # the open sessions of this thread


class NeverFired(RuntimeError):
    """A session was opened for something that did not happen."""


class OverLimit(MemoryError):
    """A capture would hold more than its limit."""


def live_handles():
    """The names every open session of the process holds on to; empty when nobody looks."""
    with _lock:
        return [str(where) for session in _open for where, _ in session.held]


def open_sessions():
    """The sessions that this thread has open, oldest first."""
    return [session for session in _sessions.get() if session.held]


class Session:
    """What capture and patch share: it installs itself on the matching taps, all or none, and takes away exactly that."""

    edits = False

    def __init__(self, obj, patterns, steps=None, blocks=None, branch=None):
        self.obj, self.patterns = obj, patterns
        self.steps, self.blocks, self.branches = (
            chosen("steps", steps),
            chosen("blocks", blocks),
            chosen("branch", branch),
        )
        self.held, self._undo = [], None

    def resolve(self):
        """{pattern: {Where: Taps}}, or an error that says which pattern, block or axis does not exist."""
        found = {}
        for pattern in self.patterns:
            hits = points(self.obj, pattern)
            if re.search(
                r"[*?\[]", pattern.rpartition(".")[2]
            ):  # a wildcard means values; functions are named in full
                hits = {where: tap for where, tap in hits.items() if where.layout != "function"} or hits
            there = {where.block for where in hits}
            if self.blocks is not None and not self.blocks <= there:
                raise UnknownTap(
                    f"{self} has no block {span(self.blocks - there)}; {pattern} exists in blocks {span(there)}"
                )
            found[pattern] = {
                where: tap for where, tap in hits.items() if self.blocks is None or where.block in self.blocks
            }
            for where in found[pattern]:
                self.check(where)
        return found

    def check(self, where):
        """Raise if this session can do nothing with that tap."""

    def __enter__(self):
        if self._undo is not None:
            raise RuntimeError(
                f"{self} is open already; open a second one: each `with` block has its own session"
            )
        found = self.resolve()
        self.fired, self.passed, self.calls, self.elsewhere = Counter(), Counter(), Counter(), 0
        places = {}  # a module shared by two components is one place
        for pattern, hits in found.items():
            for where, tap in hits.items():
                places.setdefault((id(tap), where.name), (where, tap, []))[2].append(pattern)
        self.owners = {where: patterns for where, _, patterns in places.values()}
        with ExitStack() as undo:
            undo.callback(self._forget)
            with _lock:
                # The stance is the whole process's, so sessions share one.  Without dynamo loaded nothing is compiled yet, and loading it takes seconds.
                if not _eager and "torch._dynamo" in sys.modules:
                    _eager.append(torch.compiler.set_stance("force_eager"))
                _open.append(self)
            _sessions.set((*_sessions.get(), self))
            for where, tap, _ in places.values():
                self._install(where, tap)
            self._undo = undo.pop_all()
        return self.opened()

    def opened(self):
        return self

    def _install(self, where, tap):
        with _lock:
            tap.live = {
                **(tap.live or {}),
                where.name: (*(tap.live or {}).get(where.name, ()), (self, where)),
            }
            self.held.append((where, tap))

    def _forget(self):
        with _lock:
            for where, tap in self.held:
                rest = {
                    name: tuple(h for h in handles if h[0] is not self)
                    for name, handles in (tap.live or {}).items()
                }
                tap.live = {name: handles for name, handles in rest.items() if handles} or None
            self.held = []
            _open[:] = [s for s in _open if s is not self]
            while _eager and not _open:
                _eager.pop().__exit__(None, None, None)
        _sessions.set(tuple(s for s in _sessions.get() if s is not self and s.held))

    def __exit__(self, error, *_):
        undo, self._undo = self._undo, None
        if undo is not None:  # else someone who cleans up was here before
            undo.close()
            if error is None:
                self._report_misses()

    def mine(self):
        """Is this the thread that opened the session?"""
        return any(session is self for session in _sessions.get())

    def locate(self, where):
        """`where` with the coordinates of the moment, or None if this session did not ask for them."""
        now = position()
        step, sigma, branch = now.get("step"), now.get("sigma"), now.get("branch")
        if (
            not self.mine()
            or not (self.steps is None or step in self.steps)
            or not (self.branches is None or branch in self.branches)
        ):
            return None
        return replace(where, step=step, sigma=None if sigma is None else float(sigma), branch=branch)

    def meet(self, where):
        """locate, and keep count of what came by."""
        here, now = self.locate(where), position()
        if not self.mine():
            self.elsewhere += 1
            return None
        key = now.get("step"), now.get("branch")
        for pattern in self.owners[where]:
            self.passed[pattern, *key] += 1
            self.fired[pattern, *key] += here is not None
        if here is None:
            return None
        self.calls[where, *key] += 1
        return replace(here, call=self.calls[where, *key] - 1)

    def _report_misses(self):
        for pattern in self.patterns:
            fired = [key for key, count in self.fired.items() if key[0] == pattern and count]
            lost_steps = set() if self.steps is None else self.steps - {key[1] for key in fired}
            lost_branches = set() if self.branches is None else self.branches - {key[2] for key in fired}
            if fired and not lost_steps and not lost_branches:
                continue
            passed = {key: count for key, count in self.passed.items() if key[0] == pattern}
            steps, branches = {key[1] for key in passed}, {key[2] for key in passed}
            text = f"{type(self).__name__.lower()} of {pattern} never fired" + (
                f" at steps {span(lost_steps)}" if fired and lost_steps else ""
            )
            text += (f" in branch {span(lost_branches)}" if fired and lost_branches else "") + ": "
            if not passed:
                why = (
                    f"it passed {self.elsewhere} times in another thread, and a session sees only the thread that opened it"
                    if self.elsewhere
                    else "it never came by; run the model inside the with block, and see that no other patch skips it"
                )
            elif lost_steps and steps == {None}:
                why = "steps= was asked for, but the loop never announced one; write `with at(step=i, sigma=s):` around each step"
            elif lost_branches and branches == {None}:
                why = 'branch= was asked for, but the run never announced one; write `with at(branch="cond"):` around each pass'
            else:
                why = (
                    f"it came by {sum(passed.values())} times, at steps {span(steps)} and branches {span(branches)}; asked were steps "
                    f"{span(self.steps) if self.steps else 'all'} and branches {span(self.branches) if self.branches else 'all'}"
                )
            raise NeverFired(text + why)

    def __repr__(self):
        return f"{type(self).__name__.lower()} of {', '.join(self.patterns)}"


def chosen(name, value):
    """None for all; otherwise one value or several, as a set."""
    if value is None:
        return None
    value = (
        frozenset(value) if not isinstance(value, str) and hasattr(value, "__iter__") else frozenset([value])
    )
    if not value:
        raise ValueError(f"{name}= is empty, so nothing would ever match; leave it out for all")
    return value


class capture(Session):
    """Read: `with capture(dit, "blocks.*.cross_attn.probs", steps=[0, 5], branch="cond") as seen:` gives a Record of copies.

    obj, patterns       a module or pipeline, and the full names of taps, with * for anything
    steps blocks branch which of them: one or several; a step or branch asked for and never met is a NeverFired error
    heads rows          indices of the heads, of the query tokens; of scores and probs no more than that is formed
    reduce              an axis to average over, such as "heads", or a function of the value, run before anything is moved
    dtype device        what to keep it as and where; values in [0, 1] fit torch.float16
    limit               OverLimit, instead of death, when more bytes than this would be held
    The output of the run is bit for bit what it is without.
    """

    def __init__(
        self,
        obj,
        *patterns,
        steps=None,
        blocks=None,
        branch=None,
        heads=None,
        rows=None,
        reduce=None,
        dtype=None,
        device=None,
        limit="2 GB",
    ):
        super().__init__(obj, patterns or ("*",), steps, blocks, branch)
        self.heads, self.rows, self.reduce, self.dtype, self.device, self.limit = (
            heads,
            rows,
            reduce,
            dtype,
            device,
            bytes_of(limit),
        )

    def check(self, where):
        if where.layout == "function":
            raise ValueError(
                f"{where} is a function, there is nothing to capture; capture what goes in or comes out, or patch it"
            )
        for axis in [axis for axis, value in (("heads", self.heads), ("n", self.rows)) if value is not None]:
            where.axis(axis)
        if isinstance(self.reduce, str):
            where.axis(self.reduce)

    def opened(self):
        self.record = Record()
        return self.record

    def pick(self, where, size):
        """{axis: indices} of the heads and rows asked for."""
        asked = {"heads": self.heads, "n": self.rows}
        return {
            axis: indices(
                value,
                size[where.axis(axis)],
                f"capture of {where} ({where.layout}), {'rows' if axis == 'n' else axis}=",
            )
            for axis, value in asked.items()
            if value is not None
        }

    def visit(self, x, where):
        here = self.meet(where)
        if here is not None:
            value = x.detach()
            for axis, kept in self.pick(where, x.shape).items():
                value = value.index_select(where.axis(axis), kept.to(x.device))
            self.keep(
                value.clone() if callable(self.reduce) else value, here
            )  # a clone, so that reduce= may write into it
        return x

    def glance(self, shape, dtype, make, where):
        here = self.meet(where)
        if here is not None:
            kept = self.pick(where, shape)
            count = torch.Size(
                len(kept[axis]) if axis in kept else size for axis, size in zip(where.layout.split(), shape)
            ).numel()
            self.afford(
                count * (dtype if self.reduce else self.dtype or dtype).itemsize,
                where,
                self.record.bytes if self.reduce is None else 0,
            )
            self.keep(make(kept.get("heads"), kept.get("n")), here)

    def afford(self, size, where, held):
        if self.limit is not None and held + size > self.limit:
            raise OverLimit(
                f"capture of {where} needs {in_words(size)} more on top of {in_words(held)}; the limit is {in_words(self.limit)}. "
                "Ask for fewer steps=, blocks=, heads= or rows=, give reduce= or dtype=torch.float16, or raise limit="
            )

    def keep(self, value, where):
        if isinstance(self.reduce, str):
            value = value.mean(where.axis(self.reduce))
            where = replace(
                where, layout=" ".join(axis for axis in where.layout.split() if axis != self.reduce)
            )
        elif self.reduce is not None:
            value = self.reduce(value)
            if not isinstance(value, torch.Tensor):
                raise TypeError(
                    f"reduce= of the capture of {where} returned {type(value).__name__}; expected a tensor. Did the function forget to return?"
                )
            where = where if value.ndim == len(where.layout.split()) else replace(where, layout="")
        dtype = self.dtype if self.dtype and value.is_floating_point() else value.dtype
        self.afford(value.numel() * dtype.itemsize, where, self.record.bytes)
        self.record.add(where, value.to(device=self.device or value.device, dtype=dtype, copy=True))

    def cost(self, obj=None, *inputs, steps=None, branches=2, **example):
        """A table of what this capture would hold, forecast without running it: see `forecast.cost`."""
        return forecast.cost(self, obj, *inputs, steps=steps, branches=branches, **example)


class patch(Session):
    """Write: `with patch(dit, "blocks.2.cross_attn.heads", zero(heads=3)):` the function's result takes the place of the value.

    function  (x, where) -> x of the same shape, dtype and device; for a tap that is called, (original, *args, where) -> result
    Patching scores or probs writes that attention out, so compare with a run under `patch(..., identity)`, not with the plain one.
    """

    edits = True

    def __init__(self, obj, pattern, function, *, steps=None, blocks=None, branch=None):
        if not callable(function):
            raise TypeError(
                f"patch of {pattern} needs a function (x, where) -> x, got {type(function).__name__}; "
                "for a fixed value write lambda x, where: value"
            )
        super().__init__(obj, (pattern,), steps, blocks, branch)
        self.function = function

    def check(self, where):
        if isinstance(self.function, Edit):
            self.function.check(where)

    def visit(self, x, where):
        here = self.meet(where)
        # The function gets a copy, so that writing into it cannot reach a tensor that someone else still holds.
        return x if here is None else self.returned(self.function(x.clone(), here), x, here)

    def glance(self, shape, dtype, make, where):
        self.meet(where)

    def wrap(self, function, where):
        def patched(*args):
            here = self.meet(where)
            if here is None:
                return function(*args)
            return self.returned(
                self.function(
                    function, *[a.clone() if isinstance(a, torch.Tensor) else a for a in args], here
                ),
                args[0],
                here,
            )

        return patched

    def returned(self, new, x, where):
        expected = f"patch at {where} returned %s; expected {list(x.shape)} ({where.layout})"
        if new is None:
            raise TypeError(expected % "None" + ". Did the function forget to return?")
        if not isinstance(new, torch.Tensor):
            raise TypeError(expected % type(new).__name__ + " as a tensor")
        if new.shape != x.shape:
            raise ValueError(expected % list(new.shape) + "; keep every axis (keepdim=True) and its size")
        if new.dtype != x.dtype:
            raise ValueError(expected % new.dtype + f" as {x.dtype}; return new.to(x.dtype)")
        if new.device != x.device:
            raise ValueError(
                expected % f"a tensor on {new.device}" + f" on {x.device}; return new.to(x.device)"
            )
        return new


def taps(obj, pattern="*", **example):
    """A table of what can be seen: name, layout, shape, meaning.

    Shapes are those of the last captured run; with the arguments of the model's `example` (`taps(dit, size=(480, 832), frames=81)`)
    they come from a rehearsal on the meta device.
    """
    if example:
        obj = forecast.ghost(obj)
        with capture(obj, "*", limit=None):
            forecast.run_on_meta(obj, (), example)
    rows = []
    for where, tap in points(obj, pattern).items():
        shape = tap.shapes.get(where.name)
        rows.append((str(where), where.layout, list(shape) if shape else "", what_is(where.name)))
    return Table(("tap", "layout", "shape", "what it is"), rows, f"{len(rows)} taps")
