"""Does looking leave everything as it was, does editing do exactly what it says, and is every miss loud?

What is expected is computed by `toy.by_hand`, which uses no moddiff at all, or by edited weights; never by
the hooks themselves.
"""

import copy
import gc
import io
import itertools
import pickle
import signal
import sys
import threading
import time
import types
from contextlib import ExitStack
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from toy import BLOCKS, HEADS, Pipe, Toy, by_hand, close, message, noise, opened

from moddiff import hooks
from moddiff.hooks import (
    NeverFired,
    OverLimit,
    Taps,
    UnknownTap,
    at,
    capture,
    identity,
    live_handles,
    patch,
    replace_attend,
    scale_by,
    taps,
    zero,
)

RUN = noise()


@pytest.fixture
def toy():
    return Toy().requires_grad_(False)


def clean(model):
    return all(tap.live is None for _, tap in hooks.parts(model)) and not live_handles()


# looking


def test_capture_of_everything_leaves_the_output_bit_identical(toy):
    plain = toy(RUN)
    with capture(toy, "*") as seen:
        assert torch.equal(toy(RUN), plain)
    assert torch.equal(toy(RUN), plain) and clean(toy)
    assert len(seen) == BLOCKS * (3 + 7)


@pytest.mark.parametrize("name", ["resid_pre", "scores", "probs", "heads", "out", "resid_post"])
def test_captured_values_are_those_of_a_forward_written_by_hand(toy, name):
    by_name = {}
    by_hand(toy, RUN, lambda tap, value, block: by_name.setdefault((tap, block), value))
    with capture(
        toy,
        f"blocks.*.{name}",
        f"blocks.*.attn.{name}"[: None if name in ("scores", "probs", "heads", "out") else 0]
        or f"blocks.*.{name}",
    ) as seen:
        toy(RUN)
    for block in range(BLOCKS):
        close(seen.get(name, block=block), by_name[name, block])


def test_capture_keeps_copies():
    class InPlace(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.tap = Taps(before="n")

        def forward(self, x):
            return self.tap("before", x).mul_(2)

    model, x = InPlace(), torch.ones(3)
    with capture(model, "before") as seen:
        model(x)
    assert seen["before"].tolist() == [1, 1, 1] and x.tolist() == [2, 2, 2]


def test_reduce_may_write_into_its_argument_without_disturbing_the_run(toy):
    plain = toy(RUN)
    with capture(toy, "blocks.0.resid_mid", reduce=lambda x: x.zero_()) as seen:
        assert torch.equal(toy(RUN), plain)
    assert not seen["blocks.0.resid_mid"].any()


def test_policies_choose_heads_rows_reduction_and_dtype(toy):
    with (
        capture(toy, "blocks.1.attn.heads") as whole,
        capture(
            toy, "blocks.1.attn.heads", heads=-1, rows=slice(0, 2), dtype=torch.float16, device="cpu"
        ) as part,
        capture(toy, "blocks.1.attn.heads", reduce="heads") as mean,
        capture(toy, "blocks.1.attn.heads", reduce=lambda x: x.norm(dim=-1)) as norms,
    ):
        toy(RUN)
    value = whole["heads"]
    assert torch.equal(part["heads"], value[:, [3], :2].half())
    close(mean["heads"], (value[:, 0] + value[:, 1] + value[:, 2] + value[:, 3]) / 4)
    assert [where.layout for where, _ in mean] == ["b n d"] and [where.layout for where, _ in norms] == [""]
    close(norms["heads"], value.square().sum(-1).sqrt())


def test_the_pipelines_own_values_stand_beside_its_components():
    pipe = Pipe()
    assert {"x", "velocity", "velocity.cond", "velocity.uncond", "dit.blocks.0.attn.q"} <= set(
        taps(pipe).names
    )
    with capture(pipe, "velocity*", "x") as seen:
        pipe()
    cond, uncond, velocity = (
        seen.get(name, step=1) for name in ("velocity.cond", "velocity.uncond", "velocity")
    )
    close(velocity, uncond + 2 * (cond - uncond))
    close(seen.get("x", step=2), seen.get("x", step=1) - 0.1 * velocity)


# editing


def test_sessions_see_each_other_in_the_order_in_which_they_opened(toy):
    plain = toy(RUN)
    with (
        capture(toy, "blocks.0.resid_pre") as outside,
        patch(toy, "blocks.0.resid_pre", scale_by(2)),
        capture(toy, "blocks.0.resid_pre") as inside,
    ):
        doubled = toy(RUN)
    assert torch.equal(outside["resid_pre"], RUN) and torch.equal(inside["resid_pre"], 2 * RUN)
    close(doubled, by_hand(toy, 2 * RUN))
    name = "blocks.0.resid_pre"
    with patch(toy, name, lambda x, where: x + 1), patch(toy, name, lambda x, where: x * 3):
        close(toy(RUN), by_hand(toy, (RUN + 1) * 3))
    assert torch.equal(toy(RUN), plain)


def test_a_patch_at_some_steps_leaves_the_other_steps_bit_identical():
    pipe = Pipe()
    plain = list(pipe.steps())
    with patch(pipe, "dit.blocks.*.attn.probs", zero(words=0), steps=[2]):
        patched = list(pipe.steps())
    assert torch.equal(plain[1], patched[1]) and not torch.equal(plain[2], patched[2])


# what is left behind


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_an_error_or_interrupt_inside_a_patch_restores_everything(toy, error):
    plain, calls = toy(RUN), []

    def fail(x, where):
        calls.append(where.block)
        if len(calls) == 2:
            raise error("stop")
        return x * 2

    with pytest.raises(error), capture(toy, "*"), patch(toy, "blocks.*.resid_pre", fail):
        toy(RUN)
    assert calls == [0, 1] and clean(toy) and torch.equal(toy(RUN), plain)


def test_a_session_that_cannot_open_installs_nothing(toy):
    for broken in (
        capture(toy, "blocks.*.resid_pre", "nonsense"),
        patch(toy, "blocks.*.attn.out", zero(heads=1)),
        capture(toy, "blocks.*", heads=1),
    ):
        with pytest.raises((UnknownTap, ValueError)), broken:
            raise AssertionError("it opened")
        assert clean(toy)


class InterruptAt:
    """Ctrl-C before the nth line that runs in one file of the hooks, as a trace function brings it."""

    def __init__(self, file, nth):
        self.file, self.left, self.line = file, nth, None

    def __call__(self, frame, event, arg):
        if frame.f_code.co_filename != self.file:
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                self.line = frame.f_code.co_name, frame.f_lineno - frame.f_code.co_firstlineno
                raise KeyboardInterrupt
        return self


def interrupted(file, nth, body, lock=hooks.sessions._lock):
    """Run the body with an interrupt at its nth line in that file.

    -> (function, line of it), None if it has fewer lines
    """
    trace, before = InterruptAt(file, nth), sys.gettrace()
    try:
        sys.settrace(trace)
        body()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
        # A trace function also strikes where no signal can, between the last line of `with lock:` and its
        # end.
        while lock._is_owned():
            lock.release()
    return trace.line


def every_interrupt(file, body, lock=hooks.sessions._lock):
    """Where each possible interrupt of the body struck, one after the other."""
    for nth in itertools.count(1):
        line = interrupted(file, nth, body, lock)
        if line is None:
            assert nth > 20
            return
        yield line


@pytest.mark.parametrize(
    "make", [lambda toy: capture(toy, "blocks.0.*", stop=True), lambda toy: patch(toy, "blocks.0.*", zero())]
)
def test_an_interrupt_at_any_line_of_opening_or_closing_leaves_nothing(toy, make):
    plain = toy(RUN)

    def open_and_close():
        with make(toy):
            toy(RUN)

    for function, line in every_interrupt(hooks.sessions.__file__, open_and_close):
        if (function, line) == (
            "__exit__",
            1,
        ):  # nothing can catch an interrupt before its first line has run
            assert live_handles()
            hooks.close_all()
        assert clean(toy) and not hooks.open_sessions(), (function, line)
        assert torch.equal(toy(RUN), plain)


def test_an_interrupt_at_any_line_of_a_place_leaves_the_place():
    def enter_and_leave():
        with at(step=1, branch="cond"):
            pass

    for function, line in every_interrupt(hooks.where.__file__, enter_and_leave):
        if function == "__exit__" and hooks.position():
            assert line == 2  # the same instant
            hooks.close_all()
        assert hooks.position() == {}, (function, line)


def test_closing_goes_on_where_an_interrupt_stopped_it(toy):
    session = patch(toy, "*", zero())
    for nth in range(1, 12):
        session.__enter__()
        interrupted(hooks.sessions.__file__, nth, session.close)
        session.close()
        assert clean(toy)


def test_real_signals_leave_no_session_behind(toy):
    """Interrupts at random moments, while sessions open and close all the time."""
    plain, left, random = toy(RUN), [], Random(0)
    name, tap = "blocks.0.resid_pre", toy.blocks[0].tap

    def open_and_close():
        end = time.monotonic() + 1  # an interrupt in a destructor is lost
        while time.monotonic() < end:
            with capture(toy, name), patch(toy, name, identity), at(step=1):
                tap("resid_pre", RUN)

    def interrupt(*_):
        raise KeyboardInterrupt

    def struck():
        try:
            signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-4, 2e-3))
            open_and_close()
        except KeyboardInterrupt:
            return live_handles() or list(hooks.position())

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for _ in range(400):
            left.append(struck())
            hooks.close_all()
            assert clean(toy) and hooks.position() == {}
    finally:
        signal.signal(signal.SIGALRM, before)
    assert torch.equal(toy(RUN), plain)
    # One in the instant before the first line of __exit__ has run; without protection several in a hundred.
    assert sum(map(bool, left)) <= 3, left


def test_a_generator_left_half_way_takes_its_session_and_its_place_with_it():
    pipe = Pipe()
    plain = pipe()

    def patched():
        with patch(pipe, "dit.*.resid_post", zero()), at(branch="strange"):
            yield from pipe.steps()

    run = patched()
    next(run)
    assert live_handles() and hooks.position() == {"branch": "strange"}
    run.close()
    assert clean(pipe.dit) and hooks.position() == {} and torch.equal(pipe(), plain)
    run = patched()
    next(run)
    del run
    gc.collect()
    assert clean(pipe.dit) and hooks.position() == {} and torch.equal(pipe(), plain)


def test_sessions_may_close_in_any_order(toy):
    plain = toy(RUN)
    first, second = ExitStack(), ExitStack()
    with first, second:
        first.enter_context(patch(toy, "blocks.0.resid_pre", scale_by(2)))
        second.enter_context(patch(toy, "blocks.0.resid_pre", scale_by(3)))
        close(toy(RUN), by_hand(toy, 6 * RUN))
        first.close()
        close(toy(RUN), by_hand(toy, 3 * RUN))
        second.close()
        assert torch.equal(toy(RUN), plain) and clean(toy)


def test_a_session_can_be_used_again_but_not_twice_at_once(toy):
    session = capture(toy, "blocks.0.resid_pre")
    with session as one:
        toy(RUN)
        with pytest.raises(RuntimeError, match="is open already; open a second one"), session:
            raise AssertionError("it opened")
    with session as two:
        toy(2 * RUN)
    assert torch.equal(two["resid_pre"], 2 * one["resid_pre"]) and len(one) == 1


def test_a_generator_closed_by_another_thread_takes_its_session_and_its_place_with_it():
    pipe = Pipe()
    plain = pipe()

    def patched():
        with patch(pipe, "dit.*.resid_post", zero()), at(step=7, branch="strange"):
            yield from pipe.steps()

    run = patched()
    next(run)
    thread = threading.Thread(target=run.close)
    thread.start()
    thread.join()
    assert (
        clean(pipe.dit)
        and hooks.position() == {}
        and not hooks.open_sessions()
        and torch.equal(pipe(), plain)
    )


def test_a_session_that_another_thread_closed_and_opened_anew_belongs_to_that_thread(toy):
    session, done = patch(toy, "blocks.0.resid_pre", scale_by(2)), []
    plain = toy(RUN)
    session.__enter__()

    def elsewhere():
        session.__exit__(GeneratorExit, None, None)
        with session:
            barrier.wait()
            barrier.wait()
            done.append(toy(RUN))

    barrier = threading.Barrier(2)
    thread = threading.Thread(target=elsewhere)
    thread.start()
    barrier.wait()
    mine = toy(RUN)
    barrier.wait()
    thread.join()
    assert torch.equal(mine, plain) and not torch.equal(done[0], plain) and clean(toy)


def test_close_all_closes_the_sessions_of_every_thread(toy):
    plain = toy(RUN)
    patch(toy, "blocks.0.resid_pre", zero()).__enter__()
    thread = threading.Thread(target=capture(toy, "*").__enter__)
    thread.start()
    thread.join()
    at(step=3).__enter__()
    assert live_handles() and hooks.position() == {"step": 3}
    hooks.close_all()
    assert clean(toy) and hooks.position() == {} and torch.equal(toy(RUN), plain)


def test_a_session_may_be_closed_while_its_thread_opens_another(toy):
    """As the garbage collector does with a generator that nobody holds: at any moment."""
    session = patch(toy, "blocks.0.resid_pre", zero())

    def collected():
        with session, hooks.sessions._lock:
            session.__exit__(GeneratorExit, None, None)

    thread = threading.Thread(target=collected, daemon=True)
    thread.start()
    thread.join(timeout=10)
    assert not thread.is_alive() and clean(toy)


# copies, sharing, threads, compilation


def test_copies_made_during_a_session_are_free_of_it(toy):
    plain = toy(RUN)
    with patch(toy, "blocks.*.resid_pre", scale_by(2)):
        deep, buffer = copy.deepcopy(toy), io.BytesIO()
        pickle.dump(toy, buffer)
        toy(RUN)
    buffer.seek(0)
    for twin in (deep, pickle.load(buffer)):
        assert clean(twin) and torch.equal(twin(RUN), plain)
        with patch(twin, "blocks.*.resid_pre", scale_by(2)):
            assert torch.equal(toy(RUN), plain) and not torch.equal(twin(RUN), plain)


def test_two_pipelines_that_share_a_component_share_its_sessions_and_no_other():
    shared = Toy()
    one, two, alone = Pipe(shared), Pipe(shared), Pipe(Toy())
    plain = one()
    with patch(one, "dit.blocks.0.resid_pre", scale_by(2)):
        assert torch.equal(one(), two()) and not torch.equal(two(), plain) and torch.equal(alone(), plain)
    with patch(one, "velocity", scale_by(2)):
        assert torch.equal(two(), plain) and not torch.equal(one(), plain)
    assert torch.equal(one(), plain) and torch.equal(two(), plain)


def test_a_module_with_two_names_is_one_place():
    shared = Toy()
    pipe = Pipe(shared)
    pipe.components["dit_low"] = shared
    with capture(pipe, "dit.blocks.0.resid_pre", "dit_low.blocks.0.resid_pre") as seen:
        shared(RUN)
    assert len(seen) == 1
    with patch(pipe, "dit*.blocks.0.resid_pre", scale_by(2)):
        close(shared(RUN), by_hand(shared, 2 * RUN))


def test_threads_do_not_see_each_others_sessions_nor_places(toy):
    plain, barrier, results = toy(RUN), threading.Barrier(4), {}

    def work(factor):
        for _ in range(5):
            with (
                at(step=factor),
                patch(toy, "blocks.0.resid_pre", scale_by(factor), steps=factor),
                capture(toy, "blocks.*.attn.probs", steps=factor) as seen,
            ):
                barrier.wait()
                results[factor] = toy(RUN), [w.step for w, _ in seen]
                barrier.wait()

    threads = [threading.Thread(target=work, args=(factor,)) for factor in (2, 3, 4, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for factor in (2, 3, 4, 5):
        close(results[factor][0], by_hand(toy, factor * RUN))
        assert results[factor][1] == [factor] * BLOCKS
    assert torch.equal(toy(RUN), plain) and clean(toy)


def test_a_run_in_another_thread_is_reported_as_such(toy):
    def elsewhere():
        thread = threading.Thread(target=toy, args=(RUN,))
        thread.start()
        thread.join()

    with (
        pytest.raises(
            NeverFired,
            match="it passed 3 times in another thread, and a session sees only the thread that opened it",
        ),
        capture(toy, "blocks.*.resid_pre"),
    ):
        elsewhere()


def test_a_compiled_model_can_be_looked_into_and_returns_to_its_graph(toy):
    frames = []

    def backend(graph, inputs):
        frames.append(graph)
        return graph.forward

    plain = toy(RUN)
    compiled = torch.compile(toy, backend=backend, fullgraph=True)
    compiled(RUN)
    assert len(frames) == 1  # one graph: taps break nothing
    with capture(compiled, "blocks.1.attn.probs") as seen, patch(compiled, "blocks.0.resid_pre", scale_by(2)):
        close(compiled(RUN), by_hand(toy, 2 * RUN))
    assert seen["probs"].shape == (2, HEADS, 6, 6)
    first, second = ExitStack(), ExitStack()
    with first, second:
        first.enter_context(patch(toy, "blocks.0.resid_pre", scale_by(2)))
        second.enter_context(patch(toy, "blocks.0.resid_pre", scale_by(3)))
        compiled(RUN)
        first.close()
        close(compiled(RUN), by_hand(toy, 3 * RUN))
    close(compiled(RUN), plain)
    assert len(frames) == 1 and clean(toy)
    assert torch._dynamo.eval_frame._stance.stance == "default"


def test_an_interrupt_while_compilers_are_held_back_lets_them_go_again(toy, monkeypatch):
    import torch._dynamo.eval_frame as dynamo

    hold_back = torch.compiler.set_stance

    def interrupted(stance):
        hold_back(stance)
        if stance == "force_eager":
            raise KeyboardInterrupt

    monkeypatch.setattr(torch.compiler, "set_stance", interrupted)
    with pytest.raises(KeyboardInterrupt), capture(toy, "blocks.0.attn.probs"):
        pass
    assert dynamo._stance.stance == "default" and not live_handles()


def test_closed_taps_cost_a_compiler_nothing():
    """No graph break, no operation of their own, no recompile for another block or after a session."""

    class Every(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.tap = Taps(x="n", beside="n", called="function")

        def forward(self, x):
            tap = self.tap
            if tap.edited("x", "beside") or tap.watched("x", "beside"):
                x = x.cos()
            tap.beside("beside", x.shape, x.dtype, lambda heads, rows: x)
            return tap.call("called", torch.sin, tap("x", x))

    graphs = []

    def backend(graph, inputs):
        graphs.append([node.name for node in graph.graph.nodes if node.op.startswith("call")])
        return graph.forward

    blocks, x = [Every(), Every()], torch.randn(5)
    compiled = [torch.compile(block, backend=backend, fullgraph=True) for block in blocks]
    for _ in range(2):
        for one in compiled:
            assert torch.equal(one(x), x.sin())
        with capture(blocks[0], "x", "beside") as seen:
            assert torch.equal(compiled[0](x), x.cos().sin())
        assert torch.equal(seen["x"], x.cos())
    assert graphs in ([["sin"]], [["sin"], ["sin"]]) and clean(blocks[0])


# wrappers


class Quiet:
    """A wrapper as a reader writes it: no module, and no word about what it wraps."""

    def __init__(self, inner):
        self.inner = inner

    def __call__(self, x):
        return self.inner(x)


class Passing(Quiet):
    def __getattr__(self, name):
        return getattr(self.__dict__["inner"], name)


class Module(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


class Saying(torch.nn.Module):
    """One with taps, weights and parts of its own, which has to say what it wraps."""

    def __init__(self, inner):
        super().__init__()
        self.wraps, self.gate, self.tap = inner, torch.nn.Linear(1, 1), Taps(gate="b n c")

    def forward(self, x):
        return self.tap("gate", self.wraps(x))


class Named(Saying):
    """One that keeps it under another name."""

    def __init__(self, inner):
        torch.nn.Module.__init__(self)
        self.toy, self.gate, self.tap = inner, torch.nn.Linear(1, 1), Taps(gate="b n c")

    @property
    def wraps(self):
        return self.toy


def compiled(toy):
    return torch.compile(toy, backend="eager")


WRAPPERS = (
    Quiet,
    Passing,
    Module,
    Saying,
    Named,
    compiled,
    lambda toy: Saying(Quiet(Quiet(Module(compiled(toy))))),
)


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_taps_keep_their_names_through_a_wrapper(toy, wrap):
    plain, name = toy(RUN), "blocks.1.attn.probs"
    with capture(toy, name) as bare:
        toy(RUN)
    wrapped = wrap(toy)
    assert set(taps(toy).names) <= set(taps(wrapped).names) <= {"gate", *taps(toy).names}
    with capture(wrapped, name) as seen:
        assert torch.equal(wrapped(RUN), plain)
    assert torch.equal(seen[name], bare[name])
    with patch(wrapped, "blocks.0.resid_pre", scale_by(2)):
        close(wrapped(RUN), by_hand(toy, 2 * RUN))
    assert torch.equal(wrapped(RUN), plain) and clean(toy)


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_taps_of_a_pipeline_keep_their_names_when_a_component_is_wrapped(toy, wrap):
    plain, pipe = Pipe(toy)(), Pipe(wrap(toy))
    with capture(pipe, "dit.blocks.*.resid_post", "velocity") as seen:
        assert torch.equal(pipe(), plain)
    assert set(seen.names) == {f"dit.blocks.{i}.resid_post" for i in range(BLOCKS)} | {"velocity"}


def test_a_wrapped_block_keeps_its_place_and_one_of_several_parts_its_name(toy):
    names = taps(toy).names
    toy.blocks[1] = Module(toy.blocks[1])
    toy.blocks[2] = torch.compile(toy.blocks[2], backend="eager")
    assert taps(toy).names == names
    both = types.SimpleNamespace(first=toy, second=Toy())
    both.itself = both  # a circle ends nowhere, and is no part
    both.tap = both.components = np.zeros(2)  # other people's names may mean other things
    assert taps(both).names == [f"{part}.{name}" for part in ("first", "second") for name in names]


# misses and mistakes: each names the cause and the cure


def test_a_typo_in_a_tap_names_the_nearest(toy):
    text = message(UnknownTap, opened(patch(toy, "blocks.*.attn.prob", identity), lambda: None))
    assert (
        "no tap of Toy matches 'blocks.*.attn.prob'" in text
        and "blocks.*.attn.probs" in text
        and "taps(obj) lists all" in text
    )


def test_a_forgotten_return_is_guessed(toy):
    text = message(
        TypeError, opened(patch(toy, "blocks.2.attn.heads", lambda x, where: None), lambda: toy(RUN))
    )
    assert (
        text == "patch at blocks.2.attn.heads returned None; expected [2, 4, 6, 4] (b heads n d). "
        "Did the function forget to return?"
    )
    text = message(
        TypeError,
        opened(patch(toy, "blocks.2.attn.attend", lambda attend, q, k, v, where: None), lambda: toy(RUN)),
    )
    assert "blocks.2.attn.attend returned None" in text and "forget to return" in text
    text = message(
        TypeError, opened(capture(toy, "blocks.2.attn.q", reduce=lambda x: None), lambda: toy(RUN))
    )
    assert "reduce= of the capture of blocks.2.attn.q returned NoneType" in text


@pytest.mark.parametrize(
    ("function", "error", "text"),
    [
        (
            lambda x, where: x[:, :2],
            ValueError,
            "returned [2, 2, 6, 4]; expected [2, 4, 6, 4] (b heads n d); keep every axis",
        ),
        (
            lambda x, where: x.double(),
            ValueError,
            "returned torch.float64; expected [2, 4, 6, 4] (b heads n d) as torch.float32; "
            "return new.to(x.dtype)",
        ),
        (
            lambda x, where: x.to("meta"),
            ValueError,
            "returned a tensor on meta; expected [2, 4, 6, 4] (b heads n d) on cpu; return new.to(x.device)",
        ),
        (
            lambda x, where: x.tolist(),
            TypeError,
            "returned list; expected [2, 4, 6, 4] (b heads n d) as a tensor",
        ),
    ],
)
def test_a_wrong_shape_dtype_device_or_type_is_named(toy, function, error, text):
    assert "patch at blocks.2.attn.heads " + text in message(
        error, opened(patch(toy, "blocks.2.attn.heads", function), lambda: toy(RUN))
    )


def test_a_step_that_never_came_is_named_with_those_that_did():
    pipe = Pipe()
    text = message(NeverFired, opened(patch(pipe, "dit.blocks.2.resid_post", zero(), steps=[50]), pipe))
    assert (
        "patch of dit.blocks.2.resid_post never fired: it came by 8 times, at steps 0..3 and "
        "branches cond, uncond; asked were steps 50 and branches all" in text
    )
    text = message(NeverFired, opened(capture(pipe, "dit.blocks.2.resid_post", steps=[0, 4]), pipe))
    assert "never fired at steps 4: it came by 8 times, at steps 0..3" in text
    text = message(NeverFired, opened(capture(pipe.dit, "blocks.*", steps=[0]), lambda: pipe.dit(RUN)))
    assert "the loop never announced one; write `with at(step=i, sigma=s):` around each step" in text


def test_a_capture_over_its_limit_stops_with_the_sum(toy):
    text = message(OverLimit, opened(capture(toy, "blocks.*.attn.probs", limit="2 kB"), lambda: toy(RUN)))
    assert (
        "capture of blocks.1.attn.probs needs 1.15 kB more on top of 1.15 kB; the limit is 2 kB. "
        "Ask for fewer steps=" in text
    )
    text = message(
        OverLimit, opened(capture(toy, "blocks.*.attn.probs", limit="1 kB", reduce="heads"), lambda: toy(RUN))
    )
    assert "needs 1.15 kB more on top of 0 B" in text  # what reduce= works on has to be formed first
    assert "limit='2 gigs' is not a size; write it as \"2 GB\"" in message(
        ValueError, lambda: capture(toy, "*", limit="2 gigs")
    )


def test_a_patch_in_a_branch_that_never_ran_is_named():
    pipe = Pipe()
    text = message(
        NeverFired, opened(patch(pipe, "dit.blocks.0.resid_post", zero(), branch="positive"), pipe)
    )
    assert "at steps 0..3 and branches cond, uncond; asked were steps all and branches positive" in text
    text = message(
        NeverFired,
        opened(patch(pipe.dit, "blocks.0.resid_post", zero(), branch="cond"), lambda: pipe.dit(RUN)),
    )
    assert 'the run never announced one; write `with at(branch="cond"):` around each pass' in text


def test_a_foreign_or_remote_component_is_named():
    pipe = Pipe()
    pipe.components["text"] = types.SimpleNamespace(encode=len)
    text = message(UnknownTap, opened(patch(pipe, "text.layers.0.attn.probs", identity), pipe))
    assert (
        "no taps in 'text': SimpleNamespace is a foreign or remote component; replace it by a local one"
        in text
    )
    text = message(UnknownTap, opened(patch(torch.nn.Linear(2, 2), "weight", identity), lambda: None))
    assert "Linear declares no taps: it is no module or pipeline of moddiff, or it runs elsewhere" in text


@pytest.mark.parametrize(
    ("policy", "error", "text"),
    [
        (dict(steps="first"), TypeError, "steps='first'; expected a whole number, or several"),
        (dict(steps=[0.5]), TypeError, "steps=[0.5]; expected a whole number, or several"),
        (dict(blocks=1.0), TypeError, "blocks=1.0; expected a whole number, or several"),
        (dict(branch=3), TypeError, "branch=3; expected text, or several"),
        (dict(dtype="half"), TypeError, "dtype='half'; expected a dtype of torch, such as torch.float16"),
        (dict(device="nowhere"), ValueError, "device='nowhere' cannot hold a capture: "),
        (dict(reduce=5), TypeError, "reduce=5; expected an axis such as 'heads', or a function of the value"),
        (dict(limit="1.2.3 GB"), ValueError, "limit='1.2.3 GB' is not a size"),
        (dict(grad=True, heads=1), ValueError, "leave out heads= and choose from its .grad afterwards"),
    ],
)
def test_a_policy_that_cannot_be_is_refused_before_the_run(toy, policy, error, text):
    assert text in message(error, lambda: capture(toy, "blocks.*.attn.q", **policy))


def test_what_is_no_name_is_refused(toy):
    assert "5 is no name of a tap; expected text such as 'blocks.*.resid_post'" in message(
        TypeError, lambda: capture(toy, "*", 5)
    )


def test_steps_may_come_as_any_whole_numbers():
    for steps in (2, [2], range(2, 3), torch.tensor(2), torch.tensor([2]), np.int64(2), np.array([2])):
        pipe = Pipe()
        with capture(pipe, "velocity", steps=steps) as seen:
            pipe()
        assert [where.step for where, _ in seen] == [2]


def test_a_block_that_does_not_exist_is_named(toy):
    assert "has no block 7; blocks.*.attn.q exists in blocks 0..2" in message(
        UnknownTap, opened(capture(toy, "blocks.*.attn.q", blocks=[0, 7]), lambda: None)
    )


def test_what_never_ran_at_all_and_what_a_swapped_attention_hides_are_loud(toy):
    assert "never fired: it never came by; run the model inside the with block" in message(
        NeverFired, opened(capture(toy, "blocks.*"), lambda: None)
    )
    with patch(toy, "blocks.1.attn.attend", replace_attend(lambda q, k, v: v)):
        text = message(NeverFired, opened(capture(toy, "blocks.1.attn.probs"), lambda: toy(RUN)))
    assert "see that no other patch skips it" in text


def test_each_of_several_patterns_has_to_come_by():
    pipe = Pipe()
    assert "capture of velocity never fired" in message(
        NeverFired, opened(capture(pipe, "dit.blocks.0.attn.q", "velocity"), lambda: pipe.dit(RUN))
    )


def test_functions_are_not_values_and_values_not_functions(toy):
    assert "attend is a function, there is nothing to capture" in message(
        ValueError, opened(capture(toy, "blocks.0.attn.attend"), lambda: None)
    )
    assert "it is a function; use replace_attend" in message(
        ValueError, opened(patch(toy, "blocks.0.attn.attend", zero()), lambda: None)
    )
    assert (
        "needs a function (x, where) -> x, got Tensor; for a fixed value write lambda x, where: value"
        in message(TypeError, lambda: patch(toy, "*", RUN))
    )


def test_an_empty_choice_is_refused(toy):
    assert "steps= is empty, so nothing would ever match" in message(
        ValueError, lambda: capture(toy, "*", steps=[])
    )


# the listing, places, taps themselves


def test_taps_lists_names_layouts_shapes_and_meanings(toy):
    table = taps(toy, "blocks.0.*")
    assert len(table) == 11 and ("blocks.0.attn.q", "b heads n d", "", "queries") in list(table)
    with capture(toy, "blocks.0.attn.q"):
        toy(RUN)
    assert ("blocks.0.attn.q", "b heads n d", [2, 4, 6, 4], "queries") in list(taps(toy, "blocks.0.attn.*"))
    assert "what it is" in repr(table) and "11 taps" in repr(table) and "<td" in table._repr_html_()


def test_a_tap_is_no_module_and_holds_no_parameter(toy):
    assert "tap" not in repr(toy).lower() and not any("tap" in name for name in toy.state_dict())


# a thousand random sessions


class RandomSessions(RuleBasedStateMachine):
    """Sessions open and close in any order, runs fail: whenever none is open, a run equals the first one."""

    opened = 0

    def __init__(self):
        super().__init__()
        self.toy, self.sessions = Toy().requires_grad_(False), []
        self.plain = self.toy(RUN)

    @rule(
        kind=st.sampled_from(["capture", "zero", "double", "swap", "none", "broken"]),
        tap=st.sampled_from(
            ["resid_pre", "resid_post", "attn.q", "attn.scores", "attn.probs", "attn.heads", "attn.out"]
        ),
        block=st.sampled_from(["*", "0", "1", "2"]),
    )
    def open(self, kind, tap, block):
        name = f"blocks.{block}.{tap}"
        if kind == "capture":
            session = capture(self.toy, name, limit="1 MB")
        elif kind == "swap":
            session = patch(
                self.toy, f"blocks.{block}.attn.attend", lambda attend, q, k, v, where: attend(q, k * 2, v)
            )
        elif kind == "broken":
            with pytest.raises(UnknownTap), capture(self.toy, name, name + "x"):
                raise AssertionError("it opened")
            return
        else:
            edit = {"zero": zero(b=0), "double": scale_by(2), "none": lambda x, where: None}[kind]
            session = patch(self.toy, name, edit)
        session.__enter__()
        self.sessions.append(session)
        RandomSessions.opened += 1

    @rule(which=st.integers(0, 100), error=st.sampled_from([None, ValueError, KeyboardInterrupt]))
    def leave(self, which, error):
        if self.sessions:
            session = self.sessions.pop(which % len(self.sessions))
            try:
                session.__exit__(error, None, None)
            except NeverFired:
                assert error is None

    @rule()
    def run(self):
        try:
            out = self.toy(RUN)
        except TypeError as forgotten:
            assert "forget to return" in str(forgotten)
        else:
            assert out.shape == RUN.shape

    @invariant()
    def as_at_first_when_nobody_looks(self):
        if not self.sessions:
            assert clean(self.toy) and torch.equal(self.toy(RUN), self.plain)

    def teardown(self):
        while self.sessions:
            self.sessions.pop().__exit__(KeyboardInterrupt, None, None)
        self.as_at_first_when_nobody_looks()


def test_after_a_thousand_random_sessions_the_plain_run_is_bit_equal_to_the_first():
    RandomSessions.opened = 0
    run_state_machine_as_test(
        RandomSessions,
        settings=settings(max_examples=180, stateful_step_count=40, deadline=None, derandomize=True),
    )
    assert RandomSessions.opened >= 1000
