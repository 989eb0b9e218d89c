"""How commands begin and end: with one process, with several, and on a Slurm cluster."""

import atexit
import io
import os
import runpy
import socket
import subprocess
import sys
import time
from contextlib import nullcontext
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from commands import NEEDS_FULL, ROOT, as_torchrun_has_it, in_forks
from machine.processes import Processes, choose_device, join, launch

pytestmark = pytest.mark.usefixtures("one_thread")


def together(command, spoil=None):
    """Launches command(args, processes) in two forks of this process; returns their statuses."""
    environment = as_torchrun_has_it(2)

    def run(rank):
        os.environ |= environment | dict(RANK=str(rank))
        if spoil:
            spoil()
        launch(command, SimpleNamespace(device="cpu"))

    return in_forks(2, run)


def test_processes_wait_for_one_that_has_work_of_its_own():
    def soon():
        dist.distributed_c10d.default_pg_timeout = timedelta(seconds=0.3)

    def command(args, processes):
        time.sleep(1 - processes.rank)
        assert processes.share("done" if processes.rank == 0 else None) == "done"

    assert together(command, soon) == [0, 0]


def test_what_the_first_process_makes_the_others_find(tmp_path):
    def command(args, processes):
        with processes.main_process_first():
            if processes.rank == 0:
                time.sleep(0.5)
                (tmp_path / "made").touch()
            assert (tmp_path / "made").exists()

    assert together(command) == [0, 0]


def test_processes_agree_without_a_look_at_their_gpus(monkeypatch):
    monkeypatch.setattr(dist, "all_reduce", lambda flags, how: flags.copy_(torch.tensor([0, 1])))
    assert Processes(0, 2, torch.device("meta")).any(False, False) == (False, True)


@pytest.mark.parametrize(("device", "expected"), [("cpu", "gloo"), ("cuda", "cpu:gloo,cuda:nccl")])
def test_they_have_a_way_to_talk_for_each_kind_of_memory(monkeypatch, device, expected):
    """And twelve hours of patience in it."""
    asked = {}
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: asked.update(options, backend=backend))
    monkeypatch.setattr("machine.processes.rendezvous", lambda url: iter([(dist.HashStore(), 0, 2)]))
    for name, value in dict(RANK="0", WORLD_SIZE="2").items():
        monkeypatch.setenv(name, value)
    join(torch.device(device))
    assert asked["backend"] == expected
    assert asked["timeout"] == asked["store"].timeout == timedelta(hours=12)


def test_no_process_ends_before_all_have_done_their_work(tmp_path):
    def command(args, processes):
        if processes.rank == 0:
            time.sleep(0.5)
            (tmp_path / "done").touch()

    def leave_if_done(destroy=dist.destroy_process_group):
        dist.destroy_process_group = lambda: destroy() if (tmp_path / "done").exists() else os._exit(9)

    assert together(command, leave_if_done) == [0, 0]


@pytest.mark.parametrize("error", [ValueError("1 is not 2"), OSError("no disk"), KeyError("x"), RuntimeError("no memory")])
def test_a_process_that_fails_alone_says_why_and_waits_for_nobody(capfd, error):
    """On GPUs it would wait: to leave their group, processes finish what they have begun together."""

    def command(args, processes):
        if processes.rank == 1:
            raise error
        processes.barrier()

    def never():
        dist.destroy_process_group = lambda: os._exit(9)

    assert together(command, never) == [1, 1]
    errors = capfd.readouterr().err
    foreseen = isinstance(error, (ValueError, OSError))
    assert f"error: {error}\n" in errors if foreseen else f"{type(error).__name__}: {error}" in errors
    assert ("Traceback" in errors) != foreseen
    assert errors.count("error: stopped, because another process did") == 1


@NEEDS_FULL
def test_output_that_finds_no_room_keeps_no_process_from_leaving(capfd):
    def command(args, processes):
        print("This waits in memory for the end.")
        if processes.rank == 1:
            raise ValueError("1 is not 2")
        processes.barrier()

    def fill_disk():
        sys.stdout = open("/dev/full", "w")  # noqa: SIM115

    assert together(command, fill_disk) == [1, 1]
    errors = capfd.readouterr().err
    assert "error: 1 is not 2\n" in errors
    assert "Traceback" not in errors


def test_who_leaves_does_what_is_to_be_done_at_the_end_but_does_not_hang_there(tmp_path, monkeypatch):
    """With the status of all."""
    monkeypatch.setattr("machine.processes.FAREWELL", 0.5)

    def command(args, processes):
        atexit.register(time.sleep, 300)
        atexit.register((tmp_path / str(processes.rank)).touch)
        raise SystemExit(os.EX_TEMPFAIL)

    assert together(command) == [os.EX_TEMPFAIL] * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (dict(RANK="0"), "RANK is '0' and WORLD_SIZE '': torchrun sets both; without RANK there is one process"),
        (dict(RANK="2", WORLD_SIZE="2"), "RANK is '2' and WORLD_SIZE '2'"),
        (dict(RANK="a", WORLD_SIZE="2"), "RANK is 'a' and WORLD_SIZE '2'"),
        (dict(RANK="0", WORLD_SIZE="2"), "MASTER_ADDR expected, but not set"),
        (dict(RANK="0", WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT="{taken}"), "address already in use; torchrun"),
    ],
)
def test_an_environment_in_which_processes_cannot_meet_ends_in_one_line(monkeypatch, environment, message):
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        for name, value in environment.items():
            monkeypatch.setenv(name, value.format(taken=taken.getsockname()[1]))
        with pytest.raises(SystemExit, match=message) as end:
            launch(None, SimpleNamespace(device="cpu"))
    assert "\n" not in str(end.value)


@pytest.mark.parametrize(
    ("name", "there", "place", "expected"),
    [
        (None, 0, 0, "cpu"),
        (None, 2, 1, "cuda:1"),
        ("cuda", 8, 7, "cuda:7"),
        ("cuda:1", 2, 0, "cuda:1"),
        ("cuda:0", 1, 3, "cuda:0"),  # where each process sees one GPU, its own
        ("cuda:1", 2, 1, "--device cuda:1 is one GPU for several processes; --device cuda gives each its own"),
        ("cuda", 2, 3, "CUDA device 3 is wanted and PyTorch finds 2; use --device cpu or at most 2 processes"),
        ("cuda", 0, 1, "CUDA device 1 is wanted and PyTorch finds 0; use --device cpu$"),
        ("cuda:²", 2, 0, "--device cuda:² is none of cpu, cuda and cuda:N"),
        ("mps", 0, 0, "--device mps is none of cpu, cuda and cuda:N"),
    ],
)
def test_each_process_has_a_device_of_its_own(monkeypatch, name, there, place, expected):
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", str(place))
    if " " in expected:
        with pytest.raises(ValueError, match=expected):
            choose_device(name)
    else:
        assert choose_device(name) == torch.device(expected)
        assert chosen == [torch.device(expected).index] * (expected != "cpu")  # or all would begin on the first GPU


def test_no_name_is_too_strange_to_print(monkeypatch):
    """Where the locale knows ASCII alone, and of bytes that are no UTF-8; a command may have no --device."""
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, "ascii"))
    launch(lambda args, processes: print("grün, gr\udcfcn on", processes.device), SimpleNamespace())
    assert printed.getvalue() == rb"gr\xfcn, gr\udcfcn on cpu" + b"\n"


def unread():
    """A pipe whose other end is closed, as after `head`."""
    end, write = os.pipe()
    os.close(end)
    return write


@pytest.mark.parametrize(
    ("place", "fault"),
    [pytest.param(lambda: "/dev/full", "No space left", id="full", marks=NEEDS_FULL), pytest.param(unread, "", id="head")],
)
def test_output_may_have_no_reader_but_must_find_room(monkeypatch, place, fault):
    with open(place(), "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        with pytest.raises(SystemExit, match=rf"error: .*{fault}") if fault else nullcontext():
            launch(lambda args, processes: print("numbers"), SimpleNamespace())
        os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())            # where what is left to be written goes


@pytest.mark.parametrize("command", ["train", "sample", "sample_ddp", "evaluate", "images/encode", "checkpoints/export"])
def test_windows_is_told_at_once(monkeypatch, command):
    files = {name: str(getattr(module, "__file__", "")) for name, module in sys.modules.items()}
    ours = [name for name, file in files.items() if file.startswith(f"{ROOT}/") and not file.startswith(f"{ROOT}/.")]
    for name in ours:                                                      # and nothing of .venv, which may lie there
        if not name.startswith(("pde_ssm", "test")):  # operators have been registered
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "resource", None)
    with pytest.raises(SystemExit, match="this runs on Linux and macOS, and on Windows inside WSL"):
        runpy.run_path(f"{ROOT}/{command}.py")


# A minute of --wait takes half a second.
FAKE_SRUN = """
import os, subprocess, sys, time
flags = dict(word[2:].split("=") for word in sys.argv[1:] if word.startswith("--") and "=" in word)
command = sys.argv[sys.argv.index("bash"):]
places = [dict(SLURM_PROCID=rank, SLURM_LOCALID=rank, SLURM_NTASKS="2") for rank in "01"]
tasks = [subprocess.Popen(command, env=os.environ | place) for place in places]
while all(task.poll() is None for task in tasks):
    time.sleep(0.01)
bad = any(task.returncode for task in tasks if task.poll() is not None)
end = time.monotonic() + (0 if bad and flags["kill-on-bad-exit"] == "1" else float(flags.get("wait", "inf")) / 120)
while any(task.poll() is None for task in tasks) and time.monotonic() < end:
    time.sleep(0.01)
for task in tasks:
    task.kill()
sys.exit(max(status if status >= 0 else 128 - status for status in (task.wait() for task in tasks)))
"""
FAKE_SCONTROL = """
import os, sys
with open(os.environ["FAKE_QUEUE"], "a") as queue:
    print("localhost") if sys.argv[1] == "show" else queue.write(" ".join(sys.argv[1:]))
"""
FAKE_PYTHON = """
import os, pathlib, sys, time
rank, place = int(os.environ["RANK"]), [os.environ[name] for name in ("LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")]
with open(os.environ["FAKE_CALLS"], "a") as calls:
    calls.write(" ".join([str(rank), *place, *sys.argv[1:]]) + "\\n")
if rank == 1 and os.environ["FAKE_SAVES"]:
    path = pathlib.Path("xl/000-DiT-N-4/checkpoints", os.environ["FAKE_SAVES"])
    path.parent.mkdir(parents=True)
    path.touch()
status, seconds = os.environ["FAKE_ENDS"].split()[rank].split(":")
time.sleep(float(seconds))
sys.exit(int(status))
"""


@pytest.mark.parametrize(
    ("flag", "ends", "saves", "status", "again"),
    [
        ("--results-dir xl", "75:0.2 75:0", "0000001.pt", os.EX_TEMPFAIL, True),
        ("--results-dir=xl", "75:0.2 75:0", "0000001.dcp", os.EX_TEMPFAIL, True),
        ("--results-dir=other --resume xl/000-DiT-N-4", "75:0.2 75:0", "0000001.pt", os.EX_TEMPFAIL, True),
        ("--results-dir xl", "75:0.2 75:0", "", os.EX_TEMPFAIL, False),
        ("--results-dir xl", "0:0.2 0:0", "0000001.pt", 0, False),
        ("--results-dir xl", "75:30 75:0", "0000001.pt", 137, True),
        ("--results-dir xl", "75:30 75:0", "", 137, False),
        ("--results-dir xl", "143:0 75:0", "0000001.pt", 143, True),
        ("--results-dir xl", "1:0.2 1:0", "0000001.pt", 1, False),
    ],
    ids=["stopped", "sharded", "named", "before a step", "done", "killed", "killed before a step", "terminated", "an error"],
)
def test_the_slurm_script_queues_again_what_was_stopped_and_saved_and_nothing_else(tmp_path, flag, ends, saves, status, again):
    """With stand-ins for Slurm's commands and for Python."""
    for name, text in (("srun", FAKE_SRUN), ("scontrol", FAKE_SCONTROL), ("python", FAKE_PYTHON)):
        (tmp_path / name).write_text(f"#!{sys.executable} -IS\n{text}")
        (tmp_path / name).chmod(0o755)
    environment = dict(PATH=f"{tmp_path}:{os.environ['PATH']}", SLURM_JOB_ID="77", SLURM_JOB_NODELIST="here")
    environment |= dict(FAKE_CALLS="calls", FAKE_QUEUE="queue", FAKE_ENDS=ends, FAKE_SAVES=saves)
    command = ["bash", str(ROOT / "train.slurm"), *flag.split(), "--lr", "1"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    calls = sorted((tmp_path / "calls").read_text().splitlines())
    assert calls == [f"{rank} {rank} 2 localhost 20077 train.py --resume auto {flag} --lr 1" for rank in (0, 1)]
    assert (tmp_path / "queue").read_text() == ("requeue 77" if again else "")
    assert ("not queued again, for nothing new was saved in xl" in done.stderr) == (status not in (0, 1) and not again)
