"""How does every figure look?  The house style, and what figures are made of: words, heat maps, tiles.

Colours are Okabe and Ito's, heat maps viridis or red to blue: readable by colour-blind eyes and in gray.
Figures are made without pyplot, so a notebook shows each once and none stays in memory; matplotlib is
imported when the first is drawn.
"""

import base64
import io
import textwrap
import threading
from functools import lru_cache
from importlib import import_module

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")  # Okabe & Ito 2008
LIT, FAINT, INK = "#E69F00", "#E8E8E8", "#333333"
MARKS = "os^Dvxp"
BARE = {"xticks": [], "yticks": [], "frame_on": False}  # axes of a picture that has no axes


def extra(name):
    """A module that only notebooks need, imported when it is first used: extra("matplotlib.figure").

    Raises ModuleNotFoundError that says what to install.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'{error}. Pictures and sliders need it: pip install "moddiff[notebooks]"', name=error.name
        ) from error


# ---- figures ----------------------------------------------------------------------------------------------

_styling = threading.Lock()  # a slider's picture is drawn in a thread of its own
STYLE = {  # no box, small ticks, gray axes
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#999999",
    "axes.labelsize": 9,
    "axes.labelcolor": INK,
    "xtick.labelsize": 8,
    "xtick.color": INK,
    "xtick.major.size": 2.5,
    "xtick.minor.size": 1.5,
    "ytick.labelsize": 8,
    "ytick.color": INK,
    "ytick.major.size": 2.5,
    "ytick.minor.size": 1.5,
}


@lru_cache(maxsize=1)
def _figure_class():
    """Made on demand: its base class is matplotlib's."""
    Figure, Text = extra("matplotlib.figure").Figure, extra("matplotlib.text").Text
    LogFormatter = extra("matplotlib.ticker").LogFormatter

    class Picture(Figure):
        """A Figure that shows itself in a notebook, whatever backend is in use, and draws any word."""

        def draw(self, renderer):
            powers = [
                label
                for ax in self.axes
                for axis in (ax.xaxis, ax.yaxis)
                if isinstance(axis.get_major_formatter(), LogFormatter)
                for label in axis.get_ticklabels(which="both")
            ]
            for text in self.findobj(Text):
                text.set_family(families())
                text.set_parse_math(text in powers)  # two dollar signs in a prompt are no formula
            super().draw(renderer)

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
    drawn.get_layout_engine().set(w_pad=0.08, h_pad=0.06)  # inches: no label touches an edge
    drawn.alone = rows * columns == 1  # then `dress` gives its title the whole width
    with _styling, extra("matplotlib").rc_context(STYLE):  # matplotlib's settings are the whole process's
        return drawn, drawn.subplots(rows, columns, **grid)


def png(drawn):
    """The bytes of a figure as a small PNG file of at most 256 colours; figures made alike give the same."""
    canvas, file = extra("matplotlib.backends.backend_agg").FigureCanvasAgg(drawn), io.BytesIO()
    drawn.draw_without_rendering()  # the layout settles at the second drawing only; savefig makes three
    canvas.draw()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    few = picture.quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    few.save(file, "PNG")  # optimize=True takes six times as long, for a fiftieth of the bytes
    return file.getvalue()


def entitle(drawn, title):
    """A title over the whole figure, from its left edge, in as many lines as it needs."""
    most = int(drawn.get_figwidth() * 13)  # letters of this size
    lines = [piece for line in title.split("\n") for piece in textwrap.wrap(line, most) or [""]]
    drawn.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=10, color=INK)


def title_of(drawn):
    """The title of a figure, or those of its axes, as text."""
    return drawn.get_suptitle() or "; ".join(filter(None, (ax.get_title(loc="left") for ax in drawn.axes)))


def dress(ax, title="", x="", y="", lines=False, legend=False):
    """Words on one axes: a title that says what is shown, and what the axes are.   -> ax

    lines  faint grid lines, for curves;  legend: of what was drawn with a label
    """
    if title and getattr(ax.figure, "alone", False):  # its title has the whole width
        entitle(ax.figure, title)
    elif title:
        ax.set_title(title, fontsize=9.5, loc="left", color=INK)
    ax.set(xlabel=x, ylabel=y)
    if lines:
        ax.grid(True, color="#E5E5E5", linewidth=0.6)
        ax.set_axisbelow(True)
    if legend:
        ax.legend(loc="best", fontsize=8, frameon=False)
    return ax


def arrow(ax, *points, colour=INK, width=1.2):
    """A line through points [(x, y)], with a head at the last."""
    look = {"arrowstyle": "-|>", "color": colour, "linewidth": width, "mutation_scale": 9}
    if len(points) > 2:
        ax.plot(*zip(*points[:-1]), color=colour, linewidth=width)
    ax.annotate("", points[-1], points[-2], arrowprops=look | {"shrinkA": 0, "shrinkB": 0})


def note(ax, x, y, text, size=8, color=INK, **how):
    """Words around a point."""
    ax.text(x, y, text, **{"ha": "center", "va": "center"} | how, fontsize=size, color=color, linespacing=1.4)


def framed(ax, corner, wide, high, colour=COLOURS[5], **how):
    """A frame around a part of the axes, from its corner of smallest x and y."""
    look = {"fill": False, "edgecolor": colour, "linewidth": 1.5} | how
    ax.add_patch(extra("matplotlib.patches").Rectangle(corner, wide, high, **look))


# ---- words and numbers ------------------------------------------------------------------------------------

# Fonts that hold Chinese, where this machine has one of them.
CHINESE = (
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


@lru_cache(maxsize=1)
def families():
    """Fonts to try in turn: matplotlib's own, then what this machine has for Chinese."""
    here = {font.name for font in extra("matplotlib.font_manager").fontManager.ttflist}
    return ["DejaVu Sans", *(name for name in CHINESE if name in here)]


@lru_cache(maxsize=1)
def _letters():
    """The codes of all letters that these fonts can draw."""
    fonts = extra("matplotlib.font_manager")
    files = [fonts.findfont(name) for name in families()]
    return frozenset(code for file in files for code in fonts.get_font(file).get_charmap()) | {ord("\n")}


def readable(texts):
    """Words as the fonts of this machine can draw them; others become "word 3", by number.   -> [str]"""
    texts = list(map(str, texts))
    return [text if _letters().issuperset(map(ord, text)) else f"word {i}" for i, text in enumerate(texts)]


def numbers(value, what, *layouts):
    """value as a numpy array of floats; leading axes of size 1 are dropped as needed.

    layouts  what the axes may be, such as "heads n m"
    Raises ValueError when the axes fit no layout, or where there is NaN or infinity: no colour can show it.
    """
    wanted = " or ".join(f"[{', '.join(layout.split())}]" for layout in layouts)
    if isinstance(value, torch.Tensor):
        value = value.detach().float().cpu()
    try:
        array = np.asarray(value, dtype=float)
    except (TypeError, ValueError):
        raise ValueError(f"{what} arrived as {type(value).__name__}; expected numbers {wanted}") from None
    ranks = {len(layout.split()) for layout in layouts}
    while array.ndim > max(ranks) and array.shape[0] == 1:
        array = array[0]
    if array.ndim not in ranks or 0 in array.shape:
        raise ValueError(
            f"{what} arrived with shape {list(array.shape)}; expected {wanted}. "
            "Pick from a larger capture first, such as probs[block, step, 0]"
        )
    if bad := (~np.isfinite(array)).sum():
        raise ValueError(
            f"{what} holds {bad} values that are NaN or infinite, which no colour can show; "
            "replace them first"
        )
    return array


# ---- heat maps --------------------------------------------------------------------------------------------


def heat(ax, values, rows, columns, low=None, high=None, signed=False, colours="viridis", bar="", write=True):
    """values [rows, columns] as a heat map with its labels and a colour bar named `bar`.   -> the image

    signed  red to blue around white = 0;  write: numbers in the cells, where there are at most 64
    """
    low = np.nanmin(values) if low is None else low
    high = np.nanmax(values) if high is None else high
    if signed:
        colours, high = "RdBu", max(abs(low), abs(high))
        low = -high
    ends = {"vmin": low, "vmax": max(high, low + 1e-12)}
    image = ax.imshow(values, cmap=colours, aspect="auto", interpolation="nearest", **ends)
    ax.set_yticks(range(len(rows)), readable(rows))
    label_columns(ax, columns)
    if bar:
        colour_bar(ax, image, bar)
    if write and values.size <= 64:
        digits = 0 if (values == np.round(values)).all() else 2  # counts are written as counts
        for (i, j), value in np.ndenumerate(values):  # z: no minus before a zero
            note(ax, j, i, f"{value:z.{digits}f}", size=7, color=ink_on(image.cmap(image.norm(value))))
    return image


def heat_figure(values, rows, columns, title, x, y, bar, size=None, **how):
    """A heat map that is a figure of its own; how: as heat takes it.   -> Figure"""
    high, wide = np.clip(1.2 + 0.3 * len(rows), 2.0, 6.0), np.clip(2.2 + 0.42 * len(columns), 3.6, 8.0)
    _, ax = figure(size=size or (wide, high))
    heat(ax, values, rows, columns, bar=bar, **how)
    return dress(ax, title, x, y).figure


def label_columns(ax, columns, most=24):
    """Labels below a heat map: at most so many, and aslant where they would run into each other."""
    every = -(-len(columns) // most)
    labels = readable(columns)[::every]
    inches = (ax.figure.get_figwidth() - 1.8) / len(labels)
    wide = max(map(len, labels)) * 0.075 > inches
    aslant = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if wide else {}
    ax.set_xticks(range(0, len(columns), every), labels, **aslant)


def ink_on(colour):
    """Black or white, whichever can be read on a colour (red, green, blue, ...) in 0 to 1: at least 4.5 to 1.

    Source: relative luminance and contrast of WCAG 2.
    """
    light = np.asarray(colour[:3])
    light = np.where(light <= 0.04045, light / 12.92, ((light + 0.055) / 1.055) ** 2.4)
    return "black" if light @ (0.2126, 0.7152, 0.0722) > 0.179 else "white"


def colour_bar(ax, image, words="", **how):
    """The scale of an image beside it, and the words that say what it measures.   -> matplotlib's Colorbar"""
    bar = ax.figure.colorbar(image, ax=ax, pad=0.02, **how)
    bar.set_label(words, fontsize=8, color=INK)
    bar.ax.tick_params(labelsize=7, colors=INK, length=2)
    bar.outline.set_visible(False)
    return bar


# ---- small pictures side by side --------------------------------------------------------------------------


def spread(count, most):
    """At most so many of 0 .. count - 1, evenly, first and last among them."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(most, count))})


def frames_of(video):
    """uint8 [F, H, W, 3] of a Video or an array of that kind."""
    frames = np.asarray(getattr(video, "frames", video))
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not len(frames):
        raise ValueError(
            f"a video arrived as {type(video).__name__}, {frames.dtype} {list(frames.shape)}; "
            "expected a Video, or uint8 [F, H, W, 3]"
        )
    return frames


def thumbnails(frames, most=96):
    """Every second, third, ... pixel, to suit a notebook.   uint8 [..., H, W, 3] -> float, 0 to 1"""
    step = max(1, frames.shape[-3] // most)
    return frames[..., ::step, ::step, :] / 255


def mosaic(tiles, gap=1):
    """Small pictures side by side with white between.

    tiles  [rows, columns, h, w] or [rows, columns, h, w, 3]
    gap    cells between two of them, or (between rows, between columns)
    ->     the picture, (the middles of its rows, the middles of its columns)
    """
    rows, columns, h, w = tiles.shape[:4]
    below, beside = np.broadcast_to(gap, 2)
    high, wide = h + below, w + beside
    white = 1.0 if tiles.ndim == 5 else np.nan
    page = np.full((rows * high - below, columns * wide - beside, *tiles.shape[4:]), white)
    for i, j in np.ndindex(rows, columns):
        page[i * high : i * high + h, j * wide : j * wide + w] = tiles[i, j]
    return page, (np.arange(rows) * high + (h - 1) / 2, np.arange(columns) * wide + (w - 1) / 2)


def sheet(tiles, rows, columns, tile, left, gap=1, **colours):
    """A mosaic with its labels on a new figure.   -> the image, (the middles of its rows, of its columns)

    tile, left  inches: how wide one picture is, and the labels of the rows;  colours: as imshow takes them
    """
    picture, middles = mosaic(tiles, gap)
    _, ax = figure(size=page_size(*np.shape(tiles)[:4], tile, left))
    image = ax.imshow(picture, interpolation="nearest", **colours)
    label_tiles(ax, middles, rows, columns)
    return image, middles


def label_tiles(ax, middles, rows, columns):
    """Labels at the middles of a mosaic's rows and columns; long ones below a column take several lines."""
    ax.set_yticks(middles[0], readable(rows))
    letters = max(4, int((ax.figure.get_figwidth() - 1.3) / len(columns) / 0.075))
    wrapped = [
        "\n".join(textwrap.fill(line, letters, break_long_words=False) for line in label.split("\n"))
        for label in readable(columns)
    ]
    ax.set_xticks(middles[1], wrapped)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)


def page_size(rows, columns, h, w, tile, left=1.0, top=0.75):
    """Inches for a mosaic whose tiles are `tile` inches wide."""
    return max(4.2, left + columns * tile), top + rows * tile * h / w


def captioned(frames, texts, height=18):
    """A strip of words above the panels of a film.   uint8 [F, H, W, 3] -> uint8 [F, H + height, W, 3]"""
    font = ImageFont.load_default(size=12)
    if not "".join(texts).isascii():  # Pillow's own font has few letters
        texts = readable(texts)
        font = ImageFont.truetype(extra("matplotlib.font_manager").findfont(families()[-1]), 12)
    strip = Image.new("RGB", (frames.shape[2], height), "white")
    pen, each = ImageDraw.Draw(strip), frames.shape[2] / len(texts)
    for i, text in enumerate(texts):
        pen.text((i * each + 4, 2), text, fill="black", font=font)
    above = np.broadcast_to(np.asarray(strip), (len(frames), height, *frames.shape[2:]))
    return np.concatenate([above, frames], 1)
