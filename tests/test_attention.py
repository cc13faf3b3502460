"""Do all kernels compute the same attention, and does looking at it leave it alone?"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moddiff.attention import (
    KERNELS,
    attend,
    attention_taps,
    merge_heads,
    repeat_last,
    split_heads,
    tap_repeated,
)
from moddiff.hooks import capture, identity, patch
from moddiff.kernels import NEEDS

RUNS_HERE = ["math", "sdpa", "flex", "sdpa-flash", "sdpa-math"]


def test_none_that_runs_here_is_left_out():
    elsewhere = {name for name, needs in NEEDS.items() if needs.gpu}
    assert set(KERNELS) - elsewhere == {*RUNS_HERE, "sage-math"}  # the last is coarse: tests/test_sage.py


class Holder(torch.nn.Module):
    """A module with nothing but taps, so that a session can be opened on an attention."""

    def __init__(self, prefix=""):
        super().__init__()
        self.tap = attention_taps(prefix)


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def qkv(b=2, heads=3, n=5, m=7, d=4, dtype=torch.float32):
    return (
        draw(b, heads, n, d, seed=1, dtype=dtype),
        draw(b, heads, m, d, seed=2, dtype=dtype),
        draw(b, heads, m, d, seed=3, dtype=dtype),
    )


def slow(q, k, v, bias=None, scale=None):
    """Attention one query at a time, in float64, with no softmax function: the oracle."""
    b, heads, n, d = q.shape
    m = k.shape[2]
    q, k, v = q.double(), k.double(), v.double()
    scale = d**-0.5 if scale is None else scale
    out = torch.zeros(b, heads, n, v.shape[-1], dtype=torch.float64)
    for i in range(b):
        for head in range(heads):
            for row in range(n):
                scores = (k[i, head] * q[i, head, row]).sum(-1) * scale  # [m]
                weights = torch.exp(scores)
                if bias is not None:
                    row_bias = bias.expand(b, heads, n, m)[i, head, row]
                    weights = (
                        weights * row_bias
                        if bias.dtype == torch.bool
                        else torch.exp(scores + row_bias.double())
                    )
                if weights.sum() > 0:
                    out[i, head, row] = (weights / weights.sum()) @ v[i, head]
    return out


BIASES = {
    "none": None,
    "full": draw(2, 3, 5, 7, seed=4),
    "per head": draw(3, 5, 7, seed=4),
    "per key": draw(2, 1, 1, 7, seed=4),
    "mask over keys": torch.tensor([[1, 1, 0, 1, 0, 1, 1], [0, 1, 1, 1, 1, 1, 0]], dtype=torch.bool)[
        :, None, None
    ],
    "mask that leaves a query nothing": torch.ones(5, 7, dtype=torch.bool).index_fill(
        0, torch.tensor([2]), False
    ),
}


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("kernel", RUNS_HERE)
def test_every_kernel_that_runs_here_is_softmax_attention(kernel, bias):
    q, k, v = qkv()
    for scale in (None, 1.0, 0.3):
        heads = attend(q, k, v, bias=BIASES[bias], scale=scale, kernel=kernel)
        torch.testing.assert_close(heads, slow(q, k, v, BIASES[bias], scale).float(), atol=2e-6, rtol=0)


@given(
    b=st.integers(1, 3),
    heads=st.integers(1, 4),
    n=st.integers(1, 9),
    m=st.integers(1, 9),
    d=st.integers(1, 8),
    biased=st.booleans(),
)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_kernels_agree_for_odd_shapes(b, heads, n, m, d, biased):
    q, k, v = qkv(b, heads, n, m, d)
    bias = draw(heads, n, m, seed=5) if biased else None
    torch.testing.assert_close(
        attend(q, k, v, bias=bias), attend(q, k, v, bias=bias, kernel="math"), atol=2e-6, rtol=0
    )


def test_bfloat16_kernels_stay_within_bfloat16_rounding():
    q, k, v = qkv(dtype=torch.bfloat16)
    expected = slow(q, k, v, BIASES["per head"])
    for kernel in ("math", "sdpa"):
        heads = attend(q, k, v, bias=BIASES["per head"], kernel=kernel)
        assert heads.dtype == torch.bfloat16
        torch.testing.assert_close(heads.double(), expected, atol=2e-2, rtol=0)


def test_split_and_merge_undo_each_other_and_keep_each_head_together():
    x = torch.arange(24.0).reshape(1, 2, 12)
    split = split_heads(x, 3)
    assert split.shape == (1, 3, 2, 4)
    assert split[0, 1, 0].tolist() == [4, 5, 6, 7]
    assert torch.equal(merge_heads(split), x)


@pytest.mark.parametrize("repeat", [1, 2, 30])
@pytest.mark.parametrize("kernel", ["math", "sdpa"])
def test_a_last_key_that_stands_for_many_equals_many_keys(kernel, repeat):
    q, k, v = qkv()
    many_k, many_v = (
        torch.cat([k[:, :, :-1], *[k[:, :, -1:]] * repeat], 2),
        torch.cat([v[:, :, :-1], *[v[:, :, -1:]] * repeat], 2),
    )
    torch.testing.assert_close(
        attend(q, k, v, kernel=kernel, repeat=repeat), slow(q, many_k, many_v).float(), atol=2e-6, rtol=0
    )
    assert torch.equal(repeat_last(k, repeat), many_k)


def test_repeated_keys_in_bfloat16_are_repeated_in_fact():
    q, k, v = qkv(dtype=torch.bfloat16)
    assert torch.equal(attend(q, k, v, repeat=9), attend(q, repeat_last(k, 9), repeat_last(v, 9)))


def test_looking_at_folded_keys_shows_every_row_and_changes_no_bit():
    holder, (q, k, v) = Holder(), qkv()

    def run():
        folded_k, folded_v, repeat = tap_repeated(holder.tap, k, v, 6)
        return attend(q, folded_k, folded_v, tap=holder.tap, repeat=repeat)

    plain = run()
    with capture(holder, "k", "probs", "heads") as seen:
        assert torch.equal(run(), plain)
    assert seen["k"].shape == (2, 3, 12, 4) and torch.equal(seen["k"][:, :, -1], k[:, :, -1])
    assert seen["probs"].shape == (2, 3, 5, 12)
    torch.testing.assert_close(seen["probs"] @ repeat_last(v, 6), plain, atol=2e-6, rtol=0)

    def rows(k, where):
        assert k.shape[2] == 12
        return k

    def whole(attend, q, k, v, where):
        assert k.shape[2] == v.shape[2] == 12
        return attend(q, k, v)

    for name, edit in (("k", rows), ("scores", identity), ("attend", whole)):
        with patch(holder, name, edit):
            torch.testing.assert_close(run(), plain, atol=2e-6, rtol=0)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kernel", RUNS_HERE)
@pytest.mark.parametrize("prefix", ["", "image_"])
def test_capturing_probs_leaves_every_kernels_output_bit_identical(kernel, prefix):
    holder, (q, k, v) = Holder(prefix), qkv()
    plain = attend(q, k, v, tap=holder.tap, bias=BIASES["per head"], kernel=kernel, prefix=prefix)
    with capture(holder, prefix + "scores", prefix + "probs") as seen:
        looked = attend(q, k, v, tap=holder.tap, bias=BIASES["per head"], kernel=kernel, prefix=prefix)
    assert torch.equal(looked, plain)
    assert torch.equal(plain, attend(q, k, v, bias=BIASES["per head"], kernel=kernel))
    scores = torch.einsum("bhnd,bhmd->bhnm", q, k) / 2 + BIASES["per head"]
    torch.testing.assert_close(seen[prefix + "scores"], scores, atol=2e-6, rtol=0)
    torch.testing.assert_close(
        seen[prefix + "probs"], scores.exp() / scores.exp().sum(-1, keepdim=True), atol=2e-6, rtol=0
    )


@pytest.mark.parametrize("bias", BIASES)
def test_some_rows_and_heads_of_probs_are_those_of_the_whole(bias):
    holder, (q, k, v) = Holder(), qkv()
    with capture(holder, "probs") as whole, capture(holder, "probs", rows=[4, 0], heads=2) as part:
        attend(q, k, v, tap=holder.tap, bias=BIASES[bias])
    torch.testing.assert_close(part["probs"], whole["probs"][:, [2]][:, :, [4, 0]], atol=1e-6, rtol=0)


def test_asking_for_rows_never_forms_the_full_matrix():
    holder, q = Holder(), draw(1, 1, 3000, 2)
    largest = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            largest.extend(
                r.numel()
                for r in (result if isinstance(result, tuple) else (result,))
                if isinstance(r, torch.Tensor)
            )
            return result

    with capture(holder, "probs", rows=range(2)) as seen, Watch():
        attend(q, q, q, tap=holder.tap)
    assert seen["probs"].shape == (1, 1, 2, 3000)
    assert max(largest) < 3000 * 3000 / 100


def test_editing_probs_writes_attention_out():
    holder, (q, k, v) = Holder(), qkv()
    plain = attend(q, k, v, tap=holder.tap)
    with patch(holder, "probs", identity):
        written = attend(q, k, v, tap=holder.tap)
    assert torch.equal(written, attend(q, k, v, kernel="math"))
    torch.testing.assert_close(written, plain, atol=2e-6, rtol=0)
    with patch(holder, "probs", lambda probs, where: torch.full_like(probs, 1 / 7)):
        mean = attend(q, k, v, tap=holder.tap)
    torch.testing.assert_close(mean, v.mean(2, keepdim=True).expand_as(mean), atol=2e-6, rtol=0)


def test_a_kernel_of_ones_own_is_used():
    q, k, v = qkv()
    assert torch.equal(
        attend(q, k, v, kernel=lambda q, k, v, bias, scale: q * 0 + scale), torch.full_like(q, 0.5)
    )


def test_an_unknown_kernel_names_those_there_are():
    with pytest.raises(
        ValueError,
        match=r"no attention kernel 'sdp'; there are sdpa, math, flash, flex, sage, sage-math, sdpa-cudnn, "
        "sdpa-flash, sdpa-fa3, sdpa-fa4, sdpa-efficient, sdpa-math, or pass a function",
    ):
        attend(*qkv(), kernel="sdp")


def test_a_bias_that_does_not_fit_is_named():
    for kernel in KERNELS:
        with pytest.raises(
            ValueError,
            match=r"bias \[2, 7\] does not broadcast to \[2, 3, 5, 7\] \(b heads n m\); give a mask over "
            r"keys as \[b, 1, 1, m\]",
        ):
            attend(*qkv(), bias=torch.zeros(2, 7), kernel=kernel)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_attention_in_tiles_equals_attention_written_out(dtype):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 3, 1030, 8, dtype=dtype), *torch.randn(2, 2, 3, 1100, 8, dtype=dtype)
    exact = slow(q, k, v)
    tiled, fused = attend(q, k, v), torch.nn.functional.scaled_dot_product_attention(q, k, v)
    off, off_fused = ((x.double() - exact).square().mean().sqrt() for x in (tiled, fused))
    assert tiled.dtype == dtype and off <= 1.05 * off_fused + 1e-8
    q.requires_grad_()
    attend(q, k, v).sum().backward()  # a derivative takes the other way
    assert q.grad.isfinite().all()
