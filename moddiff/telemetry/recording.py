"""How do I see the spans of this process?  `recorded` keeps them, for a picture or a file, and needs no
collector; `to_collector` sends them to one, as OpenTelemetry's variables say.
"""

import os
import sys
import threading
from collections import deque
from contextlib import contextmanager
from importlib import import_module
from weakref import WeakSet

from ..hooks.records import HasTable, Table
from ..saving import writable
from . import otlp
from .spans import recorder

MOST = 100_000  # spans kept; a server that runs for weeks keeps its last
ENDPOINTS = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"


class Recording(HasTable):
    """The finished spans of a process, as they end: iterate, `len`, `[i]`; shown, what took how long."""

    def __init__(self):
        self._spans = deque(maxlen=MOST)

    def __iter__(self):
        return iter(tuple(self._spans))  # a copy: others may end while one looks

    def __len__(self):
        return len(self._spans)

    def __getitem__(self, i):
        return tuple(self._spans)[i]

    def add(self, span):
        self._spans.append(span)

    def save(self, path):
        """As OTLP/JSON, which Jaeger's page and other viewers open.   Raises OSError."""
        otlp.write(path, self)

    def table(self):
        """How often each kind of work was done, and how long it took."""
        times = {}
        for span in sorted(self, key=_when):
            times.setdefault(span.name, []).append(span.seconds)
        rows = [
            (name, len(took), f"{sum(took):.3f}", f"{sum(took) / len(took):.4f}")
            for name, took in times.items()
        ]
        traces = len({span.trace for span in self})
        return Table(("span", "times", "seconds", "each"), rows, f"{len(self)} spans, traces: {traces}")


def _when(span):
    return span.begun


@contextmanager
def recorded(path=None, *, service=None, settle=True):
    """Keep the spans of all threads of this process: `with recorded() as spans: pipe(...)`.

    path     a file of OTLP/JSON to be written at the end, also after an error or Ctrl-C
    service  the name of this process in pictures; None: OTEL_SERVICE_NAME, or "moddiff"
    settle   wait for the GPU where a span begins and ends: it then shows the work, and not how that was put
             into a queue. It costs a little speed
    ->       a Recording of FinishedSpans, in the order in which they end

    Where OpenTelemetry is set up in this process, spans go there as before, under its name.
    Raises ModuleNotFoundError without the extra "otel", OSError for a path that cannot be written.
    """
    path = None if path is None else writable(path)
    recording = Recording()
    _open(recording, service, settle)
    try:
        yield recording
    finally:
        _close(recording)
        if path is not None:
            recording.save(path)


# ---- who listens ------------------------------------------------------------------------------------------

_lock = threading.Lock()
_recordings = []  # those that are open
_tapped = WeakSet()  # the providers whose spans come here already: they cannot be told to stop


class _ToRecordings:
    """What OpenTelemetry's SDK calls an exporter."""

    def export(self, spans):
        for span in map(otlp.finished, spans):
            for recording in tuple(_recordings):
                recording.add(span)

    def shutdown(self):
        pass

    def force_flush(self, timeout_millis=0):
        return True


def _open(recording, service, settle):
    trace, export = _sdk("opentelemetry.trace"), _sdk("opentelemetry.sdk.trace.export")
    with _lock:
        provider = recorder.provider or trace.get_tracer_provider()
        if not hasattr(provider, "add_span_processor"):  # nobody has set one up
            provider = recorder.provider = _provider(service)
            recorder.tracer = provider.get_tracer("moddiff")
        if provider not in _tapped:
            provider.add_span_processor(export.SimpleSpanProcessor(_ToRecordings()))
            _tapped.add(provider)
        recorder.settle = _settled if settle else recorder.settle
        _recordings.append(recording)


def _close(recording):
    with _lock:
        _recordings.remove(recording)
        if not _recordings:
            recorder.provider = recorder.tracer = recorder.settle = None


def _provider(service):
    trace, sampling = _sdk("opentelemetry.sdk.trace"), _sdk("opentelemetry.sdk.trace.sampling")
    # Of a trace that another process does not want to keep, this one shall still be seen.
    everything = sampling.ALWAYS_ON
    return trace.TracerProvider(sampler=everything, resource=_process(service), shutdown_on_exit=False)


def _process(service):
    """This process, as its spans say where they are from."""
    name = service or os.environ.get("OTEL_SERVICE_NAME") or "moddiff"
    resources = _sdk("opentelemetry.sdk.resources")
    return resources.Resource.create({"service.name": name, "process.pid": os.getpid()})


def _sdk(name):
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error}. Spans are made by OpenTelemetry: pip install 'moddiff[otel]'", name=error.name
        ) from error


def _settled():
    """Wait until a GPU has done what it was given."""
    torch = sys.modules.get("torch")
    if torch is None:
        return
    if torch.cuda.is_initialized() and not torch.cuda.is_current_stream_capturing():
        torch.cuda.synchronize()
    if torch.backends.mps.is_available():
        torch.mps.synchronize()


# ---- to a collector ---------------------------------------------------------------------------------------


def to_collector(service=None):
    """Send the spans of this process to a collector by OTLP over HTTP, until the process ends.

    Where to, and with which headers and time limit, is said by the variables that all programs with
    OpenTelemetry read: OTEL_EXPORTER_OTLP_ENDPOINT and its kin; without them, to http://localhost:4318.

    service  the name of this process in pictures; None: OTEL_SERVICE_NAME, or "moddiff"

    Where OpenTelemetry is set up already it stays as it is. Raises ModuleNotFoundError without the extra
    "otel".
    """
    trace, sdk = _sdk("opentelemetry.trace"), _sdk("opentelemetry.sdk.trace")
    export = _sdk("opentelemetry.sdk.trace.export")
    otlp_http = _sdk("opentelemetry.exporter.otlp.proto.http.trace_exporter")
    if not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
        return
    provider = sdk.TracerProvider(resource=_process(service))
    provider.add_span_processor(export.BatchSpanProcessor(otlp_http.OTLPSpanExporter()))
    trace.set_tracer_provider(provider)


def asked_by_environment():
    """Has somebody named a collector in OpenTelemetry's variables, and not switched it off?"""
    off = os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true"
    return not off and any(os.environ.get(name) for name in ENDPOINTS)
