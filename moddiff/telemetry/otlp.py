"""What is a span, when it is done, and how does it stand in a file?  OTLP/JSON, which trace viewers open.

Source: OpenTelemetry Protocol 1.x, "JSON Protobuf Encoding": protobuf's mapping to JSON, but ids in hex,
names in lowerCamelCase, enums as numbers, and 64-bit numbers as texts.
"""

import base64
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from ..saving import write_whole

KINDS = ("unspecified", "internal", "server", "client", "producer", "consumer")  # as OTLP numbers them
ERROR = 2  # the status code of a span that failed


@dataclass(frozen=True)
class FinishedSpan:
    """A piece of work that is over.

    trace, id, parent   32, 16 and 16 hex digits; parent None: the first of its trace
    begun, ended        nanoseconds since 1970, by the clock of its own machine
    error               what went wrong, as a text; None: nothing
    events              (name, nanoseconds, attributes) of what happened on the way, such as an exception
    process             what is known of the process: {"service.name": ..., "process.pid": ...}
    scope               (name, version) of the library that made the span
    """

    name: str
    trace: str
    id: str
    parent: str | None
    begun: int
    ended: int
    kind: str = "internal"
    attributes: dict = field(default_factory=dict)
    error: str | None = None
    events: tuple = ()
    process: dict = field(default_factory=dict)
    scope: tuple = ("", "")

    seconds = property(lambda self: (self.ended - self.begun) / 1e9, doc="how long it took")


def finished(span):
    """The span of OpenTelemetry's SDK, as it ends.   -> FinishedSpan"""
    here, scope = span.get_span_context(), span.instrumentation_scope
    return FinishedSpan(
        span.name,
        trace=f"{here.trace_id:032x}",
        id=f"{here.span_id:016x}",
        parent=None if span.parent is None else f"{span.parent.span_id:016x}",
        begun=span.start_time,
        ended=span.end_time,
        kind=span.kind.name.lower(),
        attributes=dict(span.attributes),
        error=None if span.status.is_ok else span.status.description or "",
        events=tuple((event.name, event.timestamp, dict(event.attributes)) for event in span.events),
        process=dict(span.resource.attributes),
        scope=(scope.name, scope.version or ""),
    )


# ---- to a file --------------------------------------------------------------------------------------------


def write(path, spans):
    """The spans as a file of OTLP/JSON, whole or not at all.   Raises OSError."""
    write_whole(path, json.dumps(as_otlp(spans), ensure_ascii=False).encode())


def as_otlp(spans):
    """FinishedSpans as dicts, as a request to /v1/traces has them: by process, then by library."""
    processes = {}
    for span in spans:
        key = json.dumps(span.process, sort_keys=True)
        _, scopes = processes.setdefault(key, (span.process, {}))
        scopes.setdefault(span.scope, []).append(_as_json(span))
    return {
        "resourceSpans": [
            {
                "resource": {"attributes": _pairs(process)},
                "scopeSpans": [
                    {"scope": _filled(name=name, version=version), "spans": held}
                    for (name, version), held in scopes.items()
                ],
            }
            for process, scopes in processes.values()
        ]
    }


def _as_json(span):
    events = [
        _filled(name=name, timeUnixNano=str(when), attributes=_pairs(attributes))
        for name, when, attributes in span.events
    ]
    return _filled(
        traceId=span.trace,
        spanId=span.id,
        parentSpanId=span.parent,
        name=span.name,
        kind=KINDS.index(span.kind),
        startTimeUnixNano=str(span.begun),
        endTimeUnixNano=str(span.ended),
        attributes=_pairs(span.attributes),
        events=events,
        status={} if span.error is None else _filled(message=span.error, code=ERROR),
    )


def _filled(**fields):
    """Only what says something, but for a status: protobuf leaves out what is empty."""
    return {name: value for name, value in fields.items() if value or name == "status"}


def _pairs(attributes):
    return [{"key": key, "value": _value(value)} for key, value in attributes.items()]


def _value(value):
    match value:
        case bool():  # before int, which in Python it is, too
            return {"boolValue": value}
        case int():
            return {"intValue": str(value)}
        case float():
            names = {"inf": "Infinity", "-inf": "-Infinity", "nan": "NaN"}  # which JSON's numbers lack
            return {"doubleValue": value if math.isfinite(value) else names[str(value)]}
        case str():
            return {"stringValue": value}
        case bytes():
            return {"bytesValue": base64.b64encode(value).decode()}
        case list() | tuple():
            return {"arrayValue": {"values": [_value(item) for item in value]}}
    raise TypeError(f"an attribute is a {type(value).__name__}; expected a number, a text or a list of them")


# ---- from a file ------------------------------------------------------------------------------------------


def read(path):
    """A file of OTLP/JSON, as `write` and collectors' file exporters make it.   -> [FinishedSpan]

    Several requests may stand in it, one a line. Raises ValueError for a file that is something else.
    """
    text = Path(path).expanduser().read_text(encoding="utf-8")
    try:
        requests = _requests(text)
        return [span for request in requests for span in from_otlp(request)]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(
            f"{path} is no OTLP/JSON of spans ({type(error).__name__}: {error}); expected "
            '{"resourceSpans": [...]}, as `moddiff generate --trace` writes it'
        ) from error


def _requests(text):
    """The requests in a file's text: one, over as many lines as it likes, or one a line."""
    try:
        return [json.loads(text)]
    except ValueError:
        lines = [line for line in text.splitlines() if line.strip()]
        if len(lines) < 2:
            raise
        return [json.loads(line) for line in lines]


def from_otlp(request):
    """What `as_otlp` has made.   -> [FinishedSpan]"""
    return [
        _from_json(span, _attributes(group.get("resource", {})), scoped.get("scope", {}))
        for group in request["resourceSpans"]
        for scoped in group.get("scopeSpans", ())
        for span in scoped.get("spans", ())
    ]


def _from_json(span, process, scope):
    status = span.get("status", {})
    return FinishedSpan(
        span["name"],
        trace=span["traceId"].lower(),
        id=span["spanId"].lower(),
        parent=span.get("parentSpanId", "").lower() or None,
        begun=int(span["startTimeUnixNano"]),
        ended=int(span["endTimeUnixNano"]),
        kind=KINDS[span.get("kind", 0)],
        attributes=_attributes(span),
        error=status.get("message", "") if status.get("code") == ERROR else None,
        events=tuple(
            (event["name"], int(event.get("timeUnixNano", 0)), _attributes(event))
            for event in span.get("events", ())
        ),
        process=process,
        scope=(scope.get("name", ""), scope.get("version", "")),
    )


def _attributes(holder):
    return {pair["key"]: _plain(pair.get("value", {})) for pair in holder.get("attributes", ())}


def _plain(value):
    kind, content = next(iter(value.items()), ("", None))
    if kind == "intValue":
        return int(content)
    if kind == "doubleValue":
        return float(content)
    if kind == "bytesValue":
        return base64.b64decode(content)
    if kind == "arrayValue":
        return tuple(_plain(item) for item in content.get("values", ()))
    return content
