"""Must each branch of a step be a question of its own?  The first step asks so; the next ones ask once.

A guide asks for one branch after the other (cond, uncond), and nobody says beforehand for which. But a guide
does in this step what it did in the one before: so with the first branch the others of that step are asked
for along with it. x then travels once, the way is waited for once, and each branch is computed as it would
have been alone.
"""

import time
from weakref import WeakKeyDictionary

import torch

from ..hooks import position


class Branches:
    """The velocities of the branches of each run.   A copy has met no run."""

    def __init__(self):
        self.runs = WeakKeyDictionary()  # OneRun -> Habit

    def __deepcopy__(self, memo):
        return Branches()

    def velocity(self, prompt, given, ask, seconds):
        """The velocity of the branch that is asked for now.

        prompt   of this branch, prepared
        given    {name: tensor or plain value}, all else that the denoiser is given
        ask      ({branch: prompt} to ask for along) -> velocity, {branch: velocity}
        seconds  that a question may take
        """
        now = position()
        run, branch, window = (now.pop(name, None) for name in ("run", "branch", "window"))
        # A loop by hand does not say which run it is; the windows of one branch all come before the other's.
        if run is None or branch is None or window is not None:
            return ask({})[0]
        habit = self.runs.setdefault(run, Habit())
        habit.begin(now.get("step"))
        moment = now | given
        if (velocity := habit.kept_for(branch, prompt, moment)) is not None:
            return velocity
        along = habit.to_ask(branch, prompt, seconds / 2)
        started = time.monotonic()
        velocity, others = ask(along)
        habit.took = (time.monotonic() - started) / (1 + len(others))
        habit.keep({name: (along[name], value) for name, value in others.items()}, moment)
        return velocity


class Habit:
    """What a run asks for in each step.

    before, asked  {branch: prompt} of the step before, and of this one so far
    kept           {branch: (prompt, velocity)} that came along and is still to be asked for, at `moment`
    alone          one that came along was not asked for: this guide does not do the same in each step
    took           seconds of one branch, when it was last asked for
    """

    def __init__(self):
        self.step, self.before, self.asked = None, {}, {}
        self.kept, self.moment, self.alone, self.took = {}, {}, False, 0.0

    def begin(self, step):
        if step != self.step:
            self.alone = self.alone or bool(self.kept)
            self.step, self.before, self.asked, self.kept = step, self.asked, {}, {}

    def to_ask(self, branch, prompt, seconds):
        """{branch: prompt} to ask for along with this one, if all of them take no longer than that."""
        self.asked[branch] = prompt
        others = {name: its for name, its in self.before.items() if name not in self.asked}
        return {} if self.alone or self.took * (1 + len(others)) > seconds else others

    def keep(self, velocities, moment):
        # Copies, since a guide may write into its x before it asks for the next branch.
        copied = {name: x.clone() if torch.is_tensor(x) else x for name, x in moment.items()}
        self.kept, self.moment = velocities, copied if velocities else {}

    def kept_for(self, branch, prompt, moment):
        """What came along, if all that it depends on is still the same; else None."""
        its, velocity = self.kept.pop(branch, (None, None))
        if velocity is None:
            return None
        if its is not prompt or not _same(self.moment, moment):
            self.alone = True
            return None
        self.asked[branch] = prompt
        return velocity


def _same(one, other):
    return one.keys() == other.keys() and all(_equal(x, other[name]) for name, x in one.items())


def _equal(x, y):
    if torch.is_tensor(x) and torch.is_tensor(y):
        return x.dtype == y.dtype and torch.equal(x, y)
    return type(x) is type(y) and x == y
