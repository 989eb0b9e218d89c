"""One update: averages, accumulated and clipped gradients, half precision, steps that are not finite."""

import json
import math
import os
import shutil
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

import train
from checkpoints.export import export
from checkpoints.export import parse_args as export_args
from checkpoints.read import load_checkpoint, read_checkpoint
from checkpoints.resume import first_not_finite
from commands import ALONE, QUICK, draw, draw_many, fit, in_forks
from images import dataset
from machine.processes import Processes
from models import MODELS
from on_gpu import CUDA
from small_runs import spoil_weights
from training import watching
from training.learner import create_learner, decay_at, only_the_scale_falls, replicate, update, update_ema


def rows(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_step_s_gradients_do_not_depend_on_how_many_came_before(tmp_path, one_thread):
    """Of three processes, whose numbers could be added up in several orders; else a run that goes on would differ."""

    def passes(rank):
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=rank, world_size=3)
        torch.manual_seed(0)
        model = torch.nn.Sequential(*(torch.nn.Linear(30, 30) for _ in range(5)))
        replica, gradients = replicate(model, Processes(rank, 3, torch.device("cpu"))), []
        x = torch.randn(7, 30, generator=torch.Generator().manual_seed(rank))
        for _ in range(3):
            model.zero_grad()
            replica(x).square().sum().backward()
            gradients.append([p.grad for p in model.parameters()])
        assert all(torch.equal(*pair) for later in gradients[1:] for pair in zip(gradients[0], later))

    assert in_forks(3, passes) == [0, 0, 0]


def test_the_average_follows_short_runs_and_slows_down_in_long_ones():
    model, ema = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    with torch.no_grad():
        for step, decay in [(1, 2 / 11), (90, 0.91), (10**7, 0.9999)]:
            ema.weight.fill_(0), model.weight.fill_(1)
            update_ema(ema, model, step, decay_at(step, 0.9999))
            assert 1 - ema.weight.item() == pytest.approx(decay, abs=1e-6)


@pytest.mark.parametrize("flags", [[], ["--no-ema-warmup"]], ids=["warmup", "constant"])
def test_the_average_of_a_run_is_that_of_its_weights(tmp_path, flags):
    """Of three steps' weights and the initial ones, which are those of a run of one step at nearly no learning rate."""
    flags = [*flags, "--global-batch-size", 4, "--ema-decay", 0.6, "--ckpt-every", 1, "--lr"]
    initial = read_checkpoint(fit(tmp_path / "0", *flags, 1e-30, "--max-steps", 1) / "checkpoints" / "0000001.pt")["model"]
    folder = fit(tmp_path / "r", *flags, 1e-2, "--max-steps", 3) / "checkpoints"
    average = initial
    for step in (1, 2, 3):
        contents = read_checkpoint(folder / f"{step:07d}.pt")
        decay = 0.6 if "--no-ema-warmup" in flags else (1 + step) / (10 + step)
        average = {name: decay * w + (1 - decay) * contents["model"][name] for name, w in average.items()}
        for name, value in average.items():
            torch.testing.assert_close(contents["ema"][name], value, rtol=1e-5, atol=1e-6)


def moments(folder):
    """The gradients of a run's only step, as AdamW has them."""
    checkpoint = read_checkpoint(folder / "checkpoints" / "0000001.pt")
    return [state["exp_avg"] for state in checkpoint["opt"]["state"].values()]


@pytest.mark.parametrize("model", ["DiT-N/4", "UNet-N", "DiS-N/4"])
def test_ways_to_spend_less_memory_change_only_rounding(tmp_path, model):
    flags = ["--model", model, "--global-batch-size", 12, "--max-steps", 1]
    plain = moments(fit(tmp_path, *flags))
    for more in (["--grad-accum", 3], ["--grad-checkpointing"], ["--grad-accum", 4, "--grad-checkpointing"]):
        for gradient, expected in zip(moments(fit(tmp_path, *flags, *more)), plain, strict=True):
            torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["DiT-N/4", "UNet-N"])
def test_checkpointing_of_gradients_keeps_less(name):
    """Counted in bytes that autograd keeps for the backward pass."""
    model = MODELS[name](input_size=16, in_channels=3, num_classes=10)
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


@pytest.mark.parametrize(
    "system",
    [["--mixer", "attention"], ["--mixer", "pdessm"], ["--model", "DiS-N/4"], ["--model", "UNet-N"]],
    ids=" ".join,
)
def test_all_that_saves_time_and_memory_works_together(tmp_path, shallow, compilations, system):
    flags = ["--max-steps", 3, "--global-batch-size", 8, "--log-every", 1, "--lr", 1e-3, *system]
    plain = rows(fit(tmp_path, *flags))
    spared = rows(fit(tmp_path, *flags, "--precision", "bf16", "--compile", "--grad-checkpointing", "--grad-accum", 2))
    assert compilations.frame_count
    assert [row["loss"] for row in spared] == pytest.approx([row["loss"] for row in plain], rel=0.01)


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="torch.compile needs a C++ compiler on CPUs")
def test_what_is_compiled_to_the_end_learns_alike(tmp_path, monkeypatch):
    """By the C++ compiler, and not from a cache; with one mixer, for it takes half a minute."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    flags = ["--max-steps", 5, "--global-batch-size", 8, "--log-every", 1, "--lr", 1e-3, "--mixer", "pdessm"]
    full = rows(fit(tmp_path / "r", *flags))
    flags += ["--precision", "bf16"]
    plain = rows(fit(tmp_path / "r", *flags))
    compiled = rows(fit(tmp_path / "r", *flags, "--compile", "--grad-checkpointing"))
    torch.compiler.reset()
    losses = [[row["loss"] for row in found] for found in (full, plain, compiled)]
    assert losses[2] == pytest.approx(losses[1], rel=1e-4)
    assert losses[2] == pytest.approx(losses[0], rel=1e-2)
    assert list((tmp_path / "cache").rglob("*.so"))


def spoil_steps(monkeypatch, *steps):
    """NaN in one image of those steps."""

    def draw(images, labels, step, *rest, draw_batch=train.draw_batch, **how):
        batch = draw_batch(images, labels, step, *rest, **how)
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


def test_steps_that_only_float16s_scale_costs_are_no_faults(tmp_path, monkeypatch, shallow):
    """A scale so high that more steps than --max-skipped go by until gradients fit in."""
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=2.0**28))
    flags = ["--model", "DiT-N/8", "--max-steps", 14, "--global-batch-size", 4, "--lr", 1e-2, "--precision", "fp16"]
    folder = fit(tmp_path, *flags, "--max-skipped", 2, "--mixer", "pdessm-g", "--log-every", 14)
    *skipped, last = rows(folder)
    assert len(skipped) > 2
    assert [row["scale"] for row in skipped] == [2.0 ** (27 - i) for i in range(len(skipped))]
    assert math.isfinite(last["loss"])
    assert "Skipped: float16 cannot hold the scaled gradients, whose scale is now 1.34" in (folder / "log.txt").read_text()


class Reads(TorchDispatchMode):
    """Counts how often Python reads a number out of a tensor, for which it waits on a GPU."""

    count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.count += operator.name() in ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal")
        return operator(*args, **kwargs or {})


def test_a_step_waits_for_a_gpu_once(tmp_path, monkeypatch):
    """For whether its gradients are finite; images and labels are copied while it computes."""
    batches, loop, to = train.batches, train.train, torch.Tensor.to
    places, copies, reads = set(), [], Reads()

    def remembered(*args):
        for batch in batches(*args):
            places.update(x.data_ptr() for x in batch)
            yield batch

    def counted(*args):
        with reads:
            yield from loop(*args)

    def noted(x, *args, **kwargs):
        if x.data_ptr() in places:
            copies.append(kwargs.get("non_blocking"))
        return to(x, *args, **kwargs)

    monkeypatch.setattr(train, "batches", remembered)
    monkeypatch.setattr(train, "train", counted)
    monkeypatch.setattr(torch.Tensor, "to", noted)
    counts = []
    for steps in (1, 4):
        reads.count = 0
        fit(tmp_path / str(steps), "--global-batch-size", 4, "--num-workers", 0, "--max-steps", steps)
        counts.append(reads.count)
    assert (counts[1] - counts[0]) / 3 == 1
    assert copies.count(True) >= 10                                        # of five steps


def learner_of(model):
    return create_learner(model, ALONE, 1e-4, [0.5])


@pytest.mark.parametrize(("scale", "loss", "fault"), [(4, 1, False), (2, 1, False), (1, 1, True), (4, math.nan, True)])
def test_a_fault_in_float16_is_what_no_scale_mends(scale, loss, fault):
    learner = learner_of(torch.nn.Linear(1, 1))
    learner.scaler = torch.amp.GradScaler("cpu", init_scale=float(scale))
    learner.scaler.scale(learner.model(torch.full((1, 1), math.inf)).sum()).backward()
    assert not update(learner, torch.tensor(float(loss)), 1)
    assert only_the_scale_falls(learner, torch.tensor(float(loss))) == (not fault)


def test_a_gradient_is_as_large_as_it_is_without_float16s_scale():
    """Of which the norm that gradients are scaled down to knows nothing."""
    learner = learner_of(torch.nn.Linear(1, 1))
    learner.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    learner.scaler.scale(learner.model(torch.ones(1, 1)).sum()).backward()
    assert update(learner, torch.tensor(1.0), 1, max_norm=10)
    assert learner.opt.state[learner.model.weight]["exp_avg"].item() == pytest.approx(0.1)


@pytest.mark.parametrize(("gradient", "learns"), [(1e18, True), (1e20, False)])
def test_gradients_whose_squares_overflow_do_not_reach_the_moments(gradient, learns):
    learner = learner_of(torch.nn.Linear(1, 1))
    learner.model(torch.full((1, 1), gradient)).sum().backward()
    assert update(learner, torch.tensor(1.0), 1) == learns
    assert first_not_finite(learner) is None
    assert learner.opt.state[learner.model.weight]["exp_avg_sq"].any() == learns


@pytest.mark.parametrize(("part", "value"), [("model", math.inf), ("ema", math.nan), ("ema_0.5", -math.inf), ("opt", math.inf)])
def test_what_is_not_finite_takes_no_checkpoints_place(tmp_path, monkeypatch, part, value):
    monkeypatch.setattr(train, "update", train.update)
    spoil_weights(part, value, 3)
    flags = ["--max-steps", 4, "--global-batch-size", 8, "--ckpt-every", 1, "--keep-last", 1, "--ema-decay", 0.9999, 0.5]
    flags += ["--ema-device", "cpu"]
    with pytest.raises(ValueError, match=rf"after step 3 final_layer\.linear\.weight\S* .*of {part} is not finite"):
        fit(tmp_path, *flags)
    (path,) = (tmp_path / "000-DiT-N-4" / "checkpoints").iterdir()
    assert path.name == "0000002.pt"
    contents = torch.load(path)
    contents["ema"]["final_layer.linear.weight"][0, 0] = math.nan
    torch.save(contents, path)
    with pytest.raises(ValueError, match=r"2\.pt: final_layer\.linear\.weight of ema is not finite; to go on from the one"):
        fit(tmp_path, *flags, "--resume", "auto")


def test_a_held_out_loss_that_is_not_finite_is_none_in_the_log():
    written = []
    watching.log_held_out(3, dict(loss=math.inf, mse=1.5, vb=math.nan), written.append)
    assert written == [dict(step=3, held_out_loss=None, held_out_mse=1.5, held_out_vb=None)]


def test_too_many_steps_that_are_not_finite_stop_with_the_images(tmp_path, monkeypatch):
    spoil_steps(monkeypatch, 2, 3)
    seen = []
    get = dataset.TrainingImages.__getitem__
    monkeypatch.setattr(dataset.TrainingImages, "__getitem__", lambda self, index: seen.append(index) or get(self, index))
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


def test_any_of_several_averages_is_drawn_and_exported(tmp_path):
    flags = ["--max-steps", 6, "--global-batch-size", 8, "--lr", 1e-2, "--ema-decay", 0.3, 0.9999]
    path = fit(tmp_path / "r", *flags) / "checkpoints" / "0000006.pt"
    contents = read_checkpoint(path)
    swapped = tmp_path / "0000006.pt"
    torch.save(contents | dict(ema=contents["ema_0.9999"]), swapped)
    grids = [draw(path, tmp_path / "a.png", *more) for more in ([], ["--ema", 0.3], ["--ema", 0.9999])]
    assert np.array_equal(grids[0], grids[1])
    assert not np.array_equal(grids[0], grids[2])
    assert np.array_equal(grids[2], draw(swapped, tmp_path / "a.png"))
    four = ["--num-fid-samples", 4]
    many = draw_many(path, tmp_path / "many", *four, "--ema", 0.9999), draw_many(swapped, tmp_path / "swapped", *four)
    assert np.array_equal(*many)

    exported = tmp_path / "slow.safetensors"
    flags = [str(path), "--format", "safetensors", "--ema", "0.9999", "--out", str(exported)]
    export(**vars(export_args(flags)))
    assert np.array_equal(grids[2], draw(exported, tmp_path / "a.png", "--ema", 0.9999))
    for file, decays in ((path, "0.3, 0.9999"), (exported, "0.9999")):
        with pytest.raises(ValueError, match=f"--ema 0.5: {file} has averages of decay {decays}$"):
            draw(file, tmp_path / "a.png", "--ema", 0.5)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda:0", marks=[CUDA, pytest.mark.gpu])])
def test_averages_in_cpu_memory_are_the_same(tmp_path, monkeypatch, photos, device):
    """Also after a stop, in samples, in held-out losses and of two decays; on a GPU up to its rounding."""
    monkeypatch.setattr(watching, "SAMPLING_STEPS", 2)
    flags = [*QUICK, "--data-path", photos, "--val-path", photos, "--global-batch-size", "8", "--max-steps", "6"]
    flags += ["--num-workers", "0", "--ckpt-every", "2", "--sample-every", "2", "--ema-decay", "0.3", "0.9999"]
    flags += ["--device", device]
    one = Processes(0, 1, torch.device(device))
    train.main(train.parse_args([*flags, "--results-dir", str(tmp_path / "a")]), one)
    for more in (["--max-steps", "4"], ["--resume", "auto"]):
        train.main(train.parse_args([*flags, "--results-dir", str(tmp_path / "b"), "--ema-device", "cpu", *more]), one)
    folders = [tmp_path / name / "000-DiT-N-4" for name in "ab"]
    plain, kept = (read_checkpoint(folder / "checkpoints" / "0000006.pt") for folder in folders)
    exact = dict(rtol=0, atol=0) if device == "cpu" else dict(rtol=1e-4, atol=1e-5)
    for part in ("model", "ema", "ema_0.9999"):
        torch.testing.assert_close(kept[part], plain[part], **exact)
    losses = [[row["held_out_loss"] for row in rows(folder) if "held_out_loss" in row] for folder in folders]
    assert len(losses[0]) == 3
    assert losses[1] == pytest.approx(losses[0], rel=exact["rtol"])
    assert len(list(folders[1].glob("samples/*"))) == 3
