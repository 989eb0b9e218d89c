"""LaMamba-Diff's two mixers as one."""

import pytest
import torch

from mixers import build_mixer
from mixers.lamamba import LaMambaMixer
from models import DiT


def test_the_windows_see_what_the_scan_has_added():
    mixer, u = LaMambaMixer(16, 4, grid_size=(4, 6), layer=1, window_size=4), torch.randn(2, 24, 16)
    scan = build_mixer("ss2d-lamamba", 16, 4, (4, 6), 1)
    scan.load_state_dict(mixer.op.state_dict())
    stream = u + scan(u)
    torch.testing.assert_close(mixer(u), stream + mixer.attn(mixer.norm_swin(stream)) - u)
    assert mixer.attn.shifted


def test_a_model_on_another_grid_tells_both():
    model = DiT(8, hidden_size=32, depth=2, num_heads=4, num_classes=10, mixer="lamamba", window_size=4).resize((6, 10))
    for block in model.blocks:
        assert block.attn.grid_size == block.attn.op.grid_size == block.attn.attn.grid_size == (3, 5)
    assert model(torch.randn(1, 4, 6, 10), torch.ones(1), torch.tensor([3])).shape == (1, 8, 6, 10)


def test_tokens_of_another_grid_are_named():
    with pytest.raises(ValueError, match="a grid of 3 x 5 = 15 tokens"):
        LaMambaMixer(8, 2, grid_size=(3, 5))(torch.randn(1, 12, 8))
