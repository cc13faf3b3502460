"""Is the tiny world what it claims?  Clear clips, true captions in four languages, a tenth of it held out."""

import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest

from moddiff.tiny import world
from moddiff.tiny.words import TEMPLATES, say
from moddiff.tiny.world import Scene, Thing

TRIPLES = [
    Thing(shape, colour, motion)
    for shape in world.SHAPES
    for colour in world.COLOURS
    for motion in world.MOTIONS
]


def test_held_out_triples_are_a_tenth_and_every_name_is_on_both_sides():
    out = [t for t in TRIPLES if world.held_out(t)]
    trained = [t for t in TRIPLES if not world.held_out(t)]
    assert len(TRIPLES) == 196 and len(out) == 20
    for part, names in (("shape", world.SHAPES), ("colour", world.COLOURS), ("motion", world.MOTIONS)):
        for side in (out, trained):
            assert {getattr(t, part) for t in side} == set(names)


HELD_OUT = """
from moddiff.tiny import world
from moddiff.tiny.world import Thing
names = world.SHAPES, world.COLOURS, world.MOTIONS
print([(s, c, m) for s in names[0] for c in names[1] for m in names[2] if world.held_out(Thing(s, c, m))])
print(world.stable_seed("a", 1))
"""


def test_held_out_triples_are_the_same_in_every_process():
    environment = {"PYTHONHASHSEED": "7", "PYTHONPATH": ":".join(sys.path)}
    command = [sys.executable, "-c", HELD_OUT]
    other = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    mine = [(t.shape, t.colour, t.motion) for t in TRIPLES if world.held_out(t)]
    assert other.stdout.split("\n")[:2] == [str(mine), str(world.stable_seed("a", 1))]


def test_held_out_triples_never_enter_a_training_scene():
    rng = np.random.default_rng(0)
    seen = Counter(thing for _ in range(10_000) for thing in world.sample_scene(rng, split="train").things)
    assert not [thing for thing in seen if world.held_out(thing)]
    assert len(seen) == 176  # and everything else does enter


@pytest.mark.parametrize("things", [1, 2])
def test_held_out_scenes_hold_a_held_out_triple(things):
    rng = np.random.default_rng(1)
    for _ in range(500):
        scene = world.sample_scene(rng, things, "heldout")
        assert len(scene.things) == things and any(map(world.held_out, scene.things))


def test_two_things_can_always_be_told_apart_by_name():
    rng = np.random.default_rng(2)
    for _ in range(2_000):
        upper, lower = world.sample_scene(rng, 2, "any").things
        assert (upper.shape, upper.colour) != (lower.shape, lower.colour)


def test_the_canonical_english_captions_are_the_documented_ones():
    red, white = Thing("circle", "red", "moving left"), Thing("star", "white", "standing still")
    assert world.caption(Scene((red,), "black")) == "a red circle moving left on a black background"
    assert (
        world.caption(Scene((red, white), "navy"))
        == "a red circle moving left above a white star standing still on a navy background"
    )
    assert (
        world.caption(Scene((Thing("star", "orange", "growing"),), "gray"))
        == "an orange star growing on a gray background"
    )


@pytest.mark.parametrize(
    "language, one, two",
    [
        (
            "es",
            "una estrella blanca quieta sobre un fondo azul marino",
            "un círculo rojo moviéndose hacia la izquierda encima de una estrella blanca quieta "
            "sobre un fondo azul marino",
        ),
        (
            "de",
            "ein weißer Stern, der stillsteht, auf marineblauem Hintergrund",
            "ein roter Kreis, der sich nach links bewegt, über einem weißen Stern, der stillsteht, "
            "auf marineblauem Hintergrund",
        ),
        (
            "zh",
            "深蓝色背景上，一个白色的五角星静止不动",
            "深蓝色背景上，上面一个红色的圆形向左移动，下面一个白色的五角星静止不动",
        ),
    ],
)
def test_other_languages_agree_in_gender_and_order(language, one, two):
    red, white = Thing("circle", "red", "moving left"), Thing("star", "white", "standing still")
    assert world.caption(Scene((white,), "navy"), language) == one
    assert world.caption(Scene((red, white), "navy"), language) == two


@pytest.mark.parametrize("language", world.LANGUAGES)
def test_every_template_of_every_thing_parses_back_with_no_unknown_word(language):
    rng = np.random.default_rng(3)
    scenes = [Scene((thing,), tuple(world.BACKGROUNDS)[i % 4]) for i, thing in enumerate(TRIPLES)]
    scenes += [world.sample_scene(rng, 2, "any") for _ in range(100)]
    for scene in scenes:
        for template in TEMPLATES[language][len(scene.things)]:
            text = say(template, language, scene)
            said = world.parse(text)
            assert (
                said is not None
                and said.things == scene.things
                and said.background in (scene.background, None)
            ), text
            assert world.unknown(text) == [], text


@pytest.mark.parametrize("language", world.LANGUAGES)
def test_drawn_captions_vary_repeat_with_their_seed_and_parse(language):
    scene = Scene((Thing("star", "orange", "growing"), Thing("square", "blue", "moving up")), "brown")
    drawn = [world.caption(scene, language, np.random.default_rng(i)) for i in range(80)]
    assert drawn == [world.caption(scene, language, np.random.default_rng(i)) for i in range(80)]
    assert len(set(drawn)) >= 5 and drawn.count(world.caption(scene, language)) >= 10
    assert all(world.parse(text).things == scene.things for text in drawn)


def test_words_without_meaning_are_named_once_in_order():
    assert world.unknown("A big red circle 🎈 dances left, big, on a pink background!") == [
        "big",
        "🎈",
        "dances",
        "pink",
    ]
    assert world.unknown("一个快红色圆形") == ["快"]
    assert world.unknown("") == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a red circle",
        "red moving left",
        "a red circle moving left, a star growing",
        "a red circle left, a blue star up",
        "a red circle moving left on black and navy",
    ],
)
def test_a_prompt_that_names_no_whole_scene_is_not_parsed(text):
    assert world.parse(text) is None


def test_wrong_names_are_refused_with_the_choices():
    with pytest.raises(
        ValueError,
        match="shape='cube' is not in the tiny world; choose one of circle, square, triangle, star",
    ):
        Thing("cube", "red", "growing")
    with pytest.raises(
        ValueError, match="background='pink' is not in the tiny world; choose one of black, gray, brown, navy"
    ):
        Scene((Thing("star", "red", "growing"),), "pink")
    with pytest.raises(ValueError, match="1 or 2 things, got 3"):
        Scene((Thing("star", "red", "growing"),) * 3, "navy")
    with pytest.raises(ValueError, match="language='fr'; the tiny world speaks en, es, de, zh"):
        world.caption(Scene((Thing("star", "red", "growing"),), "navy"), "fr")
    with pytest.raises(ValueError, match="split='test'; choose 'train', 'heldout' or 'any'"):
        world.sample_scene(np.random.default_rng(0), split="test")


def test_evaluation_prompts_never_change_and_are_the_same_scenes_in_every_language():
    prompts = world.prompts(256)
    assert prompts == world.prompts(256) and prompts[:10] == world.prompts(10)
    assert len({scene.things for _, scene in prompts}) == 20  # every held-out triple is asked for
    assert [scene for _, scene in prompts] == [scene for _, scene in world.prompts(256, language="zh")]
    assert all(world.parse(text) == scene for text, scene in prompts)
    assert prompts[0][0] == "a yellow square moving down on a gray background"


def test_a_clip_repeats_with_its_seed_and_changes_with_it():
    scene = Scene((Thing("star", "white", "moving up"),), "navy")
    first = world.clip(scene, 0)
    assert first.shape == (17, 96, 96, 3) and first.dtype == np.uint8
    assert np.array_equal(first, world.clip(scene, 0)) and not np.array_equal(first, world.clip(scene, 1))
    assert world.clip(scene, "any text", frames=5, size=(48, 64)).shape == (5, 48, 64, 3)


def _extent(frame, background):
    """Rows and columns where anything is drawn: (top, bottom, left, right), bottom and right exclusive."""
    drawn = np.abs(frame.astype(int) - background).sum(-1) > 0
    rows, columns = np.flatnonzero(drawn.any(1)), np.flatnonzero(drawn.any(0))
    return rows[0], rows[-1] + 1, columns[0], columns[-1] + 1


@pytest.mark.parametrize("thing", TRIPLES[::3], ids=lambda t: f"{t.colour} {t.shape} {t.motion}")
def test_one_thing_stays_in_view_and_does_what_its_name_says(thing):
    video = world.clip(Scene((thing,), "black"), 5)
    boxes = np.array([_extent(frame, video[0, 0, 0]) for frame in video])
    assert boxes.min() >= 1 and boxes.max() <= 95
    middle = (boxes[:, [2, 0]] + boxes[:, [3, 1]]) / 2
    moved, height = middle[-1] - middle[0], boxes[:, 1] - boxes[:, 0]
    direction = world.DIRECTION.get(thing.motion)
    if direction:
        along = np.array(direction) @ moved
        assert along >= 0.28 * 96 and np.abs(moved).sum() <= along + 1.5
    elif thing.motion == "standing still":
        assert np.array_equal(video[0], video[-1])
    else:
        ratio = height[-1] / height[0]
        assert (ratio if thing.motion == "growing" else 1 / ratio) >= 1.6


def test_a_foreign_outline_is_drawn_where_the_things_would_be():
    scene = Scene((Thing("circle", "red", "moving left"),), "black")

    def square(x, y, radius):
        return world.distance("square", x, y, radius)

    circle, drawn = world.clip(scene, seed=3), world.clip(scene, seed=3, outline=square)
    track = world.tracks(scene, np.random.default_rng(3))
    square = world.render(Scene((Thing("square", "red", "moving left"),), "black"), track)
    assert np.array_equal(drawn, square) and not np.array_equal(drawn, circle)


def test_two_things_stay_each_in_its_own_half():
    rng = np.random.default_rng(4)
    for index in range(60):
        scene = world.sample_scene(rng, 2, "any")
        upper, lower = world.tracks(scene, np.random.default_rng(index))
        tracks = (upper, lower)
        for thing, track, (top, bottom) in zip(scene.things, tracks, ((0, 0.5), (0.5, 1)), strict=True):
            side, up, down = world.REACH[thing.shape]
            for (x, y), radius in zip((track.start, track.end), track.radius, strict=True):
                assert side * radius <= x <= 1 - side * radius
                assert top + up * radius < y < bottom - down * radius
            if thing.motion in ("moving up", "moving down"):
                assert abs(track.end[1] - track.start[1]) >= 0.14


def test_equal_radius_means_equal_area_for_every_shape():
    y, x = np.mgrid[-40:41, -40:41].astype(np.float32)
    areas = {
        shape: np.clip(0.5 - world.distance(shape, x, y, np.float32(20)), 0, 1).sum()
        for shape in world.SHAPES
    }
    for shape, area in areas.items():
        assert abs(area / (np.pi * 20**2) - 1) < 0.01, (shape, area)


def test_a_star_keeps_five_points_and_five_notches():
    angles = np.linspace(0, 2 * np.pi, 360, endpoint=False)
    x, y = np.float32(np.sin(angles) * 20), np.float32(-np.cos(angles) * 20)
    inside = world.distance("star", x, y, np.float32(20)) < 0  # walk once around: in and out of each point
    assert np.count_nonzero(inside != np.roll(inside, 1)) == 10 and inside[0] and not inside[180]


def test_a_clip_is_drawn_fast_enough_to_train_on():
    scene = world.sample_scene(np.random.default_rng(5), 2)
    start = time.process_time()
    for index in range(20):
        world.clip(scene, index)
    assert (time.process_time() - start) / 20 < 0.05  # 6 ms on an idle core
