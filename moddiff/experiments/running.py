"""Is everything as it was?  Experiments put back whatever was changed, and keep a record of what was done.

    with moddiff.experiment("softer attention", pipe, seed=0) as e:
        e.patch(pipe.dit, "blocks.3.self_attn.attend", softer)
        video = e.run(pipe, "a red circle moving left", seed=0)
        e.metric(redness=redness(video))

Whatever happens inside, on exit the patches are gone, weights, components, hooks and random states are
those of before, and that is checked.
"""

import inspect
import operator
import os
import platform
import random
import sqlite3
import textwrap
import threading
import time
import warnings
from contextlib import ExitStack, contextmanager

import numpy as np
import torch

from .. import hooks
from ..pipeline import Pipeline
from ..video import Video
from . import ledger
from .keeping import Store
from .ledger import connect
from .snapshots import Leaked, Snapshot
from .store import FILE, OPEN, as_json

_lock = threading.RLock()
_random = []  # [experiment, random state before it], oldest first: all threads share one random state


class experiment:
    """A `with` block that cannot leak, and keeps a record of what was done in it.

    name    how it is listed; may be used again later, each time is a run of its own; but not inside itself
    objs    pipelines and modules to watch from the start; any that patch, capture, run or replace meet are
            watched from then on
    file    where records go: one SQLite file for all
    seed    seeds torch, numpy and random inside; their states outside stay as they are in any case
    copies  models up to this size are copied and so can be put back even if their weights are overwritten

    Raises ValueError (the name is open already), OSError (the record cannot be written), Leaked on exit if
    something could not be put back; what could is put back, with a warning.
    """

    def __init__(self, name, *objs, file=FILE, seed=None, note="", copies="500 MB"):
        for what, value in (("name", name), ("note", note)):
            if not isinstance(value, str):
                raise TypeError(
                    f"the {what} of an experiment arrived as {type(value).__name__}: {value!r}; expected text"
                )
        try:
            self.seed = None if seed is None else operator.index(seed)
        except TypeError:
            raise TypeError(f"experiment {name!r}: seed={seed!r}; expected a whole number") from None
        hooks.bytes_of(copies, "copies")  # a size, or an error now
        self.name, self.objs, self.file, self.note, self.copies = name, objs, os.fspath(file), note, copies
        self.id = self._db = None

    def __enter__(self):
        self._key = os.path.abspath(self.file), self.name
        self._snapshots, self._sessions, self._before, self._changed = [], ExitStack(), None, []
        self._recording = False
        try:
            if OPEN.setdefault(self._key, self) is not self:  # of several threads, one has the name
                raise ValueError(
                    f"experiment {self.name!r} is open already; give the inner one a name of its own, "
                    "or close the outer one first"
                )
            self._db = connect(self.file)
            self.id = self._execute(
                "insert into experiment (name, started, host, pid, note, status) "
                "values (?, ?, ?, ?, ?, 'running')",
                (self.name, time.time(), platform.node(), os.getpid(), self.note),
            ).lastrowid
            self._recording = True
            self._before = hooks.open_sessions()
            with _lock:
                _random.append([self, random_state()])
            if self.seed is not None:
                seed_all(self.seed)
                self.setting(seed=self.seed)
            for obj in self.objs:
                self.watch(obj)
            return self
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise

    def __exit__(self, kind, error, trace):
        try:
            self._end(kind, error, trace)
        except KeyboardInterrupt as interrupt:
            self._end(KeyboardInterrupt, interrupt, None)  # what it cut short
            raise

    def _end(self, kind, error, trace):
        """Put everything back and write down how it ended.

        May be called again, whatever an interrupt left half done.
        """
        outcome = error
        try:
            try:
                self._sessions.__exit__(kind, error, trace)
            finally:
                self._restore()
        except BaseException as raised:  # a miss or a leak: it goes on record and on its way
            outcome = raised
            raise
        finally:
            self._finish(outcome)

    def _restore(self):
        now_open = [] if self._before is None else hooks.open_sessions()
        for session in [session for session in reversed(now_open) if session not in self._before]:
            session.close()
            self._changed.append(repr(session))
        restore_random(self)
        lost = []
        for snapshot in self._snapshots:
            try:
                self._changed += snapshot.restore()
            except Leaked as leak:
                lost.append(leak)
        if self._changed:
            shown = ", ".join(self._changed[:5]) + ", ..." * (len(self._changed) > 5)
            warnings.warn(
                f"experiment {self.name!r} left changes behind, which were put back: {shown}", stacklevel=4
            )
        if lost:
            raise lost[0]

    def _finish(self, outcome):
        """Write down how it ended, and let go of the file and of the name."""
        status = {type(None): "done", KeyboardInterrupt: "interrupted"}.get(type(outcome), "failed")
        try:
            if self._recording:
                if self._changed:
                    self._write("put back", "changed", self._changed)
                if outcome is not None:
                    self._write("error", type(outcome).__name__, str(outcome))
                self._execute(
                    "update experiment set ended = ?, status = ? where id = ?", (time.time(), status, self.id)
                )
                self._recording = False
        except OSError as unwritten:
            if outcome is None:
                raise
            outcome.add_note(str(unwritten))  # what went wrong in the block matters more
        finally:
            if self._db is not None:
                self._db.close()
            if OPEN.get(self._key) is self:
                del OPEN[self._key]

    # what to do inside

    def watch(self, obj):
        """Remember how obj is now; on exit it will be so again.   -> obj"""
        if not any(snapshot.obj is obj for snapshot in self._snapshots):
            snapshot = Snapshot(obj, self.copies)
            self._snapshots.append(snapshot)
            self._write(
                "model", type(obj).__name__, {"fingerprint": snapshot.fingerprint, "bytes": snapshot.bytes}
            )
        return obj

    def patch(self, obj, pattern, function, **policy):
        """hooks.patch, open until the experiment ends; the function's code goes on record."""
        session = self._sessions.enter_context(hooks.patch(self.watch(obj), pattern, function, **policy))
        said = {key: repr(value) for key, value in policy.items()}
        self._write("patch", pattern, {"code": code_of(function), **said})
        return session

    def capture(self, obj, *patterns, **policy):
        """hooks.capture, open until the experiment ends.   -> Record"""
        if policy.get("stop"):
            raise ValueError(
                "capture(stop=True) ends its own `with` block, and here that would be the experiment; "
                "open it inside: with moddiff.capture(..., stop=True) as seen:"
            )
        return self._sessions.enter_context(hooks.capture(self.watch(obj), *patterns, **policy))

    def replace(self, pipe, **parts):
        """pipe.replace, on record.   -> the new pipeline"""
        new = self.watch(pipe).replace(**parts)
        for role, part in parts.items():
            self._write("component", role, repr(type(part).__qualname__))
        return self.watch(new)

    def run(self, pipe, *args, **options):
        """pipe(*args, **options), its settings and its video on record.   -> what the pipe returned

        A run of a Pipeline is also kept as one that can be made again: see keeping.py.
        """
        if isinstance(pipe, Pipeline):
            options.setdefault("store", Store(self.file, self.id))
        result = self.watch(pipe)(*args, **options)
        settings = getattr(result, "settings", None)
        self.setting(**settings or {"arguments": [repr(value) for value in args], **options})
        if isinstance(result, Video):
            self.video(result)
        return result

    def setting(self, **values):
        """Put settings on record, by name."""
        for name, value in values.items():
            self._write("setting", name, value)

    def metric(self, **numbers):
        """Put numbers on record, by name."""
        for name, value in numbers.items():
            try:
                number = float(value)
            except (TypeError, ValueError, RuntimeError) as error:  # the last is torch's, for several numbers
                raise TypeError(f"metric({name}={value!r}): expected one number") from error
            self._write("metric", name, number)

    def video(self, video, name="video"):
        """Put a Video on record, without loss."""
        if not isinstance(video, Video):
            raise TypeError(
                f"video of {type(video).__name__}; expected a moddiff.Video, such as e.run(pipe, ...) returns"
            )
        with self._guarded(), ledger.transaction(self._db):
            ledger.put(self._db, video.digest, video.frames)
            self._write("video", name, {"digest": video.digest, "fps": float(video.fps)})

    def _write(self, kind, name, value):
        self._execute(
            "insert into entry (experiment, at, kind, name, value) values (?, ?, ?, ?, ?)",
            (self.id, time.time(), kind, name, as_json(value)),
        )

    def _execute(self, statement, values):
        with self._guarded():
            return self._db.execute(statement, values)

    @contextmanager
    def _guarded(self):
        """What SQLite raises, in words that say what was lost and what was not."""
        try:
            yield
        except sqlite3.Error as error:
            raise OSError(
                f"experiment {self.name!r} could not be put on record in {self.file}: {error}. "
                "What was recorded before is safe; make room on the disk, or give file= another place"
            ) from error


def close_all():
    """End every experiment that this process has open.

    For after an interrupt that came in the very instant in which one ended.
    """
    for one in reversed(list(OPEN.values())):
        one.__exit__(None, None, None)


def code_of(function):
    """A patch function as text: its source where there is one, with the plain values it closes over."""
    if not inspect.isfunction(function):
        return repr(function)
    try:
        source = textwrap.dedent(inspect.getsource(function)).strip()
    except OSError:  # typed into a plain interpreter
        source = repr(function)
    closed = inspect.getclosurevars(function).nonlocals
    plain = {name: value for name, value in closed.items() if isinstance(value, int | float | str | None)}
    return source + (f"\n# with {plain}" if plain else "")


# the random states of torch, numpy and Python


def random_state():
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return torch.get_rng_state(), gpus, np.random.get_state(), random.getstate()


def set_random_state(state):
    cpu, gpus, numpy, python = state
    torch.set_rng_state(cpu)
    for device, gpu in enumerate(gpus):
        torch.cuda.set_rng_state(gpu, device)
    np.random.set_state(numpy)
    random.setstate(python)


def seed_all(seed):
    torch.manual_seed(seed % 2**63)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def restore_random(owner):
    """Go back to the state of before `owner`.

    While a later one is open, in another thread, that one will, when it ends.
    """
    with _lock:
        for i, (known, before) in enumerate(_random):
            if known is not owner:
                continue
            if known is _random[-1][0]:
                set_random_state(before)
            else:
                _random[i + 1][1] = before
            del _random[i]
            return
