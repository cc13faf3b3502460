"""What does an adapter add to a weight?  The families: LoRA, LoHa, LoKr, plain differences; DoRA on top.

Each is a change dW to one weight W of a layer, [out, in] or a convolution's [out, in, *kernel], kept in fewer
numbers than W has:

    LoRA        dW = alpha / rank  up down             up [out, rank], down [rank, in]
    LoHa        dW = alpha / rank  (a1 b1) * (a2 b2)   two LoRAs, multiplied number by number: rank up to r^2
    LoKr        dW = alpha / rank  kron(w1, w2)        each number of w1 times all w2, both full or products
    difference  dW as it is                            the whole matrix, as `.diff` holds it
    DoRA        W' = m (W + dW) / |W + dW|             one of these, then each row brought to length m

Sources: Hu et al. 2021 (LoRA), Hyeon-Woo et al. 2021 (LoHa), Yeh et al. 2023 (LoKr, in LyCORIS), Liu et al.
2024 (DoRA). There is a trap in DoRA: |W + dW| is the length after the change, not that of W.
"""

import math

import torch
from torch import nn

from ..linear import product


class Change(nn.Module):
    """A change to one weight, at strength 1: a plain difference, or one of the families below.

    tensors  {part: tensor}, by the names that the family has for them
    shape    of the weight
    alpha    None: there was none, and alpha / rank is then taken for 1
    """

    family, rank = "difference", None
    needs = ({"diff"},)  # one of these sets of parts

    def __init__(self, tensors, shape, alpha=None):
        super().__init__()
        self.shape, self.alpha = tuple(shape), alpha
        for name, x in tensors.items():
            self.register_parameter(name, nn.Parameter(x, requires_grad=False))

    @property
    def scale(self):
        """alpha / rank, by which the product is multiplied."""
        return 1.0 if self.alpha is None or self.rank is None else self.alpha / self.rank

    def part(self, name):
        """One of its tensors in float32, or None."""
        x = self._parameters.get(name)
        return None if x is None else x.float()

    def raw(self):
        """dW without its scale; a convolution's may still be flat, [out, in * kernel]."""
        return self.part("diff")

    def delta(self):
        """dW in float32, shaped as the weight."""
        return self.scale * self.raw().reshape(self.shape)

    def forward(self, x):
        """x dW^T, in the dtype of x, where W is a matrix."""
        return product(x, self.delta().to(x.dtype))


class LoRA(Change):
    """dW = scale up down: x goes through `rank` numbers on its way, so the matrix itself is never made."""

    family, needs = "LoRA", ({"down", "up"}, {"down", "up", "mid"})
    rank = property(lambda self: self.down.shape[0])

    def raw(self):
        up, down, mid = self.part("up").flatten(1), self.part("down").flatten(1), self.part("mid")
        # A convolution may come in three: channels, kernel, channels.
        return up @ down if mid is None else torch.einsum("op,pq...,qi->oi...", up, mid, down)

    def forward(self, x):
        narrow = product(x, self.down.to(x.dtype))  # [..., rank]
        return self.scale * product(narrow, self.up.to(x.dtype))


class LoHa(Change):
    """dW = scale (a1 b1) * (a2 b2)"""

    family, needs = "LoHa", ({"w1_a", "w1_b", "w2_a", "w2_b"}, {"w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2"})
    rank = property(lambda self: self.w1_b.shape[0])

    def raw(self):
        return self._pair("w1_a", "w1_b", "t1") * self._pair("w2_a", "w2_b", "t2")

    def _pair(self, a, b, core):
        a, b, core = self.part(a), self.part(b), self.part(core)
        # LyCORIS's Tucker form of a convolution: a core [rank, rank, *kernel], and a is then [rank, out].
        return a @ b.flatten(1) if core is None else torch.einsum("ij...,jr,ip->pr...", core, b, a)


class LoKr(Change):
    """dW = scale kron(w1, w2). Two full factors have no rank, and alpha then says nothing."""

    family = "LoKr"
    needs = tuple(
        first | second
        for first in ({"w1"}, {"w1_a", "w1_b"})
        for second in ({"w2"}, {"w2_a", "w2_b"}, {"w2_a", "w2_b", "t2"})
    )

    @property
    def rank(self):
        # w2 first: w1 is small, and nearly always whole.
        ranks = [self._parameters[name].shape[0] for name in ("w2_b", "w1_b") if name in self._parameters]
        return ranks[0] if ranks else None

    def raw(self):
        w1 = self.part("w1")
        w1 = self.part("w1_a") @ self.part("w1_b") if w1 is None else w1
        w2, a, b, core = (self.part(name) for name in ("w2", "w2_a", "w2_b", "t2"))
        if core is not None:
            w2 = torch.einsum("ij...,jr,ip->pr...", core, b, a)
        elif w2 is None:
            w2 = (a @ b.flatten(1)).unflatten(1, b.shape[1:])
        # kron asks for as many axes: w1 has none for a convolution's kernel.
        w1 = w1.reshape(*w1.shape, *[1] * (w2.ndim - w1.ndim))
        return torch.kron(w1, w2.contiguous())


FAMILIES = {"lora": LoRA, "hada": LoHa, "lokr": LoKr, "full": Change}


def change_for(family, tensors, shape, alpha=None):
    """One change, once its tensors are seen to fit the weight.

    family   a key of FAMILIES;  the rest as in Change
    Raises ValueError in words that begin with what arrived.
    """
    kind = FAMILIES[family]
    if set(tensors) not in kind.needs:
        lacking = sorted(min((need - set(tensors) for need in kind.needs), key=len))
        odd = sorted(set(tensors) - set().union(*kind.needs))
        raise ValueError(
            f"{kind.family} with {', '.join(sorted(tensors))}"
            + f", which lacks {', '.join(lacking)}" * bool(lacking)
            + f", which has no place for {', '.join(odd)}" * bool(odd)
        )
    sizes = ", ".join(f"{name} {list(x.shape)}" for name, x in tensors.items())
    flat = (shape[0], math.prod(shape[1:]))
    try:  # the same computation without the numbers, for its shape
        made = tuple(kind({name: x.to("meta") for name, x in tensors.items()}, shape).raw().shape)
    except (RuntimeError, IndexError) as error:
        raise ValueError(f"{kind.family} of {sizes}, which do not fit each other") from error
    if made not in (tuple(shape), flat) or not all(x.numel() for x in tensors.values()):
        raise ValueError(f"{kind.family} of {sizes}, a change to a weight {list(made)}")
    return kind(tensors, shape, alpha)


def gain(weight, change, magnitude):
    """DoRA's factors m / |W + dW|, and the axis that they lie along.   -> [out], 0; or [in], 1

    weight     the layer's, dense
    magnitude  [out] (PEFT), [out, 1, ...] or [1, in, ...] (LyCORIS, which has had both)
    """
    whole = weight.detach().float() + change.delta().detach()
    along_in = magnitude.ndim > 1 and magnitude.shape[0] == 1 and magnitude.shape[1] == change.shape[1]
    # PEFT's of a convolution is [1, out, 1, 1, 1].
    axis = int(along_in and not (magnitude.ndim == 5 and change.shape[0] == magnitude.shape[1]))
    if magnitude.numel() != change.shape[axis]:
        raise ValueError(
            f"DoRA lengths {list(magnitude.shape)}; expected one for each of {change.shape[0]} rows"
        )
    length = torch.linalg.vector_norm(whole, dim=[i for i in range(whole.ndim) if i != axis])
    return magnitude.float().flatten() / length.clamp(min=torch.finfo(torch.float32).tiny), axis


def fresh(shape, rank, alpha, generator):
    """A LoRA that changes nothing yet: `down` random, `up` zero, both to be trained."""
    # Hu et al.'s code says kaiming_uniform_(a=sqrt(5)), which comes to this bound.
    bound = 1 / math.sqrt(shape[1])
    down = (torch.rand(rank, shape[1], generator=generator) * 2 - 1) * bound
    change = LoRA({"down": down, "up": torch.zeros(shape[0], rank)}, shape, float(alpha))
    return change.requires_grad_(True)
