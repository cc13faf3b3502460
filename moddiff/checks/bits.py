"""Does the reader keep a matrix in 8 bits as the library does?"""

import torch

from ..storage.scaled import rounded
from .verdict import attempted, exercise, expect, expect_close, first_hint, shape_of


@exercise("every row has its own scale, nothing is cut off, and a row of zeros stays one.")
def int8_rows(answer):
    """The exercise of 16_quantize.

    answer(weight) -> (codes, scale): int8 [n, m] and float32 [n, 1], the nearest to weight = codes * scale.
    """
    source = torch.Generator().manual_seed(16)
    weight = torch.randn(6, 10, generator=source) * torch.tensor([1, 0.01, 5, 1, 0, 20]).unsqueeze(1)
    weight[3, 4] = -9.0  # the largest of its row is below zero
    result = attempted(answer, weight.clone())
    said = "expected the pair (codes, scale)"
    expect(isinstance(result, tuple) and len(result) == 2, f"got {shape_of(result)}; {said}")
    codes, scale = result
    arrived = f"codes {shape_of(codes)}, scale {shape_of(scale)}"
    fits = shape_of(codes) == [6, 10] and shape_of(scale) == [6, 1]
    one_for_all = isinstance(scale, float) or shape_of(scale) in ([], [1], [1, 1])
    mistakes = {
        "one scale for the whole matrix: the largest row decides for all": one_for_all,
        "keepdim=True keeps the scale a column, so that it meets its own row": shape_of(scale) == [6],
        "that is a scale for each column; a row of the weight makes one output": shape_of(scale) == [1, 10],
    }
    expect(fits, f"{arrived}: {first_hint(mistakes, 'expected [6, 10] and [6, 1]')}")
    expect(
        codes.dtype == torch.int8,
        f"the codes are {codes.dtype}; .to(torch.int8) makes them take one byte each",
    )
    expect(
        bool(scale.isfinite().all()) and bool((scale != 0).all()),
        "the row of zeros has the scale 0 or NaN, by which nothing can be divided; any other will do for it",
    )
    right, true = rounded(weight, torch.int8)
    full = (weight / true)[:4]  # the rows of zeros aside
    scales = {
        "the scale is the largest number itself; 127 steps must reach it": true * 127,
        "127 is the largest code, not 128": true * 127 / 128,
        "the largest by size: a number below zero may be further away": (weight.amax(1, keepdim=True) / 127),
    }
    keep = [0, 1, 2, 3, 5]
    expect_close(
        scale.float()[keep] / true[keep],
        torch.ones(5, 1),
        {hint: wrong[keep] / true[keep] for hint, wrong in scales.items()},
        "the scale of a row: its largest number by size becomes 127",
        tolerance=1e-3,
    )
    rounding = {
        "the codes are cut off, not rounded: .round() before .to(torch.int8)": (
            torch.equal(codes[:4], full.to(torch.int8))
        ),
        "the codes are the weight times the scale; divide by it": (
            torch.equal(codes[:4], (weight * true).round().to(torch.int8)[:4])
        ),
    }
    expect(torch.equal(codes, right), first_hint(rounding, "codes: the weight over its scale, rounded"))
