"""Does every figure look alike, show itself as a small file, and refuse what no colour can show?"""

import numpy as np
import pytest
import torch

from moddiff.viz.canvas import dress, figure, numbers, png, readable, title_of


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


def test_words_that_no_font_can_draw_are_numbered():
    assert readable(["red", "größer", "\U000f1234", "left"]) == ["red", "größer", "word 2", "left"]


def test_arrays_of_the_wrong_rank_or_with_nan_are_refused_by_name():
    assert numbers(torch.ones(1, 1, 2, 3), "probs", "n l").shape == (2, 3)
    with pytest.raises(
        ValueError,
        match=r"probs arrived with shape \[2, 3, 4, 5\]; expected \[heads, n, l\] or \[n, l\]. Pick from a larger capture",
    ):
        numbers(torch.ones(2, 3, 4, 5), "probs", "heads n l", "n l")
    with pytest.raises(ValueError, match="scores holds 2 values that are NaN or infinite"):
        numbers([[1.0, float("nan"), float("-inf")]], "scores", "n m")
