"""Other people's scripts with a mixer of ours, and what it changes in their models."""

import argparse
import json
import os
import shutil
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import models
import overlay
from checkpoints.build import load_model, save_checkpoint
from commands import ROOT, torchrun, write_modules
from comparing import check, checkouts, diff, exchange
from mixers import MIXERS
from models import DiT_models
from pde_ssm import PRESETS, PDESSMBlock

pytestmark = pytest.mark.usefixtures("one_thread")

PDE = ["--mixer", "pdessm"]
UPSTREAM = os.environ.get("UPSTREAM_DIT")


def git(folder, *arguments):
    return subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A git checkout beside an empty working directory with some images."""
    folder = tmp_path / "checkout"
    shutil.copytree(ROOT / "tests" / "checkout", folder, ignore=shutil.ignore_patterns("__pycache__"))
    git(folder, "init", "--quiet")
    git(folder, "add", ".")
    git(folder, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "-m", "all")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(exchange, "said", set())
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    torch.save(torch.randn(4, 3, 8, 8), "images.pt")
    yield folder
    assert git(folder, "status", "--porcelain", "--ignored") == ""


def fit(checkout, *flags, model="DiT-N/4"):
    """Trains by the checkout's script; returns its checkpoint."""
    overlay.main([str(checkout / "train.py"), "--model", model, "--images", "images.pt", *map(str, flags)])
    return torch.load("results/last.pt", weights_only=False)


def draw(checkout, path, *flags):
    overlay.main([str(checkout / "sample.py"), *flags, "ODE", "--ckpt", str(path)])
    return torch.load("sample.pt")


@torch.no_grad()
def draw_ours(path):
    model, settings = load_model(path, {}, default_vae="ema")
    x, t, y = torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8), torch.tensor([10.0, 700.0]), torch.tensor([3, 10])
    return model(x, t, y), settings


def write(path, mixer, **options):
    """A checkpoint of this repository."""
    model = DiT_models["DiT-N/4"](input_size=8, in_channels=3, num_classes=10, mixer=mixer, **options)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    args = dict(model="DiT-N/4", mixer=mixer, vae="none", image_size=8)
    save_checkpoint(path, model=model.state_dict(), ema=model.state_dict(), opt={}, args=args)
    return path


def test_two_processes_train_and_the_checkpoint_travels(checkout):
    flags = ["--model", "DiT-N/4", "--images", "images.pt", *PDE, "--pde-gate", "--steps", 2]
    output = torchrun(2, "overlay.py", checkout / "train.py", *flags)
    assert output.count("overlay: Net: 6 Attention -> --mixer pdessm (gate=True) on 2 x 2 tokens") == 1
    theirs = draw(checkout, "results/last.pt")
    ours, settings = draw_ours("results/last.pt")
    assert (settings["mixer"], settings["mixer_options"]["gate"], settings["model"]) == ("pdessm", True, "DiT-N/4")
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("mixer", "options"),
    [
        ("attention", {}),
        ("pdessm", {}),
        ("pdessm-g", {}),
        ("pdessm", dict(coupling="coupled", terms=("diffusion", "reaction"))),
        ("pdessm", dict(coupling="pairwise", groups=3, state_dim=48)),
        ("pdessm-gla", {}),
    ],
)
def test_checkpoints_of_this_repository_tell_the_mixer(checkout, mixer, options):
    ours, _ = draw_ours(write("ours.pt", mixer, **options))
    torch.testing.assert_close(draw(checkout, "ours.pt"), ours, rtol=1e-4, atol=1e-5)


def test_attention_changes_nothing(checkout):
    through = fit(checkout, "--mixer", "attention")
    command = [sys.executable, "-B", str(checkout / "train.py"), "--model", "DiT-N/4", "--images", "images.pt"]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())})
    alone = torch.load("results/last.pt", weights_only=False)
    assert vars(alone["args"]) == vars(through["args"])
    assert alone["model"].keys() == through["model"].keys()
    assert all(torch.equal(w, through["model"][name]) for name, w in alone["model"].items())


@pytest.mark.parametrize("mixer", PRESETS)
def test_all_else_starts_from_the_same_values(checkout, mixer):
    attention = fit(checkout, "--steps", 0)
    pde = fit(checkout, "--mixer", mixer, "--steps", 0)
    shared = attention["model"].keys() & pde["model"].keys()
    assert {name for name in attention["model"] if ".attn." not in name} == shared
    assert all(torch.equal(attention["model"][name], pde["model"][name]) for name in shared)
    assert torch.equal(attention["numbers"], pde["numbers"])


def test_no_initialiser_of_the_checkout_touches_a_mixer(checkout):
    weights = fit(checkout, *PDE, "--steps", 0, "--pde-activation", model="DiT-N/2")["model"]
    layers = [{k.split(".attn.")[1]: w for k, w in weights.items() if k.startswith(f"blocks.{i}.attn.")} for i in (0, 1)]
    fresh = PDESSMBlock(96, grid_size=(4, 4), activation=True).state_dict()
    drawn = {"pde.R.weight", "pde.equation.b"}
    assert layers[0].keys() == fresh.keys()
    assert all(torch.equal(layers[0][name], w) for name, w in fresh.items() if name not in drawn)
    assert not any(torch.equal(layers[0][name], layers[1][name]) for name in drawn)
    assert all(torch.isclose(layers[0][name].std(), fresh[name].std(), rtol=0.2) for name in drawn)


def test_training_learns_and_learns_the_mixers(checkout):
    before, after = (fit(checkout, *PDE, "--steps", steps, model="DiT-N/2")["model"] for steps in (0, 2))
    still = {name for name in before if torch.equal(before[name], after[name])}
    assert still == {"pos_embed"}


def test_flags_may_stand_anywhere(checkout):
    script, rest = str(checkout / "train.py"), ["--model", "DiT-N/4", "--images", "images.pt", "--steps", "0"]
    for argv in ([*PDE, script, *rest], [script, rest[0], rest[1], "--mixer=pdessm", "--pde-terms", "diffusion", *rest[2:]]):
        overlay.main(argv)
        weights = torch.load("results/last.pt", weights_only=False)["model"]
        assert "blocks.0.attn.pde.equation.log_lx" in weights
        assert ("blocks.0.attn.pde.equation.b" in weights) == ("--pde-terms" not in argv)


def test_afterwards_all_is_as_it_was(checkout):
    before = sys.path[:], sys.modules.copy(), sys.argv[:], sys.dont_write_bytecode
    fit(checkout, *PDE)
    assert (sys.path, sys.argv, sys.dont_write_bytecode) == (before[0], *before[2:])
    assert all(sys.modules[name] is module for name, module in before[1].items())
    assert sys.modules["models"] is models
    assert "__init_subclass__" not in vars(nn.Module)

    class Later(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = timm.layers.Attention(96)

    assert isinstance(Later().attn, timm.layers.Attention)


def test_of_this_repository_a_script_finds_the_operator_alone(checkout, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [path for path in sys.path if Path(path).name != "tests"])  # whose folders have our names
    with checkouts.imports_of(checkout):
        assert find_spec("checkpoints") is None
        assert find_spec("models").origin == str(checkout / "models.py")
        monkeypatch.setattr(checkouts, "HERE", write_modules(tmp_path / "ours", pde_ssm_more="fast = True"))
        assert import_module("pde_ssm_more").fast  # as pde_ssm imports what it needs on some devices only
    assert find_spec("checkpoints").origin == str(ROOT / "checkpoints" / "__init__.py")


def test_an_attention_of_ones_own(checkout):
    expected = r"holds timm.*:Attention; they hold 6 models:SelfAttention; name the class .* --attention-class"
    for steps in (0, 1):  # at the script's end, or at the first step of its optimizer
        with pytest.raises(ValueError, match=expected) as error:
            fit(checkout, *PDE, "--steps", steps, model="Own-N/4")
        assert overlay.is_ours(error.value)
    weights = fit(checkout, *PDE, "--attention-class", "models:SelfAttention", model="Own-N/4")["model"]
    assert "blocks.5.attn.pde.R.weight" in weights
    with pytest.raises(ValueError, match="holds models:Other; they hold 6 models:SelfAttention"):
        fit(checkout, *PDE, "--attention-class", "models:Other", model="Own-N/4")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mixer", "attention", "--pde-gate"], "--pde-gate means nothing to --mixer attention"),
        (["--pde-groups", "2"], "--pde-groups means nothing to --mixer attention"),
        (["--mixer", "attention", "--attention-class", "a:B"], "--attention-class means nothing to --mixer attention"),
        ([*PDE, "--attention-class", "SelfAttention"], "it is module:Class"),
        ([*PDE, "--attention-class", "torch.nn:GELU"], "activation:GELU has no nn.Linear"),
        ([*PDE, "--pde-groups", "2"], "--pde-groups means nothing to the diagonal coupling"),
        ([*PDE, "--pde-coupling", "pairwise", "--pde-groups", "7"], "96 channels cannot be split into 7"),
        ([*PDE, "--model", "Strip"], "2 tokens on the grid; it needs a square number"),
    ],
)
def test_mistakes_in_flags(checkout, flags, message):
    with pytest.raises(ValueError, match=message) as error:
        fit(checkout, *flags)
    assert overlay.is_ours(error.value)


@pytest.mark.parametrize(
    ("mixer", "options", "flags", "message"),
    [
        ("attention", {}, PDE, "the checkpoint does not fit --mixer pdessm: it has another mixer"),
        ("pdessm", {}, ["--mixer", "attention"], "--mixer attention contradicts ours.pt, which mixes tokens by a PDE"),
        ("pdessm", {}, ["--mixer", "pdessm-g"], r"--mixer pdessm-g contradicts ours.pt, which has --mixer pdessm \(coupling"),
        ("pdessm", {}, ["--pde-gate"], r"--mixer pdessm \(gate=True\) contradicts ours.pt"),
        ("pdessm-gl", {}, ["--mixer", "pdessm-gla"], "--mixer pdessm-gla contradicts ours.pt, which has --mixer"),
        ("pdessm-gla", {}, ["--mixer", "pdessm-gl"], r"--mixer pdessm-gl contradicts ours.pt, which has .*attention_every=4"),
        ("attention", {}, ["--pde-gate"], "--pde-gate means nothing to --mixer attention"),
        ("pdessm", dict(conditioned=True), [], "ours.pt are conditioned, but the blocks of a checkout pass no vector"),
    ],
)
def test_checkpoints_of_another_mixer(checkout, mixer, options, flags, message):
    write("ours.pt", mixer, **options)
    with pytest.raises(ValueError, match=message):
        draw(checkout, "ours.pt", *flags)


@pytest.mark.parametrize("mixer", ["pdessm-g", "pdessm-gla"])
def test_flags_that_agree_with_the_checkpoint(checkout, mixer):
    ours, _ = draw_ours(write("ours.pt", mixer))
    torch.testing.assert_close(draw(checkout, "ours.pt", "--mixer", mixer), ours, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("contents", [{"ema": [torch.zeros(2)]}, {"model": None}, [1], {"ema": {1: torch.zeros(2)}}, None])
def test_files_that_are_no_checkpoint_say_nothing(tmp_path, contents):
    path = tmp_path / "statistics.pt"
    torch.save(contents, path)
    assert overlay.stored_mixer(["train", f"--statistics={path}", "--other", str(tmp_path / "none.pt")]) == (None, {}, {})
    path.write_bytes(b"not torch's")
    assert overlay.stored_mixer([str(path)]) == (None, {}, {})


@pytest.mark.parametrize(("mixer", "flags"), [("attention", PDE), ("pdessm", [])])
def test_a_checkpoint_of_another_mixer_that_the_arguments_do_not_show(checkout, mixer, flags):
    write("ours.weights", mixer)
    with pytest.raises(ValueError, match=r"the checkpoint does not fit --mixer .* it has another mixer"):
        draw(checkout, "ours.weights", *flags)


def test_what_is_no_script_and_no_checkout(checkout, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none.py: no such script$"):
        overlay.main([str(checkout / "none.py"), *PDE])
    with pytest.raises(FileNotFoundError, match="checkout: no such script, but a folder"):
        overlay.main([str(checkout), *PDE])
    with pytest.raises(FileNotFoundError, match=r"has no models\.py"):
        overlay.main(["--diff", str(tmp_path / "here")])
    with pytest.raises(FileNotFoundError, match="no such folder"):
        overlay.main(["--check", str(tmp_path / "nowhere")])
    with pytest.raises(ValueError, match="has no DiT_models"):
        check.check(write_modules(tmp_path / "a", models="Other_models = {}", diffusion="", train=""))
    with pytest.raises(ValueError, match="has no dict of models"):
        overlay.main(["--diff", str(write_modules(tmp_path / "b", models="x = {}"))])
    with pytest.raises(ValueError, match="cannot be imported: No module named 'nowhere'"):
        overlay.main(["--diff", str(write_modules(tmp_path / "c", models="import nowhere"))])


def test_errors_of_the_script_are_its_own(checkout):
    with pytest.raises(FileNotFoundError, match=r"missing.pt") as error:
        fit(checkout, *PDE, "--images", "missing.pt")
    assert not overlay.is_ours(error.value)


def test_diff(checkout, capsys, monkeypatch):
    monkeypatch.setattr(diff, "SIDE", 16)
    overlay.main(["--diff", str(checkout), "--model", "DiT-N/2", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert [layer["name"] for layer in found["replaced"]] == [f"blocks.{i}.attn" for i in range(6)]
    before, after = ([layer[side] for layer in found["replaced"]] for side in ("before", "after"))
    assert {layer["class"] for layer in before} == {"Attention"}
    assert {layer["class"] for layer in after} == {"PDESSMBlock"}
    assert before[0]["parameters"] - after[0]["parameters"] == 4 * 96**2 + 4 * 96 - (96**2 + 10 * 96)
    assert found["parameters"][0] - found["parameters"][1] == 6 * (3 * 96**2 - 6 * 96)
    N, D = 64, 96
    attention, R = 8 * N * D**2 + 4 * N**2 * D, 2 * N * D**2
    assert 0.5 * (attention - R) < (found["forward_flops"][0] - found["forward_flops"][1]) / 6 < attention - R
    keys = found["keys"]
    assert len(keys["only_before"]) == 6 * 4
    assert len(keys["only_after"]) == 6 * 10
    outside = found["outside_the_mixers"]
    assert outside.pop("tensors") == len(keys["shared"]) == sum(".attn." not in key for key in keys["shared"])
    assert list(outside.values()) == [True] * 4
    table = diff.diff_table(found | {"outside_the_mixers": {"tensors": 1, "same_names": False}})
    assert "same names: NO" in table
    assert "6 x blocks.*.attn" in table


def test_diff_of_what_it_cannot_compare(checkout):
    with pytest.raises(ValueError, match="--model DiT-XL/2 is none of DiT-N/4, DiT-N/2, Own-N/4, Strip"):
        overlay.main(["--diff", str(checkout), "--model", "DiT-XL/2"])
    with pytest.raises(ValueError, match="--diff compares attention with another mixer"):
        overlay.main(["--diff", str(checkout), "--mixer", "attention"])
    with pytest.raises(ValueError, match=r"holds timm.*:Attention; they hold 6 models:SelfAttention"):
        overlay.main(["--diff", str(checkout), "--model", "Own-N/4"])


@pytest.mark.skipif(not UPSTREAM, reason="UPSTREAM_DIT names no checkout of DiT")
def test_a_real_checkout(tmp_path, monkeypatch, capsys):
    from diffusers.models import AutoencoderKL

    folder = Path(UPSTREAM).resolve()
    before = git(folder, "status", "--porcelain", "--ignored")
    overlay.main(["--check", str(folder)])
    overlay.main(["--diff", str(folder), "--json"])
    found = json.loads(capsys.readouterr().out.partition("\n{")[2].join(["{", ""]))
    assert found["parameters"] == [32_963_360, 27_682_592]
    assert list(found["outside_the_mixers"].values())[1:] == [True] * 4

    blocks = dict(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
    vae = AutoencoderKL(**blocks, block_out_channels=(4,) * 4, norm_num_groups=2, latent_channels=4)
    commit = "0" * 40
    cached = tmp_path / "hub" / "models--stabilityai--sd-vae-ft-mse"
    vae.save_pretrained(cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    flags = ["--model", "DiT-S/8", "--num-sampling-steps", "2", "--ckpt", "a.pt"]
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    pictures = []
    for mixer in MIXERS:
        model = DiT_models["DiT-S/8"](mixer=mixer)
        nn.init.normal_(model.final_layer.linear.weight, std=0.02)
        args = argparse.Namespace(model="DiT-S/8", image_size=256, num_classes=1000, vae="ema")
        torch.save(dict(ema=model.state_dict(), args=args), tmp_path / "a.pt")
        command = [sys.executable, str(ROOT / "overlay.py"), str(folder / "sample.py"), *flags]
        subprocess.run(command, check=True, capture_output=True, cwd=tmp_path, env=environment)
        pictures.append((tmp_path / "sample.png").read_bytes())
    assert len(set(pictures)) == len(MIXERS)
    assert git(folder, "status", "--porcelain", "--ignored") == before
