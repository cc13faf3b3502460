"""Videos show and save themselves whole, and any picture a student has becomes the same tensor."""

import base64
import io
import os
import re
import struct
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from moddiff import conditioning, saving
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


# ---- the object ----------------------------------------------------------------------------------------


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


# ---- files ---------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("suffix, tolerance", [(".mp4", 4), (".webm", 4), (".gif", 12), (".webp", 0.01)])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_saved_video_reads_back_with_its_frames_and_rate(tmp_path, suffix, tolerance, shape):
    video = Video(ramp(*shape), 8, {"prompt": "红", "seed": 5})
    back = Video.open(video.save(tmp_path / f"out{suffix}"))
    frames, height, width = shape
    even = suffix in room.CODECS
    assert back.frames.shape == (frames, height + even * (height % 2), width + even * (width % 2), 3)
    assert np.abs(back.frames[:, :height, :width].astype(int) - video.frames).mean() < tolerance
    assert (back.fps, back.settings) == (8, {"prompt": "红", "seed": 5})


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
@pytest.mark.parametrize("fps", [8, 24, 23.976])
def test_frames_that_are_alike_are_not_lost(tmp_path, suffix, fps):
    frames = np.zeros((9, 16, 16, 3), np.uint8)
    frames[4:] = 255
    assert Video.open(Video(frames, fps).save(tmp_path / f"still{suffix}")) == Video(frames, fps)


def test_an_animation_of_another_program_has_its_own_rate(tmp_path):
    pages = [Image.fromarray(frame) for frame in ramp(seed=3)]
    for name in ("a.gif", "a.webp"):
        pages[0].save(
            tmp_path / name, save_all=True, append_images=pages[1:], duration=200, comment=b"by hand"
        )
        back = Video.open(tmp_path / name)
        assert (len(back), back.fps, back.settings) == (5, 5, {})


@pytest.mark.parametrize(
    "comment", ['{"fps": 1e12, "settings": {}}', '{"fps": "8"}', '{"fps": 8}', "[8]", "{"]
)
def test_a_comment_that_only_looks_like_ours_is_not_believed(tmp_path, comment):
    pages = [Image.fromarray(frame) for frame in ramp()]
    pages[0].save(tmp_path / "a.gif", save_all=True, append_images=pages[1:], duration=200, comment=comment)
    back = Video.open(tmp_path / "a.gif")
    assert (len(back), back.fps, back.settings) == (5, 5, {})


@pytest.mark.parametrize("degrees, turns", [(0, 0), (90, 3), (180, 2), (270, 1)])
def test_a_film_of_a_phone_is_turned_as_a_player_turns_it(tmp_path, degrees, turns):
    flat = Video(ramp(3, 16, 32), 8)
    path = flat.save(tmp_path / "phone.mp4")
    data = bytearray(path.read_bytes())
    one, angle = 1 << 16, {0: (1, 0), 90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees]
    (cos, sin), place = (
        angle,
        data.index(b"tkhd") + 44,
    )  # the matrix of the track, clockwise: [cos sin 0; -sin cos 0]
    for i, value in ((0, cos), (1, sin), (3, -sin), (4, cos)):
        data[place + 4 * i : place + 4 * i + 4] = struct.pack(">i", value * one)
    path.write_bytes(data)
    turned = np.rot90(flat.frames, turns, (1, 2))
    back = Video.open(path).frames
    assert back.shape == turned.shape and np.abs(back.astype(int) - turned).mean() < 4


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
@pytest.mark.parametrize("comment", [b"{_rompt", b"pro\xffmp_", b"[1, 2, "])
def test_a_comment_of_another_program_is_no_error(tmp_path, suffix, comment):
    data = Video(ramp(), 8, {"prompt": "x"}).encode(suffix)
    assert b'{"promp' in data
    (tmp_path / f"a{suffix}").write_bytes(data.replace(b'{"promp', comment, 1))
    assert Video.open(tmp_path / f"a{suffix}").settings == {}


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
        (
            "x" * 300 + ".mp4",
            ValueError,
            "the file name xxx.* has 304 bytes, more than this file system takes",
        ),
        ("out\udcff.mp4", ValueError, r"the file name 'out\\udcff.mp4' is not UTF-8; choose another"),
        ("taken/out.mp4", OSError, "no file can be written there: .*taken/out.mp4"),
    ],
)
def test_a_place_that_cannot_be_written_is_named(tmp_path, name, error, message):
    (tmp_path / "taken").write_text("a file where a folder should be")
    for attempt in (Video(ramp(), 8).save, room.check_path):
        with pytest.raises(error, match=message):
            attempt(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_a_name_that_is_too_long_is_seen_also_where_its_folder_is_not_there_yet(tmp_path):
    with pytest.raises(ValueError, match="has 304 bytes, more than this file system takes"):
        room.check_path(tmp_path / "new" / ("x" * 300 + ".mp4"))


def test_a_path_of_windows_is_no_file_name_elsewhere():
    with pytest.raises(ValueError, match="is a path of Windows, and this is not"):
        room.check_path("C:\\Users\\me\\out.mp4")


def test_a_missing_folder_is_made_and_the_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert room.check_path("~/films/new/out.mp4") == tmp_path / "films" / "new" / "out.mp4"
    assert not list((tmp_path / "films" / "new").iterdir())
    assert Video.open(Video(ramp(), 8).save("~/films/new/out.mp4")) == Video.open("~/films/new/out.mp4")


def test_names_that_just_fit_are_written(tmp_path):
    for name in ("x" * 251 + ".png", "红色的圆形" * 16 + "ab.png"):
        assert Video(ramp(), 8).save(tmp_path / name).read_bytes()[:4] == b"\x89PNG"
    assert len(list(tmp_path.iterdir())) == 2


def test_a_folder_that_cannot_be_written_is_named_before_the_work(tmp_path, monkeypatch):
    def refused(self, data):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(type(tmp_path), "write_bytes", refused)
    with pytest.raises(PermissionError, match="no file can be written there: Permission denied.*out.mp4"):
        room.check_path(tmp_path / "out.mp4")


def test_a_full_disk_is_said_of_the_user_s_file(tmp_path, monkeypatch):
    monkeypatch.setattr(saving.shutil, "disk_usage", lambda folder: SimpleNamespace(free=0))

    def like_torch(path):
        raise RuntimeError("PytorchStreamWriter failed writing file")

    with pytest.raises(OSError, match="No space left on device.*model.pt"):
        room.write_whole(tmp_path / "model.pt", like_torch)
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_replaced_keeps_its_permissions_and_a_link_stays_a_link(tmp_path):
    path, link = tmp_path / "out.png", tmp_path / "link.png"
    Video(ramp(), 8).save(path)
    path.chmod(0o600)
    link.symlink_to(path)
    Video(ramp(seed=1), 8).save(link)
    assert link.is_symlink() and path.stat().st_mode & 0o777 == 0o600
    assert path.read_bytes() == Video(ramp(seed=1), 8).encode(".png")


def test_a_new_file_has_the_permissions_of_any_new_file_and_no_one_s_umask_is_touched(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("the umask is the whole process's"))
    (tmp_path / "any").write_text("")
    path = Video(ramp(), 8).save(tmp_path / "out.png")
    assert path.stat().st_mode == (tmp_path / "any").stat().st_mode


def test_what_a_killed_process_left_is_cleared_away_later_and_not_at_once(tmp_path):
    path = Video(ramp(), 8).save(tmp_path / "out.png")
    spares = saving._spare(path), saving._spare(path), saving._spare(tmp_path / "other.png")
    for spare in spares:
        spare.write_bytes(b"half")
    for spare in spares[1:]:
        os.utime(spare, (0, 0))
    Video(ramp(), 8).save(path)
    assert [spare.exists() for spare in spares] == [True, False, True]


def test_a_folder_is_not_overwritten(tmp_path):
    (tmp_path / "out.mp4").mkdir()
    with pytest.raises(IsADirectoryError, match="is a folder; name a file in it"):
        Video(ramp(), 8).save(tmp_path / "out.mp4")


def test_films_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no video at .*nowhere.mp4; check the path"):
        Video.open(tmp_path / "nowhere.mp4")
    with pytest.raises(FileNotFoundError, match="there is no video at"):
        Video.open("http://127.0.0.1:9/a.mp4")
    path = tmp_path / "a.webm"
    path.write_bytes(Video(ramp(), 8).encode(".webm").replace(b"V_VP9", b"V_XYZ"))
    with pytest.raises(ValueError, match="a.webm is not a video that can be read"):
        Video.open(path)
    path.write_bytes(Video(ramp(), 8).encode(".webp")[:300])
    with pytest.raises(ValueError, match="a.webm is damaged or cut off"):
        Video.open(path)


def test_a_file_that_is_no_video_is_named(tmp_path):
    (tmp_path / "out.mp4").write_text("not a video at all, " * 100)
    with pytest.raises(ValueError, match="out.mp4 is not a video that can be read"):
        Video.open(tmp_path / "out.mp4")


# ---- notebooks -----------------------------------------------------------------------------------------


def test_it_plays_by_itself_in_a_page_with_nothing_beside_it():
    shown = Video(ramp(), 8, notes=["never met <b>zebra</b>"])._repr_mimebundle_()
    page = shown["text/html"]
    assert all(word in page for word in ("<video", "autoplay", "loop", "muted", "data:video/mp4;base64,"))
    assert "&lt;b&gt;zebra" in page and "<b>" not in page and "http" not in page
    assert shown["text/plain"].startswith("Video(5 frames")


@pytest.mark.parametrize("shape", [(5, 16, 24), (1, 48, 48), (81, 120, 208)])
def test_a_page_without_players_has_a_small_moving_picture(shape):
    noisy = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    video = Video(noisy, 8)
    shown = video._repr_mimebundle_()
    inside = re.search(
        r'<video [^>]*><img [^>]*src="data:image/webp;base64,([^"]+)"></video>', shown["text/html"]
    )
    for data in (inside[1], shown["image/png"]):
        data = base64.b64decode(data)
        assert len(data) < 60_000
        with Image.open(io.BytesIO(data)) as small:
            assert small.n_frames == min(shape[0], small.n_frames) and (small.n_frames > 1) == (shape[0] > 1)
            assert abs(small.width / small.height - shape[2] / shape[1]) < 0.1
    assert shown == Video(noisy, 8)._repr_mimebundle_()


# ---- pictures in ---------------------------------------------------------------------------------------


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


def test_other_gray_pictures_are_not_black():
    for pixels, expected in (
        (np.full((4, 5), 200, np.int32), 200 / 127.5 - 1),
        (np.full((4, 5), 51400, np.int32), 200 / 127.5 - 1),
        (np.full((4, 5), 0.8, np.float32), 0.6),
    ):
        assert picture(Image.fromarray(pixels)).mean() == pytest.approx(expected, abs=0.01)
    with pytest.raises(ValueError, match=r"runs from 200 to 200; expected 0\.\.1"):
        picture(Image.fromarray(np.full((4, 5), 200, np.float32)))


def test_rare_modes_are_read_or_named():
    for mode in ("HSV", "YCbCr", "LAB", "CMYK"):
        assert picture(Image.new(mode, (4, 5))).shape == (3, 5, 4)
    with pytest.raises(ValueError, match="a PIL picture of mode La .* save it as a png"):
        picture(Image.new("La", (4, 5)))
    image = Image.new("RGB", (4, 5))
    image.close()
    with pytest.raises(ValueError, match="a PIL picture of mode RGB .* cannot be read .*open it again"):
        picture(image)
    with pytest.raises(ValueError, match="on the meta device, which has no values"):
        picture(torch.zeros(3, 4, 4, device="meta"))


def test_a_file_is_what_it_holds_and_starts_no_other_program(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program was started"))
    path = tmp_path / "photo.png"
    for kind in ("EPS", "DDS", "XBM"):
        Image.new("1" if kind == "XBM" else "RGB", (8, 8)).save(path, kind)
        with pytest.raises(ValueError, match="photo.png is not a picture that can be read"):
            picture(path)
    Image.new("1", (20000, 20000)).save(path)
    with pytest.raises(ValueError, match="photo.png is too large"):
        picture(path)
    for kind in ("AVIF", "JPEG", "TIFF"):
        Image.fromarray(rgb(64, 64)).save(path, kind)
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(ValueError, match="photo.png is (damaged|not a picture)"):
            picture(path)


def test_a_long_strip_is_cut_before_it_is_resized():
    strip, photo = picture(Image.fromarray(rgb(10_000, 1))), picture(Image.fromarray(rgb(60, 90)))
    assert conditioning.without_ends(strip, (96, 96)).shape == (3, 64, 1)
    assert conditioning.without_ends(photo, (96, 96)) is photo
    for cover in (conditioning.cover, conditioning.cover_lanczos):
        assert cover(strip, (96, 96)).shape == cover(strip.mT, (96, 96)).shape == (3, 96, 96)
        for length in (300, 301):
            some = picture(Image.fromarray(rgb(length, 3)))
            cut = cover(some, (32, 48))
            with pytest.MonkeyPatch.context() as whole:
                whole.setattr(conditioning, "without_ends", lambda image, size: image)
                assert torch.equal(cover(some, (32, 48)), cut)


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
