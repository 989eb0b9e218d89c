"""Checkpoints: a dict of model, ema, opt and args, as DiT's train.py writes them, except that args is a plain dict,
so that torch.load reads it without trusting the file. Files with an argparse.Namespace, or bare weights, load too, and
so do safetensors files with the weights and, as JSON in their metadata, the args; checkpoints/export.py converts between them.
"""

import math
import re
from collections import Counter
from contextlib import suppress

import torch

from backbones.parts import NORMS
from checkpoints.lengths import reconstruct
from checkpoints.read import FLOATS, load_checkpoint
from diffusion import OBJECTIVES, PATHS, PREDICTIONS
from images.autoencoder import open_space
from machine.files import whole_file
from mixers import MIXERS, build_mixer, kind_of, mixer_options, read_mixer, untold
from models import MLPS, MODELS, DiT, backbone_of, stride

# The paths of SiT's flows by its settings path_type and prediction. Its networks are DiT's, but see t and not 1000 t.
SIT_PATHS = {("Linear", "velocity"): "linear", ("GVP", "velocity"): "cosine"}
# Settings that a file may state, with a test of their values: the type, or the known names.
STATED = dict(
    num_classes=int, image_size=int, in_channels=int, learn_sigma=bool, vae=str, vae_digest=str,
    model=MODELS, mixer=MIXERS, objective=OBJECTIVES, path=PATHS, predict=PREDICTIONS, time_shift=float, mlp=MLPS,
    norm=NORMS, time_intervals=int,
)  # fmt: skip


def save_checkpoint(path, **contents):
    with whole_file(path, "checkpoint") as file:
        torch.save(contents, file)


def settings_from_weights(weights):
    """Returns the settings of a network that its weights reveal: model, mixer, mixer_options, num_classes, in_channels and
    learn_sigma (whether its outputs include learned variances). ValueError if it is none of MODELS."""
    backbone = backbone_of(weights)
    size, settings = backbone.read(weights)
    for name, build in MODELS.items():
        if build.func is backbone and size.items() <= build.keywords.items():
            return {"model": name, **settings}
    numbers = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in size.items())
    raise ValueError(f"no {backbone.__name__} is known with {numbers}")


def check_recognised(model, name, mixer):
    """Raises a ValueError, before it is trained in vain, for a network that no command could read from a checkpoint."""
    weights = model.state_dict()
    if other := [key for key, w in weights.items() if w.dtype not in FLOATS]:
        raise ValueError(
            f"{other[0]} is {weights[other[0]].dtype}, and commands read only floating-point numbers from a checkpoint: "
            "register such a buffer with persistent=False"
        )
    found = settings_from_weights(weights) if backbone_of(weights) else dict(model="no network", mixer=mixer)
    if found["model"] != name or kind_of(found["mixer"]) is not kind_of(mixer):
        taken = f"would be taken for those of {found['model']} with {found['mixer']}"
        where = "see `read` in mixers/options.py and backbones/__init__.py"
        raise ValueError(f"the weights of {name} with the mixer {mixer} {taken}: {where}")


def stated_settings(stored, path):
    """Returns the settings in a checkpoint's args, under train.py's names or SiT's. ValueError for a SiT with unknown flow."""
    if "path_type" in stored or str(stored.get("model")).startswith("SiT-"):
        kind = str(stored.get("path_type")), str(stored.get("prediction"))
        if kind not in SIT_PATHS:
            known = " or ".join(map(" and ".join, SIT_PATHS))
            raise ValueError(f"{path} is SiT's with path_type {kind[0]} and prediction {kind[1]}; what can be sampled: {known}")
        name = str(stored.get("model")).replace("SiT", "DiT", 1)
        stored = stored | dict(model=name, objective="flow", path=SIT_PATHS[kind], time_scale=1)
    stated = {"time_scale": scale} if type(scale := stored.get("time_scale")) in (int, float) else {}
    for name, known in STATED.items():
        value = stored.get(name)
        if type(value) is known if isinstance(known, type) else isinstance(value, str) and value in known:
            stated[name] = value
    if stated.get("objective") == "flow":
        stated = dict(path="linear", predict="velocity") | stated
    return stated


def _stated_options(stored, model, path):
    """Returns the mixer's options that its name and the flags in a checkpoint's args determine, as two dicts: those that
    weights reveal too, under the names and with the values that they reveal, and the others."""
    mixer, kind = stored["mixer"], kind_of(stored["mixer"])
    try:
        given = kind.named[mixer] | kind.stored(stored) | mixer_options(mixer, stored)
        with torch.device("meta"):
            size = MODELS[model].keywords
            layer = build_mixer(mixer, size["hidden_size"], size["num_heads"], (16, 16), 0, **given)  # options hold on any grid
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} states options that its mixer cannot have: {error}") from error
    revealed = kind.read(layer.state_dict())
    name_in_weights = {name: kind.told_as.get(name, name) for name in given}
    in_weights = {name: revealed[name] for name in name_in_weights.values() if name in revealed}
    return in_weights, {name: value for name, value in given.items() if name_in_weights[name] not in revealed}


def reconcile(stored, settings, path):
    """Returns the settings that weights reveal, combined with those that a checkpoint's args state. ValueError, with both
    values, where they differ."""
    stated, revealed, options = stated_settings(stored, path), dict(settings), {}
    is_dit, kind = MODELS[settings["model"]].func is DiT, kind_of(settings["mixer"])
    if not is_dit and (foreign := stated.keys() & {"mlp", "norm", "time_intervals"}):
        raise ValueError(f"{path} contradicts itself: it states {', '.join(sorted(foreign))}, and its weights are no DiT's")
    if is_dit and kind.options and stated.get("mixer") in kind.named:
        revealed |= settings["mixer_options"] | dict(mixer=stated["mixer"])  # weights reveal the kind, and not which preset
        in_weights, options = _stated_options(stored, settings["model"], path)
        stated |= in_weights | {name: value for name, value in options.items() if name in revealed}
    for name, value in stated.items():
        if revealed.get(name, value) != value:
            raise ValueError(
                f"{path} contradicts itself: it states {name}={value}, and its weights have {name}={revealed[name]}; "
                "if they are right, save them without those settings"
            )
    settings = settings | dict(mixer_options=settings["mixer_options"] | options)
    return settings | {name: stated[name] for name in (*STATED, "time_scale") if name in stated}


def load_model(path, given, default_vae, decay=None, usual=()):
    """Returns the model of a checkpoint, in eval mode, and its settings.

    The settings are those that the weights reveal and the checkpoint states. The dict `given` may supply those that neither
    has: the objective, a flow's path and prediction, the vae, a mixer's name and the options that its weights do not tell. Its
    values that are not None must agree with the known ones, except three that are free: the decoder in latent space, a flow's
    time_shift, and image_size, a side or (height, width), to which the model is resized. decay: the average to load, if there
    are several; `given` may instead have ema_length, that of an average to reconstruct from them. usual: the objective, path
    and prediction to assume if nothing states them, a dict.
    ValueError names both values, the misfit, or the flag to give.

    Besides train.py's settings there are learn_sigma, and time_scale, by which a flow's network sees t multiplied.
    """
    if (length := given.get("ema_length")) and decay is not None:
        raise ValueError(f"--ema {decay:g} and --ema-length {length:g} name two averages; leave one out")
    weights, stored = reconstruct(path, length) if length else load_checkpoint(path, decay)
    revealed = settings_from_weights(weights)
    settings = reconcile(stored, revealed, path)
    given = {name: value for name, value in given.items() if value is not None}
    if "mixer" in given and "mixer" not in stored:  # it may set what weights do not show, such as the order of a scan
        with suppress(ValueError):  # where it does not fit them, which is told below
            settings = reconcile(stored | dict(mixer=given["mixer"]), revealed, path)
    for name in ("model", "mixer", "num_classes", "objective", "path", "predict"):
        if name in given and settings.get(name, given[name]) != given[name]:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} {given[name]} contradicts {path}, which has {flag} {settings[name]}; leave the flag out")
    options = mixer_options(settings["mixer"], given)
    if "mixer" in stored and not options.items() <= settings["mixer_options"].items():
        flags = ", ".join(map(kind_of(settings["mixer"]).flag_of, options))
        raise ValueError(f"{flags} contradicts {path}, which states its mixer and its options; leave the flag out")
    settings["mixer_options"] = settings["mixer_options"] | options
    choose_objective(settings, given, learnt_variances(weights, settings), path, dict(usual))
    space = choose_space(settings, given, default_vae, path)
    size = trained_size(settings, backbone_of(weights).tokens_of(weights), given.get("image_size"), space, path)
    model = create_network(settings, tuple(side // space.factor for side in size))
    load_weights(model, weights, path)
    model.settings = stored
    model.class_names = class_names(stored, model.num_classes, path)
    model.trained_classes = len(model.class_names or range(model.num_classes))
    settings["image_size"] = given.get("image_size", size[0])
    if "image_size" in given:
        resize(model, given["image_size"], space.factor)
    return model.eval().requires_grad_(False), settings


def for_sampler(settings):
    """Returns the settings of a checkpoint that `create_sampler` needs."""
    return {name: settings[name] for name in ("path", "time_scale", "predict", "time_shift", "learn_sigma")}


def load_guide(path, model, settings):
    """Returns a checkpoint's model as the guide of `model`, which has these settings, at its size. ValueError unless both have
    the same space, objective and classes, in one order; the guide may also have no classes."""
    usual = {name: settings[name] for name in ("objective", "path", "predict")}
    guide, own = load_model(path, dict(image_size=settings["image_size"], vae=settings["vae"]), settings["vae"], usual=usual)
    for name in ("vae_digest", "in_channels", "objective", "path", "predict", "time_scale"):
        if own.get(name, settings.get(name)) != settings.get(name, own.get(name)):
            raise ValueError(f"--guide-ckpt {path} has {name} {own[name]}, and what it is to guide has {settings[name]}")
    if guide.num_classes not in (0, model.num_classes):
        raise ValueError(f"--guide-ckpt {path} has {guide.num_classes} classes, what it is to guide {model.num_classes}")
    for number, other in same_classes(model.class_names, guide.class_names).items():
        if number != other:
            name = model.class_names[number]
            raise ValueError(f"--guide-ckpt {path} has {name} as class {other}, and what it is to guide as class {number}")
    return guide


def create_network(settings, input_size):
    """Returns a network of these settings, as `load_model` returns them, with new weights."""
    return MODELS[settings["model"]](
        input_size=input_size,
        in_channels=settings["in_channels"],
        num_classes=settings["num_classes"],
        learn_sigma=settings["learn_sigma"],
        mixer=settings["mixer"],
        **{name: settings[name] for name in ("mlp", "norm", "time_intervals") if name in settings},
        **settings["mixer_options"],
    )


def learnt_variances(weights, settings):
    """Returns whether a network has learned variances among its outputs; SiT's has them, but leaves them at zero."""
    last = weights.get("final_layer.linear.weight")
    if not settings["learn_sigma"] or last is None:
        return settings["learn_sigma"]
    variances = torch.arange(len(last)) // settings["in_channels"] % 2 == 1
    return bool(last[variances].any() or not last[~variances].any())


def choose_objective(settings, given, learnt_variances, path, usual):
    """Adds the objective and a flow's settings to the others. ValueError if nothing says which objective it is."""
    objective = settings.get("objective") or given.get("objective")
    objective = objective or ("diffusion" if learnt_variances else usual.get("objective"))
    if objective is None:
        raise ValueError(
            f"{path} does not say for which objective it was trained, and weights that have learnt no variances do not tell; "
            f"give --objective {' or '.join(OBJECTIVES)}, to `python -m checkpoints.export` where a command has no such flag"
        )
    for name in ("path", "predict", "time_shift"):
        if objective == "diffusion" and name in given:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} {given[name]} means nothing to {path}, which was trained for diffusion")
    if objective == "flow" and settings["learn_sigma"] and "time_scale" not in settings:
        if "objective" in settings:
            raise ValueError(f"{path} contradicts itself: it states objective=flow, and its weights have learned variances")
        settings["time_scale"] = 1  # only SiT's flows have outputs for variances
    settings["objective"] = objective
    for name, value in (dict(path="linear", predict="velocity") | usual).items():
        settings.setdefault(name, given.get(name, value))
    settings["time_shift"] = given.get("time_shift") or settings.get("time_shift", 1.0)
    settings.setdefault("time_scale", 1000)


def choose_space(settings, given, default_vae, path):
    """Returns the space in which the model lives, whose name goes into the settings. ValueError if it is not the model's,
    FileNotFoundError if it is a folder that is not there."""
    stated, channels = settings.get("vae"), settings["in_channels"]
    vae = given.get("vae")
    if stated and vae and (vae == "none") != (stated == "none"):
        raise ValueError(f"--vae {vae} contradicts {path}, which was trained with --vae {stated}")
    if not vae and stated not in (None, "ema", "mse"):  # those two share an encoder, so either decodes
        vae = stated
    if not (vae or stated) and channels not in (3, 4):
        raise ValueError(f"{path} has {channels} channels and does not say of which autoencoder; give --vae FOLDER")
    settings["vae"] = vae or ("none" if channels == 3 and not stated else default_vae)
    try:
        space = open_space(settings["vae"])
    except FileNotFoundError as error:
        if "vae" in given:
            raise
        way_out = "if it is elsewhere now, give --vae FOLDER, or put a link in its old place where a command has no such flag"
        raise FileNotFoundError(f"{path} was trained with {error}; {way_out}") from error
    if space.channels != channels:
        says = f"--vae {vae}" if "vae" in given else f"{path} states --vae {stated or settings['vae']}, which"
        raise ValueError(f"{says} has {space.channels} channels, and the weights in {path} are for {channels}")
    return space


def trained_size(settings, tokens, given, space, path):
    """Returns (height, width) of the images that a model was trained on. tokens: how many of them its weights have positions
    for, or None. given: --image-size, or None. ValueError if nothing tells, or two of these disagree."""
    stated, given = ((size, size) if isinstance(size, int) else size for size in (settings.get("image_size"), given))
    if tokens is None:
        if not (stated or given):
            raise ValueError(f"{path} does not say for images of which size it is; give --image-size")
        return stated or given
    least, side = stride(settings["model"]) * space.factor, math.isqrt(tokens)
    if side**2 == tokens:
        size = (side * least, side * least)
        if stated not in (None, size):
            raise ValueError(
                f"{path} contradicts itself: it states image_size={stated[0]}, and its weights have image_size={size[0]} "
                f"with --vae {settings['vae']}"
            )
        return size
    if not given or given[0] * given[1] != tokens * least**2:
        raise ValueError(f"{path} is for {tokens} tokens, no square; give the --image-size HxW that it was trained on")
    return given


def class_names(stored, num_classes, path):
    """Returns the names of the classes with training images, if a checkpoint's args have them, or None. ValueError for more
    names than the weights have classes."""
    names = stored.get("class_names")
    if not isinstance(names, list) or not names:
        return None
    if (there := len(names)) > num_classes:
        raise ValueError(f"{path} contradicts itself: it names {there} classes, its weights have num_classes={num_classes}")
    return [str(name) for name in names]


def same_classes(names, others):
    """Returns {number: number among the others} of the classes that both name, each once; either may be None."""
    here, there = Counter(names or []), Counter(others or [])
    places = {name: number for number, name in enumerate(others or [])}
    return {number: places[name] for number, name in enumerate(names or []) if here[name] == there[name] == 1}


def resize(model, image_size, factor):
    """Makes the model one for images of another size, a side or (height, width), in a space smaller by `factor`."""
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    least = model.stride * factor
    if height % least or width % least:
        parts = f"{model.stride} of the model times {factor} of its space"
        raise ValueError(f"--image-size {height}x{width}: both must be divisible by {least} ({parts})")
    model.resize((height // factor, width // factor))


def load_weights(model, weights, path):
    """Loads weights into a model, all of them. ValueError of one line that says what differs."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        expected = model.state_dict()
        differences = [f"{key} is missing" for key in expected if key not in weights]
        differences += [f"{key} is not the model's" for key in weights if key not in expected]
        differences += [
            f"{key} is {tuple(weights[key].shape)}, not {tuple(value.shape)}"
            for key, value in expected.items()
            if key in weights and weights[key].shape != value.shape
        ]
        more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise ValueError(f"{path} does not fit the model: {'; '.join(differences[:3])}{more}") from error


def initialize(model, path, settings=None):
    """Loads those weights of a checkpoint that fit the model by name and shape; returns lines that name the others.

    Mixers of another kind keep their initial values, and so does a table with another number of classes, or with the same ones
    in another order, except for the null class and classes of the same name. Learnt positions and other weights that depend on
    the grid are adapted from a square one. settings: the model's, a dict; the lines then also name settings with which the
    weights were trained differently. ValueError for another kind of network, or if no matrix fits.
    """
    weights, stored = load_checkpoint(path)
    given = {name: w for name, w in weights.items() if isinstance(w, torch.Tensor)}
    own = model.state_dict()
    theirs, ours = backbone_of(given) or type(model), type(model)
    kinds = [_mixers_of_blocks(weights) if backbone is DiT else {} for backbone, weights in ((theirs, given), (ours, own))]
    other = tuple(start for start, kind in kinds[1].items() if kinds[0].get(start, kind) != kind)
    known = {name: w for name, w in given.items() if name in own and not name.startswith(other)}
    regridded = adapted(model, known) if theirs is ours else {}
    known |= regridded
    fitting = {name: w for name, w in known.items() if w.shape == own[name].shape}
    if theirs is not ours or not any(w.dim() > 1 for w in fitting.values()):
        differs = f"it holds a {theirs.__name__}, and the model is a {ours.__name__}"
        reason = "none of its matrices fits the model" if theirs is ours else differs
        raise ValueError(f"{path} is of another network or size: {reason}")
    if ours is DiT and (model.rotary or ("pos_embed" in given and not given["pos_embed"].any())):
        fitting.pop("pos_embed", None)  # one of the two has rotary mixers, which know places
    same = {}  # rows of the table of classes here and there
    if (table := known.get(ours.class_table)) is not None:
        same = same_classes((settings or {}).get("class_names"), class_names(stored, len(table) - 1, path))
    if any(row != there for row, there in same.items()):
        fitting.pop(ours.class_table, None)
    model.load_state_dict(fitting, strict=False)
    report = [f"Initial weights from {path}: {len(fitting)} of the model's {len(own)} tensors"]
    if regridded:
        report.append(f"... adapted to this image size: {_by_kind(regridded)}")
    for name in (name for name in known if name not in fitting):
        report.append(f"... not {name}, which is {tuple(known[name].shape)} there and {tuple(own[name].shape)} here")
        if name == ours.class_table and own[name].shape[1:] == known[name].shape[1:]:
            for row, there in (same | {-1: -1}).items():
                own[name][row].copy_(table[there])
            report[-1] += f"; the null class is kept{f', and {len(same)} of the same names' if same else ''}"
    if missing := [name for name in own if name not in known]:
        report.append(f"... not there, and initial: {_by_kind(missing)}")
    if unknown := [name for name in given if name not in known]:
        report.append(f"... there, and not taken: {_by_kind(unknown)}")
    try:
        before, now = (stated_settings(one, path) | _mixer_in_words(one) for one in (stored, settings or {}))
        return report + _other_purposes(before, now)
    except ValueError as error:  # its flow is unknown here, but its weights are a beginning all the same
        return [*report, f"... {error}"]


def adapted(model, weights):
    """Returns those of another network's weights that depend on its grid of tokens, as they are on the model's. There are none
    if that grid is not square or has as many tokens, or of a U-Net, which has no grid."""
    tokens, found = model.tokens_of(weights) if "pos_embed" in weights else 0, {}
    side = math.isqrt(tokens)
    if not side or side**2 != tokens or tokens == model.tokens_of(model.state_dict()):
        return found
    for place, part in model.named_modules():
        prefix = f"{place}." if place else ""
        layer = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
        if layer and hasattr(part, "adapted"):
            found |= {prefix + name: w for name, w in part.adapted(layer, (side, side)).items()}
    return found


def _mixers_of_blocks(weights):
    """Returns {prefix of a block's tensors: name of its mixer} for a DiT's weights: one name for all mixers of a kind, and None
    for unknown ones."""
    mixers = dict.fromkeys(found[0] for name in weights if (found := re.match(r"blocks\.\d+\.attn\.", name)))
    for start in mixers:
        layer = {name.removeprefix(start): w for name, w in weights.items() if name.startswith(start)}
        with suppress(ValueError):
            mixers[start] = read_mixer(layer)[0]
    return mixers


def _mixer_in_words(stored):
    """Returns {"mixer": its name with what weights do not tell of it} from a checkpoint's args, or {} without one."""
    if not isinstance(mixer := stored.get("mixer"), str) or mixer not in MIXERS:
        return {}
    given = " and ".join(f"{flag} {value}" for flag, value in untold(mixer, kind_of(mixer).stored(stored)).items())
    return dict(mixer=f"{mixer} with {given}" if given else mixer)


def _other_purposes(stated, now):
    """Returns a line for each setting that differs between training then and now, and that the weights' names and shapes do not
    show. stated, now: settings from stated_settings, and a mixer in words."""
    names = ["norm", "mixer", "objective", "vae", "vae_digest", "time_intervals"]
    if stated.get("objective") == now.get("objective") == "flow":
        names += ["path", "predict", "time_scale"]
    before, now = (dict(norm="layer", time_scale=1000, time_intervals=128) | known for known in (stated, now))
    differing = [name for name in names if name in before and name in now and before[name] != now[name]]
    one_encoder = "vae_digest" in before and before["vae_digest"] == now.get("vae_digest")
    if one_encoder or {before.get("vae"), now.get("vae")} == {"ema", "mse"}:
        differing = [name for name in differing if name != "vae"]          # another path or another decoder
    return [f"... trained with {name.replace('_', ' ')} {before[name]}, which is {now[name]} here" for name in differing]


def _by_kind(names):
    """Returns names that differ in a number alone, such as a block's, once, with how many there are."""
    kinds = [re.sub(r"\b\d+\b", "*", name) for name in names]
    return ", ".join(f"{kind} ({kinds.count(kind)})" for kind in dict.fromkeys(kinds))
