"""Who is looking?  Sessions: on all the taps they ask for or on none, and gone again, whatever happens.

A session lives inside a `with` block and sees the runs of the thread that opened it.
"""

import operator
import re
import sys
import threading
from collections import Counter
from contextvars import ContextVar
from dataclasses import replace

import torch

from .records import span
from .tap import UnknownTap, points
from .where import forget_position, position

# Re-entrant: while this thread opens a session, the garbage collector may close that of a lost generator.
_lock = threading.RLock()
_open = []  # every open session of the process
_eager = []  # what holds torch.compile back while any session is open
_sessions = ContextVar("moddiff_sessions", default=())  # (session, opening) of this thread, oldest first


class NeverFired(RuntimeError):
    """A session was opened for something that did not happen."""


class Finished(BaseException):
    """Finished(session): no error, but the way out of a run once a session has all it asked for.

    The session's own `with` block takes it.
    """


def live_handles():
    """The names every open session of the process holds on to; empty when nobody looks."""
    with _lock:
        return [str(where) for session in _open for where, _ in session.handles]


def open_sessions():
    """The sessions that this thread has open, oldest first."""
    return [session for session, opening in _sessions.get() if session.opening is opening]


def close_all():
    """Close every session of the process, of other threads too, and leave every `at` of this thread.

    For the one case in which a `with` block cannot clean up: a second Ctrl-C, or one in the instant in
    which the block ends.
    """
    for session in list(_open):
        session.close()
    forget_position()


class Session:
    """What capture and patch share: it goes onto the taps it asks for, and takes away exactly itself.

    A tap (see `Taps`) knows no more of its sessions than this, and asks them in the order of their opening:

        visit(x, where) -> x                a value comes by; what is returned flows on
        glance(shape, dtype, make, where)   one comes by that the run does not form; make(heads, rows) would
        wrap(function, where) -> function   a function is about to be called; what is returned is called
        locate(where) -> Where or None      does the session want this tap, at this step and in this branch?
        edits                               may it change what flows on?  Then fused attention is written out

    `where` is the tap's address; step, noise level and branch are filled in by `locate`.
    """

    edits = False

    def __init__(self, obj, patterns, steps=None, blocks=None, branch=None):
        if odd := [pattern for pattern in patterns if not isinstance(pattern, str)]:
            raise TypeError(
                f"{odd[0]!r} is no name of a tap; expected text such as 'blocks.*.resid_post', "
                "and taps(obj) lists all"
            )
        self.obj, self.patterns = obj, patterns
        self.steps = as_set("steps", steps, operator.index, "a whole number")
        self.blocks = as_set("blocks", blocks, operator.index, "a whole number")
        self.branches = as_set("branch", branch, str.__str__, "text")
        self.handles = []  # (Where, Taps) that this session is on
        # A new object each time it opens, so that a thread that remembers an earlier opening is not meant.
        self.opening = None

    # what a tap asks; visit, glance and wrap, and a check of the tap before the run, are each verb's own

    def locate(self, where):
        """`where` with the coordinates of the moment, or None if this session did not ask for them."""
        now = position()
        if not self.mine() or not self.wants(now.get("step"), now.get("branch")):
            return None
        return replace(where, **{name: value for name, value in now.items() if name != "run"})

    def wants(self, step, branch):
        asked = (self.steps, step), (self.branches, branch)
        return all(some is None or one in some for some, one in asked)

    def mine(self):
        """Is this the thread that opened the session?"""
        return (self, self.opening) in _sessions.get()

    def meet(self, where):
        """locate, and keep count of what came by."""
        if not self.mine():
            self.elsewhere += 1
            return None
        here, now = self.locate(where), position()
        moment = now.get("step"), now.get("branch")
        for pattern in self.asked[where]:
            self.came[pattern][moment] += 1
        if here is None:
            return None
        self.calls[where, moment] += 1
        return replace(here, call=self.calls[where, moment] - 1)

    # opening and closing

    def resolve(self):
        """{Where: (Taps, patterns that name it)}, or an error that says what is not there."""
        hit, first = {}, {}
        for pattern in self.patterns:
            hits = points(self.obj, pattern)
            if re.search(r"[*?\[]", pattern.rpartition(".")[2]):
                # A wildcard means values; functions are named in full.
                hits = {where: tap for where, tap in hits.items() if where.layout != "function"} or hits
            there = {where.block for where in hits}
            blocks = there if self.blocks is None else self.blocks
            if lacking := blocks - there:
                raise UnknownTap(
                    f"{self} has no block {span(lacking)}; {pattern} exists in blocks {span(there)}"
                )
            for where, tap in hits.items():
                if where.block not in blocks:
                    continue
                self.check(where)
                tap.admit(self, where)
                # A module that two components share is visited once, under the name that was met first.
                where = first.setdefault((id(tap), where.name), where)
                hit.setdefault(where, (tap, []))[1].append(pattern)
        return hit

    def begin(self):
        """Get ready for a new run.   -> what the `with` block is given"""
        return self

    def __enter__(self):
        if self.opening is not None:
            raise RuntimeError(
                f"{self} is open already; open a second one: each `with` block has its own session"
            )
        hit = self.resolve()
        self.asked = {where: patterns for where, (_, patterns) in hit.items()}
        self.came = {pattern: Counter() for pattern in self.patterns}  # (step, branch) -> how often
        self.calls, self.elsewhere = Counter(), 0
        given = self.begin()
        try:  # the return too, since an interrupt may come wherever a line ends
            self._install([(where, tap) for where, (tap, _) in hit.items()])
            return given
        except BaseException:
            self.close()
            raise

    def _install(self, handles):
        self.opening, self.handles = object(), handles
        with _lock:
            _open.append(self)
            # The stance is the whole process's, so sessions share one.  Without dynamo nothing is compiled
            # yet, and loading it takes seconds.
            if not _eager and "torch._dynamo" in sys.modules:
                _eager.append(None)  # first, so that an interrupt between the two leaves a trace
                _eager[-1] = torch.compiler.set_stance("force_eager")
            _sessions.set((*remembered(), (self, self.opening)))
            for where, tap in handles:
                live = tap.live or {}
                tap.live = live | {where.name: (*live.get(where.name, ()), (self, where))}

    def close(self):
        """Leave every tap, as `with` does.  May be called again, whatever an interrupt left half done."""
        with _lock:
            for _, tap in self.handles:
                live = {name: without(self, handles) for name, handles in (tap.live or {}).items()}
                tap.live = {name: handles for name, handles in live.items() if handles} or None
            _open[:] = [session for session in _open if session is not self]
            while _eager and not _open:
                if _eager[-1] is None:
                    torch.compiler.set_stance("default")
                else:
                    _eager[-1].__exit__(None, None, None)
                _eager.pop()
            self.opening, self.handles = None, []
        _sessions.set(remembered())

    def __exit__(self, kind, error, trace):
        try:
            was_open = self.opening is not None  # else someone who cleans up was here before
            self.close()
        except BaseException:  # an interrupt in between: it goes on when all is closed
            self.close()
            raise
        if was_open and kind is None:
            for pattern in self.patterns:
                self._report_miss(pattern)
        return isinstance(error, Finished) and error.args == (self,)

    # what did not happen

    def _report_miss(self, pattern):
        """Raise NeverFired, with the reason, if a pattern was not seen at each step and branch asked for."""
        came = self.came[pattern]
        fired = [moment for moment in came if self.wants(*moment)]
        lost_steps = (self.steps or set()) - {step for step, _ in fired}
        lost_branches = (self.branches or set()) - {branch for _, branch in fired}
        if fired and not lost_steps and not lost_branches:
            return
        where = f" at steps {span(lost_steps)}" * bool(fired and lost_steps)
        where += f" in branch {span(lost_branches)}" * bool(fired and lost_branches)
        steps, branches = {step for step, _ in came}, {branch for _, branch in came}
        reasons = (
            (
                not came and self.elsewhere,
                f"it passed {self.elsewhere} times in another thread, "
                "and a session sees only the thread that opened it",
            ),
            (
                not came,
                "it never came by; run the model inside the with block, and see that no other patch skips it",
            ),
            (
                lost_steps and steps == {None},
                "steps= was asked for, but the loop never announced one; "
                "write `with at(step=i, sigma=s):` around each step",
            ),
            (
                lost_branches and branches == {None},
                "branch= was asked for, but the run never announced one; "
                'write `with at(branch="cond"):` around each pass',
            ),
            (
                True,
                f"it came by {sum(came.values())} times, "
                f"at steps {span(steps)} and branches {span(branches)}; asked were "
                f"steps {span(self.steps or ['all'])} and branches {span(self.branches or ['all'])}",
            ),
        )
        reason = next(text for holds, text in reasons if holds)
        raise NeverFired(f"{type(self).__name__.lower()} of {pattern} never fired{where}: {reason}")

    def __repr__(self):
        return f"{type(self).__name__.lower()} of {', '.join(self.patterns)}"


def without(session, handles):
    """The (session, where) of the other sessions, as far as these are still open."""
    return tuple(handle for handle in handles if handle[0] is not session and handle[0].opening is not None)


def remembered():
    """The (session, opening) of this thread that are still open: another thread may have closed some."""
    return tuple((session, opening) for session, opening in _sessions.get() if session.opening is opening)


def as_set(name, value, kind, expected):
    """One value, or several, that a session asks for; None for all.   -> frozenset or None

    Raises TypeError for what `kind` does not take, ValueError if it is empty.
    """
    if value is None:
        return None
    single = isinstance(value, str) or not hasattr(value, "__iter__") or getattr(value, "ndim", 1) == 0
    values = [value] if single else list(value)
    if not values:
        raise ValueError(f"{name}= is empty, so nothing would ever match; leave it out for all")
    try:
        return frozenset(map(kind, values))
    except TypeError:
        raise TypeError(f"{name}={value!r}; expected {expected}, or several") from None
