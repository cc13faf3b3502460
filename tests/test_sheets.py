"""Is each small picture where its labels say, and is what a latent hears measured exactly?"""

from types import SimpleNamespace

import numpy as np
import pytest
import small
import torch

from moddiff.conditioning import first_frame_mask
from moddiff.vae import VAE, VAEConfig
from moddiff.video import Video
from moddiff.viz.canvas import title_of
from moddiff.viz.sheets import (
    films,
    frame_sheet,
    gallery,
    influence,
    latent_sheet,
    mask_over_time,
    receptive_field,
    x0_strip,
)


def ticks(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def film(frames=9, height=32, width=40):
    return Video(np.random.default_rng(0).integers(0, 256, (frames, height, width, 3), np.uint8), 8)


def tile(picture, row, column, gap, shape):
    h, w = shape
    top, left = row * (h + gap), column * (w + gap)
    return np.asarray(picture)[top : top + h, left : left + w]


def test_a_latent_sheet_has_a_column_per_channel_and_a_row_per_frame():
    latent = torch.randn(1, 3, 2, 4, 5, generator=torch.Generator().manual_seed(0))
    drawn = latent_sheet(latent)
    ax = drawn.axes[0]
    assert np.allclose(tile(ax.images[0].get_array(), 1, 2, 1, (4, 5)), latent[0, 2, 1]) and (
        ax.get_xlabel(),
        ax.get_ylabel(),
    ) == ("channel", "latent frame")
    assert np.allclose(ax.images[0].get_clim(), (-latent.abs().max(), latent.abs().max()))
    with pytest.raises(
        ValueError, match=r"latent arrived with shape \[2, 3, 2, 4, 5\]; expected \[c, f, h, w\]"
    ):
        latent_sheet(torch.zeros(2, 3, 2, 4, 5))


def test_a_frame_sheet_shows_every_frame_with_its_number():
    video = film(11)
    drawn = frame_sheet(video)
    (ax,) = drawn.axes
    picture = ax.images[0].get_array()  # two rows of nine, with room for the numbers between
    for i, frame in enumerate(video.frames):
        top, left = i // 9 * (32 + 12), i % 9 * (40 + 2)
        assert np.array_equal(picture[top : top + 32, left : left + 40], frame / 255)
    assert (picture[44:, 2 * 42 :] == 1).all()
    assert [number.get_text() for number in ax.texts] == [str(i) for i in range(11)]
    assert [number.get_position() for number in ax.texts[8:10]] == [(8 * 42 + 19.5, -0.5), (19.5, 43.5)]
    assert title_of(drawn) == "11 frames, 8 a second: frame numbers above"


def test_the_strip_of_beliefs_decodes_x_and_x0_of_evenly_chosen_steps():
    states = [
        SimpleNamespace(step=i, sigma=1 - i / 10, x=torch.tensor(20 * i), x0=torch.tensor(20 * i + 10))
        for i in range(10)
    ]

    def decode(latent):
        return Video(np.full((5, 8, 8, 3), int(latent), np.uint8), 8)

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


class Means(torch.nn.Module):
    """A codec with a known reach: latent frame k is the mean of frames 4k - 3 .. 4k and of 8 x 8 pixels."""

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
    in_time, _, _ = influence(vae, frames=9, size=(16, 16))
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


# ---- what films say ----


def test_a_film_that_was_cut_keeps_its_frames_numbers():
    part = film(17)[::4]
    assert [number.get_text() for number in frame_sheet(part).axes[0].texts] == ["0", "4", "8", "12", "16"]
    assert [number.get_text() for number in frame_sheet(part[1:3]).axes[0].texts] == ["4", "8"]
    assert ticks(films({"a": part}).axes[0].xaxis) == ["0", "4", "8", "12", "16"]
    assert title_of(gallery({"a": part})) == "One frame of each, frame 8"


def test_a_gallery_says_what_its_columns_and_rows_are():
    one, still = film(), film().frames[:1]
    assert gallery({"a": one}).axes[0].get_xlabel() == "video"
    assert gallery({"a": still}).axes[0].get_xlabel() == "picture"
    ax = gallery({"0": {"1": one}}, x="last block", y="first block").axes[0]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("last block", "first block")


def test_what_does_not_fit_on_one_sheet_is_refused():
    with pytest.raises(ValueError, match="gallery got 32 x 40 and 8 x 8; expected videos of one height"):
        gallery({"a": film(), "b": film(height=8, width=8)})
    with pytest.raises(ValueError, match="frame=9; expected a number from 0 to 8"):
        gallery({"a": film()}, frame=9)
    with pytest.raises(ValueError, match="gallery got nothing"):
        gallery({})
    with pytest.raises(ValueError, match="a video arrived as str"):
        frame_sheet("film.mp4")
    with pytest.raises(ValueError, match="a video arrived as ndarray, uint8 .0, 8, 8, 3."):
        frame_sheet(np.zeros((0, 8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match="columns=0; expected 1 or more"):
        x0_strip([SimpleNamespace(x0=0)], None, columns=0)
    with pytest.raises(TypeError, match="receptive_field of Linear; expected a vae with encode"):
        receptive_field(torch.nn.Linear(2, 2))
