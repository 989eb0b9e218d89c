"""The latent path with a small autoencoder saved locally in the format of the real one."""

import numpy as np
import pytest
import torch
from PIL import Image

import train
from checkpoint import save_checkpoint
from commands import ALONE, draw, draw_many, fit
from diffusion import create_diffusion
from diffusion.samplers import SAMPLERS
from models import MODELS
from vae import LatentSpace, PixelSpace, open_space


def save_autoencoder(path, levels, channels):
    from diffusers.models import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        block_out_channels=[8] * levels,
        norm_num_groups=4,
        latent_channels=channels,
        layers_per_block=1,
    ).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An autoencoder with the factor and channels of Stable Diffusion's."""
    return save_autoencoder(tmp_path_factory.mktemp("vae") / "small", levels=4, channels=4)


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


@pytest.mark.parametrize(("levels", "channels"), [(3, 4), (4, 16)])
def test_autoencoders_of_other_shapes(tmp_path, levels, channels):
    folder = save_autoencoder(tmp_path / "vae", levels, channels)
    flags = ["--image-size", 32, "--vae", folder, "--global-batch-size", 4, "--max-steps", 1]
    checkpoint = fit(tmp_path / "r", *flags) / "checkpoints" / "0000001.pt"
    assert draw_many(checkpoint, tmp_path / "s", "--num-fid-samples", 1).shape == (1, 32, 32, 3)


@pytest.mark.parametrize(("channels", "by_default"), [(3, "all 3"), (4, "3 of 4"), (16, "all 16")])
def test_guidance_is_on_all_channels_where_there_are_not_four(
    tmp_path, randomize, capsys, caplog, monkeypatch, channels, by_default
):
    """In sample.py, sample_ddp.py and the grids of training, which all say so; a flag that is given holds."""
    vae = "none" if channels == 3 else save_autoencoder(tmp_path / "vae", 3, channels)
    size = 4 if channels == 3 else 16
    model = randomize(MODELS["DiT-N/2"](input_size=4, in_channels=channels, num_classes=10)).eval()
    path = tmp_path / "a.pt"
    save_checkpoint(path, ema=model.state_dict(), args=dict(model="DiT-N/2", mixer="attention", vae=vae, image_size=size))

    def drawn(name, *flags):
        many = draw_many(path, tmp_path / name, "--num-fid-samples", 1, "--cfg-scale", 4, *flags)
        return draw(path, tmp_path / f"{name}.png", *flags), many

    default, three, every = drawn("a"), drawn("b", "--cfg-channels", 3), drawn("c", "--cfg-channels", "all")
    for of_default, of_three, of_every in zip(default, three, every):
        assert np.array_equal(of_default, of_every if channels == 16 else of_three)
        assert np.array_equal(of_three, of_every) == (channels == 3)
    said = [line for line in capsys.readouterr().out.splitlines() if "strength" in line]
    three_of = "all 3" if channels == 3 else f"3 of {channels}"
    for line, which in zip(said, [by_default] * 2 + [three_of] * 2 + [f"all {channels}"] * 2, strict=True):
        assert line.endswith(f"with guidance of strength 4 on {which} channels")

    caplog.set_level("INFO", "train")
    monkeypatch.setattr(train, "SAMPLING_STEPS", 4)
    train.draw_samples(7, model, train.parse_args([]), ALONE, open_space(vae).load("cpu"), tmp_path, None)
    assert caplog.messages[-1].endswith(f"with guidance of strength 4 on {by_default} channels")
    with Image.open(tmp_path / "samples" / "0000007.png") as grid:
        assert np.array_equal(grid, default[0])


def test_training_encodes_with_noise_of_its_own(folder):
    """Each image's latents and the noise that is added to them are drawn apart, and anew at every step."""
    args = train.parse_args(["--vae", folder, "--image-size", "16", "--global-batch-size", "3"])
    space, diffusion = open_space(folder).load("cpu"), create_diffusion("")
    images, labels = torch.rand(3, 3, 16, 16) * 2 - 1, torch.zeros(3, dtype=torch.long)
    first, again, later = (train.draw_batch(images, labels, s, args, ALONE, False, space, diffusion) for s in (1, 1, 2))
    assert torch.equal(first["x_start"], again["x_start"])
    assert not torch.equal(first["x_start"], later["x_start"])
    latents = space.vae.encode(images).latent_dist
    drawn = (first["x_start"] / 0.18215 - latents.mean) / latents.std
    assert 0.5 < drawn.std() < 1.5
    assert (drawn - first["noise"]).abs().min() > 1e-3


def test_pixels_are_clipped_at_every_step_and_latents_never(tmp_path, folder, monkeypatch):
    seen = []
    ddpm = SAMPLERS["ddpm"]
    monkeypatch.setitem(SAMPLERS, "ddpm", lambda *a, **k: seen.append(k["clip_denoised"]) or ddpm(*a, **k))
    for vae in ("none", folder):
        flags = ["--vae", vae, "--image-size", 32, "--global-batch-size", 2, "--max-steps", 1]
        draw(fit(tmp_path / vae[-4:], *flags) / "checkpoints" / "0000001.pt", tmp_path / "a.png", "--class-labels", 1)
    assert seen == [True, False]


def test_a_vae_that_cannot_be_had_says_what_to_do(tmp_path):
    with pytest.raises(OSError, match=r"stabilityai/sd-vae-ft-mse could not be loaded .* give --vae a local folder"):
        LatentSpace("mse").load("cpu")
    with pytest.raises(FileNotFoundError, match="neither ema, mse, none nor a folder"):
        LatentSpace(str(tmp_path))
    for config in ('{"hidden_size": 4}', "[4]", "{"):
        (tmp_path / "config.json").write_text(config)
        with pytest.raises(ValueError, match=r"config\.json is not that of an AutoencoderKL"):
            LatentSpace(str(tmp_path))
    (tmp_path / "config.json").write_text('{"latent_channels": 4, "block_out_channels": [8, 8, 8, 8]}')
    with pytest.raises(OSError, match="could not be loaded"):
        LatentSpace(str(tmp_path)).load("cpu")
