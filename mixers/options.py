"""Declares a token mixer and its options, once: all code that needs to know the options reads them from these classes."""

from collections.abc import Callable
from dataclasses import dataclass, field

SWITCH = dict(action="store_true")  # the flag of an option that is on or off


def check_numbers(name, **numbers):
    """Raises a ValueError unless all numbers, options of the named mixer, are whole and at least 1."""
    for option, number in numbers.items():
        if not isinstance(number, int) or number < 1:
            raise ValueError(f"{option} of {name} is a whole number from 1; it is {number!r}")


@dataclass(frozen=True)
class Option:
    """A keyword of a mixer's constructor, which is also a flag of the commands.

    flag:        arguments of add_argument besides name and help: type, choices, nargs, action. A default is the constructor's
                 alone: of a flag that is not given the value is None or False.
    conditioned: whether it is only for this project's blocks: it makes the mixer take their conditioning vector, or changes
                 attention, which other people's models already have.
    called:      its flag, if that is not --<mixer>-<name>.
    told:        whether a network's weights tell it; if not, commands that read bare weights take its flag, too.
    """

    name: str
    help: str
    flag: dict = field(default_factory=dict)
    conditioned: bool = False
    called: str | None = None
    told: bool = True


@dataclass(frozen=True)
class Mixer:
    """One kind of mixer.

    name:    its flags are --<name>-<option>.
    build:   a class with the constructor of timm's Attention that maps (B, N, D) to (B, N, D), or a function that makes one.
             If it takes `grid_size`, it is given the (h, w) of its tokens, and its attribute of that name is set for images of
             another size; if `layer`, it is given the number of its block. If its `conditioned` is true, it gets the blocks'
             conditioning vector (B, D) as second argument. DiT's initialisation walks over all nn.Linear, and then calls the
             mixer's `initialize()` if it has one. If it has weights that depend on the grid, its `adapted(weights, grid)`
             returns them, from those of a layer for another grid (h, w), a dict, as they are on its own. It also runs on the
             meta device, where operations are counted. Its state dict holds floating-point numbers; other buffers are
             registered with persistent=False.
    read:    returns the options that a layer's state dict reveals by names and shapes, or None if the weights are not those of
             this mixer. The first in KINDS that returns a dict is taken: a mixer with attention's `qkv` stands before that.
    presets: names for --mixer, with the options that each sets; by default only the mixer's own name.
    check:   raises a ValueError for options (a dict) that conflict.
    told_as: for an option that weights do not show, the one that they show instead: {"expand": "state_dim"}, since weights have
             a number of channels and not a multiple.
    """

    name: str
    build: Callable
    read: Callable
    options: tuple = ()
    presets: dict | None = None
    check: Callable = lambda options: None
    told_as: dict = field(default_factory=dict)

    @property
    def named(self):
        """Returns the names for --mixer, with the options that each of them sets."""
        return self.presets or {self.name: {}}

    def flag_of(self, name):
        called = {option.name: option.called for option in self.options}
        return called.get(name) or f"--{self.name}-{name}".replace("_", "-")

    def given(self, settings):
        """Returns the options that `settings`, a dict of a command's flags, sets to anything but None or False."""
        named = self.stored(settings)
        return {option.name: named[option.name] for option in self.options if option.name in named}

    def stored(self, settings):
        """Returns the same for a checkpoint's settings: all with this mixer's prefix, even those that are no option here."""
        prefix = f"{self.name}_".replace("-", "_")
        named = {name.removeprefix(prefix): value for name, value in settings.items() if name.startswith(prefix)}
        for option in self.options:
            if option.called:
                named[option.name] = settings.get(option.called.removeprefix("--").replace("-", "_"))
        return {name: value for name, value in named.items() if value is not None and value is not False}
