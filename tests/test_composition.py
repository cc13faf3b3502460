"""Do extensions go on top of each other, in every order?  Each pair is tried; the table is made here."""

import itertools
from functools import partial
from pathlib import Path

import pytest
import small
import torch

from moddiff import capture, hooks, patch, roles, taps, weights
from moddiff.extensions import (
    adapted,
    cached,
    causal,
    compiled,
    layers,
    offloaded,
    parallel,
    quantized,
    sparse,
    tiled,
    windowed,
)
from moddiff.linear import Linear, dense

GUIDE = Path(__file__).parents[1] / "guides" / "lora.md"
PROMPT = "a red circle moving left on a black background"
WIDTHS = dict(ffn_dim=64)
LAYERS = [
    f"blocks.{i}.{name}" for i in range(2) for name in ("self_attn.q", "cross_attn.k", "ffn.0", "ffn.2")
]


def adapter():
    """A LoRA of random numbers."""
    g, state = torch.Generator().manual_seed(0), {}
    for name in LAYERS:
        rows, columns = small.dit(**WIDTHS).get_submodule(name).weight.shape
        state[f"{name}.lora_down.weight"] = torch.randn(3, columns, generator=g) / 4
        state[f"{name}.lora_up.weight"] = torch.randn(rows, 3, generator=g) / 4
        state[f"{name}.alpha"] = torch.tensor(3.0)
    return state


def at_the_end(now, here):
    """A cache policy that skips the last of three steps."""
    return now.step == 2


ADAPTER = adapter()
# What is tried: name -> component -> component.
TRIED = {
    "adapted": lambda dit: adapted(dit, ADAPTER),
    "quantized": partial(quantized, kind="int8"),
    "offloaded": partial(offloaded, keep=0),
    "cached": partial(cached, policy=at_the_end),
    "compiled": partial(compiled, backend="eager"),
    "windowed": partial(windowed, length=2, overlap=1),
    "sparse": partial(sparse, pattern="sliding", time=1, space=0),
    "causal": partial(causal, chunk=2),
    "parallel": parallel,
}
# Others of the same kind, tried among the first four.
VARIANTS = {
    "adapted by step": lambda dit: adapted(dit, ADAPTER, strength=lambda where: 1.0),
    "quantized fp8": partial(quantized, kind="fp8"),
    "quantized q8_0": partial(quantized, kind="q8_0"),
    "offloaded to disk": partial(offloaded, keep=0, source="disk"),
}
MAKE = TRIED | VARIANTS
# Pairs that cannot be, in either order, and why. A word of it is in the error.
APART = {
    ("quantized", "quantized"): "quantized",  # what is kept in few bits is not rounded again
    ("compiled", "offloaded"): "graph",  # each block that streams would be a graph of its own
    ("compiled", "causal"): "compile",  # an attention that is no one graph
    ("compiled", "parallel"): "compile",
    ("compiled", "sparse"): "compile",
    ("causal", "parallel"): "attention",  # two that change the same attention
    ("causal", "sparse"): "attention",
    ("parallel", "sparse"): "attention",
    ("sparse", "sparse"): "attention",
    ("causal", "windowed"): "causal",  # frames in turn, and frames out of turn
}
# Pairs that go in one order alone: the outer one first.
REFUSED = {("cached", "parallel"): "inside"}  # the ranks have to skip the same blocks
BEHAVE = ("cached", "windowed", "sparse", "causal")  # what changes more than weights, and where they are
PAIRS = list(itertools.permutations(TRIED, 2))
PAIRS += [
    pair for pair in itertools.permutations([*list(TRIED)[:4], *VARIANTS], 2) if set(pair) & set(VARIANTS)
]
OF_A_VAE = {"tiled"}  # with offloaded, below


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    # Widths in 32s, so that q8_0 has blocks for every layer, and each quantized model is one throughout.
    return small.pipeline(tmp_path_factory.mktemp("tokenizer"), dit=small.dit(**WIDTHS))


def latents(pipe):
    return torch.stack([state.next for state in pipe.steps(PROMPT, seed=3)])


def expected(pipe, *names):
    """The oracle: one dense DiT with all that those extensions change in its weights."""
    dit = pipe.dit
    for name in names:
        if name.startswith("quantized"):  # as it expands, in whatever order: adapters stay beside the weights
            kept = MAKE[name](dit)
            whole = {f"{path}.weight": dense(layer).detach() for path, layer in layers(kept, Linear).items()}
            dit = weights.build("dit", dit.config, dict(dit.state_dict()) | whole)
    state = {name: x.clone() for name, x in dit.state_dict().items()}
    for _ in [name for name in names if name.startswith("adapted")]:
        for layer in LAYERS:
            state[f"{layer}.weight"] += (
                ADAPTER[f"{layer}.lora_up.weight"] @ ADAPTER[f"{layer}.lora_down.weight"]
            )
    dit = weights.build("dit", dit.config, state).requires_grad_(False)
    for name in reversed(names):  # in the other order: it must not matter
        dit = TRIED[name](dit) if name in BEHAVE else dit
    return pipe.replace(dit=dit)


def refusal(outer, inner):
    """A word of the error of outer(inner(dit)); None where both go together."""
    kinds = outer.split()[0], inner.split()[0]
    if kinds in REFUSED:
        return REFUSED[kinds]
    return next((word for pair, word in APART.items() if set(pair) == set(kinds)), None)


@pytest.mark.parametrize(("outer", "inner"), PAIRS, ids=[f"{outer} on {inner}" for outer, inner in PAIRS])
def test_a_pair_computes_what_both_say_or_is_refused_at_the_call(pipe, outer, inner):
    within = MAKE[inner](pipe.dit)
    if word := refusal(outer, inner):
        with pytest.raises(ValueError, match=word):
            MAKE[outer](within)
        return
    new = pipe.replace(dit=MAKE[outer](within))
    result, wanted = latents(new), latents(expected(pipe, inner, outer))
    assert float((result - wanted).abs().max() / wanted.abs().max()) < 1e-4
    assert set(taps(pipe.dit).names) <= set(taps(new.dit).names)
    with capture(new.dit, "blocks.1.cross_attn.probs", steps=1, branch="cond") as seen:
        latents(new)
    assert len(seen) == (2 if "windowed" in (outer, inner) else 1)  # three frames are two windows
    with patch(new.dit, "blocks.0.resid_post", hooks.zero()):
        assert not torch.equal(latents(new), result)
    assert torch.equal(latents(new), result), "a second run gives the same"


@pytest.mark.parametrize(("outer", "inner"), itertools.permutations(("adapted", "quantized", "offloaded"), 2))
def test_three_go_too(pipe, outer, inner):
    third = next(name for name in ("adapted", "quantized", "offloaded") if name not in (outer, inner))
    new = pipe.replace(dit=TRIED[outer](TRIED[inner](TRIED[third](pipe.dit))))
    wanted = latents(expected(pipe, "quantized", "adapted"))
    assert float((latents(new) - wanted).abs().max() / wanted.abs().max()) < 1e-4


def test_those_of_a_vae_go_together(pipe):
    tile = partial(tiled, size=(16, 32), overlap=(8, 16))
    latent = torch.randn(1, small.Z, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = tile(pipe.vae).decode(latent)
        for both in (tile(offloaded(pipe.vae)), offloaded(tile(pipe.vae))):
            assert torch.equal(both.decode(latent), plain)


def test_every_extension_is_tried():
    tried = set(TRIED) | OF_A_VAE
    assert set(roles.BUILT_IN["extension"]) == tried


def table():
    """Rows: the one on the outside; columns: the one within."""
    head = "| outside, inside | " + " | ".join(TRIED) + " |"
    lines = [head, "|" + "---|" * (len(TRIED) + 1)]
    for outer in TRIED:
        cells = ["" if outer == inner else "refused" if refusal(outer, inner) else "yes" for inner in TRIED]
        lines.append(f"| {outer} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def test_the_guide_has_the_table():
    assert table() in GUIDE.read_text(encoding="utf-8")
