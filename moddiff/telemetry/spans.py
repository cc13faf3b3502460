"""What is being done right now, and since when?  A span around each piece of work, free while nobody looks.

Only OpenTelemetry's API is used, and not even that is imported here: who wants spans has imported it before,
to set it up. So a look into sys.modules tells whether there is anything to do.

One trace goes through several processes by the W3C header `traceparent`: the asking side sends what
`traceparent()` says, the other works inside `joined(...)`.
"""

import sys
from contextlib import contextmanager

from ..hooks.where import position

KINDS = ("internal", "client", "server")


def span(name, /, kind="internal", **attributes):
    """A piece of work with a name: `with span("dit", blocks=30) as done: ...; done.set(tokens=480)`.

    name        the work in a word or two, the same at each repetition: "step", not "step 7"
    kind        "client" around a question to another process, "server" around the answer to one
    attributes  numbers, texts, and lists of them; a shape, dtype or device as torch has it; None is left out
                A plain name goes under "moddiff."; names with dots are those of OpenTelemetry's conventions
    ->          a context manager, whose value has `set(**attributes)` for what is known only later

    Where the run is (`hooks.position`: step, sigma, branch, expert, window) stands on each span by itself.

    An error that leaves the block is written on the span, with its status, and goes on its way.
    """
    tracer = _tracer()
    return _OFF if tracer is None else _Span(tracer, name, kind, attributes)


def is_on():
    """Does anybody look: are spans made at all?"""
    return _tracer() is not None


def traceparent():
    """Where this thread is, as the W3C header for another process; None outside of any span."""
    if "opentelemetry.trace" not in sys.modules:
        return None
    carrier = {}
    _header().inject(carrier)
    return carrier.get("traceparent")


@contextmanager
def joined(traceparent):
    """In this block, spans belong to the trace, and under the span, that another process sent.

    traceparent  the header as it came. None or nonsense: the block begins a trace of its own, as W3C's Trace
                 Context wants it; a request does not fail by its trace
    """
    if not isinstance(traceparent, str) or _tracer() is None:
        yield
        return
    from opentelemetry import context

    token = context.attach(_header().extract({"traceparent": traceparent}))
    try:
        yield
    finally:
        context.detach(token)


# ---- on and off -------------------------------------------------------------------------------------------


class _Off:
    """The span of a process in which nobody looks."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def set(self, **attributes):
        pass


class Recorder:
    """What `recorded` has switched on in this process."""

    provider, tracer = None, None  # make the spans, where the process has set up nothing of its own
    settle = None  # called where a span begins and ends: a GPU is then done with what came before


_OFF, recorder = _Off(), Recorder()


def _tracer():
    """What makes spans here, or None."""
    if recorder.tracer is not None:
        return recorder.tracer
    trace = sys.modules.get("opentelemetry.trace")
    if trace is None:
        return None
    provider = trace.get_tracer_provider()
    # Somebody imported the API, as libraries do, and nobody has set it up: this one only passes things on.
    return None if isinstance(provider, trace.ProxyTracerProvider) else provider.get_tracer("moddiff")


def _header():
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator()


class _Span:
    def __init__(self, tracer, name, kind, attributes):
        if kind not in KINDS:
            raise ValueError(f"a span's kind is {kind!r}; expected one of {', '.join(KINDS)}")
        self.tracer, self.name, self.kind, self.attributes = tracer, name, kind, attributes

    def __enter__(self):
        from opentelemetry import context, trace

        _settle()
        here = {name: value for name, value in position().items() if name != "run"}
        kind = trace.SpanKind[self.kind.upper()]
        self.span = self.tracer.start_span(self.name, kind=kind, attributes=_said(here | self.attributes))
        self.token = context.attach(trace.set_span_in_context(self.span))
        return self

    def set(self, **attributes):
        self.span.set_attributes(_said(attributes))

    def __exit__(self, _, error, __):
        from opentelemetry import context, trace

        _settle()
        if error is not None:  # KeyboardInterrupt, too: OpenTelemetry's own `with` passes over that
            self.span.record_exception(error)
            self.span.set_attribute("error.type", type(error).__qualname__)
            self.span.set_status(trace.StatusCode.ERROR, f"{type(error).__name__}: {error}")
        context.detach(self.token)
        self.span.end()


def _settle():
    if recorder.settle is not None:
        recorder.settle()


def _said(attributes):
    """Attributes under their full names, and as OpenTelemetry takes them."""
    return {
        name if "." in name else f"moddiff.{name}": _plain(value)
        for name, value in attributes.items()
        if value is not None
    }


def _plain(value):
    if isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple | list):  # torch.Size is one
        return [_plain(item) for item in value]
    return str(value).removeprefix("torch.")  # a dtype, a device
