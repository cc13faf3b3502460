"""What does every extension promise, and what keeps the promises for it?

An extension is a function from a component to a component of the same role. Anybody's function will do: it
needs nothing of this file. Those that come with the package are written so, and get the promises for it:

    @extension
    def halved(part, skip=()):
        expect("dit", part, "halved")               # an error at the call, not in the middle of a run
        rows = []
        for path, layer in layers(part).items():    # by the names that taps have, through any stack
            ...                                     # change it: `part` is a twin, whose modules are yours
            rows.append({"layer": path, ...})
        return Extension(part, exact=False, rows=rows)

1. **What came in is unchanged.** `@extension` gives the function a twin: other modules over the same tensors.
   Exchange its layers and their forwards as you like; write into no tensor. (`new.shares` says that they are
   shared: who trains one trains the other.) Stacks are copied, so hold modules as attributes, or as bound
   methods, never in closures: a copied closure would go on with the old ones.
2. **Taps keep their names**, since `wraps` adds nothing to a path. What an Extension does not have itself is
   asked of the component inside, so that it plays the same role: `prepare`, `encode`, `config`, `blocks`.
   For another behaviour, subclass it and write the method: `forward`, `decode`.
3. `exact`: True, and tests demand equality; False, and they demand a committed curve.
4. **State belongs to a run.** `memory = Memory()` as an attribute; `memory.here()` is a dict that starts
   empty with each run and is kept apart per branch, expert and window. Nothing is ever remembered for a call
   that does not say its step. `memory.note(step=3, skipped=True)` adds a row to the report of the run.
5. `report()`: `rows`, those of the making and the notes of the last run. Override it for others.
6. `repr` reads as the call that made it. `@extension` sees to that.
7. It composes: `tests/test_composition.py` tries each pair. What cannot work raises ValueError at the call.

A row in `roles.BUILT_IN["extension"]` gives it a name for `apply`, and one in tests/test_extensions.py its
promises a test.
"""

import functools
import inspect
import operator
from copy import deepcopy
from pathlib import Path

import torch
from torch import nn

from ..attention import use_kernel
from ..contracts import METHODS, ContractError
from ..hooks import Memory, walk, wrapped
from ..hooks.records import HasTable, Table


class Extension(nn.Module):
    """A component around a component, which does what that one does unless a subclass says otherwise.

    wraps   the component inside, a twin of the one that came in
    exact   does it compute what the component inside computes?
    rows    of the report: dicts, what was done when it was made
    shares  are tensors of the component that came in also its own?  True unless a subclass copies them all
    """

    shares = True

    def __init__(self, wraps, exact, rows=()):
        super().__init__()
        self.wraps, self.exact, self.rows = wraps, exact, list(rows)
        self.call = type(self).__name__.lower(), (), {}  # name, arguments and options; see `extension`
        self.memory = Memory()
        # The names of weights stay, too: `wraps.` is not in them.
        self.register_state_dict_post_hook(_rename_out)
        self.register_load_state_dict_pre_hook(_rename_in)

    def forward(self, *inputs, **options):
        return self.wraps(*inputs, **options)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Python's own questions, such as __deepcopy__, are about this object and no other.
            if name == "wraps" or name.startswith("__"):
                raise
        return getattr(self.wraps, name)

    def use_kernel(self, kernel):
        """As DiT.use_kernel, for all that is inside.   -> self"""
        return use_kernel(self, kernel)

    def holds(self):
        """Bytes of weights.   -> (at most where it computes, waiting in the main memory)"""
        return self.wraps.holds() if isinstance(self.wraps, Extension) else (nbytes(self.wraps), 0)

    def at_once(self, size):
        """The largest picture that is computed in one piece.   (height, width) in pixels -> the same"""
        return self.wraps.at_once(size) if isinstance(self.wraps, Extension) else size

    def frames_at_once(self, frames):
        """How a step goes over a film.   latent frames -> (calls of the component, latent frames of each)"""
        return self.wraps.frames_at_once(frames) if isinstance(self.wraps, Extension) else (1, frames)

    def report(self):
        """What was done when it was made, and in the last run.   -> Report"""
        return Report([*self.rows, *self.memory.notes], self.in_words())

    def in_words(self):
        """The call that made it and whether it is exact, for the foot of a report."""
        shared = "; its tensors are also those of the component it was made from" if self.shares else ""
        return f"{self!r}, {'exact' if self.exact else 'approximate'}{shared}"

    def __repr__(self):
        name, args, how = self.call
        inside = repr(self.wraps) if isinstance(self.wraps, Extension) else type(self.wraps).__name__
        said = [inside, *map(_said, args), *(f"{key}={_said(value)}" for key, value in how.items())]
        return f"{name}({', '.join(said)})"


class Report(HasTable):
    """Rows, dicts, shown as a table; `report.rows` is the list."""

    def __init__(self, rows, caption=""):
        self.rows, self.caption = rows, caption

    def table(self):
        headings = list(dict.fromkeys(key for row in self.rows for key in row))
        lines = [tuple(_shown(row.get(heading, "")) for heading in headings) for row in self.rows]
        return Table(headings, lines, self.caption)

    def __len__(self):
        return len(self.rows)

    def __iter__(self):
        return iter(self.rows)


# ---- making one -----------------------------------------------------------------------------------------


def extension(function):
    """Let a function (component, ...) -> Extension keep the promises above: what decorates each of ours."""

    @functools.wraps(function)
    def made(part, *args, **how):
        inspect.signature(function).bind(part, *args, **how)  # a misspelt option is the caller's TypeError
        expect(None, part, function.__name__)
        new = function(twin(part), *args, **how)
        new.call = function.__name__, args, how
        return new

    return made


def twin(part):
    """Other modules over the same tensors: what is changed in one is not changed in the other.

    The parameters are other objects over the same memory: a twin that moves to a GPU, or begins to ask for
    gradients, goes alone. Taps and memories start empty. A component without modules is returned as it is.
    """
    modules = [inside for _, inside in walk(part) if isinstance(inside, nn.Module)]
    memo = {}  # what a deepcopy finds in here, it takes for the copy
    for module in modules:
        held = [*module._parameters.values(), *module._buffers.values(), *vars(module).values()]
        memo |= {id(value): _same_memory(value) for value in held if torch.is_tensor(value)}
    return deepcopy(part, memo) if modules else part


def _same_memory(tensor):
    other = tensor.detach()
    return nn.Parameter(other, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else other


def expect(role, part, name):
    """Raise ContractError unless `part` can play this role (None: any), for the extension of that name."""
    if isinstance(getattr(part, "components", None), dict):  # a whole pipeline, the natural slip
        raise ContractError(
            f"{name} takes one component, and a {type(part).__name__} arrived: "
            f"pipe.replace(dit={name}(pipe.dit, ...))"
        )
    if isinstance(part, type):
        raise ContractError(
            f"{name} takes a component, and the class {part.__name__} arrived; make one first"
        )
    roles = {role for role, methods in METHODS.items() if all(callable(_method(part, m)) for m in methods)}
    roles = set() if isinstance(part, str) else roles  # text "encodes", too
    # Whatever else a component can do, one that encodes is no dit: any module can be called.
    roles -= {"dit", "guide", "rewrite"} if roles & {"text", "vae", "image", "solver"} else set()
    if not roles or (role is not None and role not in roles):
        wanted = f"a {role} component ({', '.join(METHODS[role])})" if role else "a component"
        raise ContractError(f"{name} takes {wanted}; {type(part).__name__} arrived, which is none")


def whole_number(name, option, value, least=0, of=""):
    """An option of the extension `name` as a whole number.   of: what it counts.  Raises ValueError"""
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if number < least:
        counted = f" of {of}," if of else ""
        raise ValueError(f"{name}({option}={value!r}); expected a whole number{counted} from {least} on")
    return number


def _method(part, name):
    return getattr(part, name, None)


def layers(part, kind=nn.Linear):
    """{path: module} of all modules of a kind in a component, by the names taps have, through any stack."""
    return {path: module for path, module in walk(part) if isinstance(module, kind)}


def own(module):
    """The weights that a module itself holds, not those of its children."""
    held = [*module._parameters.values(), *module._buffers.values()]
    return [x for x in held if x is not None]


def tensors(part):
    """All weights in a component, each once."""
    held = [x for module in layers(part, nn.Module).values() for x in own(module)]
    return [*{id(x): x for x in held}.values()]


def nbytes(part):
    return sum(x.nbytes for x in tensors(part))


def stack(part):
    """The extensions around a component, the outermost first; [] for a bare one."""
    found = []
    while part is not None:
        found += [part] if isinstance(part, Extension) else []
        part = wrapped(part)
    return found


def bare(part):
    """The component inside all wrappers."""
    while (inside := wrapped(part)) is not None:
        part = inside
    return part


# ---- words ----------------------------------------------------------------------------------------------


def _said(value):
    """An argument as one would write it; of what has a long repr, its name."""
    if inspect.isfunction(value) or isinstance(value, type):
        return value.__name__
    if isinstance(value, Path):
        return repr(value.name)
    if torch.is_tensor(value) or (isinstance(value, nn.Module) and not isinstance(value, Extension)):
        return type(value).__name__
    return repr(value)


def _shown(value):
    return f"{value:.4g}" if isinstance(value, float) else value


def _rename_out(module, state, prefix, _):
    _rename(state, prefix + "wraps.", prefix)


def _rename_in(module, state, prefix, *_):
    _rename(state, prefix, prefix + "wraps.")


def _rename(state, old, new):
    """Exchange the beginning of names, in place and in order, as torch wants it."""
    for name in list(state):
        if name.startswith(old):
            state[new + name.removeprefix(old)] = state.pop(name)
