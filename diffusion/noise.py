"""Random numbers that belong to images, not to batches or processes."""

import numpy as np
import torch


class PerImageNoise:
    """Draws noise from one generator per image, so that an image does not depend on what it is batched with.

    seeds: one integer per image. drawn_on: where noise is drawn, by default on `device`; a GPU draws other numbers for a seed
    than a CPU. Called with a tensor (B, ...), it returns standard normal noise like it.
    """

    def __init__(self, seeds, device, drawn_on=None):
        self.device, self.drawn_on = device, drawn_on or device
        self.generators = [torch.Generator(self.drawn_on).manual_seed(seed) for seed in seeds]

    def randn(self, *shape):
        """Draws (B, *shape) standard normal numbers."""
        return torch.stack([torch.randn(shape, generator=g, device=self.drawn_on) for g in self.generators]).to(self.device)

    def rand(self, *shape):
        """Draws (B, *shape) uniform numbers in [0, 1)."""
        return torch.stack([torch.rand(shape, generator=g, device=self.drawn_on) for g in self.generators]).to(self.device)

    def __call__(self, x):
        return self.randn(*x.shape[1:]).to(x.dtype)


def image_seeds(seed, numbers, purpose):
    """Returns one seed per image, from a run's seed and the images' numbers in it; distinct for distinct numbers below 2^32.

    Seeds count up from a start that depends on `seed` and on `purpose` ("training", "sampling" and others), in 32 bits
    because PyTorch's generator on CPUs uses no more.
    """
    start = int(np.random.SeedSequence([seed, *purpose.encode()]).generate_state(1)[0])
    return [(start + number) % 2**32 for number in numbers]
