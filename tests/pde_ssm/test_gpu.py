"""The kernels against the plain path: on a GPU if there is one, else under Triton's interpreter."""

import pytest
import torch

import pde_ssm
from pde_ssm import PDESSM

pytest.importorskip("triton")
from pde_ssm_kernels import gpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# In units of the largest value. All but tokens and results is float32; bfloat16 has 8 bits, and the interpreter cuts off
# where GPUs and PyTorch round.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7}
types = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


@pytest.fixture(autouse=True)
def on_device():
    with torch.device(DEVICE):
        yield


@pytest.fixture
def triton_backend():
    pde_ssm.set_backend("triton")


def assert_close(mine, expected, dtype):
    assert mine.dtype == expected.dtype
    assert mine.shape == expected.shape
    assert (mine - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max()


def random_problem(grid, dtype, B=3, C=5):
    h, w = grid
    v = torch.randn(B, h, w, C).to(dtype).requires_grad_()
    symbol = torch.randn(2, h, w // 2 + 1, C).requires_grad_()
    return v, symbol


def assert_like_the_plain_path(v, symbol):
    gradient, dtype = torch.randn_like(v), v.dtype
    expected = pde_ssm.irfft2(torch.complex(*symbol).movedim(-1, 0) * pde_ssm.rfft2(v), v)
    mine = gpu.evolve(v, symbol)
    assert_close(mine, expected, dtype)
    for theirs, ours in zip(*(torch.autograd.grad(out, (v, symbol), gradient) for out in (expected, mine))):
        assert_close(ours, theirs, dtype)


@types
@pytest.mark.parametrize("grid", [(1, 1), (4, 4), (1, 6), (7, 1), (5, 8), (9, 7), (16, 16), (18, 20), (3, 32)], ids=str)
def test_values_and_gradients_are_those_of_the_plain_path(grid, dtype):
    assert_like_the_plain_path(*random_problem(grid, dtype))


@pytest.mark.parametrize("grid", [(2, 3), (1, 33)], ids=str)
def test_deterministic_algorithms_are_all_there_is(grid, triton_backend):
    pde, u = PDESSM(2), torch.randn(1, 2, *grid, requires_grad=True)
    torch.use_deterministic_algorithms(True)
    try:
        pde(u).square().sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert pde.equation.b.grad.isfinite().all()


@types
@pytest.mark.parametrize("grid", [(33, 2), (3, 65)], ids=str)
def test_grids_that_take_three_passes(grid, dtype):
    assert_like_the_plain_path(*random_problem(grid, dtype, B=2))


def by_channel(v):
    """The same values, which lie in memory channel after channel."""
    return v.detach().movedim(-1, 1).contiguous().movedim(1, -1).requires_grad_()


@pytest.mark.parametrize("grid", [(2, 34), (18, 3)], ids=str)
def test_three_passes_in_several_steps_each(grid, monkeypatch):
    monkeypatch.setattr(gpu, "LONGEST_AT_ONCE", 0)
    monkeypatch.setattr(gpu, "BLOCK", 16)
    v, symbol = random_problem(grid, torch.float32, B=2, C=17)
    assert_like_the_plain_path(by_channel(v), symbol)


def test_channels_in_several_programs_the_last_not_full(monkeypatch):
    monkeypatch.setattr(gpu, "FORWARD_BYTES", 16 * 16 * 4 * 2)
    monkeypatch.setattr(gpu, "BACKWARD_BYTES", 16 * 16 * 4 * 4)
    v, symbol = random_problem((5, 6), torch.float32, B=5, C=7)
    assert gpu.constants(v, gpu.FORWARD_BYTES)["CB"] == 2
    assert_like_the_plain_path(v, symbol)


@types
@pytest.mark.parametrize("grid", [(5, 8), (2, 33)], ids=str)
@pytest.mark.parametrize("options", [{}, {"components": 2, "gate": True, "activation": True}], ids=["plain", "gated"])
def test_a_layer_has_the_same_values_and_gradients_of_all_parameters(options, grid, dtype, triton_backend):
    pde = PDESSM(6, grid_size=grid, **options).to(dtype)
    with torch.no_grad():
        for p in pde.parameters():
            p.add_(torch.randn_like(p) / 10)
    u, gradient = torch.randn(2, 6, *grid).to(dtype).requires_grad_(), torch.randn(2, 6, *grid).to(dtype)
    results = []
    for backend in ("torch", "triton"):
        pde_ssm.set_backend(backend)
        out = pde(u)
        results.append((out, *torch.autograd.grad(out, [u, *pde.parameters()], gradient)))
    for theirs, mine in zip(*results):
        # In bfloat16 the state is rounded before the gate and the last layer, either way.
        assert (mine - theirs).abs().max() <= 3 * TOLERANCE[dtype] * theirs.abs().max()


def test_as_custom_operators_they_keep_the_rules_of_torch_compile():
    v, symbol = random_problem((3, 4), torch.float32, B=2, C=2)
    torch.library.opcheck(gpu.evolve_op, (v, symbol), test_utils=("test_schema", "test_autograd_registration"))
    torch.library.opcheck(gpu.evolve_op, (v, symbol), test_utils="test_faketensor")
    v, symbol = random_problem((1, 33), torch.float32, B=2, C=2)
    v = by_channel(v)
    torch.library.opcheck(gpu.evolve_op, (v, symbol), test_utils="test_faketensor")
    gradient = torch.randn(2, 1, 33, 2)
    torch.library.opcheck(gpu.evolve_backward, (gradient, v, symbol), test_utils="test_faketensor")


def test_a_compiled_layer_has_no_graph_break(triton_backend):
    pde = PDESSM(4, grid_size=(3, 4))
    u = torch.randn(2, 4, 3, 4)
    torch.testing.assert_close(torch.compile(pde, fullgraph=True, backend="aot_eager")(u), pde(u))


def test_auto_takes_the_plain_path_where_no_kernels_can(triton_backend):
    for u in (torch.randn(1, 2, 131, 2), torch.randn(1, 2, 3, 3, dtype=torch.float64)):
        pde = PDESSM(2).to(u.dtype)
        pde_ssm.set_backend("torch")
        expected = pde(u)
        pde_ssm.set_backend("auto")
        assert torch.equal(pde(u), expected)
        pde_ssm.set_backend("triton")
        with pytest.raises(ValueError, match=r"not for torch\.float.* of shape"):
            pde(u)
    with pytest.raises(ValueError, match="known: default, torch, cpp, triton, auto"):
        pde_ssm.set_backend("cuda")


def test_other_layers_do_not_come_by_the_kernels(triton_backend):
    c = torch.randn(2, 4)
    assert PDESSM(4, conditioned=True)(torch.randn(2, 4, 3, 3), c).shape == (2, 4, 3, 3)
    assert PDESSM(4, coupling="coupled")(torch.randn(2, 4, 3, 3)).shape == (2, 4, 3, 3)
