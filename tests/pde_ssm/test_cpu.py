"""The C++ kernels against the plain path, and what becomes of a machine that cannot have them."""

import os
import sys

import pytest
import torch
from torch.autograd import forward_ad

import pde_ssm
from oracle import random_rows
from pde_ssm import PDESSM, evolve_plainly
from pde_ssm_kernels import building, cpu
from pde_ssm_kernels.cpu import MAX_SIDE, SIDES, evolve, evolve_backward

KERNELS, REASON = cpu.library()
pytestmark = pytest.mark.skipif(KERNELS is None, reason=str(REASON))
f64 = torch.float64


def assert_close(mine, exact, of_largest, dim=None):
    """Within a fraction of the largest value, over those axes."""
    assert mine.shape == exact.shape
    errors = (mine - exact).abs().amax(dim) / exact.abs().amax(dim).clamp_min(1e-6)
    assert errors.max() <= of_largest


@pytest.mark.parametrize(
    "grid",
    [(1, 1), (1, 2), (2, 1), (2, 2), (3, 4), (5, 7), (1, 8), (9, 1), (6, 10), (13, 11), (8, 8), (16, 16), (15, 27), (32, 32),
     (12, 64), (50, 36)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize(
    ("channels", "components", "per_image"), [(32, 1, False), (5, 3, False), (37, 1, True), (16, 2, True)]
)  # whole vectors of channels, a part of one, both
def test_values_and_gradients_are_those_of_the_plain_path_in_double_precision(grid, channels, components, per_image):
    v, gradient = torch.randn(2, 3, *grid, channels)
    rows = random_rows(*([3] if per_image else []), components, channels)
    inputs = [x.double().requires_grad_() for x in (v, rows)]
    exact = evolve_plainly(*inputs)
    assert_close(evolve(v, rows), exact, 3e-6)
    gradients = zip(evolve_backward(gradient, v, rows), torch.autograd.grad(exact, inputs, gradient.double()))
    assert_close(*next(gradients), 3e-6)
    assert_close(*next(gradients), 3e-5, dim=-1)                           # each of the nine on its own


@pytest.mark.parametrize("side", [*range(1, 65), 81, 96, 121, 125, 127, 128, 169, 243, 254, 256, 343, 381, 500, MAX_SIDE])
def test_transforms_of_all_lengths(side):
    rows = random_rows(1, 1)
    for grid in ((side, 2), (2, side)):
        v = torch.randn(1, *grid, 1)
        assert_close(evolve(v, rows), evolve_plainly(v.double(), rows.double()), 3e-6)


def test_sides_have_no_larger_prime_factors():
    def primes(n):
        return [p for p in range(2, n + 1) if n % p == 0 and all(p % q for q in range(2, p))]

    assert {n for n in range(1, MAX_SIDE + 1) if max(primes(n), default=1) <= cpu.LARGEST_PRIME} == SIDES


OPTIONS = [
    {},
    {"components": 3, "gate": True, "activation": True, "local": True},
    {"conditioned": True},
    {"terms": "convection"},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grid", [(6, 5), (36, 35)], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
def test_a_layer_has_the_same_values_and_gradients_of_all_parameters(options, grid, dtype):
    pde = PDESSM(18, grid_size=grid, **options).to(dtype)
    with torch.no_grad():
        for p in pde.parameters():
            p.add_(torch.randn_like(p) / 10)
    u, gradient = torch.randn(2, 2, 18, *grid, dtype=dtype)
    inputs = [u, torch.randn(2, 18, dtype=dtype)] if pde.conditioned else [u]
    wanted, results = [x.requires_grad_() for x in inputs] + list(pde.parameters()), []
    for backend in ("torch", "cpp"):
        pde_ssm.set_backend(backend)
        out = pde(*inputs)
        results.append((out, *torch.autograd.grad(out, wanted, gradient)))
    for theirs, mine in zip(*results):
        assert mine.dtype == dtype
        assert (mine - theirs).abs().max() <= (1e-5 if dtype == torch.float32 else 2**-6) * theirs.abs().max()


@pytest.mark.parametrize("name", ["equation.b", "equation"])
def test_coefficients_may_be_in_float64(name):
    """As those are that were made from arrays of NumPy's."""
    pde, u = PDESSM(5), torch.randn(2, 5, 4, 6)
    expected = pde(u)
    if name == "equation":
        pde.equation.double()
    else:
        pde.equation.b = torch.nn.Parameter(pde.equation.b.double())
    for training in (True, False):
        with torch.set_grad_enabled(training):
            torch.testing.assert_close(pde.train(training)(u), expected)
    pde(u).square().sum().backward()
    assert pde.equation.b.grad.dtype == torch.float64


@pytest.mark.parametrize("grid", [(8, 8), (6, 35)], ids=str)
def test_shifts_of_many_turns_are_those_of_the_torus_on_both_paths(grid):
    """And those of an equation that starts a whole number of turns nearer."""
    pde, (u, direction) = PDESSM(5), torch.randn(2, 2, 5, *grid)
    turns, results = torch.tensor([[0, 0], [1, -2], [40, 1000], [-1024, 7], [3, 512]]), []
    wanted = [p for name, p in pde.named_parameters() if name != "equation.log_tau"]       # which turns the shift by more
    near = torch.randint(-128, 128, (5, 2)) / 256                          # binary: sums with turns are exact
    for backend, shift in (("torch", near), ("torch", near + turns), ("cpp", near + turns)):
        pde_ssm.set_backend(backend)
        with torch.no_grad():
            pde.equation.b.copy_(shift)
        out = pde(u)
        results.append((out, *torch.autograd.grad(out, wanted, direction)))
    for plain, far, kernels in zip(*results):
        assert_close(far, plain, 1e-6)
        assert_close(kernels, plain, 1e-5)


COUPLINGS = [dict(components=1), dict(components=2), dict(coupling="pairwise")]


@pytest.mark.parametrize("options", COUPLINGS, ids=str)
def test_gradients_have_gradients(options):
    equation, v = PDESSM(4, **options).equation, torch.randn(2, 6, 5, 4, requires_grad=True)
    for p in equation.parameters():
        torch.nn.init.normal_(p, std=0.1)
    inputs, results = [v, *equation.parameters()], []
    for backend in ("plain", "cpp"):
        pde_ssm.set_backend(backend)
        gradients = torch.autograd.grad(equation.evolve(v).square().sum(), inputs, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in gradients), inputs))
    for theirs, mine in zip(*results):
        assert_close(mine, theirs, 1e-4)


@pytest.mark.parametrize("options", [*COUPLINGS, dict(coupling="coupled")], ids=str)
def test_tensors_that_are_negated_lazily(options):
    """PyTorch keeps a negation as a flag, which kernels would not see."""
    equation, v = PDESSM(4, **options).equation, torch.randn(2, 6, 5, 4, requires_grad=True)
    out = equation.evolve(v)
    torch.testing.assert_close(equation.evolve(torch._neg_view(-v)), out)
    found, expected = (torch.autograd.grad(out, v, g, retain_graph=True)[0] for g in (torch._neg_view(-out), out))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("options", [*COUPLINGS, dict(coupling="coupled")], ids=str)
@pytest.mark.parametrize("frozen", ["input", "parameters"])
@pytest.mark.parametrize("create_graph", [False, True])
def test_a_frozen_side_gets_no_gradient(options, frozen, create_graph):
    equation = PDESSM(4, **options).equation.requires_grad_(frozen != "parameters")
    v = torch.randn(2, 6, 5, 4, requires_grad=frozen != "input")
    equation.evolve(v).square().sum().backward(create_graph=create_graph)
    assert (v.grad is None) == (frozen == "input")
    assert (equation.g0.grad is None) == (frozen == "parameters")


def test_images_and_channels_do_not_touch():
    """Not even by rounding, nor by what is not a number."""
    v, rows = torch.randn(5, 6, 9, 40), random_rows(2, 40)
    before = evolve(v, rows)
    v[3, 2, 4, 17] = float("nan")
    after = evolve(v, rows)
    assert after[3, :, :, 17].isnan().all()
    before[3, :, :, 17] = after[3, :, :, 17] = 0
    assert torch.equal(after, before)


def test_a_result_depends_on_nothing_but_its_input(threads):
    v, gradient, rows = *torch.randn(2, 7, 12, 10, 40), random_rows(1, 40)
    threads(2)
    first, (v_gradient, rows_gradient) = evolve(v, rows), evolve_backward(gradient, v, rows)
    for number in (2, 2, 1, 3):
        threads(number)
        assert torch.equal(evolve(v, rows), first)
        v_again, rows_again = evolve_backward(gradient, v, rows)
        assert torch.equal(v_again, v_gradient)
        if number == 2:
            assert torch.equal(rows_again, rows_gradient)
        assert_close(rows_again, rows_gradient, 3e-6, dim=-1)              # sums of other shares of images
    across = v.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0)        # the same numbers, elsewhere
    assert torch.equal(evolve(across, rows), first)


def test_strictly_not_even_a_gradient_depends_on_the_number_of_threads(threads):
    v, gradient, rows = *torch.randn(2, 23, 5, 7, 40), random_rows(2, 40)
    torch.use_deterministic_algorithms(True)
    try:
        sums = [threads(number) or evolve_backward(gradient, v, rows)[1] for number in (1, 2, 3)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(sums[0], sums[1])
    assert torch.equal(sums[0], sums[2])
    loosely = [threads(number) or evolve_backward(gradient, v, rows)[1] for number in (1, 3)]
    assert not torch.equal(*loosely)                                       # or the mode would have had nothing to do


@pytest.mark.parametrize("r", [-1e4, -85.0, -60.0, 0.0, 60.0])
def test_growth_of_any_size(r):
    v, rows = torch.randn(1, 4, 6, 3), random_rows(1, 3)
    rows[:, 0] = r
    exact = evolve_plainly(v.double(), rows.double())                      # which stops at exp(LEAST_GROWTH), too
    assert_close(evolve(v, rows), exact, 1e-5 if r > -80 else 1e-4)


@pytest.mark.parametrize("r", [100.0, float("nan")])
def test_what_is_no_number_stays_none(r):
    v, rows = torch.ones(1, 2, 2, 2), random_rows(1, 2)
    rows[:, 0, 0] = r
    out = evolve(v, rows)
    assert not out[..., 0].isfinite().any()
    assert out[..., 1].isfinite().all()


@pytest.mark.parametrize(
    ("v", "rows"),
    [((2, 4, 4, 3), (9, 3)), ((2, 4, 4, 3), (1, 9, 4)), ((2, 4, 4, 3), (3, 1, 9, 3)), ((4, 4, 3), (1, 9, 3))],
    ids=["axes", "channels", "images", "tokens"],
)  # fmt: skip
def test_memory_of_others_is_not_read(v, rows):
    with pytest.raises(ValueError, match="the kernels need float32"):
        evolve(torch.randn(v), torch.randn(rows))
    with pytest.raises(ValueError, match="the kernels need float32"):
        evolve(torch.randn(2, 4, 4, 3, dtype=f64), torch.randn(1, 9, 3, dtype=f64))


@pytest.mark.parametrize("grid", [(4, 131), (131, 4), (514, 4), (0, 4)], ids=str)
def test_sides_that_do_not_fit_are_named(grid):
    v, rows = torch.randn(1, *grid, 2), random_rows(1, 2)
    for run in (lambda: evolve(v, rows), lambda: evolve_backward(v, v, rows)):
        with pytest.raises(ValueError, match=f"from 1 to 512 .* above 127; they got {grid[0]} x {grid[1]} tokens"):
            run()


def test_as_custom_operators_they_keep_the_rules_of_torch_compile():
    v, rows = torch.randn(2, 3, 4, 5, requires_grad=True), random_rows(1, 5).requires_grad_()
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(cpu.evolve_op, (v, rows), test_utils=tests)
    torch.library.opcheck(cpu.evolve_backward_op, (torch.randn(2, 3, 4, 5), v, rows), test_utils="test_faketensor")
    mine = torch.autograd.grad(cpu.evolve_op(v, rows).square().sum(), (v, rows))
    torch.testing.assert_close(mine, evolve_backward(2 * evolve(v.detach(), rows.detach()), v.detach(), rows.detach()))


def test_functional_transforms_see_pytorchs_operations():
    equation, (v, dv) = PDESSM(4).equation, torch.randn(2, 2, 6, 5, 4)
    _, slope = torch.func.jvp(equation.evolve, (v,), (dv,))                # linear in v
    assert_close(slope, equation.evolve(dv), 1e-5)
    assert_close(torch.vmap(equation.evolve)(torch.stack([v, dv]))[1], slope, 1e-5)
    with forward_ad.dual_level():
        dual = equation.evolve(v, forward_ad.make_dual(torch.ones(2, 4), torch.ones(2, 4)))
        slope = forward_ad.unpack_dual(dual).tangent                       # along log tau
    later, earlier = (equation.evolve(v, torch.full((2, 4), scale)) for scale in (1.01, 0.99))
    assert_close(slope, (later - earlier) / 0.02, 1e-3)


@pytest.mark.parametrize(
    ("shape", "dtype"), [((1, 2, 131, 4), torch.float32), ((1, 2, 4, 514), torch.float32), ((1, 2, 3, 3), f64)], ids=str
)
def test_what_they_cannot_is_done_by_pytorch(shape, dtype):
    pde, u = PDESSM(2).to(dtype), torch.randn(shape, dtype=dtype)
    out = pde(u)
    pde_ssm.set_backend("torch")
    assert torch.equal(pde(u), out)
    pde_ssm.set_backend("cpp")
    with pytest.raises(ValueError, match=r"the backend is cpp, and its kernels are not for torch\.float.* of shape"):
        pde(u)


@pytest.mark.parametrize(
    ("backend", "options", "dtype"),
    [
        ("cpp", dict(coupling="pairwise"), f64),
        ("cpp", dict(coupling="coupled", groups=1), torch.float32),
        ("cpp", dict(conditioned=True), f64),
    ],
    ids=str,
)
def test_a_backend_by_name_is_that_or_an_error(backend, options, dtype):
    pde, u = PDESSM(40, **options).to(dtype), [torch.randn(2, 40, 4, 4, dtype=dtype)]
    u += [torch.randn(2, 40, dtype=dtype)] * pde.conditioned
    pde(*u)
    pde_ssm.set_backend(backend)
    with pytest.raises(ValueError, match=rf"the backend is {backend}, and its kernels are not .*set_backend\('auto'\)"):
        pde(*u)


@pytest.fixture
def builds(monkeypatch, tmp_path):
    """Another machine, with an empty cache: the sizes of the files that are built there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    build, sizes = building.build, []

    def watched(command, path):
        build(command, path)
        sizes.append(path.stat().st_size)

    monkeypatch.setattr(building, "build", watched)
    return sizes


def test_kernels_are_built_once_for_each_kind_of_processor(builds, tmp_path, monkeypatch):
    library = cpu.library.__wrapped__
    for _ in range(2):
        kernels, reason = library()
        assert reason is None
        assert kernels.evolve.argtypes
    assert len(builds) == 1
    monkeypatch.setattr(building, "processor", lambda: "another one")
    library()
    assert len(builds) == 2
    assert {path.suffix for path in (tmp_path / "cache").rglob("*")} == {"", ".so"}
    assert len(list((tmp_path / "cache" / "pde_ssm").iterdir())) == 2      # nothing is left of building them


def test_damaged_kernels_are_built_again(builds, tmp_path):
    library = cpu.library.__wrapped__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(building, "build", lambda _, path: path.parent.mkdir(parents=True) or path.write_bytes(b""))
        assert "file too short" in library()[1]
    assert library()[1] is None
    assert len(builds) == 1


def without_a_compiler(monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))


def with_another_program(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", f"{sys.executable} -c 'import sys; sys.exit(\"error: what?\")'")


def with_a_compiler_that_is_not_there(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "/no/compiler")


def with_quotes_that_do_not_close(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "g++ -DX='")


def with_a_cache_that_is_a_file(monkeypatch, tmp_path):
    (tmp_path / "cache").write_text("")


def with_a_broken_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(building, "build", lambda command, path: os.makedirs(path))


TROUBLES = {
    without_a_compiler: "there is no C\\+\\+ compiler: install g\\+\\+, or name another in CXX",
    with_another_program: "could not be built: error: what\\?",
    with_a_compiler_that_is_not_there: "could not be built: .*/no/compiler",
    with_quotes_that_do_not_close: "could not be built: No closing quotation; CXX names another",
    with_a_cache_that_is_a_file: "could not be built: .*cache",
    with_a_broken_cache: "could not be built: .*\\.so",
}


@pytest.mark.parametrize("trouble", TROUBLES, ids=lambda f: f.__name__)
def test_without_kernels_pytorch_does_the_work_and_says_why(builds, trouble, tmp_path, monkeypatch):
    pde, u = PDESSM(4), torch.randn(2, 4, 8, 6)
    pde_ssm.set_backend("torch")
    expected = pde(u)
    pde_ssm.set_backend("default")
    monkeypatch.setattr(cpu, "library", lambda found=[]: found or found.extend(LIBRARY()) or found)
    trouble(monkeypatch, tmp_path)
    with pytest.warns(UserWarning, match=f"{TROUBLES[trouble]}.*; PDEs on CPUs run by PyTorch's operations"):
        assert torch.equal(pde(u), expected)
    with pytest.raises(RuntimeError, match=TROUBLES[trouble]):
        evolve(torch.randn(1, 2, 2, 1), random_rows(1, 1))


LIBRARY = cpu.library.__wrapped__
