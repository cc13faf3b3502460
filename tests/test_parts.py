"""The exercises that build a part: right ones pass, and usual wrong ones are told their mistake."""

import pytest
import torch
from answers import rejected, solution

from moddiff import capture, checks, configs, dit


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


def compares(moves, tolerance=1e-3, both=True):
    """A proof that moves two tokens by each of `moves` and compares the scores."""

    def proof(score):
        here, there = (1, 2, 3), (4, 0, 5)
        for move in moves:
            moved = [tuple(p + m for p, m in zip(position, move)) for position in (here, there)]
            after = score(moved[0], moved[1] if both else there)
            if abs(after - score(here, there)) > tolerance:
                return False
        return True

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


def merged_weight(scale=lambda alpha, rank: alpha / rank, product=lambda up, down: up @ down, sum_of=None):
    """The exercise of 15_lora, with one thing changed."""

    def merged(weight, down, up, alpha, strength):
        rank = len(down)
        change = scale(rank if alpha is None else alpha, rank) * product(up, down)
        return weight + strength * change if sum_of is None else sum_of(weight, change, strength)

    return merged


def test_the_merged_weight_of_the_solution_is_right():
    assert checks.lora(solution("15_lora", "my_merge")).right is True
    assert checks.lora(merged_weight()).right is True
    assert checks.lora(lambda *arguments: None).right is None


@pytest.mark.parametrize(
    "wrong, hint",
    [
        (merged_weight(lambda alpha, rank: 1), "alpha / rank is missing"),
        (merged_weight(lambda alpha, rank: alpha), "not divided by the rank"),
        (merged_weight(lambda alpha, rank: rank / alpha), "upside down"),
        (merged_weight(lambda alpha, rank: alpha / rank**0.5), "rsLoRA"),
        (merged_weight(product=lambda up, down: down.T @ up.T), "halves are exchanged"),
        (merged_weight(product=lambda up, down: down @ up), "it stopped with"),
        (merged_weight(sum_of=lambda weight, change, strength: weight + change), "strength has no effect"),
        (merged_weight(sum_of=lambda weight, change, strength: strength * change), "the change alone"),
        (merged_weight(sum_of=lambda weight, change, strength: weight - strength * change), "subtracted"),
        (
            merged_weight(sum_of=lambda weight, change, strength: strength * (weight + change)),
            "scales the weight",
        ),
        (
            merged_weight(sum_of=lambda weight, change, strength: weight.add_(strength * change)),
            "changed in place",
        ),
        (
            lambda weight, down, up, alpha, strength: weight + strength * alpha / len(down) * up @ down,
            "stopped",
        ),
    ],
)
def test_a_wrongly_merged_weight_is_told_its_mistake(wrong, hint):
    rejected(checks.lora(wrong), hint)


def tile_weights(rise=lambda place, overlap: (2 * place / overlap - 0.5).clamp(0, 1), middle=0.5):
    """The exercise of 17_offload, with one thing changed."""

    def weights(length, before, after):
        place = torch.arange(length) + middle
        found = torch.ones(length)
        if before:
            found = found * rise(place, before)
        if after:
            found = found * rise(length - place, after)
        return found

    return weights


def test_the_weights_of_a_tile_of_the_solution_are_right():
    assert checks.offload(solution("17_offload", "my_weights")).right is True
    assert checks.offload(tile_weights()).right is True
    assert checks.offload(lambda *arguments: None).right is None


@pytest.mark.parametrize(
    "wrong, hint",
    [
        (tile_weights(lambda place, overlap: (place / overlap).clamp(0, 1)), "over the whole overlap"),
        (lambda length, before, after: tile_weights()(length, after, before), "changed places"),
        (lambda length, before, after: 1 - tile_weights()(length, before, after), "counts fully"),
        (lambda length, before, after: tile_weights()(length, before, 0), "after is not used"),
        (lambda length, before, after: tile_weights()(length, 0, after), "before is not used"),
        (tile_weights(middle=0), "i + 0.5"),
        (lambda length, before, after: torch.ones(length + 1), "got [11]; expected [10]"),
        (lambda length, before, after: torch.ones(length) * (1 / before), "it stopped with ZeroDivision"),
        (tile_weights(lambda place, overlap: (place / overlap).clamp(0, 1) ** 2), "a quarter of 0"),
    ],
)
def test_wrong_weights_of_a_tile_are_told_by_their_mistake(wrong, hint):
    rejected(checks.offload(wrong), hint)
