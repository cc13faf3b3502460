"""Can a colour move without its shape?  A's words in some blocks of B, on many pairs, beside controls."""

from functools import partial

import numpy as np
from kept import CHOOSING, finish, keep_beside, option_of
from tqdm.auto import tqdm

from moddiff.hooks import capture, identity, noise, patch, transplant
from moddiff.tiny import score, world
from moddiff.viz.canvas import COLOURS, dress, figure, heat, label_tiles, mosaic

CARRIED = "blocks.*.cross_attn.[kv]"  # from prompt to prompt: keys and values, one for each word


def pair_of(seed):
    """Two scenes that differ in colour and shape alone.   -> (a, b)"""
    motion = option_of(world.MOTIONS, "motion", "pair", seed)
    background = option_of(world.BACKGROUNDS, "background", "pair", seed)
    colour, shape = option_of(world.COLOURS, "colour a", seed), option_of(world.SHAPES, "shape a", seed)
    colours = [other for other in world.COLOURS if other != colour]
    shapes = [other for other in world.SHAPES if other != shape]
    a = world.Thing(shape, colour, motion)
    b = world.Thing(option_of(shapes, "shape b", seed), option_of(colours, "colour b", seed), motion)
    return world.Scene((a,), background), world.Scene((b,), background)


def seen_as(video):
    """What is kept of a run: colour and shape in the judge's words, and the middle frame."""
    thing = score.read(video.frames).things[0]
    names = [thing.colour or "none", thing.shape or "none"]
    return dict(names=np.array(names), shown=video.frames[len(video) // 2])


def ring(first, last, blocks):
    """Blocks first to last of that many; behind the last one it goes on at 0.

    So 6 to 1 of 8 are 0, 1, 6, 7: a set without the middle.
    """
    return sorted((first + step) % blocks for step in range((last - first) % blocks + 1))


class Pair:
    """Two prompts with one seed, and what the second becomes where it is given the words of the first.

    steps  of each run
    keep   a Keep, so that what was run once is not run again
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
        return seen_as(self.pipe(self.prompts[which], seed=self.seed, steps=self.steps))

    def _first(self):
        """The first prompt's run; its words' keys and values are recorded along the way."""
        with capture(self.pipe.dit, CARRIED, branch="cond") as self._record:
            return self._run(0)

    def _second(self):
        return self._run(1)

    def _edited(self, blocks, edit):
        if edit == "transplant" and self._record is None:  # the run itself was kept, its record was not
            self._first()
        function = {"noise": noise(), "identity": identity}.get(edit) or transplant(self._record)
        with patch(self.pipe.dit, CARRIED, function, blocks=list(blocks), branch="cond"):
            return self._run(1)

    @property
    def right(self):
        """Do both plain videos show the colour and the shape that were asked for?"""
        asked = [[scene.things[0].colour, scene.things[0].shape] for scene in self.scenes]
        return [list(seen["names"]) for seen in (self.a, self.b)] == asked

    def under(self, blocks, edit="transplant"):
        """The second prompt with an edit of the keys and values of cross-attention in these blocks.

        ->  names, shown
        """
        name = f"{self._name}-{edit}-{'-'.join(map(str, blocks))}"
        return self.keep(name, partial(self._edited, blocks, edit))

    def moved(self, seen):
        """(has it the first one's colour, has it still the second one's shape)"""
        return bool(seen["names"][0] == self.a["names"][0]), bool(seen["names"][1] == self.b["names"][1])


def usable_pairs(make, first, count, patience=6):
    """The first `count` pairs whose two plain videos are right, from seed `first` on.   make: seed -> Pair"""
    pairs = []
    for seed in range(first, first + patience * count):
        pair = make(seed)
        if pair.right:
            pairs.append(pair)
        if len(pairs) == count:
            return pairs
    raise ValueError(
        f"of {patience * count} pairs of prompts only {len(pairs)} gave two videos with the colour and shape "
        f"asked for; {count} are needed. These weights obey too seldom for the claim to be tested"
    )


def find_blocks(pairs, blocks):
    """Try every run of neighbouring blocks and every `ring`: how often does the colour move alone?

    ->  (first, last) of the best, of equals the fewest blocks; and for each (first, last) the shares of pairs
        whose colour moved, whose shape stayed, and both
    """
    # All of them is one set, wherever the ring starts.
    sets = [(0, blocks - 1)]
    sets += [(first, last) for first, last in np.ndindex(blocks, blocks) if (last + 1 - first) % blocks]
    shares = {}
    for first, last in tqdm(sets, desc="sets of blocks"):
        moved = np.array([pair.moved(pair.under(ring(first, last, blocks))) for pair in pairs])  # [pairs, 2]
        shares[first, last] = *moved.mean(0).tolist(), float(moved.all(1).mean())

    def merit(ends):
        colour, shape, both = shares[ends]
        return both, colour + shape, -len(ring(*ends, blocks))

    return max(shares, key=merit), shares


def transplant_facts(pairs, ends, blocks, chosen_on):
    """The figures of the claim: the chosen blocks, the others, and the controls beside them.

    ->  facts, {name: what each pair became}
    """
    inside = ring(*ends, blocks)
    outside = [block for block in range(blocks) if block not in inside]
    edits = {
        "chosen": (inside, "transplant"),
        "other blocks": (outside, "transplant"),
        "all blocks": (range(blocks), "transplant"),
        "noise": (inside, "noise"),
    }
    became = {name: [pair.under(*edit) for pair in tqdm(pairs, desc=name)] for name, edit in edits.items()}
    facts = dict(blocks=inside, first=ends[0], last=ends[1], other_blocks=outside)
    facts |= dict(pairs=len(pairs), chosen_on=chosen_on)
    for name, seen in became.items():
        moved = np.array([pair.moved(one) for pair, one in zip(pairs, seen)])  # [pairs, 2]
        came = [one["names"][1] == pair.a["names"][1] for pair, one in zip(pairs, seen)]
        facts[name] = dict(
            colour_moved=float(moved[:, 0].mean()),
            shape_stayed=float(moved[:, 1].mean()),
            both=float(moved.all(1).mean()),
            shape_moved=float(np.mean(came)),
        )
    unchanged = np.array_equal(pairs[0].under(inside, "identity")["shown"], pairs[0].b["shown"])
    return facts | dict(identity_changes_nothing=unchanged), became


def transplant_figure(pairs, became, shares, facts, blocks, columns=8):
    """Left: the sweep. Right: A, B, and B with A's words in the chosen blocks, and in the others."""
    grid = np.full((blocks, blocks), np.nan)
    for (first, last), (_, _, both) in shares.items():
        grid[first, last] = both
    drawn, (left, right) = figure(1, 2, size=(12, 4), width_ratios=[1, 2])
    heat(left, grid, range(blocks), range(blocks), low=0, high=1, bar="share of pairs", write=False)
    frame = dict(facecolors="none", edgecolors=COLOURS[5], linewidths=2)
    left.scatter([facts["last"]], [facts["first"]], marker="s", s=150, **frame)
    after = f"first block (after {blocks - 1} comes 0)"
    dress(left, "A's colour and B's shape", "last block with A's words", after)
    rows = {"A": [pair.a for pair in pairs], "B": [pair.b for pair in pairs]}
    for name, numbers in (("chosen", facts["blocks"]), ("other blocks", facts["other_blocks"])):
        rows[f"B, A's words in\n{', '.join(map(str, numbers))}"] = became[name]
    tiles = np.stack([[seen["shown"] / 255 for seen in row[:columns]] for row in rows.values()])
    picture, middles = mosaic(tiles, gap=3)
    right.imshow(picture, interpolation="nearest")
    label_tiles(right, middles, list(rows), [str(pair.seed) for pair in pairs[:columns]])
    dress(right, f"The first {len(tiles[0])} of {facts['pairs']} pairs", "pair (seed)")
    return drawn


def transplants(pipe, out, pairs=20, choosing=5):
    """Do A's words in some blocks of B move the colour alone?   -> the finding"""
    blocks = len(pipe.dit.blocks)
    make = partial(Pair, pipe, steps=pipe.defaults["steps"], keep=keep_beside(out, pipe))
    ends, shares = find_blocks(usable_pairs(make, CHOOSING, choosing), blocks)
    measured = usable_pairs(make, 0, pairs)
    facts, became = transplant_facts(measured, ends, blocks, choosing)
    finish(transplant_figure(measured, became, shares, facts, blocks), facts, out)
    titles = {
        "chosen": f"blocks {', '.join(map(str, facts['blocks']))}",
        "other blocks": f"the others, {', '.join(map(str, facts['other_blocks']))}",
        "all blocks": "control: all blocks",
        "noise": "control: noise of equal size",
    }
    line = (
        "{}: A's colour {colour_moved:.0%}, B's shape {shape_stayed:.0%}, both {both:.0%}; "
        "A's shape {shape_moved:.0%}"
    )
    lines = [line.format(title, **facts[name]) for name, title in titles.items()]
    unchanged = f"Putting B's own words back changes nothing: {facts['identity_changes_nothing']}."
    lines.append(f"{pairs} pairs; the blocks were found on {choosing} others. {unchanged}")
    return "\n".join(lines)
