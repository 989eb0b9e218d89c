"""What reproduce/scaling.py fits and prints, on losses whose exponent is known."""

import json

import pytest
import torch

from benchmarks import timing
from commands import fit
from machine.cost import training_flops
from models import MODELS
from reproduce import scaling
from reproduce.scaling import curves, slope, table

SIZES = (1e5, 4e5, 9e5)


@pytest.fixture
def entries():
    return [
        dict(
            model=f"DiT-{n:.0f}", mixer=mixer, seeds=[0, 1], parameters=int(n), step_multiply_adds=int(64 * n), step_ms=n / 1e4,
            held_out_loss={"10": [2.0, 2.2], "1000": [3 * n**-exponent * (1 - 1e-3), 3 * n**-exponent * (1 + 1e-3)]},
        )
        for mixer, exponent in (("attention", 0.1), ("pdessm", 0.2))
        for n in SIZES
    ]  # fmt: skip


def test_runs_become_sizes_of_the_networks_that_were_trained(images, shallow, tmp_path, monkeypatch):
    runs = tmp_path / "runs"
    for seed, every in enumerate((2, 3)):
        flags = ["--model", "DiT-N/8", "--mlp", "swiglu", "--objective", "flow", "--uncond", "--global-batch-size", 4]
        flags += ["--data-path", images, "--val-path", images, "--max-steps", 6, "--ckpt-every", every, "--global-seed", seed]
        run = fit(runs / str(seed), *flags)
    weights = torch.load(run / "checkpoints" / "0000006.pt", weights_only=True)["ema"]
    monkeypatch.setattr(scaling, "RESULTS", tmp_path)
    monkeypatch.setattr(timing, "ROUNDS", 1)
    monkeypatch.setattr(timing, "MOST_ROUNDS", 2)
    scaling.main(runs, torch.device("cpu"))
    (entry,) = json.loads((tmp_path / "scaling.json").read_text())["runs"]
    assert (tmp_path / "scaling.png").stat().st_size
    assert (entry["seeds"], list(entry["held_out_loss"])) == ([0, 1], ["6"])  # the step that both were measured at
    assert entry["parameters"] == sum(weight.numel() for weight in weights.values())
    assert entry["step_ms"] > 0
    network = MODELS["DiT-N/8"](8, in_channels=3, num_classes=0, learn_sigma=False, mlp="swiglu")
    assert entry["step_multiply_adds"] == training_flops(network, 4) // 2


def test_runs_that_are_not_finished_or_have_no_finite_loss_do_not_count(tmp_path):
    settings = dict(model="DiT-N/4", mixer="attention", global_seed=0, global_batch_size=2, image_size=8, max_steps=6)
    for name, steps in (("lost", (3, 6)), ("stopped", (3,)), ("whole", (3, 6))):
        folder = tmp_path / name / "000-DiT-N-4"
        (folder / "checkpoints").mkdir(parents=True)
        torch.save(dict(args=settings), folder / "checkpoints" / f"{steps[-1]:07d}.pt")
        rows = [dict(step=1, loss=2.0), *(dict(step=step, held_out_loss=1 / step) for step in steps)]
        rows[-1] |= dict(held_out_loss=None) if name == "lost" else {}
        (folder / "log.jsonl").write_text('{"step": 2, "lo\n' + "".join(json.dumps(row) + "\n" for row in rows))  # cut short
    assert [run["loss"] for run in scaling.runs_in(tmp_path)] == [{3: 1 / 3, 6: 1 / 6}]


def test_a_step_that_cannot_be_timed_is_named(monkeypatch):
    run = dict(model="DiT-N/4", mixer="attention", global_batch_size=2, image_size=8, settings={})
    monkeypatch.setattr(scaling, "time_in_turns", lambda sides, *_, **__: dict.fromkeys(sides, "does not fit"))
    with pytest.raises(SystemExit, match="DiT-N/4 with attention cannot be timed: does not fit"):
        scaling.measured([run], torch.device("cpu"))


@pytest.mark.parametrize("cost", ["parameters", "multiply_adds", "seconds"])
def test_slopes_are_those_of_the_losses(entries, cost):
    fitted = {mixer: slope(line) for mixer, line in curves(entries, cost).items()}
    assert fitted == pytest.approx({"attention": -0.1, "pdessm": -0.2})


def test_costs_are_those_of_all_steps(entries):
    assert [x for x, _ in curves(entries, "multiply_adds")["pdessm"]] == [64_000 * n for n in SIZES]
    assert [x for x, _ in curves(entries, "seconds")["pdessm"]] == pytest.approx([n / 1e4 for n in SIZES])
    first, last = curves(entries, "steps")["pdessm"]                       # of the widest
    assert (first, last) == ((10, pytest.approx(2.1)), (1000, pytest.approx(3 * SIZES[-1] ** -0.2)))


def test_the_table_has_every_size_and_says_how_far_seeds_lie_apart(entries):
    lines = table(entries).splitlines()
    assert sum(line.startswith("| DiT-") for line in lines) == 6
    mean = 3 * SIZES[0] ** -0.1
    assert f"| 2 | {mean:.4f} ({0.999 * mean:.4f} to {1.001 * mean:.4f}) |" in lines[2]
    assert "| parameters | -0.100 | -0.200 |" in lines
