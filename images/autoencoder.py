"""The space in which a model works: pixels, or the latents of an autoencoder, such as Stable Diffusion's.

A space has channels, and a factor by which its sides are smaller than the image's. encode(images, noise) -> x and
decode(x) -> images, both (B, C, H, W), images in [-1, 1]; noise is standard normal, like x."""

import hashlib
import json
import math
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

# Diffusers' autoencoders that make one map of latents per image. Some give no distribution; their latents have no spread.
KINDS = ("AutoencoderKL", "AsymmetricAutoencoderKL", "AutoencoderKLFlux2", "AutoencoderTiny", "AutoencoderDC", "VQModel")
AT_ONCE = 2**20  # most pixels per batch of an autoencoder, or one image if larger: its activations need much memory
ENCODER, DECODER = ("encoder.", "quant_conv."), ("decoder.", "post_quant_conv.", "quantize.")


class PixelSpace:
    channels, factor = 3, 1

    def load(self, device):
        return self

    def encode(self, images, noise):
        return images

    def decode(self, x):
        return x

    def digest(self, names=None):
        return None


class LatentSpace:
    """Encodes images by an autoencoder, and decodes latents.

    name: "ema" or "mse" for stabilityai/sd-vae-ft-<name> on the hub, or a local folder in diffusers' format, of an
    autoencoder of KINDS or of a pipeline that has one in vae/. FileNotFoundError or ValueError if it is neither.
    """

    def __init__(self, name):
        self.name, self.on_hub = name, name in ("ema", "mse")
        self.source, self.kind, self.channels, self.factor = f"stabilityai/sd-vae-ft-{name}", KINDS[0], 4, 8
        if not self.on_hub:
            self.source, config = find_config(name)
            self.kind = config["_class_name"]
            with quiet_diffusers():
                self.channels, self.factor = latent_shape(name, self.kind, config)

    def load(self, device):
        """Reads the weights. OSError, with the way out, if they cannot be loaded, ValueError if the statistics are wrong."""
        import diffusers.models

        settings = dict(low_cpu_mem_usage=False, ignore_mismatched_sizes=True, output_loading_info=True)
        try:
            with quiet_diffusers():
                variant = None if self.on_hub else find_variant(self.source)
                kind = getattr(diffusers.models, self.kind)
                vae, found = kind.from_pretrained(self.source, variant=variant, **settings)
            check_weights(vae, found)
        except Exception as error:  # damaged files raise nearly anything
            why = "neither cached nor to be had from the hub" if self.on_hub else str(error).strip().partition("\n")[0]
            raise OSError(
                f"the VAE {self.source} could not be loaded ({why}); give --vae a local folder in diffusers' format "
                "(config.json and weights), or work on pixels with --vae none"
            ) from error
        self.vae = vae.to(device).float().eval().requires_grad_(False)
        self.shift, self.scale, self.spread = read_scaling(self.vae, self.channels, self.name)
        return self

    @torch.no_grad()
    def moments(self, images):
        """Returns mean and standard deviation of the images' latents: (B, 2, C, h, w)."""
        return torch.cat([self._moments(part) for part in images.split(self.at_once(*images.shape[2:]))])

    def _moments(self, images):
        mean, std = _encode(self.vae, images)
        return torch.stack([(mean - self.shift) * self.scale / self.spread, std * self.scale / self.spread], dim=1)

    def encode(self, images, noise):
        return draw_latents(self.moments(images), noise)

    @torch.no_grad()
    def decode(self, x):
        n = self.at_once(*(side * self.factor for side in x.shape[2:]))
        return torch.cat([_decode(self.vae, part * self.spread / self.scale + self.shift) for part in x.split(n)])

    def at_once(self, height, width):
        """Returns how many images of that size the autoencoder takes at once."""
        return max(AT_ONCE // (height * width), 1)

    def digest(self, names=ENCODER):
        """Returns a digest of everything on which the moments depend, which a change of decoder leaves the same; with DECODER,
        of everything on which decoded images depend."""
        weights = {name: w for name, w in self.vae.state_dict().items() if name.startswith(names)}
        weights["scaling_factor"] = torch.tensor(self.scale)
        # Settings that change nothing are left out, so that digests in older files and checkpoints stay right.
        weights |= {} if self.kind == KINDS[0] else {self.kind: torch.empty(0)}
        weights |= {"shift_factor": torch.as_tensor(self.shift)} if torch.as_tensor(self.shift).any() else {}
        weights |= {"latents_std": self.spread} if isinstance(self.spread, torch.Tensor) else {}
        return digest_of_weights(weights)


def find_config(name):
    """Reads (folder, config) of the autoencoder in a folder, or in the vae/ of a pipeline's folder. FileNotFoundError or
    ValueError if there is none of KINDS."""
    folders = [folder for folder in (Path(name, "vae"), Path(name)) if (folder / "config.json").is_file()]
    if not folders:
        raise FileNotFoundError(f"--vae {name}: neither ema, mse, none nor a folder that holds config.json or vae/config.json")
    try:
        config = json.loads((folders[0] / "config.json").read_text())
        kind = config.setdefault("_class_name", KINDS[0])
    except (ValueError, AttributeError) as error:
        raise ValueError(f"--vae {name}: its config.json is not that of an autoencoder") from error
    if kind not in KINDS:
        raise ValueError(f"--vae {name} is of the class {kind}; give one of {', '.join(KINDS)}, in diffusers' format")
    if "latent_channels" not in config:
        raise ValueError(f"--vae {name}: its config.json is not that of an {kind}, it has no latent_channels")
    return str(folders[0]), config


def latent_shape(name, kind, config):
    """Returns channels and factor of an autoencoder's latents, from the shapes it gives for an image. ValueError if it does not
    decode the latents to an image."""
    import diffusers.models

    if not hasattr(diffusers.models, kind):
        raise ValueError(f"--vae {name} is of the class {kind}, which needs a newer diffusers")
    try:
        with torch.device("meta"), torch.no_grad():
            vae, image = getattr(diffusers.models, kind).from_config(config), torch.empty(1, 3, 256, 256)
            latents = _encode(vae, image)[0]
            if (shape := _decode(vae, latents).shape) != image.shape:
                raise ValueError(f"it makes {tuple(shape)} of {tuple(image.shape)}")
    except Exception as error:  # a config may hold anything
        why = str(error).strip().partition("\n")[0]
        raise ValueError(f"--vae {name}: no autoencoder of RGB images can be made from its config.json ({why})") from error
    return latents.shape[1], 256 // latents.shape[2]


def find_variant(folder):
    """Returns which variant of the weights a folder holds, such as fp16, or None if it holds the plain ones."""
    files = [path for path in Path(folder).glob("diffusion_pytorch_model*") if path.suffix in (".safetensors", ".bin")]
    variants = sorted(path.stem.partition(".")[2].partition("-")[0] for path in files)
    if not variants:
        raise FileNotFoundError("it holds no diffusion_pytorch_model.safetensors")
    return variants[0] or None


def check_weights(vae, found):
    """Checks that a network got all its weights and nothing else, and that all are finite. ValueError if not."""
    kind = type(vae).__name__
    faults = [f"{key} is missing" for key in found["missing_keys"]]
    faults += [f"{key} is {tuple(there)}, not {tuple(here)}" for key, there, here in found["mismatched_keys"]]
    faults += [f"{key} is unknown to the {kind} of its config.json" for key in found["unexpected_keys"]]
    faults = faults or [f"{key} is not finite" for key, weight in vae.state_dict().items() if not weight.isfinite().all()]
    if faults:
        raise ValueError(f"of its weights, {faults[0]}" + (f", and {len(faults) - 1:,} more" if len(faults) > 1 else ""))


def read_scaling(vae, channels, name):
    """Returns shift, scale and spread, numbers or (C, 1, 1): the model's latents are (z - shift) * scale / spread, where z are
    the autoencoder's own. ValueError for invalid statistics."""
    keys = ("shift_factor", "scaling_factor", "latents_mean", "latents_std")
    shift, scale, mean, std = (vae.config.get(key) for key in keys)
    shift, scale = 0.0 if shift is None else shift, 1.0 if scale is None else scale
    if hasattr(vae, "bn"):  # AutoencoderKLFlux2 has them among its weights
        mean, std = vae.bn.running_mean.tolist(), (vae.bn.running_var + vae.bn.eps).sqrt().tolist()
    alike = mean is None and std is None
    if not (
        _are_numbers([shift, scale], 2)
        and scale > 0
        and (alike or (not shift and _are_numbers(mean, channels) and _are_numbers(std, channels) and min(std) > 0))
    ):
        there = ", ".join(f"{key} {vae.config.get(key)}" for key in keys)
        raise ValueError(
            f"--vae {name}: its config.json has {there}; it should have a scale above 0 and, if anything else, a shift or, for "
            f"each of {channels} channels, a mean and a standard deviation above 0"
        )
    if alike:
        return shift, scale, 1.0
    mean, std = (torch.tensor(numbers, dtype=torch.float32, device=vae.device).view(-1, 1, 1) for numbers in (mean, std))
    return mean, scale, std


def _are_numbers(values, count):
    return isinstance(values, (list, tuple)) and len(values) == count and all(map(_is_number, values))


def _is_number(value):
    return isinstance(value, (int, float)) and math.isfinite(value)


def _encode(vae, images):
    """Returns mean and standard deviation (B, C, h, w) of an autoencoder's own latents, which may have no distribution."""
    z = vae.encode(images, return_dict=False)[0]
    parts = (z, torch.zeros_like(z)) if isinstance(z, torch.Tensor) else (z.mean, z.std)
    return [pixel_unshuffle(part, _patch(vae)) for part in parts]


def _decode(vae, z):
    return vae.decode(pixel_shuffle(z, _patch(vae))).sample


def _patch(vae):
    """Returns the side of the squares of latents that are packed into channels: 1, or that of AutoencoderKLFlux2."""
    return vae.config.get("patch_size", [1])[0]


@contextmanager
def quiet_diffusers():
    """Silences diffusers' own messages about files, which this module reports in one line."""
    from diffusers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)


def draw_latents(moments, noise):                                          # (B, 2, C, h, w), (B, C, h, w)
    mean, std = moments.unbind(1)
    return mean + std * noise                                              # (B, C, h, w)


def digest_of_weights(weights):
    """Returns sixteen hexadecimal digits that tell one state dict from another."""
    digest = hashlib.sha256()
    for name, value in weights.items():
        digest.update(name.encode())
        digest.update(value.contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def load_trained_space(vae, device, trained_digest=None):
    """Loads the space in which a model was trained. trained_digest: of its encoder then, None if it does not matter.

    ValueError if the autoencoder's folder now has another encoder. Those of "ema" and "mse" never change.
    """
    space = open_space(vae).load(device)
    if vae not in ("ema", "mse") and trained_digest not in (None, now := space.digest()):
        raise ValueError(
            f"the autoencoder in {vae} has changed since the checkpoint was trained: the digest of its encoder was "
            f"{trained_digest} and is {now}; --vae {vae}, where a command has that flag, takes it all the same"
        )
    return space


def open_space(vae):
    """Returns the space that a --vae flag names: "none" is pixels."""
    return PixelSpace() if vae == "none" else LatentSpace(vae)
