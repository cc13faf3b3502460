"""Is a compiled dit the same dit, in one graph, and as it is written while somebody looks?"""

import re
from copy import deepcopy
from functools import partial

import pytest
import small
import torch
from torch._dynamo.testing import CompileCounter

from moddiff import capture, patch
from moddiff.experts import Experts
from moddiff.extensions import (
    adapted,
    cached,
    causal,
    compiled,
    offloaded,
    parallel,
    quantized,
    windowed,
)
from moddiff.hooks import at

PROMPT = "a red circle moving left on a black background"


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return small.pipeline(tmp_path_factory.mktemp("tokenizer"), dit=small.dit(ffn_dim=64, num_layers=3))


def latents(pipe, **options):
    return torch.stack([state.next for state in pipe.steps(PROMPT, seed=1, **options)])


def close(a, b, within=1e-5):
    return float((a - b).abs().max() / b.abs().max()) < within


def test_a_run_has_one_graph_and_later_prompts_none(pipe):
    counter = CompileCounter()
    new = pipe.replace(dit=compiled(pipe.dit, backend=counter))
    assert close(latents(new), latents(pipe)) and counter.frame_count == 1
    for prompt in ("ein roter Kreis", "a blue square", ""):
        list(new.steps(prompt, seed=1))
    assert counter.frame_count == 1
    rows = new.dit.report().rows
    assert (
        len(rows) == 6 and not any(row["graphs"] for row in rows) and all(row["seconds"] > 0 for row in rows)
    )
    assert repr(new.dit).startswith("compiled(DiT, backend=")


def test_a_block_reads_the_table_of_positions_and_does_not_make_one(pipe):
    """A compiler looks through an lru_cache: inside a block the table would be made in each."""
    graphs = []

    def kept(graph, inputs):
        graphs.append(graph)
        return graph.forward

    latents(pipe.replace(dit=compiled(pipe.dit, backend=kept)), steps=1)
    named = [str(node.target) for node in graphs[0].graph.nodes]
    assert "scaled_dot_product_attention" in " ".join(named)
    assert not [name for name in named if re.search(r"\b(cos|sin|outer|arange)\b", name)]


def test_the_compiler_of_torch_gives_the_same(pipe):
    new = pipe.replace(dit=compiled(pipe.dit))
    assert close(latents(new, steps=2), latents(pipe, steps=2))
    first = new.dit.report().rows
    assert sum(row["graphs"] for row in first) == 1 and first[0]["seconds"] > 10 * first[-1]["seconds"]
    assert repr(new.dit) == "compiled(DiT)"


def test_while_somebody_looks_it_runs_as_written(pipe):
    counter = CompileCounter()
    new = pipe.replace(dit=compiled(pipe.dit, backend=counter))
    plain = latents(new)
    with capture(new.dit, "blocks.1.cross_attn.probs", branch="cond") as seen:
        assert close(latents(new), plain)
    with capture(pipe.dit, "blocks.1.cross_attn.probs", branch="cond") as wanted:
        latents(pipe)
    for (_, a), (_, b) in zip(seen, wanted, strict=True):
        torch.testing.assert_close(a, b)
    assert {row["way"] for row in new.dit.report().rows} == {"as written"}
    with (
        patch(new.dit, "blocks.0.ffn", lambda x, where: x * 0),
        patch(pipe.dit, "blocks.0.ffn", lambda x, where: x * 0),
    ):
        assert close(latents(new), latents(pipe)) and not close(latents(new), plain)
    assert close(latents(new), plain) and counter.frame_count == 1


AROUND = {
    "quantized": partial(quantized, kind="int8"),
    "q8_0": partial(quantized, kind="q8_0"),
    "adapted": partial(adapted, rank=2),
    "windowed": partial(windowed, length=2, overlap=1),
    "easycache": partial(cached, policy="easycache", threshold=0.0),
    "first-block": partial(cached, policy="first-block", threshold=0.0),
}


@pytest.mark.parametrize("name", AROUND)
def test_others_go_inside_and_around_with_one_graph(pipe, name):
    other, counter = AROUND[name], CompileCounter()
    wanted = latents(pipe.replace(dit=other(pipe.dit)))
    for new in (compiled(other(pipe.dit), backend=counter), other(compiled(pipe.dit, backend=counter))):
        torch._dynamo.reset()
        counter.frame_count = 0
        assert close(latents(pipe.replace(dit=new)), wanted), new
        assert counter.frame_count == 1, new


def test_two_experts_share_the_graph():
    counter = CompileCounter()
    both = Experts(small.dit(), small.dit(seed=1), 0.5)
    new, g = compiled(both, backend=counter), torch.Generator().manual_seed(0)
    x, text = torch.randn(1, small.Z, 3, 4, 6, generator=g), [torch.randn(4, 16, generator=g)]
    with torch.no_grad():
        for t in (900.0, 100.0):
            with at(step=0):
                torch.testing.assert_close(new(x, torch.tensor([t]), text), both(x, torch.tensor([t]), text))
    assert counter.frame_count == 1


def test_a_copy_is_compiled_anew_and_the_one_that_came_in_not_at_all(pipe):
    counter = CompileCounter()
    new = compiled(pipe.dit, backend=counter)
    other = deepcopy(new)
    latents(pipe)
    assert counter.frame_count == 0
    for one in (new, other):
        latents(pipe.replace(dit=one))
    assert counter.frame_count == 1  # the same code and the same shapes: the same graph


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda dit: compiled(dit, speed=9), "compiled(speed=...): torch.compile takes fullgraph, dynamic"),
        (
            lambda dit: compiled(lambda x, t, text: x),
            "compiles the blocks of a dit of ours; function has none",
        ),
        (lambda dit: compiled(compiled(dit)), "compiled already"),
        (lambda dit: compiled(causal(dit)), "(Listening) is none"),
        (lambda dit: causal(compiled(dit)), "which is compiled; leave one out"),
        (lambda dit: compiled(parallel(dit)), "(Listening) is none"),
        (lambda dit: parallel(compiled(dit)), "which are compiled; leave one out"),
        (lambda dit: compiled(offloaded(dit, keep=0)), "have hooks, so each is its own"),
        (lambda dit: offloaded(compiled(dit)), "a graph for each block that streams"),
    ],
)
def test_what_cannot_be_compiled_is_refused_at_the_call(make, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        make(small.dit())
