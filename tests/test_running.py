"""Does an experiment leave everything as it was, whatever happens inside, and does its record survive?"""

import random
import sqlite3
import threading
import warnings

import numpy as np
import pytest
import torch
from test_sessions import every_interrupt
from toy import Pipe, Toy, message

from moddiff import experiments
from moddiff.experiments import Leaked, experiment, listed, recall
from moddiff.experiments.running import code_of
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
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)


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
        text == "experiment 'twice' is open already; give the inner one a name of its own, "
        "or close the outer one first"
    )
    with experiment("twice", file=file) as again:
        again.metric(x=3)
    assert recall("twice", file).metrics == {"x": 3} and [row[1] for row in listed(file)] == [
        "twice",
        "another",
        "twice",
    ]


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


def test_a_function_typed_nowhere_is_still_on_record():
    space = {}
    exec("def f(x, where):\n    return x", space)
    assert code_of(space["f"]).startswith("<function f") and code_of(zero(heads=3)) == "zero(heads=3)"


def states():
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()


def test_an_interrupt_at_any_line_of_an_experiment_leaves_nothing(file):
    pipe = Pipe()
    plain, weight, before = pipe(), pipe.dit.blocks[0].mlp.weight, states()

    def meddled():
        with experiment("interrupted", pipe, file=file, seed=5) as e:
            e.patch(pipe, "velocity", zero())
            pipe()
            with torch.no_grad():
                weight.zero_()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for function, line in every_interrupt(
            experiments.running.__file__, meddled, experiments.running._lock
        ):
            if (function, line) == (
                "__exit__",
                1,
            ):  # nothing can catch an interrupt before its first line has run
                assert live_handles()
                experiments.close_all()
            assert not live_handles() and torch.equal(pipe(), plain) and states() == before, (function, line)
            assert not experiments.store.OPEN, (function, line)
    assert {row[2] for row in listed(file)} <= {"interrupted", "done", "lost"}


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
def test_experiments_that_overlap_in_threads_leave_the_random_state_of_before(file, order):
    before = states()
    inside, leave = {}, {name: threading.Event() for name in order}

    def work(name, seed):
        with experiment(name, file=file, seed=seed):
            inside[name].set()
            leave[name].wait()

    threads = {}
    for seed, name in enumerate(("a", "b")):
        inside[name] = threading.Event()
        threads[name] = threading.Thread(target=work, args=(name, seed))
        threads[name].start()
        inside[name].wait()
    for name in order:
        leave[name].set()
        threads[name].join()
    assert states() == before


def test_an_experiment_inside_another_gives_back_the_outer_random_state(file):
    with experiment("outer", file=file, seed=1):
        torch.rand(3)
        before = states()
        with experiment("inner", file=file, seed=2):
            torch.rand(1)
        assert states() == before


def full(e):
    """From now on the file cannot grow, as on a full disk."""
    pages = e._db.execute("pragma page_count").fetchone()[0]
    e._db.execute(f"pragma max_page_count = {pages}")
    with pytest.raises(
        OSError, match="database or disk is full. What was recorded before is safe; make room on the disk"
    ):
        while True:
            e.setting(filler="x" * 2000)


def test_on_a_full_disk_the_error_of_the_block_comes_out_and_the_file_is_closed(file):
    with pytest.raises(ZeroDivisionError, match="mine") as caught, experiment("full", file=file) as e:
        full(e)
        raise ZeroDivisionError("mine" * 3000)
    assert "'full' could not be put on record" in caught.value.__notes__[0]
    with pytest.raises(sqlite3.ProgrammingError, match="closed database"):
        e._db.execute("select 1")
    assert recall("full", file).status == "lost" and not experiments.store.OPEN


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (dict(name=None), "the name of an experiment arrived as NoneType: None; expected text"),
        (dict(name=["a"]), "the name of an experiment arrived as list: ['a']; expected text"),
        (dict(name="a", note=3), "the note of an experiment arrived as int: 3; expected text"),
        (dict(name="a", seed="one"), "experiment 'a': seed='one'; expected a whole number"),
    ],
)
def test_what_cannot_be_on_record_is_refused_before_the_work(arguments, text):
    assert text in message(TypeError, lambda: experiment(**arguments))


def test_values_that_cannot_be_on_record_are_refused_or_written_as_they_show(file):
    round_and_round = []
    round_and_round.append(round_and_round)
    with experiment("odd", file=file) as e:
        e.setting(keys={(1, 2): 3}, circle=round_and_round, tensor=torch.ones(1))
        assert "metric(loss='low'): expected one number" in message(TypeError, lambda: e.metric(loss="low"))
        assert "expected one number" in message(TypeError, lambda: e.metric(loss=torch.ones(2)))
        assert "video of int; expected a moddiff.Video" in message(TypeError, lambda: e.video(5))
        assert "open it inside: with moddiff.capture(..., stop=True)" in message(
            ValueError, lambda: e.capture(Toy(), "*", stop=True)
        )
    assert recall("odd", file).settings == {
        "keys": "{(1, 2): 3}",
        "circle": "[[...]]",
        "tensor": "tensor([1.])",
    }
    assert "copies='much' is not a size" in message(ValueError, lambda: experiment("x", copies="much"))


def test_an_experiment_in_a_generator_may_be_ended_by_another_thread(file):
    pipe = Pipe()

    def run():
        with experiment("left", pipe, file=file, seed=1):
            yield

    before, left = states(), run()
    next(left)
    thread = threading.Thread(target=left.close)
    thread.start()
    thread.join()
    assert states() == before and recall("left", file).status == "failed" and not experiments.store.OPEN


def test_what_a_wrapper_wraps_is_watched_through_it(file):
    class Quiet:
        def __init__(self, inner):
            self.inner = inner

        def __call__(self, x):
            return self.inner(x)

    toy = Toy()
    pipe = Pipe(Quiet(toy))
    plain, weight = pipe(), toy.blocks[0].mlp.weight.clone()
    with (
        pytest.warns(UserWarning, match=r"put back: dit.inner, dit.blocks.0.mlp.weight"),
        experiment("wrapped", pipe, file=file) as e,
    ):
        e.patch(pipe, "dit.blocks.1.resid_post", zero())
        pipe()
        with torch.no_grad():
            toy.blocks[0].mlp.weight.zero_()
        pipe.dit.inner = Toy(seed=1)
    assert (
        pipe.dit.inner is toy and torch.equal(toy.blocks[0].mlp.weight, weight) and torch.equal(pipe(), plain)
    )
