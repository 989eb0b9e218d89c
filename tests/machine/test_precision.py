"""Precision and compilation, whatever is compiled."""

import os
import subprocess
import sys
from functools import partial

import pytest
import torch

from commands import ROOT
from diffusion import create_objective
from diffusion.samplers import FLOW_SAMPLERS, SAMPLERS
from machine.precision import compile_blocks, compile_whole


@pytest.mark.parametrize("sampler", [*SAMPLERS, *FLOW_SAMPLERS])
def test_no_sampler_reads_what_a_cuda_graph_has_overwritten(monkeypatch, sampler):
    """Stands for a CUDA graph: every call writes into the same memory as the one before."""

    def graph(network, **options):
        assert options == dict(fullgraph=True, dynamic=False, mode="reduce-overhead")
        outputs = {}

        def run(x, t, y):
            out = network(x, t, y)
            return outputs.setdefault(out.shape, torch.empty_like(out)).copy_(out)

        return run

    def network(x, t, y):
        out = x.roll(1, dims=3).sin() * (1 + t[:, None, None, None] / 1000)
        return torch.cat([out, -out], dim=1) if sampler in SAMPLERS else out

    objective, x = create_objective("flow" if sampler in FLOW_SAMPLERS else "diffusion", 4), torch.randn(2, 3, 8, 8)
    run = partial((SAMPLERS | FLOW_SAMPLERS)[sampler], objective, x=x, model_kwargs=dict(y=None), randn_like=torch.zeros_like)
    plain = run(network)
    monkeypatch.setattr(torch, "compile", graph)
    assert torch.equal(run(compile_whole(network, torch.device("cuda"))), plain)


@torch._dynamo.config.patch(recompile_limit=8)
def test_blocks_of_many_sizes_are_all_compiled(compilations):
    """One of each size, for they share a function, of which PyTorch would compile eight."""
    blocks = [torch.nn.Linear(n, n) for n in (*range(1, 12), 3)]
    plain = [block(torch.ones(1, block.in_features)) for block in blocks]
    compile_blocks(blocks)
    for block, expected in zip(blocks, plain):
        torch.testing.assert_close(block(torch.ones(1, block.in_features)), expected)
    assert compilations.frame_count == 11


BY_THREADS = """
import sys, torch
from commands import fit
runs = []
for threads in (1, 2):
    torch.set_num_threads(threads)
    flags = ["--mixer", "pdessm", "--global-batch-size", 24, "--lr", 1e-3, "--max-steps", 3, "--deterministic"]
    folder = fit(f"{sys.argv[1]}/{threads}", *flags)
    runs.append(torch.load(folder / "checkpoints" / "0000003.pt"))
assert [run["rounding"][0]["threads"] for run in runs] == [1, 2]
assert runs[0]["rounding"][0]["deterministic"] and runs[0]["rounding"][0]["mkl"] != "default"
print(sum(not torch.equal(value, runs[1]["model"][name]) for name, value in runs[0]["model"].items()))
"""


def test_deterministic_runs_are_the_same_with_any_number_of_threads(tmp_path):
    """In a process of its own, for MKL reads its mode once."""
    command = [sys.executable, "-c", BY_THREADS, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT / "tests", env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "0", done.stderr
