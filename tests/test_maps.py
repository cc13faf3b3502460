"""Do the maps lie where the attention is, frame by frame, and does the picture say which frame, word and head it shows?"""

from types import SimpleNamespace

import numpy as np
import pytest
import small
import torch

from moddiff.conditioning import first_frame_mask
from moddiff.pipeline import Word
from moddiff.vae import VAE, VAEConfig
from moddiff.video import Video
from moddiff.viz.canvas import title_of
from moddiff.viz.maps import (
    attention_rows,
    films,
    frame_sheet,
    gallery,
    influence,
    latent_sheet,
    mask_over_time,
    moments,
    overlay,
    receptive_field,
    show_heads,
    show_words,
    word_animation,
    x0_strip,
)

GRID = (3, 4, 5)
WORDS = [Word("red", (0,)), Word("circle", (1, 2)), Word("</s>", (3,))]


def ticks(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def probs(heads=2, places=((0, 1, 2), (1, 1, 3), (2, 1, 4)), keys=8):
    """Every token listens to the padding alone, but for one cell in each frame that splits its attention over the two tokens of "circle"."""
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


# ---- words ------------------------------------------------------------------------------------------------------------


def test_a_word_lights_up_where_it_is_heard():
    drawn = show_words(probs(), WORDS, GRID)
    ax = drawn.axes[0]
    for frame, (_, row, column) in enumerate(((0, 1, 2), (1, 1, 3), (2, 1, 4))):
        expected = np.zeros(GRID[1:])
        expected[row, column] = 1
        assert np.allclose(
            tile(ax.images[0].get_array(), 1, frame), expected
        )  # both tokens of the word, summed
    assert ticks(ax.yaxis) == ["red  0%", "circle  5%", "</s>  0%", "(padding)  95%"] and ticks(ax.xaxis) == [
        "0",
        "1",
        "2",
    ]
    assert (
        ax.get_xlabel() == "latent frame" and title_of(drawn) == "Where each word is heard, mean over heads"
    )


def test_heads_are_averaged_or_taken_one_by_one():
    both = torch.cat([probs(1), probs(1, places=((0, 0, 0),))])
    mean = show_words(both, WORDS[1:2], GRID, scale="same").axes[0].images[0].get_array()
    assert np.allclose(tile(mean, 0, 0)[[0, 1], [0, 2]], 1.0)  # half in each head, and the half is the most
    second = show_words(both, WORDS[1:2], GRID, head=1)
    assert (
        tile(second.axes[0].images[0].get_array(), 0, 0)[0, 0] == 1
        and tile(second.axes[0].images[0].get_array(), 0, 1).max() == 0
    )
    assert title_of(second) == "Where each word is heard, head 1"
    heads = show_heads(both, WORDS[1], GRID)
    assert (
        ticks(heads.axes[0].yaxis) == ["head 0  5%", "head 1  2%"]
        and title_of(heads) == 'Where each head hears "circle"'
    )
    alone, first = (
        drawn.axes[0].images[0].get_array().filled(-1)
        for drawn in (show_words(both[0], WORDS, GRID), show_words(both, WORDS, GRID, head=0))
    )
    assert np.array_equal(alone, first)


def test_one_scale_for_all_keeps_faint_words_faint():
    own, same = (show_words(probs(), WORDS, GRID, scale=scale) for scale in ("own", "same"))
    assert tile(own.axes[0].images[0].get_array(), 3, 0).max() == 1 and ticks(own.axes[1].yaxis) == [
        "0",
        "row's most",
    ]
    half = probs() * torch.tensor([1, 0.5, 0.5, 1, 1, 1, 1, 1])
    assert np.allclose(
        tile(show_words(half, WORDS, GRID, scale="same").axes[0].images[0].get_array(), 1, 0).max(), 0.5
    )
    assert ticks(same.axes[1].yaxis) == ["0", "1"]


def test_maps_lie_over_the_frames_of_their_own_moment():
    video = film()
    ax = show_words(probs(), WORDS[1:2], GRID, video).axes[0]
    assert ticks(ax.yaxis) == ["the video", "circle  5%"] and ticks(ax.xaxis) == ["0", "1-4", "5-8"]
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
            r"probs arrived with shape \[2, 2, 60, 8\]; expected \[heads, n, l\] or \[n, l\]",
        ),
        (dict(scale="log"), "scale='log'; expected 'own'"),
        (dict(words=[]), "the words use tokens up to none"),
        (
            dict(video=film(8)),
            "a video of 8 frames does not belong to a grid of 3 latent frames, such as 9 do",
        ),
        (dict(video=np.zeros((9, 8, 8))), r"video= arrived as float64 \[9, 8, 8\]; expected a Video"),
    ],
)
def test_what_does_not_fold_into_a_picture_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        show_words(**(dict(probs=probs(), words=WORDS, grid=GRID) | change))


def test_latent_frames_stand_for_one_frame_and_then_for_groups():
    assert moments((5, 6, 6), range(17)) == [(0, 0), (1, 4), (5, 8), (9, 12), (13, 16)]
    assert moments((2, 1, 1), range(9)) == [(0, 0), (1, 8)] and moments((1, 1, 1), range(1)) == [(0, 0)]


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


# ---- self-attention ---------------------------------------------------------------------------------------------------


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
    ].startswith("head 1  most ")
    for other in (attention_rows(whole, GRID, number), attention_rows(whole[:, number], GRID, query)):
        assert np.array_equal(other.axes[0].images[0].get_array(), ax.images[0].get_array(), equal_nan=True)
    over = attention_rows(whole, GRID, query, film()).axes[0]
    assert (
        np.allclose(over.patches[0].get_xy(), (43 + 3 * 8 - 0.5, 35 + 2 * 8 - 0.5))
        and over.patches[0].get_width() == 8
    )
    with pytest.raises(
        ValueError,
        match=r"query=\(3, 0, 0\); expected \(frame, row, column\) inside \(3, 4, 5\), or a token number below 60",
    ):
        attention_rows(whole, GRID, (3, 0, 0))
    with pytest.raises(ValueError, match="but grid="):
        attention_rows(whole, (1, 2, 3), 0)


# ---- latents and films ------------------------------------------------------------------------------------------------


def test_a_latent_sheet_has_a_column_per_channel_and_a_row_per_frame():
    latent = torch.randn(1, 3, 2, 4, 5, generator=torch.Generator().manual_seed(0))
    drawn = latent_sheet(latent)
    ax = drawn.axes[0]
    assert np.allclose(tile(ax.images[0].get_array(), 1, 2), latent[0, 2, 1]) and (
        ax.get_xlabel(),
        ax.get_ylabel(),
    ) == ("channel", "latent frame")
    assert np.allclose(ax.images[0].get_clim(), (-latent.abs().max(), latent.abs().max()))
    with pytest.raises(
        ValueError, match=r"latent arrived with shape \[2, 3, 2, 4, 5\]; expected \[c, f, h, w\]"
    ):
        latent_sheet(torch.zeros(2, 3, 2, 4, 5))


def test_a_frame_sheet_shows_every_frame_with_its_number():
    video = film(7)
    drawn = frame_sheet(video, columns=3)
    shown = [ax for ax in drawn.axes if ax.images]
    assert len(drawn.axes) == 9 and [ax.get_title() for ax in shown] == list("0123456")
    assert all(np.array_equal(ax.images[0].get_array(), frame) for ax, frame in zip(shown, video.frames))
    assert title_of(drawn) == "7 frames, 8 a second: frame numbers above"
    with pytest.raises(ValueError, match="columns=-1; expected 1 or more"):
        frame_sheet(video, columns=-1)


def test_the_strip_of_beliefs_decodes_x_and_x0_of_evenly_chosen_steps():
    states = [
        SimpleNamespace(step=i, sigma=1 - i / 10, x=torch.tensor(20 * i), x0=torch.tensor(20 * i + 10))
        for i in range(10)
    ]
    decode = lambda latent: Video(np.full((5, 8, 8, 3), int(latent), np.uint8), 8)
    drawn = x0_strip(states, decode, columns=4)
    ax = drawn.axes[0]
    picture = ax.images[0].get_array()
    for column, step in enumerate((0, 3, 6, 9)):
        assert np.allclose(tile(picture, 0, column, 3, (8, 8)), 20 * step / 255) and np.allclose(
            tile(picture, 1, column, 3, (8, 8)), (20 * step + 10) / 255
        )
    assert ticks(ax.xaxis) == [
        "0\nsigma 1.00",
        "3\nsigma 0.70",
        "6\nsigma 0.40",
        "9\nsigma 0.10",
    ] and "frame 2" in title_of(drawn)
    with pytest.raises(ValueError, match="x0_strip needs the States of a run"):
        x0_strip([], decode)
    with pytest.raises(ValueError, match="frame=5; the video has 5 frames"):
        x0_strip(states, decode, frame=5)


def test_the_mask_is_shown_by_pixel_frame_and_latent_frame():
    ax = mask_over_time(first_frame_mask(17, (5, 3, 3), 4, last=True)).axes[0]
    expected = np.zeros((4, 5))
    expected[:, 0] = expected[3, 4] = 1
    assert np.array_equal(ax.images[0].get_array(), expected) and (ax.get_xlabel(), ax.get_ylabel()) == (
        "latent frame",
        "pixel frame in it",
    )
    with pytest.raises(ValueError, match=r"mask arrived with shape \[5, 3, 3\]; expected \[ft, f, h, w\]"):
        mask_over_time(torch.ones(5, 3, 3))


# ---- the VAE's reach --------------------------------------------------------------------------------------------------


class Means(torch.nn.Module):
    """A codec with a known reach: latent frame k is the mean of pixel frames 4k - 3 .. 4k, each cell the mean of its own 8 x 8 pixels."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def encode(self, video):
        frames = torch.cat([video[:, :, :1].expand(-1, -1, 4, -1, -1), video[:, :, 1:]], 2)
        return torch.nn.functional.avg_pool3d(frames, (4, 8, 8)) * self.weight


def test_the_reach_of_a_codec_is_measured_exactly():
    codec = Means()
    in_time, in_space, cell = influence(codec, frames=9, size=(24, 16))
    expected = np.zeros((3, 9), bool)
    expected[0, 0] = expected[1, 1:5] = expected[2, 5:9] = True
    assert np.array_equal(in_time > 0, expected) and cell == (8, 8, 8, 8)
    inside = np.zeros((24, 16), bool)
    inside[8:16, 8:16] = True
    assert np.array_equal(in_space > 0, inside) and codec.weight.grad is None
    drawn = receptive_field(codec, frames=9, size=(24, 16))
    left, right = drawn.axes[:2]
    assert np.array_equal(~np.ma.getmaskarray(np.ma.masked_invalid(left.images[0].get_array())), expected)
    assert right.patches[0].get_xy() == (7.5, 7.5) and (left.get_xlabel(), left.get_ylabel()) == (
        "pixel frame",
        "latent frame",
    )


def test_the_real_codec_hears_only_the_past():
    torch.manual_seed(0)
    vae = VAE(VAEConfig(**small.VAE_SIZES)).eval()
    in_time, in_space, _ = influence(vae, frames=9, size=(16, 16))
    for latent, row in enumerate(in_time):
        assert (row[4 * latent + 1 :] == 0).all() and (row[max(0, 4 * latent - 3) : 4 * latent + 1] > 0).all()
    assert all(p.grad is None for p in vae.parameters())


def test_a_gallery_shows_the_same_frame_of_each_video_under_its_label():
    first, second = film(), Video(255 - film().frames, 8)
    drawn = gallery({"one": first, "two": second}, title="Both")
    picture = drawn.axes[0].images[0].get_array()
    assert np.allclose(picture[:32, :40], first.frames[4] / 255) and np.allclose(
        picture[:32, 43:], second.frames[4] / 255
    )
    assert ticks(drawn.axes[0].xaxis) == ["one", "two"] and title_of(drawn) == "Both, frame 4"
    grid = gallery({"a": {"x": first, "y": second}, "b": {"x": second, "y": first}}, frame=-1)
    assert ticks(grid.axes[0].yaxis) == ["a", "b"] and title_of(grid) == "One frame of each, frame 8"
    assert np.allclose(grid.axes[0].images[0].get_array()[35:, :40], second.frames[-1] / 255)
    assert title_of(gallery({"one": first.frames[:1]}, title="A picture")) == "A picture"
    with pytest.raises(ValueError, match="gallery got a: x; b: y; expected {label: Video}, or"):
        gallery({"a": {"x": first}, "b": {"y": first}})


def test_films_stand_one_below_the_other_with_the_numbers_of_their_frames():
    dark, light = (Video(np.full((17, 8, 8, 3), value, np.uint8)) for value in (0, 255))
    drawn = films({"dark": dark, "light": light}, title="Both")
    assert ticks(drawn.axes[0].yaxis) == ["dark", "light"] and ticks(drawn.axes[0].xaxis) == [
        "0",
        "2",
        "4",
        "6",
        "8",
        "10",
        "12",
        "14",
        "16",
    ]
    assert title_of(drawn) == "Both" and drawn.axes[0].get_xlabel() == "frame"
    picture = drawn.axes[0].images[0].get_array()
    assert picture[2, 2, 0] == 0 and picture[-2, -2, 0] == 1
    assert ticks(films({"dark": dark}, frames=[3, 16]).axes[0].xaxis) == ["3", "16"]
    with pytest.raises(ValueError, match=r"films got \[5, 8, 8, 3\] and \[17, 8, 8, 3\]; expected"):
        films({"dark": dark, "short": light[:5]})
    with pytest.raises(ValueError, match=r"frames=\[17\]; expected numbers from 0 to 16"):
        films({"dark": dark}, frames=[17])
