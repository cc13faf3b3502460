"""Is every change to a model noticed, named and put back?"""

import pytest
import torch
from moddiff.snapshots import Leaked, Snapshot
from toy import HEADS, WIDTH, Pipe, Toy, message, noise


def overwrite(toy):
    with torch.no_grad():
        toy.blocks[1].mlp.weight[0, 0] += 1


def nan_in(toy):
    with torch.no_grad():
        toy.blocks[1].mlp.bias[0] = float("nan")


CHANGES = {
    "blocks.1.mlp.weight": overwrite,
    "blocks.1.mlp.bias": nan_in,
    "blocks.0.attn: modules": lambda toy: setattr(toy.blocks[0].attn, "out", torch.nn.Linear(WIDTH, WIDTH)),
    "blocks.0.attn.out: parameters": lambda toy: setattr(
        toy.blocks[0].attn.out, "weight", torch.nn.Parameter(torch.zeros(WIDTH, WIDTH))
    ),
    "blocks.2.attn.q.weight": lambda toy: setattr(
        toy.blocks[2].attn.q.weight, "data", torch.zeros(WIDTH, WIDTH)
    ),
    "blocks.2.mlp: forward hooks": lambda toy: toy.blocks[2].mlp.register_forward_hook(
        lambda module, args, out: out * 2
    ),
    "blocks.2.mlp: forward pre hooks": lambda toy: toy.blocks[2].mlp.register_forward_pre_hook(
        lambda module, args: args[0] * 2
    ),
    "blocks.2.mlp: backward hooks": lambda toy: toy.blocks[2].mlp.register_full_backward_hook(
        lambda module, given, taken: given
    ),
    "blocks.1.attn.q.weight": lambda toy: setattr(
        toy.blocks[1].attn.q.weight, "data", toy.blocks[1].attn.q.weight.data.T
    ),
    "blocks.0.attn.kernel": lambda toy: setattr(toy.blocks[0].attn, "kernel", "math"),
    "blocks.0.training": lambda toy: toy.eval(),
    "blocks.0.attn.extra": lambda toy: setattr(toy.blocks[0].attn, "extra", 1),
    "blocks.0.mlp.weight": lambda toy: toy.to(torch.bfloat16),
    "blocks: modules": lambda toy: toy.blocks.append(torch.nn.Identity()),
}


@pytest.mark.parametrize("named", CHANGES)
def test_each_change_is_named_and_put_back_bit_for_bit(named):
    toy = Toy()
    plain, state = toy(noise()), {name: value.clone() for name, value in toy.state_dict().items()}
    snapshot = Snapshot(toy)
    CHANGES[named](toy)
    assert named in snapshot.restore()
    assert snapshot.restore() == []
    assert torch.equal(toy(noise()), plain) and all(
        torch.equal(state[name], value) for name, value in toy.state_dict().items()
    )
    assert toy.state_dict().keys() == state.keys() and toy.training


def test_a_model_left_alone_has_not_changed():
    toy = Toy()
    snapshot = Snapshot(toy)
    toy(noise())
    assert snapshot.restore() == [] and snapshot.bytes == sum(p.numel() * 4 for p in toy.parameters())


def test_components_of_a_pipeline_are_put_back():
    pipe = Pipe()
    dit, snapshot = pipe.dit, Snapshot(pipe)
    pipe.components["dit"] = Toy(seed=1)
    assert snapshot.restore() == ["components"] and pipe.dit is dit


def test_without_a_copy_a_change_in_place_is_an_error_and_a_swap_is_not():
    toy = Toy()
    snapshot = Snapshot(toy, copies=0)
    weight = toy.blocks[0].mlp.weight
    toy.blocks[0].mlp.weight = torch.nn.Parameter(torch.zeros(WIDTH, WIDTH))
    toy.to(torch.bfloat16)
    assert (
        "blocks.0.mlp: parameters" in snapshot.restore()
        and toy.blocks[0].mlp.weight is weight
        and weight.dtype == torch.float32
    )
    overwrite(toy)
    text = message(Leaked, snapshot.restore)
    assert (
        "weights were changed in place and no copy was kept: blocks.1.mlp.weight; load the model again"
        in text
        and "or raise copies=" in text
    )


def test_what_is_no_model_is_refused():
    assert "cannot watch a int; expected a module, or a pipeline" in message(
        TypeError, lambda: Snapshot(HEADS)
    )
