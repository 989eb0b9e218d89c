"""The gated S4D against the sum that its convolution is, and on other grids."""

import pytest
import torch
from torch.nn.functional import gelu

from mixers.s4d import S4D


def test_it_is_the_sum_over_all_lags():
    layer, u = S4D(4, grid_size=(2, 3), state_dim=6).double(), torch.randn(2, 6, 4).double()
    forward, backward = layer.kernel(6)
    kernel = torch.stack([torch.stack([(forward if i >= j else backward)[:, max(i - j, j - i - 1)] for j in range(6)])
                          for i in range(6)])                              # (6, 6, D)  # fmt: skip
    y = torch.einsum("ijd,bjd->bid", kernel, u) + layer.D * u
    expected = layer.out(gelu(layer.state(y)) * gelu(layer.gate(u)))
    torch.testing.assert_close(layer(u), expected)


def test_a_longer_line_takes_as_long():
    layer, u = S4D(4, grid_size=(2, 3), state_dim=6), torch.randn(2, 24, 4)
    layer.grid_size = (4, 6)
    other = S4D(4, grid_size=(4, 6), state_dim=6)
    other.load_state_dict(layer.state_dict())
    other.kernel.inv_dt.data -= torch.tensor(4.0).log()
    torch.testing.assert_close(layer(u), other(u))


def test_parameters():
    assert sum(p.numel() for p in S4D(384, grid_size=(16, 16)).parameters()) == 493_568
    with pytest.raises(ValueError, match=r"^--s4d-state-dim 3: states come in conjugate pairs"):
        S4D(8, grid_size=(2, 2), state_dim=3)
