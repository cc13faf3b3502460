"""What can be seen?  The named values that a module shows, and the search for them by name."""

import re
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn

from .where import Where


class UnknownTap(LookupError):
    """No tap has this name."""


class Taps:
    """The named values one module shows, each with its layout: `Taps(q="b heads n d", out="b n c")`.

    A plain object, no nn.Module: it holds no parameter, no child, and stays out of `print(model)`.  A layout names the axes;
    "function" is the layout of something that is called, through `call`.  A copy of a module starts with nobody looking.
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
        """function(*args), or what a session has put in its place: it too returns a tensor shaped like the first argument."""
        live = self.live
        if live is None:
            return function(*args)
        for session, where in live.get(name, ()):
            function = session.wrap(function, where)
        return function(*args)

    def beside(self, name, shape, dtype, make):
        """Show a value the forward itself does not form: make(heads, rows) is called only if a session wants it now."""
        for session, where in (self.live or {}).get(name, ()):
            self.shapes[name] = tuple(shape)
            session.glance(shape, dtype, make, where)

    def edited(self, *names):
        """Does an open session want to change one of these, here and now?"""
        live = self.live
        return live is not None and any(
            s.edits and s.locate(where) for n in names for s, where in live.get(n, ())
        )

    def watched(self, *names):
        """Does an open session look at one of these?"""
        live = self.live
        return live is not None and any(live.get(n) for n in names)


# which taps there are


def parts(obj, prefix=""):
    """(path, Taps) of everything in a module, a pipeline (its `components`) or any object that holds modules."""
    if isinstance(obj, nn.Module):
        for path, module in obj.named_modules(remove_duplicate=False):
            if isinstance(module.__dict__.get("tap"), Taps):
                yield (prefix + re.sub(r"\b_orig_mod\b\.?", "", path)).strip("."), module.tap
        return
    if isinstance(getattr(obj, "tap", None), Taps):
        yield prefix.strip("."), obj.tap
    for name, part in components(obj).items():
        yield from parts(part, f"{prefix}{name}.")


def components(obj):
    """The named parts of an object that is not a module itself."""
    if isinstance(getattr(obj, "components", None), dict):
        return {name: part for name, part in obj.components.items() if part is not None}
    if hasattr(obj, "named_parts"):
        return dict(obj.named_parts())
    return {name: part for name, part in getattr(obj, "__dict__", {}).items() if isinstance(part, nn.Module)}


def points(obj, pattern="*"):
    """{Where: Taps} of the taps whose full name matches; UnknownTap, with the nearest names, if none does."""
    every = {}
    for path, tap in parts(obj):
        block = next((int(piece) for piece in path.split(".") if piece.isdigit()), None)
        for name, layout in tap.layouts.items():
            every[Where(path, name, layout, block)] = tap
    found = {where: tap for where, tap in every.items() if fnmatchcase(str(where), pattern)}
    if found:
        return found
    kind = type(obj).__name__
    first = pattern.partition(".")[0]
    if not every:
        raise UnknownTap(
            f"{kind} declares no taps: it is no module or pipeline of moddiff, or it runs elsewhere; load the component locally"
        )
    if first in components(obj) and not any(str(where).startswith(first + ".") for where in every):
        foreign = type(components(obj)[first]).__name__
        raise UnknownTap(
            f"no taps in {first!r}: {foreign} is a foreign or remote component; replace it by a local one of moddiff's"
        )
    names = {str(where) for where in every}
    near = get_close_matches(
        pattern, names | {re.sub(r"\b\d+\b", "*", name) for name in names}, n=3, cutoff=0.3
    )
    raise UnknownTap(
        f"no tap of {kind} matches {pattern!r}; the nearest are {', '.join(near) or ', '.join(sorted(names)[:3])}; taps(obj) lists all"
    )
