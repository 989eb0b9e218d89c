"""The shell scripts of reproduce/, stopped, started again, or given what cannot be, with a pretender in place of Python."""

import os
import subprocess

import pytest

import train
from commands import ROOT
from scripts import PRETENDER, commands_of, run_script


def test_what_was_stopped_after_its_last_checkpoint_is_trained_to_its_end(tmp_path):
    """Since the held-out loss of a checkpoint is logged after it."""
    (tmp_path / "runs" / "DiT-0" / "000" / "checkpoints").mkdir(parents=True)
    (tmp_path / "runs" / "DiT-0" / "000" / "checkpoints" / "0000002.pt").touch()
    flags = dict(SCALE="small", STEPS="2")
    commands = commands_of("table1_cifar10.sh", tmp_path, ONLY="DiT", **flags)
    assert [c[0] for c in commands] == ["-c", "evaluate.py", "train.py", "sample_ddp.py", "evaluate.py", "-m", "-m"]
    flags = dict(SIZES="N", MIXERS="pdessm", STEPS="2", WORK=str(tmp_path / "scaling"))
    for names in (["train.py", "-m"], ["-m"]):
        commands = commands_of("scaling.sh", tmp_path, **flags)
        assert [c[0] for c in commands] == names
    next(tmp_path.glob("scaling/*/trained-2")).unlink()
    train.parse_args(commands_of("scaling.sh", tmp_path, **flags)[0][1:])


def test_runs_that_have_gone_on_are_not_sampled_earlier(tmp_path):
    """By sample_ddp.py --ckpt "", which would fetch the public DiT-XL/2."""
    (tmp_path / "python").write_text(PRETENDER.replace('int(flags["--max-steps"])', "400"))
    (tmp_path / "python").chmod(0o755)
    flags = dict(PYTHON=str(tmp_path / "python"), SEEN=str(tmp_path / "seen"), SCALE="small", ONLY="DiT", STEPS="200")
    done = run_script("table1_cifar10.sh", tmp_path, tmp_path, **flags)
    assert done.returncode == 2
    assert "DiT-0 was trained for more than STEPS=200 and has no checkpoint there: give another WORK" in done.stderr
    assert "sample_ddp" not in (tmp_path / "seen").read_text()


def test_another_reference_is_another_evaluation(tmp_path):
    flags = dict(SCALE="small", ONLY="DiT")
    commands_of("table1_cifar10.sh", tmp_path, **flags)
    flags["REFERENCE"] = str(tmp_path / "all.npz")
    (tmp_path / "all.npz").touch()
    anew, nothing = ["-c", "sample_ddp.py", "evaluate.py", "-m", "-m"], ["-c", "-m"]
    for expected in (anew, nothing):
        assert [c[0] for c in commands_of("table1_cifar10.sh", tmp_path, **flags)] == expected
    next((tmp_path / "runs" / "DiT-0").glob("recorded*")).write_text("")   # as it was before it named the reference
    assert [c[0] for c in commands_of("table1_cifar10.sh", tmp_path, **flags)] == nothing


def test_paths_are_those_of_the_callers_folder(tmp_path, monkeypatch):
    (tmp_path / "pictures").mkdir()
    monkeypatch.chdir(tmp_path)
    _, made, *_ = commands_of("table2_lamamba.sh", tmp_path, IMAGES_OF="pictures", SEEDS="0")
    assert made[:3] == ["evaluate.py", "--make-ref", str(tmp_path / "pictures")]


@pytest.mark.parametrize("name", ["SCALE", "OBJECTIVE"])
def test_mistyped_settings_claim_no_folder(tmp_path, name):
    assert run_script("table1_cifar10.sh", tmp_path, tmp_path, PYTHON="false", **{name: "tiny"}).returncode == 2
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("script", "name", "value"),
    [
        ("table1_cifar10.sh", "STEPS", "0"), ("table1_cifar10.sh", "SAMPLING_STEPS", "0"),
        ("table1_cifar10.sh", "IMAGES", "many"), ("table1_cifar10.sh", "PROCESSES", "2.5"),
        ("scaling.sh", "STEPS", "-1"), ("grids.sh", "STEPS", "1e3"),
        ("every_mixer.sh", "STEPS", "all"), ("every_mixer.sh", "IMAGES", "5k"), ("every_mixer.sh", "BITS", "-5"),
    ],
)  # fmt: skip
def test_numbers_that_are_none_are_named_before_the_work(tmp_path, script, name, value):
    done = run_script(script, tmp_path, tmp_path, PYTHON="false", CIFAR10=str(tmp_path), **{name: value})
    assert (done.returncode, done.stderr) == (2, f"{name}={value} is not a whole number from 1\n")


@pytest.mark.parametrize(("script", "name"), [("table1_cifar10.sh", "ONLY"), ("table2_lamamba.sh", "SIZES")])
def test_one_wrong_name_among_others_is_named_before_the_work(tmp_path, script, name):
    (tmp_path / "python").write_text(PRETENDER)
    (tmp_path / "python").chmod(0o755)
    flags = dict(PYTHON=str(tmp_path / "python"), SEEN=str(tmp_path / "seen"), SCALE="small", PROCESSES="1")
    right = {"ONLY": "DiT", "SIZES": "S"}[name]
    done = run_script(script, tmp_path, tmp_path, **flags, **{name: f"{right} tiny"})
    assert done.returncode == 2
    assert f"{name}=tiny is none of" in done.stderr
    assert not (tmp_path / "seen").exists()


def test_a_set_of_grids_that_there_is_not_is_named(tmp_path):
    done = run_script("grids.sh", tmp_path, tmp_path, PYTHON="false", SETS="digit")
    assert (done.returncode, done.stderr) == (2, "SETS=digit is none of the sets: digits cifar10\n")


def test_the_overlays_script_ends_with_what_fails(tmp_path):
    """Here all but its first two commands fail, which write what the others read and name versions."""
    (tmp_path / "python").write_text('#!/bin/sh\ncase $1 in -*) exit 0 ;; esac\necho why\nexit 3\n')
    (tmp_path / "python").chmod(0o755)
    command = ["sh", ROOT / "reproduce" / "overlay.sh", *3 * [tmp_path]]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHON": str(tmp_path / "python")})
    assert (done.returncode, done.stdout.splitlines()[-1]) == (3, "why")
