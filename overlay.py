"""Runs the scripts of an untouched DiT checkout, or of one of its children, with another mixer of tokens:

    torchrun --nproc_per_node=8 overlay.py ../DiT/train.py --mixer pdessm --model DiT-XL/2 --data-path /imagenet/train
    python overlay.py ../DiT/sample.py --model DiT-XL/2 --ckpt results/000-DiT-XL-2/checkpoints/0400000.pt
    python overlay.py --diff ../DiT --model DiT-S/2      (what --mixer pdessm changes in its models)
    python overlay.py --check ../DiT                     (whether this repository's own DiT agrees with it)

--mixer and --pde-* are taken out of the arguments, all else is the script's. A model is built with its attention, by its own
code to the last line; then its attention layers are exchanged, with random numbers of their own. So whatever else is random,
initial weights, noise and data, is the same as without the overlay, and no initialiser touches a mixer.
Processes that a script starts by itself are not followed; those of torchrun and accelerate are.
"""

import argparse
import importlib
import json
import math
import os
import re
import runpy
import sys
import traceback
from collections import Counter
from contextlib import contextmanager, suppress
from functools import wraps
from importlib.machinery import PathFinder
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.models.vision_transformer import Attention
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from machine.cost import forward_flops
from mixers import MIXERS, add_pde_flags, build_mixer, mixer_options
from pde_ssm import options_from_weights

HERE = Path(__file__).resolve().parent
# A checkout has modules of these names too, and while its scripts run, those are meant.
OURS = {path.stem for path in HERE.glob("*.py")} | {path.parent.name for path in HERE.glob("*/__init__.py")}
OURS = {name for name in OURS if not name.startswith(("overlay", "pde_ssm"))}

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

said = set()


def main(argv):
    args, rest = mixer_flags().parse_known_args(argv)
    if rest and not rest[0].startswith("-"):
        run(rest[0], rest[1:], args)
        return
    args = parse_args(argv)
    if args.diff:
        found = diff(args.diff, args)
        print(json.dumps(found, indent=1) if args.json else diff_table(found))
        return
    rows = check(args.check)
    print(json.dumps(rows, indent=1) if args.json else check_table(rows))
    if wrong := [row["what"] for row in rows if not row["agrees"]]:
        raise ValueError(f"{len(wrong)} of {len(rows)} comparisons disagree: {', '.join(wrong)}")


def run(script, arguments, args):
    """Runs a script as `python script arguments` would, with the mixer that args or a checkpoint among arguments name."""
    script = Path(script)
    if not script.is_file():
        raise FileNotFoundError(f"{script}: no such script" + (", but a folder" if script.is_dir() else ""))
    mixer, options = choose_mixer(args, arguments)
    root = checkout_of(script)
    say(f"{script} runs as it is, with {describe(mixer, options)}")
    say("torch.load may read an argparse.Namespace, which torch >= 2.6 refuses; Python writes no __pycache__")
    exchange = None if mixer == "attention" else Exchange(mixer, options, root, args.attention_class)
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"  # for processes of data loaders that start afresh
    argv, sys.argv = sys.argv, [str(script), *arguments]
    try:
        with imports_of(script.parent), torch.serialization.safe_globals([argparse.Namespace]), exchanging(exchange):
            runpy.run_path(str(script), run_name="__main__")
            if exchange:
                exchange.require_any()
    except RuntimeError as error:
        if "loading state_dict" in str(error) and re.search(r"\.pde\.\w", str(error)):
            raise ValueError(f"the checkpoint does not fit {describe(mixer, options)}: it has another mixer") from error
        raise
    finally:
        sys.argv = argv


def checkout_of(script):
    """The git repository that a script lies in, or if there is none its folder."""
    folder = script.resolve().parent
    return next((parent for parent in (folder, *folder.parents) if (parent / ".git").exists()), folder)


def choose_mixer(args, arguments):
    """(name, options): what the flags say, or else what a checkpoint among the script's arguments was trained with.

    ValueError if the two contradict each other.
    """
    path, stored = stored_mixer(arguments)
    if stored and args.mixer == "attention":
        raise ValueError(f"--mixer attention contradicts {path}, which mixes tokens by a PDE; leave the flag out")
    args.mixer = mixer = args.mixer or ("pdessm" if stored else "attention")
    options = mixer_options(args)
    if mixer == "attention" and args.attention_class:
        raise ValueError("--attention-class means nothing to --mixer attention")
    if not stored:
        return mixer, options
    kept = options_from_weights(stored)
    if kept["conditioned"]:
        raise ValueError(f"the PDEs of {path} are conditioned, but the blocks of a checkout pass no vector to their mixers")
    with torch.device("meta"):
        asked = build_mixer(mixer, stored["pde.R.weight"].shape[1], 8, None, **options)
    if (options or mixer != "pdessm") and shapes(asked.state_dict()) != shapes(stored):
        asked, kept = describe(mixer, options), describe("pdessm", kept)
        raise ValueError(f"{asked} contradicts {path}, which has {kept}; leave the flags out")
    return "pdessm", kept


def stored_mixer(arguments):
    """(path, weights of its first mixer) of the first argument that is a checkpoint with PDEs, or (None, {}).

    Attention says nothing: its weights may be those of an encoder that a script reads too.
    """
    for argument in arguments:
        path = argument.partition("=")[2] if argument.startswith("--") else argument
        if not path.endswith((".pt", ".pth", ".ckpt")):
            continue
        weights = {}
        with suppress(Exception), torch.serialization.safe_globals([argparse.Namespace]):  # reading it is the script's business
            contents = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            weights = dict(contents.get("ema", contents.get("model", contents)))
        for name in map(str, weights):
            if name.endswith(".pde.equation.g0"):
                prefix = name.removesuffix("pde.equation.g0")
                return path, {key.removeprefix(prefix): w for key, w in weights.items() if key.startswith(prefix)}
    return None, {}


def shapes(weights):
    return {name: tuple(weight.shape) for name, weight in weights.items()}


def describe(mixer, options):
    given = [f"{name}={value}" for name, value in options.items() if value not in (None, False)]
    return f"--mixer {mixer}" + (f" ({', '.join(given)})" if given else "")


class Exchange:
    """Called on a model, replaces its attention layers by `mixer`, in place, and remembers what it saw.

    Attention is timm's, in modules of the checkout at `root`; within timm's own models it stays, since they come with
    weights. attention_class, "module:Class", names another class, wherever it stands.
    """

    def __init__(self, mixer, options, root, attention_class=None):
        if attention_class and not re.fullmatch(r"[\w.]+:\w+", attention_class):
            raise ValueError(f"--attention-class {attention_class}: it is module:Class, such as models:SelfAttention")
        self.mixer, self.options, self.root, self.attention_class = mixer, options, root, attention_class
        self.count, self.others = 0, Counter()

    def __call__(self, model):
        """Returns {name: (old layer, new layer)}. A layer that stands in several places is replaced in all."""
        grids = [getattr(module, "grid_size", None) for module in model.modules()]
        grid_size = next((tuple(grid) for grid in grids if isinstance(grid, (tuple, list)) and len(grid) == 2), None)
        found = {
            name: layer
            for name, layer in model.named_modules(remove_duplicate=False)
            if name and self.is_meant(layer, model.get_submodule(name.rpartition(".")[0]))
        }
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            # A stream of its own: numbers that the script draws later must not be those of these weights.
            torch.default_generator.manual_seed(torch.randint(2**62, ()).item())
            new = {layer: self.build(layer, grid_size) for layer in dict.fromkeys(found.values())}
        for name, layer in found.items():
            model.set_submodule(name, new[layer])
        self.count += len(new)
        self.others.update(kind(module) for module in model.modules() if "attention" in type(module).__name__.lower())
        if new:
            grid = "{} x {}".format(*grid_size) if grid_size else "a square number of"
            old = Counter(type(layer).__name__ for layer in new)
            what = ", ".join(f"{count} {name}" for name, count in old.items())
            say(f"{type(model).__name__}: {what} -> {describe(self.mixer, self.options)} on {grid} tokens")
        return {name: (layer, new[layer]) for name, layer in found.items()}

    def is_meant(self, layer, owner):
        if not self.attention_class:
            return type(layer) is Attention and not type(owner).__module__.startswith("timm.")
        module, _, name = self.attention_class.partition(":")
        return type(layer) is getattr(sys.modules.get(module), name, None)

    def build(self, layer, grid_size):
        first = next((module for module in layer.modules() if isinstance(module, nn.Linear)), None)
        if first is None:
            raise ValueError(f"{kind(layer)} has no nn.Linear, whose input would be the channels to mix")
        dim, heads = first.in_features, getattr(layer, "num_heads", 8)
        mixer = build_mixer(self.mixer, dim, heads, grid_size, **self.options)
        return mixer.to(first.weight.device, first.weight.dtype).train(layer.training)

    def require_any(self):
        """ValueError that says what was looked for and what there is instead, if nothing has been replaced."""
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
    """Within, `exchange` gets every module that code of its checkout has built, the outermost alone, as soon as it is.

    If none of them had attention, the first step of an optimizer is a ValueError: nobody trains the wrong model for a week.
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


@contextmanager
def imports_of(folder):
    """Within, imports mean what they mean to a script of `folder`: of ours, only the operator is there, and nothing is
    written to __pycache__. Afterwards, the modules of `folder` are gone from sys.modules and ours are back."""
    folder = Path(folder).resolve()
    path, dont_write, there = sys.path[:], sys.dont_write_bytecode, set(sys.modules)
    ours = [name for name in there if name.partition(".")[0] in OURS and lies_in(sys.modules[name], HERE)]
    ours = {name: sys.modules.pop(name) for name in ours}
    sys.path[:] = [str(folder), *(entry for entry in path if Path(entry).resolve() != HERE)]
    sys.dont_write_bytecode = True
    sys.meta_path.insert(0, Operator)
    try:
        yield
    finally:
        sys.meta_path.remove(Operator)
        for name in set(sys.modules) - there | ours.keys():
            if lies_in(sys.modules.get(name), folder):
                del sys.modules[name]
        sys.modules.update(ours)
        sys.path[:], sys.dont_write_bytecode = path, dont_write


class Operator:
    """An import finder for pde_ssm.py and for the kernels beside it, which it imports only when it needs them."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        return PathFinder.find_spec(name, path or [str(HERE)]) if name.startswith("pde_ssm") else None


def lies_in(module, folder):
    """Whether a module's file is somewhere below `folder`."""
    place = getattr(module, "__file__", None) or next(iter(getattr(module, "__path__", [])), None)
    return place is not None and Path(place).resolve().is_relative_to(folder)


def load(folder, *names):
    """Modules of a checkout by name. OSError or ValueError if it has none of that name, or not one that can be imported."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    with imports_of(folder):
        for name in names:
            if not (folder / f"{name}.py").is_file() and not (folder / name / "__init__.py").is_file():
                raise FileNotFoundError(f"{folder} is not a checkout of DiT or of a child: it has no {name}.py")
        try:
            return [importlib.import_module(name) for name in names]
        except ImportError as error:
            raise ValueError(f"a module of {folder} cannot be imported: {error}") from error


def diff(folder, args):
    """What a mixer changes in a model of a checkout: a dict, ready for JSON. See `diff_table`."""
    args.mixer = args.mixer or "pdessm"
    exchange = Exchange(args.mixer, mixer_options(args), folder, args.attention_class)
    if args.mixer == "attention":
        raise ValueError("--diff compares attention with another mixer; give --mixer")
    registry = models_of(*load(folder, "models"))
    name = args.model or next((name for name in registry if name.endswith("S/2")), next(iter(registry)))
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
        "mixer": describe(args.mixer, exchange.options),
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
    """The registry of a checkout's models.py: DiT_models, SiT_models, or whatever it calls it."""
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
    """Of a forward pass on one image, once the symbols are there."""
    inputs = torch.randn(1, model.in_channels, SIDE, SIDE), torch.ones(1), torch.zeros(1, dtype=torch.long)
    model.eval()(*inputs)
    return forward_flops(model, *inputs)


def diff_table(found):
    """Text of what `diff` found; layers that differ in a number of their name alone share a row."""
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
        f"Outside the mixers: {outside.pop('tensors')} tensors.",
    ]
    lines += [f"    {name.replace('_', ' ')}: {'yes' if same else 'NO'}" for name, same in outside.items()]
    return "\n".join(lines)


def check(folder):
    """Compares this repository's DiT, diffusion and centre crop with those of a checkout of DiT.

    A list of dicts: what was compared; difference, the largest relative to the largest value, or how many names or shapes
    differ; limit; and agrees.
    """
    their_models, their_diffusion, their_train = load(folder, "models", "diffusion", "train")
    if not hasattr(their_models, "DiT_models"):
        raise ValueError(f"models.py of {folder} has no DiT_models: --check is for DiT and its like, --diff for any child")
    from diffusion import create_diffusion
    from images.dataset import center_crop_arr
    from models import DiT_models

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
    """The largest difference in two dicts of tensors, each relative to the largest value of its own tensor."""
    if shapes(ours) != shapes(theirs):
        return math.inf
    pairs = [(a.double(), theirs[name].double()) for name, a in ours.items()]
    return max(((a - b).abs().max() / b.abs().max().clamp(min=1e-12)).item() for a, b in pairs)


def same_weights(*builds):
    """A model of each, with the weights of the last, whose zeros, which make every block the identity, are random ones."""
    models = [build(input_size=SIDE, class_dropout_prob=0.5) for build in builds]
    for parameter in models[-1].parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    for model in models[:-1]:
        model.load_state_dict(models[-1].state_dict())
    return models


def network_outputs(model):
    """{what: {name: tensor}} of a DiT in evaluation and training, at the same inputs and random numbers."""
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
    """{what: tensor} of a diffusion and its samplers on a network of no weights."""

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


def say(line):
    """On stderr, since stdout is the script's; once per line, by the first of several processes."""
    if line not in said and os.environ.get("RANK", "0") == "0":
        print(f"overlay: {line}", file=sys.stderr, flush=True)
    said.add(line)


def mixer_flags():
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add = parser.add_argument
    add("--mixer", choices=MIXERS, help="read off a checkpoint among the script's arguments, or attention, unless given")
    add_pde_flags(add)
    add("--attention-class", metavar="module:Class", help="what to replace, where a checkout has an attention of its own")
    return parser


def parse_args(argv):
    parser = argparse.ArgumentParser(
        description="Run a script of an untouched DiT checkout with another mixer, or compare with it.",
        usage="overlay.py SCRIPT [mixer's flags] [the script's arguments] | --diff FOLDER | --check FOLDER",
        parents=[mixer_flags()],
        allow_abbrev=False,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--diff", type=Path, metavar="FOLDER", help="show what the mixer changes in a model of a checkout")
    what.add_argument("--check", type=Path, metavar="FOLDER", help="compare this repository's DiT with a checkout's")
    parser.add_argument("--model", help="of --diff; the first S/2 unless given")
    parser.add_argument("--json", action="store_true", help="of --diff and --check: print JSON")
    return parser.parse_args(argv)


def is_ours(error):
    """Whether an exception was raised in this repository's code, and not in a script or a library."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    rooms = {HERE, *(package.parent for package in HERE.glob("*/__init__.py"))}
    return Path(frame.f_code.co_filename).resolve().parent in rooms


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        if sys.flags.dev_mode or not is_ours(error):
            raise
        sys.exit(f"overlay.py: error: {error}")
