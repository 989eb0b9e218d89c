"""What evaluation keeps of a layer: never stale, never too much, nothing once training goes on."""

import copy
import weakref

import pytest
import torch
from diffusers.training_utils import EMAModel
from torch.nn.utils import prune
from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations

import pde_ssm
import train
from commands import fit
from pde_ssm import COUPLINGS, PDESSM
from pde_ssm_kernels import kept
from training import watching

couplings = pytest.mark.parametrize("coupling", COUPLINGS)


@couplings
def test_the_symbol_is_kept_for_inference(monkeypatch, coupling):
    pde_ssm.set_backend("torch")
    pde, computed = PDESSM(4, coupling=coupling).eval(), []
    tau = pde.equation.tau
    monkeypatch.setattr(pde.equation, "tau", lambda: computed.append(grid) or tau())
    with torch.no_grad():
        for grid in [(4, 4), (4, 4), (3, 5), (4, 4), (3, 5)]:
            pde(torch.randn(1, 4, *grid))
    assert computed == [(4, 4), (3, 5)]


@couplings
def test_kept_symbols_are_few(coupling):
    pde_ssm.set_backend("torch")
    pde = PDESSM(4, coupling=coupling).eval()
    with torch.no_grad():
        for n in range(1, 9):
            pde(torch.randn(1, 4, n, n))
    assert len(kept.of(pde.equation)) == kept.VALUES


def keep_something(coupling):
    """A layer that has kept its symbol, and a reference to that which does not hold it."""
    pde_ssm.set_backend("torch")
    pde = PDESSM(4, coupling=coupling).eval()
    with torch.no_grad():
        return pde, weakref.ref(pde.equation.symbol(4, 4))


@pytest.mark.parametrize("event", ["forward", "step", "train", "deleted"])
@couplings
def test_nothing_is_kept_once_training_goes_on(event, coupling):
    """Of no layer: an average of the weights, which is evaluated between steps, is never trained itself."""
    pde, symbol = keep_something(coupling)
    assert symbol() is not None
    other = PDESSM(4)
    if event == "forward":
        other(torch.randn(1, 4, 2, 2))
    elif event == "step":
        torch.optim.SGD(other.parameters()).step()
    elif event == "train":
        pde.train()
    else:
        del pde
    assert symbol() is None


@couplings
@torch.no_grad()
def test_what_all_layers_keep_has_a_limit(coupling, monkeypatch):
    pde_ssm.set_backend("torch")
    kept.forget()
    layers, u = [PDESSM(4, coupling=coupling).eval() for _ in range(3)], torch.randn(2, 4, 4, 4)
    limit = 2 * layers[0].equation.symbol(4, 4).nbytes
    kept.forget()
    monkeypatch.setattr(kept, "KEPT", limit)
    for _ in range(2):
        for pde in layers:
            torch.testing.assert_close(pde(u), copy.deepcopy(pde)(u))
        assert [len(kept.of(pde.equation)) for pde in layers] == [1, 1, 0]
        assert kept.bytes_kept() == limit
    for grid, left in [((4, 5), [("symbol", 4, 5)]), ((8, 4), [])]:        # another in place of the first; one too large
        layers[0](torch.randn(1, 4, *grid))
        assert list(kept.of(layers[0].equation)) == left
    del layers[0], pde
    layers[1](u)
    assert kept.bytes_kept() == limit


def test_training_keeps_nothing_of_what_it_evaluates(tmp_path, monkeypatch):
    sizes, draw_samples, update = [], watching.draw_samples, train.update
    monkeypatch.setattr(watching, "SAMPLING_STEPS", 2)
    monkeypatch.setattr(watching, "draw_samples", lambda *a: draw_samples(*a) or sizes.append(kept.bytes_kept()))
    monkeypatch.setattr(train, "update", lambda *a: sizes.append(kept.bytes_kept()) or update(*a))
    fit(tmp_path, "--mixer", "pdessm", "--global-batch-size", 4, "--max-steps", 2, "--sample-every", 1)
    assert [size > 0 for size in sizes] == [False, True, False, True]        # after each step, and gone in the next


@couplings
def test_an_ensemble_under_vmap_is_never_stale(coupling):
    models = [PDESSM(4, coupling=coupling).eval() for _ in range(3)]
    weights, _ = torch.func.stack_module_state(models)
    u = torch.randn(2, 4, 3, 5)
    with torch.no_grad():
        for scale in (1, 2):
            weights = {name: scale * w for name, w in weights.items()}
            outs = torch.vmap(lambda w: torch.func.functional_call(models[0], w, u))(weights)
            for i, model in enumerate(models):
                model.load_state_dict({name: w[i] for name, w in weights.items()})
                torch.testing.assert_close(outs[i], model(u), rtol=1e-4, atol=1e-5)


def change_parametrised(pde):
    register_parametrization(pde.equation, "log_tau", torch.nn.Identity())
    pde.equation.symbol(4, 6)
    pde.equation.parametrizations.log_tau.original.add_(0.1)
    fresh = type(pde.equation).symbol.__wrapped__(pde.equation, 4, 6)
    torch.testing.assert_close(pde.equation.symbol(4, 6), fresh, rtol=0, atol=0)
    remove_parametrizations(pde.equation, "log_tau")
    return pde


def compute_a_coefficient(pde):
    """As other people's code does that makes a parameter a function of something else."""
    log_tau = pde.equation.log_tau.clone()
    del pde.equation.log_tau
    for shift in (0, 0.5):
        pde.equation.log_tau = log_tau + shift
        found, fresh = pde.equation.symbol(4, 6), type(pde.equation).symbol.__wrapped__(pde.equation, 4, 6)
        torch.testing.assert_close(found, fresh, rtol=0, atol=0)
    del pde.equation.log_tau
    pde.equation.log_tau = torch.nn.Parameter(log_tau + shift)
    return pde


def change_in_place(pde):
    pde.equation.log_tau.add_(0.5)
    return pde


def step_optimiser(pde):
    for p in pde.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.AdamW(pde.parameters(), lr=0.1).step()
    return pde


def step_fused(pde, optimiser=torch.optim.AdamW):
    for p in pde.parameters():
        p.grad = torch.ones_like(p)
    optimiser(pde.parameters(), lr=0.1, fused=True).step()
    return pde


def step_fused_adam(pde):
    return step_fused(pde, torch.optim.Adam)


def step_fused_sgd(pde):
    return step_fused(pde, torch.optim.SGD)


def load_other_weights(pde):
    pde.load_state_dict(PDESSM(4, grid_size=(2, 2), coupling=pde.coupling).state_dict())
    return pde


def assign_other_weights(pde):
    pde.load_state_dict(PDESSM(4, grid_size=(2, 2), coupling=pde.coupling).state_dict(), assign=True)
    return pde


def replace_parameters(pde):
    for shift in (0.2, 0.3):  # the second may lie where the first one lay
        pde.equation.log_tau = torch.nn.Parameter(torch.full_like(pde.equation.log_tau, shift))
    return pde


def average_with_another(pde):
    torch._foreach_lerp_(list(pde.parameters()), list(PDESSM(4, grid_size=(2, 2), coupling=pde.coupling).parameters()), 0.5)
    return pde


def borrow_an_average(pde, foreach=False):
    """As diffusers does for validation."""
    average = EMAModel(PDESSM(4, grid_size=(2, 2), coupling=pde.coupling).parameters(), foreach=foreach)
    average.store(pde.parameters())
    average.copy_to(pde.parameters())
    return pde, average


def copy_an_average(pde):
    return borrow_an_average(pde)[0]


def copy_an_average_at_once(pde):
    return borrow_an_average(pde, foreach=True)[0]


def return_an_average(pde):
    pde, average = borrow_an_average(pde)
    pde.equation.symbol(4, 6)
    average.temp_stored_params[-1].add_(0.1)
    average.restore(pde.parameters())
    return pde


def swap_tensors(pde):
    for shift in (0.2, 0.3):
        torch.utils.swap_tensors(pde.equation.log_tau, torch.nn.Parameter(torch.full_like(pde.equation.log_tau, shift)))
    return pde


def replace_values(pde):
    for shift in (0.2, 0.3):  # the second may lie where the first one lay
        pde.equation.log_tau.data = torch.full_like(pde.equation.log_tau, shift)
    return pde


def write_in_inference_mode(pde):
    with torch.inference_mode():
        pde.equation.log_tau.add_(0.1)
    return pde


def go_through_half(pde):
    return pde.half().float()


def change_a_copy(pde):
    twin = copy.deepcopy(pde)
    for _ in range(5):
        twin.equation.log_tau.add_(0.1)
    return twin


def edit_behind_autograd(pde):
    pde.equation.log_tau.data.add_(0.5)
    return pde


def edit_and_say_so(pde):
    return edit_behind_autograd(pde).train().eval()


def edit_and_train(pde):
    edit_behind_autograd(pde)
    with torch.enable_grad():
        pde(torch.randn(1, 4, 2, 2))
    return pde


SEEN_BY_VALUE = [edit_behind_autograd, copy_an_average, copy_an_average_at_once, return_an_average]  # on CPUs
SEEN_ANYWHERE = [
    change_in_place, step_optimiser, step_fused, step_fused_adam, step_fused_sgd, load_other_weights, assign_other_weights,
    replace_parameters, replace_values, average_with_another, go_through_half, change_a_copy, change_parametrised,
    compute_a_coefficient, swap_tensors, write_in_inference_mode, edit_and_say_so, edit_and_train,
]  # fmt: skip


@pytest.mark.parametrize("change", SEEN_BY_VALUE + SEEN_ANYWHERE, ids=lambda f: f.__name__)
@couplings
@torch.no_grad()
def test_the_kept_symbol_is_never_stale(change, coupling, monkeypatch):
    if change in SEEN_ANYWHERE:
        monkeypatch.setattr(kept, "COMPARED", 0)
    pde = PDESSM(4, coupling=coupling).eval()
    pde.equation.log_tau.add_(0.1)
    before = pde.equation.symbol(4, 6)
    pde = change(pde)
    fresh = PDESSM(4, coupling=coupling)
    fresh.load_state_dict(pde.state_dict())
    after = pde.equation.symbol(4, 6)
    torch.testing.assert_close(after, fresh.equation.symbol(4, 6), rtol=0, atol=0)
    assert not torch.equal(after, before)


@couplings
def test_hooks_of_the_equation_run(coupling):
    pde, u = PDESSM(4, coupling=coupling), torch.randn(2, 4, 3, 5)
    prune.random_unstructured(pde.equation, "g0", 0.5)                     # computes g0 in a hook
    before, optimiser = pde.equation.g0.clone(), torch.optim.SGD(pde.parameters(), lr=0.01)
    for _ in range(2):
        optimiser.zero_grad()
        pde(u).square().mean().backward()
        optimiser.step()
    out = pde(u)
    assert not torch.equal(pde.equation.g0, before)
    prune.remove(pde.equation, "g0")
    torch.testing.assert_close(pde(u), out)


@torch.no_grad()
@couplings
def test_hooks_of_the_equation_see_every_state_in_evaluation(coupling):
    pde, seen = PDESSM(4, coupling=coupling).eval(), []
    pde.equation.register_forward_hook(lambda equation, inputs, state: seen.append(state))
    for _ in range(5):
        pde(torch.randn(3, 4, 3, 5))                                       # more images than channels
    assert [state.shape for state in seen] == [(3, 3, 5, 4)] * 5
