"""How do pictures come in and go out?  A Video that shows and saves itself, and readers for whatever picture a student has at hand."""

import base64
import hashlib
import io
import json
import math
import os
import tempfile
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

# How each kind of file is written; the codec and its options where PyAV does it. x264's macroblock tree, which saves bytes, is off: it makes
# other bytes of the same frames in another process.
CODECS = {
    ".mp4": ("mp4", "libx264", {"crf": "18", "preset": "fast", "x264-params": "mbtree=0"}),
    ".webm": ("webm", "libvpx-vp9", {"crf": "24", "b": "0"}),
}
SUFFIXES = (*CODECS, ".gif", ".webp", ".png")


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
                f"frames arrived as {frames.dtype} {list(frames.shape)}; expected uint8 [F, H, W, 3] with at least one frame. "
                "For a tensor in [-1, 1] use Video.from_tensor"
            )
        if not (fps > 0 and math.isfinite(fps)):
            raise ValueError(f"fps={fps}; expected a number of frames per second above 0, such as 16")
        frames.flags.writeable = False
        self.frames, self.fps, self.settings, self.notes = frames, fps, dict(settings or {}), tuple(notes)
        self.frame_numbers = range(len(frames))  # of a slice: those in the film it was cut from

    @classmethod
    def from_tensor(cls, video, fps=16, settings=None, notes=()):
        """video [3, F, H, W] or [1, 3, F, H, W] in [-1, 1], clamped -> Video. Values are cut, not rounded, to 0..255, as Wan does."""
        if video.ndim == 5 and len(video) == 1:
            video = video[0]
        if video.ndim != 4 or video.shape[0] != 3:
            raise ValueError(
                f"a video of shape {list(video.shape)} arrived; expected [3, F, H, W] or [1, 3, F, H, W]: one video at a time"
            )
        if video.isnan().any():
            raise ValueError(
                f"{int(video.isnan().sum())} of {video.numel()} pixel values are NaN; did a patch, the scale or a 16 bit dtype "
                "drive the model out of range? try dtype='fp32'"
            )
        pixels = (video.float().clamp(-1, 1) + 1) / 2 * 255  # [3, F, H, W]
        return cls(pixels.to(torch.uint8).permute(1, 2, 3, 0), fps, settings, notes)

    @classmethod
    def open(cls, path):
        """Read a file that PyAV can read (mp4, webm, gif, ...).   -> Video"""
        import av

        try:
            with av.open(str(path)) as file:
                stream = file.streams.video[0] if file.streams.video else None
                frames = (
                    [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)] if stream else []
                )
                fps = stream and stream.average_rate
                comment = {key.lower(): value for key, value in file.metadata.items()}.get("comment", "")
        except av.error.InvalidDataError as error:
            raise ValueError(
                f"{path} is not a video that can be read ({error.strerror}); expected mp4, webm or gif"
            ) from error
        if not frames:
            raise ValueError(f"there are no pictures in {path}; expected a video such as mp4, webm or gif")
        settings = json.loads(comment) if comment.startswith("{") else {}
        return cls(np.stack(frames), int(fps) if fps.denominator == 1 else float(fps), settings)

    def tensor(self):
        """What vae.encode takes: float32 [1, 3, F, H, W] in [-1, 1]."""
        return torch.tensor(self.frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1

    @property
    def seconds(self):
        return len(self) / self.fps

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

    # ---- files --------------------------------------------------------------------------------------------------------

    def encode(self, suffix):
        """The bytes of a file of this kind: ".mp4" (h264), ".webm" (VP9), ".gif", ".webp" (lossless) or ".png" (a sheet).

        The same frames give the same bytes. Frames with an odd side get one more row or column in mp4 and webm, whose colours are halved in size.
        """
        suffix = check_suffix(suffix)
        if suffix in CODECS:
            return self._by_av(*CODECS[suffix])
        file = io.BytesIO()
        if suffix == ".png":
            self.sheet().save(file, "PNG")
        else:
            first, *rest = [self[i] for i in range(len(self))]
            extra = {"lossless": True, "quality": 60, "method": 4} if suffix == ".webp" else {"disposal": 1}
            unit = (
                1 if suffix == ".webp" else 10
            )  # milliseconds; a gif counts in tens, so its frames take turns to keep the whole in time
            ends = [round((i + 1) * 1000 / unit / self.fps) * unit for i in range(len(self))]
            times = [max(unit, end - start) for start, end in zip([0, *ends], ends)]
            first.save(
                file,
                suffix[1:].upper(),
                save_all=True,
                append_images=rest,
                duration=times if rest else times[0],
                loop=0,
                **extra,
            )
        return file.getvalue()

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
                file.mux(
                    stream.encode(
                        to_yuv.reformat(
                            frame, format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG"
                        )
                    )
                )
            file.mux(stream.encode())
        return buffer.getvalue()

    def save(self, path):
        """Write a .mp4, .webm, .gif, .webp or .png (all frames on one sheet).   -> the Path

        The file appears whole or not at all, whatever interrupts the writing. Raises ValueError for another ending, and
        FileNotFoundError where there is no such folder.
        """
        path = check_path(path)
        write_whole(path, self.encode(path.suffix))
        return path

    # ---- notebooks ----------------------------------------------------------------------------------------------------

    def _repr_html_(self):
        """A player that starts by itself and repeats; the video is inside the page, so an exported page plays too."""
        import html

        height, width = self.frames.shape[1:3]
        shown = width * max(1, 240 // max(height, width))
        data = base64.b64encode(self.encode(".mp4")).decode()
        notes = "".join(f"<p><i>Note: {html.escape(note)}</i></p>" for note in self.notes)
        style = "image-rendering: pixelated; max-width: 100%"
        return (
            f'<video width="{shown}" style="{style}" autoplay loop muted controls playsinline '
            f'src="data:video/mp4;base64,{data}"></video>{notes}'
        )

    def _repr_mimebundle_(self, include=None, exclude=None):
        return {"text/plain": repr(self), "text/html": self._repr_html_()}


def check_suffix(suffix):
    """The ending in small letters; ValueError if a Video cannot be written so."""
    if suffix.lower() not in SUFFIXES:
        raise ValueError(
            f"a video cannot be saved as {suffix or 'a file without an ending'}; choose one of {', '.join(SUFFIXES)}"
        )
    return suffix.lower()


def check_path(path):
    """The Path, if a video can be written there; says what is wrong before the work and not after."""
    path = Path(path)
    check_suffix(path.suffix)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} to save {path.name} in; create it first")
    if path.is_dir():
        raise IsADirectoryError(
            f"{path} is a folder; name a file in it, such as {path / ('out' + path.suffix)}"
        )
    return path


def write_whole(path, data):
    """Put bytes at a path in one motion: beside it first, then in its place. An interrupt leaves neither half a file nor a spare one."""
    path = Path(path)
    handle, spare = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=path.suffix, dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(spare, 0o666 & ~_umask())
        os.replace(spare, path)
    except BaseException:
        os.unlink(spare)
        raise


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


# ---- pictures in ------------------------------------------------------------------------------------------------------


def picture(source):
    """Whatever picture a student has, as the models take it: float32 [3, H, W] in [-1, 1].

    source  a path; a PIL picture of any mode (see-through parts are laid on black); a uint8 array or tensor, 0..255; a numpy float
            array, 0..1; a torch float tensor, -1..1 (as in the rest of the library). Arrays are [H, W], [H, W, 3 or 4] or [3 or 4, H, W]

    Raises FileNotFoundError, TypeError for something that is no picture, ValueError for a wrong shape or range.
    """
    if isinstance(source, Video):
        raise TypeError(
            f"a whole video of {len(source)} frames arrived as a picture; choose a frame: video[0] or video[-1]"
        )
    if isinstance(source, (str, Path)):
        source = _open_picture(Path(source))
    if isinstance(source, Image.Image):
        return _from_pil(source)
    if not isinstance(source, (np.ndarray, torch.Tensor)):
        raise TypeError(
            f"a picture arrived as {type(source).__name__}; expected a path, a PIL image, a numpy array or a torch tensor"
        )
    signed = torch.is_tensor(source) and source.is_floating_point()
    if signed:
        source = source.float()  # numpy knows no bfloat16
    pixels = _channels_last(source.detach().cpu().numpy() if torch.is_tensor(source) else source)
    if pixels.dtype == np.uint8:
        return _from_pil(Image.fromarray(pixels))
    if not np.issubdtype(pixels.dtype, np.floating):
        raise ValueError(f"a picture of {pixels.dtype} arrived; expected uint8 (0..255) or floats")
    low = -1 if signed else 0
    if not (np.isfinite(pixels).all() and pixels.min() >= low - 1e-3 and pixels.max() <= 1 + 1e-3):
        kind, other = (
            ("torch float tensor", "uint8 tensor for 0..255")
            if signed
            else ("numpy float array", "uint8 array for 0..255, or a torch tensor for -1..1")
        )
        raise ValueError(
            f"a picture runs from {pixels.min():.3g} to {pixels.max():.3g}; expected {low}..1 and no NaN in a {kind}. Give a {other}"
        )
    pixels = pixels.astype(np.float32) if signed else pixels.astype(np.float32) * 2 - 1
    if pixels.shape[-1] == 4:
        alpha = (pixels[..., 3:] + 1) / 2
        pixels = (pixels[..., :3] + 1) * alpha - 1
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def _channels_last(pixels):
    if pixels.ndim == 2:
        pixels = np.stack([pixels] * 3, -1)
    if pixels.ndim == 3 and pixels.shape[-1] not in (3, 4) and pixels.shape[0] in (3, 4):
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim != 3 or pixels.shape[-1] not in (3, 4) or 0 in pixels.shape:
        raise ValueError(
            f"a picture of shape {list(pixels.shape)} arrived; expected [H, W], [H, W, 3 or 4] or [3 or 4, H, W], one picture"
        )
    return np.ascontiguousarray(pixels)


def _open_picture(path):
    if not path.is_file():
        raise FileNotFoundError(f"there is no picture at {path}; check the path")
    try:
        with Image.open(path) as file:
            return ImageOps.exif_transpose(file).copy()  # as a camera held it
    except UnidentifiedImageError as error:
        raise ValueError(
            f"{path} is not a picture that can be read; expected png, jpeg, webp or the like"
        ) from error
    except OSError as error:
        raise ValueError(f"{path} is damaged or cut off ({error}); save or fetch it again") from error


def _from_pil(image):
    """PIL picture of any mode -> float32 [3, H, W] in [-1, 1]"""
    if image.mode.startswith("I"):  # 16 bit gray, which PIL would clip
        image = Image.fromarray(
            (np.asarray(image, np.float64) / 65535 * 255).clip(0, 255).round().astype(np.uint8)
        )
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
    pixels = torch.tensor(np.asarray(image.convert("RGB")))  # [H, W, 3]
    return pixels.permute(2, 0, 1).float() / 255 * 2 - 1
