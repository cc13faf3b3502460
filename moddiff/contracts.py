"""What does each role promise, and was the promise kept?  Text, image, dit, vae, solver, guide, rewrite.

A role is a promise about shapes, not a base class: anything with the right methods may stand in, from a
remote encoder to three lines in a notebook. Dtype and device are each component's own; the pipeline converts
where they meet, and checks there that the promise was kept.

What a pipeline must know of a component beyond its methods is an attribute of the role below, with a default.
It is read by `fact`, which looks through wrappers, so that a component is wrapped by no more than this:

    class Slow:
        def __init__(self, inner):
            self.wraps = inner  # what the wrapper does not say itself is asked of this one

        def __call__(self, *inputs, **options):
            time.sleep(1)
            return self.wraps(*inputs, **options)
"""

import inspect
from collections.abc import Callable
from typing import Any, Protocol

import torch

from .hooks import wrapped


class ContractError(TypeError):
    """A component did not do what its role promises."""


# ---- the roles -----------------------------------------------------------------------------------------


# The docstrings of the methods below are also what an error says: see `_promise`.
class TextEncoder(Protocol):
    """Role "text": prompts to vectors.

    counts  prompt -> (tokens read, tokens there are), for the note on a prompt cut off; None: none is
    tokens  prompt -> [(id, piece)], one per row of `encode`, for `pipe.words`; None: pictures have no words

    Must raise TypeError for anything but strings.
    """

    counts: Callable | None = None
    tokens: Callable | None = None

    def encode(self, prompts: list) -> list:
        """[str] -> list of floating [l, d], one per prompt; l counts its real tokens (at least one), d is
        what the denoiser reads."""


class ImageEncoder(Protocol):
    """Role "image": pictures to vectors, for models that see their first frame through CLIP.

    Must raise ValueError for another rank or channel count.
    """

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """[b, 3, H, W] in [-1, 1], any H and W -> floating [b, n, d]"""


class Denoiser(Protocol):
    """Role "dit": which way from data to noise.

    task        "t2v", "i2v", "flf2v", "ti2v" or "vace": the pictures it takes; None: the pipeline is told
    patch       (time, height, width) latent cells per token
    channels    of the latent x and of the velocity; None: as many as the vae's
    text_dim    d of the text features it reads; None: any
    image_dim   d of the CLIP features it reads; None: it reads none
    boundary    in [0, 1], where one expert hands over to the other; None: there is one model
    window      (length, overlap) in latent frames of what it sees at a time; None: the whole film
    chunk       latent frames of each chunk, where it makes a film in turn; None: all frames at once
    sampling    {setting: value} of a run, where it was made for some, as a distilled adapter is for its step
                list: they come before the pipeline's defaults; None: it was made for none
    prepare     (text, image) -> what `__call__` takes as text, made once per prompt; None: it takes the list
    use_kernel  name -> itself, with every attention on that kernel; None: there is no choice
    example     empty inputs for a video of some size, to forecast shapes and memory; None: no forecast

    Must raise ValueError for inputs whose shapes do not agree.
    """

    task: str | None = None
    patch: tuple = (1, 2, 2)
    channels: int | None = None
    text_dim: int | None = None
    image_dim: int | None = None
    boundary: float | None = None
    window: tuple | None = None
    chunk: tuple | None = None
    sampling: dict | None = None
    prepare: Callable | None = None
    use_kernel: Callable | None = None
    example: Callable | None = None

    def __call__(
        self, x: torch.Tensor, t: torch.Tensor, text: list, image: Any = None, y: Any = None
    ) -> torch.Tensor:
        """x [b, c, f, h, w], t [b] or one per token on the scale 0..1000, text list of [l, d] -> velocity,
        floating, shaped as x"""


class VideoCodec(Protocol):
    """Role "vae": pixels to a small latent and back.

    stride    (time, height, width) pixels per latent cell
    channels  z, of the latent

    Must raise ValueError for frames that are not 4n + 1 (by its stride), and for sizes no multiple of it.
    """

    stride: tuple = (4, 8, 8)
    channels: int = 16

    def encode(self, video: torch.Tensor) -> torch.Tensor:
        """[b, 3, F, H, W] in [-1, 1] -> [b, z, f, h, w], normalised as the denoiser expects"""

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        """[b, z, f, h, w] -> [b, 3, F, H, W] in [-1, 1]"""


class Solver(Protocol):
    """Role "solver": one step from a noise level to the next, without hidden state.

    grid  the name of the flow.schedule that it steps along

    Where `step` has an argument `left`, the loop tells it how many steps remain, this one included. Must
    raise ValueError when shapes differ or the noise does not fall.
    """

    grid: str = "unipc"

    def step(
        self, x: torch.Tensor, velocity: torch.Tensor, sigma: Any, sigma_next: Any, memory: Any = None
    ) -> tuple:
        """-> (x at sigma_next, memory for the next step); x as it came in is not changed"""


class Guide(Protocol):
    """Role "guide": which branches to ask, and how to combine their velocities; a run's `scale=`.

    With a dot and a word behind its name, "cond.skipped", a branch is asked once more in another way, which
    caches and captures keep apart. `predict.dit` is the denoiser, for a guide that patches it.
    """

    def __call__(self, predict: Callable, sigma: Any, t: Any = None) -> torch.Tensor:
        """predict("cond" | "uncond") -> velocity; the result is shaped like these"""


class PromptRewriter(Protocol):
    """Role "rewrite": a richer prompt from a plain one. A run takes one as `rewrite=`.

    sees  is it given the first frame, [3, H, W] in [-1, 1], as a second argument where a run has one?
    """

    sees: bool = False

    def __call__(self, prompt: str) -> str:
        """str -> str, not empty"""


ROLES = {
    "text": TextEncoder,
    "image": ImageEncoder,
    "dit": Denoiser,
    "vae": VideoCodec,
    "solver": Solver,
    "guide": Guide,
    "rewrite": PromptRewriter,
}
# The first of each role is what an error names where nobody said which.
METHODS = {
    "text": ("encode",),
    "image": ("encode",),
    "dit": ("__call__",),
    "vae": ("encode", "decode"),
    "solver": ("step",),
    "guide": ("__call__",),
    "rewrite": ("__call__",),
}

NOT_FINITE = (
    "NaN or infinite values; expected finite numbers. "
    "Is its dtype too narrow (float16), or are its weights damaged?"
)


# ---- what a component says of itself -------------------------------------------------------------------


def fact(role, component, name):
    """What a pipeline must know of a component: its own word, or of the one it wraps, or the role's default.

    fact("dit", pipe.dit, "patch") -> (1, 2, 2);  the names and defaults stand in the roles above

    Methods, such as `prepare`, are taken only through a wrapper that says `wraps`: another one may well
    change what its inner component is given.
    """
    open_to_all = hasattr(component, "wraps")
    for layer in _layers(component):
        if hasattr(layer, name):
            value = getattr(layer, name)
            if layer is component or open_to_all or not callable(value):
                return value
    # A plain function can play a role, too; it says nothing of itself, so the role's default holds.
    return getattr(ROLES[role], name)


def _layers(component):
    """A component, the one it wraps, the one that one wraps, and so on."""
    while component is not None:
        yield component
        component = wrapped(component)


def device_of(component):
    """Where a component computes: its own `device`, the device of its first parameter, or the CPU."""
    for layer in _layers(component):
        # Asked again at each call, since a module can be moved after the pipeline was made.
        if hasattr(layer, "device"):
            return torch.device(layer.device)
        if isinstance(layer, torch.nn.Module) and (first := next(layer.parameters(), None)) is not None:
            return first.device
    return torch.device("cpu")


def wants_left(solver):
    """Does this solver's step take `left`, the steps that remain, itself or through a wrapper?"""
    for layer in _layers(solver):
        # One with **options may hand `left` on, so the solver inside decides; without them it would choke.
        parameters = inspect.signature(layer.step).parameters
        hands_on = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        if "left" in parameters or not hands_on:
            return "left" in parameters
    return False


# ---- promises ------------------------------------------------------------------------------------------


def check_component(role, component):
    """The component itself, once it is seen to have the methods of its role.

    Raises ContractError naming those it lacks.
    """
    known_role(role)
    lacking = [name + "()" for name in METHODS[role] if not callable(getattr(component, name, None))]
    # A class has every method, so it would pass here and fail in the middle of a run.
    is_class = isinstance(component, type)
    if lacking or is_class:
        fault = "is a class; make one first" if is_class else f"lacks {' and '.join(lacking)}"
        raise ContractError(
            f"{name_of(component)} cannot play the role {role!r}: it {fault}. Expected {_promise(role)}"
        )
    return component


def checked(role, component, output, method=None, *, finite=True, **expected):
    """The output itself, if it is what the role promises.

    role       the role that `component` plays
    output     what it returned
    method     which of its methods, where the role has several: vae "encode" or "decode"
    finite     look for NaN, too? on a GPU that waits for the result
    expected   what is known where they meet: prompts (text), dim (text, image: d), batch (image), shape (dit,
               vae, solver, guide)

    Raises ContractError saying which component, what arrived, what was expected.
    """
    known_role(role)
    if complaint := _complaint(role, output, finite, **expected):
        called = f"{type(component).__name__}.{method or METHODS[role][0]}"
        raise ContractError(
            f"the {role} component broke its contract: {called} returned {complaint} "
            f"The role promises: {_promise(role, method)}"
        )
    return output


def _promise(role, method=None):
    methods = [method] if method else METHODS[role]
    return "; ".join(f"{name}: {' '.join(getattr(ROLES[role], name).__doc__.split())}" for name in methods)


def _complaint(role, output, finite, prompts=None, batch="b", dim="d", shape=tuple("bcfhw")):
    """What is wrong with an output, ending in a full stop; empty when nothing is."""
    if role == "rewrite":
        is_prompt = isinstance(output, str) and output.strip()
        return "" if is_prompt else f"{output!r}; expected a prompt that is not empty."
    # Each prompt keeps its own length, so a list: padding is the denoiser's affair.
    if role == "text":
        if not isinstance(output, (list, tuple)):
            return f"{_what(output)}; expected a list with one [l, d] per prompt."
        if prompts not in (None, len(output)):
            return f"a list of {len(output)}; expected {prompts}, one [l, d] per prompt."
        complaints = (_numbers(x, ("l", dim), finite) for x in output)
        return next(filter(None, complaints), "")
    if role == "image":
        shape = batch, "n", dim
    if role == "solver":
        if not isinstance(output, tuple) or len(output) != 2:
            return f"{_what(output)}; expected the pair (x, memory). Did the step forget its memory?"
        output = output[0]
    return _numbers(output, shape, finite)


def _numbers(x, want, finite):
    """The complaint unless x is a floating tensor of this shape, where letters are any size from 1 on."""
    if torch.is_tensor(x) and x.is_floating_point() and x.ndim == len(want):
        if all(got == size if isinstance(size, int) else got > 0 for got, size in zip(x.shape, want)):
            # A forecast runs on the meta device, where there are shapes and no values.
            lost = finite and not x.is_meta and not x.isfinite().all()
            return NOT_FINITE if lost else ""
    # None is what a function gives that has no return: an easy slip in a notebook.
    forgot = " Did it forget to return?" if x is None else ""
    return f"{_what(x)}; expected a floating tensor [{', '.join(map(str, want))}].{forgot}"


def _what(x):
    if torch.is_tensor(x):
        return f"a tensor {list(x.shape)} of {str(x.dtype).removeprefix('torch.')}"
    return "None" if x is None else f"a {type(x).__name__}"


def known_role(role):
    if role not in ROLES:
        raise ValueError(f"there is no role {role!r}; the roles are {', '.join(ROLES)}")


def name_of(component):
    kind = type(component).__name__
    # A built-in one is named by the text "module:class" until somebody asks for it.
    return component if isinstance(component, str) else getattr(component, "__qualname__", kind)
