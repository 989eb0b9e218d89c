"""Bits per dimension against Gaussian data, whose best network, and the probability of whose levels, are known."""

import math

import pytest
import torch

from diffusion import create_diffusion, create_flow
from diffusion.likelihood import diffusion_bits, flow_bits
from diffusion.noise import PerImageNoise

MEAN, DEVIATION = 0.2, 0.5  # of every pixel
LEVELS = 2 * torch.arange(256, dtype=torch.float64) / 255 - 1


def images_and_bits(count):
    """The same 3 x 2 x 2 image many times, and -log2 of the probability of its levels, per dimension."""
    levels = torch.arange(20, 260, 20)
    x = LEVELS[levels].float().view(1, 3, 2, 2).expand(count, -1, -1, -1)
    ends = torch.stack([LEVELS[levels] - 1 / 255, LEVELS[levels] + 1 / 255])
    below = torch.special.ndtr((ends - MEAN) / DEVIATION)
    return x, -(below[1] - below[0]).log2().mean().item()


def noise_of(x):
    return PerImageNoise(range(len(x)), "cpu")


def best_velocity(flow):
    """The velocity E[alpha' u + sigma' z | x] of Gaussian images u."""

    def network(x, t):
        alpha, sigma, d_alpha, d_sigma = flow.coefficients(t / 1000, x)
        from_middle = (x - alpha * MEAN) / (alpha**2 * DEVIATION**2 + sigma**2)
        return d_alpha * (MEAN + alpha * DEVIATION**2 * from_middle) + d_sigma * sigma * from_middle

    return network


def best_noise(diffusion):
    """The noise E[z | x_t] of Gaussian images, and the variance of x_(t - 1) given x_t, on the scale of learned variances."""

    def network(x, t):
        signal, noise = diffusion.table("signal", t, x), diffusion.table("noise", t, x)
        variance = signal**2 * DEVIATION**2 + noise**2
        start = MEAN + signal * DEVIATION**2 / variance * (x - signal * MEAN)
        exact = diffusion.table("mean_x0", t, x) ** 2 * DEVIATION**2 * noise**2 / variance
        exact = exact + torch.where(t.view(-1, 1, 1, 1) > 0, diffusion.table("log_posterior", t, x).exp(), 0)
        least, most = diffusion.table("log_posterior", t, x), diffusion.table("log_beta", t, x)
        position = (2 * (exact.log() - least) / (most - least) - 1).expand_as(x)
        return torch.cat([diffusion.predict_noise(x, t, start), position], 1)

    return network


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_the_best_flow_has_the_likelihood_of_the_data(path):
    flow = create_flow(20, path=path)
    x, expected = images_and_bits(500)
    assert flow_bits(flow, best_velocity(flow), x, noise_of(x)).mean() == pytest.approx(expected, abs=1e-3)


def test_the_bound_of_the_best_diffusion_is_the_likelihood_of_the_data():
    diffusion = create_diffusion("", use_kl=True)
    x, expected = images_and_bits(100)
    bits = diffusion_bits(diffusion, best_noise(diffusion), x, noise_of(x), 200)
    assert bits.mean() == pytest.approx(expected, abs=4 * bits.std().item() / 10)
    assert bits.std() < 0.2 * expected


def test_a_worse_diffusion_has_a_higher_bound():
    diffusion = create_diffusion("", use_kl=True)
    x, _ = images_and_bits(20)
    best, scales = best_noise(diffusion), torch.tensor([1.3, 1.0]).repeat_interleave(3).view(1, 6, 1, 1)
    bits = [diffusion_bits(diffusion, network, x, noise_of(x), 200).mean() for network in (best, lambda *a: scales * best(*a))]
    assert bits[1] > bits[0] + 0.01


def test_the_divergence_counts_every_pair_of_pixels():
    """Under dx/dt = A x the density at x is that of exp(-A) x, divided by exp(trace A)."""
    torch.manual_seed(0)
    A = torch.randn(12, 12) / 4
    x, _ = images_and_bits(4000)

    def network(x, t):
        return (x.flatten(1) @ A.T).view_as(x)

    z = x[:1].double().flatten(1) @ torch.linalg.matrix_exp(-A.double()).T
    nats = (z.square().sum() / 2 + 6 * math.log(2 * math.pi) + A.trace().double()).item()
    bits = flow_bits(create_flow(10), network, x, noise_of(x))
    assert bits.std() > 0.1  # one estimate is rough
    assert bits.mean() == pytest.approx(nats / 12 / math.log(2) + math.log2(127.5), abs=4 * bits.std().item() / 4000**0.5)


def test_images_do_not_depend_on_their_batch():
    flow, diffusion = create_flow(4), create_diffusion("", use_kl=True)
    x, _ = images_and_bits(3)
    velocity, noise = best_velocity(flow), best_noise(diffusion)
    for bits in (lambda x, r: flow_bits(flow, velocity, x, r), lambda x, r: diffusion_bits(diffusion, noise, x, r, 4)):
        alone = torch.cat([bits(x[i : i + 1], PerImageNoise([i], "cpu")) for i in range(3)])
        torch.testing.assert_close(bits(x, noise_of(x)), alone)


def test_a_network_that_predicts_the_image_has_no_likelihood():
    x, _ = images_and_bits(1)
    with pytest.raises(ValueError, match="a flow has a likelihood if its network predicts the velocity"):
        flow_bits(create_flow(2, predict="x"), lambda x, t: x, x, noise_of(x))
