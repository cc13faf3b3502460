"""Did the video show what the prompt asked for?  A judge of shapes, colours, motions, backgrounds.

No network and nothing learnt: the background is the median of the border; whatever differs from it is an
object; its colour is the nearest reference of its core; its shape goes by its corners and by the overlap with
an outline; its motion is a straight line through its centres and sizes. What is not clearly one thing of this
world (a morphing shape, a second blob, a path that doubles back, an object that goes missing) is read as None
or as a wrong count, and so never counts as right.
"""

from dataclasses import dataclass

import numpy as np

from .world import BACKGROUNDS, COLOURS, REACH, distance

CONTRAST = 0.15  # a pixel this far (RGB distance) from the background is part of something
SPECK = 0.0013  # blobs smaller than this part of the canvas are noise (12 pixels of 96 x 96)
COLOUR_REACH = 0.25  # a colour farther than this from every reference has no name
PURITY = 0.60  # part of an object's core that must be nearest to its colour's name
# Corners of each shape, and the mean of z^corners over it: see _sharpness.
CORNERS = {"square": (4, -0.1646), "triangle": (3, 0.3762), "star": (5, 0.5585)}
SHARP, TRACE = 0.30, 0.12  # least sharpness of a cornered shape: on average, and in each third
LIKENESS, SOFTNESS = 0.75, 3  # least overlap with its outline, at the best of so many softnesses
# Parts of a full motion: enough to be one, little enough to be none, off the line.
CLEAR, NEGLIGIBLE, CROOKED = 0.5, 0.3, 0.35
MOTION_OF = {  # which of (x, y, log radius) changes, and the sign of its slope
    (0, -1): "moving left",
    (0, 1): "moving right",
    (1, -1): "moving up",
    (1, 1): "moving down",
    (2, -1): "shrinking",
    (2, 1): "growing",
}
PARTS = ("shape", "colour", "motion")


@dataclass(frozen=True)
class ThingReading:
    """What one object looks like; None: cannot be told.

    alone  exactly one blob in every frame
    """

    shape: str | None
    colour: str | None
    motion: str | None
    alone: bool


@dataclass(frozen=True)
class Reading:
    """What a video shows.

    things      the upper one first
    background  its name, None where it cannot be told
    count       were there as many things as looked for
    """

    things: tuple[ThingReading, ...]
    background: str | None
    count: bool


def read(video, things=1):
    """Read a video off its pixels.   -> Reading

    video   uint8 [F, H, W, 3] (numpy or torch)
    things  1 or 2, how many to look for

    Raises ValueError for another array or number.
    """
    video = np.asarray(video)
    if video.dtype != np.uint8 or video.ndim != 4 or video.shape[-1] != 3:
        raise ValueError(
            f"expected a uint8 video [frames, height, width, 3], got {video.dtype} {list(video.shape)}"
        )
    if things not in (1, 2):
        raise ValueError(f"things={things!r}; the tiny world holds 1 or 2")
    pixels = video.astype(np.float32) / 255
    ground_of_frames = np.median(border_of(pixels), 1)  # [f, 3]
    ground = np.median(ground_of_frames, 0)
    names = {_nearest(third.mean(0), BACKGROUNDS) for third in _thirds(ground_of_frames)}

    mask = soften(np.sqrt(np.square(pixels - ground).sum(-1))) > CONTRAST  # [f, h, w]
    cuts = [_cut(mask)] if things == 2 else []
    seen = tuple(
        _read_thing(*part, ground, mask.shape[1:], things)
        for part in zip(np.split(pixels, cuts, 1), np.split(mask, cuts, 1))
    )
    return Reading(seen, names.pop() if len(names) == 1 else None, all(thing.alone for thing in seen))


def border_of(pixels):
    """The outer two rows and columns of each frame.   [f, h, w, 3] -> [f, n, 3]"""
    sides = (pixels[:, :2], pixels[:, -2:], pixels[:, :, :2], pixels[:, :, -2:])
    return np.concatenate([side.reshape(len(pixels), -1, 3) for side in sides], 1)


def _nearest(rgb, references):
    far = {name: float(np.linalg.norm(rgb - np.array(reference))) for name, reference in references.items()}
    name = min(far, key=far.get)
    return name if far[name] <= COLOUR_REACH else None


def _over_neighbours(x, combine):
    """`combine` the 3 x 3 pixels around each of [f, h, w], the edge pixels repeated outwards."""
    x = np.pad(x, ((0, 0), (1, 1), (1, 1)), mode="edge")
    x = combine(combine(x[:, :-2], x[:, 1:-1]), x[:, 2:])
    return combine(combine(x[:, :, :-2], x[:, :, 1:-1]), x[:, :, 2:])


def soften(x):
    """Mean over 3 x 3 pixels of [f, h, w], the edge pixels repeated outwards."""
    return _over_neighbours(x, np.add) / 9


def _cut(mask):
    """The row near the middle that parts an upper from a lower thing: the one with fewest object pixels."""
    height = mask.shape[1]
    rows = np.arange(int(0.4 * height), int(0.6 * height))
    busy = mask.sum((0, 2))[rows]
    return round(float(np.mean(rows[busy == busy.min()])))


def blobs_of(mask):
    """Number the connected regions (8 neighbours) of each frame: int [f, h, w], 0 outside.

    Every pixel starts with a number of its own, and takes the largest around it until nothing changes.
    """
    labels = np.arange(1, mask[0].size + 1).reshape(mask[0].shape) * mask
    while True:
        spread = _over_neighbours(labels, np.maximum) * mask
        if np.array_equal(spread, labels):
            return labels
        labels = spread


def _read_thing(pixels, mask, ground, canvas, things):
    """Read the one object of a region [f, h, w].

    canvas  (height, width) of the whole picture;  things  how many share its height
    """
    speck = SPECK * canvas[0] * canvas[1]
    drawn = np.argwhere(mask.any(0))
    if len(drawn):  # look no farther than needed
        (top, left), (bottom, right) = np.maximum(drawn.min(0) - 4, 0), drawn.max(0) + 5
        pixels, mask = pixels[:, top:bottom, left:right], mask[:, top:bottom, left:right]
    labels = blobs_of(mask)
    sizes = [np.bincount(frame.ravel())[1:] for frame in labels]
    alone = all((size >= speck).sum() == 1 for size in sizes)
    if not all(size.size and size.max() >= speck for size in sizes):
        return ThingReading(None, None, None, False)  # missing in some frame
    body = np.stack([frame == size.argmax() + 1 for frame, size in zip(labels, sizes)])
    core = _grow(body, -2)  # no pixel of an edge, which mixes the thing's colour with the ground's
    for more in (_grow(body, -1), body):  # where nothing is left of a small thing
        core = np.where(core.any((1, 2), keepdims=True), core, more)

    inks = [pixels[i][core[i]] for i in range(len(pixels))]
    names = {_colour(np.concatenate(part)) for part in _thirds(inks)}
    colour = names.pop() if len(names) == 1 else None
    ink = np.median(np.concatenate(inks), 0)

    contrast = max(np.sum((ink - ground) ** 2), 1e-9)  # colours that change may have the ground as median
    # How much of a pixel the thing covers: how far its colour is on the way from the ground to the ink.
    cover = np.clip((pixels - ground) @ (ink - ground) / contrast, 0, 1)  # [f, h, w]
    cover = cover * _grow(body, 3)
    area = cover.sum((1, 2))
    if area.min() < speck / 2:  # some frame shows quite another colour
        return ThingReading(None, colour, None, alone)
    rows, columns = np.arange(cover.shape[1]) + 0.5, np.arange(cover.shape[2]) + 0.5
    x, y = (cover.sum(1) * columns).sum(1) / area, (cover.sum(2) * rows).sum(1) / area
    radius = np.sqrt(area / np.pi)

    up, right = (y[:, None] - rows)[:, :, None], (columns - x[:, None])[:, None, :]
    sharpness = _sharpness(cover, area, (up + 1j * right) / radius[:, None, None])
    shape = _shape([third.mean(0) for third in _thirds(sharpness)], sharpness.mean(0))
    if shape and _likeness(shape, cover, area, x, y, radius) < LIKENESS:
        shape = None

    # A full motion, as the world draws it at the least: across, down, in size.
    full = np.array([0.30 * canvas[1], 0.30 * canvas[0] / things, np.log(1.75)])
    motion = _motion(np.stack([x, y, np.log(radius)], 1) / full)
    return ThingReading(shape, colour, motion, alone)


def _thirds(items):
    """First, middle and last third of a sequence (the whole of it where it is shorter than three)."""
    third, n = len(items) // 3, len(items)
    return (items[:third], items[third : n - third], items[n - third :]) if third else (items,)


def _grow(mask, by):
    """Widen (by > 0) or thin (by < 0) a mask [f, h, w] by pixels. Beyond the border lies more of the same."""
    for _ in range(abs(by)):
        mask = _over_neighbours(mask, np.logical_or if by > 0 else np.logical_and)
    return mask


def _colour(inks):
    """The name of a bag of pixels [n, 3], or None where they are of no one colour."""
    name = _nearest(np.median(inks, 0), COLOURS)
    nearest = np.linalg.norm(inks[:, None] - np.array(list(COLOURS.values())), axis=-1).argmin(1)
    return name if name and np.mean(nearest == list(COLOURS).index(name)) >= PURITY else None


def _sharpness(cover, area, z):
    """How far a coverage [f, h, w] is from a circle (0) towards a square, a triangle, a star (1).   -> [f, 3]

    z  each pixel's way from the centre, in radii, complex: upwards is real

    The mean of (distance from the centre)^n * cos(n * angle), in radii, over the object: zero for a circle,
    and for a figure of n equal corners far from zero at its own n alone. z^n is harmonic, so an even blur of
    the picture does not change it at all.
    """
    return np.stack([(cover * (z**n).real).sum((1, 2)) / area / full for n, full in CORNERS.values()], 1)


def _shape(thirds, whole):
    """The name of a shape by its sharpness [3] in thirds of a video and the whole; None where it changes."""
    most = int(np.argmax(whole))
    if whole[most] < SHARP:
        return "circle" if max(map(max, thirds)) <= 2 * SHARP else None
    steady = all(third[most] >= max(TRACE, max(third) / 2) for third in thirds)
    return tuple(CORNERS)[most] if steady else None


def _likeness(shape, cover, area, x, y, radius):
    """Soft overlap (intersection over union) of a coverage [f, h, w] with an outline of its centre and area.

    The mean over the frames. A small model draws soft edges and blunt points, so the outline is tried at
    several softnesses.
    """
    half = int(np.ceil(max(REACH[shape]) * radius.max())) + 3
    side = 2 * half + 1
    pixel = np.floor(np.stack([x, y], 1)).astype(int)  # [f, 2], the one that holds the centre
    # Padded by half a window, a frame has its window from that pixel on.
    padded = np.pad(cover, ((0, 0), (half, half + 1), (half, half + 1)))
    window = np.stack([f[top : top + side, left : left + side] for f, (left, top) in zip(padded, pixel)])
    offset = np.arange(side, dtype=np.float32) + 0.5
    across = offset + np.float32(pixel[:, :1] - half - x[:, None])  # [f, side]
    down = offset + np.float32(pixel[:, 1:] - half - y[:, None])
    away = distance(shape, across[:, None, :], down[:, :, None], np.float32(radius)[:, None, None])
    outline, overlaps = np.clip(0.5 - away, 0, 1), []
    for _ in range(SOFTNESS):
        both = np.minimum(window, outline).sum((1, 2))
        overlaps.append(np.mean(both / (area + outline.sum((1, 2)) - both)))
        outline = soften(soften(outline))
    return float(max(overlaps))


def _motion(track):
    """The motion of a track [f, (x, y, log radius)], in units of a full motion; None where it is none."""
    time = np.linspace(-0.5, 0.5, len(track))
    slope = time @ (track - track.mean(0)) / max(time @ time, 1e-9)
    off_line = np.abs(track - track.mean(0) - time[:, None] * slope).max()
    lead = int(np.abs(slope).argmax())
    second, most = np.sort(np.abs(slope))[-2:]
    if off_line > CROOKED:
        return None
    if most <= NEGLIGIBLE:
        return "standing still"
    clear = most >= CLEAR and second <= most / 2
    return MOTION_OF[lead, int(np.sign(slope[lead]))] if clear else None


def judge(video, scene):
    """Is a video, uint8 [F, H, W, 3], the Scene it was asked for?

    ->  booleans "shape", "colour", "motion" (right for every thing), "background", "count" and "all", and
    "things":
        the first three for each thing. A background the scene does not name is always right; a wrong count
        makes "all" False
    """
    reading = read(video, len(scene.things))
    things = [
        {part: getattr(seen, part) == getattr(asked, part) for part in PARTS}
        for seen, asked in zip(reading.things, scene.things, strict=True)
    ]
    verdict = {part: all(thing[part] for thing in things) for part in PARTS} | {
        "background": scene.background is None or reading.background == scene.background,
        "count": reading.count,
    }
    return verdict | {"all": all(verdict.values()), "things": things}


def summarise(verdicts):
    """The rates, 0 to 1, of a list of verdicts of `judge`, and their number as "n"."""
    if not verdicts:
        raise ValueError("nothing to summarise: the list of verdicts is empty")
    parts = (*PARTS, "background", "count", "all")
    rates = {part: sum(verdict[part] for verdict in verdicts) / len(verdicts) for part in parts}
    return {"n": len(verdicts)} | rates


def psnr(a, b):
    """Peak signal-to-noise ratio in dB of two uint8 pictures or videos; infinite where they are equal."""
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape or a.dtype != np.uint8 or b.dtype != np.uint8:
        arrived = " and ".join(f"{x.dtype} {list(x.shape)}" for x in (a, b))
        raise ValueError(f"expected two uint8 arrays of equal shape, got {arrived}")
    error = np.mean((a.astype(np.float64) - b) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))
