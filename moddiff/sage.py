"""How few bits do the scores need?  SageAttention written out in torch: int8 scores, smoothed keys."""

import torch

QUERIES, KEYS = 128, 64  # rows that share one scale
E4M3_MAX = 448.0  # the largest number of fp8 e4m3


def sage_math(q, k, v, bias=None, scale=None, *, smooth=True, values="fp16"):
    """Attention whose scores are products of int8 numbers, and whose values are fp16 or fp8.

    q [b, heads, n, d]   k, v [b, heads, m, d]   bias as in `attention.attend`   ->   [b, heads, n, d]

    smooth  subtract the mean key first. It adds the same number to all scores of a query, so the softmax
            does not change; but what all keys have in common no longer uses up the 255 steps of int8.
    values  "fp16", or "fp8" (e4m3, a scale per channel, as SageAttention2)

    It shows what is lost, at no gain in speed: a GPU multiplies the integers as such, here they are floats
    (exact: 127 * 127 * d stays below 2 ** 24 up to d = 1040). Raises ValueError (unknown values).
    Source: Zhang et al., SageAttention; fp8 values: SageAttention2.
    """
    if values not in ("fp16", "fp8"):
        raise ValueError(f'values are "fp16" or "fp8", got {values!r}')
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    keys = k.float()
    if smooth:
        keys = keys - keys.mean(-2, keepdim=True)
    q8, q_step = to_int8(q.float() * scale, QUERIES)
    k8, k_step = to_int8(keys, KEYS)
    scores = (q8 @ k8.mT) * q_step * k_step.mT  # [b, heads, n, m]
    if bias is not None:
        hidden = torch.zeros((), device=q.device).masked_fill(~bias, float("-inf")) if is_mask(bias) else bias
        scores = scores + hidden.float()

    # The running softmax of a fused kernel: weights up to 1, divided by their sum only at the end.
    highest = scores.amax(-1, keepdim=True)
    weights = (scores - highest.masked_fill(highest == float("-inf"), 0)).exp()
    total = weights.sum(-1, keepdim=True)
    heads = weighted(weights, v.float(), values) / total.masked_fill(total == 0, 1)  # nobody heard: zeros
    return heads.to(q.dtype)


def is_mask(bias):
    return bias.dtype == torch.bool


def to_int8(x, block):
    """Whole numbers from -127 to 127 and, for each row, the step of its block.   x [..., rows, d]"""
    steps = []
    for rows in x.split(block, dim=-2):
        step = rows.abs().amax((-2, -1), keepdim=True) / 127
        steps.append(step.expand(*rows.shape[:-1], 1))
    step = torch.cat(steps, -2)  # [..., rows, 1]
    return (x / step.masked_fill(step == 0, 1)).round(), step


def weighted(weights, v, values):
    """weights @ v, both rounded to the type of the values, summed in float32."""
    if values == "fp16":
        return weights.half().float() @ v.half().float()
    step = v.abs().amax(-2, keepdim=True) / E4M3_MAX  # [..., 1, d]
    v8 = (v / step.masked_fill(step == 0, 1)).to(torch.float8_e4m3fn).float()
    w8 = (weights * E4M3_MAX).to(torch.float8_e4m3fn).float()
    return (w8 @ v8) * step / E4M3_MAX
