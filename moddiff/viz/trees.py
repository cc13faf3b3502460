"""What is it made of?  A module or a pipeline as a tree, with shapes, dtypes, bytes and taps."""

import html

from torch import nn

from ..hooks import Taps, in_words, members


class Tree:
    """One node: its name, its kind, what it holds, and its children.

    Text in a terminal, unfolding lines in a notebook.

    tensors  [(name, tensor)] of its own;  taps: names;  times: how many equal neighbours it stands for
    """

    def __init__(self, name, kind, tensors=(), taps=(), children=(), times=1):
        self.name, self.kind, self.tensors = name, kind, list(tensors)
        self.taps, self.children, self.times = list(taps), list(children), times

    @property
    def numbers(self):
        """How many parameters and buffers, here and below; blocks shown once are counted each time."""
        own = sum(tensor.numel() for _, tensor in self.tensors)
        return self.times * (own + sum(child.numbers for child in self.children))

    @property
    def bytes(self):
        """Of the same tensors, in their own dtypes."""
        own = sum(tensor.nbytes for _, tensor in self.tensors)
        return self.times * (own + sum(child.bytes for child in self.children))

    @property
    def dtypes(self):
        """The names of the dtypes in this node and below, in order."""
        own = {_dtype(tensor) for _, tensor in self.tensors}
        return sorted(own.union(*(child.dtypes for child in self.children)))

    def summary(self):
        """One line without the name: kind, size, dtypes, taps."""
        alike = f" x {self.times}" if self.times > 1 else ""
        size = f"  {self.numbers:,} numbers, {in_words(self.bytes)}, {' and '.join(self.dtypes)}"
        taps = f"  taps: {', '.join(self.taps)}" if self.taps else ""
        return self.kind + alike + size * bool(self.numbers) + taps

    def lines(self, depth, level=0):
        """The tree as indented lines, so many levels deep."""
        yield "  " * level + f"{self.name}: {self.summary()}"
        if depth == 0:
            return
        for name, tensor in self.tensors:
            yield "  " * (level + 1) + f"{name} {list(tensor.shape)} {_dtype(tensor)}"
        for child in self.children:
            yield from child.lines(depth - 1, level + 1)

    def __repr__(self):
        return "\n".join(self.lines(4))

    def _repr_html_(self):
        style = "font-family: monospace; font-size: 12px; line-height: 1.5"
        return f'<div style="{style}">{self._html(opened=2)}</div>'

    def _html(self, opened):
        head = f"<b>{html.escape(self.name)}</b> {html.escape(self.summary())}"
        inside = "".join(
            f"<div>{html.escape(name)} {list(tensor.shape)} {_dtype(tensor)} {in_words(tensor.nbytes)}</div>"
            for name, tensor in self.tensors
        )
        inside += "".join(child._html(opened - 1) for child in self.children)
        if not inside:
            return f"<div>{head}</div>"
        state, indented = " open" * (opened > 0), f'<div style="margin-left: 1.5em">{inside}</div>'
        return f"<details{state}><summary>{head}</summary>{indented}</details>"


def tree(obj, name=None):
    """A module, a pipeline or any object with modules as a Tree; equal neighbours are shown once.

    name  of the root; None: its own
    Raises TypeError for what holds no module.
    """
    if isinstance(obj, nn.Module):
        return _of_module(obj, name or type(obj).__name__)
    parts = members(obj)
    if not parts:
        raise TypeError(
            f"tree of {type(obj).__name__}: it holds no modules; "
            "give a pipeline, or a component such as pipe.dit"
        )
    children = [
        _of_module(part, key) if isinstance(part, nn.Module) else Tree(key, type(part).__name__)
        for key, part in parts.items()
    ]
    root = name or getattr(obj, "name", "") or "pipeline"
    return Tree(root, type(obj).__name__, taps=_taps(getattr(obj, "tap", None)), children=children)


def _of_module(module, name):
    tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    children = []
    for key, child in module.named_children():
        node = _of_module(child, key)
        last = children[-1] if children else None
        if last is not None and key.isdigit() and _shape(node) == _shape(last):
            last.times += 1
            last.name = f"{last.name.split('..')[0]}..{key}"
        else:
            children.append(node)
    return Tree(name, type(module).__name__, tensors, _taps(module.__dict__.get("tap")), children)


def _taps(tap):
    """The names of the taps of a module, or of the object that holds modules."""
    return list(tap.layouts) if isinstance(tap, Taps) else []


def _dtype(tensor):
    return str(tensor.dtype).removeprefix("torch.")


def _shape(node):
    """Equal for nodes that look alike, whatever their numbers."""
    held = [(name, tensor.shape, tensor.dtype) for name, tensor in node.tensors]
    return node.kind, node.taps, held, [(child.name, child.times, _shape(child)) for child in node.children]
