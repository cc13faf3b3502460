"""Do the two measured claims measure what they say?  Planted maps and pairs, and runs that go on."""

import json

import colour_claim
import kept
import lessons
import numpy as np
import pytest
import small
import word_claim

from moddiff.tiny import world
from moddiff.video import Video

GRID = (5, 6, 6)


def clip_of(seed):
    """A true clip of the scene that a seed stands for, and the centres of its circle in pixels."""
    scene = word_claim.circle_scene(seed)
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
    true = word_claim.in_cells(word_claim.centres(video), GRID[0])
    rng = np.random.default_rng(seed)
    maps = rng.random((blocks, heads, *GRID)) * 0.1
    for place in good:
        maps[place] = bump(true)
    return dict(maps=maps.astype(np.float16), true=true, shown=video[::4])


def test_the_circle_is_found_where_it_was_drawn():
    for seed in range(6):
        video, true = clip_of(seed)
        assert np.abs(word_claim.centres(video) - true).max() < 1.0


def test_an_empty_frame_has_no_place_and_counts_as_a_miss():
    video, _ = clip_of(0)
    blank = video.copy()
    blank[8:] = video[0, 0, 0]
    places = word_claim.centres(blank)
    assert np.isnan(places[8:]).all() and not np.isnan(places[:8]).any()
    assert word_claim.near(np.array([0.5, np.nan, 2.0, 0.9])) == 0.5


def test_latent_frames_take_the_mean_of_their_pixel_frames():
    places = np.arange(17.0)[:, None] * np.array([8.0, 16.0])
    cells = word_claim.in_cells(places, 5)
    assert cells[:, 0].tolist() == [0, 2.5, 6.5, 10.5, 14.5] and np.allclose(cells[:, 1], 2 * cells[:, 0])


def test_the_centre_of_a_hill_is_its_place_whatever_the_floor():
    true = np.array([[5.0, 5.0], [7.0, 3.0], [3.0, 7.0]])
    for floor in (0, 0.3):
        assert np.abs(word_claim.mass_centre(bump(true) + floor) - true).max() < 0.3


def test_the_heads_that_follow_are_chosen_and_the_others_are_not():
    chosen = [heard(seed, good=((1, 0), (0, 2))) for seed in range(1000, 1006)]
    facts, apart, control = word_claim.words_facts(
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
    facts, *_ = word_claim.words_facts(chosen, [heard(seed, good=()) for seed in range(8)])
    assert facts["near"] < 0.6


def test_the_words_command_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    ran = []

    def listen(pipe, seed):
        ran.append(seed)
        return heard(seed)

    pipe = small.pipeline(tmp_path)
    monkeypatch.setattr("moddiff.load", lambda model: pipe, raising=False)
    monkeypatch.setattr(word_claim, "listen", listen)
    out = tmp_path / "figures" / "word_map.png"
    lessons.main(["words", "--seeds", "3", "--choosing", "2", "-o", str(out)])
    assert ran == [1000, 1001, 0, 1, 2] and out.read_bytes()[1:4] == b"PNG"
    lessons.main(["words", "--seeds", "4", "--choosing", "2", "-o", str(out)])
    assert ran == [1000, 1001, 0, 1, 2, 3]
    facts = json.loads(out.with_suffix(".json").read_text())
    assert facts["seeds"] == 4 and facts["near"] == 1.0
    said = "within 1 latent cell of the circle in 100.0% of 20 latent frames of 4 seeds"
    assert said in capsys.readouterr().out


def test_the_transplant_command_writes_what_it_says(tmp_path, monkeypatch, capsys):
    pipe = small.pipeline(tmp_path)
    monkeypatch.setattr("moddiff.load", lambda model: pipe, raising=False)
    monkeypatch.setattr(colour_claim, "Pair", Planted)
    out = tmp_path / "figures" / "transplant.png"
    lessons.main(["transplant", "--pairs", "3", "--choosing", "2", "-o", str(out)])
    assert out.read_bytes()[1:4] == b"PNG" and json.loads(out.with_suffix(".json").read_text())["pairs"] == 3
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "blocks 1: A's colour 100%, B's shape 100%, both 100%; A's shape 0%"
    assert said[-1].startswith("3 pairs; the blocks were found on 2 others.")


def test_other_weights_are_other_runs(tmp_path):
    pipe = small.pipeline(tmp_path)
    before = kept.mark_of(pipe)
    assert before == kept.mark_of(pipe) != kept.mark_of(pipe, 1)
    pipe.dit.blocks[0].ffn[0].weight.data.mul_(1.5)
    assert kept.mark_of(pipe) != before


def test_listening_gives_a_map_for_every_head_and_a_place_for_every_latent_frame(tmp_path):
    run = word_claim.listen(small.pipeline(tmp_path), seed=1)
    assert (
        run["maps"].shape == (2, 2, 3, 2, 3)
        and run["true"].shape == (3, 2)
        and run["shown"].shape == (3, 32, 48, 3)
    )
    assert 0 < run["maps"].max() <= 1


def test_a_pair_differs_in_colour_and_shape_alone():
    for seed in range(50):
        (a, b) = (scene.things[0] for scene in colour_claim.pair_of(seed))
        assert a.colour != b.colour and a.shape != b.shape and a.motion == b.motion
        assert len({scene.background for scene in colour_claim.pair_of(seed)}) == 1


class Planted(colour_claim.Pair):
    """A pair whose videos are true clips: the colour comes from A with block 1, the shape with block 3."""

    runs, colour = 0, frozenset({1})

    def _clip(self, colour, shape):
        scene = world.Scene((world.Thing(shape, colour, "standing still"),), "black")
        return colour_claim.seen_as(Video(world.clip(scene, seed=3), 8))

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
    keep = kept.Keep(tmp_path, "mark")
    return lambda seed: Planted(None, seed, 4, keep)


def test_the_sweep_finds_the_block_that_carries_the_colour_and_not_the_shape(tmp_path):
    pairs = colour_claim.usable_pairs(planted(tmp_path), 1000, 2)
    ends, shares = colour_claim.find_blocks(pairs, 4)
    assert ends == (1, 1)
    assert shares[0, 3] == (1.0, 0.0, 0.0) and shares[0, 2] == (1.0, 1.0, 1.0)
    assert len(shares) == 4 * 3 + 1  # all four blocks are one set, not four
    before = Planted.runs
    colour_claim.find_blocks(pairs, 4)
    assert Planted.runs == before  # everything was kept


def test_the_sweep_finds_a_set_that_leaves_the_middle_out(tmp_path):
    class Apart(Planted):
        """The colour needs the first and the last block, with the shape between them."""

        colour = frozenset({0, 4})

    pair = Apart(None, 1000, 4, kept.Keep(tmp_path, "mark"))
    ends, shares = colour_claim.find_blocks([pair], 5)
    assert ends == (4, 0) and colour_claim.ring(*ends, 5) == [0, 4]
    assert shares[4, 2] == (1.0, 1.0, 1.0) and shares[0, 4] == (1.0, 0.0, 0.0)
    assert not any(both for (first, last), (_, _, both) in shares.items() if first <= last)


@pytest.mark.parametrize(
    ("first", "last", "blocks"),
    [(2, 4, [2, 3, 4]), (6, 1, [0, 1, 6, 7]), (3, 3, [3]), (0, 7, [*range(8)]), (4, 3, [*range(8)])],
)
def test_a_ring_goes_on_at_the_first_block(first, last, blocks):
    assert colour_claim.ring(first, last, 8) == blocks


def test_the_facts_of_a_transplant_hold_their_controls(tmp_path):
    pairs = colour_claim.usable_pairs(planted(tmp_path), 0, 3)
    facts, became = colour_claim.transplant_facts(pairs, (1, 2), 4, chosen_on=2)
    assert facts["blocks"] == [1, 2] and facts["other_blocks"] == [0, 3]
    assert facts["chosen"] == dict(colour_moved=1.0, shape_stayed=1.0, both=1.0, shape_moved=0.0)
    assert facts["other blocks"] == dict(colour_moved=0.0, shape_stayed=0.0, both=0.0, shape_moved=1.0)
    assert (
        facts["all blocks"]["shape_stayed"] == 0.0
        and facts["noise"]["colour_moved"] == 0.0
        and facts["identity_changes_nothing"]
    )
    _, shares = colour_claim.find_blocks(pairs, 4)
    kept.finish(
        colour_claim.transplant_figure(pairs, became, shares, facts, 4), facts, tmp_path / "transplant.png"
    )
    assert json.loads((tmp_path / "transplant.json").read_text())["blocks"] == [1, 2]


def test_weights_that_do_not_obey_are_named_as_the_reason(tmp_path):
    class Deaf(Planted):
        right = False

    with pytest.raises(
        ValueError,
        match="of 12 pairs of prompts only 0 gave two videos with the colour and shape asked for; 2 are",
    ):
        colour_claim.usable_pairs(lambda seed: Deaf(None, seed, 4, kept.Keep(tmp_path, "m")), 0, 2)


def test_a_real_pair_of_a_small_model_runs_with_every_edit_and_the_identity_changes_nothing(tmp_path):
    pair = colour_claim.Pair(small.pipeline(tmp_path), 0, 2, kept.Keep(tmp_path / "parts", "mark"))
    assert pair.moved(pair.b)[1] and len(pair.prompts) == 2
    assert np.array_equal(pair.under([0, 1], "identity")["shown"], pair.b["shown"])
    assert np.array_equal(
        pair.under([0, 1])["shown"], pair.a["shown"]
    )  # the words of A in all blocks: the other run
    assert not np.array_equal(pair.under([0], "noise")["shown"], pair.b["shown"])
