"""Which model lies in this folder of ComfyUI?  Files by kind of component, and the release that they make.

ComfyUI keeps the parts of all its models side by side. Content says which of them are Wan's.
"""

from pathlib import Path

from .files import CheckpointError, list_folder
from .quoting import first_line, listed
from .releases import preset
from .single import ENDINGS, goes_with, part_of

FOLDERS = {
    "dit": ("diffusion_models", "unet"),
    "text": ("text_encoders", "clip"),
    "image": ("clip_vision",),
    "vae": ("vae",),
}


def is_comfy(folder):
    """Is this a folder such as ComfyUI/models?"""
    folder = Path(folder).expanduser()
    return any((folder / name).is_dir() for name in FOLDERS["dit"])


def release_in(folder):
    """The one model that a folder's files make.   -> (name of the release, {kind: file, or both experts'})

    Raises ValueError where there is none, or more than one, with what to type instead.
    """
    folder = Path(folder).expanduser()
    troubles = []
    found = {kind: _parts(folder, kind, troubles) for kind in FOLDERS}
    dits = found["dit"]
    pair = _experts(dits)
    names, equal = goes_with(dits[0]) if len(dits) == 1 or pair else ([], True)
    if equal:
        names = [name for name in names if ("boundary" in preset(name)["sampling"]) == bool(pair)]
    if len(names) != 1:
        raise _unclear(folder, found, names, troubles)
    needed = [kind for kind in FOLDERS if kind in preset(names[0])]
    if any(len(found[kind]) != 1 for kind in needed if kind != "dit"):
        raise _unclear(folder, found, names, troubles)
    return names[0], {kind: found[kind][0].where for kind in needed} | ({"dit": pair} if pair else {})


def _parts(folder, kind, troubles):
    """Those of Wan among the files in the folders of one kind; why others are not is added to troubles."""
    parts = []
    for place in (folder / name for name in FOLDERS[kind]):
        for name in list_folder(place) if place.is_dir() else ():
            if not name.endswith(ENDINGS) or name.endswith(".json"):
                continue
            try:
                part = part_of(place / name)
            except CheckpointError as error:
                troubles.append(str(error))
                continue
            except ValueError as error:  # of another model, or of sizes that no shape tells
                troubles.append(f"{name} is passed over: {first_line(error)}")
                continue
            parts += [part] if part.kind == kind else []
    return parts


def _experts(dits):
    """{"high": file, "low": file} of two alike whose names say so; else None."""
    noises = {noise: part for noise in ("high", "low") for part in dits if noise in part.where.name.lower()}
    if len(dits) != 2 or len(noises) != 2 or dits[0].config != dits[1].config:
        return None
    return {noise: part.where for noise, part in noises.items()}


def _unclear(folder, found, names, troubles):
    lines = [
        f"{kind}: {listed([str(part.where.relative_to(folder)) for part in parts], 8) or 'none'}"
        for kind, parts in found.items()
    ]
    release = repr(names[0]) if len(names) == 1 else "RELEASE"
    which = f" The dit fits {listed(names)}." if len(names) > 1 else ""
    return ValueError(
        f"{folder} is a folder of ComfyUI, and which model to load is not clear.{which} Of Wan it holds\n"
        + "\n".join([*lines, *troubles])
        + f"\nSay which: moddiff.load({release}, dit=FILE, text=FILE, vae=FILE), for two experts "
        "dit={'high': FILE, 'low': FILE}, and for a model that reads pictures by CLIP image=FILE"
    )
