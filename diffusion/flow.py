"""Flow matching (Lipman et al., 2023; Eqs. (11) to (13) of the PDE-SSM paper).

A path leads from noise z at t = 0 to an image u at t = 1: u_t = alpha(t) u + sigma(t) z. The network learns its
velocity, alpha'(t) u + sigma'(t) z, and sampling follows that velocity from noise. The network sees 1000 t; SiT's see t.

With predict="x" the network's output is the clean image, and the velocity follows from it: the network's layers must then carry
an image and not its noise (Li & He, 2025, "Back to basics: let denoising generative models denoise").
"""

import math
from itertools import pairwise

import torch


def linear(t):
    """Returns alpha, sigma, alpha', sigma' at t of Eq. (12), the paper's path: u_t = t u + (1 - t) z."""
    return t, 1 - t, torch.ones_like(t), -torch.ones_like(t)


def cosine(t):
    """Returns alpha, sigma, alpha', sigma' at t of the variance-preserving path, a quarter of a circle from z to u."""
    angle = math.pi / 2 * t
    return angle.sin(), angle.cos(), math.pi / 2 * angle.cos(), -math.pi / 2 * angle.sin()


PATHS = {"linear": linear, "cosine": cosine}


def uniform(p):
    return p


def logit_normal(p):
    """Returns times that are more often in the middle: the logit of t is standard normal (Esser et al., 2024)."""
    return torch.sigmoid(torch.special.ndtri(p))


TIMES = {"uniform": uniform, "logit-normal": logit_normal}


def shifted(t, shift):
    """Returns times t moved towards the noise, as SD3 moves them for large images: the share of noise 1 - t becomes
    s (1 - t) / (1 + (s - 1) (1 - t)) (Esser et al., 2024, Eq. 23, with s for sqrt(m / n))."""
    return t / (shift - (shift - 1) * t)


PREDICTIONS = ("velocity", "x")  # what a network's output is: "x" is the clean image
LEAST_SIGMA = 0.05  # lower bound of the sigma by which the loss divides the error of a predicted image


class FlowMatching:
    """Flow matching along a path from noise to images, with the interface of GaussianDiffusion but times t (B,) in [0, 1]."""

    def __init__(self, path, times, num_timesteps, time_scale, predict="velocity", time_shift=1.0):
        self.path, self.times, self.num_timesteps, self.time_scale = PATHS[path], TIMES[times], num_timesteps, time_scale
        self.predict, self.time_shift = predict, time_shift

    def progress(self, t):
        """Returns the progress from noise, 0, to image, 1, at the time that the network sees, time_scale times t."""
        return t / self.time_scale

    def draw_times(self, p):
        """Turns uniform random numbers p (B,) in [0, 1) into times for training."""
        return shifted(self.times(p), self.time_shift)

    def steps(self):
        """Returns where each step of a sampler begins and how long it is, a list of pairs."""
        n = self.num_timesteps
        if self.time_shift == 1:
            return [(step / n, 1 / n) for step in range(n)]
        ends = [shifted(step / n, self.time_shift) for step in range(n + 1)]
        return [(start, end - start) for start, end in pairwise(ends)]

    def coefficients(self, t, x):
        """Returns alpha, sigma, alpha' and sigma' at t (B,), shaped to multiply x."""
        return [c.to(x.dtype).view(-1, *[1] * (x.ndim - 1)) for c in self.path(t.double())]

    def velocity(self, model, x, t, model_kwargs=None):
        """Returns the network's velocity at x (B, C, H, W) and times t (B,), (B, C, H, W). If the network predicts the image u,
        it is the velocity that leads to u, (u - x) / (1 - t) on the linear path; t must be below 1."""
        output = self.output(model, x, t, model_kwargs)
        if self.predict == "velocity":
            return output
        alpha, sigma, d_alpha, d_sigma = self.coefficients(t, x)
        return ((sigma * d_alpha - d_sigma * alpha) * output + d_sigma * x) / sigma

    def output(self, model, x, t, model_kwargs=None):
        """Returns the network's prediction, the first C channels of its output, (B, C, H, W)."""
        return model(x, self.time_scale * t, **(model_kwargs or {}))[:, : x.shape[1]]

    def training_losses(self, model, x_start, t, model_kwargs=None, noise=None):
        """Computes the squared error of the velocity, Eq. (11), per image: a dict of "loss" and "mse", each (B,). A predicted
        image's error is divided by 1 - t on the linear path, or by LEAST_SIGMA where that is larger, before squaring."""
        noise = torch.randn_like(x_start) if noise is None else noise
        alpha, sigma, d_alpha, d_sigma = self.coefficients(t, x_start)
        output = self.output(model, alpha * x_start + sigma * noise, t, model_kwargs)
        if self.predict == "velocity":
            error = output - (d_alpha * x_start + d_sigma * noise)
        else:
            error = (output - x_start) * ((sigma * d_alpha - d_sigma * alpha) / sigma.clamp(min=LEAST_SIGMA))
        mse = error.square().flatten(1).mean(1)
        return {"mse": mse, "loss": mse}

    def clean(self, x, t, velocity):
        """Computes the image that x and its velocity at t point to; on the linear path x + (1 - t) v, Eq. (13)."""
        alpha, sigma, d_alpha, d_sigma = self.coefficients(t, x)
        return (sigma * velocity - d_sigma * x) / (sigma * d_alpha - d_sigma * alpha)

    def noise(self, x, t, velocity):
        """Computes the noise that x and its velocity point back to, on the linear path x - t v. The score is -noise / sigma."""
        alpha, sigma, d_alpha, d_sigma = self.coefficients(t, x)
        return (d_alpha * x - alpha * velocity) / (sigma * d_alpha - d_sigma * alpha)
