"""Gaussian diffusion with learned variances (Ho et al., 2020; Nichol & Dhariwal, 2021): its tables and their use.

Notation: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise, abar_t = product of (1 - beta_s) for s <= t.
"""

import math
from contextlib import suppress

import torch

from . import samplers


def beta_schedule(name, steps):
    """Returns the variances beta_t of each step's noise: (steps,) float64. ValueError for an unknown name, or if a variance
    would not be below 1."""
    if name == "linear" and steps <= 20:
        raise ValueError(f"a linear noise schedule takes more than 20 steps, not {steps}: its last variance is 20 / {steps}")
    if name == "linear":
        return torch.linspace(0.1 / steps, 20 / steps, steps, dtype=torch.float64)
    if name == "squaredcos_cap_v2":
        angle = (torch.arange(steps + 1, dtype=torch.float64) / steps + 0.008) / 1.008 * math.pi / 2
        abar = angle.cos() ** 2
        return (1 - abar[1:] / abar[:-1]).clamp(max=0.999)
    raise ValueError(f"unknown noise schedule {name!r}; known: linear, squaredcos_cap_v2")


def spaced_timesteps(steps, respacing):
    """Lists which of `steps` timesteps to visit, in rising order.

    respacing is a count per section, "10,15,20" or a list, the sections being equal parts of the whole; or "ddimN":
    exactly N timesteps at the smallest integer stride that gives them. ValueError if there are no such timesteps.
    """
    if isinstance(respacing, str) and respacing.startswith("ddim"):
        count = _positive(respacing[4:], respacing)
        for stride in range(1, steps + 1):
            if len(range(0, steps, stride)) == count:
                return list(range(0, steps, stride))
        raise ValueError(f"no integer stride takes exactly {count} of {steps} timesteps")
    counts = respacing.split(",") if isinstance(respacing, str) else respacing
    counts = [_positive(count, respacing) for count in counts]
    chosen, start = [], 0
    for i, count in enumerate(counts):
        size = steps // len(counts) + (i < steps % len(counts))
        if count > size:
            raise ValueError(f"cannot take {count} timesteps from a section of {size} ({respacing!r} of {steps})")
        # Adding the stride up, instead of multiplying, decides ties as the published timesteps have them.
        stride, position = (size - 1) / max(count - 1, 1), 0.0
        for _ in range(count):
            chosen.append(start + round(position))
            position += stride
        start += size
    return chosen


class GaussianDiffusion:
    """Diffuses images into noise, and reads a network's outputs; `create_diffusion` makes it.

    Timesteps t (B,) count the visited steps, 0 the cleanest; the network is shown `timestep_map[t]`. Tables are float64
    tensors (num_timesteps,).
    """

    def __init__(
        self, betas, timestep_map, *, predict_xstart=False, learn_sigma=True, sigma_small=False, use_kl=False,
        rescale_bound=False, min_snr=None,
    ):  # fmt: skip
        self.predict_xstart, self.learn_sigma, self.sigma_small = predict_xstart, learn_sigma, sigma_small
        self.use_kl, self.rescale_bound, self.min_snr = use_kl, rescale_bound, min_snr
        self.timestep_map = list(timestep_map)
        self.num_timesteps, self.training_betas = len(self.timestep_map), betas

        abar = (1 - betas).cumprod(0)[self.timestep_map]
        before = torch.cat([abar.new_ones(1), abar[:-1]])
        self.betas = 1 - abar / before if self.num_timesteps < len(betas) else betas
        self.alphas_cumprod, self.alphas_cumprod_prev = abar, before
        self.posterior_variance = self.betas * (1 - before) / (1 - abar)
        # At timestep 0 the posterior's variance is 0, which has no logarithm: it takes timestep 1's, or beta if there is none.
        positive = self.posterior_variance if self.num_timesteps > 1 else self.betas
        self.posterior_log_variance_clipped = _first_from_second(positive).log()
        self._tables = {"cpu": dict(
            t=torch.tensor(self.timestep_map), signal=abar.sqrt(), noise=(1 - abar).sqrt(),
            recip_signal=(1 / abar).sqrt(), noise_to_signal=(1 / abar - 1).sqrt(),
            mean_x0=self.betas * before.sqrt() / (1 - abar), mean_xt=(1 - before) * (1 - self.betas).sqrt() / (1 - abar),
            log_beta=self.betas.log(), log_beta_large=_first_from_second(self.betas, self.posterior_variance).log(),
            log_posterior=self.posterior_log_variance_clipped, abar=abar, abar_prev=before,
        )}  # fmt: skip

    def _tables_on(self, device):
        """Returns all tables that are looked up by t, on a device; they are cached per device."""
        if str(device) not in self._tables:
            self._tables[str(device)] = {name: table.to(device) for name, table in self._tables["cpu"].items()}
        return self._tables[str(device)]

    def table(self, name, t, x):
        """Looks up the entries t (B,) of a table, in the type of x and shaped to multiply it."""
        entries = self._tables_on(t.device)[name][t].to(x.dtype)
        return entries.view(-1, *[1] * (x.ndim - 1))

    def model_timesteps(self, t):
        """Returns the timesteps that the network sees for t (B,)."""
        return self._tables_on(t.device)["t"][t]

    def progress(self, t):
        """Returns the progress from noise, 0, to image, 1, at the timestep t that the network sees."""
        return 1 - t / len(self.training_betas)

    def draw_times(self, p):
        """Turns uniform random numbers p (B,) in [0, 1) into timesteps for training."""
        return (p * self.num_timesteps).long().clamp(max=self.num_timesteps - 1)  # p may have been rounded to 1

    def q_sample(self, x_start, t, noise=None):
        """Makes x_t from x_0 and noise, which is drawn if it is not given."""
        noise = torch.randn_like(x_start) if noise is None else noise
        return self.table("signal", t, x_start) * x_start + self.table("noise", t, x_start) * noise

    def posterior_mean(self, x_start, x_t, t):
        """Computes the mean of x_{t-1} given x_t and x_0."""
        return self.table("mean_x0", t, x_t) * x_start + self.table("mean_xt", t, x_t) * x_t

    def predict_noise(self, x_t, t, x_start):
        """Computes the noise that makes x_t out of x_0."""
        return (self.table("recip_signal", t, x_t) * x_t - x_start) / self.table("noise_to_signal", t, x_t)

    def predict_start(self, x_t, t, noise):
        """Computes the x_0 from which that noise makes x_t."""
        return self.table("recip_signal", t, x_t) * x_t - self.table("noise_to_signal", t, x_t) * noise

    def p_mean_variance(self, model, x, t, clip_denoised=True, denoised_fn=None, model_kwargs=None):
        """Predicts x_{t-1} given x_t by the network: a dict of mean, variance, log_variance and pred_xstart, each like x.

        denoised_fn and then, with clip_denoised, a clamp to [-1, 1] are applied to the predicted clean image.
        """
        output = model(x, self.model_timesteps(t), **(model_kwargs or {}))
        return self._read(output, x, t, clip_denoised, denoised_fn)

    def _read(self, output, x, t, clip_denoised=False, denoised_fn=None):
        prediction, log_variance = self._split(output, x, t)
        x_start = prediction if self.predict_xstart else self.predict_start(x, t, prediction)
        if denoised_fn is not None:
            x_start = denoised_fn(x_start)
        if clip_denoised:
            x_start = x_start.clamp(-1, 1)
        mean = self.posterior_mean(x_start, x, t)
        return dict(mean=mean, variance=log_variance.exp(), log_variance=log_variance, pred_xstart=x_start)

    def _split(self, output, x, t):
        """Splits the network's output into (prediction of noise or clean image, log variance), each like x."""
        if not self.learn_sigma:
            table = "log_posterior" if self.sigma_small else "log_beta_large"
            return output, self.table(table, t, x).expand_as(x)
        if output.shape[1] != 2 * x.shape[1]:
            raise ValueError(f"learned variances need {2 * x.shape[1]} output channels; the network has {output.shape[1]}")
        # The variance lies between that of the posterior, at -1, and beta, at 1, on a logarithmic scale.
        prediction, position = output.chunk(2, dim=1)
        weight = (position.to(x.dtype) + 1) / 2                            # the network may run under autocast
        return prediction, torch.lerp(self.table("log_posterior", t, x), self.table("log_beta", t, x), weight)

    def training_losses(self, model, x_start, t, model_kwargs=None, noise=None):
        """Computes the losses of predicting the noise in q_sample(x_start, t), or x_start: a dict of (B,) tensors.

        "loss" is what to minimise; "mse" and "vb" (bits per dimension) are its parts where it has them.
        """
        noise = torch.randn_like(x_start) if noise is None else noise
        x_t = self.q_sample(x_start, t, noise)
        output = model(x_t, self.model_timesteps(t), **(model_kwargs or {}))
        if self.use_kl:
            return {"loss": self.num_timesteps * self._bound(output, x_start, x_t, t)}
        terms, prediction = {}, output
        if self.learn_sigma:
            # The bound teaches the variance alone: the mean is left to the squared error.
            prediction, position = output.chunk(2, dim=1)
            bound = self._bound(torch.cat([prediction.detach(), position], dim=1), x_start, x_t, t)
            terms["vb"] = bound * (self.num_timesteps / 1000 if self.rescale_bound else 1)
        target = x_start if self.predict_xstart else noise
        terms["mse"] = (target - prediction).square().flatten(1).mean(1)
        weight = 1 if self.min_snr is None else self.weight(t, terms["mse"])
        return terms | {"loss": weight * terms["mse"] + terms.get("vb", 0)}

    def weight(self, t, x):
        """Computes the weights of the squared errors at timesteps t, like x (B,): those of the clean image are weighted by the
        signal-to-noise ratio abar / (1 - abar), at most min_snr (Hang et al., 2023), and the noise's accordingly."""
        snr = (self.table("signal", t, x) / self.table("noise", t, x)).square()
        return snr.clamp(max=self.min_snr) / (1 if self.predict_xstart else snr)

    def _bound(self, output, x_start, x_t, t):
        """Computes one term of the variational bound, in bits per dimension: (B,)."""
        p = self._read(output, x_t, t)
        posterior = self.posterior_mean(x_start, x_t, t)
        divergence = gaussian_kl(posterior, self.table("log_posterior", t, x_t), p["mean"], p["log_variance"])
        nats = torch.where(
            (t == 0).view(-1, *[1] * (x_t.ndim - 1)),
            -pixel_log_likelihood(x_start, p["mean"], p["log_variance"] / 2),
            divergence,
        )
        return nats.flatten(1).mean(1) / math.log(2)

    # fmt: off
    def p_sample_loop(
        self, model, shape, noise=None, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None,
        device=None, progress=False, randn_like=torch.randn_like,
    ):
        # fmt: on
        """Draws by ancestral sampling from x_T = noise: (B, C, H, W). See samplers.ddpm."""
        x = _initial_noise(model, shape, noise, device)
        options = dict(clip_denoised=clip_denoised, denoised_fn=denoised_fn, cond_fn=cond_fn, model_kwargs=model_kwargs)
        return samplers.ddpm(self, model, x, progress=progress, randn_like=randn_like, **options)

    # fmt: off
    def ddim_sample_loop(
        self, model, shape, noise=None, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None,
        device=None, progress=False, eta=0.0, randn_like=torch.randn_like,
    ):
        # fmt: on
        """Draws by DDIM from x_T = noise: (B, C, H, W); eta = 1 is as noisy as DDPM. See samplers.ddim."""
        x = _initial_noise(model, shape, noise, device)
        options = dict(clip_denoised=clip_denoised, denoised_fn=denoised_fn, cond_fn=cond_fn, model_kwargs=model_kwargs)
        return samplers.ddim(self, model, x, eta=eta, progress=progress, randn_like=randn_like, **options)


def gaussian_kl(mean1, log_variance1, mean2, log_variance2):
    """Computes the KL divergence of two Gaussians, elementwise, in nats."""
    gap = log_variance1 - log_variance2
    return (gap.exp() - gap - 1 + (mean1 - mean2).square() * (-log_variance2).exp()) / 2


def pixel_log_likelihood(x, mean, log_scale):
    """Computes the log probability, in nats, of the 2/255-wide bin around each pixel x in [-1, 1] under a Gaussian.

    The outermost bins reach to infinity. Probabilities below 1e-12 count as that, and the normal distribution function
    is the approximation (1 + tanh(sqrt(2 / pi) (z + 0.044715 z^3))) / 2: the published losses rest on both.
    """
    upper, lower = ((x - mean + side / 255) * (-log_scale).exp() for side in (1, -1))
    below_upper, below_lower = ((1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))) / 2 for z in (upper, lower))
    probability = torch.where(x < -0.999, below_upper, torch.where(x > 0.999, 1 - below_lower, below_upper - below_lower))
    return probability.clamp(min=1e-12).log()


def _initial_noise(model, shape, noise, device):
    if noise is not None:
        return noise
    if device is None:
        device = next(model.parameters()).device
    return torch.randn(*shape, device=device)


def _first_from_second(table, second=None):
    """Returns `table` with its first entry replaced by the second one of `second` (of itself by default)."""
    second = table if second is None else second
    return torch.cat([second[1:2], table[1:]]) if len(table) > 1 else table


def _positive(count, respacing):
    with suppress(ValueError):
        if int(count) > 0:
            return int(count)
    raise ValueError(f"timestep_respacing counts timesteps, like '250', '10,15,20' or 'ddim50'; it is {respacing!r}")
