"""What do the hook tests run on?  A small transformer, its forward written again by hand, and a loop."""

import pytest
import torch
from torch import nn

from moddiff.attention import attend, attention_taps, merge_heads, split_heads
from moddiff.hooks import Taps, at

HEADS, WIDTH, BLOCKS = 4, 16, 3


class Attention(nn.Module):
    def __init__(self, kernel="sdpa"):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.tap, self.kernel = attention_taps(), kernel

    def forward(self, x):
        q, k, v = (split_heads(layer(x), HEADS) for layer in (self.q, self.k, self.v))
        heads = attend(self.tap("q", q), self.tap("k", k), self.tap("v", v), tap=self.tap, kernel=self.kernel)
        return self.tap("out", self.out(merge_heads(heads)))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.mlp = Attention(), nn.Linear(WIDTH, WIDTH)
        self.tap = Taps(resid_pre="b n c", resid_mid="b n c", resid_post="b n c")

    def forward(self, x):
        x = self.tap("resid_pre", x)
        x = self.tap("resid_mid", x + self.attn(x))
        return self.tap("resid_post", x + self.mlp(x).tanh())


class Toy(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Pipe:
    """As small as a pipeline can be: two branches a step, and values of its own to look at."""

    def __init__(self, dit=None, steps=4):
        self.components, self.count = {"dit": Toy() if dit is None else dit}, steps
        self.tap = Taps(
            **{"x": "b n c", "velocity.cond": "b n c", "velocity.uncond": "b n c", "velocity": "b n c"}
        )

    @property
    def dit(self):
        return self.components["dit"]

    def __call__(self, seed=0):
        return list(self.steps(seed))[-1]

    @torch.no_grad()
    def steps(self, seed=0):
        x = noise(seed)
        for i in range(self.count):
            with at(step=i, sigma=1 - i / self.count):
                x = self.tap("x", x)
                with at(branch="cond"):
                    cond = self.tap("velocity.cond", self.dit(x))
                with at(branch="uncond"):
                    uncond = self.tap("velocity.uncond", self.dit(-x))
                x = x - 0.1 * self.tap("velocity", uncond + 2 * (cond - uncond))
            yield x


def noise(seed=0, b=2, n=6):
    return torch.randn(b, n, WIDTH, generator=torch.Generator().manual_seed(seed))


def by_hand(toy, x, edit=None):
    """Toy's forward without a single line of moddiff: everything by matmul and softmax.

    edit(name, value, block) may replace a value.
    """
    edit = edit or (lambda name, value, block: value)
    for i, block in enumerate(toy.blocks):
        b, n, c = x.shape
        x = edit("resid_pre", x, i)
        q, k, v = (
            (x @ layer.weight.T + layer.bias).reshape(b, n, HEADS, c // HEADS).transpose(1, 2)
            for layer in (block.attn.q, block.attn.k, block.attn.v)
        )
        scores = edit("scores", q @ k.transpose(2, 3) / (c // HEADS) ** 0.5, i)
        probs = edit("probs", torch.exp(scores) / torch.exp(scores).sum(-1, keepdim=True), i)
        heads = edit("heads", probs @ v, i)
        x = x + edit(
            "out", heads.transpose(1, 2).reshape(b, n, c) @ block.attn.out.weight.T + block.attn.out.bias, i
        )
        x = edit("resid_post", x + torch.tanh(x @ block.mlp.weight.T + block.mlp.bias), i)
    return x


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-6 * max(1, float(b.detach().abs().max())), rtol=0)


def opened(session, run):
    """A body for `message`: the run under the session."""

    def body():
        with session:
            run()

    return body


def message(error, body):
    """The text of the error that the body raises."""
    with pytest.raises(error) as caught:
        body()
    return str(caught.value)
