"""Is a run on record as it was, whoever else writes, however it ends, and is a wrong file refused in time?"""

import json
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing

import numpy as np
import pytest
import small
import torch
from PIL import Image
from toy import message

import moddiff
from moddiff import patch, telemetry
from moddiff.experiments import Store, again, experiment, kept, ledger, recall, run, runs
from moddiff.experiments.asking import digest_of, spoken, written
from moddiff.pictures import picture
from moddiff.pipeline import Note
from moddiff.solvers import UniPC
from moddiff.video import Video

PROMPT = "a red circle moving left"
SHORT = dict(frames=5, size=(32, 48), steps=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small.release(tmp_path_factory.mktemp("release"))


@pytest.fixture(scope="module")
def pipe(folder):
    return moddiff.load(folder)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "runs.sqlite"


def photo(height=50, width=70):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def rows(file, question):
    with closing(sqlite3.connect(file)) as db:
        return db.execute(question).fetchall()


# ---- what is kept ----


def test_a_run_is_on_record_with_all_that_made_it(pipe, file):
    video = pipe(PROMPT, seed=-1, **SHORT, store=str(file))
    past = run(file, video.run)
    assert video.run == 1 and past.status == "done" and past.error is None
    assert past.video == video and past.video.settings == json.loads(json.dumps(video.settings))
    assert past.video.run == 1 and past.notes == list(video.notes)
    assert past.settings["seed"] == video.settings["seed"] >= 0 and past.settings["negative"] == pipe.negative
    assert set(past.parts) == {"text", "dit", "vae"}
    assert all(len(part["fingerprint"]) >= 16 and part["device"] == "cpu" for part in past.parts.values())
    assert past.versions["torch"] == torch.__version__ and past.versions["moddiff"] == moddiff.__version__
    assert past.machine["threads"] == torch.get_num_threads() and past.machine["instructions"]
    times = past.timings
    assert len(times["steps"]) == 2 and times["last step and decoding"] > 0
    stages = times["record"] + times["before the steps"] + sum(times["steps"])
    assert stages + times["last step and decoding"] == pytest.approx(times["total"])


def test_a_run_with_a_store_gives_the_bytes_of_one_without(pipe, file):
    assert (
        pipe(PROMPT, **SHORT, store=file) == pipe(PROMPT, **SHORT) == pipe(PROMPT, **SHORT, store=Store(file))
    )
    assert rows(file, "select count(*), count(distinct video) from run") == [(2, 1)]
    assert rows(file, "select count(*) from data") == [(1,)]  # the same frames are kept once


def test_both_prompts_are_kept_and_so_are_notes(pipe, file):
    def longer(prompt):
        return prompt + " on black"

    pipe(PROMPT, **SHORT, store=file, rewrite=longer)
    past = run(file, 1)
    assert past.settings["original_prompt"] == PROMPT and past.prompt == PROMPT + " on black"
    assert f"the prompt was rewritten from {PROMPT!r} to {past.prompt!r}" in past.notes


def test_a_run_that_fails_is_kept_with_its_error(pipe, file, monkeypatch):
    def broken(latent):
        raise RuntimeError("no room for the frames")

    monkeypatch.setattr(pipe.vae, "decode", broken)
    with pytest.raises(RuntimeError, match="no room"):
        pipe(PROMPT, **SHORT, seed=7, store=file)
    past = run(file, 1)
    assert past.status == "failed" and past.error == "RuntimeError: no room for the frames"
    assert past.video is None and past.settings["seed"] == 7 and past.settings["prompt"] == PROMPT


def test_a_run_that_is_interrupted_is_kept_as_that(pipe, file):
    def stop(x, where):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), patch(pipe, "x", stop):
        pipe(PROMPT, **SHORT, store=file)
    past = run(file, 1)
    assert past.status == "interrupted" and past.record["patches"] == ["patch of x"]


def test_spans_are_kept_where_somebody_looks(pipe, file):
    def rewriter(prompt):
        with telemetry.span("asking", words=5):
            return prompt

    pipe(PROMPT, **SHORT, store=file, rewrite=rewriter)
    with telemetry.recorded():
        pipe(PROMPT, **SHORT, store=file, rewrite=rewriter)
    assert run(file, 1).spans == []
    asking = next(span for span in run(file, 2).spans if span.name == "asking")
    assert asking.attributes == {"moddiff.words": 5} and asking.seconds >= 0


def test_a_store_may_be_any_object_that_runs_the_pipeline(pipe):
    class Loud:
        def run(self, pipe, prompt, **options):
            return pipe(prompt.upper(), **options)

    assert pipe(PROMPT, **SHORT, store=Loud()).settings["prompt"] == PROMPT.upper()
    with pytest.raises(TypeError, match="store=5; expected the path of a file"):
        pipe(PROMPT, **SHORT, store=5)


def test_what_was_asked_for_comes_back_as_it_was():
    float_picture = torch.rand(3, 6, 8) * 2 - 1
    film = Video(np.random.default_rng(1).integers(0, 256, (5, 6, 8, 3), np.uint8))
    asked = (
        dict(image=photo(), last_image=float_picture, video=film)
        | dict(references=[photo(9, 7)], mask=np.ones((5, 6, 8)))
        | dict(size=(32, 48), scale=(3.0, 4.0), solver=UniPC(order=3), seed=3)
        | dict(negative=None, progress=True, rewrite=len)
    )
    options, words, arrays = written(asked)
    written_down = {digest: ledger.packed(array) for digest, array in arrays.items()}
    back = spoken(json.loads(json.dumps(words)), lambda digest: ledger.unpacked(written_down[digest]))
    assert set(back) == set(asked) - {"negative", "progress", "rewrite"}
    assert torch.equal(back["image"], picture(photo())) and torch.equal(back["last_image"], float_picture)
    assert torch.equal(back["video"], film.tensor()) and torch.equal(
        back["mask"], torch.ones(5, 6, 8).double()
    )
    assert torch.equal(back["references"][0], picture(photo(9, 7)))
    assert back["size"] == (32, 48) and back["scale"] == (3.0, 4.0) and back["solver"] == UniPC(order=3)
    assert torch.equal(options["image"], back["image"]) and options["rewrite"] is len
    # A picture of bytes is kept as bytes: a quarter of the room.
    assert {array.dtype.name for array in arrays.values()} == {"uint8", "float32", "float64"}
    assert len({digest_of(array) for array in arrays.values()}) == len(arrays)


# ---- experiments in the same file ----


def test_a_run_of_an_experiment_is_in_the_same_file_and_belongs_to_it(pipe, file):
    with experiment("mine", pipe, file=file) as e:
        video = e.run(pipe, PROMPT, **SHORT)
    assert run(file, 1).experiment == e.id and run(file, 1).video == video
    assert recall("mine", file).videos["video"] == video
    assert rows(file, "select count(*) from data") == [(1,)]
    assert again(file, 1).same


OLD = """
create table experiment (
    id integer primary key, name text not null, started real not null, ended real, status text not null,
    host text, pid integer, note text
);
create table entry (
    id integer primary key, experiment integer not null references experiment(id), at real not null,
    kind text not null, name text not null, value text, blob blob
);
create index entry_of on entry (experiment, kind);
insert into experiment values (1, 'first', 1.5, 2.5, 'done', 'here', 1, '');
insert into entry values (1, 1, 2.0, 'metric', 'm', '0.5', null);
"""


@pytest.fixture
def old(file, tmp_path):
    """A file as version 0.1 wrote it, with a video."""
    frames = np.random.default_rng(2).integers(0, 256, (2, 4, 6, 3), np.uint8)
    np.savez_compressed(tmp_path / "video.npz", frames=frames, fps=8)
    with closing(sqlite3.connect(file)) as db:
        db.executescript("pragma journal_mode = wal;" + OLD)
        blob = (tmp_path / "video.npz").read_bytes()
        db.execute("insert into entry values (2, 1, 2.0, 'video', 'video', 'null', ?)", (blob,))
        db.commit()
    return frames


def test_an_old_file_of_experiments_is_read_without_a_change(old, file):
    before = file.read_bytes()
    past = recall("first", file)
    assert past.metrics == {"m": 0.5} and np.array_equal(past.videos["video"].frames, old)
    assert runs(file) == [] and file.read_bytes() == before
    assert "there are none yet" in message(LookupError, lambda: run(file, 1))


def test_an_old_file_of_experiments_takes_runs(old, file, pipe):
    pipe(PROMPT, **SHORT, store=file)
    assert len(runs(file)) == 1 and recall(1, file).metrics == {"m": 0.5}
    assert np.array_equal(recall("first", file).videos["video"].frames, old)
    with experiment("second", file=file) as e:
        e.metric(m=2)
    assert recall("second", file).id == 2


# ---- files that are refused, before the work ----


@pytest.fixture
def unworked(pipe, monkeypatch):
    monkeypatch.setattr(pipe, "prepare", lambda *_, **__: pytest.fail("the work was begun"))
    return pipe


def test_a_database_of_another_program_is_refused_and_left_alone(unworked, file):
    with closing(sqlite3.connect(file)) as db:
        db.execute("create table songs (name)")
        db.commit()
    before = file.read_bytes()
    for do in (lambda: unworked(PROMPT, store=file), lambda: runs(file), lambda: recall(1, file)):
        assert "is a database of another program (its tables: songs)" in message(ValueError, do)
    assert file.read_bytes() == before and [path.name for path in file.parent.iterdir()] == [file.name]


def test_a_file_of_a_newer_moddiff_is_refused(unworked, file):
    ledger.connect(file).close()
    with closing(sqlite3.connect(file)) as db:
        db.execute(f"pragma user_version = {ledger.VERSION + 1}")
    for do in (lambda: unworked(PROMPT, store=file), lambda: runs(file)):
        assert "was made by a newer moddiff: its schema is 3, and this one knows up to 2" in message(
            ValueError, do
        )


def test_a_file_that_is_none_and_a_place_where_none_can_be_are_named(unworked, file, tmp_path):
    file.write_text("not a database, but long enough to be read as one" * 40)
    assert "cannot hold experiments and runs (file is not a database)" in message(
        ValueError, lambda: unworked(PROMPT, store=file)
    )
    assert "no file can be written there" in message(
        OSError, lambda: unworked(PROMPT, store="/dev/null/runs.sqlite")
    )
    assert "is a folder" in message(OSError, lambda: unworked(PROMPT, store=tmp_path))
    assert "name the file that runs" in message(FileNotFoundError, lambda: runs(tmp_path / "none.sqlite"))


def test_a_file_that_takes_no_writing_is_an_error_before_the_work(unworked, file, monkeypatch):
    """As root no file refuses: so SQLite is asked for one that is read only."""
    ledger.connect(file).close()
    real = sqlite3.connect
    monkeypatch.setattr(
        ledger.sqlite3, "connect", lambda path, *a, **k: real(f"file:{path}?mode=ro", *a, uri=True, **k)
    )
    assert "nothing can be written into" in message(OSError, lambda: unworked(PROMPT, store=file))


FULL = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from moddiff.experiments import Store
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), -1))
try:
    Store(sys.argv[1])
except OSError as error:
    print(type(error).__name__, error)
"""


def test_a_full_disk_is_an_error_before_the_work(file):
    """A limit on the size of files stands for the disk: the trial write does not get through."""
    ledger.connect(file).close()
    size = 70_000  # the trial of a file beside it passes, that of the file itself does not
    done = subprocess.run([sys.executable, "-c", FULL, file, str(size)], capture_output=True, text=True)
    assert "OSError nothing can be written into" in done.stdout, done.stdout + done.stderr
    assert "make room on the disk" in done.stdout


def test_a_record_that_cannot_be_written_after_the_work_does_not_cost_the_video(pipe, file, monkeypatch):
    store = Store(file)
    monkeypatch.setattr(
        ledger, "put", lambda *_: (_ for _ in ()).throw(sqlite3.OperationalError("database or disk is full"))
    )
    with pytest.warns(Note, match="this run could not be kept in .*: database or disk is full"):
        video = pipe(PROMPT, **SHORT, store=store)
    assert video == pipe(PROMPT, **SHORT) and video.run is None and "could not be kept" in video.notes[-1]
    assert rows(file, "select count(*) from run") == [(0,)]


def test_a_damaged_video_is_not_shown(pipe, file):
    pipe(PROMPT, **SHORT, store=file)
    with closing(sqlite3.connect(file)) as db:
        db.execute("update data set bytes = substr(bytes, 1, length(bytes) / 2)")
        db.commit()
    assert "is damaged" in message(ValueError, lambda: run(file, 1).video)


# ---- other processes ----

WRITER = """
import sys, moddiff
from moddiff.pipeline import Note
import warnings
warnings.simplefilter("ignore", Note)
folder, file, first = sys.argv[1], sys.argv[2], int(sys.argv[3])
pipe = moddiff.load(folder)
for seed in range(first, first + 12):
    pipe("a star", seed=seed, frames=5, size=(32, 48), steps=1, store=file)
"""


def test_two_processes_that_write_at_once_lose_nothing(folder, file):
    crowd = [
        subprocess.Popen([sys.executable, "-c", WRITER, folder, file, first], stderr=subprocess.PIPE)
        for first in ("0", "100")
    ]
    errors = [process.communicate(timeout=300)[1].decode() for process in crowd]
    assert errors == ["", ""]
    kept_runs = runs(file)
    assert sorted(one.settings["seed"] for one in kept_runs) == [*range(12), *range(100, 112)]
    assert all(one.video.digest == one.digest for one in kept_runs)


KILLED = """
import os, signal, sys, moddiff
from moddiff.experiments import ledger
pipe = moddiff.load(sys.argv[1])
pipe("a star", frames=5, size=(32, 48), steps=1, store=sys.argv[2])
real = ledger.put
def put(*arguments):
    real(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)  # the video is in, its run is not
ledger.put = put
pipe("a circle", frames=5, size=(32, 48), steps=1, store=sys.argv[2])
"""


def test_a_process_that_is_killed_in_the_middle_of_writing_leaves_nothing_half(folder, file):
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", KILLED, folder, file])
    assert done.returncode == -signal.SIGKILL
    assert len(runs(file)) == 1 and rows(file, "select count(*) from data") == [(1,)]
    assert runs(file)[0].video.digest == runs(file)[0].digest
    assert rows(file, "pragma integrity_check") == [("ok",)]


def test_a_long_film_is_kept_in_pieces(file, monkeypatch):
    monkeypatch.setattr(ledger, "PIECE", 1000)
    frames = np.random.default_rng(4).integers(0, 256, (3, 20, 30, 3), np.uint8)
    with closing(ledger.connect(file)) as db:
        ledger.put(db, "film", frames)
    assert rows(file, "select count(*) from data")[0][0] > 3
    assert np.array_equal(ledger.got(file, "film"), frames)


def test_a_time_is_a_date_or_an_age():
    assert kept.moment("2026-11-02") - kept.moment("2026-11-01") == pytest.approx(86400, abs=3601)
    assert kept.moment("2d") < kept.moment("12h") < kept.moment("90m")
    assert "is no time; expected 2026-11-01" in message(ValueError, lambda: kept.moment("yesterday"))
