"""Which images a step sees, and what is random in them."""

import json
import shutil
from itertools import islice
from types import SimpleNamespace

import pytest
import torch

import train
from commands import ALONE, QUICK, fit, torchrun
from diffusion import create_diffusion
from images.autoencoder import open_space
from machine.processes import Processes
from training.batches import draw_batch, epochs, make_loader
from training.watching import held_out_loss

pytestmark = pytest.mark.usefixtures("one_thread")


def test_an_epoch_is_the_same_for_any_number_of_processes():
    images = torch.utils.data.TensorDataset(torch.arange(43))

    def batches(size):
        loaders = [make_loader(images, 12, 0, Processes(rank, size, torch.device("cpu"))) for rank in range(size)]
        for loader in loaders:
            loader.sampler.set_epoch(3)
        return [sorted(torch.cat([part for (part,) in share]).tolist()) for share in zip(*loaders)]

    assert batches(1) == batches(2) == batches(4)
    assert len(batches(1)) == 3


def test_mirrors_half_of_the_images_that_may_be(monkeypatch):
    images = torch.arange(8.0).expand(400, 3, 8, 8)
    diffusion, labels = create_diffusion(""), torch.zeros(400, dtype=torch.long)

    def draw(flip, **dropout):
        how = dict(seed=0, batch_size=400, space=open_space("none"), objective=diffusion, processes=ALONE) | dropout
        return draw_batch(images, labels, 1, flip=flip, **how)

    mirrored = (draw(True)["x_start"] == images.flip(3)).flatten(1).all(1)
    assert 160 < mirrored.sum() < 240
    assert torch.equal(draw(True)["x_start"][~mirrored], images[~mirrored])
    assert torch.equal(draw(False)["x_start"], images)
    batch = draw(True)
    assert 20 < batch["model_kwargs"]["drop"].sum() < 65
    dropped = draw(True, dropout=0.4)["model_kwargs"]["drop"]
    assert 120 < dropped.sum() < 200
    assert 0.35 < mirrored[dropped].float().mean() < 0.65  # one has nothing to do with the other
    assert batch["t"].float().mean() == pytest.approx(500, abs=50)


def test_every_epoch_has_an_order_of_its_own():
    batches = epochs(make_loader(torch.utils.data.TensorDataset(torch.arange(40)), 40, 0, ALONE), 0)
    (first,), (second,) = next(batches), next(batches)
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(40))
    assert first.tolist() != second.tolist()


@pytest.mark.parametrize("step", [1, 4, 5, 7])
def test_going_on_with_other_processes_shows_no_image_twice_in_an_epoch(step):
    """Five steps an epoch; step 5 is the last of the first."""
    images = torch.utils.data.TensorDataset(torch.arange(43))

    def seen(size, first, last):
        loaders = [make_loader(images, 8, 0, Processes(rank, size, torch.device("cpu"))) for rank in range(size)]
        shares = [islice(epochs(loader, first), last - first) for loader in loaders]
        return [sorted(torch.cat([part for (part,) in parts]).tolist()) for parts in zip(*shares)]

    whole = seen(1, 0, 10)
    assert all(len({number for batch in whole[epoch : epoch + 5] for number in batch}) == 40 for epoch in (0, 5))
    assert seen(1, 0, step) + seen(2, step, 10) == whole
    assert seen(4, 0, step) + seen(1, step, 10) == whole


def test_held_out_images_have_the_same_noise_in_every_run(tmp_path, photos):
    flags = ["--data-path", photos, "--val-path", photos, "--global-batch-size", 12, "--num-workers", 0]

    def rows(name, *more):
        folder = fit(tmp_path / name, *flags, *more)
        return [row for row in map(json.loads, (folder / "log.jsonl").read_text().splitlines()) if "held_out_loss" in row]

    often = rows("often", "--max-steps", 4, "--ckpt-every", 2)
    assert [row["step"] for row in often] == [2, 4]
    assert often[0]["held_out_loss"] > often[1]["held_out_loss"]
    assert often[1]["held_out_loss"] == pytest.approx(often[1]["held_out_mse"] + often[1]["held_out_vb"])
    assert rows("once", "--max-steps", 4) == often[1:]
    torchrun(2, "train.py", *QUICK, "--results-dir", tmp_path / "two", *flags, "--max-steps", 4)
    two = json.loads((tmp_path / "two" / "000-DiT-N-4" / "log.jsonl").read_text().splitlines()[-1])
    assert two == pytest.approx(often[1], rel=1e-4)


def test_held_out_images_are_spread_over_the_set_and_their_times_over_all_times():
    """They are not mirrored, and an image's place in the set does not tell its time."""
    images = [(torch.arange(12.0).view(3, 2, 2) + 100 * number, number) for number in range(100)]
    seen, objective = {}, SimpleNamespace(draw_times=lambda p: p)
    objective.training_losses = lambda model, x, t, kwargs, noise: seen.update(x=x, t=t, y=kwargs["y"]) or {"loss": t}
    losses = held_out_loss(torch.nn.Identity(), images, objective, open_space("none"), ALONE, most=20)
    assert seen["y"].tolist() == list(range(0, 100, 5))
    assert torch.equal(seen["x"], torch.stack([image for image, _ in images[::5]]))
    twentieths = (20 * seen["t"]).long().tolist()
    assert sorted(twentieths) == list(range(20)) != twentieths
    assert losses == pytest.approx(dict(loss=seen["t"].mean().item()))


@pytest.mark.parametrize(
    ("objective", "weights"),
    [(["diffusion"], ["--min-snr", 1]), (["flow", "--path", "cosine"], ["--times", "logit-normal", "--time-shift", 3])],
    ids=["diffusion", "flow"],
)
def test_how_a_run_weights_its_loss_is_not_seen_in_that_of_held_out_images(tmp_path, photos, shallow, objective, weights):
    flags = ["--model", "DiT-N/8", "--data-path", photos, "--val-path", photos, "--num-classes", 3, "--num-workers", 0]
    flags += ["--global-batch-size", 4, "--max-steps", 1, "--lr", 1e-30, "--objective", *objective]
    rows = []
    for more in ([], weights):
        log = (fit(tmp_path / "r", *flags, *more) / "log.jsonl").read_text()
        rows.append([json.loads(line) for line in log.splitlines()])
    assert rows[0][0]["loss"] != pytest.approx(rows[1][0]["loss"], rel=1e-3)
    assert rows[0][1]["held_out_loss"] == pytest.approx(rows[1][1]["held_out_loss"], rel=1e-5)


def test_every_process_needs_its_share_of_images(tmp_path, photos):
    """Of a batch the same as others, and at least one of those that are held out."""
    (tmp_path / "one").mkdir()
    shutil.copy(f"{photos}/0/0.png", tmp_path / "one")
    flags = ["--data-path", photos, "--val-path", str(tmp_path / "one"), "--uncond", "--global-batch-size"]
    for size, message in (
        ("9", "--global-batch-size 9 is not divisible by 2 processes"),
        ("8", "the 1 images of --val-path are fewer than the 2 processes"),
    ):
        with pytest.raises(ValueError, match=message):
            train.main(train.parse_args([*QUICK, *flags, size]), Processes(0, 2, torch.device("cpu")))
