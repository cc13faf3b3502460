"""What can a package add to moddiff?  A text encoder, a solver, a rewriter and an extension."""

from zlib import crc32

import torch

from moddiff.extensions.promises import Extension, expect, extension


class Spelled:
    """A vector for each word, drawn from its letters: the tiny models have never met these vectors."""

    dim = 192  # what the tiny denoiser reads

    def encode(self, prompts):
        return [torch.stack([self.vector(word) for word in prompt.split() or [""]]) for prompt in prompts]

    def vector(self, word):
        source = torch.Generator().manual_seed(crc32(word.encode()))
        return torch.randn(self.dim, generator=source)


class Adams:
    """Adams-Bashforth of order 2: the last velocity says where the path bends."""

    grid = "euler"

    def step(self, x, velocity, sigma, sigma_next, memory=None):
        h = sigma_next - sigma
        if memory is None:
            return x + h * velocity, (velocity, h)
        before, h_before = memory
        bend = (velocity - before) / h_before
        return x + h * velocity + h * h / 2 * bend, (velocity, h)


def on_black(prompt):
    """A background for a prompt that names none."""
    return prompt if "background" in prompt else f"{prompt} on a black background"


@extension
def damped(dit, strength=0.9):
    """A denoiser whose velocity is `strength` of what it was."""
    expect("dit", dit, "damped")
    return Damped(dit, strength)


class Damped(Extension):
    def __init__(self, dit, strength):
        super().__init__(dit, exact=False)
        self.strength = strength

    def forward(self, *inputs, **options):
        return self.strength * self.wraps(*inputs, **options)
