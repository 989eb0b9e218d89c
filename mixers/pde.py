"""The PDE-SSM block: one declaration of its options for all presets, and hybrids with attention."""

from itertools import count

from machine.flags import above_zero, positive
from mixers import attention
from mixers.options import SWITCH, Mixer, Option, check_numbers
from pde_ssm import COUPLINGS, PRESETS, TERMS, PDESSMBlock, options_from_weights

OPTIONS = (
    Option(
        "coupling",
        "a PDE per channel (diagonal, unless given), per pair of channels (the paper's Algorithm 1), or a system (ours)",
        dict(choices=COUPLINGS),
    ),
    Option("groups", "groups of channels that share one", dict(type=positive)),
    Option("state_dim", "channels of the PDE, the hidden size unless given", dict(type=positive)),
    Option("expand", "the same, as a multiple of the hidden size", dict(type=above_zero)),
    Option("terms", f"some of {', '.join(TERMS)}; all unless given", dict(nargs="+", choices=TERMS, metavar="TERM")),
    Option("components", "PDEs per channel, whose states are summed (not in the paper)", dict(type=positive)),
    Option("activation", "silu before the PDE (not in the paper)", SWITCH),
    Option("gate", "multiply by a gate, project back (not in the paper)", SWITCH),
    Option("local", "add a 3 x 3 convolution of each channel to the state (not in the paper)", SWITCH),
    Option("attention_every", "let every N-th block mix by attention instead (not in the paper)", dict(type=positive)),
    Option("conditioned", "let timestep and class scale the PDE's time (not in the paper)", SWITCH, conditioned=True),
)


def build(dim, num_heads=8, qkv_bias=False, *, grid_size=None, layer=0, attention_every=None, **options):
    """Builds a PDESSMBlock with these options; in a hybrid, every attention_every-th block (counted by layer) is attention
    instead: a PDE transports all tokens' states alike, whereas attention routes them by what the tokens contain."""
    if attention_every is not None:
        check_numbers("a hybrid", attention_every=attention_every)
        if (layer + 1) % attention_every == 0:
            return attention.build(dim, num_heads, qkv_bias)
    return PDESSMBlock(dim, num_heads, qkv_bias, grid_size=grid_size, **options)


def check(options):
    """Raises a ValueError for options that do not apply to the coupling, or that set the same thing twice."""
    coupling = options.get("coupling", "diagonal")
    if coupling == "diagonal" and "groups" in options:
        raise ValueError("--pde-groups means nothing to the diagonal coupling; choose another with --pde-coupling")
    if coupling != "diagonal" and (options.get("components", 1) > 1 or "conditioned" in options):
        flag = "--pde-conditioned" if "conditioned" in options else "--pde-components"
        raise ValueError(f"{flag} means nothing to --pde-coupling {coupling}; it needs the diagonal one")
    if {"state_dim", "expand"} <= options.keys():
        raise ValueError("--pde-state-dim and --pde-expand say the same; give one of them")
    if options.get("attention_every") == 1:
        raise ValueError("--pde-attention-every 1 leaves no PDE; that is --mixer attention")


def read(weights):
    """Returns the options of a PDESSMBlock with these weights; None for another layer's."""
    return options_from_weights(weights) if "pde.equation.g0" in weights else None


def read_hybrid(weights, first):
    """Returns the option that only all blocks of a network with PDEs reveal: attention_every, if one of them has attention.
    weights: its state dict, where the names of the first block's mixer begin with `first`, such as "blocks.0.attn."."""
    before, _, after = first.rpartition("0")
    for block in count(1):
        if f"{before}{block}{after}qkv.weight" in weights:
            return {"attention_every": block + 1}
        if f"{before}{block}{after}pde.R.weight" not in weights:
            return {}


MIXER = Mixer(
    "pde", build, read, OPTIONS, PRESETS | {"pdessm-gla": PRESETS["pdessm-gl"] | {"attention_every": 4}}, check,
    told_as={"expand": "state_dim"},
)  # fmt: skip
