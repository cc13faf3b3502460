"""Where do a pipeline's parts come from?  A preset that ships with the package, or a folder of weights."""

from pathlib import Path

import torch

from ..experts import Experts
from ..pipeline import Pipeline
from ..roles import apply, came_from, component_for
from ..telemetry import span
from . import comfy, single
from .files import CheckpointError
from .names import KINDS
from .profiles import applied
from .profiles import profile as profile_of
from .releases import open_release, presets

ALIASES = {"tiny": "tiny-t2v"}
# Not converted by one dtype for all: Wan decodes in float32, and 16 bits show in flat colours.
KEPT = ("vae",)
# What Diffusers calls an argument -> what it is here.
ARGUMENTS = {
    "torch_dtype": "dtype=",
    "device_map": "device=",
    "transformer": "dit=",
    "transformer_2": "dit=, with both experts in it",
    "text_encoder": "text=",
    "image_encoder": "image=",
    "scheduler": "solver=, in the call: pipe(..., solver='unipc')",
    "pretrained_model_name_or_path": "the first argument",
}


def load(where="tiny", dtype=None, device="cpu", tokenizer=None, profile=None, **replaced):
    """A Pipeline, ready to be called.

    where     "tiny" (also "tiny-t2v"), "tiny-fast" (four steps) or "tiny-i2v", which ship with the package
              and run on any laptop; or a folder of released weights, official or Diffusers:
              "/models/Wan2.1-T2V-1.3B"; or a folder of ComfyUI's models, where the parts of just one Wan are
              in it
    dtype     "bf16", "fp32", "fp16": for all parts but the vae; a dict such as {"dit": "bf16", "vae": "bf16"}
              for those alone. "as stored", or None where the release says nothing else: quantized weights
              (fp8, int8, GGUF) stay so, and are expanded layer by layer when they are used
    device    "cpu", "cuda", ...: for all parts; or a dict such as {"dit": "cuda"}, the others on the CPU
    tokenizer the folder of a tokenizer.json, for a text encoder whose file brings none
    profile   what is done to the parts: "base", "low_memory", "high_quality", a JSON file, or a dict such as
              {"dit": [["quantized", "int8"]], "vae": [["tiled"]], "text": "my-encoder"}; see profiles.py
    replaced  text=, image=, dit=, vae=: components of your own, or files of weights in any format that is
              read (dit={"high": FILE, "low": FILE} for two experts); those of the release are then not read
    ->        Pipeline

    Raises ValueError for an unknown name or device, CheckpointError when weights are absent or damaged. For a
    release that is known and not here the error says how to fetch it. Guide: guides/weights.md
    """
    asked = where
    calls = {} if profile is None else profile_of(profile)
    dtype = calls.get("dtype") if dtype is None else dtype
    solver = {"solver": calls["solver"]} if "solver" in calls else {}
    named = {kind: part for kind, part in calls.items() if kind in KINDS and isinstance(part, str)}
    replaced = {kind: component_for(kind, name) for kind, name in named.items()} | replaced
    calls = {kind: listed for kind, listed in calls.items() if isinstance(listed, list)}
    dtypes = dtype if isinstance(dtype, dict) else {kind: dtype for kind in KINDS if kind not in KEPT}
    devices = device if isinstance(device, dict) else dict.fromkeys(KINDS, device)
    for what, given in (("component", replaced), ("dtype", dtypes), ("device", devices)):
        _refuse_unknown(what, given)
    if Path(str(where)).expanduser().is_file():
        raise ValueError(
            f"{where} is one file, and a pipeline needs several. It is {single.how_to_use(where)}"
        )
    if comfy.is_comfy(where):
        where, there = comfy.release_in(where)
        replaced = there | replaced
    release = open_release(ALIASES.get(str(where), where))
    given = {kind: part for kind, part in replaced.items() if single.is_file(part)}
    replaced = {kind: part for kind, part in replaced.items() if kind not in given}
    if given or tokenizer is not None:
        release = single.with_files(release, given, tokenizer)
    absent = single.lacking(release, replaced)
    if absent and release.folder is None:
        less = f" (not among those you gave: {', '.join(absent)})" if given else ""
        raise CheckpointError(
            f"{release.name} is known, but its weights do not come with this package{less}; download them: "
            f"{release.how_to_get}, or give single files: dit=FILE, text=FILE, vae=FILE"
        )
    needed = [part for part in release.parts if part.removesuffix("_low") not in replaced]
    missing = [line for line in release.missing if _kind_of(line.split(":")[0]) not in replaced]
    if missing:
        raise CheckpointError(
            f"{release.name} cannot be loaded:\n" + "\n".join(f"- {line}" for line in missing)
        )

    with span("load", model=release.name):
        parts = {}
        for part in needed:
            kind, device = _kind_of(part), as_device(devices.get(_kind_of(part), "cpu"))
            # The release's own type is for its own files: those of others stay as they are.
            usual = None if kind in given else release.dtype
            as_type = dtypes.get(kind) or usual
            with span("load part", part=part, dtype=as_type, device=device):
                module = release.load(part, as_type)
                if part in release.adapters and kind not in given:
                    module = apply(module, [["adapted", release.adapters[part]]])
                parts[part] = module.requires_grad_(False).to(device)
        if "dit_low" in parts:
            parts["dit"] = Experts(parts["dit"], parts.pop("dit_low"), release.sampling["boundary"])
        for kind, part in parts.items():
            words = {"file": given.get(kind), "dtype": dtypes.get(kind), "device": devices.get(kind, "cpu")}
            came_from(part, load=_in_full(asked), tokenizer=tokenizer, **words)
        parts |= replaced
        parts = {kind: applied(part, calls.get(kind, ())) for kind, part in parts.items()}
    unknown = None
    if release.name.startswith("tiny"):  # they know how small their world is
        from ..tiny.world import unknown
    # A dit of your own says what it is for, if it has one of our configs.
    config = getattr(parts["dit"], "config", None)
    return Pipeline(
        **parts,
        task=getattr(config, "model_type", release.task),
        name=release.name,
        defaults=release.sampling | solver,
        negative=release.negative,
        unknown=unknown,
    )


def _in_full(where):
    """A folder with its whole path; a name stays a name, whatever lies in this folder."""
    is_folder = str(where) not in {*ALIASES, *presets()} and Path(where).expanduser().is_dir()
    return Path(where) if is_folder else where


def as_device(name):
    """ "cuda" -> torch.device, if there is one here.   Raises ValueError otherwise."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device is {name!r}; expected cpu, cuda, cuda:1 or mps") from error
    backend = {"cuda": torch.cuda, "mps": torch.backends.mps}.get(device.type)
    if backend is not None and not backend.is_available():
        raise ValueError(
            f"device is {name!r}, but torch finds none on this machine ({torch.__version__}); use "
            "device='cpu', or install a torch built for it"
        )
    return device


def _refuse_unknown(what, given):
    """Raise TypeError for a component that no pipeline has, and for an argument that only Diffusers has."""
    for name in given:
        if what == "component" and name in ARGUMENTS:
            raise TypeError(f"load has no {name}=; here it is {ARGUMENTS[name]}")
        if name not in KINDS:
            raise TypeError(f"load was given a {what} for {name}; there are {', '.join(KINDS)}")


def _kind_of(part):
    """The kind of component that a part of a release is, or belongs to."""
    return "text" if part == "tokenizer" else part.removesuffix("_low")
