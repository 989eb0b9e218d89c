import copy
import math
import subprocess
import sys

import pytest
import torch
from torch.autograd import forward_ad

import pde_ssm
from commands import ROOT
from on_gpu import CUDA
from operators import random_operator, without_input_map
from oracle import VARIANTS, FourierTransforms
from pde_ssm import COUPLINGS, PDESSM, TERMS, PDESSMBlock, options_from_weights, receptive_field
from pde_ssm_kernels import pytorch

f64 = torch.float64
couplings = pytest.mark.parametrize("coupling", COUPLINGS)
backends = pytest.mark.parametrize("backend", ["default", "torch", "plain"])


@couplings
@torch.no_grad()
def test_kernel_is_what_an_impulse_becomes(coupling):
    pde = without_input_map(random_operator(4, coupling=coupling, groups=2))
    impulses = torch.zeros(4, 4, 5, 6, dtype=f64)
    impulses[range(4), range(4), 0, 0] = 1
    expected = pde(impulses).transpose(0, 1)                               # (out, in, h, w)
    pde.R = torch.nn.Identity()                                            # without a weight, as quantised layers are
    kernel = pde.kernel(5, 6)
    if coupling == "diagonal":
        torch.testing.assert_close(torch.stack([expected[i, i] for i in range(4)]), kernel)
    else:
        assert kernel.shape == (4, 2, 5, 6)  # as the weight of a convolution in two groups
        whole = torch.zeros_like(expected)
        whole[:2, :2], whole[2:, 2:] = kernel[:2], kernel[2:]
        torch.testing.assert_close(expected, whole)


def test_receptive_field_of_shifts_and_gaussians():
    pde = PDESSM(3, grid_size=(9, 11), terms=("convection",)).double()
    with torch.no_grad():
        pde.equation.b.copy_(torch.tensor([[3 / 11, 4 / 9], [0, 0], [-2 / 11, 0]]))
        torch.testing.assert_close(receptive_field(pde.kernel(9, 11)), torch.tensor([5.0, 0, 2], dtype=f64), atol=1e-6, rtol=0)
    pde = PDESSM(2, grid_size=(64, 64), terms=("diffusion",)).double()
    with torch.no_grad():
        standard_deviation = torch.tensor([1.5, 4.0], dtype=f64)
        for log_l in (pde.equation.log_lx, pde.equation.log_ly):
            log_l.copy_((standard_deviation / 64 / math.sqrt(2)).log())    # variance 2 tau l^2
        torch.testing.assert_close(receptive_field(pde.kernel(64, 64)), math.sqrt(2) * standard_deviation, rtol=1e-3, atol=0)


@couplings
@pytest.mark.parametrize("terms", [*((term,) for term in TERMS), ("diffusion", "convection"), TERMS], ids="-".join)
def test_absent_terms_have_no_parameters(terms, coupling):
    pde = random_operator(4, terms=terms, coupling=coupling, groups=2)
    K, b, r, _ = pde.coefficients()
    assert K.any() == ("diffusion" in terms)
    assert b.any() == ("convection" in terms)
    assert r.any() == ("reaction" in terms)
    n, times = (4, 4) if coupling == "diagonal" else (2 * 2 * 2, 2)
    per_entry = 3 + 3 * ("diffusion" in terms) + 2 * ("convection" in terms) + ("reaction" in terms)
    assert sum(p.numel() for p in pde.parameters()) == 16 + times + n * per_entry
    pde(torch.randn(1, 4, 4, 5, dtype=f64)).square().sum().backward()
    assert all(p.grad is not None for p in pde.parameters())


@couplings
def test_a_state_of_another_size_is_projected_back(coupling):
    pde = PDESSM(6, coupling=coupling, state_dim=8)
    assert pde.R.weight.shape == (8, 6)
    assert pde.out.weight.shape == (6, 8)
    assert pde.kernel(3, 4).shape[0] == 8
    assert pde(torch.randn(2, 6, 3, 4)).shape == (2, 6, 3, 4)
    assert PDESSM(6, coupling=coupling, state_dim=6).out is None
    assert PDESSM(6, coupling=coupling, expand=4 / 3).R.weight.shape == (8, 6)
    assert PDESSM(10, coupling=coupling, expand=7 / 6).R.weight.shape == (12, 10)  # the nearest number


def test_groups_by_default():
    assert PDESSM(24, coupling="pairwise").kernel(2, 2).shape == (24, 24, 2, 2)
    assert PDESSM(24, coupling="coupled").kernel(2, 2).shape == (24, 8, 2, 2)
    assert PDESSM(20, coupling="coupled").kernel(2, 2).shape == (20, 4, 2, 2)


@pytest.mark.parametrize("coupling", ["pairwise", "coupled"])
def test_the_result_does_not_depend_on_the_chunks(coupling, monkeypatch):
    pde = random_operator(6, coupling=coupling, groups=2)
    u = torch.randn(3, 6, 5, 8, dtype=f64)

    def run(chunk):
        monkeypatch.setattr(pytorch, "CHUNK", chunk)
        pde.zero_grad()
        out = pde(u)
        out.square().sum().backward()
        return [out.detach()] + [p.grad for p in pde.parameters()]

    whole = run(2**20)
    for chunk in (1, 3 * 18, 7 * 18):  # 18 entries belong to one wave vector, of which there are 25
        torch.testing.assert_close(run(chunk), whole)
    with torch.no_grad():
        torch.testing.assert_close(pde.eval()(u), whole[0])
        monkeypatch.setattr(pytorch, "LARGEST_WHOLE", 0)
        torch.testing.assert_close(pde(u), whole[0])


MEMORY = """
import resource, sys, torch
from pde_ssm import PDESSM
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
torch.set_num_threads(1)
pde, u = PDESSM(384, coupling="pairwise"), torch.randn(8, 384, 16, 16, requires_grad=True)
before = peak()
pde(u).square().mean().backward()
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory in Linux's units")
def test_pairwise_trains_in_little_memory():
    run = subprocess.run([sys.executable, "-c", MEMORY], cwd=ROOT, capture_output=True, text=True, check=True)
    assert float(run.stdout) < 1.0  # GB


def test_the_gate_multiplies_by_a_second_projection():
    pde = PDESSM(4, gate=True).double()
    u = torch.randn(2, 4, 3, 5, dtype=f64)
    plain = PDESSM(4).double()
    plain.load_state_dict({name: p for name, p in pde.state_dict().items() if name.split(".")[0] not in ("gate", "out")})
    tokens = u.movedim(1, -1)
    gated = plain(u).movedim(1, -1) * torch.nn.functional.silu(tokens @ pde.gate.weight.T)
    torch.testing.assert_close(pde(u).movedim(1, -1), gated @ pde.out.weight.T)


def test_components_are_summed():
    pde = random_operator(4, components=3)
    u = torch.randn(2, 4, 3, 5, dtype=f64)
    one = PDESSM(4).double()
    total = 0
    for i in range(3):
        weights = pde.state_dict()
        one.load_state_dict({name: p if name == "R.weight" else p[i] for name, p in weights.items()})
        total = total + one(u)
        torch.testing.assert_close(pde.kernel(3, 5)[i], one.kernel(3, 5))
    torch.testing.assert_close(pde(u), total)


def test_the_activation_precedes_the_equation():
    pde = random_operator(4, activation=True)
    plain = PDESSM(4).double()
    plain.load_state_dict({name: p for name, p in pde.state_dict().items() if name != "R.bias"})
    with torch.no_grad():
        plain.R.weight.copy_(torch.eye(4))
    u = torch.randn(2, 4, 3, 5, dtype=f64)
    torch.testing.assert_close(pde(u), plain(torch.nn.functional.silu(pde.R(u.movedim(1, -1)).movedim(-1, 1))))


@pytest.mark.parametrize("components", [1, 3])
def test_the_condition_scales_the_time_of_each_image(components):
    pde = random_operator(4, conditioned=True, components=components)
    u, c = torch.randn(3, 4, 5, 6, dtype=f64), torch.randn(3, 4, dtype=f64)
    plain = PDESSM(4, components=components).double()
    weights = {name: p for name, p in pde.state_dict().items() if name != "log_time_scale"}
    scale = (2 * (c @ pde.log_time_scale.T / 2).tanh()).exp()
    for i in range(3):
        weights["equation.log_tau"] = pde.equation.log_tau.detach() + scale[i].detach().log()
        plain.load_state_dict(weights)
        torch.testing.assert_close(pde(u, c)[i], plain(u[i : i + 1])[0])
    with torch.no_grad():
        torch.testing.assert_close(pde.eval()(u, c), pde.train()(u, c))


def test_a_fresh_condition_changes_nothing():
    torch.manual_seed(1)
    plain = PDESSM(8)
    torch.manual_seed(1)
    conditioned = PDESSM(8, conditioned=True)
    u = torch.randn(2, 8, 4, 4)
    torch.testing.assert_close(conditioned(u, torch.randn(2, 8)), plain(u))


@pytest.mark.parametrize("options", VARIANTS, ids=lambda o: "-".join(map(str, o.values())))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [1e-3, 1, 1e3])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[CUDA, pytest.mark.gpu])])
def test_lower_precision_keeps_a_float32_core(dtype, scale, options, device):
    if dtype == torch.float16 and scale > 1 and options.get("gate"):
        pytest.skip("the gate is quadratic in its input: 1e3 becomes 1e6, more than float16 holds")
    block = PDESSMBlock(64, grid_size=(5, 6), **options).to(device)
    tokens = (scale * torch.randn(2, 30, 64, device=device)).requires_grad_()
    c = []
    if options.get("conditioned"):
        torch.nn.init.normal_(block.pde.log_time_scale)
        c = [scale * torch.randn(2, 64, device=device)]
    with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
        out = block(tokens, *c)
    assert out.dtype == dtype
    out.float().square().mean().backward()
    assert tokens.grad.isfinite().all()
    expected = block.double()(tokens.double(), *(x.double() for x in c))
    error = (out.double() - expected).norm()
    allowed = (1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps) * expected.norm()
    assert error < allowed + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps * out.numel() ** 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("grid", [(20, 20), (7, 13), (1, 1), (35, 3)], ids=str)
@couplings
def test_half_precision_weights_work_too(dtype, grid, coupling):
    pde = PDESSM(16, coupling=coupling).to(dtype)
    u, direction = torch.randn(2, 2, 16, *grid, dtype=dtype)
    u.requires_grad_()
    out = pde(u)
    assert out.dtype == dtype
    exact, inputs = copy.deepcopy(pde).double(), u.detach().double().requires_grad_()
    expected = exact(inputs)
    assert (out - expected).norm() < 2 * torch.finfo(dtype).eps * expected.norm()
    found = torch.autograd.grad(out, [u, *pde.parameters()], direction)
    for theirs, mine in zip(torch.autograd.grad(expected, [inputs, *exact.parameters()], direction.double()), found):
        assert mine.dtype == dtype
        assert (mine - theirs).norm() <= 8 * torch.finfo(dtype).eps * theirs.norm()


def test_block_puts_tokens_on_the_grid_row_by_row():
    block = PDESSMBlock(8, num_heads=2, qkv_bias=True, proj_drop=0.0, grid_size=(3, 4)).double()
    u = torch.randn(2, 8, 3, 4, dtype=f64)
    tokens = u.flatten(2).transpose(1, 2)
    torch.testing.assert_close(block(tokens), block.pde(u).flatten(2).transpose(1, 2))
    square = PDESSMBlock(8).double()
    assert square(torch.randn(1, 25, 8, dtype=f64)).shape == (1, 25, 8)


def test_tokens_off_the_grid_exchange_with_all_of_it():
    block = PDESSMBlock(8, grid_size=(3, 4), prefix_tokens=2).double()
    tokens = torch.randn(1, 14, 8, dtype=f64)
    out = block(tokens)
    mixed = PDESSMBlock(8, grid_size=(3, 4)).double()
    mixed.load_state_dict({name: p for name, p in block.state_dict().items() if name != "prefix.weight"})
    grid, uniform = mixed(tokens[:, 2:]), tokens[:, :2] @ block.prefix.weight.T
    torch.testing.assert_close(out[:, 2:], grid + uniform.mean(1, keepdim=True))
    torch.testing.assert_close(out[:, :2], uniform + grid.mean(1, keepdim=True))


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(terms=("reaction",)),
        dict(coupling="pairwise", groups=4, terms=("convection",)),
        dict(coupling="coupled", groups=2, terms=("convection",)),
        dict(coupling="coupled", groups=4, terms=("diffusion", "reaction"), state_dim=8, gate=True),
        dict(conditioned=True),
        dict(components=3, activation=True),
        dict(gate=True, local=True),
    ],
)
def test_weights_tell_their_options(options):
    block = PDESSMBlock(16, **options)
    found = options_from_weights(block.state_dict())
    plain = dict(coupling="diagonal", groups=1, state_dim=None, terms=TERMS)
    assert found == plain | dict(components=1, activation=False, gate=False, local=False, conditioned=False) | options
    PDESSMBlock(16, **found).load_state_dict(block.state_dict())


@couplings
@torch.no_grad()
def test_a_whole_module_can_be_pickled(coupling, tmp_path):
    pde, u = PDESSM(4, coupling=coupling).eval(), torch.randn(2, 4, 3, 5)
    expected = pde(u)
    torch.save(pde, tmp_path / "a.pt")
    torch.testing.assert_close(torch.load(tmp_path / "a.pt", weights_only=False)(u), expected, rtol=0, atol=0)


@couplings
def test_shapes_can_be_had_without_memory(coupling):
    with torch.device("meta"):
        assert PDESSMBlock(16, coupling=coupling)(torch.randn(2, 25, 16)).shape == (2, 25, 16)


@couplings
def test_autocast_does_not_touch_what_can_be_asked(coupling):
    pde = PDESSM(16, coupling=coupling)
    expected = pde.kernel(4, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(pde.kernel(4, 6), expected, rtol=0, atol=0)
        assert {x.dtype for x in pde.coefficients()} == {torch.float32}


def test_arguments_of_timms_attention():
    block = PDESSMBlock(8, num_heads=2, qkv_bias=True, dim_out=8, qk_norm=True, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in block.parameters()} == {("meta", torch.bfloat16)}
    assert PDESSM(4, terms="diffusion").equation.terms == ("diffusion",)
    assert PDESSM(4, terms=(t for t in reversed(TERMS))).equation.terms == TERMS


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: PDESSM(4, terms=()), "terms must be some of"),
        (lambda: PDESSM(4, terms=("advection",)), "advection"),
        (lambda: PDESSM(4, coupling="none"), "known: diagonal, pairwise, coupled"),
        (lambda: PDESSM(6, coupling="pairwise", groups=4), "6 channels cannot be split into 4 equal groups"),
        (lambda: PDESSM(75, coupling="coupled"), "fall into groups of 8, 4 or 2, and 75 do not; give groups"),
        (lambda: PDESSM(6, coupling="coupled", groups=4), "6 channels cannot be split into 4 equal groups"),
        (lambda: PDESSM(6, coupling="pairwise", state_dim=8, groups=3), "8 channels cannot be split into 3"),
        (lambda: PDESSM(6, state_dim=0), "0 channels"),
        (lambda: PDESSM(6, groups=2), "groups is 2, with coupling 'diagonal'"),
        (lambda: PDESSM(4, coupling="pairwise", conditioned=True), "conditioned needs coupling='diagonal'"),
        (lambda: PDESSM(4)(torch.ones(1, 4, 2, 2, dtype=torch.int64)), "torch.int64"),
        (lambda: PDESSM(4)(torch.ones(1, 4, 0, 2)), r"\(1, 4, 0, 2\)"),
        (lambda: PDESSM(4)(torch.ones(1, 4, 2, 2, dtype=torch.complex64)), "torch.complex64"),
        (lambda: PDESSM(4)(torch.ones(1, 3, 2, 2)), r"\(B, 4, h, w\); it got torch.float32 of shape \(1, 3, 2, 2\)"),
        (lambda: PDESSM(4)(torch.ones(4, 2, 2)), r"of shape \(4, 2, 2\)"),
        (lambda: PDESSM(4)(torch.ones(1, 4, 2, 2), torch.ones(1, 4)), "conditioned=False and got a vector c"),
        (lambda: PDESSM(4, conditioned=True)(torch.ones(1, 4, 2, 2)), "conditioned=True and got no vector c"),
        (lambda: PDESSM(4, conditioned=True)(torch.ones(2, 4, 2, 2), torch.ones(1, 4)), r"c is \(1, 4\), not .* \(2, 4\)"),
        (lambda: PDESSM(4, components=0), "components is 0"),
        (lambda: PDESSM(4, components=2, coupling="coupled"), "components is 2, with coupling 'coupled'"),
        (lambda: PDESSMBlock(4, dim_out=8), "dim_out=8"),
        (lambda: PDESSMBlock(4, prefix_tokens=-1), "-1 prefix_tokens"),
        (lambda: PDESSMBlock(4, grid_size=4), r"grid_size is 4, and not \(h, w\)"),
        (lambda: PDESSM(4, grid_size=(0, 3)), r"grid_size is \(0, 3\), and not \(h, w\)"),
        (lambda: PDESSM(4, grid_size=(4.5, 4)), r"grid_size is \(4.5, 4\), and not \(h, w\)"),
        (lambda: PDESSMBlock(4)(torch.ones(4, 4)), r"\(B, N, 4\); it got the shape \(4, 4\)"),
        (lambda: PDESSMBlock(4)(torch.ones(1, 4, 4), attn_mask=torch.ones(4, 4)), "cannot follow attn_mask"),
        (lambda: PDESSMBlock(4, prefix_tokens=3)(torch.randn(1, 2, 4)), "0 tokens on the grid"),
        (lambda: PDESSMBlock(4)(torch.randn(1, 5, 4)), "5 tokens on the grid"),
        (lambda: PDESSMBlock(4, grid_size=(2, 3))(torch.randn(1, 5, 4)), r"2 x 3 = 6 tokens"),
    ],
)
def test_mistakes_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_unknown_options_are_refused():
    with pytest.raises(TypeError, match="term"):
        PDESSMBlock(4, term="diffusion")


def test_forward_mode_differentiates_a_conditioned_layer():
    pde = PDESSM(4, conditioned=True).double()
    torch.nn.init.normal_(pde.log_time_scale, std=0.3)
    u, c, dc = torch.randn(2, 4, 6, 5, dtype=f64), *torch.randn(2, 2, 4, dtype=f64)
    with forward_ad.dual_level():
        slope = forward_ad.unpack_dual(pde(u, forward_ad.make_dual(c, dc))).tangent
    torch.testing.assert_close(slope, (pde(u, c + 1e-6 * dc) - pde(u, c - 1e-6 * dc)) / 2e-6, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("backend", "coupling"), [("default", "diagonal"), *(("torch", name) for name in COUPLINGS)])
@pytest.mark.parametrize("activation", [False, True])
@pytest.mark.parametrize("grid", [(8, 8), (6, 20), (36, 40), (33, 7)])
def test_inference_and_training_give_the_same_numbers(grid, activation, backend, coupling):
    pde_ssm.set_backend(backend)
    pde, u = PDESSM(8, coupling=coupling, activation=activation), torch.randn(3, 8, *grid)
    if activation:
        torch.nn.init.normal_(pde.R.bias)
    with torch.no_grad():
        inferred = pde.eval()(u)
    torch.testing.assert_close(inferred, pde.train()(u).detach(), rtol=1e-4, atol=1e-5)


@backends
@pytest.mark.parametrize("side", [8, 40])
def test_results_can_be_changed_in_place(side, backend):
    pde_ssm.set_backend(backend)
    pde, u = PDESSM(4), torch.randn(2, 4, side, side)
    out = pde(u)
    out += u
    out.square().sum().backward()
    (expected,) = torch.autograd.grad((pde(u) + u).square().sum(), [pde.R.weight])
    torch.testing.assert_close(pde.R.weight.grad, expected)


@pytest.mark.parametrize("grid", [(8, 8), (7, 13), (40, 3)], ids=str)
@pytest.mark.parametrize("options", VARIANTS, ids=lambda o: "-".join(map(str, o.values())))
@backends
def test_deterministic_algorithms_are_all_there_is(options, grid, backend, deterministic):
    pde_ssm.set_backend(backend)
    pde, u, c = PDESSM(16, **options), torch.randn(2, 16, *grid, requires_grad=True), torch.randn(2, 16)
    runs = []
    for _ in range(2):
        out = pde(u, *[c] * pde.conditioned)
        runs.append([out, *torch.autograd.grad(out.square().sum(), [u, *pde.parameters()])])
    assert all(map(torch.equal, *runs))
    with torch.no_grad():
        pde.eval()(u, *[c] * pde.conditioned)


@pytest.mark.parametrize("side", [8, 40])
@pytest.mark.parametrize("options", VARIANTS, ids=lambda o: "-".join(map(str, o.values())))
@backends
def test_no_images_are_no_mistake(side, options, backend):
    pde_ssm.set_backend(backend)
    pde, inputs = PDESSM(4, **options), [torch.randn(0, 4, side, side, requires_grad=True)]
    inputs += [torch.randn(0, 4)] * pde.conditioned
    out = pde(*inputs)
    assert out.shape == inputs[0].shape
    out.sum().backward()
    assert inputs[0].grad.shape == inputs[0].shape
    assert not any(p.grad.any() for p in pde.parameters())
    with torch.no_grad():
        assert pde.eval()(*inputs).shape == out.shape


@couplings
@pytest.mark.parametrize("images", [1, 2])
def test_fourier_transforms_are_of_images_that_lie_in_one_piece(images, coupling):
    """Others, of few rows and 128 columns or more, made MKL write beyond its memory."""
    pde, u = PDESSM(4, coupling=coupling), torch.randn(images, 4, 3, 129, requires_grad=True)
    with FourierTransforms() as transforms:
        pde(u).square().sum().backward()
    assert transforms.seen == 2 * [(4, [2, 3], True)]                      # one back, and one in the backward pass


@backends
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("side", [4, 12, 40])
def test_gradients_are_as_precise_under_autocast(side, create_graph, backend):
    pde_ssm.set_backend(backend)
    equation, v = PDESSM(4, components=2).equation, torch.randn(2, side, side, 4, requires_grad=True)
    loss, inputs = equation.evolve(v).square().sum(), (v, *equation.parameters())
    expected = torch.autograd.grad(loss, inputs, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(loss, inputs, create_graph=create_graph)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
