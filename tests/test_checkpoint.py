import argparse
import os
from types import SimpleNamespace

import pytest
import torch

from checkpoint import load_checkpoint, load_model, load_weights, save_checkpoint, settings_from_weights
from download import find_model
from models import DiT, DiT_models, grid_embedding
from pde_ssm import TERMS

PIXELS = dict(input_size=16, in_channels=3, num_classes=10)
PAPERS = dict(
    coupling="diagonal", groups=1, state_dim=None, terms=TERMS, components=1, activation=False, gate=False, conditioned=False,
)  # fmt: skip
OBJECTIVE = dict(objective="diffusion", path="linear")
SETTINGS = dict(
    model="DiT-N/4", mixer="pdessm", mixer_options=PAPERS, num_classes=10, image_size=16, vae="none", **OBJECTIVE
)  # fmt: skip
ATTENTION = dict(mixer="attention", mixer_options={})


def flags(**given):
    return SimpleNamespace(**{name: given.get(name) for name in SETTINGS})


def write(path, mixer="pdessm", options=None, **changes):
    """A checkpoint as train.py writes it; returns the model."""
    model = DiT_models["DiT-N/4"](**PIXELS, mixer=mixer, **options or {})
    args = dict(model="DiT-N/4", mixer=mixer, vae="none", num_classes=10, image_size=16)
    save_checkpoint(path, **dict(model=model.state_dict(), ema=model.state_dict(), opt={}, args=args) | changes)
    return model


@pytest.mark.parametrize("mixer", ["attention", "pdessm"])
def test_a_checkpoint_says_what_it_is(tmp_path, mixer):
    path = tmp_path / "a.pt"
    written = write(path, mixer)
    model, settings = load_model(path, flags(), default_vae="mse")
    assert settings == SETTINGS | (ATTENTION if mixer == "attention" else {})
    assert not model.training
    for name, value in written.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


@pytest.mark.parametrize("style", ["namespace", "bare weights", "no ema"])
def test_files_of_the_public_code_load(tmp_path, style):
    path = tmp_path / "a.pt"
    model = DiT_models["DiT-S/8"](input_size=16, num_classes=5)
    state = model.state_dict()
    if style == "namespace":
        args = argparse.Namespace(model="DiT-S/8", image_size=128, num_classes=5, vae="ema", epochs=1400)
        torch.save(dict(model={}, ema=state, opt={}, args=args), path)
    else:
        torch.save(state if style == "bare weights" else dict(model=state, opt={}), path)
    loaded, settings = load_model(path, flags(), default_vae="mse")
    assert settings == dict(model="DiT-S/8", **ATTENTION, num_classes=5, image_size=128, vae="mse", **OBJECTIVE)
    assert torch.equal(loaded.pos_embed, model.pos_embed)
    assert find_model(path).keys() == state.keys()


@pytest.mark.parametrize("mixer", ["attention", "pdessm"])
@pytest.mark.parametrize("name", ["DiT-N/1", "DiT-Ti/2", "DiT-B/4", "DiT-XL/8"])
def test_weights_tell_their_settings(name, mixer):
    with torch.device("meta"):
        state = DiT_models[name](input_size=16, in_channels=3, num_classes=7, mixer=mixer).state_dict()
    chosen = ATTENTION if mixer == "attention" else dict(mixer="pdessm", mixer_options=PAPERS)
    assert settings_from_weights(state) == dict(model=name, **chosen, num_classes=7, image_size=16, vae="none", **OBJECTIVE)


@pytest.mark.parametrize("options", [dict(coupling="coupled", groups=4, terms=("diffusion",)), dict(gate=True, state_dim=48)])
def test_the_mixers_options_are_read_off_the_weights(tmp_path, options):
    written = write(tmp_path / "a.pt", options=options)
    model, settings = load_model(tmp_path / "a.pt", flags(), "ema")
    assert settings["mixer_options"] == PAPERS | options
    assert str(model) == str(written)


def test_what_a_file_says_of_itself_is_not_believed_blindly(tmp_path):
    args = dict(model="DiT-N/4", mixer="mamba", vae="none", num_classes=None, image_size="64", objective="eps", path="/data")
    write(tmp_path / "a.pt", args=argparse.Namespace(**args))
    assert load_model(tmp_path / "a.pt", flags(), "ema")[1] == SETTINGS


def test_a_preset_keeps_its_name(tmp_path):
    written = write(tmp_path / "a.pt", "pdessm-g")
    model, settings = load_model(tmp_path / "a.pt", flags(mixer="pdessm-g"), "ema")
    assert settings["mixer"] == "pdessm-g"
    assert str(model) == str(written)
    torch.save(written.state_dict(), tmp_path / "a.pt")  # which knows no names
    assert str(load_model(tmp_path / "a.pt", flags(), "ema")[0]) == str(written)


@pytest.mark.parametrize("mixer", ["attention", "pdessm"])
@pytest.mark.parametrize("size", [24, (16, 24)])
def test_a_model_runs_at_another_size(tmp_path, mixer, size):
    written = write(tmp_path / "a.pt", mixer)
    model, settings = load_model(tmp_path / "a.pt", flags(image_size=size), "ema")
    h, w = (24, 24) if size == 24 else size
    assert settings["image_size"] == size
    assert model(torch.randn(1, 3, h, w), torch.tensor([5]), torch.tensor([3])).shape == (1, 6, h, w)
    same = load_model(tmp_path / "a.pt", flags(image_size=16), "ema")[0]
    assert torch.equal(same.pos_embed, written.pos_embed)
    assert torch.equal(model.blocks[0].mlp.fc1.weight, written.blocks[0].mlp.fc1.weight)


@pytest.mark.parametrize("mixer", ["attention", "pdessm"])
def test_resizing_there_and_back_changes_nothing(mixer):
    model = DiT_models["DiT-N/4"](**PIXELS, mixer=mixer)
    before = model.pos_embed.clone()
    assert not torch.equal(model.resize((24, 16)).pos_embed[:, :16], before)
    assert torch.equal(model.resize(16).pos_embed, before)
    with pytest.raises(ValueError, match="input size 16 x 18 is not divisible by 4"):
        model.resize((16, 18))


def test_the_weights_say_which_mixer_they_are_for(tmp_path):
    write(tmp_path / "a.pt", args=dict(model="DiT-N/4", mixer="attention", vae="none", num_classes=10, image_size=16))
    assert load_model(tmp_path / "a.pt", flags(), "ema")[1]["mixer"] == "pdessm"
    state = {name: w for name, w in write(tmp_path / "a.pt").state_dict().items() if ".attn." not in name}
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="neither by attention nor by a PDE"):
        load_model(tmp_path / "a.pt", flags(), "ema")


def test_positions_keep_their_place_in_the_picture():
    trained, finer = (grid_embedding(h, 6, 16, (4, 6)).view(h, 6, 16) for h in (4, 12))
    torch.testing.assert_close(finer[1::3], trained)  # every third of three times the rows has the old row's centre
    assert torch.equal(trained, grid_embedding(4, 6, 16).view(4, 6, 16))


def test_names_of_other_code_bases_do_not_mislead(tmp_path):
    write(tmp_path / "a.pt", "attention", args=argparse.Namespace(model="SiT-N/4", vae="ema"))
    assert load_model(tmp_path / "a.pt", flags(), "ema")[1] == SETTINGS | ATTENTION


def test_public_weights_that_cannot_be_fetched_say_where_to_put_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("download.PRETRAINED", f"file://{tmp_path}/nowhere/")
    with pytest.raises(OSError, match=r"put it at pretrained_models/DiT-XL-2-256x256\.pt, or give --ckpt"):
        find_model("DiT-XL-2-256x256.pt")
    (tmp_path / "nowhere").mkdir()
    written = write(tmp_path / "nowhere" / "DiT-XL-2-256x256.pt", "attention")
    assert find_model("DiT-XL-2-256x256.pt").keys() == written.state_dict().keys()
    assert os.listdir("pretrained_models") == ["DiT-XL-2-256x256.pt"]


def test_writing_is_all_or_nothing(tmp_path):
    path = tmp_path / "a.pt"
    write(path)
    before = path.read_bytes()
    with pytest.raises(Exception, match="pickle"):
        save_checkpoint(path, model=lambda: None)
    assert path.read_bytes() == before
    with pytest.raises(OSError, match="could not write the checkpoint /proc/version/a"):
        save_checkpoint("/proc/version/a.pt", model={})
    assert os.listdir(tmp_path) == ["a.pt"]


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_hostile_pickle_does_not_run(tmp_path):
    torch.save(dict(ema={}, args=Hostile(str(tmp_path / "owned"))), tmp_path / "a.pt")
    with pytest.raises(ValueError, match="not a whole checkpoint of tensors"):
        load_checkpoint(tmp_path / "a.pt")
    assert not (tmp_path / "owned").exists()


def truncated(path):
    path.write_bytes(path.read_bytes()[:-5000])


def text(path):
    path.write_text("not weights")


def empty(path):
    path.write_bytes(b"")


def other_network(path):
    torch.save(torch.nn.Linear(2, 2).state_dict(), path)


def list_of_numbers(path):
    torch.save([1, 2, 3], path)


def no_classes(path):
    state = write(path).state_dict()
    del state["y_embedder.embedding_table.weight"]
    torch.save(state, path)


def no_tensors(path):
    torch.save({"ema": {"x_embedder.proj.weight": 3}, "args": [1]}, path)


def garbage(path):
    path.write_bytes(bytes(range(256)) * 50)


SPOILT = [truncated, text, empty, other_network, list_of_numbers, no_classes, no_tensors, garbage]


@pytest.mark.parametrize("spoil", SPOILT, ids=lambda f: f.__name__)
def test_what_is_no_checkpoint_is_named(tmp_path, spoil):
    path = tmp_path / "a.pt"
    write(path)
    spoil(path)
    with pytest.raises(ValueError, match=r"a\.pt (is not a whole checkpoint|holds no DiT)"):
        load_model(path, flags(), "ema")


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*b\.pt"):
        load_model(tmp_path / "b.pt", flags(), "ema")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(mixer="attention"), "--mixer attention contradicts .*--mixer pdessm"),
        (dict(model="DiT-S/2"), "--model DiT-S/2 contradicts .*--model DiT-N/4"),
        (dict(image_size=18), r"--image-size 18x18: both must be divisible by 4"),
        (dict(image_size=(16, 22)), r"--image-size 16x22: both must be divisible by 4"),
        (dict(num_classes=1000), "--num-classes 1000 contradicts .*--num-classes 10"),
        (dict(vae="mse"), "--vae mse contradicts .*--vae none"),
    ],
)
def test_flags_that_contradict_the_checkpoint_name_both_values(tmp_path, given, message):
    write(tmp_path / "a.pt")
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path / "a.pt", flags(**given), "ema")
    load_model(tmp_path / "a.pt", flags(**SETTINGS), "ema")  # agreeing is no mistake


def test_weights_that_do_not_fit_are_told_in_one_line(tmp_path):
    path = tmp_path / "a.pt"
    other = DiT_models["DiT-N/4"](**PIXELS, mixer="attention").state_dict()
    with pytest.raises(ValueError, match=r"attn\.pde\.equation\.g0 is missing.* and \d+ more") as error:
        load_weights(write(path), other, path)
    assert "\n" not in str(error.value)
    short = write(path).state_dict() | {"final_layer.linear.bias": torch.zeros(7)}
    write(path, ema=short)
    with pytest.raises(ValueError, match=r"final_layer\.linear\.bias is \(7,\), not \(96,\)"):
        load_model(path, flags(), "ema")


def test_a_size_without_a_name_is_refused():
    with pytest.raises(ValueError, match="hidden size 32, depth 1 and patch size 2"):
        settings_from_weights(DiT(8, hidden_size=32, depth=1, num_heads=1).state_dict())
