"""Stopped runs go on as if nothing had been."""

import errno
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import train
from checkpoints import resume
from checkpoints.read import read_checkpoint
from checkpoints.resume import checkpoint_to_resume
from commands import ALONE, QUICK, ROOT, Colours, fit, fork, lasting
from images import dataset
from machine import files, precision
from small_runs import TINY, assert_same, at_update, checkpoint_names, die, flipped, learnt, log_rows, undisturbed
from training import probe, watching

STEPS = 14
SAVED = [4, 8, 12, STEPS]
pytestmark = pytest.mark.usefixtures("shallow", "one_thread")


def half_written(number, share):
    """Dies when that share of a checkpoint is on the disk."""

    def spoil(write=torch.save):
        def wrapped(contents, file):
            if contents["step"] != number:
                return write(contents, file)
            write(contents, file)
            file.truncate(int(share * file.tell()))
            die()

        torch.save = wrapped

    return spoil


def before_renaming(number):
    def spoil(replace=os.replace):
        os.replace = lambda a, b: die() if str(b).endswith(f"{number:07d}.pt") else replace(a, b)

    return spoil


def before_deleting(number):
    def spoil(delete=resume.delete_older):
        def wrapped(experiment, *rest):
            return die() if resume.checkpoints(experiment)[0][0] == number else delete(experiment, *rest)

        resume.delete_older = wrapped

    return spoil


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def emptied(path):
    os.truncate(path, 0)


def losses(folder):
    return {row["step"]: row["loss"] for row in log_rows(folder)}


@pytest.fixture(scope="module")
def calm(tmp_path_factory, images):
    """calm(processes): the folder of a run that nothing disturbed, three epochs of five steps, without the last."""

    return undisturbed(tmp_path_factory, "--data-path", images, "--max-steps", STEPS)


@pytest.fixture
def flags(tmp_path, images):
    """Of a run that may be disturbed."""
    return [*TINY, "--data-path", images, "--max-steps", STEPS, "--results-dir", tmp_path / "r", "--num-workers", 0]


@pytest.fixture
def begun(calm, tmp_path):
    """A copy of the folder with a run's checkpoints of steps 4, 8, 12 and 14."""
    return shutil.copytree(calm(1), tmp_path / "r")


def again(flags, *more):
    train.main(train.parse_args([*map(str, [*QUICK, *flags, *more])]), ALONE)


def draw_kills(seed, processes):
    """(what, step, kill, rank) of six kills in their order: three at random steps, and one in each part of writing a random
    checkpoint, which rank 0 does."""
    draw = random.Random(seed)
    kills = [("update", step, at_update(step), draw.randrange(processes)) for step in draw.sample(range(1, STEPS + 1), 3)]
    step, share = draw.choice(SAVED), draw.random()
    kills.append((f"writing {share:.3f} of", step, half_written(step, share), 0))
    step = draw.choice(SAVED)
    kills.append(("renaming", step, before_renaming(step), 0))
    step = draw.choice(SAVED[:-1])  # after the last, nothing would be left to do
    kills.append(("deleting after", step, before_deleting(step), 0))
    return sorted(kills, key=lambda kill: kill[1])


@pytest.mark.parametrize(("processes", "workers"), [(1, 1), (2, 0)])
def test_a_run_that_is_killed_again_and_again_ends_as_if_it_had_not_been(calm, flags, tmp_path, processes, workers):
    """Weights, averages and AdamW's moments, to the last bit. One process lets another one read its images here; of two, the
    one that is left saves what both had learnt."""
    seed = int(os.environ.get("KILL_SEED", random.randrange(10**6)))
    kills = draw_kills(seed, processes)
    print(f"KILL_SEED={seed} repeats this:", *(f"{what} {step} on rank {rank};" for what, step, _, rank in kills))
    flags = [*flags, "--num-workers", workers, "--resume", "auto", "--keep-last", 2]
    for _, step, kill, victim in kills:
        if f"{step:07d}.pt" in checkpoint_names(tmp_path / "r"):
            continue  # one process wrote it while the other died
        statuses = fork(*flags, processes=processes, spoil=lambda rank: kill() if rank == victim else None)  # noqa: B023
        assert statuses[victim] == -signal.SIGKILL, step
    assert fork(*flags, processes=processes) == [0] * processes
    assert_same(learnt(calm(processes)), learnt(tmp_path / "r"))
    assert losses(tmp_path / "r").items() <= losses(calm(processes)).items()
    last = max((tmp_path / "r").iterdir())  # those before it were killed before their first checkpoint
    kept = sorted(path.name for path in last.glob("checkpoints/*"))
    assert kept == ["0000012.pt", "0000014.pt"] if processes == 1 else len(kept) == 2


@pytest.mark.parametrize("model", ["LaMamba-N", "DiS-N/4"])
def test_other_networks_go_on_to_the_bit(flags, tmp_path, model):
    """Killed before step 4, of which checkpoints hold the first two. DiS has random numbers of its own."""
    flags = [*flags, "--model", model, "--max-steps", 5, "--ckpt-every", 2, "--num-workers", 0, "--resume", "auto"]
    calm, killed = ["--results-dir", tmp_path / "calm"], ["--results-dir", tmp_path / "killed"]
    assert fork(*flags, *calm) == [0]
    assert fork(*flags, *killed, spoil=lambda rank: at_update(4)()) == [-signal.SIGKILL]
    assert checkpoint_names(tmp_path / "killed") == ["0000002.pt"]
    assert fork(*flags, *killed) == [0]
    assert_same(learnt(tmp_path / "calm"), learnt(tmp_path / "killed"))


@pytest.mark.parametrize(("processes", "number", "after"), [(1, signal.SIGTERM, 5), (2, signal.SIGUSR1, 6)])
def test_a_signal_saves_and_says_so(calm, flags, tmp_path, capfd, processes, number, after):
    """It comes in the middle of step 6, which several processes finish, and one alone does not. It goes to all of a process's
    group, its reader among them, but to one process only."""

    def spoil(rank):
        os.setpgid(0, 0)
        if rank == processes - 1:
            at_update(6, lambda: os.killpg(0, number))()

    assert fork(*flags, "--num-workers", 1, processes=processes, spoil=spoil) == [os.EX_TEMPFAIL] * processes
    assert checkpoint_names(tmp_path / "r") == ["0000004.pt", f"000000{after}.pt"]
    by = number.name if processes == 1 else "a signal to another process"
    assert f"Stopped after step {after} by {by}" in capfd.readouterr().err
    assert fork(*flags, "--resume", tmp_path / "r" / "000-DiT-N-8", processes=processes) == [0] * processes
    assert_same(learnt(calm(processes)), learnt(tmp_path / "r"))


def test_a_signal_to_one_process_in_the_last_step_comes_too_late_for_all(flags, tmp_path):
    def spoil(rank):
        if rank == 1:
            at_update(STEPS, lambda: os.kill(os.getpid(), signal.SIGTERM))()

    assert fork(*flags, processes=2, spoil=spoil) == [0, 0]


def test_images_that_were_seen_are_not_read_again(flags, begun, monkeypatch):
    read = []
    get = dataset.TrainingImages.__getitem__
    monkeypatch.setattr(dataset.TrainingImages, "__getitem__", lambda self, index: read.append(index) or get(self, index))
    again(flags, "--resume", begun / "000-DiT-N-8", "--max-steps", 16)
    assert len(read) == 2 * 8


@pytest.mark.parametrize("damage", [flipped, cut, emptied], ids=lambda f: f.__name__)
def test_a_damaged_checkpoint_falls_back_to_the_one_before(calm, flags, begun, caplog, damage):
    newest = begun / "000-DiT-N-8" / "checkpoints" / "0000014.pt"
    damage(newest)
    with pytest.raises(ValueError, match=r"0000014\.pt is damaged"):
        again(flags, "--resume", newest)
    again(flags, "--resume", "auto")
    assert "0000014.pt is damaged" in caplog.text
    assert "Going on after step 12" in caplog.text
    assert_same(learnt(calm(1)), learnt(begun))
    for path in newest.parent.iterdir():
        damage(path)
    with pytest.raises(ValueError, match="no checkpoint in it is whole"):
        again(flags, "--resume", begun / "000-DiT-N-8")


def test_other_settings_are_named_and_stop(calm, flags, begun):
    folder = begun / "000-DiT-N-8"
    changed = ["--resume", folder, "--lr", 0.5, "--mixer", "pdessm", "--max-steps", 15, "--log-every", 1]
    message = "--mixer was attention and is pdessm; --lr was 0.001 and is 0.5; --allow-changes goes on all the same"
    before = log_rows(begun)
    with pytest.raises(ValueError, match=message):
        again(flags, *changed)
    with pytest.raises(ValueError, match=r"0000014\.pt does not fit: blocks\.0\.attn\.\S+ is missing"):
        again(flags, *changed, "--allow-changes")
    assert log_rows(begun) == before
    again(flags, *changed, "--mixer", "attention", "--allow-changes")
    assert learnt(begun, 15)["opt"]["param_groups"][0]["lr"] == 0.5
    moved = learnt(begun, 15)["model"]["pos_embed"], learnt(begun, 15)["model"]["x_embedder.proj.bias"]
    was = learnt(calm(1))["model"]["pos_embed"], learnt(calm(1))["model"]["x_embedder.proj.bias"]
    assert torch.equal(moved[0], was[0])
    assert (moved[1] - was[1]).abs().max() > 0.05


def test_averages_go_on_from_their_own(tmp_path, flags):
    """Not from the first of the checkpoint, whatever its decay was; a network of fewer tensors is said not to fit."""
    flags += ["--lr", 1e-2, "--no-ema-warmup", "--mixer", "pdessm", "--ckpt-every", 1, "--max-steps", 2]
    again(flags, "--ema-decay", 0.9, 0.5)
    before = learnt(tmp_path / "r", 2)["ema_0.5"]
    flags += ["--resume", "auto", "--allow-changes", "--max-steps", 3]
    with pytest.raises(ValueError, match=r"0000002\.pt does not fit: \S+ is missing"):
        again(flags, "--mixer", "attention")
    with pytest.raises(ValueError, match=r"has averages of decay 0\.9, 0\.5, and none to go on from for each of 0\.3, 0\.9"):
        again(flags, "--ema-decay", 0.3, 0.9)
    again(flags, "--ema-decay", 0.5)
    after = learnt(tmp_path / "r", 3)
    for name, w in after["ema"].items():
        torch.testing.assert_close(w, (before[name] + after["model"][name]) / 2)


def test_other_conditions_of_rounding_are_said_and_recorded(flags, begun, caplog, threads, monkeypatch):
    """Tests compare such records with everything else that was learnt: see `learnt`."""
    (one,) = learnt(begun)["rounding"]
    assert one["threads"] == torch.get_num_threads() == 1
    assert one["processes"] == 1
    again(flags, "--resume", "auto", "--max-steps", 15)
    assert learnt(begun, 15)["rounding"] == [one]
    assert "bits may differ" not in caplog.text
    threads(2)
    monkeypatch.setattr(precision, "processor", lambda: "another")
    again(flags, "--resume", "auto", "--max-steps", 16, "--grad-accum", 2)
    assert learnt(begun, 16)["rounding"] == [one, one | dict(threads=2, grad_accum=2, processor="another")]
    changes = f"processor {one['processor']} is now another, threads 1 is now 2, grad_accum 1 is now 2"
    assert re.findall("last bits may differ .*stopped: (.*)", caplog.text) == [changes]


def test_a_run_that_goes_on_remembers_where_it_began(tmp_path):
    flags = ["--model", "DiT-N/8", "--global-batch-size", 8]
    path = fit(tmp_path / "a", *flags, "--max-steps", 1) / "checkpoints" / "0000001.pt"
    for step, begun in ((1, ["--init-from", path]), (2, []), (3, ["--init-from", path])):
        folder = fit(tmp_path / "b", *flags, *begun, "--max-steps", step, "--resume", "auto")
        assert read_checkpoint(folder / "checkpoints" / f"{step:07d}.pt")["args"]["init_from"] == str(path)


@pytest.mark.parametrize("change", [["--global-batch-size", 10], ["--global-seed", 1]])
def test_another_order_of_images_is_said_to_show_some_twice(flags, begun, caplog, change):
    again(flags, "--resume", "auto", "--max-steps", 15, *change, "--allow-changes")
    assert f"{change[0]} was" in caplog.text
    assert "so that images may come twice in the epoch that was begun, and others not at all" in caplog.text


@pytest.mark.parametrize("more", [["--max-steps", 10], ["--tracker", "tensorboard"], ["--sample-every", 10]])
def test_a_finished_run_changes_nothing(flags, begun, caplog, more):
    before = {path: path.read_bytes() for path in begun.rglob("*.*")}
    again(flags, "--resume", "auto", *more)
    assert {path: path.read_bytes() for path in begun.rglob("*.*")} == before
    assert "Done! All" in caplog.text


@pytest.mark.parametrize(
    ("resume", "message"),
    [
        ("r/001-DiT-N-8", "001-DiT-N-8: no checkpoints/<step>.pt in it"),
        ("r/000-DiT-N-8/checkpoints/0000013.pt", r"no checkpoint at .*0000013\.pt"),
        ("r/000-DiT-N-8/checkpoints/0000008.pt", r"newer ones, 0000014\.pt, 0000012\.pt; to go on from here, move them away"),
        ("r/000-DiT-N-8/log.txt", "log.txt: no checkpoints/<step>.pt in it"),
        ("elsewhere.pt", "a run goes on from a file <step>.pt in its folder's checkpoints"),
        ("r/public/checkpoints/0000001.pt", "no run can go on from it, it lacks scaler, step"),
    ],
)
def test_what_no_run_can_go_on_from(flags, begun, tmp_path, resume, message):
    shutil.copy(begun / "000-DiT-N-8" / "checkpoints" / "0000014.pt", tmp_path / "elsewhere.pt")
    public = begun / "public" / "checkpoints" / "0000001.pt"
    public.parent.mkdir(parents=True)
    torch.save(dict(model={}, ema={}, opt={}, args={}), public)
    with pytest.raises((ValueError, OSError), match=message):
        again(flags, "--resume", tmp_path / resume)


def test_the_last_and_every_so_many_steps_checkpoints_are_kept(flags, tmp_path):
    again(flags, "--ckpt-every", 1, "--keep-last", 2, "--keep-every", 5)
    assert checkpoint_names(tmp_path / "r") == [f"{step:07d}.pt" for step in (5, 10, 13, 14)]


def test_the_log_is_that_of_the_weights(flags, begun):
    log = begun / "000-DiT-N-8" / "log.jsonl"
    whole = log_rows(begun)
    for path in sorted(log.parent.glob("checkpoints/*"))[2:]:
        path.unlink()
    for half in ("log.jsonl.h.1.partial", "checkpoints/0000012.pt.h.1.partial", "checkpoints/0000012.dcp.partial/__0_0.distcp"):
        (log.parent / half).parent.mkdir(exist_ok=True)
        (log.parent / half).write_bytes(b"cut")
    with open(log, "a") as file:
        file.write('{"step": 15, "los')
    files.append_row(log, dict(step=16, loss=2.0))  # which is not lost with the line before it
    assert files.read_rows(log) == [*whole, dict(step=16, loss=2.0)]
    again(flags, "--resume", "auto")
    assert [(row["step"], row["loss"]) for row in log_rows(begun)] == [(row["step"], row["loss"]) for row in whole]
    assert checkpoint_names(begun) == ["0000004.pt", "0000008.pt", "0000012.pt", "0000014.pt"]
    assert not [*log.parent.rglob("*.partial")]


def test_what_was_learnt_is_saved_when_another_process_meets_a_bad_image(flags, tmp_path, capfd):
    """Batch 6 is read by the process that does not write checkpoints."""

    def spoil(rank, get=dataset.TrainingImages.__getitem__):
        reads = []

        def read(self, index):
            reads.append(index)
            if rank == 1 and len(reads) > 5 * 4:
                raise OSError("cannot read the image x.png")
            return get(self, index)

        dataset.TrainingImages.__getitem__ = read

    assert fork(*flags, processes=2, spoil=spoil) == [1, 1]
    assert checkpoint_names(tmp_path / "r") == ["0000004.pt", "0000005.pt"]
    errors = re.findall(r"error: (.*)", capfd.readouterr().err)
    assert sorted(errors) == ["cannot read the image x.png", "stopped, because another process could not read an image"]


def test_a_full_disk_is_named_and_takes_no_checkpoint_along(flags, begun, capfd):
    room = 2 * (begun / "000-DiT-N-8" / "checkpoints" / "0000004.pt").stat().st_size // 3
    before = {path: path.read_bytes() for path in begun.glob("*/checkpoints/*")}

    def spoil(rank):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))

    assert fork(*flags, "--resume", "auto", "--max-steps", 15, spoil=spoil) == [1]
    assert {path: path.read_bytes() for path in begun.glob("*/checkpoints/*")} == before
    assert re.search(r"error: could not write the checkpoint .*/0000015\.pt: .*File too large", capfd.readouterr().err)


def test_a_folder_is_for_one_process_at_a_time(calm, flags, tmp_path, monkeypatch):
    """The other one is killed, and what it had started to read its images does not hold the lock."""
    there = tmp_path / "there"

    def wait():
        there.write_text(str(os.getpid()))
        time.sleep(100)

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(fork, *flags, "--num-workers", 1, spoil=lambda rank: at_update(6, wait)())
        while not (there.exists() and there.read_text()):
            assert not other.done()
            time.sleep(0.01)
        before = {path: path.read_bytes() for path in tmp_path.glob("r/**/*") if path.is_file()}
        try:
            for named in ("auto", tmp_path / "r" / "000-DiT-N-8"):
                with pytest.raises(ValueError, match=r"another process is at work in .*000-DiT-N-8; wait for its end"):
                    again(flags, "--resume", named)
        finally:
            os.kill(int(there.read_text()), signal.SIGKILL)
        assert {path: path.read_bytes() for path in tmp_path.glob("r/**/*") if path.is_file()} == before
        assert other.result() == [-signal.SIGKILL]
    again(flags, "--resume", "auto")
    assert_same(learnt(calm(1)), learnt(tmp_path / "r"))


def test_a_file_system_without_locks_is_warned_of(flags, begun, monkeypatch, caplog):
    def refuse(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "lockf", refuse)
    again(flags, "--resume", "auto", "--max-steps", 15)
    assert re.search("Nothing keeps a second process out of .*000-DiT-N-8: it cannot be locked .*No locks", caplog.text)
    assert "Done!" in caplog.text


@pytest.mark.parametrize("killed_in", ["held_out_loss", "draw_samples", "distance"])
def test_what_a_kill_came_before_is_shown_after_all(flags, tmp_path, monkeypatch, images, killed_in):
    """Held-out loss, samples and the probe's distance of the checkpoint that a run goes on from."""
    monkeypatch.setattr(watching, "SAMPLING_STEPS", 2)
    monkeypatch.setattr(probe, "open_network", lambda *_: Colours())
    monkeypatch.setattr(probe, "PROBED", 4)
    flags = [*flags, "--val-path", images, "--sample-every", 4, "--probe-every", 4, "--max-steps", 8]
    again(flags, "--results-dir", tmp_path / "calm")

    def stop(*args):
        raise RuntimeError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(watching, killed_in, stop)
        with pytest.raises(RuntimeError, match="stopped"):
            again(flags)
    assert checkpoint_names(tmp_path / "r") == ["0000004.pt"]
    for _ in range(2):
        again(flags, "--resume", "auto")
        monkeypatch.setattr(watching, killed_in, stop)  # the second time there is nothing to do
        shown, expected = ([lasting(row) for row in log_rows(tmp_path / name)] for name in ("r", "calm"))
        assert sorted(map(str, shown)) == sorted(map(str, expected))
        grids = [[path.read_bytes() for path in sorted((tmp_path / name).glob("*/samples/*"))] for name in ("r", "calm")]
        assert grids[0] == grids[1]
        assert len(grids[0]) == 2


def test_torchrun_brings_back_a_run_whose_worker_was_killed(calm, images, tmp_path):
    """One of two workers is killed in step 7: the other one saves, and all start again from there."""
    folder, flags = tmp_path / "r", [*TINY, "--data-path", images, "--max-steps", STEPS, "--num-workers", 0, "--resume", "auto"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1"]
    script = tmp_path / "killed_once.py"
    script.write_text(KILLED_ONCE)
    run = subprocess.Popen(
        [*command, str(script), *map(str, [*QUICK, *flags, "--results-dir", folder])],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT}/tests"}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    errors = run.communicate(timeout=300)[1]
    assert run.returncode == 0, errors
    assert "Going on after step 7" in errors
    assert [row["step"] for row in log_rows(folder)] == list(range(1, STEPS + 1))
    assert_same(learnt(calm(2)), learnt(folder))


KILLED_ONCE = """
import logging, os
from functools import partial
import small_runs, train
from models import DiT_models
from machine.processes import launch
train.MODELS["DiT-N/8"] = partial(DiT_models["DiT-N/8"], depth=2)
if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    small_runs.at_update(7)()
train.log_to(logging.StreamHandler())
launch(train.main, train.parse_args())
"""


def test_the_last_experiment_is_the_one_with_the_highest_number(tmp_path):
    for name in ("999-DiT-N-4", "1000-DiT-N-4", "1001-DiT-N-2", "²01-DiT-N-4", "٣٤٥٦-DiT-N-4"):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        for step in ("0000001", "²"):
            torch.save({}, tmp_path / name / "checkpoints" / f"{step}.pt")
    assert checkpoint_to_resume("auto", tmp_path, "DiT-N/4") == tmp_path / "1000-DiT-N-4" / "checkpoints" / "0000001.pt"
