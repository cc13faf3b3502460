"""What may be swapped for what?  The role of every component, a registry of who can play it, and checks where they meet.

A role is a promise about shapes, not a base class: anything with the right methods may stand in, from a remote encoder to three lines
in a notebook. Pass it to the pipeline, or register it under a name so that others can ask for it. Dtype and device are each
component's own; the pipeline converts where they meet, and checks there that the promise was kept.

A wrapper plays the role of what it wraps, and may say `wraps`: the component inside. Through it taps keep their names
(moddiff.hooks.wrapped).
"""

from collections.abc import Callable
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, Protocol, runtime_checkable

import torch

GROUP = "moddiff.components"  # the entry point group; an entry is named "role.name", as in "text.my-encoder"


@runtime_checkable
class TextEncoder(Protocol):
    """Role "text": prompts to vectors.

    Must raise TypeError for anything but strings.
    """

    def encode(self, prompts: list) -> list:
        """[str] -> list of floating [l, d], one per prompt; l counts its real tokens (at least one), d is what the denoiser reads."""


@runtime_checkable
class ImageEncoder(Protocol):
    """Role "image": pictures to vectors, for models that see their first frame through CLIP.

    Must raise ValueError for another rank or channel count.
    """

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """[b, 3, H, W] in [-1, 1], any H and W -> floating [b, n, d]"""


@runtime_checkable
class Denoiser(Protocol):
    """Role "dit": which way from data to noise.

    Must raise ValueError for inputs whose shapes do not agree.
    """

    def __call__(
        self, x: torch.Tensor, t: torch.Tensor, text: list, image: Any = None, y: Any = None
    ) -> torch.Tensor:
        """x [b, c, f, h, w], t [b] or one per token on the scale 0..1000, text list of [l, d] -> velocity, floating, shaped as x"""


@runtime_checkable
class VideoCodec(Protocol):
    """Role "vae": pixels to a small latent and back. `stride` is (time, height, width) in pixels per latent cell.

    Must raise ValueError for frames that are not 4n + 1 (by its stride), and sizes that are not multiples of it.
    """

    def encode(self, video: torch.Tensor) -> torch.Tensor:
        """[b, 3, F, H, W] in [-1, 1] -> [b, z, f, h, w], normalised as the denoiser expects"""

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        """[b, z, f, h, w] -> [b, 3, F, H, W] in [-1, 1]"""


@runtime_checkable
class Solver(Protocol):
    """Role "solver": one step from a noise level to the next, without hidden state.

    Must raise ValueError when shapes differ or the noise does not fall.
    """

    def step(
        self, x: torch.Tensor, velocity: torch.Tensor, sigma: Any, sigma_next: Any, memory: Any = None
    ) -> tuple:
        """-> (x at sigma_next, memory for the next step); x as it came in is not changed"""


@runtime_checkable
class Guide(Protocol):
    """Role "guide": which branches to ask, and how to combine their velocities."""

    def __call__(self, predict: Callable, sigma: Any, t: Any = None) -> torch.Tensor:
        """predict("cond" | "uncond") -> velocity; the result is shaped like these"""


@runtime_checkable
class PromptRewriter(Protocol):
    """Role "rewrite": a richer prompt from a plain one."""

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
METHODS = {
    "text": ("encode",),
    "image": ("encode",),
    "dit": ("__call__",),
    "vae": ("encode", "decode"),
    "solver": ("step",),
    "guide": ("__call__",),
    "rewrite": ("__call__",),
}

# What comes with the package, imported when asked for.
BUILT_IN = {
    "text": {"umt5": "moddiff.text:TextEncoder"},
    "image": {"clip": "moddiff.image:ImageEncoder"},
    "dit": {"wan": "moddiff.dit:DiT"},
    "vae": {"wan": "moddiff.vae:VAE"},
    "solver": {
        "euler": "moddiff.solvers:Euler",
        "dpm++": "moddiff.solvers:DPMSolverPP",
        "unipc": "moddiff.solvers:UniPC",
    },
    "guide": {"cfg": "moddiff.guidance:CFG"},
    "rewrite": {},
}
_registered = {role: {} for role in ROLES}


class ContractError(TypeError):
    """A component did not do what its role promises."""


def register(role, name, component=None):
    """Make a component, or what makes one, available by name.

        moddiff.register("text", "my-encoder", MyEncoder)      or, as a decorator:      @moddiff.register("text", "my-encoder")

    Registering the same function or class again (a cell run twice) replaces it; another one under a taken name is refused.
    A separate package does the same with an entry point of the group "moddiff.components", named "text.my-encoder".

    Raises ValueError for an unknown role or a name that is taken.
    """
    _known_role(role)
    if component is None:
        return lambda component: register(role, name, component)
    taken = _registered[role].get(name) or BUILT_IN[role].get(name)
    if taken is not None and _identity(taken) != _identity(component):
        raise ValueError(
            f"there already is a {role} component {name!r}, {_called(taken)}; choose another name for {_called(component)}"
        )
    _registered[role][name] = component
    return component


def get(role, name):
    """What was registered under a name: by `register`, by an installed package, or with this one.

    Raises ValueError for an unknown role or name, ContractError when an installed package's entry cannot be imported.
    """
    _known_role(role)
    if name in _registered[role]:
        return _registered[role][name]
    if name in BUILT_IN[role]:
        module, attribute = BUILT_IN[role][name].split(":")
        return getattr(import_module(module), attribute)
    entry = _installed(role).get(name)
    if entry is None:
        near = get_close_matches(str(name), names(role), 1)
        raise ValueError(
            f"there is no {role} component {name!r}"
            + (f"; did you mean {near[0]!r}?" if near else ";")
            + f" there are: {', '.join(names(role)) or 'none'}. Add one with moddiff.register({role!r}, {name!r}, ...)"
        )
    try:
        component = entry.load()
    except (ImportError, AttributeError) as error:
        package = entry.dist.name if entry.dist else "?"
        raise ContractError(
            f"the {role} component {name!r} of the installed package {package} cannot be imported: {error}. Its entry point is {entry.value}; update or remove that package"
        ) from error
    return component


def names(role):
    """All names known for a role."""
    _known_role(role)
    return sorted({*_registered[role], *BUILT_IN[role], *_installed(role)})


def _installed(role):
    return {
        entry.name.removeprefix(role + "."): entry
        for entry in entry_points(group=GROUP)
        if entry.name.startswith(role + ".")
    }


def _known_role(role):
    if role not in ROLES:
        raise ValueError(f"there is no role {role!r}; the roles are {', '.join(ROLES)}")


def _identity(component):
    if isinstance(component, str):
        return component
    return getattr(component, "__module__", None), getattr(component, "__qualname__", id(component))


def _called(component):
    return (
        component
        if isinstance(component, str)
        else getattr(component, "__qualname__", type(component).__name__)
    )


def check_component(role, component):
    """The component itself, once it is seen to have the methods of its role.   Raises ContractError naming those it lacks."""
    _known_role(role)
    lacking = [method for method in METHODS[role] if not callable(getattr(component, method, None))]
    if lacking or isinstance(component, type):
        what = (
            "is a class; make one first"
            if isinstance(component, type)
            else f"lacks {' and '.join(m + '()' for m in lacking)}"
        )
        raise ContractError(
            f"{_called(component)} cannot play the role {role!r}: it {what}. Expected {_promise(role)}"
        )
    return component


def checked(role, component, output, method=None, **expected):
    """The output itself, if it is what the role promises.

    role       the role that `component` plays
    output     what it returned
    method     which of its methods, where the role has several: vae "encode" or "decode"
    expected   what is known where they meet: prompts (text), dim (text, image: d), batch (image), shape (dit, vae, solver, guide), and
               finite=False to skip looking for NaN, which on a GPU waits for the result

    Raises ContractError saying which component, what arrived, what was expected.
    """
    _known_role(role)
    finite = expected.pop("finite", True)
    complaint = _complaint(role, output, expected)
    tensors = [x for x in (output if isinstance(output, (list, tuple)) else [output]) if torch.is_tensor(x)]
    if not complaint and finite and any(not x.isfinite().all() for x in tensors if not x.is_meta):
        complaint = "NaN or infinite values; expected finite numbers. Is its dtype too narrow (float16), or are its weights damaged?"
    if complaint:
        called = f"{type(component).__name__}.{method or METHODS[role][0]}"
        raise ContractError(
            f"the {role} component broke its contract: {called} returned {complaint} "
            f"The role promises: {_promise(role, method)}"
        )
    return output


def _promise(role, method=None):
    methods = [method] if method else METHODS[role]
    return "; ".join(f"{name}: {' '.join(getattr(ROLES[role], name).__doc__.split())}" for name in methods)


def _complaint(role, output, expected):
    """What is wrong with an output, ending in a full stop; empty when nothing is."""
    if role == "rewrite":
        return (
            ""
            if isinstance(output, str) and output.strip()
            else f"{output!r}; expected a prompt that is not empty."
        )
    if role == "text":
        prompts = expected.get("prompts")
        if not isinstance(output, (list, tuple)):
            return f"{_what(output)}; expected a list with one [l, d] per prompt."
        if prompts is not None and len(output) != prompts:
            return f"a list of {len(output)}; expected {prompts}, one [l, d] per prompt."
        return next(filter(None, (_shape(x, ("l", expected.get("dim", "d"))) for x in output)), "")
    if role == "image":
        return _shape(output, (expected.get("batch", "b"), "n", expected.get("dim", "d")))
    if role == "solver":
        if not isinstance(output, tuple) or len(output) != 2:
            return f"{_what(output)}; expected the pair (x, memory). Did the step forget its memory?"
        output = output[0]
    return _shape(output, tuple(expected.get("shape") or "bcfhw"))


def _shape(x, want):
    """Is x a floating tensor of this shape, where letters stand for any size from 1 on?"""
    asked = f"expected a floating tensor [{', '.join(map(str, want))}]."
    if not torch.is_tensor(x):
        return f"{_what(x)}; {asked}" + (" Did it forget to return?" if x is None else "")
    fits = x.ndim == len(want) and all(
        got == size if isinstance(size, int) else got > 0 for got, size in zip(x.shape, want)
    )
    return "" if fits and x.is_floating_point() else f"{_what(x)}; {asked}"


def _what(x):
    if torch.is_tensor(x):
        return f"a tensor {list(x.shape)} of {str(x.dtype).removeprefix('torch.')}"
    return "None" if x is None else f"a {type(x).__name__}"
