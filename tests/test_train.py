import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from checkpoints.build import load_model
from checkpoints.read import load_checkpoint
from commands import ALONE, QUICK, Colours, draw, draw_many, fit, fork
from diffusion import drawing
from diffusion.samplers import FLOW_SAMPLERS
from images.dataset import load_dataset
from images.named import DATASETS
from machine.cost import training_flops
from machine.processes import launch
from pde_ssm import TERMS
from training import probe, watching
from training.batches import draw_batch

pytestmark = pytest.mark.usefixtures("one_thread")

COUPLED = ["--mixer", "pdessm", "--pde-coupling", "coupled"]


def load(folder, step):
    return torch.load(folder / "checkpoints" / f"{step:07d}.pt", weights_only=True)


def test_what_a_run_leaves(tmp_path):
    flags = ["--max-steps", 6, "--global-batch-size", 16, "--log-every", 4, "--ckpt-every", 4, "--mixer", "pdessm"]
    folder = fit(tmp_path, *flags)
    assert folder.name == "000-DiT-N-4"
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["0000004.pt", "0000006.pt"]
    checkpoint = load(folder, 6)
    start = load(folder, 4)["model"]
    for name in ("final_layer.linear.weight", "blocks.0.adaLN_modulation.1.weight"):
        assert not torch.equal(checkpoint["ema"][name], checkpoint["model"][name])
        assert not torch.equal(checkpoint["ema"][name], start[name])
        assert checkpoint["ema"][name].any()
    assert set(checkpoint) == {"model", "ema", "opt", "args", "step", "scaler", "rounding"}
    assert checkpoint["args"]["mixer"] == "pdessm"
    log = (folder / "log.txt").read_text()
    assert re.search(r"^\[[-\d: ]+\] DiT Parameters: [\d,]+$", log, re.MULTILINE)
    assert "Training for 6 steps (0.1 epochs) on 1 x cpu...\n" in log
    assert "A step has 16 images, 16 on each process\n" in log
    speed = r"Train Steps/Sec: [\d.]+, GFLOP/s: [\d,.]+, Peak Memory: [\d.]+ GB$"
    logged = re.findall(rf"\(step=(\d{{7}})\) Train Loss: ([\d.]+), {speed}", log, re.MULTILINE)
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [4, 6]
    assert logged == [(f"{row['step']:07d}", f"{row['loss']:.4f}") for row in rows]
    model = train.MODELS["DiT-N/4"](input_size=8, in_channels=3, num_classes=10, mixer="pdessm")
    for row in rows:
        assert row["gflops_per_sec"] == pytest.approx(training_flops(model, 16) * row["steps_per_sec"] / 1e9)
        assert 0.1 < row["peak_memory_gb"] < 100
    assert fit(tmp_path, *flags).name == "001-DiT-N-4"


def test_the_share_of_what_the_device_is_made_for(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "peak_flops", lambda device, precision, tf32: 1e10 if precision == "bf16" and tf32 else None)
    flags = ["--max-steps", 2, "--global-batch-size", 8, "--log-every", 2]
    for more, known in ((["--precision", "bf16"], True), ([], False)):
        folder = fit(tmp_path, *flags, *more)
        row = json.loads((folder / "log.jsonl").read_text())
        assert ("utilisation" in row) == known
        if known:
            assert row["utilisation"] == pytest.approx(row["gflops_per_sec"] / 10)
        assert (f"({row['gflops_per_sec'] / 10:.1%} of the peak)" in (folder / "log.txt").read_text()) == known


@pytest.mark.parametrize(("flags", "last"), [([], 4), (["--max-steps", 3], 3), (["--max-steps", 9], 4)], ids=str)
def test_a_run_ends_after_its_epochs_or_steps_whatever_comes_first(tmp_path, photos, shallow, flags, last):
    """40 images fill two batches of 16."""
    flags = ["--model", "DiT-N/8", "--data-path", photos, "--num-classes", 3, "--num-workers", 0, "--epochs", 2, *flags]
    folder = fit(tmp_path / "r", *flags, "--global-batch-size", 16)
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [f"{last:07d}.pt"]


def test_a_seed_decides_initial_weights_order_and_noise(tmp_path, monkeypatch, shallow):
    runs = []

    def noted(images, labels, *rest, **how):
        batch = draw_batch(images, labels, *rest, **how)
        runs.append([images, batch["noise"]])
        return batch

    monkeypatch.setattr(train, "draw_batch", noted)
    for seed in (0, 1, 0):
        flags = ["--model", "DiT-N/8", "--max-steps", 1, "--global-batch-size", 8, "--lr", 1e-30, "--global-seed", seed]
        weights = load(fit(tmp_path, *flags), 1)["model"]["blocks.0.mlp.fc1.weight"]
        runs[-1].append(weights)
    one, other, again = runs
    assert [torch.equal(*pair) for pair in zip(one, again)] == [True] * 3
    assert [torch.equal(*pair) for pair in zip(one, other)] == [False] * 3


def test_photos_may_be_mirrored_and_digits_may_not(tmp_path, photos, monkeypatch, shallow):
    mirrored = []
    monkeypatch.setattr(train, "draw_batch", lambda *a, **how: mirrored.append(how["flip"]) or draw_batch(*a, **how))
    for images in ([], ["--data-path", photos, "--num-classes", 3, "--num-workers", 0]):
        fit(tmp_path / "r", "--model", "DiT-N/8", "--max-steps", 1, "--global-batch-size", 8, *images)
    assert mirrored == [False, True]


def test_default_is_dit(tmp_path):
    """Without --mixer, DiT-S/2 is DiT. Its VAE cannot be reached from here, and the error says what to do."""
    args = train.parse_args(["--model", "DiT-S/2", "--num-classes", "1000", "--results-dir", str(tmp_path)])
    with pytest.raises(OSError, match=r"give --vae a local folder .* or work on pixels with --vae none"):
        train.main(args, ALONE)
    assert list(tmp_path.iterdir()) == []
    model = train.MODELS[args.model](num_classes=args.num_classes, mixer=args.mixer)
    assert sum(p.numel() for p in model.parameters()) == 32_963_360


def test_flags_of_the_public_script_keep_their_defaults():
    defaults = vars(train.parse_args([]))
    public = dict(
        data_path=None, results_dir="results", model="DiT-XL/2", image_size=256, num_classes=1000, epochs=1400,
        global_batch_size=256, global_seed=0, vae="ema", num_workers=4, log_every=100, ckpt_every=50_000,
    )  # fmt: skip
    assert {name: defaults[name] for name in public} == public
    assert (defaults["mixer"], defaults["lr"]) == ("attention", 1e-4)


@pytest.mark.parametrize("mixer", ["attention", "pdessm"])
def test_the_loss_curve_is_the_committed_one(tmp_path, mixer, golden):
    """Freezes data, noise, initial values and optimiser together. A change that is meant to move the curve replaces it:
    python train.py --model DiT-N/4 --vae none --image-size 8 --num-classes 10 --max-steps 30 --global-batch-size 32
    --lr 1e-3 --log-every 5 --mixer ..."""
    folder = fit(tmp_path, "--max-steps", 30, "--global-batch-size", 32, "--lr", 1e-3, "--log-every", 5, "--mixer", mixer)
    losses = [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]
    assert losses == pytest.approx(golden("loss_curve.json")[mixer], rel=2e-3)
    assert losses[-1] < 0.5 * losses[0]


def test_unconditional_training(tmp_path, photos):
    folder = fit(tmp_path / "r", "--data-path", f"{photos}/0", "--uncond", "--global-batch-size", 8, "--max-steps", 2)
    checkpoint = load(folder, 2)
    assert checkpoint["model"]["y_embedder.embedding_table.weight"].shape[0] == 1
    assert checkpoint["args"]["num_classes"] == 0


def test_what_was_learnt_is_saved_before_a_bad_image_ends_the_run(tmp_path, monkeypatch):
    digits, reads = load_dataset(None, 8), []

    def read_twenty(index, get=digits.__getitem__):
        reads.append(index)
        if len(reads) > 20:
            raise OSError("cannot read the image x.png")
        return get(index)

    monkeypatch.setattr(type(digits), "__getitem__", lambda self, index: read_twenty(index))
    monkeypatch.setattr("training.batches.load_dataset", lambda *a, **k: digits)
    with pytest.raises(OSError, match=r"x\.png"):
        fit(tmp_path, "--global-batch-size", 8)
    assert load(tmp_path / "000-DiT-N-4", 2)


def test_a_mistake_that_one_process_sees_ends_all_without_a_traceback(capfd):
    flags = ["--global-batch-size", 8, "--results-dir", "/proc/version/r"]
    assert fork(*flags, processes=2, spoil=lambda rank: sys.argv.__setitem__(0, "train.py")) == [1, 1]
    errors = capfd.readouterr().err
    assert "train.py: error: --results-dir /proc/version/r: a file is where a folder is needed" in errors
    assert "train.py: error: stopped, because another process did" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        (["--pde-terms", "diffusion", "reaction"], dict(terms=("diffusion", "reaction"))),
        (["--pde-coupling", "coupled", "--pde-groups", "24"], dict(coupling="coupled", groups=24)),
        (["--pde-coupling", "pairwise", "--pde-state-dim", "16"], dict(coupling="pairwise", state_dim=16)),
        (["--pde-gate", "--pde-conditioned"], dict(gate=True, conditioned=True)),
        (["--pde-activation", "--pde-components", "2"], dict(activation=True, components=2)),
    ],
)
def test_options_of_the_pde_reach_the_model_and_both_samplers(tmp_path, flags, options):
    folder = fit(tmp_path, "--max-steps", 1, "--global-batch-size", 8, "--mixer", "pdessm", *flags)
    path = folder / "checkpoints" / "0000001.pt"
    stored = load_checkpoint(path)[1]
    assert {name: stored[f"pde_{name}"] for name in options} == {n: list(v) if n == "terms" else v for n, v in options.items()}
    model, settings = load_model(path, {}, "ema")
    assert settings["mixer_options"].items() >= options.items()
    assert options.get("terms", TERMS) == model.blocks[0].attn.pde.equation.terms
    assert draw(path, tmp_path / "grid.png", "--class-labels", 3).shape == (64, 64, 3)
    assert draw_many(path, tmp_path / "samples", "--num-fid-samples", 2).shape == (2, 8, 8, 3)


@pytest.mark.parametrize(("mixer", "predict"), [("attention", "velocity"), ("pdessm", "x")])
def test_flow_matching_from_training_to_samples(tmp_path, mixer, predict):
    flags = ["--max-steps", 30, "--global-batch-size", 32, "--lr", 1e-3, "--log-every", 10, "--mixer", mixer]
    flags += ["--objective", "flow", "--path", "cosine", "--times", "logit-normal"]
    folder = fit(tmp_path, *flags, *(["--predict", "x"] if predict == "x" else []))
    losses = [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.9 * losses[0]
    path = folder / "checkpoints" / "0000030.pt"
    model, settings = load_model(path, {}, "ema")
    assert (settings["objective"], settings["path"], model.out_channels) == ("flow", "cosine", 3)
    assert settings["predict"] == predict
    grids = {sampler: draw(path, tmp_path / "a.png", "--sampler", sampler) for sampler in FLOW_SAMPLERS}
    assert np.array_equal(grids["euler"], draw(path, tmp_path / "a.png"))
    assert len({grid.tobytes() for grid in grids.values()}) == len(grids)
    assert draw_many(path, tmp_path / "samples", "--sampler", "heun", "--num-fid-samples", 2).shape == (2, 8, 8, 3)
    with pytest.raises(ValueError, match="--sampler ddpm: the checkpoint's objective is flow, for euler, heun, rk45, sde"):
        draw(path, tmp_path / "a.png", "--sampler", "ddpm")


def test_grids_and_probes_of_a_run_draw_only_classes_that_it_sees(tmp_path, photos, monkeypatch):
    drawn, generate = [], drawing.generate
    monkeypatch.setattr(drawing, "generate", lambda *a, **k: drawn.append(set(a[4].tolist())) or generate(*a, **k))
    monkeypatch.setattr(watching, "SAMPLING_STEPS", 1)
    monkeypatch.setattr(probe, "PROBED", 32)
    monkeypatch.setattr(probe, "open_network", lambda *_: Colours())
    flags = ["--data-path", photos, "--num-classes", 1000, "--max-steps", 1, "--global-batch-size", 8, "--num-workers", 0]
    folder = fit(tmp_path / "r", *flags, "--sample-every", 1, "--probe-every", 1)
    assert drawn == [{0, 1, 2}] * 2
    assert load_checkpoint(folder / "checkpoints" / "0000001.pt")[1]["class_names"] == ["0", "1", "2"]


@pytest.mark.parametrize("objective", ["diffusion", "flow"])
def test_a_unet_from_training_to_samples(tmp_path, objective):
    flags = ["--model", "UNet-N", "--max-steps", 2, "--global-batch-size", 8, "--objective", objective]
    path = fit(tmp_path, *flags) / "checkpoints" / "0000002.pt"
    settings = load_model(path, {}, "ema")[1]
    assert (settings["model"], settings["objective"], settings["image_size"]) == ("UNet-N", objective, 8)
    assert draw(path, tmp_path / "a.png", "--image-size", "8x16", "--class-labels", 3).shape == (64, 128, 3)
    weights = load_checkpoint(path)[0]
    torch.save(weights, path)  # without what train.py was told
    known = ["--objective", objective] if objective == "flow" else []
    with pytest.raises(ValueError, match="does not say for images of which size it is; give --image-size"):
        draw(path, tmp_path / "a.png", *known)
    assert draw(path, tmp_path / "a.png", "--image-size", "8", "--class-labels", 3, *known).shape == (64, 64, 3)


@pytest.mark.parametrize(
    ("name", "objective", "classes"),
    [
        *((name, *how) for name in ("LaMamba-N", "DiS-N/4") for how in (("diffusion", []), ("flow", ["--uncond"]))),
        ("U-ViT-N/4", "flow", ["--uncond"]),
        ("ZigMa-N/4", "diffusion", []),
    ],
)
def test_systems_from_training_to_samples(tmp_path, name, objective, classes):
    """Also of bare weights, of another size, and in bf16."""
    flags = ["--model", name, "--max-steps", 2, "--global-batch-size", 8, "--objective", objective, *classes]
    path = fit(tmp_path, *flags, "--precision", "bf16") / "checkpoints" / "0000002.pt"
    model, settings = load_model(path, {}, "ema")
    assert (settings["model"], settings["objective"], settings["image_size"]) == (name, objective, 8)
    assert model.num_classes == (0 if classes else 10)
    drawn = [] if classes else ["--class-labels", 3]
    assert draw(path, tmp_path / "a.png", "--image-size", "16x8", *drawn, "--precision", "bf16").shape[2] == 3
    torch.save(load_checkpoint(path)[0], path)  # without what train.py was told
    known = ["--objective", objective] if objective == "flow" else []
    assert (draw(path, tmp_path / "b.png", *known, *drawn) == draw(path, tmp_path / "c.png", *known, *drawn)).all()


@pytest.mark.parametrize("objective", ["diffusion", "flow"])
def test_mixers_see_the_same_images_noise_and_times(tmp_path, monkeypatch, objective):
    seen = []
    monkeypatch.setattr(train, "draw_batch", lambda *a, **how: seen.append(draw_batch(*a, **how)) or seen[-1])
    for mixer in ("attention", "pdessm", "pdessm-g"):
        fit(tmp_path, "--max-steps", 3, "--global-batch-size", 8, "--objective", objective, "--mixer", mixer)
    for step in range(3):
        for other in (seen[3 + step], seen[6 + step]):
            torch.testing.assert_close(other, seen[step], rtol=0, atol=0)


def test_a_named_set_brings_its_classes(tmp_path, photos, monkeypatch):
    for name, classes in (("imagenet256", 3), ("celeba-hq", 0)):
        monkeypatch.setitem(DATASETS, name, DATASETS[name]._replace(images=40, num_classes=classes))
        folder = fit(tmp_path / name, "--dataset", name, "--data-path", photos, "--max-steps", 1, "--global-batch-size", 8)
        assert load_checkpoint(folder / "checkpoints" / "0000001.pt")[1]["num_classes"] == classes


def test_held_out_images_must_have_the_same_classes(tmp_path, photos):
    other = tmp_path / "others" / "cat" / "1.png"
    other.parent.mkdir(parents=True)
    (Path(photos) / "0" / "0.png").rename(other)
    args = train.parse_args([*QUICK, "--data-path", photos, "--val-path", str(tmp_path / "others"), "--global-batch-size", "8"])
    with pytest.raises(ValueError, match=r"--val-path has other classes \(cat\) than --data-path \(0, 1, 2\)"):
        train.main(args, ALONE)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data-path", "/no/such/folder"], "/no/such/folder: no such folder"),
        (["--image-size", "10"], r"--image-size 10 is not divisible by 4 \(4 of DiT-N/4\)"),
        (["--image-size", "40", "--vae", "ema"], r"--image-size 40 is not divisible by 32 \(4 of DiT-N/4 x 8 of the VAE\)"),
        (["--global-batch-size", "8", "--grad-accum", "3"], "size 8 is not divisible by 1 processes x 3 of --grad-accum"),
        (["--parallel", "fsdp"], "--parallel fsdp has nothing to shard on one process; start several with torchrun"),
        (["--global-batch-size", "2000"], "--global-batch-size 2000 is more than there are images: at most 1797"),
        (["--num-classes", "9"], "10 classes, more than --num-classes 9"),
        (["--vae", "/no/vae"], "/no/vae: neither ema, mse, none nor a folder"),
        (["--results-dir", "/proc/version/results"], "--results-dir /proc/version/results: a file is where a folder is needed"),
        (["--device", "cuda"], "--device cuda: CUDA device 0 is wanted and PyTorch finds 0"),
        (["--times", "logit-normal"], "--times means nothing to --objective diffusion"),
        (["--predict", "x", "--time-shift", "3"], "--predict, --time-shift means nothing to --objective diffusion"),
        (["--objective", "flow", "--min-snr", "5"], "--min-snr means nothing to --objective flow"),
        (["--ema-decay", "0.9", "0.5", "0.9"], "--ema-decay 0.9 0.5 0.9: give each once"),
        (["--ema-lengths", "0.1", "0.1"], "--ema-lengths 0.1 0.1: give each once"),
        (["--lr-coefficients", "5"], "--lr-coefficients 5 is for the coefficients of PDEs, and the model has none"),
        (["--mixer", "pdessm", "--pde-attention-every", "9"], "9: DiT-N/4 has 6 blocks, of which none would have attention"),
        (["--features", "efficientnet-lite0"], "--features and --weights mean nothing without --probe-every"),
        (["--keep-every", "5"], "--keep-every means nothing without --keep-last"),
        (["--uncond", "--class-dropout", "0.2"], "--class-dropout means nothing to --uncond"),
        (["--lr-schedule", "cosine", "--max-steps", "5", "--warmup-steps", "5"], "--warmup-steps 5 leave none of the 5 steps"),
        (["--model", "UNet-N", "--mixer", "pdessm"], "a U-Net has no mixer to swap"),
        (["--model", "UNet-N", "--image-size", "10"], r"--image-size 10 is not divisible by 4 \(4 of UNet-N\)"),
        (["--model", "LaMamba-N", "--mixer", "pdessm"], "LaMamba has no mixer to swap, so mixer='pdessm' means nothing to it"),
        (["--model", "LaMamba-N", "--image-size", "24"], "24 x 24 does not fit windows of 4: this model comes to a side of 6"),
        (["--val-path", "/no/such/folder"], "/no/such/folder: no such folder"),
        (["--val-path", "digits"], "the digits have no held-out images"),
        (["--pde-gate", "--pde-groups", "2"], "--pde-groups, --pde-gate means nothing to --mixer attention"),
        ([*COUPLED, "--pde-groups", "7"], "96 channels cannot be split into 7"),
        ([*COUPLED, "--pde-conditioned"], "--pde-conditioned means nothing to --pde-coupling coupled"),
        ([*COUPLED, "--pde-components", "2"], "--pde-components means nothing to --pde-coupling coupled"),
        (["--mixer", "pdessm", "--pde-groups", "1"], "--pde-groups means nothing to the diagonal coupling"),
        (["--mixer", "pdessm", "--pde-state-dim", "64", "--pde-expand", "2"], "--pde-state-dim and --pde-expand say the same"),
        (["--device", "gpu"], "--device gpu is none of cpu, cuda and cuda:N"),
    ],
)
def test_mistakes_end_in_one_line(tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(SystemExit, match=message) as end:
        launch(train.main, train.parse_args([*QUICK, *flags]))
    assert "\n" not in str(end.value)
    assert not list(tmp_path.rglob("*.pt"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mixer", "hyena"], "choose from .*attention.*pdessm"),
        (["--model", "DiT-Q/2"], "--model: DiT-Q/2 is no model; they are DiT-{XL,.*DiS-{H,"),
        (["--results", "runs/xl"], "unrecognized arguments: --results runs/xl"),  # of which train.slurm would not know
        (["--max-steps", "0"], "--max-steps: 0 is not a whole number from 1"),
        (["--pde-terms", "advection"], "choose from .*convection"),
        (["--pde-coupling", "full"], "choose from .*pairwise"),
    ],
)
def test_unknown_names_list_the_known(capsys, flags, message):
    with pytest.raises(SystemExit):
        train.parse_args(flags)
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_damaged_image_is_named_without_a_traceback(tmp_path, photos, capfd, workers):
    damaged = Path(photos) / "1" / "7.png"
    damaged.write_bytes(damaged.read_bytes()[:120])
    flags = ["--data-path", photos, "--global-batch-size", "40", "--num-workers", workers, "--results-dir", str(tmp_path / "r")]
    assert fork(*flags, spoil=lambda rank: sys.argv.__setitem__(0, "train.py")) == [1]
    errors = capfd.readouterr().err
    assert "Traceback" not in errors
    assert re.search(rf"^train\.py: error: cannot read the image {damaged}", errors, re.MULTILINE)
