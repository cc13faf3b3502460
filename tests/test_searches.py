"""The exercises that search: right finds pass, and usual wrong ones are told their mistake."""

import numpy as np
import pytest
from answers import rejected, solution

from moddiff import capture, checks, configs, dit, keymaps, patch
from moddiff.hooks import identity, live_handles, zero


def without_the_loudest(
    pick=lambda each: each.sum(-1).mean(-1).argmax(),
    order=lambda block, head: (block, head),
    pattern="blocks.{block}.cross_attn.heads",
    edit=lambda head: zero(heads=head),
):
    """The exercise of 03_hooks, with one thing changed."""

    def loudest(dit, run, tokens):
        with capture(dit, "blocks.*.cross_attn.probs") as seen:
            run()
        block, head = divmod(int(pick(seen.stack("cross_attn.probs")[:, 0][..., tokens])), 4)
        with patch(dit, pattern.format(block=block), edit(head)):
            return *order(block, head), run()

    return loudest


def test_the_ablation_of_the_solution_is_right():
    assert checks.hooks(solution("03_hooks", "without_the_loudest")).right is True
    assert checks.hooks(without_the_loudest()).right is True
    assert (
        checks.hooks(without_the_loudest(pattern="blocks.{block}.cross_attn.probs")).right is True
    )  # nothing listened to: the same
    assert checks.hooks(lambda *arguments: None).right is None


@pytest.mark.parametrize(
    "change, hint",
    [
        (dict(pick=lambda each: each.sum(-1).mean(-1).argmin()), "quietest"),
        (dict(pick=lambda each: each[..., 0].mean(-1).argmax()), "only the first"),
        (dict(pick=lambda each: each.sum(-1).amax(-1).argmax()), "brightest cell"),
        (dict(order=lambda block, head: (head, block)), "changed places"),
        (dict(pick=lambda each: 10), "block 2, head 2 is not"),
        (dict(pattern="blocks.*.cross_attn.heads"), "in every block"),
        (dict(edit=lambda head: identity), "the result is the plain run"),
        (dict(pattern="blocks.{block}.self_attn.heads"), "not the run without it"),
    ],
)
def test_a_wrong_ablation_is_told_by_its_mistake(change, hint):
    rejected(checks.hooks(without_the_loudest(**change)), hint)


def test_an_ablation_outside_the_block_or_left_open_is_told():
    def outside(dit, run, tokens):
        return *without_the_loudest()(dit, run, tokens)[:2], run()

    def open_ended(dit, run, tokens):
        patch(dit, "blocks.1.cross_attn.heads", zero(heads=0)).__enter__()
        return without_the_loudest()(dit, run, tokens)

    rejected(checks.hooks(outside), "plain run")
    rejected(checks.hooks(open_ended), "still open")
    assert not live_handles()
    rejected(checks.hooks(lambda dit, run, tokens: run()), "expected (block, head, result)")
    rejected(checks.hooks(lambda dit, run, tokens: (None, "2", run())), "it stopped with TypeError: int()")


def names_by(rules):
    """A translator that replaces pieces of names, rule after rule; norm2 is refused unless a rule has it."""

    def names(keys):
        found = {}
        for key in keys:
            name = key
            for there, here in rules.items():
                name = name.replace(there, here)
            found[key] = None if ".norm2." in name else name
        return found

    return names


RULES = {
    "time_embedding": "time_mlp",
    "text_embedding": "text_mlp",
    "head.modulation": "final.modulation",
    "head.head": "final.linear",
    "img_emb.proj.3": "image_mlp.down",
    ".o.": ".out.",
    "norm3": "norm_cross",
    "norm_k_img": "image_norm_k",
    "k_img": "image_k",
}


def test_ten_names_are_right_when_nine_find_their_place_and_one_is_refused():
    assert checks.weights(names_by(RULES)).right
    assert checks.weights(lambda keys: None).right is None


def test_wrong_names_are_told_by_their_mistake():
    rejected(checks.weights(names_by(RULES | {"norm2": "norm_cross"})), "norm2 is Diffusers' word")
    rejected(
        checks.weights(names_by({"k_img": "image_k"} | {a: b for a, b in RULES.items() if a != "k_img"})),
        "hit inside norm_k_img",
    )
    rejected(checks.weights(lambda keys: {"blocks.1.norm3.bias": "blocks.1.norm_cross.bias"}), "every key")
    fixed = names_by(RULES | {f"blocks.{i}.": "blocks.1." for i in (0, 37)})
    rejected(checks.weights(fixed), "number is fixed")
    rejected(checks.weights(names_by({a: b for a, b in RULES.items() if a != "norm3"})), "left as it is")


def test_the_folded_solution_of_the_weights_exercise_is_right():
    assert checks.weights(solution("13_weights", "my_names")).right


def test_the_names_that_the_exercise_wants_are_those_of_the_library():
    config = dit.DiTConfig("i2v", 12, 24, 32, 16, 8, 4, 2, 38, image_dim=16)
    table = keymaps.counterparts("dit", config, list(configs.empty("dit", config).state_dict()), "official")
    ours = {place.names[0]: name for name, place in table.items()}
    assert checks.weights(lambda keys: {key: ours.get(key) for key in keys}).right


def searching(blocks_of, left=lambda shape: abs(shape) <= 0.2, end=0):
    """A search over the runs that blocks_of(first, blocks) offers; `end` is added to the last block.

    left  does the shape count as left alone
    """

    def answer(run, blocks):
        pairs = [(first, last) for first in range(blocks) for last in blocks_of(first, blocks)]
        allowed = [pair for pair in pairs if left(run(*pair)[1])]
        first, last = max(allowed, key=lambda pair: run(*pair)[0])
        return first, last + end

    return answer


def test_the_search_for_blocks_of_the_solution_is_right():
    assert checks.tracing(solution("14_tracing", "my_blocks")).right is True
    assert checks.tracing(lambda run, blocks: None).right is None


def everywhere(first, blocks):
    return range(blocks)


@pytest.mark.parametrize(
    "answer, hint",
    [
        (searching(everywhere, left=lambda shape: True), "moves the shape as well"),
        (searching(everywhere, left=lambda shape: shape <= 0.2), "below -0.2, and away counts like towards"),
        (searching(lambda first, blocks: [first]), "one block alone is not enough"),
        (searching(range), "goes round the end"),
        (searching(lambda first, blocks: range(blocks - 1)), "up to the last block"),
        (searching(everywhere, end=1), "last is included"),
        (lambda run, blocks: 3, "expected the pair"),
        (lambda run, blocks: (2, blocks), "two blocks from 0 to 6"),
        (lambda run, blocks: (run(2, 3)[0], 3), "expected the pair"),
    ],
)
def test_a_wrong_search_for_blocks_is_told_what_it_missed(answer, hint):
    rejected(checks.tracing(answer), hint)


def motion_reader(dark=False, upside=False, mirrored=False, sizes=True):
    """The solution of lesson 23, or one of its usual mistakes."""

    def answer(video):
        ground = np.zeros(3, int) if dark else video[0, 0, 0].astype(int)
        away = np.abs(video.astype(int) - ground).max(-1) > 40
        first, last = (np.argwhere(frame) for frame in away[[0, -1]])
        growth = len(last) / len(first)
        if sizes and not 0.5 < growth < 2:
            return "growing" if growth > 1 else "shrinking"
        dy, dx = last.mean(0) - first.mean(0)
        if max(abs(dy), abs(dx)) < 6:
            return "standing still"
        if abs(dx) > abs(dy):
            return "moving right" if (dx > 0) != mirrored else "moving left"
        return "moving down" if (dy > 0) != upside else "moving up"

    return answer


def test_a_motion_is_read_by_the_solution():
    assert checks.training(motion_reader()).right is True
    assert checks.training(lambda video: None).right is None


@pytest.mark.parametrize(
    "answer, hint",
    [
        (motion_reader(mirrored=True), "that is the opposite; is it the last frame minus the first"),
        (motion_reader(upside=True), "rows count from the top"),
        (motion_reader(sizes=False), "its size changes and its place does not"),
        (motion_reader(dark=True), "told from the background by its difference"),
        (lambda video: "left", "expected one of moving left"),
        (lambda video: video[99], "IndexError"),
    ],
)
def test_a_wrong_reader_of_motions_is_told_what_it_missed(answer, hint):
    rejected(checks.training(answer), hint)
