import fcntl
import json
import multiprocessing
import re
import resource
import struct
import time
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import sample
import sample_ddp
from commands import ALONE, FEW_STEPS, Colours, draw, draw_many, torchrun
from diffusion import create_diffusion, create_flow, drawing
from diffusion.guidance import Guidance, guided
from diffusion.samplers import FLOW_SAMPLERS
from download import public_checkpoint
from images.autoencoder import PixelSpace
from images.numbered import gather_npz
from images.samples import save_grid
from machine.processes import launch
from models import DiT_models

pytestmark = pytest.mark.usefixtures("one_thread")


def error_of(command, *flags):
    """The one line with which a command ends."""
    with pytest.raises(SystemExit) as end:
        launch(command.main, command.parse_args(list(map(str, flags))))
    assert "\n" not in str(end.value)
    return str(end.value)


def change(path, edit):
    """Lets edit(weights) change a checkpoint's averaged weights."""
    contents = torch.load(path, weights_only=True)
    edit(contents["ema"])
    torch.save(contents, path)
    return path


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@pytest.mark.parametrize("mixer", ["attention", "pdessm"])
def test_a_grid_of_samples(tmp_path, checkpoint, sampler, mixer):
    flags = ["--class-labels", 3, 7, 10, "--samples-per-class", 2, "--sampler", sampler]
    grid = draw(checkpoint(mixer), tmp_path / "grid.png", *flags)
    assert grid.shape == (3 * 66 + 2, 2 * 66 + 2, 3)  # 8 pixels shown as 64, with a frame of 2
    assert np.array_equal(grid, draw(checkpoint(mixer), tmp_path / "again.png", *flags))
    assert not np.array_equal(grid, draw(checkpoint(mixer), tmp_path / "other.png", *flags, "--seed", 1))
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".png", ".png", ".png", ".pt"]


@pytest.mark.parametrize("mixer", ["attention", "pdessm"])
def test_samples_of_another_size_and_shape(tmp_path, checkpoint, mixer):
    grid = draw(checkpoint(mixer), tmp_path / "a.png", "--image-size", "16x24", "--class-labels", 3)
    assert grid.shape == (64, 96, 3)
    images = draw_many(checkpoint(mixer), tmp_path / "s", "--image-size", "16x24", "--num-fid-samples", 2)
    assert images.shape == (2, 16, 24, 3)
    assert [path.name.split("-")[5] for path in (tmp_path / "s").glob("*.npz")] == ["16x24"]


@pytest.mark.parametrize("text", ["0", "8x", "x8", "8x8x8", "8x0", "-8", "a"])
def test_sizes_that_are_none(text, capsys):
    with pytest.raises(SystemExit):
        sample.parse_args(["--image-size", text])
    assert "--image-size" in capsys.readouterr().err


def test_large_samples_are_shown_as_they_are(tmp_path):
    images = torch.randint(0, 256, (3, 64, 96, 3), dtype=torch.uint8)
    save_grid(images, tmp_path / "grid.png", columns=2)
    with Image.open(tmp_path / "grid.png") as grid:
        shown = np.asarray(grid)
    assert np.array_equal(shown[2:66, 2:98], images[0])
    assert np.array_equal(shown[68:132, 2:98], images[2])


def test_guidance_and_class_matter_only_where_there_are_classes(tmp_path, checkpoint):
    path = checkpoint()
    base = draw(path, tmp_path / "a.png", "--class-labels", 3)
    assert not np.array_equal(base, draw(path, tmp_path / "b.png", "--class-labels", 4))
    assert not np.array_equal(base, draw(path, tmp_path / "b.png", "--class-labels", 3, "--cfg-scale", 1))
    free = checkpoint(num_classes=0, name="free.pt")
    assert np.array_equal(draw(free, tmp_path / "c.png"), draw(free, tmp_path / "d.png", "--cfg-scale", 1))


COMMANDS = {
    "sample": lambda path, folder, *flags: draw(path, f"{folder}.png", "--class-labels", 0, *flags),
    "sample_ddp": lambda path, folder, *flags: draw_many(path, folder, "--num-fid-samples", 2, *flags),
}


@pytest.mark.parametrize("num_classes", [1, 10])
@pytest.mark.parametrize("run", COMMANDS.values(), ids=COMMANDS)
def test_a_strength_of_0_draws_without_classes(tmp_path, checkpoint, run, num_classes):
    """All of the output, with the variances that guidance leaves alone: as if no class were any but the null class."""
    path, same = checkpoint(num_classes=num_classes), checkpoint(num_classes=num_classes, name="same.pt")
    table = "y_embedder.embedding_table.weight"
    change(same, lambda weights: weights[table].copy_(weights[table][-1:].expand_as(weights[table])))
    drawn = [run(path, tmp_path / f"{scale}", "--cfg-scale", scale).astype(int) for scale in (0, 0.5, 1)]
    without = run(same, tmp_path / "without", "--cfg-scale", 4)
    assert [np.abs(images - without).max() <= 1 for images in drawn] == [True, False, False]
    if run is COMMANDS["sample"]:
        null = run(path, tmp_path / "null", "--class-labels", num_classes, "--cfg-scale", 4)
        assert np.abs(drawn[0] - null).max() <= 1


@torch.no_grad()
def test_guidance_on_a_part_of_the_way_and_on_all_channels(randomize):
    model = randomize(DiT_models["DiT-N/4"](input_size=8, in_channels=4, num_classes=10, learn_sigma=False)).eval()
    x, y = torch.randn(2, 4, 8, 8), torch.tensor([3, 7])
    flow, null = create_flow(), torch.full((2,), 10)

    def network(t, *settings):
        return guided(model, flow, Guidance(2.5, *settings))(x, t, y)

    t = torch.full((2,), 400.0)
    plain, without = model(x, t, y), model(x, t, null)
    all_channels = without + 2.5 * (plain - without)
    torch.testing.assert_close(network(t, None), all_channels)
    torch.testing.assert_close(network(t)[:, :3], all_channels[:, :3])
    torch.testing.assert_close(network(t)[:, 3], plain[:, 3])
    torch.testing.assert_close(network(t, None, (0.3, 0.5)), all_channels)
    torch.testing.assert_close(network(t, None, (0.5, 0.9)), plain)
    t[1] = 800  # of a sampler in which every image has steps of its own
    plain, without = model(x, t, y), model(x, t, null)
    expected = torch.stack([without[0] + 2.5 * (plain - without)[0], plain[1]])
    torch.testing.assert_close(network(t, None, (0.3, 0.5)), expected)
    expected = torch.stack([without[0], plain[1]])
    half = guided(model, flow, Guidance(0, None, (0.3, 0.5)))
    torch.testing.assert_close(half(x, t, y), expected)
    diffusion = create_diffusion("10")
    assert [diffusion.progress(t) for t in (1000, 250, 0)] == [0, 0.75, 1]


def test_guidance_flags_reach_the_samples(tmp_path, checkpoint):
    path = checkpoint()
    base = draw(path, tmp_path / "a.png", "--class-labels", 3)
    assert not np.array_equal(base, draw(path, tmp_path / "b.png", "--class-labels", 3, "--cfg-interval", 0.3, 0.6))
    assert np.array_equal(base, draw(path, tmp_path / "c.png", "--class-labels", 3, "--cfg-channels", "all"))  # RGB
    draw_many(path, tmp_path / "s", "--num-fid-samples", 2)
    with pytest.raises(ValueError, match=r"cfg_interval \[0.0, 1.0\] and now \[0.0, 0.5\]"):
        draw_many(path, tmp_path / "s", "--num-fid-samples", 2, "--cfg-interval", 0, 0.5)
    with pytest.raises(ValueError, match=r"--cfg-interval 0\.6 0\.3"):
        draw(path, tmp_path / "a.png", "--cfg-interval", 0.6, 0.3)


def test_two_processes_draw_the_same_images_as_one(tmp_path, checkpoint):
    path = checkpoint()
    flags = ["--ckpt", path, *FEW_STEPS, "--num-fid-samples", 22, "--per-proc-batch-size", 4, "--sample-dir"]
    torchrun(1, "sample_ddp.py", *flags, tmp_path / "one")
    torchrun(2, "sample_ddp.py", *flags, tmp_path / "two")
    name = "DiT-N-4-a-size-8-vae-none-cfg-1.5-seed-0"
    one, two = tmp_path / "one" / name, tmp_path / "two" / name
    files = [f"{i:06d}.png" for i in range(22)]
    assert sorted(path.name for path in one.glob("*.png")) == files
    assert all((one / file).read_bytes() == (two / file).read_bytes() for file in files)
    assert one.with_suffix(".5-seed-0.npz").read_bytes() == two.with_suffix(".5-seed-0.npz").read_bytes()


def test_the_npz_is_what_adms_reader_takes(tmp_path, checkpoint):
    images = draw_many(checkpoint(), tmp_path / "s", "--num-fid-samples", 5)
    assert (images.shape, images.dtype) == ((5, 8, 8, 3), np.uint8)
    assert images.flags.c_contiguous
    folder = next(path for path in (tmp_path / "s").iterdir() if path.is_dir())
    for i, image in enumerate(images):
        with Image.open(folder / f"{i:06d}.png") as png:
            assert np.array_equal(image, png)
    assert len(np.unique(images.reshape(5, -1), axis=0)) == 5
    with zipfile.ZipFile(next((tmp_path / "s").glob("*.npz"))) as archive, archive.open("arr_0.npy") as file:
        assert np.lib.format.read_magic(file) == (1, 0)
        assert np.lib.format.read_array_header_1_0(file) == ((5, 8, 8, 3), False, np.dtype(np.uint8))


def test_an_image_does_not_depend_on_how_many_are_drawn_with_it(tmp_path, checkpoint):
    path = checkpoint()
    few = draw_many(path, tmp_path / "few", "--num-fid-samples", 3, "--per-proc-batch-size", 2)
    more = draw_many(path, tmp_path / "more", "--num-fid-samples", 8, "--per-proc-batch-size", 8)
    assert np.abs(few.astype(int) - more[:3]).max() <= 1  # a batch's size changes rounding


def test_a_stopped_run_goes_on(tmp_path, checkpoint, monkeypatch):
    path, flags = checkpoint(), ["--num-fid-samples", 10, "--per-proc-batch-size", 4]
    whole = draw_many(path, tmp_path / "s", *flags)
    folder = next(entry for entry in (tmp_path / "s").iterdir() if entry.is_dir())
    (folder / "000005.png").unlink()
    (folder / "000009.png").rename(folder / "000009.png.partial")
    drawn = []
    generate = drawing.generate
    monkeypatch.setattr(drawing, "generate", lambda *a, **k: drawn.append(len(a[4])) or generate(*a, **k))
    assert np.array_equal(draw_many(path, tmp_path / "s", *flags), whole)
    assert drawn == [4, 2]


SPOILT = {  # how, flags, and what the message says
    "network": (lambda w: w["final_layer.linear.weight"].fill_(3e38), [], r"network's output at call 1 .*another checkpoint"),
    "fp16": (
        lambda w: w["final_layer.linear.bias"].view(-1, 6)[:, :3].fill_(-1e5),
        ["--precision", "fp16"],
        r"network's .*; --precision fp32, a",
    ),
    "guidance": (
        lambda w: w["final_layer.linear.weight"].mul_(1e25),
        ["--cfg-scale", 1e18],
        r"guidance's .*smaller --cfg-scale",
    ),
    "decoder": (lambda w: None, [], r"decoder's output at call 4 of the network; .*--vae may help"),
}


@pytest.mark.parametrize(("how", "flags", "message"), SPOILT.values(), ids=SPOILT)
@pytest.mark.parametrize("command", [sample, sample_ddp])
def test_images_that_are_not_finite_end_it(tmp_path, monkeypatch, checkpoint, command, how, flags, message):
    """Even where clipping would have made pixels of them."""
    monkeypatch.chdir(tmp_path)
    if "decoder" in message:
        monkeypatch.setattr(PixelSpace, "decode", lambda self, x: x / 0)
    path = change(checkpoint(), how)
    few = ["--class-labels", 1, 2, "--out", "a.png"] if command is sample else ["--num-fid-samples", 2]
    said = error_of(command, "--ckpt", path, *FEW_STEPS, *few, *flags)
    assert re.search(r"2 of 2 images of a batch are not finite \(numbers 0, 1\), first the " + f".*{message}", said)
    assert not [*tmp_path.rglob("*.png"), *tmp_path.rglob("*.npz"), *tmp_path.rglob("*.partial")]
    if "fp32" in message:
        assert COMMANDS[command.__name__](path, tmp_path / "fp32").any()


@pytest.mark.parametrize("sampler", ["ddim", "dpm-solver", "euler", "heun", "sde", "rk45"])
def test_the_images_that_are_not_finite_are_named(tmp_path, checkpoint, sampler):
    """Those of a spoilt class; batches before theirs stay."""
    path = checkpoint(objective="flow" if sampler in FLOW_SAMPLERS else "diffusion")
    change(path, lambda weights: weights["final_layer.linear.weight"].zero_())  # for few adaptive steps
    change(path, lambda weights: weights["y_embedder.embedding_table.weight"][3].fill_(3e38))
    flags = ["--ckpt", path, *FEW_STEPS, "--sampler", sampler]
    said = error_of(sample, *flags, "--class-labels", 3, 4, 3, "--out", tmp_path / "a.png")
    assert re.search(r"2 of 3 .*\(numbers 0, 2\), first the network's output at call 1", said)
    flags += ["--num-fid-samples", 40, "--per-proc-batch-size", 4, "--sample-dir", tmp_path / "s"]
    number = int(re.search(r"\(numbers (\d+)", error_of(sample_ddp, *flags))[1])
    assert sorted(int(path.stem) for path in tmp_path.rglob("*.png")) == list(range(number // 4 * 4))
    assert not list(tmp_path.rglob("*.npz"))


def test_other_weights_or_settings_do_not_mix_into_a_folder(tmp_path, checkpoint, randomize):
    path = checkpoint()
    draw_many(path, tmp_path / "s", "--num-fid-samples", 2)
    with pytest.raises(ValueError, match="num_sampling_steps 4 and now 5; give another --sample-dir"):
        draw_many(path, tmp_path / "s", "--num-fid-samples", 2, "--num-sampling-steps", 5)
    change(path, lambda weights: weights["final_layer.linear.bias"].add_(1))
    with pytest.raises(ValueError, match=r"weights .* and now"):
        draw_many(path, tmp_path / "s", "--num-fid-samples", 2)


def test_images_of_unknown_origin_are_left_alone(tmp_path, checkpoint):
    folder = tmp_path / "s" / "DiT-N-4-a-size-8-vae-none-cfg-1.5-seed-0"
    folder.mkdir(parents=True)
    Image.new("RGB", (8, 8), "red").save(folder / "000000.png")
    with pytest.raises(ValueError, match="holds images of unknown origin"):
        draw_many(checkpoint(), tmp_path / "s", "--num-fid-samples", 1)


def test_a_large_npz_is_not_replaced_by_a_small_one(tmp_path, checkpoint):
    path = checkpoint()
    draw_many(path, tmp_path / "s", "--num-fid-samples", 3)
    with pytest.raises(ValueError, match="holds 3 images, more than --num-fid-samples 2"):
        draw_many(path, tmp_path / "s", "--num-fid-samples", 2)
    assert len(draw_many(path, tmp_path / "s", "--num-fid-samples", 4)) == 4


def test_a_damaged_image_is_named(tmp_path, checkpoint):
    path = checkpoint()
    draw_many(path, tmp_path / "s", "--num-fid-samples", 2)
    png = next((tmp_path / "s").rglob("000001.png"))
    png.write_bytes(png.read_bytes()[:60])
    with pytest.raises(OSError, match=r"cannot read the image .*000001\.png .*; delete it and run again"):
        draw_many(path, tmp_path / "s", "--num-fid-samples", 2)


def save_16_bits(path):
    pixels = zlib.compress(8 * (b"\0" + 8 * b"abcdef"))
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)), (b"IDAT", pixels), (b"IEND", b"")]
    packed = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(packed))


FOREIGN = {
    "size": lambda path: Image.new("RGB", (8, 9)).save(path),
    "grey": lambda path: Image.new("L", (8, 8)).save(path),
    "alpha": lambda path: Image.new("RGBA", (8, 8)).save(path),
    "palette": lambda path: Image.new("P", (8, 8)).save(path),
    "16 bits": save_16_bits,
    "jpeg": lambda path: Image.new("RGB", (8, 8)).save(path, "jpeg"),
    "empty": lambda path: path.write_bytes(b""),
}


@pytest.mark.parametrize("save", FOREIGN.values(), ids=FOREIGN)
def test_an_image_of_another_kind_is_named_before_any_is_drawn(tmp_path, monkeypatch, checkpoint, save):
    path = checkpoint()
    draw_many(path, tmp_path / "s", "--num-fid-samples", 1)
    folder = next(entry for entry in (tmp_path / "s").iterdir() if entry.is_dir())
    save(folder / "000001.png")
    monkeypatch.setattr(drawing, "generate", None)
    with pytest.raises(OSError, match=r"000001\.png is not an 8-bit RGB PNG of 8 x 8 as this run's are; delete it"):
        draw_many(path, tmp_path / "s", "--num-fid-samples", 3)
    with pytest.raises(OSError, match=r"000001\.png is not"):  # it may have come later
        gather_npz(folder, 2, (8, 8))
    (folder / "000001.png").rename(folder / "1.png")
    with pytest.raises(OSError, match=r"1\.png is none of this run's images, which are named by number; move it away"):
        draw_many(path, tmp_path / "s", "--num-fid-samples", 3)


def test_fewer_images_than_lie_there(tmp_path, checkpoint, capsys):
    path = checkpoint()
    many = draw_many(path, tmp_path / "s", "--num-fid-samples", 5)
    next((tmp_path / "s").glob("*.npz")).unlink()
    assert np.array_equal(draw_many(path, tmp_path / "s", "--num-fid-samples", 3), many[:3])
    assert "2 images beyond --num-fid-samples 3 stay in" in capsys.readouterr().out


def test_a_folder_is_for_one_run_at_a_time(tmp_path, checkpoint):
    path = checkpoint()
    draw_many(path, tmp_path / "s", "--num-fid-samples", 1)
    record = next((tmp_path / "s").rglob("settings.json"))
    context = multiprocessing.get_context("fork")
    ready = context.Event()

    def hold():
        with open(record, "a+") as file:
            fcntl.lockf(file, fcntl.LOCK_EX)
            ready.set()
            time.sleep(600)

    other = context.Process(target=hold)
    other.start()
    ready.wait()
    try:
        with pytest.raises(ValueError, match=r"another process is at work in .*DiT-N-4-a-.*; wait for its end, or stop it"):
            draw_many(path, tmp_path / "s", "--num-fid-samples", 2)
    finally:
        other.kill()
        other.join()
    assert len(draw_many(path, tmp_path / "s", "--num-fid-samples", 2)) == 2


def test_what_a_kill_leaves_is_taken_away(tmp_path, checkpoint):
    """A kill while the folder's settings, an image or the .npz was being written."""
    path = checkpoint()
    folder = tmp_path / "s" / "DiT-N-4-a-size-8-vae-none-cfg-1.5-seed-0"
    folder.mkdir(parents=True)
    (folder / "settings.json").write_text('{"weights": "2f')
    left = [folder / "000000.png.7.partial", tmp_path / "s" / f"{folder.name}.npz.7.partial"]
    for partial in left:
        partial.write_bytes(b"half")
    assert len(draw_many(path, tmp_path / "s", "--num-fid-samples", 1)) == 1
    assert not any(partial.exists() for partial in left)
    (folder / "settings.json").write_text("")
    with pytest.raises(ValueError, match="holds images of unknown origin"):
        draw_many(path, tmp_path / "s", "--num-fid-samples", 1)


def limit_files(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@pytest.mark.parametrize(("size", "named"), [(100, r"could not write the image .*000000\.png: "), (1000, "")])
@pytest.mark.usefixtures("capsys")  # or the limit is on the output, too
def test_a_full_disk_leaves_nothing_half(tmp_path, monkeypatch, checkpoint, size, named):
    """A limit on the size of files stands for it."""
    path = checkpoint()
    check = sample_ddp.check_folder
    monkeypatch.setattr(sample_ddp, "check_folder", lambda *a: check(*a) or limit_files(size))
    try:
        flags = ["--ckpt", path, *FEW_STEPS, "--sample-dir", tmp_path / "s", "--num-fid-samples", 8]
        said = error_of(sample_ddp, *flags)
    finally:
        limit_files(resource.RLIM_INFINITY)
    assert re.search(f"{named}.*File too large", said)
    assert len(list(tmp_path.rglob("*.png"))) == (0 if size == 100 else 8)
    assert not [*tmp_path.rglob("*.partial"), *tmp_path.rglob("*.npz")]


@pytest.mark.parametrize(
    ("options", "flags", "words"),
    [
        (dict(), ["--cfg-scale", 1.5], "DiT-N/4 with mixer pdessm (diagonal coupling), diffusion by ddpm in 4 steps, fp32, "
         "with guidance of strength 1.5 on all 3 channels"),
        (dict(mixer="attention"), ["--sampler", "dpm-solver", "--cfg-scale", 1], "DiT-N/4 with mixer attention, diffusion by "
         "dpm-solver in 4 steps, fp32, without guidance"),
        (dict(objective="flow"), ["--sampler", "rk45", "--precision", "bf16", "--cfg-interval", 0.2, 0.5, "--cfg-scale", 2],
         "flow by rk45 in steps of its own, bf16, with guidance of strength 2 on all 3 channels from 0.2 to 0.5 of the way"),
        (dict(num_classes=0), ["--cfg-scale", 3], "fp32, without guidance"),
        (dict(), ["--cfg-scale", 0], "fp32, without classes"),
    ],
)  # fmt: skip
def test_both_commands_say_once_what_they_draw(tmp_path, checkpoint, capsys, options, flags, words):
    path = change(checkpoint(**options), lambda weights: weights["final_layer.linear.weight"].zero_())  # for few adaptive steps
    draw(path, tmp_path / "a.png", *flags)
    draw_many(path, tmp_path / "s", "--num-fid-samples", 1, *flags)
    lines = [line for line in capsys.readouterr().out.splitlines() if " with mixer " in line]
    assert [line.endswith(words) for line in lines] == [True, True]


def test_samples_are_evaluated_in_one_go(tmp_path, checkpoint, monkeypatch, capsys):
    for command in (sample_ddp, evaluate):
        monkeypatch.setattr(command, "open_network", lambda *_: Colours())
    ref, path = tmp_path / "ref.npz", checkpoint()
    with pytest.raises(FileNotFoundError, match=r"ref\.npz: no such file"):  # before any image is drawn
        draw_many(path, tmp_path / "s", "--evaluate", ref)
    assert not (tmp_path / "s").exists()
    np.savez(ref, arr_0=np.random.default_rng(0).integers(0, 256, (30, 8, 8, 3), dtype=np.uint8))
    draw_many(path, tmp_path / "s", "--num-fid-samples", 8, "--evaluate", ref)
    npz = next((tmp_path / "s").glob("*.npz"))
    row = json.loads(npz.with_suffix(".json").read_text())
    printed = capsys.readouterr().out
    assert f"FID: {row['FID']}" in printed
    evaluate.main(evaluate.parse_args([str(ref), str(npz), "--json", "-"]), ALONE)
    assert json.loads(capsys.readouterr().out) == row


def test_labels_and_seed_vary_the_images(tmp_path, checkpoint, monkeypatch):
    drawn = []
    generate = drawing.generate
    monkeypatch.setattr(drawing, "generate", lambda *a, **k: drawn.extend(a[4].tolist()) or generate(*a, **k))
    path = checkpoint()
    first = draw_many(path, tmp_path / "s", "--num-fid-samples", 40)
    assert set(drawn) == set(range(10))
    assert not np.array_equal(first, draw_many(path, tmp_path / "t", "--num-fid-samples", 40, "--global-seed", 1))


def test_the_npz_takes_no_memory(tmp_path):
    """Two thousand images of 3 kB are gathered in well under their 6 MB."""
    folder = tmp_path / "images"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (2000, 32, 32, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{i:06d}.png", compress_level=0)
    tracemalloc.start()
    gather_npz(folder, 2000, (32, 32))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e6
    with np.load(f"{folder}.npz") as arrays:
        assert np.array_equal(arrays["arr_0"], pixels)


def test_many_samples_are_drawn_in_parts(tmp_path, checkpoint, monkeypatch):
    path, flags = checkpoint(), ["--class-labels", 1, 2, 3, "--samples-per-class", 2]
    whole = draw(path, tmp_path / "a.png", *flags)
    monkeypatch.setattr(drawing, "AT_ONCE", 4)
    assert np.abs(whole.astype(int) - draw(path, tmp_path / "b.png", *flags)).max() <= 1


def test_flags_of_the_public_scripts_keep_their_defaults():
    one, lots = vars(sample.parse_args([])), vars(sample_ddp.parse_args([]))
    assert dict(cfg_scale=4.0, num_sampling_steps=250, seed=0, ckpt=None).items() <= one.items()
    public = dict(
        sample_dir="samples", per_proc_batch_size=32, num_fid_samples=50_000, cfg_scale=1.5, num_sampling_steps=250,
        global_seed=0, tf32=True, ckpt=None,
    )  # fmt: skip
    assert public.items() <= lots.items()
    assert sample_ddp.parse_args(["--no-tf32"]).tf32 is False
    assert public_checkpoint() == "DiT-XL-2-256x256.pt"
    assert public_checkpoint(image_size=512) == "DiT-XL-2-512x512.pt"


@pytest.mark.parametrize(
    ("command", "flags", "message"),
    [
        (sample, ["--class-labels", "11"], "class 11 is out of range: the checkpoint has 0 to 9"),
        (sample, ["--out", "/no/such/folder/a.png"], "/no/such/folder/a.png: not a file in a folder that can be written"),
        (sample, ["--out", "/tmp"], "/tmp: not a file"),
        (sample, ["--mixer", "attention"], "--mixer attention contradicts .*--mixer pdessm"),
        (sample, ["--num-sampling-steps", "1001"], "--num-sampling-steps 1001: ddpm takes at most 1000 of training's 1000"),
        (sample_ddp, ["--num-sampling-steps", "1001", "--sampler", "ddim"], "1001: ddim takes at most 1000"),
        (sample_ddp, ["--num-sampling-steps", "1000", "--sampler", "dpm-solver"], "1000: dpm-solver takes at most 999"),
        (sample_ddp, ["--num-fid-samples", f"{2**32 + 1}"], "--num-fid-samples 4,294,967,297: seeds tell 4,294,967,296"),
        (sample_ddp, ["--sample-dir", "/proc/version/samples"], "/proc/version"),
        (sample_ddp, ["--ckpt", "/no/checkpoint.pt"], "no checkpoint at /no/checkpoint.pt"),
        (sample_ddp, ["--image-size", "30"], "--image-size 30x30: both must be divisible by 4"),
        (sample, ["--image-size", "32x30"], "--image-size 32x30: both must be divisible by 4"),
    ],
)
def test_mistakes_end_in_one_line(tmp_path, monkeypatch, checkpoint, command, flags, message):
    path = checkpoint()
    monkeypatch.chdir(tmp_path)
    assert re.search(message, error_of(command, "--ckpt", path, *FEW_STEPS, *flags))
    assert not (tmp_path / "samples").exists()


@pytest.mark.parametrize("flags", [["--model", "DiT-S/2"], ["--mixer", "pdessm"], ["--image-size", "64"]])
def test_without_a_checkpoint_there_is_one_model(flags):
    with pytest.raises(ValueError, match="without --ckpt there is only DiT-XL/2"):
        sample.main(sample.parse_args(flags), ALONE)


def test_only_classes_that_were_trained_are_drawn(tmp_path, checkpoint, monkeypatch):
    """The model has 10, and there were images of 2."""
    path, drawn, generate = checkpoint(), [], drawing.generate
    contents = torch.load(path)
    contents["args"]["class_names"] = ["cat", "dog"]
    torch.save(contents, path)
    monkeypatch.setattr(drawing, "generate", lambda *a, **k: drawn.append(set(a[4].tolist())) or generate(*a, **k))
    draw(path, tmp_path / "a.png")
    draw_many(path, tmp_path / "s", "--num-fid-samples", 12, "--per-proc-batch-size", 12)
    draw(path, tmp_path / "a.png", "--class-labels", 1, 10)
    assert drawn == [{0, 1}, {0, 1}, {1, 10}]
    with pytest.raises(ValueError, match="class 2 was not trained: there were images of 0 to 1; 10 is none"):
        draw(path, tmp_path / "a.png", "--class-labels", 0, 2)
    contents["args"]["class_names"] = [str(n) for n in range(11)]
    torch.save(contents, path)
    with pytest.raises(ValueError, match=r"a\.pt contradicts itself: it names 11 classes, its weights have num_classes=10"):
        draw(path, tmp_path / "a.png")


def test_classes_cannot_be_asked_of_a_model_without(checkpoint):
    args = sample.parse_args(["--ckpt", checkpoint(num_classes=0), "--class-labels", "0"])
    with pytest.raises(ValueError, match="trained without classes"):
        sample.main(args, ALONE)
