"""Token mixers by name. A new one is a file in this folder that declares a `MIXER`, and a line in KINDS."""

import inspect
from functools import partial

from mixers import attention, global_filter, lamamba, mamba, mean, pde, plainmamba, s4d, s4nd, ss2d, window

KINDS = (
    attention.MIXER,
    pde.MIXER,
    ss2d.MIXER,
    s4nd.MIXER,
    s4d.MIXER,
    global_filter.MIXER,
    mean.MIXER,
    mamba.MIXER,
    plainmamba.MIXER,
    window.MIXER,
    lamamba.MIXER,
)
MIXERS = {name: partial(kind.build, **preset) for kind in KINDS for name, preset in kind.named.items()}


def kind_of(mixer):
    """Returns the Mixer that declares the mixer of that name."""
    return next(kind for kind in KINDS if mixer in kind.named)


def build_mixer(mixer, dim, num_heads, grid_size, layer, /, **options):
    """Builds the mixer of block number `layer`; `mixer` is a name in MIXERS or a class. ValueError for an unknown name or
    option."""
    if isinstance(mixer, str) and mixer not in MIXERS:
        raise ValueError(f"unknown mixer {mixer!r}; known: {', '.join(MIXERS)}")
    build = MIXERS[mixer] if isinstance(mixer, str) else mixer
    parameters = inspect.signature(build).parameters
    if isinstance(mixer, str):
        accepted = {option.name for option in kind_of(mixer).options}
    elif any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        accepted = options.keys()                                          # the class checks its **options itself
    else:  # the model decides on these, and has no prefix tokens, since all of its tokens are on the grid
        accepted = parameters.keys() - {"dim", "num_heads", "qkv_bias", "grid_size", "layer", "prefix_tokens"}
    if unknown := [name for name in options if name not in accepted]:
        raise ValueError(f"mixer {mixer} has no option {', '.join(unknown)}")
    told = dict(grid_size=grid_size, layer=layer)
    options |= {name: value for name, value in told.items() if name in parameters}
    return build(dim, num_heads=num_heads, qkv_bias=True, **options)


def add_mixer_flags(add, conditioned=False, told=True):
    """Adds the options of every mixer to a command, as flags: `add` is add_argument of its parser. conditioned: also those of
    mixers that take the conditioning vector of their blocks. told: also those that weights tell."""
    known = "" if told else "for weights that do not tell: "
    for kind in KINDS:
        for option in kind.options:
            if (conditioned or not option.conditioned) and (told or not option.told):
                add(kind.flag_of(option.name), help=known + option.help, **option.flag)


def mixer_options(mixer, settings):
    """Returns the options of the named mixer that `settings`, a dict of a command's flags, sets. ValueError for options of
    another mixer, or that conflict with each other."""
    kind = kind_of(mixer)
    if foreign := [other.flag_of(name) for other in KINDS if other is not kind for name in other.given(settings)]:
        raise ValueError(f"{', '.join(foreign)} means nothing to --mixer {mixer}")
    options = kind.given(settings)
    kind.check(options)
    return options


def untold(mixer, options):
    """Returns, by flag, those options of the named mixer, a dict, that no weights tell."""
    kind = kind_of(mixer)
    names = [option.name for option in kind.options if not option.told and option.name in options]
    return {kind.flag_of(name): options[name] for name in names}


def read_mixer(weights):
    """Returns the name of the mixer that has these weights, a layer's state dict, and the options that they reveal. ValueError
    if they fit no mixer."""
    for kind in KINDS:
        if (options := kind.read(weights)) is not None:
            return next(iter(kind.named)), options
    raise ValueError(f"the weights' blocks mix tokens in a way unknown here; known: {', '.join(kind.name for kind in KINDS)}")
