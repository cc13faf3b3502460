"""Do words point at things?  The map of "circle" against where the circle is, on many seeds."""

import numpy as np
from kept import CHOOSING, finish, keep_beside, option_of
from tqdm.auto import tqdm

from moddiff.hooks import capture
from moddiff.tiny import score, world
from moddiff.viz.canvas import COLOURS, dress, figure, label_tiles, mosaic
from moddiff.viz.maps import moments, overlay

WORD = "circle"  # whose map is followed
REACH = 1.0  # how near is near, in latent cells
CELL = 8  # pixels of a latent cell


def circle_scene(seed):
    """A scene of one circle: colour, motion and background by the seed."""
    colour, motion = option_of(world.COLOURS, "colour", seed), option_of(world.MOTIONS, "motion", seed)
    return world.Scene((world.Thing(WORD, colour, motion),), option_of(world.BACKGROUNDS, "background", seed))


def centres(video):
    """The centre of the largest thing in each frame, read off the pixels; NaN where nothing is.

    The mean of what differs from the background, weighted by how much.   uint8 [F, H, W, 3] -> (x, y) [F, 2]
    """
    pixels = np.asarray(video, dtype=np.float32) / 255
    ground = np.median(score.border_of(pixels).reshape(-1, 3), 0)
    apart = score.soften(np.linalg.norm(pixels - ground, axis=-1))  # [F, H, W]
    points = np.full((len(pixels), 2), np.nan)
    for i, labels in enumerate(score.blobs_of(apart > score.CONTRAST)):
        sizes = np.bincount(labels.ravel())[1:]
        if sizes.size and sizes.max() >= score.SPECK * labels.size:
            weight = apart[i] * (labels == sizes.argmax() + 1)
            rows, columns = np.arange(labels.shape[0]) + 0.5, np.arange(labels.shape[1]) + 0.5
            points[i] = weight.sum(0) @ columns, weight.sum(1) @ rows
            points[i] /= weight.sum()
    return points


def in_cells(points, frames):
    """Pixels as latent cells: the mean over the pixel frames of each latent frame.   [F, 2] -> [f, 2]"""
    return np.stack([points[first : last + 1].mean(0) for first, last in moments((frames,), points)]) / CELL


def above_median(maps):
    """Everything listens to every word a little: what counts is what lies above the median of its frame."""
    return np.clip(maps - np.median(maps, axis=(-2, -1), keepdims=True), 0, None) + 1e-12


def mass_centre(maps, patch=2):
    """The centre of mass, above the median.   maps [..., h, w] of tokens -> (x, y) in latent cells [..., 2]

    patch  latent cells per token
    """
    above = above_median(maps)
    rows, columns = (np.arange(side) * patch + patch / 2 for side in maps.shape[-2:])
    x, y = (above.sum(-2) * columns).sum(-1), (above.sum(-1) * rows).sum(-1)
    return np.stack([x, y], -1) / above.sum((-2, -1))[..., None]


def listen(pipe, seed):
    """One video of a circle, and who listens to the word in the last half of its steps.

    ->  maps [block, heads, f, h, w], true [f, 2], shown [f, H, W, 3]
    """
    prompt, steps = world.caption(circle_scene(seed)), pipe.defaults["steps"]
    columns = [token for word in pipe.words(prompt) if word.text == WORD for token in word.tokens]
    with capture(
        pipe.dit,
        "blocks.*.cross_attn.probs",
        steps=range(steps // 2, steps),
        branch="cond",
        reduce=lambda probs: probs[..., columns].sum(-1),
    ) as seen:
        video = pipe(prompt, seed=seed)
    maps = seen.stack("*.cross_attn.probs").mean((1, 2))  # [block, heads, n]
    maps = maps.reshape(*maps.shape[:2], *pipe.grid).numpy().astype(np.float16)
    middles = [(first + last + 1) // 2 for first, last in moments(pipe.grid, video)]
    return dict(maps=maps, true=in_cells(centres(video.frames), pipe.grid[0]), shown=video.frames[middles])


def mean_centre(maps, heads):
    """Where heads [(block, head)] point on average.   maps [..., block, heads, f, h, w] -> [..., f, 2]"""
    picked = [maps[..., block, head, :, :, :].astype(np.float64) for block, head in heads]
    return np.mean([mass_centre(one) for one in picked], 0)


def distances(maps, true, heads):
    """How far the mean of the heads' centres lies from the thing, in latent cells.

    maps [seeds, block, heads, f, h, w], true [seeds, f, 2] -> [seeds, f]
    """
    return np.linalg.norm(mean_centre(maps, heads) - true, axis=-1)


def near(apart):
    """The share of frames within reach; a frame where no thing is seen counts as a miss."""
    return float((np.nan_to_num(apart, nan=np.inf) <= REACH).mean())


def choose_heads(maps, true, most=6):
    """The heads of least mean distance, as many as together are near most often.   -> [(block, head)]"""
    every = list(np.ndindex(maps.shape[1:3]))
    ranked = sorted(every, key=lambda head: float(np.nanmean(distances(maps, true, [head]))))
    fewest_first = [ranked[:count] for count in range(1, most + 1)]
    return max(fewest_first, key=lambda heads: near(distances(maps, true, heads)))


def stacked(runs, name):
    return np.stack([run[name] for run in runs]).astype(np.float64)


def words_facts(chosen_on, measured):
    """The figures of the claim, from the runs for choosing and the runs that are measured.

    ->  facts, distances [seeds, f], and the same of the control: the circle of another seed's video
    """
    heads = choose_heads(stacked(chosen_on, "maps"), stacked(chosen_on, "true"))
    maps, true = stacked(measured, "maps"), stacked(measured, "true")
    apart, control = distances(maps, true, heads), distances(maps, np.roll(true, 1, 0), heads)
    facts = dict(
        word=WORD,
        heads=[list(map(int, head)) for head in heads],
        seeds=len(measured),
        chosen_on=len(chosen_on),
        frames=int(apart.size),
        near=near(apart),
        control=near(control),
        mean_distance=float(np.nanmean(apart)),
        lost=int(np.isnan(apart).sum()),
    )
    return facts, apart, control


def words_figure(measured, facts, apart, control, rows=3):
    """Left: word maps over the first measured videos, with both centres. Right: all distances."""
    shown = measured[:rows]
    drawn, (left, right) = figure(1, 2, size=(9.0, 0.9 + 1.05 * len(shown)), width_ratios=[2, 1])
    draw_maps(left, shown, facts["heads"])
    for apart_of, label, colour in (
        (apart, "its own video", COLOURS[0]),
        (control, "another seed's video", "#999999"),
    ):
        ranked = np.sort(np.nan_to_num(apart_of, nan=99).ravel())
        share = np.arange(len(ranked) + 1) / len(ranked)
        right.step([0, *ranked], share, where="post", color=colour, label=label)
    right.axvline(REACH, color=COLOURS[5], linewidth=1, linestyle="--")
    right.set_xlim(0, 6)
    right.legend(fontsize=8, frameon=False, loc="lower right")
    title = f"Within 1 cell: {facts['near']:.0%} of {facts['frames']} frames"
    dress(right, title, "distance, latent cells", "share of frames", lines=True)
    return drawn


def draw_maps(ax, runs, heads):
    """A row for each run: its map over its frames, a ring where the circle is, a cross where the map is."""
    tiles = []
    for run in runs:
        cells = np.mean(
            [run["maps"][block, head].astype(np.float64) for block, head in heads], 0
        )  # [f, h, w]
        tiles.append([overlay(frame, m / m.max()) for frame, m in zip(run["shown"], above_median(cells))])
    tiles = np.stack(tiles)  # [runs, f, H, W, 3]
    picture, middles = mosaic(tiles, gap=3)
    ax.imshow(picture, interpolation="nearest")
    corner = np.stack(np.meshgrid(middles[1], middles[0]), -1) - np.array(tiles.shape[2:4])[::-1] / 2
    true = np.stack([run["true"] for run in runs])
    pointed = np.stack([mean_centre(run["maps"], heads) for run in runs])
    x, y = (corner + CELL * true).reshape(-1, 2).T
    ring = dict(facecolors="none", edgecolors="white", linewidths=1.6)
    ax.scatter(x, y, marker="o", s=46, label="the circle", **ring)
    x, y = (corner + CELL * pointed).reshape(-1, 2).T
    ax.scatter(x, y, marker="x", s=46, color=COLOURS[1], linewidths=1.6, label="the word's map")
    label_tiles(ax, middles, [f"seed {i}" for i in range(len(runs))], range(tiles.shape[1]))
    below = dict(loc="upper left", bbox_to_anchor=(0, -0.12), ncols=2)
    ax.legend(**below, fontsize=8, frameon=True, facecolor="#888888")
    named = ", ".join(f"{block}.{head}" for block, head in heads)
    dress(ax, f'Where "{WORD}" is heard: heads {named}', "latent frame", "")


def words(pipe, out, seeds=50, choosing=12):
    """Does the word map of "circle" follow the circle?   -> the finding, in words"""
    keep = keep_beside(out, pipe)
    runs = {}
    for seed in tqdm([*range(CHOOSING, CHOOSING + choosing), *range(seeds)], desc="videos"):
        runs[seed] = keep(f"words{seed}", lambda seed=seed: listen(pipe, seed))
    measured = [runs[seed] for seed in range(seeds)]
    chosen_on = [run for seed, run in runs.items() if seed >= CHOOSING]
    facts, apart, control = words_facts(chosen_on, measured)
    finish(words_figure(measured, facts, apart, control), facts, out)
    heads = ", ".join(f"{block}.{head}" for block, head in facts["heads"])
    return (
        f'The map of "{WORD}" lies within {REACH:g} latent cell of the {WORD} in {facts["near"]:.1%} of '
        f"{facts['frames']} latent frames of {seeds} seeds (mean distance {facts['mean_distance']:.2f}; "
        f"no object found in {facts['lost']}, which count as misses).\n"
        f"Heads (block.head) {heads}, chosen on {choosing} other seeds. "
        f"Control, the {WORD} of another seed's video: {facts['control']:.1%}."
    )
