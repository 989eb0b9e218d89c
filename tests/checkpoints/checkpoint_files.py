"""Checkpoints for tests: as train.py writes them, as other tools do, and spoilt."""

import os

from checkpoints import export
from checkpoints.build import save_checkpoint
from models import DiT_models
from pde_ssm import TERMS

PIXELS = dict(input_size=16, in_channels=3, num_classes=10)
PAPERS = dict(
    coupling="diagonal", groups=1, state_dim=None, terms=TERMS, components=1, activation=False, gate=False, local=False,
    conditioned=False,
)  # fmt: skip
OBJECTIVE = dict(objective="diffusion", path="linear", predict="velocity", time_shift=1.0, time_scale=1000, learn_sigma=True)
SETTINGS = dict(
    model="DiT-N/4", mixer="pdessm", mixer_options=PAPERS, mlp="gelu", num_classes=10, image_size=16, in_channels=3, vae="none",
    **OBJECTIVE,
)  # fmt: skip
ATTENTION = dict(mixer="attention", mixer_options=dict(qk_norm=False))


def given_flags(**given):
    return {name: given.get(name) for name in SETTINGS}


def write_checkpoint(path, mixer="pdessm", options=None, learn_sigma=True, **changes):
    """A checkpoint as train.py writes it; returns the model."""
    model = DiT_models["DiT-N/4"](**PIXELS, mixer=mixer, learn_sigma=learn_sigma, **options or {})
    args = dict(model="DiT-N/4", mixer=mixer, vae="none", num_classes=10, image_size=16, objective="diffusion")
    save_checkpoint(path, **dict(model=model.state_dict(), ema=model.state_dict(), opt={}, args=args) | changes)
    return model


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def truncated(path):
    path.write_bytes(path.read_bytes()[:-5000])


def text(path):
    path.write_text("not weights")


def empty(path):
    path.write_bytes(b"")


def garbage(path):
    path.write_bytes(bytes(range(256)) * 50)


def write_as(path, *flags):
    export.export(**vars(export.parse_args([str(path), *map(str, flags)])))
