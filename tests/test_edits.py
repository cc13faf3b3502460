"""Does each ready edit do to the run what the same change does to a forward written by hand?"""

import copy

import pytest
import torch
from toy import HEADS, WIDTH, Pipe, Toy, by_hand, close, message, noise, opened

from moddiff.hooks import (
    capture,
    identity,
    live_handles,
    mean_over,
    patch,
    replace_attend,
    scale_by,
    transplant,
    zero,
)
from moddiff.hooks import noise as gaussian

RUN = noise()


@pytest.fixture
def toy():
    return Toy().requires_grad_(False)


@pytest.mark.parametrize("head", range(HEADS))
def test_zeroing_a_head_equals_zeroing_its_columns_of_the_output_projection(toy, head):
    edited = copy.deepcopy(toy)
    width = WIDTH // HEADS
    edited.blocks[1].attn.out.weight[:, head * width : (head + 1) * width] = 0
    with patch(toy, "blocks.1.attn.heads", zero(heads=head)):
        ablated = toy(RUN)
    assert torch.equal(ablated, edited(RUN))


EDITS = {
    "zero two tokens of two heads": (
        "heads",
        zero(heads=[0, 3], tokens=slice(1, 3)),
        lambda x: x * ~(mask(HEADS, [0, 3])[:, None, None] & mask(6, [1, 2])[:, None]),
    ),
    "double": ("resid_post", scale_by(2.0), lambda x: 2 * x),
    "scale a word's probability": (
        "probs",
        scale_by(0.5, words=2),
        lambda x: x * torch.where(mask(6, [2]), 0.5, 1.0),
    ),
    "mean over tokens": (
        "heads",
        mean_over("tokens", heads=1),
        lambda x: torch.where(mask(HEADS, [1])[:, None, None], x.mean(2, keepdim=True), x),
    ),
    "a function": ("scores", lambda x, where: x.flip(where.axis("m")), lambda x: x.flip(-1)),
    "an in-place function": ("out", lambda x, where: x.add_(1), lambda x: x + 1),
    "identity": ("probs", identity, lambda x: x),
}


def mask(size, on):
    return torch.tensor([i in on for i in range(size)])


@pytest.mark.parametrize("case", EDITS)
def test_each_edit_equals_the_same_change_in_the_forward_written_by_hand(toy, case):
    name, edit, meaning = EDITS[case]
    path = f"blocks.1.{'' if name.startswith('resid') else 'attn.'}{name}"
    expected = by_hand(
        toy, RUN, lambda tap, value, block: meaning(value) if (tap, block) == (name, 1) else value
    )
    plain = toy(RUN)
    with patch(toy, path, edit):
        patched = toy(RUN)
    close(patched, expected)
    assert torch.equal(toy(RUN), plain) and not live_handles()
    assert case == "identity" or (expected - plain).abs().max() > 1e-3


def test_noise_keeps_the_size_repeats_and_differs_by_place_and_seed(toy):
    def under(*edits):
        with capture(toy, "blocks.*.resid_post") as before:
            toy(RUN)
        seen = []
        for edit in edits:
            with patch(toy, "blocks.*.resid_post", edit), capture(toy, "blocks.*.resid_post") as after:
                toy(RUN)
            seen.append(after)
        return before, *seen

    before, a, again, other = under(gaussian(seed=1), gaussian(seed=1), gaussian(seed=2))
    assert torch.equal(a.stack("resid_post"), again.stack("resid_post")) and not torch.equal(
        a.stack("resid_post"), other.stack("resid_post")
    )
    first, second = a.get("resid_post", block=0), a.get("resid_post", block=1)
    assert not torch.allclose(first / first.norm(), second / second.norm())
    assert 0.7 < first.norm() / before.get("resid_post", block=0).norm() < 1.4


def test_a_swapped_attention_is_the_one_that_runs(toy):
    expected = by_hand(
        toy,
        RUN,
        lambda tap, value, block: (
            value.mean(2, keepdim=True).expand_as(value) * 0 + 7 if (tap, block) == ("heads", 1) else value
        ),
    )
    with patch(toy, "blocks.1.attn.attend", replace_attend(lambda q, k, v: torch.full_like(q, 7))):
        close(toy(RUN), expected)
    softer = by_hand(
        toy, RUN, lambda tap, value, block: value * 0.5 if (tap, block) == ("scores", 1) else value
    )
    with patch(toy, "blocks.1.attn.attend", lambda attend, q, k, v, where: attend(q.mul_(0.5), k, v)):
        close(toy(RUN), softer)


def test_transplanting_everything_gives_the_other_run():
    pipe = Pipe()
    a, b = pipe(seed=1), pipe(seed=2)
    with capture(pipe, "velocity", "x", steps=range(4)) as A:
        pipe(seed=1)
    with patch(pipe, "x", transplant(A)), patch(pipe, "velocity", transplant(A)):
        assert torch.equal(pipe(seed=2), a)
    with patch(pipe, "x", transplant(A), steps=0):
        assert torch.equal(pipe(seed=2), a)
    assert torch.equal(pipe(seed=2), b) and not torch.equal(a, b)


def test_transplanting_some_tokens_moves_those_tokens_only(toy):
    other = noise(5)
    with capture(toy, "blocks.0.resid_post") as A:
        toy(other)
    theirs = {}
    by_hand(toy, other, lambda tap, value, block: theirs.setdefault((tap, block), value))

    def mixed(tap, value, block):
        if (tap, block) != ("resid_post", 0):
            return value
        return torch.cat([value[:, :2], theirs["resid_post", 0][:, 2:4], value[:, 4:]], 1)

    for tokens in (
        [2, 3],
        range(2, 4),
        slice(2, 4),
        torch.tensor([2, 3]),
        torch.tensor([0, 0, 1, 1, 0, 0], dtype=torch.bool),
    ):
        with patch(toy, "blocks.0.resid_post", transplant(A, tokens=tokens)):
            close(toy(RUN), by_hand(toy, RUN, mixed))


def test_a_record_of_a_component_fits_the_pipeline_it_belongs_to():
    pipe = Pipe()
    with capture(pipe.dit, "blocks.2.resid_post") as A:
        a = pipe(seed=1)
    with (
        patch(pipe, "dit.blocks.2.resid_post", transplant(A)),
        patch(pipe, "x", lambda x, where: noise(1) if where.step == 0 else x),
    ):
        assert torch.equal(pipe(seed=2), a)


def test_a_head_that_does_not_exist_is_named_with_the_number_there_is(toy):
    text = message(IndexError, opened(patch(toy, "blocks.2.attn.heads", zero(heads=15)), lambda: toy(RUN)))
    assert (
        "zero(heads=15) at blocks.2.attn.heads (b heads n d), axis heads: no 15; this axis has 4, 0 to 3"
        in text
    )
    text = message(IndexError, opened(capture(toy, "blocks.2.attn.probs", heads=4), lambda: toy(RUN)))
    assert "heads=: no 4; this axis has 4, 0 to 3" in text


def test_an_axis_that_does_not_exist_is_named_before_the_run(toy):
    assert "blocks.2.attn.out has the axes b, n, c; there is no 'heads'" in message(
        ValueError, opened(patch(toy, "blocks.2.attn.out", zero(heads=1)), lambda: None)
    )


def test_a_transplant_from_a_shorter_or_different_run_is_refused():
    short, long = Pipe(steps=2), Pipe(steps=4)
    with capture(short, "x") as A, capture(short, "velocity") as other:
        short()
    text = message(ValueError, opened(patch(long, "x", transplant(A)), long))
    assert (
        "transplant at x, step 1: captured at sigma 0.5000, running at 0.7500; both runs need the same steps"
        in text
    )
    text = message(LookupError, opened(patch(long, "x", transplant(A), steps=[3]), long))
    assert (
        "transplant at x, step 3, branch None: the record of x holds steps 0, 1 and branches none; "
        "give both runs the same steps" in text
    )
    text = message(LookupError, opened(patch(long, "x", transplant(other)), long))
    assert "the record holds velocity; capture x in the first run" in text


def test_a_transplant_of_another_size_or_of_a_pass_too_many_is_refused(toy):
    with capture(toy, "blocks.0.resid_post") as A:
        toy(noise(n=5))
    text = message(ValueError, opened(patch(toy, "blocks.0.resid_post", transplant(A)), lambda: toy(RUN)))
    assert "[2, 5, 16] was captured, [2, 6, 16] runs here (b n c); both runs need the same size" in text
    with capture(toy, "blocks.0.resid_post") as A:
        toy(RUN)
        toy(RUN)
    text = message(
        LookupError,
        opened(patch(toy, "blocks.0.resid_post", transplant(A)), lambda: (toy(RUN), toy(RUN), toy(RUN))),
    )
    assert "this is pass 3, the record holds 2; announce the loop with at(step=i)" in text


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: scale_by("half"), "scale_by(factor) is 'half'; expected a number"),
        (lambda: gaussian(scale=None), "noise(scale) is None; expected a number"),
        (lambda: transplant({"x": RUN}), "transplant of dict: expected the Record that a capture gave"),
        (lambda: replace_attend("math"), "replace_attend of str: expected a function (q, k, v) -> heads"),
    ],
)
def test_an_edit_of_what_cannot_be_is_refused_when_it_is_made(make, text):
    assert text in message(TypeError, make)


@pytest.mark.parametrize("which", ["first", [[0], [1, 2]], 10**30, None])
def test_what_names_no_place_on_an_axis_is_refused(toy, which):
    name = "blocks.2.attn.heads"
    assert "names no places on an axis" in message(
        TypeError, opened(patch(toy, name, zero(heads=which)), lambda: toy(RUN))
    )


@pytest.mark.parametrize("which", [[], slice(6, 9), range(0), torch.zeros(6, dtype=torch.bool)])
def test_an_edit_that_would_change_nothing_is_refused(toy, which):
    name = "blocks.2.resid_post"
    assert "axis tokens: expected whole numbers from 0 to 5, got []" in message(
        IndexError, opened(patch(toy, name, zero(tokens=which)), lambda: toy(RUN))
    )
