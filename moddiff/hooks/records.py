"""What did the session see?  Records of captured values, and the tables that list taps and forecast their bytes."""

import html
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
    plain = name.removeprefix("image_")
    return WHAT.get(plain, "") + (" (image tokens)" if plain != name and plain in WHAT else "")


def in_words(size):
    """Bytes as people say them: 402_653_184 -> "403 MB"."""
    for unit, power in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= power:
            return f"{size / power:.3g} {unit}"
    return f"{size} B"


def bytes_of(text, name="limit"):
    """A size such as "2 GB" or "500 MB" in bytes; a number of bytes, or None, as it is.   `name` is for the error."""
    if text is None or isinstance(text, (int, float)):
        return text
    found = re.fullmatch(r"\s*(\d+\.?\d*)\s*([kKMGT]?)i?B\s*", str(text))
    if not found:
        raise ValueError(f'{name}={text!r} is not a size; write it as "2 GB", "500 MB", or a number of bytes')
    return float(found[1]) * 1000 ** " KMGT".index(found[2].upper() or " ")


def span(values):
    """Sorted distinct values as short text: 0..19, or 0, 5, 10; "none" if nothing was announced."""
    values = sorted({v for v in values if v is not None}, key=lambda v: (str(type(v)), v))
    if not values:
        return "none"
    if len(values) > 2 and values == list(range(values[0], values[-1] + 1)):
        return f"{values[0]}..{values[-1]}"
    return ", ".join(map(str, values))


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
        def line(tag, row):
            return (
                "<tr>"
                + "".join(f'<{tag} style="text-align:left">{html.escape(str(cell))}</{tag}>' for cell in row)
                + "</tr>"
            )

        return f"<table>{line('th', self.headings)}{''.join(line('td', row) for row in self.rows)}</table><p>{html.escape(self.caption)}</p>"


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


class Record:
    """What a capture saw: copies, each with its Where.  Iterate for (where, value); `seen[name]`, `get`, `stack` pick."""

    def __init__(self):
        self.visits = []  # (where, value), in the order of the run
        self.bytes = 0
        self._named = {}  # name -> its visits

    def add(self, where, value):
        self.visits.append((where, value))
        self.bytes += value.numel() * value.element_size()
        self._named.setdefault(str(where), []).append((where, value))

    def __len__(self):
        return len(self.visits)

    def __iter__(self):
        return iter(self.visits)

    @property
    def names(self):
        """The taps seen, in the order of the run."""
        return list(self._named)

    def __getitem__(self, name):
        return self.get(name)

    def get(self, name, **coordinates):
        """The one value of a tap: `seen.get("blocks.0.resid_post", step=3, branch="cond")`; KeyError if there is none, or more."""
        known = self._find(name)
        found = [
            value
            for where, value in known
            if all(getattr(where, key) == want for key, want in coordinates.items())
        ]
        if len(found) != 1:
            raise KeyError(
                f"{name} with {coordinates or 'no coordinates'}: {len(found)} values; it was seen at steps {span(w.step for w, _ in known)}, "
                f"branches {span(w.branch for w, _ in known)}, blocks {span(w.block for w, _ in known)}; say which, or use stack()"
            )
        return found[0]

    def _find(self, name):
        names = (
            [name]
            if name in self._named
            else [n for n in self.names if fnmatchcase(n, name) or fnmatchcase(n, "*." + name)]
        )
        found = [visit for n in names for visit in self._named[n]]
        if not found:
            raise KeyError(
                f"nothing was captured at {name!r}; this record holds {', '.join(self.names[:6]) or 'nothing'}{', ...' * (len(self.names) > 6)}"
            )
        return found

    def counterpart(self, where):
        """The (where, value) of the same name, step and branch; LookupError when the record has none."""
        mine = str(where)
        name = (
            mine
            if mine in self._named
            else next((n for n in self.names if n.endswith("." + mine) or mine.endswith("." + n)), None)
        )
        asked = f"transplant at {mine}, step {where.step}, branch {where.branch}"
        if name is None:
            raise LookupError(
                f"{asked}: the record holds {', '.join(self.names[:4]) or 'nothing'}; capture {mine} in the first run"
            )
        held = self._named[name]
        found = [(w, value) for w, value in held if (w.step, w.branch) == (where.step, where.branch)]
        if not found:
            raise LookupError(
                f"{asked}: the record of {name} holds steps {span(w.step for w, _ in held)} and branches {span(w.branch for w, _ in held)}; "
                "give both runs the same steps and branches, or patch with steps= and branch="
            )
        if len(found) == 1:
            return found[0]
        if where.call >= len(found):
            raise LookupError(
                f"{asked}: this is pass {where.call + 1}, the record holds {len(found)}; announce the loop with at(step=i), one run per session"
            )
        return found[where.call]

    def axes(self, name):
        """The axes of stack(name) that come before the tap's own: {"block": [0, 1, 2, 3], "step": [0, 5, 10]}."""
        return self._grid(name)[0]

    def stack(self, name):
        """All values of a tap in one tensor: `seen.stack("cross_attn.probs")` -> [block, step, b, heads, n, m].

        `name` is a whole name, the end of one, or a pattern.  In front stand block and step (as far as the values have them), then
        branch and call where there are several; `seen.axes(name)` labels them.  ValueError if some are missing or the shapes differ.
        """
        axes, cells = self._grid(name)
        shapes = {tuple(value.shape) for value in cells.values()}
        if len(shapes) > 1:
            raise ValueError(
                f"{name}: shapes differ, {' and '.join(str(list(s)) for s in sorted(shapes))}; stack one branch, or use get()"
            )
        keys = [()]
        for labels in axes.values():
            keys = [(*key, label) for key in keys for label in labels]
        missing = [key for key in keys if key not in cells]
        if missing:
            raise ValueError(
                f"{name}: nothing was seen at {dict(zip(axes, missing[0]))}; the record is not a full grid, use get()"
            )
        return torch.stack([cells[key] for key in keys]).view(*map(len, axes.values()), *shapes.pop())

    def _grid(self, name):
        found = self._find(name)
        held = {
            axis: sorted({getattr(w, axis) for w, _ in found}, key=lambda v: (v is not None, v))
            for axis in ("block", "step")
        }
        for axis in ("branch", "call"):
            held[axis] = list(dict.fromkeys(getattr(w, axis) for w, _ in found))
        axes = {
            axis: labels
            for axis, labels in held.items()
            if labels != [None] and (axis in ("block", "step") or len(labels) > 1)
        }
        cells = {}
        for where, value in found:
            key = tuple(getattr(where, axis) for axis in axes)
            if key in cells:
                raise ValueError(
                    f"{name} names several taps of one block: {', '.join(sorted({str(w) for w, _ in found})[:4])}; say more of the name"
                )
            cells[key] = value
        return axes, cells

    def table(self):
        """One row for each tap: visits, steps, branches, shapes, bytes."""
        rows = []
        for name, visits in self._named.items():
            shapes = " or ".join(dict.fromkeys(str(list(v.shape)) for _, v in visits))
            size = sum(v.numel() * v.element_size() for _, v in visits)
            rows.append(
                (
                    name,
                    visits[0][0].layout,
                    shapes,
                    len(visits),
                    span(w.step for w, _ in visits),
                    span(w.branch for w, _ in visits),
                    in_words(size),
                )
            )
        return Table(
            ("tap", "layout", "shape", "visits", "steps", "branches", "bytes"),
            rows,
            f"{len(self)} values, {in_words(self.bytes)}",
        )

    def __repr__(self):
        return repr(self.table())

    def _repr_html_(self):
        return self.table()._repr_html_()
