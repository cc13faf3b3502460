"""How does the text encoder run on a Mac?  UMT5 through mlx, from the same files, with the same numbers.

text.py written once more, under the same names, with Apple's arrays in the place of torch's: on a Mac they
lie in the memory that processor and GPU share. What text.py says about UMT5 is not said again here. Weights
are found, read, renamed and checked by weights/, and only then handed over, one matrix at a time.

mlx has a build for processors under Linux, too, with which the tests compare the two. **No Mac was at hand:
nothing here has been run on one**, and no figure is known of its speed there.
"""

import hashlib
import platform
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from ..fingerprints import fingerprint
from ..hooks import Taps
from ..linear import dense
from ..text import TextEncoder as InTorch
from ..text import as_list, bucket
from ..weights import as_dtype
from ..weights.loading import ALIASES
from ..weights.releases import open_release
from ..weights.single import with_files

try:
    import mlx.core as mx
except ImportError as error:  # an extra; the first encoder that is made says so
    mx, absent = None, error

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BITS, GROUPS = (4, 8), (32, 64, 128)  # of those that mlx can, the ones that are used
LIKE = "wan2.1-t2v-1.3b"  # a single file is a part of some Wan, all of which share one text encoder


# ---- between the two ---------------------------------------------------------------------------------


def to_mlx(x):
    """A copy of a torch tensor as an mlx array.   numpy stands between them, and has no bfloat16"""
    x = x.detach().cpu()
    if x.dtype == torch.bfloat16:
        return mx.array(x.view(torch.int16).numpy()).view(mx.bfloat16)
    return mx.array(x.numpy())


def to_torch(x):
    """A copy of an mlx array as a torch tensor, in main memory.   mlx is lazy: here it has to compute"""
    if x.dtype == mx.bfloat16:
        return torch.from_numpy(np.array(x.view(mx.int16))).view(torch.bfloat16)
    return torch.from_numpy(np.array(x))


def show(tap, name, x):
    """x, or what somebody who looks puts in its place; see hooks.   Nothing is computed if nobody looks."""
    if not tap.watched(name):
        return x
    seen = to_torch(x)
    given = tap(name, seen)
    return x if given is seen else to_mlx(given.to(seen.dtype))


@dataclass(frozen=True)
class Form:
    """How weights are kept: a torch dtype; with `bits`, matrices as whole numbers in groups of a row, each of
    which has a scale and an offset in that dtype."""

    dtype: torch.dtype
    bits: int | None = None
    group_size: int = 64


# ---- the model, as in text.py --------------------------------------------------------------------------


class Linear:
    """x W^T.   layer: ours, whatever its weight is kept as"""

    def __init__(self, layer, form):
        weight = to_mlx(dense(layer, form.dtype))
        self.how = {"bits": form.bits, "group_size": form.group_size} if form.bits else None
        self.kept = mx.quantize(weight, **self.how) if form.bits else (weight,)  # numbers, scales, offsets
        mx.eval(self.kept)  # now, so that the dense matrix is let go before the next one is read

    def __call__(self, x):
        if self.how:
            return mx.quantized_matmul(x, *self.kept, transpose=True, **self.how)
        return x @ self.kept[0].T


class Embedding(Linear):
    """Some rows of a matrix, of which only these are ever expanded."""

    def __call__(self, ids):
        rows = [x[ids] for x in self.kept]
        return mx.dequantize(*rows, **self.how) if self.how else rows[0]


class RMSNorm:
    def __init__(self, norm, form):
        self.eps, self.weight = norm.eps, to_mlx(norm.weight.to(form.dtype))

    def __call__(self, x):
        mean_square = x.astype(mx.float32).square().mean(-1, keepdims=True)
        x = x * mx.rsqrt(mean_square + self.eps)  # float32, whatever x is
        return x.astype(self.weight.dtype) * self.weight


class Attention:
    """Written out, without a fused kernel: of UMT5's work at 512 tokens, attention is 2 in 100 parts."""

    def __init__(self, attn, form):
        self.num_heads = attn.num_heads
        self.q, self.k, self.v, self.out = (Linear(x, form) for x in (attn.q, attn.k, attn.v, attn.out))
        self.relative_bias = to_mlx(attn.relative_bias.weight.to(form.dtype))  # [buckets, heads]
        layouts = dict(attn.tap.layouts)
        del layouts["attend"]  # a torch function in its place could do nothing with these arrays
        self.tap = Taps(**layouts)

    def __call__(self, x, buckets, mask=None):
        """x [b, n, c], buckets [n, m], mask [b, m], True at what may be listened to -> [b, n, c]"""
        q = show(self.tap, "q", self.split(self.q(x)))  # [b, heads, n, d]
        k = show(self.tap, "k", self.split(self.k(x)))
        v = show(self.tap, "v", self.split(self.v(x)))
        bias = self.relative_bias[buckets].transpose(2, 0, 1)[None]
        bias = show(self.tap, "bias", bias)
        if mask is not None:
            bias = mx.where(mask[:, None, None, :], bias, mx.finfo(bias.dtype).min)  # [b, heads, n, m]
        # In float32, as inside torch's kernels: without 1 / sqrt(d) scores are large, and 16 bits coarse.
        scores = q.astype(mx.float32) @ k.astype(mx.float32).swapaxes(-1, -2) + bias
        probs = mx.softmax(show(self.tap, "scores", scores), axis=-1).astype(q.dtype)
        heads = show(self.tap, "heads", show(self.tap, "probs", probs) @ v)
        return show(self.tap, "out", self.out(heads.swapaxes(1, 2).reshape(*x.shape[:2], -1)))

    def split(self, x):
        """[b, n, heads * d] -> [b, heads, n, d]"""
        return x.reshape(*x.shape[:2], self.num_heads, -1).swapaxes(1, 2)


class FeedForward:
    def __init__(self, ffn, form):
        self.gate, self.up, self.down = (Linear(x, form) for x in (ffn.gate, ffn.up, ffn.down))

    def __call__(self, x):
        return self.down(self.up(x) * gelu(self.gate(x)))


def gelu(x):
    """By way of tanh, in float32, rounded once."""
    wide = x.astype(mx.float32)
    inner = (2 / np.pi) ** 0.5 * (wide + 0.044715 * wide**3)
    return (0.5 * wide * (1 + mx.tanh(inner))).astype(x.dtype)


class Layer:
    def __init__(self, layer, form):
        self.norm_attn, self.norm_ffn = RMSNorm(layer.norm_attn, form), RMSNorm(layer.norm_ffn, form)
        self.attn, self.ffn = Attention(layer.attn, form), FeedForward(layer.ffn, form)
        self.tap = Taps(**layer.tap.layouts)
        self.components = {"attn": self.attn}  # by which hooks find the taps inside

    def __call__(self, x, buckets, mask=None):
        x = show(self.tap, "resid_pre", x)
        x = x + self.attn(self.norm_attn(x), buckets, mask)
        x = show(self.tap, "resid_mid", fit_half(x))
        x = x + show(self.tap, "ffn", self.ffn(self.norm_ffn(x)))
        return show(self.tap, "resid_post", fit_half(x))


def fit_half(x):
    """As in text.py; asked of the array without waiting for it."""
    if x.dtype != mx.float16:
        return x
    most = mx.finfo(x.dtype).max - 1000
    return mx.where(mx.isinf(x).any(), mx.clip(x, -most, most), x)


class TextEncoder:
    """UMT5 in mlx: plays the role "text", takes and gives torch tensors, and equals text.TextEncoder.

    where       a folder of released weights, official or Diffusers'; "tiny"; one file of a text encoder
                (safetensors, .pth, GGUF, fp8 too, an index of shards); or a text.TextEncoder
    dtype       "bf16", "fp32" or "fp16", to compute in; None: what torch would take from the same files
    bits        4 or 8: matrices are kept in so many, and the table of tokens; None: as `dtype` says
    group_size  how many numbers of a row share a scale: 32, 64 or 128. Fewer: more exact, and larger
    tokenizer   the folder of a tokenizer.json, for a file that brings none

    In float32 it differs from ours by less than 1e-4. In float16 the stream is brought back into range where
    it overflows, as ours is. Each prompt runs alone, in its own length.

    Its taps have our names (`layers.3.attn.probs`), and capture and patch work, on torch copies of the
    values. Two things do not: the function `attend` cannot be exchanged, and there are no gradients. mlx puts
    work off until it is asked for; looking asks for it, so it costs time, and changes nothing.

    Raises ModuleNotFoundError without mlx, ValueError for a dtype, bits or group size that there is not,
    CheckpointError and WeightsError as moddiff.load: no text encoder, damaged files, weights not read.
    """

    def __init__(self, where, dtype=None, bits=None, group_size=64, tokenizer=None):
        dtype = check(dtype, bits, group_size)
        source, usual = (where, None) if isinstance(where, InTorch) else read(where, tokenizer)
        check_groups(source.config, bits, group_size)
        self.form = form = Form(dtype or usual or source.token_embedding.weight.dtype, bits, group_size)
        self.where = type(where).__name__ if where is source else str(where)
        self.config, self.dim, self._tokenizer = source.config, source.dim, source._tokenizer
        self.token_embedding = Embedding(source.token_embedding, form)
        self.layers = [Layer(layer, form) for layer in source.layers]
        self.norm = RMSNorm(source.norm, form)
        self.components = {f"layers.{i}": layer for i, layer in enumerate(self.layers)}

    def __call__(self, ids, mask=None):
        """Hidden states, as text.TextEncoder.   torch ids [b, l], mask [b, l] -> torch [b, l, d]"""
        self._check(ids, mask)
        position = torch.arange(ids.shape[1])
        offsets = position[None, :] - position[:, None]  # [n, m], from each query to each key
        buckets = to_mlx(bucket(offsets, self.config.num_buckets, self.config.max_dist))
        mask = None if mask is None else to_mlx(mask.bool())
        x = self.token_embedding(to_mlx(ids))  # [b, l, d]
        for layer in self.layers:
            x = layer(x, buckets, mask)
        return to_torch(self.norm(x))

    def encode(self, prompts):
        """Hidden states of the real tokens.   [str] -> list of torch [l, d], one per prompt"""
        return [self(torch.tensor([self.tokenizer.ids(prompt)]))[0] for prompt in as_list(prompts)]

    # What is about prompts, and about no number, is ours as it is.
    tokens, counts, tokenizer, _check = InTorch.tokens, InTorch.counts, InTorch.tokenizer, InTorch._check

    @property
    def fingerprint(self):
        """What caches and servers know this model by: its numbers as they are kept, sizes and tokenizer."""
        words = [repr(self.config), self._numbers]
        if self._tokenizer is not None:
            words.append(self._tokenizer.model.to_str())
        return hashlib.blake2b("\0".join(words).encode(), digest_size=8).hexdigest()

    @cached_property
    def _numbers(self):
        return " ".join(fingerprint(to_torch(x)) for x in arrays(self))

    def __repr__(self):
        kept = str(self.form.dtype).removeprefix("torch.")
        if self.form.bits:
            kept += f", bits={self.form.bits}, group_size={self.form.group_size}"
        return f"mlx.TextEncoder({self.where!r}, dtype={kept})"


def arrays(part):
    """All arrays of a part of the model, in order."""
    if isinstance(part, mx.array):
        yield part
    elif isinstance(part, list | tuple):
        for each in part:
            yield from arrays(each)
    elif type(part).__module__ == __name__:
        yield from arrays(list(vars(part).values()))


# ---- where it comes from ---------------------------------------------------------------------------------


def read(where, tokenizer=None):
    """Ours, its weights mapped and as stored.   -> (text encoder, the dtype its release runs in, or None)"""
    if not isinstance(where, str | Path):
        raise TypeError(
            f"where is a {type(where).__name__}; expected a folder, a file, a name such as 'tiny', or a "
            "text.TextEncoder"
        )
    if Path(where).expanduser().is_file():
        release = with_files(open_release(LIKE), {"text": where}, tokenizer)
    else:
        release = open_release(ALIASES.get(str(where), where))
    text = release.load("text")
    if tokenizer is not None:
        text.tokenizer = tokenizer
    return text, as_dtype(release.dtype)


def check(dtype, bits, group_size):
    """The dtype as torch's.   Raises for what mlx cannot, before anything is read"""
    if mx is None:
        extra = "mlx" if platform.system() == "Darwin" else "mlx[cpu]"
        raise ModuleNotFoundError(
            f"the text encoder in mlx needs mlx, which cannot be imported here ({absent}); run: pip install "
            f"'moddiff[mlx]' (in a clone: pip install -e '.[mlx]'), which brings {extra}"
        ) from absent
    dtype = as_dtype(dtype)
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype is {dtype}; mlx computes in float32, bfloat16 or float16")
    if bits not in (None, *BITS):
        raise ValueError(f"bits={bits!r}; expected 4 or 8, or None for weights in full")
    if group_size not in GROUPS:
        raise ValueError(f"group_size={group_size!r}; expected 32, 64 or 128, as mlx has them")
    return dtype


def check_groups(config, bits, group_size):
    """Raise ValueError for matrices whose rows are no whole groups."""
    rows = {name: getattr(config, name) for name in ("dim", "dim_attn", "dim_ffn")}
    odd = [f"{name}={width}" for name, width in rows.items() if width % group_size]
    if bits and odd:
        raise ValueError(
            f"bits={bits} needs rows of whole groups of {group_size}, and this text encoder has "
            f"{', '.join(odd)}; take a smaller group_size that divides them, or bits=None"
        )
