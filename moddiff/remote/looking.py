"""How does one look inside a model that runs elsewhere?  Captures and edits go there as data, values come.

The component at this end has the taps of the one at the other, under the same names. A session goes onto them
as anywhere. At each call it is written down, as far as it asks for this moment, and opened again over there,
on the model itself; what it saw comes back and is put on record here. Of patches only the declared edits
(`hooks.zero`, `scale_by`, `mean_over`, `noise`, `transplant`, `identity`) can be written down: a function is
code, and code does not travel.
"""

from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from torch import nn

from ..hooks import Edit, Record, Taps, at, capture, edits, identity, open_sessions, patch
from ..hooks.tap import points
from .wire import Malformed, brief, names

# Those that are made from numbers alone. A transplant has a value with it, and identity has nothing.
EDITS = {edit.__name__: edit for edit in (edits.zero, edits.scale_by, edits.mean_over, edits.noise)}
INSIDE = "expert", "window"  # coordinates that the model at the other end says itself


# ---- this end: taps, and who looks at them ---------------------------------------------------------------


class TapsElsewhere(Taps):
    """The taps of a module that runs elsewhere.   path: the name of that module there

    No value ever passes through them. Sessions are hung onto them, as onto any, and `written` finds them.
    """

    def __init__(self, path, layouts):
        super().__init__(**layouts)
        self.path = path

    def __getstate__(self):
        return super().__getstate__() | {"path": self.path}

    def admit(self, session, where):
        if isinstance(session, patch):
            _made(session)
        elif not isinstance(session, capture):
            raise TypeError(f"{session} cannot look at {where}, which runs elsewhere; capture and patch can")
        elif session.grad or callable(session.reduce):
            raise TypeError(
                f"{session} at {where}, which runs elsewhere: gradients and functions do not travel; leave "
                'out grad=, and give reduce= an axis such as "heads", or load the component here'
            )


class Mirror(nn.Module):
    """A module that runs elsewhere, as far as it can be seen: its taps, and those inside it."""

    def __init__(self, tap):
        super().__init__()
        self.tap = tap


def hang_taps(root, told):
    """Give a component the taps that the other end told, {path: {name: layout}}.   -> [TapsElsewhere]"""
    root.tap = TapsElsewhere("", told.get("", {}))
    made, every = {"": root}, [root.tap]
    # The shallow ones first, so that a module is there before those inside it.
    # What is above comes first: "" is the component itself, then one name, then two.
    for path in sorted(told, key=lambda path: path.count(".") + bool(path)):
        pieces = path.split(".") if path else []
        for depth in range(1, len(pieces) + 1):
            here, above = ".".join(pieces[:depth]), ".".join(pieces[: depth - 1])
            if here in made:
                continue
            if here in told:
                made[here] = Mirror(TapsElsewhere(here, told[here]))
                every.append(made[here].tap)
            else:
                made[here] = nn.ModuleDict()  # a list of modules, or one that shows nothing itself
            made[above].add_module(pieces[depth - 1], made[here])
    return every


def told_taps(part):
    """What a component shows, to be told to the other end.   -> {path: {name: layout}}"""
    found = {}
    for where in points(part):
        found.setdefault(where.path, {})[where.name] = where.layout
    return found


def written(taps, counting=True):
    """Who looks at these taps at this moment.   -> [(session, {name there: Where here}, spec)], tensors

    counting  tell those that ask for other moments that this one came by
    """
    # In the order in which they were opened: an edit acts on what the one before it left.
    mine, asked, tensors = set(map(id, taps)), [], {}
    if not any(tap.live for tap in taps):
        return asked, tensors
    for session in open_sessions():
        wanted = {}
        for where, tap in session.handles:
            if id(tap) in mine and session.locate(where) is not None:
                wanted[f"{tap.path}.{where.name}".strip(".")] = where
            elif id(tap) in mine and counting:
                session.meet(where)
        if wanted:
            spec = _written_patch if isinstance(session, patch) else _written_capture
            asked.append((session, wanted, spec(session, wanted, tensors, f"looks.{len(asked)}")))
    return asked, tensors


def _written_capture(session, wanted, tensors, prefix):
    # Of the bytes that it may keep, those that are left: over there it begins with none each time.
    left = None if session.limit is None else session.limit - session.record.bytes
    spec = {"kind": "capture", "taps": list(wanted), "reduce": session.reduce, "limit": left}
    spec["dtype"] = str(session.dtype).removeprefix("torch.") if session.dtype else None
    return spec | {name: _plain(getattr(session, name)) for name in ("heads", "rows")}


def _written_patch(session, wanted, tensors, prefix):
    maker, *how = _made(session)
    spec = {"kind": "patch", "edit": maker.__name__, "as": {}, "taps": list(wanted)}
    if maker is not identity:
        spec["axes"] = {axis: _plain(which) for axis, which in session.function.axes.items()}
    # Noise is made from the address of a value: that of this end goes along, and how many came before.
    for name, where in wanted.items():
        here = session.locate(where)
        spec["as"][name] = [where.path, session.calls[where, (here.step, here.branch)]]
        if maker is edits.transplant:
            # Only the one value that is due now travels, not the record that holds it.
            there, value = how[0].counterpart(replace(here, call=spec["as"][name][1]))
            tensors[f"{prefix}.{name}"] = value
            spec.setdefault("sigma", {})[name] = there.sigma
    return spec if maker is edits.transplant else spec | {"how": how}


def _made(session):
    """The maker of a patch's edit, and what it was given.   Raises TypeError for what does not travel."""
    function = session.function
    if function is identity:
        return (identity,)
    if isinstance(function, Edit) and function.made:
        maker, *how = function.made
        if maker is edits.transplant or all(isinstance(value, (int, float, str)) for value in how):
            return maker, *how
    raise TypeError(
        f"{session}: it runs elsewhere, and only the declared edits go there, with plain numbers: "
        f"{', '.join(EDITS)}, transplant, identity. {brief(function)} is code, which does not travel; load "
        "the component here to patch it by a function"
    )


def _plain(which):
    """An index, list, range, slice, mask or tensor as JSON has it."""
    if which is None or isinstance(which, int):
        return which
    if isinstance(which, slice):
        ends = which.start, which.stop, which.step
        return {"slice": [None if end is None else int(end) for end in ends]}
    return torch.as_tensor(which if torch.is_tensor(which) else list(which)).tolist()


def delivered(asked, visits, tensors):
    """Put on record here what was seen there.

    visits  [{"look": i, "tap": name, "layout", "shape", "at": {expert, window}, "value": name of a tensor}]
    """
    for visit in visits:
        session, wanted, _ = asked[visit["look"]]
        where = wanted[visit["tap"]]
        # Step and branch are known here; which expert or window it was, only the model can say.
        said = {name: value for name, value in visit["at"].items() if name in INSIDE and value is not None}
        with at(**said):
            if isinstance(session, patch):
                session.meet(where)
                continue
            for there, tap in session.handles:  # what `taps(pipe)` says of shapes
                if there is where:
                    tap.shapes[where.name] = tuple(visit["shape"])
            session.arrived(tensors[visit["value"]], where, visit["layout"])


# ---- the other end: the same sessions, on the model itself ------------------------------------------------


@contextmanager
def opened(part, looks, tensors):
    """Open what the other end wrote down.   -> a function that gives (visits, tensors) after the run

    Raises Malformed for what nobody of ours writes.
    """
    if not isinstance(looks, list):
        raise Malformed(f"looks is {brief(looks)}; expected a list")
    seen = []  # (look, Where, value or None), in the order of the run
    with ExitStack() as stack:
        captures = []
        for i, spec in enumerate(looks):
            if not isinstance(spec, dict) or spec.get("kind") not in ("capture", "patch"):
                raise Malformed(f"a look is {brief(spec)}; expected a capture or a patch")
            for session in _sessions(part, i, spec, tensors, seen):
                record = session.__enter__()
                # Closed without asking what never fired: the end that opened it here asks that.
                stack.callback(session.close)
                if isinstance(record, Record):
                    captures.append((i, record))
        yield lambda: _seen(part, seen, captures)


def _sessions(part, i, spec, tensors, seen):
    taps = names(spec.get("taps"), "taps")
    if spec["kind"] == "capture":
        how = {name: _index(spec.get(name)) for name in ("heads", "rows")}
        dtype = spec.get("dtype")
        how["dtype"] = None if dtype is None else getattr(torch, str(dtype), None)
        if dtype is not None and not isinstance(how["dtype"], torch.dtype):
            raise Malformed(f"dtype is {brief(dtype)}; expected the name of one of torch's")
        for name in ("reduce", "limit"):
            if not isinstance(value := spec.get(name), str | int | float | None):
                raise Malformed(f"{name} is {brief(value)}")
            how[name] = value
        yield capture(part, *taps, **how)
        return
    for name in taps:  # a session each, since each has its own address and count of calls
        yield patch(part, name, _again(i, name, spec, tensors, seen))


def _again(i, name, spec, tensors, seen):
    """The edit of one tap, made again, under the address that the value has at the other end."""
    try:
        path, calls = spec["as"][name]
        kind, axes = spec["edit"], {axis: _index(which) for axis, which in spec.get("axes", {}).items()}
        if kind == "transplant":
            sigma = spec["sigma"][name]
        elif kind != "identity":
            edit = EDITS[kind](*spec["how"], **axes)
        str.__str__(path), int.__index__(calls)  # a TypeError for anything else
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Malformed(f"the edit {brief(spec)} is none of the declared ones ({error})") from None

    def function(x, where):
        seen.append((i, where, None))
        here = replace(where, path=path, call=where.call + calls)
        if kind == "identity":
            return x
        if kind != "transplant":
            return edit(x, here)
        record = Record()
        record.add(replace(here, sigma=sigma), tensors[f"looks.{i}.{name}"])
        return edits.transplant(record, **axes)(x, here)

    return function


def _index(which):
    if isinstance(which, dict):
        ends = which.get("slice")
        if not isinstance(ends, list) or len(ends) != 3:
            raise Malformed(f"{brief(which)} is no slice")
        return slice(*ends)
    if not isinstance(which, int | list | None):
        raise Malformed(f"{brief(which)} is no index")
    return which


def _seen(part, seen, captures):
    """What the sessions saw, as `delivered` takes it.   -> visits, {name: tensor}"""
    visits, tensors = [_visit(i, where) for i, where, _ in seen], {}
    if not captures:
        return visits, tensors
    shapes = {str(where): tap.shapes.get(where.name, ()) for where, tap in points(part).items()}
    for i, record in captures:
        for where, value in record:
            name = f"seen.{len(tensors)}"
            tensors[name] = value
            visit = {"layout": where.layout, "shape": list(shapes[str(where)]), "value": name}
            visits.append(_visit(i, where) | visit)
    return visits, tensors


def _visit(i, where):
    return {"look": i, "tap": str(where), "at": {name: getattr(where, name) for name in INSIDE}}
