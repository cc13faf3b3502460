"""How do a stranger's words get into a message?  Short, and with nothing that a terminal would obey."""

from difflib import get_close_matches
from reprlib import Repr

_repr = Repr()
_repr.maxstring = _repr.maxother = 80


def quoted(value):
    """A name, or any other value from a file or a config, in at most about 100 characters."""
    if isinstance(value, int) and value.bit_length() > 64:
        return f"a number of {value.bit_length()} bits"
    if not isinstance(value, str):
        return _repr.repr(value)
    value = value if len(value) <= 100 else f"{value[:60]}...{value[-30:]}"
    return value if value.isprintable() else repr(value)[1:-1]


def listed(items, most=6, between=", "):
    """The first few items of many, and how many more there are."""
    items = list(items)
    more = [f"and {len(items) - most} more"] if len(items) > most else []
    return between.join([quoted(item) for item in items[:most]] + more)


def nearest(name, known):
    """ " (did you mean 'x'?)", for the known name that a wrong one is most like; or nothing."""
    near = get_close_matches(str(name)[:100], known, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def first_line(error):
    """What an error of another library says, in one line."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return quoted(lines[0])
