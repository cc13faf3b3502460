"""What would looking cost?  Shapes and bytes of a capture, forecast on the meta device, where tensors have shapes and no values."""

from copy import deepcopy

import torch
from torch import nn

from .hooks import capture, components
from .records import Cost


def cost(session, obj=None, *inputs, steps=None, branches=2, **example):
    """A table of what a capture would hold, from one rehearsal of the forward; weights are not needed, nothing is computed.

    session   the capture: its patterns and policies are applied as in the run
    obj       the model, by default the session's own; it may itself be on the meta device
    inputs    arguments of its forward; or, for a model with an `example` method, that method's: size=(480, 832), frames=81
    steps     how many steps the loop has, where the session does not choose its own; branches likewise, 2 under guidance
    ->        a Cost: a row for each tap, `.bytes` in all

    Raises UnknownTap as the session would, and TypeError if there is nothing to make inputs from.
    """
    times = len(session.steps) if session.steps else steps or 1
    if session.steps or steps:  # no loop, no guidance
        times *= len(session.branches) if session.branches else branches
    model = ghost(session.obj if obj is None else obj)
    policy = dict(heads=session.heads, rows=session.rows, reduce=session.reduce, dtype=session.dtype)
    with capture(model, *session.patterns, blocks=session.blocks, **policy, device="meta", limit=None) as seen:
        run_on_meta(model, inputs, example)
    return Cost([(str(where), where.layout, list(value.shape), value.numel() * value.element_size(), times) for where, value in seen])


def rehearsed(obj, **example):
    """A ghost of the model that has run once on its example inputs, so that its taps know their shapes."""
    model = ghost(obj)
    with capture(model, "*", limit=None):
        run_on_meta(model, (), example)
    return model


def ghost(obj):
    """A copy of a model with its weights on the meta device; the model itself is neither copied nor touched."""
    memo = {}
    for part in [obj] if isinstance(obj, nn.Module) else components(obj).values():
        for module in part.modules() if isinstance(part, nn.Module) else ():
            for held in (module._parameters, module._buffers, module.__dict__):
                for value in held.values():
                    if isinstance(value, torch.Tensor):
                        memo[id(value)] = as_meta(value)
    return deepcopy(obj, memo)


def as_meta(value):
    """The same tensor without its values; anything else, and lists of it, as it is."""
    if isinstance(value, (list, tuple)):
        return type(value)(as_meta(item) for item in value)
    if isinstance(value, nn.Parameter):
        return nn.Parameter(value.detach().to("meta"), requires_grad=False)
    return value.detach().to("meta") if isinstance(value, torch.Tensor) else value


def run_on_meta(model, inputs, example):
    """Call the model on meta copies of the inputs, or on the example inputs that it names itself."""
    if not inputs:
        inputs = example_of(model, **example)
    with torch.no_grad():
        return model(*map(as_meta, inputs))
