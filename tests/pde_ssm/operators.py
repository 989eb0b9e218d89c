"""Operators with random coefficients, and ways to run them."""

import copy

import torch

import pde_ssm
from pde_ssm import PDESSM

f64 = torch.float64


def random_coefficients(*shape):
    """K, b, r, tau with some diffusion in every direction, over `shape`."""
    L = 0.05 * torch.randn(*shape, 2, 2, dtype=f64)
    return L @ L.mT, 0.2 * torch.randn(*shape, 2, dtype=f64), torch.randn(shape, dtype=f64), 0.5 + torch.rand(shape, dtype=f64)


def random_operator(dim, spread=0.05, coupling="diagonal", groups=None, **options):
    """A PDESSM in float64 whose every coefficient is random, with groups where the coupling has any."""
    groups = groups if coupling != "diagonal" else None
    pde = PDESSM(dim, grid_size=(8, 8), coupling=coupling, groups=groups, **options).double()
    with torch.no_grad():
        for parameter in pde.parameters():
            parameter.add_(spread * torch.randn_like(parameter))
    return pde


def without_input_map(pde):
    """The PDE's flow alone: R and B are the identity."""
    with torch.no_grad():
        pde.R.weight.copy_(torch.eye(pde.dim))
        g0 = pde.equation.g0
        g0.copy_(torch.ones(pde.dim) if pde.coupling == "diagonal" else torch.eye(g0.shape[-1]))
        pde.equation.gx.zero_(), pde.equation.gy.zero_()
    return pde


class Solver:
    """A way to run the operator: a backend, in one precision, with what rounding may cost there, of the largest value."""

    def __init__(self, backend, dtype, device="cpu"):
        self.backend, self.dtype, self.device, self.rounding = backend, dtype, device, 1e-8 if dtype == f64 else 2e-5

    def __call__(self, pde, u):
        pde_ssm.set_backend(self.backend)
        return copy.deepcopy(pde).to(self.device, self.dtype)(u.to(self.device, self.dtype)).to("cpu", f64)

    def __repr__(self):
        return f"{self.backend}-{str(self.dtype)[-2:]}-{self.device}"

    def assert_close(self, state, expected):
        torch.testing.assert_close(state, expected, rtol=self.rounding, atol=self.rounding * expected.abs().max().item())
