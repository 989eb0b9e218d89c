"""The selective scan against public numbers, its own equations and finite differences."""

import re
import sys
from functools import partial
from types import ModuleType

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from machine.cost import forward_flops
from mixers import selective_scan_cpu, selective_scan_mamba
from mixers.selective_scan import CHUNK, scan, scan_backward, selective_scan, selective_scan_reference
from pde_ssm_kernels import set_backend

KERNELS, REASON = selective_scan_cpu.library()
CASES = ["plain", "bare", "one", "grouped", "long", "stiff", "slow"]
INPUTS = ["u", "delta", "A", "B", "C", "D", "z", "delta_bias"]
BACKENDS = {"torch": (), "cpp": [pytest.mark.skipif(KERNELS is None, reason=str(REASON))]}
backends = pytest.mark.parametrize("backend", [pytest.param(name, marks=marks) for name, marks in BACKENDS.items()])


def random_inputs(batch, E, L, N, groups=None, dtype=torch.float64, everything=True):
    shape = (batch, N, L) if groups is None else (batch, groups, N, L)
    given = dict(u=torch.randn(batch, E, L), delta=torch.randn(batch, E, L), A=-torch.rand(E, N), B=torch.randn(shape))
    given |= dict(C=torch.randn(shape))
    if everything:
        given |= dict(D=torch.randn(E), z=torch.randn(batch, E, L), delta_bias=torch.randn(E))
    return {name: x.to(dtype).requires_grad_() for name, x in given.items()}


def values_and_gradients(function, given, delta_softplus=True):
    out, last = function(**given, delta_softplus=delta_softplus, return_last_state=True)
    weights = torch.linspace(1, 2, out.numel(), dtype=torch.float64).view_as(out)
    loss = (out * weights).sum() + last.square().sum()
    return [out, last, *torch.autograd.grad(loss, list(given.values()))]


def exactly(given, delta_softplus=True):
    given = {name: x.detach().double().requires_grad_() for name, x in given.items()}
    return values_and_gradients(selective_scan_reference, given, delta_softplus)


def assert_close(results, exact, of_largest):
    for mine, theirs in zip(results, exact):
        assert mine.shape == theirs.shape
        assert (mine - theirs).abs().max() <= of_largest * theirs.abs().max().clamp_min(1e-3)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("implementation", ["reference", *BACKENDS])
def test_public_numbers(golden, case, implementation):
    function = selective_scan_reference if implementation == "reference" else selective_scan
    set_backend("default" if implementation == "reference" else implementation)
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
@backends
def test_any_length_has_the_values_and_gradients_of_the_equations(L, groups, backend):
    set_backend(backend)
    given = random_inputs(2, 6, L, 3, groups)
    assert_close(values_and_gradients(selective_scan, given), exactly(given), 1e-11)


@pytest.mark.parametrize(
    ("E", "N", "groups"), [(1, 1, None), (16, 4, None), (37, 16, None), (70, 5, None), (150, 2, 2), (132, 7, 3)]
)  # whole vectors of channels and parts, one share of them and several; states by fours and one by one
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("everything", [False, True])
@backends
def test_any_number_of_channels_and_states(E, N, groups, dtype, everything, backend):
    set_backend(backend)
    given = random_inputs(2, E, 19, N, groups, dtype, everything)
    results = values_and_gradients(selective_scan, given, everything)
    assert {x.dtype for x in results} == {dtype}
    assert_close(results, exactly(given, everything), 3e-6 if dtype == torch.float32 else 1e-13)


@pytest.mark.parametrize(("scale", "less"), [(1e-4, 0), (1.0, 0), (1e2, 0), (1e4, 0), (1.0, 12)])
@backends
def test_slow_and_stiff_channels_in_float32(scale, less, backend):
    """exp(delta A) from one but for its last digits to none at all, also where softplus is a straight line, or next to none."""
    set_backend(backend)
    given = random_inputs(1, 20, 40, 4, dtype=torch.float32)
    with torch.no_grad():
        given["delta"] *= scale
        given["delta_bias"] -= less
    assert_close(values_and_gradients(selective_scan, given), exactly(given), 2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@backends
def test_its_exponential_is_as_good_as_its_exponent(dtype, backend):
    """Of two tokens, the first of which alone puts something in, the last state is exp(delta A)."""
    set_backend(backend)
    steps = torch.rand(1, 4000, 2, dtype=dtype) + 0.1
    steps[..., 0] = 1
    A = (60 * torch.rand(4000, 1) ** 4 * torch.randn(4000, 1).sign()).to(dtype)
    u, ones = torch.tensor([1.0, 0.0], dtype=dtype).expand_as(steps), torch.ones(1, 1, 2, dtype=dtype)
    _, last = selective_scan(u, steps, A, ones, ones, return_last_state=True)
    x = steps[0, :, 1:].double() * A.double()
    errors = (last[0] - x.exp()).abs() / x.exp()
    assert (errors <= 1.5 * (1 + x.abs()) * torch.finfo(dtype).eps).all()  # of which in float64 x itself has half a unit


@backends
def test_growth_beyond_what_numbers_hold_is_infinite_and_a_nan_stays_one(backend):
    set_backend(backend)
    given = random_inputs(1, 40, 20, 2, dtype=torch.float32, everything=False)
    with torch.no_grad():
        given["delta"].fill_(1)
        given["A"][3] = 200
        given["u"][0, 5, 7] = torch.nan
        given["delta"][0, 6, 7] = torch.nan
    out, last, *_ = values_and_gradients(selective_scan, given, delta_softplus=False)
    good = [e for e in range(40) if e not in (3, 5, 6)]
    assert not out[0, 3, 2:].isfinite().any()
    assert out[0, 5:7, 7:].isnan().all()
    assert last[0, 5:7].isnan().all()
    assert out[0, 5:7, :7].isfinite().all()
    assert out[0, good].isfinite().all()


@pytest.mark.parametrize("implementation", ["reference", *BACKENDS])
@pytest.mark.parametrize("L", [1, 16, 21])
def test_in_reverse_it_is_the_scan_of_the_tokens_in_reverse(implementation, L):
    function = selective_scan_reference if implementation == "reference" else selective_scan
    set_backend("default" if implementation == "reference" else implementation)
    given = random_inputs(2, 18, L, 3, 2)
    along = {name: x if name in ("A", "D", "delta_bias") else x.flip(-1) for name, x in given.items()}
    expected = selective_scan_reference(**along, delta_softplus=True, return_last_state=True)
    results = function(**given, delta_softplus=True, return_last_state=True, reverse=True)
    gradients = []
    for out, last in ((results[0].flip(2), results[1]), expected):
        weights = torch.linspace(1, 2, out.numel(), dtype=out.dtype).view_as(out)
        gradients.append([out, last, *torch.autograd.grad((out * weights).sum() + last.square().sum(), list(given.values()))])
    assert_close(*gradients, 1e-13)


def laid_out(x, order):
    """The same numbers, with the axes of that order one after the other in memory."""
    return x.detach().permute(order).contiguous().permute([order.index(axis) for axis in range(len(order))])


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (2, 0, 1)], ids=str)
@backends
def test_any_layout_has_the_same_values(order, backend):
    set_backend(backend)
    given = random_inputs(2, 37, 21, 3)
    expected = values_and_gradients(selective_scan, given)
    given = {name: laid_out(x, order) if x.ndim == 3 else x.detach() for name, x in given.items()}
    given["z"] = torch.cat([given["z"], given["z"]], dim=1)[:, 37:]          # a part of something larger
    given = {name: x.requires_grad_() for name, x in given.items()}
    results = values_and_gradients(selective_scan, given)
    assert_close(results, expected, 1e-14)
    assert results[0].stride() == given["delta"].stride()


@pytest.mark.skipif(KERNELS is None, reason=str(REASON))
def test_any_number_of_threads_has_the_same_bits(threads):
    given = random_inputs(3, 200, 50, 5, dtype=torch.float32)
    results = []
    for number in (1, 2, 3, 7):
        threads(number)
        results.append(values_and_gradients(selective_scan, given))
    assert all(torch.equal(x, y) for other in results[1:] for x, y in zip(results[0], other))


@backends
def test_a_batch_of_no_images_has_gradients_that_are_zero(backend):
    set_backend(backend)
    given = random_inputs(0, 6, 5, 3)
    out, last, *gradients = values_and_gradients(selective_scan, given)
    assert out.shape == (0, 6, 5)
    assert last.shape == (0, 6, 3)
    assert [x.shape for x in gradients] == [x.shape for x in given.values()]
    assert not any(x.any() for x in gradients)


def test_functions_of_torch_func_and_forward_mode_see_the_equations():
    given = {name: x.detach() for name, x in random_inputs(2, 4, 9, 3).items()}
    scan_of = partial(selective_scan, **given | dict(delta_softplus=True))
    slope = torch.randn(2, 4, 9, dtype=torch.float64)
    later, earlier = (scan_of(delta=given["delta"] + sign * 1e-6 * slope) for sign in (1, -1))
    _, mine = torch.func.jvp(lambda delta: scan_of(delta=delta), (given["delta"],), (slope,))
    torch.testing.assert_close(mine, (later - earlier) / 2e-6, rtol=1e-6, atol=1e-8)
    with forward_ad.dual_level():
        dual = scan_of(delta=forward_ad.make_dual(given["delta"], slope))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, mine)
    many = torch.vmap(lambda u: scan_of(u=u))(torch.stack([given["u"], slope]))
    torch.testing.assert_close(many[1], scan_of(u=slope))


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


def test_training_keeps_the_states_of_one_token_in_a_chunk_and_evaluation_none():
    given = random_inputs(1, 4, 70, 3, dtype=torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        selective_scan(**given, delta_softplus=True)
    inputs = sum(x.numel() for x in given.values())
    assert sum(kept) == inputs + -(-70 // CHUNK) * 4 * 3
    tensors = [x.detach() for x in (*given.values(),)]
    tensors[3], tensors[4] = tensors[3][:, None], tensors[4][:, None]
    assert [x.numel() for x in scan(*tensors, True, False, False)] == [4 * 70, 4 * 3, 0]


def test_to_compilers_it_is_one_operator():
    given = random_inputs(1, 4, 70, 3, dtype=torch.float32)
    operators = []

    def backend(graph, inputs):
        operators.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    compiled = torch.compile(selective_scan, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(**given), selective_scan(**given))
    assert sum("selective_scan" in name for name in operators) == 1
    assert len(operators) < 20


@pytest.mark.parametrize("everything", [False, True])
@backends
def test_the_operators_keep_the_rules_of_torch_compile(everything, backend):
    set_backend(backend)
    given = random_inputs(2, 4, 18, 3, 2, torch.float32, everything)
    given["delta"] = laid_out(given["delta"], (0, 2, 1)).requires_grad_()
    tensors = [given.get(name) for name in INPUTS]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    for reverse in (False, True):
        torch.library.opcheck(scan, (*tensors, True, reverse, True), test_utils=tests)
        out, last, before = scan(*tensors, True, reverse, True)
        torch.library.opcheck(scan_backward, (out, last, *tensors, True, reverse, before), test_utils=tests[::2])


@pytest.mark.parametrize("everything", [False, True])
def test_counters_of_operations_see_the_scan(everything):
    """Nine multiply-adds for each state, and one each for D and the gate; gradients count twice."""
    given = random_inputs(2, 6, 20, 5, 3, torch.float32, everything)
    count = 2 * (9 * 5 + 2 * everything) * 2 * 6 * 20
    assert forward_flops(lambda: selective_scan(**given)) == count
    assert forward_flops(lambda: selective_scan(**{name: x.to("meta") for name, x in given.items()})) == count
    with FlopCounterMode(display=False) as counter:
        selective_scan(**given).sum().backward()
    assert counter.get_total_flops() == 3 * count


@pytest.mark.parametrize("function", [selective_scan, selective_scan_reference])
def test_shapes_that_do_not_fit_are_named(function):
    given = random_inputs(1, 6, 5, 3, groups=4)
    with pytest.raises(ValueError, match=r"with G dividing E, .*; they are u \(1, 6, 5\) .* B \(1, 4, 3, 5\)"):
        function(**given)
    given = random_inputs(1, 6, 5, 3) | dict(A=torch.ones(6, 4))
    with pytest.raises(ValueError, match=r"they are .* A \(6, 4\) .* B \(1, 3, 5\)"):
        function(**given)


@pytest.mark.parametrize(
    "change",
    [
        dict(D=torch.ones(1)), dict(D=torch.ones(6, 1)), dict(delta_bias=torch.ones(3)), dict(z=torch.ones(6, 5)),
        dict(z=torch.ones(1, 6, 5)), dict(z=torch.ones(2, 5, 6)), dict(B=torch.ones(2, 0, 3, 5), C=torch.ones(2, 0, 3, 5)),
        dict(A=torch.ones(6, 3, dtype=torch.complex64)), dict(u=torch.ones(2, 6, 5, dtype=torch.int64)),
    ],
    ids=lambda change: " ".join(f"{name} {tuple(x.shape)} {x.dtype}" for name, x in change.items()),
)  # fmt: skip
@pytest.mark.parametrize("function", [selective_scan, selective_scan_reference])
def test_what_kernels_would_read_wrongly_is_refused(function, change):
    """Kernels take addresses: of a tensor of another shape they would read foreign memory."""
    name, found = next((name, x) for name, x in change.items())
    with pytest.raises(ValueError, match=rf"they are .*{name} {re.escape(str(tuple(found.shape)))} {str(found.dtype)[6:]}"):
        function(**random_inputs(2, 6, 5, 3) | change)


@backends
def test_tensors_that_are_negated_lazily(backend):
    """The imaginary part of a conjugate lies in memory with the opposite sign."""
    set_backend(backend)
    given = random_inputs(2, 6, 5, 3, dtype=torch.float32, everything=True)
    lazy = {name: torch.complex(x, -x).conj().imag for name, x in given.items()}
    assert all(x.is_neg() for x in lazy.values())
    torch.testing.assert_close(selective_scan(**lazy), selective_scan(**given))
    out = selective_scan(**given)
    lazy = torch.complex(out, -out).conj().imag.detach()
    found, expected = (torch.autograd.grad(out, given["u"], g, retain_graph=True)[0] for g in (lazy, lazy.resolve_neg()))
    torch.testing.assert_close(found, expected)


def test_without_kernels_pytorch_does_the_work_and_says_why(monkeypatch):
    given = random_inputs(1, 6, 5, 3)
    set_backend("torch")
    expected = selective_scan(**given)
    set_backend("default")
    monkeypatch.setenv("CXX", f"{sys.executable} /no/compiler")
    found = selective_scan_cpu.library.__wrapped__()
    monkeypatch.setattr(selective_scan_cpu, "library", lambda: found)
    with pytest.warns(UserWarning, match="kernels of mixers.selective_scan.cpp could not be built: .*; selective scans"):
        assert torch.equal(selective_scan(**given), expected)


@pytest.fixture
def mamba_ssm(monkeypatch):
    """mamba_ssm(function): that package, with this function, taken for tensors of CPUs."""

    def install(function):
        module = ModuleType("mamba_ssm.ops.selective_scan_interface")
        module.selective_scan_fn = function
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(selective_scan_mamba, "DEVICE", "cpu")
        monkeypatch.setattr(selective_scan_cpu, "serves", lambda u: False)

    selective_scan_mamba.agrees.cache_clear()
    yield install
    selective_scan_mamba.agrees.cache_clear()


def test_the_kernel_of_mamba_serves_once_it_agrees(mamba_ssm):
    lengths = []

    def theirs(u, *others, **options):
        lengths.append(u.shape[2])
        return selective_scan_reference(u, *others, **options)

    mamba_ssm(theirs)
    given = random_inputs(2, 6, 5, 3, dtype=torch.float32)
    for _ in range(2):
        out = selective_scan(**given, delta_softplus=True)
        assert_close([out], exactly(given), 1e-5)
    assert lengths == [77, 5, 5]                                           # compared once
    values_and_gradients(selective_scan, given)                            # it has no gradient of the last state
    selective_scan(**{name: x.double() for name, x in given.items()})
    assert lengths == [77, 5, 5]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("softplus", [False, True])
def test_the_kernel_of_mamba_computes_the_same_scan(mamba_ssm, softplus, reverse):
    lengths, how = [], dict(delta_softplus=softplus, reverse=reverse)
    mamba_ssm(lambda u, *others, **more: lengths.append(u.shape[2]) or selective_scan_reference(u, *others, **more))
    given = random_inputs(2, 6, 5, 3, dtype=torch.float32)
    torch.testing.assert_close(selective_scan(**given, **how), selective_scan_reference(**given, **how))
    assert lengths == [77, 5]
    set_backend("torch")
    selective_scan(**given, **how)
    assert lengths == [77, 5]  # nor where PyTorch's operations are asked for


@pytest.mark.parametrize(
    ("shape", "taken"),
    [
        ((2, 6, 5, 1, 3), True), ((0, 6, 5, 1, 3), False), ((2, 6, 5, 1, 256), True), ((2, 6, 5, 1, 257), False),
        ((1, 65_535, 5, 1, 1), True), ((1, 65_536, 5, 1, 1), False),
        ((2047, 256, 4096, 1, 1), True), ((2048, 256, 4096, 1, 1), False),
        ((1024, 512, 16, 256, 256), True), ((1024, 512, 64, 256, 256), False), ((4096, 4096, 16, 1, 128), False),
    ],
)  # fmt: skip
def test_the_kernel_of_mamba_gets_no_more_than_it_can_count(monkeypatch, shape, taken):
    """Images, channels, tokens, groups and states; the tensors take no memory."""
    monkeypatch.setattr(selective_scan_mamba, "DEVICE", "cpu")
    monkeypatch.setattr(selective_scan_mamba, "agrees", lambda *_: True)
    batch, E, L, groups, N = shape
    u, A, B = (torch.zeros(()).expand(some) for some in ((batch, E, L), (E, N), (batch, groups, N, L)))
    assert selective_scan_mamba.serves([u, u, A, B, B, None, None, None], None) == taken


def fails(*_, **__):
    raise RuntimeError("no kernel image\nfor this device")


TROUBLES = {
    "wrong values": (lambda *args, **options: 1.01 * selective_scan_reference(*args, **options), "differs .* by 1.0e-02"),
    "no number": (lambda *args, **options: selective_scan_reference(*args, **options) / 0 * 0, "differs .* by nan"),
    "wrong gradients": (
        lambda u, *others, **options: selective_scan_reference(u.detach() + 0.9 * (u - u.detach()), *others, **options),
        "differs .* by 1.0e-01",
    ),
    "failure": (fails, "fails: no kernel image; scans run by our own code"),
}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_a_kernel_of_mamba_that_does_not_agree_does_not_serve(trouble, mamba_ssm):
    function, warning = TROUBLES[trouble]
    given = random_inputs(2, 6, 5, 3, dtype=torch.float32)
    expected = selective_scan(**given)
    mamba_ssm(function)
    with pytest.warns(UserWarning, match=f"mamba_ssm's selective scan {warning}"):
        assert_close([selective_scan(**given)], [expected], 1e-6)


@pytest.mark.parametrize(
    ("error", "warned"),
    [
        (ModuleNotFoundError("No module named 'mamba_ssm'", name="mamba_ssm"), False),
        (ModuleNotFoundError("No module named 'einops'", name="einops"), True),
        (ImportError("selective_scan_cuda.so: undefined symbol: _ZN3c10"), True),
    ],
    ids=str,
)
def test_a_kernel_of_mamba_that_cannot_be_loaded_is_no_secret(mamba_ssm, monkeypatch, recwarn, error, warned):
    """One that is not there is none."""

    def load(name):
        raise error

    mamba_ssm(None)
    monkeypatch.setattr(selective_scan_mamba, "import_module", load)
    given = random_inputs(2, 6, 5, 3, dtype=torch.float32)
    for _ in range(2):
        selective_scan(**given)
    said = [f"mamba_ssm's selective scan fails: {error}; scans run by our own code"] * warned
    assert [str(warning.message) for warning in recwarn] == said
