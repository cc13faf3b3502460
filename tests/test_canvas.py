"""Does every figure look alike, show any word, stay small, and refuse what no colour can show?"""

import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch

from moddiff.viz.canvas import (
    captioned,
    colour_bar,
    dress,
    extra,
    figure,
    heat,
    ink_on,
    label_tiles,
    mosaic,
    numbers,
    png,
    readable,
    sheet,
    thumbnails,
    title_of,
)

# ---- figures ----


def test_a_figure_shows_itself_as_a_small_png_with_its_title_as_text():
    drawn, ax = figure()
    ax.imshow(np.random.default_rng(0).random((40, 60, 3)))
    dress(ax, "Noise", "x", "y")
    shown = drawn._repr_mimebundle_()
    assert shown["text/plain"] == "Figure: Noise" and shown["image/png"].startswith("iVBORw0KGgo")
    assert png(drawn) == png(drawn) and len(png(drawn)) < 60_000


def test_a_long_title_is_broken_and_not_cut():
    drawn, ax = figure(size=(3, 2))
    dress(ax, "a title that is much longer than such a small figure is wide")
    lines = title_of(drawn).split("\n")
    assert (
        len(lines) > 1
        and max(map(len, lines)) <= 39
        and " ".join(lines) == "a title that is much longer than such a small figure is wide"
    )


def test_labels_that_no_font_can_draw_are_numbered_wherever_they_stand():
    _, (left, right) = figure(1, 2)
    heat(left, np.ones((1, 2)), ["\U000f1234"], ["a", "\U000f1234"])
    label_tiles(right, ([0], [0, 1]), ["\U000f1234"], ["0\nsigma 1.00", "\U000f1234"])
    assert [label.get_text() for label in left.get_yticklabels()] == ["word 0"]
    assert [label.get_text() for label in left.get_xticklabels()] == ["a", "word 1"]
    assert [label.get_text() for label in right.get_yticklabels()] == ["word 0"]
    assert [label.get_text() for label in right.get_xticklabels()] == ["0\nsigma 1.00", "word 1"]


def test_words_that_no_font_can_draw_are_numbered():
    assert readable(["red", "größer", "\U000f1234", "left"]) == ["red", "größer", "word 2", "left"]


def test_arrays_of_the_wrong_rank_or_with_nan_are_refused_by_name():
    assert numbers(torch.ones(1, 1, 2, 3), "probs", "n l").shape == (2, 3)
    with pytest.raises(
        ValueError,
        match=r"probs arrived with shape \[2, 3, 4, 5\]; expected \[heads, n, l\] or \[n, l\]. Pick from",
    ):
        numbers(torch.ones(2, 3, 4, 5), "probs", "heads n l", "n l")
    for bad in ("words", [object()], {"a": 1}):
        with pytest.raises(ValueError, match=r"probs arrived as (str|list|dict); expected numbers \[n, m\]"):
            numbers(bad, "probs", "n m")
    with pytest.raises(ValueError, match="scores holds 2 values that are NaN or infinite"):
        numbers([[1.0, float("nan"), float("-inf")]], "scores", "n m")


NEEDING_IT = (
    "viz.tap_valve()",
    "viz.frame_sheet(film)",
    "viz.show_words(probs, [word], (1, 1, 1), film)",
    "viz.word_animation(probs, [word], (1, 1, 1), film)",
    "viz.tokens_picture([(1, 'a')])",
    "viz.distances(np.ones((2, 3)), ['a', 'b'])",
)


@pytest.mark.parametrize("call", NEEDING_IT)
def test_without_matplotlib_every_picture_says_what_to_install(call):
    code = f"""
import sys
sys.modules["matplotlib"] = None  # as where it is not installed
import numpy as np
from moddiff import viz
from moddiff.pipeline import Word
film, probs, word = np.zeros((1, 8, 8, 3), np.uint8), np.ones((1, 1, 1)), Word("red", (0,))
try:
    {call}
except ModuleNotFoundError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "matplotlib" in done.stdout
    assert done.stdout.strip().endswith('Pictures and sliders need it: pip install "moddiff[notebooks]"')


def test_the_library_that_is_missing_is_named_not_the_one_that_needs_it(tmp_path, monkeypatch):
    (tmp_path / "half_there.py").write_text("import surely_absent_library")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="^No module named 'surely_absent_library'. Pictures and"):
        extra("half_there")


def test_no_label_touches_an_edge_of_its_figure():
    drawn, ax = figure(size=(4, 2))
    heat(ax, np.ones((2, 2)), ["a long label of a row", "b"], ["x", "y"])
    dress(ax, "A title", "x", "y")
    drawn.draw_without_rendering()
    boxes = [label.get_window_extent() for label in (*ax.get_yticklabels(), ax.yaxis.label)]
    assert min(box.x0 for box in boxes) >= 5  # pixels


def test_words_below_a_low_figure_are_inside_the_picture():
    image, _ = sheet(np.zeros((1, 5, 6, 6)), [""], range(5), 1.1, left=1.0)
    bar = colour_bar(image.axes, image, "root mean square")
    drawn = dress(image.axes, "two\nlines", "latent frame", "height").figure
    assert png(drawn) and bar.ax.yaxis.label.get_window_extent().x1 < drawn.bbox.x1
    assert image.axes.xaxis.label.get_window_extent().y0 >= 5  # pixels


# ---- words and numbers ----


def test_dollar_signs_are_letters_and_powers_of_ten_are_still_formulas():
    drawn, ax = figure()
    ax.plot([1, 10, 1e5], [1, 2, 3], label="from $1_{ to $2")
    ax.set_xscale("log")
    ax.set_yticks([1, 2, 3], ["$a_{$", "b", "c"])
    dress(ax, "costs $5 or ${6$", "$x_{$", "y", legend=True)
    assert png(drawn)  # read as formulas, these would be errors
    assert not ax.get_yticklabels()[0].get_parse_math()
    assert all(label.get_parse_math() and "10^{" in label.get_text() for label in ax.get_xticklabels())
    plain, same = figure(size=(3, 1)), figure(size=(3, 1))
    dress(plain[1], "$x$ and $y$")
    dress(same[1], "x and y")
    assert png(plain[0]) != png(same[0])


def test_numbers_in_a_heat_map_can_be_read_on_every_colour():
    def light(colour):
        colour = np.asarray(colour)
        return np.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4) @ (
            0.2126,
            0.7152,
            0.0722,
        )

    for signed in (False, True):
        _, ax = figure()
        image = heat(ax, np.linspace(-1, 1, 64).reshape(8, 8), range(8), range(8), signed=signed)
        assert len(ax.texts) == 64
        for text in ax.texts:
            column, row = map(int, text.get_position())
            cell = light(image.cmap(image.norm(image.get_array()[row, column]))[:3])
            ink = {"black": 0.0, "white": 1.0}[text.get_color()]
            bright, dark = max(cell, ink), min(cell, ink)
            assert (bright + 0.05) / (dark + 0.05) >= 4.5
    assert ink_on((1, 1, 1)) == "black" and ink_on((0, 0, 0)) == "white"


def test_what_rounds_to_nothing_has_no_minus():
    _, ax = figure()
    heat(ax, np.array([[-0.001, -0.5, 0.0]]), ["a"], ["b", "c", "d"])
    assert [text.get_text() for text in ax.texts] == ["0.00", "-0.50", "0.00"]


def test_many_numbers_are_colours_alone_and_so_are_few_where_asked():
    for values, how in ((np.ones((5, 13)), {}), (np.ones((2, 2)), {"write": False})):
        _, ax = figure()
        heat(ax, values, range(len(values)), range(values.shape[1]), **how)
        assert not ax.texts


def test_labels_of_columns_do_not_run_into_each_other():
    _, ax = figure(size=(3.6, 2))
    heat(ax, np.ones((1, 3)), ["a"], ["from A, under the thing", "from A, the rest", "noise"])
    assert [label.get_rotation() for label in ax.get_xticklabels()] == [35] * 3
    _, ax = figure(size=(3.6, 2))
    heat(ax, np.ones((1, 3)), ["a"], ["red", "blue", "green"])
    assert [label.get_rotation() for label in ax.get_xticklabels()] == [0] * 3
    _, ax = figure(size=(3.6, 2))
    heat(ax, np.ones((1, 60)), ["a"], range(60))
    assert [label.get_text() for label in ax.get_xticklabels()] == [str(i) for i in range(0, 60, 3)]


# ---- small pictures side by side ----


def test_labels_below_tiles_take_as_many_lines_as_they_need():
    drawn, ax = figure(size=(4.2, 2))
    picture, middles = mosaic(np.zeros((1, 3, 8, 8)))
    ax.imshow(picture)
    label_tiles(ax, middles, ["a"], ["as it is", "all to the words of another", "without its padding"])
    drawn.draw_without_rendering()
    boxes = [label.get_window_extent() for label in ax.get_xticklabels()]
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes))
    assert ax.get_xticklabels()[0].get_text() == "as it is"


def test_large_frames_are_thinned_and_small_ones_kept():
    frames = np.random.default_rng(0).integers(0, 256, (2, 200, 300, 3), np.uint8)
    assert np.array_equal(thumbnails(frames), frames[:, ::2, ::2] / 255)
    assert np.array_equal(thumbnails(frames[:, :96, :96]), frames[:, :96, :96] / 255)


def test_captions_are_drawn_in_letters_that_there_are():
    frames = np.zeros((2, 8, 160, 3), np.uint8)
    numbered = captioned(frames, ["word 0", "größer"])
    assert np.array_equal(captioned(frames, ["\U000f1234", "größer"]), numbered)  # and no empty boxes
    assert numbered.shape == (2, 26, 160, 3) and not numbered[:, 18:].any()
