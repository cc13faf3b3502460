"""What if a server dies, is slow, or is asked nonsense?  Real processes, and counts of what is left."""

import gc
import http.client
import json
import os
import random
import shutil
import signal
import socket
import threading
import time
from collections import Counter

import pytest
import torch
from at_fault import Forks, Wire, held
from small import CAPTIONS, pipeline

import moddiff
from moddiff.fingerprints import fingerprint
from moddiff.hooks import open_sessions, position
from moddiff.remote import RemoteError
from moddiff.remote.wire import VERSION, packed, unpacked
from moddiff.settings import Note

PROMPT, RUN = CAPTIONS[0], dict(seed=3, steps=4)
ROLES = "text", "dit", "vae"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As the servers, which are forks: sums of several threads have other last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def pipe(folder):
    return pipeline(folder)


@pytest.fixture(scope="module")
def forks(folder, pipe):
    forks = Forks(folder)
    yield forks
    forks.close()


@pytest.fixture(scope="module")
def server(forks):
    return forks.begin()


@pytest.fixture(scope="module")
def film(pipe):
    return pipe(PROMPT, **RUN)


@pytest.fixture(autouse=True)
def nothing_is_left(pipe):
    """No thread, file or open look is left at this end."""
    gc.collect()  # pipelines hold themselves in circles, and their connections
    before = threading.active_count(), len(os.listdir("/proc/self/fd"))
    yield
    gc.collect()
    assert not position() and not list(open_sessions())
    until = time.monotonic() + 2
    while (after := (threading.active_count(), len(os.listdir("/proc/self/fd")))) > before:
        assert time.monotonic() < until, (before, after)
        time.sleep(0.02)


def elsewhere(pipe, url, roles=ROLES, **how):
    return pipe.replace(**{role: moddiff.remote(url, role, timeout=10, **how) for role in roles})


def kill(pid):
    os.kill(pid, signal.SIGKILL)


# ---- the plug is pulled ----------------------------------------------------------------------------------


def port_of(url):
    return int(url.rpartition(":")[2])


def cut(forks, pipe, wire, after):
    """A run whose server is killed after so many bytes; another is begun, and the run goes on.

    -> the video, the steps that were done before, the error
    """
    pid, url = forks.begin()
    wire.port = port_of(url)
    far = elsewhere(pipe, wire.url)
    wire.passed, wire.broken, wire.left = 0, lambda: kill(pid), after
    state, error, steps = None, None, RUN["steps"]
    try:
        for reached in far.steps(PROMPT, **RUN):
            state = reached
        video = far.decode(state.next)
    except RemoteError as told:
        error = told
        _, url = forks.begin()
        wire.port = port_of(url)
        done = 0 if state is None else state.step + 1
        if state is None:
            return far(PROMPT, **RUN), done, error
        if done < steps:
            *_, state = moddiff.resume(far, state)
        return far.decode(state.next), done, error
    kill(pid)
    return video, steps, error


def test_a_server_killed_at_any_of_20_moments_costs_no_step_that_was_done(forks, pipe, film):
    wire, chance = Wire(0), random.Random(15)
    try:
        video, _, error = cut(forks, pipe, wire, 10**9)
        assert video == film and error is None
        every, done = wire.passed, []
        for i in range(20):  # one of each twentieth of all bytes, both ways
            video, steps, error = cut(forks, pipe, wire, int(every * (i + chance.random() * 0.9) / 20) + 1)
            assert video == film
            assert wire.url in str(error) and "no answer within" not in str(error)  # it is said at once
            done.append(steps)
        assert done == sorted(done) and {0, RUN["steps"]} <= set(done) and len(set(done)) >= 3
    finally:
        wire.close()


# ---- one server, many faults -----------------------------------------------------------------------------


def test_slow_is_said_within_the_timeout_and_what_waited_is_dropped(forks, pipe):
    _, url = forks.begin("slow")
    text = moddiff.remote(url, "text", timeout=10)
    hurried = moddiff.remote(url, "text", timeout=0.15)
    first = threading.Thread(target=text.encode, args=([PROMPT],))
    first.start()
    time.sleep(0.1)
    for _ in range(3):  # they wait in line behind the first, and go away
        with pytest.raises(RemoteError, match="within 0.15 s|deadline"):
            hurried.encode([CAPTIONS[1]])
    first.join()
    assert torch.equal(text.encode([PROMPT])[0], pipe.text.encode([PROMPT])[0])
    assert text.tokens(PROMPT) == [(2, "calls")]


def test_a_wrong_token_and_a_wrong_fingerprint_say_what_to_do(forks, server, pipe, film):
    _, url = forks.begin("quick", "sesame")
    for token in (None, "wrong"):
        with pytest.raises(RemoteError, match="token is missing or wrong; give token="):
            moddiff.remote(url, "dit", token)
    far = elsewhere(pipe, server[1], ("dit",))
    right, far.dit.fingerprint = far.dit.fingerprint, "0" * 16
    with pytest.raises(RemoteError, match=f"{right}.*expected '0+'|0+.*expected '{right}'.*connect again"):
        far(PROMPT, **RUN)
    far.dit.fingerprint = right
    assert far(PROMPT, **RUN) == film


def test_two_clients_at_once_get_the_bits_that_each_gets_alone(server, pipe):
    alone = {seed: pipe(CAPTIONS[seed % 2], seed=seed, steps=3) for seed in range(3)}
    films = {}

    def run(seed):
        films[seed] = elsewhere(pipe, server[1])(CAPTIONS[seed % 2], seed=seed, steps=3)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in alone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert films == alone


def test_a_client_that_goes_in_the_middle_leaves_nothing_behind(server, pipe, film):
    pid, url = server
    far = elsewhere(pipe, url)
    assert far(PROMPT, **RUN) == film
    del far
    body = question("dit", pipe)
    for _ in range(2):
        files, threads, _ = settled(pid)
        for share in range(25):
            with socket.create_connection(("127.0.0.1", port_of(url))) as raw:
                head = f"POST /v1/dit HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
                raw.sendall(head + body[: len(body) * share // 24])
        assert settled(pid)[:2] <= (files, threads + 1)
    assert elsewhere(pipe, url)(PROMPT, **RUN) == film


def settled(pid):
    """`held`, when it has been the same for a moment."""
    last = None
    for _ in range(40):
        now = held(pid)
        if now == last:
            break
        last = now
        time.sleep(0.1)
    return now


def test_a_run_all_of_whose_encodings_are_kept_needs_no_server(forks, pipe, film, tmp_path):
    pid, url = forks.begin()
    far = elsewhere(pipe, url, ("text",), cache=tmp_path / "kept")
    assert far(PROMPT, **RUN) == film
    kill(pid)
    assert far(PROMPT, **RUN) == film
    with pytest.raises(RemoteError, match=r"cannot connect|was closed"):
        far(CAPTIONS[1], **RUN)


def test_a_damaged_folder_of_encodings_is_computed_again(server, pipe, film, tmp_path):
    far = elsewhere(pipe, server[1], ("text",), cache=tmp_path / "kept")
    far(PROMPT, **RUN)
    files = list((tmp_path / "kept").rglob("*.safetensors"))
    chance = random.Random(3)
    for file in files:
        data = bytearray(file.read_bytes())
        data[chance.randrange(len(data))] ^= 0x55
        file.write_bytes(data)
    with pytest.warns(Note, match="is damaged"):
        assert elsewhere(pipe, server[1], ("text",), cache=tmp_path / "kept")(PROMPT, **RUN) == film
    assert sorted((tmp_path / "kept").rglob("*.*")) == sorted(files)  # and no half of one
    shutil.rmtree(tmp_path / "kept")


# ---- lying answers ---------------------------------------------------------------------------------------


LIES = {
    "a shape": lambda header, out: (header, {name: x[..., :1] for name, x in out.items()}),
    "a dtype": lambda header, out: (header, {name: x.long() for name, x in out.items()}),
    "no number": lambda header, out: (header, {name: x * torch.nan for name, x in out.items()}),
    "other names": lambda header, out: (header, {"its " + name: x for name, x in out.items()}),
    "another model": lambda header, out: (header | {"fingerprint": "other"}, out),
    "another version": lambda header, out: (header | {"version": 99}, out),
    "another role": lambda header, out: (header | {"role": "text"}, out),
    "nothing": lambda header, out: ({}, {}),
}


@pytest.mark.parametrize("lie", LIES)
@torch.no_grad()
def test_a_lie_in_an_answer_is_found_before_the_run_goes_on_with_it(server, pipe, lie):
    vae = moddiff.remote(server[1], "vae", timeout=10)
    honest, latent = vae.server._asked, torch.randn(1, 4, 2, 4, 6)

    def lying(method, pieces, size, until=None):
        return b"".join(packed(*LIES[lie](*unpacked(honest(method, pieces, size, until))))[0])

    vae.server._asked = lying
    with pytest.raises(
        (RemoteError, moddiff.contracts.ContractError), match="expected|promise|finite|nan|here it is 1"
    ):
        vae.decode(latent)
    vae.server._asked = honest
    assert torch.equal(vae.decode(latent), pipe.vae.decode(latent))


@pytest.mark.parametrize(
    "said", ({}, {"result": None}, {"result": [1]}, {"result": ["x", "y"]}, {"result": 7})
)
def test_counts_and_tokens_that_are_none_are_an_error_of_the_server(server, said, monkeypatch):
    text = moddiff.remote(server[1], "text", timeout=10)
    monkeypatch.setattr(text.server, "ask", lambda *given, **told: (said, {}))
    for method in (text.counts, text.tokens):
        with pytest.raises(RemoteError, match="expected"):
            method(PROMPT)


# ---- 2,000 questions that are none -----------------------------------------------------------------------


def question(role, pipe, **changes):
    """A good question, with somebody looking inside."""
    header = {"version": VERSION, "role": role, "fingerprint": fingerprint(pipe.components[role])}
    header |= {"deadline": 5.0, "traceparent": None, "at": {"step": 1, "sigma": 0.5, "branch": "cond"}}
    tap = {"text": "layers.0.resid_post", "dit": "blocks.0.self_attn.heads", "vae": "decoder.stage.0"}[role]
    if role != "vae":
        seen = {"kind": "capture", "taps": [tap], "heads": None, "rows": {"slice": [0, 2, 1]}, "limit": 10**6}
        edit = {
            "kind": "patch",
            "taps": [tap],
            "edit": "scale_by",
            "how": [0.5],
            "axes": {},
            "as": {tap: ["", 0]},
        }
        header["looks"] = [seen, edit]
    tensors = {}
    if role == "text":
        header |= {"op": "encode", "prompts": [PROMPT]}
    elif role == "vae":
        header |= {"op": "decode", "options": {}}
        tensors = {"latent": torch.randn(1, 4, 1, 2, 2)}
    else:
        header |= {"op": "call", "options": {}}
        tensors = {"x": torch.randn(1, 4, 2, 4, 4), "t": torch.tensor([500.0]), "text.0": torch.randn(5, 16)}
    return b"".join(packed(header | changes, tensors)[0])


STRANGE = (None, True, -1, 0, 7, 2**31, 2**63, 10**18, 1e300, "", "x", "F64", "BOOL", "I64", [], [-1], [0, 0])
STRANGE += (
    [[]],
    {},
    {"x": 1},
    {"slice": [0, 10**15, 1]},
    [2**40, 2**40],
    [10**12],
    "\ud800",
    "a" * 300,
    [None] * 9,
)


def changed_json(value, chance):
    """JSON with something strange somewhere in it."""
    if isinstance(value, dict) and value and chance.random() < 0.85:
        name = chance.choice(list(value))
        if (way := chance.random()) < 0.1:
            return {key: old for key, old in value.items() if key != name}
        if way < 0.15:
            return value | {chance.choice(("x", "text.0", "looks.0.x", "")): value[name]}
        return value | {name: changed_json(value[name], chance)}
    if isinstance(value, list) and value and chance.random() < 0.6:
        at = chance.randrange(len(value))
        return [*value[:at], changed_json(value[at], chance), *value[at + 1 :]]
    return chance.choice(STRANGE)


def mutated(data, chance):
    """The bytes of a question, damaged in one of seven ways.   -> bytes, the length that is told"""
    size = int.from_bytes(data[:8], "little")
    told, values = json.loads(data[8 : 8 + size]), data[8 + size :]
    way = chance.randrange(8)
    if way == 0:  # some bits
        data = bytearray(data)
        for _ in range(chance.choice((1, 1, 4, 40))):
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        return bytes(data), len(data)
    if way == 1:  # the length of the header
        length = chance.choice((0, 1, size - 1, size + 1, 2**20, 2**31, 2**62, 2**64 - 1))
        return length.to_bytes(8, "little") + data[8:], len(data)
    if way == 2:  # cut off, or longer
        data = data[: chance.randrange(len(data))] if chance.random() < 0.7 else data + b"x" * 9
        return data, len(data)
    if way == 3:  # another length than told
        return data, max(len(data) + chance.choice((-200, -1, 1, 5, 10**5, 10**12)), 0)
    if way == 4:  # nests too deep, or is no UTF-8
        head = chance.choice((b"[" * 5000, b"\xff\xfe" * 40, b'{"a":' * 3000, b'{"__metadata__":{}}', b"{}"))
        return len(head).to_bytes(8, "little") + head + values, 8 + len(head) + len(values)
    if way == 5:  # names, dtypes, shapes, offsets
        metadata = told.pop("__metadata__")
        told = changed_json(told, chance)
        told = told | {"__metadata__": metadata} if isinstance(told, dict) else told
    else:  # what the header asks
        name = "moddiff" if way == 6 or chance.random() < 0.7 else "axes"
        asked = changed_json(json.loads(told["__metadata__"][name]), chance)
        told["__metadata__"][name] = json.dumps(asked)
    head = json.dumps(told).encode()
    return len(head).to_bytes(8, "little") + head + values, 8 + len(head) + len(values)


class Line:
    """A connection that is opened again where the server ended it."""

    def __init__(self, url):
        self.port, self.connection = port_of(url), None

    def post(self, role, body, length):
        """-> status, what was said"""
        whole = length == len(body)
        if self.connection is None:
            self.connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        connection = self.connection
        try:
            connection.putrequest("POST", f"/v1/{role}")
            connection.putheader("Content-Length", str(length))
            connection.endheaders(body)
            if not whole:
                connection.sock.shutdown(socket.SHUT_WR)
            answer = connection.getresponse()
            status, said = answer.status, answer.read()
        except (http.client.HTTPException, ConnectionError):
            status, said, whole = (None if not whole else "broken"), b"", False
        if not whole:
            connection.close()
            self.connection = None
        return status, said


def test_2000_questions_that_are_none_get_an_answer_and_the_server_lives(forks, pipe, film):
    pid, url = forks.begin()
    assert elsewhere(pipe, url)(PROMPT, **RUN) == film
    chance, seen, line = random.Random(2000), Counter(), Line(url)
    good = {role: question(role, pipe) for role in ROLES}
    assert all(line.post(role, body, len(body))[0] == 200 for role, body in good.items())
    files, threads, memory = settled(pid)
    for i in range(2000):
        role = ROLES[i % 3]
        status, said = line.post(role, *mutated(good[role], chance))
        seen[status] += 1
        assert status in (200, 400, 409, 413, 422, 504, None), (i, role, status, said)
        if status not in (200, None) and said[:1] == b"{":
            told = json.loads(said)
            assert told["error"] and len(told["message"]) > 5, (i, told)
    assert seen[400] > 500 and seen[422] > 20 and seen[409] > 20 and seen[413] > 10, seen
    assert seen[None] < 200
    if line.connection:
        line.connection.close()
    after = settled(pid)
    assert after[0] <= files and after[1] <= threads + 2 and after[2] < memory + 2**26, (
        files,
        threads,
        memory,
        after,
    )
    assert elsewhere(pipe, url)(PROMPT, **RUN) == film
