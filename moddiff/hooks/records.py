"""What did the session see?  Records of captured values, and tables of taps and of bytes."""

import html
import itertools
import re
from fnmatch import fnmatchcase

import torch

WHAT = {  # the last part of a tap's name: what it is, in words
    "q": "queries",
    "k": "keys",
    "v": "values",
    "bias": "added to the scores",
    "scores": "fit of each key to each query, before the softmax",
    "probs": "attention probabilities",
    "heads": "probs @ v, each head on its own",
    "out": "after the output projection",
    "attend": "the whole attention, to be swapped",
    "resid_pre": "residual stream entering the block",
    "resid_mid": "residual stream between the sublayers",
    "resid_cross": "residual stream after cross-attention",
    "resid_post": "residual stream leaving the block",
    "modulation": "shifts, scales and gates made from the noise level",
    "ffn": "feed-forward output",
    "final": "last layer",
    "x": "the noisy latent",
    "velocity": "the prediction, guided",
    "velocity.cond": "the prediction with the prompt",
    "velocity.uncond": "the prediction with the negative prompt",
    "x0": "the clean latent it points at",
}


def what_is(name):
    """A tap's meaning in words, "" when it has no entry."""
    # The i2v models of Wan 2.1 attend to picture and words apart, with taps of the same meaning for both.
    plain = name.removeprefix("image_")
    return WHAT.get(plain, "") + (" (image tokens)" if plain != name and plain in WHAT else "")


def in_words(size):
    """Bytes as people say them: 402_653_184 -> "403 MB"."""
    # Powers of 1000, as disks are sold; `bytes_of` reads them so, and takes a GiB for a GB.
    for unit, power in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= power:
            return f"{size / power:.3g} {unit}"
    return f"{size} B"


def bytes_of(text, name="limit"):
    """A size such as "2 GB" or "500 MB" in bytes; a number of bytes, or None, as it is.

    `name` is for the error.
    """
    if text is None or isinstance(text, (int, float)):
        return text
    match = re.fullmatch(r"\s*(\d+\.?\d*)\s*([kKMGT]?)i?B\s*", str(text))
    if not match:
        raise ValueError(f'{name}={text!r} is not a size; write it as "2 GB", "500 MB", or a number of bytes')
    return float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " ")


def span(values):
    """Sorted distinct values as short text: 0..19, or 0, 5, 10; "none" if nothing was announced."""
    # Numbers and text may stand together, and Python does not compare those: kinds first.
    values = sorted({v for v in values if v is not None}, key=lambda v: (str(type(v)), v))
    whole = all(isinstance(value, int) for value in values)
    if whole and len(values) > 2 and values == list(range(values[0], values[-1] + 1)):
        return f"{values[0]}..{values[-1]}"
    return ", ".join(map(str, values)) or "none"


class Table:
    """Rows under headings: text in a terminal, a table in a notebook."""

    def __init__(self, headings, rows, caption=""):
        self.headings, self.rows, self.caption = headings, rows, caption

    def __len__(self):
        return len(self.rows)

    def __iter__(self):
        return iter(self.rows)

    @property
    def names(self):
        return [row[0] for row in self.rows]

    def __repr__(self):
        lines = [tuple(map(str, row)) for row in (self.headings, *self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines)]
        text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]
        return "\n".join([text[0], "-" * len(text[0]), *text[1:], self.caption]).rstrip()

    def _repr_html_(self):
        lines = [html_row("th", self.headings), *(html_row("td", row) for row in self.rows)]
        return f"<table>{''.join(lines)}</table><p>{html.escape(self.caption)}</p>"


def html_row(tag, cells):
    cells = [f'<{tag} style="text-align:left">{html.escape(str(cell))}</{tag}>' for cell in cells]
    return f"<tr>{''.join(cells)}</tr>"


# The table is made when it is shown, so a Record can be printed while it is still being filled.
class HasTable:
    """What shows itself as its `table()`."""

    def __repr__(self):
        return repr(self.table())

    def _repr_html_(self):
        return self.table()._repr_html_()


class Cost(Table):
    """A forecast: .bytes in all, and a row for each tap."""

    def __init__(self, rows):
        self.bytes = sum(row[3] * row[4] for row in rows)
        rows = [
            (name, layout, shape, in_words(size), visits, in_words(size * visits))
            for name, layout, shape, size, visits in rows
        ]
        super().__init__(
            ("tap", "layout", "shape", "each", "visits", "all"), rows, f"in all {in_words(self.bytes)}"
        )


class Record(HasTable):
    """What a capture saw: copies, each with its Where.

    Iterate for (where, value); `seen[name]`, `get`, `stack` pick.
    """

    def __init__(self):
        self.visits = []  # (where, value), in the order of the run
        self.bytes = 0
        self._named = {}  # name -> its visits

    def add(self, where, value):
        self.visits.append((where, value))
        self.bytes += value.nbytes
        self._named.setdefault(str(where), []).append((where, value))

    def __len__(self):
        return len(self.visits)

    def __iter__(self):
        return iter(self.visits)

    @property
    def names(self):
        """The taps seen, in the order of the run."""
        return list(self._named)

    def get(self, name, **coordinates):
        """The one value of a tap: `seen.get("blocks.0.resid_post", step=3, branch="cond")`.

        KeyError, with the coordinates there are, if there is none, or more than one.
        """
        visits = self._visits(name)
        fitting = [
            value
            for where, value in visits
            if all(getattr(where, key) == wanted for key, wanted in coordinates.items())
        ]
        if len(fitting) != 1:
            raise KeyError(
                f"{name} with {coordinates or 'no coordinates'}: {len(fitting)} values; "
                f"it was seen at steps {span(where.step for where, _ in visits)}, "
                f"branches {span(where.branch for where, _ in visits)}, "
                f"blocks {span(where.block for where, _ in visits)}; say which, or use stack()"
            )
        return fitting[0]

    # seen[name] suffices where a tap was seen once; a tap of many steps needs its coordinates.
    __getitem__ = get

    def _visits(self, name):
        """The visits of a tap by its whole name, or of all whose name, or the end of it, fits the pattern."""
        names = [name]
        if name not in self._named:
            names = [n for n in self.names if fnmatchcase(n, name) or fnmatchcase(n, "*." + name)]
        visits = [visit for known in names for visit in self._named[known]]
        if not visits:
            held = ", ".join(self.names[:6]) or "nothing"
            more = ", ..." * (len(self.names) > 6)
            raise KeyError(f"nothing was captured at {name!r}; this record holds {held}{more}")
        return visits

    def counterpart(self, where):
        """The (where, value) of the same name, step and branch; LookupError when the record has none."""
        asked = f"transplant at {where}, step {where.step}, branch {where.branch}"
        # The one may have been captured on a component, the other run in a whole pipeline: "dit." before it.
        own = str(where)
        ends = [name for name in self.names if name.endswith("." + own) or own.endswith("." + name)]
        if own not in self._named and not ends:
            held = ", ".join(self.names[:4]) or "nothing"
            raise LookupError(f"{asked}: the record holds {held}; capture {where} in the first run")
        name = own if own in self._named else ends[0]
        visits = self._named[name]
        passes = [(w, value) for w, value in visits if (w.step, w.branch) == (where.step, where.branch)]
        if not passes:
            steps, branches = span(w.step for w, _ in visits), span(w.branch for w, _ in visits)
            raise LookupError(
                f"{asked}: the record of {name} holds steps {steps} and branches {branches}; "
                "give both runs the same steps and branches, or patch with steps= and branch="
            )
        # One captured value serves each pass of this run; of several, the first goes to the first, and so on.
        call = 0 if len(passes) == 1 else where.call
        if call >= len(passes):
            raise LookupError(
                f"{asked}: this is pass {call + 1}, the record holds {len(passes)}; "
                "announce the loop with at(step=i), one run per session"
            )
        return passes[call]

    def axes(self, name):
        """The axes of stack(name) before the tap's own: {"block": [0, 1, 2, 3], "step": [0, 5, 10]}."""
        return self._grid(name)[0]

    def stack(self, name):
        """All values of a tap in one: `seen.stack("cross_attn.probs")` -> [block, step, b, heads, n, m].

        `name` is a whole name, the end of one, or a pattern.  In front stand block and step (as far as the
        values have them), then branch and call where there are several; `seen.axes(name)` labels them.

        Raises ValueError if some are missing or the shapes differ.
        """
        axes, cells = self._grid(name)
        shapes = {tuple(value.shape) for value in cells.values()}
        if len(shapes) > 1:
            several = " and ".join(str(list(shape)) for shape in sorted(shapes))
            raise ValueError(f"{name}: shapes differ, {several}; stack one branch, or use get()")
        keys = list(itertools.product(*axes.values()))
        missing = [key for key in keys if key not in cells]
        if missing:
            cell = dict(zip(axes, missing[0]))
            raise ValueError(f"{name}: nothing was seen at {cell}; the record is not a full grid, use get()")
        return torch.stack([cells[key] for key in keys]).view(*map(len, axes.values()), *shapes.pop())

    def _grid(self, name):
        """The axes that tell the visits of a tap apart, name -> labels; and the value at each key."""
        visits = self._visits(name)
        axes = {}
        for axis in ("block", "step", "branch", "call"):
            labels = list(dict.fromkeys(getattr(where, axis) for where, _ in visits))  # as they came
            # Block and step get an axis even of length one, so that asking for one does not move the others.
            if axis in ("block", "step") and labels != [None]:
                axes[axis] = sorted(labels, key=lambda label: (label is not None, label))
            elif len(labels) > 1:
                axes[axis] = labels
        cells = {}
        for where, value in visits:
            key = tuple(getattr(where, axis) for axis in axes)
            # Such as "*.q", which in one block is the q of self-attention and that of cross-attention.
            if key in cells:
                names = ", ".join(sorted({str(w) for w, _ in visits})[:4])
                raise ValueError(f"{name} names several taps of one block: {names}; say more of the name")
            cells[key] = value
        return axes, cells

    def table(self):
        """One row for each tap: visits, steps, branches, shapes, bytes."""
        headings = "tap", "layout", "shape", "visits", "steps", "branches", "bytes"
        rows = [
            (
                name,
                visits[0][0].layout,
                " or ".join(dict.fromkeys(str(list(value.shape)) for _, value in visits)),
                len(visits),
                span(where.step for where, _ in visits),
                span(where.branch for where, _ in visits),
                in_words(sum(value.nbytes for _, value in visits)),
            )
            for name, visits in self._named.items()
        ]
        return Table(headings, rows, f"{len(self)} values, {in_words(self.bytes)}")
