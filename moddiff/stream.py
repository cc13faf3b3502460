"""How does one watch a film that is still being made?  The first frames come while later ones are noise.

The vae decodes frame by frame and remembers the last ones, whatever the dit does. A dit that goes chunk by
chunk (extensions/streaming.py) makes the latents in turn, too: then the first frames are there long before
the last ones are begun.
"""

from dataclasses import replace

import torch

from .contracts import checked, device_of, fact
from .hooks import at
from .video import Video


@torch.no_grad()
def frames_of(pipe, run):
    """The film of a run, piece by piece.   yields Video; `frame_numbers` says where in the film it is"""
    latents = whole(pipe, run) if fact("dit", pipe.dit, "chunk") is None else in_chunks(pipe, run)
    stream, first = fact("vae", pipe.vae, "stream"), 0
    if stream is None:  # another's vae, that needs the whole film
        yield pipe.decode(torch.cat([*latents], 2), run.settings, run.notes)
        return
    device, (_, fh, fw) = device_of(pipe.vae), pipe.stride
    for pixels in stream(latent.to(device) for latent in latents):
        height, width = run.noise.shape[3] * fh, run.noise.shape[4] * fw
        checked("vae", pipe.vae, pixels, "decode", shape=(1, 3, "F", height, width), finite=False)
        piece = Video.from_tensor(pixels.float().cpu(), pipe.defaults["fps"], run.settings, run.notes)
        piece.frame_numbers = range(first, first := first + len(piece))
        yield piece


def whole(pipe, run):
    """All latent frames at once, when the last step is done."""
    for state in pipe.loop(run):
        latent = state.next
    yield latent[:, :, run.conditioning.references :]


def in_chunks(pipe, run):
    """Chunk after chunk of latent frames, each through all steps, and once more when it is clean."""
    lengths, first, turn = fact("dit", pipe.dit, "chunk"), 0, 0
    while first < run.noise.shape[2]:
        length = lengths[min(turn, len(lengths) - 1)]
        part = part_of(run, first, first + length)
        with at(window=range(first, first + part.noise.shape[2])):
            for state in pipe.loop(part):
                latent = state.next
            remember(pipe, part, latent)
        yield latent
        first, turn = first + length, turn + 1


def part_of(run, first, end):
    """The run that makes only these latent frames."""
    cut = slice(first, end)
    inputs = {name: x[:, :, cut] if name == "y" else x for name, x in run.inputs.items()}
    conditioning = run.conditioning if first == 0 else replace(run.conditioning, held=None)
    return replace(run, noise=run.noise[:, :, cut], inputs=inputs, conditioning=conditioning)


def remember(pipe, run, latent):
    """Show the dit the clean frames, at t = 0: what it keeps of them is what later chunks look back at."""
    predict = pipe.predictor(run, latent, torch.zeros((), device=latent.device))
    with at(step=len(run.schedule), sigma=0.0, run=run.mark), run.span("remember"):
        for branch in run.context:
            predict(branch)
