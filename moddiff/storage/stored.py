"""What does every storage of a weight have?  A shape, the type it stands for, and a way back to numbers."""

import torch
from torch import nn

# Numbers that are expanded at once: what lies beside them on the way stays in a few times 16 MB.
AT_ONCE = 2**22
# Whoever converts a model converts floats: as integers of the same width the bytes pass unharmed.
BYTES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Stored(nn.Module):
    """A matrix [out, in] kept in fewer bytes, which stands in a layer's `weight` in place of a Parameter.

    shape   [out, in], of the matrix it stands for
    dtype   the type that it expands to and that its layer computes in. `model.to(dtype)` and its like change
            this, and never what is kept

    What is kept are buffers: they are in the state_dict, are copied and moved with the model. A subclass says
    `shape` and how to `decode` some of the rows to float32.
    """

    def __init__(self, dtype):
        super().__init__()
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
            raise TypeError(f"a stored weight stands for {dtype}; expected a float of 16 bits or more")
        self.dtype = dtype

    def decode(self, rows):
        """Those rows as float32.   slice or indices [n] -> [n, in]"""
        raise NotImplementedError

    def flaws(self):
        """How many of the numbers are NaN or infinite; what is kept tells without expanding it."""
        raise NotImplementedError

    def forward(self, dtype=None, rows=None):
        """The whole matrix, or some rows of it, as numbers.

        dtype   what to give; None: the one it stands for
        rows    integers of any shape; None: all rows
        ->      [out, in], or [*rows.shape, in]
        """
        dtype = dtype or self.dtype
        if rows is not None:
            return self.decode(rows.reshape(-1)).to(dtype).reshape(*rows.shape, self.shape[1])
        count, width = self.shape
        step = max(1, AT_ONCE // max(1, width))
        if count <= step:
            return self.decode(slice(None)).to(dtype)
        whole = torch.empty(count, width, dtype=dtype, device=self.device)
        for start in range(0, count, step):
            whole[start : start + step] = self.decode(slice(start, start + step))
        return whole

    def expand(self, dtype=None):
        """The whole matrix as numbers.   -> [out, in]"""
        # By way of the call, so that what hangs on it (torch's hooks, an offloader's) also works here.
        return self(dtype)

    def _apply(self, fn, recurse=True):
        for name, x in self._buffers.items():
            kept = x.view(BYTES[x.element_size()])
            moved = fn(kept)
            # `model.type(dtype)` converts whole numbers too.
            moved = moved if moved.dtype == kept.dtype else kept.to(moved.device)
            self._buffers[name] = moved.view(x.dtype)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self

    # ---- what is asked of any weight, dense or not ----

    @property
    def device(self):
        return next(self.buffers()).device

    @property
    def is_meta(self):
        return self.device.type == "meta"

    @property
    def ndim(self):
        return 2

    @property
    def nbytes(self):
        """Bytes of what is kept."""
        return sum(x.nbytes for x in self.buffers())

    def numel(self):
        return self.shape.numel()

    def extra_repr(self):
        bits = 8 * self.nbytes / max(1, self.numel())
        return f"{self.kind}, {list(self.shape)}, {bits:.3g} bits a number, for {self.dtype}"
