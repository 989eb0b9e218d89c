"""Diffusion objectives and samplers for any callable (x, t, **kwargs); nothing here knows a model.

    ddpm.py, flow.py    the objectives: Gaussian diffusion and flow matching
    samplers.py         from noise to images, step by step
    guidance.py         classifier-free guidance of a network
    likelihood.py       how likely an image is under a network, in bits per dimension
    noise.py            random numbers that belong to images
    drawing.py          all of these together: from labels to pictures
"""

from machine.flags import above_zero

from .ddpm import GaussianDiffusion, beta_schedule, spaced_timesteps
from .flow import PATHS, PREDICTIONS, TIMES, FlowMatching
from .samplers import FLOW_SAMPLERS, MOST_STEPS, SAMPLERS


# fmt: off
def create_diffusion(
    timestep_respacing, noise_schedule="linear", use_kl=False, sigma_small=False, predict_xstart=False,
    learn_sigma=True, rescale_learned_sigmas=False, diffusion_steps=1000, min_snr=None,
):
    # fmt: on
    """Makes a Gaussian diffusion over `diffusion_steps` steps, visiting those that `timestep_respacing` keeps.

    timestep_respacing:     "" for all of them, "250" for 250 spread evenly, "10,15,20" for 10, 15 and 20 in the three thirds,
                            "ddim50" for 50 at an integer stride; see `spaced_timesteps`.
    noise_schedule:         "linear" (Ho et al., 2020) or "squaredcos_cap_v2" (Nichol & Dhariwal, 2021).
    predict_xstart:         the network predicts the clean image instead of the noise.
    learn_sigma:            the network also predicts the variance, as twice the channels; else it is fixed, to beta, or
                            with sigma_small to that of the true posterior.
    use_kl:                 the loss is the variational bound in bits per dimension, summed over timesteps; else it is
                            the mean squared error, plus with learn_sigma the bound for the variance alone.
    rescale_learned_sigmas: weight that bound by num_timesteps / 1000.
    min_snr:                weight the squared error of the clean image by the signal-to-noise ratio, clipped at min_snr.

    ValueError for an unknown schedule, an impossible respacing, or min_snr together with use_kl.
    """
    if use_kl and min_snr is not None:
        raise ValueError(f"min_snr={min_snr} weights squared errors, of which a loss with use_kl has none")
    betas = beta_schedule(noise_schedule, diffusion_steps)
    return GaussianDiffusion(
        betas, spaced_timesteps(diffusion_steps, timestep_respacing or str(diffusion_steps)),
        predict_xstart=predict_xstart, learn_sigma=learn_sigma, sigma_small=sigma_small,
        use_kl=use_kl, rescale_bound=rescale_learned_sigmas, min_snr=min_snr,
    )  # fmt: skip


def create_flow(num_timesteps=50, path="linear", times="uniform", time_scale=1000, predict="velocity", time_shift=1.0):
    """Makes flow matching with the interface of `create_diffusion`.

    num_timesteps: steps of the samplers; training uses none.
    path:          "linear", the paper's, or "cosine", which keeps the variance.
    times:         how training draws t: "uniform" or "logit-normal".
    time_scale:    the network sees time_scale times t.
    predict:       what the network's output is: "velocity", or "x", the clean image.
    time_shift:    moves training times and the samplers' steps towards the noise; 1 does not move them; see `flow.shifted`.

    ValueError for a path, times or a prediction that are unknown, fewer than one step, or a time_shift that is not above 0.
    """
    if path not in PATHS or times not in TIMES or predict not in PREDICTIONS or num_timesteps < 1:
        known = f"paths: {', '.join(PATHS)}; times: {', '.join(TIMES)}; predictions: {', '.join(PREDICTIONS)}; at least 1 step"
        asked = f"path {path!r}, times {times!r}, prediction {predict!r} and {num_timesteps} steps"
        raise ValueError(f"no flow with {asked}; known {known}")
    if not time_shift > 0:
        raise ValueError(f"a flow's time_shift is above 0, not {time_shift}")
    return FlowMatching(path, times, num_timesteps, time_scale, predict, time_shift)


def create_objective(name, num_timesteps=None, learn_sigma=True, min_snr=None, **flow):
    """Makes the objective that a --objective flag names, "diffusion" or "flow", with num_timesteps to sample; by default
    those of training. learn_sigma and min_snr are diffusion's, and the other settings are those of `create_flow`.

    One step of diffusion starts from pure noise; create_diffusion("1") visits timestep 0, as its public counterpart does,
    where nearly no noise is left.
    """
    if name == "diffusion" and num_timesteps == 1:
        return GaussianDiffusion(beta_schedule("linear", 1000), [999], learn_sigma=learn_sigma)
    if name == "diffusion":
        return create_diffusion("" if num_timesteps is None else str(num_timesteps), learn_sigma=learn_sigma, min_snr=min_snr)
    return create_flow(num_timesteps or 1, **flow)


def create_sampler(objective, sampler=None, steps=250, **settings):
    """Returns (objective, sampler function) to sample from a trained network in that many steps.

    objective: its name, one of OBJECTIVES, for which the network was trained.
    sampler:   a name among SAMPLERS or FLOW_SAMPLERS; without it, ddpm for diffusion and euler for flows.
    settings:  of `create_objective`: path, time_scale, predict, time_shift and learn_sigma.

    ValueError for a sampler of the other objective, or more steps than it takes.
    """
    samplers = SAMPLERS if objective == "diffusion" else FLOW_SAMPLERS
    sampler = sampler or next(iter(samplers))
    if sampler not in samplers:
        raise ValueError(f"--sampler {sampler}: the checkpoint's objective is {objective}, for {', '.join(samplers)}")
    if steps > MOST_STEPS.get(sampler, steps):
        raise ValueError(f"--num-sampling-steps {steps}: {sampler} takes at most {MOST_STEPS[sampler]} of training's 1000")
    return create_objective(objective, steps, **settings), samplers[sampler]


def add_objective_flags(add):
    """Adds the flags of train.py that choose the training objective: `add` is add_argument of its parser."""
    add("--objective", choices=OBJECTIVES, default="diffusion", help="diffusion as in DiT, or flow matching")
    add("--path", choices=PATHS, help="of flow matching, from noise to image; linear unless given")
    add("--times", choices=TIMES, help="how flow matching draws its times; uniform unless given")
    add("--predict", choices=PREDICTIONS, help="of flow matching: the velocity, or x, the clean image; velocity unless given")
    more = "of flow matching: move training times and sampling steps towards the noise, as in SD3; 1 unless given"
    add("--time-shift", type=above_zero, metavar="S", help=more)
    snr = "of diffusion: weight squared errors of the image by the signal-to-noise ratio, at most GAMMA (5 is usual)"
    add("--min-snr", type=above_zero, metavar="GAMMA", help=snr)


def objective_settings(settings):
    """Returns the settings for `create_objective` that `settings`, a dict of a command's flags, contains. ValueError for those
    of the other objective."""
    given = {name: settings[name] for name in (*FLOWS, *DIFFUSIONS) if settings.get(name)}
    other, objective = (DIFFUSIONS, "flow") if settings["objective"] == "flow" else (FLOWS, "diffusion")
    if foreign := [f"--{name}".replace("_", "-") for name in given if name in other]:
        raise ValueError(f"{', '.join(foreign)} means nothing to --objective {objective}")
    return given


OBJECTIVES = ("diffusion", "flow")
FLOWS, DIFFUSIONS = ("path", "times", "predict", "time_shift"), ("min_snr",)  # settings of each
