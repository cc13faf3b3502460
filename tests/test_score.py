"""Can the judge be trusted: right on true clips, and fooled by no way in which another can be wrong?

The whole check, 1,000 true clips clean and 1,000 roughened, is `python tests/test_score.py`.
"""

from dataclasses import replace

import numpy as np
import pytest

from moddiff.tiny import score, world
from moddiff.tiny.world import Scene, Thing

PERFECT = {part: 1.0 for part in ("shape", "colour", "motion", "background", "count", "all")}
OPPOSITE = {
    "moving left": "moving right",
    "moving up": "moving down",
    "growing": "shrinking",
    "standing still": "standing still",
}
OPPOSITE |= {other: motion for motion, other in OPPOSITE.items()}


def scenes(n, things=None, seed=0):
    rng = np.random.default_rng(seed)
    return [world.sample_scene(rng, things or 1 + i % 2, "any") for i in range(n)]


def judged_truth(n=1000, blur=0.0, noise=0.0):
    """The summary of n true clips (one and two things, all triples): every rate must be 1."""
    rng = np.random.default_rng(world.stable_seed("check the judge", n, blur, noise))
    verdicts = []
    for index in range(n):
        scene = world.sample_scene(rng, 1 + index % 2, "any")
        clip = world.clip(scene, world.stable_seed("check", index))
        verdicts.append(score.judge(roughened(clip, rng, blur, noise), scene))
    return score.summarise(verdicts)


def roughened(video, rng, blur=0.0, noise=0.0):
    """A clip as a small model might draw it: a Gaussian blur in pixels, noise as a part of full scale."""
    x = np.asarray(video).astype(np.float32) / 255
    if blur:
        taps = np.exp(-0.5 * (np.arange(-4, 5) / blur) ** 2)
        taps /= taps.sum()
        for axis in (1, 2):
            padded = np.pad(x, [(4, 4) if a == axis else (0, 0) for a in range(4)], mode="edge")
            blurred = sum(tap * np.roll(padded, 4 - i, axis) for i, tap in enumerate(taps))
            x = blurred.take(range(4, 4 + x.shape[axis]), axis)
    return np.clip(np.rint((x + noise * rng.standard_normal(x.shape)) * 255), 0, 255).astype(np.uint8)


def test_every_true_clip_is_right_in_every_attribute():
    assert judged_truth(200) == PERFECT | {"n": 200}


def test_every_blurred_and_noisy_true_clip_is_right_in_every_attribute():
    assert judged_truth(100, blur=0.8, noise=0.03) == PERFECT | {"n": 100}


def test_swapped_colours_are_wrong():
    for index, scene in enumerate(scenes(20, 2)):
        upper, lower = scene.things
        if upper.colour == lower.colour:
            continue
        swapped = Scene(
            (replace(upper, colour=lower.colour), replace(lower, colour=upper.colour)), scene.background
        )
        verdict = score.judge(world.clip(swapped, index), scene)
        assert not verdict["colour"] and not verdict["all"]
        assert verdict["shape"] and verdict["motion"] and verdict["background"]


def test_swapped_places_are_wrong():
    for index, scene in enumerate(scenes(10, 2)):
        assert not score.judge(world.clip(Scene(scene.things[::-1], scene.background), index), scene)["all"]


def test_a_frozen_video_stands_still_whatever_it_shows():
    for index, scene in enumerate(scenes(20)):
        video = world.clip(scene, index)
        frozen = np.repeat(video[8:9], 17, 0)
        assert {thing.motion for thing in score.read(frozen, len(scene.things)).things} == {"standing still"}
        assert score.judge(frozen, scene)["motion"] == all(
            thing.motion == "standing still" for thing in scene.things
        )


def test_reversed_time_reads_as_the_opposite_motion():
    for index, scene in enumerate(scenes(20)):
        reading = score.read(world.clip(scene, index)[::-1], len(scene.things))
        assert [thing.motion for thing in reading.things] == [
            OPPOSITE[thing.motion] for thing in scene.things
        ]


@pytest.mark.parametrize("shape", world.SHAPES)
@pytest.mark.parametrize("drawn", world.SHAPES)
def test_another_shape_of_equal_area_in_the_same_place_is_wrong(shape, drawn):
    asked = Scene((Thing(shape, "green", "moving right"),), "gray")
    placed = (world.Track((0.3, 0.5), (0.65, 0.5), (0.12, 0.12)),)
    video = world.render(Scene((Thing(drawn, "green", "moving right"),), "gray"), placed)
    assert score.judge(video, asked)["all"] == (shape == drawn)


@pytest.mark.parametrize("wrong", [{"colour": "orange"}, {"motion": "standing still"}, {"shape": "square"}])
def test_one_wrong_attribute_is_found_and_only_that_one(wrong):
    asked = Thing("circle", "red", "growing")
    verdict = score.judge(world.clip(Scene((replace(asked, **wrong),), "navy"), 0), Scene((asked,), "black"))
    part = next(iter(wrong))
    assert verdict["things"] == [{name: name != part for name in ("shape", "colour", "motion")}]
    assert not verdict["background"] and verdict["count"] and not verdict["all"]


CIRCLE = Scene((Thing("circle", "red", "moving right"),), "black")


def spoiled(how):
    """A clip of CIRCLE with one fault that leaves most of its pixels as they were."""
    video = world.clip(CIRCLE, 3)
    ground = video[0, 0, 0]
    if how == "vanishes":
        video[13:] = ground
    if how == "appears":
        video[:4] = ground
    if how == "blinks":
        video[8] = ground
    if how == "second blob":
        video[:, 2:8, 45:51] = (60, 200, 60)
    if how == "second blob in one frame":
        video[9, 2:8, 45:51] = (60, 200, 60)
    if how == "morphs":
        video[9:] = world.clip(Scene((replace(CIRCLE.things[0], shape="square"),), "black"), 3)[9:]
    if how == "changes colour":
        video[12:] = world.clip(Scene((replace(CIRCLE.things[0], colour="white"),), "black"), 3)[12:]
    if how == "changes background":
        video[12:] = world.clip(replace(CIRCLE, background="gray"), 3)[12:]
    if how == "turns back":
        video[9:] = video[7::-1]
    if how == "jumps":
        video = np.concatenate([np.repeat(video[:1], 9, 0), np.repeat(video[-1:], 8, 0)])
    if how == "drifts diagonally":
        video = np.stack([np.roll(frame, 2 * i - 16, axis=0) for i, frame in enumerate(video)])
    if how == "two colours":
        red = video[..., 0] > 128
        for frame, inside in zip(video, red, strict=True):
            frame[: int(np.argwhere(inside)[:, 0].mean())][
                inside[: int(np.argwhere(inside)[:, 0].mean())]
            ] = (242, 217, 38)
    if how == "ring":
        for frame in video:
            rows, columns = np.argwhere(frame[..., 0] > 128).mean(0)
            y, x = np.mgrid[:96, :96]
            frame[np.hypot(x - columns, y - rows) < 7] = ground
    return video


@pytest.mark.parametrize(
    "how, wrong",
    [
        ("vanishes", "count"),
        ("appears", "count"),
        ("blinks", "count"),
        ("second blob", "count"),
        ("second blob in one frame", "count"),
        ("morphs", "shape"),
        ("changes colour", "colour"),
        ("changes background", "background"),
        ("turns back", "motion"),
        ("jumps", "motion"),
        ("drifts diagonally", "motion"),
        ("two colours", "colour"),
        ("ring", "shape"),
    ],
)
def test_a_spoiled_clip_is_wrong(how, wrong):
    verdict = score.judge(spoiled(how), CIRCLE)
    assert not verdict[wrong] and not verdict["all"]
    assert score.judge(spoiled("not at all"), CIRCLE)["all"]


def test_the_wrong_number_of_things_is_wrong():
    for index, scene in enumerate(scenes(10, 2)):
        assert not score.judge(world.clip(scene, index), Scene(scene.things[:1], scene.background))["count"]
        alone = Scene(scene.things[:1], scene.background)
        assert not score.judge(world.clip(alone, index), scene)["all"]


@pytest.mark.parametrize(
    "video",
    [
        np.zeros((17, 96, 96, 3), np.uint8),
        np.full((5, 32, 48, 3), 255, np.uint8),
        np.random.default_rng(0).integers(0, 256, (17, 96, 96, 3), dtype=np.uint8),
    ],
    ids=["black", "white", "noise"],
)
@pytest.mark.parametrize("things", [1, 2])
def test_a_video_of_nothing_is_read_without_failing_and_is_wrong(video, things):
    verdict = score.judge(video, scenes(1, things)[0])
    assert not (verdict["all"] or verdict["shape"] or verdict["colour"])


def test_a_thing_whose_median_colour_is_the_background_is_read_without_failing():
    video = np.zeros((18, 96, 96, 3), np.uint8)
    for i, frame in enumerate(video):
        frame[40:60, 40:60, i % 3] = 255  # red, green and blue in turn: each channel's median is black
    assert score.read(video).things == (score.ThingReading(None, None, None, True),)


def test_other_sizes_and_lengths_are_read_too():
    for frames, size in ((33, 96), (17, 128), (9, (96, 144))):
        for scene in scenes(6, seed=frames):
            assert score.judge(world.clip(scene, 1, frames, size), scene)["all"], (frames, size, scene)


def test_a_background_that_was_not_asked_for_may_be_any():
    scene = scenes(1)[0]
    assert score.judge(world.clip(scene, 0), Scene(scene.things, None))["background"]


def test_a_wrong_array_is_refused_with_what_was_expected():
    with pytest.raises(
        ValueError,
        match=r"expected a uint8 video \[frames, height, width, 3\], got float32 \[17, 3, 96, 96\]",
    ):
        score.read(np.zeros((17, 3, 96, 96), np.float32))
    with pytest.raises(ValueError, match="things=3; the tiny world holds 1 or 2"):
        score.read(np.zeros((1, 8, 8, 3), np.uint8), 3)
    with pytest.raises(ValueError, match="nothing to summarise"):
        score.summarise([])
    with pytest.raises(ValueError, match="two uint8 arrays of equal shape"):
        score.psnr(np.zeros((2, 2, 3), np.uint8), np.zeros((2, 3, 3), np.uint8))


def test_the_summary_counts_each_attribute_by_itself():
    right = score.judge(world.clip(CIRCLE, 0), CIRCLE)
    wrong = score.judge(world.clip(replace(CIRCLE, background="navy"), 0), CIRCLE)
    assert score.summarise([right, wrong]) == PERFECT | {"n": 2, "background": 0.5, "all": 0.5}


def test_corners_are_counted_the_same_however_soft_the_edges():
    y, x = np.mgrid[-160:161, -160:161].astype(np.float64)
    z = (-y + 1j * x) / 80
    for shape in world.SHAPES:
        inside = world.distance(shape, x, y, 80.0) < 0
        for name, (corners, full) in score.CORNERS.items():
            assert (z**corners).real[inside].mean() / full == pytest.approx(float(shape == name), abs=0.03)
    for blur in (0.0, 1.0, 1.5):
        for shape in world.SHAPES:
            scene = Scene((Thing(shape, "white", "standing still"),), "black")
            video = roughened(world.clip(scene, 2)[:3], np.random.default_rng(0), blur)
            assert score.read(video).things[0].shape == shape


def test_a_pentagon_is_no_star():
    scene = Scene((Thing("star", "white", "standing still"),), "black")
    y, x = np.mgrid[-47.5:48, -47.5:48]
    pentagon = (
        np.max([x * np.sin(a) - y * np.cos(a) for a in np.pi / 5 + 2 * np.pi / 5 * np.arange(5)], 0) < 14
    )
    video = np.repeat((pentagon[None, ..., None] * np.uint8(247)).repeat(3, -1), 17, 0)
    assert score.read(video).things[0].shape == "circle" and not score.judge(video, scene)["all"]


def test_psnr_is_the_textbook_figure():
    a = np.full((4, 4, 3), 100, np.uint8)
    assert score.psnr(a, a) == float("inf")
    assert score.psnr(a, a + np.uint8(10)) == pytest.approx(20 * np.log10(255 / 10))


if __name__ == "__main__":
    for settings in ({}, {"blur": 0.8, "noise": 0.03}):
        print(settings, judged_truth(**settings))
