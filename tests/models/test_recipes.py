"""Parts that DiT has by choice: norms of queries and keys, places as angles, a gated MLP, the norm by the root mean square."""

import pytest
import torch

from checkpoints.build import load_model
from checkpoints.read import load_checkpoint
from commands import draw, fit
from mixers.attention import build, rotations
from models import MLPS, MODELS, DiT

f64 = torch.float64
SIZE = dict(input_size=16, in_channels=3, num_classes=10)


def scores(layer, x):
    """The scores of one token with another before the softmax, (B, heads, N, N), as they reach PyTorch's attention."""
    seen = []

    def attend(q, k, v, **_):
        seen.append(q @ k.mT)
        return v

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.nn.functional.scaled_dot_product_attention", attend)
        layer(x)
    return seen[0]


@pytest.mark.parametrize("qk_norm", [False, True])
@torch.no_grad()
def test_scores_of_rope_depend_on_differences_of_places_alone(qk_norm):
    """All tokens are alike, so that nothing but their places can tell two scores apart."""
    layer = build(32, 2, True, grid_size=(3, 5), qk_norm=qk_norm, positions="rope")
    found = scores(layer, torch.randn(1, 1, 32).expand(1, 15, 32))[0].view(2, 3, 5, 3, 5)
    torch.testing.assert_close(found[:, 1:, 2:, 1:, 2:], found[:, :-1, :-2, :-1, :-2], rtol=1e-4, atol=1e-4)
    first = found[:, 0, 0]  # of the token in the corner with every other: by row and by column
    assert (first - first[:, :1, :1]).abs().flatten(1)[:, 1:].min() > 1e-4


@torch.no_grad()
def test_rope_leaves_tokens_off_the_grid_as_they_are():
    """They come first; what the others are to one another is what it is without them."""
    layer, x = build(32, 2, True, grid_size=(3, 5), positions="rope", prefix_tokens=2), torch.randn(1, 17, 32)
    plain, alone = build(32, 2, True), build(32, 2, True, grid_size=(3, 5), positions="rope")
    for other in (plain, alone):
        other.load_state_dict(layer.state_dict())
    found = scores(layer, x)
    torch.testing.assert_close(found[:, :, :2, :2], scores(plain, x[:, :2]))
    torch.testing.assert_close(found[:, :, 2:, 2:], scores(alone, x[:, 2:]))


@torch.no_grad()
def test_rope_keeps_places_in_the_picture_on_other_grids():
    layer = build(32, 2, True, grid_size=(4, 6), positions="rope")
    x = torch.randn(1, 1, 32)
    coarse = scores(layer, x.expand(1, 24, 32)).view(2, 4, 6, 4, 6)
    layer.grid_size = (8, 12)
    fine = scores(layer, x.expand(1, 96, 32)).view(2, 8, 12, 8, 12)
    torch.testing.assert_close(fine[:, ::2, ::2, ::2, ::2], coarse, rtol=1e-4, atol=1e-4)
    turned = rotations((8, 12), (4, 6), 16, x)
    torch.testing.assert_close(turned[:, :16] ** 2 + turned[:, 16:] ** 2, torch.ones(96, 16))


def test_angles_of_rope_per_token_fall_from_1_to_a_hundredth():
    """Geometrically; a half of the channels turns by column, and the other one by row, which is the same here."""
    turned = rotations((1, 2), (1, 2), 16, torch.empty(0))
    angles = torch.atan2(turned[:, :16], turned[:, 16:]).diff(dim=0)[0].sort(descending=True).values
    expected = torch.tensor([100 ** (-i / 4) for i in range(4)]).repeat_interleave(2)
    torch.testing.assert_close(angles, torch.cat([expected, torch.zeros(8)]), rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_norms_of_queries_and_keys_bound_the_scores():
    layer = build(32, 2, True, qk_norm=True)
    x = torch.randn(2, 9, 32)
    layer.qkv.bias.zero_()
    torch.testing.assert_close(scores(layer, 100 * x), scores(layer, x), rtol=1e-3, atol=1e-3)
    assert scores(layer, 100 * x).abs().max() <= 16 * 1.001  # 16 channels a head, each of mean square 1
    with torch.autocast("cpu", torch.bfloat16):
        q = layer.q_norm(torch.full((1, 2, 9, 16), 300.0, dtype=torch.bfloat16))
    assert q.dtype == torch.bfloat16
    assert (q == 1).all()


@pytest.mark.parametrize("dim", [64, 96, 128, 192, 384, 512, 768, 1024, 1152])
def test_a_gated_mlp_has_as_many_parameters(dim):
    with torch.device("meta"):
        counts = [sum(p.numel() for p in build(dim, 4 * dim).parameters()) for build in MLPS.values()]
    assert counts[1] == pytest.approx(counts[0], rel=5e-3)


@torch.no_grad()
def test_a_gated_mlp_by_its_formula():
    mlp, x = MLPS["swiglu"](12, 48).to(f64), torch.randn(5, 12, dtype=f64)
    gate, value = mlp.fc1_g(x), mlp.fc1_x(x)
    torch.testing.assert_close(mlp(x), (gate / (1 + (-gate).exp()) * value) @ mlp.fc2.weight.T + mlp.fc2.bias)


@torch.no_grad()
def test_the_norm_by_root_mean_square_keeps_the_mean(randomize):
    """A constant added to all channels of every token changes nothing for the norm by deviation, and much for the other."""
    differences = {}
    for norm in ("layer", "rms"):
        model = randomize(DiT(8, 4, 3, 32, 1, 2, norm=norm, num_classes=10)).eval()
        last, c = model.final_layer, torch.randn(1, 32)
        x = torch.randn(1, 4, 32)
        differences[norm] = (last(x + 3, c) - last(x, c)).abs().max()
    assert differences["layer"] < 1e-4 < 0.1 < differences["rms"]


FLAGS = ["--qk-norm", "--positions", "rope", "--mlp", "swiglu", "--norm", "rms"]


def test_all_of_it_from_training_to_samples_of_another_size(tmp_path, shallow):
    how = ["--max-steps", 2, "--global-batch-size", 8, "--lr", 1e-2, "--precision", "bf16", *FLAGS]
    path = fit(tmp_path, *how) / "checkpoints" / "0000002.pt"
    model, settings = load_model(path, {}, "ema")
    assert (settings["mlp"], settings["norm"]) == ("swiglu", "rms")
    assert settings["mixer_options"] == dict(qk_norm=True, positions="rope")
    assert not model.pos_embed.any()
    weights, stored = load_checkpoint(path)
    assert stored["qk_norm"]
    assert stored["positions"] == "rope"
    assert draw(path, tmp_path / "a.png", "--class-labels", 3, "--image-size", "8x16").shape[:2] == (64, 128)
    torch.save(weights, tmp_path / "bare.pt")  # without what train.py was told
    settings = load_model(tmp_path / "bare.pt", {}, "ema")[1]
    assert settings["mixer_options"] == dict(qk_norm=True, positions="rope")
    assert settings["mlp"] == "swiglu"


def test_a_model_with_rope_takes_no_places_from_another(tmp_path):
    flags = ["--max-steps", 1, "--global-batch-size", 8]
    first = fit(tmp_path / "1", *flags) / "checkpoints" / "0000001.pt"
    second = fit(tmp_path / "2", *flags, "--positions", "rope", "--init-from", first) / "checkpoints" / "0000001.pt"
    assert not load_checkpoint(second)[0]["pos_embed"].any()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mixer", "pdessm", "--qk-norm"], "--qk-norm means nothing to --mixer pdessm"),
        (["--mixer", "pdessm", "--positions", "rope"], "--positions means nothing to --mixer pdessm"),
        (["--model", "UNet-N", "--mlp", "swiglu", "--qk-norm"], "--mlp, --qk-norm means nothing to --model UNet-N"),
        (["--model", "LaMamba-N", "--norm", "rms"], "--norm means nothing to --model LaMamba-N"),
        (["--model", "UNet-N", "--mixer", "pdessm", "--pde-attention-every", 2], "-every means nothing to --model UNet-N"),
    ],
)
def test_what_means_nothing_is_refused(tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, "--max-steps", 1, "--global-batch-size", 8, *flags)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"rope needs heads of 4, 8, 12 \.\.\. channels; here they have 6"):
        build(12, 2, positions="rope")
    with pytest.raises(ValueError, match="mixer pdessm has no option qk_norm"):
        MODELS["DiT-N/4"](**SIZE, mixer="pdessm", qk_norm=True)
