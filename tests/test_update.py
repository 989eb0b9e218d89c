import pytest
import torch

from update import update_ema


def test_the_average_follows_short_runs_and_slows_down_in_long_ones():
    model, ema = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    with torch.no_grad():
        for step, decay in [(1, 2 / 11), (90, 0.91), (10**7, 0.9999)]:
            ema.weight.fill_(0), model.weight.fill_(1)
            update_ema(ema, model, step, 0.9999)
            assert 1 - ema.weight.item() == pytest.approx(decay, abs=1e-6)
