"""Token mixers by name. A mixer is a class with the constructor of timm's Attention that maps (B, N, D) to (B, N, D);
one that takes `grid_size` is told the (h, w) of its tokens, and one with a true `conditioned` gets the blocks'
conditioning vector (B, D) as second argument."""

import inspect
from functools import partial

from timm.models.vision_transformer import Attention

from machine.flags import above_zero, positive
from pde_ssm import COUPLINGS, PRESETS, TERMS, PDESSMBlock

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


def add_pde_flags(add):
    """The options of `--mixer pdessm` as flags of a command: `add` is add_argument of its parser."""
    couplings = "a PDE per channel (diagonal, unless given), per pair of channels (the paper's Algorithm 1), or a system (ours)"
    add("--pde-coupling", choices=COUPLINGS, help=couplings)
    add("--pde-groups", type=positive, help="groups of channels that share one")
    add("--pde-state-dim", type=positive, help="channels of the PDE, the hidden size unless given")
    add("--pde-expand", type=above_zero, help="the same, as a multiple of the hidden size")
    add("--pde-terms", nargs="+", choices=TERMS, metavar="TERM", help=f"some of {', '.join(TERMS)}; all unless given")
    add("--pde-components", type=positive, help="PDEs per channel, whose states are summed (not in the paper)")
    add("--pde-activation", action="store_true", help="silu before the PDE (not in the paper)")
    add("--pde-gate", action="store_true", help="multiply by a gate, project back (not in the paper)")


def mixer_options(args):
    """The --pde-* flags that were given, as options of the mixer. ValueError for those that mean nothing beside others."""
    given = {name: value for name, value in vars(args).items() if name.startswith("pde_")}
    given = {name: value for name, value in given.items() if value is not None and value is not False}
    if given and args.mixer == "attention":
        flags = ", ".join("--" + name.replace("_", "-") for name in given)
        raise ValueError(f"{flags} means nothing to --mixer attention")
    coupling = given.get("pde_coupling", "diagonal")
    if coupling == "diagonal" and "pde_groups" in given:
        raise ValueError("--pde-groups means nothing to the diagonal coupling; choose another with --pde-coupling")
    if coupling != "diagonal" and (given.get("pde_components", 1) > 1 or "pde_conditioned" in given):
        flag = "--pde-conditioned" if "pde_conditioned" in given else "--pde-components"
        raise ValueError(f"{flag} means nothing to --pde-coupling {coupling}; it needs the diagonal one")
    if {"pde_state_dim", "pde_expand"} <= given.keys():
        raise ValueError("--pde-state-dim and --pde-expand say the same; give one of them")
    return {name.removeprefix("pde_"): value for name, value in given.items()}
