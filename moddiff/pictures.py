"""How does a picture come in?  Whatever a student has at hand, as the models take it."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

# What a file may hold, whatever its name says: Pillow knows more, and starts other programs for some of it
# (EPS).
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "TGA")


def picture(source):
    """Whatever picture a student has, as the models take it: float32 [3, H, W] in [-1, 1].

    source  a path; a PIL picture of any mode (see-through parts are laid on black); a uint8 array or tensor,
            0..255; a numpy float array, 0..1; a torch float tensor, -1..1 (as in the rest of the library).
            Arrays are [H, W], [H, W, 3 or 4] or [3 or 4, H, W]

    Raises FileNotFoundError, TypeError for something that is no picture, ValueError for a wrong shape or
    range.
    """
    if isinstance(source, (str, Path)):
        source = _open(Path(source).expanduser())
    readers = {Image.Image: _from_pil, torch.Tensor: _from_tensor, np.ndarray: _from_array}
    for kind, read in readers.items():
        if isinstance(source, kind):
            return read(source)
    if hasattr(source, "frames"):
        raise TypeError(
            f"a whole video of {len(source)} frames arrived as a picture; "
            "choose a frame: video[0] or video[-1]"
        )
    raise TypeError(
        f"a picture arrived as {type(source).__name__}; "
        "expected a path, a PIL image, a numpy array or a torch tensor"
    )


def _open(path):
    if not path.is_file():
        raise FileNotFoundError(f"there is no picture at {path}; check the path")
    Image.init()
    known = [name for name in FORMATS if name in Image.OPEN]  # AVIF is in newer versions of Pillow
    try:
        with Image.open(path, formats=known) as file:
            return ImageOps.exif_transpose(file).copy()  # as a camera held it
    except UnidentifiedImageError as error:
        raise ValueError(
            f"{path} is not a picture that can be read; expected png, jpeg, webp or the like"
        ) from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path} is too large ({error}); save it smaller") from error
    except (OSError, ValueError, SyntaxError) as error:  # Pillow's decoders raise all three
        raise ValueError(f"{path} is damaged or cut off ({error}); save or fetch it again") from error


def _from_pil(image):
    """PIL picture of any mode -> float32 [3, H, W] in [-1, 1]"""
    if image.mode == "F":  # 0..1, as in a numpy array
        return _from_array(np.asarray(image))
    try:
        if image.mode.startswith("I"):
            image = _eight_bits(image)
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
        pixels = torch.from_numpy(np.array(image.convert("RGB")))  # [H, W, 3]
    except (OSError, ValueError) as error:
        raise ValueError(
            f"a PIL picture of mode {image.mode} and size {image.size} cannot be read ({error}); "
            "open it again, or save it as a png"
        ) from error
    # In place: a large picture fits in memory once, not four times.
    return pixels.permute(2, 0, 1).float().div_(255).mul_(2).sub_(1)


def _eight_bits(image):
    """Whole numbers, which Pillow would cut at 255: of 16 bits, unless all of them are below 256 in a mode
    that may be either."""
    values = np.asarray(image, np.float64)
    high = 255 if image.mode == "I" and values.max() <= 255 else 65535
    return Image.fromarray((values / high * 255).clip(0, 255).round().astype(np.uint8))


def _from_tensor(source):
    if source.is_meta:
        raise ValueError("a picture arrived as a tensor on the meta device, which has no values; load it")
    if not source.is_floating_point():
        return _from_array(source.detach().cpu().numpy())
    # numpy knows no bfloat16
    return _from_floats(_channels_last(source.detach().cpu().float().numpy()), -1, "torch float tensor")


def _from_array(pixels):
    pixels = _channels_last(pixels)
    if pixels.dtype == np.uint8:
        return _from_pil(Image.fromarray(pixels))
    if not np.issubdtype(pixels.dtype, np.floating):
        raise ValueError(f"a picture of {pixels.dtype} arrived; expected uint8 (0..255) or floats")
    return _from_floats(pixels, 0, "numpy float array")


def _from_floats(pixels, low, kind):
    """[H, W, 3 or 4] from low to 1 -> float32 [3, H, W] in [-1, 1]"""
    if not (np.isfinite(pixels).all() and pixels.min() >= low - 1e-3 and pixels.max() <= 1 + 1e-3):
        other = "uint8 tensor for 0..255" if low else "uint8 array for 0..255, or a torch tensor for -1..1"
        raise ValueError(
            f"a picture runs from {pixels.min():.3g} to {pixels.max():.3g}; "
            f"expected {low}..1 and no NaN in a {kind}. Give a {other}"
        )
    pixels = torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)
    pixels = pixels if low else pixels * 2 - 1
    if len(pixels) == 4:
        pixels = (pixels[:3] + 1) * ((pixels[3:] + 1) / 2) - 1  # on black
    return pixels.contiguous()


def _channels_last(pixels):
    """[H, W], [H, W, 3 or 4] or [3 or 4, H, W] -> [H, W, 3 or 4]"""
    if pixels.ndim == 2:
        pixels = np.stack([pixels] * 3, -1)
    if pixels.ndim == 3 and pixels.shape[-1] not in (3, 4) and pixels.shape[0] in (3, 4):
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim != 3 or pixels.shape[-1] not in (3, 4) or 0 in pixels.shape:
        raise ValueError(
            f"a picture of shape {list(pixels.shape)} arrived; "
            "expected [H, W], [H, W, 3 or 4] or [3 or 4, H, W], one picture"
        )
    return np.ascontiguousarray(pixels)
