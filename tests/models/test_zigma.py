"""ZigMa against public numbers, whose mixer is `zigzag`."""

import pytest
import torch

from backbones.zigma import ZigMa
from models import MODELS
from public_numbers import assert_near, assert_public, on_meta, shapes


def test_public_numbers(golden):
    """Public code has times from 0 to 1, and no null class, of which no image here is."""
    numbers = golden("zigma.npz")
    table = "state.y_embedder.embedding_table.weight"
    numbers[table] = torch.cat([numbers[table], torch.ones(1, 24)])
    model = ZigMa(8, 2, 4, 24, 4, 6, learn_sigma=False)
    assert_public(model, numbers, numbers["t"], numbers["y"])
    # The sines of float32 angles differ from one processor to another.
    assert_near(model(numbers["x"].double(), 1000 * numbers["t2"], numbers["y"]), numbers["out2"], 5e-5)


@pytest.mark.parametrize("size", "SBMLH")
def test_sizes(golden, size):
    """With one row more, for the null class."""
    public = golden("systems.json")
    name = f"ZigMa-{size}/2"
    model = on_meta(MODELS[name], learn_sigma=False)
    width = model.pos_embed.shape[2]
    assert sum(p.numel() for p in model.parameters()) == public["zigma"][name]["parameters"] + width
    if name in public["state_shapes"]:
        table = {"y_embedder.embedding_table.weight": [1001, width]}
        assert shapes(model) == public["state_shapes"][name] | table


