"""DiS and U-ViT against public numbers, and what is theirs alone; what every network promises is in test_backbones.py."""

import pytest
import torch
from torch.nn.functional import softplus

from backbones.dis import DiS
from backbones.uvit import UViT
from machine.cost import forward_flops
from models import MODELS
from public_numbers import assert_near, assert_public, on_meta, shapes

CASES = {"latent": dict(), "latent 64": dict(input_size=64), "pixels": dict(in_channels=3, num_classes=0)}
SMALL = dict(input_size=8, patch_size=2, in_channels=3, hidden_size=16, depth=4)


@pytest.mark.parametrize(
    ("case", "model"),
    [
        ("dis", lambda: DiS(8, 2, 4, 24, 4, 5)),
        ("dis_uncond", lambda: DiS(6, 2, 3, 16, 2, 0)),
        ("uvit", lambda: UViT(8, 2, 4, 24, 4, 3, 6, learn_sigma=False)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_public_numbers(golden, case, model):
    """At timesteps other than 0 they hang on how their machine rounds sines; see test_models.py."""
    numbers, model = golden(f"{case}.npz"), model()
    labels = numbers["y"] if len(numbers["y"]) else None
    assert_public(model, numbers, numbers["t"], labels)
    # The sines of float32 angles differ from one processor to another.
    assert_near(model(numbers["x"].double(), numbers["t2"], labels), numbers["out2"], 5e-5)
    if "cfg_x" in numbers:
        x, t, y, scale = (numbers[f"cfg_{name}"] for name in ("x", "t", "y", "scale"))
        assert_near(model.forward_with_cfg(x.double(), t, y, scale.item()), numbers["cfg_out"])


@pytest.mark.parametrize("name", [f"DiS-{size}/{patch}" for size in "SBMLH" for patch in (2, 4)])
def test_sizes_of_dis(golden, name):
    public = golden("systems.json")
    for case, expected in public["dis"][name].items():
        model = on_meta(MODELS[name], **CASES[case])
        assert sum(p.numel() for p in model.parameters()) == expected["parameters"]
        assert len(model.state_dict()) == expected["state_entries"]
        if case == "latent" and name in public["state_shapes"]:
            assert shapes(model) == public["state_shapes"][name]


def test_sizes_of_uvit(golden):
    """Public code counts the null class, where there is one, as a class."""
    for name, expected in golden("systems.json")["uvit"].items():
        options = dict(num_classes=max(expected["num_classes"] - 1, 0), learn_sigma=False)
        options |= {option: expected[option] for option in ("input_size", "in_channels")}
        model = on_meta(MODELS[name.split()[0]], **options)
        assert sum(p.numel() for p in model.parameters()) == expected["parameters"]
        heads = dict(H=16, L=16, M=12, S=8)[name.removeprefix("U-ViT-").partition("/")[0]]  # of which no shape tells
        assert {block.attn.num_heads for block in model.blocks} == {heads}


@pytest.mark.parametrize("name", ["DiS-S/2", "U-ViT-H/2"])
def test_multiply_adds(golden, name):
    """Public code lets the convolutions before DiS's 50 scans, of 736 channels, run over 3 tokens more."""
    model, public = on_meta(MODELS[name], learn_sigma=name == "DiS-S/2").eval(), golden("systems.json")
    x, t = torch.empty(1, 4, 32, 32, device="meta"), torch.empty(1, device="meta")
    counted = forward_flops(model, x, t, torch.zeros(1, dtype=torch.long, device="meta")) / 2e9
    if name == "DiS-S/2":
        expected = public["dis"][name]["latent"]["gmacs_with_scan"] - 50 * 736 * 4 * 3 / 1e9
    else:
        expected = public["uvit"][f"{name} imagenet256"]["gmacs"]
    assert counted == pytest.approx(expected, rel=1e-5)


def test_time_steps_of_dis_start_as_its_public_code_has_them():
    """Those of the second direction at softplus(0)."""
    model = DiS(**SMALL)
    for block in model.blocks:
        steps = softplus(block.mixer.dt_proj.bias)
        assert 1e-3 < steps.min() < steps.max() < 0.1001
        assert not block.mixer.dt_proj_b.bias.any()
        assert block.mixer.out_proj.weight.abs().max() < 32**-0.5 / 2      # nn.Linear's bound, by the root of 4 blocks


def test_initial_weights_of_uvit_are_those_of_vision_transformers():
    model = UViT(**SMALL | dict(hidden_size=64))
    block = model.out_blocks[0]
    for weight in (block.skip_linear.weight, block.attn.qkv.weight, model.label_emb.weight, model.pos_embed):
        assert weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not any(layer.bias.any() for layer in (block.skip_linear, block.mlp.fc1, model.decoder_pred))


@torch.no_grad()
def test_skips_carry_what_a_block_returned_and_come_back_last_first():
    """Of five blocks the first one's reaches the last, and the second one's the last but one."""
    model, passed, came = DiS(**SMALL).eval(), [], []
    for block in model.blocks:
        block.register_forward_hook(lambda block, inputs, output: came.append(inputs[2]) or passed.append(output[0]))
    model(torch.randn(2, 3, 8, 8), torch.zeros(2), torch.zeros(2, dtype=torch.long))
    assert came[:3] == [None] * 3
    assert came[3] is passed[1]
    assert came[4] is passed[0]


@torch.no_grad()
def test_stochastic_depth_leaves_out_inputs_of_blocks_by_the_numbers_given():
    """At a rate that rises to a tenth; what stays is divided by its probability. Evaluation leaves nothing out."""
    model = DiS(**SMALL)
    assert model.random_numbers == 6
    rates = torch.tensor([0, 0, 0.1 / 3, 0.2 / 3, 0.1, 0.1])
    torch.testing.assert_close(model.drop_rates, rates)
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda block, inputs, output: seen.append(inputs[3][:, 0, 0]))
    inputs = torch.randn(2, 3, 8, 8), torch.zeros(2), torch.zeros(2, dtype=torch.long), torch.zeros(2, dtype=torch.bool)
    chance = torch.tensor([[0.05] * 6, [0.5] * 6])
    out = model.train()(*inputs, chance)
    torch.testing.assert_close(torch.stack(seen, 1), (chance[:, :5] >= rates[:5]) / (1 - rates[:5]))
    torch.testing.assert_close(out[1], model(*(x[1:] for x in inputs), chance[1:])[0])     # each image by its own
    assert not torch.equal(model(*inputs), model(*inputs))                 # numbers of its own, unless given
    model.drop_rates.zero_()
    out = model(*inputs, chance)
    model.eval()
    for block in model.blocks:
        block._forward_hooks.clear()
    torch.testing.assert_close(model(*inputs, chance), out)


@pytest.mark.parametrize("build", [DiS, UViT])
@torch.no_grad()
def test_positions_keep_their_place_in_the_picture(build):
    """On three times the rows every third has the place of an old one; extra tokens have none."""
    model = build(**SMALL, num_classes=2)
    model.pos_embed.normal_()
    trained = model.positions()
    finer = model.resize((24, 8)).positions()
    rows, finer_rows = trained[:, 2:].unflatten(1, (4, 4)), finer[:, 2:].unflatten(1, (12, 4))
    torch.testing.assert_close(finer_rows[:, 1::3], rows, rtol=1e-5, atol=1e-5)
    assert torch.equal(finer[:, :2], trained[:, :2])
    assert model(torch.randn(1, 3, 24, 8), torch.zeros(1), torch.zeros(1, dtype=torch.long)).shape == (1, 6, 24, 8)
    assert torch.equal(model.resize(8).positions(), trained)
