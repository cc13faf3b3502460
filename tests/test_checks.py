"""Checkers accept right answers, and reject plausible wrong ones with a hint that names the mistake."""

import json
import re
from pathlib import Path

import pytest
import torch

from moddiff import capture, checks, configs, dit, keymaps, patch
from moddiff.hooks import identity, live_handles, zero


def rejected(verdict, hint):
    """The verdict says no, and its sentence names the mistake."""
    assert verdict.right is False
    assert hint in verdict.text, verdict.text


def solution(notebook, name):
    """The function that the folded solution of a notebook's exercise defines, run as a reader would run it."""
    cells = json.loads(
        (Path(__file__).parents[1] / "notebooks" / f"{notebook}.ipynb").read_text(encoding="utf-8")
    )["cells"]
    texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
    blocks = [
        block
        for text in texts
        if "<summary>Solution" in text
        for block in re.findall(r"(?ms)^```python\n(.*?)^```", text)
    ]
    namespace = {}
    exec(next(block for block in blocks if f"def {name}(" in block), namespace)
    return namespace[name]


def test_a_prediction_stays_closed_until_there_is_a_guess():
    closed = checks.reveal(None, right="b", a="No, it grows.", b="Yes, it shrinks.")
    assert closed.right is None and "shrinks" not in closed.text


def test_a_wrong_guess_is_explained_and_so_are_the_others():
    opened = checks.reveal("a", right="b", a="No, it grows.", b="Yes, it shrinks.")
    assert opened.right is False and opened.text.startswith("No, it grows.") and "(b) Yes" in opened.text
    assert checks.reveal("b", right="b", a="No.", b="Yes.").right is True
    rejected(checks.reveal("z", right="b", a="No.", b="Yes."), "'z' is not an option")


def test_a_prediction_without_its_right_answer_is_an_error():
    with pytest.raises(ValueError, match="has no explanation"):
        checks.reveal(None, right="c", a="No.")


# ---- 09_solvers -------------------------------------------------------------------------------------------------------


def second_order(weight):
    """A step towards x0 + weight * (x0 - x0_old), where weight may look at (h, h_old, the same in sigma)."""

    def step(x, x0, x0_old, sigma, sigma_next, sigma_old):
        clock = lambda level: ((1 - level) / level).log()
        w = weight(
            clock(sigma_next) - clock(sigma),
            clock(sigma) - clock(sigma_old),
            (sigma - sigma_next) / (sigma_old - sigma),
        )
        keep = sigma_next / sigma
        return keep * x + (1 - keep) * (x0 + w * (x0 - x0_old))

    return step


def test_the_second_order_step_of_the_solution_is_right():
    assert checks.solvers(solution("09_solvers", "my_step")).right is True
    assert checks.solvers(lambda *arguments: None).right is None


@pytest.mark.parametrize(
    "weight, hint",
    [
        (lambda h, old, ratio: 0.0, "that is Euler"),
        (lambda h, old, ratio: h / old, "whole step"),
        (lambda h, old, ratio: -0.5 * h / old, "backwards"),
        (lambda h, old, ratio: 0.5, "equally long"),
        (lambda h, old, ratio: 0.5 * ratio, "log_snr"),
        (lambda h, old, ratio: 0.5 * old / h, "upside down"),
        (lambda h, old, ratio: 7.0, "expected a tensor [2, 4]"),
    ],
)
def test_a_wrong_second_order_step_is_told_what_it_is(weight, hint):
    rejected(checks.solvers(second_order(weight)), hint)


# ---- 10_guidance ------------------------------------------------------------------------------------------------------


def test_guidance_on_an_interval_of_the_solution_is_right():
    assert checks.guidance(solution("10_guidance", "my_guide")).right is True
    assert checks.guidance(lambda *arguments: None).right is None


@pytest.mark.parametrize(
    "outside, hint",
    [
        (lambda predict, scale: predict("cond") + 0 * predict("uncond"), "a pass of the model for nothing"),
        (lambda predict, scale: scale * predict("cond"), "4 times cond"),
        (lambda predict, scale: predict("uncond"), "that is uncond"),
        (
            lambda predict, scale: predict("uncond") + scale * (predict("cond") - predict("uncond")),
            "still guided",
        ),
        (lambda predict, scale: predict("cond") / 2 + predict("cond") / 2, "called 2 times"),
    ],
)
def test_what_is_wrong_outside_the_interval_is_named(outside, hint):
    def guide(predict, sigma, scale, lowest, highest):
        if not lowest <= sigma <= highest:
            return outside(predict, scale)
        cond, uncond = predict("cond"), predict("uncond")
        return uncond + scale * (cond - uncond)

    rejected(checks.guidance(guide), hint)


@pytest.mark.parametrize(
    "combine, inside, hint",
    [
        (lambda c, u, s: c + s * (u - c), lambda s, a, b: a <= s <= b, "changed places"),
        (lambda c, u, s: c + s * (c - u), lambda s, a, b: a <= s <= b, "starts from cond"),
        (lambda c, u, s: u + s * (c - u), lambda s, a, b: a < s < b, "both ends belong"),
        (lambda c, u, s: u + s * (c - u), lambda s, a, b: not a <= s <= b, "here the push belongs"),
    ],
)
def test_what_is_wrong_inside_the_interval_is_named(combine, inside, hint):
    def guide(predict, sigma, scale, lowest, highest):
        cond = predict("cond")
        return combine(cond, predict("uncond"), scale) if inside(sigma, lowest, highest) else cond

    rejected(checks.guidance(guide), hint)


def names_by(rules):
    """A translator that replaces pieces of names, rule after rule; an official norm2 is refused unless a rule places it."""

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
    table = keymaps.places("dit", config, list(configs.empty("dit", config).state_dict()), "official")
    ours = {place.names[0]: name for name, place in table.items()}
    assert checks.weights(lambda keys: {key: ours.get(key) for key in keys}).right


def condition(rest=0.0, mask_of=None, mask_first=True, whole=True):
    """The exercise of 11_image, with one thing changed."""

    def y(encode, picture, frames, ft):
        video = torch.full((1, 3, frames, *picture.shape[1:]), rest)
        video[:, :, 0] = picture
        z = encode(video)
        if not whole:
            z = torch.cat([z[:, :, :1], torch.zeros_like(z[:, :, 1:])], 2)
        mask = torch.zeros(1, ft, *z.shape[2:])
        mask[:, :, 0] = 1
        mask = mask if mask_of is None else mask_of(mask)
        return torch.cat([mask, z] if mask_first else [z, mask], 1)

    return y


def test_a_mask_and_a_latent_of_picture_and_gray_are_right():
    assert checks.image(condition()).right
    assert checks.image(lambda *given: None).right is None


def test_the_folded_solution_of_the_image_exercise_is_right():
    assert checks.image(solution("11_image", "my_condition")).right


def test_wrong_conditionings_are_told_by_their_mistake():
    rejected(checks.image(condition(rest=-1.0)), "black")
    rejected(checks.image(condition(whole=False)), "only the picture went through")
    rejected(checks.image(condition(mask_first=False)), "changed places")
    rejected(checks.image(condition(mask_of=lambda mask: 1 - mask)), "inverted")
    rejected(
        checks.image(
            condition(mask_of=lambda mask: mask * torch.tensor([1.0, 0, 0, 0])[None, :, None, None, None])
        ),
        "counts once",
    )
    rejected(
        checks.image(lambda encode, picture, frames, ft: encode(picture[None, :, None])),
        "expected [1, 7, 4, 2, 3]",
    )


# ---- 07_dit -----------------------------------------------------------------------------------------------------------


def test_the_modulation_of_the_solution_is_right_and_is_that_of_the_model():
    mine = solution("07_dit", "my_modulation")
    assert checks.dit(mine).right is True
    assert checks.dit(lambda *arguments: None).right is None
    small = dit.DiTConfig(
        "t2v", in_dim=4, dim=8, ffn_dim=8, freq_dim=8, text_dim=4, out_dim=4, num_heads=1, num_layers=2
    )
    model = configs.MODULES["dit"][0](small).requires_grad_(False)
    with capture(model, "blocks.1.modulation", "time") as seen:
        model(torch.randn(1, 4, 1, 2, 2), torch.tensor([500.0]), [torch.randn(3, 4)])
    torch.testing.assert_close(
        mine(seen["time"][0], model.time_projection[1], model.blocks[1].modulation),
        seen["blocks.1.modulation"][0],
    )


@pytest.mark.parametrize(
    "wrong, hint",
    [
        (lambda time, linear, table: table + linear(time).unflatten(-1, (6, -1)), "is missing: SiLU"),
        (
            lambda time, linear, table: table + torch.nn.functional.silu(linear(time)).unflatten(-1, (6, -1)),
            "SiLU comes before",
        ),
        (
            lambda time, linear, table: linear(time * time.sigmoid()).unflatten(-1, (6, -1)),
            "table is missing",
        ),
        (
            lambda time, linear, table: table * linear(time * time.sigmoid()).unflatten(-1, (6, -1)),
            "not multiplied",
        ),
        (
            lambda time, linear, table: table + linear(time * time.sigmoid()).unflatten(-1, (-1, 6)).mT,
            "every sixth",
        ),
        (lambda time, linear, table: linear(time * time.sigmoid()), "expected [2, 6, 5]"),
    ],
)
def test_a_wrong_modulation_is_told_what_it_is(wrong, hint):
    rejected(checks.dit(wrong), hint)


# ---- 08_rope ----------------------------------------------------------------------------------------------------------


def compares(moves, tolerance=1e-3, both=True):
    """A proof that moves two tokens by each of `moves` and compares the scores."""

    def proof(score):
        here, there = (1, 2, 3), (4, 0, 5)
        moved = lambda place, move: tuple(p + m for p, m in zip(place, move))
        return all(
            abs(score(moved(here, move), moved(there, move) if both else there) - score(here, there))
            <= tolerance
            for move in moves
        )

    return proof


def test_a_proof_that_moves_two_tokens_along_every_axis_is_right():
    assert checks.rope(solution("08_rope", "only_offsets_matter")).right is True
    assert checks.rope(compares([(100, 7, 3)])).right is True
    assert checks.rope(lambda score: None).right is None


def test_a_proof_may_assert_instead_of_returning_false():
    def proof(score):
        assert compares([(3, 5, 9)])(score)
        return True

    assert checks.rope(proof).right is True


@pytest.mark.parametrize(
    "proof, hint",
    [
        (lambda score: True, "did it compare anything"),
        (compares([(100, 0, 0)]), "the row itself"),
        (compares([(0, 7, 3)]), "the frame itself"),
        (compares([(100, 7, 3)], tolerance=0), "up to rounding"),
        (compares([(100, 7, 3)], both=False), "move *both* tokens"),
        (lambda score: "yes", "got str"),
    ],
)
def test_a_proof_that_proves_too_little_or_too_much_is_told_so(proof, hint):
    rejected(checks.rope(proof), hint)


# ---- 02_attention -----------------------------------------------------------------------------------------------------


def masked_attention(
    of=lambda scores, mask: scores.masked_fill(~mask, float("-inf")).softmax(-1).nan_to_num(), scale=8**-0.5
):
    """The exercise of 02_attention, with one thing changed."""
    return lambda q, k, v, mask: of(q @ k.mT * scale, mask) @ v


def test_the_masked_attention_of_the_solution_is_right():
    assert checks.attention(solution("02_attention", "my_attention")).right is True
    assert checks.attention(masked_attention()).right is True
    assert checks.attention(lambda *arguments: None).right is None


NOWHERE = float("-inf")


@pytest.mark.parametrize(
    "wrong, hint",
    [
        (
            masked_attention(lambda scores, mask: scores.masked_fill(mask, NOWHERE).softmax(-1).nan_to_num()),
            "wrong way round",
        ),
        (masked_attention(scale=1), "not divided"),
        (masked_attention(scale=1 / 8), "root of d is enough"),
        (masked_attention(lambda scores, mask: scores.softmax(-1)), "no effect"),
        (masked_attention(lambda scores, mask: scores.softmax(-1) * mask), "after the softmax"),
        (masked_attention(lambda scores, mask: (scores * mask).softmax(-1)), "exp(0) is 1"),
        (
            masked_attention(
                lambda scores, mask: scores.masked_fill(~mask, NOWHERE).softmax(-2).nan_to_num()
            ),
            "over the queries",
        ),
        (masked_attention(lambda scores, mask: scores.masked_fill(~mask, NOWHERE).softmax(-1)), "it got NaN"),
        (
            masked_attention(lambda scores, mask: scores.masked_fill(~mask, -1e9).softmax(-1)),
            "it got something",
        ),
        (lambda q, k, v, mask: q @ k.mT, "got [2, 3, 5, 7]"),
        (masked_attention(lambda scores, mask: scores), "numbers are not"),
    ],
)
def test_a_wrong_masked_attention_is_told_by_its_mistake(wrong, hint):
    rejected(checks.attention(wrong), hint)


# ---- 03_hooks ---------------------------------------------------------------------------------------------------------


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


# ---- 05_vae -----------------------------------------------------------------------------------------------------------


def test_the_past_of_the_solution_is_right():
    assert checks.vae(solution("05_vae", "my_past")).right is True
    assert checks.vae(lambda x, kernel, history: None).right is None


def past_by(without, remembered=lambda x, history: torch.cat([history, x], 2)):
    """An answer that does the one where there is no history and the other where there is one."""
    return lambda x, kernel, history: without(x, kernel - 1) if history is None else remembered(x, history)


def zeros_before(x, past):
    return torch.nn.functional.pad(x, (0, 0, 0, 0, past, 0))


@pytest.mark.parametrize(
    "without, hint",
    [
        (lambda x, past: torch.nn.functional.pad(x, (0, 0, 0, 0, 1, 1)), "the future leaks"),
        (lambda x, past: torch.nn.functional.pad(x, (0, 0, 0, 0, 0, past)), "the future leaks"),
        (lambda x, past: torch.nn.functional.pad(x, (past, 0)), "pads the width"),
        (lambda x, past: zeros_before(x, past + 1), "one frame too many"),
        (lambda x, past: torch.cat([x[:, :, :1]] * past + [x], 2), "first frame is repeated"),
        (lambda x, past: x, "expected [1, 2, 7, 3, 4]"),
    ],
)
def test_padding_in_the_wrong_place_is_named(without, hint):
    rejected(checks.vae(past_by(without)), hint)


@pytest.mark.parametrize(
    "remembered, hint",
    [
        (lambda x, history: zeros_before(x, 3), "not used"),
        (lambda x, history: torch.cat([x, history], 2), "happened before"),
        (lambda x, history: zeros_before(torch.cat([history, x], 2), 3), "takes their place"),
    ],
)
def test_a_history_in_the_wrong_place_is_named(remembered, hint):
    rejected(checks.vae(past_by(zeros_before, remembered)), hint)


# ---- 06_flow ----------------------------------------------------------------------------------------------------------


def test_one_look_at_any_level_of_the_solution_is_right():
    assert checks.flow(solution("06_flow", "one_look")).right is True
    assert checks.flow(lambda predict, x0, noise, sigma: None).right is None


def look_by(
    clock=lambda sigma: int(1000 * sigma),
    mix=lambda x0, noise, sigma: (1 - sigma) * x0 + sigma * noise,
    walk=lambda x, v, sigma: x - sigma * v,
):
    def look(predict, x0, noise, sigma):
        x = mix(x0, noise, sigma)
        return walk(x, predict(x, clock(sigma)), sigma)

    return look


@pytest.mark.parametrize(
    "change, hint",
    [
        (dict(clock=lambda sigma: sigma), "told sigma"),
        (dict(clock=lambda sigma: 1000 * (1 - sigma)), "expected 1000 sigma"),
        (dict(mix=lambda x0, noise, sigma: sigma * x0 + (1 - sigma) * noise), "changed places"),
        (dict(mix=lambda x0, noise, sigma: x0 + sigma * noise), "something else than x"),
        (dict(walk=lambda x, v, sigma: x + sigma * v), "the sign"),
        (dict(walk=lambda x, v, sigma: x - v), "only sigma of the way"),
        (dict(walk=lambda x, v, sigma: v), "velocity itself"),
    ],
)
def test_a_wrong_look_is_told_what_it_is(change, hint):
    rejected(checks.flow(look_by(**change)), hint)


def test_an_x0_that_never_asked_the_model_is_refused():
    rejected(checks.flow(lambda predict, x0, noise, sigma: x0), "never called")


def guided_loop(dit, solver, schedule, cond, uncond, noise, scale, carry=True, swap=False, base=True):
    x, memory = noise, None
    for t, sigma, sigma_next in schedule:
        with_words, without = dit(x, t[None], cond), dit(x, t[None], uncond)
        with_words, without = (without, with_words) if swap else (with_words, without)
        x, memory = solver.step(
            x, without * base + scale * (with_words - without), sigma, sigma_next, memory if carry else None
        )
    return x


def test_the_whole_loop_passes_and_a_loop_with_a_part_missing_is_told_which():
    assert checks.pipeline(guided_loop).right is True
    assert checks.pipeline(lambda *given: None) is checks.NOT_ATTEMPTED
    rejected(checks.pipeline(lambda *given: guided_loop(*given, carry=False)), "memory is lost")
    rejected(checks.pipeline(lambda *given: guided_loop(*given, swap=True)), "swapped")
    rejected(checks.pipeline(lambda *given: guided_loop(*given, base=False)), "only the change")
    rejected(checks.pipeline(lambda *given: given[5]), "came back unchanged")
    rejected(checks.pipeline(lambda *given: (guided_loop(*given), None)), "only x is asked for")
    rejected(
        checks.pipeline(
            lambda dit, solver, schedule, cond, uncond, noise, scale: dit(noise, schedule.timesteps[0], cond)
        ),
        "t[None]",
    )


def most_likely(word, table, key=None):
    def cuts(rest):
        heads = [rest[:i] for i in range(1, len(rest) + 1) if rest[:i] in table]
        return [[head, *tail] for head in heads for tail in cuts(rest[len(head) :])] if rest else [[]]

    return max(cuts(word), key=key or (lambda cut: sum(map(table.get, cut))))


def test_the_most_likely_cut_passes_and_the_usual_short_cuts_are_named():
    assert checks.text(most_likely).right is True
    assert checks.text(lambda word, table: None) is checks.NOT_ATTEMPTED
    rejected(
        checks.text(lambda word, table: most_likely(word, table, lambda cut: [len(piece) for piece in cut])),
        "longest piece each time",
    )
    rejected(
        checks.text(lambda word, table: most_likely(word, table, lambda cut: -len(cut))), "fewest pieces"
    )
    rejected(
        checks.text(lambda word, table: most_likely(word, table, lambda cut: -sum(map(table.get, cut)))),
        "least likely",
    )
    rejected(
        checks.text(
            lambda word, table: most_likely(word, table, lambda cut: sum(map(table.get, cut)) / len(cut))
        ),
        "mean score",
    )
    rejected(checks.text(lambda word, table: list(word)), "single letters")
    rejected(checks.text(lambda word, table: most_likely(word[1:], table)), "every letter belongs")
    rejected(checks.text(lambda word, table: [word]), "must be in the table")


# ---- 14_tracing -------------------------------------------------------------------------------------------------------


def searching(blocks_of, allowed=0.2, end=0):
    """A search over the runs that blocks_of(first, blocks) offers, with so much shape allowed; `end` is added to the last block."""

    def answer(run, blocks):
        tried = {
            (first, last): run(first, last) for first in range(blocks) for last in blocks_of(first, blocks)
        }
        first, last = max(
            (place for place in tried if tried[place][1] <= allowed), key=lambda place: tried[place][0]
        )
        return first, last + end

    return answer


def test_the_search_for_blocks_of_the_solution_is_right():
    assert checks.tracing(solution("14_tracing", "my_blocks")).right is True
    assert checks.tracing(lambda run, blocks: None).right is None


everywhere = lambda first, blocks: range(blocks)


@pytest.mark.parametrize(
    "answer, hint",
    [
        (searching(everywhere, allowed=9), "moves the shape as well"),
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
