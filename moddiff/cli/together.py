"""How do several processes make one video?  What torchrun has started joins, and the first one speaks."""

import os
import random
from contextlib import contextmanager


class Alone:
    """One process: nothing to share, nobody to agree with."""

    first = True

    def __init__(self, device):
        self.device = device

    def shared(self, pipe):
        return pipe

    def agreed(self, rewriter):
        return rewriter

    def seed(self, seed):
        return seed


class Together:
    """One of several processes.

    first   is it the one that speaks and writes the file?
    device  where it computes
    """

    def __init__(self, how, device):
        from ..extensions.ranks import Ranks, begin, world

        self.how, self.device = how, begin(device)
        self.ranks = Ranks(world())
        self.first = self.ranks.rank == 0

    def shared(self, pipe):
        """The pipeline, its dit shared among the processes, and its vae, where that has tiles."""
        from ..extensions import layers, parallel
        from ..extensions.tile import Tiled

        parts = {"dit": parallel(pipe.dit, **self.how)}
        if layers(pipe.vae, Tiled):
            parts["vae"] = parallel(pipe.vae)
        return pipe.replace(**parts)

    def agreed(self, rewriter):
        """The rewriter, asked by the first process alone: a language model says something else each time."""
        if rewriter is None:
            return None
        return Agreed(self, rewriter)

    def seed(self, seed):
        """The same for all, where one is to be drawn."""
        return seed if seed >= 0 else int(self.ranks.text(str(random.SystemRandom().randrange(2**31))))


class Agreed:
    """A rewriter whose answer is the first process's."""

    def __init__(self, together, wraps):
        self.together, self.wraps = together, wraps

    def __call__(self, prompt, *picture):
        answer = self.wraps(prompt, *picture) if self.together.first else ""
        return self.together.ranks.text(answer)


@contextmanager
def together(device, **how):
    """The processes of this run, left at its end.

    how  the options of `parallel`;  yields Together, or Alone where no option asks for others
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    asked = {name: value for name, value in how.items() if value not in (1, False)}
    if not asked:
        if world > 1:
            raise ValueError(
                f"{world} processes were started, and no option says what they share: --ulysses {world}, "
                f"--ring {world}, --branches 2, --shard"
            )
        yield Alone(device)
        return
    from ..extensions import ranks

    try:
        yield Together(how, device)
    finally:
        ranks.end()
