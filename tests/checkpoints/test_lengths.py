"""Averages that look back over a share of the run, and those that are made of them afterwards."""

import numpy as np
import pytest
import torch

from checkpoints.build import load_model
from checkpoints.lengths import exponent, overlap, reconstruct, residual, shares
from checkpoints.read import load_checkpoint, read_checkpoint
from commands import draw, draw_many, fit
from training.learner import decay_at

pytestmark = pytest.mark.usefixtures("shallow")


@pytest.mark.parametrize("length", [0.005, 0.05, 0.1, 0.25])
def test_an_exponent_gives_its_length(length):
    """The deviation of s where the density is proportional to s^gamma."""
    s, gamma = np.linspace(0, 1, 1_000_001), exponent(length)
    density = s**gamma / (s**gamma).sum()
    mean = (density * s).sum()
    assert np.sqrt((density * (s - mean) ** 2).sum()) == pytest.approx(length, rel=1e-3)


def test_overlaps_are_integrals():
    s = (np.arange(1_000_000) + 0.5) / 1_000_000
    one, other = 3 * s**2 / 0.5**3 * (s < 0.5), 6 * s**5
    assert overlap(0.5, 2, 1.0, 5) == pytest.approx((one * other).mean(), rel=1e-4)
    assert overlap(1.0, 5, 0.5, 2) == pytest.approx(overlap(0.5, 2, 1.0, 5))


def test_a_residual_is_the_distance_of_the_weights_over_the_run():
    s = (np.arange(1_000_000) + 0.5) / 1_000_000
    steps, lengths, found = [500, 1000], [0.05, 0.1], np.array([0.25, 0.75])
    gammas = [exponent(one) for one in (*lengths, 0.2)]
    first, second, wanted = ((gamma + 1) * s**gamma for gamma in gammas)
    first = (gammas[0] + 1) * (2 * s) ** gammas[0] * 2 * (s < 0.5)  # which ended halfway
    squares = ((0.25 * first + 0.75 * second - wanted) ** 2).mean() / (wanted**2).mean()
    assert residual(steps, lengths, 1000, 0.2, found) == pytest.approx(np.sqrt(squares), rel=1e-3)


def average(path, length):
    """The average of that length of every number on a path, one after another."""
    averages, now = [], 0.0
    for step, x in enumerate(path, start=1):
        decay = decay_at(step, f"length_{length}")
        averages.append(now := decay * now + (1 - decay) * x)
    return np.array(averages)


@pytest.mark.parametrize("length", [0.06, 0.08, 0.12, 0.2])
def test_other_lengths_are_made_of_two(rng, length):
    """Of a random walk, whose averages of lengths 0.05 and 0.1 were kept 16 times: much nearer than the nearer of the two."""
    path = rng.standard_normal(4000).cumsum()
    kept = {one: average(path, one) for one in (0.05, 0.1)}
    parts = [(step, one) for step in range(250, 4001, 250) for one in kept]
    made = sum(share * kept[one][step - 1] for (step, one), share in zip(parts, shares(*zip(*parts), 4000, length)))
    wanted = average(path, length)[-1]
    assert abs(made - wanted) < 0.05 * min(abs(kept[one][-1] - wanted) for one in kept)


def test_lengths_from_training_to_samples(tmp_path):
    flags = ["--max-steps", 6, "--global-batch-size", 8, "--lr", 1e-2, "--ckpt-every", 2, "--ema-lengths", 0.05, 0.1]
    path = fit(tmp_path / "r", *flags) / "checkpoints" / "0000006.pt"
    kept = read_checkpoint(path)["ema_length_0.1"]
    made, stored = reconstruct(path, 0.1)
    assert stored["ema_lengths"] == [0.05, 0.1]
    for name, w in kept.items():
        torch.testing.assert_close(made[name], w, rtol=1e-4, atol=1e-4)
    between = load_model(path, dict(ema_length=0.07), "ema")[0].state_dict()
    torch.testing.assert_close(between["pos_embed"], kept["pos_embed"])  # which does not change
    name = "blocks.0.mlp.fc1.weight"
    assert not torch.allclose(between[name], kept[name], atol=1e-4)
    drawn = [draw(path, tmp_path / "a.png", "--class-labels", 3, *more) for more in ([], ["--ema-length", 0.08])]
    assert (drawn[0] != drawn[1]).any()
    assert draw_many(path, tmp_path / "s", "--ema-length", 0.08, "--num-fid-samples", 1).shape == (1, 8, 8, 3)
    with pytest.raises(ValueError, match=r"0\.05 and 0\.1 in 3 checkpoints make it with an error of 32%, above 10%; ask for"):
        draw(path, tmp_path / "a.png", "--ema-length", 0.2)
    with pytest.raises(ValueError, match=r"--ema 0\.9999 and --ema-length 0\.1 name two averages; leave one out"):
        draw(path, tmp_path / "a.png", "--ema", 0.9999, "--ema-length", 0.1)
    with pytest.raises(ValueError, match=r"--ema 0\.5: .* has averages of decay 0\.9999, length_0\.05, length_0\.1"):
        load_checkpoint(path, 0.5)
    earlier = path.with_name("0000004.pt")
    made = reconstruct(earlier, 0.08)[0][name]
    path.unlink()
    assert torch.equal(reconstruct(earlier, 0.08)[0][name], made)  # what came later was no part of it


def test_checkpoints_of_one_process_and_of_shards_go_together(tmp_path, monkeypatch):
    read = []

    def load(path, *average):
        read.append(path.name)
        return dict(w=torch.ones(1)), dict(ema_lengths=[0.05, 0.1])

    monkeypatch.setattr("checkpoints.lengths.load_checkpoint", load)
    (tmp_path / "0000002.dcp").mkdir()
    for name in ("0000004.pt", "0000003.pt.host.1.partial", "0000006.pt"):
        (tmp_path / name).touch()
    assert reconstruct(tmp_path / "0000004.pt", 0.08)[0]["w"].item() == pytest.approx(1)
    assert {*read} == {"0000002.dcp", "0000004.pt"}


def test_runs_without_lengths_say_what_makes_them(tmp_path, checkpoint):
    with pytest.raises(ValueError, match=r"--ema-length 0\.1: .* kept averages .* with --ema-lengths 0\.05 0\.1"):
        draw(checkpoint(), tmp_path / "a.png", "--ema-length", 0.1)
