"""Parts that run elsewhere: equal to the bit, open to looks, and clear about what goes wrong."""

import copy
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import httpx
import pytest
import torch
from small import CAPTIONS, dit, pipeline

import moddiff
from moddiff import at, capture, patch, taps
from moddiff.contracts import ContractError, fact
from moddiff.experts import Experts
from moddiff.extensions import windowed
from moddiff.fingerprints import fingerprint
from moddiff.hooks import NeverFired, UnknownTap, edits, identity
from moddiff.remote import RemoteError, serving
from moddiff.remote.branches import Branches
from moddiff.remote.server import Service, check_host
from moddiff.remote.wire import Malformed, packed, unpacked
from moddiff.remote.work import Full, Late, Worker
from moddiff.settings import Note
from moddiff.telemetry import recorded

PROMPT, RUN = CAPTIONS[0], dict(seed=3, steps=3)


@contextmanager
def elsewhere(pipe, *roles, **how):
    """The pipeline with these parts served by a thread of this process."""
    roles = roles or tuple(role for role, part in pipe.components.items() if part is not None)
    with serving({role: pipe.components[role] for role in roles}, **how) as url:
        token = how.get("token")
        yield pipe.replace(**{role: moddiff.remote(url, role, token) for role in roles}), url


@pytest.fixture
def pipe(tmp_path):
    return pipeline(tmp_path)


@pytest.fixture
def far(pipe):
    with elsewhere(pipe) as (far, _):
        yield far


def same(one, other):
    """Two records of the same values at the same moments."""
    assert len(one) == len(other) > 0
    for (where, value), (there, its) in zip(one, other):
        assert where == there and value.dtype == its.dtype and torch.equal(value, its), where


# ---- equal ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ("t2v", "i2v", "flf2v", "ti2v", "vace"))
def test_a_whole_run_is_equal_to_the_bit(tmp_path, task):
    pipe = pipeline(tmp_path, task)
    picture = torch.rand(3, 40, 50) * 2 - 1
    given = {"t2v": {}, "vace": {"references": [picture]}}.get(task, {"image": picture})
    if task == "flf2v":
        given["last_image"] = picture.flip(-1)
    with elsewhere(pipe) as (far, _):
        assert far(PROMPT, **given, **RUN) == pipe(PROMPT, **given, **RUN)


def test_two_experts_are_equal_to_the_bit(tmp_path):
    pipe = pipeline(tmp_path, dit=Experts(dit(seed=1), dit(seed=2), 0.875))
    with elsewhere(pipe, "dit") as (far, _):
        assert fact("dit", far.dit, "boundary") == 0.875
        with capture(pipe, "dit.*.final") as here:
            video = pipe(PROMPT, **RUN)
        with capture(far, "dit.*.final") as there:
            assert far(PROMPT, **RUN) == video
    same(here, there)
    assert {where.expert for where, _ in there} == {"high", "low"}


@torch.no_grad()
def test_each_part_is_equal_and_says_the_same_of_itself(pipe, far):
    video, latent = torch.rand(1, 3, 5, 32, 48) * 2 - 1, torch.randn(2, 4, 2, 4, 6)
    assert torch.equal(far.vae.encode(video), pipe.vae.encode(video))
    assert torch.equal(far.vae.decode(latent), pipe.vae.decode(latent))
    assert torch.equal(far.vae.decode(latent, chunked=True), pipe.vae.decode(latent, chunked=True))
    for one, other in zip(far.text.encode(CAPTIONS), pipe.text.encode(CAPTIONS)):
        assert torch.equal(one, other)
    assert far.text.counts(PROMPT) == pipe.text.counts(PROMPT)
    assert far.words(PROMPT) == pipe.words(PROMPT)
    for role in ("text", "dit", "vae"):
        assert fingerprint(far.components[role]) == fingerprint(pipe.components[role])
    assert (far.stride, far.patch, far.channels, far.task) == (
        pipe.stride,
        pipe.patch,
        pipe.channels,
        pipe.task,
    )


@torch.no_grad()
def test_the_image_encoder_is_equal(tmp_path):
    pipe = pipeline(tmp_path, "i2v")
    pictures = torch.rand(2, 3, 30, 20) * 2 - 1
    with elsewhere(pipe, "image") as (far, _):
        assert torch.equal(far.image.encode(pictures), pipe.image.encode(pictures))


def test_half_precision_travels_as_it_is(pipe):
    with elsewhere(pipe.replace(text=copy.deepcopy(pipe.text).bfloat16()), "text") as (far, _):
        (row,) = far.text.encode([PROMPT])
        assert row.dtype == torch.bfloat16


def test_a_copy_asks_the_same_server(pipe, far):
    assert copy.deepcopy(far.text).server is far.text.server
    assert (
        windowed(far.dit, 2, 1)(torch.randn(1, 4, 3, 4, 6), torch.tensor([5.0]), far.text.encode([PROMPT]))
        is not None
    )


def test_a_run_of_a_distilled_dit_elsewhere_has_the_settings_that_it_was_made_for(pipe):
    pipe.dit.sampling = {"steps": (0.99, 0.5), "solver": "euler", "scale": 1.0}
    with elsewhere(pipe, "dit") as (far, _):
        assert far.dit.sampling == pipe.dit.sampling and far.defaults == pipe.defaults
        assert far(PROMPT, seed=3) == pipe(PROMPT, seed=3)


def test_a_prompt_that_is_forgotten_though_none_was_named_is_an_error_of_the_server(pipe, far, monkeypatch):
    monkeypatch.setattr(far.dit.server, "ask", lambda *given, **told: ({"forgotten": True}, {}))
    with pytest.raises(RemoteError, match="expected the tensor 'out'"):
        far.dit(torch.randn(1, 4, 3, 4, 6), torch.tensor([5.0]), pipe.text.encode([PROMPT]))


# ---- hooks ----------------------------------------------------------------------------------------------


def test_taps_lists_those_of_the_model_elsewhere(pipe, far):
    for one, other in ((pipe, far), (pipe.dit, far.dit), (pipe.vae, far.vae), (pipe.text, far.text)):
        assert {row[:2] for row in taps(one)} == {row[:2] for row in taps(other)}


CAPTURES = {
    "one": (("dit.blocks.1.cross_attn.probs",), dict(branch="cond")),
    "all of a step": (("*",), dict(steps=1)),
    "parts": (("dit.blocks.*.self_attn.probs",), dict(heads=1, rows=slice(2, 9, 3), steps=[0, 2])),
    "means": (("dit.blocks.*.self_attn.scores",), dict(reduce="heads", dtype=torch.float16)),
    "masks": (("dit.blocks.0.self_attn.q",), dict(heads=torch.tensor([False, True]))),
    "before the steps": (("dit.text", "text.layers.0.attn.probs"), {}),
    "after them": (("vae.decoder.stage.*",), {}),
}


@pytest.mark.parametrize("name", CAPTURES)
def test_a_capture_is_equal_to_the_bit_and_changes_nothing(pipe, far, name):
    patterns, how = CAPTURES[name]
    with capture(pipe, *patterns, **how) as here:
        video = pipe(PROMPT, **RUN)
    with capture(far, *patterns, **how) as there:
        assert far(PROMPT, **RUN) == video
    if name != "all of a step":
        same(here, there)
    else:  # in whole passes they come one after the other, so their order may be another
        assert here.names and set(here.names) == set(there.names) and here.bytes == there.bytes


def an_edit(name, record):
    return {
        "zero": edits.zero(heads=1),
        "scale": edits.scale_by(0.5, heads=0, tokens=range(3, 17)),
        "mean": edits.mean_over("tokens", heads=torch.tensor([1])),
        "noise": edits.noise(0.7, seed=5, tokens=slice(None, 7)),
        "transplant": edits.transplant(record, heads=1),
        "identity": identity,
    }[name]


@pytest.mark.parametrize("name", ("zero", "scale", "mean", "noise", "transplant", "identity"))
def test_a_declared_edit_inside_the_model_elsewhere_gives_the_same_bytes(pipe, far, name):
    with capture(pipe, "dit.blocks.*.self_attn.heads") as record:
        plain = pipe(CAPTIONS[1], **RUN)
    where = dict(steps=[0, 1], branch="cond", blocks=1)
    with patch(pipe, "dit.blocks.*.self_attn.heads", an_edit(name, record), **where):
        video = pipe(PROMPT, **RUN)
    with patch(far, "dit.blocks.*.self_attn.heads", an_edit(name, record), **where):
        assert far(PROMPT, **RUN) == video != plain
    assert far(PROMPT, **RUN) == pipe(PROMPT, **RUN)


def test_a_patched_prompt_stays_patched_and_no_one_else_has_it(pipe, far):
    with patch(pipe, "dit.text", edits.zero(), branch="cond"):
        patched = pipe(PROMPT, **RUN)
    with patch(far, "dit.text", edits.zero(), branch="cond"):
        run = far.prepare(PROMPT, **RUN)
    for _ in range(5):  # so that what was prepared is forgotten there
        far.prepare(CAPTIONS[1], **RUN)
    *_, state = far.loop(run)
    assert far.decode(state.next) == patched
    assert far(PROMPT, **RUN) == pipe(PROMPT, **RUN) != patched


@torch.no_grad()
def test_sessions_on_one_tap_act_in_the_order_of_their_opening(pipe, far):
    name = "blocks.0.self_attn.heads"
    x, t, text = torch.randn(1, 4, 3, 4, 6), torch.tensor([500.0]), pipe.text.encode([PROMPT])
    seen = []
    for part in (pipe.dit, far.dit):
        with (
            capture(part, name) as before,
            patch(part, name, edits.scale_by(2)),
            capture(part, name) as after,
        ):
            out = part(x, t, text)
        seen.append((out, before[name], after[name]))
    for one, other in zip(*seen):
        assert torch.equal(one, other)
    assert torch.equal(seen[1][2], 2 * seen[1][1])


def test_what_is_code_or_a_gradient_does_not_travel(far):
    function = lambda x, where: x  # noqa: E731
    for pattern, edit in (
        ("dit.blocks.0.self_attn.heads", function),
        ("dit.blocks.0.self_attn.attend", function),
    ):
        with pytest.raises(TypeError, match="only the declared edits go there"):
            with patch(far, pattern, edit):
                raise AssertionError("it was opened")
    for how in (dict(grad=True), dict(reduce=torch.mean)):
        with pytest.raises(TypeError, match="gradients and functions do not travel"):
            with capture(far, "dit.blocks.0.resid_post", **how):
                raise AssertionError("it was opened")


def test_misses_and_unknown_taps_are_said_as_of_a_model_here(far):
    with pytest.raises(UnknownTap, match="blocks"):
        with capture(far, "dit.blocks.9.resid_post"):
            pass
    with pytest.raises(NeverFired, match="steps 7"):
        with capture(far, "dit.blocks.0.resid_post", steps=7):
            far(PROMPT, **RUN)
    with pytest.raises(MemoryError, match="limit"):
        with capture(far, "dit.blocks.0.resid_post", limit=1000):
            far(PROMPT, **RUN)


def test_stop_ends_a_run_elsewhere_too(pipe, far):
    with capture(far, "dit.blocks.0.resid_post", steps=0, branch="cond", stop=True) as seen:
        far(PROMPT, **RUN)
        raise AssertionError("it went on")
    assert len(seen) == 1


# ---- the branches of a step ------------------------------------------------------------------------------


@pytest.fixture
def asked(far, monkeypatch):
    """The ops of all questions to the dit elsewhere, each with the branches that it was about."""
    ask, ops = far.dit.server.ask, []

    def counting(fingerprint, op, tensors, **told):
        ops.append((op, told["at"].get("branch"), *told.get("along", ())))
        return ask(fingerprint, op, tensors, **told)

    monkeypatch.setattr(far.dit.server, "ask", counting)
    return ops


def passes(ops):
    return [branches for op, *branches in ops if op == "call"]


def test_after_the_first_step_both_branches_are_one_question(pipe, far, asked):
    assert far(PROMPT, **RUN) == pipe(PROMPT, **RUN)
    assert passes(asked) == [["cond"], ["uncond"], ["cond", "uncond"], ["cond", "uncond"]]


class Uncertain:
    """A guide that does not do the same in each step."""

    def __init__(self, *plan):
        self.plan = plan  # of each step the branches that it asks for

    def __call__(self, predict, sigma, t=None):
        return sum(predict(branch) for branch in self.plan[moddiff.hooks.position()["step"]])


@pytest.mark.parametrize(
    ("plan", "questions"),
    (
        (("cond", "uncond"), ["c", "u", "cu", "cu", "cu"]),
        (("uncond", "cond"), ["u", "c", "uc", "uc", "uc"]),
        (("cond",), ["c", "c", "c", "c"]),
        (("cond", "cond"), ["c"] * 8),
    ),
)
def test_a_guide_is_asked_for_as_it_asked_in_the_step_before(pipe, far, asked, plan, questions):
    how = RUN | {"steps": 4, "scale": Uncertain(*[plan] * 4)}
    assert far(PROMPT, **how) == pipe(PROMPT, **how)
    assert ["".join(branch[0] for branch in each) for each in passes(asked)] == questions


def test_what_came_along_and_was_not_wanted_comes_once_in_a_run(pipe, far, asked):
    both, one = ("cond", "uncond"), ("cond",)
    how = RUN | {"steps": 7, "scale": Uncertain(one, both, both, one, both, both, both)}
    assert far(PROMPT, **how) == pipe(PROMPT, **how)
    along = [len(each) == 2 for each in passes(asked)]
    assert along.index(True) == 3 and sum(along) == 2  # steps 2 and 3; the latter wanted one alone


@pytest.mark.parametrize("change", ("nothing", "x", "written", "option", "prompt", "sigma"))
def test_what_came_along_is_used_for_the_same_x_prompt_and_moment_alone(change):
    branches, run, seen = Branches(), moddiff.hooks.OneRun(), []

    def ask(along):
        seen.append((moddiff.hooks.position()["branch"], *along))
        return torch.zeros(1), {branch: torch.ones(1) for branch in along}

    for step in range(3):
        x, prompts = torch.ones(2), {"cond": 1, "uncond": 2}
        for branch in prompts:
            given, sigma = {"x": x, "y": torch.ones(3), "strength": 1}, 0.5
            if step == 1 and branch == "uncond":  # between the two branches
                given["x"] = torch.ones(2) * 2 if change == "x" else x
                given["strength"] = 2 if change == "option" else 1
                x[0] = 7 if change == "written" else 1
                prompts["uncond"] = 3 if change == "prompt" else 2
                sigma = 0.6 if change == "sigma" else 0.5
            with at(run=run, step=step, branch=branch, sigma=sigma):
                velocity = branches.velocity(prompts[branch], given, ask, 60)
            assert velocity == float(branch == "uncond" and len(seen[-1]) == 2)
    first, both = [("cond",), ("uncond",)], [("cond", "uncond")]
    # Once it was of no use, and the rest of the run is asked one by one.
    assert seen == (first + 2 * both if change == "nothing" else first + both + [("uncond",), *first])


def test_who_looks_sees_each_branch_alone(pipe, far, asked):
    with capture(far, "dit.blocks.0.resid_post", steps=2):
        assert far(PROMPT, **RUN) == pipe(PROMPT, **RUN)
    assert passes(asked) == [["cond"], ["uncond"]] * 3


def test_windows_are_asked_for_alone(pipe, far, asked):
    near, there = (part.replace(dit=windowed(part.dit, 2, 1)) for part in (pipe, far))
    assert there(PROMPT, **RUN) == near(PROMPT, **RUN)
    assert passes(asked) and all(len(each) == 1 for each in passes(asked))


@pytest.mark.parametrize(("timeout", "questions"), ((10, 3), (0.1, 4)))
def test_branches_that_would_take_half_of_the_time_are_asked_for_alone(timeout, questions):
    branches, run, count = Branches(), moddiff.hooks.OneRun(), 0

    def ask(along):
        nonlocal count
        count += 1
        time.sleep(0.03)
        return torch.zeros(1), {branch: torch.ones(1) for branch in along}

    for step in range(2):
        for branch in ("cond", "uncond"):
            with at(run=run, step=step, branch=branch):
                branches.velocity(branch, {"x": torch.ones(1)}, ask, timeout)
    assert count == questions


def test_two_prompts_that_were_forgotten_are_prepared_again(pipe, far, asked):
    run = far.prepare(PROMPT, **RUN)
    states = far.loop(run)
    next(states)
    for _ in range(5):
        far.prepare(CAPTIONS[1], **RUN)
    *_, state = states
    assert far.decode(state.next) == pipe(PROMPT, **RUN)
    assert passes(asked)[-1] == ["cond", "uncond"]


# ---- going on -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ("unipc", "dpm++", "euler"))
def test_a_run_goes_on_after_its_server_came_back(pipe, solver):
    how = RUN | {"steps": 6, "solver": solver}
    with elsewhere(pipe, "dit") as (far, url):
        for state in far.steps(PROMPT, **how):
            if state.step == 3:
                break
    with pytest.raises(RemoteError, match="cannot connect"):
        list(moddiff.resume(far, state))
    with serving({"dit": pipe.dit}, port=int(url.rpartition(":")[2])):
        *_, last = moddiff.resume(far, state)
    assert last.step == 5 and far.decode(last.next) == pipe(PROMPT, **how)


def test_resume_of_a_state_of_no_run():
    with pytest.raises(ValueError, match="belongs to no run"):
        moddiff.resume(None, moddiff.run.State(0, 1, *[None] * 7))


def test_a_server_that_came_back_with_other_weights_is_told_apart(pipe):
    with elsewhere(pipe, "dit") as (far, url):
        state = next(far.steps(PROMPT, **RUN))
    with serving({"dit": dit(seed=9)}, port=int(url.rpartition(":")[2])):
        with pytest.raises(RemoteError, match="fingerprint"):
            list(moddiff.resume(far, state))


# ---- what goes wrong ------------------------------------------------------------------------------------


@contextmanager
def answering(respond):
    """A server of one's own: respond(connection) for each question."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        stop = threading.Event()

        def loop():
            listener.settimeout(0.05)
            while not stop.is_set():
                try:
                    connection, _ = listener.accept()
                except TimeoutError:
                    continue
                with connection:
                    connection.recv(2**20)
                    respond(connection)

        thread = threading.Thread(target=loop)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            stop.set()
            thread.join()


def reply(body, status="200 OK", length=None):
    head = f"HTTP/1.1 {status}\r\nContent-Length: {len(body) if length is None else length}\r\n\r\n"
    return head.encode() + body


def test_a_dead_server_is_said_at_once():
    with pytest.raises(RemoteError, match="cannot connect.*moddiff serve"):
        moddiff.remote("http://127.0.0.1:9", "dit")


def test_a_slow_server_costs_no_more_than_the_timeout(pipe):
    def drip(connection):
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
        for _ in range(40):
            try:
                connection.sendall(b" ")
            except OSError:
                return
            time.sleep(0.05)

    started = time.monotonic()
    with answering(drip) as url, pytest.raises(RemoteError, match="no answer within 0.3 s"):
        moddiff.remote(url, "dit", timeout=0.3)
    assert time.monotonic() - started < 3

    class Slow(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.wraps = inner

        def encode(self, prompts):
            time.sleep(0.6)
            return self.wraps.encode(prompts)

    with serving({"text": Slow(pipe.text)}) as url:
        with pytest.raises(RemoteError, match="no answer within|deadline"):
            moddiff.remote(url, "text", timeout=0.2).encode([PROMPT])
        assert len(moddiff.remote(url, "text").encode([PROMPT])) == 1  # it is alive


@pytest.mark.parametrize(
    ("answer", "said"),
    (
        (b"hello", "none of HTTP"),
        (reply(b"[1, 2]"), "is it a `moddiff serve`"),
        (reply(b'{"role": "dit"}'), "is it a `moddiff serve`"),
        (reply(b"{}", length=50), "broke off"),
        (reply(b"", length=10**15), "its length is"),
        (reply(b"<html>", "502 Bad Gateway"), "<html>"),
        (b"", "closed before an answer"),
    ),
)
def test_a_stranger_is_no_server_of_ours(answer, said):
    with answering(lambda connection: connection.sendall(answer)) as url:
        with pytest.raises(RemoteError, match=said):
            moddiff.remote(url, "dit", timeout=5)


class Lying(torch.nn.Module):
    """A denoiser that answers as it is told."""

    def __init__(self, answer, inner):
        super().__init__()
        self.answer, self.wraps = answer, inner

    def forward(self, x, t, text, **rest):
        return self.answer(x)


@pytest.mark.parametrize(
    ("answer", "error"),
    (
        (lambda x: x * torch.nan, ContractError),
        (lambda x: x[:, :, :1], ContractError),
        (lambda x: x.long(), ContractError),
        (lambda x: 1 / 0, RemoteError),
    ),
)
def test_an_answer_that_breaks_the_promise_is_an_error_and_the_server_lives(pipe, answer, error):
    with elsewhere(pipe.replace(dit=Lying(answer, pipe.dit)), "dit") as (far, url):
        with pytest.raises(error):
            far(PROMPT, **RUN)
        assert httpx.get(f"{url}/health").json()["status"] == "ok"


def test_what_the_component_refuses_is_raised_as_it_is(pipe, far):
    for part in (pipe, far):
        with pytest.raises(ValueError, match="channels"):
            part.dit(torch.randn(1, 7, 3, 4, 6), torch.tensor([1.0]), part.text.encode([PROMPT]))
        with pytest.raises(TypeError, match="must be a str"):
            part.text.encode([3])
        with pytest.raises(ValueError, match="4n"):
            part.vae.encode(torch.zeros(1, 3, 4, 32, 48))
    with pytest.raises(TypeError, match="does not travel"):
        far.dit(torch.randn(1, 4, 3, 4, 6), torch.tensor([1.0]), [], control_scale=[1])


def test_tokens_are_asked_for_and_off_loopback_demanded(pipe):
    with serving({"text": pipe.text}, token="sesame") as url:
        for token in (None, "wrong", "ünicode"):
            with pytest.raises(RemoteError, match="token"):
                moddiff.remote(url, "text", token and token.encode("ascii", "replace").decode())
        assert len(moddiff.remote(url, "text", "sesame").encode([PROMPT])) == 1
        assert httpx.get(f"{url}/health").status_code == 200
    check_host("127.0.0.1", None), check_host("0.0.0.0", "sesame")
    for host in ("0.0.0.0", "192.168.1.7", "example.org"):
        with pytest.raises(ValueError, match="token"):
            check_host(host, None)


def test_bad_questions_are_refused_before_they_cost(pipe):
    with serving({"text": pipe.text}, limit="1 MB") as url:
        print_ = fingerprint(pipe.text)
        header = dict(version=1, role="text", fingerprint=print_, op="encode", deadline=5, prompts=[PROMPT])

        def status(content=None, headers=None, **changes):
            content = b"".join(packed(header | changes, {})[0]) if content is None else content
            answer = httpx.post(f"{url}/v1/text", content=content, headers=headers)
            assert answer.status_code == 200 or len(answer.json()["message"]) > 5
            return answer.status_code

        assert status() == 200
        assert status(version=2) == status(role="dit") == status(fingerprint="x") == 409
        assert status(content=b"junk") == status(op="eval") == status(deadline="soon") == 400
        assert (
            status(prompts="text")
            == status(looks=3)
            == status(at=[1])
            == status(looks=[{"kind": "x"}])
            == 400
        )
        assert status(at={"step": "x"}) == 422
        assert status(content=iter([b"no size"])) == 411
        assert httpx.get(f"{url}/v1/dit").status_code == 404
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as raw:
            raw.sendall(b"POST /v1/text HTTP/1.1\r\nHost: x\r\nContent-Length: 2000000000\r\n\r\n")
            assert b"413" in raw.recv(100)  # and not a byte of the body was sent
        assert status() == 200


def test_a_message_comes_back_as_it_went_and_damage_is_seen():
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.tensor(True),
        "c": torch.randn(2, 3).bfloat16(),
        "d": torch.zeros(0),
    }
    pieces, size = packed({"x": [1, None]}, tensors)
    data = b"".join(pieces)
    header, back = unpacked(data)
    assert len(data) == size and header == {"x": [1, None]}
    assert all(torch.equal(back[name], x) and back[name].dtype == x.dtype for name, x in tensors.items())
    for wrong in (b"", data[:7], data[:40], data[:-1], data + b"x", b"\xff" * 50, b"\x00" * 8):
        with pytest.raises(Malformed):
            unpacked(wrong)
    with pytest.raises(TypeError, match="does not travel"):
        packed({}, {"a": torch.zeros(2, dtype=torch.complex64)})


def test_a_full_line_is_an_honest_429():
    worker, gate = Worker("test", places=1), threading.Event()
    futures = []
    for _ in range(2):
        worker.take_place()
        futures.append(worker.submit(gate.wait, time.monotonic() + 60))
    with pytest.raises(Full, match="waiting already"):
        worker.take_place()
    assert futures[1].cancel()  # what waits can be dropped
    late = worker.submit(gate.wait, time.monotonic() - 1)
    gate.set()
    assert futures[0].result(5) is True
    with pytest.raises(Late):
        late.result(5)
    worker.stop()
    with pytest.raises(Full, match="ending"):
        worker.submit(gate.wait, time.monotonic() + 1)


class Counting(torch.nn.Module):
    def __init__(self, inner, seconds=0.0):
        super().__init__()
        self.wraps, self.seconds, self.calls = inner, seconds, 0

    def encode(self, prompts):
        self.calls += 1
        time.sleep(self.seconds)
        return self.wraps.encode(prompts)

    def begun(self):
        """Come back once it is asked, however busy the machine is."""
        deadline = time.monotonic() + 30
        while not self.calls and time.monotonic() < deadline:
            time.sleep(0.01)


def test_two_clients_at_once_wait_for_each_other_and_busy_ones_come_again(pipe):
    slow = Counting(pipe.text, 0.05)
    with serving({"text": slow}, places=1) as url:
        parts = [moddiff.remote(url, "text") for _ in range(4)]
        rows, threads = {}, []
        for i, part in enumerate(parts):
            threads.append(
                threading.Thread(target=lambda i=i, part=part: rows.update({i: part.encode([PROMPT])}))
            )
            threads[-1].start()
        for thread in threads:
            thread.join()
    assert len(rows) == 4 and all(torch.equal(rows[0][0], row[0]) for row in rows.values())


def test_what_waits_is_dropped_when_its_client_goes(pipe):
    slow = Counting(pipe.text, 0.5)
    with serving({"text": slow}) as url:
        first = threading.Thread(target=lambda: moddiff.remote(url, "text").encode([PROMPT]))
        first.start()
        slow.begun()
        with pytest.raises(RemoteError):
            moddiff.remote(url, "text", timeout=0.1).encode([PROMPT])
        first.join()
        moddiff.remote(url, "text").encode([PROMPT])
    assert slow.calls == 2


def test_a_stop_finishes_what_runs_and_refuses_what_comes(pipe):
    slow, rows = Counting(pipe.text, 0.5), []
    service = Service({"text": slow})
    service.stop()
    assert service.health()["status"] == "ending"
    with serving({"text": slow}) as url:
        part = moddiff.remote(url, "text")
        thread = threading.Thread(target=lambda: rows.extend(part.encode([PROMPT])))
        thread.start()
        slow.begun()
    thread.join()
    assert len(rows) == 1
    with pytest.raises(RemoteError, match="cannot connect"):
        part.encode([PROMPT])


# ---- encodings kept -------------------------------------------------------------------------------------


def test_encodings_are_kept_by_content_and_damage_is_computed_again(pipe, tmp_path):
    counting, folder = Counting(pipe.text), tmp_path / "kept"
    with serving({"text": counting}) as url:
        text = moddiff.remote(url, "text", cache=folder)
        (first,) = text.encode([PROMPT])
        (again,) = moddiff.remote(url, "text", cache=folder).encode([PROMPT])
        assert counting.calls == 1 and torch.equal(first, again)
        text.encode([CAPTIONS[1]])
        assert counting.calls == 2
        with capture(text, "layers.0.resid_post") as seen:
            text.encode([PROMPT])
        assert counting.calls == 3 and len(seen) == 1
        for damage in (lambda data: data[:-3], lambda data: data[:-3] + b"abc", lambda data: b""):
            for file in folder.rglob("*.safetensors"):
                file.write_bytes(damage(file.read_bytes()))
            with pytest.warns(Note, match="is damaged"):
                assert torch.equal(text.encode([PROMPT])[0], first)
        assert counting.calls == 6
        text.encode([PROMPT])
        assert counting.calls == 6 and not list(folder.rglob("*.part"))
    with pytest.raises(ValueError, match="is a file"):
        with serving({"text": counting}) as url:
            moddiff.remote(url, "text", cache=next(folder.rglob("*.safetensors")))


def test_a_prompt_that_was_only_encoded_is_run_without_its_server(pipe, tmp_path):
    with serving({"text": pipe.text}) as url:
        text = moddiff.remote(url, "text", cache=tmp_path)
        far = pipe.replace(text=text)
        for prompt in (PROMPT, far.negative):
            text.encode([prompt])
    assert text.counts(PROMPT) == pipe.text.counts(PROMPT)
    assert far(PROMPT, **RUN) == pipe(PROMPT, **RUN)


# ---- the command ----------------------------------------------------------------------------------------


def test_the_command_serves_until_it_is_told_to_end(tmp_path):
    token = tmp_path / "token"
    token.write_text("sesame\n")
    command = [
        sys.executable,
        "-m",
        "moddiff",
        "serve",
        "--roles",
        "text",
        "--port",
        "0",
        "--token-file",
        token,
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline()
            url = re.search(r"http://\S+", line)[0]
            text = moddiff.remote(url, "text", "sesame")
            pipe = moddiff.load("tiny")
            assert text.fingerprint == fingerprint(pipe.text) and text.fingerprint in line
            assert torch.equal(text.encode([PROMPT])[0], pipe.text.encode([PROMPT])[0])
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(20) in (0, -signal.SIGTERM)


@pytest.mark.parametrize(
    "words", (["--roles", "solver"], ["--host", "0.0.0.0"], ["--backend", "jax"], ["--roles", "image"])
)
def test_the_command_says_what_is_wrong(words, capsys):
    from moddiff.cli import main

    with pytest.raises(SystemExit):
        main(["serve", "--port", "0", *words])
    assert words[1] in capsys.readouterr().err


def test_a_component_without_taps_is_served_too():
    class Twice(torch.nn.Module):
        task, channels = "t2v", 4

        def forward(self, x, t, text):
            return 2 * x

    with serving({"dit": Twice()}) as url:
        part, x = moddiff.remote(url, "dit"), torch.randn(1, 4, 1, 2, 2)
        assert torch.equal(part(x, torch.tensor([1.0]), []), 2 * x) and part.prepare is None
        with pytest.raises(UnknownTap):
            taps(part)


def test_the_description_is_plain_json(pipe):
    service = Service({role: pipe.components[role] for role in ("text", "dit", "vae")})
    for served in service.served.values():
        assert json.loads(json.dumps(served.described()))["fingerprint"] == served.fingerprint
    service.stop()
    with at(step=1):
        assert moddiff.hooks.position() == {"step": 1}


def test_an_answer_does_not_wait_for_the_other_sides_acknowledgement(far):
    def took():
        begun = time.perf_counter()
        far.text.encode([PROMPT])
        return time.perf_counter() - begun

    # Nagle's algorithm against delayed ACKs: each answer would take 40 ms more.
    assert min(took() for _ in range(20)) < 0.03


def test_spans_of_both_ends_say_where_the_run_is(far):
    with recorded() as spans:
        far(PROMPT, **RUN)
    of = {one.id: one for one in spans}
    served = [one for one in spans if one.name == "serve.call" and one.attributes["moddiff.op"] == "call"]
    assert len(served) == 1 + RUN["steps"]  # the first step asks for one branch after the other
    inside = [one.parent for one in spans if one.name == "pass"]
    assert [inside.count(one.id) for one in served] == [1, 1] + [2] * (RUN["steps"] - 1)
    for one in served:
        asked, here = of[one.parent], ("moddiff.step", "moddiff.sigma", "moddiff.branch")
        assert asked.name == "remote.call" and of[asked.parent].name == "branch"
        assert all(one.attributes[name] == of[asked.parent].attributes[name] for name in here)
