"""What did I try, and is everything as it was?  Experiments that put all back, and a file that remembers them."""

from .snapshots import Leaked, Snapshot
from .store import FILE, Past, compare, connect, experiment, listed, recall
