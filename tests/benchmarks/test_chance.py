"""The rows of reproduce/chance.py."""

import json

import numpy as np
import pytest

from commands import Colours
from reproduce import chance


def test_rows_of_two_sets_are_what_two_numbers_tell(tmp_path, random_images, monkeypatch):
    """All images of the reference together are at no distance from it; samples that are darker are further than its parts."""
    for name, brightness in (("real", 1.0), ("dark", 0.5)):
        np.savez(tmp_path / f"{name}.npz", arr_0=random_images(40, brightness))
    monkeypatch.setattr(chance, "open_network", lambda *_: Colours())
    files = [str(tmp_path / f"{name}.npz") for name in ("real", "dark")]
    chance.main(files[0], files[1:], 20, None, None, None, tmp_path / "a.json")
    real, dark = (json.loads((tmp_path / "a.json").read_text())["rows"][file] for file in files)
    for row in (real, dark):
        assert (row["sets"], row["images"]) == (2, 40)
        assert row["mean"] == pytest.approx((row["least"] + row["most"]) / 2)
        assert row["standard_deviation"] == pytest.approx((row["most"] - row["least"]) / 2**0.5)
    assert real["whole"] == pytest.approx(0, abs=1e-6)
    assert dark["least"] > real["most"] > real["least"] > 1e-4
