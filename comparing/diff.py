"""Shows what another mixer changes in a model of a checkout: overlay.py --diff."""

import re

import torch

from comparing.checkouts import load
from comparing.exchange import describe, shapes
from machine.cost import forward_flops

SIDE = 32  # of the latents of a 256 x 256 image


def diff(folder, exchange, name=None):
    """Compares a model of a checkout before and after an Exchange; returns a dict, ready for JSON. See `diff_table`.

    name: of the model; the first S/2 unless given. ValueError if the checkout has no such model, or no attention in it.
    """
    registry = models_of(*load(folder, "models"))
    name = name or next((name for name in registry if name.endswith("S/2")), next(iter(registry)))
    if name not in registry:
        raise ValueError(f"--model {name} is none of {', '.join(registry)}")

    torch.manual_seed(0)
    models, numbers = [registry[name](input_size=SIDE)], [torch.rand(100)]
    torch.manual_seed(0)
    models.append(registry[name](input_size=SIDE))
    replaced = exchange(models[1])
    numbers.append(torch.rand(100))
    exchange.require_any()

    states = [model.state_dict() for model in models]
    mixers = tuple(f"{name}." for name in replaced)
    outside = [{key: w for key, w in state.items() if not key.startswith(mixers)} for state in states]
    shared = [key for key in states[0] if key in states[1]]
    return {
        "checkout": str(folder),
        "model": name,
        "mixer": describe(exchange.mixer, exchange.options),
        "replaced": [
            dict(name=name, before=describe_layer(old), after=describe_layer(new)) for name, (old, new) in replaced.items()
        ],
        "parameters": [sum(p.numel() for p in model.parameters()) for model in models],
        "forward_flops": [image_flops(model) for model in models],
        "keys": {
            "shared": shared,
            "only_before": [key for key in states[0] if key not in states[1]],
            "only_after": [key for key in states[1] if key not in states[0]],
        },
        "outside_the_mixers": {
            "tensors": len(outside[0]),
            "same_names": list(outside[0]) == list(outside[1]),
            "same_shapes": shapes(outside[0]) == shapes(outside[1]),
            "same_initial_values": all(torch.equal(outside[0][key], outside[1][key]) for key in shared if key in outside[0]),
            "same_random_numbers_afterwards": torch.equal(*numbers),
        },
    }


def models_of(module):
    """Returns the registry of a checkout's models.py: DiT_models, SiT_models, or another dict whose name ends in _models."""
    found = [value for name, value in vars(module).items() if name.endswith("_models") and isinstance(value, dict) and value]
    if not found:
        raise ValueError(f"{module.__file__} has no dict of models such as DiT_models")
    return found[0]


def describe_layer(layer):
    return {
        "class": type(layer).__name__,
        "parameters": sum(p.numel() for p in layer.parameters()),
        "shapes": shapes(layer.state_dict()),
    }


@torch.no_grad()
def image_flops(model):
    """Counts the flops of a forward pass on one image, once the symbols are there."""
    inputs = torch.randn(1, model.in_channels, SIDE, SIDE), torch.ones(1), torch.zeros(1, dtype=torch.long)
    model.eval()(*inputs)
    return forward_flops(model, *inputs)


def diff_table(found):
    """Writes what `diff` found as text; layers whose names differ in a number only share a row."""
    lines = [f"{found['model']} of {found['checkout']}, and with {found['mixer']}", ""]
    row = "{:<38} {:>20} {:>20}".format
    alike = {}
    for layer in found["replaced"]:
        alike.setdefault((re.sub(r"\d+", "*", layer["name"]), str(layer["before"]), str(layer["after"])), []).append(layer)
    for (name, *_), layers in alike.items():
        before, after = layers[0]["before"], layers[0]["after"]
        lines.append(row(f"{len(layers)} x {name}", before["class"], after["class"]))
        for key in before["shapes"] | after["shapes"]:
            sizes = [" x ".join(map(str, part["shapes"][key])) if key in part["shapes"] else "-" for part in (before, after)]
            lines.append(row(f"    {key}", *sizes))
        lines.append(row("    parameters", *(f"{part['parameters']:,}" for part in (before, after))))
    keys, outside = found["keys"], found["outside_the_mixers"]
    lines += [
        "",
        row("parameters, in all", *(f"{count:,}" for count in found["parameters"])),
        row("GFLOP of a forward pass, one image", *(f"{count / 1e9:.3f}" for count in found["forward_flops"])),
        row("keys of the state dict", *(f"{len(keys['shared']) + len(keys[one])}" for one in ("only_before", "only_after"))),
        row("    of which shared", *[len(keys["shared"])] * 2),
        "",
        f"Outside the mixers: {outside['tensors']} tensors.",
    ]
    lines += [f"    {name.replace('_', ' ')}: {'yes' if same else 'NO'}" for name, same in outside.items() if name != "tensors"]
    return "\n".join(lines)
