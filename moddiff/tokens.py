"""Which token is which?  From tokens to what people see: the words of a prompt, and the pixels of a video."""

from typing import NamedTuple

import torch


class Word(NamedTuple):
    """One word of a prompt and the tokens it became: the columns that a picture labels with it."""

    text: str
    tokens: tuple


def words_of(pieces):
    """Tokens joined into words where the tokenizer marks word starts; Chinese has none and stays in pieces.

    pieces  [(id, piece)], as text.tokens(prompt) gives
    ->      [Word(text, tokens)], the end token `</s>` last
    """
    words = []
    for i, (_, piece) in enumerate(pieces):
        text = piece.lstrip("▁")
        before = words[-1].text if words else ""
        new = piece.startswith("▁") or piece == "</s>" or _han(before + text)
        if words and not (before and new):  # a lone word start belongs to whatever follows
            words[-1] = Word(before + text, (*words[-1].tokens, i))
        else:
            words.append(Word(text, (i,)))
    return words


def _han(text):
    return any("\u2e80" <= letter <= "\u9fff" for letter in text)


def tokens_of(box, frames, video, stride, patch):
    """The tokens whose pixels a box touches.

    box            (x0, y0, x1, y1) in pixels, x to the right, y down, x1 and y1 outside
    frames         pixel frames: a number or several; None: all
    video          (frames, height, width) of the video in pixels
    stride, patch  (time, height, width): pixels per latent cell, cells per token
    ->             token indices, int64 [k]
    """
    count, height, width = video
    x0, y0, x1, y1 = box
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        raise ValueError(
            f"box={tuple(box)}; expected (x0, y0, x1, y1) "
            f"with 0 <= x0 < x1 <= {width} and 0 <= y0 < y1 <= {height}"
        )
    frames = range(count) if frames is None else [frames] if isinstance(frames, int) else list(frames)
    if not frames or not all(0 <= i < count for i in frames):
        raise ValueError(f"frames={list(frames)}; expected frame numbers from 0 to {count - 1}")
    inside = torch.zeros(grid_of(video, stride, patch), dtype=torch.bool)  # [f, h, w] in tokens
    down, across = stride[1] * patch[1], stride[2] * patch[2]  # pixels of one token
    rows = slice(int(y0 // down), int(-(-y1 // down)))
    columns = slice(int(x0 // across), int(-(-x1 // across)))
    for i in frames:
        # The first frame has a latent frame of its own, later ones share one.
        inside[-(-i // stride[0]) // patch[0], rows, columns] = True
    return inside.flatten().nonzero()[:, 0]


def grid_of(video, stride, patch):
    """(f, h, w) in tokens of a video (frames, height, width) in pixels."""
    return tuple(cells // p for cells, p in zip(latent_shape(video, stride), patch))


def latent_shape(video, stride):
    """(f, h, w) of the latent of a video (frames, height, width) in pixels; frame 0 is one by itself."""
    return (video[0] - 1) // stride[0] + 1, video[1] // stride[1], video[2] // stride[2]
