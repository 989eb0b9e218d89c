"""The stencil beside the PDE: `local`."""

from itertools import product

import pytest
import torch

from operators import random_operator
from pde_ssm import COUPLINGS, PDESSM, PRESETS, PDESSMBlock


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("grid", [(3, 5), (1, 4), (1, 1)], ids=str)
@pytest.mark.parametrize("activation", [False, True])
@torch.no_grad()
def test_the_stencil_is_added_to_the_state(coupling, grid, activation):
    """Each token takes nine of its own channel, as far as they are on the grid, as the PDE gets them."""
    pde = random_operator(4, coupling=coupling, local=True, activation=activation)
    plain = PDESSM(4, coupling=coupling, activation=activation).double()
    plain.load_state_dict({name: p for name, p in pde.state_dict().items() if not name.startswith("local")})
    u = torch.randn(2, 4, *grid, dtype=torch.float64)
    v, wanted = pde.R(u.movedim(1, -1)), plain(u).movedim(1, -1) + pde.local.bias
    v = torch.nn.functional.silu(v) if activation else v
    for y, x in product(range(grid[0]), range(grid[1])):
        for i, j in product(range(max(y - 1, 0), min(y + 2, grid[0])), range(max(x - 1, 0), min(x + 2, grid[1]))):
            wanted[:, y, x] += pde.local.weight[:, 0, i - y + 1, j - x + 1] * v[:, i, j]
    torch.testing.assert_close(pde.eval()(u).movedim(1, -1), wanted)


@pytest.mark.parametrize("dim", [72, 96, 384])
def test_the_preset_has_fewer_parameters_than_attention(dim):
    block = PDESSMBlock(dim, **PRESETS["pdessm-gl"])
    assert sum(p.numel() for p in block.parameters()) < 4 * dim**2 + 4 * dim


@torch.no_grad()
def test_the_stencil_does_not_go_round_the_torus():
    pde = PDESSM(3, local=True)
    plain = PDESSM(3)
    plain.load_state_dict({name: p for name, p in pde.state_dict().items() if not name.startswith("local")})
    u = torch.zeros(1, 3, 6, 6)
    u[..., 0, 0] = 1
    reached = (pde(u) - plain(u) - pde.local.bias[:, None, None]).abs().amax((0, 1)) > 1e-6
    assert reached.nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
