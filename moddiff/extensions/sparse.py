"""Who need not listen to whom?  Attention that leaves out pairs of tokens by where they lie in the film.

A film of n tokens has n * n pairs, and most of a long film's time goes into them. `sparse` computes those
that a pattern keeps. A pattern is a function (query, key, grid) -> bool of the numbers of two tokens, written
with operations on each pair alone: so flex attention can ask it for whole tiles, and pass by the empty ones.
Guide: guides/kernels.md
"""

import inspect
import math
import threading
from functools import partial

import torch

from ..attention import attend
from ..dit import DiT
from ..dit.block import SelfAttention
from ..hooks import position
from ..kernels import check_choice, flex_function
from .compile import compiled_inside, replaced
from .promises import Extension, expect, extension, layers, whole_number


@extension
def sparse(dit, pattern, dense_blocks=0, dense_steps=0, **how):
    """A dit whose tokens listen only to those that a pattern keeps.   -> the component; approximate

    pattern       "sliding", "radial", or a function (query, key, grid) -> bool, True: the query may look
    dense_blocks  how many of the first blocks listen to everything
    dense_steps   how many of the first steps do
    how           the pattern's own numbers, such as time=1 or decay=0.5

    With kernel "flex" on a GPU only tiles with a pair in them are computed. Every other kernel that takes a
    mask gets one of [tokens, tokens], which gives the same result and saves nothing; so it is on a CPU.

    `report()` says of each call which share of all pairs was kept. Raises ValueError for a pattern or number
    that there is none of, attention that another extension has changed, and a kernel that takes no mask.
    """
    expect("dit", dit, "sparse")
    function = PATTERNS.get(pattern, pattern) if isinstance(pattern, str) else pattern
    if not callable(function):
        raise ValueError(
            f"sparse(pattern={pattern!r}); there are {', '.join(PATTERNS)}, or pass a function "
            "(query, key, grid) -> bool"
        )
    for name, count in {"dense_blocks": dense_blocks, "dense_steps": dense_steps}.items():
        whole_number("sparse", name, count)
    if others := replaced(dit):
        raise ValueError(f"sparse narrows attention, and {dit!r} has its own ({others}); leave one out")
    if compiled_inside(dit):
        raise ValueError(f"sparse changes the attention of {dit!r}, which is compiled; leave one out")
    if not (models := layers(dit, DiT)):
        raise ValueError(f"sparse narrows the attention of a dit of ours; {type(dit).__name__} arrived")
    kept = Kept(checked_pattern(function, how), dense_steps)
    for model in models.values():
        model.register_forward_pre_hook(kept.go_to, with_kwargs=True)
        dense = {block.self_attn for block in model.blocks[:dense_blocks]}
        for module in model.modules():
            if isinstance(module, SelfAttention) and module not in dense:
                module.listen, module.biased = Narrowed(kept, module), True
                check_choice(module, module.kernel)
    share = max(1 - dense_blocks / len(model.blocks), 0)
    return Sparse(dit, kept, share)


def checked_pattern(function, how):
    """The pattern with its numbers, once it was asked about a film of one token.

    Raises ValueError for numbers that it does not take, and where that token may not look at itself.
    """
    takes = list(inspect.signature(function).parameters)[3:]
    try:
        inspect.signature(function).bind(None, None, None, **how)
    except TypeError as error:
        raise ValueError(f"sparse: {error}; the pattern takes {', '.join(takes) or 'no numbers'}") from error
    pattern, token = partial(function, **how), torch.zeros(1, dtype=torch.long)
    may = pattern(token, token, (1, 1, 1))
    if not torch.is_tensor(may) or may.dtype != torch.bool or not may.all():
        raise ValueError(
            f"sparse: with {how} the pattern says {may} where one token looks at itself; expected a bool "
            "tensor, true there"
        )
    return pattern


class Sparse(Extension):
    """See `sparse`.  share: of the blocks that are narrowed"""

    def __init__(self, wraps, kept, share):
        super().__init__(wraps, exact=False)
        self.kept, self.share = kept, share

    def forward(self, *inputs, **options):
        velocity = self.wraps(*inputs, **options)
        if not velocity.is_meta:  # a forecast of memory has no numbers to count
            density = 1.0 if self.kept.dense() else self.kept.density(velocity.device)
            kept = 1 - self.share * (1 - density)
            self.memory.note(step=position().get("step"), branch=position().get("branch"), kept=kept)
        return velocity


class Kept:
    """Which pairs of tokens are kept, in a film of the size that is computed just now.

    pattern      (query, key, grid) -> bool
    dense_steps  the first ones, in which all are
    """

    def __init__(self, pattern, dense_steps):
        self.pattern, self.dense_steps = pattern, dense_steps
        self._now, self._made = threading.local(), {}

    def __deepcopy__(self, memo):
        return Kept(self.pattern, self.dense_steps)

    def go_to(self, dit, inputs, options):
        """Before each forward of a dit: how many tokens are there along time, height and width?"""
        x = options["x"] if "x" in options else inputs[0]
        self._now.grid = tuple(size // patch for size, patch in zip(x.shape[2:], dit.config.patch_size))

    def dense(self):
        return position().get("step", self.dense_steps) < self.dense_steps

    def density(self, device):
        """The share of all pairs that is kept, a number from 0 to 1."""
        return self._of_this_size("density", device, self._density)

    def mask(self, device):
        """True where a query may look.   -> bool [tokens, tokens]"""
        return self._of_this_size("mask", device, self._mask)

    def tiles(self, device):
        """The same for flex attention: which tiles of 128 queries and keys have a pair in them."""
        return self._of_this_size("tiles", device, self._tiles)

    def _of_this_size(self, what, device, make):
        """What was made for a film of this size; that of the last few others stays, too."""
        key = what, device, self._now.grid
        if key not in self._made:
            self._made = dict(list(self._made.items())[-5:]) | {key: make(device, self._now.grid)}
        return self._made[key]

    def _rows(self, device, grid):
        """The mask, some queries at a time: its numbers take more memory than itself."""
        tokens = torch.arange(math.prod(grid), device=device)
        for queries in tokens.split(1024):
            rows = self.pattern(queries[:, None], tokens, grid).expand(len(queries), len(tokens))
            if device.type != "meta" and not (seeing := rows.any(1)).all():
                blind = int(queries[~seeing][0])
                raise ValueError(f"the pattern lets token {blind} of a film of {grid} tokens look nowhere")
            yield rows

    def _density(self, device, grid):
        mask = self._made.get(("mask", device, grid))
        parts = self._rows(device, grid) if mask is None else [mask]
        return float(sum(rows.sum() for rows in parts) / math.prod(grid) ** 2)

    def _mask(self, device, grid):
        return torch.cat(list(self._rows(device, grid)))

    def _tiles(self, device, grid):
        from torch.nn.attention.flex_attention import create_block_mask

        def may(batch, head, query, key):
            return self.pattern(query, key, grid)

        n = math.prod(grid)
        self.density(device)  # which raises where a token would look nowhere
        return create_block_mask(may, None, None, n, n, device=device, _compile=device.type == "cuda")


class Narrowed:
    """In the place of SelfAttention.listen."""

    def __init__(self, kept, attention):
        self.kept, self.attention = kept, attention

    def __call__(self, q, k, v):
        tap, kernel = self.attention.tap, self.attention.kernel
        if self.kept.dense():
            return attend(q, k, v, tap=tap, kernel=kernel)
        mask = None
        if kernel != "flex" or tap.live is not None:  # for whoever looks, flex or not, the scores are masked
            mask = self.kept.mask(q.device)
        if kernel == "flex":
            kernel = partial(flex_tiles, self.kept.tiles(q.device))
        return attend(q, k, v, tap=tap, bias=mask, kernel=kernel)


def flex_tiles(tiles, q, k, v, bias, scale):
    """A kernel: flex attention over the tiles that are not empty. The bias says the same, and is not read."""
    return flex_function(compiled=q.is_cuda)(q, k, v, block_mask=tiles, scale=scale)


# ---- patterns: (query, key, grid) -> bool, of the numbers of two tokens, width fastest --------------------


def sliding(query, key, grid, time=1, space=2):
    """A window that goes with the query: `time` frames, `space` rows and columns to each side; None: all."""
    near = torch.ones_like(query - key, dtype=torch.bool)
    for mine, other, reach in zip(cell(query, grid), cell(key, grid), (time, space, space)):
        if reach is not None:
            near = near & ((mine - other).abs() <= reach)
    return near


def radial(query, key, grid, decay=1.0, block=128):
    """The farther in time, the narrower: as the distance doubles, what a pair of frames may spend halves.

    Of two frames, d apart, with n tokens each, are kept

        d = 0  all pairs
        d = 1  those whose places are at most n // 2 apart
        d > 1  those at most decay * reach apart, where reach = 2 ** (bits of n) / 2 ** (bits of d); never
               fewer than `block` apart: where reach is less than that, the band stays as wide as a block and
               only every (block / reach)-th frame is kept

    and all look at the first frame. A place is the number of a token within its frame, so a band of places is
    some whole rows. Source: Li et al. 2025, Radial Attention, and its code for Wan, whose kernel then rounds
    the pattern to tiles of `block` tokens.
    """
    frames, tokens = grid[0], grid[1] * grid[2]
    frame, other = query // tokens, key // tokens
    distance, apart = (frame - other).abs(), (query % tokens - key % tokens).abs()
    halvings = sum((distance >= 2**k).long() for k in range(frames.bit_length()))  # the bits of the distance
    reach = 2.0 ** tokens.bit_length() / 2.0**halvings
    band = apart <= (decay * reach).clamp(min=block)
    one_in = (block / reach).long().clamp(min=1)
    far = band & (distance % one_in == 0)
    near = (distance == 1) & (apart <= tokens // 2)
    return (distance == 0) | near | (far & (distance > 1)) | (other == 0)


PATTERNS = {"sliding": sliding, "radial": radial}


def cell(token, grid):
    """The frame, row and column of a token."""
    _, height, width = grid
    return token // (height * width), token // width % height, token % width
