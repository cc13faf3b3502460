"""What do the stages learn from?  Numbered scenes, captions drawn for them, their latents on disk."""

import multiprocessing
import os
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from ..saving import write_whole
from ..video import to_tensor
from . import world
from .muon import fast

CLIPS = 8000
LANGUAGE_SHARES = dict(en=0.55, es=0.15, de=0.15, zh=0.15)


def training_scene(i):
    """Scene i of the training set, with the seed of its clip; four in ten hold one thing."""
    rng = np.random.default_rng([2024, i])
    return world.sample_scene(rng, things=1 if i % 5 < 2 else 2), int(rng.integers(2**31))


def draw_language(rng):
    return str(rng.choice(list(LANGUAGE_SHARES), p=list(LANGUAGE_SHARES.values())))


def draw_captions(picks, rng, empty=0.1):
    """One caption for each training clip, now and then an empty one, which teaches the unguided branch."""
    return [
        world.caption(training_scene(i)[0], draw_language(rng), rng) if rng.random() > empty else ""
        for i in picks
    ]


class Drawn(Dataset):
    """What a function draws for a number, in the form in which other processes can draw it."""

    def __init__(self, draw):
        self.draw = draw

    def __getitem__(self, number):
        return self.draw(number)


def drawn_for(draw, numbers, device, processes=None):
    """What `draw(number)`, a {name: value}, gives for each of `numbers`, in turn, tensors on the device.

    processes  how many draw ahead. None: while a GPU computes, as many as there are cores; a CPU has no core
               to spare for it
    """
    if processes is None:
        ahead = device.type == "cuda" and "fork" in multiprocessing.get_all_start_methods()
        processes = os.cpu_count() if ahead else 0
    loader = DataLoader(
        Drawn(draw),
        batch_size=None,
        sampler=numbers,
        num_workers=processes,
        multiprocessing_context="fork" if processes else None,
    )
    for drawn in loader:
        yield {
            name: value.to(device) if isinstance(value, torch.Tensor) else value
            for name, value in drawn.items()
        }


def generator_on(device, seed):
    return torch.Generator(device).manual_seed(seed)


def device_of(model):
    return next(model.parameters()).device


@torch.no_grad()
def cache_latents(vae, folder, count=None, what="clip", batch=4):
    """Encode the first `count` training clips to `<folder>/latents.npy`, going on where a call stopped.

    what   "clip": the whole clip; "first": its first frame and then mid gray, which conditions image-to-video
    count  None: as many as this folder was made for, or CLIPS. A cache that was made for more keeps them; for
           one that was made for fewer it is a ValueError
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shape = (count or CLIPS, vae.config.z_dim, (world.FRAMES - 1) // 4 + 1, world.SIZE // 8, world.SIZE // 8)
    path, counter = folder / "latents.npy", folder / "latents.done"
    if not path.exists():
        np.lib.format.open_memmap(path, "w+", np.float16, shape).flush()
    latents = np.lib.format.open_memmap(path, "r+")
    if count is not None and len(latents) < count:
        raise ValueError(
            f"{path} was made for {len(latents)} clips, and {count} are asked for; delete its folder to have "
            "it made anew, or ask for no more than it holds"
        )

    def draw(start):
        clips = to_tensor([world.clip(*training_scene(i)) for i in range(start, stop_of(start))])
        if what == "first":
            clips[:, :, 1:] = 0
        return dict(clips=clips)  # [batch, 3, F, H, W]

    def stop_of(start):
        return min(start + batch, len(latents))

    encoded, device = int(counter.read_text()) if counter.exists() else 0, device_of(vae)
    starts = range(encoded, len(latents), batch)
    shown = tqdm(starts, desc=f"latents ({what})", mininterval=10, disable=None)
    for start, drawn in zip(shown, drawn_for(draw, starts, device)):
        with fast(device):
            latents[start : stop_of(start)] = vae.encode(drawn["clips"], chunked=False).half().cpu().numpy()
        write_whole(counter, str(stop_of(start)).encode())  # a training run may be reading it


class Latents:
    """The cached latents of training clips; more may be added while a run reads them.

    latents[picks] -> float16 [b, z, f, h, w]
    """

    def __init__(self, folder):
        self.folder, self.array = Path(folder), np.load(Path(folder) / "latents.npy", mmap_mode="r")

    def __len__(self):
        return int((self.folder / "latents.done").read_text())

    def __getitem__(self, picks):
        return torch.from_numpy(self.array[picks])
