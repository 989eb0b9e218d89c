"""Token mixers by name. A mixer is a class with the constructor of timm's Attention that maps (B, N, D) to (B, N, D);
one that takes `grid_size` is told the (h, w) of its tokens, and one with a true `conditioned` gets the blocks'
conditioning vector (B, D) as second argument."""

import inspect
from functools import partial

from timm.models.vision_transformer import Attention

from pde_ssm import PRESETS, PDESSMBlock

MIXERS = {"attention": Attention} | {name: partial(PDESSMBlock, **options) for name, options in PRESETS.items()}


def build_mixer(mixer, dim, num_heads, grid_size, /, **options):
    """One mixer layer: `mixer` is a name in MIXERS or a class. ValueError for an unknown name or option."""
    if isinstance(mixer, str) and mixer not in MIXERS:
        raise ValueError(f"unknown mixer {mixer!r}; known: {', '.join(MIXERS)}")
    build = MIXERS[mixer] if isinstance(mixer, str) else mixer
    parameters = inspect.signature(build).parameters
    # The model decides the first four, and its tokens are all on the grid.
    accepted = parameters.keys() - {"dim", "num_heads", "qkv_bias", "grid_size", "prefix_tokens", "ignored"}
    if unknown := [name for name in options if name not in accepted]:
        raise ValueError(f"mixer {mixer} has no option {', '.join(unknown)}")
    if "grid_size" in parameters:
        options["grid_size"] = grid_size
    return build(dim, num_heads=num_heads, qkv_bias=True, **options)
