"""The operator under torch.compile and torch.export."""

import shutil

import pytest
import torch

import pde_ssm
from models import DiT
from operators import random_operator
from oracle import VARIANTS
from pde_ssm import COUPLINGS, PDESSM
from pde_ssm_kernels import pytorch

f64 = torch.float64
couplings = pytest.mark.parametrize("coupling", COUPLINGS)
backends = pytest.mark.parametrize("backend", ["default", "torch", "plain"])


@pytest.mark.parametrize("options", VARIANTS, ids=lambda o: "-".join(map(str, o.values())))
def test_compiles_without_a_graph_break(options, randomize, monkeypatch):
    monkeypatch.setattr(pytorch, "CHUNK", 1000)  # more than one
    model = randomize(DiT(8, hidden_size=16, depth=1, num_heads=2, num_classes=10, mixer="pdessm", **options)).eval()
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([1, 500]), torch.tensor([1, 2])

    def run(network):
        model.zero_grad()
        out = network(*inputs)
        out.square().sum().backward()
        with torch.no_grad():
            kept = network(*inputs)
        return [out.detach(), kept] + [p.grad for p in model.parameters() if p.requires_grad]

    torch.compiler.reset()
    assert torch._dynamo.explain(model)(*inputs).graph_break_count == 0
    torch.compiler.reset()
    torch.testing.assert_close(run(torch.compile(model, backend="aot_eager")), run(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", VARIANTS, ids=lambda o: "-".join(map(str, o.values())))
@torch.no_grad()
def test_exports_for_any_batch(options, randomize, tmp_path):
    model = randomize(DiT(8, hidden_size=16, depth=1, num_heads=2, num_classes=10, mixer="pdessm", **options)).eval()

    def inputs(B):
        return torch.randn(B, 4, 8, 8), torch.full((B,), 500), torch.arange(B)

    batch = {0: torch.export.Dim("batch", min=2, max=64)}
    torch.export.save(torch.export.export(model, inputs(2), dynamic_shapes=(batch, batch, batch)), tmp_path / "a.pt2")
    exported, other = torch.export.load(tmp_path / "a.pt2").module(), inputs(5)
    operators = {str(node.target) for part in exported.modules() if hasattr(part, "graph") for node in part.graph.nodes}
    assert any("aten.linear" in name for name in operators)
    assert not any("evolve_on_cpu" in name for name in operators)          # for machines without a compiler
    torch.testing.assert_close(exported(*other), model(*other))


@couplings
@torch.no_grad()
def test_exports_for_any_batch_and_grid(coupling):
    pde, Dim = PDESSM(16, coupling=coupling).eval(), torch.export.Dim
    shape = {0: Dim("batch", min=1, max=64), 2: Dim("h", min=4, max=64), 3: Dim("w", min=4, max=64)}
    exported = torch.export.export(pde, (torch.randn(2, 16, 6, 8),), dynamic_shapes=(shape,)).module()
    for batch, *grid in [(5, 4, 5), (1, 7, 9), (2, 64, 4)]:
        u = torch.randn(batch, 16, *grid)
        torch.testing.assert_close(exported(u), pde(u), rtol=1e-4, atol=1e-5)


@couplings
@pytest.mark.parametrize("grid", [(3, 4), (2, 33)])
def test_a_compiled_layer_has_the_same_gradients(grid, coupling):
    pde = random_operator(8, coupling=coupling)
    u = torch.randn(2, 8, *grid, dtype=f64, requires_grad=True)
    inputs = [u, *pde.parameters()]
    torch.compiler.reset()
    expected, mine = (torch.autograd.grad(f(u).square().sum(), inputs) for f in (pde, torch.compile(pde, backend="aot_eager")))
    for theirs, ours in zip(expected, mine):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex operators")
@pytest.mark.parametrize(
    ("backend", "coupling"), [("cpp", "diagonal"), ("triton", "diagonal"), ("cpp", "pairwise"), ("cpp", "coupled")]
)
def test_derivatives_forwards_compiled_or_not(backend, coupling):
    """Of a linear operator: itself."""
    if backend == "triton":
        pytest.importorskip("triton")
    pde_ssm.set_backend(backend)
    pde = random_operator(4, coupling=coupling).float()
    u, direction = torch.randn(2, 4, 3, 4), torch.randn(2, 4, 3, 4)

    def derivative(u, direction):
        return torch.func.jvp(pde, (u,), (direction,))[1]

    torch.compiler.reset()
    for run in (derivative, torch.compile(derivative, backend="eager")):
        torch.testing.assert_close(run(u, direction), pde(direction), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("backend", "coupling", "shapes"),
    [
        ("cpp", "diagonal", [(2, 3, 7, 13), (1, 3, 35, 4)]),
        ("torch", "diagonal", [(2, 3, 7, 13), (1, 3, 35, 4)]),
        ("torch", "pairwise", [(2, 3, 7, 13)]),
        ("torch", "coupled", [(1, 3, 35, 4)]),
    ],
)
def test_after_a_compiled_convolution_that_runs_channels_last(backend, coupling, shapes):
    pde_ssm.set_backend(backend)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3, padding=1), PDESSM(16, coupling=coupling))
    net.to(memory_format=torch.channels_last)
    torch.compiler.reset()
    compiled = torch.compile(net, dynamic=len(shapes) > 1, backend="aot_eager")
    for shape in shapes:
        u = torch.randn(shape).to(memory_format=torch.channels_last).requires_grad_()
        expected, mine, direction = net(u), compiled(u), torch.randn(shape[0], 16, *shape[2:])
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)
        gradients = (torch.autograd.grad(out, [u, *net.parameters()], direction) for out in (mine, expected))
        for ours, theirs in zip(*gradients):
            assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on CPUs")
@pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex operators")
@backends
def test_the_compiled_model_gives_the_same_numbers(randomize, backend):
    pde_ssm.set_backend(backend)
    options = dict(num_classes=10, mixer="pdessm", gate=True, conditioned=True)
    model = randomize(DiT(8, hidden_size=16, depth=1, num_heads=2, **options)).eval()
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([1, 500]), torch.tensor([1, 2])

    def run(network):
        model.zero_grad()
        out = network(*inputs)
        out.square().sum().backward()
        return [out.detach()] + [p.grad for p in model.parameters() if p.requires_grad]

    torch.compiler.reset()
    torch.testing.assert_close(run(torch.compile(model)), run(model), rtol=1e-4, atol=1e-5)
