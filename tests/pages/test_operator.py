"""Page 1: what one PDE makes of a picture."""

import math
import re

import pytest
import torch

from pages.operator import chosen, evolve, in_numbers, picture, to_show
from pde_ssm import TERMS

STILL = dict(width_1=0, width_2=0, angle=0, b_x=0, b_y=0, r=0, tau=1)


def moved(pixels, terms=TERMS, **sliders):
    return evolve(pixels, *chosen(**STILL | sliders, terms=terms))


def test_convection_moves_the_picture_against_b():
    pixels = torch.rand(3, 16, 16, dtype=torch.float64)
    _, after = moved(pixels, b_x=-3 / 16, b_y=2 / 16)
    low = pixels - torch.fft.irfft2(torch.fft.rfft2(pixels) * nyquist(16))  # the highest frequency has no direction
    torch.testing.assert_close(after - torch.fft.irfft2(torch.fft.rfft2(after) * nyquist(16)), low.roll((-2, 3), (1, 2)))


def nyquist(n):
    there = torch.zeros(n, n // 2 + 1)
    there[n // 2] = there[:, n // 2] = 1
    return there


def test_reaction_multiplies_and_stays_bounded():
    pixels = torch.rand(3, 9, 9, dtype=torch.float64)
    torch.testing.assert_close(moved(pixels, r=-0.5, tau=2)[1], math.exp(-1) * pixels)
    torch.testing.assert_close(moved(pixels, r=1, tau=4)[1], math.e * pixels)


def test_terms_that_are_off_do_nothing():
    pixels = picture(None, 24)
    everything = dict(width_1=0.2, width_2=0.1, angle=20, b_x=0.3, b_y=0.2, r=-1, tau=2)
    torch.testing.assert_close(moved(pixels, (), **everything)[1], pixels)
    torch.testing.assert_close(moved(pixels, ("reaction",), **everything)[1], math.exp(-2) * pixels)
    assert (to_show(pixels).shape, to_show(pixels).std() > 20) == ((312, 312, 3), True)


def test_the_numbers_of_the_equation_are_those_of_the_kernel():
    how = chosen(0.1, 0.05, 25, -0.125, 0.25, -0.3, 0.8, TERMS)
    text = in_numbers(evolve(picture(None, 64), *how)[0], *how, TERMS)
    rows = re.findall(r"^\| [\w ]+ \| \$.*\$ \| (\S+) \| (\S+) \|$", text, re.MULTILINE)
    assert len(rows) == 5
    for stated, measured in rows:
        assert float(measured) == pytest.approx(float(stated), abs=2e-4)
    assert r"b\cdot\nabla h" in text
    assert r"b\cdot\nabla h" not in in_numbers(evolve(picture(None, 64), *how)[0], *how, ("diffusion", "reaction"))
