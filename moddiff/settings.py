"""What was asked for?  The settings of one run, each checked before any work; what was left out comes from
the model."""

import numbers
import operator
import random
import warnings
from difflib import get_close_matches
from reprlib import repr as brief
from types import SimpleNamespace

import torch

from . import conditioning
from .contracts import fact
from .flow import step_list
from .guidance import CFG
from .roles import component_for, names
from .video import Video, picture

# The pictures that each kind of model takes.
TAKES = {
    "t2v": (),
    "i2v": ("image",),
    "flf2v": ("image", "last_image"),
    "ti2v": ("image",),
    "vace": ("video", "mask", "references"),
}
# How Diffusers calls a setting -> how it is asked for here.
IN_DIFFUSERS = {
    "num_inference_steps": "steps=20",
    "guidance_scale": "scale=5.0",
    "guidance_scale_2": "scale=(low noise, high noise)",
    "negative_prompt": 'negative="..."',
    "num_frames": "frames=81",
    "height": "size=(height, width)",
    "width": "size=(height, width)",
    "generator": "seed=0, a whole number",
    "latents": "seed=0, or a latent put into state.next of pipe.steps(...)",
    "output_type": "the Video that comes back: video.frames, video.tensor(), video.save(...)",
    "callback_on_step_end": "for state in pipe.steps(...)",
}
# The same for what its pipelines have.
METHODS_IN_DIFFUSERS = {
    "from_pretrained": "moddiff.load(where) makes one, from a folder of weights or a name",
    "to": "moddiff.load(..., device=, dtype=) says where its parts are; one moves alone: pipe.dit.to(...)",
    "enable_model_cpu_offload": 'moddiff.load(..., device={"dit": "cuda"}) leaves the others on the CPU',
    "scheduler": 'a run takes its solver: pipe(..., solver="unipc", shift=5.0)',
    "transformer": "it is pipe.dit",
    "text_encoder": "it is pipe.text",
    "image_encoder": "it is pipe.image",
}


class InDiffusers:
    """A name that Diffusers' pipelines have: whoever asks a Pipeline for it is told what to do here."""

    def __init__(self, name, here):
        self.name, self.here = name, here

    # An AttributeError, so that hasattr(pipe, "to") stays False for code that tries out what it was given.
    def __get__(self, pipe, owner):
        raise AttributeError(f"a Pipeline has no {self.name}; {self.here}")


class Note(UserWarning):
    """Something about a run that its reader should know; nothing is wrong with the program."""


# What a run can be asked for, as in Pipeline.__call__ -> what it is when left out; None: see `complete`.
SETTINGS = {
    "negative": None,
    "solver": None,
    "steps": None,
    "scale": None,
    "frames": None,
    "size": None,
    "seed": 0,
    "shift": None,
    "image": None,
    "last_image": None,
    "video": None,
    "mask": None,
    "references": (),
    "control_scale": 1.0,
    "noise": None,
    "rewrite": None,
}
# Those that a Video remembers of its run: enough to ask for the same again.
REMEMBERED = ("prompt", "negative", "solver", "steps", "scale", "frames", "size", "seed", "shift")


def remembered(asked):
    """The settings that are kept with a Video, as plain values; objects by their repr."""
    values = {name: getattr(asked, name) for name in REMEMBERED}
    if asked.shift is None:
        del values["shift"]  # a step list has none
    # They end up as text in the file of the video; a solver or a guide object has no other way to get there.
    plain = (str, numbers.Real, tuple, list)
    if asked.rewrite is not None:
        values["original_prompt"] = asked.original_prompt  # "prompt" is what the model read
    if asked.noise is not None:
        values["noise"] = asked.noise
    return {name: value if isinstance(value, plain) else repr(value) for name, value in values.items()}


def complete(pipe, prompt, options):
    """The settings of a run of this pipeline, all of them known and possible.

    options  names of SETTINGS -> what was asked for; None: the pipeline's default, of a seed: drawn
    ->       an object with those, pictures as tensors in [-1, 1], and with
             prompt   as it came
             stretch  is a picture bent to the size of the video, as Wan does, or cut to it?

    Raises TypeError for a setting that does not exist or is of another kind, ValueError for what cannot be
    done.
    """
    check_names(options)
    asked = SimpleNamespace(prompt=prompt, **(SETTINGS | options))
    check_pictures(pipe, asked)

    # Before the sizes are filled in: a size that was asked for is kept, and the picture cut to it.
    asked.stretch = asked.size is None and pipe.defaults.get("fit") != "crop"
    usual = pipe.defaults | {"negative": pipe.negative}
    for name in ("negative", "solver", "steps", "scale", "frames", "size"):
        if getattr(asked, name) is None:
            setattr(asked, name, usual[name])

    check_words("prompt", asked.prompt)
    check_words("negative", asked.negative)
    asked.frames = whole("frames", asked.frames)
    # Below 0 is "draw one", as in Wan's own scripts; the one drawn is kept, so that the run can be repeated.
    seed = -1 if asked.seed is None else whole("seed", asked.seed)
    asked.seed = random.SystemRandom().randrange(2**31) if seed < 0 else seed % 2**63

    asked.size = sides(asked.size)
    for name in ("image", "last_image"):
        if getattr(asked, name) is not None:
            setattr(asked, name, picture(getattr(asked, name)))
    if asked.image is not None and asked.stretch:
        # Wan takes the shape from the picture and only the area from the size.
        asked.size = conditioning.size_for(asked.image, asked.size, pipe.stride, pipe.patch, pipe.task)
    conditioning.check_size(asked.size, asked.frames, pipe.stride, pipe.patch)
    check_steps(asked, usual)
    asked.control_scale = number("control_scale", asked.control_scale)
    if asked.noise not in (None, "freenoise"):
        raise ValueError(f'noise={brief(asked.noise)}; expected None or "freenoise"')
    if asked.noise and fact("dit", pipe.dit, "window") is None:
        raise ValueError(
            'noise="freenoise" repeats from window to window; make the dit see them: windowed(dit)'
        )
    if asked.references and fact("dit", pipe.dit, "window") is not None:
        raise ValueError(
            "references= lie in front of the film's first frames, and a windowed dit shows them to its first "
            "windows alone; leave references out, or take the dit without windows for a film it sees whole"
        )
    read_control(asked)
    return asked


def rewritten(rewriter, prompt, image=None):
    """A prompt through a rewriter, which is shown the first frame if it `sees`.   -> (prompt, notes)

    Notes that the rewriter warns of are caught, for the run to carry; other warnings go on.
    """
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        seen = fact("rewrite", rewriter, "sees") and image is not None
        new = rewriter(prompt, image) if seen else rewriter(prompt)
    for warning in said:
        if not issubclass(warning.category, Note):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    told = [str(warning.message) for warning in said if issubclass(warning.category, Note)]
    return new, told + [f"the prompt was rewritten from {prompt!r} to {new!r}"] * (new != prompt)


def notes(pipe, asked):
    """What the reader of a run should know: words not read or not known, a size that was never trained."""
    for name, words in (("prompt", asked.prompt), ("negative prompt", asked.negative)):
        counts = fact("text", pipe.text, "counts")
        read, there = counts(words) if counts else (0, 0)
        if read < there:
            yield f"the {name} has {there} tokens, of which the model reads the first {read}"
    if pipe.unknown is not None and (odd := pipe.unknown(asked.prompt)):
        named = ", ".join(odd[:12]) + (", ..." if len(odd) > 12 else "")
        yield f"the model has never met {named}; it was trained on a small world of moving shapes"
    made_for = fact("dit", pipe.dit, "sampling") or {}
    if odd := [name for name, value in made_for.items() if getattr(asked, name) != value]:
        yield (
            f"the adapter was trained for {_said(made_for)}, and this run has "
            f"{_said({name: getattr(asked, name) for name in odd})}: away from what it was trained for it "
            "does worse"
        )
    sizes, frames = [tuple(size) for size in pipe.defaults.get("sizes", ())], pipe.defaults["frames"]
    known = asked.frames == frames and (asked.stretch or asked.size in sizes)
    if sizes and not known:
        trained = ", ".join(f"{height} x {width}" for height, width in sizes)
        yield (
            f"the model was trained on {frames} frames of {trained}; "
            f"with frames={asked.frames}, size={asked.size} the video may come out dark or broken"
        )


def _said(settings):
    """{"steps": (1.0, 0.5), "scale": 1.0} -> "steps (1, 0.5), scale 1" """
    return ", ".join(f"{name} {shortly(value)}" for name, value in settings.items())


def shortly(value):
    """A setting in a few characters: a step list with three digits for each level."""
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(shortly, value))})"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def guide_for(scale, boundary):
    """The guide that `scale` asks for: a CFG for a number or a pair, or the one of that name, or itself."""
    # Said here, since a mistyped scale would else be answered as a guide that is not registered.
    if isinstance(scale, str) and scale not in names("guide"):
        raise ValueError(
            f"scale={brief(scale)} is a str; expected a number such as 5.0, a pair (low noise, high noise), "
            f"a guidance.CFG, or the name of a registered guide: {', '.join(names('guide'))}"
        )
    if isinstance(scale, str) or callable(scale):
        return component_for("guide", scale)
    return CFG(scale, boundary=boundary)


# ---- checks --------------------------------------------------------------------------------------------


def check_names(options):
    """Raise TypeError for a setting that does not exist, with the one that was meant."""
    for name in options:
        if name in IN_DIFFUSERS:
            raise TypeError(f"{name}= is what Diffusers calls it; here it is {IN_DIFFUSERS[name]}")
        if name not in SETTINGS:
            near = get_close_matches(name, SETTINGS, 1)
            meant = f"did you mean {near[0]}=?" if near else f"there are {', '.join(SETTINGS)}"
            raise TypeError(f"a run has no setting {name}=; {meant}")


def check_steps(asked, usual):
    """A number of steps has a shift, that bends their levels; a step list says them itself and has none."""
    if isinstance(asked.steps, (tuple, list)):
        asked.steps = step_list(asked.steps)
        if asked.shift is not None:
            raise ValueError(
                f"shift={brief(asked.shift)} bends the levels of a number of steps, and steps is the list "
                f"{shortly(asked.steps)}; leave shift out, or give steps={len(asked.steps)} too"
            )
        return
    asked.steps = whole("steps", asked.steps)
    # A preset may have another shift for some of its sizes.
    shifts = {tuple(size): shift for size, shift in usual.get("shifts", ())}
    if asked.shift is None:
        asked.shift = shifts.get(asked.size, usual["shift"])
    asked.shift = number("shift", asked.shift)


def check_words(name, words):
    if not isinstance(words, str):
        raise TypeError(
            f"the {name} arrived as {type(words).__name__}: {brief(words)}; expected a str. "
            "For several videos call the pipeline once for each"
        )
    # A Python str may hold half of a surrogate pair; a tokenizer would stop at it with an error of its own.
    try:
        words.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the {name} has no letter at place {error.start}, only part of one ({words[error.start]!a}); "
            "it was read from something that is not UTF-8: read it again with the right encoding"
        ) from None


def check_pictures(pipe, asked):
    """Which pictures this model takes, and which it must have."""
    if not isinstance(asked.references, (list, tuple)):
        raise TypeError(f"references={brief(asked.references)}; expected a list of pictures")
    takes, model = TAKES[pipe.task], f"{pipe.name or 'this pipeline'} is a {pipe.task} model"
    given = [name for name in ("image", "last_image", "video", "mask") if getattr(asked, name) is not None]
    given += ["references"] * bool(asked.references)
    if odd := [name for name in given if name not in takes]:
        cure = "load an image-to-video model, such as tiny-i2v" if "image" in odd else f"leave {odd[0]} out"
        raise ValueError(
            f"{odd[0]}= was given, but {model} and takes {' and '.join(takes) or 'no pictures'}; {cure}"
        )
    # ti2v and vace go without pictures as well: from the text alone.
    if pipe.task not in ("i2v", "flf2v"):
        return
    if needed := [f"{name}=" for name in takes if name not in given]:
        raise ValueError(
            f"{model} and needs {' and '.join(needed)}: "
            "a path, a PIL picture, an array, or a frame of a Video such as video[0]"
        )
    # Wan 2.1 also reads CLIP features of its pictures; 2.2 sees their latents alone.
    if pipe.image is None and fact("dit", pipe.dit, "image_dim") is not None:
        raise ValueError(
            "this dit reads CLIP features, but the pipeline has no image component; give it one: "
            "pipe.replace(image=...)"
        )


def read_control(asked):
    """VACE's video, mask and references, as tensors of the size of the run."""
    frames, (height, width) = asked.frames, asked.size
    if asked.video is not None:
        asked.video = asked.video.tensor() if isinstance(asked.video, Video) else tensor("video", asked.video)
        if tuple(asked.video.shape) != (1, 3, frames, height, width):
            raise ValueError(
                f"video= has shape {list(asked.video.shape)}; "
                f"expected [1, 3, {frames}, {height}, {width}], as frames= and size= say"
            )
    if asked.mask is not None:
        asked.mask = tensor("mask", asked.mask)
        if tuple(asked.mask.shape) != (frames, height, width):
            raise ValueError(
                f"mask= has shape {list(asked.mask.shape)}; "
                f"expected [{frames}, {height}, {width}], one value per pixel"
            )
    asked.references = [conditioning.cover(picture(source), asked.size) for source in asked.references]


def tensor(name, value):
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{name}= arrived as {type(value).__name__}; expected a tensor or an array"
        ) from error


def whole(name, value):
    try:
        # Takes the integers of numpy and torch too, but not 20.0.
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name}={brief(value)}; expected a whole number") from None


def number(name, value):
    # Not `abs(value) > 1e6`: NaN is neither above nor below, and has to fail.
    if not isinstance(value, numbers.Real) or not abs(value) <= 1e6:
        kind = type(value).__name__
        raise ValueError(f"{name}={brief(value)} is a {kind}; expected a number such as 5.0, at most 1e6")
    return value


def sides(size):
    if not (isinstance(size, (tuple, list)) and len(size) == 2):
        raise ValueError(
            f"size={brief(size)}; expected (height, width) in whole pixels, such as (96, 96) or (480, 832)"
        )
    return tuple(whole("size", side) for side in size)
