"""Where does the time go, and what can a compiler save?  Blocks that torch.compile has fused.

A block is some forty small operations around eight large products. Each small one reads and writes the whole
stream; compiled, neighbours become one pass over it. Guide: guides/compile.md
"""

import inspect
import time
from copy import deepcopy

import torch

from ..dit.block import Block, SelfAttention
from ..hooks import open_sessions, position
from .promises import Extension, expect, extension, layers

NEEDS = "torch.compile takes each block as one graph"  # how the refusals begin


@extension
def compiled(dit, **options):
    """A dit whose blocks are compiled, all to the same graph.   -> the component; exact, but for rounding

    options  of torch.compile: mode="max-autotune-no-cudagraphs", dynamic=..., backend=..., fullgraph=False

    The first call takes as long as the compiler needs, once for all blocks, and again for another dtype or a
    video of another size. Steps, branches and prompts of other lengths use the same graph; only a prompt that
    fills the model's whole text length, where no row is padding, has a graph of its own. What was compiled is
    kept by torch in a folder (TORCHINDUCTOR_CACHE_DIR), so that the next process begins faster.

    While a session is open everything runs as it is written, and taps work. `report()` says of each call of
    the last run how long it took and how many graphs were made.

    Other extensions go inside or around it. Three do not: `causal` and `parallel`, whose attention is not one
    graph, and `offloaded`, with which every block that streams would be a graph of its own.

    Raises ValueError for an option that torch.compile does not have, a dit without our blocks, and attention
    that cannot be compiled.
    """
    expect("dit", dit, "compiled")
    known = [name for name in inspect.signature(torch.compile).parameters if name not in ("model", "disable")]
    if odd := [name for name in options if name not in known]:
        raise ValueError(f"compiled({odd[0]}=...): torch.compile takes {', '.join(known)}")
    blocks = layers(dit, Block)
    if not blocks:
        raise ValueError(f"compiled compiles the blocks of a dit of ours; {type(dit).__name__} has none")
    if compiled_inside(dit):
        raise ValueError("compiled got a dit that is compiled already; once is enough")
    uncompilable(dit)
    return Compiled(dit, blocks, {"fullgraph": True} | options)


class Compiled(Extension):
    """See `compiled`.  options: of torch.compile"""

    def __init__(self, dit, blocks, options):
        super().__init__(dit, exact=True)
        for block in blocks.values():
            block.forward = Fused(block.forward, options)

    def forward(self, *inputs, **options):
        started, graphs = time.perf_counter(), graphs_made()
        velocity = self.wraps(*inputs, **options)
        if velocity.is_cuda:
            # A GPU works on its own time. Without waiting, the report would hold what asking took, not doing.
            torch.cuda.synchronize(velocity.device)
        self.memory.note(
            step=position().get("step"),
            branch=position().get("branch"),
            seconds=time.perf_counter() - started,
            graphs=graphs_made() - graphs,
            way="as written" if open_sessions() else "compiled",
        )
        return velocity


def compiled_inside(part):
    """Is there a compiled dit among the extensions of a component?"""
    return any(isinstance(inside, Compiled) for inside in layers(part, Extension).values())


def uncompilable(dit):
    """Raise ValueError for hooks and attention by which the blocks would not share one graph."""
    if any(block._forward_pre_hooks for block in layers(dit, Block).values()):
        raise ValueError(f"{NEEDS} for all, and the blocks of {dit!r} have hooks, so each is its own")
    if others := replaced(dit):
        raise ValueError(f"{NEEDS}, and the attention of {dit!r} ({others}) is none")


def replaced(part):
    """What another extension has put in the place of self-attention, by name; "" where nothing is."""
    found = [vars(attention).get("listen") for attention in layers(part, SelfAttention).values()]
    return ", ".join(sorted({type(one).__name__ for one in found if one is not None}))


class Fused:
    """A block's forward, compiled when it is first called.

    torch's compiled function holds on to the block it was made of, so a copy of the block needs its own.
    """

    def __init__(self, forward, options):
        self.forward, self.options, self.compiled = forward, options, None

    def __deepcopy__(self, memo):
        return Fused(deepcopy(self.forward, memo), self.options)

    def __call__(self, *inputs):
        if self.compiled is None:
            self.compiled = torch.compile(self.forward, **self.options)
        return self.compiled(*inputs)


def graphs_made():
    """How many graphs torch has compiled in this process."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]
