"""Checkpoints of which every process writes a part."""

import pathlib
import pickle
import re
import resource
import shutil
import signal
import sys
import zlib
from functools import cache
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

import train
from checkpoint_files import Hostile
from checkpoints import resume, sharded
from checkpoints.build import load_model
from checkpoints.export import measures
from checkpoints.read import load_checkpoint, read_checkpoint
from checkpoints.resume import tensors
from checkpoints.sharded import Index, read_whole
from commands import draw, fork, lasting, write_photos
from small_runs import TINY, assert_same, at_update, checkpoint_names, die, flipped, log_rows, spoil_weights
from training import watching

EQUAL = [*TINY, "--max-steps", 10, "--num-workers", 0]
FLAGS = [*EQUAL, "--max-grad-norm", 0.5, "--mixer", "pdessm", "--ema-decay", 0.9999, 0.5]
pytestmark = pytest.mark.usefixtures("shallow", "one_thread")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of equal runs by two processes, with the whole model on each and with half of it; held-out loss every 4 steps."""
    folder = tmp_path_factory.mktemp("runs")
    flags = [*FLAGS, "--data-path", write_photos(folder / "photos"), "--val-path", folder / "photos"]
    for name, more in (("ddp", []), ("fsdp", ["--parallel", "fsdp", "--grad-accum", 2])):
        assert fork(*flags, *more, "--results-dir", folder / name, processes=2) == [0, 0]
    return folder


def weights(path):
    """Model, average and AdamW's first moments, by name."""
    if path.is_dir():
        parts = {part: read_whole(path, part) for part in ("model", "ema", "opt")}
        moments = {name.removesuffix(".exp_avg"): x for name, x in parts.pop("opt").items() if name.endswith(".exp_avg")}
    else:
        contents = read_checkpoint(path)
        parts, names = {part: contents[part] for part in ("model", "ema")}, list(contents["model"])
        moments = {names[number]: state["exp_avg"] for number, state in contents["opt"]["state"].items()}
    return parts | dict(moments=moments)


def final(folder):
    return next(folder.glob("*/checkpoints/0000010.*"))


def assert_close(one, other):
    for part in ("model", "ema"):
        for name, value in one[part].items():
            torch.testing.assert_close(other[part][name], value, rtol=1e-4, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}")


SYSTEMS = dict(attention=[], pdessm=["--mixer", "pdessm"], DiS=["--model", "DiS-N/4"])
WAYS = [
    (1, ["--grad-accum", 2]),
    (2, []),
    (2, ["--grad-accum", 2]),
    (2, ["--parallel", "fsdp"]),
    (2, ["--parallel", "fsdp", "--grad-accum", 2]),
]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """reference(system): folder of a run by one process with whole batches."""
    folder = tmp_path_factory.mktemp("reference")
    photos = write_photos(folder / "photos")

    @cache
    def run(system):
        flags = [*EQUAL, *SYSTEMS[system], "--data-path", photos, "--results-dir", folder / system]
        assert fork(*flags) == [0]
        return folder / system

    return run


@pytest.mark.parametrize(
    ("system", "processes", "flags"),
    [*((system, *way) for system in ("attention", "pdessm") for way in WAYS), ("DiS", *WAYS[-1])],
    ids=lambda value: "-".join(map(str, value)) or "ddp" if isinstance(value, list) else None,
)
def test_processes_shards_and_parts_of_batches_change_only_rounding(reference, tmp_path, system, processes, flags):
    """Ten steps at a learning rate of 1e-3, each of which moves a weight by about as much, whatever the size of gradients,
    which the moments have."""
    photos = reference(system).parent / "photos"
    flags = [*EQUAL, *flags, *SYSTEMS[system], "--data-path", photos, "--results-dir", tmp_path / "r"]
    assert fork(*flags, processes=processes) == [0] * processes
    one, other = weights(final(reference(system))), weights(final(tmp_path / "r"))
    assert one["moments"].keys() == other["moments"].keys()
    for part, rounding in (("model", 3e-5), ("ema", 3e-5), ("moments", 3e-8)):
        for name, x in one[part].items():
            torch.testing.assert_close(other[part][name], x, rtol=0, atol=rounding, msg=lambda m, name=name: f"{name}: {m}")
    assert max(moment.abs().max() for moment in one["moments"].values()) > 3e-3
    losses = [[row["loss"] for row in log_rows(folder)] for folder in (reference(system), tmp_path / "r")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize(
    "flags",
    [
        ["--mixer", "pdessm-g"],
        ["--mixer", "pdessm", "--uncond", "--compile"],
        ["--model", "UNet-N"],
        ["--model", "LaMamba-N"],
        ["--model", "DiS-N/4"],
    ],
    ids=" ".join,
)
def test_two_processes_that_save_memory_end_with_the_weights_of_one_that_does_not(tmp_path, photos, compilations, flags):
    """Each of them has all weights. Where a gradient is nothing but rounding, such as a bias's before a group norm of a U-Net,
    AdamW takes whole steps all the same, so of a U-Net the first moments alone are compared, which are those of gradients."""

    def keep_weights(rank, save=resume.save_run):
        def save_and_keep(experiment, learner, *rest):
            parts = tensors(learner)
            moments = {name: state["exp_avg"] for name, state in parts.pop("opt").items()}
            torch.save(parts | dict(moments=moments), experiment / f"weights-{rank}.pt")
            return save(experiment, learner, *rest)

        resume.save_run = save_and_keep

    flags = [*EQUAL, "--global-batch-size", 4, "--max-steps", 2, "--lr", 1e-4, *flags, "--data-path", photos]
    plain = [flag for flag in flags if flag != "--compile"]
    assert fork(*plain, "--results-dir", tmp_path / "one", spoil=keep_weights) == [0]
    more = ["--grad-checkpointing", "--grad-accum", 2, "--results-dir", tmp_path / "two"]
    assert fork(*flags, *more, processes=2, spoil=keep_weights) == [0, 0]
    one, first, second = (torch.load(path) for path in (*tmp_path.glob("one/*/w*"), *sorted(tmp_path.glob("two/*/w*"))))
    assert_same(first, second)
    for part, rounding in (("moments", 3e-7), ("model", 1e-5), ("ema", 1e-5))[: 1 if "UNet-N" in flags else 3]:
        for name, x in one[part].items():
            torch.testing.assert_close(first[part][name], x, rtol=0, atol=rounding, msg=lambda m, name=name: f"{name}: {m}")
    assert max(moment.abs().max() for moment in one["moments"].values()) > 1e-3


def test_a_checkpoint_needs_no_other_process(tmp_path):
    """One dies when the other begins to write: at the end of step 4, which is saved all the same."""

    def die_before_saving(rank):
        if rank == 1:
            resume.save_run = lambda *_: die()

    assert fork(*EQUAL, "--results-dir", tmp_path, processes=2, spoil=die_before_saving) == [1, -9]
    assert checkpoint_names(tmp_path) == ["0000004.pt"]


def test_a_sharded_model_learns_as_a_whole_one(runs):
    assert checkpoint_names(runs / "fsdp") == ["0000004.dcp", "0000008.dcp", "0000010.dcp"]
    assert_close(weights(final(runs / "ddp")), weights(final(runs / "fsdp")))
    for one, other in zip(log_rows(runs / "ddp"), log_rows(runs / "fsdp"), strict=True):
        assert lasting(one) == pytest.approx(lasting(other), rel=1e-4)


@pytest.mark.parametrize(("processes", "flags"), [(1, []), (2, []), (3, ["--parallel", "fsdp"])])
def test_any_number_of_processes_goes_on_from_a_sharded_checkpoint(runs, tmp_path, processes, flags):
    """From step 8 of the run on two; three take batches of 9 images, which they can share."""
    folder = shutil.copytree(runs / "fsdp", tmp_path / "r")
    shutil.rmtree(final(folder))
    flags = [*FLAGS, *flags, "--data-path", runs / "photos", "--val-path", runs / "photos", "--resume", "auto"]
    batch = ["--global-batch-size", 9, "--allow-changes"] if processes == 3 else []
    assert fork(*flags, *batch, "--results-dir", folder, processes=processes) == [0] * processes
    if processes != 3:
        assert_close(weights(final(runs / "ddp")), weights(final(folder)))


def test_a_sharded_run_goes_on_from_a_file(runs, tmp_path):
    folder = shutil.copytree(runs / "ddp", tmp_path / "r")
    final(folder).unlink()
    flags = [*FLAGS, "--data-path", runs / "photos", "--val-path", runs / "photos", "--resume", "auto", "--parallel", "fsdp"]
    assert fork(*flags, "--results-dir", folder, processes=2) == [0, 0]
    assert final(folder).suffix == ".dcp"
    assert_close(weights(final(runs / "ddp")), weights(final(folder)))


def test_a_killed_sharded_run_ends_as_if_it_had_not_been(runs, tmp_path, capfd):
    """Its newest checkpoint is damaged, too, so that it goes on from the one before."""
    folder = tmp_path / "r"
    flags = [*FLAGS, "--data-path", runs / "photos", "--val-path", runs / "photos", "--resume", "auto", "--results-dir", folder]
    flags += ["--parallel", "fsdp", "--grad-accum", 2]
    spoil = at_update(9)
    assert fork(*flags, processes=2, spoil=lambda rank: spoil() if rank == 1 else None)[1] == -9
    flipped(next(folder.glob("*/checkpoints/0000008.dcp/__0_0.distcp")))
    assert fork(*flags, processes=2) == [0, 0]
    assert "0000008.dcp is damaged (__0_0.distcp); going on from the one before" in capfd.readouterr().err
    assert_same(weights(final(runs / "fsdp")), weights(final(folder)))


def test_a_card_of_a_sharded_checkpoint_tells_steps_and_losses(runs):
    told = measures(final(runs / "fsdp"), None)
    assert told["steps"] == 10
    assert {"loss (train.py, step 10)", "held_out_loss (train.py, step 10)"} <= told["metrics"].keys()


def fill_disk(room):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))


def fill_disk_late(write=sharded.write_settings):
    """When the pieces are written and the settings are not."""

    def write_or_not(*args):
        fill_disk(100)
        try:
            write(*args)
        finally:
            fill_disk(resource.RLIM_INFINITY)  # the file in which the test reads errors has no end

    sharded.write_settings = write_or_not


@pytest.mark.parametrize("spoil", [lambda: fill_disk(200_000), fill_disk_late], ids=["in its pieces", "in its settings"])
def test_a_full_disk_is_named_and_takes_no_sharded_checkpoint_along(runs, tmp_path, capfd, spoil):
    folder = shutil.copytree(runs / "fsdp", tmp_path / "r")
    before = {path: path.read_bytes() for path in folder.glob("*/checkpoints/*/*")}
    flags = [*FLAGS, "--parallel", "fsdp", "--grad-accum", 2, "--data-path", runs / "photos", "--val-path", runs / "photos"]
    flags += ["--resume", "auto", "--results-dir", folder, "--max-steps", 11]
    assert fork(*flags, processes=2, spoil=lambda rank: spoil() if rank == 0 else None) == [1, 1]
    assert {path: path.read_bytes() for path in folder.glob("*/checkpoints/*/*")} == before
    errors = capfd.readouterr().err
    reason = "File too large" if spoil is fill_disk_late else ".+"
    assert re.search(rf"error: could not write the checkpoint .*/0000011\.dcp; is the disk full\? .*{reason}\n", errors)
    assert "Traceback" not in errors


def test_a_part_that_is_not_finite_is_not_saved(runs, tmp_path, capfd):
    flags = [*FLAGS, "--parallel", "fsdp", "--data-path", runs / "photos", "--results-dir", tmp_path / "r", "--ckpt-every", 1]
    assert fork(*flags, processes=2, spoil=lambda rank: spoil_weights("ema", np.nan, 2) if rank == 1 else None) == [1, 1]
    assert checkpoint_names(tmp_path / "r") == ["0000001.dcp"]
    errors = capfd.readouterr().err
    assert "error: after step 2 final_layer.linear.weight of ema is not finite" in errors
    assert "error: after step 2 a part on another process is not finite" in errors


def test_samples_come_from_a_sharded_checkpoint_too(runs, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("checkpoints.build.MODELS", {"DiT-N/8": train.MODELS["DiT-N/8"]})
        model, settings = load_model(final(runs / "fsdp"), {}, "ema")
        assert draw(final(runs / "fsdp"), tmp_path / "a.png", "--class-labels", 2).shape == (64, 64, 3)
    assert settings["mixer"] == "pdessm"
    stored, args = load_checkpoint(final(runs / "fsdp"))
    assert args["parallel"] == "fsdp"
    assert_same(dict(model.state_dict()), stored)
    fast, whole = (load_checkpoint(final(runs / name), 0.5)[0] for name in ("fsdp", "ddp"))
    assert_close(dict(model=fast, ema=fast), dict(model=whole, ema=whole))
    assert not torch.equal(fast["final_layer.linear.bias"], stored["final_layer.linear.bias"])
    with pytest.raises(ValueError, match=r"--ema 0\.3: .*0000010\.dcp has averages of decay 0\.9999, 0\.5"):
        load_checkpoint(final(runs / "fsdp"), 0.3)


def test_samples_of_a_damaged_sharded_checkpoint_are_not_drawn(runs, tmp_path):
    folder = shutil.copytree(final(runs / "fsdp"), tmp_path / "0000010.dcp")
    flipped(next(folder.glob("__1_0.distcp")))
    with pytest.raises(ValueError, match=r"0000010\.dcp is damaged \(__1_0\.distcp\)"):
        draw(folder, tmp_path / "a.png")


def test_a_checksum_is_of_the_whole_file(tmp_path):
    """Which is read 16 MB at a time."""
    contents = b"begin" + bytes(2**24) + b"end"
    (tmp_path / "a").write_bytes(contents)
    assert sharded.checksum(tmp_path / "a") == zlib.crc32(contents)


def test_a_hostile_index_does_not_run(runs, tmp_path):
    folder = shutil.copytree(final(runs / "fsdp"), tmp_path / "0000010.dcp")
    (folder / ".metadata").write_bytes(pickle.dumps(Hostile(str(tmp_path / "owned"))))
    with pytest.raises(ValueError, match=r"damaged \(\.metadata\)"):
        load_checkpoint(folder)
    settings = sharded.read_settings(folder)
    settings["files"][".metadata"] = sharded.checksum(folder / ".metadata")  # whoever means harm knows it, too
    torch.save(settings, folder / "settings.pt")
    with pytest.raises(ValueError, match="mkdir"):
        load_checkpoint(folder)
    (folder / "settings.pt").write_bytes(pickle.dumps(Hostile(str(tmp_path / "owned"))))
    with pytest.raises(ValueError, match="damaged or no checkpoint"):
        load_checkpoint(folder)
    assert not (tmp_path / "owned").exists()
    assert not any("Bytes" in name for known in Index.known.values() for name in known)  # PyTorch would unpickle those


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])
def test_an_index_of_any_python_is_read(tmp_path, monkeypatch, module):
    """It holds the folder's path, whose class is in another module in Python 3.13 than before and after."""
    with monkeypatch.context() as patched:
        patched.setattr(type(tmp_path), "__module__", module)
        patched.setitem(sys.modules, module, pathlib)
        index = pickle.dumps(tmp_path)
    assert module.encode() in index
    assert Index(BytesIO(index)).load() == tmp_path


def test_averages_in_parts_stay_where_they_are(tmp_path, capfd):
    flags = [*FLAGS, "--parallel", "fsdp", "--ema-device", "cpu", "--results-dir", tmp_path / "r"]
    assert fork(*flags, processes=2) == [1, 1]
    assert "--ema-device is not for --parallel fsdp, which leaves every process its part" in capfd.readouterr().err
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("classes", [[], ["--uncond"]])
def test_a_sharded_model_draws_what_a_whole_one_does(runs, tmp_path, monkeypatch, classes):
    """With classes guidance calls the model, without them the sampler does. Averages change between the grids."""
    monkeypatch.setattr(watching, "SAMPLING_STEPS", 4)
    flags = [*FLAGS, *classes, "--data-path", runs / "photos", "--max-steps", 4, "--sample-every", 2]
    for name, more in (("ddp", []), ("fsdp", ["--parallel", "fsdp"])):
        assert fork(*flags, *more, "--results-dir", tmp_path / name, processes=2) == [0, 0]
    for step in (2, 4):
        one, other = (np.asarray(Image.open(next(tmp_path.glob(f"{name}/*/samples/*{step}.png")))) for name in ("ddp", "fsdp"))
        assert np.abs(one.astype(int) - other).max() <= 1
