"""What does this one file hold, how is it stored, and what would it take to run it?  Nothing is loaded."""

import html
import re
from dataclasses import asdict, dataclass

from ..hooks import Table, in_words
from ..storage import Stored
from . import building, configs, files, gguf, peaks
from .fit import IN_SHORT
from .pieces import SPIECE
from .releases import open_release
from .single import goes_with, part_of
from .working import forecast

# What the layers of a component do, by their names: the first that fits.
LAYERS = (
    ("norms, biases, modulation", r"norm|modulation|bias|gamma"),
    ("self-attention", r"self_attn|\.attn\.|to_qkv|middle\.1\.proj"),
    ("cross-attention", r"cross_attn"),
    ("feed-forward", r"\.ffn\."),
    ("embeddings, first and last layers", r""),
)


@dataclass(frozen=True)
class Contents:
    """What a file of weights holds. to_dict() is plain data, ready for JSON.

    kind, config  what it is, and its sizes in words
    naming        whose names its tensors have
    layers        {what they do: {how they are stored: (tensors, numbers, bytes)}}
    releases      those it goes with;  equal: in every size, or only the nearest
    needs         the other parts that such a pipeline has
    forecast      bytes, for the release's own size, with this file as it is stored: as `fit.forecast`
    notes         what a reader should know
    """

    path: str
    kind: str
    config: str
    naming: str
    parameters: int
    bytes: int
    layers: dict
    releases: list
    equal: bool
    needs: list
    forecast: dict
    notes: list

    def to_dict(self):
        return asdict(self)

    def tables(self):
        rows = [
            [layer, kind, f"{count:,}", f"{numbers:,}", in_words(size), f"{8 * size / max(1, numbers):.3g}"]
            for layer, kinds in self.layers.items()
            for kind, (count, numbers, size) in kinds.items()
        ]
        headings = ["layers", "stored as", "tensors", "numbers", "bytes", "bits each"]
        stored = Table(headings, rows, f"{self.path}: {self.kind}, {self.config}")
        cast = self.forecast["parts"]
        rows = [[name, in_words(part["weights"]), in_words(part["working"])] for name, part in cast.items()]
        rows.append(["all at once", in_words(self.forecast["weights"]), in_words(self.forecast["peak"])])
        rows.append(["one at a time", "", in_words(self.forecast["peak_one_at_a_time"])])
        height, width = self.forecast["size"]
        what = f"Memory at {width} x {height}, {self.forecast['frames']} frames"
        memory = Table(["part", "weights", "working memory, then peak"], rows, what)
        return stored, memory, peaks.table(self.forecast["profiles"])

    def remarks(self):
        like = "as in" if self.equal else "nearest to"
        return [
            f"{in_words(self.bytes)}, {self.parameters:,} parameters, {self.naming}",
            f"{like} {', '.join(self.releases)}",
            f"to run it: moddiff.load({self.releases[0]!r}, {self.kind}=FILE, "
            f"{', '.join(f'{name}=FILE' for name in self.needs)})",
            *(f"note  {note}" for note in self.notes),
        ]

    def __repr__(self):
        return "\n\n".join([*map(repr, self.tables()), "\n".join(self.remarks())])

    def _repr_html_(self):
        lines = "".join(f"<li>{html.escape(line)}</li>" for line in self.remarks())
        return "".join(table._repr_html_() for table in self.tables()) + f"<ul>{lines}</ul>"


def contents(where, size=None, frames=None, dtype=None, config=None, profile=None):
    """What a file of weights, or an index of shards, holds.

    size, frames   of the video to forecast; None: the release's own
    dtype          of the weights in memory; None: as they are stored
    config         a dict, or the path of a config.json, where the sizes cannot be told from the shapes
    profile        one of your own to forecast beside those of the package: a JSON file or a dictionary
    ->             Contents

    Raises CheckpointError, WeightsError or ValueError for what is no part of Wan, or does not fit together.
    """
    part = part_of(where, config=config)
    stored = files.describe(part.where)
    module = configs.empty(part.kind, part.config)
    naming, prefix, _ = building.detect(part.kind, part.config, module, stored)
    state = building.match(part.kind, part.config, module, stored, check_values=False)
    names, equal = goes_with(part)
    release, dtype = open_release(names[0]), building.as_dtype(dtype)
    numbers = sum(x.numel() for x in state.values())
    known = {name: each.config for name, each in release.parts.items()} | {part.kind: part.config}
    size, frames = tuple(size or release.sampling["size"]), frames or release.sampling["frames"]
    # Of the others nothing is known: the vae is taken for float32, a second expert for 16 bits, as in fit.py.
    widths = {part.kind: files.size_of(state) / numbers, "vae": 4}
    if "dit_low" in known:
        widths["dit_low"] = widths["dit"] if part.kind == "dit" else 2
    cast = forecast(known, size, frames, dtype, widths)
    mine = {"dit", "dit_low"} if part.kind == "dit" else {part.kind}  # two experts are stored alike
    asked = {
        name: peaks.Asked(name.removesuffix("_low"), config, stored if name in mine else None)
        for name, config in known.items()
    }
    cast["profiles"] = peaks.under_profiles(asked, size, frames, dtype, profile)
    return Contents(
        str(part.where),
        part.kind,
        IN_SHORT[part.kind].format(part.config),
        building.NAMINGS[naming] + (f" behind {prefix!r}" if prefix else ""),
        numbers,
        files.size_of(stored),
        by_layer(state),
        names,
        equal,
        [name for name in ("dit", "text", "image", "vae") if name in known and name != part.kind],
        cast,
        _notes(part, stored, names),
    )


def by_layer(state):
    """How the layers are stored, by what they do.   -> {layer: {storage: (tensors, numbers, bytes)}}"""
    found = {}
    for name, x in state.items():
        layer = next(layer for layer, pattern in LAYERS if re.search(pattern, name))
        kind = x.kind if isinstance(x, Stored) else str(x.dtype).removeprefix("torch.")
        count, numbers, size = found.setdefault(layer, {}).get(kind, (0, 0, 0))
        found[layer][kind] = count + 1, numbers + x.numel(), size + x.nbytes
    order = [layer for layer, _ in LAYERS]
    return {layer: found[layer] for layer in sorted(found, key=order.index)}


def _notes(part, stored, names):
    notes = []
    if len(names) > 1 and part.kind == "dit":
        notes.append("these sizes are those of several releases; what they were trained for is in no shape")
    first = files.files(part.where)[0]
    inside = SPIECE in stored or (gguf.is_gguf(first) and "tokenizer.ggml.tokens" in gguf.facts(first))
    if part.kind == "text" and not inside:
        notes.append("no tokenizer is in it: give tokenizer=, the folder of google/umt5-xxl")
    return notes
