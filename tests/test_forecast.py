"""Does the forecast of a capture say what the capture then holds, also for models too large to have?"""

import pytest
import torch
from toy import HEADS, Pipe, Toy, noise

from moddiff.dit import DiT, DiTConfig
from moddiff.hooks import UnknownTap, capture, taps

WAN_1B = dict(
    model_type="t2v",
    in_dim=16,
    dim=1536,
    ffn_dim=8960,
    freq_dim=256,
    text_dim=4096,
    out_dim=16,
    num_heads=12,
    num_layers=30,
)
WAN_14B = WAN_1B | dict(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)
TOKENS = 21 * 30 * 52


def on_meta(config, layers=None):
    """The model with shapes and no weights; `layers` keeps the test short where every block is alike."""
    with torch.device("meta"):
        return DiT(DiTConfig(**config | ({} if layers is None else {"num_layers": layers})))


@pytest.mark.parametrize(
    "policy",
    [{}, {"heads": [1]}, {"rows": [0, 2]}, {"reduce": "heads"}, {"dtype": torch.float16}, {"blocks": [0, 2]}],
)
def test_the_forecast_is_what_the_capture_then_holds(policy):
    pipe = Pipe()
    session = capture(
        pipe.dit, "blocks.*.attn.probs", "blocks.*.attn.heads", steps=[0, 2], branch="cond", **policy
    )
    forecast = session.cost(pipe.dit, noise())
    with session as seen:
        pipe()
    assert forecast.bytes == seen.bytes > 0
    assert sum(row[4] for row in forecast) == len(seen)


def test_the_forecast_leaves_the_model_where_and_as_it_is():
    toy = Toy()
    plain = toy(noise())
    capture(toy, "*").cost(toy, noise())
    assert torch.equal(toy(noise()), plain) and not any(p.is_meta for p in toy.parameters())


def test_steps_and_branches_multiply_unless_the_capture_chose_its_own():
    toy = Toy()
    one = capture(toy, "blocks.0.attn.probs").cost(toy, noise()).bytes
    assert one == 2 * HEADS * 6 * 6 * 4
    assert capture(toy, "blocks.0.attn.probs").cost(toy, noise(), steps=50).bytes == 100 * one
    assert (
        capture(toy, "blocks.0.attn.probs", steps=[1, 2, 3]).cost(toy, noise(), steps=50, branches=1).bytes
        == 3 * one
    )
    assert capture(toy, "blocks.0.attn.probs", branch="cond").cost(toy, noise(), steps=50).bytes == 50 * one


def test_wan_1b_cross_attention_costs_what_the_arithmetic_says():
    model = on_meta(WAN_1B)
    video = dict(size=(480, 832), frames=81)
    pattern = "blocks.*.cross_attn.probs"
    one = (
        TOKENS * 12 * 512 * 2
    )  # bytes of a block, a step and a branch in float16: the 403 MB of guides/hooks.md
    whole = capture(model, pattern, dtype=torch.float16).cost(steps=50, **video)
    assert (
        whole.bytes == one * 30 * 50 * 2
        and "1.21 TB" in repr(whole)
        and "403 MB" in repr(whole)
        and "[1, 12, 32760, 512]" in repr(whole)
    )
    model = on_meta(WAN_1B, 2)
    mean = capture(model, pattern, dtype=torch.float16, reduce="heads").cost(steps=50, **video)
    assert mean.bytes == one // 12 * 2 * 50 * 2
    few = capture(
        model,
        pattern,
        dtype=torch.float16,
        steps=range(5),
        branch="cond",
        reduce=lambda p: p[..., :8].mean(1),
    ).cost(**video)
    assert few.bytes == TOKENS * 8 * 2 * 2 * 5
    some = capture(model, "blocks.0.self_attn.probs", rows=range(10), dtype=torch.float16).cost(**video)
    assert some.bytes == 12 * 10 * TOKENS * 2


@pytest.mark.parametrize(("config", "layers"), [(WAN_1B, 2), (WAN_14B, 2)])
def test_every_tap_of_wan_at_480p_has_the_shape_its_layout_says(config, layers):
    model = on_meta(config, layers)
    forecast = capture(model, "*").cost(size=(480, 832), frames=81, batch=2)
    dim, heads = config["dim"], config["num_heads"]
    sizes = {"b": 2, "n": TOKENS, "heads": heads, "d": dim // heads, "six": 6, "pairs": dim // heads // 2}
    for name, layout, shape, *_ in forecast:
        assert len(shape) == len(layout.split()), name
        for axis, size in zip(layout.split(), shape):
            one_time = axis == "n" and name.rpartition(".")[2] in ("time", "modulation")
            assert size == (1 if one_time else sizes.get(axis, size)), f"{name} {layout} {shape}"
    named = {row[0]: row[2] for row in forecast}
    assert named["blocks.0.self_attn.probs"] == [2, heads, TOKENS, TOKENS] and named[
        "blocks.1.cross_attn.k"
    ] == [2, heads, 512, dim // heads]


def test_taps_shows_shapes_of_a_model_that_never_ran():
    table = taps(on_meta(WAN_1B, 1), "blocks.0.self_attn.*", size=(480, 832), frames=81)
    assert ("blocks.0.self_attn.q", "b heads n d", [1, 12, TOKENS, 128], "queries") in list(table)


class Quiet:
    def __init__(self, inner):
        self.inner = inner

    def __call__(self, *inputs):
        return self.inner(*inputs)


def test_a_wrapped_model_is_forecast_as_the_bare_one():
    model, video = on_meta(WAN_1B, 1), dict(size=(480, 832), frames=81, steps=4)
    patterns = "blocks.0.cross_attn.probs", "final"
    bare = capture(model, *patterns).cost(**video)
    assert list(capture(Quiet(Quiet(model)), *patterns).cost(**video)) == list(bare)


def test_a_model_without_example_asks_for_the_inputs_and_a_typo_for_the_name():
    with pytest.raises(
        TypeError, match=r"Toy has no example\(...\) method to make inputs from; pass the inputs themselves"
    ):
        capture(Toy(), "*").cost()
    with pytest.raises(UnknownTap, match="nearest"):
        capture(Toy(), "blocks.0.attn.prob").cost(Toy(), noise())


def test_a_pipelines_own_values_are_forecast_with_its_components():
    class Videos:
        def __init__(self):
            from moddiff.hooks import Taps

            self.components, self.tap = (
                {"dit": on_meta(WAN_1B, 1), "text": None},
                Taps(x="b c f h w", velocity="b c f h w"),
            )

    forecast = capture(Videos(), "x", "velocity", "dit.blocks.0.resid_post").cost(
        size=(480, 832), frames=81, steps=10
    )
    latent = 16 * 21 * 60 * 104 * 4
    assert {row[0]: row[4] for row in forecast} == {"x": 10, "velocity": 10, "dit.blocks.0.resid_post": 20}
    assert forecast.bytes == 20 * latent + 20 * TOKENS * 1536 * 4
