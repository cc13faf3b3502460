"""Does the reader's part compute what the library's does?  Attention, words, padding, rope, images, tiles."""

import torch
import torch.nn.functional as F

from ..attention import attend
from ..conditioning import with_picture
from ..extensions.tile import ramp
from ..rope import axis_pairs, clock_speeds, rotate
from .verdict import attempted, close, exercise, expect, expect_close, first_hint, shape_of


@exercise("the same as PyTorch's fused attention, and a query that may look nowhere gets zeros.")
def masked_attention(answer):
    """The exercise of 02_attention.

    answer(q, k, v, mask) -> masked attention [b, heads, n, d].

    mask  True: may look. A query that may look nowhere gets zeros
    """
    source = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(2, 3, count, 8, generator=source) for count in (5, 7, 7))
    # Every query may look somewhere but not everywhere, except the last one, which may look nowhere.
    mask, key = torch.rand(2, 1, 5, 7, generator=source) > 0.4, torch.arange(7)
    mask = (mask & (key != 1)) | (key == 0)
    mask[:, :, 4] = False
    # The shape first: a hint about numbers would only confuse somebody whose axes are in another order.
    heads = attempted(answer, q, k, v, mask)
    expect(
        shape_of(heads) == list(q.shape),
        f"got {shape_of(heads)}; expected {list(q.shape)} (b heads n d), one mean of values for each query",
    )
    right, scores = attend(q, k, v, bias=mask, kernel="math"), q @ k.mT / 8**0.5

    # One formula, of which each mistake below is a small change.
    def weigh(scores, allowed=mask, dim=-1):
        return scores.masked_fill(~allowed, float("-inf")).softmax(dim).nan_to_num() @ v

    mistakes = {
        "the mask is the wrong way round: True means that the query may listen": weigh(scores, ~mask),
        "the scores are not divided by the root of d": weigh(scores * 8**0.5),
        "divided by d; the root of d is enough": weigh(scores / 8**0.5),
        "the mask has no effect": scores.softmax(-1) @ v,
        "masked after the softmax, so rows no longer sum to 1; mask the scores": (
            (scores.softmax(-1) * mask) @ v
        ),
        "a masked score of 0 is still listened to, since exp(0) is 1; use minus infinity": (
            (scores * mask).softmax(-1) @ v
        ),
        "the softmax runs over the queries; each query's row has to sum to 1: softmax(-1)": (
            weigh(scores, dim=-2)
        ),
    }
    expect_close(
        heads[:, :, :4],
        right[:, :, :4],
        {hint: wrong[:, :, :4] for hint, wrong in mistakes.items()},
        "the shape is right and the numbers are not; scores, mask, softmax, mean of v, in this order",
    )
    nowhere = "NaN, the softmax of nothing but minus infinity" if heads.isnan().any() else "something"
    expect(
        close(heads, right),
        f"right for every query but the one that may look nowhere: it got {nowhere}; give it zeros",
    )


@exercise("the most likely cut, for every word. The tokenizers of UMT5 and of this model work by this rule")
def likeliest_pieces(answer):
    """The exercise of 04_text.

    answer(word, table) -> the pieces with the largest sum of scores.   table: {piece: log-probability}
    """
    # Scores chosen so that each usual shortcut (longest piece, fewest, best mean) cuts some word wrongly.
    table = dict.fromkeys("▁abcdefgh", -9.0) | {
        **{"▁abc": -3.0, "▁ab": -3.5, "cd": -3.5, "▁abcd": -50.0, "▁e": -6.0, "▁ef": -4.0},
        **{"fgh": -4.0, "gh": -7.0, "h": -4.0, "▁g": -2.0, "▁gh": -5.0},
    }
    words = ("▁abcd", "▁efgh", "▁gh", "▁had")

    def cuts(word):
        """Every way to cut a word into pieces of the table."""
        heads = [word[:i] for i in range(1, len(word) + 1) if word[:i] in table]
        return [[head, *rest] for head in heads for rest in cuts(word[len(head) :])] if word else [[]]

    def score(cut):
        return sum(table[piece] for piece in cut)

    def best(key):
        return [max(cuts(word), key=key) for word in words]

    answers = [attempted(answer, word, dict(table)) for word in words]
    for word, cut in zip(words, answers):
        expect(
            isinstance(cut, list) and all(isinstance(piece, str) for piece in cut),
            f"for {word!r} it returned {cut!r}; expected a list of pieces, such as ['▁a', 'b']",
        )
        expect(
            "".join(cut) == word and set(cut) <= set(table),
            f"{word!r} became {cut}; every letter belongs to one piece, and every piece must be in the table",
        )
    keys = {
        "that takes the longest piece each time; a long first piece can leave a bad rest": (
            lambda cut: [len(piece) for piece in cut]
        ),
        "that takes the fewest pieces; two likely ones can beat one unlikely one": (
            lambda cut: (-len(cut), score(cut))
        ),
        "that is the least likely cut; the scores are negative, and the largest sum is the nearest to 0": (
            lambda cut: -score(cut)
        ),
        "that takes the best mean score; add the scores up and do not divide by their number": (
            lambda cut: score(cut) / len(cut)
        ),
        "those are single letters; look for longer pieces in the table": len,
    }
    mistakes = {hint: answers == best(key) for hint, key in keys.items()}
    for cut, right in zip(answers, best(score)):
        better = f"but there is a cut of {''.join(cut)!r} with {score(right):g}"
        expect(cut == right, first_hint(mistakes, f"{cut} has the sum {score(cut):g}, {better}"))


@exercise("the past goes before, zeros or remembered, and the future has no way in.")
def causal_past(answer):
    """The exercise of 05_vae.

    answer(x, kernel, history) -> x with kernel - 1 frames of past before it: `history`, or zeros.
    """
    source = torch.Generator().manual_seed(5)
    x = torch.randn(1, 2, 5, 3, 4, generator=source)
    for kernel, remembered in ((3, False), (2, False), (4, True)):
        past, zeros = kernel - 1, torch.zeros(1, 2, kernel - 1, 3, 4)
        history = torch.randn(zeros.shape, generator=source) if remembered else None
        padded = attempted(answer, x.clone(), kernel, history)
        mistakes = {
            "some zeros stand after the last frame, so a frame would hear the next one: the future leaks. "
            "All of them belong before": (
                F.pad(x, (0, 0, 0, 0, past // 2, past - past // 2)),
                F.pad(x, (0, 0, 0, 0, 1, 1)),
                torch.cat([x, zeros], 2),
            ),
            "one frame too many: with kernel frames of past the output would be longer than the input; "
            "kernel - 1 is enough": F.pad(x, (0, 0, 0, 0, kernel, 0)),
            "the first frame is repeated; Wan puts zeros before it": torch.cat([x[:, :, :1]] * past + [x], 2),
            "that pads the width: F.pad counts axes from the last one, and time is the third from the end": (
                F.pad(x, (past, 0)),
                F.pad(x, (past, 0, 0, 0, 0, 0)),
            ),
            "that pads the height: F.pad counts axes from the last one, and time is the third from the end": (
                F.pad(x, (0, 0, past, 0))
            ),
        }
        if remembered:
            mistakes |= {
                "right without a history, but where there is one it is not used": torch.cat([zeros, x], 2),
                "the history stands after the new frames; it happened before them": torch.cat(
                    [x, history], 2
                ),
                "there are zeros before the history; it takes their place": torch.cat([zeros, history, x], 2),
            }
        expect_close(
            padded,
            torch.cat([history if remembered else zeros, x], 2),
            mistakes,
            f"for kernel {kernel} expected {[1, 2, 5 + past, 3, 4]}, the past first, then x untouched; "
            f"got {shape_of(padded)}",
            tolerance=0,
        )


@exercise("these are the shift, scale and gate of self-attention, then of the feed-forward part.")
def modulation(answer):
    """The exercise of 07_dit.

    answer(time [b, c], linear c -> 6c, table [1, 6, c]) -> the modulation of a block, [b, 6, c].
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        time, linear, table = torch.randn(2, 5), torch.nn.Linear(5, 30), torch.randn(1, 6, 5)
    linear.requires_grad_(False)
    result = attempted(answer, time, linear, table)

    def six(flat):
        return flat.unflatten(-1, (6, -1))  # [2, 30] -> [2, 6, 5]

    right = table + six(linear(F.silu(time)))
    expect_close(
        result,
        right,
        {
            "the nonlinearity in front of the linear layer is missing: SiLU": table + six(linear(time)),
            "SiLU comes before the linear layer": table + six(F.silu(linear(time))),
            "the block's own table is missing": right - table,
            "the table is added, not multiplied": table * (right - table),
            "time is missing": table.expand(2, 6, 5),
            "the 6 c numbers are six vectors one after the other; "
            "this takes every sixth number for a vector": (
                table + linear(F.silu(time)).unflatten(-1, (-1, 6)).mT
            ),
            "the 1 + of the scales comes later, where they are used": 1 + right,
        },
        f"expected [2, 6, 5] that begins with {float(right[0, 0, 0]):.3f}, got {shape_of(result)}; "
        "three steps: the nonlinearity, the linear layer cut in six, the table",
    )


@exercise("it accepts the rotation and catches every score that looks at a position itself.")
def offset_test(answer):
    """The exercise of 08_rope.

    answer(score) -> does score(here, there) depend on the offset of the two positions alone?
    """
    q, k = torch.randn(2, 1, 1, 1, 24, generator=torch.Generator().manual_seed(8))

    def turned(x, position):
        angles = [p * clock_speeds(pairs) for p, pairs in zip(position, axis_pairs(24))]
        return rotate(x, torch.cat(angles)[None])

    def real(here, there):
        return float((turned(q, here) * turned(k, there)).sum())

    def offset(here, there):
        return float(sum(weight * (b - a) for weight, a, b in zip((5, 3, 2), here, there)))

    def absolute(axis):
        return lambda here, there: real(here, there) + here[axis]

    def proof(score):
        try:
            return answer(score)
        except AssertionError:  # a proof may also fail as tests do
            return False

    along = "it says yes to a score that depends on the {} itself; move both tokens along that axis too"
    worlds = {  # what to say to an answer that gets it wrong: (a score, does it depend on the offset alone)
        "it says no to a score made of nothing but offsets; "
        "move *both* tokens by the same amount, and compare with before": (offset, True),
        "it says no to the real rotation, whose scores agree up to rounding; "
        "allow a difference of 1e-3 or so": (real, True),
        "it says yes to a score of which token is where, with no offset in it; did it compare anything?": (
            lambda here, there: float(sum(here)),
            False,
        ),
        along.format("frame"): (absolute(0), False),
        along.format("row"): (absolute(1), False),
        along.format("column"): (absolute(2), False),
    }
    for hint, (score, right) in worlds.items():
        result = attempted(proof, score)
        expect(shape_of(result) in ("bool", "bool_", []), f"expected True or False, got {shape_of(result)}")
        expect(bool(result) == right, hint)


@exercise("mask and latent are what the model was trained to read.")
def picture_and_mask(answer):
    """The exercise of 11_image.

    answer(encode, picture, frames, ft) -> y [1, ft + z, f, h, w]: mask, then conditioning latent.
    """
    picture = torch.rand(3, 16, 24, generator=torch.Generator().manual_seed(11)) * 2 - 1
    video = picture[None, :, None]

    def encode(video):
        """Causal like the VAE: a mean over 4 x 8 x 8 pixels, and later latent frames remember the picture."""
        whole = torch.cat([video[:, :, :1].expand(-1, -1, 4, -1, -1), video[:, :, 1:]], 2)
        return F.avg_pool3d(whole, (4, 8, 8)).cumsum(2) + 0.25

    y = attempted(answer, encode, picture, 13, 4)
    right = with_picture(encode, picture, 13, (4, 2, 3), 4)  # [1, 7, 4, 2, 3]
    mask, z = right[:, :4], right[:, 4:]
    expect(
        shape_of(y) == list(right.shape),
        f"got {shape_of(y)}; expected {list(right.shape)}: "
        "4 channels of mask and 3 of latent, over 4 latent frames of 2 x 3 cells",
    )
    expect(
        not close(y, torch.cat([z, mask], 1)),
        "latent and mask have changed places; the mask comes first",
    )
    expect_close(
        y[:, :4],
        mask,
        {
            "the mask: frame 0 counts once; it fills its latent frame alone, "
            "so all four channels of latent frame 0 are 1": (
                mask * torch.tensor([1, 0, 0, 0]).view(1, 4, 1, 1, 1)
            ),
            "the mask: it is inverted: 1 means given": 1 - mask,
            "the mask: no frame is given": torch.zeros_like(mask),
            "the mask: every frame is given": torch.ones_like(mask),
        },
        "the mask: 1 only in latent frame 0, in all four channels",
    )
    expect_close(
        y[:, 4:],
        z,
        {
            "the latent: the other frames are black (-1); gray is 0": (
                encode(torch.cat([video, -torch.ones(1, 3, 12, 16, 24)], 2))
            ),
            "the latent: the picture fills every frame": encode(video.expand(-1, -1, 13, -1, -1)),
            "the latent: only the picture went through the VAE; encode the gray frames with it": (
                torch.cat([z[:, :, :1], torch.zeros_like(z[:, :, 1:])], 2)
            ),
        },
        "the latent: encode one video: the picture, then zeros",
    )


@exercise("the change is alpha / rank times up down, and the weight that came in is as it was.")
def merged_weight(answer):
    """The exercise of 15_lora.

    answer(weight [out, in], down [rank, in], up [out, rank], alpha, strength) -> the merged weight.

    alpha  None: the file had none, and it is taken for the rank
    """
    source = torch.Generator().manual_seed(15)
    # Square first: there the halves can be exchanged, and the shape is still right.
    for out, into, rank, alpha, strength in ((6, 6, 4, 3.0, 0.7), (6, 5, 4, 2.0, 1.5), (6, 5, 4, None, 1.5)):
        weight, down, up = (
            torch.randn(shape, generator=source) for shape in ((out, into), (rank, into), (out, rank))
        )
        before = weight.clone()
        merged = attempted(answer, weight, down, up, alpha, strength)
        expect(
            torch.equal(weight, before),
            "the weight that came in was changed in place; it may belong to others. Return a new one",
        )
        expect(
            shape_of(merged) == [out, into],
            f"got {shape_of(merged)}; expected {[out, into]}: up [out, rank] @ down [rank, in]",
        )
        alpha = rank if alpha is None else alpha
        whole, scale = up @ down, strength * alpha / rank
        mistakes = {
            "alpha / rank is missing: without it this change is too strong by rank / alpha": strength * whole,
            "alpha is not divided by the rank": strength * alpha * whole,
            "rank / alpha is upside down": strength * rank / alpha * whole,
            "divided by the root of the rank, which is rsLoRA's rule": strength * alpha / rank**0.5 * whole,
            "the strength has no effect": alpha / rank * whole,
            "the change is subtracted": -scale * whole,
        }
        mistakes = {hint: weight + change for hint, change in mistakes.items()}
        mistakes |= {
            "that is the change alone; the weight itself belongs to the sum": scale * whole,
            "the strength scales the weight, too": strength * (weight + alpha / rank * whole),
        }
        if out == into:
            mistakes["the halves are exchanged: down comes first, so it stands at the right, up @ down"] = (
                weight + scale * (down.T @ up.T),
                weight + scale * (up @ down).T,
            )
        expect_close(merged, weight + scale * whole, mistakes, "the shape is right and the numbers are not")


@exercise("two neighbours are 1 together everywhere, and what lies nearest to an edge is not used.")
def tile_weights(answer):
    """The exercise of 17_offload.

    answer(length, before, after) -> how much each pixel of a tile counts along one axis, [length].

    before, after  pixels that it shares with its neighbours; 0 at the border of the picture
    """

    def whole(before, after, middle=0.5):
        """A straight line over the whole overlap."""
        place = torch.arange(length) + middle
        rising = (place / before).clamp(0, 1) if before else torch.ones(length)
        falling = ((length - place) / after).clamp(0, 1) if after else torch.ones(length)
        return rising * falling

    def moved(by):
        rising = ((2 * torch.arange(length) + by) / before - 0.5).clamp(0, 1) if before else 1.0
        falling = (2 * (length - torch.arange(length) - by / 2) / after - 0.5).clamp(0, 1) if after else 1.0
        return torch.ones(length) * rising * falling

    for length, before, after in ((10, 0, 0), (24, 0, 8), (24, 8, 0), (32, 16, 8)):
        weights, right = attempted(answer, length, before, after), ramp(0, length, before, after)
        at = f"for a tile of {length} with overlaps {before} and {after}: "
        expect(shape_of(weights) == [length], f"{at}got {shape_of(weights)}; expected [{length}]")
        mistakes = {
            "that is a line over the whole overlap; its outer quarter is to be 0, its inner quarter 1": (
                whole(before, after)
            ),
            "before and after have changed places": ramp(0, length, after, before),
            "1 and 0 have changed places: a tile counts least at its edge": 1 - right,
            "the overlap after is not used": ramp(0, length, before, 0),
            "the overlap before is not used": ramp(0, length, 0, after),
            "the middle of pixel i is at i + 0.5; without it two neighbours are not 1 together": (
                moved(0),
                moved(2),
                whole(before, after, 0.0),
            ),
            "without an overlap every pixel counts fully: all ones": torch.zeros(length),
        }
        if not (before or after):
            mistakes = {"without an overlap every pixel counts fully: all ones": weights}
        expect_close(
            weights,
            right,
            {at + hint: wrong for hint, wrong in mistakes.items()},
            f"{at}a quarter of 0, a line up over a half, a quarter of 1; and the mirror image after",
        )
