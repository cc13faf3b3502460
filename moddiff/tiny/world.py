"""What does a tiny model see?  Clips of one or two shapes that move, stand or grow, and captions.

The world is small enough to be learnt in hours and read off the pixels without doubt: 4 shapes x 7 colours x
7 motions on 4 backgrounds. A fixed tenth of the (shape, colour, motion) triples is held out of training, so
that a model shown "a green star" and "growing" can be asked for a growing green star it has never seen.
Nothing here uses a global random state: every draw comes from a generator that the caller passes, every seed
from `stable_seed`.
"""

import hashlib
import re
from collections import defaultdict
from dataclasses import dataclass
from functools import cache, partial

import numpy as np

from .words import LANGUAGES, LEXICON, TEMPLATES, say

SHAPES = ("circle", "square", "triangle", "star")
COLOURS = {
    "red": (0.90, 0.15, 0.15),
    "green": (0.15, 0.75, 0.25),
    "blue": (0.20, 0.35, 0.95),
    "yellow": (0.95, 0.85, 0.15),
    "purple": (0.60, 0.25, 0.80),
    "orange": (0.98, 0.55, 0.10),
    "white": (0.97, 0.97, 0.97),
}
MOTIONS = (
    "moving left",
    "moving right",
    "moving up",
    "moving down",
    "standing still",
    "growing",
    "shrinking",
)
BACKGROUNDS = {
    "black": (0.03, 0.03, 0.03),
    "gray": (0.45, 0.45, 0.45),
    "brown": (0.35, 0.20, 0.10),
    "navy": (0.05, 0.08, 0.30),
}
FPS, FRAMES, SIZE = 8, 17, 96

DIRECTION = {"moving left": (-1, 0), "moving right": (1, 0), "moving up": (0, -1), "moving down": (0, 1)}
STAR_INNER = 0.45  # the notches of a star lie at this part of its outer radius
# One "radius" means one area for every shape, that of the circle of this radius: no size gives a shape away.
HALF_SIDE = np.sqrt(np.pi) / 2
TRIANGLE_RADIUS = np.sqrt(4 * np.pi / (3 * np.sqrt(3)))
STAR_RADIUS = np.sqrt(np.pi / (5 * STAR_INNER * np.sin(np.pi / 5)))
# How far each shape reaches from its centre, in radii: sideways, up, down.
REACH = {
    "circle": (1.0, 1.0, 1.0),
    "square": (HALF_SIDE, HALF_SIDE, HALF_SIDE),
    "triangle": (TRIANGLE_RADIUS * np.sqrt(3) / 2, TRIANGLE_RADIUS, TRIANGLE_RADIUS / 2),
    "star": (STAR_RADIUS * np.sin(2 * np.pi / 5), STAR_RADIUS, STAR_RADIUS * np.cos(np.pi / 5)),
}
MARGIN = 0.015  # free border around each object's room, as a part of the canvas


@dataclass(frozen=True)
class Thing:
    """One object: a name from each of SHAPES, COLOURS and MOTIONS."""

    shape: str
    colour: str
    motion: str

    def __post_init__(self):
        for name, value, known in (
            ("shape", self.shape, SHAPES),
            ("colour", self.colour, COLOURS),
            ("motion", self.motion, MOTIONS),
        ):
            if value not in known:
                raise ValueError(
                    f"{name}={value!r} is not in the tiny world; choose one of {', '.join(known)}"
                )


@dataclass(frozen=True)
class Scene:
    """One or two things, the upper one first, on a background.

    background  None: "not said", in a parsed prompt only
    """

    things: tuple[Thing, ...]
    background: str | None

    def __post_init__(self):
        if len(self.things) not in (1, 2):
            raise ValueError(f"a scene holds 1 or 2 things, got {len(self.things)}")
        if self.background is not None and self.background not in BACKGROUNDS:
            raise ValueError(
                f"background={self.background!r} is not in the tiny world; "
                f"choose one of {', '.join(BACKGROUNDS)}"
            )


@dataclass(frozen=True)
class Track:
    """Where one thing is in the first and the last frame: centres (x, y) and radii as parts of the canvas."""

    start: tuple[float, float]
    end: tuple[float, float]
    radius: tuple[float, float]


def stable_seed(*parts):
    """A seed in 0 .. 2^63-1 made from any printable parts: the same on every machine, in every process."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@cache
def held_out(thing):
    """True for the 20 of the 196 (shape, colour, motion) triples that training never shows, by a stable hash.

    The number in the hash makes it a tenth, with every shape, colour and motion both held out and trained on.
    """
    return stable_seed("held out 562", thing.shape, thing.colour, thing.motion) % 10 == 0


def sample_scene(rng, things=None, split="train"):
    """Draw a scene. Two things never share both shape and colour, so a caption always tells which is which.

    rng     numpy Generator
    things  1, 2 or None: either, evenly
    split   "train": no held-out triple; "heldout": one thing is a held-out triple, or at least one of two;
            "any": all triples
    """
    if things not in (None, 1, 2):
        raise ValueError(f"things={things!r}; choose 1, 2 or None for either")
    if split not in ("train", "heldout", "any"):
        raise ValueError(f"split={split!r}; choose 'train', 'heldout' or 'any'")
    count = things or int(rng.integers(1, 3))
    background = _choose(rng, tuple(BACKGROUNDS))
    while True:
        drawn = [_sample_thing(rng, split if split == "train" else "any") for _ in range(count)]
        if split == "heldout":
            sure = int(rng.integers(count))  # this one is held out; the other may be anything
            drawn[sure] = _sample_thing(rng, "heldout")
        if len({(t.shape, t.colour) for t in drawn}) == count:
            return Scene(tuple(drawn), background)


def _choose(rng, options):
    return options[int(rng.integers(len(options)))]


def _sample_thing(rng, split):
    while True:
        thing = Thing(_choose(rng, SHAPES), _choose(rng, tuple(COLOURS)), _choose(rng, MOTIONS))
        if split == "any" or held_out(thing) == (split == "heldout"):
            return thing


def tracks(scene, rng):
    """Draw where the things of a scene are.   -> one Track each

    One thing has the whole canvas, two have half of its height each.
    """
    halves = ((0.0, 1.0),) if len(scene.things) == 1 else ((0.0, 0.5), (0.5, 1.0))
    return tuple(_track(thing, rng, rows) for thing, rows in zip(scene.things, halves))


def _track(thing, rng, rows):
    alone = rows == (0.0, 1.0)
    # Radii as parts of the canvas; two things share its height, so theirs are smaller.
    still = rng.uniform(*((0.10, 0.16) if alone else (0.09, 0.11)))
    large = rng.uniform(*((0.15, 0.18) if alone else (0.11, 0.125)))
    small = large / rng.uniform(1.75, 2.2 if alone else 2.0)
    radius = {"growing": (small, large), "shrinking": (large, small)}.get(thing.motion, (still, still))

    side, up, down = (reach * max(radius) for reach in REACH[thing.shape])
    low = np.array([MARGIN + side, rows[0] + MARGIN + up])  # the centre may be anywhere from low to high
    high = np.array([1 - MARGIN - side, rows[1] - MARGIN - down])
    direction = np.array(DIRECTION.get(thing.motion, (0, 0)))
    along = 1 if direction[1] else 0
    least, most = (0.15, 0.25) if along == 1 and not alone else (0.30, 0.50)
    travel = direction * rng.uniform(least, min(most, (high - low)[along]))
    start = rng.uniform(low - np.minimum(travel, 0), high - np.maximum(travel, 0))
    return Track(tuple(map(float, start)), tuple(map(float, start + travel)), tuple(map(float, radius)))


def render(scene, tracks, frames=FRAMES, size=(SIZE, SIZE), outline=None):
    """Draw a scene, its motion whole in any number of frames.   -> uint8 [frames, H, W, 3]

    outline  of a shape that this world does not have, drawn in place of its things': a function of
             (x, y, radius) to a signed distance, as in `distance`
    """
    height, width = size
    video = np.empty((frames, height, width, 3), np.float32)
    video[:] = BACKGROUNDS[scene.background]
    progress = np.linspace(0, 1, frames)[:, None]
    columns, rows = np.arange(width) + 0.5, np.arange(height) + 0.5
    for thing, track in zip(scene.things, tracks, strict=True):
        centre = ((1 - progress) * track.start + progress * track.end) * (width, height)  # [f, 2]
        radius = ((1 - progress) * track.radius[0] + progress * track.radius[1]) * min(size)  # [f, 1]
        x = (columns - centre[:, :1])[:, None, :].astype(np.float32)  # [f, 1, w]
        y = (rows - centre[:, 1:])[:, :, None].astype(np.float32)  # [f, h, 1]
        drawn = outline or partial(distance, thing.shape)
        away = drawn(x, y, radius[:, :, None].astype(np.float32))
        cover = np.clip(0.5 - away, 0, 1)[..., None]  # an edge is one pixel wide
        video += cover * (np.array(COLOURS[thing.colour], np.float32) - video)
    return np.rint(video * 255).astype(np.uint8)


def distance(shape, x, y, radius):
    """Signed distance in pixels from the outline, negative inside.

    x, y  to the right and downwards from the shape's centre

    Straight edges are whole lines, which is exact wherever anti-aliasing looks but near sharp corners.
    """
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - radius * np.float32(HALF_SIDE)
    if shape == "triangle":
        slanted = np.abs(x) * np.float32(np.sqrt(3) / 2) - y * np.float32(0.5)
        return np.maximum(slanted, y) - radius * np.float32(TRIANGLE_RADIUS / 2)
    fifth = np.float32(2 * np.pi / 5)  # a star: fold the plane into half of one point
    angle = np.arctan2(x, -y)
    angle = np.abs(angle - fifth * np.rint(angle / fifth))
    length = np.hypot(x, y)
    notch = STAR_INNER * np.array([np.sin(np.pi / 5), np.cos(np.pi / 5)])
    normal = np.array([1 - notch[1], notch[0]])
    across, along = np.float32(normal / np.hypot(*normal))
    return (
        length * np.sin(angle) * across + (length * np.cos(angle) - radius * np.float32(STAR_RADIUS)) * along
    )


def clip(scene, seed, frames=FRAMES, size=SIZE, outline=None):
    """One clip of a scene.   -> uint8 [frames, H, W, 3]

    seed  int, or anything that `stable_seed` takes;  size  pixels, or (H, W);  outline  as in `render`
    """
    rng = np.random.default_rng(seed if isinstance(seed, int) else stable_seed(seed))
    size = (size, size) if isinstance(size, int) else size
    return render(scene, tracks(scene, rng), frames, size, outline)


def caption(scene, language="en", rng=None):
    """Say a scene.

    rng  None: the canonical form of the language. A numpy Generator: one of its sentences, the canonical one
         three times in ten; one in ten has a capital and a full stop, and some leave the background out

    Raises ValueError for a language that the tiny world does not speak.
    """
    if language not in LANGUAGES:
        raise ValueError(f"language={language!r}; the tiny world speaks {', '.join(LANGUAGES)}")
    templates = TEMPLATES[language][len(scene.things)]
    if rng is None:
        return say(templates[0], language, scene)
    text = say(templates[0] if rng.random() < 0.3 else _choose(rng, templates), language, scene)
    sentence = language != "zh" and rng.random() < 0.1
    return text[0].upper() + text[1:] + "." if sentence else text


# The longest phrases first, so that 向左 is not read as 向 and 左.
_LATIN = sorted((p for p in LEXICON if p[0] < "\u2e80"), key=len, reverse=True)
_HAN = sorted((p for p in LEXICON if p[0] >= "\u2e80"), key=len, reverse=True)
_PIECE = re.compile(
    r"\b(?:"
    + "|".join(map(re.escape, _LATIN))
    + r")\b|"
    + "|".join(_HAN)
    + r"|[^\W\u2e80-\u9fff]+|[\u3400-\u9fff]"  # another word, another Chinese character
    + r"|[^\w\s!-/:-@\[-`{-~\u2000-\u206f\u3000-\u303f\uff00-\uff65¡¿«»]"  # a symbol, no punctuation
)


def _said(text):
    """What a text says, in order: {kind: [(value, (start, end))]}, with "unknown" for what means nothing."""
    said = defaultdict(list)
    for match in _PIECE.finditer(text.lower()):
        kind, value = LEXICON.get(match.group(), ("unknown", match.group()))
        said[kind].append((value, match.span()))
    return said


def split_han(text):
    """Chinese characters, in phrases of the world and one by one.   "红色圆形" -> ["红色", "圆形"]"""
    return _PIECE.findall(text.lower())


def mentions(text):
    """Which words speak of which thing.

    ->  [(start, end, thing)]: character spans of colours, shapes and motions; thing 0 is the upper one
    """
    said = _said(text)
    lower_first = _lower_first(said)
    return sorted(
        (*span, 1 - i if lower_first else i)
        for kind in ("shape", "colour", "motion")
        for i, (_, span) in enumerate(said[kind])
    )


def _lower_first(said):
    """Does the text name the lower thing before the upper one?  Its first word of order tells."""
    return [value for value, _ in said["order"]][:1] == ["below"]


def unknown(text):
    """The pieces of a prompt that this world has no meaning for, each once, in order: worth a note."""
    return list(dict(_said(text)["unknown"]))


def parse(text):
    """The Scene that a prompt asks for; None where it does not name one or two whole things.

    Understands every sentence of all four languages, and any order of words in which the things come one by
    one. A whole thing has a shape, a colour and a motion.
    """
    said = _said(text)
    shapes, colours, motions, backgrounds = (
        [value for value, _ in said[kind]] for kind in ("shape", "colour", "motion", "background")
    )
    whole = len(shapes) in (1, 2) and len(shapes) == len(colours) == len(motions)
    if not whole or len(backgrounds) > 1 or (len(shapes) == 2) != bool(said["order"]):
        return None
    things = tuple(map(Thing, shapes, colours, motions))
    return Scene(things[::-1] if _lower_first(said) else things, *(backgrounds or [None]))


def prompts(n, things=1, split="heldout", language="en", seed=0):
    """The evaluation prompts, fixed for all time, of the same scenes in every language.

    ->  n pairs (canonical caption, Scene)
    """
    rng = np.random.default_rng(stable_seed("prompts", things, split, seed))
    scenes = [sample_scene(rng, things, split) for _ in range(n)]
    return [(caption(scene, language), scene) for scene in scenes]
