"""How do processes pass tensors to each other?  The groups of a mesh, what travels in them, and how much.

Gloo carries it between CPUs, NCCL between GPUs of NVIDIA. A process is called a rank, after its number.
"""

import os
from datetime import timedelta
from math import prod
from weakref import WeakSet

import torch
import torch.distributed as dist


class LostRank(ConnectionError):
    """Another process of the run has ended, or did not answer within the timeout."""


def begin(device="cpu", timeout=300):
    """Join the processes that torchrun has started.   -> the device that is this one's

    device   "cpu", or "cuda": then each process takes the GPU of its number on this machine
    timeout  seconds that one waits for the others

    Raises RuntimeError when this process was not started by torchrun.
    """
    if "RANK" not in os.environ:
        raise RuntimeError(
            "this process has no rank; start all of them with torchrun: "
            "torchrun --nproc-per-node 2 -m moddiff generate ... --ulysses 2"
        )
    # Before there is a group: these modules keep the one that they find, and then the process cannot end.
    import torch.distributed.fsdp
    import torch.distributed.nn

    device = torch.device(device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    return device


def world():
    """The group of all processes."""
    return dist.group.WORLD


def end():
    """Leave the others."""
    if dist.is_initialized():
        dist.destroy_process_group()
        # Whoever still holds a group keeps its threads, and Python must not end before they do.
        for ranks in _all:
            ranks.group = None


def shares(count, ranks):
    """How many of `count` each rank gets, as evenly as can be: 7 over 3 -> [3, 2, 2]"""
    return [count // ranks + (rank < count % ranks) for rank in range(ranks)]


_all = WeakSet()  # of this process


class Ranks:
    """Processes that share one thing, in order; without a group, this process alone.

    size, rank  how many there are, and which is this one
    sent        bytes that this one has sent to others
    """

    def __init__(self, group=None):
        self.group, self.sent = group, 0
        _all.add(self)
        self.size, self.rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))

    def __deepcopy__(self, memo):
        return self  # a process is what it is

    def swap(self, parts, shapes):
        """Give part i to rank i, and take one of shape i from it.   [tensor], [shape] -> [tensor]"""
        if self.size == 1:
            return parts
        given = torch.cat([part.reshape(-1) for part in parts])
        taken = given.new_empty(sum(map(prod, shapes)))
        sizes = [prod(shape) for shape in shapes]
        self.call(dist.all_to_all_single, taken, given, sizes, [part.numel() for part in parts])
        self.sent += given.nbytes - parts[self.rank].nbytes
        return [part.view(shape) for part, shape in zip(taken.split(sizes), shapes)]

    def gather(self, x, axis, lengths):
        """All ranks' x, one after the other along an axis, where rank i has lengths[i]."""
        if self.size == 1:
            return x
        shapes = [(*x.shape[:axis], length, *x.shape[axis + 1 :]) for length in lengths]
        return torch.cat(self.swap([x] * self.size, shapes), axis)

    def pass_on(self, x, shape):
        """Begin to give x to the next rank, and to take what the one before gives: see `arrived`."""
        taken = x.new_empty(shape)
        to, source = (dist.get_global_rank(self.group, (self.rank + i) % self.size) for i in (1, -1))
        self.sent += x.nbytes
        both = [dist.P2POp(dist.isend, x, to, self.group), dist.P2POp(dist.irecv, taken, source, self.group)]
        return self.call(dist.batch_isend_irecv, both, group=False), taken, x

    def arrived(self, passing):
        waiting, taken, _ = passing
        for work in waiting:
            self.call(work.wait, group=False)
        return taken

    def from_rank(self, rank, x, like):
        """What rank `rank` has as x; the others say None, and any tensor of the same dtype and device."""
        if self.size == 1:
            return x
        source, mine = dist.get_global_rank(self.group, rank), rank == self.rank
        shape = torch.zeros(5, dtype=torch.int64, device=like.device)  # none has more axes
        if mine:
            shape[-x.ndim :] = torch.tensor(x.shape)
        self.call(dist.broadcast, shape, source)
        sizes = [size for size in shape.tolist() if size]
        x = x.contiguous() if mine else like.new_empty(sizes)
        self.call(dist.broadcast, x, source)
        self.sent += x.nbytes * (self.size - 1) if mine else 0
        return x

    def text(self, words):
        """What the first rank says, for all.   str -> str"""
        if self.size == 1:
            return words
        # One byte goes before the words: an empty tensor has no shape that `from_rank` could tell the others.
        letters = torch.frombuffer(bytearray(b" " + words.encode()), dtype=torch.uint8)
        device = "cuda" if dist.get_backend(self.group) == "nccl" else "cpu"
        like = torch.zeros(0, dtype=torch.uint8, device=device)
        said = self.from_rank(0, letters.to(like) if self.rank == 0 else None, like)
        return bytes(said.tolist()[1:]).decode()

    def call(self, function, *given, group=True):
        """A call of torch.distributed, whose failure is a sentence."""
        try:
            return function(*given, **({"group": self.group} if group else {}))
        except RuntimeError as error:
            rank, world, said = dist.get_rank(), dist.get_world_size(), str(error).splitlines()[0]
            raise LostRank(
                f"rank {rank} of {world} lost another, which has ended or does not answer ({said[:200]}); "
                "what that one printed says why. Nothing was written: start all again"
            ) from error
