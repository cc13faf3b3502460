"""Where in the video is it?  Attention folded back onto the frames: a map for each word, head or token."""

import numpy as np
from PIL import Image

from ..video import Video
from .canvas import (
    captioned,
    colour_bar,
    dress,
    extra,
    framed,
    frames_of,
    numbers,
    readable,
    sheet,
    thumbnails,
)

# ---- tokens, cells and frames -----------------------------------------------------------------------------


def check_grid(grid, tokens, what):
    """(f, h, w), if that many tokens fold into it."""
    sides = tuple(int(side) for side in grid) if np.ndim(grid) == 1 else ()
    if len(sides) != 3 or np.prod(sides) != tokens:
        raise ValueError(
            f"{what} has {tokens} tokens, but grid={grid} (frames, height, width) has {int(np.prod(sides))}; "
            "use pipe.grid, or pipe.grid_of(frames, size) for a video of another size"
        )
    return sides


def moments(grid, video):
    """For each latent frame, the first and last pixel frame it stands for.   -> [(first, last)]"""
    f, count = grid[0], len(video)
    per = (count - 1) // max(f - 1, 1)
    if count - 1 != per * (f - 1) or f > 1 > per:
        raise ValueError(
            f"a video of {count} frames does not belong to a grid of {f} latent frames, "
            f"such as {4 * f - 3} do; use the video of this run"
        )
    return [(0, 0)] + [(per * (k - 1) + 1, per * k) for k in range(1, f)]


def overlay(frame, glow):
    """A frame dimmed, with a map shining through it.   -> float [H, W, 3] in 0..1

    frame  uint8 [H, W, 3];  glow: [h, w] in 0..1
    The map is interpolated between cells, for the eye.
    """
    size = frame.shape[1], frame.shape[0]  # Pillow says (width, height)
    smooth = Image.fromarray(glow.astype(np.float32)).resize(size, Image.BILINEAR)
    smooth = np.asarray(smooth).clip(0, 1)[..., None]  # [H, W, 1]
    colours = extra("matplotlib").colormaps["viridis"](0.35 + 0.65 * smooth[..., 0])[..., :3]
    dimmed = frame / 255 * (1 - 0.8 * smooth) * (0.55 + 0.45 * smooth)
    return dimmed + colours * 0.8 * smooth


def overlay_colours(frames):
    """What `overlay` makes of the mean colour of these frames, from 0 to 1: the scale beside it."""
    # The overlay darkens and tints what is under it, so no fixed colour map could be its scale.
    plain = np.broadcast_to(frames.mean((0, 1, 2)), (1, 256, 3))
    shades = overlay(plain, np.linspace(0, 1, 256)[None])[0]
    return extra("matplotlib.colors").ListedColormap(shades)


def percent(share):
    """0.42 -> "42%", 0.00123 -> "0.12%": enough digits to tell little from nothing, and much from all."""
    return f"{100 * share:.2g}%" if share < 0.1 else f"{100 * share:.3g}%"


# ---- words ------------------------------------------------------------------------------------------------


def word_maps(probs, words, grid, head=None):
    """How much each token of the video listens to each word.   -> names, maps [word, f, h, w]

    probs  [heads, n, m] or [n, m], m the tokens of the text
    words  [Word(text, tokens)] as pipe.words gives; a word of several tokens gets their sum.  Where the
           last is </s>, what is left, the padding, is one more row
    head   None: the mean over heads; or one of them
    """
    probs = numbers(probs, "probs", "heads n m", "n m")
    if head is not None and (probs.ndim == 2 or not 0 <= head < len(probs)):
        there = f"heads 0 to {len(probs) - 1}" if probs.ndim == 3 else "no heads any more"
        raise ValueError(f"head={head}, but probs {list(probs.shape)} has {there}")
    if probs.ndim == 3:
        probs = probs.mean(0) if head is None else probs[head]
    grid = check_grid(grid, len(probs), "probs")
    words = [words] if hasattr(words, "tokens") else list(words)
    if not all(hasattr(word, "tokens") for word in words):
        raise ValueError(f"words={words[:3]!r}; expected words with their tokens: pipe.words(prompt)")
    taken = [token for word in words for token in word.tokens]
    if not words or max(taken) >= probs.shape[1]:
        raise ValueError(
            f"the words use tokens up to {max(taken, default='none')}, "
            f"but probs has {probs.shape[1]} columns; "
            "take the words of the prompt that ran: pipe.words(prompt)"
        )
    # A word that is several tokens is heard as much as all of them together.
    names, maps = [word.text for word in words], [probs[:, list(word.tokens)].sum(1) for word in words]
    last = max(taken) + 1
    # Wan does not mask the padding behind the prompt, and most of the listening goes there: it gets a row.
    if words[-1].text == "</s>" and last < probs.shape[1]:
        names.append("(padding)")
        maps.append(probs[:, last:].sum(1))
    return readable(names), np.stack(maps).reshape(len(maps), *grid)


def show_words(probs, words, grid, video=None, head=None):
    """Where each word is heard: a row per word, a column per latent frame.   -> Figure

    probs  [heads, n, m] or [n, m], such as seen.stack("cross_attn.probs")[block, step, 0]
    words  pipe.words(prompt), or some of them
    grid   (f, h, w) in tokens: pipe.grid;  head: None for the mean over heads, or one of them
    video  a Video of the run: the maps lie over its frames

    Each row is bright from 0 to its own brightest cell. It says what part of its listening a token gives to
    the word: on average, and where it is most. Below stands what goes elsewhere.
    """
    names, maps = word_maps(probs, words, grid, head)
    heads = ", mean over heads" if head is None else f", head {head}"
    drawn = _rows(names, maps, video, "Where each word is heard" + heads * (np.ndim(probs) > 2), "word")
    rest = 1 - maps.mean((1, 2, 3)).sum()
    if rest > 0.001:
        ax = drawn.axes[0]
        elsewhere = f"not shown: {percent(rest)} of the listening\n(other words, </s>, padding)"
        ax.set_xlabel(f"{ax.get_xlabel()}\n{elsewhere}")
        drawn.set_figheight(drawn.get_figheight() + 0.4)  # inches, for two lines more
    return drawn


def show_heads(probs, word, grid, video=None):
    """One word, a row per head: the heads do not all look at the same thing.   -> Figure

    probs  [heads, n, m];  word: one of pipe.words(prompt);  grid, video: as show_words
    What a head does not give to this word goes to the others, </s> and the padding: 100% less its mean.
    """
    probs = numbers(probs, "probs", "heads n m")
    maps = np.stack([word_maps(probs, [word], grid, head)[1][0] for head in range(len(probs))])
    title = f'Where each head hears "{readable([word.text])[0]}"'
    return _rows([f"head {i}" for i in range(len(maps))], maps, video, title, "head")


def attention_rows(probs, grid, query, video=None, head=None):
    """One token of the video, and how much it listens to every other.   -> Figure

    A row per head, a column per latent frame.

    probs  self-attention [heads, n, m], or [heads, m] where only that query was captured (rows=)
    query  (frame, row, column) on the grid, or the token's number; the token is outlined
    head   None: all of them; one of them; or "mean" over them
    """
    probs = numbers(probs, "probs", "heads n m", "heads m")
    grid = check_grid(grid, probs.shape[-1], "probs")
    cells = dict(enumerate(np.ndindex(grid)))  # token number -> (frame, row, column)
    cell = tuple(map(int, query)) if np.ndim(query) else cells.get(int(query))
    if cell not in cells.values():
        raise ValueError(
            f"query={query}; expected (frame, row, column) inside {grid}, "
            f"or a token number below {len(cells)}"
        )
    if head not in (None, "mean", *range(len(probs))):
        raise ValueError(f"head={head!r}; expected None, 'mean' or one of 0 to {len(probs) - 1}")
    rows = probs[:, np.ravel_multi_index(cell, grid)] if probs.ndim == 3 else probs
    maps = rows.reshape(len(rows), *grid)
    names = [f"head {i}" for i in range(len(maps))]
    if head == "mean":
        maps, names = maps.mean(0, keepdims=True), ["mean over heads"]
    elif head is not None:
        maps, names = maps[head : head + 1], names[head : head + 1]
    title = "What the token at frame {}, row {}, column {} listens to".format(*cell)
    return _rows(names, maps, video, title, "head", outlined=cell)


def _rows(names, maps, video, title, kind, outlined=None):
    """A row for each of the maps [rows, f, h, w], over the video's frames where there is one.

    kind  what a row is: "word", "head";  outlined: a cell (frame, row, column)
    """
    f, h, w = maps.shape[1:]
    glow = _full(maps)
    labels = [f"{name}\nmean {percent(m.mean())}, most {percent(m.max())}" for name, m in zip(names, maps)]
    if video is None:
        tiles, gap, colours, x, columns = glow, 1, "viridis", "latent frame", range(f)
    else:
        frames, gap, x = frames_of(video), 3, "video frames of each latent frame"
        spans = moments((f, h, w), frames)
        shown = frames[[(first + last) // 2 for first, last in spans]]
        small = (thumbnails(shown, 64) * 255).round().astype(np.uint8)
        lit = [[overlay(frame, cell) for frame, cell in zip(small, row)] for row in glow]
        tiles, colours = np.stack([small / 255, *lit]), overlay_colours(small)
        labels = ["the video", *labels]
        columns = [f"{first}" if first == last else f"{first}-{last}" for first, last in spans]
    left = 1.4 + 0.065 * max(len(line) for label in labels for line in label.split("\n"))
    image, middles = sheet(tiles, labels, columns, 0.58, left, gap, cmap=colours, vmin=0, vmax=1)
    shrink = min(1.0, 2.2 / len(labels))
    measured = "part of\nthe listening" * (len(labels) > 1)  # beside a single row there is no room for it
    bar = colour_bar(image.axes, image, measured, ticks=[0, 1], shrink=shrink)
    bar.ax.set_yticklabels(["0", "row's most"])
    if outlined is not None:
        _outline(image.axes, middles, outlined, (h, w), tiles.shape[2:4], 0 if video is None else 1)
    return dress(image.axes, title, x, kind).figure


def _full(maps):
    """Maps [rows, f, h, w], each to its own brightest cell, which becomes 1."""
    return maps / maps.max((1, 2, 3), keepdims=True).clip(1e-12)


def _outline(ax, middles, cell, grid, tile, first):
    """A frame around one cell in every row of a mosaic from the first on.

    grid, tile  (height, width) in cells, in pixels
    """
    frame, row, column = cell
    high, wide = tile[0] / grid[0], tile[1] / grid[1]
    x = middles[1][frame] - tile[1] / 2 + column * wide
    for middle in middles[0][first:]:
        framed(ax, (x, middle - tile[0] / 2 + row * high), wide, high)


# ---- films of it ------------------------------------------------------------------------------------------


def word_animation(probs, words, grid, video, head=None, size=160):
    """The words' maps playing over the video, side by side with it.   -> Video

    words  1 to 5 of pipe.words(prompt);  size: pixels of one panel's width;  the rest as show_words
    Above each panel stands the part of a token's listening that full brightness means.
    """
    frames = frames_of(video)
    names, maps = word_maps(probs, words, grid, head)
    if len(names) > 5:
        raise ValueError(
            f"word_animation got {len(names)} rows, {', '.join(names)}; expected 5 words at most"
        )
    glow = _full(maps)
    times = max(1, round(size / frames.shape[2]))
    played = []
    for k, (first, last) in enumerate(moments(maps.shape[1:], frames)):
        for frame in frames[first : last + 1]:
            panels = [frame / 255, *[overlay(frame, cells[k]) for cells in glow]]
            played.append(np.concatenate(panels, 1).repeat(times, 0).repeat(times, 1))
    captions = [f"{name}, to {percent(each.max())}" for name, each in zip(names, maps)]
    film = captioned((np.stack(played) * 255).round().astype(np.uint8), ["video", *captions])
    return Video(film, getattr(video, "fps", 8))
