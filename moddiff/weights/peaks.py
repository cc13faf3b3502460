"""How much memory does each profile take?  The components without memory, and the same calls done to them.

An extension says by itself what it leaves where and what it takes at a time (`holds`, `at_once`,
`frames_at_once`: extensions/promises.py), so that a forecast knows no more of it than its name.
"""

from dataclasses import dataclass
from math import prod
from pathlib import Path

from ..experts import Experts
from ..hooks import Table, in_words
from ..storage import Stored
from . import building, configs
from .profiles import applied, profile, profiles
from .working import tokens_of, working_bytes

# Bytes of a number where neither a file nor a dtype says it: 16 bits, and the vae's 32.
UNSAID = {"vae": "fp32"}


@dataclass(frozen=True)
class Asked:
    """A component to forecast.   state: what its files hold, without memory; None: there are no files"""

    kind: str
    config: object
    state: dict | None = None


def under_profiles(parts, size, frames, dtype=None, own=None):
    """The memory of a run under each profile of the package, and under one's own.

    parts   {part name: Asked}
    size    (height, width) in pixels;  frames: 4n + 1
    dtype   of the weights in memory; it goes before a profile's own. None: as stored
    own     another profile: a name, a JSON file or a dictionary
    ->      {profile: {"parts": {kind: {"weights", "waiting", "working"}}, "weights", "waiting", "peak"}}

    Bytes. `weights` are where the parts compute, `waiting` in the main memory beside (on a CPU that is the
    same memory); `peak` is all weights there and the largest working memory. The dit's row has "calls", too:
    how often a branch of a step asks for it, above 1 in windows. A profile that this model cannot have is
    {"trouble": why}.
    """
    vae, made, found = parts["vae"].config, {}, {}
    asked_for = {name: profile(name) for name in profiles()}
    if own is not None:
        asked_for["yours" if isinstance(own, dict) else Path(own).stem] = profile(own)
    for name, calls in asked_for.items():
        modules = {}
        for part, asked in parts.items():
            kept = dtype or building.as_dtype(calls.get("dtype", {}).get(asked.kind))
            if (part, kept) not in made:
                made[part, kept] = without_memory(asked, kept)
            modules[part] = made[part, kept]
        if "dit_low" in modules:  # to an extension the two are one component, as in load
            modules["dit"] = Experts(modules["dit"], modules.pop("dit_low"), boundary=0.5)
        try:
            done = {kind: applied(module, calls.get(kind, ())) for kind, module in modules.items()}
        except ValueError as error:  # such as one block, of which none can stream
            found[name] = {"trouble": str(error)}
            continue
        rows = {
            kind: _row(module, kind, parts[kind].config, size, frames, vae) for kind, module in done.items()
        }
        weights, waiting = (sum(row[what] for row in rows.values()) for what in ("weights", "waiting"))
        peak = weights + max(row["working"] for row in rows.values())
        found[name] = {"parts": rows, "weights": weights, "waiting": waiting, "peak": peak}
    return found


def without_memory(asked, dtype=None):
    """A component on the meta device, each weight of the type and storage that it would be loaded with."""
    if asked.state is not None:
        return building.build(asked.kind, asked.config, asked.state, dtype, check_values=False)
    dtype = dtype or building.as_dtype(UNSAID.get(asked.kind, "bf16"))
    return configs.empty(asked.kind, asked.config).to(dtype)


def _row(module, kind, config, size, frames, vae):
    """One component's bytes.   vae: the config that says how many frames a latent frame stands for"""
    weights, waiting = module.holds() if hasattr(module, "holds") else (_nbytes(module), 0)
    piece = module.at_once(size) if hasattr(module, "at_once") else size
    width = max(x.dtype.itemsize for x in module.parameters())
    calls, tokens, beside = _in_windows(module, config, size, frames, vae) if kind == "dit" else (None, 0, 0)
    takes = working_bytes(kind, config, piece, frames, tokens, width) + beside
    if piece != size:
        # The finished video and its sum of weights lie beside the tiles.
        takes += (3 * frames * width + 4) * prod(size)
    # A stored weight is numbers while its layer computes.
    takes += max((x.numel() * x.dtype.itemsize for x in module.modules() if isinstance(x, Stored)), default=0)
    row = {"weights": weights, "waiting": waiting, "working": round(takes)}
    return row if calls is None else row | {"calls": calls}


def _in_windows(dit, config, size, frames, vae):
    """-> (how often a branch calls the dit, tokens of each call, bytes of the film beside them)"""
    stride, latents = vae.stride[0], (frames - 1) // vae.stride[0] + 1
    calls, together = dit.frames_at_once(latents) if hasattr(dit, "frames_at_once") else (1, latents)
    tokens = tokens_of(config, vae, size, stride * (together - 1) + 1)
    # The film and the sum of its windows: float32, a latent each.
    cells = tokens_of(config, vae, size, frames) * prod(config.patch_size)
    return calls, tokens, 8 * config.out_dim * cells if calls > 1 else 0


def _nbytes(module):
    return sum(x.nbytes for x in [*module.parameters(), *module.buffers()])


def table(found):
    """The same as a Table; how often a step calls the dit stands in it where that is more than once."""
    headings = ["profile", "weights", "peak where it computes", "and waiting in memory", "calls a branch"]
    rows = []
    for name, x in found.items():
        if "trouble" in x:
            rows.append([name, f"cannot be: {x['trouble']}", "", "", ""])
            continue
        sizes = map(in_words, (x["weights"], x["peak"], x["waiting"]))
        rows.append([name, *sizes, x["parts"]["dit"]["calls"]])
    if all(row[-1] in (1, "") for row in rows):
        headings, rows = headings[:-1], [row[:-1] for row in rows]
    return Table(headings, rows, "Memory under each profile, everything loaded")
