"""Saves and loads networks as folders in Hugging Face's format: config.json, model.safetensors, and README.md, the card."""

import json
import shlex
from pathlib import Path

import torch
from huggingface_hub import ModelCard, ModelCardData, PyTorchModelHubMixin, hf_hub_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from machine.files import whole_file, write_json

WEIGHTS = "model.safetensors"
# Settings of a run that tell where and how it ran, not what was trained; some are paths on its machine.
WHEREABOUTS = {
    "data_path", "val_path", "results_dir", "resume", "init_from", "weights", "device", "num_workers", "check_data",
    "max_bad_images", "bad_images", "allow_changes", "tracker", "ckpt_every", "keep_last", "keep_every", "log_every",
    "sample_every", "probe_every", "features", "parallel", "grad_checkpointing", "grad_accum", "ema_device", "max_skipped",
    "compile", "backend", "deterministic",
}  # fmt: skip
NO_FLAGS = {"class_names", "data", "vae_digest", "first_seed"}
NEGATED = {"ema_warmup", "tf32"}  # flags that are on unless --no-... is given


def to_safetensors(weights, settings, **more):
    """Returns a state dict as bytes of a safetensors file, with settings, a dict, as JSON and further text as metadata."""
    whole = {name: w.detach().clone(memory_format=torch.contiguous_format) for name, w in weights.items()}
    return save(whole, dict(format="pt", args=json.dumps(settings, default=str, skipkeys=True), **more))


def from_safetensors(path):
    """Returns the tensors of a safetensors file, by name, and its metadata, a dict of texts."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


class Pretrained(PyTorchModelHubMixin):
    """Adds from_pretrained(folder or id), save_pretrained(folder) and push_to_hub(id) of huggingface_hub to a network.

    settings: the settings that training recorded, as in a checkpoint's args; they are also stored in the file of weights, so
    that every command can read the folder.
    """

    settings = None

    def _save_pretrained(self, folder):
        config, size, weights = self._hub_mixin_config, self.input_size, self.state_dict()
        if size != (trained := self.check_size(config["input_size"])):     # positions elsewhere depend on the trained grid
            weights = self.resize(trained).state_dict()
            self.resize(size)
        shapes = {name: w.shape for name, w in weights.items()}
        with torch.device("meta"):
            again = type(self)(**config)
        if {name: w.shape for name, w in again.state_dict().items()} != shapes:
            raise ValueError(f"this {type(self).__name__} has parts without a name, such as a mixer given by its class")
        with whole_file(Path(folder, WEIGHTS), "weights") as file:
            file.write(to_safetensors(weights, public(self.settings or {}), size=json.dumps(size)))
        write_json(Path(folder, "config.json"), config, "configuration")

    @classmethod
    def _from_pretrained(cls, *, model_id, revision, cache_dir, force_download, local_files_only, token, **arguments):
        path = Path(model_id, WEIGHTS)
        if not Path(model_id).is_dir():
            how = dict(revision=revision, cache_dir=cache_dir, force_download=force_download, token=token)
            path = hf_hub_download(model_id, WEIGHTS, local_files_only=local_files_only, **how)
        try:
            model = cls(**arguments)
            weights, stored = from_safetensors(path)
            model.load_state_dict(weights)
            model.settings = json.loads(stored["args"])
            size = tuple(json.loads(stored.get("size", "[]")))
            if size and size != model.input_size:
                model.resize(size)
        except (TypeError, RuntimeError, KeyError, SafetensorError) as error:
            raise ValueError(f"{model_id} holds no {cls.__name__} that save_pretrained wrote ({error})") from error
        model.class_names = model.settings.get("class_names") or None
        model.trained_classes = len(model.class_names or range(model.num_classes))
        return model.eval()

    def generate_model_card(self, **facts):
        return ModelCard(card(self, self.settings or {}, **facts))


def public(settings):
    """Returns settings without those in WHEREABOUTS, which only concern the machine of the run. Of the weights with which a run
    began the file's name is kept, since its seed does not tell them."""
    begun = {"init_from": Path(str(settings["init_from"])).name} if settings.get("init_from") else {}
    return {name: value for name, value in settings.items() if name not in WHEREABOUTS} | begun


def card(model, settings, name="this model", steps=None, metrics=None):
    """Returns a model card: the network, its data, how long it was trained, its metrics, and the commands to use it.

    name: its value for --ckpt. steps: training steps. metrics: {name: value}.
    """
    kind, mixer = settings.get("model", type(model).__name__), settings.get("mixer", "attention")
    classes = ", ".join(map(str, (model.class_names or [])[:200]))
    data, count = settings.get("data_path"), (settings.get("data") or {}).get("images")
    images = "/".join(Path(data).parts[-2:]) if data else "the digits of scikit-learn"
    images += f", {count:,} images" if count else ""
    batch = settings.get("global_batch_size") if steps else None
    rows = "".join(f"| {what} | {number:.6g} |\n" for what, number in (metrics or {}).items())
    flags = [_as_flag(*item) for item in public(settings).items() if item[0] not in NO_FLAGS]
    flags += ["--data-path DATA"] if data else []
    ckpt = f"--ckpt {shlex.quote(name)}"
    header = ModelCardData(library_name="pde-ssm-dit", tags=["image-generation", "diffusion-transformer", mixer])
    parts = [
        f"---\n{header.to_yaml()}\n---\n\n# {Path(name).name}\n",
        f"{kind} with the mixer {mixer}: {sum(p.numel() for p in model.parameters()):,} parameters, trained for "
        f"{settings.get('objective', 'diffusion')}.\n",
        f"## Data\n\n{images}.\n" if {"data", "data_path"} <= settings.keys() else "",  # a path is left out of what is exported
        f"Classes, by number from 0: {classes}\n" if classes else "",
        f"## Training\n\n{steps:,} steps of {batch:,} images.\n" if batch else "",
        f"    python train.py {' '.join(filter(None, flags))}\n" if batch else "",
        f"## Measures\n\n| | |\n|---|---|\n{rows}" if rows else "",
        f"## Use\n\n    python sample.py {ckpt}\n    python sample_ddp.py {ckpt} --evaluate REFERENCE\n",
    ]
    return "\n".join(filter(None, parts))


def _as_flag(name, value):
    flag = f"--{name.replace('_', '-')}"
    if name in NEGATED and value is False:
        return f"--no-{name.replace('_', '-')}"
    if value is None or value is False or isinstance(value, dict) or (name == "num_classes" and value == 0):
        return ""
    return flag if value is True else f"{flag} {shlex.join(map(str, value if isinstance(value, list) else [value]))}"
