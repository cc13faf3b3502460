"""How does a picture enter the loop?  What each kind of model takes beside the noise: a mask and a latent,
CLIP features, a held frame.

t2v          nothing
i2v, flf2v   y = [mask ; latent of a video that shows the picture and is gray elsewhere]; Wan 2.1 also reads
             CLIP features of it
ti2v         no extra channels: latent frame 0 is the picture's own, held there through the run, and its
             tokens are told t = 0
vace         a control latent: what to keep, what to change, and the mask
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image

from .video import picture


@dataclass(frozen=True)
class Conditioning:
    """What pictures add to a run; None where the model takes nothing of the kind.

    y           [1, c, f, h, w]      joined to x along channels
    image       [n_pictures, n, d]   CLIP features
    held        [1, z, 1, h, w]      the clean latent that stays in frame 0 (ti2v)
    control     [1, c, f, h, w]      for the VACE blocks, whose hints count `control_scale` times
    references  latent frames in front, of reference pictures, that are cut off again (VACE)
    """

    y: torch.Tensor | None = None
    image: torch.Tensor | None = None
    held: torch.Tensor | None = None
    control: torch.Tensor | None = None
    control_scale: float = 1.0
    references: int = 0

    def inputs(self, prepared):
        """What the dit takes beside x, t and text; `prepared`: the CLIP features went in with the text."""
        image = None if prepared else self.image
        scale = None if self.control is None else self.control_scale
        named = {"y": self.y, "image": image, "control": self.control, "control_scale": scale}
        return {name: value for name, value in named.items() if value is not None}

    def hold(self, x):
        """x with the held frame in its place."""
        return x if self.held is None else torch.cat([self.held.to(x), x[:, :, 1:]], 2)

    def times(self, t, x, patch):
        """The DiT's t: [1], or one per token [1, n]: 0 for those of the held frame, t for the rest."""
        if self.held is None:
            return t.reshape(1)
        f, h, w = (size // p for size, p in zip(x.shape[2:], patch))
        times = t.repeat(1, f * h * w)
        times[:, : h * w] = 0
        return times


# ---- sizes ---------------------------------------------------------------------------------------------


def size_for(image, size, stride, patch, task):
    """The video size (height, width) with about the area of `size` and the picture's own shape, as Wan
    chooses it.

    image  [3, H, W];  stride and patch: pixels per latent cell, cells per token
    """
    height, width = image.shape[1:]
    area = size[0] * size[1]
    if task == "ti2v":
        return _size_ti2v(height, width, area, stride[1] * patch[1], stride[2] * patch[2])
    shape = height / width
    rows = math.floor(math.sqrt(area * shape)) // stride[1] // patch[1] * patch[1]
    columns = math.floor(math.sqrt(area / shape)) // stride[2] // patch[2] * patch[2]
    return max(rows, patch[1]) * stride[1], max(columns, patch[2]) * stride[2]


def _size_ti2v(height, width, area, down, across):
    """Round one side down and fit the other, in both ways; the one that distorts less."""
    shape = width / height
    wide, high = math.sqrt(area * shape), area / math.sqrt(area * shape)
    first_w = max(int(wide // across), 1) * across
    first = (max(int(area / first_w // down), 1) * down, first_w)
    second_h = max(int(high // down), 1) * down
    second = (second_h, max(int(area / second_h // across), 1) * across)

    def distortion(size):
        new_shape = size[1] / size[0]
        return max(shape / new_shape, new_shape / shape)

    return min(second, first, key=distortion)  # of two equal ones the second, as in Wan


def check_size(size, frames, stride, patch):
    """Raise ValueError, naming the nearest possible ones, unless whole tokens make up such a video."""
    if frames < 1 or (frames - 1) % stride[0]:
        lower = max(frames - 1, 0) // stride[0] * stride[0] + 1
        raise ValueError(
            f"frames={frames}; expected {stride[0]}n + 1 of them, such as {lower} or {lower + stride[0]}: "
            f"the first frame stands alone, then {stride[0]} at a time share one latent frame"
        )
    if max(*size, frames) > 2**14:
        raise ValueError(
            f"{frames} frames of {size[0]} x {size[1]} pixels are more than any model can do; "
            f"expected at most {2**14} each"
        )
    steps = stride[1] * patch[1], stride[2] * patch[2]
    if any(side < 1 or side % step for side, step in zip(size, steps)):
        near = tuple(max(round(side / step), 1) * step for side, step in zip(size, steps))
        raise ValueError(
            f"size={tuple(size)} (height, width) cannot be cut into whole tokens; "
            f"expected multiples of {steps[0]} and {steps[1]}, such as {near}"
        )


# ---- pictures ------------------------------------------------------------------------------------------


def resize(image, size):
    """[3, H, W] -> [3, h, w] by torch's bicubic, slightly distorted, as Wan's image-to-video does."""
    return F.interpolate(image[None], tuple(size), mode="bicubic", align_corners=False)[0]


def smooth(image, size):
    """[3, H, W] -> [3, h, w] by torch's bicubic, which would overshoot [-1, 1]; small ones are averages."""
    image = F.interpolate(image[None], size, mode="bicubic", align_corners=False, antialias=True)
    return image[0].clamp(-1, 1)


def lanczos(image, size):
    """[3, H, W] -> [3, h, w] by PIL's Lanczos on 8 bit colours."""
    pixels = ((image.clamp(-1, 1) + 1) / 2 * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return picture(Image.fromarray(pixels).resize(size[::-1], Image.LANCZOS))


def cover(image, size, resized=smooth):
    """Scaled in its own proportions until it covers (height, width); what stands over is cut off on both
    sides."""
    height, width = size
    image = without_ends(image, size)
    factor = max(height / image.shape[1], width / image.shape[2])
    inner = max(height, round(image.shape[1] * factor)), max(width, round(image.shape[2] * factor))
    top, left = (inner[0] - height) // 2, (inner[1] - width) // 2
    return resized(image, inner)[:, top : top + height, left : left + width]


def cover_lanczos(image, size):
    """As `cover`, with the resampling of Wan 2.2's ti2v."""
    return cover(image, size, lanczos)


def without_ends(image, size):
    """A long strip without the ends that will be cut off anyhow: resized whole it would take gigabytes."""
    for axis, other in ((1, 2), (2, 1)):
        # Eight times what is kept, so that no edge of this cut comes near the part that stays.
        longest = max(64, math.ceil(8 * image.shape[other] * size[axis - 1] / size[other - 1]))
        ends = (image.shape[axis] - longest) // 2  # the same on both sides: the middle stays the middle
        if ends > 0:
            image = image.narrow(axis, ends, image.shape[axis] - 2 * ends)
    return image


# ---- what each model takes -----------------------------------------------------------------------------


def first_frame_mask(frames, latent, ft, last=False):
    """1 where the pixels are given: frame 0, and the last one with `last`.   -> [1, ft, f, h, w]

    The ft pixel frames of a latent frame are its channels. Frame 0 fills its latent frame alone, so it counts
    ft times.
    """
    given = torch.zeros(frames)
    given[[0, -1] if last else 0] = 1
    given = torch.cat([given[:1].expand(ft), given[1:]])  # [f * ft]
    return rearrange(given, "(f ft) -> 1 ft f 1 1", ft=ft).expand(1, ft, *latent)


def framed(image, last, size, stretch):
    """First and last picture at the size of the video: bent to it as Wan does, or cut to it."""
    fit = resize if stretch else cover
    if last is None:
        return fit(image, size), None
    # The size follows the first picture: a last one of another shape would be bent out of all proportion.
    fit_last = fit if last.shape == image.shape else cover
    return fit(image, size), fit_last(last, size)


def with_picture(encode, image, frames, latent, ft, last=None):
    """y of i2v and flf2v.   image, last [3, H, W] -> [1, ft + z, f, h, w]

    encode  video [1, 3, F, H, W] -> latent [1, z, f, h, w]
    """
    video = torch.zeros(1, 3, frames, *image.shape[1:])
    video[0, :, 0] = image
    if last is not None:
        video[0, :, -1] = last
    z = encode(video)
    return torch.cat([first_frame_mask(frames, latent, ft, last is not None).to(z), z], 1)


def vace_control(encode, frames, size, stride, video=None, mask=None, references=()):
    """The control of VACE: 2 z channels of what to keep and what to change, and the mask's pixels.

    encode      video [1, 3, F, H, W] -> latent [1, z, f, h, w]
    video       [1, 3, F, H, W] in [-1, 1]; None: gray
    mask        [F, H, W], above 0.5 where the model shall draw; None: everywhere, and a video is a guide
    references  pictures [3, H, W]; each takes a latent frame in front
    ->          [1, 2 z + fh fw, references + f, h, w]

    Source: Jiang et al. 2025 (VACE), section 3.2.
    """
    _, fh, fw = stride
    video = torch.zeros(1, 3, frames, *size) if video is None else video
    mask = torch.ones(frames, *size) if mask is None else (mask > 0.5).float()
    z = torch.cat([encode(video * (1 - mask)), encode(video * mask)], 1)  # [1, 2z, f, h, w]
    cells = rearrange(mask, "F (h fh) (w fw) -> 1 (fh fw) F h w", fh=fh, fw=fw)
    cells = F.interpolate(cells, z.shape[2:], mode="nearest-exact").to(z)  # [1, fh fw, f, h, w]
    control = torch.cat([z, cells], 1)
    for image in reversed(references):
        seen = encode(image[None, :, None])  # [1, z, 1, h, w]
        front = torch.cat([seen, torch.zeros_like(seen), cells.new_zeros(1, fh * fw, 1, *seen.shape[3:])], 1)
        control = torch.cat([front, control], 2)
    return control
