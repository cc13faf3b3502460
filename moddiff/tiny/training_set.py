"""What do the stages learn from?  Numbered scenes, captions drawn for them, their latents on disk."""

from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from ..saving import write_whole
from ..video import to_tensor
from . import world
from .muon import fast

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


@torch.no_grad()
def cache_latents(vae, folder, count, what="clip", batch=4):
    """Encode the first `count` training clips to `<folder>/latents.npy`, going on where a call stopped.

    what  "clip": the whole clip; "first": its first frame and then mid gray, which conditions image-to-video
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shape = (count, vae.config.z_dim, (world.FRAMES - 1) // 4 + 1, world.SIZE // 8, world.SIZE // 8)
    path, counter = folder / "latents.npy", folder / "latents.done"
    if not path.exists():
        np.lib.format.open_memmap(path, "w+", np.float16, shape).flush()
    latents = np.lib.format.open_memmap(path, "r+")
    encoded = int(counter.read_text()) if counter.exists() else 0
    for start in tqdm(
        range(encoded, len(latents), batch), desc=f"latents ({what})", mininterval=10, disable=None
    ):
        numbers = range(start, min(start + batch, len(latents)))
        clips = to_tensor([world.clip(*training_scene(i)) for i in numbers])  # [batch, 3, F, H, W]
        if what == "first":
            clips[:, :, 1:] = 0
        with fast():
            latents[start : numbers.stop] = vae.encode(clips, chunked=False).half().numpy()
        write_whole(counter, str(numbers.stop).encode())  # a training run may be reading it


class Latents:
    """The cached latents of training clips; more may be added while a run reads them."""

    def __init__(self, folder):
        self.folder, self.array = Path(folder), np.load(Path(folder) / "latents.npy", mmap_mode="r")

    def __len__(self):
        return int((self.folder / "latents.done").read_text())

    def __getitem__(self, picks):
        return torch.from_numpy(self.array[picks].astype(np.float32))  # [b, z, f, h, w]
