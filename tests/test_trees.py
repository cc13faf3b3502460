"""Does the tree count what there is, fold what is alike, and name every tap?"""

import pytest
import torch
from torch import nn
from toy import BLOCKS, Pipe, Toy

from moddiff import taps
from moddiff.hooks.records import in_words
from moddiff.viz.trees import tree


def test_numbers_and_bytes_are_those_of_the_module():
    toy = Toy()
    toy.blocks[1].mlp.half()
    shown = tree(toy)
    held = list(toy.parameters())
    assert shown.numbers == sum(p.numel() for p in held) and shown.bytes == sum(
        p.numel() * p.element_size() for p in held
    )
    assert shown.dtypes == ["float16", "float32"] and in_words(shown.bytes) in repr(shown).splitlines()[0]
    assert "weight [16, 16] float32" in repr(shown) and "weight [16, 16] float16" in shown._repr_html_()


def test_equal_neighbours_are_shown_once_and_counted_each_time():
    shown = tree(Toy())
    (blocks,) = shown.children
    (block,) = blocks.children
    assert block.name == f"0..{BLOCKS - 1}" and block.times == BLOCKS and f"Block x {BLOCKS}" in repr(shown)
    odd = Toy()
    odd.blocks[1].mlp = nn.Linear(16, 16, bias=False)
    assert [child.name for child in tree(odd).children[0].children] == ["0", "1", "2"]
    named = nn.Module()
    named.first, named.second = nn.Linear(2, 2), nn.Linear(2, 2)
    assert [child.name for child in tree(named).children] == [
        "first",
        "second",
    ]  # only numbered ones are folded


def test_every_tap_is_named_in_the_tree():
    pipe = Pipe()
    shown = tree(pipe)

    def found(node, path):
        yield from ((*path, name) for name in node.taps)
        for child in node.children:
            yield from found(child, (*path, child.name))

    names = {".".join(path).replace(f"0..{BLOCKS - 1}", "0") for path in found(shown, ())}
    assert names == {name for name in taps(pipe).names if ".1." not in name and ".2." not in name}


def test_a_pipeline_lists_its_components_and_foreign_ones_by_kind():
    class Remote:
        pass

    pipe = Pipe()
    pipe.components["text"] = Remote()
    shown = tree(pipe, "mine")
    assert shown.name == "mine" and [(child.name, child.kind) for child in shown.children] == [
        ("dit", "Toy"),
        ("text", "Remote"),
    ]
    with pytest.raises(
        TypeError, match="tree of list: it holds no modules; give a pipeline, or a component such as pipe.dit"
    ):
        tree([1])


def test_the_notebook_form_is_escaped_and_unfolds():
    shown = tree(nn.Sequential(nn.Linear(2, 3)), "<mine>")
    page = shown._repr_html_()
    assert (
        "&lt;mine&gt;" in page
        and "<mine>" not in page
        and page.count("<details") == page.count("</details>") == 2
    )
    assert "weight [3, 2] float32 24 B" in page


def test_weights_without_memory_are_counted_too():
    with torch.device("meta"):
        shown = tree(nn.Linear(10_000, 10_000))
    assert shown.bytes == 400_040_000 and "400 MB" in repr(shown)
