"""Do the two measured claims measure what they say?  Planted maps, planted pairs, and runs that go on where they stopped."""

import json

import lessons
import numpy as np
import pytest
import small

from moddiff.tiny import world
from moddiff.video import Video

GRID = (5, 6, 6)


def clip_of(seed):
    """A true clip of the scene that a seed stands for, and the centres of its circle in pixels."""
    scene = lessons.circle_scene(seed)
    rng = np.random.default_rng(seed)
    track = world.tracks(scene, rng)[0]
    progress = np.linspace(0, 1, world.FRAMES)[:, None]
    return world.render(scene, (track,)), ((1 - progress) * track.start + progress * track.end) * world.SIZE


def bump(true, width=1.5):
    """A map [f, h, w] with a hill at each place [f, 2] in latent cells, on a floor."""
    rows = columns = np.arange(6) * 2 + 1.0
    apart = (columns[None, None] - true[:, :1, None]) ** 2 + (rows[None, :, None] - true[:, 1:, None]) ** 2
    return 0.02 + 0.5 * np.exp(-apart / (2 * width**2))


def heard(seed, good=((1, 0),), blocks=2, heads=3):
    """A run as `listen` gives it, in which only the good heads follow the circle."""
    video, _ = clip_of(seed)
    true = lessons.in_cells(lessons.centres(video), GRID[0])
    rng = np.random.default_rng(seed)
    maps = rng.random((blocks, heads, *GRID)) * 0.1
    for place in good:
        maps[place] = bump(true)
    return dict(maps=maps.astype(np.float16), true=true, shown=video[::4])


def test_the_circle_is_found_where_it_was_drawn():
    for seed in range(6):
        video, true = clip_of(seed)
        assert np.abs(lessons.centres(video) - true).max() < 1.0


def test_an_empty_frame_has_no_place_and_counts_as_a_miss():
    video, _ = clip_of(0)
    blank = video.copy()
    blank[8:] = video[0, 0, 0]
    places = lessons.centres(blank)
    assert np.isnan(places[8:]).all() and not np.isnan(places[:8]).any()
    assert lessons.near(np.array([0.5, np.nan, 2.0, 0.9])) == 0.5


def test_latent_frames_take_the_mean_of_their_pixel_frames():
    places = np.arange(17.0)[:, None] * np.array([8.0, 16.0])
    cells = lessons.in_cells(places, 5)
    assert cells[:, 0].tolist() == [0, 2.5, 6.5, 10.5, 14.5] and np.allclose(cells[:, 1], 2 * cells[:, 0])


def test_the_centre_of_a_hill_is_its_place_whatever_the_floor():
    true = np.array([[5.0, 5.0], [7.0, 3.0], [3.0, 7.0]])
    for floor in (0, 0.3):
        assert np.abs(lessons.mass_centre(bump(true) + floor) - true).max() < 0.3


def test_the_heads_that_follow_are_chosen_and_the_others_are_not():
    chosen = [heard(seed, good=((1, 0), (0, 2))) for seed in range(1000, 1006)]
    facts, apart, control = lessons.words_facts(
        chosen, [heard(seed, good=((1, 0), (0, 2))) for seed in range(8)]
    )
    assert {tuple(place) for place in facts["heads"]} <= {(1, 0), (0, 2)}
    assert (
        facts["near"] == 1.0
        and facts["control"] < 0.6
        and apart.shape == control.shape == (8, 5)
        and facts["frames"] == 40
    )


def test_a_head_that_follows_only_where_it_was_chosen_is_found_out():
    chosen = [heard(seed) for seed in range(1000, 1006)]
    facts, *_ = lessons.words_facts(chosen, [heard(seed, good=()) for seed in range(8)])
    assert facts["near"] < 0.6


def test_the_words_command_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    ran = []
    pipe = small.pipeline(tmp_path)
    monkeypatch.setattr("moddiff.load", lambda model: pipe, raising=False)
    monkeypatch.setattr(lessons, "listen", lambda pipe, seed: (ran.append(seed), heard(seed))[1])
    out = tmp_path / "figures" / "word_map.png"
    lessons.words(seeds=3, choosing=2, out=out, model="tiny")
    assert ran == [1000, 1001, 0, 1, 2] and out.read_bytes()[1:4] == b"PNG"
    lessons.words(seeds=4, choosing=2, out=out, model="tiny")
    assert ran == [1000, 1001, 0, 1, 2, 3]
    facts = json.loads(out.with_suffix(".json").read_text())
    assert facts["seeds"] == 4 and facts["near"] == 1.0
    assert (
        "within 1 latent cell of the circle in 100.0% of 20 latent frames of 4 seeds"
        in capsys.readouterr().out
    )


def test_other_weights_are_other_runs(tmp_path):
    pipe = small.pipeline(tmp_path)
    before = lessons.mark_of(pipe)
    assert before == lessons.mark_of(pipe) != lessons.mark_of(pipe, 1)
    pipe.dit.blocks[0].ffn[0].weight.data.mul_(1.5)
    assert lessons.mark_of(pipe) != before


def test_listening_gives_a_map_for_every_head_and_a_place_for_every_latent_frame(tmp_path):
    run = lessons.listen(small.pipeline(tmp_path), seed=1)
    assert (
        run["maps"].shape == (2, 2, 3, 2, 3)
        and run["true"].shape == (3, 2)
        and run["shown"].shape == (3, 32, 48, 3)
    )
    assert 0 < run["maps"].max() <= 1


def test_a_pair_differs_in_colour_and_shape_alone():
    for seed in range(50):
        (a, b) = (scene.things[0] for scene in lessons.pair_of(seed))
        assert a.colour != b.colour and a.shape != b.shape and a.motion == b.motion
        assert len({scene.background for scene in lessons.pair_of(seed)}) == 1


class Planted(lessons.Pair):
    """A pair whose videos are true clips: the colour comes from A where block 1 is transplanted, the shape where block 3 is."""

    runs, colour = 0, {1}

    def _clip(self, colour, shape):
        scene = world.Scene((world.Thing(shape, colour, "standing still"),), "black")
        return lessons.seen_as(Video(world.clip(scene, seed=3), 8))

    def _first(self):
        return self._clip(self.scenes[0].things[0].colour, self.scenes[0].things[0].shape)

    def _second(self):
        return self._clip(self.scenes[1].things[0].colour, self.scenes[1].things[0].shape)

    def _edited(self, blocks, edit):
        Planted.runs += 1
        a, b = (scene.things[0] for scene in self.scenes)
        real = edit == "transplant"
        return self._clip(
            (a if real and self.colour <= set(blocks) else b).colour, (a if real and 3 in blocks else b).shape
        )


def planted(tmp_path):
    keep = lessons.Keep(tmp_path, "mark")
    return lambda seed: Planted(None, seed, 4, keep)


def test_the_sweep_finds_the_block_that_carries_the_colour_and_not_the_shape(tmp_path):
    pairs = lessons.usable_pairs(planted(tmp_path), 1000, 2)
    place, tried = lessons.find_blocks(pairs, 4)
    assert place == (1, 1)
    assert tried[0, 3] == (1.0, 0.0, 0.0) and tried[0, 2] == (1.0, 1.0, 1.0)
    assert len(tried) == 4 * 3 + 1  # all four blocks are one set, not four
    before = Planted.runs
    lessons.find_blocks(pairs, 4)
    assert Planted.runs == before  # everything was kept


def test_the_sweep_finds_a_set_that_leaves_the_middle_out(tmp_path):
    class Apart(Planted):
        """The colour needs the first and the last block, with the shape between them."""

        colour = {0, 4}

    pair = Apart(None, 1000, 4, lessons.Keep(tmp_path, "mark"))
    place, tried = lessons.find_blocks([pair], 5)
    assert place == (4, 0) and lessons.ring(*place, 5) == [0, 4]
    assert (
        tried[4, 2] == (1.0, 1.0, 1.0)
        and tried[0, 4] == (1.0, 0.0, 0.0)
        and not any(both for (f, l), (_, _, both) in tried.items() if f <= l)
    )


@pytest.mark.parametrize(
    ("first", "last", "blocks"),
    [(2, 4, [2, 3, 4]), (6, 1, [0, 1, 6, 7]), (3, 3, [3]), (0, 7, [*range(8)]), (4, 3, [*range(8)])],
)
def test_a_ring_goes_on_at_the_first_block(first, last, blocks):
    assert lessons.ring(first, last, 8) == blocks


def test_the_facts_of_a_transplant_hold_their_controls(tmp_path):
    pairs = lessons.usable_pairs(planted(tmp_path), 0, 3)
    facts, became = lessons.transplant_facts(pairs, (1, 2), 4, chosen_on=2)
    assert facts["blocks"] == [1, 2] and facts["other_blocks"] == [0, 3]
    assert facts["chosen"] == dict(colour_moved=1.0, shape_stayed=1.0, both=1.0, shape_moved=0.0)
    assert facts["other blocks"] == dict(colour_moved=0.0, shape_stayed=0.0, both=0.0, shape_moved=1.0)
    assert (
        facts["all blocks"]["shape_stayed"] == 0.0
        and facts["noise"]["colour_moved"] == 0.0
        and facts["identity_changes_nothing"]
    )
    _, tried = lessons.find_blocks(pairs, 4)
    lessons.finish(
        lessons.transplant_figure(pairs, became, tried, facts, 4), facts, tmp_path / "transplant.png"
    )
    assert json.loads((tmp_path / "transplant.json").read_text())["blocks"] == [1, 2]


def test_weights_that_do_not_obey_are_named_as_the_reason(tmp_path):
    class Deaf(Planted):
        right = False

    with pytest.raises(
        ValueError,
        match="of 12 pairs of prompts only 0 gave two videos with the colour and shape asked for; 2 are needed",
    ):
        lessons.usable_pairs(lambda seed: Deaf(None, seed, 4, lessons.Keep(tmp_path, "m")), 0, 2)


def test_a_real_pair_of_a_small_model_runs_with_every_edit_and_the_identity_changes_nothing(tmp_path):
    pair = lessons.Pair(small.pipeline(tmp_path), 0, 2, lessons.Keep(tmp_path / "parts", "mark"))
    assert pair.moved(pair.b)[1] and len(pair.prompts) == 2
    assert np.array_equal(pair.under([0, 1], "identity")["shown"], pair.b["shown"])
    assert np.array_equal(
        pair.under([0, 1])["shown"], pair.a["shown"]
    )  # the words of A in all blocks: the other run
    assert not np.array_equal(pair.under([0], "noise")["shown"], pair.b["shown"])
