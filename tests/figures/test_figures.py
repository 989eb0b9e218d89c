"""The numbers in the pictures, against formulas."""

import json
import math

import pytest
import torch

from diffusion import create_objective
from figures import curves, drift, kernels, maps, reach, spectrum
from figures.layers import Layer, observe, time_at
from mixers import MIXERS
from models import MODELS
from pde_ssm import PDESSMBlock, green_symbol, receptive_field


def layer_of(mix, grid, prefix=0, dim=8, module=None):
    tokens = torch.randn(2, prefix + grid[0] * grid[1], dim)
    return Layer(module, mix, tokens, mix(tokens), grid, prefix)


@pytest.mark.parametrize("grid", [(64, 64), (48, 33)])
def test_a_gaussian_has_the_width_that_was_chosen_and_is_where_it_was_moved(grid):
    found = kernels.measure(kernels.green_function(grid, (0.08, 0.05), 90, (0.3, -0.45), -0.5))
    expected = dict(std_x=0.05, std_y=0.08, shift_x=0.3, shift_y=-0.45, sum=math.exp(-0.5))
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-6)


def test_a_gaussian_is_turned_from_right_to_down():
    kernel = kernels.green_function((32, 32), (0.1, 0.03), 45)
    assert kernel[3, 3] > 10 * kernel[3, -3]
    K = torch.tensor([[0.1**2 + 0.03**2, 0.1**2 - 0.03**2]] * 2).double() / 4
    K[1] = K[1].flip(0)
    zero = torch.zeros(3).double()
    assert torch.allclose(kernel, torch.fft.irfft2(green_symbol(K, zero[:2], zero[2], zero[2] + 1, 32, 32)))


@pytest.mark.parametrize(("grid", "prefix"), [((8, 8), 0), ((7, 6), 1)])
def test_a_shift_reaches_as_far_as_it_goes(grid, prefix):
    def shift(tokens):
        moved = tokens[:, prefix:].unflatten(1, grid).roll((2, -1), (1, 2)).flatten(1, 2)
        return torch.cat([tokens[:, :prefix], moved], 1)

    layer = layer_of(shift, grid, prefix)
    assert reach.reach_of(layer, 3).tolist() == pytest.approx([5**0.5] * 3)
    assert spectrum.gain_map(layer) == pytest.approx(torch.ones(grid).double(), abs=1e-3)


def test_a_mean_sees_all_tokens_alike():
    layer = layer_of(lambda tokens: tokens.mean(1, keepdim=True).expand_as(tokens), (6, 8))
    assert reach.reach_of(layer).tolist() == pytest.approx([reach.uniform_reach((6, 8))] * 8)
    assert spectrum.by_frequency(spectrum.gain_map(layer)) == pytest.approx(torch.tensor([1.0, 0, 0, 0]).double(), abs=1e-3)
    assert maps.map_of(layer).max() < 1e-5


def test_a_pde_reaches_as_far_as_its_kernel_and_has_the_gain_of_its_symbol():
    block = PDESSMBlock(8, grid_size=(8, 8)).requires_grad_(False).eval()
    layer = layer_of(block, (8, 8))
    assert torch.allclose(reach.reach_of(layer), receptive_field(block.pde.kernel(8, 8)), rtol=1e-4)
    block.pde.R.weight.copy_(torch.eye(8))
    for parameter in block.pde.equation.parameters():  # every channel has the PDE of the first
        parameter.copy_(parameter[:1].expand_as(parameter))
    symbol = green_symbol(*(x[0].double() for x in block.pde.coefficients()), 8, 8).abs()
    found = spectrum.gain_map(layer_of(block, (8, 8)))
    assert found[:, :5] == pytest.approx(symbol, abs=1e-3)
    assert spectrum.by_frequency(found)[0] == pytest.approx(symbol[0, 0].item(), abs=1e-3)


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_mixer_is_looked_at(mixer, randomize):
    model = randomize(MODELS["DiT-N/4"](input_size=16, in_channels=3, num_classes=2, mixer=mixer, depth=2)).eval()
    model.requires_grad_(False)
    _, layers = observe(model, create_objective("diffusion"), maps.disc(16).expand(2, -1, -1, -1), 1, 0.7)
    assert len(layers) == 2
    for layer in layers:
        assert torch.allclose(layer.mix(layer.tokens), layer.mixed, atol=1e-4)
        assert layer.grid == (4, 4)
        far = reach.reach_of(layer, 4)
        assert ((far >= 0) & (far <= 8**0.5 + 1e-4)).all()                 # half the diagonal
        gains = spectrum.by_frequency(spectrum.gain_map(layer))
        assert (gains >= 0).all()
        assert gains[0] > 0
        assert (reach.attention_distance(layer) is None) == (mixer != "attention")
        assert -1 <= maps.likeness(maps.disc(16), maps.map_of(layer)) <= 1


@pytest.mark.parametrize("name", ["LaMamba-N", "DiS-N/2", "U-ViT-N/2", "ZigMa-N/2"])
def test_layers_of_every_backbone_have_a_grid_and_a_reach(name):
    model = MODELS[name](input_size=16, in_channels=3, num_classes=2).eval().requires_grad_(False)
    _, layers = observe(model, create_objective("flow"), maps.disc(16)[None], 1, 0.7)
    for layer in layers:
        assert layer.prefix == (2 if name[:4] in ("DiS-", "U-Vi") else 0)
        assert layer.tokens.shape[1] == layer.prefix + layer.grid[0] * layer.grid[1]
        assert 0 <= reach.reach_of(layer, 1).item() <= 12
    if name == "LaMamba-N":
        assert len({layer.grid for layer in layers}) > 2


def test_a_network_without_mixers_is_named():
    with pytest.raises(ValueError, match="UNet has no mixers of tokens"):
        observe(MODELS["UNet-N"](16, in_channels=3), create_objective("diffusion"), maps.disc(16)[None], 0, 0.5)


def test_heads_that_look_at_all_tokens_alike_reach_as_a_mean_does():
    model = MODELS["DiT-N/4"](input_size=24, in_channels=3, num_classes=2, depth=1).eval()
    torch.nn.init.zeros_(model.blocks[0].attn.qkv.weight[:192])
    _, (layer,) = observe(model, create_objective("diffusion"), maps.disc(24)[None], 0, 0.5)
    assert reach.attention_distance(layer).tolist() == pytest.approx([reach.uniform_reach((6, 6))] * 3)


@torch.no_grad()
def test_heads_look_as_far_as_the_attention_of_the_middle_token_says(randomize):
    model, seen = randomize(MODELS["DiT-N/4"](input_size=24, in_channels=3, num_classes=2, depth=1)).eval(), []
    _, (layer,) = observe(model, create_objective("diffusion"), maps.disc(24).expand(2, -1, -1, -1), 0, 0.5)
    layer.module.fused_attn = False
    layer.module.attn_drop.register_forward_hook(lambda module, inputs, weights: seen.append(weights))
    layer.mix(layer.tokens)
    weights = seen[0][:, :, 3 * 6 + 3].mean(0).view(3, 6, 6).roll((-3, -3), (1, 2))
    torch.testing.assert_close(reach.attention_distance(layer), receptive_field(weights))


def test_frequencies_belong_to_the_nearest_ring():
    gains = torch.zeros(8, 8)
    gains[2, 6] = 1                                                        # of 2.83 cycles a picture
    assert spectrum.by_frequency(gains).gt(0).tolist() == [False, False, False, True, False]


@pytest.mark.parametrize("objective", ["diffusion", "flow"])
def test_images_are_noisy_as_in_training(objective):
    model, image = MODELS["DiT-N/4"](input_size=16, in_channels=3, num_classes=2, depth=1).eval(), maps.disc(16)[None]
    objective = create_objective(objective)
    shown = [observe(model, objective, image, 0, progress)[0] for progress in (0.05, 0.5, 0.95)]
    alike = [torch.corrcoef(torch.stack([x.flatten(), image.flatten()]))[0, 1] for x in shown]
    assert alike[0] < alike[1] - 0.05 < 0.8 < alike[2]
    for progress in (0, 0.2, 0.8, 1):
        t = time_at(objective, progress, image)
        assert objective.progress(getattr(objective, "time_scale", 1) * t) == pytest.approx(torch.tensor([progress]), abs=2e-3)


def test_a_map_of_the_contrast_itself_is_like_it():
    image = maps.disc(32)
    contrast = (image - image.mean((1, 2), keepdim=True)).norm(dim=0)
    assert maps.likeness(image, 3 * torch.nn.functional.avg_pool2d(contrast[None], 4)[0] - 1) == pytest.approx(1)
    assert maps.likeness(image, torch.ones(8, 8)) == 0


@pytest.mark.parametrize("coupling", ["diagonal", "pairwise", "coupled"])
def test_coefficients_that_moved(coupling):
    model = MODELS["DiT-N/4"](input_size=16, in_channels=3, num_classes=2, mixer="pdessm", coupling=coupling, depth=1)
    equation, (before,) = model.blocks[0].attn.pde.equation, drift.coefficients_of(model)
    equation.log_tau.data += math.log(4)
    (after,) = drift.coefficients_of(model)
    assert [len(values) for values in before.values()] == [96] * 5
    factors = dict(width=2, stretch=1, shift=4, tau=4)
    assert {name: (after[name] / before[name]).mean().item() for name in factors} == pytest.approx(factors, rel=1e-4)
    if coupling == "diagonal":
        standard = torch.logspace(math.log(0.5), 0, 96, base=math.e)       # in tokens: from half of one to a quarter of four
        assert before["width"].tolist() == pytest.approx(standard.tolist(), rel=1e-4)
        equation.log_ly.data += math.log(3)
        equation.r_slack.data.fill_(math.log(math.expm1(1.5)))             # r = -1/2
        (after,) = drift.coefficients_of(model)
        assert after["stretch"].tolist() == pytest.approx([3] * 96, rel=1e-4)
        assert after["growth"].tolist() == pytest.approx([-2] * 96, rel=1e-4)


def test_curves_are_of_losses_and_distances_that_are_finite(tmp_path):
    rows = [dict(step=2, loss=0.5, lr=0.1), dict(step=2, held_out_loss=None, held_out_mse=0.5), dict(step=2, fd64_a_256=7.0)]
    rows += [dict(step=4, loss=0.25), dict(step=4, held_out_loss=0.5), dict(step=4, fd64_a_256=None)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    expected = dict(loss=[(2, 0.5), (4, 0.25)], held_out_loss=[(4, 0.5)], fd64_a_256=[(2, 7.0)])
    assert curves.read_curves(tmp_path) == expected


def test_a_folder_without_losses_is_named(tmp_path):
    with pytest.raises(ValueError, match="is no folder of a run"):
        curves.read_curves(tmp_path)
