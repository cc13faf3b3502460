"""How do I look inside without disturbing it?  Declared taps, and sessions that read or edit them.

    tap.py       Taps, what a module shows, and the search for it by name
    where.py     the coordinates of a value, and `at`, by which a loop says where it is
    sessions.py  who looks: opened all or none, closed whatever happens
    verbs.py     taps lists, capture reads, patch writes
    records.py   what a capture saw
    edits.py     ready functions for patch
    forecast.py  what looking would cost
    memory.py    what extensions and guides remember of a run

This room knows no model.  Guide: guides/hooks.md
"""

from .edits import Edit, identity, indices, mean_over, noise, replace_attend, scale_by, transplant, zero
from .forecast import cost, run_on_meta
from .memory import Memory
from .records import Cost, Record, Table, bytes_of, in_words, span, what_is
from .sessions import NeverFired, Session, close_all, live_handles, open_sessions
from .tap import Taps, UnknownTap, members, parts, points, walk, wrapped
from .verbs import OverLimit, capture, patch, taps
from .where import OneRun, Where, at, position
