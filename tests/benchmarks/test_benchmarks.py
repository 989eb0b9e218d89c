import json
import re
import runpy
import subprocess
import sys
import time
from argparse import Namespace
from importlib import import_module

import pytest
import torch

from benchmarks import every_mixer, flags, memory, pairwise_memory, plot, rehearsal, sides, table5, table8, table9, timing
from benchmarks.all import NAMES
from benchmarks.checkout import status
from benchmarks.selective_scan import NO_MAMBAPY
from commands import ROOT
from mixers import build_mixer
from models import DiT

CPU = torch.device("cpu")


@pytest.fixture
def args(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "SAMPLE_MS", 0.1)
    monkeypatch.setattr(timing, "MOST_ROUNDS", 3)
    common = dict(quick=True, device=CPU, threads=1, seconds=0, compile=None, backend="default", out=tmp_path)
    return Namespace(**common, batch=2, tokens_per_step=16, size="S")


def test_a_checkout_that_changes_is_noticed(tmp_path):
    (tmp_path / "train.py").write_text("1")
    before = status(tmp_path)
    (tmp_path / "train.py").write_text("22")
    assert status(tmp_path) != before


def test_sides_take_turns_and_their_times_are_told_apart(args, monkeypatch):
    monkeypatch.setattr(timing, "MOST_ROUNDS", 7)
    calls = []

    def sleeper(name, seconds):
        def call():
            calls.append(name)
            time.sleep(seconds)

        return lambda: call

    results = timing.time_in_turns({"short": sleeper("short", 0.01), "long": sleeper("long", 0.03)}, CPU, 60)
    turns = calls[6:]                                                      # after three untimed calls each
    assert len(turns) == 14
    assert all(set(turns[i : i + 2]) == {"short", "long"} for i in range(0, 14, 2))
    assert len({tuple(turns[i : i + 2]) for i in range(0, 14, 2)}) == 2    # in either order
    for name, least in (("short", 10), ("long", 30)):
        low, high = results[name]["quartiles_ms"]
        assert least <= low <= results[name]["median_ms"] <= high
        assert results[name]["samples"] == 7
    assert results["short"]["median_ms"] < results["long"]["median_ms"]


def test_short_calls_are_gathered_into_samples(args, monkeypatch):
    monkeypatch.setattr(timing, "SAMPLE_MS", 20)
    result = timing.time_in_turns({"nap": lambda: lambda: time.sleep(0.002)}, CPU, 0)["nap"]
    assert 2 <= result["calls"] <= 10
    assert result["median_ms"] >= 2


def test_what_does_not_fit_is_said_and_the_rest_is_timed(args):
    def later(calls=[]):  # noqa: B006  (counts)
        calls.append(1)
        return torch.ones(2, 3 if len(calls) > 5 else 2) @ torch.ones(2, 3)

    sides = {"huge": lambda: torch.empty(2**50), "wrong": lambda: lambda: torch.ones(2, 3) @ torch.ones(2, 3)}
    sides |= {"later": lambda: later, "small": lambda: lambda: torch.ones(3).sum()}
    results = timing.time_in_turns(sides, CPU, 0)
    assert list(results) == ["huge", "wrong", "later", "small"]
    assert results["huge"] == "does not fit into memory"
    assert re.match("failed: .*shapes cannot be multiplied", results["wrong"])
    assert results["later"] == results["wrong"]
    assert results["small"]["median_ms"] > 0


@pytest.mark.parametrize("argv", [["--device", "cuda:99"], ["--device", "tpu"], ["--threads", "0"]], ids=" ".join)
def test_flags_that_cannot_be_are_refused_in_one_sentence(argv, capsys):
    with pytest.raises(SystemExit):
        flags.parse_args("A test.", argv)
    assert re.search(rf"error: (argument )?{argv[0]}:? {argv[1]}", capsys.readouterr().err)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone kills processes for memory")
def test_memory_that_is_not_there_is_an_error_and_not_a_kill():
    code = """
import torch
from benchmarks import every_mixer, flags, timing
flags.parse_args("A test.", ["--device", "cpu", "--threads", "1"])
free = 1024 * flags.proc_value("/proc/meminfo", "MemAvailable")
try:
    torch.empty(2 * free, dtype=torch.uint8)
except RuntimeError as error:
    assert timing.is_out_of_memory(error), error
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("power", [1, 1.5, 2])
def test_slopes_are_exponents_of_the_larger_sizes(power):
    places = [(4, 70), (16, 80), *((n, 3 * n**power) for n in (64, 256, 1024))]
    assert plot.slope(places) == pytest.approx(power)                    # of 64, 256 and 1,024
    assert plot.slope(places[:4]) != pytest.approx(power)
    assert plot.slope([(16, 3 * 16**power), (240, 3 * 240**power), (256, 3 * 256**power)]) == pytest.approx(power)
    assert plot.slope([(16, 1)]) is None


def test_the_papers_ratios():
    """Those that the paper itself, or a reader of its tables, quotes."""
    for cells, ratios in (
        (table5.PAPER, [5.09, 1.39, 0.67, 8.35, 1.72, 0.55, 13.39, 2.29, 0.73, 40.33, 3.92, 0.57]),
        (table8.PAPER, [0.85, 1.53, 4.46]),
        (table9.PAPER, [6.49, 4.45, 3.70, 4.44]),
    ):
        assert [round(attention / pdessm, 2) for attention, pdessm in cells.values()] == ratios


def test_naive_attention_and_timms_blocks_compute_the_same():
    options = dict(input_size=8, hidden_size=16, depth=2, num_heads=2)
    models = [
        sides.build_model(CPU, mixer="attention", **options),
        sides.build_model(CPU, mixer=sides.NaiveAttention, **options),
        sides.build_model(CPU, mixer="attention", timms_blocks=True, **options),
    ]
    assert not models[1].blocks[0].attn.fused_attn
    batch = sides.random_batch(models[0], 3, CPU)
    outputs = [model.eval()(*batch) for model in models]
    for model in models[1:]:
        for mine, theirs in zip(model.state_dict().values(), models[0].state_dict().values()):
            assert torch.equal(mine, theirs)
    assert outputs[0].abs().min() > 0
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs[2], outputs[0], rtol=1e-4, atol=1e-5)


def test_the_floor_is_r_alone():
    floor, tokens = sides.Floor(6), torch.randn(2, 5, 6, requires_grad=True)
    out = floor(tokens)
    torch.testing.assert_close(out, tokens @ floor.R.weight.T)
    gradient = torch.randn_like(out)
    torch.testing.assert_close(torch.autograd.grad(out, tokens, gradient)[0], gradient @ floor.R.weight)


def test_nothing_is_timed_on_zeros():
    model = sides.build_model(CPU, mixer="pdessm", input_size=8, hidden_size=16, depth=1, num_heads=2)
    assert all(parameter.any() for parameter in model.parameters())


def here(build, n, *_):
    """Takes the steps whose memory a process of its own would measure."""
    return memory.two_steps(build, n) or dict(peak_mb=1.0)


def small(name, monkeypatch):
    """The benchmark of that name with models and sizes that take no time."""
    benchmark = import_module(f"benchmarks.{name}")
    rehearsal.shrink(name, monkeypatch.setattr)
    if name == "every_mixer":
        monkeypatch.setattr(memory, "peak_of_process", here)
    if name == "faster_sampling":
        monkeypatch.setattr(torch, "compile", lambda network, **options: network)
        monkeypatch.setenv("CXX", sys.executable)
    return benchmark


@pytest.mark.parametrize("name", NAMES)
def test_every_benchmark_writes_json_and_a_plot(name, args, monkeypatch, capsys):
    small(name, monkeypatch).main(args)
    contents = json.loads((args.out / f"{name}-cpu-quick.json").read_text())
    assert contents["machine"]["threads"] == torch.get_num_threads()
    assert contents["machine"]["versions"]["torch"]
    assert contents["settings"]["precision"] == "float32"
    assert contents["rows"]
    for row in contents["rows"]:
        compared = [{"attention", "pdessm"}, {"attention", "diagonal", "floor"}, {"plain", "compiled", "bf16", "both"}]
        compared += [{"ours", "torch", "mambapy", "reference"}, {"attention", "pairwise", "coupled", "product"}]
        assert any(names <= row["sides"].keys() for names in compared)
        for side in (side for side in row["sides"].values() if side != NO_MAMBAPY):
            assert side.get("median_ms", side.get("peak_mb")) > 0
    assert (args.out / f"{name}-cpu-quick.png").read_bytes().startswith(b"\x89PNG")
    assert not list(args.out.glob("*.partial*"))
    printed = capsys.readouterr().out
    if name == "table5":
        assert "16,384  left out by --quick" in printed
        assert "0.75x" in printed                                          # the paper's of the second row
    if name == "mixer":
        assert "2 x 3" in printed
    if name == "pairwise":
        assert [row["operations"] for row in contents["rows"]] == [30, 4]
        assert "attention/floor" in printed


@pytest.mark.parametrize("name", every_mixer.SIDES)
def test_every_side_has_a_cost_or_a_reason(name):
    side = every_mixer.count(8, **every_mixer.SIDES[name])
    assert side["parameters"] > 1e5
    assert 1e6 < side["multiply_adds"] < 1e9


def test_a_side_that_does_not_fit_says_why():
    assert every_mixer.count(1, "UNet-N", mixer="mean").startswith("is not built: a U-Net has no mixer to swap")


@pytest.mark.parametrize("plain", [False, True])
def test_memory_of_a_pairwise_layer(plain, monkeypatch, capsys):
    for name in ("CHANNELS", "SIDE", "BATCH"):
        monkeypatch.setattr(pairwise_memory, name, 2)
    pairwise_memory.main(plain)
    assert re.fullmatch(r"\d+\.\d\d GB\n", capsys.readouterr().out)


def test_a_file_is_no_folder_for_results(tmp_path, capsys):
    (tmp_path / "a.json").touch()
    with pytest.raises(SystemExit):
        flags.parse_args("Times.", ["--out", str(tmp_path / "a.json")])
    assert f"--out {tmp_path / 'a.json'} is no folder that can be written" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["large_images", "pairwise_memory"])
def test_words_that_mean_nothing_are_refused(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "plian"])
    monkeypatch.delitem(sys.modules, f"benchmarks.{name}", raising=False)
    with pytest.raises(SystemExit):
        runpy.run_module(f"benchmarks.{name}", run_name="__main__")
    assert "invalid choice: 'plian'" in capsys.readouterr().err


@pytest.mark.parametrize("side", [16, 64])
def test_the_kernels_whose_resources_are_shown_are_those_of_the_gpu(side):
    pytest.importorskip("triton")
    from benchmarks.kernel_resources import cases

    for kernel, constants, _ in cases(side, torch.float32):
        assert constants.keys() <= set(kernel.arg_names)


def test_without_matplotlib_there_is_no_plot_and_it_is_said(args, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    small("table8", monkeypatch).main(args)
    assert "No plot: matplotlib is not installed" in capsys.readouterr().out
    assert [path.suffix for path in args.out.iterdir()] == [".json"]


def test_compiled_sides_compute_the_same(monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "compile", lambda f, **options: calls.append(options) or f)
    options = dict(mixer="pdessm", input_size=8, hidden_size=16, depth=1, num_heads=2)
    model = sides.build_model(CPU, compile="reduce-overhead", **options)
    assert calls == [dict(mode="reduce-overhead", dynamic=False)]
    assert isinstance(model, DiT)
    assert build_mixer(sides.Floor, 8, 2, (2, 2), 0).R.bias is None
