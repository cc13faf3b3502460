"""Where do measured claims keep their runs?  On disk, under the fingerprint of the weights.

A command that was interrupted goes on where it stopped, and one with other weights begins anew.
"""

import json
from functools import partial
from pathlib import Path

import numpy as np

from moddiff.experiments.snapshots import Snapshot
from moddiff.saving import write_whole
from moddiff.tiny import world
from moddiff.viz.canvas import png

CHOOSING = 1000  # seeds from here on are for choosing heads and blocks; measured are those from 0


class Keep:
    """`keep(name, make)` is make(), or what it gave in an earlier run with the same weights.

    folder  where
    mark    of the weights and settings: another mark is another file
    make    returns a dict of arrays
    """

    def __init__(self, folder, mark):
        self.folder, self.mark = Path(folder), mark

    def __call__(self, name, make):
        path = self.folder / f"{self.mark}-{name}.npz"
        if not path.exists():
            arrays = make()
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(path, partial(_save, arrays))
        with np.load(path) as held:
            return {key: held[key] for key in held.files}


def _save(arrays, path):
    with open(path, "wb") as file:  # given a path, numpy would put .npz behind it
        np.savez_compressed(file, **arrays)


def keep_beside(out, pipe):
    """A Keep in a folder beside the picture `out`."""
    return Keep(out.with_suffix(".parts"), mark_of(pipe, pipe.defaults))


def mark_of(pipe, *settings):
    """A few letters that change when a weight or a setting does."""
    return f"{world.stable_seed(Snapshot(pipe, copies=0).fingerprint, *settings):016x}"[:10]


def option_of(options, *key):
    """One of the options, by a stable hash of the key: the same on every machine."""
    options = list(options)
    return options[world.stable_seed("lessons", *key) % len(options)]


def finish(figure, facts, out):
    """Write the picture, and beside it the numbers as JSON."""
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, png(figure))
    write_whole(out.with_suffix(".json"), json.dumps(facts, indent=2).encode() + b"\n")
