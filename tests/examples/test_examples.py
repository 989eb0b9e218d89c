"""The examples do what they say."""

import torch

from examples import heat, vit


def test_fields_have_the_mass_that_they_should_and_spread():
    before, after = heat.pairs(3, 48)
    assert torch.allclose(torch.cat([before, after]).mean((1, 2, 3)), torch.ones(6), atol=1e-4)
    assert (after.square().mean((1, 2, 3)) < before.square().mean((1, 2, 3))).all()


def test_heat_and_advection_are_learnt(capsys):
    K, b, finer = heat.main()
    assert K < 1e-6
    assert b < 1e-5
    assert finer < 1e-5
    assert "tau K   learnt" in capsys.readouterr().out


def test_the_vision_transformer_learns_with_either_mixer(capsys):
    found = vit.main(steps=40)
    assert found.keys() == {"attention", "pdessm"}
    assert min(found.values()) > 0.2                                       # ten classes
    assert "replaced 3 attention layers" in capsys.readouterr().out
