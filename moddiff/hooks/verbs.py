"""What can I do with a tap?  `taps` lists them, `capture` reads, `patch` writes; nothing stays."""

from dataclasses import replace

import torch

from . import forecast
from .edits import Edit, indices
from .records import Record, Table, bytes_of, in_words, what_is
from .sessions import Finished, Session
from .tap import points


class OverLimit(MemoryError):
    """A capture would hold more than its limit."""


# Small letters, since one reads `with capture(...)` as a verb; what it gives is the Record.
class capture(Session):
    """Read: `with capture(dit, "blocks.*.cross_attn.probs", steps=[0, 5]) as seen:` gives a Record of copies.

    obj, patterns       a module or pipeline, and the full names of taps, with * for anything
    steps blocks branch which of them: one or several; one that is asked for and never met is a NeverFired
    heads rows          indices of the heads, of the query tokens; of scores and probs only these are formed
    reduce              an axis to average over, such as "heads", or a function, run before anything is moved
    dtype device        what to keep it as and where; values in [0, 1] fit torch.float16
    limit               OverLimit, instead of death, when more bytes than this would be held
    grad                keep the value itself, in the graph, so that metric.backward() gives it a `.grad`
    stop                leave the `with` block as soon as all that was asked for is there

    The output of the run is bit for bit what it is without; with grad=True and scores or probs, for which
    attention is then written out, up to rounding.

    grad=True needs a run with gradients, which `pipe(...)` is not: call the dit yourself, or it is a
    RuntimeError.  Frozen weights will do: the graph begins at the first captured value.

    stop=True waits for each tap, at each step and in each branch asked for (at one, where none is).  Without
    branch= the other branches of the last step are taken too, until a further step begins.  What the run
    would have returned is not there, nor is what the rest of the block would have done.
    """

    def __init__(
        self,
        obj,
        *patterns,
        steps=None,
        blocks=None,
        branch=None,
        heads=None,
        rows=None,
        reduce=None,
        dtype=None,
        device=None,
        limit="2 GB",
        grad=False,
        stop=False,
    ):
        super().__init__(obj, patterns or ("*",), steps, blocks, branch)
        self.heads, self.rows, self.reduce = heads, rows, reduce
        self.dtype, self.device, self.limit = dtype, device, bytes_of(limit)
        self.grad, self.stop = grad, stop
        self.edits = grad  # so that scores and probs are part of the run, and not computed beside it
        self._check_policy()

    def check(self, where):
        if where.layout == "function":
            raise ValueError(
                f"{where} is a function, there is nothing to capture; "
                "capture what goes in or comes out, or patch it"
            )
        # Before the run: a missing axis is then an error at the `with`, and not after minutes of denoising.
        for axis, is_needed in (
            ("heads", self.heads is not None),
            ("n", self.rows is not None),
            (self.reduce, isinstance(self.reduce, str)),
        ):
            if is_needed:
                where.axis(axis)

    def begin(self):
        self.record = Record()
        # None where no steps or branches were asked for: one value of each tap is then enough.
        moments = [(step, branch) for step in self.steps or [None] for branch in self.branches or [None]]
        self.awaited = {(where, *moment) for where in self.asked for moment in moments}
        self.last = None  # with stop: the visit after which only other branches of its step are of interest
        return self.record

    # what a tap asks

    def visit(self, x, where):
        here = self.meet(where)
        if here is None:
            return x
        if self.grad:
            kept = self.tracked(x, here)
            self.afford(kept.numel() * kept.itemsize, where, self.record.bytes)
            self.record.add(here, kept)
            x = kept.clone()  # so that nothing that the run writes into it reaches the record
        else:
            # Selected before it is copied, so that no more than the part is ever held.
            value = x.detach()
            for axis, kept in self.selection(where, x.shape).items():
                value = value.index_select(where.axis(axis), kept.to(x.device))
            # A function gets a clone, so that it may write into it.
            self.keep(value.clone() if callable(self.reduce) else value, here)
        self.settle(here, where)
        return x

    def glance(self, shape, dtype, make, where):
        here = self.meet(where)
        if here is None:
            return
        kept = self.selection(where, shape)
        sizes = [len(kept[axis]) if axis in kept else size for axis, size in zip(where.layout.split(), shape)]
        stored = dtype if self.reduce or self.dtype is None else self.dtype
        # With reduce= the whole value lives only until it is reduced, so it is measured on its own.
        held = self.record.bytes if self.reduce is None else 0
        self.afford(torch.Size(sizes).numel() * stored.itemsize, where, held)
        # Only now is it formed, and only its heads and rows.
        self.keep(make(kept.get("heads"), kept.get("n")), here)
        self.settle(here, where)

    def arrived(self, value, where, layout):
        """A value that came by elsewhere: already the part, the mean and the dtype that were asked for."""
        here = self.meet(where)
        if here is not None:
            self.afford(value.nbytes, where, self.record.bytes)
            self.record.add(replace(here, layout=layout), value.to(self.device or value.device))
            self.settle(here, where)

    def meet(self, where):
        here = super().meet(where)
        # Of the last step all branches were to be seen; something of another step means that it is over.
        if self.last is not None and self.mine() and (here is None or here.step != self.last.step):
            raise Finished(self)
        return here

    # what becomes of a value

    def selection(self, where, shape):
        """{axis: indices} of the heads and rows asked for."""
        return {
            axis: indices(which, shape[where.axis(axis)], f"capture of {where} ({where.layout}), {name}=")
            for axis, name, which in (("heads", "heads", self.heads), ("n", "rows", self.rows))
            if which is not None
        }

    def keep(self, value, where):
        """Put a copy on record, as reduce=, dtype= and device= have it."""
        if isinstance(self.reduce, str):
            value = value.mean(where.axis(self.reduce))
            axes = [axis for axis in where.layout.split() if axis != self.reduce]
            where = replace(where, layout=" ".join(axes))
        elif self.reduce is not None:
            value = self.reduce(value)
            if not isinstance(value, torch.Tensor):
                raise TypeError(
                    f"reduce= of the capture of {where} returned {type(value).__name__}; expected a tensor. "
                    "Did the function forget to return?"
                )
            # It may drop any axis, and which one is not known: no names are better than wrong ones.
            if value.ndim != len(where.layout.split()):
                where = replace(where, layout="")
        dtype = self.dtype if self.dtype and value.is_floating_point() else value.dtype
        self.afford(value.numel() * dtype.itemsize, where, self.record.bytes)
        self.record.add(where, value.to(device=self.device or value.device, dtype=dtype, copy=True))

    def afford(self, size, where, held):
        if self.limit is not None and held + size > self.limit:
            raise OverLimit(
                f"capture of {where} needs {in_words(size)} more on top of {in_words(held)}; "
                f"the limit is {in_words(self.limit)}. Ask for fewer steps=, blocks=, heads= or rows=, "
                "give reduce= or dtype=torch.float16, or raise limit="
            )

    def tracked(self, x, where):
        """x such that a gradient will reach it: it begins here, if it has not begun before."""
        if not torch.is_grad_enabled():
            raise RuntimeError(
                f"capture of {where} with grad=True: gradients are off here, "
                "as inside pipe(...) and torch.no_grad(); call the model yourself, under torch.enable_grad()"
            )
        if not x.is_floating_point():
            raise TypeError(
                f"capture of {where} with grad=True: it is {x.dtype}, and only floating values have gradients"
            )
        # Without this a model with frozen weights has no graph to go back through.
        x = x if x.requires_grad else x.detach().requires_grad_()
        # torch drops the gradient of whatever is not a leaf unless it is asked to keep it.
        x.retain_grad()
        return x

    def settle(self, here, where):
        """With stop=True: end the run if this was the last value that was awaited."""
        self.awaited.discard((where, self.steps and here.step, self.branches and here.branch))
        if self.awaited or not self.stop:
            return
        if self.branches is not None or here.branch is None:
            raise Finished(self)
        # Nobody said which branches there are, so whether another one comes is known only at the next step.
        self.last = here  # `meet` ends the run when another step begins

    cost = forecast.cost  # a table of what this capture would hold, without running it

    def _check_policy(self):
        if self.reduce is not None and not isinstance(self.reduce, str) and not callable(self.reduce):
            raise TypeError(
                f"reduce={self.reduce!r}; expected an axis such as 'heads', or a function of the value"
            )
        if self.dtype is not None and not isinstance(self.dtype, torch.dtype):
            raise TypeError(f"dtype={self.dtype!r}; expected a dtype of torch, such as torch.float16")
        if self.device is not None:
            try:
                torch.empty(0, device=self.device)
            except (RuntimeError, AssertionError, TypeError) as error:
                raise ValueError(
                    f"device={self.device!r} cannot hold a capture: {str(error).splitlines()[0]}"
                ) from error
        policy = "heads", "rows", "reduce", "dtype", "device"
        given = [f"{name}=" for name in policy if getattr(self, name) is not None]
        if self.grad and given:
            raise ValueError(
                f"grad=True keeps the value that the run goes on with, and no part or copy of it; leave out "
                f"{', '.join(given)} and choose from its .grad afterwards"
            )


class patch(Session):
    """Write: `with patch(dit, "blocks.2.cross_attn.heads", zero(heads=3)):` puts another value there.

    function  (x, where) -> x of the same shape, dtype and device
              for a tap that is called: (original, *args, where) -> result

    Patching scores or probs writes that attention out, so compare with a run under `patch(..., identity)`,
    not with the plain one.
    """

    edits = True

    def __init__(self, obj, pattern, function, *, steps=None, blocks=None, branch=None):
        if not callable(function):
            raise TypeError(
                f"patch of {pattern} needs a function (x, where) -> x, got {type(function).__name__}; "
                "for a fixed value write lambda x, where: value"
            )
        super().__init__(obj, (pattern,), steps, blocks, branch)
        self.function = function

    def check(self, where):
        if isinstance(self.function, Edit):
            self.function.check(where)

    def visit(self, x, where):
        here = self.meet(where)
        if here is None:
            return x
        # A copy, so that writing into it cannot reach a tensor that someone else still holds.
        return self.checked(self.function(x.clone(), here), x, here)

    def glance(self, shape, dtype, make, where):
        self.meet(where)

    def wrap(self, function, where):
        def patched(*args):
            here = self.meet(where)
            if here is None:
                return function(*args)
            copies = [arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in args]
            return self.checked(self.function(function, *copies, here), args[0], here)

        return patched

    def checked(self, new, x, where):
        """What the function returned, if it can take the place of x."""
        expected = f"expected {list(x.shape)} ({where.layout})"
        if new is None:
            raise TypeError(f"patch at {where} returned None; {expected}. Did the function forget to return?")
        if not isinstance(new, torch.Tensor):
            raise TypeError(f"patch at {where} returned {type(new).__name__}; {expected} as a tensor")
        here = f"a tensor on {x.device}"
        for got, wanted, cure in (
            (list(new.shape), list(x.shape), "; keep every axis (keepdim=True) and its size"),
            (new.dtype, x.dtype, f" as {x.dtype}; return new.to(x.dtype)"),
            (f"a tensor on {new.device}", here, f" on {x.device}; return new.to(x.device)"),
        ):
            if got != wanted:
                raise ValueError(f"patch at {where} returned {got}; {expected}{cure}")
        return new


def taps(obj, pattern="*", **example):
    """A table of what can be seen: name, layout, shape, meaning.

    Shapes are those of the last captured run; with the arguments of the model's `example`
    (`taps(dit, size=(480, 832), frames=81)`) they come from a rehearsal on the meta device.
    """
    if example:
        obj = forecast.ghost(obj)
        with capture(obj, "*", limit=None):
            forecast.run_on_meta(obj, (), example)
    rows = [
        (str(where), where.layout, list(tap.shapes.get(where.name, ())) or "", what_is(where.name))
        for where, tap in points(obj, pattern).items()
    ]
    return Table(("tap", "layout", "shape", "what it is"), rows, f"{len(rows)} taps")
