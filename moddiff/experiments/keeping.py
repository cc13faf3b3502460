"""How does a run come on record?  `store=`: settings, parts, versions, times and the video, as it ends.

    video = pipe("a red circle moving left", seed=0, store="runs.sqlite")
    video.run       # the number it is kept under

On the command line `moddiff generate --store FILE`. What is on record is found by kept.py, and made once more
by repeating.py.
"""

import json
import platform
import sqlite3
import time
import traceback
import warnings
from contextlib import closing, nullcontext
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import torch

from .. import telemetry
from ..fingerprints import fingerprint
from ..hooks import open_sessions, patch
from ..run import watch
from ..settings import Note
from . import ledger
from .asking import written
from .recipes import plain, recipe

INSERT = """
insert into run (experiment, started, seconds, status, model, prompt, error, video, record)
values (?, ?, ?, ?, ?, ?, ?, ?, ?)
"""
# Those that were asked for by a key, as cluster/ does: it knows from it which are missing.
KEYS = """
select json_extract(record, '$.key'), id from run
where status = 'done' and json_extract(record, '$.key') is not null
"""


class Store:
    """A file of runs: `pipe("...", store=Store("runs.sqlite"))`, or just its path.

    file        an SQLite file, made where there is none; experiments may be in it, too
    experiment  the number of the experiment in that file that the runs belong to

    Raises ValueError for a file that is something else or of a newer moddiff, OSError where nothing can be
    written: now, and not after the work.
    """

    def __init__(self, file, experiment=None):
        self.file, self.experiment = Path(file).expanduser(), experiment
        ledger.try_out(self.file)

    def run(self, pipe, prompt, **options):
        """pipe(prompt, **options), on record however it ends.   -> Video; `video.run` is its number

        A run that fails is kept with its error. Where the record cannot be written after all, the video comes
        back with a Note that says so.
        """
        times = {"started": time.time(), "begun": time.perf_counter(), "steps": []}
        options, words, arrays = written(options)
        record = {
            "asked": words,
            "pipeline": with_fingerprints(recipe(pipe), pipe),
            "versions": versions(),
            "machine": machine(pipe),
            "patches": [repr(session) for session in open_sessions() if isinstance(session, patch)],
        }
        times["recorded"] = time.perf_counter()
        video = failed = spans = None
        # Where nobody looks for spans, none are made; settle=False, as a record must not make a run slower.
        looked = telemetry.recorded(settle=False) if telemetry.is_on() else nullcontext(())
        try:
            with looked as spans, watch(lambda *_: times["steps"].append(time.perf_counter())):
                video = pipe(prompt, **options)
            return video
        except BaseException as error:  # Ctrl-C and Stop, too: how it ended goes on record
            failed = error
            raise
        finally:
            times["ended"] = time.perf_counter()
            record |= {"timings": seconds(times), "spans": telemetry.as_otlp(spans)}
            self._keep(pipe, prompt, record, arrays, times, video, failed)

    def _keep(self, pipe, prompt, record, arrays, times, video, failed):
        """Write down how it ended."""
        status, error, film = "done", None, None
        if video is None:
            # Ctrl-C and Stop are BaseExceptions, and no failures.
            status = "failed" if isinstance(failed, Exception) else "interrupted"
            error = "".join(traceback.format_exception_only(failed)).strip()
        else:
            record |= {"settings": plain(video.settings), "notes": list(video.notes), "fps": float(video.fps)}
            prompt, film = video.settings["prompt"], video.digest
            arrays = arrays | {film: video.frames}
        took = times["ended"] - times["begun"]
        row = self.experiment, times["started"], took, status, pipe.name, str(prompt), error, film
        # Before the file is locked, as packing a long film takes seconds.
        packed = {digest: ledger.packed(array) for digest, array in arrays.items()}
        try:
            number = self.write(row, record, packed)
        except (sqlite3.Error, OSError, ValueError) as unwritten:
            self._say(f"this run could not be kept in {self.file}: {unwritten}", video, failed)
        else:
            if video is not None:
                video.run = number

    def write(self, row, record, packed):
        """A run with its arrays in one transaction, or nothing of it.   -> the number it is kept under

        One whose record has a "key" is kept once: where a run of that key is done, its number comes back.
        """
        with closing(ledger.connect(self.file)) as db, ledger.transaction(db):
            if (key := record.get("key")) and (there := done(db).get(key)):
                return there
            for digest, data in packed.items():
                ledger.put(db, digest, data)
            return db.execute(INSERT, (*row, json.dumps(record))).lastrowid

    def _say(self, what, video, failed):
        """The work is done and must not be lost with its record: a Note; or one more word of an error."""
        if video is None:
            failed.add_note(what)
        else:
            video.notes += (what,)
            warnings.warn(what, Note, stacklevel=5)


def done(db):
    """Which runs with a key are done?   -> {key: number}"""
    return dict(db.execute(KEYS).fetchall())


# ---- what goes on record --------------------------------------------------------------------------------


def with_fingerprints(found, pipe):
    """A recipe with the fingerprint of each part, by which the same one is known again."""
    for role, part in pipe.components.items():
        if part is not None:
            found["parts"][role]["fingerprint"] = fingerprint(part)
    return found


def seconds(times):
    """Seconds of a run: all of it, its record, all before the first step, and each step."""
    steps = [*times["steps"], times["ended"]]  # a time is taken as a step begins: the last has no end
    return {
        "total": times["ended"] - times["begun"],
        "record": times["recorded"] - times["begun"],
        "before the steps": steps[0] - times["recorded"],
        "steps": [after - before for before, after in pairwise(steps[:-1])],
        "last step and decoding": steps[-1] - steps[max(0, len(steps) - 2)],
    }


def versions():
    """{package: version} of what computes."""
    from .. import __version__

    # Those whose next version may give other bits or other tokens.
    others = {name: version(name) for name in ("torch", "numpy", "safetensors", "tokenizers")}
    return {"moddiff": __version__, "python": platform.python_version()} | others


def machine(pipe):
    """What of a machine the last bit of a sum may depend on."""
    found = {
        "system": platform.system(),
        "processor": platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "matmul": torch.get_float32_matmul_precision(),
    }
    devices = {part["device"] for part in recipe(pipe)["parts"].values()}
    return found | {name: torch.cuda.get_device_name(name) for name in devices if name.startswith("cuda")}
