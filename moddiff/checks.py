"""Is my answer right, and if not, what went wrong?  The checkers of the notebooks' exercises, and their predictions.

Each checker takes the reader's function, tries it on inputs of its own and returns a Verdict, which displays as a sentence. A stub that
still returns None is "not attempted". A wrong answer is never just wrong: the checker knows the usual mistakes and names the one it saw.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Verdict:
    """What a checker found. `right`: True, False, or None where nothing was attempted; `text`: the sentence to show."""

    right: bool | None
    text: str

    def __repr__(self):
        return {True: "right: ", False: "not yet: ", None: ""}[self.right] + self.text

    def _repr_html_(self):
        colour = {True: "#2a7d4f", False: "#b3541e", None: "#777777"}[self.right]
        return f'<p style="border-left: 4px solid {colour}; padding-left: 0.7em">{self!r}</p>'


NOT_ATTEMPTED = Verdict(None, "not attempted: write the function above, run its cell, then this one")


def reveal(guess, right, **explanations):
    """Open a prediction: explain why the guessed option is right or wrong, and only then the others.   -> Verdict

    guess  None (nothing is given away), or the letter of an option;  right  the letter of the right one
    """
    if right not in explanations:
        raise ValueError(f"right={right!r} has no explanation; the options are {', '.join(explanations)}")
    if guess is None:
        return Verdict(
            None,
            f"commit to a guess first: set guess to one of {', '.join(map(repr, explanations))} and run both cells again",
        )
    if guess not in explanations:
        return Verdict(
            False, f"{guess!r} is not an option; choose one of {', '.join(map(repr, explanations))}"
        )
    others = " ".join(f"({letter}) {text}" for letter, text in explanations.items() if letter != guess)
    return Verdict(guess == right, f"{explanations[guess]} And the other answers: {others}")


def attempted(function, *arguments):
    """Call the reader's function.   -> its answer, or the Verdict to show where there is none or it raised"""
    try:
        answer = function(*arguments)
    except (
        TypeError,
        ValueError,
        RuntimeError,
        IndexError,
        KeyError,
        AttributeError,
        NameError,
        ZeroDivisionError,
        AssertionError,
    ) as error:
        return Verdict(False, f"it stopped with {type(error).__name__}: {error}")
    return NOT_ATTEMPTED if answer is None else answer


def close(answer, expected, tolerance=1e-5):
    """True where two tensors have one shape and differ by no more than `tolerance` anywhere."""
    return (
        isinstance(answer, torch.Tensor)
        and answer.shape == expected.shape
        and bool((answer - expected).abs().max() <= tolerance)
    )


def shape_of(answer):
    """How an answer is described in a verdict: a tensor's shape, or a type."""
    return list(answer.shape) if isinstance(answer, torch.Tensor) else type(answer).__name__


def pipeline(answer):
    """Exercise of 01_first_video: answer(dit, solver, schedule, cond, uncond, noise, scale) -> the latent at the end of the run."""
    from .flow import schedule
    from .solvers import UniPC

    levels, solver, scale = schedule(5, 3.0), UniPC(), 3.0
    noise, cond, uncond = torch.randn(3, 1, 2, 1, 3, 3, generator=torch.Generator().manual_seed(0))

    def dit(x, t, text):
        if not (isinstance(t, torch.Tensor) and t.shape == (1,)):
            raise ValueError(
                f"the dit was told t of shape {shape_of(t)}; expected [1], one time for each video: t[None]"
            )
        return torch.tanh(x - text) * (0.5 + t / 1000)

    def run(
        guide=lambda c, u: u + scale * (c - u),
        carry=True,
        told=lambda t, sigma: t,
        seen=lambda x: x,
        last=len(levels),
    ):
        x, memory = noise, None
        for t, sigma, sigma_next in list(levels)[:last]:
            velocity = guide(*(dit(seen(x), told(t, sigma)[None], text) for text in (cond, uncond)))
            x, memory = solver.step(x, velocity, sigma, sigma_next, memory if carry else None)
        return x

    mine = attempted(answer, dit, solver, levels, cond, uncond, noise, scale)
    if isinstance(mine, Verdict):
        return mine
    if isinstance(mine, tuple):
        return Verdict(
            False, "it returns several things; the solver returns x and its memory, and only x is asked for"
        )
    if close(mine, run()):
        return Verdict(
            True,
            "noise, words, two answers, guidance and a step, once for each level: that is the whole of it",
        )
    usual = {
        "there is no guidance in it: the answer without the words is missing": run(lambda c, u: c),
        "cond and uncond are swapped: it walks away from the words": run(lambda c, u: c + scale * (u - c)),
        "scale * (cond - uncond) is only the change; add it to the answer without the words": run(
            lambda c, u: scale * (c - u)
        ),
        "the change is added to the answer with the words; start from the one without them": run(
            lambda c, u: c + scale * (c - u)
        ),
        "the solver's memory is lost between steps; hand back to it what it returned": run(carry=False),
        "the dit is told sigma; its clock is t, from 0 to 1000": run(told=lambda t, sigma: sigma),
        "the dit always sees the noise; after a step it must see the new x": run(seen=lambda x: noise),
        "it returns after the first step; return when the schedule is at its end": run(last=1),
        "the noise came back unchanged; put what the solver returns into x": noise,
    }
    otherwise = f"the latent ({shape_of(mine)}) is not the one expected ({list(noise.shape)}); compare with rooms 2, 3 and 4"
    return Verdict(False, next((hint for hint, wrong in usual.items() if close(mine, wrong)), otherwise))


def text(answer):
    """Exercise of 04_text: answer(word, table) -> the pieces with the largest sum of scores; table {piece: log-probability}."""
    table = dict.fromkeys("▁abcdefgh", -9.0) | {
        "▁abc": -3.0,
        "▁ab": -3.5,
        "cd": -3.5,
        "▁abcd": -50.0,
        "▁e": -6.0,
        "▁ef": -4.0,
        "fgh": -4.0,
        "gh": -7.0,
        "h": -4.0,
        "▁g": -2.0,
        "▁gh": -5.0,
    }
    words = ("▁abcd", "▁efgh", "▁gh", "▁had")

    def cuts(word):
        heads = [word[:i] for i in range(1, len(word) + 1) if word[:i] in table]
        return [[head, *rest] for head in heads for rest in cuts(word[len(head) :])] if word else [[]]

    score = lambda cut: sum(table[piece] for piece in cut)
    by = lambda key: [max(cuts(word), key=key) for word in words]
    mine = [attempted(answer, word, dict(table)) for word in words]
    for word, found in zip(words, mine):
        if isinstance(found, Verdict):
            return found
        if not isinstance(found, list) or not all(isinstance(piece, str) for piece in found):
            return Verdict(
                False, f"for {word!r} it returned {found!r}; expected a list of pieces, such as ['▁a', 'b']"
            )
        if "".join(found) != word or set(found) - set(table):
            return Verdict(
                False,
                f"{word!r} became {found}; every letter belongs to one piece, and every piece must be in the table",
            )
    if mine == by(score):
        return Verdict(
            True,
            "the most likely cut, for every word. The tokenizers of UMT5 and of this model work by this rule",
        )
    usual = {
        "that takes the longest piece each time; a long first piece can leave a bad rest": lambda cut: [
            len(piece) for piece in cut
        ],
        "that takes the fewest pieces; two likely ones can beat one unlikely one": lambda cut: (
            -len(cut),
            score(cut),
        ),
        "that is the least likely cut; the scores are negative, and the largest sum is the one nearest to 0": lambda cut: (
            -score(cut)
        ),
        "that takes the best mean score; add the scores up and do not divide by their number": lambda cut: (
            score(cut) / len(cut)
        ),
        "those are single letters; look for longer pieces in the table": len,
    }
    wrong, right = next((a, b) for a, b in zip(mine, by(score)) if a != b)
    otherwise = f"{wrong} has the sum {score(wrong):g}, but there is a cut of {''.join(wrong)!r} with {score(right):g}"
    return Verdict(False, next((hint for hint, key in usual.items() if mine == by(key)), otherwise))


def solvers(answer):
    """answer(x, x0, x0_old, sigma, sigma_next, sigma_old) -> x at sigma_next, by DPM-Solver++ of order 2.   -> Verdict"""
    source = torch.Generator().manual_seed(9)
    x, x0, x0_old = torch.randn(3, 2, 4, generator=source, dtype=torch.float64)
    old, now, new = torch.tensor([0.9, 0.7, 0.3], dtype=torch.float64)
    clock = lambda sigma: torch.log((1 - sigma) / sigma)
    pace, keep = (clock(new) - clock(now)) / (clock(now) - clock(old)), new / now
    reached = lambda ahead: keep * x + (1 - keep) * (x0 + ahead * (x0 - x0_old))
    found = attempted(answer, x, x0, x0_old, now, new, old)
    if isinstance(found, Verdict):
        return found
    if close(found, reached(pace / 2), 1e-6):
        return Verdict(True, "this is DPM-Solver++(2M). One remembered x0 buys a whole order.")
    mistakes = {
        "that is Euler: x0 as it is. Use x0_old to guess what x0 will be halfway": 0.0,
        "the trend is followed over the whole step; the mean of a line is at its middle: half as far": pace,
        "the trend runs backwards: it goes from x0_old to x0, and on": -pace / 2,
        "both steps are taken as equally long; scale the trend by their lengths on the lambda clock": 0.5,
        "lengths are measured in sigma; measure them on the lambda clock, log_snr(sigma)": (now - new)
        / (old - now)
        / 2,
        "that is a step towards x0_old alone": -1.0,
        "the ratio of the two lengths is upside down: new length over old one": 0.5 / pace,
    }
    for hint, ahead in mistakes.items():
        if close(found, reached(ahead), 1e-6):
            return Verdict(False, hint)
    got = (
        f" with {float(found.flatten()[0]):.3f}" if isinstance(found, torch.Tensor) and found.numel() else ""
    )
    return Verdict(
        False,
        f"expected a tensor {shape_of(x)} that begins with {float(reached(pace / 2)[0, 0]):.3f}, got {shape_of(found)}{got}; is it towards(x, halfway, ...)?",
    )


def guidance(answer):
    """answer(predict, sigma, scale, lowest, highest) -> the guided velocity; predict("uncond") only inside the interval.   -> Verdict"""
    source = torch.Generator().manual_seed(10)
    branches = dict(zip(("cond", "uncond"), torch.randn(2, 1, 3, 4, generator=source)))
    cond, uncond = branches.values()
    for sigma, inside in ((0.5, True), (0.9, True), (0.3, True), (0.95, False), (0.1, False)):
        asked = []
        found = attempted(
            answer, lambda branch: (asked.append(branch), branches[branch])[1], sigma, 4.0, 0.3, 0.9
        )
        if isinstance(found, Verdict):
            return found
        where = f"at sigma {sigma}, {'inside' if inside else 'outside'} 0.3 to 0.9"
        if close(found, cond + 4 * (uncond - cond)) and inside:
            return Verdict(
                False, f"{where}: that pushes away from the prompt; cond and uncond have changed places"
            )
        if inside and close(found, cond):
            return Verdict(
                False,
                f"{where}: that is cond alone; "
                + ("both ends belong to the interval" if sigma in (0.3, 0.9) else "here the push belongs"),
            )
        if inside and close(found, cond + 4 * (cond - uncond)):
            return Verdict(
                False, f"{where}: the push starts from cond, so scale 1 would push already; start from uncond"
            )
        if not close(found, uncond + 4 * (cond - uncond) if inside else cond):
            usual = {
                "that is 4 times cond; outside, nothing is scaled": 4 * cond,
                "that is uncond; outside, follow the prompt as it is": uncond,
                "it is still guided; outside, return cond": uncond + 4 * (cond - uncond),
            }
            told = [hint for hint, wrong in usual.items() if close(found, wrong)]
            return Verdict(
                False,
                f"{where}: " + (told[0] if told else f"the velocity is not right; got {shape_of(found)}"),
            )
        if not inside and "uncond" in asked:
            return Verdict(
                False,
                f'{where}: right velocity, but predict("uncond") was still called: a pass of the model for nothing',
            )
        if len(asked) > 1 + inside:
            return Verdict(
                False, f"{where}: predict was called {len(asked)} times; each call is a pass of the model"
            )
    return Verdict(True, "guided inside, cond alone outside, and not one pass too many.")


def weights(answer):
    """answer(keys) -> {official name of an i2v file: our name, or None for a name that no official file has}.   -> Verdict"""
    cross = {
        "blocks.#.cross_attn.k_img.bias": "blocks.#.cross_attn.image_k.bias",
        "blocks.#.norm3.bias": "blocks.#.norm_cross.bias",
        "blocks.#.cross_attn.norm_k_img.weight": "blocks.#.cross_attn.image_norm_k.weight",
        "blocks.#.norm2.weight": None,
    }
    pairs = {
        "time_embedding.2.bias": "time_mlp.2.bias",
        "text_embedding.0.weight": "text_mlp.0.weight",
        "head.modulation": "final.modulation",
        "img_emb.proj.3.weight": "image_mlp.down.weight",
        "head.head.weight": "final.linear.weight",
        "blocks.#.self_attn.o.weight": "blocks.#.self_attn.out.weight",
        **cross,
    }
    for block in ("1", "0", "37"):
        right = {
            there.replace("#", block): here and here.replace("#", block) for there, here in pairs.items()
        }
        found = attempted(answer, list(right))
        if isinstance(found, Verdict):
            return found
        if not isinstance(found, dict) or any(key not in found for key in right):
            lost = (
                ""
                if not isinstance(found, dict)
                else "; no answer for " + next(key for key in right if key not in found)
            )
            return Verdict(
                False,
                f"for the keys of block {block} expected a dictionary with every key, got {shape_of(found)}{lost}. Is a block's number fixed?",
            )
        wrong = {key: str(found[key]) for key in right if found[key] != right[key]}
        for key, name in wrong.items():
            usual = {
                "norm2 is Diffusers' word for the norm before cross-attention; official norm2 has no weights, and norm3 already has that place": "norm2"
                in key,
                "a rule for k_img hit inside norm_k_img: rules run one after the other": "norm_image_k"
                in name,
                "the rule for head hit twice": name.startswith("final.final"),
                "this key is a real one": name == "None",
                "the block's number is fixed": "blocks.1." in name and block != "1",
                "it was left as it is": name == key,
            }
            return Verdict(
                False,
                f"{key} became {name}: "
                + next((hint for hint, told in usual.items() if told), "our DiT has another name for it"),
            )
    return Verdict(True, "nine keys find their place, in every block, and the tenth is refused.")


def image(answer):
    """answer(encode, picture, frames, ft) -> y [1, ft + z, f, h, w]: the mask, then the latent of the conditioning video.   -> Verdict"""
    from .conditioning import with_picture

    picture = torch.rand(3, 16, 24, generator=torch.Generator().manual_seed(11)) * 2 - 1

    def encode(video):  # causal like the VAE: later latent frames remember the picture
        return (
            torch.nn.functional.avg_pool3d(
                torch.cat([video[:, :, :1].expand(-1, -1, 4, -1, -1), video[:, :, 1:]], 2), (4, 8, 8)
            ).cumsum(2)
            + 0.25
        )

    found = attempted(answer, encode, picture, 13, 4)
    if isinstance(found, Verdict):
        return found
    y = with_picture(encode, picture, 13, (4, 2, 3), 4)  # [1, 7, 4, 2, 3]
    mask, z, video = y[:, :4], y[:, 4:], picture[None, :, None]
    if not isinstance(found, torch.Tensor) or found.shape != y.shape:
        return Verdict(
            False,
            f"got {shape_of(found)}; expected {list(y.shape)}: 4 channels of mask and 3 of latent, over 4 latent frames of 2 x 3 cells",
        )
    if close(found, torch.cat([z, mask], 1)):
        return Verdict(False, "latent and mask have changed places; the mask comes first")
    once, first = torch.zeros_like(mask), found[:, :4]
    once[:, 0, 0] = 1
    if not close(first, mask):
        usual = {
            "frame 0 counts once; it fills its latent frame alone, so all four channels of latent frame 0 are 1": once,
            "it is inverted: 1 means given": 1 - mask,
            "no frame is given": torch.zeros_like(mask),
            "every frame is given": torch.ones_like(mask),
        }
        return Verdict(
            False,
            "the mask: "
            + next(
                (hint for hint, wrong in usual.items() if close(first, wrong)),
                "1 only in latent frame 0, in all four channels",
            ),
        )
    rest = torch.ones(1, 3, 12, 16, 24)
    usual = {
        "the other frames are black (-1); gray is 0": encode(torch.cat([video, -rest], 2)),
        "the picture fills every frame": encode(video.expand(-1, -1, 13, -1, -1)),
        "only the picture went through the VAE; encode the gray frames with it": torch.cat(
            [z[:, :, :1], 0 * z[:, :, 1:]], 2
        ),
    }
    if not close(found[:, 4:], z):
        return Verdict(
            False,
            "the latent: "
            + next(
                (hint for hint, wrong in usual.items() if close(found[:, 4:], wrong)),
                "encode one video: the picture, then zeros",
            ),
        )
    return Verdict(True, "mask and latent are what the model was trained to read.")


def dit(answer):
    """answer(time [b, c], linear c -> 6 c, table [1, 6, c]) -> the modulation of a block, [b, 6, c].   -> Verdict"""
    silu = torch.nn.functional.silu
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        time, linear, table = (
            torch.randn(2, 5),
            torch.nn.Linear(5, 30).requires_grad_(False),
            torch.randn(1, 6, 5),
        )
    found = attempted(answer, time, linear, table)
    if isinstance(found, Verdict):
        return found
    six = lambda flat: flat.unflatten(-1, (6, -1))  # [2, 30] -> [2, 6, 5]
    right = table + six(linear(silu(time)))
    if close(found, right):
        return Verdict(
            True, "these are the shift, scale and gate of self-attention, then of the feed-forward part."
        )
    usual = {
        "the nonlinearity in front of the linear layer is missing: SiLU": table + six(linear(time)),
        "SiLU comes before the linear layer": table + six(silu(linear(time))),
        "the block's own table is missing": right - table,
        "the table is added, not multiplied": table * (right - table),
        "time is missing": table.expand(2, 6, 5),
        "the 6 c numbers are six vectors one after the other; this takes every sixth number for a vector": table
        + linear(silu(time)).unflatten(-1, (-1, 6)).mT,
        "the 1 + of the scales comes later, where they are used": 1 + right,
    }
    told = [hint for hint, wrong in usual.items() if close(found, wrong)]
    return Verdict(
        False,
        told[0]
        if told
        else f"expected [2, 6, 5] that begins with {float(right[0, 0, 0]):.3f}, got {shape_of(found)}; "
        "three steps: the nonlinearity, the linear layer cut in six, the table",
    )


def rope(answer):
    """answer(score) -> True where score(here, there) depends on the offset of the two positions alone, else False.   -> Verdict"""
    from .rope import axis_pairs, clock_speeds, rotate

    q, k = torch.randn(2, 1, 1, 1, 24, generator=torch.Generator().manual_seed(8))
    turned = lambda x, place: rotate(
        x, torch.cat([p * clock_speeds(pairs) for p, pairs in zip(place, axis_pairs(24))])[None]
    )
    real = lambda here, there: float((turned(q, here) * turned(k, there)).sum())
    offset = lambda here, there: float(sum(weight * (b - a) for weight, a, b in zip((5, 3, 2), here, there)))
    worlds = [
        (
            "it says no to a score made of nothing but offsets; move *both* tokens by the same amount, and compare with before",
            offset,
            True,
        ),
        (
            "it says no to the real rotation, whose scores agree up to rounding; allow a difference of 1e-3 or so",
            real,
            True,
        ),
        (
            "it says yes to a score of which token is where, with no offset in it; did it compare anything?",
            lambda here, there: float(sum(here)),
            False,
        ),
    ]
    for axis, name in enumerate(("frame", "row", "column")):
        absolute = lambda here, there, axis=axis: real(here, there) + here[axis]
        worlds.append(
            (
                f"it says yes to a score that depends on the {name} itself; move both tokens along that axis too",
                absolute,
                False,
            )
        )

    def asked(score):
        try:
            return answer(score)
        except AssertionError:
            return False

    for hint, score, right in worlds:
        found = attempted(asked, score)
        if isinstance(found, Verdict):
            return found
        if shape_of(found) not in ("bool", "bool_", []):
            return Verdict(False, f"expected True or False, got {shape_of(found)}")
        if bool(found) != right:
            return Verdict(False, hint)
    return Verdict(True, "it accepts the rotation and catches every score that looks at a position itself.")


def vae(answer):
    """answer(x, kernel, history) -> x with kernel - 1 frames of past before it: `history`, or zeros where it is None.   -> Verdict"""
    source = torch.Generator().manual_seed(5)
    x, pad = torch.randn(1, 2, 5, 3, 4, generator=source), torch.nn.functional.pad
    for kernel, remembered in ((3, False), (2, False), (4, True)):
        past = kernel - 1
        history = torch.randn(1, 2, past, 3, 4, generator=source) if remembered else None
        zeros = torch.zeros(1, 2, past, 3, 4)
        found = attempted(answer, x.clone(), kernel, history)
        if isinstance(found, Verdict):
            return found
        if close(found, torch.cat([history if remembered else zeros, x], 2), 0):
            continue
        usual = {
            "some zeros stand after the last frame, so a frame would hear the next one: the future leaks. All of them belong before": [
                pad(x, (0, 0, 0, 0, past // 2, past - past // 2)),
                pad(x, (0, 0, 0, 0, 1, 1)),
                torch.cat([x, zeros], 2),
            ],
            "one frame too many: with kernel frames of past the output would be longer than the input; kernel - 1 is enough": [
                pad(x, (0, 0, 0, 0, kernel, 0))
            ],
            "the first frame is repeated; Wan puts zeros before it": [
                torch.cat([x[:, :, :1]] * past + [x], 2)
            ],
            "that pads the width: F.pad counts axes from the last one, and time is the third from the end": [
                pad(x, (past, 0)),
                pad(x, (past, 0, 0, 0, 0, 0)),
            ],
            "that pads the height: F.pad counts axes from the last one, and time is the third from the end": [
                pad(x, (0, 0, past, 0))
            ],
        }
        if remembered:
            usual = {
                "right without a history, but where there is one it is not used": [torch.cat([zeros, x], 2)],
                "the history stands after the new frames; it happened before them": [
                    torch.cat([x, history], 2)
                ],
                "there are zeros before the history; it takes their place": [
                    torch.cat([zeros, history, x], 2)
                ],
            } | usual
        told = [hint for hint, wrongs in usual.items() if any(close(found, wrong, 0) for wrong in wrongs)]
        return Verdict(
            False,
            told[0]
            if told
            else f"for kernel {kernel} expected {[1, 2, 5 + past, 3, 4]}, the past first, then x untouched; got {shape_of(found)}",
        )
    return Verdict(True, "the past goes before, zeros or remembered, and the future has no way in.")


def flow(answer):
    """answer(predict, x0, noise, sigma) -> the x0 that one look of the model at level sigma points at; predict(x, t).   -> Verdict"""
    x0, noise = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(6))
    for sigma in (0.75, 0.2005):
        asked, predict = [], lambda x, t: (asked.append((x, float(t))), torch.tanh(x) + 0.3)[1]
        found = attempted(answer, predict, x0, noise, sigma)
        if isinstance(found, Verdict):
            return found
        if not asked:
            return Verdict(
                False, "predict was never called; without the model nobody knows where x came from"
            )
        (seen, told), x = asked[-1], (1 - sigma) * x0 + sigma * noise
        velocity = torch.tanh(seen) + 0.3
        if close(seen, sigma * x0 + (1 - sigma) * noise):
            return Verdict(
                False,
                "x0 and noise have changed places: sigma is the part of the noise, 1 at the start of a run",
            )
        if not close(seen, x):
            return Verdict(
                False,
                f"the model was shown something else than x at sigma {sigma}: add_noise(x0, noise, sigma)",
            )
        if abs(told - sigma) < 1e-6:
            return Verdict(
                False,
                "the model was told sigma; its clock t runs from 0 to 1000, and 0.75 would mean nearly clean",
            )
        if not 0 <= 1000 * sigma - told < 1:
            return Verdict(
                False,
                f"at sigma {sigma} the model was told t = {told:g}; expected 1000 sigma, cut to a whole number",
            )
        usual = {
            "the sign: velocity points towards the noise, and the way to x0 is against it": x
            + sigma * velocity,
            "a whole velocity was taken off; only sigma of the way is left": x - velocity,
            "that is the noise end of the path": x + (1 - sigma) * velocity,
            "that is the velocity itself; walk along it to x0": velocity,
            "that is the x0 you were given, not the one the model points at": x0,
        }
        if not close(found, x - sigma * velocity):
            told = [hint for hint, wrong in usual.items() if close(found, wrong)]
            return Verdict(
                False,
                told[0]
                if told
                else f"expected x - sigma * velocity, of shape {shape_of(x)}; got {shape_of(found)}",
            )
    return Verdict(True, "noise it, look once, walk straight to the end: the model's belief at that level.")


def attention(answer):
    """answer(q, k, v, mask) -> masked attention [b, heads, n, d]; True: may look; a query that may look nowhere gets zeros.   -> Verdict"""
    from .attention import attend

    source = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(2, 3, count, 8, generator=source) for count in (5, 7, 7))
    mask = torch.rand(2, 1, 5, 7, generator=source) > 0.4
    mask[..., 0], mask[..., 1], mask[:, :, 4] = (
        True,
        False,
        False,
    )  # every query may look somewhere but not everywhere; the last one nowhere
    found = attempted(answer, q, k, v, mask)
    if isinstance(found, Verdict):
        return found
    if not isinstance(found, torch.Tensor) or found.shape != q.shape:
        return Verdict(
            False,
            f"got {shape_of(found)}; expected {list(q.shape)} (b heads n d), one mean of values for each query",
        )
    right, scores = attend(q, k, v, bias=mask, kernel="math"), q @ k.mT / 8**0.5
    weigh = lambda scores, allowed=mask, dim=-1: (
        scores.masked_fill(~allowed, float("-inf")).softmax(dim).nan_to_num() @ v
    )
    usual = {
        "the mask is the wrong way round: True means that the query may listen": weigh(scores, ~mask),
        "the scores are not divided by the root of d": weigh(scores * 8**0.5),
        "divided by d; the root of d is enough": weigh(scores / 8**0.5),
        "the mask has no effect": scores.softmax(-1) @ v,
        "masked after the softmax, so rows no longer sum to 1; mask the scores": (scores.softmax(-1) * mask)
        @ v,
        "a masked score of 0 is still listened to, since exp(0) is 1; use minus infinity": (
            scores * mask
        ).softmax(-1)
        @ v,
        "the softmax runs over the queries; each query's row has to sum to 1: softmax(-1)": weigh(
            scores, dim=-2
        ),
    }
    if not close(found[:, :, :4], right[:, :, :4]):
        told = [hint for hint, wrong in usual.items() if close(found[:, :, :4], wrong[:, :, :4])]
        return Verdict(
            False,
            told[0]
            if told
            else "the shape is right and the numbers are not; scores, mask, softmax, mean of v, in this order",
        )
    if not close(found, right):
        what = (
            "NaN, the softmax of nothing but minus infinity" if found[:, :, 4].isnan().any() else "something"
        )
        return Verdict(
            False, f"right for every query but the one that may look nowhere: it got {what}; give it zeros"
        )
    return Verdict(
        True, "the same as PyTorch's fused attention, and a query that may look nowhere gets zeros."
    )


def hooks(answer):
    """answer(dit, run, tokens) -> (block, head, result): the head that listens most to those tokens, and run() without it.   -> Verdict"""
    from .dit import DiT, DiTConfig
    from .hooks import capture, open_sessions, patch, zero

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(9)
        dit = DiT(DiTConfig("t2v", 4, 48, 48, 16, 24, 4, 4, 3, text_len=12)).eval()
        x, text = torch.randn(1, 4, 2, 6, 6), [torch.randn(9, 24)]
    run, tokens, before = (
        torch.no_grad()(lambda: dit(x, torch.tensor([500.0]), text)),
        [2, 5],
        open_sessions(),
    )
    with capture(dit, "blocks.*.cross_attn.probs") as seen:
        plain = run()
    each = seen.stack("cross_attn.probs")[:, 0][..., tokens]  # [block, heads, n, tokens]
    share = each.sum(-1).mean(-1)
    block, head = divmod(int(share.argmax()), share.shape[1])
    found = attempted(answer, dit, run, tokens)
    left = [session for session in open_sessions() if session not in before]
    for session in left:
        session.__exit__(GeneratorExit, None, None)
    if isinstance(found, Verdict):
        return found
    if left:
        return Verdict(False, f"{left[0]} is still open; use `with`, so that it ends whatever happens")
    if (
        not isinstance(found, tuple)
        or len(found) != 3
        or not isinstance(found[2], torch.Tensor)
        or found[2].shape != plain.shape
    ):
        return Verdict(
            False,
            f"got {shape_of(found)}; expected (block, head, result), where result is what run() returned without that head",
        )
    place = int(found[0]), int(found[1])
    usual = {
        "block and head have changed places": (head, block),
        "that is the quietest head": divmod(int(share.argmin()), 4),
        "only the first of the tokens was counted; sum over all of them": divmod(
            int(each[..., 0].mean(-1).argmax()), 4
        ),
        "that head has the single brightest cell; take the mean over the tokens of the video": divmod(
            int(each.sum(-1).amax(-1).argmax()), 4
        ),
    }
    if place != (block, head):
        return Verdict(
            False,
            next(
                (hint for hint, wrong in usual.items() if place == wrong),
                f"block {place[0]}, head {place[1]} is not the one that listens most",
            ),
        )
    if torch.equal(found[2], plain):
        return Verdict(
            False,
            "the right head, but the result is the plain run; call run() inside the `with patch(...)` block",
        )
    for pattern, hint in (
        (f"blocks.{block}", ""),
        ("blocks.*", "the right head, but taken away in every block; name the block in the pattern"),
    ):
        with patch(dit, f"{pattern}.cross_attn.heads", zero(heads=head)):
            if close(found[2], run(), 1e-4):
                return Verdict(
                    not hint, hint or "found by looking, taken away by editing, and the model is as it was."
                )
    return Verdict(
        False,
        "the right head, but the result is not the run without it: zero(heads=head) at cross_attn.heads of its block, and nothing else",
    )


def tracing(answer):
    """answer(run, blocks) -> (first, last), the blocks that move the colour most while the shape stays, perhaps round the end. run(first, last) -> (colour, shape)."""
    for low, high, blocks in ((2, 3, 7), (4, 0, 5), (3, 4, 5)):

        def run(first, last):
            moved = {(first + step) % blocks for step in range((last - first) % blocks + 1)}
            chosen = len(moved & {low, high})
            return 0.45 * chosen + 0.02 * (len(moved) - chosen), 0.05 * chosen + 0.3 * (len(moved) - chosen)

        found = attempted(answer, run, blocks)
        if isinstance(found, Verdict):
            return found
        if found not in ((low, high), [low, high]):
            told = f"{low} to {high} moves more of the colour and leaves the shape; was every first tried with every last?"
            if not (
                isinstance(found, (tuple, list))
                and len(found) == 2
                and all(isinstance(block, int) and 0 <= block < blocks for block in found)
            ):
                told = f"expected the pair (first, last), two blocks from 0 to {blocks - 1}"
            elif found[0] == found[1]:
                told = (
                    f"here the run goes round the end, {low} to {high}"
                    if low > high
                    else "one block alone is not enough here; try neighbours together, up to the last block"
                )
            elif run(*found)[1] > 0.2:
                told = "it moves the shape as well (above 0.2)" + (
                    "; last is included: run(first, last) takes both ends"
                    if found[1] == (high + 1) % blocks
                    else ""
                )
            return Verdict(False, f"of {blocks} blocks you chose {found}: {told}")
    return Verdict(True, "every run of blocks was tried, the shape was watched, and the colour came over.")
