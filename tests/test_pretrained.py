"""The weights that the repository brings, and the notebook that draws with them."""

import json

import matplotlib
import pytest
import torch

from checkpoints.build import for_sampler, load_model
from commands import ROOT
from diffusion import create_objective
from figures.maps import disc

WEIGHTS = sorted((ROOT / "pretrained").glob("*.safetensors"))
NOTEBOOK = ROOT / "examples" / "pde_ssm_dit.ipynb"


def test_they_are_two_and_small():
    assert [path.name for path in WEIGHTS] == ["flowers-64-attention.safetensors", "flowers-64.safetensors"]
    assert sum(path.stat().st_size for path in WEIGHTS) < 6e6


@pytest.mark.parametrize("path", WEIGHTS, ids=lambda path: path.stem)
def test_they_see_through_noise(path):
    """A picture that they have not been trained on is found in as much noise, which has an error of 1."""
    model, settings = load_model(path, {}, "mse")
    assert len(model.class_names) == 102
    assert "rose" in model.class_names
    assert not {"data_path", "val_path", "results_dir"} & model.settings.keys()
    image, half = disc(64)[None], torch.tensor([0.5])
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        objective = create_objective(settings["objective"], **for_sampler(settings))
        no_class = torch.tensor([model.num_classes])
        found = objective.output(model, (image + noise) / 2, half, dict(y=no_class))
    assert (found - image).square().mean() < 0.05


def test_every_cell_of_the_notebook_runs(monkeypatch, capsys):
    matplotlib.use("Agg")
    monkeypatch.chdir(ROOT)
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] for cell in cells[1:])
    assert not any(output["output_type"] == "error" for cell in cells for output in cell["outputs"])
    names = {}
    for cell in cells:
        exec("".join(cell["source"]).replace("%matplotlib inline", ""), names)
    names["plt"].close("all")
    assert "torch.Size([2, 384, 16, 24])" in capsys.readouterr().out
    assert [images.shape for images in names["rows"].values()] == 2 * [(6, 64, 64, 3)]
