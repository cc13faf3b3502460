"""The exercise of 16_quantize: the right one passes, and usual wrong ones are told their mistake."""

import pytest
import torch
from answers import rejected, solution

from moddiff import checks


def rows(largest=127.0, size=lambda w: w.abs().amax(1, keepdim=True), nearest=torch.round, least=1.0):
    """The exercise, with one thing changed."""

    def answer(weight):
        scale = size(weight) / largest
        scale = torch.where(scale == 0, least, scale)
        return nearest(weight / scale).to(torch.int8), scale

    return answer


def test_the_rows_of_the_solution_are_right():
    assert checks.quantize(solution("16_quantize", "my_int8")).right is True
    assert checks.quantize(rows()).right is True
    assert checks.quantize(lambda weight: None).right is None


@pytest.mark.parametrize(
    "wrong, hint",
    [
        (rows(size=lambda w: w.abs().amax().reshape(1, 1)), "one scale for the whole matrix"),
        (lambda w: (rows()(w)[0], rows()(w)[1].squeeze(1)), "keepdim=True"),
        (lambda w: (rows()(w)[0], w.abs().amax(0, keepdim=True) / 127), "a scale for each column"),
        (lambda w: (rows()(w)[0].float(), rows()(w)[1]), "one byte each"),
        (rows(least=float("nan")), "the row of zeros"),
        (rows(largest=1.0), "127 steps must reach it"),
        (rows(largest=128.0), "not 128"),
        (rows(size=lambda w: w.amax(1, keepdim=True)), "below zero"),
        (rows(nearest=torch.trunc), "cut off"),
        (lambda w: ((w * rows()(w)[1]).round().to(torch.int8), rows()(w)[1]), "divide by it"),
        (lambda w: rows()(w)[0], "the pair"),
    ],
)
def test_a_wrong_rounding_is_told_its_mistake(wrong, hint):
    rejected(checks.quantize(wrong), hint)
