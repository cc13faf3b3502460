"""Will it fit?  What a folder or a preset holds, what it lacks, and the memory that a video will take.

Nothing is loaded: names, shapes and types come from the heads of the files, and the modules are built without
memory.
"""

import html
from dataclasses import asdict, dataclass
from math import prod

from ..hooks import Table, in_words
from . import building, configs, files, peaks
from .files import CheckpointError
from .names import ignored
from .quoting import quoted
from .releases import open_release
from .working import forecast, parameters

# A config in a few words.
IN_SHORT = {
    "dit": "{0.model_type}, {0.num_layers} blocks, width {0.dim}, {0.num_heads} heads, {0.in_dim} channels "
    "in",
    "text": "{0.num_layers} layers, width {0.dim}, {0.vocab:,} pieces",
    "image": "{0.num_layers} layers, width {0.dim}, {0.num_tokens} tokens",
    "vae": "stride {0.stride}, {0.z_dim} latent channels",
}


@dataclass(frozen=True)
class Inspection:
    """What a folder or a preset holds. to_dict() is plain data, ready for JSON.

    parts     one entry per component whose config is known
    missing   what keeps it from being loaded, in words
    forecast  in bytes, "profiles" in it for each profile; empty where the config of the dit or of the vae is
              not known
    """

    name: str
    about: str
    layout: str
    folder: str | None
    task: str
    parts: dict
    missing: list
    sampling: dict
    forecast: dict
    notes: tuple

    def to_dict(self):
        return asdict(self)

    def tables(self):
        """The components, and the forecast where there is one."""
        rows = [
            [
                name,
                part["config"],
                f"{part['parameters']:,}",
                part["stored"] or "no files here",
                in_words(part["bytes"]) if part["bytes"] else "",
                part["naming"],
            ]
            for name, part in self.parts.items()
        ]
        headings = ["part", "what", "parameters", "stored as", "on disk", "names"]
        parts = Table(headings, rows, f"{self.name}: {self.about} ({self.layout})")
        if not self.forecast:
            return (parts,)
        return parts, self._memory(), peaks.table(self.forecast["profiles"])

    def _memory(self):
        cast = self.forecast
        rows = [
            *([name, in_words(x["weights"]), in_words(x["working"])] for name, x in cast["parts"].items()),
            ["all at once", in_words(cast["weights"]), in_words(cast["peak"] - cast["weights"])],
            [
                "one at a time",
                in_words(cast["peak_one_at_a_time"]),
                "(the largest, weights and working memory: where parts take turns; load keeps them all)",
            ],
        ]
        height, width = cast["size"]
        video = f"{width} x {height}, {cast['frames']} frames, {cast['tokens']:,} tokens"
        return Table(["part", "weights", "working memory"], rows, f"Memory at {video}, {cast['dtype']}")

    def remarks(self):
        lines = [f"missing  {line}" for line in self.missing] + [f"note  {line}" for line in self.notes]
        if not self.forecast:
            return [*lines, "note  no forecast: it needs the configs of the dit and the vae"]
        written_out, whole, chunked = (
            in_words(self.forecast[name]) for name in ("written_out", "vae_whole", "vae_chunked")
        )
        return [
            *lines,
            f"note  attention written out, as when its probs are edited, would add {written_out} in the dit",
            f"note  the vae decodes in one pass with {whole}, in chunks with {chunked}",
        ]

    def __repr__(self):
        return "\n\n".join([*map(repr, self.tables()), "\n".join(self.remarks())])

    def _repr_html_(self):
        lines = "".join(f"<li>{html.escape(line)}</li>" for line in self.remarks())
        return "".join(table._repr_html_() for table in self.tables()) + f"<ul>{lines}</ul>"


def inspect(where, size=None, frames=None, dtype=None, profile=None):
    """What a folder or a preset holds, what it lacks, and what generating with it will take.

    where    folder or preset name, as for `open_release`
    size     (height, width) in pixels; frames: 4n + 1. None: the release's defaults
    dtype    of the weights in memory; None: what load would take, which is as stored (the tiny
             models: 32 bit); where nothing is stored 16 bit, the vae 32
    profile  one of your own to forecast beside those of the package: a JSON file or a dictionary
    ->       Inspection, which shows itself as tables

    Raises ValueError when `where` is neither a folder with a model nor a preset, and for an unknown profile.
    """
    release = open_release(where)
    size = tuple(size or release.sampling["size"])
    frames = frames or release.sampling["frames"]
    dtype = building.as_dtype(dtype or release.dtype)
    parts, asked, missing, notes = {}, {}, list(release.missing), list(release.notes)
    known = {name: part for name, part in release.parts.items() if part.config is not None}
    for name, part in known.items():
        parts[name], asked[name], trouble, aside = _look(part)
        missing += [f"{name}: {trouble}"] if trouble else []
        notes += [f"{name}: {why}, left aside" for why in aside]
    cast = {}
    # The vae's stride and the dit's patch make the number of tokens, which all else hangs on.
    if {"dit", "vae"} <= known.keys():
        widths = {name: part["width"] for name, part in parts.items()}
        cast = forecast({name: part.config for name, part in known.items()}, size, frames, dtype, widths)
        cast["profiles"] = peaks.under_profiles(asked, size, frames, dtype, profile)
    return Inspection(
        release.name,
        release.about,
        release.layout,
        None if release.folder is None else str(release.folder),
        release.task,
        parts,
        missing,
        release.sampling,
        cast,
        tuple(notes),
    )


def _look(part):
    """One component's entry, what to forecast, what is wrong with its files, what of them is left aside."""
    kind, config = part.kind, part.config
    stored, naming, trouble = {}, "", ""
    if part.where is not None and not part.problem:
        module = configs.empty(kind, config)
        try:
            stored = files.describe(part.where)
            naming, prefix, _ = building.detect(kind, config, module, stored)
            naming += f", behind {prefix!r}" if prefix else ""
            # Names and shapes are matched as in loading; only the values are not read.
            building.match(kind, config, module, stored, check_values=False)
        except (CheckpointError, building.WeightsError) as error:
            trouble = str(error)
    kept = {name: x for name, x in stored.items() if ignored(kind, name) is None}
    types = sorted({str(x.dtype).removeprefix("torch.") for x in kept.values()})
    numbers = sum(prod(x.shape) for x in kept.values())
    unsaid = 4 if kind == "vae" else 2  # bytes of a number where no file says it
    entry = {
        "kind": kind,
        "config": IN_SHORT[kind].format(config),
        "parameters": parameters(kind, config),
        "tensors": len(kept),
        "shapes": {quoted(name): list(x.shape) for name, x in kept.items()},
        "stored": " and ".join(types),
        "bytes": files.size_of(stored),
        "width": files.size_of(kept) / numbers if numbers else unsaid,
        "naming": naming,
        "files": [str(path) for path in files.files(part.where)] if stored else [],
    }
    # Of files that do not fit only the config is known.
    asked = peaks.Asked(kind, config, stored if stored and not trouble else None)
    return entry, asked, trouble, sorted({why for name in stored if (why := ignored(kind, name))})
