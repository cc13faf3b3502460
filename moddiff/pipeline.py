"""How does a sentence become a video?  Words to vectors, noise to a latent by many small steps, the latent to frames: the loop, in plain sight."""

import inspect
import operator
import random
import warnings
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from . import conditioning, roles
from .flow import schedule, velocity_to, x0_from
from .guidance import CFG
from .hooks import Taps, at
from .roles import check_component, checked
from .text import TextEncoder, clean
from .video import Video, picture

ROLES = ("text", "image", "dit", "vae")
# The pictures that each kind of model takes.
TAKES = {
    "t2v": (),
    "i2v": ("image",),
    "flf2v": ("image", "last_image"),
    "ti2v": ("image",),
    "vace": ("video", "mask", "references"),
}


class Note(UserWarning):
    """Something about a run that its reader should know; nothing is wrong with the program."""


class Word(NamedTuple):
    """One word of a prompt and the tokens it became: the columns that a picture labels with it."""

    text: str
    tokens: tuple


@dataclass
class State:
    """One step, as `pipe.steps` yields it. Put another latent into `next` to steer the rest of the run.

    step, steps       which step, of how many;   t: 0..1000, what the model was told;   sigma, sigma_next: the noise levels
    x                 [1, c, f, h, w]  the noisy latent that the model saw
    velocity          [1, c, f, h, w]  its guided answer
    x0                [1, c, f, h, w]  where that points: `pipe.decode(state.x0)` shows it
    next              [1, c, f, h, w]  the latent at sigma_next; after the last step, the result
    """

    step: int
    steps: int
    t: torch.Tensor
    sigma: float
    sigma_next: float
    x: torch.Tensor = field(repr=False)
    velocity: torch.Tensor = field(repr=False)
    x0: torch.Tensor = field(repr=False)
    next: torch.Tensor = field(repr=False)


@dataclass(frozen=True)
class Run:
    """Everything a run needs before its first step; `settings` is what the user asked for, with the defaults filled in."""

    settings: dict
    notes: tuple
    schedule: object
    solver: object
    guide: object
    context: dict  # branch -> what the dit takes as text
    extra: conditioning.Conditioning
    noise: torch.Tensor  # [1, c, f, h, w]
    control_scale: float
    countdown: bool  # does the solver want to know how many steps are left?


class Pipeline:
    """Components that together turn a prompt into a video. Any of them may be swapped: see `replace` and moddiff.components.

    text, dit, vae, image  the components, or names they are registered under; image (the CLIP tower) only where the model reads it
    task                   "t2v", "i2v", "flf2v", "ti2v" or "vace"; None: what dit.config says
    defaults               solver, steps, shift, scale, frames, fps, size; any of them
    negative               the negative prompt used when a call gives none
    unknown                prompt -> the words the model has never met; only the tiny models know
    """

    def __init__(
        self, text, dit, vae, image=None, *, task=None, name="", defaults=None, negative="", unknown=None
    ):
        given = dict(text=text, image=image, dit=dit, vae=vae)
        self.components = {role: made(role, part) for role, part in given.items()}
        self.task = task or getattr(getattr(dit, "config", None), "model_type", None)
        if self.task not in TAKES:
            raise ValueError(
                f"task={self.task!r}; expected one of {', '.join(TAKES)}. Give task= where dit.config does not say it"
            )
        if absent := [role for role in ("text", "dit", "vae") if self.components[role] is None]:
            raise ValueError(f"a pipeline needs {', '.join(absent)}; only image may be None")
        for role, part in self.components.items():
            if part is not None:
                check_component(role, part)
        self.name, self.negative, self.unknown = name, negative, unknown
        self.defaults = dict(
            solver="unipc", steps=50, shift=5.0, scale=5.0, frames=81, fps=16, size=(480, 832)
        ) | (defaults or {})
        self.tap = Taps(
            **{name: "b c f h w" for name in ("x", "velocity.cond", "velocity.uncond", "velocity", "x0")}
        )

    text = property(lambda self: self.components["text"], doc="prompts -> vectors")
    image = property(lambda self: self.components["image"], doc="a picture -> CLIP features, or None")
    dit = property(lambda self: self.components["dit"], doc="noisy latent, time, text -> velocity")
    vae = property(lambda self: self.components["vae"], doc="video <-> latent")

    # ---- the loop -----------------------------------------------------------------------------------------------------

    def __call__(self, prompt, *, progress=False, **options):
        """A prompt to a Video. The same arguments give the same bytes.

        prompt      str; "" is allowed and shows what the model does unasked. More words than the model reads are cut off, with a note
        seed        whole number; below 0 or None: drawn, and kept in video.settings
        negative    what not to show; None: the model's default
        image       the first frame, for i2v, flf2v and ti2v: a path, PIL picture, array, tensor, or a frame of a Video
        last_image  the last frame, for flf2v
        steps, solver, scale, shift, frames, size  None: the model's defaults. size is (height, width); solver a name or an object with
                    `step` and `grid`; scale a number, (low noise, high noise), or a guidance.CFG
        video, mask, references, control_scale     VACE only: see conditioning.vace_control
        progress    a bar, in terminal or notebook
        ->          Video

        Raises ValueError or TypeError, before any work, for what cannot be done. Guide: guides/pipeline.md
        """
        run = self.prepare(prompt, **options)
        for note in run.notes:
            warnings.warn(note, Note, stacklevel=2)
        states = self._loop(run)
        if progress:
            from tqdm.auto import tqdm

            states = tqdm(states, total=len(run.schedule), desc="denoising", unit="step")
        for state in states:
            pass
        return self.decode(state.next[:, :, run.extra.extra :], run.settings, run.notes)

    def steps(self, prompt, **options):
        """The same run, one State at a time: `for state in pipe.steps("...", seed=0):`. Stop whenever; nothing is left behind."""
        run = self.prepare(prompt, **options)
        for note in run.notes:
            warnings.warn(note, Note, stacklevel=2)
        return self._loop(run)

    @torch.no_grad()
    def _loop(self, run):
        x, memory = run.extra.hold(run.noise), None
        for i, (t, sigma, sigma_next) in enumerate(run.schedule):
            with at(step=i, sigma=float(sigma)):
                x = self.tap("x", x)
                velocity = run.guide(self._predictor(run, x, t), sigma, t)
                velocity = self.tap(
                    "velocity", checked("guide", run.guide, velocity, shape=x.shape, finite=False)
                )
                x0 = self.tap("x0", x0_from(x, velocity, sigma))
                if self.tap.edited("x0"):
                    velocity = velocity_to(x0, x, sigma)
                left = dict(left=len(run.schedule) - i) if run.countdown else {}
                stepped = run.solver.step(x, velocity, sigma, sigma_next, memory, **left)
                new, memory = checked("solver", run.solver, stepped, shape=x.shape, finite=False)
                new = run.extra.hold(new)
            state = State(i, len(run.schedule), t, float(sigma), float(sigma_next), x, velocity, x0, new)
            yield state
            x, memory = state.next, memory if state.next is new else None

    def _predictor(self, run, x, t):
        """branch -> velocity at x: one call of the dit, alone in its batch."""
        place = device_of(self.dit)
        extra = {
            name: value
            for name, value in (("y", run.extra.y), ("control", run.extra.control))
            if value is not None
        }
        if run.extra.control is not None:
            extra["control_scale"] = run.control_scale
        times = run.extra.times(t.to(place), x, self.patch)

        def predict(branch):
            with at(branch=branch):
                velocity = self.dit(x.to(place), times, run.context[branch], **extra)  # [1, c, f, h, w]
                checked("dit", self.dit, velocity, shape=x.shape, finite=place.type == "cpu")
                return self.tap(f"velocity.{branch}", velocity)

        return predict

    # ---- before the loop ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def prepare(
        self,
        prompt,
        *,
        seed=0,
        negative=None,
        image=None,
        last_image=None,
        steps=None,
        solver=None,
        scale=None,
        shift=None,
        frames=None,
        size=None,
        video=None,
        mask=None,
        references=(),
        control_scale=1.0,
    ):
        """Check every argument, encode the prompts and the pictures, draw the noise.   -> Run"""
        given = dict(solver=solver, steps=steps, scale=scale, frames=frames, size=size)
        chosen = {name: self.defaults[name] if value is None else value for name, value in given.items()}
        seed = -1 if seed is None else _whole("seed", seed)
        chosen["seed"] = random.SystemRandom().randrange(2**31) if seed < 0 else seed % 2**63
        chosen["frames"] = _whole("frames", chosen["frames"])
        if not (isinstance(chosen["size"], (tuple, list)) and len(chosen["size"]) == 2):
            raise ValueError(
                f"size={chosen['size']!r}; expected (height, width) in whole pixels, such as (96, 96) or (480, 832)"
            )
        chosen["size"] = tuple(_whole("size", side) for side in chosen["size"])
        negative = self.negative if negative is None else negative
        for name, value in (("prompt", prompt), ("negative", negative)):
            if not isinstance(value, str):
                raise TypeError(
                    f"the {name} arrived as {type(value).__name__}: {value!r}; expected a str. For several videos call the pipeline "
                    "once for each"
                )
        self._check_pictures(image, last_image, video, mask, references)
        image, last_image = (None if source is None else picture(source) for source in (image, last_image))
        if image is not None and size is None and self.defaults.get("fit") != "crop":
            chosen["size"] = conditioning.size_for(image, chosen["size"], self.stride, self.patch, self.task)
        conditioning.check_size(chosen["size"], chosen["frames"], self.stride, self.patch)
        chosen["shift"] = shift if shift is not None else self._default_shift(chosen["size"])

        chosen_solver = check_component("solver", made("solver", chosen["solver"]))
        chosen["solver"] = chosen["solver"] if isinstance(chosen["solver"], str) else repr(chosen_solver)
        guide = (
            chosen["scale"]
            if callable(chosen["scale"])
            else CFG(chosen["scale"], boundary=getattr(self.dit, "boundary", None))
        )
        chosen["scale"] = repr(guide) if guide is chosen["scale"] else chosen["scale"]
        levels = schedule(
            chosen["steps"], chosen["shift"], getattr(chosen_solver, "grid", "unipc"), device_of(self.dit)
        )

        exact = size is not None or self.defaults.get("fit") == "crop"
        extra, features = self._condition(chosen, exact, image, last_image, video, mask, references)
        context = {
            branch: self._context(words, features, branch)
            for branch, words in (("cond", prompt), ("uncond", negative))
        }
        f, h, w = self.latent_shape(chosen["frames"], chosen["size"])
        source = torch.Generator(device_of(self.dit)).manual_seed(chosen["seed"])
        noise = torch.randn(
            self.channels, f + extra.extra, h, w, generator=source, device=source.device, dtype=torch.float32
        )[None]
        countdown = "left" in inspect.signature(chosen_solver.step).parameters
        settings = dict(model=self.name, prompt=prompt, negative=negative) | chosen
        return Run(
            settings,
            self._notes(prompt, negative),
            levels,
            chosen_solver,
            guide,
            context,
            extra,
            noise,
            control_scale,
            countdown,
        )

    def _check_pictures(self, image, last_image, video, mask, references):
        """Which pictures this model takes, and which it must have."""
        takes = TAKES[self.task]
        given = dict(
            image=image is not None,
            last_image=last_image is not None,
            video=video is not None,
            mask=mask is not None,
            references=len(references) > 0,
        )
        for name, there in given.items():
            if there and name not in takes:
                cure = (
                    "load an image-to-video model, such as tiny-i2v"
                    if name == "image" and not takes
                    else f"leave {name} out"
                )
                raise ValueError(
                    f"{name}= was given, but {self.name or 'this pipeline'} is a {self.task} model and takes "
                    f"{' and '.join(takes) if takes else 'no pictures'}; {cure}"
                )
        needed = [name for name in takes if self.task in ("i2v", "flf2v") and not given[name]]
        if needed:
            asked = " and ".join(f"{name}=" for name in needed)
            raise ValueError(
                f"{self.name or 'this pipeline'} is a {self.task} model and needs {asked}: a path, a PIL picture, an array, or a frame of a Video such as video[0]"
            )
        if self.image is None and self.task in ("i2v", "flf2v") and self._reads_clip:
            raise ValueError(
                "this dit reads CLIP features, but the pipeline has no image component; give it one: pipe.replace(image=...)"
            )

    def _condition(self, chosen, exact, image, last, video, mask, references):
        """-> Conditioning, and the CLIP features or None"""
        frames, size = chosen["frames"], chosen["size"]
        latent, ft = self.latent_shape(frames, size), self.stride[0]
        if self.task == "vace":
            if video is not None:
                video = video.tensor() if isinstance(video, Video) else video
                if tuple(video.shape) != (1, 3, frames, *size):
                    raise ValueError(
                        f"video= has shape {list(video.shape)}; expected [1, 3, {frames}, {size[0]}, {size[1]}], as frames= and size= "
                        "say"
                    )
            mask = None if mask is None else torch.as_tensor(mask)
            if mask is not None and tuple(mask.shape) != (frames, *size):
                raise ValueError(
                    f"mask= has shape {list(mask.shape)}; expected [{frames}, {size[0]}, {size[1]}], one value per pixel"
                )
            references = [conditioning.cover(picture(source), size) for source in references]
            control = conditioning.vace_control(
                self._encode, frames, size, self.stride, video, mask, references
            )
            return conditioning.Conditioning(
                control=control.to(device_of(self.dit)), extra=len(references)
            ), None
        if image is None:
            return conditioning.Conditioning(), None
        if self.task == "ti2v":
            return conditioning.Conditioning(
                held=self._encode(conditioning.cover_lanczos(image, size)[None, :, None])
            ), None
        fit = conditioning.cover if exact else conditioning.resize
        framed = fit(image, size)
        framed_last = (
            None
            if last is None
            else conditioning.cover(last, size)
            if last.shape != image.shape
            else fit(last, size)
        )
        y = conditioning.with_picture(self._encode, framed, frames, latent, ft, framed_last).to(
            device_of(self.dit)
        )
        features = None
        if self.image is not None and self._reads_clip:
            originals = [source for source in (image, last) if source is not None]
            seen = [self.image.encode(source[None].to(device_of(self.image))) for source in originals]
            features = torch.cat(
                [checked("image", self.image, part, batch=1, dim=self.dit.config.image_dim) for part in seen]
            )  # [1 or 2, n, d]
            features = features.to(device_of(self.dit))
        return conditioning.Conditioning(image=features, y=y), features

    def _context(self, words, features, branch):
        """What the dit takes as text: keys and values made once per prompt where it can `prepare` them, else the features."""
        with at(branch=branch):
            width = getattr(getattr(self.dit, "config", None), "text_dim", "d")
            text = [
                part.to(device_of(self.dit))
                for part in checked("text", self.text, self.text.encode([words]), prompts=1, dim=width)
            ]
            if hasattr(self.dit, "prepare"):
                return self.dit.prepare(text, features)
        return text

    def _encode(self, video):
        """video [1, 3, F, H, W] -> float32 latent on the dit's device"""
        latent = self.vae.encode(video.to(device_of(self.vae)))
        checked(
            "vae",
            self.vae,
            latent,
            "encode",
            shape=(1, "z", *self.latent_shape(video.shape[2], video.shape[3:])),
        )
        return latent.float().to(device_of(self.dit))

    def _default_shift(self, size):
        """The shift for this size, where the preset has one of its own."""
        return next(
            (shift for other, shift in self.defaults.get("shifts", ()) if tuple(other) == tuple(size)),
            self.defaults["shift"],
        )

    def _notes(self, prompt, negative):
        notes = []
        for name, words in (("prompt", prompt), ("negative prompt", negative)):
            read, all_of_it = self._token_counts(words)
            if read < all_of_it:
                notes.append(f"the {name} has {all_of_it} tokens, of which the model reads the first {read}")
        if self.unknown is not None and (odd := self.unknown(prompt)):
            named = ", ".join(odd[:12]) + (", ..." if len(odd) > 12 else "")
            notes.append(f"the model has never met {named}; it was trained on a small world of moving shapes")
        return tuple(notes)

    def _token_counts(self, words):
        """(tokens the model reads, tokens there are), the end token not counted; equal where the text component does not tell."""
        if not isinstance(self.text, TextEncoder):
            return 0, 0
        tokenizer = self.text.tokenizer
        return len(tokenizer.ids(words)) - 1, len(
            tokenizer.model.encode(clean(words), add_special_tokens=False).ids
        )

    # ---- after the loop -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def decode(self, latent, settings=None, notes=()):
        """A latent [1, z, f, h, w], such as state.x0, as a Video."""
        (ft, fh, fw), (f, h, w) = self.stride, latent.shape[2:]
        video = self.vae.decode(latent.to(device_of(self.vae)))
        checked(
            "vae", self.vae, video, "decode", shape=(1, 3, (f - 1) * ft + 1, h * fh, w * fw), finite=False
        )
        return Video.from_tensor(video.float().cpu(), self.defaults["fps"], settings, notes)

    # ---- places and names, for pictures -------------------------------------------------------------------------------

    @property
    def stride(self):
        """(time, height, width) pixels per latent cell."""
        return tuple(
            getattr(self.vae, "stride", None)
            or getattr(getattr(self.vae, "config", None), "stride", (4, 8, 8))
        )

    @property
    def patch(self):
        """(time, height, width) latent cells per token."""
        return tuple(getattr(getattr(self.dit, "config", None), "patch_size", (1, 2, 2)))

    @property
    def _reads_clip(self):
        """Does the dit read CLIP features? Wan 2.1 image-to-video does, Wan 2.2 does not."""
        return getattr(getattr(self.dit, "config", None), "image_dim", None) is not None

    @property
    def channels(self):
        """Latent channels."""
        config = getattr(self.dit, "config", None)
        return config.out_dim if hasattr(config, "out_dim") else self.vae.config.z_dim

    def latent_shape(self, frames=None, size=None):
        """(f, h, w) of the latent of a video; by default of the default one."""
        frames, size = frames or self.defaults["frames"], size or self.defaults["size"]
        return ((frames - 1) // self.stride[0] + 1, size[0] // self.stride[1], size[1] // self.stride[2])

    @property
    def grid(self):
        """(f, h, w) in tokens of the default video: how attention over its tokens folds into a picture."""
        return self.grid_of()

    def grid_of(self, frames=None, size=None):
        """(f, h, w) in tokens of a video of this length and size."""
        return tuple(cells // p for cells, p in zip(self.latent_shape(frames, size), self.patch))

    def region(self, box, frames=None, *, size=None, video_frames=None):
        """The tokens that a box of pixels touches, for `transplant(A, tokens=pipe.region(box))`.

        box           (x0, y0, x1, y1) in pixels, x to the right, y down, x1 and y1 outside
        frames        pixel frames: a number or several; None: all
        size, video_frames   of the video; None: the defaults
        ->            token indices, int64 [k]
        """
        height, width = size or self.defaults["size"]
        x0, y0, x1, y1 = box
        if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
            raise ValueError(
                f"box={tuple(box)}; expected (x0, y0, x1, y1) with 0 <= x0 < x1 <= {width} and 0 <= y0 < y1 <= {height}"
            )
        count = video_frames or self.defaults["frames"]
        chosen = range(count) if frames is None else [frames] if isinstance(frames, int) else list(frames)
        if not chosen or not all(0 <= i < count for i in chosen):
            raise ValueError(f"frames={frames!r}; expected frame numbers from 0 to {count - 1}")
        (f, h, w), (ft, fh, fw), (pt, ph, pw) = self.grid_of(count, (height, width)), self.stride, self.patch
        inside = torch.zeros(f, h, w, dtype=torch.bool)
        whens = sorted({-(-i // ft) // pt for i in chosen})
        rows = slice(int(y0) // (fh * ph), -(-int(-(-y1 // 1)) // (fh * ph)))
        columns = slice(int(x0) // (fw * pw), -(-int(-(-x1 // 1)) // (fw * pw)))
        for when in whens:
            inside[when, rows, columns] = True
        return inside.flatten().nonzero()[:, 0]

    def words(self, prompt):
        """The words of a prompt with their tokens, as pictures label them.   -> [Word(text, tokens)], the end token `</s>` last

        Pieces are joined into words where the tokenizer marks word starts; Chinese, which has none, stays in pieces.
        """
        words = []
        for i, (_, piece) in enumerate(self.text.tokens(prompt)):
            text, starts = piece.lstrip("▁"), piece.startswith("▁")
            if words and not starts and piece != "</s>" and not (_han(text) or _han(words[-1].text)):
                words[-1] = Word(words[-1].text + text, (*words[-1].tokens, i))
            elif words and not words[-1].text:  # a lone word start belongs to what follows
                words[-1] = Word(text, (*words[-1].tokens, i))
            else:
                words.append(Word(text, (i,)))
        return words

    # ---- swapping -----------------------------------------------------------------------------------------------------

    def replace(self, **parts):
        """A new pipeline with other components, sharing all the rest: `pipe.replace(text=other)`. The old one stays as it was.

        A str is the name of a registered component. Raises ContractError for something that cannot play its role.
        """
        if odd := [name for name in parts if name not in ROLES]:
            raise TypeError(f"a pipeline has no component {', '.join(odd)}; expected {', '.join(ROLES)}")
        task = None if hasattr(getattr(parts.get("dit"), "config", None), "model_type") else self.task
        return Pipeline(
            **(self.components | parts),
            task=task,
            name=self.name,
            defaults=self.defaults,
            negative=self.negative,
            unknown=self.unknown,
        )

    def __repr__(self):
        lines = [
            f"Pipeline {self.name!r}, {self.task}: {self.defaults['frames']} frames of {self.defaults['size'][0]} x {self.defaults['size'][1]}, "
            f"{self.defaults['steps']} steps of {self.defaults['solver']}, scale {self.defaults['scale']}, shift {self.defaults['shift']:g}"
        ]
        for role, part in self.components.items():
            if isinstance(part, torch.nn.Module):
                first = next(part.parameters(), None)
                size = sum(p.numel() for p in part.parameters())
                what = f"{type(part).__name__}, {size / 1e6:.3g} M parameters" + (
                    f", {str(first.dtype).removeprefix('torch.')} on {first.device}" if size else ""
                )
            else:
                what = "none" if part is None else type(part).__name__
            lines.append(f"  {role:6} {what}")
        return "\n".join(lines)

    def _repr_html_(self):
        from .viz.trees import tree

        return tree(self)._repr_html_()


def made(role, part):
    """The component itself: a name is looked up in the registry, and what is found there made, if it is a class."""
    if not isinstance(part, str):
        return part
    found = roles.get(role, part)
    return found() if isinstance(found, type) else found


def device_of(part):
    """Where a component computes: the device of its first parameter, its own `device`, or the CPU."""
    first = next(part.parameters(), None) if isinstance(part, torch.nn.Module) else None
    return torch.device(first.device if first is not None else getattr(part, "device", "cpu"))


def _whole(name, value):
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name}={value!r}; expected a whole number") from None


def _han(text):
    return any("\u2e80" <= letter <= "\u9fff" for letter in text)
