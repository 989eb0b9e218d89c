import json
import logging
import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from commands import write_photos
from models import MODELS

os.environ["HF_HUB_OFFLINE"] = "1"  # no test reaches for a hub
HERE = Path(__file__).parent


@pytest.fixture
def golden():
    """golden(name): the arrays of tests/golden/<name> as tensors, or its JSON."""

    def load(name):
        path = HERE / "golden" / name
        if path.suffix == ".json":
            return json.loads(path.read_text())
        with np.load(path) as arrays:
            return {key: torch.from_numpy(arrays[key]) if arrays[key].dtype.kind in "iuf" else arrays[key] for key in arrays}

    return load


@pytest.fixture
def randomize():
    """randomize(model): gives every trainable parameter that is all zeros random values, without which adaLN-Zero's
    blocks are the identity."""

    def fill(model):
        generator = torch.Generator().manual_seed(7)
        for parameter in model.parameters():
            if parameter.requires_grad and not parameter.any():
                parameter.data.normal_(std=0.1, generator=generator)
        return model

    return fill


@pytest.fixture
def photos(tmp_path):
    return write_photos(tmp_path / "photos")


@pytest.fixture(scope="module")
def shallow():
    """Two layers of the smallest model are enough to stop and go on, and a kill takes no disk along."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        patch.setitem(MODELS, "DiT-N/8", partial(MODELS["DiT-N/8"], depth=2))
        yield


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def fresh_log():
    yield
    for handler in logging.getLogger("train").handlers[:]:
        handler.close()
        logging.getLogger("train").removeHandler(handler)
