"""Who listens to whom?  Softmax attention, written out and through fused kernels."""

import math
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch.utils.flop_counter import register_flop_formula

from .hooks import Taps
from .kernels import BACK_ENDS, back_end, check_choice, flash_package, flex_kernel, sage_package
from .linear import onednn, product
from .sage import sage_math


def split_heads(x, heads):
    """[b, n, heads * d] -> [b, heads, n, d]"""
    return rearrange(x, "b n (heads d) -> b heads n d", heads=heads)


def merge_heads(x):
    """[b, heads, n, d] -> [b, n, heads * d]"""
    return rearrange(x, "b heads n d -> b n (heads d)")


def attend(q, k, v, *, tap=None, bias=None, scale=None, kernel="sdpa", prefix="", repeat=1):
    """softmax(q k^T * scale + bias) v: a mean of the values, each weighted by how well its key fits the
    query.

    q       [b, heads, n, d]
    k, v    [b, heads, m, d]
    bias    broadcasts to [b, heads, n, m]; added to the scores, or boolean: True where a query may look.
            A query that may look nowhere gets zeros.
    scale   float, by default d ** -0.5 (UMT5 uses 1)
    kernel  a name of KERNELS ("sdpa", "math", ...), or a function (q, k, v, bias, scale) -> heads
    repeat  a number, or a tensor of one: the last key and value stand for this many equal ones
    ->      [b, heads, n, d]

    On `tap` it shows `<prefix>scores`, `<prefix>probs`, `<prefix>heads`; the whole may be swapped at
    `<prefix>attend`. Looking at scores or probs computes them beside the kernel, which still makes the
    output; editing them writes it out. Raises ValueError (bias that does not fit the shapes or the kernel,
    unknown kernel), ImportError (kernel not installed). Source: Vaswani et al. 2017, eq. 1. Guide:
    guides/attention.md
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    check_bias(bias, q, k)
    if tap is None or tap.live is None:  # nobody looks
        return run_kernel(q, k, v, bias, scale, kernel, repeat)

    # Somebody does. Unless they also edit, the output stays the same to the bit.
    scores, probs, whole = prefix + "scores", prefix + "probs", prefix + "attend"
    if folded(repeat) and tap.edited(scores, probs, whole):  # an editor gets every row
        k, v, repeat = repeat_last(k, repeat), repeat_last(v, repeat), 1

    def original(q, k, v):
        if tap.edited(scores, probs):
            return probs_of(q, k, scale, bias, tap, prefix) @ v
        if tap.watched(scores, probs):
            keys = repeat_last(k, repeat)
            shape = (*q.shape[:-1], keys.shape[-2])
            tap.beside(scores, shape, q.dtype, partial(some_of, scores_of, q, keys, scale, bias))
            tap.beside(probs, shape, q.dtype, partial(some_of, probs_of, q, keys, scale, bias))
        return run_kernel(q, k, v, bias, scale, kernel, repeat)

    return tap(prefix + "heads", tap.call(whole, original, q, k, v))


def run_kernel(q, k, v, bias, scale, kernel, repeat=1):
    """The kernel of that name; the last key counts `repeat` times."""
    kernel = kernel_named(kernel)
    if not folded(repeat):
        return kernel(q, k, v, bias, scale)
    # In half precision log(repeat) is too coarse, and a bias keeps the fastest kernels out.
    if bias is not None or q.dtype.itemsize < 4:
        return kernel(q, repeat_last(k, repeat), repeat_last(v, repeat), bias, scale)
    return kernel(q, k, v, count_bias(k, repeat), scale)


def folded(repeat):
    """Does one row stand for several?  A count that is a tensor says so without being read."""
    return torch.is_tensor(repeat) or repeat > 1


def count_bias(k, repeat):
    """What makes the last key count `repeat` times: log(repeat) on its score.   k [b, heads, m, d] -> [1, m]

    exp(score + log(repeat)) = repeat * exp(score): the softmax over all the equal keys. The count may be a
    tensor, since it differs from prompt to prompt and a compiled model shall not be compiled for each.
    """
    log = torch.as_tensor(repeat, dtype=torch.float32, device="cpu").log()
    return F.pad(log.view(1, 1), (k.shape[-2] - 1, 0)).to(k.device)


def repeat_last(x, count):
    """The last row `count` times.   [b, heads, m, d] -> [b, heads, m - 1 + count, d]"""
    if not folded(count):
        return x
    return torch.cat([x, x[:, :, -1:].expand(-1, -1, int(count) - 1, -1)], 2)


def tap_repeated(tap, k, v, repeat):
    """Show keys and values whose last row stands for `repeat` equal ones, with every row.   -> k, v, repeat

    Looking leaves them folded, so the output does not change; an edit gets, and returns, all the rows.
    """
    if tap.live is None:
        return k, v, repeat
    if not folded(repeat) or tap.edited("k", "v"):
        return tap("k", repeat_last(k, repeat)), tap("v", repeat_last(v, repeat)), 1
    for name, x in (("k", k), ("v", v)):
        if tap.watched(name):
            every_row = repeat_last(x.detach(), repeat)
            tap.beside(name, every_row.shape, x.dtype, partial(_heads_and_rows, every_row))
    return k, v, repeat


def scores_of(q, k, scale, bias=None):
    """How well each key fits each query, before the softmax.   -> [b, heads, n, m]"""
    scores = q @ k.mT * scale  # [b, heads, n, m]
    if bias is None:
        return scores
    if bias.dtype == torch.bool:
        return scores.masked_fill(~bias, float("-inf"))
    return scores + bias.to(scores.dtype)


def probs_of(q, k, scale, bias=None, tap=None, prefix=""):
    """The attention probabilities, written out.

    q [b, heads, n, d]   k [b, heads, m, d]   ->   [b, heads, n, m]
    """
    scores = scores_of(q, k, scale, bias)
    if tap is not None:
        scores = tap(prefix + "scores", scores)
    probs = scores.float().softmax(-1).to(q.dtype)
    if bias is not None:  # the softmax of nothing but -inf is nan: such a query listens to nobody
        probs = probs.masked_fill((scores == float("-inf")).all(-1, keepdim=True), 0)
    return probs if tap is None else tap(prefix + "probs", probs)


def some_of(function, q, k, scale, bias, heads, rows):
    """scores_of or probs_of for some heads and query rows (None: all), so that the rest is never formed."""
    bias = None if bias is None else _heads_and_rows(bias, heads, rows)
    with torch.no_grad():
        return function(_heads_and_rows(q, heads, rows), _heads_and_rows(k, heads), scale, bias)


def _heads_and_rows(x, heads, rows=None):
    """Some heads and rows of x [b, heads, rows, any].

    An axis of size 1, or one that is not there, broadcasts.
    """
    x = x[(None,) * (4 - x.ndim)]
    if heads is not None and x.shape[1] > 1:
        x = x.index_select(1, heads.to(x.device))
    if rows is not None and x.shape[2] > 1:
        x = x.index_select(2, rows.to(x.device))
    return x


# the kernels: each (q, k, v, bias, scale) -> heads


def math_kernel(q, k, v, bias, scale):
    """Written out, as the paper has it."""
    return probs_of(q, k, scale, bias) @ v


def sdpa_kernel(q, k, v, bias, scale):
    """PyTorch's fused attention: the default. On a CPU, long sequences go through `attend_in_tiles`."""
    long = bias is None and q.shape[2] * k.shape[2] >= 2**20
    if long and onednn(q, k, v):
        return attend_in_tiles(q, k, v, scale)
    if bias is not None and bias.dtype != torch.bool:
        bias = bias.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)


@torch.library.custom_op("moddiff::attend_in_tiles", mutates_args=())  # one node for a compiler, not hundreds
def attend_in_tiles(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Attention written out in float32 for 256 queries of a head at a time, whose scores stay in the cache.

    Exact, and on one core of an AMD EPYC about twice as fast as the fused kernel, whose products are MKL's.
    """
    heads = torch.empty(q.shape, dtype=torch.float32)
    for b in range(q.shape[0]):
        for head in range(q.shape[1]):
            keys = k[b, head].float().contiguous()  # [m, d]
            values = v[b, head].float().t().contiguous()  # [d, m], for `product` turns its second one around
            for queries, out in zip(q[b, head].split(256), heads[b, head].split(256)):
                probs = product(queries.float() * scale, keys).softmax(-1)  # [256, m]
                out.copy_(product(probs, values))
    return heads.to(q.dtype)


@attend_in_tiles.register_fake
def _(q, k, v, scale):
    return torch.empty(q.shape, dtype=q.dtype)


@register_flop_formula(torch.ops.moddiff.attend_in_tiles)
def _(q_shape, k_shape, *others, **options):
    """For torch's counter of operations: scores and their use, n * m * d each, twice."""
    return 4 * math.prod(q_shape) * k_shape[2]


KERNELS = {
    "sdpa": sdpa_kernel,
    "math": math_kernel,
    "flash": flash_package,
    "flex": flex_kernel,
    "sage": sage_package,
    "sage-math": sage_math,
    **{name: back_end(name) for name in BACK_ENDS},  # "sdpa-cudnn" and its like
}
ALSO_CALLED = {"cudnn": "sdpa-cudnn", "efficient": "sdpa-efficient"}


def kernel_named(kernel):
    """The function behind a kernel's name; a function of one's own passes through."""
    if callable(kernel):
        return kernel
    name = ALSO_CALLED.get(kernel, kernel)
    if name not in KERNELS:
        raise ValueError(
            f"no attention kernel {kernel!r}; there are {', '.join(KERNELS)}, or pass a function "
            "(q, k, v, bias, scale) -> heads"
        )
    return KERNELS[name]


def use_kernel(model, kernel):
    """Let every attention inside a model run on that kernel: a name of KERNELS, or a function.   -> model

    Raises ValueError (unknown name, one that cannot run this model on this machine), ImportError (a package
    that it needs is missing).
    """
    kernel_named(kernel)  # an unknown name is an error now, not in the first forward
    if not callable(kernel):
        check_choice(model, ALSO_CALLED.get(kernel, kernel))
    for module in model.modules():
        if "kernel" in vars(module):
            module.kernel = kernel
    return model


def check_bias(bias, q, k):
    """Raise ValueError unless bias broadcasts to [b, heads, n, m]."""
    if bias is None:
        return
    full = (*q.shape[:-1], k.shape[-2])
    axes = zip(reversed(bias.shape), reversed(full))  # broadcasting goes from the last axis back
    if bias.ndim > 4 or any(size not in (1, want) for size, want in axes):
        raise ValueError(
            f"attention bias {list(bias.shape)} does not broadcast to {list(full)} (b heads n m); "
            "give a mask over keys as [b, 1, 1, m]"
        )


ATTENTION_LAYOUTS = dict(
    q="b heads n d",
    k="b heads m d",
    v="b heads m d",
    scores="b heads n m",
    probs="b heads n m",
    heads="b heads n d",
    out="b n c",
    attend="function",
)


def attention_taps(prefix="", **more):
    """The taps every attention shows; `prefix` names a second key/value pair, such as "image_".

    `more` adds or redeclares some.
    """
    return Taps(**{prefix + name: layout for name, layout in ATTENTION_LAYOUTS.items()} | more)
