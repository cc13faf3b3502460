"""What would looking cost?  A capture, forecast on the meta device: shapes without values."""

from copy import deepcopy

import torch
from torch import nn

from .records import Cost
from .tap import members, walk, wrapped


def cost(session, obj=None, *inputs, steps=None, branches=2, **example):
    """A table of what a capture would hold, from one rehearsal of the forward without weights and values.

    session   the capture: its patterns and policies are applied as in the run
    obj       the model or pipeline, by default the session's own; its weights may be on the meta device
    inputs    arguments of the model's forward; or else those of its `example` method: size=(480, 832),
              frames=81, words=32
    steps     how many steps the loop has, where the session does not choose its own
    branches  how many passes a step has, where the session does not choose: 2 under guidance; counts only
              with steps
    ->        a Cost: a row for each tap, `.bytes` in all

    Raises UnknownTap as the session would, and TypeError where there is nothing to make inputs from.
    """
    model = ghost(session.obj if obj is None else obj)
    policy = dict(heads=session.heads, rows=session.rows, reduce=session.reduce, dtype=session.dtype)
    with type(session)(
        model, *session.patterns, blocks=session.blocks, **policy, device="meta", limit=None
    ) as seen:
        run_on_meta(model, inputs, example)
    steps = len(session.steps or ()) or steps
    passes = steps * (len(session.branches or ()) or branches) if steps else 1
    # A pipeline's own values come once a step, those of its components in each branch.
    own = steps or 1 if hasattr(model, "components") else passes
    rows = [
        (str(where), where.layout, list(value.shape), value.nbytes, passes if where.path else own)
        for where, value in seen
    ]
    return Cost(rows)


def ghost(obj):
    """A copy of a model with its weights on the meta device; the weights themselves are not copied."""
    memo = {}  # what a deepcopy finds in here, it takes for the copy
    for module in [part for _, part in walk(obj) if isinstance(part, nn.Module)]:
        held = [*module._parameters.values(), *module._buffers.values(), *vars(module).values()]
        memo |= {id(value): as_meta(value) for value in held if isinstance(value, torch.Tensor)}
    return deepcopy(obj, memo)


def as_meta(value):
    """The same tensor without its values; lists and tuples item by item; anything else as it is."""
    if isinstance(value, (list, tuple)):
        return type(value)(as_meta(item) for item in value)
    if isinstance(value, nn.Parameter):
        return nn.Parameter(value.detach().to("meta"), requires_grad=False)
    return value.detach().to("meta") if isinstance(value, torch.Tensor) else value


@torch.no_grad()
def run_on_meta(obj, inputs, example):
    """Call the model on meta copies of the inputs, or on the example that it gives of them.

    Of a pipeline, every part that gives one is called.
    """
    if inputs:
        return obj(*map(as_meta, inputs))
    if (example_inputs := example_of(obj)) is not None:
        return obj(*map(as_meta, example_inputs(**example)))
    if not hasattr(obj, "components"):
        raise TypeError(
            f"{type(obj).__name__} has no example(...) method to make inputs from; "
            "pass the inputs themselves: cost(model, x, t, text)"
        )
    for part in members(obj).values():
        if example_of(part) is not None:
            latent = run_on_meta(part, (), example)
            for name in obj.tap.layouts:
                obj.tap(name, latent)


def example_of(obj):
    """The method of a model, or of what it wraps, that makes inputs of a size; None if there is none."""
    inner = wrapped(obj)
    return getattr(obj, "example", None if inner is None else example_of(inner))
