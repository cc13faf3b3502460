"""How far does the model see?  A film longer than its training, in windows that overlap and are blended.

At every step the model looks at each window alone, as at a short film of its own; the velocities are mixed
where windows overlap, and the solver takes one step with the whole. Guide: guides/windows.md
"""

import math
from functools import partial

import torch
from einops import rearrange

from ..contracts import fact
from ..dit import DiT
from ..hooks import at, position
from ..rope import angles, axis_pairs
from ..video import Video
from .promises import Extension, expect, extension, layers, whole_number

SCHEDULES = "static", "uniform", "looped"
BLENDS = "linear", "pyramid"


@extension
def windowed(
    dit,
    length=21,
    overlap=4,
    schedule="static",
    blend="linear",
    prompts=None,
    text=None,
    levels=1,
    riflex=0,
    stretch=1.0,
):
    """A dit that sees a window of latent frames at a time.   -> the component; exact for one window

    length    latent frames of a window; 21 are the 81 frames that Wan was trained on
    overlap   latent frames that neighbours share; the cost of a step is about frames / (length - overlap)
    schedule  "static": the same windows at every step; "uniform": they move from step to step, so that seams
              do not stay in one place; "looped": so, on a ring, for a film that begins anew at its end
    blend     "linear": the weight of a window rises and falls over the overlap; "pyramid": to its middle
    prompts   one for each section of the film, in turn, in place of the run's prompt: features [l, d] as the
              text encoder gives them, or strings, with the encoder as text=
    levels    "uniform" and "looped": also windows of every second, fourth, ... frame
    riflex    slow down this one of the clocks that tell frames apart, counted from 1, so that it does not
              come round within a window longer than training showed; Wan: 6 (see rope.angles); 0: none
    stretch   multiplies the positions of frames: 0.5 lets a window of 42 frames pass for one of 21

    Each window counts its frames from 0, so positions never leave what training showed. A picture that steers
    the film (i2v) is the first frame of every window. `hooks.position()["window"]` are the frames. A run with
    noise="freenoise" begins with noise that repeats from window to window.

    Raises ValueError for an overlap as long as the window, an unknown schedule or blend, and strings as
    prompts without an encoder; ContractError for a dit whose patches span frames.
    Source: kijai, ComfyUI-WanVideoWrapper, context_windows/context.py.
    """
    expect("dit", dit, "windowed")
    length = whole_number("windowed", "length", length, 1, of="latent frames")
    overlap = whole_number("windowed", "overlap", overlap, of="latent frames")
    levels = whole_number("windowed", "levels", levels, 1)
    if overlap >= length:
        raise ValueError(f"windowed(overlap={overlap}) is not shorter than the window, length={length}")
    known(schedule, SCHEDULES, "schedule")
    known(blend, BLENDS, "blend")
    if (patch := tuple(fact("dit", dit, "patch")))[0] != 1:
        raise ValueError(
            f"windowed cuts between frames, and a patch of this dit spans several: patch={patch}"
        )
    if fact("dit", dit, "chunk"):
        raise ValueError(f"windowed looks at frames out of turn, and {dit!r} takes them chunk by chunk")
    if riflex or stretch != 1:
        reposition(dit, whole_number("windowed", "riflex", riflex), stretch)
    prompts, width = encoded(prompts, text), fact("dit", dit, "text_dim")
    if width and prompts and (odd := {features.shape[1] for features in prompts} - {width}):
        raise ValueError(f"windowed(prompts=...) are features of width {odd.pop()}; this dit reads {width}")
    return Windowed(dit, length, overlap, schedule, blend, prompts, levels)


class Windowed(Extension):
    """See `windowed`."""

    def __init__(self, wraps, length, overlap, schedule, blend, prompts, levels):
        super().__init__(wraps, exact=False)
        self.length, self.overlap, self.levels = length, overlap, levels
        self.schedule, self.blend, self.prompts = schedule, blend, prompts

    @property
    def window(self):
        """(length, overlap) in latent frames, for noise that suits them."""
        return self.length, self.overlap

    def frames_at_once(self, frames):
        there = windows(frames, self.length, self.overlap, self.schedule, levels=self.levels)
        return len(reaching_all(there, frames, self.length)), min(self.length, frames)

    def prepare(self, text, image=None):
        """As dit.prepare, for the prompt of each section."""
        prepare = fact("dit", self.wraps, "prepare")
        if self.prompts is None or position().get("branch") not in ("cond", None):
            return text if prepare is None else prepare(text, image)
        sections = [[features.to(text[0])] * len(text) for features in self.prompts]
        return Sections(sections if prepare is None else [prepare(section, image) for section in sections])

    def forward(self, x, t, text, image=None, y=None, control=None, **options):
        frames, step = x.shape[2], position().get("step") or 0
        if self.prompts is not None and isinstance(text, list):
            text, image = self.prepare(text, image), None
        there = windows(frames, self.length, self.overlap, self.schedule, step, self.levels)
        there = reaching_all(there, frames, self.length)
        counts = blending(there, frames, self.overlap, self.blend, self.schedule == "looped")
        self.memory.note(step=step, branch=position().get("branch"), windows=len(there))

        whole = None
        for window, count in zip(there, counts):
            words = text.of(window, frames) if isinstance(text, Sections) else text
            pictures = {"image": image, "y": cut(y, window, first=True), "control": cut(control, window)}
            given = {name: value for name, value in pictures.items() if value is not None}
            with at(window=window):
                velocity = self.wraps(cut(x, window), times(t, window, frames), words, **given, **options)
            if len(there) == 1:
                return velocity  # to the bit as without windows
            whole = (
                torch.zeros_like(velocity[:, :, :1]).repeat(1, 1, frames, 1, 1) if whole is None else whole
            )
            # A window on a ring may hold a frame twice: `index_add_` adds both.
            count = count.to(velocity)[:, None, None]
            whole.index_add_(2, torch.tensor(window, device=x.device), velocity * count)
        return whole


class Sections:
    """A prompt for each section of a film, all as the dit takes them."""

    def __init__(self, prompts):
        self.prompts = prompts

    def of(self, window, frames):
        """What the window of these frames reads: the prompt of the section that its last frame is in."""
        section = frames / len(self.prompts)
        return self.prompts[min(int(max(window) / section), len(self.prompts) - 1)]


# ---- where the windows are ------------------------------------------------------------------------------


def windows(frames, length, overlap, schedule, step=0, levels=1):
    """The windows of a step.   -> [[latent frame]]

    frames, length, overlap  latent frames of the film, of a window, and that neighbours share
    schedule, levels         see `windowed`
    step                     "uniform" and "looped" windows move with it
    """
    if frames <= length:
        return [list(range(frames))]
    if schedule == "static":
        starts = [*range(0, frames - length, length - overlap), frames - length]  # the last slides back
        return [list(range(start, start + length)) for start in starts]
    there = ring(frames, length, overlap, step, levels)
    return there if schedule == "looped" else unrolled(there, frames, length)


def ring(frames, length, overlap, step, levels):
    """Windows on a film whose end is its beginning, from wherever this step begins."""
    levels = min(levels, math.ceil(math.log2(frames / length)) + 1)
    phase, there = halving(step), []
    pad = round(frames * phase)
    for spacing in (2**level for level in range(levels)):
        # The overlap is not spread with the frames: so it is in the source, and films are compared with that.
        for first in range(int(phase * spacing) + pad, frames + pad, length * spacing - overlap):
            there.append([(first + i * spacing) % frames for i in range(length)])
    return there


def unrolled(there, frames, length):
    """Windows of a ring for a film that has an end: those that run over it are moved back, to end with it."""
    there = list(there)
    for window in [*there]:
        over = next((i for i in range(1, length) if window[i] < window[i - 1]), None)
        if over is None:
            continue
        place, beyond = there.index(window), window[over]
        # How far each frame is from the first one: the steps across the end count, too.
        ahead = [(frame - window[0]) % frames for frame in window]
        there[place] = [(frame - ahead[-1] - 1) % frames for frame in ahead]
        # What it no longer reaches, the next window does, or a new one has to.
        if beyond not in there[(place + 1) % len(there)]:
            there.insert(place + 1, list(range(beyond, beyond + length)))
    return [window for i, window in enumerate(there) if window not in there[:i]]


def reaching_all(there, frames, length):
    """The windows, and new ones for frames that none reaches: those of two levels sometimes miss one."""
    there = list(there)
    while missed := set(range(frames)) - {frame for window in there for frame in window}:
        first = min(min(missed), frames - length)
        there.append(list(range(first, first + length)))
    return there


def halving(step):
    """0, 1/2, 1/4, 3/4, 1/8, ...: where to begin so that beginnings spread evenly (van der Corput)."""
    return int(f"{step:064b}"[::-1], 2) / 2**64


# ---- how much each counts -------------------------------------------------------------------------------


def blending(there, frames, overlap, blend="linear", looped=False):
    """How much each window counts for each of its frames.   -> [float32 [length]]; at a frame their sum is 1

    No weight is 0, so a frame that only one window reaches is never lost.
    """
    overlap = overlap if len(there) > 1 else 0  # one window is the whole film
    if blend == "pyramid":
        raw = [pyramid(window) for window in there]
    else:
        raw = [ramps(window, frames, overlap, looped) for window in there]
    total = torch.zeros(frames, dtype=torch.float64)
    for window, weight in zip(there, raw):
        total.index_add_(0, torch.tensor(window), weight)
    return [(weight / total[window]).float() for window, weight in zip(there, raw)]


def ramps(window, frames, overlap, looped):
    """1, but rising over the first `overlap` frames and falling over the last, within the film."""
    weight = torch.ones(len(window), dtype=torch.float64)
    rising = torch.arange(1, overlap + 1, dtype=torch.float64) / (overlap + 1)
    if overlap and (looped or min(window) > 0):
        weight[:overlap] *= rising
    if overlap and (looped or max(window) < frames - 1):
        weight[-overlap:] *= rising.flip(0)
    return weight


def pyramid(window):
    """Highest in the middle.   [3, 4, 5, 6, 7] -> 1/3, 2/3, 1, 2/3, 1/3"""
    rising = torch.arange(1, len(window) + 1, dtype=torch.float64)
    weight = torch.minimum(rising, rising.flip(0))
    return weight / weight.max()


# ---- cutting --------------------------------------------------------------------------------------------


def cut(x, window, first=False):
    """Frames of [b, c, f, h, w]; with `first`, the film's own first frame in the place of the window's."""
    if x is None:
        return None
    part = x[:, :, window]  # a copy
    if first:
        part[:, :, 0] = x[:, :, 0]
    return part


def times(t, window, frames):
    """The times of a window's tokens, where each token has one (Wan 2.2 TI2V).   [b] or [b, n] -> the same"""
    if t.ndim == 1:
        return t
    return rearrange(rearrange(t, "b (f hw) -> b f hw", f=frames)[:, window], "b f hw -> b (f hw)")


def as_loop(pipe, latent, before=4):
    """A film whose end leads into its beginning, of a latent made with looped windows.   -> Video

    latent  [1, z, f, h, w], as the last state's `next`
    before  how many of its last frames the vae sees before the first: it looks back, and else would find
            nothing there
    ->      time stride * f frames: the first latent frame has become as many as the others
    """
    before = min(before, latent.shape[2])
    ring = torch.cat([latent[:, :, -before:], latent], 2)
    film = pipe.decode(ring)
    return Video(film.frames[1 + (before - 1) * pipe.stride[0] :], film.fps)


# ---- other positions ------------------------------------------------------------------------------------


def reposition(dit, riflex, stretch):
    """Let every DiT inside turn its tokens by other angles."""
    models = layers(dit, DiT)
    if not models:
        raise ValueError(
            "windowed(riflex=..., stretch=...) need a dit of ours; this one makes its own positions"
        )
    if not (isinstance(stretch, int | float) and 0 < stretch < math.inf):
        raise ValueError(f"windowed(stretch={stretch!r}); expected a number above 0, such as 0.5")
    for model in models.values():
        d = model.config.dim // model.config.num_heads
        if riflex > axis_pairs(d)[0]:
            raise ValueError(
                f"windowed(riflex={riflex}); frames have {axis_pairs(d)[0]} clocks, counted from 1"
            )
        model.angles = partial(angles, d=d, stretch=(float(stretch), 1.0, 1.0), riflex=riflex)


# ---- checks ---------------------------------------------------------------------------------------------


def encoded(prompts, text):
    """Prompts as features.   [str] and an encoder, or [[l, d]] -> [[l, d]], None -> None"""
    if prompts is None:
        return None
    prompts = list(prompts) if not isinstance(prompts, str) else [prompts]
    if not prompts:
        raise ValueError(
            "windowed(prompts=[]); expected a prompt for each section, or None for the run's own"
        )
    if all(torch.is_tensor(prompt) and prompt.ndim == 2 for prompt in prompts):
        return prompts
    if not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(
            "windowed(prompts=...) takes strings, or features [l, d] of a text encoder, not both"
        )
    if text is None:
        raise ValueError(
            "prompts as strings need their encoder: windowed(dit, prompts=[...], text=pipe.text)"
        )
    with torch.no_grad():
        return list(text.encode(prompts))


def known(value, there, name):
    if value not in there:
        raise ValueError(f"windowed({name}={value!r}); expected one of {', '.join(there)}")
