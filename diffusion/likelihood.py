"""Likelihoods of images under a trained network, in bits per dimension: of a flow by its ODE, of a diffusion by its bound.

Images x (B, C, H, W) have 256 levels from -1 to 1, 2/255 apart. `noise` is a PerImageNoise, so that the random numbers of an
image do not depend on its batch.
"""

import math
from itertools import pairwise

import torch

from .ddpm import gaussian_kl


def flow_bits(flow, model, x, noise, model_kwargs=None):
    """Computes -log2 P(x) / (C H W) under a flow: (B,), float64. Its average over noise is an upper bound of the true value.

    P is the integral of the density p over a level's bin, bounded by its logarithm at a random point of the bin (Theis et al.,
    2016). From there the ODE is followed to the noise z at t = 0, by the Runge-Kutta method of order 4, in as many steps as the
    flow has, shorter near the image: t = 1 - s^2, with equal steps of s. Then

        log p(x) = log N(z; 0, 1) - int_0^1 div v dt                            (Chen et al., 2018),

    where s^T (dv/dx) s with random signs s estimates the divergence (Hutchinson; Grathwohl et al., 2019).
    ValueError for a network that predicts the image: its velocity, (u - x) / (1 - t), has a divergence without bound at t = 1.
    """
    if flow.predict != "velocity":
        raise ValueError("a flow has a likelihood if its network predicts the velocity; this one predicts the image")
    x = x + (torch.special.ndtr(noise(x)) - 0.5) * (2 / 255)
    signs = torch.where(noise(x) < 0, -1.0, 1.0)

    def slopes(x, t):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            velocity = flow.velocity(model, x, t.expand(len(x)), model_kwargs)
            (pulled_back,) = torch.autograd.grad(velocity, x, signs)
        return velocity.detach(), (signs * pulled_back).double().flatten(1).sum(1)

    times, integral = 1 - torch.linspace(0, 1, flow.num_timesteps + 1, device=x.device) ** 2, 0
    for t, before in pairwise(times):
        dt = before - t
        here = slopes(x, t)
        middle = slopes(x + dt / 2 * here[0], t + dt / 2)
        again = slopes(x + dt / 2 * middle[0], t + dt / 2)
        there = slopes(x + dt * again[0], before)
        velocity, divergence = ((a + 2 * b + 2 * c + d) / 6 for a, b, c, d in zip(here, middle, again, there))
        x, integral = x + dt * velocity, integral + dt.double() * divergence
    nats = (x.double().square() + math.log(2 * math.pi)).flatten(1).sum(1) / 2 - integral
    return nats / math.log(2) / x[0].numel() + math.log2(255 / 2)


@torch.no_grad()
def diffusion_bits(diffusion, model, x, noise, terms, model_kwargs=None):
    """Estimates the variational bound of -log2 P(x) / (C H W) under a diffusion with use_kl: (B,), float64.

    It is the sum of a term L_t for every timestep and of the divergence between x_T and noise (Ho et al., 2020, Eq. 5). The sum
    is estimated from `terms` timesteps, without bias: most of the bits are in small t, so t + 1 is drawn uniformly on a
    logarithmic scale, and L_t is divided by the probability of t.
    """
    T, total = diffusion.num_timesteps, 0
    for part in range(terms):
        p = ((part + noise.rand()) / terms).double()
        t = ((T + 1) ** p).long().clamp(1, T) - 1
        probability = ((t + 2).double() / (t + 1)).log() / math.log(T + 1)
        total = total + diffusion.training_losses(model, x, t, model_kwargs, noise(x))["loss"] / T / probability
    last = torch.full((len(x),), T - 1, device=x.device)
    mean, log_variance = diffusion.table("signal", last, x) * x, 2 * diffusion.table("noise", last, x).log()
    prior = gaussian_kl(mean, log_variance, torch.zeros_like(mean), torch.zeros_like(log_variance))
    return total / terms + prior.double().flatten(1).mean(1) / math.log(2)
