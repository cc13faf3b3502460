"""What is a run made of?  All that is ready before the first step, and what is there to be seen at each.

Also how far it is, and its end before the end: `watch` and `Stop`.
"""

import os
import sys
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch

from .conditioning import Conditioning
from .contracts import wants_left
from .hooks import OneRun
from .telemetry import joined, span


@dataclass
class State:
    """One step, as `pipe.steps` yields it. Put another latent into `next` to steer the rest of the run.

    step, steps       which step, of how many
    t                 0..1000, the time that the model was told;  sigma, sigma_next: the noise levels
    x                 [1, c, f, h, w]  the noisy latent that the model saw
    velocity          [1, c, f, h, w]  its guided answer
    x0                [1, c, f, h, w]  where that points: `pipe.decode(state.x0)` shows it
    next              [1, c, f, h, w]  the latent at sigma_next; after the last step, the result
    run               what was ready before the first step: `moddiff.resume(pipe, state)` goes on from here
    """

    step: int
    steps: int
    t: torch.Tensor
    sigma: float
    sigma_next: float
    x: torch.Tensor = field(repr=False)
    velocity: torch.Tensor = field(repr=False)
    x0: torch.Tensor = field(repr=False)
    next: torch.Tensor = field(repr=False)
    run: object = field(default=None, repr=False)
    kept: tuple = field(default=(None, None), repr=False)  # the solver's own `next`, and what it remembers

    @property
    def memory(self):
        """What the solver remembers, unless `next` has left the path that it remembers."""
        solved, memory = self.kept
        return memory if self.next is solved else None


@dataclass(frozen=True)
class Run:
    """Everything a run needs before its first step.

    settings      what was asked for, with the model's defaults filled in
    notes         what its reader should know
    schedule      the noise levels;   solver, guide: the components that take the steps and ask the dit
    context       branch -> what the dit takes as text
    conditioning  what pictures add;  inputs: what of it the dit takes, by name
    noise         [1, c, f, h, w] float32, where the run begins
    mark          what `hooks.position()["run"]` is during it: extensions keep what they remember by that
    trace         the span that its steps belong to, as a traceparent; None: nobody records any
    """

    settings: dict
    notes: tuple
    schedule: object
    solver: object
    guide: object
    context: dict
    conditioning: Conditioning
    inputs: dict
    noise: torch.Tensor
    mark: OneRun
    trace: str | None = None

    extra = property(lambda self: self.conditioning, doc="the older name of `conditioning`")

    @contextmanager
    def span(self, name):
        """A piece of this run, for who records spans."""
        with joined(self.trace), span(name):
            yield

    def left(self, step):
        """For a solver that plans ahead: how many steps remain, this one included."""
        return {"left": len(self.schedule) - step} if wants_left(self.solver) else {}


def resume(pipe, state):
    """The rest of a run, after the step that `state` is: `for state in moddiff.resume(pipe, state):`.

    pipe   the pipeline that made it, or one with other components that compute the same: a dit that is served
           elsewhere, after the server has ended
    state  the last that `pipe.steps` yielded
    ->     yields State; all of it is as if the run had not been interrupted

    Raises ValueError for a state that no run has made.
    """
    if state.run is None:
        raise ValueError("this state belongs to no run; expected one that pipe.steps has yielded")
    return pipe.loop(state.run, state)


# ---- how far it is ----------------------------------------------------------------------------------------

_watchers = ContextVar("moddiff_watchers", default=())  # of this thread
UNASKED_AFTER = 3.0  # seconds without a sign of life


class Stop(BaseException):
    """No error, but the way out of a run that nobody waits for any more: see `watch`.

    As with KeyboardInterrupt, every `with` block on the way closes, so nothing stays patched.
    """


@contextmanager
def watch(function):
    """Call function(step, steps) as each step of any run begins: `with watch(print): pipe("...", seed=0)`.

    It may end the run by raising Stop, which then leaves this block too. Only runs of this thread call it.
    """
    token = _watchers.set((*_watchers.get(), function))
    try:
        yield
    finally:
        _watchers.reset(token)


def begin_step(step, steps):
    """Tell all who `watch` that a step begins."""
    for function in _watchers.get():
        function(step, steps)


def behind_bar(states, steps, progress=None):
    """The states of a run, with a bar that counts them.

    progress  None: where somebody looks on, a terminal or an open notebook, and only if it takes long
    """
    # Jupyter sets this name for a notebook that someone has opened; nbconvert and tests do not.
    watched = sys.stderr.isatty() or "JPY_SESSION_NAME" in os.environ
    if not (watched if progress is None else progress):
        return states
    from tqdm.auto import tqdm

    patience = UNASKED_AFTER if progress is None else 0
    return tqdm(states, total=steps, desc="denoising", unit="step", delay=patience, leave=bool(progress))
