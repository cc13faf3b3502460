"""How does a model run where it does not fit?  Its blocks come when they are needed, and go when they ran.

A block of Wan 14B is 0.7 GB and computes for 85 ms at 480p; its copy from pinned memory takes 13 ms. So the
next block can be on its way while this one computes, and streaming costs next to nothing: see
guides/offload.md for the rule.
"""

import functools
import os
import tempfile
from contextlib import contextmanager

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from ..hooks import position
from ..storage.pages import give_back, in_a_file, will_need
from .compile import compiled_inside
from .promises import Extension, extension, layers, nbytes, own, tensors, whole_number

SOURCES = ("memory", "disk")


@extension
def offloaded(part, device=None, keep=1, ahead=1, source="memory"):
    """A component whose blocks are on the device only while they compute.   -> the component; exact

    device  where it computes; None: "cuda" where there is one, else "cpu"
    keep    how many blocks stay on the device, the first ones
    ahead   how many more are fetched while one computes
    source  where the others wait: "memory" (pinned, for a GPU), or "disk": they stay in the file that they
            were loaded from, mapped. What is in no file, such as a quantized weight, goes to a file without
            a name, which ends with the process

    What is no block, such as the patch embedding, stays on the device unless it is larger than a block. A
    vae, which has no such blocks, comes as a whole for each call.

    Raises ValueError for a number below 0, a source or a device that there is not, or a component without
    blocks that is no vae.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"offloaded(device={str(device)!r}), but torch sees no GPU; leave device out")
    if source not in SOURCES:
        raise ValueError(f"offloaded(source={source!r}); expected {' or '.join(map(repr, SOURCES))}")
    for option, number in dict(keep=keep, ahead=ahead).items():
        whole_number("offloaded", option, number)
    if compiled_inside(part):
        raise ValueError(
            f"offloaded would make a graph for each block that streams of {part!r}; leave one out"
        )
    blocks = blocks_of(part)[0]
    if not blocks and callable(getattr(part, "decode", None)):
        return Whole(part, device, source)
    if len(blocks) < 2:
        raise ValueError(f"offloaded got {type(part).__name__}, which has no list of blocks to stream")
    return Offloaded(part, device, keep, ahead, source)


class Offloaded(Extension):
    """See `offloaded`.  device: where it computes"""

    def __init__(self, part, device, keep, ahead, source):
        super().__init__(part, exact=True)
        self.device, self.ahead, self.source = device, ahead, source
        blocks, others = blocks_of(part)
        largest = max(map(nbytes, blocks.values()))
        streamed = dict([*blocks.items()][keep:])
        streamed |= {path: module for path, module in others.items() if nbytes(module) > largest}
        self.rows = [
            {"part": path, "MB": nbytes(module) / 1e6, "it": "streams" if path in streamed else "stays"}
            for path, module in (others | blocks).items()
        ]
        self.streamed = [*streamed.values()]
        self.here, self.guests = {}, {}  # away from home: {number of a block, or a layer: Visit}
        self.ran, self.moved = {}, 0  # {number: the event after which it has computed}; bytes of this pass
        moving = {id(x) for module in self.streamed for x in tensors(module)}
        for x in tensors(part):
            if id(x) not in moving and not x.is_meta:
                x.data = x.data.to(device)
        for module in self.streamed:
            send_away(module, device, source)
        self.shares = source == "disk" or device.type == "cpu"
        for i, module in enumerate(self.streamed):
            module.register_forward_pre_hook(functools.partial(self.arrive, i))
            module.register_forward_hook(functools.partial(self.depart, i), always_call=True)
            for layer in module.modules():
                if layer is not module and own(layer):
                    # Keys and values of the prompt are made by layers of blocks that do not run themselves.
                    layer.register_forward_pre_hook(functools.partial(self.admit, i))
                    layer.register_forward_hook(self.dismiss, always_call=True)

    def holds(self):
        """As Extension.holds: what stays and, of what streams, one block that computes and those `ahead`."""
        sizes = [nbytes(module) for module in self.streamed]
        here = max((sum(sizes[i : i + 1 + self.ahead]) for i in range(len(sizes))), default=0)
        stays = nbytes(self.wraps) - sum(sizes)
        return stays + here, sum(sizes) if self.source == "memory" else 0

    def fetch(self, i):
        """Begin to bring a block here."""
        if i in self.here or i >= len(self.streamed):
            return
        # The program runs ahead of the GPU: without this wait all blocks would be here before the first has
        # computed.
        if i - self.ahead - 2 in self.ran:
            self.ran.pop(i - self.ahead - 2).synchronize()
        self.here[i] = Visit(tensors(self.streamed[i]), self.device, self.source)
        self.moved += self.here[i].nbytes

    def arrive(self, i, module, inputs):
        """Before a block computes it has to be here, and nothing else that an error may have left."""
        for stale in [j for j in self.here if not i <= j <= i + self.ahead]:
            self.here.pop(stale).end()
        # The next ones begin to come before this one computes: a CPU is at it until `depart`.
        for j in range(i, i + 1 + self.ahead):
            self.fetch(j)
        self.here[i].begin()

    def depart(self, i, module, inputs, outputs):
        """After it has computed it goes."""
        if self.device.type == "cuda":
            self.ran[i] = torch.cuda.current_stream(self.device).record_event()
        self.here.pop(i).end()
        if i + 1 == len(self.streamed):
            now = position()
            self.memory.note(step=now.get("step"), branch=now.get("branch"), MB_moved=self.moved / 1e6)
            self.moved = 0
            self.ran.clear()

    def admit(self, i, layer, inputs):
        """Before a layer computes whose block does not: only its own weights come."""
        if i not in self.here:
            self.guests[layer] = Visit(own(layer), self.device, self.source)
            self.guests[layer].begin()

    def dismiss(self, layer, inputs, outputs):
        if layer in self.guests:
            self.guests.pop(layer).end()


class Whole(Extension):
    """A vae that is on the device only while it encodes or decodes."""

    def __init__(self, part, device, source):
        super().__init__(part, exact=True, rows=[{"part": "all", "MB": nbytes(part) / 1e6, "it": "comes"}])
        self.device, self.source = device, source
        send_away(part, device, source)
        self.shares = source == "disk" or device.type == "cpu"

    def holds(self):
        size = nbytes(self.wraps)
        return size, size if self.source == "memory" else 0

    @contextmanager
    def visiting(self):
        visit = Visit(tensors(self.wraps), self.device, self.source)
        try:
            visit.begin()
            yield
        finally:
            visit.end()

    def encode(self, *inputs, **options):
        with self.visiting():
            return self.wraps.encode(*inputs, **options)

    def decode(self, *inputs, **options):
        with self.visiting():
            return self.wraps.decode(*inputs, **options)

    def stream(self, *inputs, **options):
        frames = self.wraps.stream(*inputs, **options)  # which checks its input at the call
        return self.visited(frames)

    def visited(self, frames):
        with self.visiting():
            yield from frames


class Visit:
    """Some weights on their way to the device, there, and back.  A CPU uses those of a file in place."""

    def __init__(self, weights, device, source):
        self.weights, self.source, self.device = weights, source, device
        self.homes = [x.data for x in weights]
        self.nbytes = sum(x.nbytes for x in weights)
        self.event = None
        if source == "disk":
            will_need(self.homes)
        stream = copy_stream(device)
        with torch.cuda.stream(stream):  # None does nothing
            copies = not (source == "disk" and device.type == "cpu")
            self.copies = [x.to(device, non_blocking=True, copy=copies) for x in self.homes]
            self.event = None if stream is None else stream.record_event()

    def begin(self):
        """From here on the weights are those on the device."""
        if self.event is not None:
            now = torch.cuda.current_stream(self.device)
            now.wait_event(self.event)
            for copy in self.copies:
                copy.record_stream(now)
        for x, copy in zip(self.weights, self.copies):
            x.data = copy

    def end(self):
        for x, home in zip(self.weights, self.homes):
            x.data = home
        if self.source == "disk":
            give_back(self.homes)


@functools.cache
def copy_stream(device):
    """The stream on which weights come to a GPU, beside the one that computes; None for a CPU."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


def send_away(module, device, source):
    """The weights of a block to where they wait: pinned memory, a file, or for a CPU where they are."""
    if any(x.is_meta for x in tensors(module)):
        return  # a forecast, where nothing moves
    if source == "disk":
        onto_disk(module)
    elif device.type == "cuda":
        for x in tensors(module):
            x.data = x.data.cpu().pin_memory()


# ---- what moves -----------------------------------------------------------------------------------------


def blocks_of(part):
    """The repeated blocks of a component, and the other parts beside them.   -> {path: module} of each"""
    modules = layers(part, nn.Module)
    lists = [path for path, module in modules.items() if isinstance(module, nn.ModuleList)]
    lists = [path for path in lists if not any(path.startswith(other + ".") for other in lists)]
    blocks, others = {}, {}
    for path in lists:
        blocks |= {f"{path}.{name}": block for name, block in modules[path].named_children()}
        home = path.rpartition(".")[0]
        beside = modules[home].named_children() if home in modules else ()
        others |= {f"{home}.{name}".strip("."): module for name, module in beside if tensors(module)}
    return blocks, {path: module for path, module in others.items() if path not in lists}


# ---- files ----------------------------------------------------------------------------------------------


def onto_disk(module):
    """Let what is not yet mapped from a file be so, from one without a name."""
    inside = [x for x in tensors(module) if not in_a_file(x)]
    if not inside:
        return
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "block.safetensors")
        save_file({str(i): x.detach().cpu().contiguous() for i, x in enumerate(inside)}, path)
        with safe_open(path, "pt") as file:
            for i, x in enumerate(inside):
                x.data = file.get_tensor(str(i))
