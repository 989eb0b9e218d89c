"""From labels to images, of networks that are one line."""

from types import SimpleNamespace

import pytest
import torch

from diffusion import create_flow
from diffusion.drawing import choose_classes, generate
from diffusion.guidance import Guidance
from diffusion.noise import PerImageNoise
from diffusion.samplers import euler


class Bright(torch.nn.Module):
    """Its velocity leads from any noise to an image of threes."""

    in_channels, input_size, num_classes = 3, (2, 2), 0

    def forward(self, x, t, y):
        return (3 - x) / (1 - t.view(-1, 1, 1, 1) / 1000)


@pytest.mark.parametrize(("factor", "brightest"), [(1, 1), (8, 3)])
def test_pixels_have_a_range_and_latents_have_none(factor, brightest):
    seen = []
    space = SimpleNamespace(factor=factor, decode=lambda x: seen.append(x) or x)
    generate(Bright(), space, create_flow(4), euler, torch.zeros(2).long(), PerImageNoise([0, 1], "cpu"), Guidance(1), False)
    torch.testing.assert_close(seen[0], torch.full((2, 3, 2, 2), float(brightest)))


@pytest.mark.parametrize(
    ("classes", "trained", "shown"),
    [
        (1000, 1000, [207, 360, 387, 974, 88, 979, 417, 279]), (1000, 3, [0, 1, 2]), (100, 100, [*range(16)]), (1, 1, [0]),
        (0, 0, [0]),
    ],
)  # fmt: skip
def test_classes_that_are_shown_by_default_were_trained(classes, trained, shown):
    assert choose_classes(SimpleNamespace(num_classes=classes, trained_classes=trained, class_names=None)) == shown
