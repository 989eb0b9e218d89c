"""The selective scan against public numbers, its own equations and finite differences."""

import pytest
import torch

from mixers.selective_scan import scan, scan_backward, selective_scan, selective_scan_reference

CASES = ["plain", "bare", "one", "grouped", "long", "stiff", "slow"]
INPUTS = ["u", "delta", "A", "B", "C", "D", "z", "delta_bias"]
both = pytest.mark.parametrize("function", [selective_scan, selective_scan_reference])


def random_inputs(batch, E, L, N, groups=None, dtype=torch.float64, everything=True):
    shape = (batch, N, L) if groups is None else (batch, groups, N, L)
    given = dict(u=torch.randn(batch, E, L), delta=torch.randn(batch, E, L), A=-torch.rand(E, N), B=torch.randn(shape))
    given |= dict(C=torch.randn(shape))
    if everything:
        given |= dict(D=torch.randn(E), z=torch.randn(batch, E, L), delta_bias=torch.randn(E))
    return {name: x.to(dtype).requires_grad_() for name, x in given.items()}


@pytest.mark.parametrize("case", CASES)
@both
def test_public_numbers(golden, case, function):
    stored = golden("selective_scan.npz")
    arrays = {name.removeprefix(f"{case}."): x for name, x in stored.items() if name.startswith(f"{case}.")}
    given = {name: arrays[name].double().requires_grad_() for name in INPUTS if name in arrays}
    out, last = function(**given, delta_softplus=bool(arrays["softplus"]), return_last_state=True)
    for mine, theirs in ((out, arrays["out"]), (last, arrays["last_state"])):
        assert (mine - theirs).abs().max() <= 1e-9 * theirs.abs().max()
    gradients = torch.autograd.grad((out * arrays["cotangent"]).sum(), list(given.values()))
    for name, mine in zip(given, gradients):
        if f"grad_{name}" in arrays:
            assert (mine - arrays[f"grad_{name}"]).abs().max() <= 1e-9 * arrays[f"grad_{name}"].abs().max()
        else:
            assert mine.norm() == pytest.approx(arrays[f"grad_norm_{name}"].item(), rel=1e-8)


@pytest.mark.parametrize("L", [1, 2, 15, 16, 17, 33])
@pytest.mark.parametrize("groups", [None, 1, 3])
def test_any_length_has_the_values_and_gradients_of_the_equations(L, groups):
    given = random_inputs(2, 6, L, 3, groups)
    results = []
    for function in (selective_scan, selective_scan_reference):
        out, last = function(**given, delta_softplus=True, return_last_state=True)
        weights = torch.linspace(1, 2, out.numel(), dtype=out.dtype).view_as(out)
        results.append([out, last, *torch.autograd.grad((out * weights).sum() + last.square().sum(), list(given.values()))])
    for mine, theirs in zip(*results):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_computes_in_float32_whatever_it_gets(dtype):
    given = random_inputs(2, 4, 40, 5, dtype=dtype)
    exact = selective_scan_reference(**{name: x.double() for name, x in given.items()}, delta_softplus=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = selective_scan(**given, delta_softplus=True)
    assert out.dtype == dtype
    assert (out - exact).abs().max() <= (1e-5 if dtype == torch.float32 else 2**-8) * exact.abs().max()
    out.float().sum().backward()
    assert all(x.grad.dtype == dtype for x in given.values())


def test_to_compilers_it_is_one_operator():
    given = random_inputs(1, 4, 70, 3, dtype=torch.float32)
    operators = []

    def backend(graph, inputs):
        operators.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    compiled = torch.compile(selective_scan, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(**given), selective_scan(**given))
    assert sum("selective_scan" in name for name in operators) == 1
    assert len(operators) < 60


def test_the_operators_keep_the_rules_of_torch_compile():
    L, batch, E, N, groups = 18, 2, 4, 3, 2
    delta, x = torch.rand(L, batch, E, requires_grad=True), torch.randn(L, batch, E, requires_grad=True)
    A, (B, C) = -torch.rand(E, N, requires_grad=True), torch.randn(2, L, batch, groups, N, requires_grad=True)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(scan, (delta, x, A, B, C), test_utils=tests)
    _, last, before = scan(delta, x, A, B, C)
    torch.library.opcheck(scan_backward, (x, last, delta, x, A, B, C, before), test_utils=tests[::2])


@both
def test_shapes_that_do_not_fit_are_named(function):
    given = random_inputs(1, 6, 5, 3, groups=4)
    with pytest.raises(ValueError, match=r"with G dividing E; they are u \(1, 6, 5\), .* B \(1, 4, 3, 5\)"):
        function(**given)
