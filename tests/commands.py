"""Running the commands in tests: in this process, where it is fast, or under torchrun."""

import fcntl
import logging
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sample
import sample_ddp
import train
from machine.processes import ALONE, launch

ROOT = Path(__file__).parent.parent
QUICK = ["--model", "DiT-N/4", "--vae", "none", "--image-size", "8", "--num-classes", "10", "--device", "cpu"]
FEW_STEPS = ["--num-sampling-steps", "4", "--device", "cpu"]
NEEDS_FULL = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has this")


def write_photos(folder):
    """Forty coloured images in three classes, which may be mirrored."""
    generator = np.random.default_rng(0)
    for i in range(40):
        path = folder / str(i % 3) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (12, 10, 3), dtype=np.uint8)).save(path)
    return str(folder)


def fit(folder, *flags):
    """Trains the smallest model; returns the experiment's folder."""
    train.main(train.parse_args([*QUICK, "--results-dir", str(folder), *map(str, flags)]), ALONE)
    return max(Path(folder).iterdir())


def lasting(row):
    """Of a row of the log what is not otherwise on another day."""
    return {name: row[name] for name in row if name not in ("steps_per_sec", "gflops_per_sec", "peak_memory_gb")}


def draw(path, out, *flags):
    """The pixels of sample.py's grid."""
    sample.main(sample.parse_args(["--ckpt", str(path), "--out", str(out), *FEW_STEPS, *map(str, flags)]), ALONE)
    with Image.open(out) as image:
        return np.asarray(image)


def draw_many(path, folder, *flags):
    """The images in sample_ddp.py's .npz."""
    args = sample_ddp.parse_args(["--ckpt", str(path), "--sample-dir", str(folder), *FEW_STEPS, *map(str, flags)])
    sample_ddp.main(args, ALONE)
    with np.load(next(Path(folder).glob("*.npz"))) as arrays:
        return arrays["arr_0"]


def error_of(command, *flags):
    """The one line with which a command ends."""
    with pytest.raises(SystemExit) as end:
        launch(command.main, command.parse_args(list(map(str, flags))))
    assert "\n" not in str(end.value)
    return str(end.value)


def change_weights(path, edit):
    """Lets edit(weights) change a checkpoint's averaged weights."""
    contents = torch.load(path, weights_only=True)
    edit(contents["ema"])
    torch.save(contents, path)
    return path


def write_modules(folder, **sources):
    """A folder with those files of Python."""
    folder.mkdir()
    for name, source in sources.items():
        (folder / f"{name}.py").write_text(source)
    return folder


def torchrun(processes, script, *flags, fails=False):
    """Runs a command, a file or a module, on that many processes of one thread each; returns what it printed."""
    assert_one_thread()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += [str(ROOT / script)] if script.endswith(".py") else ["-m", script]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, *map(str, flags)], capture_output=True, text=True, env=environment)
    assert (done.returncode != 0) == fails, done.stderr
    return done.stderr


class Colours(torch.nn.Module):
    """Stands for Inception: two statistics of each colour as pool, the means of halves as spatial."""

    name, label, dim = "inception", "", 6

    def forward(self, images):
        x = images.float() / 255
        halves = x.flatten(2).unflatten(2, (2, -1)).mean(3)                # (N, 3, 2)
        return dict(pool=torch.cat([x.mean((2, 3)), x.std((2, 3))], 1), spatial=halves.flatten(1))

    def probabilities(self, pool):
        return (5 * pool).softmax(1)


def assert_one_thread():
    """Other processes have one thread here, and what they made is compared with what this one made, often to the bit: sums
    depend on the number of threads, though not on every processor."""
    assert torch.get_num_threads() == 1, "a test that starts processes takes the fixture one_thread"


def forked(run, *args):
    """A child of this process that runs a function, in one thread: OpenMP's do not survive a fork."""
    assert_one_thread()
    return multiprocessing.get_context("fork").Process(target=run, args=args)


def in_forks(count, run):
    """Calls run(rank) in so many forks of this process; returns their statuses, -9 for one that was killed."""
    children = [forked(run, rank) for rank in range(count)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    return [child.exitcode for child in children]


@contextmanager
def locked_by_another(path):
    """Another process holds the lock of a file."""
    ready = multiprocessing.get_context("fork").Event()

    def hold():
        with open(path, "a") as file:
            fcntl.lockf(file, fcntl.LOCK_EX)
            ready.set()
            time.sleep(600)

    other = forked(hold)
    other.start()
    assert ready.wait(60)
    try:
        yield
    finally:
        other.kill()
        other.join()


def as_torchrun_has_it(processes):
    """The environment of so many processes that are to find one another, but for RANK."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return dict(WORLD_SIZE=str(processes), MASTER_ADDR="localhost", MASTER_PORT=str(free.getsockname()[1]))


def fork(*flags, processes=1, spoil=None):
    """Trains in forks of this process, which saves their start-up; each first calls spoil(rank). Returns their statuses."""
    environment = as_torchrun_has_it(processes) if processes > 1 else {}

    def run(rank):
        os.environ |= environment | ({"RANK": str(rank)} if environment else {})
        train.log_to(logging.StreamHandler())
        if spoil:
            spoil(rank)
        try:
            launch(train.main, train.parse_args([*QUICK, *map(str, flags)]))
        except SystemExit as end:
            if isinstance(end.code, str):
                sys.stderr.write(f"{end.code}\n")  # in one piece: others may be writing theirs
            sys.stderr.flush()
            os._exit(1 if isinstance(end.code, str) else end.code)

    return in_forks(processes, run)
