"""What others ask of a layer besides its gradient: second derivatives, many gradients at once, and traces of any batch size."""

from copy import deepcopy
from functools import partial

import pytest
import torch
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from mixers import MIXERS, build_mixer
from mixers.selective_scan import selective_scan
from pde_ssm import PDESSM, set_backend
from pde_ssm_kernels import pytorch

GRID = 3, 4


def layers():
    for name in MIXERS:
        torch.manual_seed(0)
        layer = build_mixer(name, 16, 2, GRID, 3)
        for parameter in layer.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)  # none is zero at the start
        yield pytest.param(layer, id=name)
    for coupling in ("pairwise", "coupled"):
        yield pytest.param(build_mixer("pdessm", 16, 2, GRID, 3, coupling=coupling), id=coupling)


every_layer = pytest.mark.parametrize("layer", [*layers()])
by_kernels_and_without = pytest.mark.parametrize("backend", ["default", "torch"])


def gradient(layer, x, create_graph=False):
    loss = (x + layer(x)).pow(3).sum()
    return torch.autograd.grad(loss, [x, *layer.parameters()], create_graph=create_graph)


@by_kernels_and_without
@every_layer
def test_second_derivatives(layer, backend):
    """Of the gradient along a direction, against differences of gradients in float64. PyTorch's fast attention has none."""
    set_backend(backend)
    x = torch.randn(2, 12, 16, requires_grad=True)
    inputs = [x, *layer.parameters()]
    directions = [torch.randn_like(p) for p in inputs]
    with sdpa_kernel(SDPBackend.MATH):
        along = sum((g * v).sum() for g, v in zip(gradient(layer, x, create_graph=True), directions))
    found = torch.autograd.grad(along, inputs)

    def moved(step):
        wide, there = deepcopy(layer).double(), (x.detach().double() + step * directions[0]).requires_grad_()
        for parameter, v in zip(wide.parameters(), directions[1:]):
            parameter.data += step * v
        return gradient(wide, there)

    for ours, ahead, behind in zip(found, moved(1e-5), moved(-1e-5)):
        expected = (ahead - behind) / 2e-5
        assert (ours - expected).norm() <= 1e-3 * expected.norm()


@by_kernels_and_without
@every_layer
def test_many_gradients_at_once_are_those_one_by_one(layer, backend):
    set_backend(backend)
    x = torch.randn(2, 12, 16, requires_grad=True)
    inputs, out = [x, *layer.parameters()], layer(x)
    directions = torch.randn(3, *out.shape)
    together = torch.autograd.grad(out, inputs, directions, retain_graph=True, is_grads_batched=True)
    mapped = torch.func.vmap(lambda direction: torch.autograd.grad(out, inputs, direction, retain_graph=True))(directions)
    alone = [torch.autograd.grad(out, inputs, direction, retain_graph=True) for direction in directions]
    for ours, of_vmap, *others in zip(together, mapped, *alone):
        expected = torch.stack(others)
        assert (ours - expected).norm() <= 1e-4 * expected.norm()
        assert (of_vmap - expected).norm() <= 1e-4 * expected.norm()


def a_scan():
    """The outputs of a scan and its inputs."""
    u, delta, A, B, C = torch.randn(2, 4, 5), torch.rand(2, 4, 5), -torch.rand(4, 3), torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    inputs = [x.requires_grad_() for x in (u, delta, A, B, C)]
    return selective_scan(*inputs), inputs


def an_operator(coupling):
    layer, x = PDESSM(8, coupling=coupling), torch.randn(2, 8, 3, 4, requires_grad=True)
    return layer(x), [x, *layer.parameters()]


@pytest.mark.parametrize("backend", ["default", "torch", "triton"])
@pytest.mark.parametrize(
    "build", [a_scan, *(partial(an_operator, name) for name in ("diagonal", "pairwise", "coupled"))]
)
def test_gradients_keep_the_tangent_of_what_they_are_given(build, backend):
    """The gradient is linear in it, so along itself its tangent is the gradient: by dual numbers and by torch.func.jvp."""
    set_backend(backend)
    torch.manual_seed(0)
    out, inputs = build()
    direction = torch.randn_like(out)
    pull = partial(torch.autograd.grad, out, inputs, retain_graph=True)
    expected, (_, pushed) = pull(direction), torch.func.jvp(pull, (direction,), (direction,))
    with forward_ad.dual_level():
        tangents = [forward_ad.unpack_dual(x).tangent for x in pull(forward_ad.make_dual(direction, direction))]
    for name, found in dict(dual=tangents, jvp=pushed).items():
        for ours, gradient in zip(found, expected):
            assert (ours - gradient).norm() <= 1e-4 * gradient.norm(), name


@every_layer
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit", "ignore:Converting a tensor")
def test_a_trace_is_of_any_batch_size(layer):
    traced = torch.jit.trace(layer, torch.randn(2, 12, 16), check_trace=False)
    tokens = torch.randn(5, 12, 16)
    torch.testing.assert_close(traced(tokens), layer(tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("coupling", ["pairwise", "coupled"])
def test_functions_of_torch_func_take_grids_of_several_pieces(monkeypatch, coupling):
    monkeypatch.setattr(pytorch, "CHUNK", 600)
    layer, u = PDESSM(16, coupling=coupling), torch.randn(2, 16, 3, 4)
    weights = dict(layer.named_parameters())
    found = torch.func.grad(lambda p: torch.func.functional_call(layer, p, (u,)).square().sum())(weights)
    layer(u).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert (found[name] - parameter.grad).norm() <= 1e-4 * parameter.grad.norm()


def test_a_forward_that_was_replaced_is_the_one_that_runs():
    """As accelerate's hooks replace it; evaluation of pairs would otherwise read the weights of R alone."""
    layer, u = PDESSM(16, coupling="pairwise"), torch.randn(40, 16, 3, 4)
    before = layer.R.forward
    layer.R.forward = lambda tokens: 0 * before(tokens)
    with torch.no_grad():
        assert not layer.eval()(u).any()
