"""What a run shows while it trains: grids of samples, and its numbers elsewhere."""

import json
import os
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from autoencoders import save_autoencoder
from commands import draw, fit
from training import trackers
from training.trackers import TRACKERS

SHORT = ["--global-batch-size", 8, "--max-steps", 4, "--log-every", 2, "--ckpt-every", 2]


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.mark.parametrize(
    "objective",
    [["diffusion"], ["flow"], ["flow", "--path", "cosine", "--predict", "x", "--time-shift", 3]],
    ids=["diffusion", "flow", "shifted"],
)
def test_samples_of_a_run_are_those_of_its_checkpoint(tmp_path, monkeypatch, objective):
    monkeypatch.setattr("training.watching.SAMPLING_STEPS", 4)
    flags = [*SHORT, "--objective", *objective, "--lr", 1e-2, "--sample-every", 2]
    folder = fit(tmp_path / "r", *flags, "--ema-decay", 0.3, 0.9, "--no-ema-warmup")  # of which the first is drawn
    grids = sorted((folder / "samples").iterdir())
    assert [path.name for path in grids] == ["0000002.png", "0000004.png"]
    for path in grids:
        checkpoint = folder / "checkpoints" / path.with_suffix(".pt").name
        assert np.array_equal(pixels(path), draw(checkpoint, tmp_path / "a.png"))
    assert not np.array_equal(pixels(grids[0]), pixels(grids[1]))


def test_looking_at_a_run_does_not_change_it(tmp_path, monkeypatch):
    monkeypatch.setattr("training.watching.SAMPLING_STEPS", 2)
    plain = fit(tmp_path / "a", *SHORT)
    watched = fit(tmp_path / "b", *SHORT, "--sample-every", 1, "--tracker", "tensorboard")
    weights = [torch.load(folder / "checkpoints" / "0000004.pt")["model"] for folder in (plain, watched)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert not (plain / "samples").exists()


def test_latents_are_decoded(tmp_path, monkeypatch):
    """Also where training itself needs no autoencoder."""
    from commands import ALONE
    from images import encode

    monkeypatch.setattr("training.watching.SAMPLING_STEPS", 2)
    vae = save_autoencoder(tmp_path / "vae", levels=3, channels=4)
    flags = ["--vae", vae, "--image-size", "16"]
    encode.encode(encode.parse_args(["--out", str(tmp_path / "latents"), "--device", "cpu", *flags]), ALONE)
    flags += ["--data-path", tmp_path / "latents", "--num-workers", 0, "--sample-every", 4]
    folder = fit(tmp_path / "r", *SHORT, *flags)
    assert pixels(folder / "samples" / "0000004.png").shape == (2 + 3 * 66, 2 + 4 * 66, 3)


def test_tensorboard_has_every_row_of_the_log(tmp_path, monkeypatch):
    monkeypatch.setattr("training.watching.SAMPLING_STEPS", 2)
    folder = fit(tmp_path, *SHORT, "--sample-every", 2, "--tracker", "tensorboard")
    events = EventAccumulator(str(folder)).Reload()
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4]
    for name in ("loss", "steps_per_sec", "gflops_per_sec", "peak_memory_gb"):
        shown = [(event.step, event.value) for event in events.Scalars(name)]
        assert shown == [(row["step"], pytest.approx(row[name])) for row in rows]
    assert [event.step for event in events.Images("samples")] == [2, 4]
    assert b'"global_batch_size": 8' in events.Tensors("settings/text_summary")[0].tensor_proto.string_val[0]


@pytest.mark.parametrize(
    ("logged_in", "variable", "mode"), [(True, "", "online"), (False, "", "offline"), (True, "disabled", "disabled")]
)
def test_weights_and_biases_is_offline_unless_logged_in(tmp_path, monkeypatch, logged_in, variable, mode):
    shown, settings = [], {}
    stand_in = SimpleNamespace(
        login=lambda prompt: logged_in,
        init=lambda **given: settings.update(given) or SimpleNamespace(log=lambda row, step: shown.append((step, row)), step=0),
        Image=lambda path: path,
    )
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    monkeypatch.setenv("WANDB_MODE", variable)
    monkeypatch.setattr("training.watching.SAMPLING_STEPS", 2)
    folder = fit(tmp_path, *SHORT, "--sample-every", 4, "--tracker", "wandb")
    assert (settings["mode"], settings["dir"], settings["name"]) == (mode, folder, "000-DiT-N-4")
    assert settings["config"]["max_steps"] == 4
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert shown[:2] == [(row.pop("step"), row) for row in rows]
    assert shown[2:] == [(4, {"samples": str(folder / "samples" / "0000004.png")})]


def test_weights_and_biases_go_on_with_the_run(tmp_path, monkeypatch):
    starts = []
    stand_in = SimpleNamespace(
        login=lambda prompt: False,
        init=lambda **given: starts.append(given) or SimpleNamespace(log=lambda row, step: None, step=0),
    )
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    folder = fit(tmp_path, *SHORT, "--tracker", "wandb")
    fit(tmp_path, *SHORT, "--tracker", "wandb", "--max-steps", 6, "--resume", folder)
    fit(tmp_path, *SHORT, "--tracker", "wandb")
    first, resumed, other = starts
    assert first["resume"] == "allow"
    assert re.fullmatch(r"[0-9a-f]{8}", first["id"])
    assert first["id"] == resumed["id"] != other["id"]
    assert first["dir"] == resumed["dir"] != other["dir"]


def test_pictures_of_other_names_are_no_samples_of_a_step(tmp_path):
    (tmp_path / "samples").mkdir()
    for name in ("0000002.png", "best.png"):
        (tmp_path / "samples" / name).touch()
    assert trackers.shown_before(tmp_path, 4) == [(2, {}, tmp_path / "samples" / "0000002.png")]


def cut_short(folder, *flags):
    """A run that was killed after step 6, of which the last checkpoint is that of step 4."""
    experiment = fit(folder, *SHORT, *flags, "--ckpt-every", 4, "--sample-every", 2, "--max-steps", 6)
    (experiment / "checkpoints" / "0000006.pt").unlink()
    return ["--ckpt-every", 4, "--sample-every", 2, "--max-steps", 8, "--resume", experiment]


@pytest.mark.parametrize(("mode", "kept"), [("offline", 0), ("offline", 6), ("online", 2), ("online", 6)])
def test_a_kill_shows_weights_and_biases_no_step_twice_and_none_never(tmp_path, monkeypatch, mode, kept):
    """wandb keeps what it shows of a run offline in a folder for each start, online in an account; of a run that is killed
    all or some. It takes no step after a later one."""
    account, starts = {}, []

    def init(dir, mode, id, resume, **_):
        rows = account
        if mode == "offline":
            (dir / "wandb" / f"offline-run-{len(starts)}-{id}").mkdir(parents=True)
            rows = {}
        starts.append(rows)

        def log(row, step):
            assert step >= max(rows, default=0)
            assert not row.keys() & rows.get(step, {}).keys()
            rows[step] = rows.get(step, {}) | row

        return SimpleNamespace(log=log, step=max(rows, default=-1) + 1)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(login=lambda prompt: True, init=init, Image=lambda path: path))
    monkeypatch.setenv("WANDB_MODE", mode)
    monkeypatch.setattr("training.watching.SAMPLING_STEPS", 2)
    rest = cut_short(tmp_path, "--tracker", "wandb")
    for step in [step for step in starts[0] if step > kept]:
        del starts[0][step]
    folder = fit(tmp_path, *SHORT, *rest, "--tracker", "wandb")
    to_sync = [starts[int(path.name.split("-")[2])] for path in folder.glob("wandb/offline-run-*")]
    (shown,) = to_sync if mode == "offline" else [account]
    assert list(shown) == [2, 4, 6, 8]
    assert all({"loss", "samples"} <= row.keys() for row in shown.values())
    assert len(list(folder.glob("wandb-before/offline-run-*"))) == (mode == "offline")


def test_a_kill_shows_tensorboard_no_step_twice(tmp_path, monkeypatch):
    monkeypatch.setattr("training.watching.SAMPLING_STEPS", 2)
    rest = cut_short(tmp_path, "--tracker", "tensorboard")
    folder = fit(tmp_path, *SHORT, *rest, "--tracker", "tensorboard")
    events = EventAccumulator(str(folder)).Reload()
    assert [event.step for event in events.Scalars("loss")] == [2, 4, 6, 8]
    assert [event.step for event in events.Images("samples")] == [2, 4, 6, 8]


def test_an_account_that_does_not_answer_is_named_in_one_line(tmp_path, monkeypatch):
    def init(**given):
        raise RuntimeError("no answer\n  after 90 seconds")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(login=lambda prompt: True, init=init))
    with pytest.raises(OSError, match="--tracker wandb does not begin: no answer after 90 seconds; WANDB_MODE=offline keeps"):
        fit(tmp_path, *SHORT, "--tracker", "wandb")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", TRACKERS)
def test_a_tracker_that_is_not_installed_says_so(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if name == "tensorboard" else name, None)
    with pytest.raises(OSError, match=f"--tracker {name}: pip install {name}"):
        fit(tmp_path / "results", *SHORT, "--tracker", name)
    assert not (tmp_path / "results").exists()


def test_every_tracker_of_accelerate_is_there():
    assert TRACKERS.keys() == LOGGER_TYPE_TO_CLASS.keys()


def stand_in(name, shown):
    """What a tracker's package offers, as far as accelerate calls it: what is shown there is appended to a list."""

    def log(row, step=None):
        shown.extend((step, key) for key in row)

    run = SimpleNamespace(log=log, finish=lambda: None)
    config = SimpleNamespace(update=lambda values, allow_val_change: shown.append(values))
    if name == "trackio":
        return dict(trackio=SimpleNamespace(init=lambda project, name: run, config=config))
    if name == "swanlab":
        config = type("Config", (dict,), dict(update=staticmethod(config.update)))()
        begin = SimpleNamespace(init=lambda project, experiment_name, logdir: run, Image=lambda pixels: pixels, config=config)
        return dict(swanlab=begin)
    if name == "dvclive":
        class Live:
            def __init__(self, dir):
                self.step = 0

            def log_params(self, values):
                shown.append(values)

            def log_metric(self, name, value):
                log({name: value}, self.step)

            def next_step(self):
                self.step += 1

        metric = SimpleNamespace(could_log=lambda value: isinstance(value, (int, float)))
        return {"dvclive": SimpleNamespace(Live=Live), "dvclive.plots": SimpleNamespace(Metric=metric)}

    class Run(dict):
        def __init__(self, repo):
            super().__init__()

        def __setitem__(self, name, values):
            shown.append(values)

        def track(self, value, name, step):
            log({name: value}, step)

    return dict(aim=SimpleNamespace(Run=Run, Image=lambda pixels, caption: pixels))


@pytest.mark.parametrize(("name", "pictures"), [("aim", 1), ("swanlab", 1), ("trackio", 0), ("dvclive", 0)])
def test_other_trackers_show_the_numbers_and_where_they_can_the_samples(tmp_path, monkeypatch, name, pictures):
    shown = []
    for module, contents in stand_in(name, shown).items():
        monkeypatch.setitem(sys.modules, module, contents)
    monkeypatch.setattr("training.watching.SAMPLING_STEPS", 2)
    folder = fit(tmp_path, *SHORT, "--sample-every", 4, "--tracker", name)
    settings, *shown = shown
    assert settings["global_batch_size"] == 8
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    expected = [(row["step"], key) for row in rows for key in row if key != "step"] + [(4, "samples")] * pictures
    assert sorted(shown) == sorted(expected)


def test_accelerate_is_not_told_of_other_processes(tmp_path, monkeypatch):
    """It would set the number of threads, which the last bits depend on."""
    monkeypatch.setattr(PartialState, "_shared_state", {})
    for name in ("LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "1")
    threads = torch.get_num_threads()
    trackers.tensorboard(tmp_path, {})
    assert PartialState().num_processes == 1
    assert torch.get_num_threads() == threads
    assert os.environ["LOCAL_RANK"] == os.environ["WORLD_SIZE"] == "1"


def test_a_model_without_classes_is_drawn_too(tmp_path, monkeypatch):
    monkeypatch.setattr("training.watching.SAMPLING_STEPS", 2)
    folder = fit(tmp_path, *SHORT, "--uncond", "--sample-every", 4)
    assert pixels(folder / "samples" / "0000004.png").shape == (2 + 4 * 66, 2 + 4 * 66, 3)


def test_samples_that_are_not_finite_do_not_end_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr("training.watching.SAMPLING_STEPS", 2)
    monkeypatch.setattr("images.autoencoder.PixelSpace.decode", lambda self, x: x / 0)
    folder = fit(tmp_path, *SHORT, "--sample-every", 2)
    log = (folder / "log.txt").read_text()
    assert "(step=0000002) No samples: 10 of 10 images of a batch are not finite (numbers 0, 1, 2" in log
    assert (folder / "checkpoints" / "0000004.pt").exists()
    assert not (folder / "samples").exists()
