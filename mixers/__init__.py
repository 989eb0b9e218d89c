"""Token mixers by name. A mixer is a class with the constructor of timm's Attention that maps (B, N, D) to (B, N, D);
one that takes `grid_size` is told the (h, w) of its tokens."""

import inspect

from timm.models.vision_transformer import Attention

from pde_ssm import PDESSMBlock

MIXERS = {"attention": Attention, "pdessm": PDESSMBlock}


def build_mixer(mixer, dim, num_heads, grid_size, /, **options):
    """One mixer layer: `mixer` is a name in MIXERS or a class. ValueError for an unknown name or option."""
    if isinstance(mixer, str):
        if mixer not in MIXERS:
            raise ValueError(f"unknown mixer {mixer!r}; known: {', '.join(MIXERS)}")
        mixer = MIXERS[mixer]
    parameters = inspect.signature(mixer).parameters
    accepted = parameters.keys() - {"dim", "num_heads", "qkv_bias", "grid_size"}  # the model decides those
    if unknown := [name for name in options if name not in accepted]:
        raise ValueError(f"{mixer.__name__} has no option {', '.join(unknown)}")
    if "grid_size" in parameters:
        options["grid_size"] = grid_size
    return mixer(dim, num_heads=num_heads, qkv_bias=True, **options)
