"""How is a large picture decoded in a small memory?  In tiles that overlap, and are blended where they do."""

from itertools import chain, pairwise, tee

import torch

from .promises import Extension, expect, extension


@extension
def tiled(vae, size=(256, 256), overlap=(64, 64)):
    """A vae that encodes and decodes tile by tile.   -> the component; approximate

    size     (height, width) of a tile in pixels, multiples of the vae's stride
    overlap  (height, width) that neighbours share, in pixels; smaller than the size

    A tile does not see what is beyond its edge: near an edge it is wrong, as far as the convolutions look,
    and everywhere by what the attention in the middle misses. So the outer quarter of an overlap is not used
    at all, and the two tiles are mixed over the half between. A video no larger than a tile is exact.

    Raises ValueError for sizes that are no multiples of the stride, and an overlap as large as the tile.
    """
    expect("vae", vae, "tiled")
    stride = vae.stride[1:]
    for name, lengths, least in (("size", size, stride), ("overlap", overlap, (0, 0))):
        pair = isinstance(lengths, tuple | list) and [type(n) for n in lengths] == [int, int]
        if not pair or any(n % s or n < low for n, s, low in zip(lengths, stride, least)):
            raise ValueError(
                f"tiled({name}={lengths!r}); expected (height, width) in pixels, multiples of {stride[0]} "
                f"and {stride[1]}"
            )
    if any(o >= n for o, n in zip(overlap, size)):
        raise ValueError(f"tiled(overlap={overlap!r}) is not smaller than the tiles, size={size!r}")
    return Tiled(vae, size, overlap)


class Tiled(Extension):
    """See `tiled`.  size, overlap: in pixels"""

    def __init__(self, vae, size, overlap):
        super().__init__(vae, exact=False)
        self.size, self.overlap = tuple(size), tuple(overlap)

    def at_once(self, size):
        return tuple(map(min, size, self.size))

    def encode(self, video):
        """As vae.encode, tile by tile."""
        if video.ndim != 5:
            return self.wraps.encode(video)  # whose error says what is expected
        tiles = self.tiles(video.shape[3:], (1, 1))
        self.note("encode", tiles)
        parts = self.each(self.wraps.encode, (tile.cut(video) for tile in tiles))
        return blended([tile.smaller(self.stride[1:]) for tile in tiles], parts)

    def decode(self, latent):
        """As vae.decode, tile by tile."""
        if latent.ndim != 5:
            return self.wraps.decode(latent)
        tiles = self.tiles(latent.shape[3:], self.stride[1:])
        self.note("decode", tiles)
        cells = [tile.smaller(self.stride[1:]) for tile in tiles]
        return blended(tiles, self.each(self.wraps.decode, (cell.cut(latent) for cell in cells)))

    def each(self, function, tiles):
        """The function of each tile, in turn. An extension may share them out."""
        return map(function, tiles)

    def stream(self, latent):
        """As vae.stream: all tiles of some frames, then the next frames. Keeps what each tile remembers."""
        if torch.is_tensor(latent) and latent.ndim != 5:
            return self.wraps.stream(latent)
        return self.streamed(iter([latent] if torch.is_tensor(latent) else latent))

    def streamed(self, latents):
        first = next(latents)
        tiles = self.tiles(first.shape[3:], self.stride[1:])
        self.note("stream", tiles)
        cells = [tile.smaller(self.stride[1:]) for tile in tiles]
        # Each tile reads the latents for itself. All are a piece behind at most, so tee keeps little.
        copies = tee(chain([first], latents), len(tiles))
        streams = [self.wraps.stream(map(cell.cut, copy)) for cell, copy in zip(cells, copies)]
        for parts in zip(*streams):
            yield blended(tiles, parts)

    def tiles(self, lengths, stride):
        """The tiles of a picture of so many cells, each of `stride` pixels.   -> [Tile], in pixels"""
        down, across = (
            spans(n * s, size, overlap)
            for n, s, size, overlap in zip(lengths, stride, self.size, self.overlap)
        )
        return [Tile(rows, columns) for rows in down for columns in across]

    def note(self, call, tiles):
        self.memory.note(call=call, tiles=len(tiles), size=self.size, overlap=self.overlap)


class Tile:
    """A rectangle of a picture, and how much each of its pixels counts.

    rows, columns  (first, end, overlap with the one before, overlap with the one after)
    """

    def __init__(self, rows, columns):
        self.rows, self.columns = rows, columns

    def smaller(self, stride):
        """The same in latent cells."""
        spans = zip((self.rows, self.columns), stride)
        return Tile(*(tuple(n // s for n in span) for span, s in spans))

    def cut(self, x):
        """[..., H, W] -> [..., h, w]"""
        (top, bottom, *_), (left, right, *_) = self.rows, self.columns
        return x[..., top:bottom, left:right]

    def weight(self, like):
        """[h, w], 1 where only this tile counts, falling to 0 in its overlaps."""
        down, across = (ramp(*span).to(like.device) for span in (self.rows, self.columns))
        return down[:, None] * across


def spans(length, size, overlap):
    """Where the tiles lie along one axis.   -> [(first, end, overlap before, overlap after)]

    The last one ends with the picture, and so may overlap more than the others.
    """
    if length <= size:
        return [(0, length, 0, 0)]
    starts = [*range(0, length - size, size - overlap), length - size]
    shared = [0, *(before + size - start for before, start in pairwise(starts)), 0]
    return [(start, start + size, *both) for start, *both in zip(starts, shared, shared[1:])]


def ramp(first, end, before, after):
    """How much each pixel of a span counts: 0 in the outer quarter of an overlap, 1 in the inner.

    -> [end - first]; those of two neighbours are 1 together
    """
    place = torch.arange(end - first) + 0.5
    rising = (2 * place / before - 0.5).clamp(0, 1) if before else torch.ones(end - first)
    falling = (2 * place.flip(0) / after - 0.5).clamp(0, 1) if after else torch.ones(end - first)
    return rising * falling


def blended(tiles, parts):
    """One picture of many.   [Tile], their [..., h, w] in turn -> [..., H, W]"""
    whole = total = None
    for tile, part in zip(tiles, parts):
        if whole is None:
            whole = part.new_zeros(*part.shape[:-2], tiles[-1].rows[1], tiles[-1].columns[1])
            total = torch.zeros(whole.shape[-2:], device=part.device)
        weight = tile.weight(part)
        tile.cut(whole).add_(part * weight.to(part.dtype))
        tile.cut(total).add_(weight)
    return whole if len(tiles) == 1 else whole / total.to(whole.dtype)
