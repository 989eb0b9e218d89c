"""What every network promises, DiT aside, which has tests of its own."""

import re
from itertools import product

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from checkpoints.build import settings_from_weights
from commands import ROOT, draw
from models import MODELS, UNets, stride
from public_numbers import on_meta

NETWORKS = ["UNet-N", "LaMamba-N", "DiS-N/2", "U-ViT-N/2", "ZigMa-N/2"]


@pytest.fixture
def build(randomize):
    """build(name, **changes): a network without stochastic depth whose output depends on everything."""

    def network(name, **changes):
        model = MODELS[name](**dict(input_size=(8, 16), in_channels=3, num_classes=10) | changes)
        if model.random_numbers:
            model.drop_rates.zero_()
        return randomize(model)

    return network


@pytest.fixture(params=NETWORKS)
def network(request, build):
    return build(request.param).eval()


def inputs(n=2):
    return torch.randn(n, 3, 8, 16), torch.arange(n) * 300, torch.arange(n)


def test_the_baseline_has_about_the_papers_size():
    with torch.device("meta"):
        model = MODELS["UNet-S"](input_size=32, in_channels=3, num_classes=10, learn_sigma=False)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(32.6e6, rel=0.01)  # Table 1
    channels = {layer.to_q.out_features // layer.heads for layer in model.modules() if hasattr(layer, "to_q")}
    assert channels == {32}  # of a head, which no shape tells and trained weights rely on


def test_their_page_has_every_size_and_patch():
    found = re.findall(r"--model ([\w-]+-)\{(.+?)\}(?:(/)\{(.+?)\})?", (ROOT / "docs" / "systems.md").read_text())
    listed = {
        f"{family}{size}{slash}{patch}"
        for family, sizes, slash, patches in found
        for size, patch in product(sizes.split(","), patches.split(","))
    }
    families = "|".join(family for family, *_ in found)
    assert listed == {name for name in MODELS if re.fullmatch(rf"({families})[A-Z]+(/\d+)?", name)}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("num_classes", [0, 10])
def test_every_parameter_gets_a_gradient(build, name, num_classes):
    model = build(name, input_size=8, num_classes=num_classes)
    y = torch.zeros(4, dtype=torch.long)
    out = model(torch.randn(4, 3, 8, 8), torch.tensor([0, 3, 500, 999]), y, torch.zeros(4, dtype=torch.bool))
    assert out.shape == (4, 6, 8, 8)
    out.square().mean().backward()
    lacking = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert [name for name in lacking if not name.endswith("to_k.bias")] == []  # which a softmax over keys cancels


@torch.no_grad()
def test_outputs_depend_on_image_time_and_class(network):
    x, t, y = inputs()
    out = network(x, t, y)
    for other in (network(x + 1, t, y), network(x, t + 100, y), network(x, t, y + 1)):
        assert (other - out).abs().amax((1, 2, 3)).min() > 1e-4


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_dropped_classes_are_the_null_class(build, name):
    network, x, t, y = build(name, class_dropout_prob=1).eval(), *inputs()
    null = network(x, t, torch.full_like(y, 10))
    torch.testing.assert_close(network(x, t, y, torch.tensor([False, True]))[1], null[1])
    assert (network(x, t, y) - null).abs().amax((1, 2, 3)).min() > 1e-4  # nothing is dropped in evaluation
    for dropout in (m for m in network.modules() if isinstance(m, nn.Dropout)):
        assert dropout.p == 0
    torch.testing.assert_close(network.train()(x, t, y), null)


@torch.no_grad()
def test_guidance(network):
    x, t, y = inputs()
    both = network.forward_with_cfg(x.repeat(2, 1, 1, 1), t.repeat(2), torch.cat([y, torch.full_like(y, 10)]), 2.5)
    plain, null = network(x, t, y), network(x, t, torch.full_like(y, 10))
    torch.testing.assert_close(both[:2, :3], null[:, :3] + 2.5 * (plain - null)[:, :3], rtol=1e-4, atol=1e-4)


def test_guidance_of_each_image_in_half_precision():
    network, (x, t, y) = MODELS["DiT-N/4"]((8, 16), in_channels=3, num_classes=10).bfloat16().eval(), inputs()
    x, t, y = x.bfloat16().repeat(2, 1, 1, 1), t.repeat(2), torch.cat([y, torch.full_like(y, 10)])
    each = network.forward_with_cfg(x, t, y, torch.full((2, 1, 1, 1), 2.5))
    torch.testing.assert_close(each, network.forward_with_cfg(x, t, y, 2.5))


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_that_are_computed_twice_are_the_same(build, name):
    model, x, t, y = build(name), *inputs()
    found, called = [], []
    with register_module_forward_pre_hook(lambda *_: called.append(len(found))):
        for _ in range(2):
            model.zero_grad()
            model(x, t, y, torch.zeros(2, dtype=torch.bool)).square().mean().backward()
            found.append([p.grad for p in model.parameters()])
            model.checkpoint_gradients()
    for one, other in zip(*found):
        torch.testing.assert_close(one, other)
    assert called.count(1) > 1.3 * called.count(0)  # most layers again, for which less is kept


@pytest.mark.parametrize("name", NETWORKS)
def test_weights_tell_what_was_built(name):
    """Also without classes, and without learned variances."""
    for settings in (dict(num_classes=7), dict(num_classes=0, learn_sigma=False)):
        model = on_meta(MODELS[name], input_size=8, in_channels=3, **settings)
        expected = dict(model=name, mixer="attention", mixer_options={}, in_channels=3, learn_sigma=True)
        assert settings_from_weights(model.state_dict()) == expected | settings


@pytest.mark.parametrize("num_classes", [0, 1])
@pytest.mark.parametrize("name", NETWORKS[1:])
def test_bare_weights_of_a_square_are_sampled_at_any_size(tmp_path, build, name, num_classes):
    torch.save(build(name, input_size=8, num_classes=num_classes).state_dict(), tmp_path / "a.pt")
    for more, (height, width, _) in (([], (1, 1, 3)), (["--image-size", "8x16"], (1, 2, 3))):
        grid = draw(tmp_path / "a.pt", tmp_path / "a.png", "--objective", "diffusion", *more)
        assert grid.shape[0] * width == grid.shape[1] * height


@pytest.mark.parametrize("name", UNets)
def test_sides_must_be_divisible(name):
    assert stride(name) == 2 ** (len(MODELS[name].keywords["channels"]) - 1)
    with torch.device("meta"):
        model = MODELS[name](input_size=stride(name), in_channels=3)
        assert model.stride == stride(name)
        with pytest.raises(ValueError, match=f"8 x 9 is not divisible by {stride(name)}"):
            model.resize((8, 9))


@pytest.mark.parametrize(("name", "called"), [*zip(NETWORKS, ["a U-Net", "LaMamba", "DiS", "UViT", "ZigMa"])])
def test_there_is_no_mixer_to_swap(name, called):
    with pytest.raises(ValueError, match=f"^{called} has no mixer to swap, so mixer='pdessm' means nothing to it"):
        MODELS[name](input_size=8, mixer="pdessm")
