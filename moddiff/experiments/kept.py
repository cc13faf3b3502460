"""Which runs are on record, and how do two of them differ?  Listed, found by number, compared, exported."""

import json
import math
import re
import time
from contextlib import closing
from functools import cached_property

import numpy as np

from .. import telemetry
from ..hooks.records import HasTable, Table
from ..video import Video
from .asking import spoken
from .ledger import got, reading

FIELDS = "id, experiment, started, seconds, status, model, prompt, error, video, record"
AGES = {"m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


class PastRun(HasTable):
    """A run on record.

    .id .status .model .prompt .error      status: done, failed or interrupted
    .started .seconds .timings             seconds since 1970; of all of it; of its stages
    .settings .notes                       those of its video; of a run without one, what was asked for
    .parts                                 role -> how it was made, its fingerprint, its device
    .versions .machine                     what computed it
    .experiment                            the number of the experiment it belongs to, or None
    .spans                                 FinishedSpans, where somebody looked: see telemetry
    .video                                 the Video, frame by frame as it was, or None
    """

    def __init__(self, row, file):
        self.file = file
        self.id, self.experiment, self.started, self.seconds, self.status, *rest = row
        self.model, self.prompt, self.error, self.digest, record = rest
        self.record = json.loads(record)
        self.versions, self.machine = self.record["versions"], self.record["machine"]
        self.timings, self.notes = self.record["timings"], self.record.get("notes", [])
        self.settings = self.record.get("settings") or {"prompt": self.prompt} | self.record["asked"]
        self.parts = self.record["pipeline"]["parts"]

    @cached_property
    def video(self):
        if self.digest is None:
            return None
        video = Video(got(self.file, self.digest), self.record["fps"], self.settings, self.notes)
        video.run = self.id
        if video.digest != self.digest:
            raise ValueError(f"{self.file} is damaged: the video of run {self.id} is not the one it kept")
        return video

    @property
    def spans(self):
        return telemetry.from_otlp(self.record["spans"])

    def options(self):
        """What the pipeline is called with to do the same again: pictures as tensors, the prompt apart."""
        # Not the settings of the video: what was left out comes from the model again, and a size that was
        # fitted to a picture would be fitted twice. But a seed that was drawn is not drawn anew.
        words = self.record["asked"] | {"seed": self.settings.get("seed", 0)}
        return spoken(words, lambda digest: got(self.file, digest))

    def facts(self):
        """Everything that two runs can differ in, as name -> text."""
        facts = {"status": self.status, "error": self.error or ""}
        facts |= {name: in_text(value) for name, value in self.settings.items()}
        # Of what was asked for, the settings lack pictures: here they are, by their digests.
        others = {name: value for name, value in self.record["asked"].items() if name not in facts}
        facts |= {name: in_text(value) for name, value in others.items()}
        for role, part in self.parts.items():
            facts |= {role: part["shown"], f"{role} fingerprint": part["fingerprint"]}
            facts[f"{role} device"] = part["device"]
        facts |= {name: in_text(value) for name, value in (self.versions | self.machine).items()}
        facts["patches"] = ", ".join(self.record["patches"])
        facts |= {f"seconds: {name}": in_seconds(value) for name, value in self.timings.items()}
        return {name: text for name, text in facts.items() if text}

    def table(self):
        notes = "\n".join(f"note: {note}" for note in self.notes)
        rows = [("started", when(self.started)), *self.facts().items()]
        return Table((f"run {self.id}", ""), rows, notes)

    def to_dict(self):
        """All that is on record, but for the frames, as plain values for JSON."""
        return {
            "run": self.id,
            "experiment": self.experiment,
            "started": self.started,
            "seconds": self.seconds,
            "status": self.status,
            "model": self.model,
            "prompt": self.prompt,
            "error": self.error,
            "video": self.digest,
        } | self.record


def runs(file, model=None, since=None, words=None, last=None):
    """The runs on record, the last first.   -> [PastRun]

    model  only those of a model whose name, or of a part whose description, has this in it
    since  "2026-11-01", "2026-11-01 14:30", or an age: "90m", "12h", "3d", "2w"
    words  text that is in the prompt, the error or a note, whatever its case
    last   so many at most

    Raises FileNotFoundError, ValueError for a file of something else or a time that is none.
    """
    begin = 0.0 if since is None else moment(since)
    if last is not None and last < 1:
        raise ValueError(f"last={last}; expected 1 or more")
    with closing(reading(file)) as db:
        found = _select(db, f"select {FIELDS} from run where started >= ? order by id desc", (begin,))
    kept = (PastRun(row, file) for row in found)
    fitting = [one for one in kept if _fits(one, model, words)]
    return fitting[:last]


def run(file, number):
    """The run of that number.   -> PastRun; LookupError if there is none"""
    with closing(reading(file)) as db:
        rows = _select(db, f"select {FIELDS} from run where id = ?", (number,))
        numbers = [one for (one,) in _select(db, "select id from run order by id", ())]
    if not rows:
        there = f"there are {numbers[0]} to {numbers[-1]}" if numbers else "there are none yet"
        raise LookupError(f"there is no run {number} in {file}; {there}")
    return PastRun(rows[0], file)


def _select(db, question, values):
    """Rows of a question about runs; of a file from before there were any, none."""
    if db.execute("pragma user_version").fetchone()[0] < 2:
        return []
    return db.execute(question, values).fetchall()


def _fits(one, model, words):
    names = [one.model, *(part["shown"] for part in one.parts.values())]
    text = " ".join([one.prompt, one.error or "", *one.notes, str(one.settings.get("original_prompt", ""))])
    return (model is None or any(model.lower() in name.lower() for name in names)) and (
        words is None or words.lower() in text.lower()
    )


def moment(text):
    """ "2026-11-01", "2026-11-01 14:30", or an age such as "3d" -> seconds since 1970"""
    if age := re.fullmatch(r"(\d+)([mhdw])", text.strip()):
        return time.time() - int(age[1]) * AGES[age[2]]
    for form in ("%Y-%m-%d", "%Y-%m-%d %H:%M", "%Y-%m-%dT%H:%M"):
        try:
            return time.mktime(time.strptime(text.strip(), form))
        except (ValueError, OverflowError):
            pass
    raise ValueError(f"{text!r} is no time; expected 2026-11-01, '2026-11-01 14:30', or an age: 90m, 12h, 3d")


def listed_runs(found, width=100):
    """A table of runs, of at most so many columns."""
    rows = []
    for one in found:
        seed = one.settings.get("seed", "")
        ended = one.status if one.error is None else f"{one.status}: {one.error}"
        start = one.id, when(one.started), clipped(one.model, 16), str(seed), f"{one.seconds:.1f} s"
        rows.append((*start, clipped(ended, 24), one.prompt))
    heads = "run", "started", "model", "seed", "took", "status", "prompt"
    taken = [max([len(heads[i]), *(len(str(row[i])) for row in rows)]) for i in range(6)]
    room = max(12, width - sum(taken) - 2 * 6)  # two blanks between columns; the prompt has what is left
    rows = [(*row[:-1], clipped(row[-1], room)) for row in rows]
    return Table(heads, rows, f"{len(rows)} run{'s' * (len(rows) != 1)}")


def differing(a, b):
    """A table of what two runs differ in, with the times of both and how close their videos are."""
    first, second = a.facts(), b.facts()
    names = [name for name in first | second if first.get(name) != second.get(name)]
    rows = [(name, first.get(name, ""), second.get(name, "")) for name in names]
    if a.digest is None or b.digest is None:
        return Table(("", f"run {a.id}", f"run {b.id}"), rows, "no two videos to compare")
    return Table(("", f"run {a.id}", f"run {b.id}"), rows, closeness(a.video, b.video))


def closeness(a, b):
    """How close two videos are, in words."""
    if a == b:
        return "the videos are the same, frame by frame"
    if a.frames.shape != b.frames.shape:
        return f"the videos are of other sizes: {list(a.frames.shape)} and {list(b.frames.shape)}"
    error = np.square(a.frames.astype(np.float64) - b.frames).mean()
    if error == 0:
        return f"the same frames, at {a.fps:g} and {b.fps:g} a second"
    return f"the videos differ: PSNR {10 * math.log10(255**2 / error):.1f} dB"


# ---- words ----------------------------------------------------------------------------------------------


def when(seconds):
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def clipped(text, width):
    """One line of at most so many letters."""
    text = " ".join(str(text).split())
    return text if len(text) <= width else text[: width - 3] + "..."


def in_text(value):
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def in_seconds(value):
    return ", ".join(f"{one:.3g}" for one in value) if isinstance(value, list) else f"{value:.3g}"
