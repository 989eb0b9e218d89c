"""The comparison of all mixers and systems: what its script runs, what it makes of a run, and the table of all."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image

import train
from benchmarks.every_mixer import SIDES
from commands import ROOT, fit
from mixers import mixer_options
from reproduce import every_mixer

# In place of Python, as in test_reproduce.py: two rows, of which training makes a checkpoint, or ends with a status.
PRETENDER = f"""#!{sys.executable} -S
import os, sys
flags = dict(zip(sys.argv[1:], sys.argv[2:]))
with open("SEEN", "a") as file:
    print(repr(sys.argv[1:]), file=file)
if "--names" in flags:
    print("good\\t--model DiT-N/" + flags["--names"])
    print("bad\\t--model DiT-N/4 --mixer bad")
elif "train.py" in sys.argv and flags.get("--mixer") == "bad":
    print("train.py: error: it is bad")
    sys.exit(STATUS)
elif "train.py" in sys.argv:
    path = os.path.join(flags["--results-dir"], "000", "checkpoints")
    os.makedirs(path)
    open(os.path.join(path, "%07d.pt" % int(flags["--max-steps"])), "w").close()
elif "--record" in sys.argv:
    folder, *_, failure = sys.argv[sys.argv.index("--record") + 1:][:7]
    there = [("samples", "metrics"), ("bits.json", "bits_per_dimension")]
    measured = [' "%s": 1' % key for name, key in there if os.path.exists(os.path.join(folder, name))]
    with open(os.path.join(folder, "row.json"), "a") as file:
        print(' "failure": ' + failure if failure else "\\n".join(measured), file=file)
elif "--make-ref" in flags:
    open(sys.argv[sys.argv.index("--make-ref") + 2], "w").close()
elif "sample_ddp.py" in sys.argv:
    os.makedirs(flags["--sample-dir"])
elif "evaluation.likelihood" in sys.argv:
    open(flags["--json"], "w").close()
"""


@pytest.fixture
def script(tmp_path):
    """script(status of the bad row, variables): what was run, and the script's own status."""

    def run(status=1, **variables):
        pretender, seen = tmp_path / "python", tmp_path / "seen"
        pretender.write_text(PRETENDER.replace('"SEEN"', repr(str(seen))).replace("STATUS", str(status)))
        pretender.chmod(0o755)
        seen.unlink(missing_ok=True)
        places = dict(PYTHON=str(pretender), WORK=str(tmp_path / "work"), RESULTS=str(tmp_path / "rows.json"))
        environment = {name: value for name, value in os.environ.items() if name not in ("CIFAR10", "FLOWERS", "SEEDS")}
        command = ["bash", str(variables.pop("SCRIPT", ROOT / "reproduce" / "every_mixer.sh"))]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment | places | variables)
        return [eval(line) for line in seen.read_text().splitlines()] if seen.exists() else [], done

    return run


def test_what_failed_is_a_row_and_what_is_finished_is_not_done_again(script, tmp_path):
    variables = dict(CIFAR10=str(tmp_path), SEEDS="0 3", STEPS="7")
    first, done = script(**variables, IMAGES="0", BITS="0")
    assert done.returncode == 0, done.stderr
    runs = [train.parse_args(command[1:]) for command in first if command[0] == "train.py" and "bad" not in command]
    assert [(run.global_seed, run.max_steps, run.resume) for run in runs] == [(0, 7, "auto"), (3, 7, "auto")]
    assert [command[9] for command in first if "--record" in command] == ["", "train.py: error: it is bad"] * 2
    again, _ = script(**variables, IMAGES="9", BITS="0")                   # draws samples of what can be drawn
    assert [command[0] for command in again if command[0] != "-m"] == ["evaluate.py", "sample_ddp.py", "sample_ddp.py"]
    third, _ = script(**variables, IMAGES="9", BITS="5")
    assert [command[0] for command in third if command[0] != "-m"] == []
    measured = [command[command.index("--num-images") + 1] for command in third if "evaluation.likelihood" in command]
    assert measured == ["5", "5"]
    fourth, _ = script(**variables, IMAGES="9")
    assert {command[1] for command in fourth} == {"reproduce.every_mixer"}
    assert not list(tmp_path.glob("work/*/*/samples"))


@pytest.mark.parametrize("status", [75, 137])
def test_what_is_stopped_is_no_row(script, tmp_path, status):
    commands, done = script(status, FLOWERS=str(tmp_path), IMAGES="0", SEEDS="0")
    assert done.returncode == status
    assert not any("evaluation.likelihood" in command for command in commands)  # of networks that predict the image
    assert [command[4] for command in commands if "--record" in command] == ["flowers"]
    assert {"--uncond", "--predict", "DiT-N/8"} <= {*next(c for c in commands if c[0] == "train.py")}


@pytest.mark.parametrize("other", [dict(CIFAR10="b", STEPS="8"), dict(LR="3e-4")], ids=["the reference's data", "the rate"])
def test_other_data_and_rates_do_not_mix_into_a_folder(script, tmp_path, other):
    for folder in "ab":
        (tmp_path / folder).mkdir()
    variables = dict(CIFAR10=str(tmp_path / "a"), SEEDS="0", STEPS="7", IMAGES="9")
    assert script(**variables)[1].returncode == 0
    other = other | (dict(CIFAR10=str(tmp_path / other["CIFAR10"])) if "CIFAR10" in other else {})
    commands, done = script(**variables | other)
    assert (commands, done.returncode) == ([], 2)
    assert "holds runs on" in done.stderr


def test_rows_of_another_rate_have_a_file_of_their_own(script, tmp_path):
    (tmp_path / "reproduce").mkdir()
    for name in ("every_mixer.sh", "claim.sh"):
        shutil.copy(ROOT / "reproduce" / name, tmp_path / "reproduce")
    places = dict(SCRIPT=str(tmp_path / "reproduce" / "every_mixer.sh"), CIFAR10=str(tmp_path), WORK="", RESULTS="")
    commands, done = script(**places, LR="3e-4", SEEDS="0", IMAGES="0")
    assert done.returncode == 0, done.stderr
    runs, rows = tmp_path / "results" / "every_mixer-lr-3e-4", tmp_path / "reproduce" / "results" / "every_mixer-lr-3e-4.json"
    assert commands[-1][2:] == ["--collect", str(runs), str(rows)]


def test_mistakes_are_named(script):
    assert "usage" in script()[1].stderr
    assert "not tiny" in script(CIFAR10=".", OBJECTIVE="tiny")[1].stderr
    assert "ONLY=tiny is none of the rows: good bad" in script(CIFAR10=".", ONLY="tiny")[1].stderr


@pytest.mark.parametrize("name", SIDES)
def test_flags_name_what_the_benchmark_times(name):
    side = dict(SIDES[name])
    assert "/" not in name                                                 # a folder is called so
    args = train.parse_args(every_mixer.flags_of(**side))
    assert args.model == side.pop("model")
    assert args.mixer == side.pop("mixer", "attention")
    assert mixer_options(args.mixer, vars(args)) == side


def test_a_run_becomes_a_row_of_the_table(tmp_path, photos, capsys):
    folder = tmp_path / "work" / "cifar10-flow-2" / "mean-0"
    run = ["--mixer", "mean", "--objective", "flow", "--data-path", photos, "--val-path", photos, "--num-classes", 3]
    log = fit(folder, *run, "--max-steps", 2, "--ckpt-every", 1, "--global-batch-size", 4, "--num-workers", 0) / "log.jsonl"
    (folder / "samples").mkdir()
    sides = dict(samples=dict(images=20), reference=dict(images_in_statistics=40, source=photos))
    measured = {every_mixer.DISTANCE: 123.4, "features": "some", **sides}
    np.savez(folder / "samples" / "a.npz", arr_0=np.full((20, 8, 8, 3), 77, dtype=np.uint8))
    (folder / "samples" / "a.json").write_text(json.dumps(measured))
    (folder / "commands.txt").write_text("5 train.py --mixer mean\n")
    bits = dict(images=5, steps=20, networks={"a.pt": dict(objective="flow", bits_per_dimension=[4.5678, 0.1])})
    results = tmp_path / "rows.json"
    failed = dict(data="cifar10", name="mean", seed=1, steps=2, objective="flow", failure="it diverged")
    others = [dict(failed, data="flowers"), dict(failed, name="attention", seed=0)]
    results.write_text(json.dumps(others))
    record = [str(folder), "cifar10", "mean", "0", "2", "flow", ""]
    every_mixer.main(["--record", *record, "--collect", str(tmp_path / "work"), str(results)])
    shutil.rmtree(folder / "samples")                                      # as the script does
    (folder / "bits.json").write_text(json.dumps(bits))
    capsys.readouterr()
    every_mixer.main(["--record", *record, "--collect", str(tmp_path / "work"), str(results)])
    *before, row = json.loads(results.read_text())
    assert before == others
    losses = [json.loads(line).get("held_out_loss") for line in log.read_text().splitlines()]
    assert [*row["held_out_loss"].values()] == [loss for loss in losses if loss]
    assert row["compared"] == [20, 40, "some"]
    assert photos not in json.dumps(row)
    assert row["commands"] == [dict(command="train.py --mixer mean", seconds=5)]
    printed = capsys.readouterr().out
    assert "\ncifar10: 20 samples against 40 images, some\n" in printed
    table = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("| ")]
    assert table[0][1:5] == ["cifar10, loss", "cifar10, distance", "cifar10, bits", "flowers, loss"]
    assert table[2][:5] == ["`mean`", f"{row['held_out_loss']['2']:.4f}", "123.4", "4.568", "it diverged (seed 1)"]
    assert table[3][:2] == ["`attention`", "it diverged (seed 0)"]
    with Image.open(tmp_path / "rows-cifar10-flow-2-samples.png") as sheet:
        samples = np.asarray(sheet.convert("RGB"))[:, -8 * every_mixer.SHOWN :]
    assert samples.shape == (8, 8 * every_mixer.SHOWN, 3)
    assert (samples == 77).all()
    assert (tmp_path / "rows-flow-2-fp32.png").read_bytes().startswith(b"\x89PNG")


def test_the_picture_of_samples_is_of_the_lowest_seed(tmp_path):
    for seed in (2, 10):
        folder = tmp_path / f"mean-{seed}"
        folder.mkdir()
        Image.new("RGB", (16, 8), (seed, 0, 0)).save(folder / "samples.png")
    every_mixer.draw_samples(tmp_path, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as sheet:
        assert sheet.convert("RGB").getpixel((sheet.width - 1, 0)) == (2, 0, 0)


def test_losses_far_from_the_others_are_drawn_at_the_edges_with_their_values(tmp_path, monkeypatch):
    written = {}
    monkeypatch.setattr(Axes, "annotate", lambda axis, text, place, *_, **__: written.update({text: place[1]}))
    losses = {"attention": 0.5, "mean": 0.52, "vim": 0.3, "UNet-N": 9.0, "mamba": 0.48}
    rows = [dict(data="cifar10", name=name, held_out_loss={"2": losses[name]}, steps=2, multiply_adds=7) for name in losses]
    every_mixer.draw(tmp_path / "a.png", rows, {})
    far = {"vim: 0.3": 0.5 / every_mixer.FAR, "UNet-N: 9": 0.5 * every_mixer.FAR}
    assert written == pytest.approx({"attention": 0.5, "mean": 0.52, "mamba": 0.48} | far)


def test_the_plot_shows_the_range_of_the_seeds(tmp_path, monkeypatch):
    places, ranges = [], []
    monkeypatch.setattr(Axes, "annotate", lambda axis, text, place, *_, **__: places.append((text, *place)))
    monkeypatch.setattr(Axes, "vlines", lambda axis, x, least, most, **_: ranges.append((x, least, most)))
    losses = {"attention": (0.5, 0.53, 0.5), "mean": (0.52,), "vim": (0.48, 5.0)}
    rows = [
        dict(data="cifar10", name=name, seed=seed, held_out_loss={"2": loss}, steps=2, multiply_adds=len(name))
        for name, of_seeds in losses.items() for seed, loss in enumerate(of_seeds)
    ]
    every_mixer.draw(tmp_path / "a.png", rows, {})
    far = pytest.approx(0.51 * every_mixer.FAR)
    assert places == [("attention", 9, pytest.approx(0.51)), ("mean", 4, 0.52), ("vim: 2.74", 3, far)]
    assert ranges == [(9, 0.5, 0.53), (4, 0.52, 0.52), (3, 0.48, far)]


OTHER = dict(data="flowers", name="mean", seed=1, steps=4, objective="diffusion", precision="bf16")


@pytest.mark.parametrize("other", [{name: value} for name, value in OTHER.items()], ids=str)
def test_a_new_row_takes_the_place_of_none_but_its_own(tmp_path, monkeypatch, other):
    monkeypatch.setattr(every_mixer, "draw", lambda *_: None)
    row = dict(data="cifar10", name="attention", seed=0, steps=2, objective="flow", failure="it diverged")
    results, again = tmp_path / "rows.json", tmp_path / "work" / "a" / "b" / "row.json"
    results.write_text(json.dumps([row, row | other]))
    again.parent.mkdir(parents=True)
    again.write_text(json.dumps(row | dict(failure="it is too large")))
    every_mixer.collect(tmp_path / "work", results)
    assert json.loads(results.read_text()) == [row | dict(failure="it is too large"), row | other]


def test_seeds_are_summed_up():
    rows = [dict(held_out_loss={"2": loss}, steps=2, seed=seed) for seed, loss in enumerate((0.25, 0.5, 0.75))]
    assert every_mixer.cell(rows[:1], every_mixer.loss, ".3f") == "0.250"
    assert every_mixer.cell(rows, every_mixer.loss, ".2f") == "0.50 (0.25 to 0.75, 3 seeds)"
    failed = dict(steps=2, seed=3, failure="it diverged")
    assert every_mixer.cell([*rows, failed], every_mixer.loss, ".1f") == "0.5 (0.2 to 0.8, 3 seeds); it diverged (seed 3)"
    assert every_mixer.cell([], every_mixer.loss, ".1f") == ""


def test_what_does_not_run_stands_last_in_the_table_of_times():
    ran = dict(median_ms=1234.5, peak_mb=7.6, parameters=8000, multiply_adds=9e6)
    times = {"mean": {64: ran, 256: "is not built: it does not fit"}, "gate": {64: "out of memory", 256: ran}, "vim": {64: ran}}
    *_, gate, mean, vim = every_mixer.tabulate_times(times).splitlines()
    assert gate == "| `pdessm --pde-gate` | out of memory | 1,234 | 8 | 8,000 | 9 |"
    assert mean == "| `mean` | 1,234 | is not built: it does not fit |"
    assert vim == "| `vim` | 1,234 |  |"


def test_the_page_of_results_has_these_tables():
    results = ROOT / "reproduce" / "results"
    rows = [row for row in json.loads((results / "every_mixer.json").read_text()) if row["steps"] == 300]
    page = (ROOT / "docs" / "results.md").read_text()
    for table in (every_mixer.tabulate(rows, ""), every_mixer.tabulate_times(every_mixer.read_times(results))):
        lines = [line for line in table.splitlines() if line.startswith("|")]
        assert len(lines) == 2 + len(SIDES)
        assert "\n".join(lines) in page
