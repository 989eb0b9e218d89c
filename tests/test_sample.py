"""sample.py, and what it has in common with sample_ddp.py."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

import sample
import sample_ddp
from commands import ALONE, FEW_STEPS, change_weights, draw, draw_many, error_of
from diffusion import drawing
from diffusion.samplers import FLOW_SAMPLERS
from download import public_checkpoint
from images.autoencoder import PixelSpace
from images.dataset import cropped

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
    change_weights(same, lambda weights: weights[table].copy_(weights[table][-1:].expand_as(weights[table])))
    drawn = [run(path, tmp_path / f"{scale}", "--cfg-scale", scale).astype(int) for scale in (0, 0.5, 1)]
    without = run(same, tmp_path / "without", "--cfg-scale", 4)
    assert [np.abs(images - without).max() <= 1 for images in drawn] == [True, False, False]
    if run is COMMANDS["sample"]:
        null = run(path, tmp_path / "null", "--class-labels", num_classes, "--cfg-scale", 4)
        assert np.abs(drawn[0] - null).max() <= 1


def test_a_weaker_checkpoint_guides(tmp_path, checkpoint):
    path, weak = checkpoint(), checkpoint("attention", name="weak.pt")
    flags = ["--class-labels", 3, "--cfg-scale", 1, "--guide-ckpt"]
    plain = draw(path, tmp_path / "a.png", *flags[:-1])
    assert not np.array_equal(draw(path, tmp_path / "b.png", *flags, weak), plain)
    assert np.abs(draw(path, tmp_path / "b.png", *flags, weak, "--guide-scale", 1).astype(int) - plain).max() <= 1
    assert np.array_equal(
        draw(path, tmp_path / "b.png", *flags, weak), draw(path, tmp_path / "b.png", *flags, weak, "--guide-scale", 2)
    )
    draw_many(path, tmp_path / "s", "--num-fid-samples", 1, "--guide-ckpt", weak)
    with pytest.raises(ValueError, match=r"guide_scale 2\.0 and now 3\.0; give another --sample-dir"):
        draw_many(path, tmp_path / "s", "--num-fid-samples", 1, "--guide-ckpt", weak, "--guide-scale", 3)
    for other, message in (
        (checkpoint("attention", name="f.pt", objective="flow"), "has objective flow, and what it is to guide has diffusion"),
        (checkpoint("attention", 5, name="c.pt"), "has 5 classes, what it is to guide 10"),
    ):
        with pytest.raises(ValueError, match=message):
            draw(path, tmp_path / "b.png", *flags, other)
    with pytest.raises(ValueError, match="--guide-scale 3 means nothing without --guide-ckpt"):
        draw(path, tmp_path / "b.png", "--guide-scale", 3)
    assert draw(path, tmp_path / "b.png", *flags, checkpoint("attention", 0, name="u.pt")).shape == plain.shape


def test_a_guide_whose_classes_are_in_another_order_is_refused(tmp_path, checkpoint):
    path, weak = (checkpoint(num_classes=3, name=name) for name in ("a.pt", "weak.pt"))

    def call_classes(path, names):
        contents = torch.load(path, weights_only=True)
        torch.save(contents | dict(args=contents["args"] | dict(class_names=names)), path)

    call_classes(path, ["cat", "dog", "dog"])
    for names in (["cat", "dog", "dog"], ["tabby", "dog", "wolf"]):
        call_classes(weak, names)
        draw(path, tmp_path / "a.png", "--guide-ckpt", weak)
    call_classes(weak, ["tabby", "wolf", "cat"])
    with pytest.raises(ValueError, match=r"weak\.pt has cat as class 2, and what it is to guide as class 0$"):
        draw(path, tmp_path / "a.png", "--guide-ckpt", weak)


def test_a_guide_that_does_not_tell_its_objective_has_the_other_s(tmp_path, checkpoint):
    path, weak = (checkpoint("attention", name=name, objective="flow") for name in ("a.pt", "weak.pt"))
    flags = ["--class-labels", 3, "--cfg-scale", 1, "--sampler", "euler", "--guide-ckpt"]
    told = draw(path, tmp_path / "a.png", *flags, weak)
    contents = torch.load(weak, weights_only=True)
    for name, other, own in (("path", "cosine", "linear"), ("predict", "x", "velocity"), ("time_scale", 1, 1000)):
        torch.save(contents | dict(args=contents["args"] | {name: other}), tmp_path / "other.pt")
        with pytest.raises(ValueError, match=f"other.pt has {name} {other}, and what it is to guide has {own}$"):
            draw(path, tmp_path / "b.png", *flags, tmp_path / "other.pt")
    torch.save(torch.load(weak, weights_only=True)["ema"], weak)
    assert np.array_equal(draw(path, tmp_path / "b.png", *flags, weak), told)


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
    path = change_weights(checkpoint(), how)
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
    change_weights(path, lambda weights: weights["final_layer.linear.weight"].zero_())  # for few adaptive steps
    change_weights(path, lambda weights: weights["y_embedder.embedding_table.weight"][3].fill_(3e38))
    flags = ["--ckpt", path, *FEW_STEPS, "--sampler", sampler]
    said = error_of(sample, *flags, "--class-labels", 3, 4, 3, "--out", tmp_path / "a.png")
    assert re.search(r"2 of 3 .*\(numbers 0, 2\), first the network's output at call 1", said)
    flags += ["--num-fid-samples", 40, "--per-proc-batch-size", 4, "--sample-dir", tmp_path / "s"]
    number = int(re.search(r"\(numbers (\d+)", error_of(sample_ddp, *flags))[1])
    assert sorted(int(path.stem) for path in tmp_path.rglob("*.png")) == list(range(number // 4 * 4))
    assert not list(tmp_path.rglob("*.npz"))


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
    path = checkpoint(**options)
    change_weights(path, lambda weights: weights["final_layer.linear.weight"].zero_())  # for few adaptive steps
    draw(path, tmp_path / "a.png", *flags)
    draw_many(path, tmp_path / "s", "--num-fid-samples", 1, *flags)
    lines = [line for line in capsys.readouterr().out.splitlines() if " with mixer " in line]
    assert [line.endswith(words) for line in lines] == [True, True]


def test_every_pixel_comes_back_as_it_was_read():
    pixels = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    images = cropped(Image.fromarray(pixels), 16)[None]
    for off in (-0.4, 0, 0.4):  # of a level: the nearest one is meant
        assert np.array_equal(drawing.to_pixels(images + off / 127.5)[0], pixels)
    assert drawing.to_pixels(torch.tensor([-3.0, 3.0]).view(2, 1, 1, 1)).flatten().tolist() == [0, 255]


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
        (sample, ["--class-labels", "-1"], "class -1 is out of range: the checkpoint has 0 to 9"),
        (sample, ["--out", "/no/such/folder/a.png"], "/no/such/folder/a.png: not a file in a folder that can be written"),
        (sample, ["--out", f"{__file__}/a.png"], "a.png: not a file in a folder that can be written"),
        (sample, ["--out", "/tmp"], "/tmp: not a file"),
        (sample, ["--out", "a.jpg"], r"--out a.jpg should end in \.png"),
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
    name_classes(path, "cat", "dog")
    monkeypatch.setattr(drawing, "generate", lambda *a, **k: drawn.append(set(a[4].tolist())) or generate(*a, **k))
    draw(path, tmp_path / "a.png")
    draw_many(path, tmp_path / "s", "--num-fid-samples", 12, "--per-proc-batch-size", 12)
    draw(path, tmp_path / "a.png", "--class-labels", 1, 10)
    assert drawn == [{0, 1}, {0, 1}, {1, 10}]
    with pytest.raises(ValueError, match="class 2 was not trained: there were images of 0 to 1; 10 is none"):
        draw(path, tmp_path / "a.png", "--class-labels", 0, 2)
    name_classes(path, *map(str, range(11)))
    with pytest.raises(ValueError, match=r"a\.pt contradicts itself: it names 11 classes, its weights have num_classes=10"):
        draw(path, tmp_path / "a.png")


def name_classes(path, *names):
    contents = torch.load(path)
    contents["args"]["class_names"] = [*names]
    torch.save(contents, path)
    return path


def test_classes_have_names(tmp_path, checkpoint):
    path = name_classes(checkpoint(), "bird of paradise", "rose", "007")
    wanted = (["Rose", 0, "007"], [1, "bird of paradise", 2])
    grids = [draw(path, tmp_path / "a.png", "--class-labels", *classes) for classes in wanted]
    assert grids[0].shape == (2 + 66 + 16, 2 + 3 * 66, 3)  # with room for the names
    assert np.array_equal(*grids)
    assert len(draw(path, tmp_path / "a.png", "--class-labels", 1, 0, "--cfg-scale", 0)) == 68  # drawn without their classes
    bare = draw(name_classes(path, "0", "1", "2"), tmp_path / "a.png", "--class-labels", 1, 0, 2)
    assert np.array_equal(bare[2:], grids[0][18:])  # the same images; numbers are not written above them
    assert [(grids[0][2:18, x : x + 64] < 128).any() for x in (2, 68, 134)] == [True] * 3


@pytest.mark.parametrize(
    ("names", "wanted", "message"),
    [
        (["rose", "tulip", "lily"], "roos", "the checkpoint has no class 'roos'; the nearest are rose"),
        (["rose", "tulip", "lily"], "Zzz", "has no class 'Zzz'; it has rose, tulip, lily"),
        (["crane", "rose", "crane"], "crane", "several classes are called 'crane': give one of their numbers, such as 0"),
        (["Rose", "rose"], "ROSE", "has no class 'ROSE'; the nearest are"),
        ([], "rose", "class 'rose': the checkpoint does not name its classes; give their numbers"),
        (["rose"], "-1", "class -1 is out of range: the checkpoint has 0 to"),
    ],
)
def test_a_name_of_no_class_is_answered_with_the_nearest(tmp_path, checkpoint, names, wanted, message):
    path = name_classes(checkpoint(), *names)
    assert message in error_of(sample, "--ckpt", path, *FEW_STEPS, "--class-labels", wanted, "--out", tmp_path / "a.png")


def test_classes_cannot_be_asked_of_a_model_without(checkpoint):
    args = sample.parse_args(["--ckpt", checkpoint(num_classes=0), "--class-labels", "0"])
    with pytest.raises(ValueError, match="trained without classes"):
        sample.main(args, ALONE)
