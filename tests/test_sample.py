import json
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import sample
import sample_ddp
from commands import ALONE, FEW_STEPS, Colours, draw, draw_many, torchrun
from diffusion import create_diffusion, create_flow
from models import DiT_models
from parallel import launch

pytestmark = pytest.mark.usefixtures("one_thread")


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
    sample.save_grid(images, tmp_path / "grid.png", columns=2)
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


@torch.no_grad()
def test_guidance_on_a_part_of_the_way_and_on_all_channels(randomize):
    model = randomize(DiT_models["DiT-N/4"](input_size=8, in_channels=4, num_classes=10, learn_sigma=False)).eval()
    x, y = torch.randn(2, 4, 8, 8), torch.tensor([3, 7])
    flow, null = create_flow(), torch.full((2,), 10)

    def network(t, *settings):
        return sample.guided(model, flow, sample.Guidance(2.5, *settings))(x, t, y)

    t = torch.full((2,), 400.0)
    plain, without = model(x, t, y), model(x, t, null)
    all_channels = without + 2.5 * (plain - without)
    torch.testing.assert_close(network(t, None), all_channels)
    torch.testing.assert_close(network(t)[:, :3], all_channels[:, :3])
    torch.testing.assert_close(network(t)[:, 3], plain[:, 3])
    torch.testing.assert_close(network(t, None, (0.3, 0.5)), all_channels)
    torch.testing.assert_close(network(t, None, (0.5, 0.9)), plain)
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
    generate = sample.generate
    monkeypatch.setattr(sample_ddp, "generate", lambda *a, **k: drawn.append(len(a[4])) or generate(*a, **k))
    assert np.array_equal(draw_many(path, tmp_path / "s", *flags), whole)
    assert drawn == [4, 2]


def test_other_weights_or_settings_do_not_mix_into_a_folder(tmp_path, checkpoint, randomize):
    path = checkpoint()
    draw_many(path, tmp_path / "s", "--num-fid-samples", 2)
    with pytest.raises(ValueError, match="num_sampling_steps 4 and now 5; give another --sample-dir"):
        draw_many(path, tmp_path / "s", "--num-fid-samples", 2, "--num-sampling-steps", 5)
    contents = torch.load(path, weights_only=True)
    contents["ema"]["final_layer.linear.bias"] += 1
    torch.save(contents, path)
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
    with pytest.raises(OSError, match=r"cannot read the image .*000001\.png"):
        draw_many(path, tmp_path / "s", "--num-fid-samples", 2)


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
    generate = sample.generate
    monkeypatch.setattr(sample_ddp, "generate", lambda *a, **k: drawn.extend(a[4].tolist()) or generate(*a, **k))
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
    sample_ddp.gather_npz(folder, 2000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e6
    with np.load(f"{folder}.npz") as arrays:
        assert np.array_equal(arrays["arr_0"], pixels)


def test_many_samples_are_drawn_in_parts(tmp_path, checkpoint, monkeypatch):
    path, flags = checkpoint(), ["--class-labels", 1, 2, 3, "--samples-per-class", 2]
    whole = draw(path, tmp_path / "a.png", *flags)
    monkeypatch.setattr(sample, "AT_ONCE", 4)
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
    assert sample.checkpoint_name(sample.parse_args([])) == "DiT-XL-2-256x256.pt"
    assert sample.checkpoint_name(sample.parse_args(["--image-size", "512"])) == "DiT-XL-2-512x512.pt"


@pytest.mark.parametrize(
    ("command", "flags", "message"),
    [
        (sample, ["--class-labels", "11"], "class 11 is out of range: the checkpoint has 0 to 9"),
        (sample, ["--out", "/no/such/folder/a.png"], "/no/such/folder/a.png: not a file in a folder that can be written"),
        (sample, ["--out", "/tmp"], "/tmp: not a file"),
        (sample, ["--mixer", "attention"], "--mixer attention contradicts .*--mixer pdessm"),
        (sample, ["--num-sampling-steps", "1001"], "cannot take 1001 timesteps from a section of 1000"),
        (sample_ddp, ["--sample-dir", "/proc/version/samples"], "/proc/version"),
        (sample_ddp, ["--ckpt", "/no/checkpoint.pt"], "no checkpoint at /no/checkpoint.pt"),
        (sample_ddp, ["--image-size", "30"], "--image-size 30x30: both must be divisible by 4"),
        (sample, ["--image-size", "32x30"], "--image-size 32x30: both must be divisible by 4"),
    ],
)
def test_mistakes_end_in_one_line(tmp_path, monkeypatch, checkpoint, command, flags, message):
    path = checkpoint()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message) as end:
        launch(command.main, command.parse_args(["--ckpt", path, *FEW_STEPS, *flags]))
    assert "\n" not in str(end.value)


@pytest.mark.parametrize("flags", [["--model", "DiT-S/2"], ["--mixer", "pdessm"], ["--image-size", "64"]])
def test_without_a_checkpoint_there_is_one_model(flags):
    with pytest.raises(ValueError, match="without --ckpt there is only DiT-XL/2"):
        sample.checkpoint_name(sample.parse_args(flags))


def test_only_classes_that_were_trained_are_drawn(tmp_path, checkpoint, monkeypatch):
    """The model has 10, and there were images of 2."""
    path, drawn, generate = checkpoint(), [], sample.generate
    contents = torch.load(path)
    contents["args"]["class_names"] = ["cat", "dog"]
    torch.save(contents, path)
    for command in (sample, sample_ddp):
        monkeypatch.setattr(command, "generate", lambda *a, **k: drawn.append(set(a[4].tolist())) or generate(*a, **k))
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


