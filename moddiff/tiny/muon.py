"""How are the tiny models optimised?  Muon for matrices and kernels, AdamW for the rest.

Muon (Jordan et al. 2024) replaces a matrix's momentum by the nearest matrix with equal singular values, so
that every direction of a layer learns at one pace. torch.optim.Muon takes 2-D parameters only; this one also
takes kernels, flattened to [out, rest], and orthogonalises all matrices of one shape in one batch, which is
what makes it affordable on a CPU.
"""

from collections import defaultdict
from contextlib import nullcontext
from functools import cache
from timeit import repeat
from typing import NamedTuple

import torch
import torch.distributed as dist


class Recipe(NamedTuple):
    """How a stage is optimised.

    muon, adam  learning rates
    ema         how much of the averaged weights is kept at each step
    embeddings  words in the names of parameters that go to AdamW although they are matrices
    """

    muon: float
    adam: float
    ema: float
    embeddings: tuple[str, ...] = ()


@cache
def half_pays():
    """Does this CPU multiply bfloat16 matrices faster than float32 ones?

    Some do so twice as fast, some a hundred times slower.
    """
    full = torch.randn(512, 512)
    half = full.bfloat16()
    seconds = [min(repeat(lambda m=m: m @ m, number=1, repeat=5)) for m in (half, full)]
    return seconds[0] < 0.8 * seconds[1]


def computes_in_half(device):
    """Are matrices multiplied in bfloat16 there?  On a GPU always, on a CPU that is faster in it."""
    return device.type == "cuda" or (device.type == "cpu" and half_pays())


def fast(device):
    """Forward passes in bfloat16 where that is faster; weights, losses and averages stay in float32."""
    return torch.autocast(device.type, torch.bfloat16) if computes_in_half(device) else nullcontext()


def orthogonalise(g, steps=5):
    """The nearly orthogonal matrix nearest to each g, by a quintic Newton-Schulz iteration.

    [k, rows, columns] -> the same
    """
    tall = g.shape[1] > g.shape[2]
    x = g.mT if tall else g
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    # The iteration forgives rounding: its limit is a band of singular values around 1, not a point.
    x = x.bfloat16() if computes_in_half(x.device) else x
    for _ in range(steps):
        a = x @ x.mT  # [k, rows, rows]
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x.mT if tall else x).to(g.dtype)


def orthogonalise_together(g):
    """As `orthogonalise`; where several processes train one model, each does a share for all."""
    if not dist.is_initialized():
        return orthogonalise(g)
    whole, mine = torch.zeros_like(g), slice(dist.get_rank(), None, dist.get_world_size())
    whole[mine] = orthogonalise(g[mine])
    dist.all_reduce(whole)  # a sum: where one has its share, all others have zeros
    return whole


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised, and scaled to the size of an Adam step.

    The size is lr * 0.2 * sqrt(max(out, rest)) * max(1, out / rest)^0.5.
    """

    def __init__(self, parameters, lr, momentum=0.95):
        super().__init__(parameters, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for p in group["params"]:
                if p.grad is None:
                    continue
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - group["momentum"])
                nesterov = torch.lerp(p.grad, momentum, group["momentum"])
                by_shape[p.shape[0], p[0].numel()].append((p, nesterov.flatten(1)))
            for (out, rest), entries in by_shape.items():
                updates = orthogonalise_together(torch.stack([g for _, g in entries]))
                size = 0.2 * max(out, rest) ** 0.5 * max(1, out / rest) ** 0.5
                for (p, _), update in zip(entries, updates):
                    p.sub_(update.view_as(p), alpha=group["lr"] * size)


def optimisers(model, recipe):
    """[Muon for every parameter with two or more axes, AdamW for the rest and for `recipe.embeddings`], or
    one of the two, where the other has nothing to do."""
    matrices, rest = [], []
    for name, p in model.named_parameters():
        matrix = p.squeeze().ndim >= 2 and not any(word in name for word in recipe.embeddings)
        if p.requires_grad:
            (matrices if matrix else rest).append(p)
    muon = [Muon(matrices, lr=recipe.muon)] if matrices else []
    adam = [torch.optim.AdamW(rest, lr=recipe.adam, betas=(0.9, 0.99), weight_decay=0.0)] if rest else []
    return muon + adam
