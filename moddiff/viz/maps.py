"""Where in the video is it?  Attention folded back onto frames, latents and receptive fields as pictures, films as strips."""

import numpy as np
import torch

from ..video import Video
from .canvas import (
    COLOURS,
    INK,
    dress,
    entitle,
    figure,
    frames_of,
    heat,
    mosaic,
    numbers,
    page_size,
    place_tiles,
    readable,
)


def check_grid(grid, tokens, what):
    """(f, h, w), if that many tokens fold into it."""
    grid = tuple(int(side) for side in grid)
    if len(grid) != 3 or np.prod(grid) != tokens:
        raise ValueError(
            f"{what} has {tokens} tokens, but grid={grid} (frames, height, width) has {int(np.prod(grid))}; "
            "use pipe.grid, or pipe.grid_of(frames, size) for a video of another size"
        )
    return grid


def moments(grid, video):
    """For each latent frame, the first and last pixel frame it stands for.   -> [(first, last)]"""
    f, count = grid[0], len(video)
    if f == 1:
        return [(0, count - 1)]
    per = (count - 1) // (f - 1)
    if per < 1 or count != per * (f - 1) + 1:
        raise ValueError(
            f"a video of {count} frames does not belong to a grid of {f} latent frames, such as {4 * f - 3} do; "
            "use the video of this run"
        )
    return [(0, 0)] + [(per * (k - 1) + 1, per * k) for k in range(1, f)]


def overlay(frame, glow):
    """A frame dimmed, with a map shining through it.   frame uint8 [H, W, 3], glow [h, w] in 0..1 -> float [H, W, 3] in 0..1

    The map is interpolated between cells, for the eye.
    """
    import matplotlib
    from PIL import Image

    height, width = frame.shape[:2]
    smooth = np.asarray(Image.fromarray(glow.astype(np.float32)).resize((width, height), Image.BILINEAR))
    smooth = smooth.clip(0, 1)[..., None]  # [H, W, 1]
    colours = matplotlib.colormaps["viridis"](0.35 + 0.65 * smooth[..., 0])[..., :3]
    return frame / 255 * (1 - 0.8 * smooth) * (0.55 + 0.45 * smooth) + colours * 0.8 * smooth


# ---- words ------------------------------------------------------------------------------------------------------------


def word_maps(probs, words, grid, head=None):
    """How much each token of the video listens to each word.   probs [heads, n, l] or [n, l] -> names, maps [word, f, h, w]

    words  [Word(text, tokens)] as pipe.words gives; a word of several tokens gets their sum.  What is left, the padding, is one more row
    head   None: the mean over heads; or one of them
    """
    probs = numbers(probs, "probs", "heads n l", "n l")
    if head is not None and (probs.ndim == 2 or not 0 <= head < len(probs)):
        there = f"heads 0 to {len(probs) - 1}" if probs.ndim == 3 else "no heads any more"
        raise ValueError(f"head={head}, but probs {list(probs.shape)} has {there}")
    if probs.ndim == 3:
        probs = probs.mean(0) if head is None else probs[head]
    grid = check_grid(grid, len(probs), "probs")
    words = [words] if hasattr(words, "tokens") else list(words)
    taken = [token for word in words for token in word.tokens]
    if not words or max(taken) >= probs.shape[1]:
        raise ValueError(
            f"the words use tokens up to {max(taken, default='none')}, but probs has {probs.shape[1]} columns; "
            "take the words of the prompt that ran: pipe.words(prompt)"
        )
    names, maps = [word.text for word in words], [probs[:, list(word.tokens)].sum(1) for word in words]
    last = max(taken) + 1
    if words[-1].text == "</s>" and last < probs.shape[1]:
        names.append("(padding)")
        maps.append(probs[:, last:].sum(1))
    return readable(names), np.stack(maps).reshape(len(maps), *grid)


def show_words(probs, words, grid, video=None, head=None, scale="own"):
    """Where each word is heard: a row per word, a column per latent frame.   -> Figure

    probs  [heads, n, l] or [n, l], such as seen.stack("cross_attn.probs")[block, step, 0];  words: pipe.words(prompt), or some of them
    grid   (f, h, w) in tokens: pipe.grid;  head: None for the mean over heads, or one of them
    video  a Video of the run: the maps lie over its frames
    scale  "own": each word from 0 to its own brightest cell; "same": all on one scale
    The percentage is the part of all listening that a word gets.
    """
    names, maps = word_maps(probs, words, grid, head)
    title = "Where each word is heard" + (", mean over heads" if head is None else f", head {head}") * (
        np.ndim(probs) > 2
    )
    return _rows(names, maps, video, scale, title, [percent(m.mean()) for m in maps])


def percent(share):
    """0.42 -> "42%"; with one more digit where that would say 0% or 100% of something else."""
    return f"{share:.1%}" if 0.0005 <= share < 0.005 or 0.995 < share < 0.9995 else f"{share:.0%}"


def show_heads(probs, word, grid, video=None):
    """One word, a row per head: the heads do not all look at the same thing.   probs [heads, n, l], word: one of pipe.words(prompt)"""
    probs = numbers(probs, "probs", "heads n l")
    maps = np.stack([word_maps(probs, word, grid, head)[1][0] for head in range(len(probs))])
    name = readable([word.text])[0]
    return _rows(
        [f"head {i}" for i in range(len(maps))],
        maps,
        video,
        "own",
        f'Where each head hears "{name}"',
        [percent(m.mean()) for m in maps],
    )


def _rows(names, maps, video, scale, title, shares):
    if scale not in ("own", "same"):
        raise ValueError(
            f"scale={scale!r}; expected 'own' (each row to its brightest cell) or 'same' (all rows on one scale)"
        )
    f, h, w = maps.shape[1:]
    most = maps.max((1, 2, 3), keepdims=True) if scale == "own" else maps.max()
    glow = maps / np.maximum(most, 1e-12)  # [rows, f, h, w]
    labels = [f"{name}  {share}" for name, share in zip(names, shares)]
    columns = [str(k) for k in range(f)]
    if video is not None:
        frames = frames_of(video)
        spans = moments((f, h, w), frames)
        shown = [frames[(first + last) // 2] for first, last in spans]
        step = max(1, shown[0].shape[0] // 64)  # small enough for a notebook
        shown = [frame[::step, ::step] for frame in shown]
        tiles = np.stack(
            [
                [frame / 255 for frame in shown],
                *[[overlay(frame, cell) for frame, cell in zip(shown, row)] for row in glow],
            ]
        )
        labels, columns = ["the video", *labels], [f"{a}" if a == b else f"{a}-{b}" for a, b in spans]
        picture, places = mosaic(tiles, gap=3)
    else:
        picture, places = mosaic(glow)
    drawn, ax = figure(
        size=page_size(len(labels), f, h, w, 0.62, left=1.9 + 0.07 * max(0, max(map(len, labels)) - 15))
    )
    image = ax.imshow(picture, cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
    place_tiles(ax, places, labels, columns)
    key = drawn.colorbar(image, ax=ax, ticks=[0, 1], shrink=min(1.0, 2.2 / len(labels)), pad=0.03)
    key.ax.set_yticklabels(
        ["0", f"{maps.max():.2g}" if scale == "same" else "row's most"], fontsize=7, color=INK
    )
    key.outline.set_visible(False)
    dress(ax, title, "latent frame" if video is None else "video frames of each latent frame")
    return drawn


def word_animation(probs, words, grid, video, head=None, size=160):
    """The words' maps playing over the video, side by side with it: a Video that shows itself, also in an exported page.

    words  some of pipe.words(prompt), at most 5 at once;  size: pixels of one panel's width;  the rest as show_words
    """
    frames = frames_of(video)
    names, maps = word_maps(probs, words, grid, head)
    names, maps = names[:5], maps[:5]
    glow = maps / np.maximum(maps.max((1, 2, 3), keepdims=True), 1e-12)
    times = max(1, round(size / frames.shape[2]))
    played = []
    for k, (first, last) in enumerate(moments(maps.shape[1:], frames)):
        for frame in frames[first : last + 1]:
            panels = [frame / 255, *[overlay(frame, cells[k]) for cells in glow]]
            played.append(np.concatenate([panel.repeat(times, 0).repeat(times, 1) for panel in panels], 1))
    return Video(
        captioned((np.stack(played) * 255).round().astype(np.uint8), ["video", *names]),
        getattr(video, "fps", 8),
    )


def captioned(frames, texts, height=18):
    """A strip of words above the panels of a film.   uint8 [F, H, W, 3] -> uint8 [F, H + height, W, 3]"""
    from PIL import Image, ImageDraw, ImageFont

    strip = Image.new("RGB", (frames.shape[2], height), "white")
    pen, each = ImageDraw.Draw(strip), frames.shape[2] / len(texts)
    for i, text in enumerate(texts):
        pen.text((i * each + 4, 2), text, fill="black", font=ImageFont.load_default(size=12))
    return np.concatenate(
        [np.broadcast_to(np.asarray(strip), (len(frames), height, *frames.shape[2:])), frames], 1
    )


def attention_rows(probs, grid, query, video=None):
    """One token of the video, and how much it listens to every other: a row per head, a column per latent frame; the token is outlined.

    probs  self-attention [heads, n, m], or [heads, m] where only that query was captured (rows=)
    query  (frame, row, column) on the grid, or the token's number
    """
    probs = numbers(probs, "probs", "heads n m", "heads m")
    grid = check_grid(grid, probs.shape[-1], "probs")
    place = tuple(int(i) for i in (np.unravel_index(query, grid) if np.ndim(query) == 0 else query))
    if len(place) != 3 or any(not 0 <= i < side for i, side in zip(place, grid)):
        raise ValueError(
            f"query={query}; expected (frame, row, column) inside {grid}, or a token number below {np.prod(grid)}"
        )
    rows = probs[:, np.ravel_multi_index(place, grid)] if probs.ndim == 3 else probs
    maps = rows.reshape(len(rows), *grid)
    title = f"What the token at frame {place[0]}, row {place[1]}, column {place[2]} listens to"
    drawn = _rows(
        [f"head {i}" for i in range(len(maps))],
        maps,
        video,
        "own",
        title,
        [f"most {m.max():.1%}" for m in maps],
    )
    from matplotlib.patches import Rectangle

    ax = drawn.axes[0]
    x = ax.get_xticks()  # the middles of the columns
    across = (
        (x[1] - x[0] - (3 if video is not None else 1)) / grid[2]
        if grid[0] > 1
        else (ax.get_xlim()[1] + 0.5) / grid[2]
    )
    for y in ax.get_yticks()[video is not None :]:
        corner = x[place[0]] + (place[2] - grid[2] / 2) * across, y + (place[1] - grid[1] / 2) * across
        ax.add_patch(Rectangle(corner, across, across, fill=False, edgecolor="#D55E00", linewidth=1.6))
    return drawn


# ---- latents and films ------------------------------------------------------------------------------------------------


def latent_sheet(latent, title="The latent, channel by channel"):
    """latent [c, f, h, w]: a column per channel, a row per latent frame; 0 is the channel's usual value, 1 one standard deviation."""
    latent = numbers(latent, "latent", "c f h w")
    c, f, h, w = latent.shape
    most = np.abs(latent).max().clip(1e-12)
    picture, places = mosaic(latent.swapaxes(0, 1))
    drawn, ax = figure(size=page_size(f, c, h, w, min(0.62, 8 / c), left=1.3))
    image = ax.imshow(picture, cmap="RdBu", vmin=-most, vmax=most, interpolation="nearest")
    place_tiles(ax, places, [str(k) for k in range(f)], [str(k) for k in range(c)])
    key = drawn.colorbar(image, ax=ax, pad=0.02)
    key.set_label("standard deviations", fontsize=8, color=INK)
    key.ax.tick_params(labelsize=7, colors=INK, length=2)
    key.outline.set_visible(False)
    return dress(ax, title, "channel", "latent frame").figure


def frame_sheet(video, columns=None, title=None):
    """Every frame of a video with its number, row by row.   columns: frames per row"""
    frames, fps = frames_of(video), getattr(video, "fps", None)
    step = max(1, frames.shape[1] // 96)
    small, columns = frames[:, ::step, ::step], columns or min(len(frames), 9)
    if columns < 1:
        raise ValueError(f"columns={columns}; expected 1 or more")
    rows, h, w = -(-len(frames) // columns), *small.shape[1:3]
    drawn, axes = figure(
        rows, columns, size=page_size(rows, columns, h * 1.2, w, 0.72, left=0, top=0.35), squeeze=False
    )
    for i, ax in enumerate(axes.flat):
        ax.axis("off")
        if i < len(frames):
            ax.imshow(small[i], interpolation="nearest")
            ax.set_title(f"{i}", fontsize=7, color=INK, pad=2)
    entitle(
        drawn,
        title or f"{len(frames)} frames" + (f", {fps:g} a second" if fps else "") + ": frame numbers above",
    )
    return drawn


def gallery(videos, frame=None, title="One frame of each"):
    """The same frame of several videos, labelled.

    videos  {label: Video}, side by side; or {row: {label: Video}}, a row each with the same labels;  frame: its number, None: the middle one
    """
    rows = videos if videos and all(isinstance(row, dict) for row in videos.values()) else {"": videos}
    labels = list(next(iter(rows.values()), {}))
    if not labels or any(list(row) != labels for row in rows.values()):
        got = "; ".join(f"{name}: {', '.join(map(str, row))}" for name, row in rows.items()) or "nothing"
        raise ValueError(
            f"gallery got {got}; expected {{label: Video}}, or {{row: {{label: Video}}}} with the same labels in every row"
        )
    films = [[frames_of(video) for video in row.values()] for row in rows.values()]
    frame = len(films[0][0]) // 2 if frame is None else frame
    tiles = np.stack(
        [
            np.stack(
                [
                    film[frame][:: max(1, film.shape[1] // 96), :: max(1, film.shape[2] // 96)] / 255
                    for film in row
                ]
            )
            for row in films
        ]
    )
    picture, places = mosaic(tiles, gap=3)
    drawn, ax = figure(size=page_size(*tiles.shape[:4], 0.95, left=1.0))
    ax.imshow(picture, interpolation="nearest")
    place_tiles(ax, places, list(rows), labels)
    if list(rows) == [""]:
        ax.set_yticks([])
    count = len(films[0][0])
    return dress(ax, title + (f", frame {frame % count}" if count > 1 else "")).figure


def films(videos, frames=None, title="Frame by frame"):
    """Several videos frame by frame, one below the other: what changes, and when.

    videos  {label: Video}, all of one size and length;  frames: which, such as [0, 4, 8]; None: nine, evenly chosen, first and last among them
    """
    rows = {label: frames_of(video) for label, video in videos.items()}
    shapes = {film.shape for film in rows.values()}
    if len(shapes) != 1:
        got = " and ".join(str(list(shape)) for shape in sorted(shapes)) or "nothing"
        raise ValueError(f"films got {got}; expected one or more videos of one size and length")
    count, height = next(iter(shapes))[:2]
    frames = sorted({round(i) for i in np.linspace(0, count - 1, 9)}) if frames is None else list(frames)
    if not frames or not all(0 <= i < count for i in frames):
        raise ValueError(f"frames={frames}; expected numbers from 0 to {count - 1}")
    step = max(1, height // 96)
    tiles = np.stack(
        [film[frames][:, ::step, ::step] / 255 for film in rows.values()]
    )  # [rows, frames, H, W, 3]
    picture, places = mosaic(tiles, gap=3)
    drawn, ax = figure(size=page_size(*tiles.shape[:4], 0.72, left=1.3))
    ax.imshow(picture, interpolation="nearest")
    place_tiles(ax, places, list(rows), frames)
    return dress(ax, title, "frame").figure


def x0_strip(states, decode, columns=6, frame=None):
    """What the model believes at each step: the noisy latent, and the clean one it points at, decoded.

    states   of pipe.steps(...);  decode: pipe.decode;  columns: how many of the steps, evenly chosen, first and last among them
    frame    which frame to show; None: the middle one
    """
    states = list(states)
    if not states or not hasattr(states[0], "x0"):
        raise ValueError(
            "x0_strip needs the States of a run: x0_strip(list(pipe.steps(prompt)), pipe.decode)"
        )
    chosen = [
        states[i]
        for i in sorted({round(i) for i in np.linspace(0, len(states) - 1, min(columns, len(states)))})
    ]
    rows = [[frames_of(decode(latent)) for latent in (state.x, state.x0)] for state in chosen]
    frame = len(rows[0][0]) // 2 if frame is None else frame
    if not -len(rows[0][0]) <= frame < len(rows[0][0]):
        raise ValueError(f"frame={frame}; the video has {len(rows[0][0])} frames")
    tiles = np.stack([[video[frame] / 255 for video in both] for both in rows], 1)  # [2, columns, H, W, 3]
    tiles = tiles[:, :, :: max(1, tiles.shape[2] // 96), :: max(1, tiles.shape[2] // 96)]
    picture, places = mosaic(tiles, gap=3)
    drawn, ax = figure(size=page_size(2, len(chosen), *tiles.shape[2:4], 0.95, left=1.3))
    ax.imshow(picture.clip(0, 1), interpolation="nearest")
    place_tiles(
        ax,
        places,
        ["x, as it is", "x0, as believed"],
        [f"{state.step}\nsigma {state.sigma:.2f}" for state in chosen],
    )
    return dress(ax, f"What the model believes on the way, frame {frame % len(rows[0][0])}", "step").figure


def mask_over_time(mask):
    """Which pixel frames are given to an image-to-video model.   mask [ft, f, h, w]: the first ft channels of y; 1 is given, 0 to be made"""
    mask = numbers(mask, "mask", "ft f h w")
    given = mask.mean((2, 3))  # [ft, f]
    drawn, ax = figure(size=(2.4 + 0.3 * given.shape[1], 2.2))
    heat(
        ax,
        given,
        range(given.shape[0]),
        range(given.shape[1]),
        low=0,
        high=1,
        bar="part given",
        write="{:.0f}" if given.size <= 64 else "",
    )
    dress(ax, "The mask: what is given, what is to be made", "latent frame", "pixel frame in it")
    return drawn


# ---- the VAE's reach --------------------------------------------------------------------------------------------------


def influence(vae, frames=17, size=(48, 48), seed=0):
    """How strongly each pixel frame reaches each latent frame, by gradient, and each pixel the middle latent cell.

    ->  [f, F] and [H, W], and the cell as (top, left, height, width) in pixels; exactly 0 where nothing can reach
    The parameters' own gradients are left alone.
    """
    source = torch.Generator().manual_seed(seed)
    like = next(vae.parameters())
    video = (torch.rand(1, 3, frames, *size, generator=source) * 2 - 1).to(like).requires_grad_()
    with torch.enable_grad():
        latent = vae.encode(video)  # [1, z, f, h, w]
        weight = torch.randn(latent.shape, generator=source).to(latent)
        pull = lambda part: torch.autograd.grad(part.sum(), video, retain_graph=True)[0].abs().double()
        rows = [pull((latent * weight)[:, :, k]).sum((0, 1, 3, 4)) for k in range(latent.shape[2])]
        h, w = latent.shape[3:]
        around = pull((latent * weight)[:, :, -1, h // 2, w // 2]).sum((0, 1, 2))
    high, wide = size[0] // h, size[1] // w
    return torch.stack(rows).numpy(), around.numpy(), (h // 2 * high, w // 2 * wide, high, wide)


def receptive_field(vae, frames=17, size=(48, 48), seed=0):
    """Which frames and which pixels a latent hears: only the past, and mostly its own place.   -> Figure

    vae  moddiff's, or any module whose encode takes [1, 3, F, H, W] with gradients;  frames, size: of the test video, kept small for speed
    """
    from matplotlib.colors import LogNorm
    from matplotlib.patches import Rectangle

    in_time, in_space, (top, first, high, wide) = influence(vae, frames, size, seed)
    drawn, (left, right) = figure(1, 2, size=(7.2, 2.7), width_ratios=[1.5, 1])
    for ax, values, bar in (
        (left, in_time / in_time.max(1, keepdims=True).clip(1e-300), "reach, row's most = 1"),
        (right, in_space / in_space.max().clip(1e-300), "reach, most = 1"),
    ):
        image = ax.imshow(
            np.where(values > 0, values, np.nan),
            cmap="viridis",
            norm=LogNorm(1e-4, 1),
            interpolation="nearest",
            aspect="auto" if ax is left else "equal",
        )
        key = drawn.colorbar(image, ax=ax, pad=0.02)
        key.set_label(bar, fontsize=8, color=INK)
        key.ax.tick_params(labelsize=7, colors=INK, length=2)
    left.set_xticks(range(0, frames, max(1, (frames - 1) // 8)))
    left.set_yticks(range(len(in_time)))
    right.add_patch(
        Rectangle((first - 0.5, top - 0.5), wide, high, fill=False, edgecolor=COLOURS[5], linewidth=1.4)
    )
    dress(left, "What a latent frame hears (white: nothing)", "pixel frame", "latent frame")
    dress(right, "What one latent cell (framed) hears", "pixel column", "pixel row")
    return drawn
