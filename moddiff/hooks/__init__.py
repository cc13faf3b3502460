"""How do I look inside without disturbing it?  Declared taps, and sessions that read or edit them.

    tap.py       Taps, what a module shows, and the search for it by name
    where.py     the place of a value, and `at`, by which a loop says where it is
    sessions.py  capture reads, patch writes, and both leave nothing behind
    records.py   what a capture saw
    edits.py     ready functions for patch
    forecast.py  what looking would cost

This room knows no model.  Guide: guides/hooks.md
"""

from .edits import Edit, identity, indices, mean_over, noise, replace_attend, scale_by, transplant, zero
from .forecast import cost, run_on_meta
from .records import Cost, Record, Table, bytes_of, in_words, span, what_is
from .sessions import NeverFired, OverLimit, Session, capture, live_handles, open_sessions, patch, taps
from .tap import Taps, UnknownTap, members, parts, points, walk, wrapped
from .where import Where, at, position
