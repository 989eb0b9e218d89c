"""Files of results, to which several scripts may write at once, and whose run a row is."""

import json
from threading import Thread

import pytest
import torch

from machine.files import alone_in
from reproduce import classify, every_mixer, tables


def record(folder):
    """Records a run of two steps, which then went on, as a row of a table in <folder>/rows.json."""
    args = dict(global_seed=0, objective="flow", predict="x", precision="fp32", data_path="photos/train", image_size=8)
    args |= dict(global_batch_size=4, model="DiT-N/4", mixer="attention")
    checkpoint, samples = folder / "run" / "checkpoints" / "0000002.pt", folder / "samples"
    for parent in (checkpoint.parent, samples):
        parent.mkdir(parents=True)
    torch.save(dict(args=args, ema={"w": torch.zeros(3)}, step=2), checkpoint)
    log = [dict(step=step, loss=1 / step, held_out_loss=0.5 / step) for step in (2, 4)]
    (folder / "run" / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    (folder / "commands.txt").write_text("7 1 train.py --max-steps 2\n")
    (folder / "metrics.json").write_text(json.dumps(dict(samples=dict(source=f"{samples}.npz"))))
    (samples / "settings.json").write_text(json.dumps(dict(sampler="heun", num_sampling_steps=6)))
    tables.record(folder / "rows.json", "table1_cifar10", "small", "DiT", folder, checkpoint)


def collect(folder):
    path = folder / "work" / "cifar10-flow-2" / "mean-0" / "row.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(dict(data="cifar10", name="mean", seed=0, steps=2, objective="flow", failure="ours")))
    every_mixer.collect(folder / "work", folder / "rows.json")


def classify_images(folder):
    classify.main(folder, ["attention"], [0], 1, folder / "rows.json")


def tune(folder):
    from benchmarks import tiles

    tiles.write(folder / "rows.json", "our card", {})


@pytest.fixture
def undrawn(monkeypatch):
    """Since the library of plots wants the main thread."""
    monkeypatch.setattr(every_mixer, "draw", lambda *_: None)


FAILED = dict(data="cifar10", name="mean", seed=1, steps=2, objective="flow", failure="other")
CLASSIFIED = dict(mixer="other", seed=3, steps=1, parameters=1, accuracy={"32": 0.5, "48": 0.5}, step_ms=1.0)


@pytest.mark.parametrize(
    ("write", "other", "ours"),
    [
        (record, {"system": "other"}, '"DiT"'), (collect, [FAILED], '"ours"'),
        (classify_images, dict(rows=[CLASSIFIED]), '"attention"'), (tune, {"other": {}}, '"our card"'),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("undrawn")
def test_what_another_process_writes_at_the_same_time_is_kept(tmp_path, monkeypatch, write, other, ours):
    if write is tune:
        pytest.importorskip("triton")
    monkeypatch.setattr(classify, "read", lambda *_, **__: (torch.zeros(1, 3, 32, 32), torch.zeros(1, dtype=torch.long)))
    monkeypatch.setattr(classify, "train", lambda *_: None)
    monkeypatch.setattr(classify, "time_in_turns", lambda sides, *_, **__: {side: dict(median_ms=1.0) for side in sides})
    rows, writing = tmp_path / "rows.json", Thread(target=write, args=[tmp_path])
    with alone_in(tmp_path):
        writing.start()
        writing.join(2)  # it has read the file by now, if it reads it before its turn
        rows.write_text(json.dumps(other) + "\n")
    writing.join()
    assert '"other"' in rows.read_text()
    assert ours in rows.read_text()


def test_a_row_is_of_its_checkpoint_though_the_run_went_on(tmp_path):
    record(tmp_path)
    row = json.loads((tmp_path / "rows.json").read_text())
    assert (row["steps"], row["training_loss"], row["held_out_loss"]) == (2, 0.5, 0.25)


@pytest.mark.usefixtures("undrawn")
def test_folders_that_cannot_be_locked_are_written_to_with_a_warning(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError("no locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    collect(tmp_path)
    assert '"ours"' in (tmp_path / "rows.json").read_text()
    assert "cannot be locked (no locks available)" in caplog.text
