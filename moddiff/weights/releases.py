"""What is in this folder?  The released models as presets, and the layout of official and Diffusers folders.

A preset is one JSON file in `presets/`: a config per component ("dit", "text", "vae", some also "image"), the sampling defaults,
the default negative prompt. A preset may also say where its weights are, inside this package:

    "weights": {"folder": "tiny/weights", "dit": "t2v.safetensors", "text": "text.safetensors", "vae": "vae.safetensors",
                "tokenizer": "tokenizer.json"}

Nothing is loaded here: `open_release` describes, `Release.load` builds one component.
"""

import json
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

from . import building as weights
from . import configs
from . import files as checkpoints
from .files import CheckpointError

PACKAGE = Path(__file__).parents[1]
PRESETS = Path(__file__).parent / "presets"

# The files of the official folders, beside the transformer's: the first pattern that fits is taken, the last is the released name.
OFFICIAL = {
    "text": ("models_t5*.safetensors", "models_t5*.pth", "models_t5_umt5-xxl-enc-bf16.pth"),
    "image": (
        "models_clip*.safetensors",
        "models_clip*.pth",
        "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
    ),
    "vae": ("Wan{}_VAE.safetensors", "Wan{}_VAE.pth"),
}
VAE_OF = {
    48: "2.2"
}  # which autoencoder a transformer was trained with, by its latent channels; the others 2.1
# Part -> subfolder of a Diffusers folder. Their `transformer` is the expert for high noise.
DIFFUSERS = {
    "dit": "transformer",
    "dit_low": "transformer_2",
    "text": "text_encoder",
    "image": "image_encoder",
    "vae": "vae",
}


@dataclass(frozen=True)
class Part:
    """One component of a release: its kind, its config, and where its weights are. `problem` says why they cannot be loaded, if so."""

    kind: str
    config: object
    where: Path | None = None
    problem: str = ""


@dataclass(frozen=True)
class Release:
    """A model as found on disk or as a preset describes it.

    parts      {"dit", "text", "vae", and where the model has them "image" (CLIP) and "dit_low": Part}. With two experts, "dit" is
               the one for high noise and "dit_low" the one for low noise
    tokenizer  path of the tokenizer.json or its folder, None where there is none
    sampling   solver, steps, shift, scale, frames, fps, size (height, width), sizes; with two experts `boundary`, and scale is the
               pair (low noise, high noise)
    negative   the default negative prompt
    notes      what a reader should know: what was assumed, where files and preset disagree
    dtype      what to compute in where the caller does not say; None: as stored (the tiny models are stored in 16 bits and run in 32)
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
    notes: tuple = field(default=())
    dtype: str | None = None

    @property
    def missing(self):
        """What keeps this release from being loaded, in words; empty when nothing does."""
        found = [f"{name}: {part.problem}" for name, part in self.parts.items() if part.problem]
        if self.folder is not None and self.tokenizer is None:
            found.append(
                f"tokenizer: no tokenizer.json under {self.folder}; expected google/umt5-xxl/tokenizer.json or "
                "tokenizer/tokenizer.json"
            )
        return found

    def shift(self, size=None):
        """The default shift for a video of this size, (height, width)."""
        special = {tuple(s): value for s, value in self.sampling.get("shifts", ())}
        return special.get(tuple(size or self.sampling["size"]), self.sampling["shift"])

    def load(self, name, dtype=None, check_values=True):
        """Build one part, its weights mapped from the files.   -> the module

        Raises KeyError for a part the release does not have, CheckpointError and WeightsError as `weights.load_component`.
        """
        if name not in self.parts:
            raise KeyError(f"{self.name} has no part {name!r}; it has {', '.join(self.parts)}")
        part = self.parts[name]
        if part.where is None or part.problem:
            raise CheckpointError(
                f"the {name} of {self.name} cannot be loaded: "
                + (
                    part.problem
                    or "a preset describes it but holds no weights. Give the folder you downloaded it to"
                )
            )
        module = weights.load_component(part.where, part.kind, part.config, dtype, check_values)
        if part.kind == "text" and self.tokenizer is not None:
            module.tokenizer = self.tokenizer
        return module


def presets():
    """The names of all presets."""
    return sorted(path.stem for path in PRESETS.glob("*.json"))


def profiles():
    """The names of all profiles (dtype and offload settings)."""
    return sorted(path.stem for path in (PRESETS / "profiles").glob("*.json"))


def preset(name):
    """A preset as a dict.   Raises ValueError for an unknown name."""
    return _read_named(PRESETS, name, "preset", presets())


def profile(name):
    """A profile as a dict: dtype per kind, offload ("none" or "component"), vae_chunked, sampling overrides."""
    return _read_named(PRESETS / "profiles", name, "profile", profiles())


def open_release(where, overrides=None):
    """Find out what a folder, or a preset's name, holds.

    where      a folder as Wan-AI releases it, the same in Diffusers form, or the name of a preset
    overrides  {part name: config dict} for parts that differ from the released ones, such as a fine-tuned text encoder
    ->         Release

    Raises ValueError when it is neither; a part whose files are absent or damaged is described in `Release.missing`.
    """
    overrides = overrides or {}
    folder = Path(where)
    if str(where) in presets():
        return _from_preset(preset(str(where)))
    if not folder.is_dir():
        near = get_close_matches(str(where), presets(), 1)
        raise ValueError(
            f"{str(where)!r} is neither a folder nor a preset"
            + (f" (did you mean {near[0]!r}?)" if near else "")
            + f". Presets: {', '.join(presets())}. For downloaded weights give the folder, such as /models/Wan2.1-T2V-1.3B"
        )
    if (folder / "model_index.json").is_file():
        return _from_diffusers(folder, overrides)
    if (folder / "config.json").is_file() or any(
        (folder / f"{level}_noise_model").is_dir() for level in ("high", "low")
    ):
        return _from_official(folder, overrides)
    held = sorted(path.name for path in folder.iterdir())[:8]
    raise ValueError(
        f"{folder} is not a Wan release: it holds {', '.join(held) or 'nothing'}. Expected an official folder (config.json, or "
        "high_noise_model and low_noise_model, beside models_t5_*.pth and Wan2.?_VAE.pth) or a Diffusers one (model_index.json)"
    )


def _read_named(folder, name, what, known):
    if name not in known:
        near = get_close_matches(str(name), known, 1)
        raise ValueError(
            f"there is no {what} {name!r}"
            + (f"; did you mean {near[0]!r}?" if near else ".")
            + f" There are: {', '.join(known)}"
        )
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def _from_preset(found):
    stored = found.get("weights", {})
    folder = PACKAGE / stored["folder"] if stored else None
    parts = {}
    for name in ("dit", "dit_low", "text", "image", "vae"):
        kind = name.removesuffix("_low")
        if kind in found and (name != "dit_low" or "boundary" in found["sampling"]):
            where = folder / stored[name] if name in stored else None
            problem = (
                ""
                if where is None or where.is_file()
                else f"{where.name} is not in {folder}; is the package whole? install it again"
            )
            parts[name] = Part(kind, configs.read(kind, found[kind]), where, problem)
    tokenizer = folder / stored["tokenizer"] if "tokenizer" in stored else None
    return Release(
        found["name"],
        found["about"],
        found["task"],
        "preset",
        folder,
        parts,
        tokenizer,
        _sampling(found),
        found["negative"],
        dtype=found.get("dtype"),
    )


def _from_official(folder, overrides):
    experts = {
        name: folder / sub for name, sub in (("dit", "high_noise_model"), ("dit_low", "low_noise_model"))
    }
    if not any(path.is_dir() for path in experts.values()):
        experts = {"dit": folder}
    parts, needs = {}, ["text", "vae"]
    for name, path in experts.items():
        parts[name] = _part("dit", _transformer(path), overrides.get(name) or path / "config.json")
    dit = parts["dit"].config
    found = _closest(dit, len(experts), folder.name)
    needs += ["image"] if dit is not None and dit.image_dim is not None else []
    for name in needs:
        patterns = [pattern.format(VAE_OF.get(found["dit"]["out_dim"], "2.1")) for pattern in OFFICIAL[name]]
        parts[name] = _part(name, _first(folder, patterns), overrides.get(name) or found[name])
    tokenizer = _first(folder, ("google/umt5-xxl/tokenizer.json", "*/*/tokenizer.json"), required=False)
    return _describe(folder, "official", parts, tokenizer, found, ())


def _from_diffusers(folder, overrides):
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    parts = {}
    for name, sub in DIFFUSERS.items():
        if isinstance(index.get(sub), list) and index[sub][0] is not None:
            parts[name] = _part(
                name.removesuffix("_low"), folder / sub, overrides.get(name) or folder / sub / "config.json"
            )
    lacking = [name for name in ("dit", "text", "vae") if name not in parts]
    if lacking:
        raise ValueError(
            f"{folder}/model_index.json names no {', '.join(DIFFUSERS[name] for name in lacking)}; is it a Wan pipeline? "
            f"its class is {index.get('_class_name')}"
        )
    found = _closest(parts["dit"].config, 1 + ("dit_low" in parts), folder.name)
    notes = []
    if index.get("boundary_ratio") and "dit_low" in parts:
        found = found | {"sampling": found["sampling"] | {"boundary": index["boundary_ratio"]}}
    scheduler = folder / "scheduler" / "scheduler_config.json"
    if (
        scheduler.is_file()
        and (shift := json.loads(scheduler.read_text(encoding="utf-8")).get("flow_shift"))
        != found["sampling"]["shift"]
    ):
        notes.append(
            f"the scheduler config says shift {shift}; the official default {found['sampling']['shift']} is used, pass "
            f"shift={shift} for theirs"
        )
    tokenizer = _first(folder, ("tokenizer/tokenizer.json",), required=False)
    return _describe(folder, "diffusers", parts, tokenizer, found, notes)


def _describe(folder, layout, parts, tokenizer, found, notes):
    released = found.get("exact", False)
    if not released:
        notes = (*notes, f"not one of the released models; sampling defaults are those of {found['name']}")
    name = found["name"] if released else folder.name
    return Release(
        name,
        found["about"] if released else f"a model like {found['name']}",
        found["task"],
        layout,
        folder,
        parts,
        tokenizer,
        _sampling(found),
        found["negative"],
        tuple(notes),
    )


def _part(kind, where, config):
    """A Part, with its config read with the help of the names in its files; troubles are kept as words."""
    if isinstance(config, Path):
        try:
            config = checkpoints.config_beside(config.parent)
        except CheckpointError as error:
            return Part(kind, None, where, str(error))
    try:
        stored, problem = checkpoints.describe(where), ""
    except CheckpointError as error:
        stored, problem = {}, str(error)
    return Part(kind, configs.read(kind, config, stored), where, problem)


def _transformer(folder):
    """The transformer's weights beside other files of an official folder."""
    stem = "diffusion_pytorch_model"
    return _first(folder, (f"{stem}*{checkpoints.INDEX}", f"{stem}.safetensors", f"{stem}*.safetensors"))


def _first(folder, patterns, required=True):
    """The first file that fits; where none does, the place where it should be, so that the error can name it."""
    found = next((path for pattern in patterns for path in sorted(folder.glob(pattern))), None)
    return found or (folder / patterns[-1] if required else None)


def _closest(dit, experts, name):
    """The preset with this very DiT, marked "exact"; else the one with as many experts and the same task that is nearest in width."""
    known = [preset(each) for each in presets()]
    known = [each for each in known if "folder" in each and experts == 1 + ("boundary" in each["sampling"])]
    same = [each for each in known if dit == configs.read("dit", each["dit"])]
    if same:
        # The 480p and 720p models differ in nothing but their training; the folder's name tells.
        named = [
            each
            for each in same
            if each["folder"].lower() in name.lower()
            or each["folder"].rsplit("-", 1)[-1].lower() in name.lower()
        ]
        return (named or same)[-1] | {"exact": True}
    alike = [
        each
        for each in known
        if dit and (each["dit"]["model_type"], each["dit"]["out_dim"]) == (dit.model_type, dit.out_dim)
    ]
    return min(alike or known, key=lambda each: abs(each["dit"]["dim"] - (dit.dim if dit else 0)))


def _sampling(found):
    """Sampling defaults, with sizes and the pair of scales as tuples."""
    tuples = {"size", "scale"}
    return {
        key: tuple(value) if key in tuples and isinstance(value, list) else value
        for key, value in found["sampling"].items()
    }
