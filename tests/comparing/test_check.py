"""overlay.py --check: a checkout's numbers beside ours."""

import json
import math
import shutil

import pytest
import torch

import overlay
from commands import ROOT, write_modules
from comparing import check


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A checkout that is this repository with one model, and a function (file, old, new) that changes it."""
    monkeypatch.setattr(check, "SIDE", 16)
    folder = write_modules(tmp_path / "copy", train="from images.dataset import center_crop_arr")
    for path in ROOT.glob("*.py"):
        if path.name not in ("train.py", "pde_ssm.py"):
            shutil.copy(path, folder)
    for name in ("backbones", "mixers", "diffusion", "images", "machine"):
        shutil.copytree(ROOT / name, folder / name)

    def change(file, old, new):
        text = (folder / file).read_text()
        assert text.count(old) == 1
        (folder / file).write_text(text.replace(old, new))

    change("models.py", "for patch in (1, 2, 4, 8, 16)", "for patch in (8,)")
    change("models.py", "in SIZES.items()", 'in [("S", SIZES["S"])]')
    return folder, change


def test_check_agrees_with_a_copy(copy, capsys):
    overlay.main(["--check", str(copy[0])])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 1 + 4 + len(check.DIFFUSIONS) + len(check.CROPS)
    assert not [line for line in lines if "DISAGREES" in line]


def test_check_finds_differences(copy, capsys):
    folder, change = copy
    change("backbones/__init__.py", "channels=3)", "channels=4)")
    change("diffusion/__init__.py", "sigma_small=sigma_small", "sigma_small=False")
    change("images/dataset.py", "Resampling.BICUBIC", "Resampling.BILINEAR")
    with pytest.raises(ValueError, match=r"^5 of 22 comparisons disagree: DiT-S/8: guided forward, create_diffusion"):
        overlay.main(["--check", str(folder), "--json"])
    wrong = [row["what"] for row in json.loads(capsys.readouterr().out) if not row["agrees"]]
    assert "sigma_small=True" in wrong[1]
    assert [what.split(" of ")[0] for what in wrong[2:]] == ["centre crop"] * 3

    change("models.py", "self.final_layer = FinalLayer(hidden_size", "self.final_layer = FinalLayer(hidden_size + 0")
    change("models.py", "nn.Linear(hidden_size, 2 * hidden_size)", "nn.Linear(hidden_size, 2 * hidden_size, bias=False)")
    change("models.py", "nn.init.zeros_(last.bias)", "last.bias is None or nn.init.zeros_(last.bias)")
    rows = {row["what"].split(":")[0]: row["difference"] for row in check.check(folder)[:2]}
    assert rows["DiT-S/8"] == 1  # and no outputs, since the weights do not fit
    assert list(rows)[1].startswith("create_diffusion")


@pytest.mark.parametrize("place", [0, 1])
def test_what_is_no_number_agrees_with_nothing(place):
    ours = {name: torch.full((2,), math.nan if i == place else 1.0) for i, name in enumerate("ab")}
    assert not check.distance(ours, {name: torch.ones(2) for name in "ab"}) <= 1


@pytest.mark.parametrize("flags", [["--model", "DiT-S/2"], ["--mixer", "pdessm"], ["--attention-class", "a:B"]], ids=str)
def test_flags_of_diff_mean_nothing_to_check(tmp_path, flags):
    with pytest.raises(ValueError, match="--mixer, --model and --attention-class are for --diff"):
        overlay.main(["--check", str(tmp_path), *flags])
