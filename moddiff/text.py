"""What does the model hear of my prompt?  Clean text, tokens, and UMT5, which turns them into vectors."""

import html
import math
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from reprlib import repr as brief

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from .attention import attend, attention_taps, merge_heads, split_heads
from .hooks import Taps
from .linear import Embedding, Linear
from .remembered import Remembered


def clean(prompt):
    """The prompt as the tokenizer wants it: encodings repaired, HTML entities read, white space made single.

    Entities are read twice, because scraped captions are often escaped twice. Case is kept.
    """
    prompt = re.sub(r"#\d{4000,}", "#", prompt)  # no letter has such a number, and Python does not read it
    import ftfy  # a tenth of what importing torch takes; not everybody who imports us reads a prompt

    prompt = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return re.sub(r"\s+", " ", prompt).strip()


class Tokenizer:
    """Prompts to token ids, by the `tokenizer.json` of a folder, such as google/umt5-xxl's.

    path      the folder, or the file itself
    text_len  most tokens per prompt, the end token included; longer prompts lose their tail, never that
    model     a tokenizers.Tokenizer that was found in another kind of file, which `path` then names

    Raises FileNotFoundError where there is no such file, ValueError where it cannot be read or has no end
    token `</s>`.
    """

    def __init__(self, path, text_len=512, model=None):
        self.path, self.text_len = Path(path), text_len
        if self.path.is_dir() and model is None:
            self.path /= "tokenizer.json"
        if text_len < 1:
            raise ValueError(
                f"text_len is {text_len}; expected 1 or more, since the end token is always kept"
            )
        self.model = _read(self.path) if model is None else model
        self.end = self.model.token_to_id("</s>")
        self.pad = self.model.token_to_id("<pad>") or 0
        if self.end is None:
            raise ValueError(f"the tokenizer at {self.path} has no end token </s>; is it a UMT5 tokenizer?")

    def ids(self, prompt):
        """The token ids of one prompt, cleaned and cut to text_len, the end token last.   str -> [int]

        Raises TypeError for what is not a str, ValueError for one that is not text.
        """
        return [*self.uncut(prompt)[: self.text_len - 1], self.end]

    def uncut(self, prompt):
        """The ids of the whole prompt, without an end token.   str -> [int]"""
        _check_prompt(prompt)
        # The file's own end token would be cut off with the tail of a long prompt.
        return self.model.encode(clean(prompt), add_special_tokens=False).ids

    def tokens(self, prompt):
        """What the ids stand for.   str -> [(id, piece)], where a piece that starts a word begins with '▁'"""
        return [(i, self.model.id_to_token(i)) for i in self.ids(prompt)]

    def batch(self, prompts, length=None):
        """Several prompts side by side, padded.   [str] -> ids [b, l], mask [b, l], True at real tokens

        l is `length`, or the longest prompt's own. Raises ValueError where that one does not fit.
        """
        rows = [self.ids(prompt) for prompt in as_list(prompts)]
        longest = max(map(len, rows), default=0)
        length = longest if length is None else length
        if length < longest:
            raise ValueError(
                f"a prompt has {longest} tokens, which do not fit in length={length}; give a larger one, "
                f"or text_len={length}"
            )
        ids = torch.full((len(rows), length), self.pad)
        mask = torch.zeros(len(rows), length, dtype=torch.bool)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = True
        return ids, mask

    def __len__(self):
        return self.model.get_vocab_size()

    def __repr__(self):
        return f"Tokenizer({str(self.path)!r}, text_len={self.text_len}): {len(self)} pieces"


def _read(path):
    if not path.is_file():
        raise FileNotFoundError(
            f"no tokenizer at {path}; expected a folder that holds tokenizer.json (for the released Wan "
            "models: google/umt5-xxl), or that file itself"
        )
    import tokenizers  # as late as ftfy

    try:
        model = tokenizers.Tokenizer.from_buffer(path.read_bytes())
    except ValueError as error:
        raise ValueError(
            f"{path} is not a tokenizer.json ({error}); was its download cut off? fetch it again"
        ) from error
    # A file may carry its own padding and truncation, which would hide the true lengths.
    model.no_padding()
    model.no_truncation()
    return model


def _check_prompt(prompt):
    if not isinstance(prompt, str):
        raise TypeError(f"a prompt must be a str, but this one is {type(prompt).__name__}: {brief(prompt)}")
    half = re.search("[\ud800-\udfff]", prompt)
    if half:
        raise ValueError(
            f"a prompt has {half[0]!a} at place {half.start()}, half a letter; it was read from something "
            "that is not UTF-8: read it again with the right encoding"
        )


@dataclass(frozen=True)
class TextConfig:
    """Sizes of a UMT5 encoder.

    vocab, dim    pieces, and the width of the vector of each
    dim_attn      the width of all heads together; it need not be `dim`
    num_buckets   distances that are told apart, the far ones up to max_dist in groups
    shared_pos    one bias table for all layers, as in T5; False in UMT5
    text_len      most tokens per prompt
    """

    vocab: int
    dim: int
    dim_attn: int
    dim_ffn: int
    num_heads: int
    num_layers: int
    num_buckets: int = 32
    max_dist: int = 128
    shared_pos: bool = False
    eps: float = 1e-6
    text_len: int = 512

    def __post_init__(self):
        if self.dim_attn % self.num_heads:
            raise ValueError(
                f"dim_attn={self.dim_attn} cannot be split into num_heads={self.num_heads}; expected a "
                "multiple"
            )
        if self.num_buckets % 4 or self.max_dist <= self.num_buckets // 4:
            raise ValueError(
                f"num_buckets={self.num_buckets}, max_dist={self.max_dist}: expected a multiple of 4 "
                "buckets, and a max_dist above a quarter of them"
            )
        if self.shared_pos:
            raise ValueError(
                "shared_pos=True is T5, where all layers share one relative bias; Wan's UMT5 has a table per "
                "layer: shared_pos=False"
            )


class RMSNorm(nn.Module):
    """x / rms(x) * weight.   Source: Zhang & Sennrich 2019.

    x is divided in float32 and rounded to the weight's dtype before the product, as T5 was trained. (The
    DiT's own norm of queries and keys rounds once, after the product.) The stream of a T5 grows into the
    thousands, so float16 could not hold its squares.
    """

    def __init__(self, dim, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        mean_square = x.float().square().mean(-1, keepdim=True)
        x = x * torch.rsqrt(mean_square + self.eps)  # float32, whatever x is
        return x.to(self.weight.dtype) * self.weight


def bucket(offset, num_buckets=32, max_dist=128):
    """Which bias a distance gets: exact when near, ever coarser when far, one bucket for all beyond max_dist.

    offset  integer tensor  key position minus query position
    ->      same shape      0 .. num_buckets - 1; the upper half is for keys that come after the query

    Source: Raffel et al. 2020 (T5), section 2.1.
    """
    half, exact = num_buckets // 2, num_buckets // 4
    near = offset.abs()
    # From `exact` to max_dist the bucket grows with the logarithm: each one is wider than the one before.
    far = torch.log(near.clamp(min=exact).float() / exact) / math.log(max_dist / exact)  # 0 to 1
    coarse = (exact + (far * (half - exact)).long()).clamp(max=half - 1)
    return half * (offset > 0) + torch.where(near < exact, near, coarse)


class Attention(nn.Module):
    """Every token listens to every other; how far apart they are adds a learned bias to the score.

    UMT5 does not divide the scores by sqrt(d): that factor is left to the weights.
    """

    biased = True  # some kernels take none, and say so when they are chosen

    def __init__(self, config):
        super().__init__()
        self.num_heads, self.kernel = config.num_heads, "sdpa"
        self.q, self.k, self.v = (Linear(config.dim, config.dim_attn, bias=False) for _ in range(3))
        self.out = Linear(config.dim_attn, config.dim, bias=False)
        self.relative_bias = nn.Embedding(config.num_buckets, config.num_heads)
        self.tap = attention_taps(bias="b heads n m")
        # This is where the missing 1 / sqrt(d) is: queries begin that much smaller.
        nn.init.normal_(self.q.weight, std=(config.dim * config.dim_attn / config.num_heads) ** -0.5)
        for layer in (self.k, self.v, self.out):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
        nn.init.normal_(self.relative_bias.weight, std=(2 * config.num_buckets * config.num_heads) ** -0.5)

    def forward(self, x, buckets, mask=None):
        """x [b, n, c], buckets [n, m], mask [b, m], True at what may be listened to -> [b, n, c]"""
        q = self.tap("q", split_heads(self.q(x), self.num_heads))  # [b, heads, n, d]
        k = self.tap("k", split_heads(self.k(x), self.num_heads))
        v = self.tap("v", split_heads(self.v(x), self.num_heads))
        bias = rearrange(self.relative_bias(buckets), "n m heads -> 1 heads n m")
        bias = self.tap("bias", bias).to(q.dtype)
        if mask is not None:
            # Lowest finite value instead of -inf, so that a row with no key at all stays a number.
            bias = bias.masked_fill(~mask[:, None, None, :], torch.finfo(bias.dtype).min)  # [b, heads, n, m]
        heads = attend(q, k, v, tap=self.tap, bias=bias, scale=1.0, kernel=self.kernel)
        return self.tap("out", self.out(merge_heads(heads)))  # [b, n, c]


class FeedForward(nn.Module):
    """down(up(x) * gelu(gate(x))).   Source: Shazeer 2020, "GLU variants improve transformer"."""

    def __init__(self, config):
        super().__init__()
        self.gate = Linear(config.dim, config.dim_ffn, bias=False)
        self.up = Linear(config.dim, config.dim_ffn, bias=False)
        self.down = Linear(config.dim_ffn, config.dim, bias=False)
        for layer in (self.gate, self.up, self.down):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)

    def forward(self, x):
        return self.down(self.up(x) * F.gelu(self.gate(x), approximate="tanh"))


class Layer(nn.Module):
    """x + attention, then x + feed-forward, each on a normalised copy of the stream."""

    def __init__(self, config):
        super().__init__()
        self.norm_attn = RMSNorm(config.dim, config.eps)
        self.attn = Attention(config)
        self.norm_ffn = RMSNorm(config.dim, config.eps)
        self.ffn = FeedForward(config)
        self.tap = Taps(resid_pre="b n c", resid_mid="b n c", ffn="b n c", resid_post="b n c")

    def forward(self, x, buckets, mask=None):
        x = self.tap("resid_pre", x)
        x = x + self.attn(self.norm_attn(x), buckets, mask)
        x = self.tap("resid_mid", fit_half(x))
        x = x + self.tap("ffn", self.ffn(self.norm_ffn(x)))
        return self.tap("resid_post", fit_half(x))


def fit_half(x):
    """x, brought back into range where float16 has overflowed.

    UMT5 was trained in bfloat16, and its stream leaves float16's 65,504 here and there. Room is left above
    the clamp for what the next branch adds.
    """
    if x.dtype != torch.float16 or not x.isinf().any():
        return x
    most = torch.finfo(torch.float16).max - 1000
    return x.clamp(-most, most)


class TextEncoder(nn.Module):
    """UMT5: a T5 encoder whose every layer has its own relative bias.

    config     TextConfig
    tokenizer  a Tokenizer, or the folder of one; needed by `encode` and `tokens` only
    dim        the width of the vectors that `encode` gives

    Source: Chung et al. 2023, "UniMax"; Raffel et al. 2020 (T5). Guide: guides/text.md
    """

    def __init__(self, config, tokenizer=None):
        super().__init__()
        self.config, self.dim = config, config.dim
        self.token_embedding = Embedding(config.vocab, config.dim)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.dim, config.eps)
        self.tokenizer = tokenizer
        self.remembered = Remembered()

    def forward(self, ids, mask=None):
        """Hidden states, gradients included.

        ids   [b, l]     token ids
        mask  [b, l]     1 at real tokens, 0 at padding, which nobody hears; None: all are real
        ->    [b, l, d]  rows at padded places are computed too, and mean nothing

        Raises ValueError for ids that are not [b, l] integers below `vocab`, or another mask.
        """
        self._check(ids, mask)
        mask = None if mask is None else mask.bool()
        # Every layer has a table of its own, but a distance falls into the same bucket in all of them.
        position = torch.arange(ids.shape[1], device=ids.device)
        offsets = position[None, :] - position[:, None]  # [n, m], from each query to each key
        buckets = bucket(offsets, self.config.num_buckets, self.config.max_dist)
        x = self.token_embedding(ids)  # [b, l, d]
        for layer in self.layers:
            x = layer(x, buckets, mask)
        return self.norm(x)

    @torch.no_grad()
    def encode(self, prompts):
        """What the video model reads: hidden states of the real tokens only, without gradients.

        prompts  a list of str, or one str
        ->       list of [l, d], one per prompt, l its own number of tokens, the end token included

        Each prompt runs alone and unpadded, so that its company cannot change it. Raises TypeError for
        what is not text, ValueError for text that is not UTF-8 or an encoder without a tokenizer.
        """
        device = self.token_embedding.weight.device
        device = "cpu" if device.type == "meta" else device  # an offloader moves the ids itself
        ids = [torch.tensor([self.tokenizer.ids(prompt)], device=device) for prompt in as_list(prompts)]
        # The same to the bit as computing it again, as long as nothing in here changed and nobody looks.
        return [self.remembered(self, tuple(row[0].tolist()), partial(self.read, row)) for row in ids]

    def read(self, ids):
        """[1, l] -> [l, d]"""
        return self(ids)[0]

    def tokens(self, prompt):
        """The pieces the prompt is cut into.   str -> [(id, piece)], one for each row of `encode`"""
        return self.tokenizer.tokens(prompt)

    def counts(self, prompt):
        """How much of a prompt is read.   str -> (tokens read, tokens there are), without the end token"""
        return len(self.tokenizer.ids(prompt)) - 1, len(self.tokenizer.uncut(prompt))

    @property
    def tokenizer(self):
        """The Tokenizer in use.  Raises ValueError when there is none."""
        if self._tokenizer is None:
            raise ValueError(
                "this text encoder has no tokenizer; give it one: text.tokenizer = Tokenizer(folder with "
                "tokenizer.json)"
            )
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer):
        if isinstance(tokenizer, (str, Path)):
            tokenizer = Tokenizer(tokenizer, self.config.text_len)
        if tokenizer is not None and len(tokenizer) > self.config.vocab:
            raise ValueError(
                f"the tokenizer knows {len(tokenizer)} pieces but the text encoder has vectors for "
                f"{self.config.vocab}; take the tokenizer that came with these weights"
            )
        if tokenizer is not None and tokenizer.text_len != self.config.text_len:
            raise ValueError(
                f"the tokenizer keeps text_len={tokenizer.text_len} tokens but the config says "
                f"{self.config.text_len}; make them equal"
            )
        self._tokenizer = tokenizer

    def _check(self, ids, mask):
        if not torch.is_tensor(ids) or ids.ndim != 2 or ids.dtype not in (torch.int64, torch.int32):
            arrived = f"{list(ids.shape)} of {ids.dtype}" if torch.is_tensor(ids) else type(ids).__name__
            raise ValueError(
                f"ids are {arrived}; expected [b, l] integers, as Tokenizer.batch(prompts) gives; "
                "for prompts as they are: encode(prompts)"
            )
        if mask is not None and tuple(mask.shape) != tuple(ids.shape):
            raise ValueError(
                f"mask is {list(mask.shape)} but ids are {list(ids.shape)}; expected one mask entry per token"
            )
        if ids.is_meta or torch.compiler.is_compiling() or not ids.numel():
            return
        if ids.min() < 0 or ids.max() >= self.config.vocab:
            raise ValueError(
                f"ids run from {ids.min()} to {ids.max()}; expected 0 to {self.config.vocab - 1}: was "
                "another tokenizer used?"
            )


def as_list(prompts):
    """One prompt or several, as a list.   Raises TypeError for what is neither."""
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, (list, tuple)):
        raise TypeError(
            "prompts must be a str or a list of str, but arrived as "
            f"{type(prompts).__name__}: {brief(prompts)}"
        )
    return prompts
