"""Where did the time go?  A run as bars under bars, with a lane for each process that took part."""

from collections.abc import Iterable
from dataclasses import replace
from os import PathLike
from statistics import median

from ..telemetry import FinishedSpan, read
from .canvas import COLOURS, INK, entitle, extra, figure, ink_on, note, readable

FRAMES = "#DEDEDE", "#CCCCCC"  # of bars that hold other bars; two, so that neighbours differ
FAILED = COLOURS[5]
USUAL = {  # the same in every picture, so that two can be compared
    "encode text": COLOURS[1],
    "branch, cond": COLOURS[0],
    "branch, uncond": COLOURS[4],
    "decode": COLOURS[2],
    "rewrite": COLOURS[3],
    "load part": "#9C8B75",
}
OTHERS = (
    *("#8A6FB0", "#B5A630", "#D58A94", "#5E7F8C", "#7A5C3E", "#6B8E4E"),
    *("#C4A3D9", "#4F4F8F", "#E3C27A", "#A34F6B", "#7FB8AD", "#9E7B53"),
)
WIDE, LETTER = 8.7, 0.064  # inches: of the time axis, and of a letter in a bar
UNITS = (1, "s"), (1e-3, "ms"), (1e-6, "µs")


def waterfall(spans, title=""):
    """When each piece of a run was done, and how long it took: time to the right, downwards what is in what.

    A bar in colour is work; one in gray holds other bars, and where it has none below it, the time went to
    something that has no span. Each process has a lane; a line leads from a question to the answer in another
    lane. A red frame is an error.

    spans  what telemetry.recorded gave; a file of OTLP/JSON, such as that of `moddiff generate --trace`; or a
           list of spans and files, for the processes of one run
    title  instead of one that says how long all took

    The clocks of two machines differ: a process whose answers would lie outside of the questions is moved so
    that they lie in the middle of them, and its lane says by how much.
    """
    spans, moved = aligned(spans_of(spans))
    lanes, colours = in_lanes(spans), colours_of(spans)
    head = 0.85 if len(lanes) > 1 else 0.1  # in rows, like all heights here: the name of a lane
    high = sum(head + len(rows) + 0.1 for _, rows in lanes)
    begun, ended = min(span.begun for span in spans), max(span.ended for span in spans)
    legend = {name: _took([span for span in spans if name_of(span) == name]) for name in colours}
    columns = max(1, int(WIDE / (0.5 + LETTER * max(map(len, legend.values())))))
    ax = _time_axis((ended - begun) / 1e9, high, below=-(-len(legend) // columns))

    top, middles = 0, {}
    for process, rows in lanes:
        if len(lanes) > 1:
            _lane_name(ax, process, top + 0.45, moved.get(process))
        for row, held in enumerate(rows):
            middle = top + head + row + 0.5
            for turn, span in enumerate(held):
                middles[span.id] = middle
                left = (span.begun - begun) / 1e9
                _bar(ax, span, left, middle, colours[name_of(span)] or FRAMES[turn % 2])
        top += head + len(rows) + 0.1
    for asked, span in questions(spans):
        x = (span.begun - begun) / 1e9
        ends = middles[asked.id] + 0.42, middles[span.id] - 0.42
        ax.plot([x, x], ends, color=INK, linewidth=0.7, linestyle=(0, (2, 1.5)), zorder=2.5)

    patch = extra("matplotlib.patches").Patch
    handles = [patch(color=colours[name] or FRAMES[1], label=words) for name, words in legend.items()]
    look = {"loc": "upper left", "bbox_to_anchor": (0, 0), "frameon": False, "labelcolor": INK, "fontsize": 8}
    ax.legend(handles=handles, ncols=columns, handlelength=0.9, handleheight=0.9, **look)
    entitle(ax.figure, title or _summary(spans, lanes, (ended - begun) / 1e9))
    return ax.figure


# ---- what is drawn where ----------------------------------------------------------------------------------


def spans_of(given):
    """FinishedSpans of a recording, a file, or a list of both, by time.   Raises ValueError or TypeError."""
    spans = {span.id: span for span in _each(given)}
    if not spans:
        raise ValueError("there are no spans to draw; was anything done while `recorded` was open?")
    return sorted(spans.values(), key=_when)


def _each(given):
    if isinstance(given, FinishedSpan):
        yield given
    elif isinstance(given, str | PathLike):
        yield from read(given)
    elif isinstance(given, Iterable):
        for one in given:
            yield from _each(one)
    else:
        raise TypeError(f"waterfall of a {type(given).__name__}; expected spans, as telemetry.recorded gives")


def _when(span):
    return span.begun, -span.ended


def process_of(span):
    """(name, number) of the process that a span is from."""
    return span.process.get("service.name", "?"), span.process.get("process.pid", "?")


def name_of(span):
    """What spans share that are the same work: "decode", "branch, cond", "remote.call, text encode"."""
    asked = ("branch",) if span.name == "branch" else ("role", "op")
    told = [span.attributes.get(f"moddiff.{name}") for name in asked]
    return ", ".join(filter(None, (span.name, " ".join(filter(None, told)))))


def questions(spans):
    """[(span, its child in another process)]"""
    by_id = {span.id: span for span in spans}
    pairs = [(by_id[span.parent], span) for span in spans if span.parent in by_id]
    return [(asked, span) for asked, span in pairs if process_of(asked) != process_of(span)]


def aligned(spans):
    """Spans by one clock.   -> spans, {process: nanoseconds it was moved by}"""
    outside = {}
    for asked, span in questions(spans):
        early, late = asked.begun - span.begun, span.ended - asked.ended
        outside.setdefault((process_of(asked), process_of(span)), []).append((early, late))
    moved = {}
    for (asking, answering), pairs in outside.items():
        by = round(median((early - late) / 2 for early, late in pairs))
        if answering not in moved and any(max(pair) > 0 for pair in pairs):
            moved[answering] = moved.get(asking, 0) + by
    fit = [
        replace(span, begun=span.begun + by, ended=span.ended + by)
        for span in spans
        for by in [moved.get(process_of(span), 0)]
    ]
    return sorted(fit, key=_when), moved


def in_lanes(spans):
    """[(process, rows)]: spans in rows without overlap, each below the one it is in, by their beginning."""
    lanes, row_of = {}, {}
    for span in spans:
        rows = lanes.setdefault(process_of(span), [])
        row = row_of.get((process_of(span), span.parent), -1) + 1
        while row < len(rows) and rows[row] and rows[row][-1].ended > span.begun:
            row += 1  # another thread's, at the same time
        while len(rows) <= row:
            rows.append([])
        rows[row].append(span)
        row_of[process_of(span), span.id] = row
    return [*lanes.items()]


def colours_of(spans):
    """{name: colour}, in the order of the run; None for what holds other spans of its process."""
    inside = {(process_of(span), span.parent) for span in spans}
    holds = {name_of(span) for span in spans if (process_of(span), span.id) in inside}
    names = dict.fromkeys(map(name_of, spans))
    others = [name for name in names if name not in USUAL and name not in holds]
    chosen = USUAL | {name: OTHERS[i % len(OTHERS)] for i, name in enumerate(others)} | dict.fromkeys(holds)
    return {name: chosen[name] for name in names}


# ---- bars and words ---------------------------------------------------------------------------------------


def _time_axis(seconds, high, below):
    """Axes with the time above them, room for so many rows, and for the lines of a legend below."""
    _, ax = figure(size=(9.0, 0.85 + 0.27 * high + 0.2 * below))
    ax.set(xlim=(0, max(seconds, 1e-9)), ylim=(high, 0), yticks=[])
    ax.xaxis.tick_top()
    ax.xaxis.set_major_formatter(in_time)
    ax.spines[:].set_visible(False)
    ax.grid(True, axis="x", color="#E5E5E5", linewidth=0.6)
    ax.set_axisbelow(True)
    return ax


def _lane_name(ax, process, y, moved):
    ax.axhline(y - 0.45, color="#999999", linewidth=0.6)
    by = f", clock moved by {in_time(moved / 1e9)}" if moved else ""
    (words,) = readable([f"{process[0]}  (process {process[1]}{by})"])
    over = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # lines pass behind it
    ax.text(0, y, words, size=8.5, color=INK, va="center", weight="bold", bbox=over)


def _bar(ax, span, left, middle, colour):
    whole = ax.get_xlim()[1]
    inches = span.seconds / whole * WIDE
    edge = {"edgecolor": "white", "linewidth": 0.5} if inches > 0.06 else {"linewidth": 0}
    if span.error is not None:
        edge = {"edgecolor": FAILED, "linewidth": 1.6, "zorder": 4}
    least = 0.006 / WIDE * whole  # half a pixel
    ax.barh(middle, max(span.seconds, least), 0.84, left=left, color=colour, **edge)
    if text := next((text for text in _words(span) if len(text) * LETTER < inches - 0.06), ""):
        ink = ink_on(extra("matplotlib.colors").to_rgb(colour))
        (text,) = readable([text])
        note(ax, left + span.seconds / 2, middle, text, size=7.5, color=ink, zorder=5)


def _words(span):
    """What may stand in a bar, from the most to the least."""
    step, took = span.attributes.get("moddiff.step"), in_time(span.seconds)
    name = f"step {step}" if span.name == "step" else name_of(span).removeprefix("branch, ")
    if span.error is not None:
        yield f"{name}  {took}: {span.error}"
    yield f"{name}  {took}"
    yield name
    if span.name == "step":
        yield str(step)


def _took(spans):
    """One kind of work in words: how often it was done, and how long it took."""
    seconds = [span.seconds for span in spans]
    each = f"{len(spans)} × {in_time(sum(seconds) / len(spans))} = " if len(spans) > 1 else ""
    (words,) = readable([f"{name_of(spans[0])}: {each}{in_time(sum(seconds))}"])
    return words


def _summary(spans, lanes, seconds):
    """The title of a run."""
    known = {span.id for span in spans}
    first, *more = [span.name for span in spans if span.parent not in known]
    failed = sum(span.error is not None for span in spans)
    return (
        f"{first}{f' and {len(more)} more' if more else ''}: {in_time(seconds)}"
        + (f" in {len(lanes)} processes" if len(lanes) > 1 else "")
        + (f"; framed in red: {failed} that ended with an error" if failed else "")
    )


def in_time(seconds, _=None):
    """ "1.23 s", "45.6 ms", "789 µs"; also what matplotlib asks for a tick."""
    size, unit = next((pair for pair in UNITS if abs(seconds) >= pair[0]), UNITS[-1])
    return f"{seconds / size:.3g} {unit}" if seconds else "0"
