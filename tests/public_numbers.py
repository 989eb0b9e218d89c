"""What public code computes of given weights and inputs, kept in golden/, and that a module of ours computes the same.

The arrays of a case: `state.<key>` the weights, `x`, `out`, `cotangent` (for the scalar sum(out * cotangent)), `grad_x`, and
`grad_norm.<key>`, the 2-norm of that scalar's gradient by each parameter. Public code computed them in float64.
"""

import pytest
import torch


def part(numbers, tag):
    """The arrays named `<tag>.<name>`, by name: a case of several in one file, or the weights of a case."""
    return {name.removeprefix(f"{tag}."): x for name, x in numbers.items() if name.startswith(f"{tag}.")}


def as_tokens(numbers):
    """A case whose pictures are (B, h, w, D), with tokens (B, N, D) instead, and its grid (h, w)."""
    pictures = {name: numbers[name].flatten(1, 2) for name in ("x", "out", "cotangent", "grad_x")}
    return numbers | pictures, tuple(numbers["x"].shape[1:3])


def assert_near(mine, theirs, bound=1e-9):
    """Apart by no more than that share of the largest entry."""
    assert mine.shape == theirs.shape
    assert (mine - theirs).abs().max() <= bound * theirs.abs().max()


def with_public_weights(module, numbers):
    """The module with the weights of a case, all of them and no others, in float64, and as in evaluation."""
    module.load_state_dict(part(numbers, "state"))
    return module.double().eval()


def assert_public(module, numbers, *more):
    """The module has the public outputs and gradients. more: what it takes besides x."""
    with_public_weights(module, numbers)
    x = numbers["x"].double().requires_grad_()
    out = module(x, *more)
    assert_near(out, numbers["out"])
    (out * numbers["cotangent"]).sum().backward()
    assert_near(x.grad, numbers["grad_x"])
    norms = {name: p.grad.norm().item() for name, p in module.named_parameters()}
    expected = {name: norm.item() for name, norm in part(numbers, "grad_norm").items()}
    assert norms == pytest.approx(expected, rel=1e-8, abs=0)


def shapes(module):
    """The names and shapes of a state dict, as public lists have them."""
    return {name: list(x.shape) for name, x in module.state_dict().items()}


def on_meta(build, *args, **options):
    """A module without its numbers, which takes no memory and next to no time."""
    with torch.device("meta"):
        return build(*args, **options)
