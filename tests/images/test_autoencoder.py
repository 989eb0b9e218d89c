"""The latent path with a small autoencoder saved locally in the format of the real one."""

import copy
import json
import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.models import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file, save_file

import train
from autoencoders import save_autoencoder
from checkpoints.build import save_checkpoint
from commands import ALONE, draw, draw_many, fit
from diffusion import create_diffusion
from diffusion.samplers import SAMPLERS
from images import encode
from images.autoencoder import DECODER, KINDS, LatentSpace, PixelSpace, digest_of_weights, open_space
from models import MODELS
from training import watching
from training.batches import BadImages, draw_batch
from training.runs import Journal

WEIGHTS = "diffusion_pytorch_model.safetensors"


def change(folder, part):
    """Gives an autoencoder another encoder or decoder, in its folder."""
    weights = load_file(Path(folder, WEIGHTS))
    weights[f"{part}.conv_in.bias"] += 1
    save_file(weights, Path(folder, WEIGHTS))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An autoencoder with the factor and channels of Stable Diffusion's."""
    return save_autoencoder(tmp_path_factory.mktemp("vae") / "small", levels=4, channels=4)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return save_autoencoder(tmp_path_factory.mktemp("vae") / "smaller", levels=2, channels=4)


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
    monkeypatch.setattr(watching, "SAMPLING_STEPS", 4)
    space = open_space(vae).load("cpu")
    watch = watching.Watch(space, "diffusion", {}, BadImages([]), sample_every=7)
    watch.show(7, model, False, ALONE, Journal(tmp_path))
    assert caplog.messages[-1].endswith(f"with guidance of strength 4 on {by_default} channels")
    with Image.open(tmp_path / "samples" / "0000007.png") as grid:
        assert np.array_equal(grid, default[0])


def test_training_encodes_with_noise_of_its_own(folder):
    """Each image's latents and the noise that is added to them are drawn apart, and anew at every step."""
    space, diffusion = open_space(folder).load("cpu"), create_diffusion("")
    images, labels = torch.rand(3, 3, 16, 16) * 2 - 1, torch.zeros(3, dtype=torch.long)
    how = dict(seed=0, batch_size=3, flip=False, space=space, objective=diffusion, processes=ALONE)
    first, again, later = (draw_batch(images, labels, step, **how) for step in (1, 1, 2))
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


def column(*numbers):
    return torch.tensor(numbers).view(1, -1, 1, 1)


def patches(z):
    """Squares of two by two latents as one of four times as many channels."""
    return torch.stack([z[:, :, row::2, column::2] for row in (0, 1) for column in (0, 1)], dim=2).flatten(1, 2)


def unpatched(x):
    z = torch.empty(len(x), x.shape[1] // 4, 2 * x.shape[2], 2 * x.shape[3])
    for corner in range(4):
        z[:, :, corner // 2 :: 2, corner % 2 :: 2] = x[:, corner::4]
    return z


def flux2(vae):
    return vae.bn.running_mean[:, None, None], (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()[:, None, None]


MEAN, STD = (0.5, -1.0, 0.25, 2.0), (2.0, 0.5, 3.0, 0.7)
# kind, channels, config, channels and factor of the model's latents, from the autoencoder's latents to them, and back
FORMULAS = {
    "stable diffusion": (KINDS[0], 4, {}, (4, 4), lambda vae, z: z * 0.18215, lambda vae, x: x / 0.18215),
    "shift": (
        KINDS[0], 16, dict(scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
        (16, 4), lambda vae, z: (z - 0.0609) * 1.5305, lambda vae, x: x / 1.5305 + 0.0609,
    ),
    "mean and std": (
        KINDS[0], 4, dict(scaling_factor=0.5, latents_mean=MEAN, latents_std=STD),
        (4, 4), lambda vae, z: (z - column(*MEAN)) * 0.5 / column(*STD), lambda vae, x: x * column(*STD) / 0.5 + column(*MEAN),
    ),
    "128 channels": (KINDS[0], 128, {}, (128, 4), lambda vae, z: z * 0.18215, lambda vae, x: x / 0.18215),
    "asymmetric": ("AsymmetricAutoencoderKL", 4, {}, (4, 4), lambda vae, z: z * 0.18215, lambda vae, x: x / 0.18215),
    "flux2": (
        "AutoencoderKLFlux2", 32, {}, (128, 8),
        lambda vae, z: (patches(z) - flux2(vae)[0]) / flux2(vae)[1],
        lambda vae, x: unpatched(x * flux2(vae)[1] + flux2(vae)[0]),
    ),
    "tiny": ("AutoencoderTiny", 4, {}, (4, 4), lambda vae, z: z, lambda vae, x: x),
    "dc": ("AutoencoderDC", 8, dict(scaling_factor=0.4), (8, 4), lambda vae, z: z * 0.4, lambda vae, x: x / 0.4),
    "vq": ("VQModel", 3, {}, (3, 4), lambda vae, z: z * 0.18215, lambda vae, x: x / 0.18215),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMULAS)
def test_latents_are_scaled_and_shifted_as_diffusers_does(tmp_path, monkeypatch, name):
    """To the bit, given what the autoencoder's own encoder returns, and up to what its own decoder is given."""
    kind, channels, config, shape, scaled, unscaled = FORMULAS[name]
    space = open_space(save_autoencoder(tmp_path, 3, channels, kind, **config)).load("cpu")
    assert (space.channels, space.factor) == shape
    vae, plain, decode = space.vae, space.vae.encode, space.vae.decode
    encoded, given = [], []
    monkeypatch.setattr(vae, "encode", lambda *args, **names: encoded.append(plain(*args, **names)) or encoded[0])
    monkeypatch.setattr(vae, "decode", lambda z: given.append(z) or decode(z))
    images = torch.rand(2, 3, 16, 24) * 2 - 1
    mean, std = space.moments(images).unbind(1)
    assert space.decode(mean).shape == images.shape
    z = encoded[0][0]
    if isinstance(z, torch.Tensor):
        assert not std.any()
    else:
        torch.testing.assert_close(std, scaled(vae, z.mean + z.std) - scaled(vae, z.mean))
        z = z.mean
    assert torch.equal(mean, scaled(vae, z))
    assert torch.equal(given[0], unscaled(vae, mean))
    torch.testing.assert_close(given[0], z)


@pytest.mark.parametrize("kind", KINDS)
def test_many_images_are_taken_a_few_at_a_time_and_come_out_the_same(tmp_path, monkeypatch, kind):
    space = open_space(save_autoencoder(tmp_path, 3, 8, kind)).load("cpu")
    space.vae.double()  # for in float32 a batch's size changes rounding
    images = torch.rand(7, 3, 16, 16, dtype=torch.float64) * 2 - 1
    moments = space.moments(images)
    decoded = space.decode(moments[:, 0])
    taken = []
    for part in (space.vae.encoder, space.vae.decoder):
        part.register_forward_pre_hook(lambda part, inputs: taken.append(len(inputs[0])))
    for limit, parts in ((3 * 16 * 16, [3, 3, 1]), (100, [1] * 7)):
        monkeypatch.setattr("images.autoencoder.AT_ONCE", limit)
        for values, whole in ((space.moments(images), moments), (space.decode(moments[:, 0]), decoded)):
            torch.testing.assert_close(values, whole, rtol=0, atol=1e-12)
        assert taken == 2 * parts
        taken.clear()


def test_a_folder_of_a_pipeline_and_weights_of_a_variant(tmp_path):
    folder = save_autoencoder(tmp_path / "plain", 2, 4)
    vae, images = AutoencoderKL.from_pretrained(folder), torch.rand(1, 3, 8, 8)
    whole = open_space(folder).load("cpu")
    (tmp_path / "pipeline").mkdir()
    shutil.copytree(folder, tmp_path / "pipeline" / "vae")
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    vae.save_pretrained(tmp_path / "bin", safe_serialization=False)
    for name in ("pipeline", "bin"):
        assert torch.equal(open_space(str(tmp_path / name)).load("cpu").moments(images), whole.moments(images))
    for dtype, variant in ((torch.float16, "fp16"), (torch.bfloat16, "bf16"), (torch.bfloat16, None)):
        copy.deepcopy(vae).to(dtype).save_pretrained(tmp_path / f"{dtype}{variant}", variant=variant)
        space = open_space(str(tmp_path / f"{dtype}{variant}")).load("cpu")
        assert {weight.dtype for weight in space.vae.state_dict().values()} == {torch.float32}
        assert torch.equal(space.vae.encoder.conv_in.weight, whole.vae.encoder.conv_in.weight.to(dtype).float())
    weights_with(quant_conv__bias=torch.ones(8, dtype=torch.float16))(tmp_path / "pipeline" / "vae")
    assert open_space(str(tmp_path / "pipeline")).load("cpu").vae.quant_conv.bias.dtype == torch.float32
    vae.save_pretrained(folder, variant="fp16")  # beside the others
    assert open_space(folder).load("cpu").digest() == whole.digest()


def test_the_digest_knows_what_latents_depend_on_and_that_alone(tmp_path):
    """Latents that were encoded when there was only a scale keep theirs."""
    settings = dict(plain={}, scale=dict(scaling_factor=0.5), shift=dict(shift_factor=0.1))
    settings |= dict(mean=dict(latents_mean=MEAN, latents_std=[1.0] * 4), std=dict(latents_mean=[0.0] * 4, latents_std=STD))
    settings |= dict(other=dict(kind="AsymmetricAutoencoderKL"))
    spaces = {name: open_space(save_autoencoder(tmp_path / name, 2, 4, **config)) for name, config in settings.items()}
    digests = {name: (space.load("cpu").digest(), space.digest(DECODER)) for name, space in spaces.items()}
    for of_part in zip(*digests.values()):
        assert len(set(of_part)) == len(spaces)
    spaces["plain"].kind = "VQModel"
    assert spaces["plain"].digest() != digests["plain"][0]
    weights = spaces["scale"].vae.state_dict()
    known = {name: weight for name, weight in weights.items() if name.startswith(("encoder.", "quant_conv."))}
    assert digests["scale"][0] == digest_of_weights(known | {"scaling_factor": torch.tensor(0.5)})
    of_no_shift = open_space(save_autoencoder(tmp_path / "zero", 2, 4, shift_factor=0.0)).load("cpu")
    assert of_no_shift.digest() == digests["plain"][0]
    for part, same in (("decoder", 0), ("encoder", 1)):
        folder = shutil.copytree(tmp_path / "plain", tmp_path / part)
        change(folder, part)
        space = open_space(str(folder)).load("cpu")
        assert [space.digest() == digests["plain"][0], space.digest(DECODER) == digests["plain"][1]] == [same == 0, same == 1]


def config_of(**settings):
    def spoil(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | settings))

    return spoil


def config_text(text):
    return lambda folder: (folder / "config.json").write_text(text)


def weights_with(**tensors):
    def spoil(folder):
        weights = load_file(folder / WEIGHTS) | {name.replace("__", "."): value for name, value in tensors.items()}
        save_file({name: value for name, value in weights.items() if value is not None}, folder / WEIGHTS)

    return spoil


def without(name):
    return lambda folder: (folder / name).unlink()


def unreadable(name):
    def spoil(folder):
        (folder / name).unlink()
        (folder / name).symlink_to("/proc/self/mem")

    return spoil


BROKEN = {
    "no config": (without("config.json"), r"neither ema, mse, none nor a folder that holds config\.json or vae/config\.json"),
    "config cut short": (config_text('{"latent_'), r"its config\.json is not that of an autoencoder"),
    "config binary": (lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe"), "is not that of an autoencoder"),
    "config a list": (config_text("[4]"), r"its config\.json is not that of an autoencoder"),
    "config of something else": (config_text('{"hidden_size": 4}'), "is not that of an AutoencoderKL, it has no latent_"),
    "config unreadable": (unreadable("config.json"), r"Input/output error"),
    "config with words": (config_of(latent_channels="four"), r"no autoencoder of RGB images can be made from its config\.json"),
    "grey images": (config_of(in_channels=1), r"no autoencoder of RGB images can be made from its config\.json"),
    "images with alpha": (config_of(out_channels=4), r"it makes \(1, 4, 256, 256\) of \(1, 3, 256, 256\)"),
    "no weights": (without(WEIGHTS), rf"could not be loaded \(it holds no {WEIGHTS}\); give --vae a local folder"),
    "weights cut short": (lambda folder: os.truncate(folder / WEIGHTS, 999), r"could not be loaded \(Unable to load weights"),
    "weights not fetched": (lambda folder: (folder / WEIGHTS).write_text("version https://git-lfs"), r"could not be .*lfs"),
    "weights unreadable": (unreadable(WEIGHTS), r"could not be loaded \("),
    "weights of other shapes": (
        weights_with(encoder__conv_in__bias=torch.zeros(16)), r"weights, encoder\.conv_in\.bias is \(16,\), not \(8,\)\)",
    ),
    "weights of more levels": (
        lambda folder: shutil.copy(Path(save_autoencoder(folder / "deeper", 3, 4), WEIGHTS), folder),
        r"of its weights, .* is unknown to the AutoencoderKL of its config\.json, and 27 more",
    ),
    "a weight missing": (weights_with(quant_conv__bias=None), r"of its weights, quant_conv\.bias is missing\)"),
    "a weight not finite": (
        weights_with(decoder__conv_in__bias=torch.full((8,), torch.nan)), r"weights, decoder\.conv_in\.bias is not finite",
    ),
    "scale zero": (config_of(scaling_factor=0), "scaling_factor 0, .* it should have a scale above 0"),
    "scale not finite": (config_of(scaling_factor=float("nan")), "scaling_factor nan"),
    "shift a word": (config_of(shift_factor="0.1"), "shift_factor 0.1"),
    "mean of three channels": (config_of(latents_mean=[0.0] * 3, latents_std=[1.0] * 3), "for each of 4 channels, a mean"),
    "mean alone": (config_of(latents_mean=[0.0] * 4), r"latents_mean \[0.*latents_std None"),
    "deviation zero": (config_of(latents_mean=[0.0] * 4, latents_std=[0.0] * 4), "a standard deviation above 0"),
    "mean and shift": (config_of(latents_mean=[0.0] * 4, latents_std=[1.0] * 4, shift_factor=0.1), "shift_factor 0.1"),
}  # fmt: skip
BROKEN |= {
    kind: (config_of(_class_name=kind), f"is of the class {kind}; give one of AutoencoderKL, .*, VQModel, in diffusers' format")
    for kind in ("AutoencoderKLWan", "AutoencoderKLTemporalDecoder", "AutoencoderRAE", "UNet2DConditionModel")
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_autoencoder_is_refused_in_one_line(tmp_path, small, caplog, capfd, monkeypatch, name):
    spoil, message = BROKEN[name]
    folder = shutil.copytree(small, tmp_path / "vae")
    spoil(folder)
    capfd.readouterr()
    logger = logging.getLogger("diffusers")
    monkeypatch.setattr(logger, "handlers", [*logger.handlers, caplog.handler])
    with pytest.raises((ValueError, OSError), match=message) as error:
        open_space(str(folder)).load("cpu")
    assert "\n" not in str(error.value)
    assert caplog.messages == []
    assert capfd.readouterr() == ("", "")


def test_a_class_that_only_a_newer_diffusers_has(small, tmp_path, monkeypatch):
    folder = shutil.copytree(small, tmp_path / "vae")
    config_of(_class_name="AutoencoderOfTomorrow")(folder)
    monkeypatch.setattr("images.autoencoder.KINDS", (*KINDS, "AutoencoderOfTomorrow"))
    with pytest.raises(ValueError, match="is of the class AutoencoderOfTomorrow, which needs a newer diffusers"):
        open_space(str(folder))


def test_an_autoencoder_that_changed_is_named(tmp_path, small, photos):
    """Where training, encoding or drawing goes on, and only if what it makes is another."""
    vae = shutil.copytree(small, tmp_path / "vae")
    flags = ["--model", "DiT-N/2", "--vae", vae, "--global-batch-size", 2, "--ckpt-every", 1]
    fit(tmp_path / "r", *flags, "--max-steps", 1)
    folder = tmp_path / "r" / "000-DiT-N-2"
    resume = [*flags, "--resume", folder, "--max-steps"]
    latents = ["--out", tmp_path / "latents", "--data-path", photos, "--vae", vae, "--image-size", 8]
    latents = encode.parse_args([*map(str, latents), "--device", "cpu", "--num-workers", "0"])
    encode.encode(latents, ALONE)
    draws = folder / "checkpoints" / "0000001.pt", tmp_path / "s", "--num-fid-samples"
    draw_many(*draws, 1)

    change(vae, "decoder")
    fit(tmp_path / "r", *resume, 2)
    encode.encode(latents, ALONE)
    with pytest.raises(ValueError, match=r"holds images made with decoder \w{16} and now \w{16}; give another --sample-dir"):
        draw_many(*draws, 2)
    record = next((tmp_path / "s").glob("*/settings.json"))
    record.write_text(json.dumps({name: value for name, value in json.loads(record.read_text()).items() if name != "decoder"}))
    draw_many(*draws, 2)  # into a folder that does not know its decoder

    change(vae, "encoder")
    with pytest.raises(ValueError, match=r"the encoder of --vae was \w{16} and is \w{16}; --allow-changes goes on"):
        fit(tmp_path / "r", *resume, 3)
    with pytest.raises(ValueError, match=r"holds latents made with vae_digest \w{16} and now \w{16}"):
        encode.encode(latents, ALONE)
    path = folder / "checkpoints" / "0000002.pt"
    changed = r"has changed since .* its encoder was \w{16} and is \w{16}; --vae .*, where a command has that flag"
    with pytest.raises(ValueError, match=changed):
        draw(path, tmp_path / "a.png")
    draw(path, tmp_path / "a.png", "--vae", vae)
    run = torch.load(path)
    del run["args"]["vae_digest"]
    torch.save(run, path)
    fit(tmp_path / "r", *resume, 3)  # from a checkpoint that does not know its encoder
    assert (folder / "checkpoints" / "0000003.pt").exists()


def test_a_vae_that_is_neither_cached_nor_to_be_had_says_what_to_do():
    with pytest.raises(OSError, match=r"stabilityai/sd-vae-ft-mse could not be loaded .* give --vae a local folder"):
        LatentSpace("mse").load("cpu")
