"""Is SageAttention written out what the paper's formulas say, and is its error that of its rounding?"""

import numpy as np
import pytest
import torch

from moddiff.attention import attend, kernel_named
from moddiff.sage import sage_math


def qkv(n, m, d, common=0.0):
    made = torch.Generator().manual_seed(n * 1000 + m)
    q, k, v = (torch.randn(1, 2, rows, d, generator=made) for rows in (n, m, m))
    return q, k + common * torch.randn(1, 2, 1, d, generator=made), v


def by_blocks(q, k, v, mask, smooth):
    """The paper's formulas for one head, block by block, in numpy."""
    d = q.shape[-1]
    k = k - k.mean(0) if smooth else k
    out = np.zeros((len(q), d))
    for i in range(0, len(q), 128):
        rows = q[i : i + 128] / np.sqrt(d)
        q_step = np.abs(rows).max() / 127
        scores = []
        for j in range(0, len(k), 64):
            block = k[j : j + 64]
            k_step = np.abs(block).max() / 127 or 1  # one key less its mean is zero
            scores.append(np.rint(rows / q_step) @ np.rint(block / k_step).T * q_step * k_step)
        scores = np.where(mask[None], np.concatenate(scores, 1), -np.inf)
        weights = np.exp(scores - scores.max(1, keepdims=True))
        rounded = weights.astype(np.float16).astype(float) @ v.astype(np.float16).astype(float)
        out[i : i + 128] = rounded / weights.sum(1, keepdims=True)
    return out


@pytest.mark.parametrize("n, m, d", [(1, 1, 4), (5, 7, 8), (130, 67, 16), (129, 200, 12)])
@pytest.mark.parametrize("smooth", [True, False])
def test_it_equals_the_papers_formulas(n, m, d, smooth):
    q, k, v = qkv(n, m, d, common=2.0)
    mask = torch.arange(m) < max(1, m - 3)
    out = sage_math(q, k, v, mask.view(1, 1, 1, m), smooth=smooth)
    for head in range(2):
        arrays = (x[0, head].double().numpy() for x in (q, k, v))
        expected = torch.from_numpy(by_blocks(*arrays, mask.numpy(), smooth)).float()
        # a number on the edge between two int8 steps may fall either way: far below one step's effect
        assert (out[0, head] - expected).abs().mean() <= 1e-4


# fp8 rounds probabilities and values so much that less of the whole error is the scores'
@pytest.mark.parametrize("values, times", [("fp16", 3), ("fp8", 2)])
def test_smoothing_pays_where_keys_have_much_in_common(values, times):
    q, k, v = qkv(90, 150, 32, common=20.0)
    exact = attend(q.double(), k.double(), v.double(), kernel="math")
    smoothed = (sage_math(q, k, v, values=values) - exact).abs().mean()
    plain = (sage_math(q, k, v, values=values, smooth=False) - exact).abs().mean()
    assert smoothed < plain / times


def test_a_query_that_may_look_nowhere_gets_zeros_and_a_name_chooses_it():
    q, k, v = qkv(3, 4, 8)
    assert kernel_named("sage-math") is sage_math
    assert (
        attend(q, k, v, bias=torch.zeros(1, 1, 3, 4, dtype=torch.bool), kernel="sage-math").abs().max() == 0
    )


def test_other_values_are_refused():
    with pytest.raises(ValueError, match="int4"):
        sage_math(*qkv(2, 2, 4), values="int4")
