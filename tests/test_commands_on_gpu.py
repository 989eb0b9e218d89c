"""The commands on a GPU: training in every precision, resuming, several processes, sampling, evaluation, overlay."""

import json
import shutil
import socket

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch.distributed.device_mesh import init_device_mesh

import evaluate
import overlay
import sample
import sample_ddp
import train
from commands import QUICK, ROOT, Colours
from comparing import exchange
from machine.processes import Processes, join
from on_gpu import BACKEND, DEVICE, NEEDS_ONE, first_everywhere
from small_runs import log_rows
from training import learner

pytestmark = pytest.mark.gpu
ONE = Processes(0, 1, DEVICE)
FEW = ["--global-batch-size", "4", "--num-workers", "0", "--log-every", "1", "--pde-backend", BACKEND]


@pytest.fixture(autouse=True)
def plain_products():
    yield
    torch.set_float32_matmul_precision("highest")  # as commands do not leave it


def fit(folder, *flags, processes=ONE):
    train.main(train.parse_args([*QUICK, *FEW, "--results-dir", str(folder), *map(str, flags)]), processes)
    return [row["loss"] for row in log_rows(folder)]


@NEEDS_ONE
@pytest.mark.parametrize("objective", ["flow", "diffusion"])
@pytest.mark.parametrize("precision", ["bf16", "fp32", "fp16"])
@pytest.mark.parametrize("mixer", ["pdessm-g", "attention"])
def test_training_goes_on_as_if_it_had_not_stopped(tmp_path, mixer, precision, objective):
    flags = ["--mixer", mixer, "--precision", precision, "--objective", objective]
    losses = fit(tmp_path / "whole", *flags, "--max-steps", 4)
    fit(tmp_path / "parts", *flags, "--max-steps", 2)
    assert fit(tmp_path / "parts", *flags, "--max-steps", 4, "--resume", "auto") == pytest.approx(losses, rel=1e-2)
    assert np.isfinite(losses).all()


@NEEDS_ONE
def test_compiled_training_learns_alike(tmp_path, request):
    if DEVICE.type == "cpu":
        request.getfixturevalue("compilations")
    flags = ["--mixer", "pdessm", "--precision", "bf16", "--max-steps", 3]
    assert fit(tmp_path / "b", *flags, "--compile") == pytest.approx(fit(tmp_path / "a", *flags), rel=2e-2)


@pytest.fixture
def group(monkeypatch):
    """What torchrun --nproc_per_node=1 makes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    for name, value in dict(RANK=0, WORLD_SIZE=1, LOCAL_RANK=0, MASTER_ADDR="localhost", MASTER_PORT=port).items():
        monkeypatch.setenv(name, str(value))
    yield join(DEVICE)
    dist.destroy_process_group()


def test_processes_talk_through_nccl_and_gloo(group):
    two = Processes(0, 2, DEVICE)  # in a group of one, which is half of what it believes
    assert two.any(False, True) == (False, True)
    assert two.mean(torch.ones(3, device=DEVICE)).tolist() == [0.5] * 3
    assert two.share("x") == "x"
    assert two.gather("x")[0] == "x"
    two.barrier()


@NEEDS_ONE
@pytest.mark.parametrize("parallel", ["fsdp", "ddp"])
def test_both_ways_of_several_processes_learn_and_resume(tmp_path, group, monkeypatch, parallel):
    """By one of two, which is alone in its group."""
    monkeypatch.setattr(learner, "init_device_mesh", lambda kind, shape: init_device_mesh(kind, (1,)))
    flags = ["--mixer", "pdessm", "--parallel", parallel, "--precision", "bf16"]
    fit(tmp_path, *flags, "--max-steps", 2, processes=Processes(0, 2, DEVICE))
    losses = fit(tmp_path, *flags, "--max-steps", 3, "--resume", "auto", processes=Processes(0, 2, DEVICE))
    assert len(losses) == 3
    assert np.isfinite(losses).all()


def draw(path, out, *flags):
    args = ["--ckpt", path, "--out", str(out), "--num-sampling-steps", "4", "--class-labels", "3", "--pde-backend", BACKEND]
    sample.main(sample.parse_args([*args, *flags]), ONE)
    with Image.open(out) as image:
        return np.asarray(image).astype(int)


@pytest.mark.parametrize("objective", first_everywhere(["flow", "diffusion"]))
@pytest.mark.parametrize("how", first_everywhere(["--precision bf16", "--compile", "--precision fp16"]))
def test_samples_of_every_kind_are_those_of_plain_ones(tmp_path, request, checkpoint, how, objective):
    """Compiled, a network is a CUDA graph on GPUs."""
    if how == "--compile" and DEVICE.type == "cpu":
        request.getfixturevalue("compilations")
    path = checkpoint("pdessm", objective=objective)
    plain = draw(path, tmp_path / "a.png")
    assert np.abs(draw(path, tmp_path / "b.png", *how.split()) - plain).mean() <= (1 if how == "--compile" else 8)
    torch.compiler.reset()


@NEEDS_ONE
def test_many_samples_and_their_evaluation(tmp_path, checkpoint, random_images, monkeypatch):
    flags = ["--ckpt", checkpoint(), "--sample-dir", str(tmp_path / "s"), "--num-fid-samples", "12"]
    flags += ["--num-sampling-steps", "2", "--per-proc-batch-size", "5"]
    sample_ddp.main(sample_ddp.parse_args(flags), ONE)
    (found,) = (tmp_path / "s").glob("*.npz")
    np.savez(tmp_path / "ref.npz", arr_0=random_images(20))
    monkeypatch.setattr(evaluate, "open_network", lambda *_: Colours())
    results = []
    for device in (torch.device("cpu"), DEVICE):
        args = [str(tmp_path / "ref.npz"), str(found), "--json", str(tmp_path / "out.json")]
        evaluate.main(evaluate.parse_args(args), Processes(0, 1, device))
        row = json.loads((tmp_path / "out.json").read_text())
        results.append([value for value in row.values() if isinstance(value, float)])
    assert len(results[0]) >= 5
    assert results[1] == pytest.approx(results[0], rel=1e-3)


SCRIPT = """
import sys
import torch
from models import Tiny_models
device = torch.device(sys.argv[1])
model = Tiny_models["DiT-N/4"](input_size=8).to(device)
kinds = {type(layer).__name__ for layer in model.modules()}
assert "PDESSMBlock" in kinds and "Attention" not in kinds, kinds
block = next(layer for layer in model.modules() if type(layer).__name__ == "PDESSMBlock")
tokens = torch.randn(2, 4, block.pde.dim, device=device)
with torch.autocast(device.type, torch.bfloat16):
    block(tokens).float().square().sum().backward()
assert block.pde.R.weight.grad.isfinite().all()
"""


@NEEDS_ONE
def test_the_overlays_layers_run_on_a_gpu(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "tests" / "checkout", tmp_path / "checkout", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "checkout" / "run.py").write_text(SCRIPT)
    monkeypatch.setattr(exchange, "said", set())
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    overlay.main([str(tmp_path / "checkout" / "run.py"), "--mixer", "pdessm", str(DEVICE)])
