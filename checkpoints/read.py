"""Reads weights from files of many tools, without trusting the file, checks them, and returns them under DiT's names."""

import argparse
import json
import os
import re
import zipfile
import zlib
from contextlib import suppress
from pathlib import Path

import torch

from backbones.pretrained import from_safetensors
from checkpoints.pipelines import INDEX, read_pipeline
from checkpoints.sharded import SETTINGS, check_pieces, read_settings, read_whole
from models import BACKBONES, DiT, backbone_of

# Where weights are in a file, the average first; after DiT's two names those of other tools.
CONTAINERS = (
    "ema", "ema_model", "model_ema", "params_ema", "ema_state_dict", "state_dict_ema",
    "model", "model_state_dict", "state_dict", "params", "module",
)  # fmt: skip
# Prefixes that DistributedDataParallel, AveragedModel, torch.compile and FSDP add to, or insert into, the names of weights.
WRAPPERS = re.compile(r"(?<![^.])(?:(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)+")
FLOATS = {torch.float32, torch.float64, torch.float16, torch.bfloat16}


def average_names(decays):
    """Returns the names of averages in a checkpoint, by decay: the first is `ema`, as DiT has it, the others `ema_<decay>`."""
    return {decay: f"ema_{decay}" if i else "ema" for i, decay in enumerate(decays)}


def average_of_length(length):
    """Returns the key that replaces a decay for an average of that length: see checkpoints/lengths.py."""
    return f"length_{length}"


def lengths_of(stored):
    """Returns the lengths of such averages, from a checkpoint's settings, which may be of another code base."""
    lengths = stored.get("ema_lengths") if isinstance(stored, dict) else None
    return lengths if isinstance(lengths, list) and all(isinstance(length, float) for length in lengths) else []


def averages_of(stored):
    """Returns the names of all averages by decay, from a checkpoint's settings, which may be of another code base."""
    decays = stored.get("ema_decay") if isinstance(stored, dict) else None
    known = isinstance(decays, list) and all(isinstance(decay, float) for decay in decays)
    return average_names([*decays, *map(average_of_length, lengths_of(stored))]) if known else {}


def choose_average(stored, decay, path):
    """Returns the name of the average of that decay, or of the first for None. ValueError names those that there are."""
    names = {None: "ema"} | averages_of(stored)
    if decay not in names:
        raise ValueError(f"--ema {decay}: {path} has averages of decay {', '.join(map(str, averages_of(stored))) or 'unknown'}")
    return names[decay]


def read_checkpoint(path, decay=None):
    """Returns the dict in a file, an empty one for a file of something else; of a folder that FSDP wrote, as ema one of its
    averages, args and step. Tensors of a .pt file are mapped from it, so the file must not change while they are in use;
    `load_checkpoint` compares their checksums.

    Unpickles nothing but tensors, plain containers and argparse.Namespace. ValueError for anything else.
    """
    if os.path.isdir(path):
        if Path(path, INDEX).is_file():
            contents = read_pipeline(path)
            choose_average(contents["args"], decay, path)  # a pipeline has one average: any other is an error
            return contents
        if not Path(path, SETTINGS).is_file():
            raise ValueError(f"{path} is {_kind_of_folder(path)}")
        stored = read_settings(path)
        check_pieces(path)
        average = choose_average(stored["args"], decay, path)
        return dict(ema=read_whole(path, average), args=stored["args"], step=stored["step"])
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        if Path(path).suffix == ".safetensors":
            weights, stored = from_safetensors(path)
            return dict(ema=weights, args=json.loads(stored.get("args", "{}")))
        entries = _zip_entries(path)
        mapped = bool(entries) and all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
        with torch.serialization.safe_globals([argparse.Namespace]):
            contents = torch.load(str(path), map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # the unpickler raises nearly anything on damaged bytes
        if refused := _refused_types(path, error):
            raise ValueError(
                f"{path} holds {', '.join(refused)}, and only tensors and plain values are read, since anything else can run "
                "code; if you trust the file, read it with torch.load(..., weights_only=False) and save its weights as "
                "ema and its settings as args, a dict of numbers and strings"
            ) from error
        raise ValueError(f"{path} is not a whole checkpoint of tensors: it is damaged, cut short or something else") from error
    return contents if isinstance(contents, dict) else {}


def _zip_entries(path):
    """Returns what a .pt file consists of; nothing for PyTorch's older format. BadZipFile if any but a tensor is damaged, which
    PyTorch itself would not notice."""
    if not zipfile.is_zipfile(path):
        return []
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        for entry in entries:
            if "/data/" not in entry.filename and entry.CRC:  # 0 if its writer computed none
                archive.read(entry)
    return entries


def _refused_types(path, error):
    """Returns the names of the types in a file that are not safe to read, as far as PyTorch tells."""
    if Path(path).suffix == ".safetensors":
        return []
    with suppress(Exception), torch.serialization.safe_globals([argparse.Namespace]):
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
    return re.findall(r"GLOBAL ([\w.]+)", str(error))


def _kind_of_folder(path):
    """Returns what kind of folder this is, as it is no checkpoint of FSDP, and what to give instead, in words."""
    there = set(os.listdir(path))
    if "checkpoints" in there:
        return "the folder of a run; give one of the files in its checkpoints/"
    if "config.json" in there:
        return "a folder of diffusers or transformers, but no pipeline; give that of a DiTPipeline, with model_index.json"
    if "latest" in there or any(name.endswith("_model_states.pt") for name in there):
        return "a checkpoint of DeepSpeed; give the file that its zero_to_fp32.py makes of it"
    if ".metadata" in there:
        return f"a distributed checkpoint without {SETTINGS}; give the file that PyTorch's dcp_to_torch_save makes of it"
    return "a folder and no checkpoint; give a file"


def load_checkpoint(path, decay=None):
    """Returns (weights, args) of a checkpoint: its EMA's state dict if it has one, that of `decay` if it has several, and its
    settings as a dict. ValueError for anything else, and for weights that are damaged or not finite.

    Weights are under the names that DiT has for them, without prefixes that other tools give them.
    """
    contents = read_checkpoint(path, decay)
    args = contents.get("args")
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    names = CONTAINERS if decay is None or os.path.isdir(path) else [choose_average(args, decay, path)]
    weights = next((contents[name] for name in names if isinstance(contents.get(name), dict)), contents)
    weights = _under_plain_names(weights, path)
    backbone = backbone_of(weights) or DiT
    if missing := [name for name in backbone.read_from if name not in weights]:
        more = _of_another_tool(contents, weights)
        raise ValueError(f"{path} holds no {backbone.__name__}: {missing[0]} is missing{more}")
    _check_weights(weights, path)
    # Copies, for these weights may outlive the file, or be written over it.
    return {name: w.clone() for name, w in weights.items()}, args if isinstance(args, dict) else {}


def _under_plain_names(weights, path):
    """Returns the tensors of a network without what wrappers put into their names, and without a name before all of them.

    Of several networks it is the one whose name has "ema" in it; ValueError if that is none or several.
    """
    named = {WRAPPERS.sub("", name): w for name, w in weights.items() if isinstance(name, str) and isinstance(w, torch.Tensor)}
    named.pop("n_averaged", None)
    known = "|".join(re.escape(backbone.read_from[0]) for backbone in BACKBONES)
    found = [re.fullmatch(rf"(.*\.|)({known})", name) for name in named]
    prefixes = list(dict.fromkeys(match[1] for match in found if match))
    if len(prefixes) > 1 and "" not in prefixes:
        averages = [prefix for prefix in prefixes if "ema" in prefix]
        if len(averages) != 1:
            raise ValueError(f"{path} holds several networks ({', '.join(prefixes)}); save the weights of one alone")
        prefixes = averages
    if not prefixes or "" in prefixes:
        return named
    return {name.removeprefix(prefixes[0]): w for name, w in named.items() if name.startswith(prefixes[0])}


def _of_another_tool(contents, weights):
    if any(name.startswith("transformer_blocks.") for name in weights):
        return "; its names are those of diffusers' DiTTransformer2DModel, which are not translated"
    if "shadow_params" in contents:
        return "; it is diffusers' EMAModel, which keeps no names; save the state dict of the model that it was copied to"
    tool = "Lightning's, and " if "pytorch-lightning_version" in contents else ""
    return f"; it is {tool}of {next(iter(weights))} and {len(weights) - 1:,} others" if weights else ""


def _check_weights(weights, path):
    """Raises a ValueError, with a name, unless all are floating-point numbers, finite in float32, and as they were written."""
    sums = {(entry.file_size, entry.CRC) for entry in _zip_entries(path)}
    whole = set()
    for name, w in weights.items():
        if w.dtype not in FLOATS or w.layout != torch.strided or w.is_meta:
            raise ValueError(f"{path}: {name} is {w.dtype}, {w.layout} on {w.device}; weights are floating-point numbers")
        storage = w.untyped_storage()
        if sums and storage.nbytes() and storage.data_ptr() not in whole:
            written = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
            if not sums & {(len(written), zlib.crc32(written)), (len(written), 0)}:  # 0 if its writer computed none
                raise ValueError(f"{path} is damaged ({name})")
            whole.add(storage.data_ptr())
        # Testing the extremes is enough, since they are NaN if any number is, and faster than testing every number.
        if w.numel() and not torch.stack(w.aminmax()).float().isfinite().all():
            wrong = w.numel() - w.float().isfinite().sum().item()
            raise ValueError(f"{path}: {name} is not finite; {wrong:,} of its {w.numel():,} numbers are NaN or infinite")
