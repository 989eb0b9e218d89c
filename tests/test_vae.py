"""The latent path with a small autoencoder saved locally in the format of the real one."""

import pytest
import torch

import train
from commands import ALONE, draw, draw_many
from vae import LatentSpace, PixelSpace, open_space


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from diffusers.models import AutoencoderKL

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vae") / "small"
    AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[8] * 4,
        norm_num_groups=4,
        latent_channels=4,
        layers_per_block=1,
    ).save_pretrained(path)
    return str(path)


def test_latents_are_drawn_around_the_encoders_mean(folder):
    space = open_space(folder).load("cpu")
    assert (space.channels, space.factor) == (4, 8)
    images = torch.rand(2, 3, 16, 24) * 2 - 1
    mean = space.encode(images, torch.zeros(2, 4, 2, 3))
    spread = space.encode(images, torch.ones(2, 4, 2, 3)) - mean
    latents = space.vae.encode(images).latent_dist
    torch.testing.assert_close(mean, 0.18215 * latents.mean)
    torch.testing.assert_close(spread, 0.18215 * latents.std)
    assert space.decode(mean).shape == images.shape
    torch.testing.assert_close(space.decode(mean), space.vae.decode(latents.mean).sample)


def test_pixels_are_their_own_space():
    x = torch.randn(1, 3, 4, 4)
    space = open_space("none").load("cpu")
    assert isinstance(space, PixelSpace)
    assert torch.equal(space.decode(space.encode(x, None)), x)


def test_trains_and_samples_in_latent_space(tmp_path, folder):
    flags = ["--model", "DiT-N/2", "--mixer", "pdessm", "--vae", folder, "--image-size", "32", "--num-classes", "10"]
    flags += ["--global-batch-size", "4", "--max-steps", "2", "--device", "cpu", "--results-dir", str(tmp_path / "r")]
    train.main(train.parse_args(flags), ALONE)
    checkpoint = str(tmp_path / "r" / "000-DiT-N-2" / "checkpoints" / "0000002.pt")
    assert draw(checkpoint, tmp_path / "grid.png", "--class-labels", 1, 2).shape == (2 + 66, 2 + 2 * 66, 3)
    assert draw_many(checkpoint, tmp_path / "s", "--num-fid-samples", 3).shape == (3, 32, 32, 3)
    assert (tmp_path / "s" / "DiT-N-2-0000002-size-32-vae-small-cfg-1.5-seed-0.npz").exists()
    with pytest.raises(ValueError, match="--vae none contradicts"):
        draw(checkpoint, tmp_path / "grid.png", "--vae", "none")


def test_a_vae_that_cannot_be_had_says_what_to_do(tmp_path):
    with pytest.raises(OSError, match=r"stabilityai/sd-vae-ft-mse could not be loaded .* give --vae a local folder"):
        LatentSpace("mse").load("cpu")
    with pytest.raises(FileNotFoundError, match="neither ema, mse, none nor a folder"):
        LatentSpace(str(tmp_path))
    (tmp_path / "config.json").write_text('{"latent_channels": 4, "block_out_channels": [8, 8, 8, 8]}')
    with pytest.raises(OSError, match="could not be loaded"):
        LatentSpace(str(tmp_path)).load("cpu")
