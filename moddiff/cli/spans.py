"""Where do the spans of a command go?  To a file (--trace), to a collector that the environment names, or
nowhere."""

import sys
from contextlib import contextmanager


@contextmanager
def command(name, trace=None):
    """The whole of a command as the first span: `with command("generate", trace): ...`.

    trace  a file of OTLP/JSON, written when the block ends, however it ends
    Where OTEL_EXPORTER_OTLP_ENDPOINT names a collector, spans go there, too, under the name `moddiff NAME`.
    """
    from ..telemetry import recorded, span

    title = f"moddiff {name}"
    sent(title)
    if trace is None:
        with span(title):
            yield
    else:
        with recorded(trace, service=title), span(title):
            yield


def sent(title):
    """Send the spans of this process to the collector that the environment names, if it does."""
    from ..telemetry import asked_by_environment, to_collector

    if not asked_by_environment():
        return
    try:
        to_collector(title)
    except ModuleNotFoundError as error:  # a variable for other programs shall not end this one
        print(f"note: no spans are sent: {error}", file=sys.stderr)
