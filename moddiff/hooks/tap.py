"""What can be seen?  The named values that a module shows, and the search for them by name."""

import re
from difflib import get_close_matches
from fnmatch import fnmatchcase
from types import ModuleType

from torch import nn

from .where import Where


class UnknownTap(LookupError):
    """No tap has this name."""


class Taps:
    """The named values one module shows, each with its layout: `Taps(q="b heads n d", out="b n c")`.

    A plain object, no nn.Module: it holds no parameter, no child, and stays out of `print(model)`.  A layout
    names the axes; "function" is the layout of something that is called, through `call`.  A copy of a module
    starts with nobody looking.  What a session must answer when a tap asks it: see `Session`.
    """

    def __init__(self, **layouts):
        self.layouts, self.live = layouts, None  # live: name -> ((session, where), ...)
        self.shapes = {}  # name -> shape when a session last looked

    def __getstate__(self):
        return {"layouts": self.layouts, "live": None, "shapes": {}}

    def __call__(self, name, x):
        """x itself, unless a session looks at `name`."""
        live = self.live
        if live is None:
            return x
        for session, where in live.get(name, ()):
            self.shapes[name] = tuple(x.shape)
            x = session.visit(x, where)
        return x

    def call(self, name, function, *args):
        """function(*args), or what a session has put in its place, which returns a tensor alike."""
        live = self.live
        if live is None:
            return function(*args)
        for session, where in live.get(name, ()):
            function = session.wrap(function, where)
        return function(*args)

    def beside(self, name, shape, dtype, make):
        """Show a value the forward does not form: make(heads, rows) is called only if a session wants it."""
        for session, where in (self.live or {}).get(name, ()):
            self.shapes[name] = tuple(shape)
            session.glance(shape, dtype, make, where)

    def admit(self, session, where):
        """Raise, before any run, if such a session cannot look here.  Here each can."""

    def edited(self, *names):
        """Does an open session want to change one of these, here and now?"""
        live = self.live
        return live is not None and any(
            session.edits and session.locate(where) for n in names for session, where in live.get(n, ())
        )

    def watched(self, *names):
        """Does an open session look at one of these?"""
        live = self.live
        return live is not None and any(live.get(n) for n in names)


# which taps there are


def parts(obj):
    """(path, Taps) of all that is in a module, a pipeline, a wrapper, or any object that holds modules."""
    for path, part in walk(obj):
        # Of a module its own, since a compiled one passes on those of the module inside.
        tap = vars(part).get("tap") if isinstance(part, nn.Module) else getattr(part, "tap", None)
        if isinstance(tap, Taps):
            yield path, tap


def walk(obj, path=""):
    """(path, part) of an object and all that is in it.

    A wrapper adds nothing to the path: what it wraps keeps its names.
    """
    yield path, obj
    inner = wrapped(obj)
    for name, part in members(obj).items():
        yield from walk(part, path if part is inner else f"{path}.{name}".strip("."))


def members(obj):
    """{name: part}: a pipeline's `components`, a module's children, the modules of another object."""
    if isinstance(obj, nn.Module):
        held = obj._modules
    elif isinstance(getattr(obj, "components", None), dict):
        held = obj.components
    else:
        held = _held(obj, set())
    inner = wrapped(obj)
    if not any(part is inner for part in held.values()):
        held = {"wraps": inner} | held  # a property names it, or a module holds it as a plain attribute
    return {name: part for name, part in held.items() if part is not None}


LISTS = nn.ModuleList, nn.ModuleDict, nn.Sequential


def wrapped(obj, met=None):
    """The component inside a wrapper: what it calls `wraps`, or torch.compile `_orig_mod`.  Of others, None.

    One that says neither is a wrapper if it shows nothing, has no weight, and holds one part that is no
    list of modules. What an object passes on by __getattr__ is not its own.  `met`: see `_held`.
    """
    is_module = isinstance(obj, nn.Module)
    own, modules = getattr(obj, "__dict__", {}), obj._modules if is_module else {}
    if hasattr(type(obj), "wraps") or "wraps" in own or "wraps" in modules:
        return obj.wraps
    if "_orig_mod" in modules:
        return modules["_orig_mod"]
    shows = isinstance(own.get("tap"), Taps) or isinstance(own.get("components"), dict)
    weighs = is_module and (obj._parameters or obj._buffers)
    if shows or weighs or isinstance(obj, LISTS):  # more than a wrapper
        return None
    parts = list((modules if is_module else _held(obj, set() if met is None else met)).values())
    return parts[0] if len(parts) == 1 and not isinstance(parts[0], LISTS) else None


def _held(obj, met):
    """The modules, and wrappers of modules, among the attributes of a plain object; `met` ends circles."""
    if id(obj) in met or isinstance(obj, (type, ModuleType)):
        return {}
    met.add(id(obj))
    return {
        name: part
        for name, part in getattr(obj, "__dict__", {}).items()
        if isinstance(part, nn.Module) or wrapped(part, met) is not None
    }


def points(obj, pattern="*"):
    """{Where: Taps} of the taps whose full name matches; UnknownTap, with the nearest names, if none does."""
    every = {}
    for path, tap in parts(obj):
        block = next((int(piece) for piece in path.split(".") if piece.isdigit()), None)
        for name, layout in tap.layouts.items():
            every[Where(path, name, layout, block)] = tap
    matching = {where: tap for where, tap in every.items() if fnmatchcase(str(where), pattern)}
    if matching:
        return matching
    kind, first = type(obj).__name__, pattern.partition(".")[0]
    if not every:
        raise UnknownTap(
            f"{kind} declares no taps: it is no module or pipeline of moddiff, or it runs elsewhere; "
            "load the component locally, and let a wrapper say what it `wraps`"
        )
    if first in members(obj) and not any(str(where).startswith(first + ".") for where in every):
        raise UnknownTap(
            f"no taps in {first!r}: {type(members(obj)[first]).__name__} is a foreign or remote component; "
            "replace it by a local one of moddiff's"
        )
    names = {str(where) for where in every}
    near = get_close_matches(
        pattern, names | {re.sub(r"\b\d+\b", "*", name) for name in names}, n=3, cutoff=0.3
    )
    raise UnknownTap(
        f"no tap of {kind} matches {pattern!r}; the nearest are {', '.join(near or sorted(names)[:3])}; "
        "taps(obj) lists all"
    )
