"""What are 8 bit weights?  Small numbers, and scales to multiply them by: one for all, a row, or a tile."""

import torch

from .stored import Stored

KINDS = {
    torch.float8_e4m3fn: "fp8 e4m3",
    torch.float8_e5m2: "fp8 e5m2",
    torch.int8: "int8",
}
# What the largest number of a row becomes.
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


class Scaled(Stored):
    """codes * scale.

    codes   [out, in], float8_e4m3fn, float8_e5m2 or int8
    scale   one number; [out] or [out, 1], one a row; [a, b], one for each tile of out / a rows and in / b
            columns; [out, b, 1], as musubi writes it. None: 1
    dtype   what it stands for

    Raises TypeError for codes of another type, ValueError for a scale that does not divide the matrix.
    """

    def __init__(self, codes, scale=None, dtype=torch.bfloat16):
        super().__init__(dtype)
        if codes.dtype not in KINDS:
            raise TypeError(f"codes are {codes.dtype}; expected {', '.join(map(str, KINDS))}")
        if codes.ndim != 2:
            raise ValueError(f"codes are {list(codes.shape)}; expected a matrix [out, in]")
        self.register_buffer("codes", codes)
        self.register_buffer("scale", tiles(scale, codes))

    @property
    def kind(self):
        return KINDS[self.codes.dtype]

    @property
    def shape(self):
        return self.codes.shape

    def decode(self, rows):
        down, across = self.scale.shape
        scale = self.scale.repeat_interleave(len(self.codes) // down, 0)[rows] if down > 1 else self.scale
        tiled = numbers(self.codes, rows).unflatten(1, (across, -1))  # [n, across, in / across]
        return (tiled * scale.float().unsqueeze(-1)).flatten(1)

    def flaws(self):
        odd = torch.zeros(self.shape, dtype=torch.bool, device=self.device)
        if self.codes.is_floating_point():
            # The exponent of NaN and infinity is all ones; in e4m3 only NaN is left out, with ones behind it.
            least = 0x7F if self.codes.dtype == torch.float8_e4m3fn else 0x7C
            odd |= (self.codes.view(torch.uint8) & 0x7F) >= least
        down, across = self.scale.shape
        tiled = odd.view(down, self.shape[0] // down, across, self.shape[1] // across)
        tiled |= ~self.scale.float().isfinite()[:, None, :, None]
        return int(odd.sum())


def numbers(codes, rows):
    """Those rows of 8 bit numbers as float32."""
    # 8 bit floats cannot be picked by an index everywhere; their bytes can.
    bytes = codes.view(torch.uint8)[rows]
    if codes.dtype == torch.int8:
        return bytes.view(torch.int8).float()
    # All 256 there are, in a table: on a CPU that is twenty times as fast as the conversion.
    table = torch.arange(256, dtype=torch.uint8, device=codes.device).view(codes.dtype).float()
    return table.index_select(0, bytes.reshape(-1).int()).reshape(bytes.shape)


def tiles(scale, codes):
    """A scale as a matrix that divides the codes.   -> [a, b], of the scale's own type"""
    out, width = codes.shape
    if scale is None:
        return torch.ones(1, 1, device=codes.device)
    shape = list(scale.shape)
    if scale.ndim == 3 and shape[0] == out and shape[2] == 1:
        scale = scale.squeeze(2)
    elif scale.numel() == 1:
        scale = scale.reshape(1, 1)
    elif scale.ndim == 1 and shape[0] == out:
        scale = scale.unsqueeze(1)
    fits = scale.ndim == 2 and scale.numel() and not out % scale.shape[0] and not width % scale.shape[1]
    if not fits or not scale.is_floating_point():
        raise ValueError(
            f"a scale of {shape} ({scale.dtype}) does not fit a weight of {[out, width]}; expected a float, "
            f"one for all, one a row [{out}, 1], or one for each tile [a, b] where a divides {out} and b "
            f"divides {width}"
        )
    return scale


def rounded(x, code):
    """Codes and scales, one a row.   [n, m], torch.int8 or float8_e4m3fn -> [n, m] of it, float32 [n, 1]"""
    x = x.float()
    scale = x.abs().amax(1, keepdim=True) / LARGEST[code]
    scale = scale.where(scale > 0, 1.0)  # a row of zeros
    small = x / scale
    if code == torch.int8:
        return small.round().to(code), scale
    # Some versions of torch make NaN of what is a rounding error above the largest.
    return small.clamp(-LARGEST[code], LARGEST[code]).to(code), scale
