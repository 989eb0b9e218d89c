"""The learning rate of every step, and what else says how far weights move."""

import pytest
import torch

import train
from commands import ALONE, QUICK, fit
from pde_ssm import PDESSM
from small_runs import assert_same, learnt, log_rows
from training.batches import draw_batch
from training.learner import create_learner, update
from training.schedule import learning_rate

pytestmark = pytest.mark.usefixtures("shallow", "one_thread")


def test_a_rate_rises_in_proportion_and_then_stays():
    rate = learning_rate(0.1, 4, "constant", 10)
    assert [rate(step) for step in range(1, 7)] == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1, 0.1])
    assert learning_rate(0.1, 0, "constant", 10) is None


@pytest.mark.parametrize("warmup", [0, 3])
def test_a_rate_falls_along_half_a_cosine(warmup):
    """It begins at the whole rate, is at half of it halfway, and would be 0 in the step after the last."""
    rate = learning_rate(0.1, warmup, "cosine", warmup + 8)
    falling = [rate(step) for step in range(warmup + 1, warmup + 10)]
    assert [falling[0], falling[4], falling[8]] == pytest.approx([0.1, 0.05, 0], abs=1e-12)
    assert [a + b for a, b in zip(falling, reversed(falling))] == pytest.approx([0.1] * 9)
    assert [rate(step) for step in range(1, warmup + 1)] == pytest.approx([0.1 * step / 3 for step in range(1, warmup + 1)])


RECIPE = ["--model", "DiT-N/8", "--global-batch-size", 8, "--log-every", 1, "--ckpt-every", 2, "--max-steps", 6]
RECIPE += ["--class-dropout", 0.4]
RECIPE += ["--lr", 0.01, "--warmup-steps", 2, "--lr-schedule", "cosine", "--weight-decay", 0.1, "--adam-betas", 0.8, 0.95]


def test_a_recipe_goes_on_to_the_bit_and_does_not_change_on_the_way(tmp_path, monkeypatch):
    dropouts = []
    with monkeypatch.context() as patch:
        patch.setattr(train, "draw_batch", lambda *a, **how: dropouts.append(how["dropout"]) or draw_batch(*a, **how))
        whole = fit(tmp_path / "whole", *RECIPE).parent
    assert dropouts == [0.4] * 6
    rate = learning_rate(0.01, 2, "cosine", 6)
    assert [row["lr"] for row in log_rows(whole)] == [rate(step) for step in range(1, 7)]
    (group,) = learnt(whole)["opt"]["param_groups"]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (rate(6), (0.8, 0.95), 0.1)

    def stop(learner, loss, step, *rest, update=train.update):
        if step == 4:
            raise ValueError("the lights went out")
        return update(learner, loss, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(train, "update", stop)
        with pytest.raises(ValueError, match="the lights went out"):
            fit(tmp_path / "parts", *RECIPE)
    for change, was in ((["--max-steps", 9], 6), (["--adam-betas", 0.9, 0.95], r"\[0\.8, 0\.95\]")):
        with pytest.raises(ValueError, match=f"{change[0]} was {was} and is"):
            fit(tmp_path / "parts", *RECIPE, "--resume", "auto", *change)
    fit(tmp_path / "parts", *RECIPE, "--resume", "auto")
    assert_same(learnt(tmp_path / "parts"), learnt(whole))


def test_a_flag_that_a_checkpoint_is_too_old_to_know_had_its_default(tmp_path):
    flags = ["--model", "DiT-N/8", "--global-batch-size", 8, "--max-steps", 1, "--objective", "flow"]
    path = fit(tmp_path, *flags) / "checkpoints" / "0000001.pt"
    contents = torch.load(path)
    del contents["args"]["predict"]
    torch.save(contents, path)
    with pytest.raises(ValueError, match="--predict was None and is x; --allow-changes"):
        fit(tmp_path, *flags, "--resume", "auto", "--predict", "x")
    fit(tmp_path, *flags, "--resume", "auto", "--max-steps", 2)


def test_unknown_rates_are_refused(capsys):
    for flags in (["--adam-betas", "0.9", "1"], ["--warmup-steps", "-1"], ["--class-dropout", "0"], ["--time-shift", "0"]):
        with pytest.raises(SystemExit):
            train.parse_args([*QUICK, *flags])
        assert f"{flags[0]}: {flags[-1]} is not a" in capsys.readouterr().err


@pytest.mark.parametrize("times", [1, 5, 0.5])
def test_coefficients_of_pdes_learn_at_a_multiple_of_the_rate(times):
    """AdamW's first step moves every weight by the learning rate, whatever its gradient is."""
    torch.manual_seed(0)
    model = PDESSM(4, components=2, gate=True, local=True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    learner = create_learner(model, ALONE, 1e-3, [0.5], lr_coefficients=times)
    learner.rate = lambda step: 1e-3 * step
    model(torch.randn(2, 4, 6, 6)).square().sum().backward()
    assert update(learner, torch.tensor(1.0), 1)
    moved = {name: (p.detach() - before[name]).abs() for name, p in model.named_parameters()}
    for name, by in moved.items():
        expected = 1e-3 * (times if name.startswith("equation.") else 1)
        assert by[by > 0].numel() > 0
        torch.testing.assert_close(by[by > 0].median(), torch.tensor(expected), rtol=0.02, atol=0, msg=name)


def test_a_run_with_another_rate_for_coefficients_goes_on_to_the_bit(tmp_path, monkeypatch):
    """Parameters keep their numbers in the checkpoint, so that their moments come back to them."""
    flags = [*RECIPE[: RECIPE.index("--lr")], "--lr", 0.01, "--mixer", "pdessm-gl", "--lr-coefficients", 5]
    whole = learnt(fit(tmp_path / "whole", *flags).parent)
    assert {group["lr"] for group in whole["opt"]["param_groups"]} == {0.01, 0.05}
    numbers = [number for group in whole["opt"]["param_groups"] for number in group["params"]]
    assert numbers == sorted(numbers)
    for number, weight in enumerate(whole["model"].values()):
        assert number not in whole["opt"]["state"] or whole["opt"]["state"][number]["exp_avg"].shape == weight.shape

    fit(tmp_path / "parts", *flags, "--max-steps", 4)
    fit(tmp_path / "parts", *flags, "--resume", "auto")
    assert_same(learnt(tmp_path / "parts"), whole)
    with pytest.raises(ValueError, match=r"--lr-coefficients was 5\.0 and is 1\.0"):
        fit(tmp_path / "parts", *flags, "--lr-coefficients", 1, "--resume", "auto")


def test_a_model_without_pdes_has_no_coefficients(tmp_path):
    with pytest.raises(ValueError, match="--lr-coefficients 5 is for the coefficients of PDEs, and the model has none"):
        fit(tmp_path, *QUICK, "--lr-coefficients", 5)
