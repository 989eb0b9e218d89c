"""What TF32 must not round: on GPUs it would, where it is allowed. Here a mode rounds what PyTorch multiplies as they do."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from operators import random_operator
from pde_ssm_kernels import products, pytorch

PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "linalg_matrix_exp"}


@pytest.fixture
def allowed(monkeypatch):
    """TF32, on what stands for a GPU."""
    monkeypatch.setattr(products, "tf32_may_round", lambda x: not products.transformed())
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    torch.backends.cuda.matmul.fp32_precision = before


class TensorCores(TorchDispatchMode):
    """Rounds the factors of products to 11 bits while TF32 is allowed."""

    rounded = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator._schema.name.removeprefix("aten::") in PRODUCTS and torch.backends.cuda.matmul.fp32_precision == "tf32":
            self.rounded += 1
            args = [self.round(x) if isinstance(x, torch.Tensor) else x for x in args]
        return operator(*args, **kwargs or {})

    def round(self, x):
        parts = torch.view_as_real(x.resolve_conj()).contiguous() if x.is_complex() else x.contiguous()
        parts = (parts.view(torch.int32) + 2**12 & -(2**13)).view(torch.float32)
        return torch.view_as_complex(parts) if x.is_complex() else parts


def test_the_mode_rounds_what_is_not_kept_from_it(allowed):
    a, b = torch.randn(2, 8, 8), torch.randn(2, 8, 8)
    with TensorCores() as mode:
        assert 1e-4 < (a @ b - products.matmul(a, b)).abs().max() < 1e-2
    assert mode.rounded == 1


def values_and_gradients(pde, v, c):
    pde.zero_grad()
    state = pde.equation.evolve(v, *([pde.time_scale(c)] if pde.conditioned else []))
    (state * torch.linspace(-1, 1, state.numel()).view_as(state)).sum().backward()
    return [state.detach(), *(p.grad for p in pde.parameters() if p.grad is not None)]


OPTIONS = [{"coupling": "pairwise"}, {"coupling": "coupled", "groups": 2}, {"conditioned": True}]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: next(iter(options.values())))
def test_tf32_rounds_no_pde_forwards_or_backwards(allowed, monkeypatch, options):
    monkeypatch.setattr(pytorch, "CHUNK", 100)                             # in pieces, computed twice
    pde = random_operator(6, **options).float()
    v, c = torch.randn(2, 4, 5, 6), torch.randn(2, 6)
    with TensorCores() as mode:
        mine = values_and_gradients(pde, v, c)
    assert mode.rounded == 0
    monkeypatch.undo()
    for ours, theirs in zip(mine, values_and_gradients(pde, v, c)):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_products_have_the_derivatives_of_pytorchs(allowed, dtype):
    a, b = (torch.randn(1, 2, 2, dtype=dtype, requires_grad=True) for _ in range(2))
    torch.autograd.gradcheck(products.matmul, (a, b), check_forward_ad=True, check_batched_grad=True)
    torch.autograd.gradgradcheck(products.matmul, (a, b))
    torch.autograd.gradcheck(products.matrix_exp, a, check_forward_ad=True)
    torch.autograd.gradgradcheck(products.matrix_exp, a)
    torch.testing.assert_close(products.matrix_exp(a), torch.linalg.matrix_exp(a))


def test_compiled_products_are_operators(allowed):
    pde, u = random_operator(4, coupling="coupled"), torch.randn(2, 4, 3, 4, dtype=torch.float64)
    inputs = list(pde.parameters())
    torch.compiler.reset()
    both = pde, torch.compile(pde, backend="eager", fullgraph=True)
    for ours, theirs in zip(*(torch.autograd.grad(run(u).square().sum(), inputs) for run in both)):
        torch.testing.assert_close(ours, theirs)
    for operator, arguments in ((products.product_op, (u[0], u[0].mT)), (products.matrix_exp_op, (u[0, :, :3, :3],))):
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))
