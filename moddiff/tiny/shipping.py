"""How do trained weights get into the package, and out of it again to be trained on?"""

import json
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

from ..dit import DiT, DiTConfig
from ..roles import apply
from ..saving import write_whole
from . import distilling
from .dit_stages import DIT_CONFIG
from .stages import config_of, part

PACKAGE = Path(__file__).parents[1]
PARTS = {  # file of the package: (stage it comes from, model of that stage, preset entry)
    "vae": ("decoder", None, "vae"),
    "text": ("t2v", "text", "text"),
    "t2v": ("t2v", "dit", "dit"),
    "image": ("clip", "image", "image"),
    "i2v": ("i2v", "dit", "dit"),
}
PRESETS = {
    "tiny-t2v": ("text to video", ("vae", "text", "t2v")),
    "tiny-i2v": ("image to video", ("vae", "text", "image", "i2v")),
    "tiny-fast": ("text to video in four steps, distilled", ("vae", "text", "t2v", "fast")),
}
ADAPTERS = {"fast": "dit"}  # file of the package, and stage: the preset entry that it is an adapter for
PEAKS = {"vae": 2e6}  # what the values inside stay below: the decoder reaches 4e5, more than float16 can hold
SAMPLING = dict(
    **distilling.TEACHER,
    frames=17,
    fps=8,
    size=[96, 96],
    sizes=[[96, 96]],
    fit="crop",
)


def begin_from_shipped(folder, package=PACKAGE):
    """Lay the package's weights into an empty `folder` as stages that have run, so that any can go on.

    Each gets `ema.safetensors`, for the stages after it, and `start.safetensors`, from which `train` begins.
    What training threw away (the text stage's quiz, clip's text tower) is not shipped: those two stages can
    be built upon but not gone on with.
    """
    folder, shipped = Path(folder), Path(package) / "tiny" / "weights"
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(
            f"{folder} is not empty; give a new folder, or leave out --from-shipped to go on in it"
        )
    files = (*(f"{name}.safetensors" for name in PARTS), "tokenizer.json")
    missing = ", ".join(file for file in files if not (shipped / file).exists())
    if missing:
        raise FileNotFoundError(
            f"{missing} not in tiny/weights: the package carries no such trained weights to begin from"
        )

    def weights(name, prefix=""):
        state = load_file(shipped / f"{name}.safetensors")
        return {prefix + key: value.float() for key, value in state.items()}

    text, vae = weights("text", "text."), weights("vae")
    states = dict(
        vae=vae,
        decoder=vae,
        text=text,
        t2v=text | weights("t2v", "dit."),
        clip=weights("image", "image."),
        i2v=weights("i2v", "dit."),
    )
    if (shipped / "fast.safetensors").exists():
        states["fast"] = student(weights("t2v"), shipped / "fast.safetensors").state_dict(prefix="dit.")
    for stage, state in states.items():
        (folder / stage).mkdir(parents=True)
        for file in ("ema", "start") if stage not in ("text", "clip") else ("ema",):
            save_file(state, folder / stage / f"{file}.safetensors")
    with safe_open(shipped / "vae.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
    (folder / "vae" / "statistics.json").write_text(json.dumps({key: config[key] for key in ("mean", "std")}))
    (folder / "tokenizer.json").write_bytes((shipped / "tokenizer.json").read_bytes())


def export(folder, package=PACKAGE):
    """Copy what has been trained to where `moddiff.load` finds it.   -> the files' names within the package

    The averaged weights go in half precision, with a preset for each model whose parts are all there.
    """
    folder, contents = Path(folder), {}
    trained = [name for name, (stage, *_) in PARTS.items() if (folder / stage / "ema.safetensors").exists()]
    if not trained:
        raise FileNotFoundError(
            f"{folder}: nothing trained to export here; run `moddiff train-tiny --stage ...` in it first, "
            f"for one of {', '.join(sorted({stage for stage, *_ in PARTS.values()}))}"
        )
    configs = {name: config_of(name, folder) for name in trained}
    if adapter := adapter_of(folder):
        contents["tiny/weights/fast.safetensors"] = adapter
    for name, config in configs.items():
        stage, model, _ = PARTS[name]
        state = {key: value.half() for key, value in part(folder, stage, model).items()}
        contents[f"tiny/weights/{name}.safetensors"] = save(
            state, dict(config=json.dumps(config), format="pt")
        )
    contents["tiny/weights/tokenizer.json"] = (folder / "tokenizer.json").read_bytes()
    for preset, (task, names) in PRESETS.items():
        if set(names) <= set(configs) | (set(ADAPTERS) if adapter else set()):
            content = json.dumps(preset_of(preset, task, names, configs), indent=2, ensure_ascii=False)
            contents[f"weights/presets/{preset}.json"] = content.encode() + b"\n"
    for name, data in contents.items():
        write_whole(Path(package) / name, data)
    return list(contents)


def student(dit, adapter):
    """The t2v DiT with these weights and an adapter: its file, or dict(rank=...) for a fresh one."""
    model = DiT(DiTConfig(**DIT_CONFIG))
    model.load_state_dict(dit)
    return apply(model, [["adapted", adapter]])


def adapter_of(folder):
    """The file of the adapter that the stage "fast" has trained, as bytes in half precision; None before."""
    trained = folder / "fast" / "ema.safetensors"
    if not trained.exists():
        return None
    model = student(part(folder, "t2v", "dit"), dict(rank=distilling.RANK))
    model.load_state_dict(part(folder, "fast", "dit"))
    path = folder / "fast" / "fast.safetensors"
    model.half().save(path, sampling=distilling.SAMPLING)
    return path.read_bytes()


def preset_of(name, task, parts, configs):
    """What `moddiff.load(name)` reads: the configs of the parts, and how to sample."""
    models = [part for part in parts if part in PARTS]
    adapters = {ADAPTERS[part]: f"{part}.safetensors" for part in parts if part in ADAPTERS}
    return dict(
        name=name,
        about=f"The tiny world's own Wan, {task}: trained for this package, see tiny/CARD.md",
        task="i2v" if "i2v" in parts else "t2v",
        dtype="fp32",
        peaks=PEAKS,
        **{PARTS[part][2]: configs[part] for part in models},
        sampling=SAMPLING,
        negative="",
        weights=dict(
            folder="tiny/weights",
            tokenizer="tokenizer.json",
            **{PARTS[part][2]: f"{part}.safetensors" for part in models},
            **({"adapters": adapters} if adapters else {}),
        ),
    )
