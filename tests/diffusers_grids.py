"""The noise levels of Diffusers 0.42, which are not the official ones: for the tests that compare with it."""

import numpy as np
import torch

from moddiff.flow import shift_sigmas


def unipc(steps, shift):
    sigmas = shift_sigmas(np.linspace(1, 1 / 1000, steps + 1)[:-1], shift)
    sigmas[0] -= 1e-6  # as the official 0.999: a first sigma below 1, but taken after the shift
    return sigmas


def dpmpp(steps, shift):
    up = 1 - np.linspace(1, 1 / 1000, steps + 1)
    return np.flip(shift_sigmas(up, shift))[:-1]


def euler(steps, shift):
    # The ends of this grid have been shifted once already, in float32, before the whole is shifted (again).
    highest, lowest = shift_sigmas(torch.tensor([1000.0, 1.0]) / 1000, shift).tolist()
    return shift_sigmas(np.linspace(highest * 1000, lowest * 1000, steps) / 1000, shift)


# As flow.GRIDS; a solver with such a name as its grid walks it, once it is in there.
GRIDS = {"diffusers-unipc": unipc, "diffusers-dpm++": dpmpp, "diffusers-euler": euler}
