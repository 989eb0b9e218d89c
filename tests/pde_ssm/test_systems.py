"""The C++ kernels of the coupled coupling, systems of channels, against matrix exponentials in double precision."""

import copy

import pytest
import torch

import pde_ssm
from operators import random_operator
from pde_ssm import PDESSM, TERMS, exponent
from pde_ssm_kernels import kept, pairs, pytorch
from pde_ssm_kernels.kept import freeze

KERNELS, REASON = pairs.library()
pytestmark = pytest.mark.skipif(KERNELS is None, reason=str(REASON))
f64 = torch.float64
GRIDS = [(1, 1), (1, 2), (2, 1), (2, 2), (3, 4), (5, 7), (1, 8), (9, 1), (6, 10), (13, 11), (16, 16), (12, 34)]


def error(mine, exact):
    return ((mine - exact).abs().max() / exact.abs().max().clamp_min(1e-30)).item()


@pytest.fixture
def kernels_alone(monkeypatch):
    """Running anything else is an error."""
    monkeypatch.setattr(pytorch, "evolve_in_pieces", None)


def values_and_gradients(pde, u, direction, backend, dtype):
    pde_ssm.set_backend(backend)
    pde, u = copy.deepcopy(pde).to(dtype), u.to(dtype).requires_grad_()
    out = pde(u)
    return out, *torch.autograd.grad(out, [u, *pde.parameters()], direction.to(dtype))


def second_gradients(pde, u, direction, backend, dtype):
    pde_ssm.set_backend(backend)
    pde, u = copy.deepcopy(pde).to(dtype), u.to(dtype).requires_grad_()
    inputs = [u, *pde.parameters()]
    gradients = torch.autograd.grad(pde(u), inputs, direction.to(dtype), create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in gradients), inputs)


def assert_as_near_as_the_equations(results, *inputs):
    """In single precision: large exponents and products with squares of wave numbers cost both some digits."""
    exact = results(*inputs, "plain", f64)
    mine, plain = (max(map(error, results(*inputs, backend, torch.float32), exact)) for backend in ("cpp", "plain"))
    assert mine <= max(1e-5, 3 * plain)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(
    ("channels", "groups", "batch", "terms"),
    [(16, 2, 3, TERMS), (6, 2, 9, TERMS), (7, 1, 1, TERMS), (3, 3, 2, TERMS), *((4, 2, 2, (term,)) for term in TERMS)],
)
def test_values_and_all_gradients(grid, channels, groups, batch, terms, kernels_alone):
    pde = random_operator(channels, 0.1, "coupled", groups, terms=terms)
    assert_as_near_as_the_equations(values_and_gradients, pde, *torch.randn(2, batch, channels, *grid))


@pytest.mark.parametrize("grid", [(3, 3), (4, 5)], ids=str)
def test_gradients_have_gradients(grid):
    assert_as_near_as_the_equations(second_gradients, random_operator(8, 0.1, "coupled", 2), *torch.randn(2, 2, 8, *grid))


@pytest.mark.parametrize("scale", [0, 1e-6, 1e-3, 0.02, 0.1, 0.3, 1, 10, 1e3, 1e8])
@pytest.mark.parametrize("grid", [(8, 8), (7, 13), (1, 30)], ids=str)
@pytest.mark.parametrize("c", [1, 3, 8])
@torch.no_grad()
def test_exponentials_of_matrices_of_any_size(c, grid, scale, kernels_alone):
    """Each is squared as often as it needs: rounding grows with its own norm, not with its neighbours'."""
    pde = PDESSM(2 * c, coupling="coupled", groups=2).eval()
    for name, p in pde.equation.named_parameters():
        if name not in ("g0", "log_tau"):
            torch.nn.init.normal_(p, std={"gx": 0, "gy": 0, "bx": min(scale, 1), "by": min(scale, 1)}.get(name, scale))
    pde_ssm.set_backend("cpp")
    symbol = pairs.symbol_of_system(pde.equation, *grid)[..., :c].double()
    G = torch.complex(*symbol.unbind(2)).mT.unflatten(0, (2, -1))          # (groups, f, c, c)
    K, b, r, tau = pde.double().coefficients()
    A = tau.view(-1, 1, 1, 1) * torch.complex(*exponent(K, b, r, *grid)).flatten(-2).permute(0, 3, 1, 2)
    norm = torch.linalg.matrix_norm(A, 1)
    allowed = 2**-24 * (32 + 16 * norm)
    largest = (G - torch.linalg.matrix_exp(A.contiguous())).abs().amax((-2, -1))
    assert (largest <= allowed)[norm < 1e5].all()
    assert (G.abs() < 4).all()                                             # its norm is at most e


def test_what_is_no_number_stays_in_its_group():
    pde_ssm.set_backend("cpp")
    pde, v = PDESSM(9, coupling="coupled", groups=3), torch.randn(2, 4, 5, 9)
    with torch.no_grad():
        pde.equation.bx[1, 0, 2] = float("nan")
    state = pde.equation.evolve(v)
    assert state[..., 3:6].isnan().all()
    assert state[..., :3].isfinite().all()
    assert state[..., 6:].isfinite().all()


def test_groups_wider_than_a_vector_take_pytorch(monkeypatch):
    pde, u = PDESSM(34, coupling="coupled", groups=2), torch.randn(1, 34, 3, 3)
    pde_ssm.set_backend("torch")
    expected = pde(u)
    pde_ssm.set_backend("default")
    monkeypatch.setattr(pairs, "evolve_tokens", None)
    assert torch.equal(pde(u), expected)
    with pytest.raises(ValueError, match=f"the kernels take systems of at most {pairs.lanes()} channels; they got 17"):
        pairs.evolve(torch.zeros(1, 4, 2, 3, 17), *torch.zeros(3, 1, 17, 17), torch.zeros(6, 1, 17, 17), 2, 2, True)


@pytest.mark.parametrize("change", ["none", "parameter", "behind autograd", "train"])
@torch.no_grad()
def test_evaluation_makes_a_symbol_once(change, monkeypatch, kernels_alone):
    pde, u, evolve, made = random_operator(16, coupling="coupled").float().eval(), torch.randn(2, 16, 6, 7), pairs.evolve, []
    monkeypatch.setattr(pairs, "evolve", lambda *inputs: made.append(inputs) or evolve(*inputs))
    for _ in range(2):
        pde(u)
    assert len(made) == 1
    assert kept.bytes_kept() == 2 * 24 * 8 * 2 * pairs.lanes() * 4
    if change == "parameter":
        pde.equation.log_tau.add_(0.5)
    elif change == "behind autograd":
        pde.equation.lx.data.mul_(2)
    elif change == "train":
        pde.train()
    state = pde(u)
    assert len(made) == 1 + (change != "none")
    pde_ssm.set_backend("plain")
    assert error(state, copy.deepcopy(pde).double()(u.double())) < 1e-5


@torch.no_grad()
def test_compiled_programs_of_frozen_weights_hold_symbols(monkeypatch):
    pde, u = PDESSM(8, coupling="coupled").eval(), torch.randn(2, 8, 3, 4)
    expected = pde(u)
    freeze(pde)
    monkeypatch.setattr(pairs, "evolve_tokens", None)
    torch.compiler.reset()
    assert error(torch.compile(pde, backend="eager", fullgraph=True)(u), expected) < 1e-5
    assert pde.equation.constants.keys() == {("symbol", 3, 4)}
