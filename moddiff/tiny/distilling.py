"""How does a model learn to leave out steps?  An adapter that takes in four what its teacher takes in twenty.

The teacher, the tiny DiT with guidance, walks from noise to a clip: 20 steps of two passes each. Where it is
after 0, 5, 10, 15 and 20 of them are the knots of its path. The student, the same DiT with a fresh LoRA, is
asked once at each knot and has to answer with the straight line to the next one: the mean velocity between
them. Guidance is in that answer, so it needs no second pass.

A student that has only ever seen the teacher's path does not know what to do beside it, where its own steps
bring it. So in part of the steps it walks up to a knot by itself, and the teacher goes on from there.

Sources: Salimans & Ho 2022 (progressive distillation), Meng et al. 2023 (guidance distilled along), Ross et
al. 2011 (DAgger: let the student go, and ask the teacher there).
"""

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from ..flow import schedule
from ..guidance import cfg
from ..roles import apply
from ..saving import write_whole
from ..solvers import UniPC
from . import world
from .dit_stages import errors
from .muon import Recipe, fast
from .training_set import Latents, device_of, draw_language, generator_on

TEACHER = dict(solver="unipc", steps=20, shift=5.0, scale=4.0)
STEPS = 4
EACH = TEACHER["steps"] // STEPS  # steps of the teacher for one of the student
GRID = schedule(TEACHER["steps"], TEACHER["shift"], TEACHER["solver"])
KNOTS, TIMES = GRID.sigmas[::EACH], GRID.timesteps[::EACH]  # [5] noise levels, the last 0; [4] times
# What the file of the adapter says: the levels are those of `schedule(4, 5.0)`.
SAMPLING = dict(steps=[round(level, 4) for level in KNOTS[:-1].tolist()], solver="euler", scale=1.0)
RANK, PATHS, TOGETHER = 16, 1024, 16
OWN_WAY = 0.6  # in this part of the steps the student walks up to the knot by itself: see CARD.md


def path_caption(i):
    """What path i is asked for; every other one has two things, none a triple that is held out."""
    rng = np.random.default_rng([31, i])
    scene = world.sample_scene(rng, things=1 if i % 2 else 2)
    return world.caption(scene, draw_language(rng), rng)


class Teacher:
    """The DiT as it is run by default: guided, in small steps.

    prompts  what it is asked for, one each for a batch of latents
    """

    def __init__(self, dit, text, prompts):
        self.dit = dit
        with torch.no_grad(), fast(device_of(dit)):
            self.asked = dit.prepare(text.encode(prompts))
            self.unasked = dit.prepare(text.encode([""] * len(prompts)))

    @torch.no_grad()
    def walk(self, x, first=0, steps=TEACHER["steps"]):
        """x at each of so many steps from step `first` of its grid on, and behind them.   -> [x, ...]"""
        way, memory, solver = [x], None, UniPC()
        for i in range(first, first + steps):
            velocity = self.velocity(x, GRID.timesteps[i])
            x, memory = solver.step(x, velocity, GRID.sigmas[i], GRID.sigmas[i + 1], memory)
            way.append(x)
        return way

    def velocity(self, x, t):
        times = t.to(x).expand(len(x))
        with fast(x.device):
            cond, uncond = (self.dit(x, times, words).float() for words in (self.asked, self.unasked))
        return cfg(cond, uncond, TEACHER["scale"])


def cache_paths(text, dit, folder, count=None):
    """Let the teacher walk `count` paths and keep their knots in `<folder>/latents.npy`, float16 [count, 5,
    c, f, h, w], going on where a call stopped."""
    folder.mkdir(parents=True, exist_ok=True)
    f, h, w = (world.FRAMES - 1) // 4 + 1, world.SIZE // 8, world.SIZE // 8
    path, counter = folder / "latents.npy", folder / "latents.done"
    if not path.exists():
        shape = count or PATHS, len(KNOTS), dit.channels, f, h, w
        np.lib.format.open_memmap(path, "w+", np.float16, shape).flush()
    kept = np.lib.format.open_memmap(path, "r+")
    done, device = int(counter.read_text()) if counter.exists() else 0, device_of(dit)
    for start in tqdm(range(done, len(kept), TOGETHER), desc="paths", mininterval=10, disable=None):
        stop = min(start + TOGETHER, len(kept))
        teacher = Teacher(dit, text, [path_caption(i) for i in range(start, stop)])
        noise = path_noise(start // TOGETHER, kept.shape[2:])[: stop - start].to(device)
        knots = torch.stack(teacher.walk(noise)[::EACH], 1)  # [b, 5, c, f, h, w]
        kept[start:stop] = knots.half().cpu().numpy()
        write_whole(counter, str(stop).encode())


def path_noise(batch, shape):
    """Where the paths of a batch begin."""
    return torch.randn(TOGETHER, *shape, generator=generator_on("cpu", 10_000_000 + batch))


class FastStage:
    """Learn the mean velocity from each knot to the next.

    text, dit  of the teacher, frozen;  paths: folder of `cache_paths`
    """

    name = "fast"
    recipe = Recipe(muon=0.0, adam=2e-3, ema=0.995, embeddings=("changes",))

    def __init__(self, text, dit, paths, seed=0, batch=16):
        self.text, self.teacher, self.paths, self.batch = text, dit, Latents(paths), batch
        self.model = nn.ModuleDict(dict(dit=apply(dit, [["adapted", dict(rank=RANK, seed=seed)]])))

    def draw(self, step, rng):
        picks = rng.integers(len(self.paths), size=self.batch)
        prompts = [path_caption(i) for i in picks]
        if rng.random() < OWN_WAY:  # not to the first knot: that is noise on either way
            return dict(prompts=prompts, knot=int(rng.integers(1, STEPS)), seed=int(rng.integers(2**31)))
        knots = np.arange(self.batch) % STEPS  # each knot equally often
        ways = self.paths[picks]  # [b, 5, c, f, h, w]
        here, there = (ways[range(self.batch), knots + more].float() for more in (0, 1))
        return dict(prompts=prompts, knot=torch.from_numpy(knots), here=here, there=there)

    def loss(self, prompts, knot, here=None, there=None, seed=None):
        with torch.no_grad():
            features = self.text.encode(prompts)
        if here is None:
            here, there = self.own_way(prompts, features, knot, seed)
            knot = torch.full((len(prompts),), knot)
        sigma, left = (KNOTS[knot + more].to(here) for more in (0, 1))
        target = (here - there) / (sigma - left).view(-1, 1, 1, 1, 1)
        return errors(self.velocity(here, knot, features), target, sigma)

    def velocity(self, x, knot, words):
        """The student's, at a knot for each of the batch."""
        with fast(x.device):
            return self.model["dit"](x, TIMES[knot].to(x), words).float()

    @torch.no_grad()
    def own_way(self, prompts, features, knot, seed):
        """Up to a knot by the student, from there to the next by the teacher.   -> x there, x at the next"""
        device = device_of(self.teacher)
        x = torch.randn(
            len(prompts), *self.paths.array.shape[2:], generator=generator_on(device, seed), device=device
        )
        for i in range(knot):
            velocity = self.velocity(x, torch.full((len(x),), i), features)
            x = x + (KNOTS[i + 1] - KNOTS[i]) * velocity
        return x, Teacher(self.teacher, self.text, prompts).walk(x, knot * EACH, EACH)[-1]
