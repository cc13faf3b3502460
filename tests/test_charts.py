"""Do the charts show the numbers they were given, under words that say what they are?"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from toy import Toy, by_hand, noise

from moddiff import capture
from moddiff.flow import schedule
from moddiff.tracing import Sweep
from moddiff.viz.canvas import title_of
from moddiff.viz.charts import (
    bars,
    curves,
    distances,
    error_vs_steps,
    head_grid,
    heat_map,
    recovery_map,
    residual_norms,
    schedule_plot,
)


def labels(ax):
    return ax.get_xlabel(), ax.get_ylabel()


def ticks(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


# ---- curves ----


def test_schedules_are_drawn_step_by_step_and_labelled():
    plans = schedule(5, 1), schedule(5, 8, "dpm++")
    drawn = schedule_plot(*plans, my_own=[1.0, 0.5, 0.0])
    ax = drawn.axes[0]
    for line, sigmas in zip(ax.lines, (plans[0].sigmas, plans[1].sigmas, [1.0, 0.5, 0.0])):
        assert np.allclose(line.get_ydata(), sigmas) and list(line.get_xdata()) == list(range(len(sigmas)))
    assert legend(ax) == ["shift 1, unipc", "shift 8, dpm++", "my own"] and labels(ax) == (
        "step",
        "sigma (1 noise, 0 data)",
    )
    for nothing in ((), (5,), ([1.0, 0.0],)):
        with pytest.raises(ValueError, match="nothing to draw; give it schedules"):
            schedule_plot(*nothing)
    with pytest.raises(ValueError, match=r"schedule 'flat' arrived with shape \[2, 2\]; expected \[steps\]"):
        schedule_plot(flat=np.ones((2, 2)))


def test_the_slope_of_each_solver_is_fitted_on_log_axes():
    steps = (4, 8, 16)
    drawn = error_vs_steps({"first": {n: 3 / n for n in steps}, "third": {n: 5 / n**3 for n in steps}})
    ax = drawn.axes[0]
    assert (
        legend(ax) == ["first: slope 1.0", "third: slope 3.0"] and ax.get_xscale() == ax.get_yscale() == "log"
    )
    assert ticks(ax.xaxis) == ["4", "8", "16"] and np.allclose(
        ax.lines[1].get_ydata(), [5 / n**3 for n in steps]
    )
    for bad in ({4: 0.1}, {4: 0.1, 8: 0.0}, {}):
        with pytest.raises(ValueError, match="two or more steps, and every error above 0"):
            error_vs_steps({"euler": bad})


@pytest.mark.parametrize(("points", "whole"), [(range(20), True), ([0.0, 7.5, 19.0], False)])
def test_whole_numbers_have_no_tick_between_them(points, whole):
    ax = curves({"a line": {x: x for x in points}}, "", "step", "").axes[0]
    assert (ax.get_xticks() % 1 == 0).all() == whole


def test_curves_pass_through_their_points_and_only_few_points_are_marked():
    many = {i / 100: i**2 for i in range(101)}
    ax = curves(
        {"a line": many, "walk": {1.0: 2, 0.5: 3, 0.0: 5}}, "Two ways", "sigma", "x", falling=True
    ).axes[0]
    line, walk = ax.get_lines()[:2]
    assert walk.get_xydata().tolist() == [[1, 2], [0.5, 3], [0, 5]] and len(line.get_xdata()) == 101
    assert line.get_marker() == "None" and walk.get_marker() != "None" and legend(ax) == ["a line", "walk"]
    assert (
        labels(ax) == ("sigma", "x")
        and ax.get_xlim()[0] > ax.get_xlim()[1]
        and title_of(ax.figure) == "Two ways"
    )
    assert curves({"one": {1: 1, 10: 5}}, "One", "n", "m", log="x").axes[0].get_xscale() == "log"
    for nothing in ({}, [1, 2], None):
        with pytest.raises(ValueError, match="arrived to be drawn as curves; expected {name: {x: y}}"):
            curves(nothing, "", "", "")
    with pytest.raises(
        ValueError, match="one holds numbers of 0 or less, which have no place on a logarithmic"
    ):
        curves({"one": {1: 0.0, 2: 1.0}}, "", "", "", log="y")
    with pytest.raises(ValueError, match="walk: expected {x: y} with at least one point and finite numbers"):
        curves({"walk": {1: float("nan")}}, "", "", "")


def test_a_grid_of_numbers_has_a_label_for_each_line():
    ax = heat_map(
        [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]], range(3), ["a", "b"], "A grid", "letter", "number", "size"
    ).axes[0]
    assert labels(ax) == ("letter", "number") and [tick.get_text() for tick in ax.get_yticklabels()] == [
        "0",
        "1",
        "2",
    ]
    with pytest.raises(ValueError, match=r"values \[2, 1\] for 1 rows and 2 columns"):
        heat_map([[0.0], [1.0]], ["a"], ["b", "c"], "", "", "", "")


# ---- bars ----


def test_bars_are_as_long_as_the_bytes_and_say_them_in_words():
    drawn = bars({"text": 11.4e9, "vae": 0.5e9}, title="Weights")
    ax = drawn.axes[0]
    assert np.allclose([bar.get_width() for bar in ax.patches], [11.4, 0.5]) and ax.get_xlabel() == "GB"
    assert ticks(ax.yaxis) == ["text", "vae"] and [text.get_text().strip() for text in ax.texts] == [
        "11.4 GB",
        "500 MB",
    ]
    for bad in ({"text": -1}, {}, [1, 2], "text"):
        with pytest.raises(ValueError, match="expected .label: bytes. with every number 0 or more"):
            bars(bad)


def test_a_memory_forecast_is_stacked():
    cast = dict(
        parts={"dit": dict(weights=2e6, working=3e6), "vae": dict(weights=1e6, working=5e6)},
        frames=17,
        size=[96, 96],
    )
    drawn = bars(SimpleNamespace(name="tiny", forecast=cast))
    ax = drawn.axes[0]
    assert legend(ax) == ["weights", "working"] and np.allclose(
        [bar.get_x() for bar in ax.patches], [0, 0, 2, 1]
    )
    assert [text.get_text().strip() for text in ax.texts] == [
        "5 MB",
        "6 MB",
    ] and "17 frames of 96 x 96" in title_of(drawn)


def test_a_stack_of_many_kinds_is_drawn_whole():
    ax = bars({"all": {f"part {i}": 1e6 for i in range(9)}}).axes[0]
    assert len(ax.patches) == 9 and max(bar.get_x() + bar.get_width() for bar in ax.patches) == 9
    assert [text.get_text() for text in ax.texts] == ["9 MB"]


# ---- heat maps ----


def test_distances_are_one_minus_the_cosine_of_the_means():
    vectors = [torch.randn(n, 8, generator=torch.Generator().manual_seed(n)) for n in (3, 4, 6)]
    drawn = distances(vectors, ["a red star", "a blue star", "ein Stern"])
    shown = np.asarray(drawn.axes[0].images[0].get_array())
    for i, a in enumerate(vectors):
        for j, b in enumerate(vectors):
            assert abs(shown[i, j] - (1 - torch.cosine_similarity(a.mean(0), b.mean(0), 0).item())) < 1e-5
    assert (
        ticks(drawn.axes[0].yaxis) == ["a red star", "a blue star", "ein Stern"]
        and drawn.axes[1].get_ylabel() == "cosine distance"
    )
    assert distances(vectors, ["red", "rojo", "rot"], what="word").axes[0].get_xlabel() == "word"
    with pytest.raises(ValueError, match="3 vectors and 2 labels"):
        distances(vectors, ["a", "b"])


def test_a_grid_of_heads_holds_the_numbers_or_the_maps():
    values = np.arange(12.0).reshape(3, 4)
    ax = head_grid(values, what="entropy").axes[0]
    assert (
        np.array_equal(ax.images[0].get_array(), values)
        and labels(ax) == ("head", "block")
        and ax.texts[-1].get_text() == "11"
    )
    assert head_grid(values / 4).axes[0].texts[-1].get_text() == "2.75"
    maps = np.random.default_rng(0).random((3, 4, 5, 6))
    picture = np.asarray(head_grid(maps).axes[0].images[0].get_array())
    assert np.allclose(picture[6:11, 14:20], maps[1, 2] / maps[1, 2].max()) and np.isnan(picture[5]).all()
    with pytest.raises(
        ValueError,
        match=r"values arrived with shape \[3\]; expected \[block, heads\] or \[block, heads, h, w\]",
    ):
        head_grid([1, 2, 3])


def test_the_writers_of_the_stream_are_measured_from_a_capture():
    toy, x, held = Toy(), noise(), {}
    by_hand(toy, x, lambda name, value, block: held.setdefault((name, block), value))
    with torch.no_grad(), capture(toy, "blocks.*.resid_*") as seen:
        out = toy(x)
    ax = residual_norms(seen).axes[0]

    def rms(value):
        return value.square().mean().sqrt().item()

    assert legend(ax) == ["the stream after the block", "written by attention", "written by feed-forward"]
    assert np.allclose(ax.lines[0].get_ydata(), [rms(held["resid_post", i]) for i in range(3)], atol=1e-5)
    assert abs(ax.lines[0].get_ydata()[-1] - rms(out)) < 1e-5
    assert np.allclose(
        [bar.get_height() for bar in ax.patches[:3]], [rms(held["out", i]) for i in range(3)], atol=1e-5
    )
    assert labels(ax) == ("block", "size (root mean square)")
    with capture(toy, "blocks.*.attn.q") as other:
        toy(x)
    with pytest.raises(
        ValueError,
        match=r'no resid_post in this record; it holds blocks.0.attn.q.*Capture "blocks.\*.resid_\*"',
    ):
        residual_norms(other)
    with pytest.raises(TypeError, match="expected the Record of a capture, got dict"):
        residual_norms({})


def test_a_recovery_map_has_the_axes_of_its_sweep_and_its_controls():
    values = np.array([[0.0, 0.5, 1.0], [-0.2, 0.1, 0.9]])
    drawn = recovery_map(
        Sweep(
            values,
            {"block": [2, 5], "step": [0, 4, 8]},
            "recovered by resid_post",
            {"identity": 0.0, "noise": 0.031},
        )
    )
    ax = drawn.axes[0]
    assert (
        np.array_equal(ax.images[0].get_array(), values)
        and labels(ax) == ("step", "block")
        and ticks(ax.xaxis) == ["0", "4", "8"]
    )
    assert ax.images[0].get_clim() == (-1.0, 1.0) and "identity 0.00, noise 0.03" in title_of(drawn)
    assert recovery_map(Sweep(values, {"a": [1, 2], "b": [1, 2, 3]}), low=-2, high=2).axes[0].images[
        0
    ].get_clim() == (-2, 2)
    one = recovery_map(Sweep(values[0], {"block": [0, 1, 2]})).axes[0]
    assert [bar.get_height() for bar in one.patches] == [0.0, 0.5, 1.0] and one.get_xlabel() == "block"
    with pytest.raises(
        ValueError, match=r"a picture has one or two axes, this sweep has 3; pick with .at\(a="
    ):
        recovery_map(Sweep(np.zeros((1, 1, 1)), {"a": [0], "b": [0], "c": [0]}))


def test_the_numbers_of_a_recovery_map_can_be_read_on_the_ends_that_were_asked_for():
    drawn = recovery_map(Sweep(np.full((1, 2), 0.9), {"a": [1], "b": [1, 2]}), low=-10, high=10)
    assert drawn.axes[0].texts[0].get_color() == "black"  # 0.9 of 10 is nearly white
    drawn = recovery_map(Sweep(np.array([[0.9, 0.1]]), {"a": [1], "b": [1, 2]}, controls={"identity": -1e-9}))
    assert drawn.axes[0].texts[0].get_color() == "white"  # 0.9 of 0.9 is dark blue
    assert "identity 0.00" in title_of(drawn)
    with pytest.raises(TypeError, match="recovery_map of list; expected a Sweep"):
        recovery_map([1, 2])
