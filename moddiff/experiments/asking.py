"""What was a run asked for?  Its options as JSON, with the pictures among them kept as they are.

A path says where a picture was on one day; so its pixels are kept, once, under their digest.
"""

import hashlib

import numpy as np
import torch

from ..pictures import picture
from ..video import Video
from .recipes import plain, value_of

PICTURES = "image", "last_image"
ARRAYS = "video", "mask"
NOT_KEPT = "progress", "rewrite"  # the rewritten prompt is kept; the language model is not asked again


def written(options):
    """The options of a run in words.

    -> (options, words, arrays): the options with each picture read, which is what the run should be given,
       so that what is kept is what was used; the words, as JSON; {digest: array} of those pictures
    """
    options, words, arrays = dict(options), {}, {}

    def keep(tensor):
        array = _bytes_if_exact(tensor.cpu())
        arrays[digest_of(array)] = array
        return {"array": digest_of(array)}

    for name, value in options.items():
        if value is None or name in NOT_KEPT:
            continue
        if name in PICTURES:
            options[name] = picture(value)
            words[name] = keep(options[name])
        elif name == "references":
            options[name] = [picture(one) for one in value]
            words[name] = [keep(one) for one in options[name]]
        elif name in ARRAYS:
            options[name] = value.tensor() if isinstance(value, Video) else torch.as_tensor(value)
            words[name] = keep(options[name])
        else:
            words[name] = plain(value)
    return options, words, arrays


def spoken(words, array_of):
    """The options that `written` has written down.   array_of: digest -> array"""

    def read(word):
        return _floats(array_of(word["array"]))

    options = {}
    for name, word in words.items():
        if name == "references":
            options[name] = [read(one) for one in word]
        else:
            options[name] = read(word) if isinstance(word, dict) and "array" in word else value_of(word)
    return options


def digest_of(array):
    """The fingerprint of an array: its numbers, its shape and its type."""
    head = f"{array.dtype} {array.shape} ".encode()
    return hashlib.sha256(head + np.ascontiguousarray(array).tobytes()).hexdigest()


def _bytes_if_exact(tensor):
    """A tensor as an array; as one of bytes, a quarter of the size, if it came from such."""
    if tensor.dtype == torch.float32:
        small = ((tensor + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        if torch.equal(_floats(small.numpy()), tensor):
            return small.numpy()
    return np.ascontiguousarray(tensor.numpy())


def _floats(array):
    """An array as the tensor it was: bytes as `pictures.picture` reads them."""
    tensor = torch.from_numpy(array.copy())
    return tensor.float().div_(255).mul_(2).sub_(1) if tensor.dtype == torch.uint8 else tensor
