"""Weights written for others, and read again."""

import argparse
import os
import pickle
import resource

import pytest
import torch

from autoencoders import save_autoencoder
from checkpoint_files import PIXELS, SETTINGS, Hostile, empty, garbage, given_flags, text, truncated, write_as, write_checkpoint
from checkpoints.build import load_model
from checkpoints.read import load_checkpoint
from download import find_checkpoint, find_model
from models import DiT_models


@pytest.mark.parametrize(
    ("mixer", "options"), [("attention", {}), ("pdessm-g", {}), ("pdessm", dict(coupling="coupled", groups=4))]
)
def test_safetensors_there_and_back(tmp_path, mixer, options):
    written = write_checkpoint(tmp_path / "a.pt", mixer, options).state_dict()
    write_as(tmp_path / "a.pt", "--format", "safetensors")
    write_as(tmp_path / "a.safetensors", "--format", "pt", "--out", tmp_path / "b.pt")
    expected, settings = load_model(tmp_path / "a.pt", given_flags(), "ema")
    for name in ("a.safetensors", "b.pt"):
        model, read = load_model(tmp_path / name, given_flags(), "ema")
        assert read == settings
        assert str(model) == str(expected)
        assert all(torch.equal(value, written[key]) for key, value in model.state_dict().items())
        assert find_model(tmp_path / name).keys() == written.keys()
    assert load_checkpoint(tmp_path / "b.pt")[1] == load_checkpoint(tmp_path / "a.pt")[1]
    assert torch.load(tmp_path / "b.pt")["ema"].keys() == written.keys()  # where the public code looks for them


def test_what_is_exported_is_the_average_of_weights_whoever_wrote_it(tmp_path):
    model = DiT_models["DiT-N/4"](**PIXELS).state_dict()
    average = {name: value + 1 for name, value in model.items()}
    average["final_layer.linear.bias"] = average["t_embedder.mlp.0.weight"][0, :96]  # shares its memory
    args = argparse.Namespace(model="DiT-N/4", image_size=16, num_classes=10, vae="none")
    args.path, args.odd = ("data", 3), {(1, 2): 3}
    torch.save(dict(model=model, ema=average, opt={}, args=args), tmp_path / "a.pt")
    write_as(tmp_path / "a.pt", "--format", "safetensors", "--out", tmp_path / "b.safetensors")
    weights, settings = load_checkpoint(tmp_path / "b.safetensors")
    assert all(torch.equal(weights[name], average[name]) for name in average)
    assert settings == dict(model="DiT-N/4", image_size=16, num_classes=10, vae="none", path=["data", 3], odd={})
    assert os.path.getsize(tmp_path / "b.safetensors") < 0.6 * os.path.getsize(tmp_path / "a.pt")


@pytest.mark.parametrize("form", ["pt", "safetensors", "hub", "diffusers"])
@pytest.mark.parametrize("decay", [0.5, 0.0])
def test_a_second_average_does_not_pass_for_the_first(tmp_path, form, decay):
    model = write_checkpoint(tmp_path / "a.pt").state_dict()
    args = dict(model="DiT-N/4", mixer="pdessm", vae="none", num_classes=10, image_size=16, ema_decay=[0.9, decay])
    second = {f"ema_{decay}": {name: value + 1 for name, value in model.items()}}
    torch.save(dict(model=model, ema=model, args=args, **second), tmp_path / "a.pt")
    write_as(tmp_path / "a.pt", "--format", form, "--ema", decay, "--out", tmp_path / f"b.{form}")
    name = "final_layer.linear.bias"
    path = find_checkpoint(tmp_path / f"b.{form}")
    assert torch.equal(load_checkpoint(path, decay)[0][name], model[name] + 1)
    with pytest.raises(ValueError, match=r"0\.9"):
        load_checkpoint(path, 0.9)


@pytest.mark.parametrize("form", ["pt", "safetensors"])
def test_what_weights_do_not_tell_can_be_stated(tmp_path, form):
    model = write_checkpoint(tmp_path / "a.pt", learn_sigma=False)
    torch.save(model.state_dict(), tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"give --objective diffusion or flow, to `python -m checkpoints\.export` where"):
        load_model(tmp_path / "a.pt", {}, "ema")
    flags = "--format", form, "--out", tmp_path / f"b.{form}", "--objective", "flow", "--path", "cosine"
    write_as(tmp_path / "a.pt", *flags)
    settings = load_model(tmp_path / f"b.{form}", {}, "ema")[1]
    assert [settings[name] for name in ("objective", "path", "predict")] == ["flow", "cosine", "velocity"]
    with pytest.raises(ValueError, match=r"--objective diffusion contradicts .*, which has --objective flow"):
        write_as(tmp_path / f"b.{form}", "--format", form, "--out", tmp_path / f"c.{form}", "--objective", "diffusion")


def test_the_order_of_scans_and_the_autoencoder_can_be_stated_too(tmp_path):
    network = DiT_models["DiT-N/4"](8, in_channels=2, num_classes=3, mixer="zigzag")
    torch.save(network.state_dict(), tmp_path / "a.pt")
    vae = save_autoencoder(tmp_path / "vae", levels=2, channels=2)
    write_as(tmp_path / "a.pt", "--format", "pt", "--out", tmp_path / "b.pt", "--mixer", "zigzag", "--vae", vae)
    settings = load_model(tmp_path / "b.pt", {}, "ema")[1]
    assert (settings["mixer"], settings["vae"]) == ("zigzag", str(vae))


def test_weights_of_sit_state_that_their_network_sees_t_itself(tmp_path):
    weights = write_checkpoint(tmp_path / "a.pt", "attention").state_dict()
    last = torch.arange(len(weights["final_layer.linear.bias"])) // 3 % 2 == 1  # variances, which SiT does not learn
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        weights[name] = torch.ones_like(weights[name])
        weights[name][last] = 0
    torch.save(weights, tmp_path / "a.pt")
    write_as(tmp_path / "a.pt", "--format", "safetensors", "--objective", "flow", "--out", tmp_path / "b.safetensors")
    settings = load_model(tmp_path / "b.safetensors", {}, "ema")[1]
    assert (settings["objective"], settings["time_scale"]) == ("flow", 1)


@pytest.mark.parametrize("form", ["pt", "safetensors"])
def test_half_precision_is_half_the_size_and_the_nearest_weights(tmp_path, form):
    written = write_checkpoint(tmp_path / "a.pt", "pdessm-g").state_dict()
    write_as(tmp_path / "a.pt", "--format", form, "--half", "--out", tmp_path / f"b.{form}")
    model, _ = load_model(tmp_path / f"b.{form}", given_flags(), "ema")
    for name, value in model.state_dict().items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, written[name], rtol=2**-11, atol=2**-25)
    assert os.path.getsize(tmp_path / f"b.{form}") < 2.1 * sum(value.numel() for value in written.values())
    with pytest.raises(ValueError, match="--half goes with --format safetensors or pt"):
        write_as(tmp_path / "a.pt", "--format", "hub", "--half")


def test_what_is_too_large_for_half_precision_is_named(tmp_path):
    weights = DiT_models["DiT-N/4"](**PIXELS).state_dict()
    weights["final_layer.linear.bias"][0] = -1e5
    torch.save(weights, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"final_layer\.linear\.bias has a weight of 1e\+05, .* too large for --half"):
        write_as(tmp_path / "a.pt", "--format", "safetensors", "--half")
    assert os.listdir(tmp_path) == ["a.pt"]


def test_safetensors_of_others_are_bare_weights(tmp_path):
    from safetensors.torch import save_file

    written = DiT_models["DiT-N/4"](**PIXELS, mixer="pdessm")
    save_file(written.state_dict(), tmp_path / "a.safetensors")
    assert load_model(tmp_path / "a.safetensors", given_flags(), "ema")[1] == SETTINGS
    for args in ("{", "[3]", "null", "[" * 100_000):
        save_file(written.state_dict(), tmp_path / "a.safetensors", dict(args=args))
        if args in ("[3]", "null"):
            assert load_model(tmp_path / "a.safetensors", given_flags(), "ema")[1] == SETTINGS
        else:
            with pytest.raises(ValueError, match="not a whole checkpoint"):
                load_model(tmp_path / "a.safetensors", given_flags(), "ema")


def half(path):
    path.write_bytes(path.read_bytes()[: os.path.getsize(path) // 2])


def no_header(path):
    path.write_bytes(path.read_bytes()[:100])


def huge_header(path):
    path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])


def a_pickle(path):
    path.write_bytes(pickle.dumps(Hostile(str(path.parent / "owned"))))


def a_torch_file(path):
    torch.save(dict(ema={}, args=Hostile(str(path.parent / "owned"))), path)


SPOILT_SAFETENSORS = [truncated, half, text, empty, garbage, no_header, huge_header, a_pickle, a_torch_file]


@pytest.mark.parametrize("spoil", SPOILT_SAFETENSORS, ids=lambda f: f.__name__)
def test_spoilt_safetensors_are_named_and_run_nothing(tmp_path, spoil):
    write_checkpoint(tmp_path / "a.pt")
    write_as(tmp_path / "a.pt", "--format", "safetensors")
    spoil(tmp_path / "a.safetensors")
    for use in (
        lambda path: load_model(path, given_flags(), "ema"),
        lambda path: write_as(path, "--format", "pt", "--out", "b.pt"),
    ):
        with pytest.raises(ValueError, match=r"a\.safetensors is not a whole checkpoint"):
            use(tmp_path / "a.safetensors")
    assert sorted(os.listdir(tmp_path)) == ["a.pt", "a.safetensors"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--format", "pt"], r"a\.pt is there already; give another --out"),
        (["--format", "safetensors", "--out", "b.pt"], r"--out b\.pt should end in \.safetensors"),
        (["--format", "pt", "--out", "b.safetensors"], r"--out b\.safetensors should end in \.pt"),
        (["--format", "pt", "--out", "/proc/b.pt"], r"could not write the checkpoint /proc/b\.pt"),
        (["--format", "safetensors", "--out", "/proc/b.safetensors"], r"could not write the checkpoint /proc/b\.safetensors"),
    ],
)
def test_an_export_that_cannot_be_says_why(tmp_path, monkeypatch, given, message):
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "a.pt")
    before = (tmp_path / "a.pt").read_bytes()
    with pytest.raises((ValueError, OSError), match=message):
        write_as("a.pt", *given)
    assert os.listdir() == ["a.pt"]
    assert (tmp_path / "a.pt").read_bytes() == before


@pytest.mark.parametrize("form", ["pt", "safetensors"])
def test_a_full_disk_leaves_no_half_export(tmp_path, form):
    write_checkpoint(tmp_path / "a.pt")
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, unlimited[1]))
    try:
        with pytest.raises(OSError, match=rf"could not write the checkpoint .*b\.{form}: .*File too large"):
            write_as(tmp_path / "a.pt", "--format", form, "--out", tmp_path / f"b.{form}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert os.listdir(tmp_path) == ["a.pt"]
