"""Weights of another network as the beginning of a run."""

import pytest
import torch

from checkpoint_files import PIXELS, write_as
from checkpoints.build import initialize
from checkpoints.read import load_checkpoint
from commands import draw, fit
from models import MODELS, DiT_models


def filled(model, start):
    """Every weight another number."""
    with torch.no_grad():
        for number, value in enumerate(model.state_dict().values(), start):
            value.fill_(number)
    return model


def saved(path, model):
    torch.save(dict(model={}, ema=model.state_dict()), path)
    return path


def test_fine_tuning_with_other_classes_keeps_all_but_their_table(tmp_path):
    old = filled(DiT_models["DiT-N/4"](**PIXELS), 1000)
    new = filled(DiT_models["DiT-N/4"](**PIXELS | dict(num_classes=3)), 0)
    report = initialize(new, saved(tmp_path / "a.pt", old))
    table = "y_embedder.embedding_table.weight"
    for name, value in new.state_dict().items():
        if name != table:
            assert torch.equal(value, old.state_dict()[name]), name
    assert (new.state_dict()[table][:3] < 1000).all()
    assert torch.equal(new.state_dict()[table][3], old.state_dict()[table][10])
    assert report[1:] == [f"... not {table}, which is (11, 96) there and (4, 96) here; the null class is kept"]
    count = len(old.state_dict())
    assert report[0].endswith(f"a.pt: {count - 1} of the model's {count} tensors")


@pytest.mark.parametrize(
    ("now", "rows"),
    [
        (["ant", "cat", "dog"], [-1, 0, 1, 3]), (["dog", "owl"], [1, 2, 3]), (["cat", "dog", "owl", "pig"], [0, 1, 2, -1, 3]),
        (["tabby", "dog", "owl"], [0, 1, 2, 3]), (["a", "b", "c"], [0, 1, 2, 3]),
    ],
    ids=str,
)  # fmt: skip
def test_classes_keep_their_rows_by_name(tmp_path, now, rows):
    """-1 stands for a row that is initial. Where no class that both name has moved, numbers decide."""
    table = "y_embedder.embedding_table.weight"
    old = filled(DiT_models["DiT-N/4"](**PIXELS | dict(num_classes=3)), 1000)
    new = filled(DiT_models["DiT-N/4"](**PIXELS | dict(num_classes=len(now))), 0)
    with torch.no_grad():
        old.y_embedder.embedding_table.weight.copy_(torch.arange(1000.0, 1004.0)[:, None].expand(4, 96))
        new.y_embedder.embedding_table.weight.fill_(999)
    torch.save(dict(ema=old.state_dict(), args=dict(class_names=["cat", "dog", "owl"])), tmp_path / "a.pt")
    report = initialize(new, tmp_path / "a.pt", dict(class_names=now))
    assert (new.state_dict()[table] - 1000).unique(dim=1).flatten().tolist() == rows
    kept = sum(0 <= row < 3 for row in rows)
    sizes = f"(4, 96) there and ({len(rows)}, 96) here; the null class is kept, and {kept} of the same names"
    assert report[1:] == [f"... not {table}, which is {sizes}"] * (rows != [0, 1, 2, 3])


@pytest.mark.parametrize(
    ("before", "after", "options"),
    [
        ("attention", "pdessm", {}), ("pdessm", "attention", {}), ("attention", "pdessm", dict(gate=True)),
        ("attention", "window", {}), ("vim", "ss2d", {}),
    ],
)
def test_a_mixer_of_another_kind_is_initial_whole(tmp_path, before, after, options):
    old = filled(DiT_models["DiT-N/4"](**PIXELS, mixer=before), 1000)
    new = filled(DiT_models["DiT-N/4"](**PIXELS, mixer=after, **options), 0)
    report = initialize(new, saved(tmp_path / "a.pt", old))
    mixing = {name for name in new.state_dict() if ".attn." in name}
    for name, value in new.state_dict().items():
        assert torch.equal(value < 1000, torch.full(value.shape, name in mixing)), name
    assert len(report) == 3
    key = {
        "attention": "blocks.*.attn.qkv.weight (6)", "pdessm": "blocks.*.attn.pde.equation.g0 (6)",
        "window": "blocks.*.attn.relative_position_bias_table", "vim": "blocks.*.attn.A_log", "ss2d": "blocks.*.attn.A_logs",
    }  # fmt: skip
    assert report[1].startswith("... not there, and initial: ")
    assert key[after] in report[1]
    assert report[2].startswith("... there, and not taken: ")
    assert key[before] in report[2]


@pytest.mark.parametrize(("before", "after"), [(dict(positions="rope"), {}), ({}, dict(positions="rope"))], ids=str)
def test_places_that_are_added_are_not_those_of_rotations(tmp_path, before, after):
    old, new = (DiT_models["DiT-N/4"](**PIXELS, **options) for options in (before, after))
    added = new.pos_embed.clone()
    report = initialize(new, saved(tmp_path / "a.pt", old))
    assert torch.equal(new.pos_embed, added)
    assert report[1].startswith("... not pos_embed")


def test_an_option_more_of_the_same_mixer_leaves_the_rest_as_it_was(tmp_path):
    old = filled(DiT_models["DiT-N/4"](**PIXELS, mixer="pdessm"), 1000)
    new = filled(DiT_models["DiT-N/4"](**PIXELS, mixer="pdessm", gate=True), 0)
    initialize(new, saved(tmp_path / "a.pt", old))
    kept = {name for name, value in new.state_dict().items() if (value >= 1000).all()}
    assert kept == new.state_dict().keys() & old.state_dict().keys()


def test_the_attention_of_a_hybrid_is_of_the_kind_of_attention(tmp_path):
    old = filled(DiT_models["DiT-N/4"](**PIXELS), 1000)
    new = filled(DiT_models["DiT-N/4"](**PIXELS, mixer="pdessm-gla"), 0)
    initialize(new, saved(tmp_path / "a.pt", old))
    taken = {name for name, value in new.state_dict().items() if ".attn." in name and (value >= 1000).all()}
    assert taken == {name for name in new.state_dict() if name.startswith("blocks.3.attn.")}


def test_what_weights_were_trained_for_is_said_where_it_differs(tmp_path):
    path = tmp_path / "a.pt"
    model = DiT_models["DiT-N/4"](**PIXELS | dict(learn_sigma=False), mixer="mamba")
    stated = dict(norm="rms", mixer="mamba", objective="flow", predict="x", vae="ema", path="linear")
    torch.save(dict(ema=model.state_dict(), args=stated), path)
    assert initialize(model, path, stated)[1:] == []
    assert initialize(model, path, stated | dict(vae="mse"))[1:] == []
    now = dict(norm="layer", mixer="zigzag", objective="flow", predict=None, vae="none", path="linear")
    assert initialize(model, path, now)[1:] == [
        f"... trained with {was}, which is {is_} here"
        for was, is_ in (("norm rms", "layer"), ("mixer mamba", "zigzag"), ("vae ema", "none"), ("predict x", "velocity"))
    ]
    torch.save(dict(ema=model.state_dict(), args=stated | dict(mamba_zigzag=True, mamba_summed=False)), path)
    zigzag = "mixer mamba with --mamba-zigzag True"
    assert initialize(model, path, stated)[1:] == [f"... trained with {zigzag}, which is mamba here"]
    assert initialize(model, path, stated | dict(mamba_zigzag=True, mamba_summed=None))[1:] == []
    torch.save(dict(ema=model.state_dict(), args=stated | dict(vae="there", vae_digest="3f")), path)
    assert initialize(model, path, stated | dict(vae="here", vae_digest="3f"))[1:] == []
    said = initialize(model, path, stated | dict(vae="there", vae_digest="a0"))[1:]
    assert said == ["... trained with vae digest 3f, which is a0 here"]
    torch.save(dict(ema=model.state_dict(), args=stated | dict(time_intervals=127)), path)
    assert initialize(model, path, stated)[1:] == ["... trained with time intervals 127, which is 128 here"]
    torch.save(dict(ema=model.state_dict(), args=dict(model="SiT-N/4", path_type="Linear", prediction="velocity")), path)
    assert initialize(model, path, stated)[-1] == "... trained with time scale 1, which is 1000 here"
    torch.save(dict(ema=model.state_dict(), args=dict(model="SiT-N/4", path_type="VP", prediction="score")), path)
    assert initialize(model, path, stated)[-1].startswith(f"... {path} is SiT's with path_type VP and prediction score")


def test_mixers_of_somebody_else_keep_what_has_their_names_and_shapes(tmp_path):
    class Mixer(torch.nn.Linear):
        def __init__(self, dim, num_heads, qkv_bias):
            super().__init__(dim, dim)

    old, new = (filled(DiT_models["DiT-N/4"](**PIXELS, mixer=Mixer), start) for start in (1000, 0))
    assert len(initialize(new, saved(tmp_path / "a.pt", old))) == 1
    assert all((value >= 1000).all() for value in new.state_dict().values())


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ("DiT-Ti/4", "none of its matrices fits the model"),
        ("UNet-N", "it holds a UNet, and the model is a DiT"),
        ("ZigMa-N/4", "it holds a ZigMa, and the model is a DiT"),
    ],
)
def test_a_network_of_which_nothing_fits_is_no_beginning(tmp_path, other, reason):
    old = MODELS[other](input_size=16, in_channels=3, num_classes=10)
    new = DiT_models["DiT-N/4"](**PIXELS)
    before = {name: value.clone() for name, value in new.state_dict().items()}
    with pytest.raises(ValueError, match=f"is of another network or size: {reason}"):
        initialize(new, saved(tmp_path / "a.pt", old))
    assert all(torch.equal(value, before[name]) for name, value in new.state_dict().items())


def test_a_unet_keeps_its_null_class(tmp_path):
    old, new = (MODELS["UNet-N"](input_size=16, in_channels=3, num_classes=n) for n in (4, 2))
    report = initialize(new, saved(tmp_path / "a.pt", old))
    assert torch.equal(new.net.class_embedding.weight[2], old.net.class_embedding.weight[4])
    assert torch.equal(new.net.conv_in.weight, old.net.conv_in.weight)
    assert len(report) == 2


@pytest.mark.parametrize(
    ("network", "options"),
    [
        *((name, {}) for name in ("DiS-N/2", "U-ViT-N/2", "ZigMa-N/2", "LaMamba-N")),
        *(("DiT-N/2", dict(mixer=mixer)) for mixer in ("global-filter", "s4nd", "s4d", "pdessm-g", "lamamba")),
    ],
    ids=lambda value: value if isinstance(value, str) else value.get("mixer", ""),
)
@pytest.mark.parametrize("size", [16, (8, 32)])
def test_a_beginning_at_another_size_computes_what_sampling_at_that_size_does(tmp_path, randomize, network, options, size):
    old, new = (MODELS[network](side, in_channels=3, num_classes=3, **options).eval() for side in (8, size))
    report = initialize(new, saved(tmp_path / "a.pt", randomize(old)))
    adapts = network != "DiT-N/2" or options["mixer"] in ("global-filter", "s4nd", "s4d")
    assert any("... adapted to this image size: " in line for line in report) == adapts
    assert [line for line in report if "... not " in line and not line.startswith("... not pos_embed")] == []
    given = torch.randn(2, 3, *new.input_size), torch.tensor([0.1, 0.9]), torch.tensor([0, 2])
    old.resize(size)
    if network == "DiT-N/2":
        old.pos_embed.data.copy_(new.pos_embed)  # which are those of a network that is built for that size
    with torch.no_grad():
        torch.testing.assert_close(new(*given), old(*given), rtol=1e-4, atol=1e-5)


def test_a_beginning_without_the_same_extra_tokens_keeps_its_own_positions(tmp_path):
    old, new = (MODELS["DiS-N/2"](side, in_channels=3, num_classes=classes) for side, classes in ((8, 0), (16, 3)))
    before = new.pos_embed.clone()
    report = initialize(new, saved(tmp_path / "a.pt", old))
    assert any(line.startswith("... not pos_embed") for line in report)
    assert torch.equal(new.pos_embed, before)


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_training_begins_where_another_run_ended(tmp_path, ending):
    """From attention over ten classes to a PDE over ten: after one step at a tiny rate all else is still there."""
    quick = ["--global-batch-size", 2, "--max-steps", 1, "--log-every", 1]
    path = fit(tmp_path / "a", *quick, "--lr", 1e-2) / "checkpoints" / "0000001.pt"
    if ending == "safetensors":
        write_as(path, "--format", "safetensors")
        path = path.with_suffix(".safetensors")
    folder = fit(tmp_path / "b", *quick, "--lr", 1e-9, "--mixer", "pdessm", "--init-from", path)
    old, new = load_checkpoint(path)[0], torch.load(folder / "checkpoints" / "0000001.pt")
    for name, value in new["model"].items():
        if ".attn." not in name:
            torch.testing.assert_close(value, old[name], rtol=0, atol=1e-7)
            torch.testing.assert_close(new["ema"][name], old[name], rtol=0, atol=1e-7)
    assert old["final_layer.linear.weight"].abs().max() > 1e-3
    log = (folder / "log.txt").read_text()
    assert f"Initial weights from {path}: " in log
    assert "... not there, and initial: blocks.*.attn.pde." in log
    draw(folder / "checkpoints" / "0000001.pt", tmp_path / "a.png", "--class-labels", 1)


def test_a_beginning_that_is_none_leaves_no_folder(tmp_path):
    for name in ("nowhere.pt", "a.pt"):
        (tmp_path / "a.pt").write_text("not weights")
        with pytest.raises((ValueError, OSError), match=rf"{name}"):
            fit(tmp_path / "r", "--init-from", tmp_path / name)
    assert not (tmp_path / "r").exists()
