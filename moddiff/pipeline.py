"""How does a sentence become a video?  Words to vectors, noise to a latent in small steps, latent to
frames."""

import warnings
from dataclasses import replace
from os import PathLike

import torch

from . import conditioning, settings
from .conditioning import Conditioning
from .contracts import checked, device_of, fact
from .flow import free_noise, schedule, velocity_to, x0_from
from .hooks import OneRun, Taps, at
from .roles import component_for, get
from .run import Run, State, begin_step, behind_bar
from .settings import METHODS_IN_DIFFUSERS, TAKES, InDiffusers, Note
from .stream import frames_of
from .telemetry import span, traceparent
from .tokens import Word, grid_of, latent_shape, tokens_of, words_of
from .video import Video

__all__ = ["Note", "Pipeline", "Run", "State", "Word"]
ROLES = ("text", "image", "dit", "vae")
DEFAULTS = dict(solver="unipc", steps=50, shift=5.0, scale=5.0, frames=81, fps=16, size=(480, 832))


class Pipeline:
    """Components that together turn a prompt into a video. Any of them may be swapped, see `replace`.

    text, dit, vae, image  the components, or names they are registered under; image (the CLIP tower) only
                           where the model reads it
    task                   "t2v", "i2v", "flf2v", "ti2v" or "vace"; None: what the dit says
    defaults               solver, steps, shift, scale, frames, fps, size; any of them
    negative               the negative prompt used when a call gives none
    unknown                prompt -> the words the model has never met; only the tiny models know
    """

    def __init__(
        self, text, dit, vae, image=None, *, task=None, name="", defaults=None, negative="", unknown=None
    ):
        given = {"text": text, "image": image, "dit": dit, "vae": vae}
        if absent := [role for role, part in given.items() if part is None and role != "image"]:
            raise ValueError(f"a pipeline needs {', '.join(absent)}; only image may be None")
        self.components = {
            role: None if part is None else component_for(role, part) for role, part in given.items()
        }
        self.task = task or fact("dit", self.dit, "task")
        if self.task not in TAKES:
            raise ValueError(
                f"task={self.task!r}; expected one of {', '.join(TAKES)}. Give task= where the dit has no "
                "`task` of its own"
            )
        self.name, self.negative, self.unknown = name, negative, unknown
        self._defaults = DEFAULTS | (defaults or {})
        names = "x", "velocity.cond", "velocity.uncond", "velocity", "x0"
        self.tap = Taps(**dict.fromkeys(names, "b c f h w"))

    @property
    def defaults(self):
        """The settings of a run that says none: those of the model, after those that its dit was made for."""
        return self._defaults | (fact("dit", self.dit, "sampling") or {})

    text = property(lambda self: self.components["text"], doc="prompts -> vectors")
    image = property(lambda self: self.components["image"], doc="a picture -> CLIP features, or None")
    dit = property(lambda self: self.components["dit"], doc="noisy latent, time, text -> velocity")
    vae = property(lambda self: self.components["vae"], doc="video <-> latent")

    # ---- the loop ---------------------------------------------------------------------------------------

    def __call__(self, prompt, *, progress=None, store=None, **options):
        """A prompt to a Video. The same arguments give the same bytes.

        prompt      str; "" is allowed and shows what the model does unasked. More words than the model reads
                    are cut off, with a note
        seed        whole number; below 0 or None: drawn, and kept in video.settings
        negative    what not to show; None: the model's default
        image       the first frame, for i2v, flf2v and ti2v: a path, PIL picture, array, tensor, or a frame
                    of a Video
        last_image  the last frame, for flf2v
        steps       how many, or their noise levels, a step list;  with shift: how many of them go to high
                    noise;  None: as the model wants it, as below
        solver      a name, or an object with `step`
        scale       a number, a pair (low noise, high noise), a guidance.CFG, or a guide's name
        frames      4n + 1 for Wan;  size: (height, width) in pixels
        video, mask, references, control_scale     VACE only: see conditioning.vace_control
        noise       "freenoise": noise that repeats from window to window, for a windowed dit
        rewrite     a component that makes a richer prompt of a plain one, or its name
        progress    True: a bar;  None: one in a terminal or an open notebook, if the run takes above 3 s
        store       a file to keep the run in, such as "runs.sqlite", or an object whose `run(pipe, prompt,
                    **options)` calls the pipeline and keeps what it will: see experiments/keeping.py
        ->          Video

        Raises ValueError or TypeError, before any work, for what cannot be done. Guide: guides/pipeline.md
        """
        if store is not None:
            return _keeper(store).run(self, prompt, progress=progress, **options)
        with span("generate", model=self.name, task=self.task):
            run = self._prepared(prompt, options)
            for state in behind_bar(self.loop(run), len(run.schedule), progress):
                latent = state.next  # [1, c, f, h, w]
            return self.decode(latent[:, :, run.conditioning.references :], run.settings, run.notes)

    def steps(self, prompt, **options):
        """The same run, one State at a time: `for state in pipe.steps("...", seed=0):`.

        Stop whenever, by `break`; nothing is left behind. `moddiff.run.watch` ends a run from elsewhere.
        """
        return self.loop(self._prepared(prompt, options))

    def stream(self, prompt, **options):
        """The same film as it comes: `for piece in pipe.stream("...", seed=0):`, each a Video of some frames.

        The vae decodes a latent frame at a time. With a dit that goes in chunks (extensions.causal) the first
        pieces come while later frames are not yet begun.
        """
        return frames_of(self, self._prepared(prompt, options))

    @torch.no_grad()
    def loop(self, run, after=None):
        """The steps of a run that `prepare` made; those after a State of it.   yields State"""
        x, memory, done = run.noise, None, 0
        if after is not None:
            x, memory, done = after.next, after.memory, after.step + 1
        for i, (t, sigma, sigma_next) in enumerate(run.schedule):
            if i < done:
                continue
            begin_step(i, len(run.schedule))  # who watches may end it here
            with at(step=i, sigma=float(sigma), run=run.mark), run.span("step"):
                x = self.tap("x", x)
                velocity = run.guide(self.predictor(run, x, t), sigma, t)  # the dit, once per branch
                velocity = self.tap("velocity", _fits("guide", run.guide, velocity, x))
                x0 = self.tap("x0", x0_from(x, velocity, sigma))
                if self.tap.edited("x0"):  # a patch bent the path: go where it points now
                    velocity = velocity_to(x0, x, sigma)
                stepped = run.solver.step(x, velocity, sigma, sigma_next, memory, **run.left(i))
                x_next, memory = _fits("solver", run.solver, stepped, velocity, finite=True)
                x_next = run.conditioning.hold(x_next)  # ti2v: frame 0 stays the picture's own
            levels = float(sigma), float(sigma_next)
            state = State(i, len(run.schedule), t, *levels, x, velocity, x0, x_next, run, (x_next, memory))
            yield state
            # Who puts another latent into state.next leaves the path that the solver remembers.
            x, memory = state.next, state.memory

    def predictor(self, run, x, t):
        """branch -> velocity at x: one call of the dit, alone in its batch."""
        device = device_of(self.dit)
        x, times = x.to(device), run.conditioning.times(t.to(device), x, self.patch)

        def predict(branch):
            words = run.context[branch.partition(".")[0]]  # "cond.skipped" asks with the words of cond
            with at(branch=branch), span("branch", device=device):
                velocity = self.dit(x, times, words, **run.inputs)  # [1, c, f, h, w]
                return self.tap(f"velocity.{branch}", _fits("dit", self.dit, velocity, x, finite=True))

        predict.dit = self.dit  # for a guide that reaches into it
        return predict

    # ---- before the loop --------------------------------------------------------------------------------

    def _prepared(self, prompt, options):
        """A run whose notes have been said, to the one who called the pipeline."""
        run = self.prepare(prompt, **options)
        for note in run.notes:
            warnings.warn(note, Note, stacklevel=3)
        return run

    @torch.no_grad()
    def prepare(self, prompt, **options):
        """Check what was asked for, encode the prompts and the pictures, draw the noise.   -> Run"""
        above = traceparent()
        with span("prepare", model=self.name, task=self.task) as done:
            run = self._ready(prompt, options)
            kept = "seed", "steps", "solver", "shift", "frames", "size"
            done.set(**{name: run.settings.get(name) for name in kept}, shape=run.noise.shape)
            return replace(run, trace=above or traceparent())  # steps follow it, and do not lie in it

    def _ready(self, prompt, options):
        asked = settings.complete(self, prompt, options)
        solver = component_for("solver", asked.solver)
        guide = settings.guide_for(asked.scale, fact("dit", self.dit, "boundary"))
        levels = schedule(asked.steps, asked.shift, fact("solver", solver, "grid"), device_of(self.dit))
        notes = []
        if asked.rewrite is not None:
            rewriter = component_for("rewrite", asked.rewrite)
            with span("rewrite", rewriter=type(rewriter).__name__):
                rewritten, notes = settings.rewritten(rewriter, prompt, asked.image)
            asked.prompt, asked.original_prompt = checked("rewrite", rewriter, rewritten), prompt
        notes += settings.notes(self, asked)  # of the words that the model will read

        mark = OneRun(levels.timesteps.tolist())
        with at(run=mark):
            pictures = self._condition(asked)
            context = {
                "cond": self._context("cond", asked.prompt, pictures.image),
                "uncond": self._context("uncond", asked.negative, pictures.image),
            }
        return Run(
            settings={"model": self.name} | settings.remembered(asked),
            notes=tuple(notes),
            schedule=levels,
            solver=solver,
            guide=guide,
            context=context,
            conditioning=pictures,
            inputs=pictures.inputs(prepared=fact("dit", self.dit, "prepare") is not None),
            noise=pictures.hold(self._noise(asked, pictures.references)),
            mark=mark,
        )

    def _noise(self, asked, references):
        """The first and only draw of a run, from a generator of its own.   -> float32 [1, c, f, h, w]"""
        f, h, w = self.latent_shape(asked.frames, asked.size)
        source = torch.Generator(device_of(self.dit)).manual_seed(asked.seed)
        shape = self.channels, references + f, h, w
        noise = torch.randn(shape, generator=source, device=source.device, dtype=torch.float32)[None]
        return noise if asked.noise is None else free_noise(noise, *fact("dit", self.dit, "window"))

    def _condition(self, asked):
        """The pictures of a run, encoded as this kind of model takes them.   -> Conditioning"""
        frames, size = asked.frames, asked.size
        if self.task == "vace":
            pixels = asked.video, asked.mask, asked.references
            control = conditioning.vace_control(self._encode, frames, size, self.stride, *pixels)
            return Conditioning(
                control=control, control_scale=asked.control_scale, references=len(asked.references)
            )
        if asked.image is None:
            return Conditioning()
        if self.task == "ti2v":
            image = conditioning.cover_lanczos(asked.image, size)  # [3, H, W]
            return Conditioning(held=self._encode(image[None, :, None]))
        image, last = conditioning.framed(asked.image, asked.last_image, size, asked.stretch)
        latent = self.latent_shape(frames, size)
        y = conditioning.with_picture(self._encode, image, frames, latent, self.stride[0], last)
        return Conditioning(y=y, image=self._features(asked.image, asked.last_image))

    def _features(self, *pictures):
        """What CLIP sees in each picture, [1 or 2, n, d], where the dit reads that: Wan 2.1 does, 2.2 not."""
        width, features = fact("dit", self.dit, "image_dim"), []
        if self.image is None or width is None:
            return None
        for picture in filter(torch.is_tensor, pictures):
            device = device_of(self.image)
            with span("encode image", shape=picture.shape, device=device):
                seen = self.image.encode(picture[None].to(device))
                features.append(checked("image", self.image, seen, batch=1, dim=width))
        return torch.cat(features).to(device_of(self.dit))

    def _context(self, branch, words, features):
        """What the dit takes as text: keys and values, made once per prompt, where it can `prepare` them."""
        width, prepare = fact("dit", self.dit, "text_dim"), fact("dit", self.dit, "prepare")
        with at(branch=branch):
            with span("encode text", device=device_of(self.text)) as done:
                text = checked("text", self.text, self.text.encode([words]), prompts=1, dim=width or "d")
                done.set(tokens=len(text[0]), dtype=text[0].dtype)
            text = [part.to(device_of(self.dit)) for part in text]
            return text if prepare is None else prepare(text, features)

    def _encode(self, video):
        """video [1, 3, F, H, W] -> float32 latent on the dit's device"""
        shape, device = (1, "z", *self.latent_shape(video.shape[2], video.shape[3:])), device_of(self.vae)
        with span("encode video", shape=video.shape, device=device):
            latent = checked("vae", self.vae, self.vae.encode(video.to(device)), "encode", shape=shape)
        return latent.float().to(device_of(self.dit))

    # ---- after the loop ---------------------------------------------------------------------------------

    @torch.no_grad()
    def decode(self, latent, settings=None, notes=()):
        """A latent [1, z, f, h, w], such as state.x0, as a Video."""
        (ft, fh, fw), (f, h, w) = self.stride, latent.shape[2:]
        shape, device = (1, 3, (f - 1) * ft + 1, h * fh, w * fw), device_of(self.vae)
        with span("decode", shape=shape, device=device):
            video = self.vae.decode(latent.to(device))
            checked("vae", self.vae, video, "decode", shape=shape, finite=False)
            video = video.float().cpu()  # waits for the device
        return Video.from_tensor(video, self.defaults["fps"], settings, notes)

    # ---- sizes and words, for pictures ------------------------------------------------------------------

    @property
    def stride(self):
        """(time, height, width) pixels per latent cell."""
        return tuple(fact("vae", self.vae, "stride"))

    @property
    def patch(self):
        """(time, height, width) latent cells per token."""
        return tuple(fact("dit", self.dit, "patch"))

    @property
    def channels(self):
        """Latent channels."""
        return fact("dit", self.dit, "channels") or fact("vae", self.vae, "channels")

    def _pixels(self, frames=None, size=None):
        return (frames or self.defaults["frames"], *(size or self.defaults["size"]))

    def latent_shape(self, frames=None, size=None):
        """(f, h, w) of the latent of a video; by default of the default one."""
        return latent_shape(self._pixels(frames, size), self.stride)

    def grid_of(self, frames=None, size=None):
        """(f, h, w) in tokens of a video of this length and size: how attention folds into a picture."""
        return grid_of(self._pixels(frames, size), self.stride, self.patch)

    grid = property(grid_of, doc="(f, h, w) in tokens of the default video")

    def region(self, box, frames=None, *, size=None, video_frames=None):
        """The tokens that a box of pixels touches, for `transplant(A, tokens=pipe.region(box))`.

        box           (x0, y0, x1, y1) in pixels, x to the right, y down, x1 and y1 outside
        frames        pixel frames: a number or several; None: all
        size, video_frames   of the video; None: the defaults
        ->            token indices, int64 [k]
        """
        return tokens_of(box, frames, self._pixels(video_frames, size), self.stride, self.patch)

    def words(self, prompt):
        """The words of a prompt with their tokens, as pictures label them.   -> [Word(text, tokens)]"""
        tokens = fact("text", self.text, "tokens")
        if tokens is None:
            raise ValueError(
                f"the text component, {type(self.text).__name__}, has no `tokens` to be joined to words"
            )
        return words_of(tokens(prompt))

    # ---- swapping ---------------------------------------------------------------------------------------

    def replace(self, **parts):
        """A new pipeline with other components, sharing all the rest: `pipe.replace(text=other)`.

        A str is the name of a registered component. The old pipeline stays as it was.
        Raises ContractError for something that cannot play its role.
        """
        if odd := [name for name in parts if name not in ROLES]:
            raise TypeError(f"a pipeline has no component {', '.join(odd)}; expected {', '.join(ROLES)}")
        if isinstance(parts.get("dit"), str):
            parts["dit"] = component_for("dit", parts["dit"])
        task = fact("dit", parts.get("dit"), "task") or self.task  # a new dit may do something else
        kept = {name: getattr(self, name) for name in ("name", "negative", "unknown")}
        return Pipeline(**(self.components | parts), task=task, defaults=self._defaults, **kept)

    def __repr__(self):
        d = self.defaults
        parts = "".join(f"\n  {role:6} {_in_words(part)}" for role, part in self.components.items())
        steps, bent = d["steps"], f", shift {d['shift']:g}"
        if isinstance(steps, tuple):  # a step list, which no shift bends
            steps, bent = len(steps), ""
        return (
            f"Pipeline {self.name!r}, {self.task}: {d['frames']} frames of {d['size'][0]} x {d['size'][1]}, "
            f"{steps} steps of {d['solver']}, scale {d['scale']}{bent}{parts}"
        )

    def _repr_html_(self):
        from .viz.trees import tree

        return tree(self)._repr_html_()


for _name, _here in METHODS_IN_DIFFUSERS.items():
    setattr(Pipeline, _name, InDiffusers(_name, _here))


def _fits(role, part, output, given, finite=False):
    """The output, shaped as what was given; with `finite`, on a CPU, also without NaN that was not given.

    On a GPU looking for NaN would wait for the result.
    """
    finite = finite and given.device.type == "cpu" and bool(given.isfinite().all())
    return checked(role, part, output, shape=given.shape, finite=finite)


def _keeper(store):
    """What runs this pipeline and keeps what came out: the object itself, or the file of that path."""
    if isinstance(store, str | PathLike):
        return get("store", "sqlite")(store)
    if not callable(getattr(store, "run", None)):
        raise TypeError(
            f"store={store!r}; expected the path of a file, such as 'runs.sqlite', or an object whose "
            "run(pipe, prompt, **options) calls the pipeline"
        )
    return store


def _in_words(part):
    """A component in a line: its class, size, dtype and device."""
    name = "none" if part is None else type(part).__name__
    if hasattr(part, "wraps") and isinstance(part, torch.nn.Module):
        name = repr(part).splitlines()[0].removesuffix("(")  # an extension says how it was made
    first = next(part.parameters(), None) if isinstance(part, torch.nn.Module) else None
    if first is None:
        return name
    size = sum(p.numel() for p in part.parameters()) / 1e6
    return f"{name}, {size:.3g} M parameters, {str(first.dtype).removeprefix('torch.')} on {first.device}"
