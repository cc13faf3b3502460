"""What is it made of?  A module or a pipeline as a tree, with shapes, dtypes, bytes and taps."""

import html
import re

from torch import nn

from ..hooks import Taps, in_words, members


class Tree:
    """One node: its name, its kind, what it holds, and its children.  Text in a terminal, unfolding lines in a notebook."""

    def __init__(self, name, kind, tensors, taps, children, times=1):
        self.name, self.kind, self.tensors, self.taps, self.children, self.times = (
            name,
            kind,
            tensors,
            taps,
            children,
            times,
        )

    @property
    def numbers(self):
        """How many parameters and buffers, in this node and below; blocks shown once are counted each time."""
        return self.times * (
            sum(tensor.numel() for _, tensor in self.tensors) + sum(child.numbers for child in self.children)
        )

    @property
    def bytes(self):
        """Of the same tensors, in their own dtypes."""
        return self.times * (
            sum(tensor.numel() * tensor.element_size() for _, tensor in self.tensors)
            + sum(child.bytes for child in self.children)
        )

    @property
    def dtypes(self):
        found = {str(tensor.dtype).removeprefix("torch.") for _, tensor in self.tensors} | {
            name for child in self.children for name in child.dtypes
        }
        return sorted(found)

    def summary(self):
        alike = f" x {self.times}" if self.times > 1 else ""
        size = (
            f"  {self.numbers:,} numbers, {in_words(self.bytes)}, {' and '.join(self.dtypes)}"
            if self.numbers
            else ""
        )
        return f"{self.kind}{alike}{size}" + (f"  taps: {', '.join(self.taps)}" if self.taps else "")

    def lines(self, depth, level=0):
        yield "  " * level + f"{self.name}: {self.summary()}"
        if depth == 0:
            return
        for name, tensor in self.tensors:
            yield (
                "  " * (level + 1) + f"{name} {list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
            )
        for child in self.children:
            yield from child.lines(depth - 1, level + 1)

    def __repr__(self):
        return "\n".join(self.lines(4))

    def _repr_html_(self):
        return f'<div style="font-family: monospace; font-size: 12px; line-height: 1.5">{self._html(opened=2)}</div>'

    def _html(self, opened):
        head = f"<b>{html.escape(self.name)}</b> {html.escape(self.summary())}"
        held = "".join(
            f"<div>{html.escape(name)} {list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} "
            f"{in_words(tensor.numel() * tensor.element_size())}</div>"
            for name, tensor in self.tensors
        )
        inside = held + "".join(child._html(opened - 1) for child in self.children)
        if not inside:
            return f"<div>{head}</div>"
        return f'<details{" open" if opened > 0 else ""}><summary>{head}</summary><div style="margin-left: 1.5em">{inside}</div></details>'


def tree(obj, name=None):
    """A module, a pipeline or any object with modules as a Tree: kinds, shapes, dtypes, bytes and taps; equal neighbours are shown once.

    Raises TypeError for what holds no module.
    """
    if isinstance(obj, nn.Module):
        return _of_module(obj, name or type(obj).__name__)
    parts = members(obj)
    if not parts:
        raise TypeError(
            f"tree of {type(obj).__name__}: it holds no modules; give a pipeline, or a component such as pipe.dit"
        )
    own = getattr(obj, "tap", None)
    children = [
        _of_module(part, key) if isinstance(part, nn.Module) else Tree(key, type(part).__name__, [], [], [])
        for key, part in parts.items()
    ]
    return Tree(
        name or getattr(obj, "name", "") or "pipeline",
        type(obj).__name__,
        [],
        list(own.layouts) if isinstance(own, Taps) else [],
        children,
    )


def _of_module(module, name):
    tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    tap = module.__dict__.get("tap")
    children = []
    for key, child in module.named_children():
        node = _of_module(child, key)
        last = children[-1] if children else None
        if last is not None and key.isdigit() and _shape(node) == _shape(last):
            last.times += 1
            last.name = f"{re.match(r'[0-9]+', last.name)[0]}..{key}"
        else:
            children.append(node)
    return Tree(
        name, type(module).__name__, tensors, list(tap.layouts) if isinstance(tap, Taps) else [], children
    )


def _shape(node):
    """Equal for nodes that look alike, whatever their numbers."""
    held = tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in node.tensors)
    return (
        node.kind,
        tuple(node.taps),
        held,
        tuple((child.name, child.times, _shape(child)) for child in node.children),
    )
