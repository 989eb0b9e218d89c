"""Every mixer on a GPU, against the same network on a CPU."""

import copy

import pytest
import torch

import pde_ssm
from machine.precision import in_precision
from mixers import MIXERS
from models import DiT
from on_gpu import BACKEND, DEVICE, first_everywhere

pytestmark = pytest.mark.gpu

VARIANTS = [*(dict(coupling=coupling) for coupling in pde_ssm.COUPLINGS), dict(gate=True), dict(conditioned=True)]
# Of the largest value.
TOLERANCE = {"fp32": 1e-4, "bf16": 0.05, "fp16": 0.02}


@pytest.fixture(autouse=True)
def full_convolutions(monkeypatch):
    """cuDNN rounds them to TF32 unless it is told not to."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def values_and_gradients(model, precision, device):
    x, t, y = torch.linspace(-1, 1, 2 * 3 * 8 * 12).view(2, 3, 8, 12), torch.tensor([10, 700]), torch.tensor([3, 10])
    out = in_precision(model, precision, device)(*(part.to(device) for part in (x, t, y)))
    weight = torch.linspace(1, 2, out.numel(), device=device).view_as(out)
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [part.cpu() for part in (out.detach(), *torch.autograd.grad((out * weight).mean(), parameters))]


def assert_alike(model, precision):
    expected = values_and_gradients(model, "fp32", torch.device("cpu"))
    mine = values_and_gradients(copy.deepcopy(model).to(DEVICE), precision, DEVICE)
    for values in zip(mine, expected):
        assert all(part.isfinite().all() for part in values)
    assert (mine[0] - expected[0]).abs().max() <= TOLERANCE[precision] * expected[0].abs().max()
    largest = max(gradient.abs().max() for gradient in expected[1:])
    for ours, theirs in zip(mine[1:], expected[1:]):
        assert (ours - theirs).abs().max() <= TOLERANCE[precision] * largest


def network(randomize, **options):
    options |= dict(in_channels=3, hidden_size=16, depth=2, num_heads=2, num_classes=10)
    return randomize(DiT((8, 12), **options)).eval()  # without random labels


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("mixer", first_everywhere(sorted(MIXERS, key=lambda name: name != "pdessm-g")))
def test_a_mixer_computes_the_same_on_a_gpu(randomize, mixer, precision):
    pde_ssm.set_backend(BACKEND)
    assert_alike(network(randomize, mixer=mixer), precision)


@pytest.mark.parametrize("backend", ["torch", BACKEND])
@pytest.mark.parametrize("precision", first_everywhere(TOLERANCE))
@pytest.mark.parametrize("options", VARIANTS, ids=lambda options: "-".join(map(str, options.values())))
def test_a_pde_computes_the_same_on_a_gpu(randomize, options, precision, backend):
    pde_ssm.set_backend(backend)
    assert_alike(network(randomize, mixer="pdessm", **options), precision)


@pytest.mark.parametrize("options", first_everywhere(VARIANTS), ids=lambda options: "-".join(map(str, options.values())))
def test_tf32_changes_the_network_and_not_the_pde(options):
    pde = pde_ssm.PDESSM(64, grid_size=(8, 8), **options).to(DEVICE)
    v, c = torch.randn(2, 8, 8, 64, device=DEVICE), torch.randn(2, 64, device=DEVICE)
    results = []
    for precision in ("highest", "high"):
        torch.set_float32_matmul_precision(precision)
        state = pde.equation.evolve(v, *([pde.time_scale(c)] if pde.conditioned else []))
        coefficients = [p for p in pde.equation.parameters() if p.requires_grad]
        results.append([state.detach(), *torch.autograd.grad((state * v.roll(1, 1)).sum(), coefficients)])
    torch.set_float32_matmul_precision("highest")
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * one.abs().max().item())


@pytest.mark.parametrize("backend", first_everywhere(["torch", BACKEND]))
def test_derivatives_forwards_on_a_gpu(backend):
    pde_ssm.set_backend(backend)
    pde, u, direction = (x.to(DEVICE) for x in (pde_ssm.PDESSM(8), torch.randn(1, 8, 4, 6), torch.randn(1, 8, 4, 6)))
    slope = torch.func.jvp(pde, (u,), (direction,))[1]
    torch.testing.assert_close(slope, pde(direction), rtol=1e-4, atol=1e-5)
