"""The scripts of the paper's tables: one of them in full, though tiny, the others with every command looked at and not run."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import sample_ddp
import train
from checkpoints.build import save_checkpoint
from commands import ALONE, ROOT, Colours
from diffusion import create_flow
from images.named import DATASETS
from mixers import mixer_options
from models import MODELS
from reproduce import adm_targets, chance, denoising, detail, grids_sheet, noise, resolution, strips, tables, unet_norm
from scripts import commands_of, run_script

SCRIPTS = sorted(path.name for path in (ROOT / "reproduce").glob("table*.sh"))
COMMANDS = {"train.py": train.parse_args, "sample_ddp.py": sample_ddp.parse_args, "evaluate.py": evaluate.parse_args}


@pytest.mark.parametrize("objective", ["flow", "diffusion"])
@pytest.mark.parametrize("scale", ["full", "small"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_every_command_of_a_script_is_one(tmp_path, script, scale, objective):
    commands = commands_of(script, tmp_path, SCALE=scale, OBJECTIVE=objective)
    parsed = [(name, COMMANDS[name](flags)) for name, *flags in commands if name in COMMANDS]
    trained = [args for name, args in parsed if name == "train.py"]
    assert len(trained) >= (6 if scale == "full" else 2)
    assert len(parsed) == 3 * len(trained) + 1  # train, sample and evaluate each, and one reference
    for args in trained:
        assert args.model in MODELS
        assert args.objective == objective
        mixer_options(args.mixer, vars(args))
        assert (args.dataset in DATASETS) == (scale == "full")
        system = Path(args.results_dir).name.removesuffix(f"-{args.global_seed}")
        known = tables.PAPER[script.removesuffix(".sh")]
        assert system in known or any(system.removesuffix(f"-{coupling}") in known for coupling in tables.COUPLINGS)
    seeds = {args.global_seed for args in trained}
    assert seeds == ({0, 1, 2} if scale == "full" else {0})
    of_network = "model", "mixer", "lr_coefficients", "results_dir"
    settings = [{k: v for k, v in vars(a).items() if not k.startswith("pde_") and k not in of_network}
                for a in trained if a.global_seed == 0]  # fmt: skip
    assert all(other == settings[0] for other in settings)  # systems differ in the network alone


@pytest.mark.parametrize(
    ("flags", "predict"), [({}, "x"), ({"PREDICT": "velocity"}, "velocity"), ({"OBJECTIVE": "diffusion"}, None)], ids=str
)
def test_small_runs_may_have_larger_images_and_patches(tmp_path, flags, predict):
    commands = commands_of("table3_flowers.sh", tmp_path, SCALE="small", SIZE="64", BATCH="32", **flags)
    trained = [train.parse_args(flags) for name, *flags in commands if name == "train.py"]
    assert {args.model for args in trained} == {"DiT-N/8", "UNet-N"}
    assert {(args.image_size, args.predict, args.global_batch_size) for args in trained} == {(64, predict, 32)}


def test_other_settings_are_another_run(tmp_path):
    for flags in ({"STEPS": "10"}, {"STEPS": "20"}, {"STEPS": "20", "IMAGES": "30"}):
        commands = commands_of("table1_cifar10.sh", tmp_path, SCALE="small", **flags)
        assert [c[0] for c in commands].count("sample_ddp.py") == 6, flags


@pytest.mark.parametrize("script", SCRIPTS)
def test_torchrun_takes_no_flag_for_its_own(tmp_path, script):
    commands = commands_of(script, tmp_path, PROCESSES="2", SEEDS="0", FEATURES="inception")
    flags = [flag for command in commands for flag in command if flag.startswith("--")]
    assert "--nproc_per_node=2" in flags
    assert "--num" not in flags  # which torchrun takes for --numa-binding


def test_what_is_finished_is_not_done_again(tmp_path):
    first = commands_of("table1_cifar10.sh", tmp_path, SCALE="small")
    next((tmp_path / "runs" / "U-Net-0").glob("recorded*")).unlink()
    again = commands_of("table1_cifar10.sh", tmp_path, SCALE="small")
    assert [c[0] for c in again] == ["-c", "sample_ddp.py", "evaluate.py", "-m", "-m"]
    assert [c[1] for c in again[3:]] == ["reproduce.tables"] * 2
    assert again[1:] == [c for c in first if "U-Net-0" in str(c)][1:] + [first[-1]]


def test_runs_on_other_data_are_not_taken_for_finished(tmp_path):
    commands_of("table1_cifar10.sh", tmp_path, SCALE="small")
    (tmp_path / "other").mkdir()
    done = run_script("table1_cifar10.sh", tmp_path / "other", tmp_path, PYTHON="true", SCALE="small")
    assert done.returncode == 2
    kind = ", small-flow"
    assert f"runs holds runs on {tmp_path}{kind}, not on {tmp_path / 'other'}{kind}: move it away" in done.stderr
    for settings in ({"PRECISION": "bf16"}, {"OBJECTIVE": "diffusion"}, {"BATCH": "8"}, {"SCALE": "full"}):
        done = run_script("table1_cifar10.sh", tmp_path, tmp_path, PYTHON="true", **{"SCALE": "small"} | settings)
        assert done.returncode == 2, settings
    (tmp_path / "runs" / "data.txt").unlink()
    assert "holds runs" not in run_script("table1_cifar10.sh", tmp_path / "other", tmp_path, PYTHON="true").stderr


def test_data_and_references_that_do_not_exist_are_named(tmp_path):
    others = [dict(REFERENCE=str(tmp_path / "none.npz")), dict(IMAGES_OF=str(tmp_path / "nowhere"))]
    for data, more in ((tmp_path / "nowhere", {}), *((tmp_path, other) for other in others)):
        done = run_script("table1_cifar10.sh", data, tmp_path, PYTHON="true", **more)
        assert done.returncode == 2
        assert re.search(r"(nowhere|none\.npz): no such file", done.stderr)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("script", [SCRIPTS[0], "scaling.sh", "grids.sh", "metrics.sh", "every_mixer.sh", "overlay.sh"])
def test_scripts_without_data_say_what_they_take(script):
    done = subprocess.run(["bash", ROOT / "reproduce" / script], capture_output=True, text=True)
    assert (done.returncode, "unbound" in done.stderr) == (2, False)
    assert done.stderr.startswith("usage: ")


@pytest.mark.parametrize(
    ("name", "message"),
    [("SCALE", "not tiny and flow"), ("OBJECTIVE", "not full and tiny"), ("ONLY", "ONLY=tiny is none of this table's systems")],
)
def test_mistakes_are_named(tmp_path, name, message):
    done = run_script("table1_cifar10.sh", tmp_path, tmp_path, **{"PYTHON": sys.executable, name: "tiny"})
    assert done.returncode == 2
    assert message in done.stderr


def test_a_small_table_runs_to_its_rows(tmp_path):
    random = np.random.default_rng(0)
    for split in ("train", "test"):
        (tmp_path / "data" / split).mkdir(parents=True)
        for number in range(64):
            image = Image.fromarray(random.integers(256, size=(8, 8, 3), dtype=np.uint8))
            image.save(tmp_path / "data" / split / f"{number}.png")
    systems = ["PDE-SSM-DiT-diagonal"]  # the others differ in flags, which are parsed above
    settings = dict(SCALE="small", STEPS="1", IMAGES="4", SAMPLING_STEPS="1", FEATURES="efficientnet-lite0")
    settings["ONLY"] = " ".join(systems)
    done = run_script("table1_cifar10.sh", tmp_path / "data", tmp_path, PYTHON=sys.executable, **settings)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["system"] for row in rows] == systems
    table = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("|")]
    assert table[0][:3] == ["parameters (M), paper", "MSE, paper", "FID, paper"]
    lines = {line[0].replace(", ", "-"): line for line in table[2:]}
    for row in rows:
        ours = [row["parameters"] / 1e6, row["held_out_mse"], row["metrics"]["FD-EfficientNet"]]
        assert row["precision"] == "fp32"
        assert [float(cell) for cell in lines[row["system"]][4:]] == pytest.approx(ours, rel=1e-3)
        assert str(tmp_path / "data") not in json.dumps(row["commands"])


def test_other_papers_figures_stand_beside_ours_with_what_is_wrong_with_them():
    metrics = {"features": "2048 features of inception", "samples": dict(images=9), "reference": dict(images_in_statistics=8)}
    row = dict(scale="full", objective="diffusion", steps=3, sampling_steps=250, sampler="ddpm", seed=0, parameters=28e6)
    row |= dict(machine="a machine", torch="2.15", date="2026", commands=[], system="PDE-SSM-DiT-g")
    row |= dict(metrics=metrics | {"FID": 3.0})
    for table in tables.REMARKS:
        lines = [line.strip("|").split("|") for line in tables.tabulate(table, [row]).splitlines() if line.startswith("|")]
        assert len({len(line) for line in lines}) == 1
        assert tables.REMARKS[table] in tables.tabulate(table, [row])
        for name, *cells in lines[2:]:
            figures = tables.PAPER[table][name.strip()]
            assert [float(cell) for cell in cells if cell.strip()][: len(figures)] == [*figures.values()]


def test_a_later_run_of_the_same_seed_replaces_the_earlier_one():
    metrics = {"features": "2048 features of inception", "samples": dict(images=9), "reference": dict(images_in_statistics=8)}
    row = dict(scale="full", objective="flow", steps=3, sampling_steps=50, sampler="euler", parameters=29e6, training_loss=0.1)
    row |= dict(machine="a machine", torch="2.15", date="2026", commands=[], system="DiT")
    rows = [row | dict(seed=seed, metrics=metrics | {"FID": fid}) for seed, fid in ((0, 3.0), (1, 4.0), (0, 5.0))]
    (line,) = [line for line in tables.tabulate("table1_cifar10", rows).splitlines() if line.startswith("| DiT |")]
    assert line.split(" | ")[-1] == "4.5 (4 to 5) |"


def test_distances_from_other_references_are_not_averaged():
    row = dict(scale="full", objective="flow", steps=3, sampling_steps=50, sampler="euler", parameters=29e6, training_loss=0.1)
    row |= dict(machine="a machine", torch="2.15", date="2026", commands=[], system="DiT")
    metrics = [dict(features="2048 features of inception", samples=dict(images=9), FID=n) for n in (3.0, 4.0)]
    metrics = [of | dict(reference=dict(images_in_statistics=n)) for n, of in enumerate(metrics, start=8)]
    table = tables.tabulate("table1_cifar10", [row | dict(seed=seed, metrics=of) for seed, of in enumerate(metrics)])
    (line,) = [line for line in table.splitlines() if line.startswith("| DiT |")]
    assert [line.split(" | ")[number] for number in (6, 9)] == ["3", "4 |"]
    assert re.findall(r"against (\d) images", table) == ["8", "9"]


def test_tables_say_whose_seeds_they_are_and_by_which_commands():
    """As a command, too, that needs nothing but the rows."""
    printed = subprocess.run([sys.executable, "-S", "reproduce/tables.py"], cwd=ROOT, capture_output=True, text=True)
    assert printed.returncode == 0, printed.stderr
    for path in (ROOT / "reproduce" / "results").glob("table*.jsonl"):
        first, *_ = [json.loads(line) for line in path.read_text().splitlines()]
        for run in first["commands"]:
            assert f"\n    {run['command']}\n" in printed.stdout
    assert tables._seeds({"a": {0: None, 1: None}, "b": {1: None, 0: None}, "c": {2: None}}) == "seeds 0, 1 (but c 2)"
    assert tables._seeds({"a": {3: None}}) == "seed 3"


@pytest.mark.parametrize("text", ["[\n {}\n]\n", '{"table": "none"}\n', "3\n", "# Rows\n"])
def test_files_of_other_things_hold_no_rows(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(SystemExit, match=r"^tables\.py: error: .*a\.json holds other things than rows"):
        tables.main([tmp_path / "a.json"])


def test_grids_of_a_data_set_become_one_sheet(tmp_path):
    grids = {(s, o): (x, y) for y, o in enumerate(grids_sheet.OBJECTIVES) for x, s in enumerate(grids_sheet.SYSTEMS)}
    for number, (system, objective) in enumerate(grids):
        folder = tmp_path / f"digits-{system}-{objective}"
        folder.mkdir()
        Image.new("RGB", (80, 40), (40 * number, 0, 0)).save(folder / "samples.png")
    grids_sheet.main("digits", tmp_path, tmp_path)
    with Image.open(tmp_path / "grids-digits.png") as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    assert pixels.shape == (2 * (20 + grids_sheet.BAR), 3 * 40, 3)
    for number, (x, y) in enumerate(grids.values()):
        assert pixels[(y + 1) * (20 + grids_sheet.BAR) - 1, 40 * x].tolist() == [40 * number, 0, 0]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("app_pictures none", "none has 0 checkpoints, and the pictures are of two"),
        ("chance none.npz --features efficientnet-lite0", "none.npz: no such file or folder"),
        ("classify none --results none.json", "none: no such folder"),
        ("detail none none.npz", "none: no images"),
        ("noise 3 none/noise.npz", "none"),
        ("resolution none.pt none 8", "no checkpoint at none.pt"),
        ("unet_norm none work", "none/test: no such folder"),
    ],
)
def test_files_that_are_not_there_are_named_in_a_line(command, message, tmp_path, monkeypatch):
    name, *flags = command.split()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *flags])
    monkeypatch.delitem(sys.modules, f"reproduce.{name}", raising=False)
    with pytest.raises(SystemExit, match=rf"^{name}\.py: error: .*{re.escape(message)}") as ended:
        runpy.run_module(f"reproduce.{name}", run_name="__main__")
    assert "\n" not in str(ended.value)
    assert not list(tmp_path.iterdir())


def test_errors_at_other_sizes_of_a_network_without_classes(checkpoint, images, capsys):
    resolution.main(checkpoint(objective="flow", num_classes=0), images, [8, 16])
    lines = capsys.readouterr().out.splitlines()
    (own, same), (between, continued) = (re.findall(r"\d\.\d{4}", line) for line in lines)
    assert own == same  # where positions are those of training
    assert between != continued


def test_errors_at_other_sizes_are_at_times_that_the_network_knows(checkpoint, images, monkeypatch):
    """Of which SiT's are not multiplied. They are not moved towards the noise: errors of all runs are of the same times."""
    path, seen = checkpoint(objective="flow", num_classes=0), []
    contents = torch.load(path)
    save_checkpoint(path, **contents | dict(args=contents["args"] | dict(time_scale=1, time_shift=3.0)))

    def held_out_loss(model, dataset, objective, *_, **__):
        seen.append((objective.time_scale, objective.time_shift))
        return dict(mse=0)

    monkeypatch.setattr(resolution, "held_out_loss", held_out_loss)
    resolution.main(path, images, [8])
    assert seen == [(1, 1), (1, 1)]


@pytest.mark.parametrize("predict", ["velocity", "x"])
@pytest.mark.parametrize("path", ["linear", "cosine"])
@pytest.mark.parametrize("constant", [True, False])
def test_errors_of_means_are_told_from_others(path, predict, constant):
    """Of a network that is right but for a constant, or but for noise whose mean in every channel is 0."""
    flow, images = create_flow(path=path, predict=predict), torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    mistake = torch.full_like(images, 0.5) if constant else images.flip(0) - images.flip(0).mean((2, 3), keepdim=True)
    rest = list(zip(images.split(4), mistake.split(4), strict=True))

    def network(x, t, y):
        u, wrong = rest.pop(0)
        alpha, sigma, d_alpha, d_sigma = flow.coefficients(t / 1000, x)
        velocity = d_alpha * u + d_sigma * (x - alpha * u) / sigma + wrong
        return velocity if predict == "velocity" else flow.clean(x, t / 1000, velocity)

    found = denoising.errors(network, flow, images, torch.zeros(6, dtype=torch.long), 0.75, batch=4)
    whole = mistake.square().mean().item()
    assert found == pytest.approx((whole, whole * constant), rel=1e-4, abs=1e-6)


def test_errors_by_time_of_checkpoints(checkpoint, images, tmp_path, capsys):
    path, out = checkpoint(objective="flow"), tmp_path / "errors.json"
    denoising.main(**vars(denoising.parse_args([str(images), f"a={path}", f"b={path}", "--num", "3", "--json", str(out)])))
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].replace("a", "b") == lines[3]
    found = json.loads(out.read_text())
    assert found["most_images"] == 3
    assert all(0 <= part <= whole for rows in found["rows"].values() for whole, part in rows)
    with pytest.raises(ValueError, match="has --objective diffusion --vae none, not flow on pixels"):
        denoising.open_network(checkpoint(objective="diffusion"))


def test_the_u_net_is_trained_with_and_without_its_last_norm(tmp_path, monkeypatch):
    for folder in ("train", "test"):
        (tmp_path / folder).mkdir()
        for number in range(2):
            Image.new("RGB", (32, 32), (99 * number, 0, 0)).save(tmp_path / folder / f"{number}.png")
    small = unet_norm.FLAGS.replace("image-size 32", "image-size 16").replace("batch-size 32", "batch-size 2")
    monkeypatch.setattr(unet_norm, "FLAGS", small)
    flags = [str(tmp_path), str(tmp_path / "work"), "--steps", "1", "--num", "2", "--json", str(tmp_path / "a.json")]
    unet_norm.main(**vars(unet_norm.parse_args(flags)), processes=ALONE)
    assert set(json.loads((tmp_path / "a.json").read_text())["rows"]) == {"with", "without"}
    for name in ("with", "without"):
        (path,) = tmp_path.glob(f"work/{name}/*/checkpoints/0000001.pt")
        weights = torch.load(path, weights_only=True)["ema"]
        assert ("net.conv_norm_out.weight" in weights) == (name == "with")
    assert unet_norm.UNet.__init__ is unet_norm.BUILD
    with pytest.raises(ValueError, match="work exists already"):
        unet_norm.main(**vars(unet_norm.parse_args(flags)), processes=ALONE)


def test_positions_continue_in_dits_alone(images, tmp_path):
    for name, options in (("DiS-N/4", {}), ("DiT-N/4", dict(positions="rope"))):
        model = MODELS[name](8, in_channels=3, num_classes=0, **options)
        args = dict(model=name, mixer="attention", vae="none", num_classes=0, image_size=8, objective="diffusion", **options)
        save_checkpoint(tmp_path / "a.pt", model={}, ema=model.state_dict(), opt={}, args=args)
        with pytest.raises(ValueError, match="is none of a DiT with sine positions on pixels"):
            resolution.main(tmp_path / "a.pt", images, [8])


def test_chance_needs_images(tmp_path, monkeypatch):
    network = Colours()
    np.savez(tmp_path / "a.npz", mu=np.zeros(network.dim), sigma=np.eye(network.dim), features=network.name)
    monkeypatch.setattr(chance, "open_network", lambda *_: network)
    with pytest.raises(ValueError, match=r"a\.npz holds statistics without images"):
        chance.main(tmp_path / "a.npz", [], 2, *[None] * 4)


def test_first_samples_of_runs_become_one_picture(tmp_path, random_images, capsys):
    samples, out = {name: random_images(5) for name in "ab"}, tmp_path / "all.png"
    for name, images in samples.items():
        np.savez(tmp_path / f"{name}.npz", arr_0=images)
    strips.strip(tmp_path / "b.npz", 3).save(tmp_path / "b.png")
    files = [f"h = 0={tmp_path / 'a.npz'}", f"b={tmp_path / 'b.png'}"]
    strips.main(**vars(strips.parse_args([str(out), *files, "--count", "3"])))
    with Image.open(out) as picture:
        pixels = np.asarray(picture.convert("RGB"), int)[:, strips.MARGIN :]
    rows = np.concatenate([np.concatenate(list(images[:3]), axis=1) for images in samples.values()])
    assert pixels.shape == rows.shape
    assert np.abs(pixels - rows).mean() < 8  # of 256 colours
    with pytest.raises(SystemExit):
        strips.parse_args([str(out), "a"])
    assert "a is not NAME=FILE with a file that exists" in capsys.readouterr().err
    with pytest.raises(ValueError, match="the rows differ in size: 18 x 6, 30 x 6"):
        strips.main(**vars(strips.parse_args([str(out), *files, "--count", "5"])))
    np.savez(tmp_path / "a.npz", mu=np.zeros(3))
    (tmp_path / "b.npz").write_text("none")
    for name, message in (("a", "holds no images: it has no arr_0, only mu"), ("b", "is not an .npz")):
        with pytest.raises((ValueError, OSError), match=rf"{name}\.npz {message}"):
            strips.strip(tmp_path / f"{name}.npz", 3)


def test_detail_is_by_frequency(tmp_path, capsys):
    """Of waves of 3 and 10 cycles an image across it, of which the samples have half and twice the amplitude."""
    place = np.arange(32) * 2 * np.pi / 32

    def waves(slow, fast):
        row = 127.5 + slow * np.cos(3 * place) + fast * np.cos(10 * place)
        return np.tile(row.round().astype(np.uint8)[:, None], (32, 1, 3))

    for number in range(4):
        Image.fromarray(waves(40, 20)).save(tmp_path / f"{number}.png")
    np.savez(tmp_path / "samples.npz", arr_0=waves(20, 40)[None])
    detail.main(tmp_path, [tmp_path / "samples.npz"])
    ratios = [float(number) for number in capsys.readouterr().out.splitlines()[1].split()[:6]]
    assert ratios[1] == pytest.approx(0.25, rel=0.05)
    assert ratios[3] == pytest.approx(4, rel=0.05)


def test_detail_is_of_images_of_one_size(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    for name, arrays, message in (
        ("a", dict(mu=np.zeros(3)), r"a\.npz holds no images: it has no arr_0, only mu"),
        ("b", dict(arr_0=np.zeros((2, 4, 6, 3), np.uint8)), r"b\.npz has samples of 4 x 6 pixels, and .* images of 8 x 8"),
    ):
        np.savez(tmp_path / f"{name}.npz", **arrays)
        with pytest.raises(ValueError, match=message):
            detail.main(tmp_path, [tmp_path / f"{name}.npz"])
    for number in range(1, 5):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{number}.png")
    with pytest.raises(ValueError, match="has images of 2 sizes"):
        detail.main(tmp_path, [])


def test_chance_is_that_of_few_normal_numbers():
    """Of n values from N(0, 1), the squared mean and the squared error of the deviation have means of 1 / n and 1 / 2n."""
    pool = torch.randn(40_050, 1, generator=torch.Generator().manual_seed(0))
    found = chance.distances(pool, (np.zeros(1), np.ones((1, 1))), 100)
    assert len(found) == 400
    assert np.mean(found) == pytest.approx(1.5 / 100, rel=0.2)
    dealt = chance.distances(pool.sort(0).values, (np.zeros(1), np.ones((1, 1))), 100)
    assert np.mean(dealt) == pytest.approx(1.5 / 100, rel=0.2)             # whatever their order was
    with pytest.raises(ValueError, match="199 images do not make two sets of 100"):
        chance.distances(pool[:199], (np.zeros(1), np.ones((1, 1))), 100)


@pytest.mark.parametrize(("other", "status"), [({}, 0), (dict(FID=3.96), 0), (dict(FID=3.92), 1), (dict(Recall=0.54), 1)])
def test_numbers_that_are_not_adms_end_with_a_status(monkeypatch, other, status):
    ours = {name: value for name, (value, _) in adm_targets.PUBLISHED.items()} | other

    def evaluate(command):
        Path(command[-1]).write_text(json.dumps(ours))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", evaluate)
    assert adm_targets.main(["reference.npz", "samples.npz"]) == status


def test_noise_is_what_evaluation_reads(tmp_path):
    noise.main(5, tmp_path / "noise.npz")
    images = np.load(tmp_path / "noise.npz")["arr_0"]
    assert (images.shape, images.dtype) == ((5, 32, 32, 3), np.uint8)
    assert 120 < images.mean() < 135
