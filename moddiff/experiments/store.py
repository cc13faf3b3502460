"""What did I try, and is everything as it was?  Experiments that put all back, and a notebook of them in one file.

    with moddiff.experiment("softer attention", pipe, seed=0) as e:
        e.patch(pipe.dit, "blocks.3.self_attn.attend", softer)
        video = e.run(pipe, "a red circle moving left", seed=0)
        e.metric(redness=redness(video))

Whatever happens inside, on exit the patches are gone, weights, components, hooks and random states are those of before, and that is checked.
What was done is on disk as soon as its line returns: SQLite in WAL mode, safe against kill -9.
"""

import inspect
import io
import json
import os
import platform
import random
import sqlite3
import textwrap
import threading
import time
import warnings
from contextlib import ExitStack, closing

import numpy as np
import torch

from .. import hooks
from ..hooks import Table
from ..video import Video
from .snapshots import Leaked, Snapshot

FILE = "experiments.sqlite"
SCHEMA = """
create table if not exists experiment (id integer primary key, name text not null, started real not null, ended real, status text not null,
                                       host text, pid integer, note text);
create table if not exists entry (id integer primary key, experiment integer not null references experiment(id), at real not null,
                                  kind text not null, name text not null, value text, blob blob);
create index if not exists entry_of on entry (experiment, kind);
"""
_open_names, _lock = set(), threading.Lock()


class experiment:
    """A `with` block that cannot leak, and keeps a record of what was done in it.

    name    how it is listed; may be used again later, each time is a run of its own; but not inside itself
    objs    pipelines and modules to watch from the start; any that patch, capture, run or replace meet are watched from then on
    file    where records go: one SQLite file for all
    seed    seeds torch, numpy and random inside; their states outside stay as they are in any case
    copies  models up to this size are copied and so can be put back even if their weights are overwritten

    Raises ValueError (the name is open already), Leaked on exit if something could not be put back; what could is put back, with a warning.
    """

    def __init__(self, name, *objs, file=FILE, seed=None, note="", copies="500 MB"):
        self.name, self.objs, self.file, self.seed, self.note, self.copies = (
            name,
            objs,
            str(file),
            seed,
            note,
            copies,
        )
        self.id = None

    def __enter__(self):
        key = (os.path.abspath(self.file), self.name)
        with _lock:
            if key in _open_names:
                raise ValueError(
                    f"experiment {self.name!r} is open already; give the inner one a name of its own, or close the outer one first"
                )
            _open_names.add(key)
        self._key, self._snapshots, self._sessions, self._random = key, [], ExitStack(), None
        try:
            self._db = connect(self.file)
            self.id = self._db.execute(
                "insert into experiment (name, started, status, host, pid, note) values (?, ?, 'running', ?, ?, ?)",
                (self.name, time.time(), platform.node(), os.getpid(), self.note),
            ).lastrowid
            self._random, self._before = random_state(), hooks.open_sessions()
            if self.seed is not None:
                seed_all(self.seed)
                self.setting(seed=self.seed)
            for obj in self.objs:
                self.watch(obj)
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(self, kind, error, trace):
        outcome = error
        try:
            try:
                self._sessions.__exit__(kind, error, trace)
            finally:
                self._put_back()
        except (
            BaseException
        ) as raised:  # a miss, a leak, or one more interrupt: it goes on record and on its way
            outcome = raised
            raise
        finally:
            with _lock:
                _open_names.discard(self._key)
            if self.id is not None:
                status = (
                    "done"
                    if outcome is None
                    else "interrupted"
                    if isinstance(outcome, KeyboardInterrupt)
                    else "failed"
                )
                if outcome is not None:
                    self._write("error", type(outcome).__name__, str(outcome))
                self._db.execute(
                    "update experiment set ended = ?, status = ? where id = ?", (time.time(), status, self.id)
                )
                self._db.close()

    def _put_back(self):
        put_back = []
        for session in reversed(hooks.open_sessions()):
            if not any(session is known for known in getattr(self, "_before", ())):
                session.__exit__(GeneratorExit, None, None)
                put_back.append(repr(session))
        if self._random is not None:
            restore_random(self._random)
        lost = []
        for snapshot in self._snapshots:
            try:
                put_back += snapshot.restore()
            except Leaked as leak:
                lost.append(leak)
        if put_back:
            self._write("put back", "changed", put_back)
            warnings.warn(
                f"experiment {self.name!r} left changes behind, which were put back: {', '.join(put_back[:5])}{', ...' if len(put_back) > 5 else ''}",
                stacklevel=3,
            )
        if lost:
            raise lost[0]

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
        session = hooks.patch(self.watch(obj), pattern, function, **policy)
        self._sessions.enter_context(session)
        self._write(
            "patch",
            pattern,
            {"code": code_of(function), **{key: repr(value) for key, value in policy.items()}},
        )
        return session

    def capture(self, obj, *patterns, **policy):
        """hooks.capture, open until the experiment ends.   -> Record"""
        return self._sessions.enter_context(hooks.capture(self.watch(obj), *patterns, **policy))

    def replace(self, pipe, **parts):
        """pipe.replace, on record.   -> the new pipeline"""
        new = self.watch(pipe).replace(**parts)
        for role, part in parts.items():
            self._write("component", role, repr(type(part).__qualname__))
        return self.watch(new)

    def run(self, pipe, *args, **options):
        """pipe(*args, **options), its settings and its video on record.   -> what the pipe returned"""
        result = self.watch(pipe)(*args, **options)
        self.setting(
            **(getattr(result, "settings", None) or {"arguments": [repr(value) for value in args], **options})
        )
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
            self._write("metric", name, float(value))

    def video(self, video, name="video"):
        """Put a Video on record, without loss."""
        held = io.BytesIO()
        np.savez_compressed(held, frames=video.frames, fps=video.fps)
        self._write("video", name, None, held.getvalue())

    def _write(self, kind, name, value, blob=None):
        self._db.execute(
            "insert into entry (experiment, at, kind, name, value, blob) values (?, ?, ?, ?, ?, ?)",
            (self.id, time.time(), kind, name, json.dumps(value, default=repr), blob),
        )


class Past:
    """An experiment on record: .id .name .status .started .seconds .note, .settings .metrics (name -> last value), .patches, .entries, .videos."""

    def __init__(self, row, entries):
        self.id, self.name, self.started, ended, self.status, host, pid, self.note = row
        if self.status == "running" and host == platform.node() and not alive(pid):
            self.status = "killed"
        self.entries = [(kind, name, json.loads(value)) for kind, name, value, _ in entries]
        self.seconds = None if ended is None else ended - self.started
        self.settings = {name: value for kind, name, value in self.entries if kind == "setting"}
        self.metrics = {name: value for kind, name, value in self.entries if kind == "metric"}
        self.patches = [(name, value) for kind, name, value in self.entries if kind == "patch"]
        self._videos = [(name, blob) for kind, name, _, blob in entries if kind == "video"]

    @property
    def videos(self):
        """name -> Video; of several with one name, the last."""
        found = {}
        for name, blob in self._videos:
            with np.load(io.BytesIO(blob)) as held:
                found[name] = Video(
                    held["frames"], held["fps"].item(), {"experiment": self.name, "run": self.id}
                )
        return found

    def facts(self):
        """Everything that two experiments can differ in, as name -> text."""
        several = {}
        for kind, name, value in self.entries:
            if kind in ("setting", "metric", "component", "model", "patch", "error"):
                text = (
                    value
                    if isinstance(value, str)
                    else "\n".join(map(str, value.values()))
                    if kind == "patch"
                    else json.dumps(value)
                )
                several.setdefault(f"{kind} {name}", []).append(text)
        return {"status": self.status} | {
            name: "; ".join(dict.fromkeys(texts)) for name, texts in several.items()
        }

    def __repr__(self):
        return repr(Table((f"{self.name}, run {self.id}", ""), list(self.facts().items()), self.note))

    def _repr_html_(self):
        return Table((f"{self.name}, run {self.id}", ""), list(self.facts().items()), self.note)._repr_html_()


def listed(file=FILE):
    """A table of all experiments on record, the last first."""
    rows = []
    for past in reversed(_all(file)):
        metrics = ", ".join(f"{name} {value:.4g}" for name, value in past.metrics.items())
        rows.append(
            (
                past.id,
                past.name,
                past.status,
                time.strftime("%Y-%m-%d %H:%M", time.localtime(past.started)),
                metrics,
                past.note,
            )
        )
    return Table(("run", "name", "status", "started", "metrics", "note"), rows, f"{len(rows)} runs")


def recall(which, file=FILE):
    """One experiment by run number, or the last of a name.   -> Past; LookupError, with those there are, if it is not there"""
    every = _all(file)
    found = [past for past in every if which in (past.id, past.name)]
    if not found:
        raise LookupError(
            f"no experiment {which!r} in {file}; there are {', '.join(dict.fromkeys(past.name for past in every)) or 'none'}"
        )
    return found[-1]


def compare(a, b, file=FILE):
    """A table of what two experiments differ in, and of their metrics."""
    a, b = recall(a, file), recall(b, file)
    facts_a, facts_b = a.facts(), b.facts()
    names = [
        name
        for name in {**facts_a, **facts_b}
        if facts_a.get(name) != facts_b.get(name) or name.startswith("metric ")
    ]
    return Table(
        ("", f"{a.name}, run {a.id}", f"{b.name}, run {b.id}"),
        [(name, facts_a.get(name, ""), facts_b.get(name, "")) for name in names],
    )


def _all(file):
    if not os.path.exists(file):
        raise FileNotFoundError(f"there are no experiments in {file}; give file= where they were kept")
    with closing(connect(file)) as db:
        entries = {}
        for experiment_id, *entry in db.execute(
            "select experiment, kind, name, value, blob from entry order by id"
        ):
            entries.setdefault(experiment_id, []).append(entry)
        rows = db.execute(
            "select id, name, started, ended, status, host, pid, note from experiment order by id"
        ).fetchall()
    return [Past(row, entries.get(row[0], [])) for row in rows]


def connect(file):
    """The file, made if need be, such that each statement is on disk when it returns."""
    db = sqlite3.connect(file, timeout=30, isolation_level=None)
    try:
        db.execute("pragma journal_mode = wal")
        db.execute("pragma synchronous = full")
        db.executescript(SCHEMA)
    except sqlite3.DatabaseError as error:
        db.close()
        raise ValueError(
            f"{file} cannot hold experiments ({error}); give file= a new name, or one made by moddiff.experiment"
        ) from error
    return db


def code_of(function):
    """A patch function as text: its source where there is one, with the plain values it closes over."""
    if not inspect.isfunction(function):
        return repr(function)
    try:
        source = textwrap.dedent(inspect.getsource(function)).strip()
    except OSError:  # typed into a plain interpreter
        source = repr(function)
    closed = {
        name: cell.cell_contents
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or ())
    }
    plain = {
        name: value
        for name, value in closed.items()
        if isinstance(value, (int, float, str, bool, type(None)))
    }
    return source + (f"\n# with {plain}" if plain else "")


def alive(pid):
    """Is there a process of that number?"""
    if os.name == "nt":  # there, os.kill does not ask
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def random_state():
    return (
        torch.get_rng_state(),
        [torch.cuda.get_rng_state_all()] if torch.cuda.is_initialized() else [],
        np.random.get_state(),
        random.getstate(),
    )


def restore_random(state):
    cpu, gpus, numpy, python = state
    torch.set_rng_state(cpu)
    for states in gpus:
        torch.cuda.set_rng_state_all(states)
    np.random.set_state(numpy)
    random.setstate(python)


def seed_all(seed):
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
