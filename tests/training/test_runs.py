"""The folder of a run."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import train
from commands import fit
from machine.processes import Processes
from training.runs import create_experiment, log_interval


@pytest.mark.parametrize(
    ("there", "new"),
    [
        ([], "000"),
        (["998-DiT-S-2", "999-DiT-S-2"], "1000"),
        (["999-DiT-S-2", "1000-DiT-B-2", "1001-UNet-S"], "1002"),
        (["²01-x", "٣٤٥-x", "x", "1-x", "20261125-notes", "-", ".hidden"], "000"),
    ],
)
def test_every_experiment_has_a_number_of_its_own(tmp_path, there, new):
    for name in there:
        (tmp_path / name).mkdir()
    assert create_experiment(tmp_path, "DiT-N/4").name == f"{new}-DiT-N-4"


def test_operations_are_counted_for_each_process():
    written = []
    losses, two = [torch.tensor(1.0), torch.tensor(2.0)] * 2, Processes(0, 2, torch.device("cpu"))
    log_interval(4, losses, 2.0, (6e9, 1e11), two, written.append)
    (row,) = written
    assert (row["loss"], row["steps_per_sec"], row["gflops_per_sec"], row["utilisation"]) == pytest.approx((1.5, 2, 6, 0.06))


def test_experiments_that_begin_at_once_do_not_share_a_folder(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: create_experiment(tmp_path / "new", "DiT-N/4"), range(32)))
    assert sorted(folder.name for folder in folders) == [f"{index:03d}-DiT-N-4" for index in range(32)]


def test_a_run_that_cannot_begin_leaves_no_folder_and_one_that_cannot_go_on_keeps_its_own(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("no room for the averages")

    flags = ["--model", "DiT-N/8", "--global-batch-size", 8]
    folder = fit(tmp_path, *flags, "--max-steps", 1)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(train, "create_learner", fail)
    for more in ([], ["--resume", folder]):
        with pytest.raises(torch.OutOfMemoryError):
            fit(tmp_path, *flags, "--max-steps", 2, *more)
    assert sorted(tmp_path.rglob("*")) == before
