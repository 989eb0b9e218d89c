"""Training from latents that were encoded before, and what can go wrong with them."""

import json
import os
import pickle
import re
import resource
import shlex
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, DistributedSampler

import train
from autoencoders import save_autoencoder
from commands import ALONE, fit, forked, lasting, locked_by_another, torchrun
from diffusion import create_diffusion
from images import encode
from images.autoencoder import LatentSpace, open_space
from images.dataset import load_dataset
from images.latents import CachedLatents
from images.samples import FolderImages
from training.batches import draw_batch

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return save_autoencoder(tmp_path_factory.mktemp("vae") / "small", levels=3, channels=4)  # a factor of 4


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """26 images of three classes, nowhere symmetric."""
    folder, generator = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for i in range(26):
        path = folder / f"class{i % 3}" / f"{i:02d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    return str(folder)


def encode_to(out, vae, *flags):
    flags = ["--out", out, "--vae", vae, "--image-size", 16, "--shard-size", 10, "--device", "cpu", "--num-workers", 0, *flags]
    encode.encode(encode.parse_args([*map(str, flags)]), ALONE)
    return str(out)


@pytest.fixture(scope="module")
def encoded(tmp_path_factory, vae, photos):
    return encode_to(tmp_path_factory.mktemp("latents") / "a", vae, "--data-path", photos)


@pytest.fixture
def copy(tmp_path, encoded):
    """Of the latents, to be spoilt."""
    return Path(shutil.copytree(encoded, tmp_path / "copy"))


def read(folder, name):
    with open(os.path.join(folder, name), "rb") as file:
        return file.read()


def contents(folder):
    return {name: read(folder, name) for name in os.listdir(folder)}


def train_on(path, results, vae, *flags):
    """The final checkpoint and the log's rows, without their speeds."""
    settings = ["--data-path", path, "--vae", vae, "--image-size", 16, "--num-classes", 3, "--model", "DiT-N/2", "--lr", 1e-3]
    settings += ["--global-batch-size", 8, "--max-steps", 6, "--log-every", 2, "--num-workers", 0]
    folder = fit(results, *settings, *flags)
    rows = [lasting(json.loads(line)) for line in (folder / "log.jsonl").read_text().splitlines()]
    return torch.load(folder / "checkpoints" / "0000006.pt"), rows


def test_a_folder_of_latents_is_the_autoencoders_view_of_the_images(encoded, photos, vae):
    images, cached, space = load_dataset(photos, 16), load_dataset(encoded, 16), open_space(vae).load("cpu")
    assert sorted(os.listdir(encoded)) == ["00000.safetensors", "00001.safetensors", "00002.safetensors", "latents.json"]
    assert (len(cached), cached.num_classes, cached.flip, cached.classes) == (26, 3, True, ["class0", "class1", "class2"])
    for i in (0, 9, 10, 25):
        (image, label), (moments, cached_label) = images[i], cached[i]
        assert label == cached_label
        views = torch.stack([image, image.flip(2)])
        torch.testing.assert_close(moments, space.moments(views), rtol=1e-5, atol=1e-6)
        assert (moments[0] - moments[1].flip(3)).abs().max() > 1e-3  # a mirror image's latents are not the mirrored latents
    assert load_dataset(encoded, 16, uncond=True).num_classes == 0
    assert [load_dataset(encoded, 16, uncond=True)[i][1] for i in (0, 25)] == [0, 0]


def test_training_from_latents_is_training_with_the_autoencoder(tmp_path, encoded, photos, vae):
    """Noise, times, mirroring and order are the same bits; the encoder rounds differently in batches of another size."""
    with_vae, rows = train_on(photos, tmp_path / "a", vae, "--val-path", photos)
    without, cached_rows = train_on(encoded, tmp_path / "b", vae, "--val-path", encoded)
    for row, cached in zip(rows, cached_rows, strict=True):
        assert row == pytest.approx(cached, rel=1e-5)
    for name, weight in with_vae["model"].items():
        torch.testing.assert_close(without["model"][name], weight, rtol=0, atol=2e-5, msg=name)
    moved = with_vae["model"]["final_layer.linear.weight"].abs().max()
    assert moved > 1e-3  # from zero: 50 times the tolerance


@pytest.mark.parametrize("flip", [False, True])
def test_batches_are_equal_to_rounding_and_their_noise_to_the_bit(encoded, photos, vae, flip):
    how = dict(seed=0, batch_size=26, flip=flip, space=open_space(vae).load("cpu"), objective=create_diffusion(""))
    batches = []
    for dataset in (load_dataset(photos, 16), load_dataset(encoded, 16)):
        images, labels = next(iter(DataLoader(dataset, 26)))
        batches.append(draw_batch(images, labels, 5, **how, processes=ALONE))
    for one, other in (batches, batches[::-1]):
        assert torch.equal(one["noise"], other["noise"])
        assert torch.equal(one["t"], other["t"])
        assert torch.equal(one["model_kwargs"]["y"], other["model_kwargs"]["y"])
        torch.testing.assert_close(one["x_start"], other["x_start"], rtol=1e-5, atol=1e-6)


def test_held_out_images_need_not_be_encoded_too(tmp_path, encoded, photos, vae):
    _, rows = train_on(encoded, tmp_path, vae, "--val-path", photos)
    _, again = train_on(encoded, tmp_path, vae, "--val-path", encoded)
    assert rows[-1]["held_out_loss"] == pytest.approx(again[-1]["held_out_loss"], rel=1e-5)


def test_training_needs_no_autoencoder(tmp_path, photos):
    """Of a name on the hub nothing but the name is read, and ema and mse have the same encoder."""
    folder = encode_to(tmp_path / "a", save_autoencoder(tmp_path / "vae", levels=4, channels=4), "--data-path", photos)
    index = json.loads(read(folder, "latents.json"))
    (tmp_path / "a" / "latents.json").write_text(json.dumps(index | {"vae": "ema"}))
    train_on(folder, tmp_path / "r", "mse", "--val-path", folder)


def test_digits_are_not_mirrored_and_halves_take_half(tmp_path, vae):
    whole = encode_to(tmp_path / "a", vae, "--shard-size", 1000)
    half = encode_to(tmp_path / "b", vae, "--shard-size", 1000, "--half")
    (moments, label), (rounded, _) = load_dataset(whole, 16)[1500], load_dataset(half, 16)[1500]
    assert moments.shape == rounded.shape == (1, 2, 4, 4, 4)
    assert label == load_dataset(None, 16)[1500][1]
    assert moments.dtype == rounded.dtype == torch.float32
    torch.testing.assert_close(moments, rounded, rtol=5e-4, atol=1e-7)
    assert not torch.equal(moments, rounded)
    sizes = [os.path.getsize(f"{folder}/00000.safetensors") for folder in (whole, half)]
    assert sizes[1] < 0.6 * sizes[0]


def test_images_without_classes_are_encoded_and_held_out_ones_if_there_are(tmp_path, vae, photos):
    cached = CachedLatents(encode_to(tmp_path / "a", vae, "--data-path", f"{photos}/class0", "--uncond"))
    assert (len(cached), cached.num_classes) == (9, 0)
    with pytest.raises(ValueError, match="--num-classes 3, and the images have no classes: give --uncond, or others"):
        train_on(str(tmp_path / "a"), tmp_path / "r", vae)
    with pytest.raises(ValueError, match="the digits have no held-out images"):
        encode_to(tmp_path / "b", vae, "--held-out")


@pytest.mark.parametrize("held_out", [False, True])
def test_the_flags_that_are_printed_train(tmp_path, encoded, vae, photos, capsys, monkeypatch, held_out):
    monkeypatch.setattr(encode, "load_dataset", lambda *given: load_dataset(*given[:2]))  # these images have no held-out ones
    encode_to(tmp_path / "of mine", vae, "--data-path", photos, *["--held-out"] * held_out)
    flags = shlex.split(re.search(r"The latents are whole; for train\.py: (.*)", capsys.readouterr().out)[1])
    if held_out:
        flags += ["--data-path", encoded, "--vae", vae, "--image-size", "16", "--num-classes", "3"]
    some = ["--model", "DiT-N/2", "--global-batch-size", "8", "--max-steps", "1", "--results-dir", str(tmp_path)]
    train.main(train.parse_args([*some, *flags, "--num-workers", "0", "--device", "cpu"]), ALONE)
    assert ("held_out_loss" in (tmp_path / "000-DiT-N-2" / "log.jsonl").read_text()) == held_out


def test_workers_read_latents(encoded):
    cached = load_dataset(encoded, 16)
    alone = [moments for moments, _ in cached]
    loader = DataLoader(cached, batch_size=None, num_workers=2)
    assert torch.equal(torch.stack([moments for moments, _ in loader]), torch.stack(alone))
    assert torch.equal(pickle.loads(pickle.dumps(cached))[25][0], alone[25])


def test_an_encoder_that_was_killed_goes_on_with_any_number_of_processes(tmp_path, vae):
    """Killed while it writes, it leaves whole shards and perhaps a partial file; run again, it makes the rest alone."""
    out, whole = tmp_path / "killed", encode_to(tmp_path / "whole", vae, *(digits := ["--image-size", 8, "--shard-size", 30]))
    flags = ["--out", out, "--vae", vae, "--device", "cpu", *digits]

    killed = forked(encode_to, out, vae, *digits)
    killed.start()
    while len(list(out.glob("*.safetensors"))) < 3 and killed.is_alive():
        time.sleep(0.002)
    killed.kill()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    (out / "00059.safetensors.123.partial").write_bytes(b"half a shard")
    with pytest.raises(OSError, match=r"\d+ of 60 shards cannot be used \(there is no .*safetensors\); run .* again"):
        load_dataset(str(out), 8)
    made = {path: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    assert 3 <= len(made) < 60
    torchrun(2, "images.encode", *flags, "--check-data")
    assert {path: path.stat().st_mtime_ns for path in made} == made
    assert sorted(os.listdir(out)) == sorted(os.listdir(whole))
    assert read(out, "latents.json") == read(whole, "latents.json")
    for (moments, label), (expected, expected_label) in zip(load_dataset(str(out), 8), load_dataset(whole, 8), strict=True):
        torch.testing.assert_close(moments, expected, rtol=1e-5, atol=1e-6)
        assert label == expected_label


def test_a_folder_is_for_one_encoder_at_a_time(tmp_path, vae, photos):
    out, flags = tmp_path / "latents", ["--data-path", photos]
    encode_to(out, vae, *flags)
    (out / "00001.safetensors.other.7.partial").touch()
    with locked_by_another(out / "latents.json"), pytest.raises(ValueError, match=r"another process is at work in .*latents"):
        encode_to(out, vae, *flags)
    assert (out / "00001.safetensors.other.7.partial").exists()
    encode_to(out, vae, *flags)
    assert not [*out.glob("*.partial")]


def test_a_full_disk_loses_nothing_that_was_written(tmp_path, vae, photos, encoded):
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, unlimited[1]))  # a shard has 10,712 bytes
    try:
        with pytest.raises(OSError, match=r"could not write the shard .*00000\.safetensors: .*File too large"):
            encode_to(tmp_path / "a", vae, "--data-path", photos)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert os.listdir(tmp_path / "a") == ["latents.json"]
    assert contents(encode_to(tmp_path / "a", vae, "--data-path", photos)) == contents(encoded)


def test_an_image_that_cannot_be_read_leaves_the_whole_shards(tmp_path, vae, photos, encoded):
    bad = tmp_path / "photos"
    shutil.copytree(photos, bad)
    path = sorted(bad.glob("*/*.png"))[15]
    whole = path.read_bytes()
    path.write_bytes(whole[:300])
    with pytest.raises(OSError, match=rf"cannot read the image .*{path.name}"):
        encode_to(tmp_path / "a", vae, "--data-path", bad)
    assert sorted(os.listdir(tmp_path / "a")) == ["00000.safetensors", "latents.json"]
    path.write_bytes(whole)
    encode_to(tmp_path / "a", vae, "--data-path", bad)
    images = contents(tmp_path / "a"), contents(encoded)
    assert [images[0][name] == images[1][name] for name in sorted(images[0])] == [True, True, True, False]  # another source


def test_images_that_have_changed_since(tmp_path, vae, photos, encoded, capsys):
    """A file that was replaced has its shard made again, also of two of which one is missing; others names are refused."""
    changed = Path(shutil.copytree(photos, tmp_path / "photos"))
    one = sorted(changed.glob("*/*.png"))[12]
    out = Path(encode_to(tmp_path / "a", vae, "--data-path", changed))
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    known = CachedLatents(out).fingerprint()
    Image.new("RGB", (20, 20), "red").save(one)
    capsys.readouterr()
    encode_to(out, vae, "--data-path", changed)
    assert re.search("other sizes now, which are made again: 1\nEncoding 1 of 3 shards", capsys.readouterr().out)
    after = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert [name for name in before if before[name] != after[name]] == ["00001.safetensors"]
    anew = encode_to(tmp_path / "b", vae, "--data-path", changed)
    assert read(out, "00001.safetensors") == read(anew, "00001.safetensors")
    assert {name for name in known if known[name] != CachedLatents(out).fingerprint()[name]} == {"sizes"}
    one.rename(one.parent / "x.png")
    with pytest.raises(ValueError, match=r"holds latents made with names \w+ and now \w+; give another --out"):
        encode_to(out, vae, "--data-path", changed)


def test_latents_of_an_older_version_are_gone_on_with(copy, photos, vae):
    """They say neither names nor sizes."""
    index = json.loads(read(copy, "latents.json"))
    (copy / "latents.json").write_text(json.dumps({name: value for name, value in index.items() if name != "names"}))
    for path in copy.glob("*.safetensors"):
        save_file(load_file(path), path)
    (copy / "00001.safetensors").unlink()
    before = contents(copy)
    encode_to(copy, vae, "--data-path", photos)
    assert before.items() < contents(copy).items()
    assert len(load_dataset(str(copy), 16)) == 26


def test_all_images_are_read_before_they_are_encoded(tmp_path, vae, photos, capsys):
    bad = Path(shutil.copytree(photos, tmp_path / "photos"))
    for path in (bad / "class0" / "03.png", bad / "class2" / "05.png"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"^2 of 26 images cannot be read: replace or delete them$"):
        encode_to(tmp_path / "a", vae, "--data-path", bad, "--check-data")
    assert re.findall(r"cannot read the image .*/(\d\d)\.png", capsys.readouterr().out) == ["03", "05"]
    assert not (tmp_path / "a").exists()
    whole = encode_to(tmp_path / "a", vae, "--data-path", photos, "--check-data")
    assert contents(whole).keys() == {"00000.safetensors", "00001.safetensors", "00002.safetensors", "latents.json"}


def missing(path):
    path.unlink()


def truncated(path):
    path.write_bytes(path.read_bytes()[:-100])


def empty(path):
    path.write_bytes(b"")


def hostile(path):
    path.write_bytes(pickle.dumps(print))


def of_another_set(path):
    path.write_bytes((path.parent / "00002.safetensors").read_bytes())


@pytest.mark.parametrize("spoil", [missing, truncated, empty, hostile, of_another_set], ids=lambda f: f.__name__)
def test_a_shard_that_cannot_be_used_is_named_and_made_again(copy, encoded, photos, vae, spoil):
    spoil(copy / "00001.safetensors")
    with pytest.raises(OSError, match=r"^1 of 3 shards cannot be used \(.*00001\.saf.*\); run `python -m images\.encode`"):
        load_dataset(str(copy), 16)
    before = {name: value for name, value in contents(copy).items() if name != "00001.safetensors"}
    stamp = (copy / "00000.safetensors").stat().st_mtime_ns
    encode_to(copy, vae, "--data-path", photos)
    assert contents(copy) == contents(encoded)
    assert before.items() < contents(copy).items()
    assert (copy / "00000.safetensors").stat().st_mtime_ns == stamp


def test_a_wrong_bit_ends_the_run_and_what_was_learnt_is_saved(tmp_path, copy, vae, monkeypatch):
    shard = bytearray((copy / "00001.safetensors").read_bytes())
    shard[-1500] ^= 1
    (copy / "00001.safetensors").write_bytes(shard)
    good = load_dataset(str(copy), 16)
    bad = [i for i in range(10, 20) if not readable(good, i)]
    assert len(bad) == 1
    late = [i for i in range(26) if i != bad[0]][:24] + bad
    monkeypatch.setattr(DistributedSampler, "__iter__", lambda sampler: iter(late))
    with pytest.raises(OSError, match=rf"00001\.safetensors is damaged: the checksum of its image {bad[0] - 10} is wrong"):
        train_on(str(copy), tmp_path / "r", vae, "--global-batch-size", 5)
    assert os.listdir(tmp_path / "r" / "000-DiT-N-2" / "checkpoints") == ["0000004.pt"]


def test_a_wrong_class_is_noticed_too(copy):
    path = copy / "00001.safetensors"
    tensors = load_file(path)
    tensors["label"][3] += 1
    save_file(tensors, path)
    with pytest.raises(OSError, match=r"00001\.safetensors is damaged: the checksum of its image 3 is wrong"):
        load_dataset(str(copy), 16)[13]


def readable(dataset, i):
    try:
        return dataset[i] is not None
    except OSError:
        return False


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--image-size", 32], "the latents in .* are for --image-size 16, not 32"),
        (["--vae", "none"], "--vae none is not what encoded the latents in .*: that was --vae .*small"),
        (["--vae", "ema"], "--vae ema is not what encoded the latents in .*: that was --vae .*small"),
        (["--num-classes", 2], "the images are of 3 classes, more than --num-classes 2"),
        (["--max-bad-images", 1], "--max-bad-images is for images; `python -m images.encode` makes damaged latents again"),
        (["--dataset", "cifar10"], r"the latents in .* are of \(None, False\), not of .*\('cifar10', False\)"),
    ],
)
def test_flags_that_do_not_go_with_the_latents(tmp_path, encoded, vae, flags, message):
    with pytest.raises(ValueError, match=message):
        train_on(encoded, tmp_path, vae, *flags)
    assert os.listdir(tmp_path) == []


def test_another_autoencoder_is_told_by_its_encoder(tmp_path, encoded, vae):
    from diffusers.models import AutoencoderKL

    changed = AutoencoderKL.from_pretrained(vae)
    changed.decoder.conv_in.weight.data.zero_()
    changed.save_pretrained(tmp_path / "decoder")
    CachedLatents(encoded).check_vae(str(tmp_path / "decoder"))
    changed.encoder.conv_in.weight.data[0] += 1
    changed.save_pretrained(tmp_path / "encoder")
    with pytest.raises(ValueError, match="encoder is not what encoded the latents"):
        CachedLatents(encoded).check_vae(str(tmp_path / "encoder"))
    for statistics in (dict(scaling_factor=1.0), dict(shift_factor=0.1), dict(latents_mean=[0.1] * 4, latents_std=[1.0] * 4)):
        other = AutoencoderKL.from_pretrained(vae)
        other.register_to_config(**statistics)
        other.save_pretrained(tmp_path / "other")
        with pytest.raises(ValueError, match="other is not what encoded the latents"):
            CachedLatents(encoded).check_vae(str(tmp_path / "other"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--vae", "none"], "--vae none is to work on pixels"),
        (["--image-size", 18], "--image-size 18 is not divisible by 4"),
        (["--half"], "holds latents made with dtype float32 and now float16; give another --out"),
        (["--shard-size", 5], "made with shard_size 10 and now 5"),
        (["--uncond"], r"made with num_classes 3 and now 0, classes \['class0'.*\] and now None"),
        (["--data-path", "digits"], "made with source .* and now .*, images 26 and now 1797"),
    ],
)
def test_encoding_with_other_flags_touches_nothing(copy, photos, vae, flags, message):
    before = contents(copy)
    with pytest.raises(ValueError, match=message):
        encode_to(copy, vae, "--data-path", photos, *flags)
    assert contents(copy) == before


def test_places_that_will_not_do(tmp_path, encoded, photos, vae):
    with pytest.raises(ValueError, match=f"^{encoded} holds latents, not images; give the folder that they were made of$"):
        FolderImages(encoded)
    with pytest.raises(ValueError, match=r"holds latents already"):
        encode_to(tmp_path / "a", vae, "--data-path", encoded)
    with pytest.raises(ValueError, match=r"is not empty and holds no cached latents"):
        encode_to(photos, vae, "--data-path", photos)
    (tmp_path / "new" / "lost+found").mkdir(parents=True)
    (tmp_path / "new" / ".DS_Store").write_bytes(b"x")
    assert len(load_dataset(encode_to(tmp_path / "new", vae, "--data-path", photos), 16)) == 26
    with pytest.raises(OSError, match=r"/proc/a"):
        encode_to("/proc/a", vae, "--data-path", photos)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("text", ["", "[]", "{", '{"vae": "ema"}', '{"vae": 3}', '"shape"', "without classes"])
def test_an_index_that_is_none_is_named(copy, text):
    index = json.loads(read(copy, "latents.json"))
    del index["classes"]
    (copy / "latents.json").write_text(json.dumps(index) if text == "without classes" else text)
    with pytest.raises(ValueError, match=r"latents\.json is no index of cached latents"):
        load_dataset(str(copy), 16)


def test_images_are_read_as_few_at_a_time_as_the_autoencoder_takes_them(tmp_path, encoded, photos, vae, monkeypatch):
    taken = []
    moments = LatentSpace.moments
    monkeypatch.setattr(LatentSpace, "moments", lambda space, images: taken.append(len(images)) or moments(space, images))
    monkeypatch.setattr("images.autoencoder.AT_ONCE", 4 * 16 * 16)
    few = load_dataset(encode_to(tmp_path / "a", vae, "--data-path", photos, "--batch-size", 64), 16)
    assert taken == [4, 4, 4, 4, 2, 2] * 2 + [4, 4, 2, 2]  # of 10, 10 and 6 images and their mirror images
    for (moments, label), (expected, expected_label) in zip(few, load_dataset(encoded, 16), strict=True):
        torch.testing.assert_close(moments, expected, rtol=1e-5, atol=1e-6)
        assert label == expected_label


def test_latents_that_are_not_finite_are_not_kept(tmp_path, photos, vae, monkeypatch):
    huge = torch.full((2, 4, 4, 4), 1e5)
    monkeypatch.setattr(LatentSpace, "moments", lambda space, images: huge.expand(len(images), -1, -1, -1, -1))
    with pytest.raises(ValueError, match=r"00000\.safetensors are not finite in torch\.float16"):
        encode_to(tmp_path / "a", vae, "--data-path", photos, "--half")
    assert os.listdir(tmp_path / "a") == ["latents.json"]
