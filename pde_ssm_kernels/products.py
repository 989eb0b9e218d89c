"""Matrix products in full float32 even where TF32 is allowed. PyTorch's TF32 switch is meant for networks, whose weights were
trained with it; it rounds factors to 11 bits, which scaling and squaring alone amplifies to an error of 1e-2.

Where TF32 is not allowed, and on CPUs, these are PyTorch's own products.
"""

from contextlib import contextmanager

import torch

from .modes import transformed


def matmul(a, b):
    """Returns a @ b for matrices with the same leading axes, real or complex."""
    if not tf32_may_round(a):
        return a @ b
    return product_op(a, b) if torch.compiler.is_compiling() else Product.apply(a, b)


def matrix_exp(A):
    """Returns torch.linalg.matrix_exp of matrices (..., c, c), real or complex."""
    if not tf32_may_round(A):
        return torch.linalg.matrix_exp(A)
    return matrix_exp_op(A) if torch.compiler.is_compiling() else MatrixExponential.apply(A)


def tf32_may_round(x):
    """Returns whether a product of x on a GPU may use TF32; while compiling, the setting at run time is not known yet."""
    single = x.is_cuda and x.dtype in (torch.float32, torch.complex64)
    if torch.compiler.is_compiling():
        return single and not transformed()  # compilers have no forward-mode derivative of an opaque operator
    return single and torch.backends.cuda.matmul.fp32_precision == "tf32"


@contextmanager
def without_tf32():
    matrices = torch.backends.cuda.matmul
    before = matrices.fp32_precision
    if before != "tf32":
        yield
        return
    matrices.fp32_precision = "ieee"
    try:
        yield
    finally:
        matrices.fp32_precision = before


def keep_inputs(ctx, inputs, output):
    """Keeps what both derivatives need."""
    ctx.save_for_backward(*inputs)
    ctx.save_for_forward(*inputs)


class Product(torch.autograd.Function):
    """`matmul` and its derivatives of any order, forwards and backwards."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a, b):
        with without_tf32():
            return a @ b

    setup_context = staticmethod(keep_inputs)

    @staticmethod
    def backward(ctx, gradient):
        a, b = ctx.saved_tensors
        return Product.apply(gradient, b.mH), Product.apply(a.mH, gradient)

    @staticmethod
    def jvp(ctx, a_tangent, b_tangent):
        a, b = ctx.saved_tensors
        return Product.apply(a_tangent, b) + Product.apply(a, b_tangent)


class MatrixExponential(torch.autograd.Function):
    """`matrix_exp` and its derivatives of any order, forwards and backwards."""

    generate_vmap_rule = True

    @staticmethod
    def forward(A):
        with without_tf32():
            return torch.linalg.matrix_exp(A)

    setup_context = staticmethod(keep_inputs)

    @staticmethod
    def backward(ctx, gradient):
        (A,) = ctx.saved_tensors
        return derivative(MatrixExponential.apply, A.mH, gradient)

    @staticmethod
    def jvp(ctx, tangent):
        (A,) = ctx.saved_tensors
        return derivative(MatrixExponential.apply, A, tangent)


def derivative(exponential, A, E):
    """Returns the derivative of exp at A in the direction E, a corner of exp([[A, E], [0, A]])."""
    c = A.shape[-1]
    above, below = torch.cat([A, E], dim=-1), torch.cat([torch.zeros_like(A), A], dim=-1)
    return exponential(torch.cat([above, below], dim=-2))[..., :c, c:]


@torch.library.custom_op("pde_ssm::product", mutates_args=())
def product_op(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Wraps `matmul` as an operator that compilers treat as opaque."""
    return Product.forward(a, b)


@product_op.register_fake
def _(a, b):
    return a.new_empty(*a.shape[:-1], b.shape[-1])


@torch.library.custom_op("pde_ssm::matrix_exp", mutates_args=())
def matrix_exp_op(A: torch.Tensor) -> torch.Tensor:
    """Wraps `matrix_exp` likewise."""
    return MatrixExponential.forward(A).contiguous()


@matrix_exp_op.register_fake
def _(A):
    return A.new_empty(A.shape)


def _product_backward(ctx, gradient):
    a, b = ctx.saved_tensors
    return product_op(gradient, b.mH), product_op(a.mH, gradient)


def _matrix_exp_backward(ctx, gradient):
    return derivative(matrix_exp_op, ctx.saved_tensors[0].mH, gradient)


product_op.register_autograd(_product_backward, setup_context=keep_inputs)
matrix_exp_op.register_autograd(_matrix_exp_backward, setup_context=keep_inputs)
