"""Where did the time of a run go, in this process and in those that it asked?  Spans, by OpenTelemetry.

    with moddiff.telemetry.recorded() as spans:
        pipe("a red circle moving left on a black background", seed=0)
    moddiff.viz.waterfall(spans)

Without `recorded`, and where nobody has set up OpenTelemetry in this process, nothing is measured and nothing
is imported. The guide is guides/telemetry.md.
"""

from .logs import TraceIds, in_trace
from .otlp import FinishedSpan, as_otlp, from_otlp, read
from .recording import Recording, asked_by_environment, recorded, to_collector
from .spans import is_on, joined, span, traceparent
