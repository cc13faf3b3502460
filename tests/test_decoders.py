"""Are the bytes of every GGUF block read as the `gguf` package reads them?"""

import gguf
import numpy as np
import pytest
import torch

from moddiff.storage.decoders import TYPES


def random_blocks(kind, count, seed=0):
    """Any bytes are a block, once its scales are numbers of a sane size."""
    generator = np.random.default_rng(seed)
    blocks = generator.integers(0, 256, (count, TYPES[kind].bytes), dtype=np.uint8)
    for at in TYPES[kind].halves:
        blocks[:, at : at + 2] = generator.normal(size=(count, 1)).astype(np.float16).view(np.uint8)
    if kind == "mxfp4":
        blocks[:, 0] = generator.integers(0, 250, count)
    if kind == "nvfp4":
        blocks[:, :4] = generator.integers(0, 127, (count, 4))
    return blocks


def reference(kind, blocks):
    return gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType(TYPES[kind].number))


@pytest.mark.parametrize("kind", TYPES)
def test_sizes_are_those_of_the_format(kind):
    number = gguf.GGMLQuantizationType(TYPES[kind].number)
    assert number.name.lower() == kind
    assert gguf.GGML_QUANT_SIZES[number] == (TYPES[kind].values, TYPES[kind].bytes)


@pytest.mark.parametrize("kind", TYPES)
def test_random_bytes_become_the_numbers_that_gguf_gives(kind):
    blocks = random_blocks(kind, 300)
    ours = TYPES[kind].decode(torch.from_numpy(blocks))
    theirs = torch.from_numpy(reference(kind, blocks))
    assert ours.dtype == torch.float32 and len(theirs.unique()) > 100
    assert torch.equal(ours, theirs)


def test_a_lone_byte_says_where_a_number_lies():
    # q4_0: scale 1, all sixteens at 8 (zero) but the high half of byte 3, which is number 16 + 3.
    block = np.full((1, 18), 0x88, dtype=np.uint8)
    block[0, :2] = np.array([1.0], dtype=np.float16).view(np.uint8)
    block[0, 2 + 3] = 0xA8
    numbers = TYPES["q4_0"].decode(torch.from_numpy(block))[0]
    assert numbers.nonzero().tolist() == [[19]] and numbers[19] == 2
