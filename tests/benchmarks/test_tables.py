"""What reproduce/tables.py makes of rows."""

import pytest

from reproduce import tables

INCEPTION = "2048 features of inception"
METRICS = {"features": INCEPTION, "samples": dict(images=9), "reference": dict(images_in_statistics=8), "FID": 3.0}
ROW = dict(scale="full", objective="flow", steps=3, sampling_steps=50, sampler="euler", parameters=29e6, training_loss=0.1)
ROW |= dict(machine="a machine", torch="2.15", date="2026", commands=[], system="DiT", seed=0, metrics=METRICS)


def cells_of(table, rows):
    """The cells of DiT by their headings."""
    lines = [line.strip("| ").split(" | ") for line in tables.tabulate(table, rows).splitlines() if line.startswith("|")]
    return dict(zip(lines[0], next(cells for name, *cells in lines if name == "DiT")))


@pytest.mark.parametrize(
    ("other", "of_metrics"),
    [
        *((other, {}) for other in (dict(scale="small"), dict(objective="diffusion"), dict(predict="x"), dict(image_size=64))),
        *((other, {}) for other in (dict(precision="bf16"), dict(steps=4), dict(batch=64), dict(sampler="heun"))),
        *(({}, other) for other in (dict(samples=dict(images=10)), dict(features="1280 features of efficientnet-lite0"))),
        (dict(sampling_steps=100), {}),
    ],
    ids=str,
)
def test_other_settings_have_figures_of_their_own(other, of_metrics):
    of_other = METRICS | {"FID": 4.0} | of_metrics
    cells = cells_of("table3_flowers", [ROW, ROW | other | dict(seed=1, metrics=of_other)])
    assert [*cells.values()][1:] == ["3", "4"]


@pytest.mark.parametrize(
    ("features", "heading"), [(INCEPTION, "FID, ours [1]"), ("1280 features of inception", "Frechet distance, ours [1]")]
)
def test_figures_are_found_by_name_and_no_other_distance_is_called_fid(features, heading):
    metrics = {"sFID": 9.0, "Recall": 0.5} | METRICS | dict(features=features)
    cells = cells_of("table10_imagenet256", [ROW | dict(metrics=metrics)])
    assert (cells["sFID, ours [1]"], cells["Recall, ours [1]"], cells[heading]) == ("9", "0.5", "3")


@pytest.mark.parametrize(("table", "measured"), [("table3_flowers", True), ("table1_cifar10", False)])
def test_held_out_losses_stand_where_the_paper_has_no_errors(table, measured):
    cells = cells_of(table, [ROW | dict(held_out_loss=0.25, held_out_mse=0.5)])
    assert cells.get("held-out loss, ours [1]") == ("0.25" if measured else None)
    assert cells.get("MSE, ours [1]") == (None if measured else "0.5")
