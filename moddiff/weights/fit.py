"""Will it fit?  What a folder or a preset holds, what it lacks, and the memory that a video will take.

Nothing is loaded: names, shapes and types come from the heads of the files, and the modules are built without
memory.
"""

import html
from dataclasses import asdict, dataclass
from functools import lru_cache
from math import prod

from ..hooks import Table, in_words
from . import building, configs, files
from .files import CheckpointError
from .names import ignored
from .quoting import quoted
from .releases import open_release

# Peak bytes of one forward pass, measured by counting every live tensor of our modules; tests/test_fit.py
# counts again. Feature maps of the widest full-resolution stage alive at once, by pixel patch (1: VAE 2.1, 2:
# VAE 2.2) ...
DECODE_MAPS = {1: 4.1, 2: 7.3}
# ... and a chunked pass takes as much as a whole pass over this many frames: four new ones and the time
# cache.
CHUNK_FRAMES = {1: 11, 2: 8.6}
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
    forecast  in bytes; empty where the config of the dit or of the vae is not known
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
        return (parts, self._memory()) if self.forecast else (parts,)

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


def inspect(where, size=None, frames=None, dtype=None):
    """What a folder or a preset holds, what it lacks, and what generating with it will take.

    where    folder or preset name, as for `open_release`
    size     (height, width) in pixels; frames: 4n + 1. None: the release's defaults
    dtype    of the weights in memory; None: what load would take, which is as stored (the tiny
             models: 32 bit); where nothing is stored 16 bit, the vae 32
    ->       Inspection, which shows itself as two tables

    Raises ValueError when `where` is neither a folder with a model nor a preset.
    """
    release = open_release(where)
    size = tuple(size or release.sampling["size"])
    frames = frames or release.sampling["frames"]
    dtype = building.as_dtype(dtype or release.dtype)
    parts, missing, notes = {}, list(release.missing), list(release.notes)
    known = {name: part for name, part in release.parts.items() if part.config is not None}
    for name, part in known.items():
        parts[name], trouble, aside = _look(part, dtype)
        missing += [f"{name}: {trouble}"] if trouble else []
        notes += [f"{name}: {why}, left aside" for why in aside]
    cast = {}
    # The vae's stride and the dit's patch make the number of tokens, which all else hangs on.
    if {"dit", "vae"} <= known.keys():
        widths = {name: part["width"] for name, part in parts.items()}
        cast = forecast({name: part.config for name, part in known.items()}, size, frames, dtype, widths)
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


# Even without memory a model of 40 blocks takes its time to build: once for each config.
@lru_cache(maxsize=32)
def parameters(kind, config):
    """How many numbers a component with this config has."""
    return sum(p.numel() for p in configs.empty(kind, config).parameters())


def _look(part, dtype):
    """One component's entry, what is wrong with its files, and why some of its tensors are left aside."""
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
    return entry, trouble, sorted({why for name in stored if (why := ignored(kind, name))})


def forecast(parts, size, frames, dtype=None, widths=None):
    """Bytes that weights and one forward pass of each component will take, for one video.

    parts   {part name: config dataclass}
    size    (height, width) in pixels;  frames: 4n + 1
    dtype   of all weights; None: `widths`, {part name: bytes per number}, else 16 bit
    ->      dict of bytes: per part `weights` and `working`; `peak` with everything in memory;
            `peak_one_at_a_time`, the largest part alone, where each is loaded, used and freed; `written_out`

    The working memory of the DiT counts one branch; guidance runs the two one after the other.
    """
    # A width need not be whole: a file may hold some tensors in 32 bits and the rest in 16.
    wide = {name: dtype.itemsize if dtype else (widths or {}).get(name, 2) for name in parts}
    vae = parts["vae"]
    (ft, fh, fw), (height, width) = vae.stride, size
    grid = (frames - 1) // ft + 1, height // fh, width // fw
    tokens = prod(n // p for n, p in zip(grid, parts["dit"].patch_size))
    whole, chunked = decode_bytes(vae, size, frames, wide["vae"])
    rows = {}
    for name, config in parts.items():
        kind = name.removesuffix("_low")
        match kind:
            case "dit":
                working = dit_bytes(config, tokens, wide[name])
            case "text":
                working = text_bytes(config, wide[name])
            case "image":
                working = config.num_tokens * config.dim * 60
            case "vae":
                working = min(whole, chunked)
        rows[name] = {"weights": round(parameters(kind, config) * wide[name]), "working": round(working)}
    stored = sum(row["weights"] for row in rows.values())
    bits = ", ".join(f"{name} {8 * width:g} bit" for name, width in wide.items())
    return {
        "size": list(size),
        "frames": frames,
        "tokens": tokens,
        "dtype": str(dtype).removeprefix("torch.") if dtype else bits,
        "parts": rows,
        "weights": stored,
        "peak": stored + max(row["working"] for row in rows.values()),
        "peak_one_at_a_time": max(row["weights"] + row["working"] for row in rows.values()),
        # Scores and probabilities, four bytes each, for all pairs of tokens in every head of a block.
        "written_out": 8 * parts["dit"].num_heads * tokens**2,
        "vae_whole": round(whole),
        "vae_chunked": round(chunked),
    }


def dit_bytes(config, tokens, width):
    """Peak of one block: the float32 stream, and queries, keys and values or the wide layer after it."""
    dim, head = config.dim, config.dim // config.num_heads
    # They take turns, so the larger counts. Bytes for each token and channel, as counted (see the top).
    attention, ffn = 28 + width, 20 - width + 2 * width * config.ffn_dim / dim
    # Text-or-image models have six modulations per token, the others per video.
    per_token_time = 52 if config.model_type == "ti2v" else 0
    # CLIP's 16 x 16 patches and its class token.
    words = config.text_len + (257 if config.image_dim else 0)
    prompt = 2 * width * dim * config.num_layers * words  # its keys and values, kept from step to step
    return tokens * (dim * (max(attention, ffn) + per_token_time) + 16 * config.in_dim + 5 * head) + prompt


def decode_bytes(config, size, frames, width):
    """(in one pass, in chunks): feature maps at full resolution, and the finished video."""
    pixels = prod(size)
    # The widest map at full resolution: Wan 2.1 halves the width of the stage before it on the way up.
    base = max(config.dim, config.dec_dim or 0) * max(config.dim_mult[0], config.dim_mult[1] / 2)
    frame = DECODE_MAPS[config.patch] * base / config.patch**2 * pixels * width
    # In chunks the maps stay small, but all the finished frames lie beside them.
    return frame * frames, frame * min(frames, CHUNK_FRAMES[config.patch]) + 3 * pixels * frames * width


def text_bytes(config, width):
    """Attention over a prompt of full length, its bias and its probabilities."""
    return config.text_len**2 * config.num_heads * (8 + width) + config.text_len * (
        config.dim * 12 + config.dim_ffn * 3 * width
    )
