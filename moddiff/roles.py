"""What may be swapped for what?  A registry of the components that can play each role, by name.

The roles, and what each promises, are in contracts.py. Pass a component to the pipeline, or register it under
a name so that others can ask for it. Extensions, functions from a component to one of the same role, have
names here too, beside the roles: "extension" stands where a role stands.
"""

import functools
import inspect
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import entry_points
from types import FunctionType

from .contracts import (
    METHODS,
    ROLES,
    ContractError,
    Denoiser,
    Guide,
    ImageEncoder,
    PromptRewriter,
    Solver,
    TextEncoder,
    VideoCodec,
    check_component,
    checked,
    device_of,
    fact,
    known_role,
    name_of,
)

# Where components are looked for, their roles and checks are found, too.
__all__ = [
    "METHODS",
    "ROLES",
    "ContractError",
    "Denoiser",
    "Guide",
    "ImageEncoder",
    "PromptRewriter",
    "Solver",
    "TextEncoder",
    "VideoCodec",
    "apply",
    "came_from",
    "check_component",
    "checked",
    "component_for",
    "device_of",
    "fact",
    "get",
    "names",
    "origin",
    "register",
]
GROUP = "moddiff.components"  # the entry point group; an entry is named "role.name", as in "text.my-encoder"
EXTENSIONS = "moddiff.extensions"  # the group of extensions, whose entries have just a name
BESIDE = "extension", "store"  # what has names, too, and is no component
# What comes with the package, imported when asked for. Models have weights: `moddiff.load` makes those.
BUILT_IN = {role: {} for role in ROLES} | {
    "solver": {
        "euler": "moddiff.solvers:Euler",
        "dpm++": "moddiff.solvers:DPMSolverPP",
        "unipc": "moddiff.solvers:UniPC",
    },
    "guide": {
        "cfg": "moddiff.guidance:CFG",
        "cfg-zero": "moddiff.guidance:CFGZero",
        "apg": "moddiff.guidance:APG",
        "skip-layer": "moddiff.guidance:SkipLayer",
        "nag": "moddiff.guidance:NAG",
    },
    "extension": {
        "adapted": "moddiff.extensions:adapted",
        "compiled": "moddiff.extensions:compiled",
        "causal": "moddiff.extensions:causal",
        "cached": "moddiff.extensions:cached",
        "offloaded": "moddiff.extensions:offloaded",
        "parallel": "moddiff.extensions:parallel",
        "quantized": "moddiff.extensions:quantized",
        "sparse": "moddiff.extensions:sparse",
        "tiled": "moddiff.extensions:tiled",
        "windowed": "moddiff.extensions:windowed",
    },
    # Where runs are kept, by what made the file: a class that takes its path. See `Pipeline.__call__`.
    "store": {"sqlite": "moddiff.experiments:Store"},
}
_registered = {role: {} for role in BUILT_IN}


def register(role, name, component=None):
    """Make a component, or what makes one, available by name.

        moddiff.register("text", "my-encoder", MyEncoder)
        @moddiff.register("text", "my-encoder")  # above its class
        moddiff.register("extension", "halved", halved)  # a function from a component to a component

    Registering the same function or class again (a cell run twice) replaces it; another one under a taken
    name is refused. A separate package does the same with an entry point of the group "moddiff.components",
    named "text.my-encoder", or for an extension of the group "moddiff.extensions", named "halved".

    Raises ValueError for an unknown role or a name that is taken.
    """
    _known(role)
    if component is None:
        # Called with two arguments it stands above a class, and this is what takes the class.
        return lambda component: register(role, name, component)
    taken = _registered[role].get(name) or BUILT_IN[role].get(name)
    if taken is None and (entries := _installed(role).get(name)):
        raise ValueError(
            f"there already is {_article(role)} {name!r}, of the installed package {_package(entries[0])}; "
            f"choose another name for {name_of(component)}"
        )
    if taken is not None and _identity(taken) != _identity(component):
        raise ValueError(
            f"there already is {_article(role)} {name!r}, {name_of(taken)}; choose another name for "
            f"{name_of(component)}"
        )
    _registered[role][name] = component
    return component


def get(role, name):
    """What was registered under a name: by `register`, by an installed package, or with this one.

    Raises ValueError for an unknown role or name; ContractError for an entry of an installed package that
    cannot be imported, that is no function where an extension is one, or whose name somebody else has.
    """
    _known(role)
    if name in _registered[role]:
        return _registered[role][name]
    if name in BUILT_IN[role]:
        # Looking through all that is installed takes 20 ms, and each run asks for its solver: once is enough.
        entries = _installed(role, _first_look).get(name)
        if entries:
            raise ContractError(
                f"the installed package {_package(entries[0])} brings {_article(role)} {name!r}, which is "
                "ours; update or remove that package"
            )
        module, attribute = BUILT_IN[role][name].split(":")
        return getattr(import_module(module), attribute)
    entries = _installed(role).get(name)
    if not entries:
        near = get_close_matches(str(name), names(role), 1)
        raise ValueError(
            f"there is no {_what(role)} {name!r}"
            + (f"; did you mean {near[0]!r}?" if near else ";")
            + f" there are: {', '.join(names(role)) or 'none'}. "
            + f"Pass the {_what(role).split()[-1]} itself, or give it this name: "
            + f"moddiff.register({role!r}, {name!r}, ...)"
            + _of_no_role(name)
        )
    if len(entries) > 1:
        raise ContractError(
            f"the installed packages {' and '.join(map(_package, entries))} both bring {_article(role)} "
            f"{name!r}; remove one of them"
        )
    return _loaded(role, name, entries[0])


def _loaded(role, name, entry):
    """What an entry point of an installed package stands for."""
    whose = f"the {_what(role)} {name!r} of the installed package {_package(entry)}"
    try:
        found = entry.load()
    except (ImportError, AttributeError, SyntaxError) as error:
        raise ContractError(
            f"{whose} cannot be imported: {error}. Its entry point is {entry.value}; update or remove that "
            "package"
        ) from error
    if role == "extension" and not callable(found):
        kind = type(found).__name__
        raise ContractError(f"{whose} is a {kind}; expected a function from a component to a component")
    return found


def names(role):
    """All names known for a role."""
    _known(role)
    return sorted({*_registered[role], *BUILT_IN[role], *_installed(role)})


def _known(role):
    if role not in BESIDE:
        known_role(role)


def _what(role):
    return role if role in BESIDE else f"{role} component"


def _article(role):
    return f"{'an' if role == 'extension' else 'a'} {_what(role)}"


def _installed(role, look=None):
    """{name: entries} of installed packages; more than one only where their packages differ."""
    found = {}
    group, prefix = (EXTENSIONS, "") if role == "extension" else (GROUP, role + ".")
    for entry in entry_points(group=group) if look is None else look(entry_points, group):
        if entry.name.startswith(prefix):
            same = found.setdefault(entry.name.removeprefix(prefix), [])
            # A package that is on the path twice is one package.
            if not any((_package(one), one.value) == (_package(entry), entry.value) for one in same):
                same.append(entry)
    return found


@functools.cache
def _first_look(read, group):
    return read(group=group)


def _package(entry):
    # An entry point that was put together by hand, as in a test, belongs to no distribution.
    return entry.dist.name if entry.dist else "?"


def _of_no_role(name):
    """Words on entries of that name whose role there is not."""
    odd = [entry for entry in entry_points(group=GROUP) if entry.name.partition(".")[0] not in BUILT_IN]
    odd = [entry for entry in odd if entry.name.partition(".")[2] == name]
    said = [f"; the installed package {_package(entry)} has {entry.name}, which is no role" for entry in odd]
    return "".join(said)


def _identity(component):
    if isinstance(component, str):
        return component
    # A cell that is run twice makes a new class of the same name, which is taken for the same one.
    # What has no name of its own, an instance, is only itself.
    return getattr(component, "__module__", None), getattr(component, "__qualname__", id(component))


def component_for(role, part):
    """The component to use: `part` itself, or the one that its name stands for.

    part  a component; or a name, whose entry is a component, or a class or function that makes one without
          arguments

    Raises ValueError for an unknown name, or one whose entry needs arguments; ContractError for what cannot
    play the role.
    """
    if not isinstance(part, str):
        return check_component(role, part)
    try:
        return came_from(check_component(role, _named(role, part)), named=part)
    except ContractError as error:
        entries = _installed(role).get(part, [])
        if len(entries) != 1 or part in _registered[role] or part in str(error):
            raise
        whose = f"It is {part!r} of the installed package {_package(entries[0])}"
        raise ContractError(f"{error}. {whose}; update or remove that package") from error


def came_from(part, **words):
    """Write on a component the words that make it again, for `origin`.   -> the component"""
    try:
        vars(part)["_origin"] = words  # past whatever forbids setting it, as a frozen dataclass does
    except TypeError:
        pass  # it has no place for a note, and so it is taken for one made by hand
    return part


def origin(part):
    """The words that make a component again: {"load": where, ...}, {"named": name}, {"remote": url, ...};
    None: it was made by hand."""
    return getattr(part, "__dict__", {}).get("_origin")


def apply(part, calls):
    """Extensions by name, in turn, as profiles list them: `apply(dit, [["quantized", "int8"], ["cached"]])`.

    calls  of each the name and its arguments; the last, if it is a dict, holds the options by name
    ->     the component

    Raises ValueError for a name that nobody registered, before anything is done.
    """
    for call in calls:
        if not isinstance(call, list | tuple) or not call or not isinstance(call[0], str):
            raise ValueError(
                f"{call!r} is no call of an extension; expected [name, argument, ..., {{options}}]"
            )
    functions = [get("extension", name) for name, *_ in calls]
    for function, (_, *args) in zip(functions, calls):
        how = args.pop() if args and isinstance(args[-1], dict) else {}
        part = function(part, *args, **how)
    return part


def _named(role, name):
    """The component of that name, made where a class or a function without arguments stands for it."""
    entry = get(role, name)
    # An instance is ready, even one that can be called: a dit is called with a latent, not to be made.
    if not isinstance(entry, type | FunctionType):
        return entry
    needed = [
        p.name
        for p in inspect.signature(entry).parameters.values()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if not needed:
        return entry()
    if isinstance(entry, FunctionType):
        return entry  # itself a dit, a guide or a rewriter, whose method is the call
    raise ValueError(
        f"the {role} component {name!r} is made from {', '.join(needed)}, which a name does not say; "
        f"make it and pass it: {role}={entry.__name__}(...)"
    )
