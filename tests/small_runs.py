"""Small runs of training: what they leave, and what disturbs them."""

import json
import os
import signal
from functools import cache

import torch
from torch.distributed.tensor import DTensor

import train
from checkpoints.read import read_checkpoint
from checkpoints.resume import tensors
from commands import fork

TINY = ["--model", "DiT-N/8", "--global-batch-size", 8, "--ckpt-every", 4, "--log-every", 1, "--lr", 1e-3]


def undisturbed(tmp_path_factory, *flags):
    """A function of a number of processes: the folder of a run on that many which nothing disturbs, made once each."""

    @cache
    def run(processes):
        folder = tmp_path_factory.mktemp("calm")
        assert fork(*TINY, *flags, "--num-workers", 0, "--results-dir", folder, processes=processes) == [0] * processes
        return folder

    return run


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def at_update(number, act=die):
    """Does something right before an update."""

    def spoil(update=train.update):
        def wrapped(learner, loss, step, *rest):
            if step == number:
                act()
            return update(learner, loss, step, *rest)

        train.update = wrapped

    return spoil


def flipped(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def assert_same(one, other):
    """Equal to the last bit, in dicts of whatever."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for name in one:
            assert_same(one[name], other[name])
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    else:
        assert one == other


def checkpoint_names(folder):
    return sorted(path.name for path in folder.glob("*/checkpoints/*"))


def learnt(folder, step=None):
    """All of a checkpoint but its settings; of the newest one, or of a step."""
    if step is None:
        path = max(folder.glob("*/checkpoints/*.pt"), key=lambda path: path.name)
    else:
        (path,) = folder.glob(f"*/checkpoints/{step:07d}.pt")
    contents = read_checkpoint(path)
    return {name: contents[name] for name in contents if name != "args"}


def log_rows(folder):
    return [json.loads(line) for line in max(folder.iterdir()).joinpath("log.jsonl").read_text().splitlines()]


def spoil_weights(part, value, step):
    """Writes that value into a tensor of a learner's right after an update; of a sharded one, into this process's part."""

    def spoilt(learner, *rest, update=train.update):
        learnt = update(learner, *rest)
        if rest[1] == step:
            x = tensors(learner)[part]["final_layer.linear.weight"]
            x = x["exp_avg_sq"] if part == "opt" else x
            (x.to_local() if isinstance(x, DTensor) else x)[-1, -1] = value
        return learnt

    train.update = spoilt
