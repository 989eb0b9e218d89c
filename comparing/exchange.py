"""Replaces the attention layers of models that other people's code has built by another mixer."""

import os
import re
import sys
from collections import Counter
from contextlib import contextmanager
from functools import wraps
from itertools import count

import torch
from timm.models.vision_transformer import Attention
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from comparing.checkouts import lies_in
from mixers import build_mixer
from pde_ssm_attention import replace_layers

said = set()


class Exchange:
    """Replaces the attention layers of the models on which it is called by `mixer`, in place, and remembers what it saw.

    By default it replaces timm's Attention in modules of the checkout at `root`, but not within timm's own models, since they
    come with weights. attention_class, "module:Class", names another class, which is replaced wherever it occurs.
    """

    def __init__(self, mixer, options, root, attention_class=None):
        if attention_class and not re.fullmatch(r"[\w.]+:\w+", attention_class):
            raise ValueError(f"--attention-class {attention_class}: it is module:Class, such as models:SelfAttention")
        self.mixer, self.options, self.root, self.attention_class = mixer, options, root, attention_class
        self.count, self.others = 0, Counter()

    def __call__(self, model):
        """Replaces the layers of a model and returns {name: (old layer, new layer)}, as `replace_layers` does."""
        grids = [getattr(module, "grid_size", None) for module in model.modules()]
        grid_size = next((tuple(grid) for grid in grids if isinstance(grid, (tuple, list)) and len(grid) == 2), None)
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            # New weights use a random stream of their own, so that the script does not draw the same numbers again later.
            torch.default_generator.manual_seed(torch.randint(2**62, ()).item())
            numbers = count()
            replaced = replace_layers(model, lambda old: self.build(old, grid_size, next(numbers)), self.is_meant)
        old_layers = {old for old, _ in replaced.values()}
        self.count += len(old_layers)
        self.others.update(kind(module) for module in model.modules() if "attention" in type(module).__name__.lower())
        if replaced:
            grid = "{} x {}".format(*grid_size) if grid_size else "a square number of"
            old = Counter(type(layer).__name__ for layer in old_layers)
            what = ", ".join(f"{count} {name}" for name, count in old.items())
            say(f"{type(model).__name__}: {what} -> {describe(self.mixer, self.options)} on {grid} tokens")
        return replaced

    def is_meant(self, layer, owner):
        if not self.attention_class:
            return type(layer) is Attention and not type(owner).__module__.startswith("timm.")
        module, _, name = self.attention_class.partition(":")
        return type(layer) is getattr(sys.modules.get(module), name, None)

    def build(self, old, grid_size, layer):
        first = next((module for module in old.modules() if isinstance(module, nn.Linear)), None)
        if first is None:
            raise ValueError(f"{kind(old)} has no nn.Linear, whose input would be the channels to mix")
        dim, heads = first.in_features, getattr(old, "num_heads", 8)
        return build_mixer(self.mixer, dim, heads, grid_size, layer, **self.options)

    def require_any(self):
        """Raises ValueError if nothing has been replaced, and says what was looked for and what there is instead."""
        if self.count:
            return
        wanted = self.attention_class or "timm.models.vision_transformer:Attention"
        there = ", ".join(f"{count} {name}" for name, count in self.others.items())
        hint = f"they hold {there}; name the class to replace by --attention-class module:Class" if there else (
            "they hold nothing with attention in its name"
        )
        raise ValueError(f"nothing was replaced: no model that the code in {self.root} built holds {wanted}; {hint}")


def kind(module):
    return f"{type(module).__module__}:{type(module).__qualname__}"


@contextmanager
def exchanging(exchange):
    """Within its body, passes every module that the checkout's code builds to `exchange` as soon as it is built; of nested
    modules only the outermost. With None it does nothing.

    If no module had attention, the optimizer's first step raises ValueError, so that nobody trains the wrong model for a week.
    """
    if exchange is None:
        yield
        return
    depth = 0

    def watch(cls, **kwargs):
        super(nn.Module, cls).__init_subclass__(**kwargs)
        if "__init__" not in vars(cls) or not lies_in(sys.modules.get(cls.__module__), exchange.root):
            return
        init = cls.__init__

        @wraps(init)
        def build(self, *args, **kwargs):
            nonlocal depth
            depth += 1
            try:
                init(self, *args, **kwargs)
            finally:
                depth -= 1
            if depth == 0:
                exchange(self)

        cls.__init__ = build

    hook = register_optimizer_step_pre_hook(lambda *_: exchange.require_any())
    nn.Module.__init_subclass__ = classmethod(watch)
    try:
        yield
    finally:
        del nn.Module.__init_subclass__
        hook.remove()


def describe(mixer, options):
    """Names a mixer and its options, as flags would name it."""
    given = [f"{name}={value}" for name, value in options.items() if value not in (None, False)]
    return f"--mixer {mixer}" + (f" ({', '.join(given)})" if given else "")


def say(line):
    """Prints a line on stderr, since stdout is the script's; once, by the first of several processes."""
    if line not in said and os.environ.get("RANK", "0") == "0":
        print(f"overlay: {line}", file=sys.stderr, flush=True)
    said.add(line)


def shapes(weights):
    """Maps each name in a state dict to the shape of its tensor."""
    return {name: tuple(weight.shape) for name, weight in weights.items()}
