"""sample_ddp.py: a folder of numbered images and their .npz, whatever comes between."""

import json
import re
import resource
import shutil
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import sample_ddp
from commands import ALONE, FEW_STEPS, Colours, change_weights, draw_many, error_of, locked_by_another, torchrun
from diffusion import drawing
from images.numbered import UNRECORDED, gather_npz
from machine.processes import Processes

pytestmark = pytest.mark.usefixtures("one_thread")


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


def test_balanced_labels_follow_from_the_numbers(tmp_path, checkpoint, monkeypatch):
    drawn, generate = [], drawing.generate
    note = lambda *a, **k: drawn.extend(zip(k["numbers"], a[4].tolist())) or generate(*a, **k)  # noqa: E731
    monkeypatch.setattr(drawing, "generate", note)
    flags = ["--num-fid-samples", 23, "--per-proc-batch-size", 7]
    draw_many(checkpoint(), tmp_path / "s", *flags, "--balanced-labels")
    assert sorted(drawn) == [(number, number % 10) for number in range(23)]
    with pytest.raises(ValueError, match="balanced_labels True and now False"):
        draw_many(checkpoint(), tmp_path / "s", *flags)
    with pytest.raises(ValueError, match="--balanced-labels means nothing to a checkpoint without classes"):
        draw_many(checkpoint(num_classes=0), tmp_path / "t", *flags, "--balanced-labels")


@pytest.mark.parametrize("flag", ["--tf32", "--no-tf32"])
def test_tf32_is_of_products_and_convolutions(tmp_path, checkpoint, monkeypatch, flag):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    draw_many(checkpoint(), tmp_path / "s", "--num-fid-samples", 2, flag)
    assert torch.backends.cudnn.allow_tf32 == (flag == "--tf32")
    assert torch.get_float32_matmul_precision() == ("high" if flag == "--tf32" else "highest")


def test_balanced_labels_leave_the_noise_as_it_is(monkeypatch):
    def generate(model, space, objective, sampler, labels, noise, *rest, **how):
        return noise.randn(3)

    monkeypatch.setattr(drawing, "generate", generate)
    model = torch.nn.Linear(1, 1)
    model.trained_classes = 10
    plain, balanced = (drawing.draw_numbered(model, None, None, None, range(5), 0, None, kind) for kind in (False, True))
    assert torch.equal(plain, balanced)


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


class Second(Processes):
    """The second of two processes, which sees none of what the first one finds missing."""

    def barrier(self):
        pass

    def share(self, value):
        return [range(2), range(2, 4), range(4, 6), range(6, 7)]


def test_all_processes_draw_what_the_first_one_finds_missing(tmp_path, checkpoint, monkeypatch):
    path, drawn, generate = checkpoint(), [], drawing.generate
    flags = ["--num-fid-samples", 7, "--per-proc-batch-size", 2]
    draw_many(path, tmp_path / "s", *flags)
    monkeypatch.setattr(drawing, "generate", lambda *a, **k: drawn.extend(k["numbers"]) or generate(*a, **k))
    args = ["--ckpt", path, "--sample-dir", tmp_path / "s", *FEW_STEPS, *flags]
    sample_ddp.main(sample_ddp.parse_args(list(map(str, args))), Second(1, 2, torch.device("cpu")))
    assert drawn == [2, 3, 6]


def test_other_weights_or_settings_do_not_mix_into_a_folder(tmp_path, checkpoint, randomize):
    path = checkpoint()
    draw_many(path, tmp_path / "s", "--num-fid-samples", 2)
    with pytest.raises(ValueError, match="num_sampling_steps 4 and now 5; give another --sample-dir"):
        draw_many(path, tmp_path / "s", "--num-fid-samples", 2, "--num-sampling-steps", 5)
    with pytest.raises(ValueError, match="cfg_channels 3 and now all; give another --sample-dir"):
        draw_many(path, tmp_path / "s", "--num-fid-samples", 2, "--cfg-channels", "all")
    flow = checkpoint(objective="flow", name="flow.pt")
    draw_many(flow, tmp_path / "flow", "--num-fid-samples", 2)
    with pytest.raises(ValueError, match=r"time_shift 1\.0 and now 2\.0; give another --sample-dir"):
        draw_many(flow, tmp_path / "flow", "--num-fid-samples", 2, "--time-shift", 2)
    change_weights(path, lambda weights: weights["final_layer.linear.bias"].add_(1))
    with pytest.raises(ValueError, match=r"weights .* and now"):
        draw_many(path, tmp_path / "s", "--num-fid-samples", 2)


@pytest.mark.parametrize(
    ("mixer", "stated", "flags", "change"),
    [
        ("mamba", {}, ["--mamba-zigzag"], "mixer_options {} and now {'--mamba-zigzag': True}"),
        ("attention", dict(norm="rms"), [], "norm layer and now rms"),
        ("attention", dict(time_intervals=127), [], "time_intervals None and now 127"),
        ("attention", dict(class_names=["ant", "bee"]), [], "classes 10 and now 2"),
    ],
    ids=str,
)
def test_nor_does_what_weights_do_not_tell(tmp_path, checkpoint, mixer, stated, flags, change):
    path, two = checkpoint(mixer), ["--num-fid-samples", 2]
    bare = torch.load(path)
    del bare["args"]["mixer"]
    torch.save(bare, path)
    draw_many(path, tmp_path / "s", *two)
    draw_many(path, tmp_path / "s", *two)
    torch.save(bare | dict(args=bare["args"] | stated), path)
    with pytest.raises(ValueError, match=re.escape(f"holds images made with {change}; give another --sample-dir")):
        draw_many(path, tmp_path / "s", *two, *flags)


def test_images_of_unknown_origin_are_left_alone(tmp_path, checkpoint):
    folder = tmp_path / "s" / "DiT-N-4-a-size-8-vae-none-cfg-1.5-seed-0"
    folder.mkdir(parents=True)
    Image.new("RGB", (8, 8), "red").save(folder / "000000.png")
    with pytest.raises(ValueError, match="holds images of unknown origin"):
        draw_many(checkpoint(), tmp_path / "s", "--num-fid-samples", 1)


def test_an_npz_whose_folder_is_gone_is_left_alone(tmp_path, checkpoint):
    path = checkpoint()
    draw_many(path, tmp_path / "s", "--num-fid-samples", 2)
    folder = next(entry for entry in (tmp_path / "s").iterdir() if entry.is_dir())
    shutil.rmtree(folder)
    before = Path(f"{folder}.npz").read_bytes()
    with pytest.raises(ValueError, match=rf"{folder.name}\.npz holds images of unknown origin"):
        draw_many(path, tmp_path / "s", "--num-fid-samples", 2, "--num-sampling-steps", 3)
    assert Path(f"{folder}.npz").read_bytes() == before


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
    message = r"another process is at work in .*DiT-N-4-a-.*; wait for its end, or stop it"
    with locked_by_another(record), pytest.raises(ValueError, match=message):
        draw_many(path, tmp_path / "s", "--num-fid-samples", 2)
    assert len(draw_many(path, tmp_path / "s", "--num-fid-samples", 2)) == 2


@pytest.mark.parametrize("kept", ['{"weights": "2f', '{"num_sampling_steps": 7}'], ids=["cut short", "before the first image"])
def test_what_a_kill_leaves_is_taken_away(tmp_path, checkpoint, kept):
    """A kill while the folder's settings, an image or the .npz was being written."""
    path = checkpoint()
    folder = tmp_path / "s" / "DiT-N-4-a-size-8-vae-none-cfg-1.5-seed-0"
    folder.mkdir(parents=True)
    (folder / "settings.json").write_text(kept)
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


def test_a_folder_keeps_its_precision(tmp_path, checkpoint):
    path, two = checkpoint(), ["--num-fid-samples", 2]
    draw_many(path, tmp_path / "half", *two, "--precision", "bf16")
    with pytest.raises(ValueError, match="precision bf16 and now fp32; give another --sample-dir"):
        draw_many(path, tmp_path / "half", *two)
    draw_many(path, tmp_path / "old", *two)
    record = next((tmp_path / "old").rglob("settings.json"))
    settings = json.loads(record.read_text())
    assert settings.items() >= UNRECORDED.items()
    record.write_text(json.dumps({name: value for name, value in settings.items() if name not in UNRECORDED}))
    for flags, change in (
        (["--precision", "fp16"], "precision fp32 and now fp16"),
        (["--balanced-labels"], "balanced_labels False and now True"),
    ):
        with pytest.raises(ValueError, match=change):
            draw_many(path, tmp_path / "old", *two, *flags)
    draw_many(path, tmp_path / "old", *two)


@pytest.mark.parametrize("flags", [["--features", "efficientnet-lite0"], ["--weights", "/no/file"]], ids=str)
def test_flags_of_evaluation_mean_nothing_without_it(tmp_path, checkpoint, flags):
    with pytest.raises(ValueError, match="--features and --weights mean nothing without --evaluate"):
        draw_many(checkpoint(), tmp_path / "s", *flags)
