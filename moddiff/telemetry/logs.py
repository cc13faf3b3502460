"""To which run does a line of the log belong?  The ids of the trace and the span in which it was written.

    handler = logging.StreamHandler()
    in_trace(handler)
    logging.getLogger("moddiff").addHandler(handler)

The guide is guides/telemetry.md.
"""

import logging

from .spans import traceparent

# The names are those that OpenTelemetry gives them in logs that have no fields of their own.
LINE = "%(asctime)s %(levelname)s %(name)s trace_id=%(trace_id)s span_id=%(span_id)s %(message)s"


class TraceIds(logging.Filter):
    """Gives each line `trace_id` and `span_id`; outside of any span, and where nobody looks, both are "-".

    Put it on a handler: a filter of a logger does not see what comes from the loggers below it.
    """

    def filter(self, record):
        here = traceparent()  # version-trace-span-flags
        ids = here.split("-")[1:3] if here else ("-", "-")
        record.trace_id, record.span_id = ids
        return True


def in_trace(handler, line=LINE):
    """Make a handler write the ids of the trace into each line.   -> the handler"""
    handler.addFilter(TraceIds())
    handler.setFormatter(logging.Formatter(line))
    return handler
