import json
import math
from functools import partial

import pytest
import torch

import data
import train
from checkpoint import load_checkpoint, read_checkpoint
from commands import fit
from models import MODELS
from update import update_ema


def rows(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_the_average_follows_short_runs_and_slows_down_in_long_ones():
    model, ema = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    with torch.no_grad():
        for step, decay in [(1, 2 / 11), (90, 0.91), (10**7, 0.9999)]:
            ema.weight.fill_(0), model.weight.fill_(1)
            update_ema(ema, model, step, 0.9999)
            assert 1 - ema.weight.item() == pytest.approx(decay, abs=1e-6)


def moments(folder):
    """The gradients of a run's only step, as AdamW has them."""
    checkpoint = read_checkpoint(folder / "checkpoints" / "0000001.pt")
    return [state["exp_avg"] for state in checkpoint["opt"]["state"].values()]


@pytest.mark.parametrize("model", ["DiT-N/4", "UNet-N"])
def test_ways_to_spend_less_memory_change_only_rounding(tmp_path, model):
    flags = ["--model", model, "--global-batch-size", 12, "--max-steps", 1]
    plain = moments(fit(tmp_path, *flags))
    for more in (["--grad-accum", 3], ["--grad-checkpointing"], ["--grad-accum", 4, "--grad-checkpointing"]):
        for gradient, expected in zip(moments(fit(tmp_path, *flags, *more)), plain, strict=True):
            torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def test_checkpointing_of_gradients_keeps_less(monkeypatch):
    """Counted in bytes that autograd keeps for the backward pass."""
    model = MODELS["DiT-N/4"](input_size=16, in_channels=3, num_classes=10)
    kept = []
    for _ in range(2):
        sizes = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda x, s=sizes: s.update({id(x): x.nbytes}) or x, lambda x: x):
            model(torch.randn(8, 3, 16, 16), torch.arange(8), torch.arange(8))
        kept.append(sum(sizes.values()))
        model.checkpoint_gradients()
    assert kept[1] < kept[0] / 3


def test_large_gradients_are_scaled_down(tmp_path):
    flags = ["--global-batch-size", 8, "--max-steps", 1]
    runs = [moments(fit(tmp_path, *flags, *more)) for more in ([], ["--max-grad-norm", 0.01])]
    plain, clipped = (torch.cat([moment.flatten() for moment in run]) for run in runs)
    assert 10 * plain.norm() > 0.02
    assert 10 * clipped.norm() == pytest.approx(0.01, rel=1e-3)  # the moment is a tenth of the gradient
    torch.testing.assert_close(clipped / clipped.norm(), plain / plain.norm())


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("mixer", ["attention", "pdessm"])
def test_half_precision_learns_alike(tmp_path, mixer, precision):
    flags = ["--max-steps", 12, "--global-batch-size", 16, "--lr", 1e-3, "--log-every", 4, "--mixer", mixer]
    full, half = (fit(tmp_path, *flags, *more) for more in ([], ["--precision", precision]))
    losses = [[row["loss"] for row in rows(folder) if "loss" in row] for folder in (full, half)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert losses[0] != losses[1]
    checkpoint = read_checkpoint(half / "checkpoints" / "0000012.pt")
    assert {value.dtype for value in checkpoint["model"].values()} == {torch.float32}
    assert bool(checkpoint["scaler"]) == (precision == "fp16")


@pytest.mark.parametrize("mixer", ["attention", "pdessm"])
def test_all_that_saves_time_and_memory_works_together(tmp_path, monkeypatch, mixer):
    """Without a compiler's last stage, which would take most of a minute."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager", fullgraph=True))
    flags = ["--max-steps", 3, "--global-batch-size", 8, "--log-every", 1, "--lr", 1e-3, "--mixer", mixer]
    plain = rows(fit(tmp_path, *flags))
    spared = rows(fit(tmp_path, *flags, "--precision", "bf16", "--compile", "--grad-checkpointing", "--grad-accum", 2))
    torch.compiler.reset()
    assert [row["loss"] for row in spared] == pytest.approx([row["loss"] for row in plain], rel=0.01)


def spoil_steps(monkeypatch, *steps):
    """NaN in one image of those steps."""

    def draw(images, labels, step, *rest, draw_batch=train.draw_batch):
        batch = draw_batch(images, labels, step, *rest)
        if step in steps:
            batch["noise"][0, 0, 0, 0] = torch.nan
        return batch

    monkeypatch.setattr(train, "draw_batch", draw)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_step_that_is_not_finite_changes_nothing_but_the_log(tmp_path, monkeypatch, precision):
    spoil_steps(monkeypatch, 3, 4, 6)
    flags = ["--max-steps", 6, "--global-batch-size", 8, "--ckpt-every", 1, "--log-every", 3, "--precision", precision]
    folder = fit(tmp_path, *flags, "--max-skipped", 3)
    before, after, end = (read_checkpoint(folder / "checkpoints" / f"000000{step}.pt") for step in (2, 4, 6))
    for part in ("model", "ema"):
        assert all(torch.equal(after[part][name], value) for name, value in before[part].items())
        assert all(value.isfinite().all() for value in end[part].values())
    assert not torch.equal(end["model"]["final_layer.linear.weight"], after["model"]["final_layer.linear.weight"])
    assert [state["step"] for state in end["opt"]["state"].values()] == [3] * len(end["opt"]["state"])
    log = rows(folder)
    assert [(row["step"], row["skipped"]) for row in log if "skipped" in row] == [(3, 1), (4, 2), (6, 1)]
    assert "(step=0000004) Skipped, 2 in a row" in (folder / "log.txt").read_text()
    assert all(math.isfinite(row["loss"]) for row in log if "loss" in row)
    if precision == "fp16":
        assert end["scaler"]["scale"] == 2**16 / 2**3


def test_too_many_steps_that_are_not_finite_stop_with_the_images(tmp_path, monkeypatch):
    spoil_steps(monkeypatch, 2, 3)
    seen = []
    get = data.TrainingImages.__getitem__
    monkeypatch.setattr(data.TrainingImages, "__getitem__", lambda self, index: seen.append(index) or get(self, index))
    with pytest.raises(ValueError, match="steps 2 to 3 had no finite loss and gradient, the last one with images") as error:
        fit(tmp_path, "--max-steps", 6, "--global-batch-size", 4, "--max-skipped", 2, "--ckpt-every", 1)
    assert f"images {', '.join(map(str, seen[8:]))} of the data set" in str(error.value)
    assert [row["images"] for row in rows(tmp_path / "000-DiT-N-4") if "images" in row] == [seen[4:8], seen[8:]]
    assert (tmp_path / "000-DiT-N-4" / "checkpoints" / "0000002.pt").exists()


def test_averages_of_several_decays(tmp_path):
    folder = fit(tmp_path, "--max-steps", 12, "--global-batch-size", 8, "--lr", 1e-2, "--ema-decay", 0.3, 0.9999)
    checkpoint = read_checkpoint(folder / "checkpoints" / "0000012.pt")
    name = "final_layer.linear.weight"
    fast, slow = ((checkpoint[ema][name] - checkpoint["model"][name]).norm() for ema in ("ema", "ema_0.9999"))
    assert 0 < fast < slow
    assert load_checkpoint(folder / "checkpoints" / "0000012.pt")[0].keys() == checkpoint["ema"].keys()
    assert torch.equal(load_checkpoint(folder / "checkpoints" / "0000012.pt")[0][name], checkpoint["ema"][name])
