"""Compares this repository's DiT, diffusion and centre crop with those of a checkout of DiT: overlay.py --check."""

import math

import numpy as np
import torch
from PIL import Image
from torch import nn

from comparing.checkouts import load
from comparing.exchange import shapes
from diffusion import create_diffusion
from images.dataset import center_crop_arr
from models import DiT_models

SIDE = 32  # of the latents of a 256 x 256 image
DIFFUSIONS = [
    ("", {}),
    ("", dict(predict_xstart=True)),
    ("", dict(use_kl=True)),
    ("", dict(rescale_learned_sigmas=True)),
    ("10", {}),
    ("10,15,20", {}),
    ("ddim25", {}),
    ("10", dict(noise_schedule="squaredcos_cap_v2")),
    ("10", dict(learn_sigma=False)),
    ("10", dict(learn_sigma=False, sigma_small=True)),
    ("10", dict(predict_xstart=True)),
    ("20", dict(diffusion_steps=500, rescale_learned_sigmas=True)),
]
CROPS = [(64, 64, 64), (640, 481, 256), (333, 1000, 128), (37, 51, 32), (513, 512, 256)]  # width, height and side


def check(folder):
    """Compares this repository's DiT, diffusion and centre crop with those of a checkout of DiT.

    Returns a list of dicts: what was compared; difference, the largest relative to the largest value, or how many names or
    shapes differ; limit; and agrees. OSError or ValueError if the folder is not such a checkout.
    """
    their_models, their_diffusion, their_train = load(folder, "models", "diffusion", "train")
    if not hasattr(their_models, "DiT_models"):
        raise ValueError(f"models.py of {folder} has no DiT_models: --check is for DiT and its like, --diff for any child")
    rows = []

    def compare(what, difference, limit):
        rows.append(dict(what=what, difference=difference, limit=limit, agrees=difference <= limit))

    builds = {name: (DiT_models[name], build) for name, build in their_models.DiT_models.items() if name in DiT_models}
    for name, pair in builds.items():
        with torch.device("meta"):
            ours, theirs = (layout(build()) for build in pair)
        compare(f"{name}: {len(theirs)} names and shapes", sum(ours.get(k) != theirs.get(k) for k in ours | theirs), 0)
    for row, (name, pair) in zip(rows[:], builds.items()):
        if "-S/" not in name or not row["agrees"]:
            continue
        outputs = [network_outputs(model) for model in same_weights(*pair)]
        for what, ours in outputs[0].items():
            compare(f"{name}: {what}", distance(ours, outputs[1][what]), 1e-5)
    for respacing, options in DIFFUSIONS:
        outputs = [
            diffusion_outputs(create(respacing, **options), options)
            for create in (create_diffusion, their_diffusion.create_diffusion)
        ]
        what = ", ".join([repr(respacing), *(f"{name}={value!r}" for name, value in options.items())])
        compare(f"create_diffusion({what})", distance(*outputs), 1e-5)
    for width, height, side in CROPS:
        image = Image.fromarray(torch.randint(0, 256, (height, width, 3), dtype=torch.uint8).numpy())
        crops = [{"": torch.from_numpy(np.array(f(image, side)))} for f in (center_crop_arr, their_train.center_crop_arr)]
        compare(f"centre crop of {width} x {height} to {side}", distance(*crops), 0)
    return rows


def layout(model):
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name: (tuple(w.shape), w.dtype, name in trained) for name, w in model.state_dict().items()}


def distance(ours, theirs):
    """Returns the largest difference in two dicts of tensors, each relative to the largest value of its own tensor."""
    if shapes(ours) != shapes(theirs):
        return math.inf
    pairs = [(a.double(), theirs[name].double()) for name, a in ours.items()]
    return torch.stack([(a - b).abs().max() / b.abs().max().clamp(min=1e-12) for a, b in pairs]).max().item()  # or NaN


def same_weights(*builds):
    """Builds a model of each, all with the weights of the last. Zeros, which make every block the identity, become random."""
    models = [build(input_size=SIDE, class_dropout_prob=0.5) for build in builds]
    for parameter in models[-1].parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    for model in models[:-1]:
        model.load_state_dict(models[-1].state_dict())
    return models


def network_outputs(model):
    """Computes {what: {name: tensor}} of a DiT in evaluation and training, at the same inputs and random numbers."""
    torch.manual_seed(1)
    x, t = torch.randn(4, model.in_channels, SIDE, SIDE), torch.tensor([0.0, 17, 501, 999])
    y, null = torch.tensor([3, 990, 14, 207]), torch.full((2,), 1000)
    model.eval()
    with torch.no_grad():
        plain = {"": model(x, t, y)}
        guided = {"": model.forward_with_cfg(x, t, torch.cat([y[:2], null]), 4.0)}
    torch.manual_seed(2)
    dropped = model.train()(x, t, y)
    (dropped * torch.randn_like(dropped)).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"forward": plain, "guided forward": guided, "dropped labels": {"": dropped.detach()}, "gradients": gradients}


def diffusion_outputs(diffusion, options):
    """Computes {what: tensor} of a diffusion and its samplers on a network without weights."""

    def network(x, t):
        noise = torch.tanh(x + t.view(-1, 1, 1, 1) / 1000)
        return noise if options.get("learn_sigma") is False else torch.cat([noise, x.sin()], dim=1)

    torch.manual_seed(3)
    steps = diffusion.num_timesteps
    x, noise = torch.randn(2, 6, 3, 8, 8)
    t = torch.linspace(0, steps - 1, 6).round().long()
    outputs = {"steps": torch.tensor([steps]), "x_t": diffusion.q_sample(x, t, noise)}
    outputs |= diffusion.training_losses(network, x, t, noise=noise)
    if steps <= 100:
        for clip in (True, False):
            how = dict(noise=noise, clip_denoised=clip, device="cpu")
            outputs[f"ddpm, {clip}"] = diffusion.p_sample_loop(network, x.shape, **how)
            for eta in (0.0, 0.7):
                outputs[f"ddim, {clip}, {eta}"] = diffusion.ddim_sample_loop(network, x.shape, eta=eta, **how)
    return outputs


def check_table(rows):
    lines = ["{:<72} {:>10} {:>8}".format("", "difference", "limit")]
    for row in rows:
        numbers = (format(row[name], "d" if isinstance(row[name], int) else ".1e") for name in ("difference", "limit"))
        lines.append("{:<72} {:>10} {:>8}".format(row["what"], *numbers) + ("" if row["agrees"] else "   DISAGREES"))
    return "\n".join(lines)
