"""What did I try?  The experiments on record, listed, recalled and compared."""

import io
import json
import os
import platform
import time
from contextlib import closing

import numpy as np

from ..hooks.records import HasTable, Table
from ..video import Video
from .ledger import got, reading

FILE = "experiments.sqlite"
OPEN = {}  # (file, name) -> the experiments that this process has open


def as_json(value):
    """A value as JSON; what JSON cannot hold is written as Python shows it."""
    try:
        return json.dumps(value, default=repr)
    except (TypeError, ValueError):  # keys that are no text, or a list inside itself
        return json.dumps(repr(value))


class Past(HasTable):
    """An experiment on record.

    .id .name .status .started .seconds .note   status: done, failed, interrupted, running,
                                                killed, or lost (its end was not written)
    .settings .metrics .videos                  name -> the last value
    .patches .entries                           [(name, value)], [(kind, name, value)], in order
    """

    def __init__(self, row, entries, file):
        self.id, self.name, self.started, ended, self.status, host, pid, self.note = row
        if self.status == "running" and host == platform.node():
            if pid == os.getpid() and not any(one.id == self.id for one in OPEN.values()):
                self.status = "lost"  # it has ended, and that could not be written
            elif not alive(pid):
                self.status = "killed"
        self.entries = [(kind, name, json.loads(value)) for kind, name, value, _ in entries]
        self.seconds = None if ended is None else ended - self.started
        self.settings = {name: value for kind, name, value in self.entries if kind == "setting"}
        self.metrics = {name: value for kind, name, value in self.entries if kind == "metric"}
        self.patches = [(name, value) for kind, name, value in self.entries if kind == "patch"]
        self._videos = [
            (name, json.loads(value), blob) for kind, name, value, blob in entries if kind == "video"
        ]
        self.file = file

    @property
    def videos(self):
        """name -> Video; of several with one name, the last."""
        videos = {}
        for name, value, blob in self._videos:
            if blob is None:
                frames, fps = got(self.file, value["digest"]), value["fps"]
            else:  # of a file from before there were runs
                with np.load(io.BytesIO(blob)) as held:
                    frames, fps = held["frames"], held["fps"].item()
            videos[name] = Video(frames, fps, {"experiment": self.name, "run": self.id})
        return videos

    def facts(self):
        """Everything that two experiments can differ in, as name -> text."""
        several = {"status": [self.status]}
        for kind, name, value in self.entries:
            if kind == "patch":
                value = "\n".join(map(str, value.values()))
            if kind in ("setting", "metric", "component", "model", "patch", "error"):
                text = value if isinstance(value, str) else json.dumps(value)
                several.setdefault(f"{kind} {name}", []).append(text)
        return {name: "; ".join(dict.fromkeys(texts)) for name, texts in several.items()}

    def table(self):
        return Table((f"{self.name}, run {self.id}", ""), list(self.facts().items()), self.note)


def listed(file=FILE):
    """A table of all experiments on record, the last first."""
    rows = [
        (
            past.id,
            past.name,
            past.status,
            time.strftime("%Y-%m-%d %H:%M", time.localtime(past.started)),
            ", ".join(f"{name} {value:.4g}" for name, value in past.metrics.items()),
            past.note,
        )
        for past in reversed(_all(file))
    ]
    return Table(("run", "name", "status", "started", "metrics", "note"), rows, f"{len(rows)} runs")


def recall(which, file=FILE):
    """One experiment by run number, or the last of a name.

    -> Past; LookupError, with those there are, if it is not there
    """
    every = _all(file)
    fitting = [past for past in every if which in (past.id, past.name)]
    if not fitting:
        names = ", ".join(dict.fromkeys(past.name for past in every)) or "none"
        raise LookupError(f"no experiment {which!r} in {file}; there are {names}")
    return fitting[-1]


def differences(a, b, file=FILE):
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
    with closing(reading(file)) as db:
        rows = db.execute(
            "select id, name, started, ended, status, host, pid, note from experiment order by id"
        ).fetchall()
        of_one = "select kind, name, value, blob from entry where experiment = ? order by id"
        return [Past(row, db.execute(of_one, row[:1]).fetchall(), file) for row in rows]


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
