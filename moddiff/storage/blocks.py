"""How are the weights of a GGUF file kept?  As the blocks of bytes that are in it, until they are used."""

import torch

from .decoders import TYPES
from .stored import Stored


class Blocks(Stored):
    """A matrix as GGUF blocks.

    codes   uint8 [out, bytes of a row]
    kind    "q8_0", "q4_k", ...: a key of decoders.TYPES
    dtype   what it stands for

    The buffer has the name of the kind, so that a state_dict says what it holds. Raises ValueError for an
    unknown kind, or bytes that are no whole blocks.
    """

    def __init__(self, codes, kind, dtype=torch.bfloat16):
        super().__init__(dtype)
        if kind not in TYPES:
            raise ValueError(f"there are no blocks of kind {kind!r}; there are {', '.join(TYPES)}")
        size = TYPES[kind].bytes
        if codes.dtype != torch.uint8 or codes.ndim != 2 or codes.shape[1] % size:
            raise ValueError(
                f"codes are {list(codes.shape)} of {codes.dtype}; expected uint8 [out, n * {size}], whole "
                f"blocks of {kind}"
            )
        self.kind = kind
        self.register_buffer(kind, codes)

    @property
    def codes(self):
        return self._buffers[self.kind]

    @property
    def shape(self):
        out, size = self.codes.shape
        return torch.Size((out, size // TYPES[self.kind].bytes * TYPES[self.kind].values))

    def decode(self, rows):
        codes = self.codes[rows]
        numbers = TYPES[self.kind].decode(codes.reshape(-1, TYPES[self.kind].bytes))
        return numbers.reshape(len(codes), self.shape[1])

    def flaws(self):
        kind = TYPES[self.kind]
        blocks = self.codes.reshape(-1, kind.bytes)
        if self.kind == "mxfp4":  # its scales are powers of two, of which the last three are beyond float32
            return int((blocks[:, 0] > 252).sum()) * kind.values
        odd = torch.zeros(len(blocks), dtype=torch.bool, device=blocks.device)
        for at in kind.halves:
            # Five ones in the exponent; its bits are the middle five of the second byte.
            odd |= (blocks[:, at + 1] & 0x7C) == 0x7C
        return int(odd.sum()) * kind.values
