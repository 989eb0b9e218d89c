"""Samplers: functions of an objective, a network (x, t, **model_kwargs) and noise x (B, C, H, W) that return images like x.

Samplers that draw noise call `randn_like(x)` once per step, the last one included, whatever else they do: the same generator
state gives the same images. Pass a `noise.PerImageNoise` to make each image depend on a seed of its own and not on its batch.
"""

import torch
from tqdm import tqdm


@torch.no_grad()
def ddpm(
    diffusion, model, x, *, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None, progress=False,
    randn_like=torch.randn_like,
):  # fmt: skip
    """Draws by ancestral sampling (Ho et al., 2020). cond_fn(x, t, **model_kwargs), the gradient of log p(y | x), guides."""
    kwargs = model_kwargs or {}
    for t in _countdown(diffusion, x, progress):
        p = diffusion.p_mean_variance(model, x, t, clip_denoised, denoised_fn, kwargs)
        noise = randn_like(x)
        mean = p["mean"]
        if cond_fn is not None:
            mean = mean + p["variance"] * cond_fn(x, diffusion.model_timesteps(t), **kwargs)
        x = torch.where(t.view(-1, 1, 1, 1) > 0, mean + (p["log_variance"] / 2).exp() * noise, mean)
    return x


@torch.no_grad()
def ddim(
    diffusion, model, x, *, eta=0.0, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None,
    progress=False, randn_like=torch.randn_like,
):  # fmt: skip
    """Draws by DDIM (Song et al., 2021, Eq. 12), deterministic at eta = 0. cond_fn as in `ddpm`, applied to the noise."""
    kwargs = model_kwargs or {}
    for t in _countdown(diffusion, x, progress):
        x_start = diffusion.p_mean_variance(model, x, t, clip_denoised, denoised_fn, kwargs)["pred_xstart"]
        predicted = diffusion.predict_noise(x, t, x_start)
        if cond_fn is not None:
            gradient = cond_fn(x, diffusion.model_timesteps(t), **kwargs)
            predicted = predicted - diffusion.table("noise", t, x) * gradient
            x_start = diffusion.predict_start(x, t, predicted)
        abar, before = diffusion.table("abar", t, x), diffusion.table("abar_prev", t, x)
        sigma = eta * ((1 - before) / (1 - abar) * (1 - abar / before)).sqrt()
        noise = randn_like(x)
        rest = (1 - before - sigma**2).clamp(min=0).sqrt()                # at eta = 1 rounding may take it below 0
        x = before.sqrt() * x_start + rest * predicted + (t.view(-1, 1, 1, 1) > 0) * sigma * noise
    return x


@torch.no_grad()
def dpm_solver(diffusion, model, x, *, clip_denoised=True, model_kwargs=None, progress=False, randn_like=torch.randn_like):
    """Draws by DPM-Solver++ of second order (Lu et al., 2022), through diffusers' scheduler: few steps without noise.

    Visits num_timesteps of the timesteps of training, chosen by the scheduler. ValueError if those are all.
    """
    from diffusers import DPMSolverMultistepScheduler

    betas = diffusion.training_betas.numpy()
    if diffusion.num_timesteps >= len(betas):
        raise ValueError(f"dpm-solver takes fewer steps than training's {len(betas)}, not {diffusion.num_timesteps}")
    scheduler = DPMSolverMultistepScheduler(len(betas), trained_betas=betas, prediction_type="sample")
    scheduler.set_timesteps(diffusion.num_timesteps)
    for step in tqdm(scheduler.timesteps.tolist(), disable=not progress):
        output = model(x, torch.full((len(x),), step, device=x.device), **(model_kwargs or {}))
        prediction = output.chunk(2, dim=1)[0] if diffusion.learn_sigma else output
        if not diffusion.predict_xstart:
            abar = scheduler.alphas_cumprod[step].item()
            prediction = (x - (1 - abar) ** 0.5 * prediction) / abar**0.5
        x = scheduler.step(prediction.clamp(-1, 1) if clip_denoised else prediction, step, x).prev_sample
    return x


def _countdown(diffusion, x, progress):
    """Yields the timesteps of a batch from the noisiest to 0, each (B,)."""
    for step in tqdm(reversed(range(diffusion.num_timesteps)), total=diffusion.num_timesteps, disable=not progress):
        yield torch.full((len(x),), step, device=x.device)


@torch.no_grad()
def euler(flow, model, x, *, clip_denoised=True, model_kwargs=None, progress=False, randn_like=torch.randn_like):
    """Follows the velocity of a flow from t = 0 to 1 in its steps; the error falls with the step."""
    for _, t, dt in _count_up(flow, x, progress):
        x = x + dt * flow.velocity(model, x, t, model_kwargs)
    return _clip(x, clip_denoised)


@torch.no_grad()
def heun(flow, model, x, *, clip_denoised=True, model_kwargs=None, progress=False, randn_like=torch.randn_like):
    """Follows the mean of the velocities at both ends of each step, by two calls of the network per step: second order. If the
    network predicts the image, the last step goes to that image, since at t = 1 it determines no velocity."""
    for left, t, dt in _count_up(flow, x, progress):
        here = flow.velocity(model, x, t, model_kwargs)
        if not left and flow.predict == "x":
            return _clip(flow.clean(x, t, here), clip_denoised)
        there = flow.velocity(model, x + dt * here, (t + dt).clamp(max=1), model_kwargs)  # rounding may go beyond 1
        x = x + dt / 2 * (here + there)
    return _clip(x, clip_denoised)


# Dormand and Prince's method of order 5 (1980). Each stage has its place in the step and its weights of the velocities before
# it; the last stage is the end of the step. DIFFERENCE weighs the velocities to give the difference to the result of order 4.
STAGES = (
    (1 / 5, (1 / 5,)),
    (3 / 10, (3 / 40, 9 / 40)),
    (4 / 5, (44 / 45, -56 / 15, 32 / 9)),
    (8 / 9, (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729)),
    (1, (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656)),
    (1, (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84)),
)
DIFFERENCE = (71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
LAST = 0.01  # part of the way from noise to image that rk45's last step covers if the network predicts the image
SHORTEST = 1e-4  # rk45 takes this step whatever its error: velocities may jump, for example where guidance begins or ends


@torch.no_grad()
def rk45(
    flow, model, x, *, clip_denoised=True, model_kwargs=None, progress=False, randn_like=torch.randn_like,
    rtol=1e-5, atol=1e-5,
):  # fmt: skip
    """Follows the velocity by Dormand and Prince's method with adaptive steps, six calls of the network each; num_timesteps
    and time_shift mean nothing to it.

    Every image has its own steps, so that it does not depend on its neighbours, and waits at t = 1 for the slowest one. Steps
    are not shorter than SHORTEST, except the last, which covers the remaining way. If the network predicts the image, the steps
    end LAST before t = 1, and a final step goes to that image.
    """

    end_of_way = 1 if flow.predict == "velocity" else 1 - LAST

    def velocity(x, left):                                                 # (B, C, H, W), (B,)
        return flow.velocity(model, x, (end_of_way - left).to(x.dtype), model_kwargs)

    left = torch.full((len(x),), end_of_way, dtype=torch.float64, device=x.device)  # (B,) of the way from noise to image
    step = torch.full_like(left, 0.01)
    velocities = [velocity(x, left)]
    while left.any():
        step = torch.minimum(step, left)
        dt = step.to(x.dtype).view(-1, *[1] * (x.ndim - 1))
        for place, weights in STAGES:
            end = x + dt * sum(w * v for w, v in zip(weights, velocities))
            velocities.append(velocity(end, left - place * step))
        error = dt * sum(w * v for w, v in zip(DIFFERENCE, velocities))
        error = (error / (atol + rtol * torch.maximum(x.abs(), end.abs()))).flatten(1).square().mean(1).sqrt().double()
        error = error.nan_to_num(0, 0)  # accept steps of images that are not finite: shorter ones would not help
        taken = (error <= 1) | (step <= SHORTEST)                          # (B,)
        left = torch.where(taken, left - step, left)
        here = taken.view(dt.shape)
        x, velocities = torch.where(here, end, x), [torch.where(here, velocities[-1], velocities[0])]
        step = (step * (0.9 * error**-0.2).clamp(0.2, 10)).clamp(min=SHORTEST)
    if flow.predict == "x":
        x = flow.clean(x, end_of_way - left, velocities[0])
    return _clip(x, clip_denoised)


@torch.no_grad()
def sde(flow, model, x, *, clip_denoised=True, model_kwargs=None, progress=False, randn_like=torch.randn_like):
    """Follows the stochastic process of the flow's marginals by Euler and Maruyama, dx = (v + sigma s / 2) dt + sqrt(sigma) dW.

    s = -noise / sigma is the score, so the drift loses noise / 2 to compensate for the noise that dW adds. The last step goes
    to the clean image, since no later step would remove its noise.
    """
    for _, t, dt in _count_up(flow, x, progress):
        velocity = flow.velocity(model, x, t, model_kwargs)
        _, sigma, _, _ = flow.coefficients(t, x)
        clean, noise = flow.clean(x, t, velocity), randn_like(x)
        x = x + dt * (velocity - flow.noise(x, t, velocity) / 2) + (dt * sigma).sqrt() * noise
    return _clip(clean, clip_denoised)


def _count_up(flow, x, progress):
    """Yields, for every step, the number of steps left after it, its start time (B,), and its length."""
    for number, (start, length) in enumerate(tqdm(flow.steps(), disable=not progress), start=1):
        yield flow.num_timesteps - number, torch.full((len(x),), start, device=x.device, dtype=x.dtype), length


def _clip(x, clip_denoised):
    return x.clamp(-1, 1) if clip_denoised else x


SAMPLERS = {"ddpm": ddpm, "ddim": ddim, "dpm-solver": dpm_solver}
FLOW_SAMPLERS = {"euler": euler, "heun": heun, "rk45": rk45, "sde": sde}
MOST_STEPS = {"ddpm": 1000, "ddim": 1000, "dpm-solver": 999}  # of training's 1000; others take any number
