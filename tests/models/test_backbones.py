"""What every network promises, DiT aside, which has tests of its own."""

import pytest
import torch
from torch import nn

from models import MODELS, UNets, stride


@pytest.fixture
def unet():
    return MODELS["UNet-N"](input_size=(8, 12), in_channels=3, num_classes=10).eval()


def inputs(n=2):
    return torch.randn(n, 3, 8, 12), torch.arange(n) * 300, torch.arange(n)


def test_the_baseline_has_about_the_papers_size():
    with torch.device("meta"):
        model = MODELS["UNet-S"](input_size=32, in_channels=3, num_classes=10, learn_sigma=False)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(32.6e6, rel=0.01)  # Table 1


@pytest.mark.parametrize("num_classes", [0, 10])
def test_every_parameter_gets_a_gradient(num_classes):
    model = MODELS["UNet-N"](input_size=8, in_channels=3, num_classes=num_classes)
    y = torch.zeros(4, dtype=torch.long)
    out = model(torch.randn(4, 3, 8, 8), torch.tensor([0, 3, 500, 999]), y, torch.zeros(4, dtype=torch.bool))
    assert out.shape == (4, 6, 8, 8)
    out.square().mean().backward()
    lacking = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert [name for name in lacking if not name.endswith("to_k.bias")] == []  # which a softmax over keys cancels


@torch.no_grad()
def test_outputs_depend_on_image_time_and_class(unet):
    x, t, y = inputs()
    out = unet(x, t, y)
    for other in (unet(x + 1, t, y), unet(x, t + 100, y), unet(x, t, y + 1)):
        assert (other - out).abs().amax((1, 2, 3)).min() > 1e-4


@torch.no_grad()
def test_dropped_classes_are_the_null_class(unet):
    x, t, y = inputs()
    null = unet(x, t, torch.full_like(y, 10))
    torch.testing.assert_close(unet(x, t, y, torch.tensor([False, True]))[1], null[1])
    assert torch.equal(unet(x, t, y), unet(x, t, y))  # nothing is dropped in evaluation
    unet.class_dropout_prob = 1
    for dropout in (m for m in unet.modules() if isinstance(m, nn.Dropout)):
        assert dropout.p == 0
    torch.testing.assert_close(unet.train()(x, t, y), null)


@torch.no_grad()
def test_guidance(unet):
    x, t, y = inputs()
    both = unet.forward_with_cfg(x.repeat(2, 1, 1, 1), t.repeat(2), torch.cat([y, torch.full_like(y, 10)]), 2.5)
    plain, null = unet(x, t, y), unet(x, t, torch.full_like(y, 10))
    torch.testing.assert_close(both[:2, :3], null[:, :3] + 2.5 * (plain - null)[:, :3], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", UNets)
def test_sides_must_be_divisible(name):
    assert stride(name) == 2 ** (len(MODELS[name].keywords["channels"]) - 1)
    with torch.device("meta"):
        model = MODELS[name](input_size=stride(name), in_channels=3)
        assert model.stride == stride(name)
        with pytest.raises(ValueError, match=f"8 x 9 is not divisible by {stride(name)}"):
            model.resize((8, 9))


def test_there_is_no_mixer_to_swap():
    with pytest.raises(ValueError, match="a U-Net has no mixer to swap"):
        MODELS["UNet-N"](input_size=8, mixer="pdessm")
