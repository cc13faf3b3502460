"""What is this one file, and which model does it go with?  A part by its content, a release made of such.

ComfyUI, and whoever quantizes a model, hands out single files: a transformer, a text encoder, a vae, without
a config beside them. Their sizes are in their shapes (sizes.py), their tokenizer is inside (pieces.py), and
what a pipeline needs beyond that, a release says.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from . import configs, files
from .files import CheckpointError
from .names import KINDS
from .pieces import tokenizer_of
from .quoting import listed
from .releases import Part, preset, presets
from .sizes import kind_of, sizes

ENDINGS = (".safetensors", ".gguf", ".pth", ".pt", ".bin", ".json")
# How the names of each component begin in a file that ComfyUI saves a whole model to.
ALL_IN_ONE = {
    "dit": "model.diffusion_model.",
    "text": "text_encoders.",
    "vae": ("first_stage_model.", "vae."),
}
EXPERTS = {"high": "dit", "low": "dit_low"}


def part_of(where, like=(), config=None, kind=None):
    """What a file, an index or a folder of shards holds, by its content.   -> Part

    like    configs of the model that it belongs to, where that is known: see `sizes`
    config  a dict, or the path of a config.json, for what no shape tells; None: the shapes alone
    kind    which component of a file that holds several

    Raises CheckpointError for what cannot be read, WeightsError and ValueError for what is no part of Wan.
    """
    where = Path(where).expanduser()
    stored = files.describe(where)
    held = [each for each, begin in ALL_IN_ONE.items() if any(name.startswith(begin) for name in stored)]
    # Names tell only where a file holds several components, as ComfyUI's checkpoints do; else shapes do.
    if kind not in held or len(held) == 1:
        kind = kind_of(stored)
    if config is None:
        _, config = sizes(stored, like, kind)
    else:
        config = configs.read(kind, config if isinstance(config, dict) else files.read_json(config), stored)
    return Part(kind, config, where)


def goes_with(part):
    """The releases that have a part of these very sizes; the nearest one where none has.

    -> (names, are they equal)
    """
    entries = [entry for entry in map(preset, presets()) if "hub" in entry and part.kind in entry]
    known = {entry["name"]: configs.read(part.kind, entry[part.kind]) for entry in entries}
    same = [name for name, config in known.items() if config == part.config]
    if same:
        return same, True
    # No release is equal: the nearest one of the same task, since a task has its own inputs.
    alike = known
    if part.kind == "dit":
        task = part.config.model_type
        alike = {name: config for name, config in known.items() if config.model_type == task} or known
    return [min(alike, key=lambda name: abs(alike[name].dim - part.config.dim))], False


def is_file(given):
    """Does an argument of load name a file of weights, and not a component or one of a plugin?"""
    if isinstance(given, Mapping):
        return bool(given) and set(given) <= set(EXPERTS) and all(map(is_file, given.values()))
    if isinstance(given, str):
        # A path with a slip in it is still meant as one, and its error names the file, not a plugin.
        return given.endswith(ENDINGS) or Path(given).expanduser().exists()
    return isinstance(given, Path)


def with_files(release, given, tokenizer=None):
    """A release some of whose parts are other files.

    given      {"dit", "text", "image" or "vae": path; for two experts {"high": path, "low": path}}
    tokenizer  a Tokenizer, or the path of one; None: the one in the text encoder's file, or beside it

    Raises CheckpointError for a text encoder without a tokenizer, ValueError for a part of another kind, or
    of a model for another task.
    """
    parts = dict(release.parts)
    like = [part.config for part in release.parts.values()]
    for kind, where in given.items():
        for name, path in _named(release, kind, where).items():
            parts[name] = _checked(release, kind, part_of(path, like, kind=kind))
    if "text" in given:
        tokenizer = tokenizer or _tokenizer(parts["text"], release)
    # How far activations reach was measured with the release's own weights, and holds for no others.
    peaks = {name: peak for name, peak in release.peaks.items() if name not in given}
    return replace(release, parts=parts, tokenizer=tokenizer or release.tokenizer, peaks=peaks)


def lacking(release, without=()):
    """The parts of a release whose weights are nowhere, of those that are needed."""
    return [
        name
        for name, part in release.parts.items()
        if part.where is None and name.removesuffix("_low") not in without
    ]


def how_to_use(where):
    """What a single file is, and the call that makes a pipeline with it, in words."""
    part = part_of(where)
    names, equal = goes_with(part)
    release = preset(names[0])
    others = [kind for kind in KINDS if kind in release and kind != part.kind]
    two = part.kind == "dit" and "boundary" in release["sampling"]
    mine = f"{{'high': '{where}', 'low': ...}}" if two else f"'{where}'"
    rest = "".join(f", {kind}=FILE" for kind in others)
    fits = f"as in {listed(names)}" if equal else f"nearest to {names[0]}"
    return f"a {part.kind} ({fits}): moddiff.load({names[0]!r}, {part.kind}={mine}{rest})"


def _named(release, kind, where):
    """{name of the part: path}. A release of two experts needs both."""
    two = kind == "dit" and "dit_low" in release.parts
    if two != isinstance(where, Mapping) or (two and len(where) < 2):
        raise ValueError(
            f"{release.name} has {'two dits' if two else f'one {kind}'}; expected "
            + (f"{kind}={{'high': FILE, 'low': FILE}}, by noise" if two else f"{kind}=FILE")
        )
    return {EXPERTS[noise]: path for noise, path in where.items()} if two else {kind: where}


def _checked(release, kind, part):
    """The part, if it is what it was given as, and of a model for the same task."""
    if part.kind != kind:
        raise ValueError(f"{part.where} is a {part.kind}, and was given as {kind}=; give it as {part.kind}=")
    if kind == "dit":
        wanted, found = release.parts["dit"].config.model_type, part.config.model_type
        if found != wanted:
            raise ValueError(
                f"{part.where} is for {found}, and {release.name} is a model for {wanted}; load it as one of "
                f"{listed(goes_with(part)[0])}"
            )
    return part


def _tokenizer(part, release):
    """The one in a text encoder's file, or beside it."""
    inside = tokenizer_of(part.where, part.config.text_len)
    if inside is not None:
        return inside
    folder = part.where if part.where.is_dir() else part.where.parent
    for name in ("tokenizer.json", "google/umt5-xxl/tokenizer.json", "tokenizer/tokenizer.json"):
        if (folder / name).is_file():
            return folder / name
    if release.tokenizer is not None:
        return release.tokenizer
    raise CheckpointError(
        f"{part.where} holds no tokenizer, and there is no tokenizer.json beside it; give the folder of "
        "google/umt5-xxl: tokenizer=FOLDER"
    )
