"""Is SageAttention written out what the paper's formulas say, and is its error that of its rounding?"""

import json
from pathlib import Path

import numpy as np
import pytest
import sage as figure
import torch

import moddiff
from moddiff.attention import attend, kernel_named
from moddiff.sage import sage_math
from moddiff.tiny import world

GUIDES = Path(__file__).parents[1] / "guides"
FACTS = json.loads((GUIDES / "figures" / "sage.json").read_text(encoding="utf-8"))


def qkv(n, m, d, common=0.0):
    made = torch.Generator().manual_seed(n * 1000 + m)
    q, k, v = (torch.randn(1, 2, rows, d, generator=made) for rows in (n, m, m))
    return q, k + common * torch.randn(1, 2, 1, d, generator=made), v


def by_blocks(q, k, v, mask, smooth):
    """The paper's formulas for one head, block by block, in numpy; rounded to int8 from float32."""
    d = q.shape[-1]
    k = k - k.mean(0) if smooth else k
    out = np.zeros((len(q), d))
    for i in range(0, len(q), 128):
        rows = q[i : i + 128] * np.float32(d**-0.5)
        q_step = np.abs(rows).max() / np.float32(127)
        scores = []
        for j in range(0, len(k), 64):
            block = k[j : j + 64]
            k_step = np.abs(block).max() / np.float32(127) or np.float32(1)  # one key less its mean is zero
            products = np.rint(rows / q_step).astype(float) @ np.rint(block / k_step).astype(float).T
            scores.append(products * float(q_step) * float(k_step))
        scores = np.where(mask[None], np.concatenate(scores, 1), -np.inf)
        weights = np.exp(scores - scores.max(1, keepdims=True))
        rounded = weights.astype(np.float16).astype(float) @ v.astype(np.float16).astype(float)
        out[i : i + 128] = rounded / weights.sum(1, keepdims=True)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n, m, d", [(1, 1, 4), (5, 7, 8), (130, 67, 16), (129, 200, 12)])
@pytest.mark.parametrize("smooth", [True, False])
def test_it_equals_the_papers_formulas(n, m, d, smooth, dtype):
    q, k, v = (x.to(dtype) for x in qkv(n, m, d, common=2.0))
    mask = torch.arange(m) < max(1, m - 3)
    out = sage_math(q, k, v, mask.view(1, 1, 1, m), smooth=smooth)
    assert out.dtype == dtype
    # The same int8 numbers; then each weight may fall one fp16 step away (2 ** -10, 2 ** -24 near 0),
    # and the mean of the values moves by no more than that; last the rounding to the type of the inputs.
    step = 2**-10 + m * 2**-24 + torch.finfo(dtype).eps
    for head in range(2):
        arrays = (x[0, head].float().numpy() for x in (q, k, v))
        expected = torch.from_numpy(by_blocks(*arrays, mask.numpy(), smooth))
        worst = (out[0, head].double() - expected).abs().amax(-1)  # of each row
        assert (worst <= step * v[0, head].abs().max()).all()


def test_smoothing_pays_where_keys_have_much_in_common():
    q, k, v = qkv(90, 150, 32, common=20.0)
    exact = attend(q.double(), k.double(), v.double(), kernel="math")
    smoothed = (sage_math(q, k, v) - exact).abs().mean()
    plain = (sage_math(q, k, v, smooth=False) - exact).abs().mean()
    assert smoothed < plain / 3


@pytest.mark.parametrize("smooth", [True, False])
def test_fp8_values_cost_no_more_than_their_rounding(smooth):
    q, k, v = qkv(90, 150, 32)
    off = sage_math(q, k, v, smooth=smooth, values="fp8") - sage_math(q, k, v, smooth=smooth)
    # e4m3 keeps three bits after the first: 2 ** -4 of a weight and of a value, and 2 ** -10 / 448 of the
    # largest one near zero. fp16 on the other side: 2 ** -10.
    relative, near_zero = 2**-3 + 2**-8 + 2**-10, (150 + 1) * 2**-10 / 448
    bound = relative * sage_math(q, k, v.abs(), smooth=smooth) + near_zero * v.abs().max()
    assert (off.abs() <= bound).all()
    assert off.abs().max() > 2**-9 * v.abs().max()  # and they are rounded to fp8


def test_a_query_that_may_look_nowhere_gets_zeros_and_a_name_chooses_it():
    q, k, v = qkv(3, 4, 8)
    assert kernel_named("sage-math") is sage_math
    assert (
        attend(q, k, v, bias=torch.zeros(1, 1, 3, 4, dtype=torch.bool), kernel="sage-math").abs().max() == 0
    )


def test_other_values_are_refused():
    with pytest.raises(ValueError, match="int4"):
        sage_math(*qkv(2, 2, 4), values="int4")


# ---- the figures of guides/kernels.md --------------------------------------------------------------------


def test_the_guide_has_the_tables_of_the_file():
    guide = (GUIDES / "kernels.md").read_text(encoding="utf-8")
    for table in figure.tables(FACTS):
        assert table in guide
    assert f"-n {FACTS['prompts']} -o guides/figures/sage.json" in guide
    assert {(row["block"], row["step"]) for row in FACTS["model"]} == {
        (block, step) for block in range(8) for step in figure.STEPS
    }


def test_a_fresh_look_at_the_tiny_model_agrees_with_the_file():
    """One prompt, two steps: each block within half of what the median prompt had, together within 15 %."""
    with torch.no_grad():
        fresh = figure.of_the_model(
            moddiff.load("tiny-t2v"), world.prompts(1, split="heldout"), steps=(0, 19)
        )
    kept = {(row["block"], row["step"]): row for row in FACTS["model"]}
    for way in (*figure.WAYS, "common"):
        shares = [row[way] / kept[row["block"], row["step"]][way] for row in fresh]
        assert len(shares) == 16 and all(1 / 1.5 < share < 1.5 for share in shares), way
        assert np.median(shares) == pytest.approx(1, abs=0.15), way


@pytest.mark.parametrize("common", figure.COMMON)
def test_random_keys_agree_with_the_file(common):
    for way, error in figure.of_random_numbers(common).items():
        assert error == pytest.approx(FACTS["random"][str(common)][way], rel=0.05), way


def test_smoothing_does_nothing_for_the_tiny_model_and_much_for_keys_alike():
    """What the guide says of its table."""
    gains = [row["as they are"] / row["smoothed"] for row in FACTS["model"]]
    assert 0.9 < min(gains) and max(gains) < 1.1 and max(row["common"] for row in FACTS["model"]) < 1
    made = FACTS["random"]
    assert made["30"]["as they are"] > 10 * made["30"]["smoothed"]
    assert made["30"]["smoothed"] == pytest.approx(made["0"]["smoothed"], rel=0.02)


def test_films_on_file_are_judged_and_compared():
    frames = np.full((2, 4, 4, 3), 100, dtype=np.uint8)
    prompts = world.prompts(1, split="heldout")
    row = figure.judged([frames + 1], [frames], prompts)
    assert row["psnr"] == pytest.approx(48.13, abs=0.01) and row["obeyed"] == 0
    assert figure.judged([frames], [frames], prompts)["psnr"] is None
    assert set(FACTS["films"]) == {"sdpa", *figure.WAYS}
