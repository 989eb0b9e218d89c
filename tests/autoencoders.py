"""Small autoencoders of every kind, saved in the format of the real ones."""

import diffusers
import diffusers.models
import pytest
import torch


def save_autoencoder(path, levels, channels, kind="AutoencoderKL", **config):
    """A small one, random, whose latents are smaller by 2^(levels - 1)."""
    blocks = dict(down_block_types=["DownEncoderBlock2D"] * levels, up_block_types=["UpDecoderBlock2D"] * levels)
    blocks |= dict(norm_num_groups=4)
    width, once = [8] * levels, [1] * levels
    of_kind = dict(
        AutoencoderKL=blocks | dict(block_out_channels=width, layers_per_block=1),
        AsymmetricAutoencoderKL=blocks | dict(down_block_out_channels=width, up_block_out_channels=[16] * levels),
        AutoencoderKLFlux2=blocks | dict(block_out_channels=width),
        AutoencoderTiny=dict(
            encoder_block_out_channels=width, decoder_block_out_channels=width, num_encoder_blocks=once, num_decoder_blocks=once
        ),
        AutoencoderDC=dict(
            encoder_block_out_channels=width, decoder_block_out_channels=width, encoder_layers_per_block=once,
            decoder_layers_per_block=once, encoder_qkv_multiscales=[[]] * levels, decoder_qkv_multiscales=[[]] * levels,
        ),
        VQModel=blocks | dict(block_out_channels=width),
    )  # fmt: skip
    if not hasattr(diffusers.models, kind):
        pytest.skip(f"diffusers {diffusers.__version__} has no {kind}")
    torch.manual_seed(0)
    vae = getattr(diffusers.models, kind)(**of_kind[kind], latent_channels=channels, **config)
    if kind == "AutoencoderKLFlux2":
        vae.bn.running_mean.normal_()
        vae.bn.running_var.uniform_(0.5, 2)
    vae.save_pretrained(path)
    return str(path)
