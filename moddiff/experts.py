"""Who denoises when?  Wan 2.2 A14B has two DiTs, one for high noise and one for low; the timestep decides.

Only one works at a time, so the other's weights may lie elsewhere. Guide: guides/dit.md
"""

from torch import nn

from .attention import use_kernel
from .flow import high_noise
from .hooks import at


class Experts(nn.Module):
    """Two DiTs, called as one.

    high, low  the DiT for high and for low noise
    boundary   in [0, 1]: the high-noise expert works from timestep 1000 * boundary on; Wan: 0.875 or 0.9
    """

    def __init__(self, high, low, boundary):
        super().__init__()
        self.high, self.low, self.boundary = high, low, boundary
        self.config = high.config
        # What a pipeline asks of any dit (roles.Denoiser).
        self.task, self.patch, self.channels = high.task, high.patch, high.channels
        self.text_dim, self.image_dim = high.text_dim, high.image_dim

    def forward(self, x, t, text, image=None, **rest):
        expert = self.expert(t)
        with at(expert="high" if expert is self.high else "low"):
            if isinstance(text, Prompt):
                return expert(x, t, text.read_by(expert), **rest)
            return expert(x, t, text, image, **rest)

    def expert(self, t):
        """The DiT for timestep t, [b] or [b, n] on the scale 0..1000.

        Where tokens have times of their own, the latest.
        """
        return self.high if high_noise(t.max(), self.boundary) else self.low

    def prepare(self, text, image=None):
        """For `text` in forward.

        An expert's keys and values are made when its turn comes, in the place of the other's.
        """
        return Prompt(text, image)

    def use_kernel(self, kernel):
        """As DiT.use_kernel, for both experts."""
        return use_kernel(self, kernel)

    def example(self, **how):
        """As DiT.example."""
        return self.high.example(**how)


class Prompt:
    """Prompt and image for two experts, of which one works at a time.

    Only that one's keys and values are kept.
    """

    def __init__(self, text, image):
        self.text, self.image = text, image
        self.reader = self.context = None

    def read_by(self, expert):
        """The prompt as this expert prepared it.   -> Context"""
        if self.reader is not expert:
            self.reader, self.context = expert, expert.prepare(self.text, self.image)
        return self.context
