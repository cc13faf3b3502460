"""Is a tensor's memory a file, and may the system have it back?  What a mapped checkpoint costs is up to us.

A page of a mapped file counts as memory from the first look at it until the system needs the room. A model
larger than the memory is read page by page, so what was used is given back at once.
"""

import ctypes
import functools
import mmap

WILLNEED, PAGEOUT = 3, 21  # of madvise(2), Linux


def in_a_file(x):
    """Is this tensor mapped from a file?  Linux tells; elsewhere the answer is no."""
    try:
        with open("/proc/self/maps") as maps:
            lines = [line.split() for line in maps]
    except OSError:
        return False
    for span, _, _, _, inode, *_ in lines:
        first, _, end = span.partition("-")
        if int(first, 16) <= x.data_ptr() < int(end, 16):
            return inode != "0"
    return False


def will_need(tensors):
    """Let the system begin to read these."""
    _advise(tensors, WILLNEED)


def give_back(tensors):
    """Let the system have the memory of these: it reads them again when they are used.

    Harms nobody: what is in no file stays, or goes to the swap space.
    """
    _advise(tensors, PAGEOUT)


def _advise(tensors, advice):
    madvise = _madvise()
    if madvise is None:
        return
    for x in tensors:
        first = x.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        madvise(ctypes.c_void_p(first), ctypes.c_size_t(x.data_ptr() + x.nbytes - first), advice)


@functools.cache
def _madvise():
    """The function of the C library; None where there is none, as on Windows."""
    try:
        return ctypes.CDLL(None).madvise
    except (AttributeError, OSError, TypeError):
        return None
