"""The classification of reproduce/classify.py: what it shows the network, and that it learns."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from reproduce import classify


@pytest.fixture
def folders(tmp_path):
    """Images of two classes that the colour tells apart."""
    random = np.random.default_rng(0)
    for split, count in (("train", 80), ("test", 20)):
        for label, colour in enumerate((60, 190)):
            folder = tmp_path / split / str(label)
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = (colour + random.integers(-40, 40, (32, 32, 3))).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return tmp_path


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(classify, "BATCH", 16)
    monkeypatch.setattr(classify, "time_in_turns", lambda sides, *_, **__: {side: dict(median_ms=1.0) for side in sides})


@pytest.mark.usefixtures("quick", "one_thread")
def test_runs_learn_are_kept_and_not_repeated(folders, tmp_path, capsys):
    results = tmp_path / "results.json"
    flags = [str(folders), "--mixers", "attention", "pdessm", "--seeds", "0", "--steps", "12", "--results", str(results)]
    classify.main(**vars(classify.parse_args(flags)))
    printed = capsys.readouterr().out
    rows = json.loads(results.read_text())["rows"]
    assert [row["mixer"] for row in rows] == ["attention", "pdessm"]
    assert all(accuracy > 0.9 for row in rows for accuracy in row["accuracy"].values())
    assert rows[1]["parameters"] < rows[0]["parameters"]
    classify.main(**vars(classify.parse_args([*flags[:1], "--mixers", "pdessm", *flags[4:]])))
    assert json.loads(results.read_text())["rows"] == rows
    assert capsys.readouterr().out.splitlines()[-3:] == printed.splitlines()[-3:]


@pytest.mark.usefixtures("quick")
def test_rows_of_another_command_stay(folders, tmp_path, monkeypatch):
    """Which adds them while this one trains."""
    results = tmp_path / "results.json"
    other = dict(mixer="pdessm", seed=3, steps=1, parameters=1, accuracy={"32": 0.5, "48": 0.5}, step_ms=1.0)
    monkeypatch.setattr(classify, "train", lambda *_: results.write_text(json.dumps(dict(rows=[other]))))
    classify.main(folders, ["attention"], [0], 1, results)
    assert [row["mixer"] for row in json.loads(results.read_text())["rows"]] == ["pdessm", "attention"]


@pytest.mark.usefixtures("quick")
def test_matrices_alone_decay_and_the_rate_rises_for_a_tenth_and_falls_to_zero(monkeypatch):
    seen = []

    class Noted(torch.optim.AdamW):
        def step(self, *rest):
            groups = self.param_groups
            seen.append([(group["lr"], group["weight_decay"], {p.ndim for p in group["params"]}) for group in groups])
            return super().step(*rest)

    monkeypatch.setattr(torch.optim, "AdamW", Noted)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 10))
    classify.train(model, torch.zeros(40, 3, 32, 32, dtype=torch.uint8), torch.zeros(40, dtype=torch.long), 20, 0)
    assert [group[1:] for group in seen[0]] == [(classify.WEIGHT_DECAY, {2}), (0, {1})]
    rates = [groups[0][0] / classify.LR for groups in seen]
    assert [rates[step] for step in (0, 1, 10, 19)] == pytest.approx([0.5, 1, 0.5, 0])


def test_a_seed_decides_initial_weights():
    one, other, again = (classify.build("pdessm", seed).blocks[0].mlp.fc1.weight for seed in (0, 1, 0))
    assert (torch.equal(one, again), torch.equal(one, other)) == (True, False)


def test_augmented_images_are_moved_by_at_most_four_pixels():
    images = torch.zeros(400, 3, 32, 32)
    images[:, :, 16, 16] = 1
    found = classify.augment(images, torch.Generator().manual_seed(0))[:, 0].nonzero()
    assert len(found) == 400
    rows, columns = found[:, 1], found[:, 2]
    assert set(rows.tolist()) == set(range(12, 21))
    assert set(columns.tolist()) == set(range(11, 21))  # 16, or mirrored 15, and up to 4 either way
    assert columns.float().mean() == pytest.approx(15.5, abs=0.3)  # half of them are mirrored


def test_test_images_are_read_as_they_are(folders):
    images, classes = classify.read(folders, held_out=True)
    assert classes.tolist() == 20 * [0] + 20 * [1]
    with Image.open(folders / "test" / "0" / "0.png") as image:
        assert np.array_equal(images[0].permute(1, 2, 0), np.asarray(image))


@pytest.mark.usefixtures("quick")
def test_training_sees_every_image_once_before_it_begins_again_and_augmented():
    """Images of one grey each: their centre tells which they are, and zeros along an edge that they were moved."""
    seen = []
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 10))
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    images = (torch.arange(40, dtype=torch.uint8) + 100).view(40, 1, 1, 1).expand(40, 3, 32, 32)
    classify.train(model, images, torch.zeros(40, dtype=torch.long), 2, 0)
    seen = torch.cat(seen)
    assert len(seen[:, 0, 16, 16].unique()) == 2 * classify.BATCH
    assert (seen == -1).any()
