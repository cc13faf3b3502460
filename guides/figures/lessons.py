"""Do words point at things, and can a colour move without its shape?  Two claims about the tiny model, measured, each with its figure.

    python guides/figures/lessons.py words --seeds 50 -o guides/figures/word_map.png
    python guides/figures/lessons.py transplant --pairs 20 -o guides/figures/transplant.png

Heads and blocks are chosen on seeds of their own and measured on others. Every run is kept as soon as it is done, in a folder beside the
picture and under the fingerprint of the weights, so that a command which was interrupted goes on where it stopped.
"""

import json
from pathlib import Path

import numpy as np
import torch
import typer
from tqdm.auto import tqdm

from moddiff.experiments.snapshots import Snapshot
from moddiff.hooks import capture, identity, noise, patch, transplant
from moddiff.tiny import score, world
from moddiff.tiny.train import replace_file
from moddiff.viz.maps import moments

WORD, REACH = "circle", 1.0  # the word whose map is followed, and how near is near, in latent cells
CELL = 8  # pixels of a latent cell
CARRIED = (
    "blocks.*.cross_attn.[kv]"  # what is carried from prompt to prompt: keys and values, one for each word
)
CHOOSING = 1000  # seeds from here on are for choosing; measured are those from 0

# ---- what both need ---------------------------------------------------------------------------------------------------


def drawn(options, *key):
    """One of the options, by a stable hash of the key: the same on every machine."""
    return list(options)[world.stable_seed("lessons", *key) % len(list(options))]


class Keep:
    """Results on disk: `keep(name, make)` is make(), or what it gave when a run before this one was made with the same weights.

    folder  where;  mark  of the weights and settings: other marks are other files
    """

    def __init__(self, folder, mark):
        self.folder, self.mark = Path(folder), mark

    def __call__(self, name, make):
        path = self.folder / f"{self.mark}-{name}.npz"
        if not path.exists():
            values = make()
            self.folder.mkdir(parents=True, exist_ok=True)
            replace_file(path, lambda temporary: _save(temporary, values))
        with np.load(path) as held:
            return {key: held[key] for key in held.files}


def _save(path, values):
    with open(path, "wb") as file:
        np.savez_compressed(file, **values)


def mark_of(pipe, *settings):
    """A few letters that change when a weight or a setting does."""
    return f"{world.stable_seed(Snapshot(pipe, copies=0).fingerprint, *settings):016x}"[:10]


def finish(figure, facts, out):
    """Write the picture, and beside it the numbers as JSON."""
    from moddiff.viz.canvas import png

    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    replace_file(out, lambda path: path.write_bytes(png(figure)))
    replace_file(out.with_suffix(".json"), lambda path: path.write_text(json.dumps(facts, indent=2) + "\n"))


# ---- words ------------------------------------------------------------------------------------------------------------


def circle_scene(seed):
    """A scene of one circle: colour, motion and background by the seed."""
    thing = world.Thing(
        WORD,
        *(
            drawn(options, name, seed)
            for name, options in (("colour", world.COLOURS), ("motion", world.MOTIONS))
        ),
    )
    return world.Scene((thing,), drawn(world.BACKGROUNDS, "background", seed))


def centres(video):
    """Where the largest thing is in each frame, read off the pixels.   uint8 [F, H, W, 3] -> (x, y) in pixels [F, 2], NaN where nothing is

    The centre of what differs from the background, weighted by how much.
    """
    pixels = np.asarray(video, dtype=np.float32) / 255
    border = [pixels[:, :2], pixels[:, -2:], pixels[:, :, :2], pixels[:, :, -2:]]
    ground = np.median(np.concatenate([part.reshape(-1, 3) for part in border]), 0)
    apart = score._soften(np.linalg.norm(pixels - ground, axis=-1))  # [F, H, W]
    labels, found = score._blobs(apart > score.CONTRAST), np.full((len(pixels), 2), np.nan)
    for i, frame in enumerate(labels):
        sizes = np.bincount(frame.ravel())[1:]
        if sizes.size and sizes.max() >= score.SPECK * frame.size:
            weight = apart[i] * (frame == sizes.argmax() + 1)
            rows, columns = np.arange(frame.shape[0]) + 0.5, np.arange(frame.shape[1]) + 0.5
            found[i] = (
                (weight.sum(0) * columns).sum() / weight.sum(),
                (weight.sum(1) * rows).sum() / weight.sum(),
            )
    return found


def in_cells(places, frames):
    """Pixel places as latent cells: the mean over the pixel frames of each latent frame.   [F, 2] -> [f, 2]"""
    return np.stack([places[first : last + 1].mean(0) for first, last in moments((frames,), places)]) / CELL


def above_median(maps):
    """Everything listens to every word a little: what counts is what lies above the median of its frame.   [..., h, w] -> the same"""
    return np.clip(maps - np.median(maps, axis=(-2, -1), keepdims=True), 0, None) + 1e-12


def mass_centre(maps, patch=2):
    """The centre of mass, above the median, of maps [..., h, w] in latent cells, (x, y): [..., 2].   patch: latent cells per token"""
    above = above_median(maps)
    rows, columns = (np.arange(side) * patch + patch / 2 for side in maps.shape[-2:])
    x, y = (above.sum(-2) * columns).sum(-1), (above.sum(-1) * rows).sum(-1)
    return np.stack([x, y], -1) / above.sum((-2, -1))[..., None]


def listen(pipe, seed):
    """One video of a circle, and who listens to the word in the last half of its steps.   -> maps [block, heads, f, h, w], true [f, 2], shown"""
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
    true = in_cells(centres(video.frames), pipe.grid[0])
    shown = np.stack([video.frames[(first + last + 1) // 2] for first, last in moments(pipe.grid, video)])
    return dict(
        maps=maps.reshape(*maps.shape[:2], *pipe.grid).numpy().astype(np.float16), true=true, shown=shown
    )


def distances(maps, true, heads):
    """How far the mean of the heads' centres lies from the thing, in latent cells.   maps [seeds, block, heads, f, h, w], true [seeds, f, 2] -> [seeds, f]"""
    centre = np.mean([mass_centre(maps[:, block, head]) for block, head in heads], 0)
    return np.linalg.norm(centre - true, axis=-1)


def near(apart):
    """The share of frames within reach; a frame where no thing was found counts as a miss."""
    return float((np.nan_to_num(apart, nan=np.inf) <= REACH).mean())


def choose_heads(maps, true, most=6):
    """The heads whose centres follow the thing best: those of least mean distance, as many as together are near most often.   -> [(block, head)]"""
    every = list(np.ndindex(maps.shape[1:3]))
    ranked = sorted(every, key=lambda place: float(np.nanmean(distances(maps, true, [place]))))
    return max(
        (ranked[:count] for count in range(1, most + 1)), key=lambda heads: near(distances(maps, true, heads))
    )


def words_facts(chosen, measured):
    """The figures of the claim, from the runs for choosing and the runs that are measured.   -> (facts, distances [seeds, f], of the control)"""
    stack = lambda runs, name: np.stack([run[name] for run in runs]).astype(np.float64)
    heads = choose_heads(stack(chosen, "maps"), stack(chosen, "true"))
    maps, true = stack(measured, "maps"), stack(measured, "true")
    apart, control = distances(maps, true, heads), distances(maps, np.roll(true, 1, 0), heads)
    facts = dict(
        word=WORD,
        heads=[list(map(int, place)) for place in heads],
        seeds=len(measured),
        chosen_on=len(chosen),
        frames=int(apart.size),
        near=near(apart),
        control=near(control),
        mean_distance=float(np.nanmean(apart)),
        lost=int(np.isnan(apart).sum()),
    )
    return facts, apart, control


def words_figure(measured, facts, apart, control, rows=3):
    """Left: the first measured videos, their word map over them, a ring where the circle is, a cross where the map says. Right: all distances."""
    from moddiff.viz.canvas import COLOURS, dress, figure, label_tiles, mosaic
    from moddiff.viz.maps import overlay

    shown, heads = measured[:rows], facts["heads"]
    maps = np.stack(
        [np.mean([run["maps"][block, head].astype(np.float64) for block, head in heads], 0) for run in shown]
    )  # [rows, f, h, w]
    tiles = np.stack(
        [
            [overlay(frame, m / m.max()) for frame, m in zip(run["shown"], above_median(cells))]
            for run, cells in zip(shown, maps)
        ]
    )
    picture, places = mosaic(tiles, gap=3)
    drawn_on, (left, right) = figure(1, 2, size=(9.0, 0.9 + 1.05 * len(shown)), width_ratios=[2, 1])
    left.imshow(picture, interpolation="nearest")
    corner = (
        np.array([[[x, y] for x in places[1]] for y in places[0]]) - (np.array(tiles.shape[2:4]) / 2)[::-1]
    )  # [rows, f, 2]
    true = np.stack([run["true"] for run in shown])
    centre = np.stack(
        [
            np.mean([mass_centre(run["maps"][block, head].astype(np.float64)) for block, head in heads], 0)
            for run in shown
        ]
    )
    for where, mark, label in ((true, "o", "the circle"), (centre, "x", "the word's map")):
        x, y = (corner + CELL * where).reshape(-1, 2).T
        left.scatter(
            x,
            y,
            marker=mark,
            s=46,
            facecolors="none" if mark == "o" else COLOURS[1],
            edgecolors="white" if mark == "o" else None,
            linewidths=1.6,
            label=label,
        )
    label_tiles(left, places, [f"seed {i}" for i in range(len(shown))], range(tiles.shape[1]))
    left.legend(
        loc="upper left", bbox_to_anchor=(0, -0.12), ncols=2, fontsize=8, frameon=True, facecolor="#888888"
    )
    dress(
        left,
        f'Where "{facts["word"]}" is heard: heads {", ".join(f"{block}.{head}" for block, head in heads)}',
        "latent frame",
    )
    for values, label, colour in (
        (apart, "its own video", COLOURS[0]),
        (control, "another seed's video", "#999999"),
    ):
        values = np.sort(np.nan_to_num(values, nan=99).ravel())
        right.step(
            [0, *values], np.arange(len(values) + 1) / len(values), where="post", color=colour, label=label
        )
    right.axvline(REACH, color=COLOURS[5], linewidth=1, linestyle="--")
    right.set_xlim(0, 6)
    right.legend(fontsize=8, frameon=False, loc="lower right")
    dress(
        right,
        f"Within 1 cell: {facts['near']:.0%} of {facts['frames']} frames",
        "distance, latent cells",
        "share of frames",
        lines=True,
    )
    return drawn_on


# ---- transplant -------------------------------------------------------------------------------------------------------


def pair_of(seed):
    """Two scenes that differ in colour and shape alone.   -> (a, b)"""
    motion, background = (
        drawn(world.MOTIONS, "motion", "pair", seed),
        drawn(world.BACKGROUNDS, "background", "pair", seed),
    )
    colours, shapes = list(world.COLOURS), list(world.SHAPES)
    colour, shape = drawn(colours, "colour a", seed), drawn(shapes, "shape a", seed)
    colours.remove(colour), shapes.remove(shape)
    a, b = (colour, shape), (drawn(colours, "colour b", seed), drawn(shapes, "shape b", seed))
    return tuple(world.Scene((world.Thing(shape, colour, motion),), background) for colour, shape in (a, b))


def names_of(video):
    """(colour, shape) as the judge reads them; "none" where it cannot tell."""
    thing = score.read(video.frames).things[0]
    return [thing.colour or "none", thing.shape or "none"]


def seen_as(video):
    """What is kept of a run: the judge's words and the middle frame."""
    return dict(names=np.array(names_of(video)), shown=video.frames[len(video) // 2])


def ring(first, last, blocks):
    """Blocks first to last of that many; behind the last one it goes on at 0, so that 6 to 1 of 8 are 0, 1, 6, 7: a set without the middle."""
    return sorted((first + step) % blocks for step in range((last - first) % blocks + 1))


class Pair:
    """Two prompts with one seed, and what the second becomes where its cross-attention reads the words of the first.

    steps  of each run;  keep: a Keep, so that what was run once is not run again
    """

    def __init__(self, pipe, seed, steps, keep):
        self.pipe, self.seed, self.steps, self.keep, self._record = pipe, seed, steps, keep, None
        self.scenes = pair_of(seed)
        self.prompts = [world.caption(scene) for scene in self.scenes]
        self.a, self.b = keep(f"{self._name}-a", self._first), keep(f"{self._name}-b", self._second)

    @property
    def _name(self):
        return f"pair{self.seed}-steps{self.steps}"

    def _run(self, which):
        return self.pipe(self.prompts[which], seed=self.seed, steps=self.steps)

    def _first(self):
        """The first prompt's run; its words' keys and values, all blocks and steps of the conditional branch, are recorded along the way."""
        with capture(self.pipe.dit, CARRIED, branch="cond") as self._record:
            return seen_as(self._run(0))

    def _second(self):
        return seen_as(self._run(1))

    def _edited(self, blocks, edit):
        if edit == "transplant" and self._record is None:  # the run itself was kept, its record was not
            self._first()
        function = {
            "transplant": lambda: transplant(self._record),
            "noise": noise,
            "identity": lambda: identity,
        }[edit]()
        with patch(self.pipe.dit, CARRIED, function, blocks=blocks, branch="cond"):
            return seen_as(self._run(1))

    @property
    def right(self):
        """Do both plain videos show the colour and the shape that were asked for?"""
        return all(
            list(seen["names"]) == [scene.things[0].colour, scene.things[0].shape]
            for seen, scene in zip((self.a, self.b), self.scenes)
        )

    def under(self, blocks, edit="transplant"):
        """The second prompt with an edit of the keys and values of its cross-attention in these blocks.   -> names, shown"""
        return self.keep(
            f"{self._name}-{edit}-{'-'.join(map(str, blocks))}", lambda: self._edited(list(blocks), edit)
        )

    def moved(self, seen):
        """(has it the first one's colour, has it still the second one's shape)"""
        return bool(seen["names"][0] == self.a["names"][0]), bool(seen["names"][1] == self.b["names"][1])


def usable_pairs(make, first, count, patience=6):
    """The first `count` pairs whose two plain videos are right, from seed `first` on.   make: seed -> Pair"""
    found = []
    for seed in range(first, first + patience * count):
        pair = make(seed)
        found += [pair] if pair.right else []
        if len(found) == count:
            return found
    raise ValueError(
        f"of {patience * count} pairs of prompts only {len(found)} gave two videos with the colour and shape asked for; {count} are needed. "
        "These weights do not obey well enough for the claim to be tested"
    )


def find_blocks(pairs, blocks):
    """Try every run of neighbouring blocks, and every set that leaves one out (`ring`): how often has the colour moved and the shape stayed?

    ->  ((first, last) of the best, {(first, last): (colour moved, shape stayed, both) as shares}).  Of equals, the fewest blocks
    """
    tried, everything = {}, [(0, blocks - 1)]  # all of them is one set, wherever the ring starts
    for first, last in tqdm(
        everything + [(f, l) for f in range(blocks) for l in range(blocks) if (l + 1 - f) % blocks],
        desc="sets of blocks",
    ):
        moved = np.array([pair.moved(pair.under(ring(first, last, blocks))) for pair in pairs])  # [pairs, 2]
        tried[first, last] = *moved.mean(0).tolist(), float(moved.all(1).mean())
    return max(
        tried,
        key=lambda place: (tried[place][2], tried[place][0] + tried[place][1], -len(ring(*place, blocks))),
    ), tried


def transplant_facts(pairs, place, blocks, chosen_on):
    """The figures of the claim: the chosen blocks, the others, and the controls beside them.   -> (facts, what each pair became, and with the others)"""
    chosen = ring(*place, blocks)
    the_rest = [block for block in range(blocks) if block not in chosen]
    runs = {
        "chosen": (chosen, "transplant"),
        "other blocks": (the_rest, "transplant"),
        "all blocks": (range(blocks), "transplant"),
        "noise": (chosen, "noise"),
    }
    became = {name: [pair.under(*how) for pair in tqdm(pairs, desc=name)] for name, how in runs.items()}
    facts = dict(
        blocks=chosen,
        first=place[0],
        last=place[1],
        other_blocks=the_rest,
        pairs=len(pairs),
        chosen_on=chosen_on,
    )
    for name, seen in became.items():
        moved = np.array([pair.moved(one) for pair, one in zip(pairs, seen)])  # [pairs, 2]
        came = [one["names"][1] == pair.a["names"][1] for pair, one in zip(pairs, seen)]
        facts[name] = dict(
            colour_moved=float(moved[:, 0].mean()),
            shape_stayed=float(moved[:, 1].mean()),
            both=float(moved.all(1).mean()),
            shape_moved=float(np.mean(came)),
        )
    facts["identity_changes_nothing"] = bool(
        np.array_equal(pairs[0].under(chosen, "identity")["shown"], pairs[0].b["shown"])
    )
    return facts, became


def transplant_figure(pairs, became, tried, facts, blocks, columns=8):
    """Left: the sweep. Right: A, B, and B with A's words in the blocks found."""
    from moddiff.viz.canvas import dress, figure, heat, label_tiles, mosaic

    grid = np.full((blocks, blocks), np.nan)
    for (first, last), (_, _, both) in tried.items():
        grid[first, last] = both
    drawn_on, (left, right) = figure(1, 2, size=(12, 4), width_ratios=[1, 2])
    heat(left, grid, range(blocks), range(blocks), low=0, high=1, bar="share of pairs", write="")
    left.scatter(
        [facts["last"]],
        [facts["first"]],
        marker="s",
        s=150,
        facecolors="none",
        edgecolors="#D55E00",
        linewidths=2,
    )
    dress(
        left,
        "A's colour and B's shape",
        "last block with A's words",
        f"first block (after {blocks - 1} comes 0)",
    )
    rows = {"A": [pair.a for pair in pairs], "B": [pair.b for pair in pairs]}
    for name, blocks_of_it in (("chosen", facts["blocks"]), ("other blocks", facts["other_blocks"])):
        rows[f"B, A's words in\n{', '.join(map(str, blocks_of_it))}"] = became[name]
    tiles = np.stack([[seen["shown"] / 255 for seen in row[:columns]] for row in rows.values()])
    picture, places = mosaic(tiles, gap=3)
    right.imshow(picture, interpolation="nearest")
    label_tiles(right, places, list(rows), [str(pair.seed) for pair in pairs[:columns]])
    dress(right, f"The first {len(tiles[0])} of {facts['pairs']} pairs", "pair (seed)")
    return drawn_on


# ---- the commands -----------------------------------------------------------------------------------------------------

app = typer.Typer(add_completion=False, help="Two measured claims about the tiny model.")


@app.command()
def words(
    seeds: int = 50,
    choosing: int = 12,
    out: Path = typer.Option("word_map.png", "-o", "--out"),
    model: str = "tiny",
):
    """Does the word map of "circle" follow the circle? Measured on SEEDS seeds; the heads are chosen on CHOOSING others."""
    import moddiff

    pipe = moddiff.load(model)
    keep = Keep(out.with_suffix(".parts"), mark_of(pipe, pipe.defaults))
    runs = {
        seed: keep(f"words{seed}", lambda: listen(pipe, seed))
        for seed in tqdm([*range(CHOOSING, CHOOSING + choosing), *range(seeds)], desc="videos")
    }
    measured = [runs[seed] for seed in range(seeds)]
    facts, apart, control = words_facts(
        [runs[seed] for seed in range(CHOOSING, CHOOSING + choosing)], measured
    )
    finish(words_figure(measured, facts, apart, control), facts, out)
    print(
        f'The map of "{WORD}" lies within {REACH:g} latent cell of the {WORD} in {facts["near"]:.1%} of {facts["frames"]} latent frames of {seeds} seeds '
        f"(mean distance {facts['mean_distance']:.2f}; no object found in {facts['lost']}, which count as misses).\n"
        f"Heads (block.head) {', '.join(f'{block}.{head}' for block, head in facts['heads'])}, chosen on {choosing} other seeds. "
        f"Control, the {WORD} of another seed's video: {facts['control']:.1%}."
    )


@app.command(name="transplant")
def transplant_command(
    pairs: int = 20,
    choosing: int = 5,
    out: Path = typer.Option("transplant.png", "-o", "--out"),
    model: str = "tiny",
):
    """Do A's words in some blocks of B move the colour and not the shape? Measured on PAIRS pairs; the blocks are found on CHOOSING others."""
    import moddiff

    pipe = moddiff.load(model)
    blocks, steps = len(pipe.dit.blocks), pipe.defaults["steps"]
    keep = Keep(out.with_suffix(".parts"), mark_of(pipe, pipe.defaults))
    trials = usable_pairs(lambda seed: Pair(pipe, seed, steps, keep), CHOOSING, choosing)
    place, tried = find_blocks(trials, blocks)
    measured = usable_pairs(lambda seed: Pair(pipe, seed, steps, keep), 0, pairs)
    facts, became = transplant_facts(measured, place, blocks, choosing)
    finish(transplant_figure(measured, became, tried, facts, blocks), facts, out)
    for name, seen in (
        ("blocks " + ", ".join(map(str, facts["blocks"])), facts["chosen"]),
        ("the others, " + ", ".join(map(str, facts["other_blocks"])), facts["other blocks"]),
        ("control: all blocks", facts["all blocks"]),
        ("control: noise of equal size", facts["noise"]),
    ):
        print(
            f"{name}: A's colour {seen['colour_moved']:.0%}, B's shape {seen['shape_stayed']:.0%}, both {seen['both']:.0%}; A's shape {seen['shape_moved']:.0%}"
        )
    print(
        f"{pairs} pairs; the blocks were found on {choosing} others. Putting B's own words back changes nothing: {facts['identity_changes_nothing']}."
    )


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    app()
