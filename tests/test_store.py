"""Does an experiment leave everything as it was, whatever happens inside, and does its record survive?"""

import random
import signal
import subprocess
import sys
import threading
import warnings

import numpy as np
import pytest
import torch
from moddiff.snapshots import Leaked
from toy import Pipe, Toy, message

from moddiff import experiments
from moddiff.experiments import compare, experiment, listed, recall
from moddiff.hooks import NeverFired, live_handles, patch, zero
from moddiff.video import Video


@pytest.fixture
def file(tmp_path):
    return tmp_path / "experiments.sqlite"


def meddle(pipe):
    """Everything a careless cell could do."""
    patch(pipe, "dit.blocks.0.resid_post", zero()).__enter__()
    with torch.no_grad():
        pipe.dit.blocks[0].mlp.weight.zero_()
    pipe.dit.blocks[1].mlp.register_forward_hook(lambda module, args, out: out * 0)
    pipe.components["dit"] = Toy(seed=3)
    torch.manual_seed(1), np.random.seed(1), random.seed(1)


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt, SystemExit])
def test_everything_is_put_back_whatever_happens(file, error):
    pipe = Pipe()
    plain, dit = pipe(), pipe.dit
    randoms = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    with (
        pytest.warns(
            UserWarning, match="left changes behind, which were put back: patch of dit.blocks.0.resid_post"
        ),
        pytest.raises(error or LookupError),
        experiment("meddle", pipe, file=file, seed=5),
    ):
        meddle(pipe)
        raise (error or LookupError)("stop")
    assert pipe.dit is dit and torch.equal(pipe(), plain) and not live_handles()
    assert (
        torch.equal(torch.get_rng_state(), randoms[0])
        and (np.random.get_state()[1] == randoms[1]).all()
        and random.getstate() == randoms[2]
    )
    past = recall("meddle", file)
    assert (
        past.status == ("interrupted" if error is KeyboardInterrupt else "failed")
        and past.facts()[f"error {(error or LookupError).__name__}"] == "stop"
    )


def test_a_clean_experiment_warns_of_nothing_and_remembers_all(file):
    pipe, factor = Pipe(), 0.5

    def softer(x, where):  # softens
        return x * factor

    plain = pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with experiment("soften", pipe, file=file, seed=7, note="a first try") as e:
            assert torch.initial_seed() == 7
            seen = e.capture(pipe, "velocity", steps=0)
            e.patch(pipe.dit, "blocks.*.resid_post", softer, branch="cond")
            out = e.run(pipe, seed=0)
            e.metric(energy=out.square().mean())
            e.video(Video(np.arange(2 * 4 * 6 * 3, dtype=np.uint8).reshape(2, 4, 6, 3), fps=8))
    assert torch.equal(pipe(), plain) and not torch.equal(out, plain) and len(seen) == 1
    past = recall("soften", file)
    assert past.status == "done" and past.note == "a first try" and past.seconds > 0
    assert past.settings == {"seed": 0, "arguments": []} and past.metrics == {
        "energy": pytest.approx(float(out.square().mean()))
    }
    name, value = past.patches[0]
    assert (
        name == "blocks.*.resid_post"
        and "return x * factor" in value["code"]
        and "# with {'factor': 0.5}" in value["code"]
        and value["branch"] == "'cond'"
    )
    video = past.videos["video"]
    assert video.fps == 8 and video.frames.ravel().tolist() == [i % 256 for i in range(144)]
    assert "softens" in repr(past) and "<table>" in past._repr_html_()


def test_components_are_swapped_for_the_experiment_only(file):
    class Replaceable(Pipe):
        def replace(self, **parts):
            return Replaceable(parts["dit"])

    pipe, other = Replaceable(), Toy(seed=1)
    with experiment("other dit", file=file) as e:
        new = e.replace(pipe, dit=other)
        assert new.dit is other and pipe.dit is not other
        e.patch(new, "velocity", zero())
        e.run(new)
    assert ("component", "dit", "'Toy'") in recall("other dit", file).entries


def test_a_miss_inside_is_loud_and_on_record(file):
    pipe = Pipe()
    with pytest.raises(NeverFired, match="it never came by"), experiment("nothing", pipe, file=file) as e:
        e.patch(pipe, "velocity", zero())
    assert recall("nothing", file).status == "failed" and not live_handles()


def test_large_models_are_verified_even_when_they_cannot_be_put_back(file):
    pipe, second = Pipe(), Pipe(Toy(seed=2))
    plain = second()
    with (
        pytest.raises(Leaked, match=r"no copy was kept: dit.blocks.0.mlp.weight; load the model again"),
        experiment("large", pipe, second, file=file, copies=0),
    ):
        with torch.no_grad():
            pipe.dit.blocks[0].mlp.weight.zero_()
        second.dit.blocks[0].mlp = torch.nn.Identity()
    assert torch.equal(second(), plain) and recall("large", file).status == "failed"


def test_an_experiment_of_the_same_name_inside_itself_is_refused(file):
    with experiment("twice", file=file) as outer:
        text = message(ValueError, lambda: experiment("twice", file=file).__enter__())
        with experiment("another", file=file) as inner:
            inner.metric(x=1)
        outer.metric(x=2)
    assert (
        text
        == "experiment 'twice' is open already; give the inner one a name of its own, or close the outer one first"
    )
    with experiment("twice", file=file) as again:
        again.metric(x=3)
    assert recall("twice", file).metrics == {"x": 3} and [row[1] for row in listed(file)] == [
        "twice",
        "another",
        "twice",
    ]


def test_experiments_are_listed_and_compared(file):
    pipe = Pipe()
    for name, edit in (("zeroed", zero(tokens=0)), ("all zeroed", zero())):
        with experiment(name, pipe, file=file, seed=3) as e:
            e.patch(pipe, "velocity", edit)
            e.metric(energy=e.run(pipe).square().mean())
    table = compare("zeroed", 2, file)
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
    assert [row[0] for row in compare("before", "after", file)] == ["model Pipe"]


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


def test_threads_write_into_one_file_side_by_side(file):
    failures = []

    def work(number):
        pipe = Pipe(Toy(seed=number))
        try:
            with experiment(f"thread {number}", pipe, file=file) as e:
                e.patch(pipe, "velocity", zero())
                for i in range(5):
                    e.metric(**{f"m{i}": number})
                e.run(pipe)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and {row[1]: row[2] for row in listed(file)} == {
        f"thread {n}": "done" for n in range(4)
    }


def test_a_file_that_is_no_ledger_and_one_that_is_missing_are_named(file, tmp_path):
    file.write_text("not a database, but long enough to be read as one" * 40)
    assert "cannot hold experiments (file is not a database); give file= a new name" in message(
        ValueError, lambda: experiment("x", file=file).__enter__()
    )
    assert "there are no experiments in" in message(
        FileNotFoundError, lambda: listed(tmp_path / "other.sqlite")
    )
    assert not experiments._open_names


def test_a_function_typed_nowhere_is_still_on_record():
    space = {}
    exec("def f(x, where):\n    return x", space)
    assert (
        experiments.code_of(space["f"]).startswith("<function f")
        and experiments.code_of(zero(heads=3)) == "zero(heads=3)"
    )
