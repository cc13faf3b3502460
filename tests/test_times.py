"""Does the waterfall put every span where it was in time, below what it is in, in the lane of its process?"""

from dataclasses import replace
from itertools import count

import pytest
from matplotlib.colors import to_hex

from moddiff.telemetry import FinishedSpan, otlp, recorded, span
from moddiff.viz import waterfall
from moddiff.viz.canvas import title_of
from moddiff.viz.times import FAILED, aligned, in_lanes, in_time, name_of, spans_of

NUMBERS = count(1)
HERE, THERE = {"service.name": "here", "process.pid": 1}, {"service.name": "there", "process.pid": 2}


def made(name, begun, ended, parent=None, process=HERE, **how):
    """A span from and to so many milliseconds."""
    attributes = {f"moddiff.{key}": value for key, value in how.pop("at", {}).items()}
    return FinishedSpan(
        name,
        trace="1" * 32,
        id=f"{next(NUMBERS):016x}",
        parent=None if parent is None else parent.id,
        begun=1_700_000_000_000_000_000 + round(begun * 1e6),
        ended=1_700_000_000_000_000_000 + round(ended * 1e6),
        process=process,
        attributes=attributes,
        **how,
    )


def run_of(steps, each=100):
    """A run of two branches a step, as a pipeline makes it."""
    root = made("generate", 0, steps * each + 200)
    spans = [root]
    for i in range(steps):
        step = made("step", 100 + i * each, 100 + (i + 1) * each, root, at={"step": i})
        halves = (0.02, 0.5, "cond"), (0.5, 0.98, "uncond")
        spans += [
            step,
            *(
                made("branch", 100 + (i + a) * each, 100 + (i + b) * each, step, at={"branch": branch})
                for a, b, branch in halves
            ),
        ]
    return [*spans, made("decode", 100 + steps * each, 200 + steps * each, root)]


def bars_of(ax):
    """(left, right, middle, colour) of every bar, in order of drawing."""
    return [
        (
            bar.get_x(),
            bar.get_x() + bar.get_width(),
            bar.get_y() + bar.get_height() / 2,
            to_hex(bar.get_facecolor()),
        )
        for bar in ax.patches
    ]


def words_of(ax):
    return [text.get_text() for text in ax.texts]


def legend_of(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_bars_lie_where_the_spans_were_and_below_what_they_lie_in():
    root = made("generate", 0, 100)
    child, late = made("prepare", 10, 40, root), made("decode", 50, 90, root)
    drawn = waterfall([late, made("encode text", 15, 35, child), child, root])
    bars = bars_of(drawn.axes[0])
    where = [(round(left * 1e3), round(right * 1e3)) for left, right, *_ in bars]
    assert where == [(0, 100), (10, 40), (50, 90), (15, 35)]
    rows = [middle for _, _, middle, _ in bars]
    assert rows[0] < rows[1] == rows[2] < rows[3]
    assert title_of(drawn) == "generate: 100 ms" and title_of(waterfall([root], title="mine")) == "mine"


def test_work_has_colours_and_what_holds_it_is_gray():
    ax = waterfall(run_of(3)).axes[0]
    colours = [colour for *_, colour in bars_of(ax)]
    gray = [len({colour[1:3], colour[3:5], colour[5:]}) == 1 for colour in colours]
    assert gray == [True] * 4 + [False] * 7  # generate and three steps; decode and six branches
    assert len(set(colours[5:])) == 2 and colours[4] not in colours[5:]
    assert legend_of(ax) == [
        "generate: 500 ms",
        "step: 3 × 100 ms = 300 ms",
        "branch, cond: 3 × 48 ms = 144 ms",
        "branch, uncond: 3 × 48 ms = 144 ms",
        "decode: 100 ms",
    ]


LONG = {"role": "text", "op": "a long name for something that others were asked"}


@pytest.mark.parametrize(
    "more", ((), [made("remote.call", i, i + 1, at=LONG | {"role": str(i)}) for i in range(9)])
)
@pytest.mark.parametrize("steps", (1, 20, 200))
def test_no_word_is_wider_than_its_bar_and_no_legend_than_the_figure(steps, more):
    drawn = waterfall([*run_of(steps), *more])
    ax = drawn.axes[0]
    drawn.draw_without_rendering()
    assert len(ax.patches) == 2 + 3 * steps + len(more)
    boxes = [bar.get_window_extent() for bar in ax.patches]
    for text in ax.texts:
        box = text.get_window_extent()
        around = [bar for bar in boxes if bar.y0 < (box.y0 + box.y1) / 2 < bar.y1]
        assert any(bar.x0 <= box.x0 and box.x1 <= bar.x1 for bar in around), text.get_text()
    numbers = {text for text in words_of(ax) if text.startswith("step") or text.isdecimal()}
    assert len(numbers) == (steps if steps < 100 else 0)
    legend, whole = ax.get_legend().get_window_extent(), drawn.bbox
    assert legend.x1 <= whole.x1 and legend.y0 >= whole.y0


def test_processes_have_lanes_with_their_names_and_a_line_from_question_to_answer():
    root = made("generate", 0, 100)
    asked = made("remote text", 10, 60, root, kind="client")
    answer = made("serve text", 20, 50, asked, THERE, kind="server")
    drawn = waterfall([root, asked, answer])
    ax = drawn.axes[0]
    assert [text for text in words_of(ax) if "process" in text] == ["here  (process 1)", "there  (process 2)"]
    assert title_of(drawn) == "generate: 100 ms in 2 processes"
    rows = [middle for _, _, middle, _ in bars_of(ax)]
    (line,) = [line for line in ax.lines if line.get_linestyle() != "-"]
    assert line.get_xdata() == pytest.approx([0.02, 0.02])
    assert rows[1] < line.get_ydata()[0] < line.get_ydata()[1] < rows[2]


def test_a_clock_that_goes_wrong_is_set_right_and_said():
    root = made("generate", 0, 100)
    asked = made("remote text", 10, 60, root)
    answer = made("serve text", 1020, 1050, asked, THERE)
    inside = made("work", 1025, 1040, answer, THERE)
    spans, moved = aligned(spans_of([root, asked, answer, inside]))
    assert moved == {("there", 2): -1_000_000_000}
    assert [(one.begun - root.begun) / 1e6 for one in spans] == [0, 10, 20, 25]
    assert "there  (process 2, clock moved by -1 s)" in words_of(waterfall([root, asked, answer]).axes[0])
    # A third process is asked by the second, and moves with it.
    further = made("serve vae", 2030, 2036, inside, {"service.name": "far", "process.pid": 3})
    _, moved = aligned(spans_of([root, asked, answer, inside, further]))
    assert moved[("far", 3)] == pytest.approx(-2_000_500_000)
    right = replace(answer, begun=root.begun + 20_000_000, ended=root.begun + 50_000_000)
    assert aligned([root, asked, right])[1] == {}


def test_threads_at_the_same_time_lie_in_rows_of_their_own():
    one, two, three = made("a", 0, 50), made("b", 20, 70), made("c", 60, 90)
    ((_, rows),) = in_lanes([one, two, three])
    assert [[span.name for span in row] for row in rows] == [["a", "c"], ["b"]]


def test_an_error_is_framed_and_counted():
    root = made("generate", 0, 100, error="MemoryError: no room")
    drawn = waterfall(
        [root, made("decode", 50, 100, root, error="MemoryError: no room"), made("load", 0, 20)]
    )
    edges = [to_hex(bar.get_edgecolor()) == FAILED.lower() for bar in drawn.axes[0].patches]
    assert sum(edges) == 2 and "framed in red: 2 that ended with an error" in title_of(drawn)
    assert "generate  100 ms: MemoryError: no room" in words_of(drawn.axes[0])


def test_spans_come_from_a_recording_a_file_or_both(tmp_path):
    with recorded() as spans, span("生成"), span("step"):
        pass
    otlp.write(tmp_path / "there.json", [made("serve text", 0, 1, process=THERE)])
    assert len(waterfall(spans).axes[0].patches) == 2
    assert len(waterfall(tmp_path / "there.json").axes[0].patches) == 1
    assert len(spans_of([spans, str(tmp_path / "there.json"), *spans])) == 3  # each once


@pytest.mark.parametrize(
    "given, error, told",
    [
        ([], ValueError, "no spans to draw; was anything done"),
        ([1, 2], TypeError, "waterfall of a int; expected spans"),
        (3, TypeError, "waterfall of a int; expected spans"),
        (["nowhere.json"], FileNotFoundError, "nowhere.json"),
    ],
)
def test_what_is_no_span_is_refused(given, error, told):
    with pytest.raises(error, match=told):
        waterfall(given)


def test_names_and_times_are_short():
    assert [in_time(value) for value in (0, 12.3456, 0.0123, 4e-5, -0.5)] == [
        "0",
        "12.3 s",
        "12.3 ms",
        "40 µs",
        "-500 ms",
    ]
    assert name_of(made("branch", 0, 1, at={"branch": "cond"})) == "branch, cond"
    assert name_of(made("step", 0, 1, at={"branch": "cond"})) == "step"
    call = made("remote.call", 0, 1, at={"branch": "cond", "role": "text", "op": "encode"})
    assert name_of(call) == "remote.call, text encode"
