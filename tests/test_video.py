"""Videos show and save themselves whole, and any picture a student has becomes the same tensor."""

import io
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from moddiff import video as room
from moddiff.tiny import world
from moddiff.video import Video, picture

SHAPES = [(5, 16, 24), (1, 16, 16), (4, 15, 17)]


def ramp(frames=5, height=16, width=24, seed=0):
    """Smooth colours, so that lossy codecs stay close."""
    rng = np.random.default_rng(seed)
    t, y, x = np.meshgrid(
        np.linspace(0, 1, frames), np.linspace(0, 1, height), np.linspace(0, 1, width), indexing="ij"
    )
    mix = rng.uniform(0, 1, (3, 3))
    return np.stack([255 * (a * t + b * y + c * x) / (a + b + c) for a, b, c in mix], -1).astype(np.uint8)


# ---- the object -------------------------------------------------------------------------------------------------------


def test_pixels_are_cut_not_rounded_as_wan_does():
    x = torch.tensor([-2.0, -1.0, -0.9999, 0.0, 0.9999, 1.0, 3.0]).view(1, 1, 1, 7).expand(3, 1, 1, 7)
    expected = [0, 0, 0, 127, 254, 255, 255]  # floor((x + 1) / 2 * 255) by hand: 0.0128, 127.5, 254.987
    assert Video.from_tensor(x).frames[0, 0, :, 0].tolist() == expected


def test_a_video_and_its_tensor_agree():
    video = Video(ramp(), 8)
    assert video.tensor().shape == (1, 3, 5, 16, 24)
    assert np.abs(Video.from_tensor(video.tensor(), 8).frames.astype(int) - video.frames).max() <= 1
    assert video.tensor()[0, 2, 3, 4, 5].item() == pytest.approx(video.frames[3, 4, 5, 2] / 127.5 - 1)


def test_equality_and_fingerprint_follow_frames_and_fps():
    a, b = Video(ramp(), 8), Video(torch.from_numpy(ramp()), 8.0)
    assert a == b and hash(a) == hash(b) and a.digest == b.digest
    changed = ramp()
    changed[0, 0, 0, 0] ^= 1
    assert a != Video(changed, 8) and a != Video(ramp(), 9) and a != "a video"
    assert a.digest != Video(changed, 8).digest and a.digest != Video(ramp(), 9).digest


def test_frames_cannot_be_changed_behind_its_back():
    source = ramp()
    video = Video(source, 8)
    before = video.digest
    source[:] = 0
    assert video.digest == before
    with pytest.raises(ValueError, match="read-only"):
        video.frames[0] = 0


def test_frames_come_out_as_pictures_and_slices_as_videos():
    video = Video(ramp(), 8, {"seed": 3}, ["a note"])
    assert np.array_equal(np.asarray(video[-1]), video.frames[-1])
    assert len(video) == 5 and len(video[1:4]) == 3 and video[1:4].settings == {"seed": 3}
    assert np.array_equal(np.asarray(video), video.frames)
    assert list(video[::2][1:].frame_numbers) == [2, 4]  # as in the film it was cut from
    assert "5 frames of 16 x 24" in repr(video) and "a note" in repr(video)


@pytest.mark.parametrize(
    "frames, message",
    [
        (np.zeros((5, 16, 24, 3), np.float32), r"float32 \[5, 16, 24, 3\].*expected uint8 \[F, H, W, 3\]"),
        (np.zeros((16, 24, 3), np.uint8), r"uint8 \[16, 24, 3\]"),
        (np.zeros((5, 16, 24, 4), np.uint8), r"uint8 \[5, 16, 24, 4\]"),
        (np.zeros((0, 16, 24, 3), np.uint8), "at least one frame"),
    ],
)
def test_what_is_no_video_is_refused(frames, message):
    with pytest.raises(ValueError, match=message):
        Video(frames)


def test_nan_pixels_are_refused_with_a_cure():
    x = torch.zeros(3, 2, 4, 4)
    x[0, 1, 2, 3] = float("nan")
    with pytest.raises(ValueError, match="1 of 96 pixel values are NaN.*dtype='fp32'"):
        Video.from_tensor(x)


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf")])
def test_a_rate_that_cannot_play_is_refused(fps):
    with pytest.raises(ValueError, match="frames per second above 0"):
        Video(ramp(), fps)


@pytest.mark.parametrize(
    "columns, size",
    [
        (None, (3 * 24 + 2 * 2, 2 * 16 + 2)),
        (5, (5 * 24 + 4 * 2, 16)),
        (1, (24, 5 * 16 + 4 * 2)),
        (99, (5 * 24 + 8, 16)),
    ],
)
def test_a_sheet_holds_every_frame_in_reading_order(columns, size):
    video = Video(ramp(height=16, width=24), 8)
    page = np.asarray(video.sheet(columns))
    if columns is not None:
        assert page.shape[1::-1] == size
    across = (page.shape[1] + 2) // 26
    for i, frame in enumerate(video.frames):
        y, x = i // across * 18, i % across * 26
        assert np.array_equal(page[y : y + 16, x : x + 24], frame)


# ---- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", room.SUFFIXES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_kind_of_file_is_written_and_the_same_frames_give_the_same_bytes(tmp_path, suffix, shape):
    video = Video(ramp(*shape), 8, {"prompt": "rot, 红"})
    path = video.save(tmp_path / f"out{suffix}")
    assert path.read_bytes() == Video(ramp(*shape), 8, {"prompt": "rot, 红"}).encode(suffix) != b""
    assert [p.name for p in tmp_path.iterdir()] == [f"out{suffix}"]


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_the_bytes_do_not_depend_on_where_in_memory_the_encoder_works(suffix):
    video, held, found = (
        Video(world.clip(world.parse("a red circle moving left on a black background"), seed=0), 8),
        [],
        set(),
    )
    for k in range(
        40
    ):  # x264's macroblock tree gives five different files here, and another one in a new process
        held.append(np.ones(4096 + 592 * k, np.uint8))
        np.full(50000 + 1000 * k, k, np.uint8)
        found.add(video.encode(suffix))
    assert len(found) == 1


@pytest.mark.parametrize("suffix, tolerance", [(".mp4", 4), (".webm", 4), (".gif", 12)])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_saved_video_reads_back_with_its_frames_and_rate(tmp_path, suffix, tolerance, shape):
    video = Video(ramp(*shape), 8, {"prompt": "红", "seed": 5})
    back = Video.open(video.save(tmp_path / f"out{suffix}"))
    frames, height, width = shape
    even = suffix != ".gif"
    assert back.frames.shape == (frames, height + even * (height % 2), width + even * (width % 2), 3)
    assert np.abs(back.frames[:, :height, :width].astype(int) - video.frames).mean() < tolerance
    if frames > 1:
        assert back.fps == pytest.approx(8, rel=0.05)
    if even:
        assert back.settings == {"prompt": "红", "seed": 5}


@pytest.mark.parametrize("colour", [(230, 38, 38), (38, 191, 64), (51, 89, 242), (13, 20, 77)])
def test_colours_survive_h264(tmp_path, colour):
    video = Video(np.full((5, 32, 32, 3), colour, np.uint8), 8)
    back = Video.open(video.save(tmp_path / "out.mp4"))
    assert np.abs(back.frames.astype(int) - colour).max() <= 3


def test_mp4_is_what_browsers_play():
    import av

    with av.open(io.BytesIO(Video(ramp(), 8).encode(".mp4"))) as file:
        stream = file.streams.video[0]
        assert (
            stream.codec_context.name,
            stream.codec_context.pix_fmt,
            stream.average_rate,
            stream.frames,
        ) == ("h264", "yuv420p", 8, 5)


def test_webp_is_lossless_and_loops():
    video = Video(np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8), 8)
    with Image.open(io.BytesIO(video.encode(".webp"))) as file:
        assert file.n_frames == 3 and file.info["loop"] == 0
        for i in range(3):
            file.seek(i)
            assert np.array_equal(np.asarray(file.convert("RGB")), video.frames[i])


def test_a_gif_keeps_time_although_it_counts_in_hundredths():
    frames = np.random.default_rng(0).integers(0, 256, (17, 8, 8, 3), np.uint8)
    with Image.open(io.BytesIO(Video(frames, 8).encode(".gif"))) as file:
        total = 0
        for i in range(file.n_frames):
            file.seek(i)
            total += file.info["duration"]
    assert file.n_frames == 17 and abs(total - 17 * 125) <= 10


def test_an_interrupted_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = Video(ramp(), 8).save(tmp_path / "out.mp4")
    before = path.read_bytes()

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Video(ramp(seed=1), 8).save(path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["out.mp4"]


@pytest.mark.parametrize(
    "name, error, message",
    [
        (
            "out.avi",
            ValueError,
            r"cannot be saved as \.avi; choose one of \.mp4, \.webm, \.gif, \.webp, \.png",
        ),
        ("out", ValueError, "a file without an ending"),
        ("nowhere/out.mp4", FileNotFoundError, "there is no folder .*nowhere.*create it first"),
    ],
)
def test_a_place_that_cannot_be_written_is_named(tmp_path, name, error, message):
    with pytest.raises(error, match=message):
        Video(ramp(), 8).save(tmp_path / name)


def test_a_folder_is_not_overwritten(tmp_path):
    (tmp_path / "out.mp4").mkdir()
    with pytest.raises(IsADirectoryError, match="is a folder; name a file in it"):
        Video(ramp(), 8).save(tmp_path / "out.mp4")


def test_a_file_that_is_no_video_is_named(tmp_path):
    (tmp_path / "out.mp4").write_text("not a video at all, " * 100)
    with pytest.raises(ValueError, match="out.mp4 is not a video that can be read"):
        Video.open(tmp_path / "out.mp4")


# ---- notebooks --------------------------------------------------------------------------------------------------------


def test_it_plays_by_itself_in_a_page_with_nothing_beside_it():
    shown = Video(ramp(), 8, notes=["never met <b>zebra</b>"])._repr_mimebundle_()
    page = shown["text/html"]
    assert all(word in page for word in ("<video", "autoplay", "loop", "muted", "data:video/mp4;base64,"))
    assert "&lt;b&gt;zebra" in page and "<b>" not in page and "http" not in page
    assert shown["text/plain"].startswith("Video(5 frames")


# ---- pictures in ------------------------------------------------------------------------------------------------------


def rgb(height=6, width=9, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def expected(pixels):
    return torch.from_numpy(pixels.astype(np.float64) / 127.5 - 1).permute(2, 0, 1).float()


@settings(max_examples=10, deadline=None)
@given(st.integers(5, 40), st.integers(5, 40), st.integers(0, 99))
def test_one_picture_in_every_form_is_one_tensor(height, width, seed):
    pixels = rgb(height, width, seed)
    truth = expected(pixels)
    forms = [
        Image.fromarray(pixels),
        pixels,
        torch.from_numpy(pixels),
        torch.from_numpy(pixels).permute(2, 0, 1),
        pixels.astype(np.float32) / 255,
        truth,
        truth.double(),
        Video(pixels[None], 8)[0],
    ]
    for form in forms:
        assert picture(form).dtype == torch.float32
        torch.testing.assert_close(picture(form), truth, atol=1e-6, rtol=0)


def test_a_png_of_any_mode_opens(tmp_path):
    pixels = rgb()
    for mode in ("RGB", "RGBA", "L", "LA", "P", "1", "CMYK"):
        path = tmp_path / f"{mode}.{'tiff' if mode == 'CMYK' else 'png'}"
        Image.fromarray(pixels).convert(mode).save(path)
        assert picture(path).shape == (3, 6, 9) and picture(str(path)).abs().max() <= 1
    torch.testing.assert_close(picture(tmp_path / "RGB.png"), expected(pixels), atol=1e-6, rtol=0)


def test_see_through_parts_are_laid_on_black():
    pixels = np.concatenate([rgb(), np.full((6, 9, 1), 51, np.uint8)], -1)  # 51 / 255 = a fifth
    truth = (rgb() * 0.2).astype(np.float64) / 127.5 - 1
    for form in (
        pixels,
        Image.fromarray(pixels),
        pixels.astype(np.float32) / 255,
        torch.from_numpy(pixels).permute(2, 0, 1),
    ):
        assert np.abs(picture(form).permute(1, 2, 0).numpy() - truth).max() <= 1.01 / 127.5


def test_sixteen_bit_gray_keeps_its_range(tmp_path):
    deep = np.linspace(0, 65535, 54).astype(np.uint16).reshape(6, 9)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert np.abs(picture(tmp_path / "deep.png")[0].numpy() - (deep / 65535 * 2 - 1)).max() < 0.01


def test_a_photograph_is_turned_as_the_camera_was_held(tmp_path):
    image = Image.fromarray(rgb(6, 9))
    turned = image.getexif()
    turned[0x0112] = 6  # a quarter turn
    image.save(tmp_path / "photo.png", exif=turned)
    assert picture(tmp_path / "photo.png").shape == (3, 9, 6)


@pytest.mark.parametrize(
    "source, error, message",
    [
        ("nowhere.png", FileNotFoundError, "there is no picture at nowhere.png"),
        (
            Video(ramp(), 8),
            TypeError,
            r"a whole video of 5 frames arrived as a picture; choose a frame: video\[0\]",
        ),
        (7, TypeError, "arrived as int; expected a path, a PIL image, a numpy array or a torch tensor"),
        (np.zeros((2, 6, 9, 3), np.uint8), ValueError, r"shape \[2, 6, 9, 3\].*one picture"),
        (np.zeros((6, 9, 2), np.uint8), ValueError, r"shape \[6, 9, 2\]"),
        (np.zeros((6, 9, 3), np.int64), ValueError, "picture of int64.*expected uint8"),
        (
            np.full((6, 9, 3), 200.0),
            ValueError,
            r"runs from 200 to 200; expected 0\.\.1.*Give a uint8 array for 0\.\.255",
        ),
        (np.full((6, 9, 3), -0.5), ValueError, r"or a torch tensor for -1\.\.1"),
        (torch.full((3, 6, 9), 2.0), ValueError, r"expected -1\.\.1"),
        (torch.full((3, 6, 9), float("nan")), ValueError, "no NaN"),
    ],
)
def test_what_is_no_picture_is_refused_with_a_cure(source, error, message):
    with pytest.raises(error, match=message):
        picture(source)


def test_files_that_are_no_pictures_are_named(tmp_path):
    (tmp_path / "words.png").write_text("hello")
    with pytest.raises(ValueError, match="words.png is not a picture that can be read"):
        picture(tmp_path / "words.png")
    Image.fromarray(rgb(64, 64)).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:3000])
    with pytest.raises(ValueError, match="half.png is damaged or cut off"):
        picture(tmp_path / "half.png")
