"""Do spans tell what was done, in this process and others, and cost nothing while nobody looks?"""

import base64
import gzip
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import StringIO
from pathlib import Path

import pytest
import torch
from google.protobuf.json_format import ParseDict
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor

import moddiff
from moddiff import patch, viz
from moddiff.rewrite import Chat
from moddiff.telemetry import in_trace, joined, otlp, read, recorded, span, traceparent

ROOT = Path(__file__).parents[1]
PARENT = "00-" + "4bf92f3577b34da6a3ce929d0e0e4736" + "-" + "00f067aa0ba902b7" + "-01"


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


# ---- off ----


def test_a_run_without_telemetry_imports_nothing_of_opentelemetry():
    code = """
import sys, moddiff
with moddiff.telemetry.span("a", b=1) as done, moddiff.telemetry.joined(None):
    done.set(c=2)
moddiff.load("tiny")("a red circle", seed=0, steps=1)
print(moddiff.telemetry.traceparent(), [name for name in sys.modules if "opentelemetry" in name])
"""
    assert run(code) == ["None", "[]"]


def test_a_span_that_nobody_looks_at_takes_less_than_ten_microseconds():
    # Measured: 0.5 us without OpenTelemetry, 2 us with its API imported by some library.
    for imported in ("", "import opentelemetry.trace"):
        code = f"""
import time; {imported}
from moddiff.telemetry import span
def took():
    begun = time.perf_counter()
    for step in range(1000):
        with span("step", step=step, sigma=0.5):
            pass
    return (time.perf_counter() - begun) / 1000
print(min(took() for _ in range(20)))
"""
        assert float(run(code)[0]) < 10e-6


def test_joining_a_trace_is_nothing_where_nobody_looks():
    with joined(PARENT):
        assert traceparent() is None
    with span("a"):
        assert traceparent() is None


# ---- on ----


def by_name(spans):
    return {span.name: span for span in spans}


def test_spans_lie_in_each_other_and_say_what_they_were_about():
    with recorded(service="here") as spans:
        with span("outer", shape=torch.zeros(2, 3).shape, dtype=torch.bfloat16, none=None) as outer:
            with span("inner", kind="client", **{"server.port": 80}):
                pass
            outer.set(tokens=7, device=torch.device("cpu"))
        assert len(spans) == 2
    inner, outer = spans
    assert (inner.name, outer.name) == ("inner", "outer") and inner.parent == outer.id and not outer.parent
    assert inner.trace == outer.trace and inner.kind == "client" and inner.attributes == {"server.port": 80}
    assert outer.attributes == {
        "moddiff.shape": (2, 3),
        "moddiff.dtype": "bfloat16",
        "moddiff.tokens": 7,
        "moddiff.device": "cpu",
    }
    assert outer.begun <= inner.begun <= inner.ended <= outer.ended and outer.error is None
    assert outer.process["service.name"] == "here" and outer.scope == ("moddiff", "")
    with span("after"):
        assert traceparent() is None
    assert len(spans) == 2


@pytest.mark.parametrize("error", (ValueError("a shape"), KeyboardInterrupt()))
def test_an_error_is_written_on_every_span_it_leaves_and_goes_on(error):
    with recorded() as spans, pytest.raises(type(error)), span("outer"), span("inner"):
        raise error
    for one in spans:
        assert one.error == f"{type(error).__name__}: {error}"
        assert one.attributes["error.type"] == type(error).__name__
        ((name, when, said),) = one.events
        assert name == "exception" and one.begun <= when <= one.ended
        assert "test_telemetry.py" in said["exception.stacktrace"]


def test_a_span_of_no_known_kind_is_refused():
    with recorded(), pytest.raises(ValueError, match="kind is 'sever'; expected one of internal, client"):
        span("a", kind="sever")


def test_a_trace_goes_on_under_the_header_of_another_process():
    with recorded() as spans:
        with joined(PARENT):
            assert traceparent() == PARENT
            with span("answer", kind="server"):
                sent = traceparent()
        with span("its own"):
            pass
    answer, own = spans
    assert answer.trace == PARENT.split("-")[1] and answer.parent == PARENT.split("-")[2]
    assert sent == f"00-{answer.trace}-{answer.id}-01" and own.trace != answer.trace and own.parent is None


def test_a_trace_that_the_asking_side_did_not_sample_is_still_recorded():
    with recorded() as spans, joined(PARENT[:-2] + "00"), span("answer"):
        pass
    assert spans[0].trace == PARENT.split("-")[1]


@pytest.mark.parametrize(
    "header",
    ("", "nonsense", PARENT[:-1], "00-" + "0" * 32 + "-" + "1" * 16 + "-01", "ff" + PARENT[2:], "é", 5, {}),
)
def test_a_header_of_nonsense_begins_a_trace_and_fails_nothing(header):
    with recorded() as spans, joined(header), span("answer"):
        pass
    assert spans[0].parent is None and spans[0].trace != PARENT.split("-")[1]


def test_two_recordings_see_what_happens_while_they_are_open_in_all_threads():
    with recorded() as long:
        with recorded() as short, span("both"):
            thread = threading.Thread(target=lambda: span("elsewhere").__enter__().__exit__(None, None, None))
            thread.start()
            thread.join()
        with span("late"):
            pass
    assert [one.name for one in long] == ["elsewhere", "both", "late"]
    assert [one.name for one in short] == ["elsewhere", "both"]
    assert long[0].parent is None  # a thread of its own is in no span


def test_where_opentelemetry_is_set_up_the_spans_go_there_and_to_the_recording(tmp_path):
    code = """
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from moddiff.telemetry import span, recorded
theirs, provider = InMemorySpanExporter(), TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(theirs))
trace.set_tracer_provider(provider)
with trace.get_tracer("mine").start_as_current_span("mine"):
    with span("before"): pass
for _ in range(2):
    with recorded() as spans, span("inside"): pass
    print(*[one.name for one in spans])
print(*[one.name for one in theirs.get_finished_spans()])
"""
    assert run(code) == ["inside", "inside", "before", "mine", "inside", "inside"]


def test_a_span_waits_for_the_gpu_where_it_begins_and_ends(monkeypatch):
    waited, capturing = [], []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: bool(capturing))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(1))
    with recorded(settle=False), span("a"):
        pass
    assert not waited
    with recorded(), span("a"):
        assert len(waited) == 1
    assert len(waited) == 2
    capturing.append(1)  # a graph of CUDA must not wait for itself
    with recorded(), span("a"):
        pass
    with span("after"):
        pass
    assert len(waited) == 2


def test_without_the_extra_it_is_said_what_to_install_and_a_command_goes_on(tmp_path):
    code = f"""
import sys
sys.modules["opentelemetry"] = None  # as if it were not installed
from moddiff import cli, telemetry
try:
    telemetry.recorded().__enter__()
except ModuleNotFoundError as error:
    print(str(error).partition(": ")[2])
cli.main(["generate", "a red circle", "--steps", "1", "-q", "-o", {str(tmp_path / "a.gif")!r}])
"""
    variables = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | variables
    )
    assert done.returncode == 0, done.stderr
    assert "pip install 'moddiff[otel]'" in done.stdout and (tmp_path / "a.gif").exists()
    assert "note: no spans are sent" in done.stderr


def test_a_recording_shows_what_took_how_long():
    with recorded() as spans:
        for _ in range(3):
            with span("step"), span("branch"):
                pass
    rows = spans.table().rows
    assert [row[:2] for row in rows] == [("step", 3), ("branch", 3)] and "6 spans" in repr(spans)


# ---- a pipeline ----

PROMPT = "a red circle moving left on a black background"


@pytest.fixture(scope="module")
def pipe():
    return moddiff.load("tiny")


def names_under(spans, parent):
    return [one.name for one in sorted(spans, key=begun) if one.parent == parent]


def begun(one):
    return one.begun


def test_a_run_is_one_tree_of_all_that_it_did(pipe):
    plain = pipe(PROMPT, seed=0, steps=2, rewrite=str.lower)
    with recorded() as spans:
        seen = pipe(PROMPT, seed=0, steps=2, rewrite=str.lower)
    assert torch.equal(seen.tensor(), plain.tensor())
    (root,) = [one for one in spans if one.parent is None]
    prepare, first, second, _ = [one for one in sorted(spans, key=begun) if one.parent == root.id]
    assert root.name == "generate" and root.attributes == {"moddiff.model": "tiny-t2v", "moddiff.task": "t2v"}
    assert names_under(spans, root.id) == ["prepare", "step", "step", "decode"]
    assert names_under(spans, prepare.id) == ["rewrite", "encode text", "encode text"]
    assert names_under(spans, first.id) == names_under(spans, second.id) == ["branch", "branch"]
    assert len({one.trace for one in spans}) == 1
    (here,) = {one.attributes["moddiff.sigma"] for one in spans if one.attributes.get("moddiff.step") == 0}
    assert here == first.attributes["moddiff.sigma"]
    assert [one.attributes["moddiff.step"] for one in (first, second)] == [0, 1]
    assert 0.5 < first.attributes["moddiff.sigma"] < 1
    assert prepare.attributes["moddiff.shape"] == (1, 16, 5, 12, 12)
    assert prepare.attributes["moddiff.seed"] == 0 and prepare.attributes["moddiff.solver"] == "unipc"
    branches = [one.attributes["moddiff.branch"] for one in spans if one.parent == second.id]
    assert branches == ["cond", "uncond"]
    text = next(one for one in spans if one.name == "encode text")
    assert text.attributes["moddiff.tokens"] == len(pipe.text.encode([PROMPT])[0])
    assert "circle" not in repr(list(spans))  # a prompt is its writer's own


def test_steps_taken_one_by_one_belong_to_one_trace_and_their_reader_to_none(pipe):
    with recorded() as spans:
        for _ in pipe.steps(PROMPT, seed=0, steps=2):
            assert traceparent() is None
    (root,) = [one for one in spans if one.parent is None]
    assert root.name == "prepare" and names_under(spans, root.id)[-2:] == ["step", "step"]
    with recorded() as spans, span("mine"):
        for _ in pipe.steps(PROMPT, seed=0, steps=2):
            pass
    mine = spans[-1]
    assert names_under(spans, mine.id) == ["prepare", "step", "step"]


def test_a_run_with_pictures_shows_their_encoding():
    i2v = moddiff.load("tiny-i2v")
    with recorded() as spans:
        i2v(PROMPT, image=torch.zeros(3, *i2v.defaults["size"]), seed=0, steps=1)
    assert {"encode video", "decode"} <= {one.name for one in spans}
    video = next(one for one in spans if one.name == "encode video")
    assert video.attributes["moddiff.shape"] == (1, 3, 17, *i2v.defaults["size"])


def test_loading_shows_each_part():
    with recorded() as spans:
        moddiff.load("tiny", dtype="bf16")
    *parts, load = spans
    assert load.attributes == {"moddiff.model": "tiny-t2v"} and {one.parent for one in parts} == {load.id}
    kept = {one.attributes["moddiff.part"]: one.attributes["moddiff.dtype"] for one in parts}
    assert kept == {"text": "bf16", "dit": "bf16", "vae": "fp32"}


def test_a_component_that_fails_is_seen_where_it_failed(pipe):
    def broken(*_, **__):
        raise MemoryError("no room")

    with recorded() as spans, pytest.raises(MemoryError), patch(pipe.dit, "blocks.1.resid_post", broken):
        pipe(PROMPT, seed=0, steps=2)
    assert [one.name for one in spans if one.error] == ["branch", "step", "generate"]


# ---- several processes ----


@contextmanager
def process(*words):
    """Its address, once it says so; at the end it is told to end, and leaves its spans in a file."""
    started = subprocess.Popen([sys.executable, *map(str, words)], stdout=subprocess.PIPE, text=True)
    try:
        yield re.search(r"http://\S+", started.stdout.readline())[0]
    finally:
        started.send_signal(signal.SIGINT)
        started.communicate()


def test_one_trace_goes_through_three_processes_and_is_drawn(pipe, tmp_path):
    here, text, chat = [tmp_path / f"{name}.json" for name in ("here", "text", "chat")]
    serve = "-m", "moddiff", "serve", "--roles", "text", "--port", 0, "--trace", text
    with process(*serve) as text_url, process(ROOT / "tests" / "answering.py", chat) as chat_url:
        far = pipe.replace(text=moddiff.remote(text_url, "text"))
        rewriter = Chat(chat_url, "small", instructions="tiny")
        with recorded(here):
            film = far("a tomato rolls to the left", seed=0, steps=3, rewrite=rewriter)
    assert film == pipe(PROMPT, seed=0, steps=3)

    ours, of_text, of_chat = [read(file) for file in (here, text, chat)]
    of_text = [one for one in of_text if one.trace == ours[0].trace]  # without the loading of the server
    every = [*ours, *of_text, *of_chat]
    assert len({one.trace for one in every}) == 1
    assert len({one.process["process.pid"] for one in every}) == 3
    assert [one.name for one in every if one.parent is None] == ["generate"]
    of, served = {one.id: one for one in every}, [one for one in every if one.kind == "server"]
    assert {(one.name, of[one.parent].name) for one in served} == {
        ("serve.call", "remote.call"),
        ("serve chat", "chat small"),
    }
    for one in served:  # one machine, one clock
        asked = of[one.parent]
        assert asked.kind == "client" and asked.begun <= one.begun <= one.ended <= asked.ended
    ops = [one.attributes["moddiff.op"] for one in served if one.name == "serve.call"]
    assert ops.count("encode") == 2  # two prompts
    assert names_under(every, of_chat[-1].id) == ["complete"]

    ax = viz.waterfall([here, *of_text, chat]).axes[0]
    lanes = [word.get_text().split("  ")[0] for word in ax.texts if "(process" in word.get_text()]
    assert lanes == ["moddiff", "chat server", "text server"]
    assert sum(line.get_linestyle() != "-" for line in ax.lines) == len(served)


# ---- the command line ----


def command(*words, **variables):
    """A process that runs `moddiff generate` on the tiny model."""
    words = [sys.executable, "-m", "moddiff", "generate", PROMPT, *map(str, words)]
    return subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=os.environ | variables)


def test_the_command_writes_its_run_as_a_file(tmp_path):
    trace, film = tmp_path / "out.json", tmp_path / "out.gif"
    made = command("--steps", 2, "-o", film, "--trace", trace, "-q")
    assert made.wait() == 0, made.stderr.read()
    spans = read(trace)
    (root,) = [one for one in spans if one.parent is None]
    assert root.name == root.process["service.name"] == "moddiff generate" and root.error is None
    assert names_under(spans, root.id) == ["load", "generate"]
    assert ParseDict(with_base64(json.loads(trace.read_text())), ExportTraceServiceRequest()).resource_spans


def test_ctrl_c_leaves_a_whole_file_of_what_was_done(tmp_path):
    trace = tmp_path / "out.json"
    code = """
import signal, sys
from moddiff import cli, run
def interrupt(step, steps):
    if step == 3:
        signal.raise_signal(signal.SIGINT)
with run.watch(interrupt):
    cli.main(sys.argv[1:])
"""
    words = "generate", PROMPT, "-o", tmp_path / "out.gif", "--trace", trace
    done = subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True)
    assert done.returncode not in (0, 2) and not (tmp_path / "out.gif").exists()
    spans = by_name(read(trace))
    assert (
        "KeyboardInterrupt" in spans["moddiff generate"].error
        and "KeyboardInterrupt" in spans["generate"].error
    )
    assert spans["prepare"].error is None and "decode" not in spans
    assert sum(one.name == "step" for one in read(trace)) == 3


def test_a_trace_is_not_written_over_the_film(tmp_path):
    made = command("-o", tmp_path / "a.gif", "--trace", tmp_path / "b" / ".." / "a.gif")
    assert made.wait() == 2 and "--trace and --output are the same file" in made.stderr.read()


class Collector(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        self.server.got.append((self.path, ExportTraceServiceRequest.FromString(body)))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


def test_a_collector_that_the_environment_names_gets_the_run(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    server.got = []
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    made = command("--steps", 1, "-o", tmp_path / "a.gif", "-q", OTEL_EXPORTER_OTLP_ENDPOINT=address)
    assert made.wait() == 0, made.stderr.read()
    server.shutdown()
    server.server_close()
    assert {path for path, _ in server.got} == {"/v1/traces"}
    scoped = [part for _, got in server.got for group in got.resource_spans for part in group.scope_spans]
    assert {"moddiff generate", "load", "step", "decode"} <= {
        one.name for part in scoped for one in part.spans
    }


# ---- files ----


def recording_of_everything():
    with recorded(service="näher") as spans, pytest.raises(RuntimeError), span("outer", text="你好", ok=True):
        with span("inner", kind="server", numbers=[1, 2], real=0.5, big=2**60, odd=float("inf"), none=[]):
            raise RuntimeError("böse")
    return spans


def test_a_file_holds_what_the_protobuf_of_opentelemetry_holds(tmp_path):
    sent = []

    class Keep:
        def export(self, spans):
            sent.extend(spans)

        def shutdown(self):
            pass

    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(Keep()))
    tracer = provider.get_tracer("lib", "1.2")
    with (
        pytest.raises(RuntimeError),
        tracer.start_as_current_span("outer", attributes={"a": "你好", "b": True}),
    ):
        numbers = {"c": 2**60, "d": -0.5, "e": [1, 2], "f": float("inf"), "g": b"\x00\xff", "h": ["x"]}
        with tracer.start_as_current_span("inner", attributes=numbers) as inner:
            inner.add_event("half way", {"percent": 50})
            raise RuntimeError("böse")
    expected = encode_spans(sent)
    for group in expected.resource_spans:
        for scoped in group.scope_spans:
            for one in scoped.spans:
                one.flags = 0  # says of a parent whether it was remote; a file has the processes for that
    written = ParseDict(with_base64(otlp.as_otlp(map(otlp.finished, sent))), ExportTraceServiceRequest())
    assert written == expected


def with_base64(otlp_json):
    """OTLP/JSON with its ids as protobuf's own JSON has them, the one thing in which the two differ."""
    for group in otlp_json["resourceSpans"]:
        for one in [one for scoped in group["scopeSpans"] for one in scoped["spans"]]:
            for name in {"traceId", "spanId", "parentSpanId"} & set(one):
                one[name] = base64.b64encode(bytes.fromhex(one[name])).decode()
    return otlp_json


def test_a_file_is_read_as_it_was_written(tmp_path):
    spans = recording_of_everything()
    spans.save(tmp_path / "out.json")
    assert read(tmp_path / "out.json") == list(spans)
    # A collector's file has a request in each line.
    text = (tmp_path / "out.json").read_text(encoding="utf-8")
    (tmp_path / "lines.json").write_text(text + "\n" + text, encoding="utf-8")
    assert len(read(tmp_path / "lines.json")) == 2 * len(spans)


@pytest.mark.parametrize(
    "text",
    (
        "",
        "[]",
        "{}",
        "nothing",
        "3",
        '{"resourceSpans": 3}',
        '{"resourceSpans": [{"scopeSpans": [{"spans": [{}]}]}]}',
    ),
)
def test_a_file_of_something_else_is_refused(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"a\.json is no OTLP/JSON of spans"):
        read(tmp_path / "a.json")


def test_a_recording_with_a_path_is_written_also_after_an_error_and_refuses_a_bad_path_before(tmp_path):
    with pytest.raises(ZeroDivisionError), recorded(tmp_path / "new" / "out.json"), span("a"):
        raise ZeroDivisionError
    (one,) = read(tmp_path / "new" / "out.json")
    assert one.error == "ZeroDivisionError: "
    began = []
    with pytest.raises(OSError), recorded(tmp_path):
        began.append(1)
    assert not began


# ---- logs ----


def test_a_line_of_the_log_has_the_trace_it_was_written_in():
    out = StringIO()
    log, handler = logging.getLogger("moddiff.test"), in_trace(logging.StreamHandler(out))
    log.addHandler(handler)
    try:
        with recorded() as spans, span("a"):
            log.warning("inside")
        log.warning("outside")
    finally:
        log.removeHandler(handler)
    inside, outside = out.getvalue().splitlines()
    assert f"trace_id={spans[0].trace} span_id={spans[0].id} inside" in inside
    assert "trace_id=- span_id=- outside" in outside
