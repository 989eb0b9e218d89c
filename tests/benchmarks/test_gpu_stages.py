"""What runs on a GPU in one go, tried on a CPU."""

import json
import re
import subprocess
import sys
import time
from argparse import Namespace
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from timm.models.vision_transformer import Attention

from benchmarks import attention, flags, gpu, kernel_grids, mixer, rehearsal, slowest, timing
from benchmarks.gpu import Stage
from commands import ROOT
from machine.stops import STATUS
from pde_ssm_kernels import tiles
from pde_ssm_kernels.tiles import Tile

CPU = torch.device("cpu")
SLOW = """
import signal, sys, time
def save(*_):
    time.sleep(0.3)
    print("saved")
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
print("begun", flush=True)
time.sleep(60)
"""


@pytest.fixture
def planned(monkeypatch):
    """The stages of this list, which the test fills."""
    stages = []
    monkeypatch.setattr(gpu, "stages", lambda *_: stages)
    monkeypatch.setattr(gpu, "FAREWELL", 5)
    return stages


def states(out):
    return {name: result["state"] for name, result in json.loads((out / "gpu.json").read_text())["stages"].items()}


def test_stages_have_limits_and_what_is_missing_is_made_up_for(tmp_path, planned, capsys):
    planned += [
        Stage("one", 1, ["-c", "print('1 of 1 is right')"]),
        Stage("two", 1, ["-c", "import os; print(os.environ['X']); 1 / 0"], {"X": "why"}),
        Stage("three", 0.02, ["-c", SLOW]),
        Stage("four", 1, ["-c", "print()"], {}, "flowers"),
    ]
    with pytest.raises(SystemExit) as end:
        gpu.main(["--out", str(tmp_path)])
    assert end.value.code == 1
    assert states(tmp_path) == dict(one="passed", two="failed", three="out of time", four="skipped")
    assert (tmp_path / "three.log").read_text() == "begun\nsaved\n"
    assert (tmp_path / "two.log").read_text().startswith("why\n")
    printed = capsys.readouterr().out
    for line in ("one  .*passed .*1 of 1 is right", "two .*failed .*ZeroDivisionError", "four .*skipped .*give --flowers"):
        assert re.search(line, printed)
    planned[:] = [Stage(name, 1, ["-c", f"print('{name} again')"]) for name in ("one", "two", "three", "four")]
    gpu.main(["--out", str(tmp_path)])
    assert set(states(tmp_path).values()) == {"passed"}
    assert "one again" not in capsys.readouterr().out                      # it had passed
    gpu.main(["--out", str(tmp_path), "--stages", "one"])
    assert "one again" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no stage five; known: one, two, three, four"):
        gpu.main(["--out", str(tmp_path), "--stages", "five"])


def test_what_a_script_has_begun_saves_its_work_too(tmp_path, planned):
    (tmp_path / "slow.py").write_text(SLOW)
    (tmp_path / "stage.sh").write_text(f"'{sys.executable}' '{tmp_path}/slow.py'\necho 'not to be reached'\n")
    planned += [Stage("one", 0.02, ["bash", str(tmp_path / "stage.sh")])]
    gpu.main(["--out", str(tmp_path)])
    assert states(tmp_path) == dict(one="out of time")
    assert (tmp_path / "one.log").read_text() == "begun\nsaved\n"


def test_what_was_never_begun_comes_before_what_failed(tmp_path, planned, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))  # without git
    planned += [Stage("one", 1, ["-c", "1 / 0"]), Stage("two", 1, ["-c", "print()"])]
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path), "--stages", "one"])
    begun, run = [], gpu.run
    monkeypatch.setattr(gpu, "run", lambda stage, *how: begun.append(stage.name) or run(stage, *how))
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path)])
    assert begun == ["two", "one"]
    assert states(tmp_path) == dict(one="failed", two="passed")


def test_a_stage_ends_with_the_command_that_began_it(tmp_path):
    """As where a time limit from outside ends that one, before the stage has said a word."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--stages", "environment", "--out", str(tmp_path)]
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    while not (tmp_path / "environment.log").exists():
        time.sleep(0.01)
    child.terminate()
    assert child.wait() == STATUS
    assert not (tmp_path / "gpu.json").exists()


def test_no_stage_begins_when_the_minutes_are_over(tmp_path, planned):
    planned += [Stage("one", 1, ["-c", "print()"])]
    gpu.main(["--out", str(tmp_path), "--minutes", "0.1"])
    assert states(tmp_path) == dict(one="skipped")


@pytest.mark.parametrize("rehearse", [False, True])
def test_every_stages_command_is_one(tmp_path, monkeypatch, rehearse):
    monkeypatch.setattr(flags, "limit_memory", lambda: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    names = []
    for stage in gpu.stages(tmp_path, ROOT, tmp_path, tmp_path, rehearse):
        first, what, *arguments = stage.command
        if first == "bash":
            assert (ROOT / what).is_file()
        elif first == "-c":
            compile(what, "stage", "exec")
        elif what == "pytest":
            assert all((ROOT / path).is_file() for path in arguments if path.endswith(".py"))
            assert any(path.endswith("test_gpu.py") for path in arguments) != rehearse
        else:
            names.append(what)
            if what == "benchmarks.rehearsal":
                what = f"benchmarks.{arguments.pop(0)}"
            module = import_module(what)
            if what != "benchmarks.checkout":
                flags.parse_args("A test.", arguments, **getattr(module, "FLAGS", {}))
    assert ("benchmarks.rehearsal" in names) == rehearse


def test_a_short_rehearsal(tmp_path):
    gpu.main(["--rehearse", "--out", str(tmp_path), "--stages", "environment", "table8"])
    assert states(tmp_path) == dict(environment="passed", table8="passed")
    about = json.loads((tmp_path / "environment.log").read_text().splitlines()[-1])
    assert torch.__version__.startswith(about["versions"]["torch"])
    assert (tmp_path / "table8-cpu-quick.json").is_file()


@pytest.fixture
def args(tmp_path, monkeypatch):
    for name in ("kernel_grids", "tiles", "slowest", "mixer"):
        rehearsal.shrink(name, monkeypatch.setattr)
    common = dict(quick=True, device=CPU, threads=1, seconds=60, compile=None, backend="default", out=tmp_path)
    return Namespace(**common, table=tmp_path / "tiles.json")


def test_kernels_that_differ_are_named(args, monkeypatch, capsys):
    pytest.importorskip("triton")
    monkeypatch.setattr(kernel_grids, "GRIDS", [(2, 2)])
    kernel_grids.main(CPU, 60)
    assert "3 of 3 cases" in capsys.readouterr().out
    monkeypatch.setattr(kernel_grids, "TOLERANCE", {torch.float32: 1e-5})
    evolve = kernel_grids.gpu.evolve
    monkeypatch.setattr(kernel_grids.gpu, "evolve", lambda v, symbol: evolve(v, symbol) * 1.001)
    with pytest.raises(SystemExit) as end:
        kernel_grids.main(CPU, 60)
    assert end.value.code == 1
    assert "DIFFERS  2 x 2, 3 channels, torch.float32: 1.0e-03" in capsys.readouterr().out
    monkeypatch.setattr(kernel_grids, "TOLERANCE", {torch.float32: 1e-5, torch.float16: 1e-3})
    monkeypatch.setattr(kernel_grids.gpu, "evolve", lambda v, symbol: 1 / 0)
    with pytest.raises(SystemExit):
        kernel_grids.main(CPU, 60)
    printed = capsys.readouterr().out                                      # one that raises does not hide the others
    assert "torch.float16: ZeroDivisionError: division by zero" in printed
    assert "2 of 2 cases" in printed


def test_the_fastest_tiles_are_written_where_the_kernels_read_them(args, monkeypatch):
    pytest.importorskip("triton")
    from benchmarks import tiles as tuner
    from pde_ssm_kernels import gpu as kernels

    monkeypatch.setattr(tuner, "launcher", lambda kernel, sides, device: lambda: launched.append(kernel))
    monkeypatch.setattr(tuner, "sample_ms", lambda launch, calls, device: tiles.tile("forward", 16, 16, device=CPU).channels)
    monkeypatch.setattr(tiles, "TABLE", args.table)
    launched = []
    tiles.tuned.cache_clear()
    tuner.main(CPU, args.table)
    assert launched.count("forward") == launched.count("backward") == 2    # with and without the table's tile
    tiles.tuned.cache_clear()
    assert json.loads(args.table.read_text()) == {"cpu": {"forward 16 x 16": [4, 0, 8, 1]}}
    assert tiles.tile("forward", 16, 16, device=CPU) == Tile(4, 0, 8, 1)
    sizes, options = kernels.constants("forward", torch.empty(1, 9, 9, 384))
    assert (sizes["CB"], options) == (4, dict(num_warps=8, num_stages=1))
    tiles.tuned.cache_clear()


def test_what_is_timed_is_the_kernel_that_is_tuned(args, monkeypatch):
    pytest.importorskip("triton")
    from benchmarks import tiles as tuner
    from pde_ssm_kernels import gpu as kernels

    class Launcher:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, programs):
            return lambda *_, **__: launched.append(self.name)

    for name in [name for name in vars(kernels) if name.endswith("_kernel")]:
        monkeypatch.setattr(kernels, name, Launcher(name))
    for kernel, sides in (("forward", (16, 16)), ("backward", (16, 16)), *((name, (64,)) for name in tuner.PASSES)):
        launch, launched = tuner.launcher(kernel, sides, CPU), []
        launch()
        assert launched == [f"{kernel}_kernel"]


def test_the_slowest_rows_are_profiled(args, capsys):
    (args.out / "mixers.json").write_text('{"machine": "2 cores"}')  # which reproduce/results has, and no benchmark wrote
    slowest.main(CPU, args.out)
    assert "no rows" in capsys.readouterr().out
    mixer.main(args)
    capsys.readouterr()
    slowest.main(CPU, args.out)
    printed = capsys.readouterr().out
    assert printed.count("layer, 16 channels, 2 x ") == slowest.ROWS
    assert "aten::" in printed or "all others" in printed


def test_attention_at_its_best_takes_the_fastest_kernel(monkeypatch):
    sdpa = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(attention, "chosen", {})
    monkeypatch.setattr(timing, "SAMPLE_MS", 0.1)

    def refuses(q, k, v):
        raise RuntimeError("No available kernel")

    def slow(q, k, v):
        time.sleep(0.003)
        return sdpa(q, k, v)

    monkeypatch.setattr(attention, "kernels", lambda: {"slow": slow, "refuses": refuses, "fast": sdpa})
    attention.fastest.cache_clear()
    plain, mine = Attention(8, num_heads=2, qkv_bias=True), attention.FastestAttention(8, num_heads=2, qkv_bias=True)
    mine.load_state_dict(plain.state_dict())
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(mine(x), plain(x))
    with torch.no_grad():
        torch.testing.assert_close(mine(x), plain(x))
    assert attention.chosen == {"2 x 2 x 5 x 4, both passes": "fast", "2 x 2 x 5 x 4, forward": "fast"}
    attention.fastest.cache_clear()


def test_kernels_of_attention_by_name(monkeypatch):
    attention.kernels.cache_clear()
    third = SimpleNamespace(flash_attn_func=lambda q, k, v: (torch.nn.functional.scaled_dot_product_attention(q, k, v), None))
    monkeypatch.setitem(sys.modules, "flash_attn_interface", third)
    found = attention.kernels()
    assert list(found) == ["default", "flash", "cudnn", "efficient", "flash-attention-3"]
    q = torch.randn(1, 2, 3, 4)
    assert found["flash-attention-3"](q, q, q).shape == q.shape
    attention.kernels.cache_clear()
