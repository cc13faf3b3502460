"""What shall I put there instead?  Edits for `patch`, aimed by axis name: `zero(heads=3)`.

Each is a function (x, where) -> x.  Its axes are names from the tap's layout ("b heads n d"), or the plain
words tokens (n) and words (m); the value is an index, a list, a range, a slice, or a tensor of indices or
booleans.
"""

import hashlib
import math

import torch

from .records import Record


def indices(which, size, what):
    """An index, list, range, slice or tensor as a tensor of indices on an axis of that size.

    Raises IndexError, naming `what`, if one lies outside or there is none, TypeError if it is nothing of
    the kind.
    """
    # A slice is clipped to the axis, as everywhere in Python; an index outside is an error further down.
    if isinstance(which, slice):
        which = torch.arange(size)[which]
    try:
        which = torch.as_tensor(list(which) if isinstance(which, (range, set, frozenset)) else which)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"{what}: {which!r} names no places on an axis; expected an index, or several"
        ) from None
    # They may come from a GPU, and are looked at one by one.
    which = which.cpu().reshape(-1)
    if which.dtype == torch.bool:
        if len(which) != size:
            raise IndexError(
                f"{what}: a mask of {len(which)} for an axis of {size}; give one boolean for each"
            )
        which = which.nonzero()[:, 0]
    if which.is_floating_point() or not len(which):
        raise IndexError(f"{what}: expected whole numbers from 0 to {size - 1}, got {which.tolist()}")
    if outside := [i for i in which.tolist() if not -size <= i < size]:
        raise IndexError(f"{what}: no {outside[0]}; this axis has {size}, 0 to {size - 1}")
    # -1 is the last one, as in Python.
    return which.long() % size


class Edit:
    """new(x, where) in place of x, on the part that `axes` names; the rest of x stays bit for bit.

    made   the function below that made it, and its arguments: with `axes` all it takes to make it again
    """

    def __init__(self, name, new, axes, made=()):
        self.name, self.new, self.axes, self.made = name, new, axes, made

    def check(self, where):
        """Raise before any run if the tap lacks an axis."""
        if where.layout == "function":
            raise ValueError(
                f"{self} cannot edit {where}: it is a function; "
                "use replace_attend, or your own f(attend, q, k, v, where)"
            )
        for axis in self.axes:
            where.axis(axis)

    def __call__(self, x, where):
        # Booleans that broadcast against x: heads=3 with tokens=[5, 6] means these tokens of that head.
        part = torch.ones((), dtype=torch.bool, device=x.device)
        for axis, which in self.axes.items():
            dim = where.axis(axis)
            here = torch.zeros(x.shape[dim], dtype=torch.bool)
            here[indices(which, x.shape[dim], f"{self} at {where} ({where.layout}), axis {axis}")] = True
            part = part & here.to(x.device).view([-1 if i == dim else 1 for i in range(x.ndim)])
        # `new` is made from all of x, since the size of noise, or a mean, is that of the whole.
        return torch.where(part, self.new(x, where), x)

    def __repr__(self):
        axes = ", ".join(f"{axis}={which!r}" for axis, which in self.axes.items())
        return f"{self.name}({axes})"


def identity(x, where):
    """x as it is: the baseline of every patch, since editing scores or probs also changes the kernel."""
    return x


def zero(**axes):
    """Zeros: `zero(heads=3)`.  Off the distribution the model knows; see `mean_over`."""
    return Edit("zero", lambda x, where: torch.zeros_like(x), axes, (zero,))


def scale_by(factor, **axes):
    """factor * x."""
    check_number("scale_by(factor)", factor)
    return Edit(f"scale_by {factor:g}", lambda x, where: x * factor, axes, (scale_by, factor))


def mean_over(*names, **axes):
    """The mean over the named axes, for all alike: `mean_over("tokens", heads=3)`.

    Removes what differs, keeps the level.
    """
    if not names:
        raise ValueError('mean_over needs the axes to average, such as mean_over("tokens", heads=3)')

    def new(x, where):
        return x.mean([where.axis(name) for name in names], keepdim=True).expand_as(x)

    return Edit(f"mean_over {' '.join(names)}", new, axes, (mean_over, *names))


def check_number(what, value):
    if not hasattr(value, "__float__"):
        raise TypeError(f"{what} is {value!r}; expected a number")


def noise(scale=1.0, seed=0, **axes):
    """Gaussian noise with the root mean square of x, times scale: the control that should not help.

    The same (seed, name, step, branch) gives the same noise, in whatever order the run comes by.
    """
    check_number("noise(scale)", scale)

    def new(x, where):
        # Made from the address, not drawn in turn: the noise here is the same with one patch more elsewhere.
        key = f"{seed} {where} {where.step} {where.branch} {where.call}".encode()
        source = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key).digest()[:7], "big"))
        # Drawn on the CPU: a GPU's generator gives other numbers for the same seed.
        drawn = torch.randn(x.shape, generator=source).to(x)
        # Squares are summed in float32, since float16 overflows at 65504.
        return drawn * (scale * x.float().pow(2).mean().sqrt()).to(x.dtype)

    return Edit(f"noise {scale:g}", new, axes, (noise, scale, seed))


def transplant(record, **axes):
    """What another run had here: `transplant(A)`, or a part of it, `transplant(A, tokens=pipe.region(box))`.

    Pairs by name, step and branch.  LookupError if the record lacks that; ValueError if shapes or noise
    levels differ.
    """
    if not isinstance(record, Record):
        raise TypeError(f"transplant of {type(record).__name__}: expected the Record that a capture gave")

    def new(x, where):
        there, value = record.counterpart(where)
        if value.shape != x.shape:
            raise ValueError(
                f"transplant at {where}: {list(value.shape)} was captured, "
                f"{list(x.shape)} runs here ({where.layout}); "
                "both runs need the same size, and a capture without heads=, rows= or reduce="
            )
        # A loop that announces no noise level leaves None, and nothing to compare.
        levels = there.sigma, where.sigma
        if None not in levels and not math.isclose(*levels, rel_tol=1e-4, abs_tol=1e-6):
            raise ValueError(
                f"transplant at {where}, step {where.step}: captured at sigma {there.sigma:.4f}, "
                f"running at {where.sigma:.4f}; both runs need the same steps, shift and solver"
            )
        return value.to(x)

    return Edit("transplant", new, axes, (transplant, record))


def replace_attend(attend):
    """Your own attention (q, k, v) -> heads in the place of the model's.

    `patch(dit, "blocks.3.self_attn.attend", replace_attend(f))`
    """
    if not callable(attend):
        raise TypeError(f"replace_attend of {type(attend).__name__}: expected a function (q, k, v) -> heads")

    # A patch of something that is called gets the model's own first; here it is not wanted.
    def function(original, q, k, v, where):
        return attend(q, k, v)

    return function
