"""Flow matching (Lipman et al., 2023; Eqs. (11) to (13) of the PDE-SSM paper).

A path leads from noise z at t = 0 to an image u at t = 1: u_t = alpha(t) u + sigma(t) z. The network learns its
velocity, alpha'(t) u + sigma'(t) z, and sampling follows that velocity from noise. The network sees 1000 t; SiT's see t.

With predict="x" the network's output is the clean image, and the velocity follows from it: what a network must then bring
through its layers is an image and not its noise (Li & He, 2025, "Back to basics: let denoising generative models denoise").
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
LEAST_SIGMA = 0.05  # of the noise, by which the way to a predicted image is divided


class FlowMatching:
    """Leads from noise to images along a path. It has the interface of GaussianDiffusion, but times t (B,) are in [0, 1]."""

    def __init__(self, path, times, num_timesteps, time_scale, predict="velocity", time_shift=1.0):
        self.path, self.times, self.num_timesteps, self.time_scale = PATHS[path], TIMES[times], num_timesteps, time_scale
        self.predict, self.time_shift = predict, time_shift

    def progress(self, t):
        """Returns how far from noise, 0, to image, 1, the network is at what it is shown, time_scale times t."""
        return t / self.time_scale

    def draw_times(self, p):
        """Turns uniform random numbers p (B,) in [0, 1) into times for training."""
        return self.times(p) if self.time_shift == 1 else shifted(self.times(p), self.time_shift)

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
        """Asks the network for the velocity of x (B, C, H, W) at times t (B,), the first C of its channels or what follows from
        them: (B, C, H, W)."""
        output = model(x, self.time_scale * t, **(model_kwargs or {}))[:, : x.shape[1]]
        return output if self.predict == "velocity" else self.velocity_to(output, x, t)

    def velocity_to(self, image, x, t):
        """Computes the velocity that leads x at t to that image, on the linear path (u - x) / (1 - t). Near the end, where x
        has too little noise left to divide by, it divides by LEAST_SIGMA."""
        alpha, sigma, d_alpha, d_sigma = self.coefficients(t, x)
        return ((sigma * d_alpha - d_sigma * alpha) * image + d_sigma * x) / sigma.clamp(min=LEAST_SIGMA)

    def training_losses(self, model, x_start, t, model_kwargs=None, noise=None):
        """Computes the squared error of the velocity, Eq. (11), per image: a dict of "loss" and "mse", each (B,). A predicted
        image is judged by the velocity to it, beside that to the true one."""
        noise = torch.randn_like(x_start) if noise is None else noise
        alpha, sigma, d_alpha, d_sigma = self.coefficients(t, x_start)
        x = alpha * x_start + sigma * noise
        target = d_alpha * x_start + d_sigma * noise if self.predict == "velocity" else self.velocity_to(x_start, x, t)
        mse = (self.velocity(model, x, t, model_kwargs) - target).square().flatten(1).mean(1)
        return {"mse": mse, "loss": mse}

    def clean(self, x, t, velocity):
        """Computes the image that x and its velocity at t point to; on the linear path x + (1 - t) v, Eq. (13)."""
        alpha, sigma, d_alpha, d_sigma = self.coefficients(t, x)
        divided_by = sigma if self.predict == "velocity" else sigma.clamp(min=LEAST_SIGMA)
        return (divided_by * velocity - d_sigma * x) / (sigma * d_alpha - d_sigma * alpha)

    def noise(self, x, t, velocity):
        """Computes the noise that x and its velocity point back to, on the linear path x - t v. The score is -noise / sigma."""
        alpha, sigma, d_alpha, d_sigma = self.coefficients(t, x)
        if self.predict == "x":
            velocity = velocity * (sigma.clamp(min=LEAST_SIGMA) / sigma)  # as far as the image is, at any t before 1
        return (d_alpha * x - alpha * velocity) / (sigma * d_alpha - d_sigma * alpha)
