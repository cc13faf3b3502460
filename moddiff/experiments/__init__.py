"""What did I try, and is everything as it was?

Experiments that put all back, runs that can be made again, and one file that remembers both.

running.py    the `with` block of an experiment: what it offers inside, and how it ends
snapshots.py  a model as it was, to compare with and to go back to
store.py      the experiments on record, and how two of them differ
keeping.py    how a run comes on record, with `pipe(..., store=FILE)`
kept.py       the runs on record: listed, found, compared
repeating.py  a run made again: the same bytes, or what differs
recipes.py    how a pipeline is made again from words;  asking.py: the same of a run's options
ledger.py     the file: one schema for both, and who may write into it
"""

from .keeping import Store
from .kept import PastRun, differing, listed_runs, run, runs
from .ledger import connect
from .repeating import Again, NotRepeatable, again
from .running import close_all, code_of, experiment
from .snapshots import Leaked, Snapshot
from .store import FILE, Past, differences, listed, recall

compare = differences  # its name in version 0.1
