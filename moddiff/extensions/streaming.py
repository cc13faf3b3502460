"""How does a film begin before its end is known?  Frames that look back only, and keep what they have seen.

`causal` lets each chunk of frames listen to itself and to those before it. Keys and values of a chunk then
depend on no later one: they are made once, kept, and a new chunk needs no pass over the old ones. It is what
language models do word by word. Guide: guides/streaming.md
"""

import threading
from weakref import WeakKeyDictionary

import torch

from ..attention import attend
from ..contracts import fact
from ..dit import DiT
from ..dit.block import SelfAttention
from ..hooks import position
from ..kernels import check_choice
from ..rope import angles
from .compile import compiled_inside, replaced
from .promises import Extension, Report, expect, extension, layers, whole_number


@extension
def causal(dit, chunk=3, sink=0, window=None):
    """A dit whose frames see their own chunk and earlier ones.   -> the component; approximate

    chunk   latent frames of a chunk, or a list of how many each has, of which the last goes on
    sink    how many frames at the beginning every chunk sees
    window  how many frames before its chunk a frame sees, beside the sink; None: all

    Called with a whole film, all is computed at once, behind a mask. Called with the frames of one chunk,
    inside `at(window=frames)`, it goes on from the keys and values of the chunks before it, which it has kept
    since their last call: the same numbers, but for rounding. A chunk is called as often as it has steps, and
    each call replaces what the one before has kept; the last should be one with the clean chunk at t = 0, as
    `pipe.stream` does. Kept are also those of experts and branches, each for itself, while the run lives.

    "Approximate", since Wan was trained with every frame looking at every other: a model needs training for
    this (CausVid, Self-Forcing). The identity above holds for any weights.

    Raises ContractError or ValueError for a dit that is not ours, and numbers that are no whole ones.
    Source: Yin et al. 2024, CausVid; Huang et al. 2025, Self-Forcing; Xiao et al. 2023 for the sink.
    """
    expect("dit", dit, "causal")
    lengths = tuple(chunk) if isinstance(chunk, list | tuple) else (chunk,)
    if not lengths:
        raise ValueError("causal(chunk=[]); expected how many latent frames a chunk has, such as 3")
    for length in lengths:
        whole_number("causal", "chunk", length, 1, of="latent frames")
    whole_number("causal", "sink", sink, of="latent frames")
    if window is not None:
        whole_number("causal", "window", window, of="latent frames")
    if fact("dit", dit, "window") or fact("dit", dit, "chunk"):
        raise ValueError(f"causal goes through the film chunk by chunk, and {dit!r} in a way of its own")
    if others := replaced(dit):
        raise ValueError(f"causal narrows attention, and {dit!r} has its own ({others}); leave one out")
    if compiled_inside(dit):
        raise ValueError(f"causal changes the attention of {dit!r}, which is compiled; leave one out")
    if not (models := layers(dit, DiT)):
        raise ValueError(
            f"causal needs a dit of ours, whose attention it narrows; {type(dit).__name__} arrived"
        )
    if any(model.patch[0] != 1 or model.vace_blocks is not None for model in models.values()):
        raise ValueError("causal takes models with a token for each frame and without VACE's blocks")
    new = Causal(dit, lengths, sink, window)
    for path, model in models.items():
        model.angles = Positions(new.past, model.config.dim // model.config.num_heads)
        for name, attention in model.named_modules():
            if isinstance(attention, SelfAttention):
                attention.listen = Listening(new.past, attention, f"{path}.{name}")
                attention.biased = True
                check_choice(attention, attention.kernel)
    return new


class Causal(Extension):
    """See `causal`."""

    def __init__(self, wraps, lengths, sink, window):
        super().__init__(wraps, exact=False)
        self.past = Past(lengths, sink, window)

    @property
    def chunk(self):
        """Latent frames of each chunk, for whoever makes a film chunk by chunk."""
        return self.past.lengths

    def forward(self, x, *inputs, **options):
        self.past.go_to(x.shape[2])
        return self.wraps(x, *inputs, **options)

    def report(self):
        return Report([*self.rows, *self.past.rows(), *self.memory.notes], self.in_words())


class Past:
    """Keys and values of the frames that each run has been through, for each attention and branch.

    lengths, sink, window  see `causal`
    first                  the frame that this call begins with
    chunked                is it about one chunk, and not about the whole film?
    """

    def __init__(self, lengths, sink, window):
        self.lengths, self.sink, self.window = lengths, sink, window
        # With a run go its keys and values; two threads may be at two places of two films.
        self._runs, self._by_hand, self._now = WeakKeyDictionary(), {}, threading.local()
        self._sizes = {}

    def __deepcopy__(self, memo):
        return Past(self.lengths, self.sink, self.window)  # a copy has been nowhere

    first = property(lambda self: getattr(self._now, "first", 0))
    chunked = property(lambda self: getattr(self._now, "chunked", False))

    def go_to(self, frames):
        """Take from `at(window=)` which frames of the film these are."""
        asked = position().get("window")
        if asked is not None and asked != tuple(range(asked[0], asked[0] + frames)):
            raise ValueError(f"x has {frames} frames, and at(window={asked}); expected as many, one by one")
        self._now.frames = frames
        self._now.first, self._now.chunked = (0, False) if asked is None else (asked[0], True)

    def joined(self, path, k, v):
        """Keys and values of all frames that this chunk sees, its own last. Those stay, for the next one.

        path  of the attention;  k, v: [b, heads, frames * tokens, d] of the chunk
        """
        (kept, sizes), first, frames = self._of_this_run(), self.first, self._now.frames
        place = position().get("branch"), path
        known, *old = kept.get(place, ((), None, None))
        seen = [f for f in range(first) if f < self.sink or self.window is None or f >= first - self.window]
        # A chunk that was left out would be missed by all later ones, without a word.
        if lost := sorted(set(seen) - set(known)):
            raise ValueError(
                f"frame {first} looks back at frame {lost[0]}, which is not kept; call the chunks in turn, "
                "the first with at(window=range(0, ...))"
            )
        if seen:
            tokens = k.shape[2] // frames
            where = torch.tensor([known.index(f) for f in seen], device=k.device)
            # A frame is as many neighbouring tokens: the positions of all tokens of the frames that are seen.
            where = (where[:, None] * tokens + torch.arange(tokens, device=k.device)).flatten()
            k, v = (torch.cat([x.index_select(2, where), new], 2) for x, new in zip(old, (k, v)))
        # What is out of the window goes here, and this chunk's own of an earlier step with it.
        kept[place] = (*seen, *range(first, first + frames)), k, v
        sizes[place] = len(seen) + frames, k.nbytes + v.nbytes
        return k, v

    def mask(self, q):
        """Who sees whom in a whole film.   -> bool [frames * tokens, frames * tokens], None: all see all"""
        frames = self._now.frames
        may = torch.zeros(frames, frames, dtype=torch.bool)
        for first, end in chunks(frames, self.lengths):
            oldest = 0 if self.window is None else max(first - self.window, 0)
            may[first:end, oldest:end] = True
            may[first:end, : min(self.sink, end)] = True
        if may.all():
            return None  # nothing is hidden: the call is that of the plain model, to the bit
        tokens = q.shape[2] // frames
        return may.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1).to(q.device)

    def rows(self):
        """How much is kept of the last run, a row for each branch."""
        rows = {}
        for (branch, _), (frames, size) in self._sizes.items():
            row = rows.setdefault(branch, {"branch": branch, "frames kept": frames, "bytes": 0})
            row["bytes"] += size
        return list(rows.values())

    def _of_this_run(self):
        """{(branch, attention): (frames, k, v)}, and their sizes, which stay for the report."""
        mark = position().get("run")
        runs, key = (self._by_hand, threading.get_ident()) if mark is None else (self._runs, mark)
        kept, self._sizes = runs.setdefault(key, ({}, {}))
        return kept, self._sizes


class Listening:
    """What stands in the place of SelfAttention.listen."""

    def __init__(self, past, attention, path):
        self.past, self.attention, self.path = past, attention, path

    def __call__(self, q, k, v):
        bias = None
        if self.past.chunked:
            k, v = self.past.joined(self.path, k, v)
        else:
            bias = self.past.mask(q)
        return attend(q, k, v, tap=self.attention.tap, bias=bias, kernel=self.attention.kernel)


class Positions:
    """DiT.angles for a chunk: its frames are counted from the beginning of the film."""

    def __init__(self, past, d):
        self.past, self.d = past, d

    def __call__(self, grid):
        return angles(grid, self.d, start=(self.past.first, 0, 0))


def chunks(frames, lengths):
    """Where each chunk of a film begins and ends.   -> [(first, end)]; the last may be short"""
    found, first = [], 0
    while first < frames:
        length = lengths[min(len(found), len(lengths) - 1)]
        found.append((first, min(first + length, frames)))
        first += length
    return found
