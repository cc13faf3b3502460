"""Does a capture with grad= keep the graph, and does one with stop= end the run where it has all it wants?"""

import pytest
import torch
from toy import BLOCKS, Pipe, Toy, by_hand, close, message, noise, opened

from moddiff import hooks
from moddiff.dit import DiT, DiTConfig
from moddiff.hooks import NeverFired, at, capture, live_handles, patch, scale_by, zero

RUN, OTHER = noise(), noise(1)


@pytest.fixture
def toy():
    return Toy().requires_grad_(False)


# gradients


@pytest.mark.parametrize(
    "name", ["blocks.1.resid_post", "blocks.1.attn.heads", "blocks.0.attn.probs", "blocks.2.attn.q"]
)
def test_a_gradient_of_a_captured_value_is_the_difference_that_a_change_of_it_makes(toy, name):
    with capture(toy, name, grad=True) as seen:
        metric = toy(RUN).square().sum()
    metric.backward()
    gradient, direction = (
        seen[name].grad,
        torch.randn(seen[name].shape, generator=torch.Generator().manual_seed(3)),
    )
    toy.double()

    def moved(amount):
        with patch(toy, name, lambda x, where: x + amount * direction):
            return toy(RUN.double()).square().sum()

    slope = (moved(1e-5) - moved(-1e-5)) / 2e-5
    assert abs(float((gradient * direction).sum() / slope) - 1) < 1e-4


def test_autograd_finds_the_captured_value_and_the_run_is_bit_equal(toy):
    plain = toy(RUN)
    with capture(toy, "blocks.*.resid_post", grad=True) as seen:
        out = toy(RUN)
    assert torch.equal(out, plain) and len(seen) == BLOCKS
    (first,) = torch.autograd.grad(out.sum(), seen["blocks.0.resid_post"], retain_graph=True)
    # by hand: the blocks after it, on the same value
    value = seen["blocks.0.resid_post"].detach().clone().requires_grad_()
    rest = by_hand(toy, RUN, lambda tap, x, block: value if (tap, block) == ("resid_post", 0) else x)
    close(first, torch.autograd.grad(rest.sum(), value)[0])
    assert not plain.requires_grad and not any(p.requires_grad for p in toy.parameters())


def test_what_the_run_writes_into_a_value_does_not_reach_the_record():
    class InPlace(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.tap = hooks.Taps(before="n")

        def forward(self, x):
            return self.tap("before", x).mul_(2)

    with capture(model := InPlace(), "before", grad=True) as seen:
        model(torch.ones(3)).sum().backward()
    assert seen["before"].tolist() == [1, 1, 1] and seen["before"].grad.tolist() == [2, 2, 2]


def small_dit():
    torch.manual_seed(0)
    dit = DiT(DiTConfig("t2v", 4, 24, 32, 16, 12, 4, 2, 3, text_len=16)).eval().requires_grad_(False)
    return dit, (torch.randn(1, 4, 2, 4, 6), torch.tensor([500.0]))


def test_attribution_patching_foretells_what_patching_does_on_a_dit():
    """First order, (A - B) . gradient, for each block, against a small step really taken."""
    dit, (x, t) = small_dit()
    mine, other = torch.randn(1, 5, 12), torch.randn(1, 5, 12)
    score = torch.randn(1, 4, 2, 4, 6)
    name, small = "blocks.*.cross_attn.out", 0.02
    with capture(dit, name) as A:
        dit(x, t, list(other))
    with capture(dit, name, grad=True) as B:
        (dit(x, t, list(mine)) * score).sum().backward()
    foretold = {str(where): ((A[str(where)] - value) * value.grad).sum().item() for where, value in B}
    assert len(foretold) == 3 and max(map(abs, foretold.values())) > 1e-3

    def towards_a(place, amount):
        with patch(dit, place, lambda b, where: b + amount * (A[place] - b)):
            return float((dit(x, t, list(mine)) * score).sum())

    for place, effect in foretold.items():
        taken = (towards_a(place, small) - towards_a(place, -small)) / (2 * small)
        assert abs(effect - taken) < 5e-3 * max(map(abs, foretold.values()))


def test_every_floating_value_of_a_dit_can_have_a_gradient():
    dit, (x, t) = small_dit()
    with capture(dit, "*", grad=True) as seen:
        out = dit(x, t, [torch.randn(5, 12)])
    out.square().sum().backward()
    without = {str(where) for where, value in seen if value.grad is None}
    assert not without
    plain = dit(x, t, [torch.randn(5, 12)])
    assert not plain.requires_grad and not live_handles()  # nothing of the graph was remembered


def test_a_gradient_where_there_can_be_none_is_refused_with_the_cure(toy):
    pipe = Pipe()
    text = message(RuntimeError, opened(capture(pipe, "dit.blocks.0.resid_post", grad=True), pipe))
    assert "gradients are off here, as inside pipe(...) and torch.no_grad(); call the model yourself" in text

    class Counting(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.tap = hooks.Taps(ids="n")

        def forward(self, x):
            return self.tap("ids", x)

    text = message(TypeError, opened(capture(m := Counting(), "ids", grad=True), lambda: m(torch.arange(3))))
    assert "it is torch.int64, and only floating values have gradients" in text


# stopping


def forwards(toy):
    """How often each block has run, counted by hooks of torch."""
    counts = [0] * BLOCKS
    for i, block in enumerate(toy.blocks):

        def count(*_, i=i):
            counts[i] += 1

        block.register_forward_pre_hook(count)
    return counts


@pytest.mark.parametrize("name", ["blocks.0.resid_post", "blocks.0.attn.probs", "blocks.0.resid_mid"])
def test_a_run_ends_where_the_last_wanted_tap_has_fired(toy, name):
    with capture(toy, name) as whole:
        toy(RUN)
    counts, after = forwards(toy), []
    with capture(toy, name, stop=True) as seen:
        toy(RUN)
        after.append("never")
    assert torch.equal(seen[name], whole[name]) and counts == [1, 0, 0] and not after
    assert not live_handles() and not hooks.open_sessions() and toy(RUN) is not None and counts == [2, 1, 1]


def test_a_run_goes_on_until_every_tap_has_fired(toy):
    counts = forwards(toy)
    with capture(toy, "blocks.*.resid_pre", blocks=[0, 1], stop=True) as seen:
        toy(RUN)
    assert len(seen) == 2 and counts == [1, 1, 0]


@pytest.mark.parametrize(
    "names", [("dit.blocks.1.resid_post",), ("velocity.*", "x"), ("dit.blocks.*.resid_mid", "velocity.cond")]
)
@pytest.mark.parametrize(
    "policy",
    [dict(steps=1), dict(steps=[0, 2], branch="cond"), dict(steps=[1, 2], branch=["cond", "uncond"])],
)
def test_with_steps_and_branches_the_record_is_that_of_the_whole_run(names, policy):
    if "branch" in policy:
        names = [name for name in names if name not in ("x", "velocity.*")] or ["velocity.cond"]
        policy = policy if "velocity.cond" not in names else policy | {"branch": "cond"}
    pipe = Pipe()
    with capture(pipe, *names, **policy) as whole:
        plain = pipe()
    counts, steps = forwards(pipe.dit), []
    with capture(pipe, *names, **policy, stop=True) as seen:
        for _ in pipe.steps():
            steps.append(hooks.position())
    assert [where for where, _ in seen] == [where for where, _ in whole] and len(steps) < pipe.count
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(seen, whole))
    assert 2 * pipe.count > counts[0] and hooks.position() == {} and torch.equal(pipe(), plain)


def test_without_branch_the_other_branches_of_the_last_step_are_awaited():
    pipe = Pipe()
    counts = forwards(pipe.dit)
    with capture(pipe.dit, "blocks.1.resid_post", steps=1, stop=True) as seen:
        pipe()
    assert [(where.step, where.branch) for where, _ in seen] == [(1, "cond"), (1, "uncond")]
    assert counts == [5, 5, 4]  # two steps of two branches, and the third up to the tap
    counts[:] = [0] * BLOCKS
    with capture(pipe.dit, "blocks.1.resid_post", steps=1, branch="cond", stop=True):
        pipe()
    assert counts == [3, 3, 2]


def test_a_stop_passes_through_other_sessions_and_ends_its_own_block_only(toy):
    after = []
    with capture(toy, "blocks.*.resid_post") as outside:
        with (
            capture(toy, "blocks.0.resid_post", stop=True) as seen,
            patch(toy, "blocks.0.resid_pre", scale_by(2)),
        ):
            toy(RUN)
        after.append(True)
        toy(RUN)
    close(
        seen["resid_post"],
        outside["blocks.0.resid_post" and outside.names[0]] if False else outside.visits[0][1],
    )
    assert after and len(outside) == 1 + BLOCKS
    with pytest.raises(NeverFired, match="patch of blocks.2.resid_pre never fired"):
        with patch(toy, "blocks.2.resid_pre", zero()), capture(toy, "blocks.0.resid_post", stop=True):
            toy(RUN)
    assert not live_handles()


def test_an_error_before_the_stop_is_the_error(toy):
    def fails(x, where):
        raise ZeroDivisionError

    with (
        pytest.raises(ZeroDivisionError),
        capture(toy, "blocks.1.resid_post", stop=True),
        patch(toy, "blocks.0.resid_pre", fails),
    ):
        toy(RUN)
    assert "never announced one" in message(
        NeverFired, opened(capture(toy, "blocks.0.resid_post", steps=3, stop=True), lambda: toy(RUN))
    )


def test_a_gradient_and_a_stop_go_together(toy):
    with capture(toy, "blocks.0.resid_post", "blocks.1.resid_post", grad=True, stop=True) as seen, at(step=0):
        toy(RUN)
    seen["blocks.1.resid_post"].sum().backward()
    assert seen["blocks.0.resid_post"].grad.abs().max() > 0
