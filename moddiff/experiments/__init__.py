"""What did I try, and is everything as it was?

Experiments that put all back, and a file that remembers them.

running.py    the `with` block: what it offers inside, and how it ends
snapshots.py  a model as it was, to compare with and to go back to
store.py      the file: what is on record, and how two experiments differ
"""

from .running import close_all, code_of, experiment
from .snapshots import Leaked, Snapshot
from .store import FILE, Past, connect, differences, listed, recall

compare = differences  # its name in version 0.1
