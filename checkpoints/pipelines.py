"""Folders of diffusers: converts to and from its DiTPipeline, and writes a pipeline with its own code for other networks."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from backbones.parts import grid_embedding
from backbones.pretrained import from_safetensors, public, to_safetensors
from images.autoencoder import open_space
from mixers import kind_of
from models import DiT

INDEX, CONFIG, WEIGHTS = "model_index.json", "config.json", "diffusion_pytorch_model"
NETWORK, NULL = "network", 1000  # the module beside a network of ours; DiTPipeline's null class
HERE = Path(__file__).parent
INTERVALS = 127  # over which diffusers' frequencies of timesteps fall from 1 to 1 / 10000; DiT has 128
BETAS = dict(beta_start=0.0001, beta_end=0.02, beta_schedule="linear", num_train_timesteps=1000)
# Names of DiT's weights and of those of DiTTransformer2DModel, whose blocks all have the embedders of timestep and class.
OUTER = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
INNER = {
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm1.linear",
}
SHARED = {
    "t_embedder.mlp.0": "norm1.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "norm1.emb.timestep_embedder.linear_2",
}
TABLE, THEIR_TABLE = "y_embedder.embedding_table.weight", "norm1.emb.class_embedder.embedding_table.weight"
QKV = ("attn1.to_q", "attn1.to_k", "attn1.to_v")


def write_pipeline(model, settings, out):
    """Writes a network and what its images need as a folder of diffusers: a DiTPipeline where that can draw its images, and
    otherwise a pipeline whose code lies beside it. Returns how to read it. ValueError for a network that neither can be."""
    check_exportable(model, settings)
    space = open_space(settings["vae"])
    vae = space.load("cpu").vae if settings["vae"] != "none" else None
    if vae is not None and isinstance(space.spread, torch.Tensor):
        raise ValueError(f"--vae {settings['vae']} scales each channel by itself, which no exported pipeline does")
    names = model.class_names or []
    labels = {n: names[n] if n < len(names) else str(n) for n in range(model.num_classes)}
    own = is_public(model, settings, vae)
    index = {"_class_name": "DiTPipeline" if own else ["pipeline", "PDEPipeline"], "id2label": labels}
    folder = Path(out, "transformer")
    folder.mkdir(parents=True)
    if own:
        weights, config = to_diffusers(model)
        trained = json.dumps(dict(classes=len(names)) if names else {})    # the others have their numbers for names
        save_file(weights, folder / f"{WEIGHTS}.safetensors", dict(format="pt", args=trained))
        index["transformer"] = ["diffusers", "DiTTransformer2DModel"]
        if settings.get("time_intervals") != INTERVALS:
            shutil.copy(HERE / "exported_dit.py", Path(out, "pipeline.py"))
    else:
        config = own_config(model, settings)
        (folder / f"{WEIGHTS}.safetensors").write_bytes(to_safetensors(model.state_dict(), public(model.settings or {})))
        shutil.copy(HERE / "exported_network.py", folder / f"{NETWORK}.py")
        shutil.copy(HERE / "exported_pipeline.py", Path(out, "pipeline.py"))
        index |= dict(transformer=[NETWORK, "DiT"], time_scale=settings["time_scale"], predict=settings["predict"])
    (folder / CONFIG).write_text(json.dumps(config, indent=1))
    index["scheduler"] = write_scheduler(settings, pixels=vae is None, folder=Path(out, "scheduler"))
    index["vae"] = [None, None] if vae is None else ["diffusers", type(vae).__name__]
    if vae is not None:
        vae.save_pretrained(Path(out, "vae"))
    Path(out, INDEX).write_text(json.dumps(index, indent=1))
    code = f"custom_pipeline={str(out)!r}, trust_remote_code=True"
    return f"DiTPipeline.from_pretrained({str(out)!r})" if own else f"DiffusionPipeline.from_pretrained({str(out)!r}, {code})"


def check_exportable(model, settings):
    """Raises a ValueError for a network that no pipeline here can draw with."""
    options = set(settings["mixer_options"].values()) - {None, False, "sincos"} if settings["mixer"] == "attention" else set()
    plain = settings.get("mlp", "gelu") == "gelu" and settings.get("norm", "layer") == "layer"
    plain = plain and not settings["mixer_options"].get("attention_every")
    if type(model) is not DiT or not plain or options or kind_of(settings["mixer"]).name not in ("attention", "pde"):
        what = f"{settings['model']} with the mixer {settings['mixer']}" + ("" if plain else " and other layers than DiT's")
        raise ValueError(f"{what} has no pipeline: those are of DiT with attention or PDEs; --format hub takes all networks")
    if settings["predict"] == "x" and settings["path"] != "linear":
        path = settings["path"]
        raise ValueError(f"a network that predicts images on the path {path} has no pipeline; --format hub takes all networks")


def is_public(model, settings, vae):
    """Says whether diffusers' own DiTPipeline draws a network's images."""
    plain = type(vae).__name__ == "AutoencoderKL" and not vae.config.get("shift_factor")
    square = model.input_size[0] == model.input_size[1]
    diffusion = settings["objective"] == "diffusion" and settings["mixer"] == "attention"
    return plain and square and diffusion and model.num_classes <= NULL


def write_scheduler(settings, pixels, folder):
    """Writes the scheduler of a network's objective, and returns its entry in the index."""
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

    if settings["objective"] == "flow":
        scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=settings["time_shift"])
    else:
        scheduler = DDIMScheduler(**BETAS, clip_sample=pixels)
    scheduler.save_pretrained(folder)
    return ["diffusers", type(scheduler).__name__]


def own_config(model, settings):
    """Returns the arguments of exported_network.DiT for a network of ours."""
    pde = None if settings["mixer"] == "attention" else settings["mixer_options"]
    return {
        "_class_name": "DiT", "sample_size": model.input_size, "patch_size": model.patch_size, "in_channels": model.in_channels,
        "hidden_size": model.pos_embed.shape[2], "depth": len(model.blocks), "num_heads": model.num_heads,
        "num_classes": model.num_classes, "learn_sigma": model.learn_sigma, "pde": pde,
        "intervals": settings.get("time_intervals", 128),
    }  # fmt: skip


def to_diffusers(model):
    """Returns the weights of a DiT with attention under the names of DiTTransformer2DModel, and its configuration. Its table of
    classes is filled up with the null class, which DiTPipeline takes to be number 1000."""
    ours = {name: w.detach().contiguous() for name, w in model.state_dict().items()}
    weights, depth, hidden = {}, len(model.blocks), model.pos_embed.shape[2]
    table = ours[TABLE]
    table = torch.cat([table, table[-1:].expand(NULL + 1 - len(table), -1)])
    for kind in ("weight", "bias"):
        weights |= {f"{theirs}.{kind}": ours[f"{name}.{kind}"] for name, theirs in OUTER.items()}
        for i in range(depth):
            block = f"transformer_blocks.{i}."
            weights |= {f"{block}{theirs}.{kind}": ours[f"blocks.{i}.{name}.{kind}"] for name, theirs in INNER.items()}
            weights |= {f"{block}{theirs}.{kind}": ours[f"{name}.{kind}"] for name, theirs in SHARED.items()}
            weights |= {f"{block}{name}.{kind}": w for name, w in zip(QKV, ours[f"blocks.{i}.attn.qkv.{kind}"].chunk(3))}
            weights[f"{block}{THEIR_TABLE}"] = table
    config = {
        "_class_name": "DiTTransformer2DModel", "num_attention_heads": model.num_heads,
        "attention_head_dim": hidden // model.num_heads, "in_channels": model.in_channels, "out_channels": model.out_channels,
        "num_layers": depth, "sample_size": model.input_size[0], "patch_size": model.patch_size,
        "num_embeds_ada_norm": NULL, "norm_eps": 1e-6,
    }  # fmt: skip
    return {name: w.clone() for name, w in weights.items()}, config


def from_diffusers(theirs, config, classes):
    """Returns the weights of a DiTTransformer2DModel under DiT's names. classes: how many there are, None for all of its table.
    ValueError if it is no such network, or its blocks have different embedders."""
    ours, table = {}, theirs[f"transformer_blocks.0.{THEIR_TABLE}"]
    for i in range(config["num_layers"]):
        block = f"transformer_blocks.{i}."
        for shared in [THEIR_TABLE, *(f"{name}.{kind}" for name in SHARED.values() for kind in ("weight", "bias"))]:
            if not torch.equal(theirs[block + shared], theirs[f"transformer_blocks.0.{shared}"]):
                raise ValueError(f"block {i} has another {shared} than block 0, where DiT has one for all")
        for kind in ("weight", "bias"):
            ours |= {f"blocks.{i}.{name}.{kind}": theirs[f"{block}{there}.{kind}"] for name, there in INNER.items()}
            ours[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat([theirs[f"{block}{name}.{kind}"] for name in QKV])
    for kind in ("weight", "bias"):
        ours |= {f"{name}.{kind}": theirs[f"{there}.{kind}"] for name, there in OUTER.items()}
        ours |= {f"{name}.{kind}": theirs[f"transformer_blocks.0.{there}.{kind}"] for name, there in SHARED.items()}
    filled = classes is not None and classes < len(table) - 1 and (table[classes:] == table[-1]).all()
    ours[TABLE] = torch.cat([table[:classes], table[-1:]]) if filled else table
    side = config["sample_size"] // config["patch_size"]
    ours["pos_embed"] = grid_embedding(side, side, config["num_attention_heads"] * config["attention_head_dim"])
    return ours


def read_pipeline(path):
    """Reads a pipeline's folder as a checkpoint: a dict of ema and args. ValueError for one that is not of DiT."""
    try:
        index = json.loads(Path(path, INDEX).read_text())
        config = json.loads(Path(path, "transformer", CONFIG).read_text())
        kind = config["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is a pipeline of diffusers without a transformer that can be read ({error})") from error
    if kind not in ("DiT", "DiTTransformer2DModel", "Transformer2DModel"):
        raise ValueError(f"{path} is a pipeline of diffusers with a {kind}; those with a DiTTransformer2DModel are read")
    weights, args = _read_weights(Path(path, "transformer"))
    vae = dict(vae=str(path)) if Path(path, "vae").is_dir() else {}
    if kind == "DiT":
        return dict(ema=weights, args=args | vae)
    labels = {int(number): name for number, name in (index.get("id2label") or {}).items()}
    names = [labels.get(n, str(n)) for n in range(len(labels))][: args.get("classes")]
    while "classes" not in args and names and names[-1] == str(len(names) - 1):  # an older folder's classes without images
        names.pop()
    named = dict(class_names=names) if names else {}
    try:
        weights = from_diffusers(weights, config, len(labels) if "id2label" in index else None)
    except KeyError as error:
        raise ValueError(f"{path} holds no DiTTransformer2DModel: {error.args[0]} is missing") from error
    return dict(ema=weights, args=dict(objective="diffusion", time_intervals=INTERVALS) | named | vae)


def _read_weights(folder):
    """Returns the tensors of a network in diffusers' files, and what safetensors state beside them."""
    files = [folder / f"{WEIGHTS}{ending}" for ending in (".safetensors", ".bin")]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise ValueError(f"{folder} holds neither {WEIGHTS}.safetensors nor {WEIGHTS}.bin")
    try:
        if file.suffix == ".bin":
            return torch.load(file, map_location="cpu", weights_only=True), {}
        weights, stored = from_safetensors(file)
        return weights, json.loads(stored.get("args", "{}"))
    except Exception as error:  # damaged bytes raise nearly anything
        raise ValueError(f"{file} is no whole file of tensors alone: it is damaged, cut short or something else") from error
