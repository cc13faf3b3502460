"""What is remembered of a run?  By extensions and guides, for as long as it lasts, apart from all others."""

import threading
from weakref import WeakKeyDictionary

from .where import position

MOST_WINDOWS = 64  # that a Memory keeps of each branch and expert


class Memory:
    """What an extension or a guide remembers: empty at the first step of each run, apart per branch, expert
    and window.

    here()     -> dict, this moment's own
    note(...)  adds a row for the report
    notes      the rows of the last run

    A run of a Pipeline says which one it is (`at(run=)`), so that two taken in turn do not mix, and what was
    remembered goes when the run does. A loop written by hand needs no more than `at(step=i)`: it is a new run
    when the step does not go on, one in each thread. A copy remembers nothing.
    """

    def __init__(self):
        self.notes = []
        self._runs, self._by_hand = WeakKeyDictionary(), {}

    def __deepcopy__(self, memo):
        return Memory()

    def here(self):
        now = position()
        places = self._run(now)["places"]
        if now.get("step") is None:
            return {}
        asker, window = (now.get("branch"), now.get("expert")), now.get("window")
        windows = places.setdefault(asker, {})
        windows[window] = here = windows.pop(window, {})  # the last asked for stands last
        if len(windows) > MOST_WINDOWS:  # those that move from step to step come back seldom
            windows.pop(next(iter(windows)))
        return here

    def note(self, **row):
        self._run(position())["notes"].append(row)

    def _run(self, now):
        """The run of this moment: begun anew if this is its first."""
        mark, step = now.get("run"), now.get("step")
        runs, key = (self._by_hand, threading.get_ident()) if mark is None else (self._runs, mark)
        run = runs.get(key)
        if step is None:
            # Before its first step a run encodes its prompt; a call by hand may say nothing at all.
            begins = mark is None
        else:
            begins = run is not None and run["step"] is not None and step < run["step"]
        if run is None or begins:
            run = runs[key] = {"places": {}, "notes": []}
        run["step"], self.notes = step, run["notes"]
        return run
