"""Do maps lie where the attention is, and does the picture say which frame, word, head and scale it shows?"""

import numpy as np
import pytest
import torch
from matplotlib.collections import QuadMesh

from moddiff.pipeline import Word
from moddiff.video import Video
from moddiff.viz.canvas import title_of
from moddiff.viz.maps import (
    attention_rows,
    moments,
    overlay,
    percent,
    show_heads,
    show_words,
    word_animation,
)

GRID = (3, 4, 5)
WORDS = [Word("red", (0,)), Word("circle", (1, 2)), Word("</s>", (3,))]


def ticks(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def probs(heads=2, places=((0, 1, 2), (1, 1, 3), (2, 1, 4)), keys=8):
    """All tokens listen to the padding alone, but for one cell a frame: to the two tokens of "circle"."""
    made = torch.zeros(heads, *GRID, keys)
    made[..., 4:] = 1 / (keys - 4)
    for f, row, column in places:
        made[:, f, row, column] = torch.tensor([0, 0.3, 0.7, *[0.0] * (keys - 3)])
    return made.reshape(heads, -1, keys)


def film(frames=9, height=32, width=40):
    return Video(np.random.default_rng(0).integers(0, 256, (frames, height, width, 3), np.uint8), 8)


def tile(picture, row, column, gap=1, shape=GRID[1:]):
    h, w = shape
    return np.asarray(picture)[
        row * (h + gap) : row * (h + gap) + h, column * (w + gap) : column * (w + gap) + w
    ]


# ---- words ----


def test_a_word_lights_up_where_it_is_heard():
    drawn = show_words(probs(), WORDS, GRID)
    ax = drawn.axes[0]
    for frame, (_, row, column) in enumerate(((0, 1, 2), (1, 1, 3), (2, 1, 4))):
        expected = np.zeros(GRID[1:])
        expected[row, column] = 1
        assert np.allclose(
            tile(ax.images[0].get_array(), 1, frame), expected
        )  # both tokens of the word, summed
    assert ticks(ax.yaxis) == [
        "red\nmean 0%, most 0%",
        "circle\nmean 5%, most 100%",  # what the row's full brightness stands for
        "</s>\nmean 0%, most 0%",
        "(padding)\nmean 95%, most 100%",
    ]
    assert ticks(ax.xaxis) == ["0", "1", "2"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("latent frame", "word")
    assert title_of(drawn) == "Where each word is heard, mean over heads"


def test_heads_are_averaged_or_taken_one_by_one():
    both = torch.cat([probs(1), probs(1, places=((0, 0, 0),))])
    mean = show_words(both, WORDS[1:2], GRID).axes[0].images[0].get_array()
    assert np.allclose(tile(mean, 0, 0)[[0, 1], [0, 2]], 1.0)  # half in each head, and the half is the most
    second = show_words(both, WORDS[1:2], GRID, head=1)
    assert (
        tile(second.axes[0].images[0].get_array(), 0, 0)[0, 0] == 1
        and tile(second.axes[0].images[0].get_array(), 0, 1).max() == 0
    )
    assert title_of(second) == "Where each word is heard, head 1"
    heads = show_heads(both, WORDS[1], GRID)
    assert (
        ticks(heads.axes[0].yaxis) == ["head 0\nmean 5%, most 100%", "head 1\nmean 1.7%, most 100%"]
        and title_of(heads) == 'Where each head hears "circle"'
    )
    alone, first = (
        drawn.axes[0].images[0].get_array().filled(-1)
        for drawn in (show_words(both[0], WORDS, GRID), show_words(both, WORDS, GRID, head=0))
    )
    assert np.array_equal(alone, first)


def test_a_faint_word_is_as_bright_as_a_loud_one_and_the_scale_says_so():
    half = probs() * torch.tensor([1, 0.5, 0.5, 1, 1, 1, 1, 1])
    drawn = show_words(half, WORDS, GRID)
    picture = drawn.axes[0].images[0].get_array()
    assert tile(picture, 1, 0).max() == tile(picture, 3, 0).max() == 1
    assert ticks(drawn.axes[0].yaxis)[1].endswith("most 50%")
    assert ticks(drawn.axes[1].yaxis) == ["0", "row's most"]


def test_a_map_of_some_words_says_how_much_of_the_listening_it_leaves_out():
    below = (
        show_words(probs(), WORDS[:2], GRID).axes[0].get_xlabel()
    )  # 57 of 60 tokens hear the padding alone
    assert below == "latent frame\nnot shown: 95% of the listening\n(other words, </s>, padding)"


def test_maps_lie_over_the_frames_of_their_own_moment():
    video = film()
    ax = show_words(probs(), WORDS[1:2], GRID, video).axes[0]
    assert ticks(ax.yaxis) == ["the video", "circle\nmean 5%, most 100%"] and ticks(ax.xaxis) == [
        "0",
        "1-4",
        "5-8",
    ]
    picture = ax.images[0].get_array()
    for column, frame in enumerate((0, 2, 6)):
        assert np.allclose(tile(picture, 0, column, 3, (32, 40)), video.frames[frame] / 255)
    lit = tile(picture, 1, 2, 3, (32, 40))
    assert np.allclose(lit[24:], video.frames[6][24:] / 255 * 0.55)  # far from the word only dimmed
    assert not np.allclose(
        lit[12, 36], video.frames[6][12, 36] / 255 * 0.55, atol=0.05
    )  # at row 1, column 4 of 8 x 8 pixel cells


def test_an_overlay_leaves_the_frame_visible_below_it():
    frame = np.full((8, 8, 3), 200, np.uint8)
    assert np.allclose(overlay(frame, np.zeros((2, 2))), 200 / 255 * 0.55)
    full = overlay(frame, np.ones((2, 2)))
    assert full.std((0, 1)).max() < 1e-9 and full[0, 0, 0] > full[0, 0, 2]  # viridis at its end is yellow
    assert not np.allclose(full, overlay(frame // 2, np.ones((2, 2))))


@pytest.mark.parametrize(
    "change, message",
    [
        (
            dict(grid=(3, 4, 4)),
            r"probs has 60 tokens, but grid=\(3, 4, 4\) \(frames, height, width\) has 48; use pipe.grid",
        ),
        (dict(head=2), r"head=2, but probs \[2, 60, 8\] has heads 0 to 1"),
        (dict(probs=probs()[0], head=0), "has no heads any more"),
        (
            dict(probs=probs()[:, :, :3]),
            r"the words use tokens up to 3, but probs has 3 columns; take the words of the prompt that ran",
        ),
        (
            dict(probs=torch.zeros(2, 2, 60, 8)),
            r"probs arrived with shape \[2, 2, 60, 8\]; expected \[heads, n, m\] or \[n, m\]",
        ),
        (dict(words=[]), "the words use tokens up to none"),
        (
            dict(video=film(8)),
            "a video of 8 frames does not belong to a grid of 3 latent frames, such as 9 do",
        ),
        (
            dict(video=np.zeros((9, 8, 8))),
            r"a video arrived as ndarray, float64 \[9, 8, 8\]; expected a Video",
        ),
    ],
)
def test_what_does_not_fold_into_a_picture_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        show_words(**(dict(probs=probs(), words=WORDS, grid=GRID) | change))


def test_latent_frames_stand_for_one_frame_and_then_for_groups():
    assert moments((5, 6, 6), range(17)) == [(0, 0), (1, 4), (5, 8), (9, 12), (13, 16)]
    assert moments((2, 1, 1), range(9)) == [(0, 0), (1, 8)] and moments((1, 1, 1), range(1)) == [(0, 0)]
    for f, count in ((1, 5), (3, 1), (3, 4)):
        with pytest.raises(ValueError, match=f"a video of {count} frames does not belong to a grid of {f}"):
            moments((f, 1, 1), range(count))


def test_the_animation_follows_the_word_through_the_video():
    black = Video(np.zeros((9, 32, 40, 3), np.uint8), 8)
    played = word_animation(probs(), WORDS[1:2], GRID, black, size=40)
    assert (
        played.frames.shape == (9, 32 + 18, 80, 3)
        and played.fps == 8
        and "data:video/mp4;base64" in played._repr_html_()
    )
    assert played.frames[:, 18:, :40].max() == 0  # the plain video on the left
    centres = []
    for frame in played.frames[:, 18:, 40:].astype(float).sum(-1):
        brightest = np.argwhere(frame > 0.98 * frame.max())  # the middle of the bright spot
        centres.append(brightest.mean(0))
    for k, (first, last) in enumerate(((0, 0), (1, 4), (5, 8))):
        for row, column in centres[first : last + 1]:
            assert abs(row - 11.5) < 4 and abs(column - (8 * (2 + k) + 3.5)) < 4.5


# ---- self-attention ----


def test_a_row_of_self_attention_is_folded_and_its_token_outlined():
    whole = torch.softmax(torch.randn(2, 60, 60, generator=torch.Generator().manual_seed(0)), -1)
    query = (1, 2, 3)
    number = 1 * 20 + 2 * 5 + 3
    drawn = attention_rows(whole, GRID, query)
    ax = drawn.axes[0]
    for head in range(2):
        row = whole[head, number].reshape(GRID)
        for frame in range(3):
            assert np.allclose(tile(ax.images[0].get_array(), head, frame), row[frame] / row.max(), atol=1e-6)
    corners = [patch.get_xy() for patch in ax.patches]
    assert (
        np.allclose(corners, [(6 + 3 - 0.5, 2 - 0.5), (6 + 3 - 0.5, 5 + 2 - 0.5)])
        and ax.patches[0].get_width() == 1
    )
    assert title_of(drawn) == "What the token at frame 1, row 2, column 3 listens to" and ticks(ax.yaxis)[
        1
    ].startswith("head 1\nmean 1.7%, most ")
    for other in (
        attention_rows(whole, GRID, number),
        attention_rows(whole[:, number], GRID, query),
        attention_rows(whole, GRID, torch.tensor(number)),
        attention_rows(whole, GRID, torch.tensor(query)),
    ):
        assert np.array_equal(other.axes[0].images[0].get_array(), ax.images[0].get_array(), equal_nan=True)
    over = attention_rows(whole, GRID, query, film()).axes[0]
    assert (
        np.allclose(over.patches[0].get_xy(), (43 + 3 * 8 - 0.5, 35 + 2 * 8 - 0.5))
        and over.patches[0].get_width() == 8
    )
    with pytest.raises(
        ValueError,
        match=r"query=\(3, 0, 0\); expected \(frame, row, column\) inside \(3, 4, 5\), or a token number",
    ):
        attention_rows(whole, GRID, (3, 0, 0))
    with pytest.raises(ValueError, match="but grid="):
        attention_rows(whole, (1, 2, 3), 0)


# ---- latents and films ----


# ---- the VAE's reach ----


def test_one_head_or_the_mean_of_all_keeps_its_own_name():
    whole = torch.softmax(torch.randn(3, 60, 60, generator=torch.Generator().manual_seed(0)), -1)
    every = attention_rows(whole, GRID, 7).axes[0].images[0].get_array()
    ax = attention_rows(whole, GRID, 7, head=2).axes[0]
    assert [label.split("\n")[0] for label in ticks(ax.yaxis)] == ["head 2"] and ax.get_ylabel() == "head"
    assert np.array_equal(tile(ax.images[0].get_array(), 0, 1), tile(every, 2, 1))
    mean = attention_rows(whole, GRID, 7, head="mean").axes[0]
    assert ticks(mean.yaxis)[0].startswith("mean over heads\n")
    row = whole.mean(0)[7].reshape(GRID)
    assert np.allclose(tile(mean.images[0].get_array(), 0, 1), row[1] / row.max(), atol=1e-6)
    with pytest.raises(ValueError, match="head=3; expected None, 'mean' or one of 0 to 2"):
        attention_rows(whole, GRID, 7, head=3)


# ---- scales ----


def test_the_colour_bar_beside_an_overlay_shows_the_colours_of_the_overlay():
    film = np.full((9, 32, 40, 3), (200, 100, 0), np.uint8)
    bar = show_words(probs(), WORDS[1:2], GRID, film).axes[1]
    (solid,) = bar.findobj(QuadMesh)
    shades = solid.cmap(np.linspace(0, 1, 256))[:, :3]
    for glow in (0.0, 0.25, 0.5, 1.0):
        flat = overlay(film[0], np.full(GRID[1:], glow))[0, 0]
        assert np.allclose(shades[round(glow * 255)], flat, atol=0.01)
    assert bar.get_ylabel() == "part of\nthe listening"


def test_shares_have_digits_enough_to_tell_little_from_nothing():
    shares = (0, 0.00014, 0.00231, 0.042, 0.42, 0.9974, 1)
    assert [percent(share) for share in shares] == [
        "0%",
        "0.014%",
        "0.23%",
        "4.2%",
        "42%",
        "99.7%",
        "100%",
    ]


def test_captions_of_the_animation_say_what_full_brightness_means(monkeypatch):
    from moddiff.viz import maps

    captions = []
    monkeypatch.setattr(maps, "captioned", lambda frames, texts: captions.extend(texts) or frames)
    word_animation(probs() * 0.01, WORDS[1:2], GRID, film())
    assert captions == ["video", "circle, to 1%"]


def test_pictures_of_words_refuse_what_is_no_word():
    with pytest.raises(ValueError, match=r"words=\['red'\]; expected words with their tokens: pipe.words"):
        show_words(probs(), ["red"], GRID)
    with pytest.raises(ValueError, match=r"words=\['red'\]; expected words with their tokens"):
        show_heads(probs(), "red", GRID)
    many = [Word(f"w{i}", (0,)) for i in range(6)]
    with pytest.raises(ValueError, match="word_animation got 6 rows, w0, w1, .*; expected 5 words at most"):
        word_animation(probs(), many, GRID, film())
    for query in (60, -1, (0, 0), (0, 0, 5)):
        with pytest.raises(ValueError, match="expected .frame, row, column. inside"):
            attention_rows(torch.ones(2, 60, 60), GRID, query)
    with pytest.raises(ValueError, match="but grid=60"):
        show_words(probs(), WORDS, 60)
