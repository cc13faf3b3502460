"""Did the reader find what is hidden?  A head that listens, names, blocks that carry colour, a motion."""

from functools import partial

import numpy as np
import torch

from ..dit import DiT, DiTConfig
from ..hooks import capture, open_sessions, patch, zero
from ..tiny import world
from .verdict import attempted, close, exercise, expect, first_hint, shape_of

LISTENER = DiTConfig(
    model_type="t2v",
    in_dim=4,
    out_dim=4,
    dim=48,
    ffn_dim=48,
    freq_dim=16,
    text_dim=24,
    text_len=12,
    num_heads=4,
    num_layers=3,
)


@exercise("found by looking, taken away by editing, and the model is as it was.")
def loudest_head(answer):
    """The exercise of 03_hooks.

    answer(dit, run, tokens) -> (block, head, result).

    The head of cross-attention that listens most to those text tokens, and what run() returns without it.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(9)
        dit = DiT(LISTENER).eval()
        x, text = torch.randn(1, 4, 2, 6, 6), [torch.randn(9, 24)]
    run = torch.no_grad()(partial(dit, x, torch.tensor([500.0]), text))
    with capture(dit, "blocks.*.cross_attn.probs") as seen:
        plain = run()
    each = seen.stack("cross_attn.probs")[:, 0][..., [2, 5]]  # [block, heads, n, tokens]
    share = each.sum(-1).mean(-1)  # [block, heads]
    before = open_sessions()
    try:
        result = attempted(answer, dit, run, [2, 5])
    finally:
        left = [session for session in open_sessions() if session not in before]
        for session in left:
            session.__exit__(GeneratorExit, None, None)
    expect(
        not left, f"{', '.join(map(str, left))} is still open; use `with`, so that it ends whatever happens"
    )
    expect(
        isinstance(result, tuple) and len(result) == 3 and shape_of(result[2]) == list(plain.shape),
        f"got {shape_of(result)}; expected (block, head, result), "
        "where result is what run() returned without that head",
    )
    block, head = loudest(share)
    mine = attempted(int, result[0]), attempted(int, result[1])
    mistakes = {
        "block and head have changed places": mine == (head, block),
        "that is the quietest head": mine == loudest(-share),
        "only the first of the tokens was counted; sum over all of them": (
            mine == loudest(each[..., 0].mean(-1))
        ),
        "that head has the single brightest cell; take the mean over the tokens of the video": (
            mine == loudest(each.sum(-1).amax(-1))
        ),
    }
    expect(
        mine == (block, head),
        first_hint(mistakes, f"block {mine[0]}, head {mine[1]} is not the one that listens most"),
    )
    expect(
        not torch.equal(result[2], plain),
        "the right head, but the result is the plain run; call run() inside the `with patch(...)` block",
    )
    with patch(dit, "blocks.*.cross_attn.heads", zero(heads=head)):
        everywhere = close(result[2], run(), 1e-4)
    with patch(dit, f"blocks.{block}.cross_attn.heads", zero(heads=head)):
        there = close(result[2], run(), 1e-4)
    expect(not everywhere, "the right head, but taken away in every block; name the block in the pattern")
    expect(
        there,
        "the right head, but the result is not the run without it: "
        "zero(heads=head) at cross_attn.heads of its block, and nothing else",
    )


def loudest(share):
    """(block, head) of the largest number of a table [block, heads]."""
    return divmod(int(share.argmax()), share.shape[1])


KEYS = {  # official name of an i2v file: ours; None: no official file has that name
    "time_embedding.2.bias": "time_mlp.2.bias",
    "text_embedding.0.weight": "text_mlp.0.weight",
    "head.modulation": "final.modulation",
    "img_emb.proj.3.weight": "image_mlp.down.weight",
    "head.head.weight": "final.linear.weight",
    "blocks.#.self_attn.o.weight": "blocks.#.self_attn.out.weight",
    "blocks.#.cross_attn.k_img.bias": "blocks.#.cross_attn.image_k.bias",
    "blocks.#.norm3.bias": "blocks.#.norm_cross.bias",
    "blocks.#.cross_attn.norm_k_img.weight": "blocks.#.cross_attn.image_norm_k.weight",
    "blocks.#.norm2.weight": None,
}


@exercise("nine keys find their place, in every block, and the tenth is refused.")
def renamed_keys(answer):
    """The exercise of 13_weights.

    answer(keys) -> {official name of an i2v file: our name, or None if no official file has it}.
    """
    for block in ("1", "0", "37"):
        right = {there.replace("#", block): here and here.replace("#", block) for there, here in KEYS.items()}
        result = attempted(answer, list(right))
        fixed = f"for the keys of block {block} expected a dictionary with every key, got {shape_of(result)}"
        expect(isinstance(result, dict), fixed)
        missing = [key for key in right if key not in result]
        expect(not missing, f"{fixed}; no answer for {', '.join(missing[:1])}. Is a block's number fixed?")
        for key in right:
            name = str(result[key])
            mistakes = {
                "norm2 is Diffusers' word for the norm before cross-attention; "
                "official norm2 has no weights, and norm3 already has that place": "norm2" in key,
                "a rule for k_img hit inside norm_k_img: rules run one after the other": (
                    "norm_image_k" in name
                ),
                "the rule for head hit twice": name.startswith("final.final"),
                "this key is a real one": name == "None",
                "the block's number is fixed": "blocks.1." in name and block != "1",
                "it was left as it is": name == key,
            }
            expect(
                result[key] == right[key],
                f"{key} became {name}: {first_hint(mistakes, 'our DiT has another name for it')}",
            )


@exercise("every run of blocks was tried, the shape was watched, and the colour came over.")
def colour_blocks(answer):
    """The exercise of 14_tracing.

    answer(run, blocks) -> (first, last): of the blocks that leave the shape, those that move most colour.

    run(first, last) -> (colour, shape), what came over; with first > last it goes on at block 0. The shape is
    left where abs(shape) is at most 0.2: a number below 0 is a shape that has moved too.
    """
    for low, high, blocks, drift in ((2, 3, 7, 0.3), (4, 0, 5, 0.3), (3, 4, 5, 0.3), (1, 2, 5, -0.4)):
        run = partial(came_over, {low, high}, blocks, drift)
        pair = attempted(answer, run, blocks)
        said = f"of {blocks} blocks you chose {pair}: "
        expect(
            isinstance(pair, tuple | list)
            and len(pair) == 2
            and all(isinstance(block, int) and 0 <= block < blocks for block in pair),
            f"{said}expected the pair (first, last), two blocks from 0 to {blocks - 1}",
        )
        first, last = pair
        shape = run(first, last)[1]
        moves = f"it moves the shape as well: {shape:.2f} is "
        mistakes = {
            f"here the run goes round the end, {low} to {high}": first == last and low > high,
            "one block alone is not enough here; try neighbours together, up to the last block": (
                first == last
            ),
            f"{moves}below -0.2, and away counts like towards: abs(shape)": shape < -0.2,
            f"{moves}above 0.2; last is included: run(first, last) takes both ends": (
                shape > 0.2 and last == (high + 1) % blocks
            ),
            f"{moves}above 0.2": shape > 0.2,
        }
        otherwise = (
            f"{low} to {high} moves more of the colour and leaves the shape; "
            "was every first tried with every last?"
        )
        expect((first, last) == (low, high), said + first_hint(mistakes, otherwise))


def came_over(carriers, blocks, drift, first, last):
    """A model whose carriers hold the colour, and where each other block moves the shape by `drift`."""
    moved = {(first + step) % blocks for step in range((last - first) % blocks + 1)}
    colour, others = len(moved & carriers), len(moved - carriers)
    return 0.45 * colour + 0.02 * others, 0.05 * colour + drift * others


OPPOSITE = {
    "moving left": "moving right",
    "moving up": "moving down",
    "growing": "shrinking",
}
OPPOSITE |= {there: here for here, there in OPPOSITE.items()}


@exercise("every motion was read, of every shape and colour, on every background.")
def seen_motion(answer):
    """The exercise of 23_training.

    answer(video) -> one of the world's seven motions, read off a true clip, uint8 [F, H, W, 3], of one thing.
    """
    for number, motion in enumerate(world.MOTIONS * 3):
        # Over the three rounds each motion meets other shapes, colours and backgrounds.
        rng = np.random.default_rng([23, number])
        (thing,) = world.sample_scene(rng, things=1, split="any").things
        background = tuple(world.BACKGROUNDS)[number % len(world.BACKGROUNDS)]
        scene = world.Scene((world.Thing(thing.shape, thing.colour, motion),), background)
        read = attempted(answer, world.clip(scene, seed=number))
        fixed = f"got {read!r}; expected one of {', '.join(world.MOTIONS)}"
        expect(isinstance(read, str) and read in world.MOTIONS, fixed)
        mistakes = {
            "rows count from the top, so a larger row is lower": (
                read == OPPOSITE.get(motion) and motion in ("moving up", "moving down")
            ),
            "that is the opposite; is it the last frame minus the first?": read == OPPOSITE.get(motion),
            "its size changes and its place does not: compare how many pixels it has at first and at last": (
                motion in ("growing", "shrinking")
            ),
            "a size alone is no motion: edges are blurred, so a few pixels more or less are none": (
                read in ("growing", "shrinking")
            ),
            "what lies on it must be told from the background by its difference, not its brightness": (
                background != "black"
            ),
        }
        expect(
            read == motion,
            f"{world.caption(scene)} was read as {read}: "
            + first_hint(mistakes, "the axis that changes most says which motion it is"),
        )
