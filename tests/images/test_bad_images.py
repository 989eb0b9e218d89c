"""Images that cannot be read: others of their class stand in for a few, many end the run."""

import errno
import json
import logging
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

import train
from commands import fit, fork, lasting
from images import dataset
from images.dataset import check_readable, load_dataset
from machine.processes import Processes

SMALL = ["--model", "DiT-N/8", "--global-batch-size", 8, "--lr", 1e-3, "--num-workers", 0, "--max-steps", 5]  # an epoch
BAD = {"1/7.png": "1/1.png", "2/5.png": "2/11.png", "2/8.png": "2/11.png"}  # and the next of its class, which goes around


@pytest.fixture
def spoilt(photos, tmp_path):
    """Photos of which three cannot be read, and the same with copies of the next ones in their place."""
    mended = shutil.copytree(photos, tmp_path / "mended")
    for name, other in BAD.items():
        shutil.copy(mended / other, mended / name)
        Path(photos, name).write_bytes(Path(photos, name).read_bytes()[:100])
    return photos, str(mended)


def learnt(results):
    return torch.load(max(Path(results).glob("000-DiT-N-8/checkpoints/*")))


def rows(results):
    return [lasting(json.loads(line)) for line in Path(results, "000-DiT-N-8", "log.jsonl").read_text().splitlines()]


def test_another_of_its_class_stands_in_for_a_bad_image(tmp_path, spoilt, shallow, caplog, one_thread):
    """In training and held out, on one process and on two."""
    for name, photos in zip(("a", "b"), spoilt):
        flags = [*SMALL, "--data-path", photos, "--val-path", photos, "--max-bad-images", 3, "--ckpt-every", 4]
        fit(tmp_path / name, *flags)
        assert fork(*flags, "--results-dir", tmp_path / f"{name}2", "--num-workers", 1, processes=2) == [0, 0]
    for processes in ("", "2"):
        with_bad, mended = (learnt(tmp_path / f"{name}{processes}") for name in "ab")
        assert all(torch.equal(with_bad["model"][name], w) for name, w in mended["model"].items())
        assert rows(tmp_path / f"a{processes}") == rows(tmp_path / f"b{processes}")
        assert mended["args"]["bad_images"] == []
        named = [re.search(r"cannot read the image .*/(\d/\d\.png) \(", fault)[1] for fault in with_bad["args"]["bad_images"]]
        assert sorted(named) == sorted(BAD)
    assert sum("another of its class stands in for it" in line for line in caplog.messages) == 3


def test_one_bad_image_too_many_ends_the_run_and_more_may_be_allowed_for(tmp_path, spoilt, shallow):
    flags = [*SMALL, "--data-path", spoilt[0]]
    for more in ([], ["--resume", "auto"]):
        with pytest.raises(OSError, match=r"nor could 1 before: all that --max-bad-images allows for|none stands in for it: 2"):
            fit(tmp_path / "r", *flags, "--max-bad-images", 1, *more)
    stopped = learnt(tmp_path / "r")
    assert 0 < stopped["step"] < 5
    assert len(stopped["args"]["bad_images"]) <= 1
    fit(tmp_path / "r", *flags, "--max-bad-images", 3, "--resume", "auto")
    fit(tmp_path / "whole", *flags, "--max-bad-images", 3)
    assert all(torch.equal(learnt(tmp_path / "r")["model"][name], w) for name, w in learnt(tmp_path / "whole")["model"].items())
    assert learnt(tmp_path / "r")["args"]["bad_images"] == learnt(tmp_path / "whole")["args"]["bad_images"]


@pytest.mark.parametrize("lack", [OSError(errno.EMFILE, "Too many open files"), MemoryError()], ids=["files", "memory"])
def test_what_the_machine_lacks_is_no_image_s_fault(photos, monkeypatch, lack):
    images = dataset.Replacing(load_dataset(photos, 8), 100)
    monkeypatch.setattr(Image, "open", lambda *_, **__: (_ for _ in ()).throw(lack))
    with pytest.raises(OSError, match=r"cannot read the image .*/1/\d+\.png \((.*Too many open files|MemoryError)\)$"):
        images[15]


def test_a_class_without_a_good_image_has_none_to_stand_in(photos):
    for path in Path(photos, "1").iterdir():
        path.write_bytes(b"")
    images = dataset.Replacing(load_dataset(photos, 8), 100)
    with pytest.raises(OSError, match=r"/1/10\.png .*; none stands in for it: 13 of its class were tried, .* is 100"):
        images[15]
    assert images[0][1:] == (0, [])


@pytest.mark.parametrize("workers", [0, 1])
def test_all_images_are_read_before_training(tmp_path, spoilt, shallow, caplog, workers):
    """Those of both paths, which --max-bad-images counts together, and one that is in both once."""
    Path(spoilt[1], "0", "3.png").write_bytes(b"")
    shutil.copytree(spoilt[1], whole := tmp_path / "whole")
    shutil.copy(whole / "0" / "6.png", whole / "0" / "3.png")
    flags = [*SMALL, "--data-path", spoilt[1], "--val-path", spoilt[0], "--check-data", "--num-workers", workers]
    for few in (0, 3):
        message = "4 of 80 images cannot be read: replace or delete them, or give --max-bad-images 4"
        with pytest.raises(ValueError, match=message):
            fit(tmp_path / "r", *flags, "--max-bad-images", few)
    assert not (tmp_path / "r").exists()
    named = [re.search(r"^cannot read the image .*/(\d/\d\.png) \(.+\)$", line)[1] for line in caplog.messages]
    assert named == 2 * ["0/3.png", *sorted(BAD)]
    if not workers:
        with pytest.raises(ValueError, match="1 of 80 images cannot be read"):
            fit(tmp_path / "r", *flags, "--val-path", spoilt[1])
        fit(tmp_path / "r", *flags, "--max-bad-images", 4)
        fit(tmp_path / "s", *flags, "--data-path", whole, "--val-path", whole)
        assert learnt(tmp_path / "s")["step"] == learnt(tmp_path / "r")["step"] == 5


def test_every_process_checks_images_of_its_own_and_knows_their_numbers(spoilt):
    found, images = [], load_dataset(spoilt[0], 8)

    class Noted(Processes):
        def gather(self, value):
            found.extend(value)
            return []

    for rank in range(2):
        check_readable(images, Noted(rank, 2, torch.device("cpu")), print)
    assert sorted(re.search(r"(\d/\d\.png) \(", fault)[1] for _, fault in found) == sorted(BAD)
    assert all(images.source.paths[number] in fault for number, fault in found)


def test_names_that_no_locale_can_spell_are_logged(tmp_path, photos, shallow, capfd, monkeypatch):
    """In the folder's path and in a class."""
    monkeypatch.setattr(logging.getLogger("train"), "propagate", False)  # to pytest, whose workers cannot send such names
    folder = bytes(tmp_path) + b"/gr\xfcn"
    os.rename(photos, folder)
    os.rename(folder + b"/1", folder + b"/wei\xdf")
    bad = folder + b"/wei\xdf/7.png"
    os.truncate(bad, 50)
    train.log_to(logging.StreamHandler())
    fit(tmp_path / "r", *SMALL, "--data-path", os.fsdecode(folder), "--max-bad-images", 1)
    log, errors = (tmp_path / "r" / "000-DiT-N-8" / "log.txt").read_text(), capfd.readouterr().err
    assert not re.search("Logging error|Writing to .* failed", errors)
    assert r"gr\udcfcn)" in log
    assert r"Classes: 0, 2, wei\xdf" in log
    assert r"gr\xfcn/wei\xdf/7.png" in log
