"""Will it fit?  What a folder or a preset holds, what it lacks, and how much memory a video of a given size will take.

Nothing is loaded: names, shapes and types come from the heads of the files, and the modules are built without memory.
"""

import html
from dataclasses import asdict, dataclass
from functools import lru_cache
from math import prod

from ..hooks import Table, in_words
from . import building as weights
from . import configs
from . import files as checkpoints
from .files import CheckpointError
from .names import ignored
from .releases import open_release

# Peak bytes of one forward pass, measured by counting every live tensor of our own modules (tests/test_inspection.py counts again).
DECODE_MAPS = {
    1: 4.1,
    2: 7.3,
}  # feature maps of the widest full-resolution stage alive at once, by pixel patch (1: VAE 2.1, 2: VAE 2.2)
CHUNK_FRAMES = {
    1: 11,
    2: 8.6,
}  # a chunked pass takes as much as a whole pass over this many frames: four new ones and the time cache


@dataclass(frozen=True)
class Inspection:
    """What was found. `parts` has one entry per component; `forecast` is in bytes; to_dict() is plain data, ready for JSON."""

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
        """Two tables: the components, and the forecast."""
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
        cast = self.forecast
        height, width = cast["size"]
        video = f"{width} x {height}, {cast['frames']} frames, {cast['tokens']:,} tokens"
        sums = [
            [name, in_words(part["weights"]), in_words(part["working"])]
            for name, part in cast["parts"].items()
        ]
        sums += [
            ["all at once", in_words(cast["weights"]), in_words(cast["peak"] - cast["weights"])],
            [
                "one at a time",
                in_words(cast["peak_one_at_a_time"]),
                "(weights and working memory of the largest)",
            ],
        ]
        return (
            Table(
                ["part", "what", "parameters", "stored as", "on disk", "names"],
                rows,
                f"{self.name}: {self.about} ({self.layout})",
            ),
            Table(["part", "weights", "working memory"], sums, f"Memory at {video}, {cast['dtype']}"),
        )

    def remarks(self):
        cast = self.forecast
        lines = [f"missing  {line}" for line in self.missing] + [f"note  {line}" for line in self.notes]
        return lines + [
            f"note  attention written out, as when its probs are edited, would add {in_words(cast['written_out'])} in the dit",
            f"note  the vae decodes in one pass with {in_words(cast['vae_whole'])}, in chunks with {in_words(cast['vae_chunked'])}",
        ]

    def __repr__(self):
        return "\n\n".join([*map(repr, self.tables()), "\n".join(self.remarks())])

    def _repr_html_(self):
        lines = "".join(f"<li>{html.escape(line)}</li>" for line in self.remarks())
        return "".join(table._repr_html_() for table in self.tables()) + f"<ul>{lines}</ul>"


def inspect(where, size=None, frames=None, dtype=None, overrides=None):
    """What a folder or a preset holds, and what generating with it will take.

    where    folder or preset name, as for `open_release`
    size     (height, width) in pixels; frames: 4n + 1. None: the release's defaults
    dtype    of the weights in memory; None: as stored, and where nothing is stored 16 bit (the vae 32)
    ->       Inspection, which shows itself as two tables

    Raises ValueError when `where` is neither a folder with a model nor a preset.
    """
    release = open_release(where, overrides)
    size, frames = tuple(size or release.sampling["size"]), frames or release.sampling["frames"]
    dtype = weights.as_dtype(dtype)
    parts, missing, extra = {}, list(release.missing), []
    for name, part in release.parts.items():
        if part.config is None:
            continue
        found, trouble = _look(part)
        parts[name] = found
        missing += [f"{name}: {trouble}"] if trouble else []
        extra += [f"{name}: {why}, left aside" for why in found.pop("aside")]
    cast = forecast(
        {name: part.config for name, part in release.parts.items() if part.config is not None},
        size,
        frames,
        dtype,
        {name: part["width"] for name, part in parts.items()},
    )
    folder = None if release.folder is None else str(release.folder)
    return Inspection(
        release.name,
        release.about,
        release.layout,
        folder,
        release.task,
        parts,
        missing,
        release.sampling,
        cast,
        (*release.notes, *extra),
    )


@lru_cache(maxsize=32)
def parameters(kind, config):
    """How many numbers a component with this config has."""
    return sum(p.numel() for p in configs.empty(kind, config).parameters())


def _look(part):
    """One component's entry, and what is wrong with its files."""
    config, stored, trouble, naming = part.config, {}, "", ""
    if part.where is not None and not part.problem:
        try:
            stored = checkpoints.describe(part.where)
            naming, prefix, _ = weights.detect(part.kind, config, configs.empty(part.kind, config), stored)
            naming += f", behind {prefix!r}" if prefix else ""
            weights.rename(stored, part.kind, "ours", config)
        except (CheckpointError, weights.WeightsError) as error:
            trouble = str(error)
    kept = {name: x for name, x in stored.items() if ignored(part.kind, name) is None}
    types = sorted({str(x.dtype).removeprefix("torch.") for x in kept.values()})
    numbers = sum(prod(x.shape) for x in kept.values())
    files = [str(path) for path in checkpoints.files(part.where)] if stored else []
    return {
        "kind": part.kind,
        "config": _in_short(part.kind, config),
        "parameters": parameters(part.kind, config),
        "tensors": len(kept),
        "shapes": {name: list(x.shape) for name, x in kept.items()},
        "stored": " and ".join(types),
        "bytes": checkpoints.size_of(stored),
        "width": checkpoints.size_of(kept) / numbers if numbers else 4 if part.kind == "vae" else 2,
        "naming": naming,
        "files": files,
        "aside": sorted({why for name in stored if (why := ignored(part.kind, name))}),
    }, trouble


def _in_short(kind, config):
    if kind == "dit":
        return f"{config.model_type}, {config.num_layers} blocks, width {config.dim}, {config.num_heads} heads, {config.in_dim} channels in"
    if kind == "vae":
        return f"stride {config.stride}, {config.z_dim} latent channels"
    if kind == "image":
        return f"{config.num_layers} layers, width {config.dim}, {config.num_tokens} tokens"
    return f"{config.num_layers} layers, width {config.dim}, {config.vocab:,} pieces"


def forecast(parts, size, frames, dtype=None, widths=None):
    """Bytes that weights and one forward pass of each component will take, for one video.

    parts   {part name: config dataclass}
    size    (height, width) in pixels;  frames: 4n + 1
    dtype   of all weights; None: `widths`, {part name: bytes per number}, else 16 bit
    ->      dict of bytes: per part `weights` and `working`; `peak` with everything in memory; `peak_one_at_a_time`; `written_out`

    The working memory of the DiT counts one branch; guidance runs the two one after the other.
    """
    widths = widths or {}
    of = lambda name: dtype.itemsize if dtype else widths.get(name, 2)
    vae = parts["vae"]
    (ft, fh, fw), (height, width) = vae.stride, size
    grid = (frames - 1) // ft + 1, height // fh, width // fw
    tokens = prod(n // p for n, p in zip(grid, parts["dit"].patch_size))
    whole, chunked = decode_bytes(vae, size, frames, of("vae"))
    rows = {}
    for name, config in parts.items():
        kind = name.removesuffix("_low")
        working = {
            "dit": lambda: dit_bytes(config, tokens, of(name)),
            "vae": lambda: min(whole, chunked),
            "text": lambda: text_bytes(config, of(name)),
            "image": lambda: config.num_tokens * config.dim * 60,
        }[kind]()
        rows[name] = {"weights": round(parameters(kind, config) * of(name)), "working": round(working)}
    stored = sum(row["weights"] for row in rows.values())
    named = (
        str(dtype).removeprefix("torch.")
        if dtype
        else ", ".join(f"{name} {8 * of(name):g} bit" for name in parts)
    )
    return {
        "size": list(size),
        "frames": frames,
        "tokens": tokens,
        "dtype": named,
        "parts": rows,
        "weights": stored,
        "peak": stored + max(row["working"] for row in rows.values()),
        "peak_one_at_a_time": max(row["weights"] + row["working"] for row in rows.values()),
        "written_out": 8 * parts["dit"].num_heads * tokens**2,
        "vae_whole": round(whole),
        "vae_chunked": round(chunked),
    }


def dit_bytes(config, tokens, width):
    """Peak of one block: the float32 stream, and either queries, keys and values or the wide layer of the feed-forward part."""
    dim, head = config.dim, config.dim // config.num_heads
    attention, ffn = 28 + width, 20 - width + 2 * width * config.ffn_dim / dim
    per_token_time = (
        52 if config.model_type == "ti2v" else 0
    )  # six modulations per token instead of per video
    kept = (
        2 * width * dim * config.num_layers * (config.text_len + (257 if config.image_dim else 0))
    )  # keys and values of the prompt
    return tokens * (dim * (max(attention, ffn) + per_token_time) + 16 * config.in_dim + 5 * head) + kept


def decode_bytes(config, size, frames, width):
    """(in one pass, in chunks): feature maps at full resolution, and the finished video."""
    pixels = prod(size)
    base = max(config.dim, config.dec_dim or 0) * max(config.dim_mult[0], config.dim_mult[1] / 2)
    frame = DECODE_MAPS[config.patch] * base / config.patch**2 * pixels * width
    return frame * frames, frame * min(frames, CHUNK_FRAMES[config.patch]) + 3 * pixels * frames * width


def text_bytes(config, width):
    """Attention over a prompt of full length, its bias and its probabilities."""
    return config.text_len**2 * config.num_heads * (8 + width) + config.text_len * (
        config.dim * 12 + config.dim_ffn * 3 * width
    )
