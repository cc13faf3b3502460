"""Does the file of experiments hold what was done, through kills and crowds, and give it back by name?"""

import signal
import sqlite3
import subprocess
import sys
import threading
import time

import pytest
import torch
from toy import Pipe, message

from moddiff.experiments import connect, differences, experiment, listed, recall
from moddiff.experiments.store import OPEN
from moddiff.hooks import zero


@pytest.fixture
def file(tmp_path):
    return tmp_path / "experiments.sqlite"


def test_experiments_are_listed_and_compared(file):
    pipe = Pipe()
    for name, edit in (("zeroed", zero(tokens=0)), ("all zeroed", zero())):
        with experiment(name, pipe, file=file, seed=3) as e:
            e.patch(pipe, "velocity", edit)
            e.metric(energy=e.run(pipe).square().mean())
    table = differences("zeroed", 2, file)
    rows = {row[0]: row[1:] for row in table}
    assert "zeroed, run 1" in repr(table) and "all zeroed, run 2" in repr(table)
    assert (
        rows["patch velocity"] == ("zero(tokens=0)", "zero()")
        and rows["metric energy"][0] != rows["metric energy"][1]
    )
    assert "setting seed" not in rows and not any(name.startswith("model") for name in rows)
    assert "energy" in repr(listed(file)) and "2 runs" in repr(listed(file))
    assert "no experiment 'zero' in" in message(
        LookupError, lambda: recall("zero", file)
    ) and "there are zeroed, all zeroed" in message(LookupError, lambda: recall(9, file))


def test_changed_weights_have_another_fingerprint_in_the_comparison(file):
    pipe = Pipe()
    with experiment("before", pipe, file=file):
        pass
    with torch.no_grad():
        pipe.dit.blocks[0].mlp.weight[0, 0] += 1e-3
    with experiment("after", pipe, file=file):
        pass
    assert [row[0] for row in differences("before", "after", file)] == ["model Pipe"]


def test_a_killed_process_loses_nothing_that_was_written(file):
    code = f"""
import os, signal
from moddiff.experiments import experiment
with experiment("killed", file={str(file)!r}) as e:
    for i in range(50):
        e.metric(**{{f"m{{i}}": i}})
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    past = recall("killed", file)
    assert (
        past.status == "killed" and past.seconds is None and past.metrics == {f"m{i}": i for i in range(50)}
    )
    with experiment("killed", file=file) as e:
        e.metric(x=1)
    assert [row[2] for row in listed(file)] == ["done", "killed"]


def test_a_file_that_is_no_ledger_and_one_that_is_missing_are_named(file, tmp_path):
    file.write_text("not a database, but long enough to be read as one" * 40)
    assert "cannot hold experiments and runs (file is not a database); give file= a new name" in message(
        ValueError, lambda: experiment("x", file=file).__enter__()
    )
    assert "name the file that runs or experiments were kept in" in message(
        FileNotFoundError, lambda: listed(tmp_path / "other.sqlite")
    )
    assert not OPEN


def test_a_file_that_another_process_is_just_making_is_waited_for(file):
    other = sqlite3.connect(file, isolation_level=None, check_same_thread=False)
    other.execute("create table experiment (a)")
    other.execute("begin exclusive")
    start = time.monotonic()
    timer = threading.Timer(0.5, lambda: (other.execute("commit"), other.close()))
    timer.start()
    connect(file).close()
    timer.join()
    assert time.monotonic() - start > 0.4


def test_many_processes_may_make_one_file_at_the_same_moment(tmp_path):
    """SQLite waits for a file that another holds, except when it sets the mode of a new one."""
    code = """
import os, sys, time
from moddiff.experiments import connect
ready, *files = sys.argv[1:]
open(ready, "w").close()
for file in files:
    while not os.path.exists(file + ".go"):
        pass
    connect(file).close()
"""
    files = [str(tmp_path / f"{i}.sqlite") for i in range(40)]
    ready = [tmp_path / f"ready{i}" for i in range(3)]
    crowd = [subprocess.Popen([sys.executable, "-c", code, str(path), *files]) for path in ready]
    while not all(path.exists() for path in ready):
        assert all(process.poll() is None for process in crowd)
        time.sleep(0.05)
    for file in files:
        open(file + ".go", "w").close()
        time.sleep(0.02)
    assert [process.wait(60) for process in crowd] == [0, 0, 0]


def test_a_place_where_no_file_can_be_is_named(tmp_path):
    assert (
        "cannot hold experiments and runs (unable to open database file); give file= a new name"
        in message(ValueError, lambda: connect(tmp_path / "nowhere" / "e.sqlite"))
    )
