"""The kernels against the plain path: on a GPU if there is one, else under Triton's interpreter."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import pde_ssm
from on_gpu import CPU, DEVICE
from pde_ssm import PDESSM

pytest.importorskip("triton")
from pde_ssm_kernels import gpu, tiles
from pde_ssm_kernels.tiles import Tile

pytestmark = pytest.mark.gpu

# In units of the largest value. All but tokens and results is float32; bfloat16 has 8 bits, and the interpreter cuts off
# where GPUs and PyTorch round.
TOLERANCE = {torch.float32: 2e-6 if DEVICE.type == "cpu" else 1e-5, torch.bfloat16: 2**-7}
types = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


@pytest.fixture(autouse=True)
def on_device():
    with DEVICE:
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
def test_deterministic_algorithms_are_all_there_is(grid, triton_backend, deterministic):
    pde, u = PDESSM(2), torch.randn(1, 2, *grid, requires_grad=True)
    pde(u).square().sum().backward()
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
    monkeypatch.setattr(tiles, "untuned", lambda *_: Tile(16, 16, 8, 1))
    v, symbol = random_problem(grid, torch.float32, B=2, C=17)
    assert_like_the_plain_path(by_channel(v), symbol)


def test_channels_in_several_programs_the_last_not_full(monkeypatch):
    monkeypatch.setattr(tiles, "ON_CHIP", dict(forward=16 * 16 * 4 * 2, backward=16 * 16 * 4 * 4))
    v, symbol = random_problem((5, 6), torch.float32, B=5, C=7)
    assert gpu.constants("forward", v)[0]["CB"] == 2
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


@CPU
@pytest.mark.parametrize("grid", [(5, 8), (2, 33)], ids=str)
def test_kernels_are_launched_on_the_device_of_their_tokens(grid, monkeypatch):
    """It need not be the current one."""
    launched, current = [], []

    class Launcher:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, programs):
            return lambda *_, **__: launched.append((self.kernel, *current))

    @contextmanager
    def device(there):
        current.append(there.index)
        yield
        current.pop()

    kernels = [name for name in vars(gpu) if name.endswith("_kernel")]
    for name in kernels:
        monkeypatch.setattr(gpu, name, Launcher(name))
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(gpu, "programs_that_fill", lambda device: 2)
    for name in ("fourier_matrices", "irfft2_weights"):
        monkeypatch.setattr(gpu, name, getattr(gpu, name).__wrapped__)  # nothing false is kept
    with FakeTensorMode(), torch.device("cuda:1"):
        v, symbol = (x.detach() for x in random_problem(grid, torch.float32))
        gpu.evolve_op._init_fn(v, symbol)
        gpu.evolve_backward._init_fn(v, v, symbol)
    assert {index for _, index in launched} == {1}
    assert {name for name, _ in launched} == {name for name in kernels if ("along" in name) == (33 in grid)}


@pytest.mark.parametrize(
    ("limits", "served"),
    [
        (dict(shared_memory_per_block=49_152, shared_memory_per_block_optin=232_448), [8, 16, 32, 64, 128]),
        (dict(shared_memory_per_block=49_152, shared_memory_per_block_optin=101_376), [8, 16, 32, 64, 128]),
        (dict(shared_memory_per_block=49_152, shared_memory_per_block_optin=65_536), [8, 16, 64, 128]),
        (dict(shared_memory_per_block=65_536), [8, 16, 64, 128]),
        (dict(shared_memory_per_block=32_768), []),
    ],
    ids=["H200", "RTX 4090", "T4", "AMD", "none"],
)
def test_grids_that_need_more_shared_memory_than_a_gpu_has_are_not_served(limits, served, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(**limits))
    tiles.room.cache_clear()
    with FakeTensorMode(), torch.device("cuda"):
        assert [side for side in (8, 16, 32, 64, 128, 129) if gpu.serves(torch.empty(1, side, side, 4))] == served
    tiles.room.cache_clear()


@CPU
def test_amds_compiler_is_asked_for_what_it_knows(monkeypatch):
    assert gpu.precision() == "tf32x3"
    monkeypatch.setattr(torch.version, "hip", "6.3")
    assert gpu.precision() == "ieee"
    assert_like_the_plain_path(*random_problem((5, 8), torch.float32))


def test_other_layers_do_not_come_by_the_kernels(triton_backend):
    c = torch.randn(2, 4)
    assert PDESSM(4, conditioned=True)(torch.randn(2, 4, 3, 3), c).shape == (2, 4, 3, 3)
    assert PDESSM(4, coupling="coupled")(torch.randn(2, 4, 3, 3)).shape == (2, 4, 3, 3)
