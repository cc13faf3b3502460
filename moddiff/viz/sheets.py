"""What is in this film or latent?  Both as sheets of small pictures, and what pixels a latent hears."""

from itertools import product

import numpy as np
import torch

from .canvas import (
    BARE,
    colour_bar,
    dress,
    entitle,
    figure,
    framed,
    frames_of,
    heat_figure,
    mosaic,
    note,
    numbers,
    page_size,
    sheet,
    spread,
    thumbnails,
)

# ---- films ------------------------------------------------------------------------------------------------


def _page(tiles, rows, columns, tile, left, title, x, y=""):
    """Pictures [rows, columns, H, W, 3] under one title.   tile, left: inches of one, of the rows' labels"""
    image, _ = sheet(tiles, rows, columns, tile, left, gap=3)
    return dress(image.axes, title, x, y).figure


def frame_numbers(video):
    """The number of each frame in the film that it was cut from: those of film[::4] are 0, 4, 8."""
    return getattr(video, "frame_numbers", range(len(video)))


def frame_sheet(video, title=None):
    """Every frame of a video with its number, nine in a row."""
    frames, fps = frames_of(video), getattr(video, "fps", None)
    columns, small = min(len(frames), 9), thumbnails(frames)
    rows, (h, w) = -(-len(frames) // columns), small.shape[1:3]
    tiles = np.ones((rows * columns, h, w, 3))
    tiles[: len(small)] = small
    tiles, between = tiles.reshape(rows, columns, h, w, 3), (round(0.3 * w), round(0.06 * w))
    drawn, ax = figure(
        size=page_size(rows, columns, h + between[0], w, 0.74, left=0, top=0.35), subplot_kw=BARE
    )
    # One picture for all: axes for each frame would take six times as long, too long for a slider.
    picture, (downs, acrosses) = mosaic(tiles, between)
    ax.imshow(picture, interpolation="nearest")
    for number, (down, across) in zip(frame_numbers(video), product(downs, acrosses)):
        note(ax, across, down - h / 2, f"{number}", size=7, va="bottom")
    speed = f", {fps:g} a second" if fps else ""
    entitle(drawn, title or f"{len(frames)} frames{speed}: frame numbers above")
    return drawn


def gallery(videos, frame=None, title="One frame of each", x="", y=""):
    """The same frame of several videos, labelled.

    videos  {label: Video}, side by side; or {row: {label: Video}}, a row each with the same labels
    frame   which of its frames, None: the middle one;  x, y: what the columns and the rows are
    """
    rows = videos if videos and all(isinstance(row, dict) for row in videos.values()) else {"": videos}
    labels = list(next(iter(rows.values()), {}))
    if not labels or any(list(row) != labels for row in rows.values()):
        got = "; ".join(f"{name}: {', '.join(map(str, row))}" for name, row in rows.items() if row)
        raise ValueError(
            f"gallery got {got or 'nothing'}; expected {{label: Video}}, or {{row: {{label: Video}}}} "
            "with the same labels in every row"
        )
    videos = [row[label] for row in rows.values() for label in labels]
    arrays = list(map(frames_of, videos))
    sizes = {"{1} x {2}".format(*frames.shape) for frames in arrays}
    if len(sizes) > 1:
        raise ValueError(
            f"gallery got {' and '.join(sorted(sizes))}; expected videos of one height and width"
        )
    frame, count = len(arrays[0]) // 2 if frame is None else frame, min(map(len, arrays))
    if not -count <= frame < count:
        raise ValueError(f"frame={frame}; expected a number from 0 to {count - 1}, the shortest video's last")
    if count > 1:
        title = f"{title}, frame {frame_numbers(videos[0])[frame]}"
    tiles = thumbnails(np.stack([frames[frame] for frames in arrays]))
    tiles = tiles.reshape(len(rows), len(labels), *tiles.shape[1:])
    return _page(tiles, rows, labels, 0.95, 1.0, title, x or ("video" if count > 1 else "picture"), y)


def films(videos, frames=None, title="Frame by frame"):
    """Several videos frame by frame, one below the other: what changes, and when.

    videos  {label: Video}, all of one size and length
    frames  which, such as [0, 4, 8]; None: nine, evenly, first and last among them
    """
    rows = {label: frames_of(video) for label, video in videos.items()}
    shapes = {film.shape for film in rows.values()}
    if len(shapes) != 1:
        got = " and ".join(str(list(shape)) for shape in sorted(shapes)) or "nothing"
        raise ValueError(f"films got {got}; expected one or more videos of one size and length")
    count = len(next(iter(rows.values())))
    frames = spread(count, 9) if frames is None else list(frames)
    if not frames or not all(0 <= i < count for i in frames):
        raise ValueError(f"frames={frames}; expected numbers from 0 to {count - 1}")
    names = frame_numbers(next(iter(videos.values())))
    tiles = np.stack([thumbnails(film[frames]) for film in rows.values()])  # [rows, frames, H, W, 3]
    return _page(tiles, rows, [names[i] for i in frames], 0.72, 1.3, title, "frame", "video")


def x0_strip(states, decode, columns=6):
    """What the model believes at each step: the noisy latent, and the clean one it points at, decoded.

    states   of pipe.steps(...);  decode: pipe.decode
    columns  how many of the steps, evenly, first and last among them;  the middle frame of each is shown
    """
    states = list(states)
    if not states or not hasattr(states[0], "x0"):
        raise ValueError(
            "x0_strip needs the States of a run: x0_strip(list(pipe.steps(prompt)), pipe.decode)"
        )
    if columns < 1:
        raise ValueError(f"columns={columns}; expected 1 or more")
    shown = [states[i] for i in spread(len(states), columns)]
    pairs = [[frames_of(decode(latent)) for latent in (state.x, state.x0)] for state in shown]
    middle = len(pairs[0][0]) // 2
    tiles = np.stack([[thumbnails(film[middle]) for film in pair] for pair in pairs], 1)  # [2, columns, ...]
    steps = [f"{state.step}\nsigma {state.sigma:.2f}" for state in shown]
    title = f"What the model believes on the way, frame {middle}"
    return _page(tiles, ["x, as it is", "x0, as believed"], steps, 0.95, 1.3, title, "step", "latent")


# ---- latents and masks ------------------------------------------------------------------------------------


def latent_sheet(latent, title="The latent, channel by channel"):
    """latent [c, f, h, w]: a column per channel, a row per latent frame.   -> Figure

    0 is the channel's usual value, 1 one standard deviation from it.
    """
    latent = numbers(latent, "latent", "c f h w")
    c, f = latent.shape[:2]
    most = np.abs(latent).max().clip(1e-12)
    tiles, tile = latent.swapaxes(0, 1), min(0.62, 8 / c)
    image, _ = sheet(tiles, range(f), range(c), tile, 1.3, cmap="RdBu", vmin=-most, vmax=most)
    colour_bar(image.axes, image, "standard deviations")
    return dress(image.axes, title, "channel", "latent frame").figure


def mask_over_time(mask):
    """Which pixel frames are given to an image-to-video model.   -> Figure

    mask  [ft, f, h, w]: the first ft channels of y; 1 is given, 0 to be made
    """
    mask = numbers(mask, "mask", "ft f h w")
    given = mask.mean((2, 3))  # [ft, f]
    return heat_figure(
        given,
        range(given.shape[0]),
        range(given.shape[1]),
        "The mask: what is given, what is to be made",
        "latent frame",
        "pixel frame in it",
        "part given",
        low=0,
        high=1,
    )


# ---- the VAE's reach --------------------------------------------------------------------------------------


def influence(vae, frames=17, size=(48, 48)):
    """How strongly each pixel frame reaches each latent frame, and each pixel the middle cell, by gradient.

    ->  [f, F] and [H, W], exactly 0 where nothing can reach; the cell as (top, left, height, width) in pixels
    The parameters' own gradients are left alone.
    """
    source = torch.Generator().manual_seed(0)
    like = next(vae.parameters())
    video = (torch.rand(1, 3, frames, *size, generator=source) * 2 - 1).to(like).requires_grad_()

    def pull(part):
        """How strongly each value of the video moves a part of the latent: [1, 3, F, H, W]."""
        (gradient,) = torch.autograd.grad(part.sum(), video, retain_graph=True)
        return gradient.abs().double()

    with torch.enable_grad():
        latent = vae.encode(video)  # [1, z, f, h, w]
        # Random weights, so that no two paths to one value cancel each other.
        weighted = latent * torch.randn(latent.shape, generator=source).to(latent)
        f, h, w = latent.shape[2:]
        in_time = torch.stack([pull(weighted[:, :, k]).sum((0, 1, 3, 4)) for k in range(f)])
        in_space = pull(weighted[:, :, -1, h // 2, w // 2]).sum((0, 1, 2))
    high, wide = size[0] // h, size[1] // w
    return in_time.numpy(), in_space.numpy(), (h // 2 * high, w // 2 * wide, high, wide)


def receptive_field(vae, frames=17, size=(48, 48)):
    """Which frames and which pixels a latent hears: only the past, and mostly what is near.   -> Figure

    vae  moddiff's, or any module whose encode takes [1, 3, F, H, W] with gradients
    frames, size  of the test video, kept small for speed
    """
    if not hasattr(vae, "encode"):
        raise TypeError(
            f"receptive_field of {type(vae).__name__}; expected a vae with encode, such as pipe.vae"
        )
    in_time, in_space, (top, first, high, wide) = influence(vae, frames, size)
    drawn, (left, right) = figure(1, 2, size=(7.2, 2.7), width_ratios=[1.5, 1])
    for ax, reach, most, words, aspect in (
        (left, in_time, in_time.max(1, keepdims=True), "reach, row's most = 1", "auto"),
        (right, in_space, in_space.max(), "reach, most = 1", "equal"),
    ):
        seen = np.where(reach > 0, reach / most.clip(1e-300), np.nan)  # nothing at all stays white
        image = ax.imshow(seen, norm="log", vmin=1e-4, vmax=1, interpolation="nearest", aspect=aspect)
        colour_bar(ax, image, words)
    left.set_xticks(range(0, frames, max(1, (frames - 1) // 8)))
    left.set_yticks(range(len(in_time)))
    framed(right, (first - 0.5, top - 0.5), wide, high)
    dress(left, "What a latent frame hears (white: nothing)", "pixel frame", "latent frame")
    dress(right, "What one latent cell (framed) hears", "pixel column", "pixel row")
    return drawn
