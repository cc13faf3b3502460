"""How does every figure look?  The house style, and the pieces that figures are built from: heat maps and mosaics of small pictures.

Colours are Okabe and Ito's, heat maps viridis or red to blue: readable by colour-blind eyes and in gray.  Figures are made without
pyplot, so a notebook shows each once and none stays in memory; matplotlib is imported when the first is drawn.
"""

import base64
import io
import textwrap
from functools import lru_cache

import numpy as np
import torch

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")  # Okabe & Ito 2008
LIT, FAINT, INK = "#E69F00", "#E8E8E8", "#333333"


@lru_cache(maxsize=1)
def _figure_class():
    from matplotlib.figure import Figure

    class Picture(Figure):
        """A Figure that shows itself in a notebook, the same way whatever backend is in use."""

        def _repr_mimebundle_(self, include=None, exclude=None):
            return {
                "text/plain": f"Figure: {title_of(self)}",
                "image/png": base64.b64encode(png(self)).decode(),
            }

    return Picture


def figure(rows=1, columns=1, size=(5.6, 2.6), **grid):
    """An empty figure in the house style.   -> Figure, and its axes as subplots gives them

    size  (width, height) in inches, at 100 pixels an inch;  grid: what Figure.subplots takes
    """
    drawn = _figure_class()(figsize=size, dpi=100, layout="constrained")
    drawn.alone = rows * columns == 1
    return drawn, drawn.subplots(rows, columns, **grid)


def entitle(drawn, title):
    """A title over the whole figure, from its left edge, in as many lines as it needs."""
    lines = [
        piece
        for line in title.split("\n")
        for piece in textwrap.wrap(line, int(drawn.get_figwidth() * 13)) or [""]
    ]
    drawn.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=10, color=INK, family=families())


def title_of(drawn):
    """The title of a figure, or those of its axes, as text."""
    return drawn.get_suptitle() or "; ".join(filter(None, (ax.get_title(loc="left") for ax in drawn.axes)))


def dress(ax, title="", x="", y="", lines=False):
    """The house style on one axes: a title that says what is shown, axis words, small ticks, no box.   -> ax

    lines  faint grid lines, for curves
    """
    if title and getattr(ax.figure, "alone", False):
        entitle(ax.figure, title)
    elif title:
        ax.set_title(title, fontsize=9.5, loc="left", color=INK, family=families())
    ax.set_xlabel(x, fontsize=9, color=INK)
    ax.set_ylabel(y, fontsize=9, color=INK)
    ax.tick_params(labelsize=8, colors=INK, length=2.5)
    ax.tick_params(which="minor", length=1.5, labelsize=8, labelcolor=INK)
    for label in (*ax.get_xticklabels(), *ax.get_yticklabels()):
        label.set_fontfamily(families())
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color("#999999")
    if lines:
        ax.grid(True, color="#E5E5E5", linewidth=0.6)
        ax.set_axisbelow(True)
    return ax


def png(drawn):
    """The bytes of a figure as a PNG file, small enough for a notebook: at most 256 colours; the same figure gives the same bytes."""
    from PIL import Image

    file, small = io.BytesIO(), io.BytesIO()
    drawn.savefig(file, format="png")
    Image.open(file).convert("RGB").quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(
        small, "PNG", optimize=True
    )
    return small.getvalue()


@lru_cache(maxsize=1)
def families():
    """Fonts to try in turn: matplotlib's own, then what this machine has for Chinese."""
    from matplotlib import font_manager

    here = {font.name for font in font_manager.fontManager.ttflist}
    wanted = (
        "Noto Sans CJK SC",
        "Noto Sans SC",
        "Source Han Sans SC",
        "WenQuanYi Micro Hei",
        "WenQuanYi Zen Hei",
        "PingFang SC",
        "Hiragino Sans GB",
        "Heiti TC",
        "Microsoft YaHei",
        "SimHei",
        "Droid Sans Fallback",
        "Arial Unicode MS",
    )
    return ["DejaVu Sans", *(name for name in wanted if name in here)]


def readable(texts):
    """Words as the fonts of this machine can draw them; one that they cannot draw becomes "word 3", by its place.   -> [str]"""
    from matplotlib import font_manager

    known = {
        code
        for name in families()
        for code in font_manager.get_font(font_manager.findfont(name)).get_charmap()
    }
    return [
        text if all(ord(letter) in known for letter in text) else f"word {i}"
        for i, text in enumerate(map(str, texts))
    ]


def numbers(value, what, *layouts):
    """value as a numpy array of floats; leading axes of size 1 are dropped as needed.

    layouts  what the axes may be, such as "heads n l"
    Raises ValueError when the axes fit no layout, or where there is NaN or infinity, which no colour can show.
    """
    array = (
        value.detach().float().cpu().numpy()
        if isinstance(value, torch.Tensor)
        else np.asarray(value, dtype=float)
    )
    ranks = {len(layout.split()) for layout in layouts}
    while array.ndim > max(ranks) and array.shape[0] == 1:
        array = array[0]
    if array.ndim not in ranks or 0 in array.shape:
        wanted = " or ".join(f"[{', '.join(layout.split())}]" for layout in layouts)
        raise ValueError(
            f"{what} arrived with shape {list(array.shape)}; expected {wanted}. "
            "Pick from a larger capture first, such as probs[block, step, 0]"
        )
    if not np.isfinite(array).all():
        raise ValueError(
            f"{what} holds {(~np.isfinite(array)).sum()} values that are NaN or infinite, which no colour can show; replace them first"
        )
    return array.astype(float)


def heat(ax, values, rows, columns, low=None, high=None, signed=False, colours=None, bar="", write=None):
    """values [rows, columns] as a heat map with its labels and a colour bar named `bar`; signed: red to blue around white = 0.   -> the image

    write  a format such as "{:.2f}" to print each number; None: only where there are at most 64
    """
    low = np.nanmin(values) if low is None else low
    high = np.nanmax(values) if high is None else high
    if signed:
        high = max(abs(low), abs(high), 1e-12)
        low = -high
    colours = colours or ("RdBu" if signed else "viridis")
    image = ax.imshow(
        values, cmap=colours, vmin=low, vmax=max(high, low + 1e-12), aspect="auto", interpolation="nearest"
    )
    ax.set_xticks(range(len(columns)), columns)
    ax.set_yticks(range(len(rows)), rows)
    thin_out(ax, len(columns))
    if bar:
        key = ax.figure.colorbar(image, ax=ax, pad=0.02)
        key.set_label(bar, fontsize=8, color=INK)
        key.ax.tick_params(labelsize=7, colors=INK, length=2)
        key.outline.set_visible(False)
    if write or (write is None and values.size <= 64):
        for (i, j), value in np.ndenumerate(values):
            red, green, blue, _ = image.cmap(image.norm(value))
            dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
            ax.text(
                j,
                i,
                (write or "{:.2f}").format(value),
                ha="center",
                va="center",
                fontsize=7,
                color="white" if dark else INK,
            )
    return image


def thin_out(ax, count, most=24):
    """Keep at most that many labels below a wide heat map."""
    every = -(-count // most)
    if every > 1:
        ax.set_xticks(ax.get_xticks()[::every], [label.get_text() for label in ax.get_xticklabels()][::every])


# ---- small pictures side by side ----


def mosaic(tiles, gap=1):
    """Small pictures side by side with white between.   [rows, columns, h, w] or [..., h, w, 3] -> picture, (row centres, column centres)"""
    tiles = np.asarray(tiles, dtype=float)
    rows, columns, h, w = tiles.shape[:4]
    page = np.full(
        (rows * (h + gap) - gap, columns * (w + gap) - gap, *tiles.shape[4:]),
        1.0 if tiles.ndim == 5 else np.nan,
    )
    for i in range(rows):
        for j in range(columns):
            page[i * (h + gap) : i * (h + gap) + h, j * (w + gap) : j * (w + gap) + w] = tiles[i, j]
    return page, (
        [i * (h + gap) + (h - 1) / 2 for i in range(rows)],
        [j * (w + gap) + (w - 1) / 2 for j in range(columns)],
    )


def place_tiles(ax, places, rows, columns):
    """Labels at the middles of a mosaic's rows and columns."""
    ax.set_yticks(places[0], rows)
    ax.set_xticks(places[1], columns)
    for side in ax.spines.values():
        side.set_visible(False)


def page_size(rows, columns, h, w, tile, left=1.0, top=0.75):
    """Inches for a mosaic whose tiles are `tile` inches wide."""
    return max(4.2, left + columns * tile), top + rows * tile * h / w


def frames_of(video):
    """uint8 [F, H, W, 3] of a Video or an array of that kind."""
    frames = np.asarray(getattr(video, "frames", video))
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
        raise ValueError(
            f"video= arrived as {frames.dtype} {list(frames.shape)}; expected a Video, or uint8 [F, H, W, 3]"
        )
    return frames
