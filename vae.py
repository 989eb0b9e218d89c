"""Where a model lives: in pixels, or in the latent space of a Stable Diffusion autoencoder.

A space has channels, and a factor by which it is smaller than the image. encode(images, noise) -> x and
decode(x) -> images, both (B, C, H, W), images in [-1, 1]; noise is standard normal, like x."""

import hashlib
import json
from pathlib import Path

import torch


class PixelSpace:
    channels, factor = 3, 1

    def load(self, device):
        return self

    def encode(self, images, noise):
        return images

    def decode(self, x):
        return x


class LatentSpace:
    """name: "ema" or "mse" for stabilityai/sd-vae-ft-<name> on the hub, or a local folder in diffusers' format."""

    def __init__(self, name):
        self.on_hub = name in ("ema", "mse")
        self.source = f"stabilityai/sd-vae-ft-{name}" if self.on_hub else name
        self.channels, self.factor = 4, 8
        if not self.on_hub:
            config = Path(name, "config.json")
            if not config.is_file():
                raise FileNotFoundError(f"--vae {name}: neither ema, mse, none nor a folder that holds config.json")
            try:
                config = json.loads(config.read_text())
                self.channels, self.factor = config["latent_channels"], 2 ** (len(config["block_out_channels"]) - 1)
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"--vae {name}: its config.json is not that of an AutoencoderKL") from error

    def load(self, device):
        """Reads the weights. OSError says what to do if they cannot be had."""
        from diffusers.models import AutoencoderKL

        try:
            self.vae = AutoencoderKL.from_pretrained(self.source).to(device).eval().requires_grad_(False)
        except (OSError, ValueError) as error:
            why = "neither cached nor to be had from the hub" if self.on_hub else str(error).splitlines()[0]
            raise OSError(
                f"the VAE {self.source} could not be loaded ({why}); give --vae a local folder in diffusers' format "
                "(config.json and weights), or work on pixels with --vae none"
            ) from error
        return self

    @torch.no_grad()
    def moments(self, images):
        """Mean and standard deviation of the images' latents: (B, 2, C, h, w)."""
        latents = self.vae.encode(images).latent_dist
        return torch.stack([latents.mean, latents.std], dim=1) * self.vae.config.scaling_factor

    def encode(self, images, noise):
        return draw_latents(self.moments(images), noise)

    @torch.no_grad()
    def decode(self, x):
        return self.vae.decode(x / self.vae.config.scaling_factor).sample

    def digest(self):
        """Of all that the moments depend on: the same for autoencoders that differ in their decoders alone."""
        weights = {name: w for name, w in self.vae.state_dict().items() if name.startswith(("encoder.", "quant_conv."))}
        return digest(weights | {"scaling_factor": torch.tensor(self.vae.config.scaling_factor)})


def draw_latents(moments, noise):                                          # (B, 2, C, h, w), (B, C, h, w)
    mean, std = moments.unbind(1)
    return mean + std * noise                                              # (B, C, h, w)


def digest(weights):
    """Sixteen hexadecimal digits that tell one state dict from another."""
    digest = hashlib.sha256()
    for name, value in weights.items():
        digest.update(name.encode())
        digest.update(value.contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def open_space(vae):
    """The space that a --vae flag names: "none" is pixels."""
    return PixelSpace() if vae == "none" else LatentSpace(vae)
