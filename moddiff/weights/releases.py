"""What is in this folder?  The released models as presets, and the layout of official and Diffusers folders.

A preset is one JSON file in `presets/`: a config per component ("dit", "text", "vae", some also "image"), the
sampling defaults, the default negative prompt, and `hub`, where the weights can be fetched. The tiny models'
presets say where theirs are inside this package, and which parts reach values that float16 cannot hold:

    "weights": {"folder": "tiny/weights", "dit": "t2v.safetensors", "tokenizer": "tokenizer.json", ...},
    "peaks": {"vae": 2e6}

An adapter that belongs to one stands there, too: "adapters": {"dit": "fast.safetensors"}.

Nothing is loaded here: `open_release` describes, `Release.load` builds one component.
"""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from . import building, configs, files
from .files import CheckpointError, read_json
from .quoting import listed, nearest, quoted

PACKAGE = Path(__file__).parents[1]
PRESETS = Path(__file__).parent / "presets"

# The files of the official folders, beside the transformer's: the first pattern that fits is taken, the last
# is the released name.
OFFICIAL = {
    "text": ("models_t5*.safetensors", "models_t5*.pth", "models_t5_umt5-xxl-enc-bf16.pth"),
    "image": (
        "models_clip*.safetensors",
        "models_clip*.pth",
        "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
    ),
    "vae": ("Wan{}_VAE.safetensors", "Wan{}_VAE.pth"),
}
TRANSFORMER = (
    "diffusion_pytorch_model*.index*.json",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model*.safetensors",
)
EXPERTS = {"dit": "high_noise_model", "dit_low": "low_noise_model"}
# Which autoencoder a transformer was trained with, by its latent channels; the others 2.1.
VAE_OF = {48: "2.2"}
# A preset with the CLIP tower that all models share which have one.
CLIP_OF = "wan2.1-i2v-14b-480p"
# Part -> subfolder of a Diffusers folder. Their `transformer` is the expert for high noise.
SUBFOLDERS = {
    "dit": "transformer",
    "dit_low": "transformer_2",
    "text": "text_encoder",
    "image": "image_encoder",
    "vae": "vae",
}


@dataclass(frozen=True)
class Part:
    """One component of a release: its kind, its config (None where unknown), and where its weights are.

    `problem` says why it cannot be loaded; empty where it can.
    """

    kind: str
    config: object
    where: Path | None = None
    problem: str = ""


@dataclass(frozen=True)
class Release:
    """A model as found on disk or as a preset describes it.

    parts      {"dit", "text", "vae", and where the model has them "image" (CLIP) and "dit_low": Part}. With
               two experts, "dit" is the one for high noise and "dit_low" the one for low noise
    tokenizer  path of the tokenizer.json or its folder, None where there is none
    sampling   solver, steps, shift, scale, frames, fps, size (height, width), sizes; with two experts
               `boundary`, and scale is the pair (low noise, high noise)
    negative   the default negative prompt
    notes      what a reader should know: what was assumed, where files and preset disagree
    dtype      what to compute in where the caller does not say; None: as stored (the tiny models are stored
               in 16 bits and run in 32)
    peaks      {part: the largest value its layers reach}, where that is beyond some dtype
    hub        where it can be fetched; None for the tiny models and those that are nobody's release
    adapters   {part: file}, adapters that belong to it
    """

    name: str
    about: str
    task: str
    layout: str
    folder: Path | None
    parts: dict
    tokenizer: Path | None
    sampling: dict
    negative: str
    notes: tuple = ()
    dtype: str | None = None
    peaks: dict = field(default_factory=dict)
    hub: str | None = None
    adapters: dict = field(default_factory=dict)

    @property
    def missing(self):
        """What keeps this release from being loaded, in words; empty when nothing does."""
        troubles = [f"{name}: {part.problem}" for name, part in self.parts.items() if part.problem]
        if self.folder is not None and self.tokenizer is None:
            troubles.append(
                f"tokenizer: no tokenizer.json under {self.folder}; expected google/umt5-xxl/tokenizer.json "
                "or tokenizer/tokenizer.json"
            )
        return troubles

    @property
    def how_to_get(self):
        """What to type for weights that are not here."""
        folder = self.hub.split("/")[1]
        return f"hf download {self.hub} --local-dir {folder}, then moddiff.load({folder!r})"

    def load(self, name, dtype=None, check_values=True):
        """Build one part, its weights mapped from the files.   -> the module

        Raises KeyError for a part the release does not have, ValueError for a dtype too narrow for it,
        CheckpointError and WeightsError as `load_component`.
        """
        if name not in self.parts:
            raise KeyError(f"{self.name} has no part {name!r}; it has {', '.join(self.parts)}")
        part = self.parts[name]
        if part.where is None or part.problem:
            why = part.problem or f"a preset holds no weights. Fetch them: {self.how_to_get}"
            raise CheckpointError(f"the {name} of {self.name} cannot be loaded: {why}")
        narrow = building.as_dtype(dtype)
        if narrow is not None and torch.finfo(narrow).max < self.peaks.get(name, 0):
            raise ValueError(
                f"the {name} of {self.name} reaches values of {self.peaks[name]:.0e} and {narrow} ends at "
                f"{torch.finfo(narrow).max:.0e}, so it would give NaN; take bf16 or fp32 for the {name}"
            )
        module = building.load_component(part.where, part.kind, part.config, dtype, check_values)
        if part.kind == "text" and self.tokenizer is not None:
            module.tokenizer = self.tokenizer
        return module


def presets():
    """The names of all presets."""
    return sorted(path.stem for path in PRESETS.glob("*.json"))


def preset(name):
    """A preset as a dict.   Raises ValueError for an unknown name."""
    if name not in presets():
        raise ValueError(
            f"there is no preset {quoted(name)!r}{nearest(name, presets())}. There are: "
            f"{', '.join(presets())}"
        )
    return json.loads((PRESETS / f"{name}.json").read_text(encoding="utf-8"))


def open_release(where):
    """Find out what a folder, or a name, holds.

    where   a folder as Wan-AI releases it, the same in Diffusers form, the name of a preset, or its id on the
            hub ("Wan-AI/Wan2.1-T2V-1.3B"), which is described as the preset
    ->      Release

    Raises ValueError when it is none of these, CheckpointError for a folder whose model_index.json cannot be
    read; a part whose files are absent or damaged is described in `Release.missing`.
    """
    name, folder = str(where), Path(where).expanduser()
    if name in presets():
        return _from_preset(preset(name))
    if not folder.is_dir():
        if folder.is_file():
            raise ValueError(
                f"{folder} is one file, and a pipeline needs several parts. Give it to load beside the name "
                "or folder of a release: moddiff.load('wan2.1-t2v-1.3b', dit=FILE, text=FILE, vae=FILE)"
            )
        # The hub may have a release in two forms; the Diffusers one is fetched under its own name.
        for entry in map(preset, presets()):
            if name.lower().removesuffix("-diffusers") == entry.get("hub", "").lower():
                return _from_preset(entry | {"hub": name})
        raise ValueError(
            f"{quoted(name)!r} is neither a folder nor a preset{nearest(name, presets())}. Presets: "
            f"{', '.join(presets())}. For downloaded weights give the folder, such as /models/Wan2.1-T2V-1.3B"
        )
    held = files.list_folder(folder)
    if "model_index.json" in held:
        return _from_diffusers(folder)
    patterns = [pattern.format("*") for several in OFFICIAL.values() for pattern in several]
    if {"config.json", *EXPERTS.values()} & set(held) or _first(folder, patterns, required=False):
        return _from_official(folder)
    if {"diffusion_models", "unet"} & set(held):
        raise ValueError(
            f"{folder} is laid out as ComfyUI's models: single files of many models. Name those you mean: "
            "moddiff.load('wan2.1-t2v-1.3b', dit='diffusion_models/...', text='text_encoders/...', "
            "vae='vae/...'); `moddiff inspect FILE` says what one is"
        )
    raise ValueError(
        f"{folder} is not a Wan release: it holds {listed(held, 8) or 'nothing'}. Expected an official "
        "folder (config.json, or high_noise_model and low_noise_model, beside models_t5_*.pth and "
        "Wan2.?_VAE.pth) or a Diffusers one (model_index.json)"
    )


def _from_preset(entry):
    stored = entry.get("weights", {})
    folder = PACKAGE / stored["folder"] if stored else None
    parts = {}
    for name in SUBFOLDERS:
        kind = name.removesuffix("_low")
        if kind not in entry or (name == "dit_low" and "boundary" not in entry["sampling"]):
            continue
        where = folder / stored[name] if name in stored else None
        problem = ""
        if where is not None and not where.is_file():
            problem = f"{where.name} is not in {folder}; is the package whole? install it again"
        parts[name] = Part(kind, configs.read(kind, entry[kind]), where, problem)
    adapters = {name: folder / file for name, file in stored.get("adapters", {}).items()}
    for name, where in adapters.items():
        if not where.is_file():
            problem = f"its adapter {where.name} is not in {folder}; is the package whole? install it again"
            parts[name] = replace(parts[name], problem=problem)
    tokenizer = folder / stored["tokenizer"] if "tokenizer" in stored else None
    return replace(_release(entry, "preset", folder, parts, tokenizer), adapters=adapters)


def _from_official(folder):
    """config.json beside the dit's weights, once or for each expert; the other parts have none."""
    experts = {name: folder / sub for name, sub in EXPERTS.items()}
    # One of the two is enough to tell: the other one is then missing, and said to be.
    if not any(path.is_dir() for path in experts.values()):
        experts = {"dit": folder}
    parts = {
        name: _part("dit", _first(path, TRANSFORMER), path / "config.json") for name, path in experts.items()
    }
    dit = parts["dit"].config
    entry, notes = _closest(dit, len(experts), folder.name)
    version = VAE_OF.get(entry["dit"]["out_dim"], "2.1")
    sees_picture = dit is not None and dit.image_dim is not None
    for name in ("text", "vae", "image") if sees_picture else ("text", "vae"):
        # The config is a preset's: an official folder has none for text, image and vae.
        where = _first(folder, [pattern.format(version) for pattern in OFFICIAL[name]])
        parts[name] = _part(name, where, entry.get(name) or preset(CLIP_OF)[name])
    tokenizer = _first(folder, ("google/umt5-xxl/tokenizer.json", "*/*/tokenizer.json"), required=False)
    return _release(entry, "official", folder, parts, tokenizer, notes)


def _from_diffusers(folder):
    """A subfolder for each part, named in model_index.json, each with its config.json."""
    path = folder / "model_index.json"
    index, parts = read_json(path), {}
    for name, sub in SUBFOLDERS.items():
        # An entry is [library, class]; [null, null] where the pipeline has no such part.
        library = index[sub][:1] if isinstance(index.get(sub), list) else []
        if library not in ([], [None]):
            parts[name] = _part(name.removesuffix("_low"), folder / sub, folder / sub / "config.json")
    lacking = [SUBFOLDERS[name] for name in ("dit", "text", "vae") if name not in parts]
    if lacking:
        raise ValueError(
            f"{path} names no {', '.join(lacking)}; is it a Wan pipeline? its class is "
            f"{quoted(index.get('_class_name'))}"
        )
    entry, notes = _closest(parts["dit"].config, 1 + ("dit_low" in parts), folder.name)
    sampling, boundary = entry["sampling"], index.get("boundary_ratio")
    if boundary is not None and "dit_low" in parts:
        if not isinstance(boundary, int | float) or not 0 < boundary < 1:
            raise ValueError(
                f"{path} says boundary_ratio = {quoted(boundary)}; expected a number between 0 and 1"
            )
        entry |= {"sampling": sampling | {"boundary": boundary}}
    scheduler = folder / "scheduler" / "scheduler_config.json"
    shift = read_json(scheduler).get("flow_shift") if scheduler.is_file() else None
    if shift not in (None, sampling["shift"]):
        # Diffusers' converter writes shifts of its own choice; ours are those of Wan's scripts.
        notes.append(
            f"the scheduler config says shift {quoted(shift)}; the official default {sampling['shift']} is "
            f"used, pass shift={quoted(shift)} for theirs"
        )
    tokenizer = _first(folder, ("tokenizer/tokenizer.json",), required=False)
    return _release(entry, "diffusers", folder, parts, tokenizer, notes)


def _release(entry, layout, folder, parts, tokenizer, notes=()):
    """A Release of these parts; all else is as a preset says, the size and a pair of scales as tuples."""
    sampling = entry["sampling"]
    pairs = {name: tuple(sampling[name]) for name in ("size", "scale") if isinstance(sampling[name], list)}
    return Release(
        entry["name"],
        entry["about"],
        entry["task"],
        layout,
        folder,
        parts,
        tokenizer,
        sampling | pairs,
        entry["negative"],
        tuple(notes),
        entry.get("dtype"),
        entry.get("peaks", {}),
        entry.get("hub"),
    )


def _part(kind, where, config):
    """A Part, its config read with the help of the names in its files; troubles are kept as words.

    config  a dict, or the path of a config.json
    """
    try:
        stored, problem = files.describe(where), ""
    except CheckpointError as error:
        stored, problem = {}, str(error)
    try:
        raw = config if isinstance(config, dict) else files.config_beside(config.parent)
        return Part(kind, configs.read(kind, raw, stored), where, problem)
    except ValueError as error:
        # A CheckpointError names the file already.
        named = "" if isinstance(config, dict) or isinstance(error, CheckpointError) else f"{config}: "
        return Part(kind, None, where, f"{named}{error}")


def _first(folder, patterns, required=True):
    """The first file that fits; where none does, the path it should have, so that the error can name it."""
    fitting = [path for pattern in patterns for path in sorted(folder.glob(pattern))]
    if fitting:
        return fitting[0]
    return folder / patterns[-1] if required else None


def _closest(dit, experts, name):
    """The preset whose defaults a folder takes; under the folder's name, with a note, if it is another model.

    The one with this DiT; else, of those with as many experts and the same task, the one nearest in width. A
    folder without a config is known by its name at most.   -> (entry, notes)
    """
    known = [
        entry
        for entry in map(preset, presets())
        # Not the tiny models, which have no hub: their defaults fit no other model.
        if "hub" in entry and ("boundary" in entry["sampling"]) == (experts == 2)
    ]
    same = [entry for entry in known if dit == configs.read("dit", entry["dit"])]
    if same:
        # The 480p and 720p models differ in nothing but their training; the folder's name tells.
        named = [entry for entry in same if entry["hub"].rsplit("-", 1)[1].lower() in name.lower()]
        return (named or same)[-1], []
    if dit is None:
        named = [entry for entry in known if entry["hub"].split("/")[1].lower() in name.lower()]
        like = (named or known)[0]
    else:
        task, channels = dit.model_type, dit.out_dim
        alike = [e for e in known if (e["dit"]["model_type"], e["dit"]["out_dim"]) == (task, channels)]
        like = min(alike or known, key=lambda entry: abs(entry["dit"]["dim"] - dit.dim))
    note = f"not one of the released models; sampling defaults are those of {like['name']}"
    return like | {"name": name, "about": f"a model like {like['name']}", "hub": None}, [note]
