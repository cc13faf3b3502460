"""Does a record hold what was asked for, and give it back by name and place?"""

import torch
from toy import HEADS, WIDTH, Pipe, Toy, message, noise

from moddiff.hooks import at, capture

RUN = noise()


def test_steps_blocks_and_branch_choose_visits():
    pipe = Pipe()
    with capture(pipe, "dit.blocks.*.resid_post", steps=[0, 2], blocks=[0, 2], branch="cond") as seen:
        pipe()
    assert [(w.block, w.step, w.branch, w.sigma) for w, _ in seen] == [
        (0, 0, "cond", 1.0),
        (2, 0, "cond", 1.0),
        (0, 2, "cond", 0.5),
        (2, 2, "cond", 0.5),
    ]
    stacked = seen.stack("resid_post")
    assert stacked.shape == (2, 2, *RUN.shape) and seen.axes("resid_post") == {
        "block": [0, 2],
        "step": [0, 2],
    }
    assert torch.equal(stacked[1, 0], by_found(seen, block=2, step=0)) and torch.equal(
        stacked[0, 1], seen.get("resid_post", block=0, step=2)
    )
    assert (
        "dit.blocks.0.resid_post" in repr(seen)
        and "4 values" in repr(seen)
        and "<table>" in seen._repr_html_()
    )


def test_more_than_two_branches_are_named_one_by_one():
    toy = Toy()
    with capture(toy, "blocks.0.resid_post") as seen:
        for branch in ("cond", "uncond", "image"):
            with at(branch=branch):
                toy(RUN)
    assert "cond, image, uncond" in repr(seen) and seen.stack("resid_post").shape == (1, 3, *RUN.shape)


def by_found(seen, **coordinates):
    return next(value for where, value in seen if all(getattr(where, k) == v for k, v in coordinates.items()))


def test_reading_a_record_wrongly_says_what_it_holds():
    pipe = Pipe()
    with capture(pipe, "dit.blocks.*.attn.q", "dit.blocks.*.resid_post") as seen:
        pipe()
    assert "nothing was captured at 'attn.k'; this record holds dit.blocks.0.attn.q" in message(
        KeyError, lambda: seen["attn.k"]
    )
    assert (
        "8 values; it was seen at steps 0..3, branches cond, uncond, blocks 1; say which, or use stack()"
        in message(KeyError, lambda: seen["dit.blocks.1.resid_post"])
    )
    assert seen.stack("attn.q").shape == (3, 4, 2, 2, HEADS, 6, WIDTH // HEADS) and list(
        seen.axes("attn.q")
    ) == ["block", "step", "branch"]
    assert "names several taps of one block" in message(ValueError, lambda: seen.stack("dit.*"))
