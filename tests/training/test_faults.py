"""What training can lose while it works, and what it leaves then. Each has a row in docs/faults.md."""

import errno
import logging
import multiprocessing
import os
import pty
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import dataloader

import train
from checkpoints import resume
from commands import NEEDS_FULL, QUICK, Colours, fork
from faults import end_of, in_call, reader, send, throw
from images import dataset
from machine import stops
from small_runs import TINY, assert_same, checkpoint_names, learnt, undisturbed
from training import batches, learner, probe, runs, watching

STEPS = 8
AT = 4  # the step in which something is lost
pytestmark = pytest.mark.usefixtures("shallow", "one_thread")


@pytest.fixture(scope="module")
def calm(tmp_path_factory, images):
    """calm(processes): the folder of a run that loses nothing, with a checkpoint of every step."""

    return undisturbed(tmp_path_factory, "--ckpt-every", 1, "--data-path", images, "--max-steps", STEPS)


@pytest.fixture
def flags(calm, tmp_path, images):
    """Of a run that would save at its end alone."""
    calm(1)  # before a test spoils anything
    runs.warned.clear()
    flags = [*TINY, "--ckpt-every", 100, "--data-path", images, "--max-steps", STEPS, "--num-workers", 0]
    return [*flags, "--results-dir", tmp_path / "r"]


@pytest.fixture
def watched(monkeypatch, images):
    """Flags with which there is a checkpoint and all that can be shown after step AT."""
    monkeypatch.setattr(watching, "SAMPLING_STEPS", 2)
    monkeypatch.setattr(probe, "open_network", lambda *_: Colours())
    monkeypatch.setattr(probe, "PROBED", 4)
    return ["--val-path", images, "--sample-every", AT, "--probe-every", AT, "--ckpt-every", AT]


WATCHED = ["held_out_loss", "draw_samples", "distance"]


def end_of_training(*flags):
    train.log_to(logging.StreamHandler())
    return end_of(train.main, train.parse_args([*QUICK, *map(str, flags)]))


def in_step(number, act):
    """Does something in the middle of a step."""

    def spoil(patch, draw=train.draw_batch):
        def wrapped(images, labels, step, *rest, **how):
            if step == number:
                act()
            return draw(images, labels, step, *rest, **how)

        patch.setattr(train, "draw_batch", wrapped)

    return spoil


def hang(patch, get=dataset.TrainingImages.__getitem__):
    """The process that reads images has its run stopped, and reads no more."""
    read = []

    def wrapped(self, index):
        read.append(index)
        if len(read) > AT * 8:
            os.kill(os.getppid(), signal.SIGTERM)
            time.sleep(1000)
        return get(self, index)

    patch.setattr(dataset.TrainingImages, "__getitem__", wrapped)


def assert_saved_once(calm, folder, log, processes=1):
    """All that was learnt up to the step that the log names, to the last bit, and nothing else. Returns the step."""
    (step,) = map(int, re.findall(r"Stopped after step (\d+)", log))
    assert checkpoint_names(folder) == [f"{step:07d}.pt"]
    assert log.count("Saved checkpoint") == 1
    assert_same(learnt(calm(processes), step), learnt(folder, step))
    return step


@pytest.mark.parametrize("number", stops.STOPS, ids=lambda number: number.name)
def test_a_signal_in_a_step_saves_the_steps_before(calm, flags, tmp_path, monkeypatch, capfd, number):
    in_step(AT, send(number))(monkeypatch)
    assert end_of_training(*flags) == 75
    err = capfd.readouterr().err
    assert f"Stopped after step {AT - 1} by {number.name}" in err
    assert "Traceback" not in err
    assert assert_saved_once(calm, tmp_path / "r", err) == AT - 1


@pytest.mark.parametrize(
    ("spoil", "flag"),
    [(hang, "--num-workers=1"), (in_call(learner, "update_ema", send(signal.SIGTERM)), ""),
     (in_call(torch, "save", send(signal.SIGTERM)), ""), (in_call(torch, "save", send(signal.SIGHUP, signal.SIGTERM)), ""),
     *((in_call(watching, name, send(signal.SIGINT)), "") for name in WATCHED)],
    ids=["reading", "update", "checkpoint", "checkpoint, twice", *WATCHED],
)  # fmt: skip
def test_a_signal_at_any_moment_saves_once(calm, flags, tmp_path, monkeypatch, capfd, watched, spoil, flag):
    """Also while it waits for a process that reads images and hangs. An update is finished first."""
    spoil(monkeypatch)
    assert end_of_training(*flags, *watched, *filter(None, [flag])) == 75
    assert_saved_once(calm, tmp_path / "r", capfd.readouterr().err)


def test_a_signal_before_the_first_step_ends_at_once(flags, tmp_path, monkeypatch, capfd):
    """Also while processes connect their models, which may take long."""
    in_call(train, "replicate", send(signal.SIGTERM))(monkeypatch)
    assert end_of_training(*flags) == 75
    assert "Stopped after step" not in capfd.readouterr().err
    assert checkpoint_names(tmp_path / "r") == []


def test_ctrl_c_twice_ends_at_once_and_damages_nothing(calm, flags, tmp_path, monkeypatch, capfd):
    def save(contents, file, save=torch.save):
        save(contents, file)
        if contents["step"] == AT:
            send(signal.SIGINT, signal.SIGINT)()

    monkeypatch.setattr(torch, "save", save)
    assert end_of_training(*flags, "--ckpt-every", 2) == 75
    err = capfd.readouterr().err
    assert "stopping; what was learnt is saved first, unless Ctrl-C comes once more" in err
    assert "0000004.pt is not written, because Ctrl-C came twice" in err
    assert checkpoint_names(tmp_path / "r") == ["0000002.pt"]
    assert_same(learnt(calm(1), 2), learnt(tmp_path / "r", 2))


def test_a_signal_that_is_ignored_stays_so(flags, tmp_path, monkeypatch):
    """nohup has SIGHUP ignored."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    in_step(AT, send(signal.SIGHUP))(monkeypatch)
    assert end_of_training(*flags) == 0


@pytest.mark.parametrize(
    "spoil", [in_call(batches, "load_dataset", send(signal.SIGTERM)), in_call(train, "create_learner", send(signal.SIGTERM))]
)
def test_a_signal_before_step_1_ends_at_once(flags, tmp_path, monkeypatch, capfd, spoil):
    spoil(monkeypatch)
    assert end_of_training(*flags) == 75
    assert re.findall(r"stopped by \w+", capfd.readouterr().err) == ["stopped by SIGTERM"]
    assert checkpoint_names(tmp_path / "r") == []


def test_a_signal_while_networks_are_compiled_ends_at_once(flags, tmp_path, monkeypatch, capfd, compilations):
    monkeypatch.setattr(compilations, "frame_count", 0)
    in_call(compilations, "backend", send(signal.SIGTERM))(monkeypatch)
    assert end_of_training(*flags, "--compile") == 75
    assert "Stopped after step 0 by SIGTERM" in capfd.readouterr().err
    assert checkpoint_names(tmp_path / "r") == []


SHARED = RuntimeError("unable to open shared memory object </torch_7_8> in read-write mode: Too many open files (24)")


@pytest.mark.parametrize(
    ("act", "end"),
    [(lambda: bytearray(2**60), "out of memory"), (lambda: np.empty(2**58), "out of memory: Unable to allocate 2.00 EiB .*"),
     (lambda: torch.empty(2**58), ".*DefaultCPUAllocator: can't allocate memory.*"),
     (throw(torch.OutOfMemoryError("CUDA out of memory.")), ".*CUDA out of memory."), (throw(SHARED), str(SHARED)),
     (throw(OSError(errno.EIO, "Input/output error")), ".*Input/output error"),
     (throw(OSError(errno.ESTALE, "Stale file handle")), ".*Stale file handle"), (throw(KeyError("a bug")), None)],
    ids=["Python's memory", "NumPy's memory", "PyTorch's memory", "a GPU's memory", "shared memory", "EIO", "ESTALE", "a bug"],
)  # fmt: skip
def test_an_error_in_a_step_saves_the_steps_before(calm, flags, tmp_path, monkeypatch, capfd, act, end):
    in_step(AT, act)(monkeypatch)
    how = end_of_training(*flags)
    assert re.fullmatch(f"error: {re.escape(end) if end == str(SHARED) else end}", how) if end else isinstance(how, KeyError)
    assert assert_saved_once(calm, tmp_path / "r", capfd.readouterr().err) == AT - 1


@pytest.mark.parametrize("name", WATCHED)
def test_an_error_in_what_is_shown_comes_after_the_checkpoint(calm, flags, tmp_path, monkeypatch, capfd, watched, name):
    error = KeyError("a bug")
    in_call(watching, name, throw(error))(monkeypatch)
    every = AT if name == "held_out_loss" else 100
    assert end_of_training(*flags, *watched, "--ckpt-every", every) is error
    assert assert_saved_once(calm, tmp_path / "r", capfd.readouterr().err) == AT


def test_an_update_that_was_interrupted_is_not_saved(flags, tmp_path, monkeypatch, capfd):
    """The optimiser has made its step, and the averages have not."""
    in_call(learner, "update_ema", throw(MemoryError()))(monkeypatch)
    assert end_of_training(*flags) == "error: out of memory"
    assert "Stopped in the middle of an update: out of memory; nothing is saved" in capfd.readouterr().err
    assert checkpoint_names(tmp_path / "r") == []


@pytest.mark.parametrize(
    ("lose", "end"),
    [(send(signal.SIGKILL, to=reader), "ended by SIGKILL; if memory"),
     (send(signal.SIGBUS, to=reader), "shared memory (/dev/shm) ran out"),
     (lambda: subprocess.run(["kill", str(reader())], check=True), 75),
     (send(signal.SIGSTOP, to=reader), "no images have come for 0.2 seconds")],
    ids=["SIGKILL", "SIGBUS", "SIGTERM", "SIGSTOP"],
)  # fmt: skip
def test_the_process_that_reads_images_is_lost(calm, flags, tmp_path, monkeypatch, capfd, lose, end):
    """What it has read already is still learnt."""
    monkeypatch.setattr(dataloader._MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.1,))  # it looks every 5 s
    in_step(AT, lambda: lose() or monkeypatch.setattr(batches, "PATIENCE", 0.2))(monkeypatch)
    how = end_of_training(*flags, "--num-workers", 1)
    assert how == end if end == 75 else end in how
    err = capfd.readouterr().err
    assert "Traceback" not in err
    assert assert_saved_once(calm, tmp_path / "r", err) >= AT
    assert not multiprocessing.active_children()


def test_signals_for_the_one_that_reads_images_are_for_the_run(calm, flags, tmp_path, monkeypatch):
    """Ctrl-C and a terminal's end reach all processes: it goes on reading until the run has ended."""
    in_step(AT, send(signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, to=reader))(monkeypatch)
    assert end_of_training(*flags, "--num-workers", 1) == 0
    assert_same(learnt(calm(1), STEPS), learnt(tmp_path / "r", STEPS))


def test_memory_that_is_all_taken(calm, flags, tmp_path, capfd):
    """To write a checkpoint hardly any is needed."""

    def spoil(rank):
        def take():
            size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size, size))
            torch.empty(2**28)

        in_step(AT, take)(pytest.MonkeyPatch())

    assert fork(*flags, spoil=spoil) == [1]
    err = capfd.readouterr().err
    assert "can't allocate memory" in err
    assert assert_saved_once(calm, tmp_path / "r", err) == AT - 1


def test_files_that_cannot_be_opened_any_more(calm, flags, tmp_path, capfd):
    """As with `ulimit -n 40`, which is not reached before the run has begun."""

    def spoil(rank):
        def limit():
            free = os.dup(0)
            resource.setrlimit(resource.RLIMIT_NOFILE, (free, free))

        in_step(AT, limit)(pytest.MonkeyPatch())

    assert fork(*flags, "--num-workers", 2, spoil=spoil) == [1]
    err = capfd.readouterr().err
    assert "Traceback" not in err
    assert assert_saved_once(calm, tmp_path / "r", err) >= AT


def closed_pipe():
    read, write = os.pipe()
    os.close(read)
    return write


def closed_terminal():
    terminal, end = pty.openpty()
    os.close(terminal)
    return end


def full():
    return os.open("/dev/full", os.O_WRONLY)


@pytest.mark.parametrize("lose", [closed_pipe, closed_terminal, pytest.param(full, marks=NEEDS_FULL)])
def test_training_outlives_its_terminal(calm, flags, tmp_path, lose):
    """Closed, or piped to `head`, or into a file on a disk that is full."""

    def spoil(rank):
        sys.stderr = open(lose(), "w")  # noqa: SIM115
        train.logger.handlers[0].setStream(sys.stderr)

    assert fork(*flags, spoil=spoil) == [0]
    assert_same(learnt(calm(1), STEPS), learnt(tmp_path / "r", STEPS))
    assert (tmp_path / "r" / "000-DiT-N-8" / "log.txt").read_text().endswith("Done!\n")


def fill(name):
    """What is written there finds no room."""

    def lose(folder):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to("/dev/full")

    return lose


def redirect_log(path):
    os.dup2(os.open(path, os.O_WRONLY), train.logger.handlers[1].stream.fileno())


@pytest.mark.parametrize(
    ("what", "lose"),
    [pytest.param("Writing to log.jsonl", fill("log.jsonl"), marks=NEEDS_FULL),
     ("Writing a grid of samples", lambda folder: (folder / "samples").touch()),
     pytest.param(r"Writing to .*log.txt", lambda folder: redirect_log("/dev/full"), marks=NEEDS_FULL),
     ("Tracking", lambda folder: None)],
    ids=["log.jsonl", "samples", "log.txt", "tracker"],
)  # fmt: skip
def test_training_goes_on_without_what_is_shown(calm, flags, tmp_path, monkeypatch, capfd, watched, what, lose):
    def tracker(folder, *rest):
        lose(folder)
        return throw(ConnectionError("the server hangs up"))

    monkeypatch.setitem(train.TRACKERS, "tensorboard", tracker)
    assert end_of_training(*flags, *watched, "--tracker", "tensorboard") == 0
    assert len(re.findall(f"{what} failed, and training goes on: ", capfd.readouterr().err)) == 1
    assert_same(learnt(calm(1), STEPS), learnt(tmp_path / "r", STEPS))
    redirect_log(os.devnull)


def test_a_folder_that_was_deleted_is_made_again(calm, flags, tmp_path, monkeypatch):
    in_step(AT, lambda: shutil.rmtree(tmp_path / "r"))(monkeypatch)
    assert end_of_training(*flags) == 0
    assert_same(learnt(calm(1), STEPS), learnt(tmp_path / "r", STEPS))


@pytest.mark.parametrize("lost", ["", "TMPDIR"])
def test_a_folder_that_cannot_be_written_sends_the_checkpoint_elsewhere(calm, flags, tmp_path, monkeypatch, lost):
    def lose():
        checkpoints = tmp_path / "r" / "000-DiT-N-8" / "checkpoints"
        checkpoints.rmdir()
        checkpoints.touch()
        send(signal.SIGTERM)()

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "t"))
    if not lost:
        (tmp_path / "t").mkdir()
    in_step(AT, lose)(monkeypatch)
    end = end_of_training(*flags)
    assert re.match(r"error: .*File exists: \S*checkpoints", end)
    if lost:
        assert "; and [Errno 2] No such file" in end
        return
    elsewhere = re.search(r"it is in (\S+): --resume (\S+) goes on from there", end)
    assert elsewhere[1] == elsewhere[2]
    assert_same(learnt(calm(1), AT - 1), learnt(tmp_path / "t", AT - 1))
    monkeypatch.undo()
    stops.received.clear()
    assert end_of_training(*flags, "--resume", elsewhere[1]) == 0
    assert_same(learnt(calm(1), STEPS), learnt(tmp_path / "t", STEPS))


def test_older_checkpoints_that_cannot_be_deleted_end_nothing(flags, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(resume, "delete", throw(PermissionError(errno.EACCES, "Permission denied")))
    assert end_of_training(*flags, "--ckpt-every", 2, "--keep-last", 1) == 0
    assert len(checkpoint_names(tmp_path / "r")) == STEPS / 2
    assert capfd.readouterr().err.count("Deleting older checkpoints failed, and training goes on: [Errno 13]") == 1


@pytest.mark.parametrize(
    ("act", "status"), [(throw(MemoryError()), 1), (throw(KeyError("a bug")), 1), (send(signal.SIGKILL), -signal.SIGKILL)]
)
@pytest.mark.parametrize("victim", [0, 1])
def test_one_of_two_processes_is_lost(calm, flags, tmp_path, capfd, act, status, victim):
    """The one that is left, or has something left, saves what both have learnt."""
    calm(2)

    def spoil(rank):
        if rank == victim:
            in_step(AT, act)(pytest.MonkeyPatch())

    statuses = fork(*flags, processes=2, spoil=spoil)
    assert statuses[victim] == status
    assert statuses[1 - victim] == 1
    assert checkpoint_names(tmp_path / "r") == ["0000003.pt"]
    assert_same(learnt(calm(2), AT - 1), learnt(tmp_path / "r", AT - 1))


def test_processes_that_meet_the_same_error_save_once(calm, flags, tmp_path, capfd):
    calm(2)
    assert fork(*flags, processes=2, spoil=lambda rank: in_step(AT, throw(MemoryError()))(pytest.MonkeyPatch())) == [1, 1]
    assert checkpoint_names(tmp_path / "r") == ["0000003.pt"]


def test_what_no_process_has_alone_is_said_not_to_be_saved(flags, tmp_path, capfd):
    def spoil(rank):
        if rank == 1:
            in_step(AT, throw(MemoryError()))(pytest.MonkeyPatch())

    assert fork(*flags, "--parallel", "fsdp", "--ckpt-every", 2, processes=2, spoil=spoil) == [1, 1]
    assert checkpoint_names(tmp_path / "r") == ["0000002.dcp"]
    assert "0000003.dcp: every process has a part of it" in capfd.readouterr().err
