"""How does a model learn one thing more without being trained anew?  Adapters: small changes to its weights.

    pipe = pipe.replace(dit=adapted(pipe.dit, "style.safetensors", strength=0.8))

lora_families.py has the formulas, lora_files.py the spellings of files, lora_layers.py what a layer then
does. Guide: guides/lora.md
"""

import json
import math
import re
import warnings
from fnmatch import fnmatchcase
from itertools import product
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file

from ..contracts import ContractError, fact
from ..dit import DiT
from ..experts import Experts
from ..hooks import walk
from ..linear import Linear
from ..settings import Note
from ..text import TextEncoder
from ..weights import configs
from ..weights.building import WeightsError
from ..weights.quoting import listed, nearest
from .lora_families import LoRA, fresh
from .lora_files import WRITTEN, Planned, plan, read_adapter, spelt
from .lora_head import SAMPLING, checked_sampling
from .lora_layers import attach
from .promises import Extension, Report, bare, extension, layers

KINDS = {DiT: "dit", TextEncoder: "text"}


@extension
def adapted(part, *files, strength=1.0, merge=False, rank=None, alpha=None, targets=None, seed=0):
    """A component with adapters: LoRA, DoRA, LoHa, LoKr and plain differences, in any spelling.

    part      a DiT, both experts of Wan 2.2, or the UMT5 text encoder; quantized, too
    files     adapter files, folders with one, or states {key: tensor}. For experts also {"high": f, "low": g}
    strength  how much of the change: a number; for experts {"high": 1, "low": 0.5}; a list with one for each
              file; or a function of a Where (its step, sigma, branch, expert and path) to a number
    merge     add the changes into the weights, once: no cost per step, more memory, no way back. Otherwise
              they are computed beside the weights at each pass
    rank      instead of files: a fresh LoRA of that rank, which changes nothing until it is trained. Only its
              parameters ask for gradients. With it:
    alpha     its strength is alpha / rank; None: the rank
    targets   the layers it is for, one or several patterns such as "*.self_attn.q"; None: all that are in
              blocks
    seed      of its random half
    ->        the component; `report()` lists the layers, `save(path)` writes the adapter

    Raises WeightsError for a file that is no adapter, is not whole, or has no layer in common with the model;
    ValueError for what cannot be done. A Note is shown for layers that did not match and for missing alphas.
    Guide: guides/lora.md
    """
    sides = _sides(part)
    _check(files, rank, merge, strength, sides)
    if rank is None:
        wanted, rows, sampling = _from_files(files, strength, sides)
    else:
        part.requires_grad_(False)  # of our copy, see promises.py: the adapter alone is trained
        sampling = {}
        wanted, rows = _fresh(part, sides, rank, rank if alpha is None else alpha, targets, seed, strength)
    # By the names that taps have, so that a quantized or offloaded model inside has the same ones.
    modules = dict(walk(part))
    applied = [attach(modules, side + planned.layer, planned, much, merge) for side, planned, much in wanted]
    return Adapted(part, rows, applied, sampling)


class Adapted(Extension):
    """A component with adapters in its layers: see `adapted`."""

    def __init__(self, wraps, rows, applied, sampling):
        super().__init__(wraps, exact=True, rows=rows)
        # What the adapters further in were distilled for, unless one of these says otherwise.
        self.sampling = ((fact("dit", wraps, "sampling") or {}) | sampling) or None
        self.applied = applied  # those of this call, not of others further in
        self.varies = any(callable(one.strength) for one in applied)

    def prepare(self, text, image=None):
        """As DiT.prepare. Keys and values of the text change from step to step where the strength does."""
        # Keys and values are made once per prompt, before any step is known: here they have to wait for it.
        return Late(text, image) if self.varies else self.wraps.prepare(text, image)

    def forward(self, x, *inputs, **options):
        inputs = [self.wraps.prepare(*one) if isinstance(one, Late) else one for one in inputs]
        return self.wraps(x, *inputs, **options)

    def report(self):
        """A row for each layer of each file: matched or not, family, rank, alpha, strength.   -> Report"""
        # A file of another model may match in a few layers: the counts are the first thing to look at.
        matched = sum(row["status"] == "matched" for row in self.rows)
        without = sum(row["alpha"] == "none" for row in self.rows)
        counts = f"{matched} matched, {len(self.rows) - matched} unmatched, {without} without alpha. "
        return Report(self.rows, counts + self.in_words())

    def save(self, path, style="official", expert=None, sampling=None):
        """Write the LoRAs of this call to a file.

        path    ends in .safetensors
        style   "official" (ComfyUI and Wan), "diffusers" (which has no alpha: it goes into lora_B) or "kohya"
        expert  "high" or "low", where there are both: each has a file of its own
        sampling  the settings that it was distilled for, written into the head of the file, where `adapted`
                finds them: {"steps": (1.0, 0.9375, 0.8333, 0.625), "solver": "euler", "scale": 1.0}

        Raises ValueError for another style, WeightsError for adapters that are no LoRA.
        """
        if style not in WRITTEN:
            raise ValueError(f"style={style!r}; expected {', '.join(WRITTEN)}{nearest(style, WRITTEN)}")
        path, sides = Path(path), _sides(self.wraps)
        if path.suffix != ".safetensors":
            raise ValueError(f"{path.name} does not end in .safetensors, by which others know such a file")
        side = f"{expert}." if expert else ""
        if side not in sides:
            raise ValueError(
                f"expert={expert!r}; expected {' or '.join(repr(s[:-1] or None) for s in sides)}"
            )
        ours = [one for one in self.applied if one.where.path.startswith(side)]
        mine = {one.where.path.removeprefix(side): one for one in ours}
        if len(mine) < len(ours):
            raise WeightsError(
                f"{len(ours)} changes at {len(mine)} layers: these are several adapters, and a file holds "
                "one. Write those of one adapted(...) call with one file, or rank="
            )
        # A LoRA file holds down and up alone: lengths (DoRA) and biases would be lost on the way.
        other = [
            name
            for name, one in mine.items()
            if type(one.change) is not LoRA or one.gain is not None or one.bias is not None
        ]
        if other or not mine:
            here = f"others are at {listed(other, 3)}" if mine else "there is none"
            raise WeightsError(f"only LoRAs can be written; {here}")
        changes = {name: one.change for name, one in mine.items()}
        head = {SAMPLING: json.dumps(checked_sampling(sampling))} if sampling else None
        save_file(spelt(KINDS[type(sides[side])], sides[side].config, changes, style), path, head)


class Late(NamedTuple):
    """A prompt whose keys and values are made at each pass, since the strengths may then be others."""

    text: Any
    image: Any = None


# ---- what was asked for ---------------------------------------------------------------------------------


def _sides(part):
    """{what stands before its layers: the bare component}: "" of one, "high." and "low." of two experts."""
    whole = bare(part)
    sides = (
        {"high.": bare(whole.high), "low.": bare(whole.low)} if isinstance(whole, Experts) else {"": whole}
    )
    for one in sides.values():
        if type(one) not in KINDS:
            raise ContractError(
                f"adapted takes our DiT, Experts or TextEncoder; {type(one).__name__} arrived"
            )
    return sides


def _check(files, rank, merge, strength, sides):
    """Raise ValueError for calls that say too much, too little, or contradict themselves."""
    if (rank is None) == (not files):
        raise ValueError("adapted takes adapter files, or rank= for a fresh adapter: one of the two")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"rank={rank!r}; expected a whole number from 1, such as 8")
    given = strength if isinstance(strength, list | tuple) else [strength]
    if len(given) not in (1, len(files)) or not given:
        raise ValueError(f"{len(given)} strengths for {len(files)} files; give one, or one for each")
    for one in given:
        _check_sides(one, sides, "strength")
        for value in one.values() if isinstance(one, dict) else [one]:
            if not callable(value) and not (isinstance(value, Real) and math.isfinite(value)):
                raise ValueError(f"strength={value!r}; expected a finite number, or a function of a Where")
            if callable(value) and merge:
                raise ValueError("merge=True adds the change once, so its strength must be a number")
    for file in files:
        if isinstance(file, dict) and file and set(file) <= {"high", "low"}:
            _check_sides(file, sides, "files")
        elif not isinstance(file, str | Path | dict):
            raise TypeError(f"an adapter is a path or a state; {type(file).__name__} arrived")


def _check_sides(value, sides, what):
    known = {side[:-1] for side in sides if side}
    if isinstance(value, dict) and not (value and set(value) <= known):
        has = f"the experts {' and '.join(sorted(known))}" if known else "no experts"
        raise ValueError(
            f"{what} for {', '.join(map(repr, value)) or 'nothing'}, but this component has {has}"
        )


def _from_files(given, strength, sides):
    """[(side, Planned, strength)] of what the files hold, the rows of the report, and the settings that they
    were distilled for."""
    wanted, rows, sampling = [], [], {}
    for (file, much), (side, one) in product(zip(given, _each(strength, len(given))), sides.items()):
        file, much = _of(side, file, absent=None), _of(side, much, absent=1.0)
        if file is None:
            continue
        kind = KINDS[type(one)]
        shapes = {name: x.shape for name, x in configs.empty(kind, one.config).state_dict().items()}
        adapter = read_adapter(file, kind, one.config, expert=side[:-1])
        planned = plan(adapter, shapes)
        wanted += [(side, change, much) for change in planned]
        rows += [_row(side, change, much, adapter.name, adapter.keys[change.layer]) for change in planned]
        rows += [_absent(adapter.name, key, why) for key, why in adapter.unmatched.items()]
        sampling |= adapter.sampling
        _note(adapter, planned)
    return wanted, rows, sampling


def _each(strength, count):
    """One strength for each of so many files; one that was given counts for all of them."""
    given = list(strength) if isinstance(strength, list | tuple) else [strength]
    return given * count if len(given) == 1 else given


def _of(side, value, absent):
    """What was given for one side: the value itself, or its entry for that expert, or else `absent`."""
    # A state {key: tensor} is a dict, too: only one with these two words is about experts.
    split = isinstance(value, dict) and value and set(value) <= {"high", "low"}
    return value.get(side[:-1], absent) if split else value


def _note(adapter, planned):
    """Say what a reader should know of a file, once."""
    # What is all zeros does nothing anywhere: distilled files bring such layers for parts of other models.
    lost = [key for key, why in adapter.unmatched.items() if why != "all zeros"]
    plain = [
        one for one in planned if one.change is not None and one.change.rank and one.change.alpha is None
    ]
    said = []
    if lost:
        said.append(f"{len(lost)} layers of the file are not in this component, such as {listed(lost, 2)}")
    if plain and not adapter.folded:
        said.append(
            f"{len(plain)} of {len(planned)} layers have no alpha, which is then taken for the rank: if it "
            "was trained with another, its strength is wrong by that factor"
        )
    if said:
        warnings.warn(f"{adapter.name}: {'; '.join(said)}", Note, stacklevel=5)


HEADINGS = "layer", "status", "family", "rank", "alpha", "strength", "file", "key"


def _row(side, planned, strength, file="fresh", key=""):
    """A line of the report for a layer that was found."""
    change = planned.change
    family = "bias" if change is None else change.family
    ranked = change is not None and change.rank is not None
    alpha = (change.alpha if change.alpha is not None else "none") if ranked else ""
    cells = (
        side + planned.layer,
        "matched",
        family if planned.magnitude is None else f"DoRA on {family}",
        change.rank if ranked else "",
        alpha,
        "by step" if callable(strength) else strength,
        file,
        key,
    )
    return dict(zip(HEADINGS, cells))


def _absent(file, key, why):
    """A line for one that was not."""
    return dict.fromkeys(HEADINGS, "") | {"status": f"unmatched: {why}", "file": file, "key": key}


# A DiT's blocks and VACE's, and what UMT5 calls layers.
IN_BLOCKS = re.compile(r"(^|\.)(blocks|vace_blocks|layers)\.\d+\.")


def _fresh(part, sides, rank, alpha, targets, seed, strength):
    """[(side, Planned, strength)] of a new LoRA at each target, and the rows of the report."""
    if isinstance(alpha, bool) or not isinstance(alpha, Real) or not math.isfinite(alpha) or alpha <= 0:
        raise ValueError(f"alpha={alpha!r}; expected a number above 0, such as the rank")
    generator, wanted = torch.Generator().manual_seed(seed), []
    (much,) = _each(strength, 1)
    for side in sides:
        # What is in blocks: the layers around them, and those of time, are few and touch everything.
        every = {
            path.removeprefix(side): layer
            for path, layer in layers(part, Linear).items()
            if path.startswith(side) and IN_BLOCKS.search(path)
        }
        for name in _chosen(list(every), targets):
            change = fresh(tuple(every[name].weight.shape), rank, alpha, generator)
            wanted.append((side, Planned(name, change), _of(side, much, absent=1.0)))
    return wanted, [_row(*one) for one in wanted]


def _chosen(names, targets):
    """Those of the names that a pattern, or one of several, fits."""
    if targets is None:
        return names
    patterns = [targets] if isinstance(targets, str) else list(targets)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"no layer matches {pattern!r}{nearest(pattern, names)}; there are {listed(names, 3)}"
            )
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
