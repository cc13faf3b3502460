"""How does a video show and save itself?  Frames, how fast they follow, and what they were made with."""

import base64
import hashlib
import html
import io
import json
import math
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from .pictures import picture
from .saving import writable, write_whole

__all__ = ["Video", "check_path", "picture", "to_pixels", "to_tensor", "write_whole"]
# How each kind of file is written; the codec and its options where PyAV does it. x264's macroblock tree,
# which saves bytes, is off: it makes other bytes of the same frames in another process.
CODECS = {
    ".mp4": ("mp4", "libx264", {"crf": "18", "preset": "fast", "x264-params": "mbtree=0"}),
    ".webm": ("webm", "libvpx-vp9", {"crf": "24", "b": "0"}),
}
SUFFIXES = (*CODECS, ".gif", ".webp", ".png")
DESCRIPTION = 0x010E  # the EXIF field in which a webp keeps what a gif and an mp4 keep in their comment


class Video:
    """Finished frames: `video.frames` is uint8 [F, H, W, 3], read-only.

    frames    uint8 [F, H, W, 3], numpy or torch
    fps       frames per second, above 0
    settings  what the video was made with (prompt, seed, steps, ...), written into the file's comment
    notes     what the reader should know, such as words the model has never met

    Shows itself in a notebook and in exported HTML. Two videos are equal when frames and fps are.
    Raises ValueError for another shape or dtype.
    """

    def __init__(self, frames, fps=16, settings=None, notes=()):
        frames = np.array(frames.cpu().numpy() if torch.is_tensor(frames) else frames, order="C")
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
            raise ValueError(
                f"frames arrived as {frames.dtype} {list(frames.shape)}; expected uint8 [F, H, W, 3] with "
                "at least one frame. For a tensor in [-1, 1] use Video.from_tensor"
            )
        if not (fps > 0 and math.isfinite(fps)):
            raise ValueError(f"fps={fps}; expected a number of frames per second above 0, such as 16")
        frames.flags.writeable = False
        self.frames, self.fps, self.settings, self.notes = frames, fps, dict(settings or {}), tuple(notes)
        self.run = None  # the number it is kept under, if it came of a run with store=
        self.frame_numbers = range(len(frames))  # of a slice: those in the film it was cut from

    @classmethod
    def from_tensor(cls, video, fps=16, settings=None, notes=()):
        """video [3, F, H, W] or [1, 3, F, H, W] in [-1, 1], clamped -> Video. Values are cut, not rounded, to
        0..255, as Wan does."""
        if video.ndim == 5 and len(video) == 1:
            video = video[0]
        if video.ndim != 4 or video.shape[0] != 3:
            raise ValueError(
                f"a video of shape {list(video.shape)} arrived; expected [3, F, H, W] or [1, 3, F, H, W]: "
                "one video at a time"
            )
        if video.isnan().any():
            raise ValueError(
                f"{int(video.isnan().sum())} of {video.numel()} pixel values are NaN; did a patch, the scale "
                "or a 16 bit dtype drive the model out of range? try dtype='fp32'"
            )
        return cls(to_pixels(video), fps, settings, notes)

    @classmethod
    def open(cls, path):
        """Read a file that was saved here, or another one that PyAV can play.   -> Video

        Raises FileNotFoundError, or ValueError for what is no video.
        """
        path = Path(path).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"there is no video at {path}; check the path")
        with path.open("rb") as file:
            head = file.read(12)
        animated = head[:4] == b"GIF8" or head[8:] == b"WEBP"
        frames, fps, settings = _read_animation(path) if animated else _read_film(path)
        if not len(frames):
            raise ValueError(
                f"there are no pictures in {path}; expected a video such as mp4, webm, webp or gif"
            )
        return cls(np.stack(frames), int(fps) if fps == int(fps) else float(fps), settings)

    def tensor(self):
        """What vae.encode takes: float32 [1, 3, F, H, W] in [-1, 1]."""
        return to_tensor(self.frames)[None]

    seconds = property(lambda self: len(self) / self.fps, doc="how long it plays")

    @property
    def digest(self):
        """A fingerprint of the frames: the same frames and fps give the same 64 characters."""
        head = f"{self.frames.shape} {float(self.fps)} ".encode()
        return hashlib.sha256(head + self.frames.tobytes()).hexdigest()

    def __len__(self):
        return len(self.frames)

    def __getitem__(self, which):
        """A frame as a PIL picture, `video[0]`, `video[-1]`; a slice is a Video."""
        if isinstance(which, slice):
            part = Video(self.frames[which], self.fps, self.settings, self.notes)
            part.frame_numbers = self.frame_numbers[which]
            return part
        return Image.fromarray(self.frames[which])

    def __eq__(self, other):
        if not isinstance(other, Video):
            return NotImplemented
        return float(self.fps) == float(other.fps) and np.array_equal(self.frames, other.frames)

    def __hash__(self):
        return hash(self.digest)

    def __array__(self, dtype=None, copy=None):
        return np.array(self.frames, dtype=dtype)

    def __repr__(self):
        count, height, width = self.frames.shape[:3]
        notes = "".join(f"\n  note: {note}" for note in self.notes)
        return f"Video({count} frames of {height} x {width}, {self.fps:g} fps, {self.seconds:.1f} s)" + notes

    def sheet(self, columns=None, gap=2):
        """All frames side by side in one picture, row by row.   -> PIL image

        columns  frames per row; None: about as wide as high
        gap      white pixels between frames
        """
        count, height, width = self.frames.shape[:3]
        columns = columns or max(1, round(math.sqrt(count * height / width)))
        if columns < 1:
            raise ValueError(f"columns={columns}; expected 1 or more")
        columns = min(columns, count)
        rows = math.ceil(count / columns)
        page = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
        for i in range(count):
            page.paste(self[i], (i % columns * (width + gap), i // columns * (height + gap)))
        return page

    # ---- files ------------------------------------------------------------------------------------------

    def encode(self, suffix):
        """The bytes of a file of this kind: ".mp4" (h264), ".webm" (VP9), ".gif", ".webp" (lossless) or
        ".png" (a sheet).

        The same frames give the same bytes. Frames with an odd side get one more row or column in mp4 and
        webm, whose colours are halved in size.
        """
        suffix = check_suffix(suffix)
        if suffix in CODECS:
            return self._by_av(*CODECS[suffix])
        if suffix == ".png":
            return _animated([self.sheet()], "png", 0)
        comment = json.dumps({"fps": self.fps, "settings": self.settings}, default=str)
        description = Image.Exif()
        description[DESCRIPTION] = comment
        webp = {"lossless": True, "quality": 60, "method": 4, "exif": description}
        options = webp if suffix == ".webp" else {"disposal": 1, "comment": comment}
        # A gif counts in tens of milliseconds: its frames take turns, so that the whole keeps time.
        unit = 1 if suffix == ".webp" else 10
        ends = [round(i * 1000 / unit / self.fps) * unit for i in range(len(self) + 1)]
        times = [max(unit, end - start) for start, end in pairwise(ends)]
        return _animated(list(self), suffix[1:], times, **options)

    def _by_av(self, container, codec, options):
        import av
        from av.video.reformatter import VideoReformatter

        height, width = self.frames.shape[1:3]
        frames = np.pad(self.frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        buffer = io.BytesIO()
        with av.open(buffer, "w", format=container, options={"fflags": "+bitexact"}) as file:
            file.metadata["comment"] = json.dumps(self.settings, ensure_ascii=False, default=str)
            stream = file.add_stream(codec, rate=Fraction(self.fps).limit_denominator(1001), options=options)
            stream.height, stream.width = frames.shape[1:3]
            stream.pix_fmt = "yuv420p"
            context = stream.codec_context
            context.thread_count = 1  # the bytes depend on it
            # Say which matrix turned RGB into YUV, or players guess by the size of the picture.
            context.colorspace = context.color_primaries = context.color_trc = 1  # BT.709
            context.color_range = 1
            to_yuv = VideoReformatter()  # one for all frames: each new one starts threads
            for pixels in frames:
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                frame = to_yuv.reformat(
                    frame, format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG"
                )
                file.mux(stream.encode(frame))
            file.mux(stream.encode())
        return buffer.getvalue()

    def save(self, path):
        """Write a .mp4, .webm, .gif, .webp or .png (all frames on one sheet).   -> the Path

        The file appears whole or not at all, whatever interrupts the writing; a missing folder is made. A gif
        keeps 256 colours, a png no rate and no settings. Raises ValueError for another ending, OSError where
        no file can be written.
        """
        path = check_path(path)
        write_whole(path, self.encode(path.suffix))
        return path

    # ---- notebooks --------------------------------------------------------------------------------------

    def _repr_html_(self):
        """A player that starts by itself and repeats, with the video inside: an exported page plays too.

        A page that takes no players, such as GitHub's, leaves what stands inside: a small moving picture.
        """
        height, width = self.frames.shape[1:3]
        shown = width * max(1, 240 // max(height, width))
        film, small = (base64.b64encode(data).decode() for data in (self.encode(".mp4"), self._small("WEBP")))
        notes = "".join(f"<p><i>Note: {html.escape(note)}</i></p>" for note in self.notes)
        return (
            f'<video width="{shown}" style="image-rendering: pixelated; max-width: 100%" '
            f'autoplay loop muted controls playsinline src="data:video/mp4;base64,{film}">'
            f'<img width="{shown}" alt="{html.escape(repr(self))}" '
            f'src="data:image/webp;base64,{small}"></video>{notes}'
        )

    def _repr_mimebundle_(self, include=None, exclude=None):
        small = base64.b64encode(self._small("PNG")).decode()  # for what shows no HTML; it moves too
        return {"text/plain": repr(self), "text/html": self._repr_html_(), "image/png": small}

    def _small(self, kind, most=40_000):
        """A moving picture of at most that many bytes, of fewer and smaller frames if need be."""
        for count, side in ((17, 160), (9, 128), (6, 96), (4, 64), (2, 32)):
            which = np.linspace(0, len(self) - 1, min(count, len(self))).round().astype(int)
            pages = [self[i] for i in which]
            for page in pages:
                page.thumbnail((side, side))
            if kind == "PNG":  # few colours, the same ones in all frames
                palette = Video(np.stack(pages)).sheet(gap=0).quantize(32)
                pages = [page.quantize(palette=palette, dither=Image.Dither.NONE) for page in pages]
            data = _animated(pages, kind, round(1000 * self.seconds / len(pages)), quality=60)
            if len(data) <= most:
                break
        return data


def _animated(pages, kind, times, **options):
    """The bytes of a moving picture that repeats.   times: milliseconds, of each page or of all"""
    first, *rest = pages
    file = io.BytesIO()
    times = times if rest or isinstance(times, int) else times[0]
    first.save(file, kind.upper(), save_all=True, append_images=rest, duration=times, loop=0, **options)
    return file.getvalue()


def _read_film(path):
    """Frames, rate and settings of an mp4, webm, ..., turned as a player turns them."""
    import av

    try:
        with av.open(str(path.resolve()), metadata_errors="replace") as file:
            if not file.streams.video:
                return [], 1, {}
            rate = file.streams.video[0].average_rate or 16
            comment = {key.lower(): value for key, value in file.metadata.items()}.get("comment", "")
            # A phone that was held upright writes lying frames and the angle.
            frames = [
                np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
                for frame in file.decode(video=0)
            ]
    except av.error.FFmpegError as error:
        raise ValueError(
            f"{path} is not a video that can be read ({error.strerror}); expected mp4, webm, webp or gif"
        ) from error
    return frames, rate, _dict_in(comment)


def _read_animation(path):
    """Frames, rate and settings of a webp or gif."""
    frames, ends = [], [0]  # ends: milliseconds
    try:
        with Image.open(path, formats=("WEBP", "GIF")) as file:
            comment = _dict_in(file.getexif().get(DESCRIPTION) or file.info.get("comment", ""))
            for i in range(file.n_frames):
                file.seek(i)
                frames.append(np.asarray(file.convert("RGB")))
                ends.append(ends[-1] + (file.info.get("duration") or 100))
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"{path} is damaged or cut off ({error}); save or fetch it again") from error
    fps, settings = comment.get("fps"), comment.get("settings")
    if not (isinstance(fps, int | float) and 0 < fps <= 1000 and isinstance(settings, dict)):
        return frames, Fraction(1000 * len(frames), ends[-1]), {}  # of another program
    # Frames that were alike were written as one that stays longer.
    starts = [round(end * fps / 1000) for end in ends]
    times = [max(1, after - before) for before, after in pairwise(starts)]
    return np.repeat(np.stack(frames), times, axis=0), fps, settings


def _dict_in(comment):
    """The dict that a file's comment holds; an empty one where another program wrote something else."""
    try:
        read = json.loads(comment)
    except ValueError:
        return {}
    return read if isinstance(read, dict) else {}


def to_pixels(video):
    """[..., 3, F, H, W] in [-1, 1], clamped -> uint8 [..., F, H, W, 3].  Cut, not rounded, as Wan does."""
    return ((video.float().clamp(-1, 1) + 1) / 2 * 255).to(torch.uint8).movedim(-4, -1)


def to_tensor(frames):
    """uint8 [..., F, H, W, 3] -> float32 [..., 3, F, H, W] in [-1, 1]"""
    return torch.tensor(np.ascontiguousarray(frames)).movedim(-1, -4).float() / 127.5 - 1


def check_suffix(suffix):
    """The ending in small letters; ValueError if a Video cannot be written so."""
    if suffix.lower() not in SUFFIXES:
        raise ValueError(
            f"a video cannot be saved as {suffix or 'a file without an ending'}; choose one of "
            f"{', '.join(SUFFIXES)}"
        )
    return suffix.lower()


def check_path(path):
    """The Path, if a video can be written there; says what is wrong before the work and not after."""
    check_suffix(Path(path).suffix)
    return writable(path)
