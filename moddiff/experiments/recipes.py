"""How is a pipeline made again, from words alone?  What each of its parts was made from, as JSON.

A part that `moddiff.load` made, or that came by its name, says where it came from (`roles.origin`). What
extensions did to it is a list of calls, as in a profile. Anything else, such as an object of your own, has
no words that make it: `lost` then says what it was.
"""

import os
from dataclasses import fields, is_dataclass
from pathlib import Path

import torch

from ..contracts import device_of, name_of
from ..extensions.promises import Extension
from ..pipeline import ROLES, Pipeline
from ..remote.components import connect
from ..roles import apply, component_for, get, names, origin
from ..weights import load


def recipe(pipe):
    """How a pipeline is made again.   -> {"name", "task", "defaults", "negative", "parts": {role: ...}}"""
    about = {name: plain(getattr(pipe, name)) for name in ("name", "task", "defaults", "negative")}
    there = {role: part for role, part in pipe.components.items() if part is not None}
    return about | {"parts": {role: part_recipe(role, part) for role, part in there.items()}}


def part_recipe(role, part):
    """How one component is made again.

    -> {"shown", "device", "from": where the bare component came from, "calls": the extensions, the innermost
       first, "lost": why it cannot be made, or None}
    """
    found = {"shown": shown(part), "device": str(device_of(part)), "from": None, "calls": [], "lost": None}
    while found["from"] is None and part is not None:
        found["from"] = plain(origin(part))
        if found["from"] is None and isinstance(part, Extension):
            found["calls"].insert(0, _call(part))
            part = part.wraps
        elif found["from"] is None:
            found["lost"] = f"the {role} component, {name_of(part)}, is an object that was made by hand"
            return found
    if odd := [call for call in found["calls"] if objects_in(call)]:
        found["lost"] = f"the {role} component was made by {odd[0][0]} with what is not written in JSON"
    elif odd := [call[0] for call in found["calls"] if call[0] not in names("extension")]:
        found["lost"] = f"the extension {odd[0]} of the {role} component has no registered name"
    return found


def shown(part):
    return repr(part) if isinstance(part, Extension) else name_of(part)


def _call(part):
    """[name, argument, ..., {options}] of an extension, as `roles.apply` takes it."""
    name, args, how = part.call
    return [name, *map(plain, args), {key: plain(value) for key, value in how.items()}]


# ---- values ---------------------------------------------------------------------------------------------


def plain(value):
    """A value as JSON holds it. An object becomes {"object": its repr}, from which none can be made again."""
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str | Path):
        path = os.path.abspath(os.path.expanduser(value))
        return path if isinstance(value, Path) or (os.sep in value and os.path.exists(path)) else value
    if isinstance(value, torch.device | torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    return _from_registry(value) or {"object": repr(value)}


def _from_registry(value):
    """A solver or a guide with a few settings, UniPC(order=3), by its registered name; None for others."""
    if not is_dataclass(value):
        return None
    for role in ("solver", "guide"):
        for name in names(role):
            if get(role, name) is type(value):
                return {"role": role, "named": name, "with": _changed(value)}
    return None


def _changed(value):
    """{field: what it was set to} of a dataclass, where that is not its default."""
    changed = {}
    for field in fields(value):
        setting = getattr(value, field.name)
        # What a guide remembers of a run, and a method of its own in a field (APG), are made with it.
        if not field.init or getattr(setting, "__self__", None) is value:
            continue
        if plain(setting) != plain(field.default):
            changed[field.name] = plain(setting)
    return changed


def objects_in(words):
    """What of a value that `plain` has written down cannot be made again; "" where all can."""
    if isinstance(words, dict) and "object" in words:
        return words["object"]
    inside = words.values() if isinstance(words, dict) else words if isinstance(words, list) else ()
    return ", ".join(filter(None, map(objects_in, inside)))


def value_of(words):
    """The value that `plain` has written down; lists as tuples."""
    if isinstance(words, dict) and "named" in words:
        options = {key: value_of(item) for key, item in words["with"].items()}
        return get(words["role"], words["named"])(**options)
    if isinstance(words, dict):
        return {key: value_of(item) for key, item in words.items()}
    # JSON has lists alone. Whatever it was, a tuple comes back, which every setting takes.
    return tuple(map(value_of, words)) if isinstance(words, list) else words


# ---- making it again ------------------------------------------------------------------------------------


def lost(found):
    """Why a pipeline cannot be made again from its recipe, one reason a part; [] where it can."""
    return [part["lost"] for part in found["parts"].values() if part["lost"]]


def made(found):
    """The Pipeline of a recipe.

    Raises ValueError where it has none, and what `moddiff.load` and the extensions raise for files that have
    gone.
    """
    if why := lost(found):
        raise ValueError(f"this run cannot be made again: {'; '.join(why)}")
    wanted, parts, unknown = found["parts"], {}, None
    for role, part in wanted.items():
        if "named" in part["from"]:
            parts[role] = component_for(role, part["from"]["named"])
        if "remote" in part["from"]:
            url, timeout, cache = (part["from"][option] for option in ("remote", "timeout", "cache"))
            parts[role] = connect(url, role, timeout=timeout, cache=cache)
    # What came from one folder is loaded in one call, as it was.
    for where in dict.fromkeys(part["from"]["load"] for part in wanted.values() if "load" in part["from"]):
        of_it = {role: part["from"] for role, part in wanted.items() if part["from"].get("load") == where}
        every = {
            option: {role: said[option] for role, said in of_it.items() if said[option] is not None}
            for option in ("dtype", "device", "file")
        }
        tokenizer = next((said["tokenizer"] for said in of_it.values() if said["tokenizer"]), None)
        # What comes from elsewhere is given, so that it is not read from here.
        given = {role: part for role, part in parts.items() if role not in of_it} | every["file"]
        pipe = load(where, dtype=every["dtype"] or None, device=every["device"], tokenizer=tokenizer, **given)
        parts |= {role: pipe.components[role] for role in of_it}
        unknown = unknown or pipe.unknown
    parts = {role: apply(part, wanted[role]["calls"]) for role, part in parts.items()}
    about = {name: found[name] for name in ("name", "task", "negative")}
    absent = dict.fromkeys(set(ROLES) - set(parts))
    return Pipeline(**parts, **absent, **about, defaults=_as_tuples(found["defaults"]), unknown=unknown)


def _as_tuples(defaults):
    return {key: value_of(value) for key, value in defaults.items()}
