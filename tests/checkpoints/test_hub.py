"""Models as folders, and on a hub that stands on this machine."""

import json
import os
import re
import shlex
import subprocess
import sys

import pytest
import torch
from huggingface_hub import constants

import sample
import train
from backbones.pretrained import NO_FLAGS, WHEREABOUTS, card
from checkpoint_files import PIXELS, given_flags, write_as, write_checkpoint
from checkpoints import hub
from checkpoints.build import initialize, load_model, save_checkpoint
from commands import ROOT, draw, error_of
from download import find_checkpoint, find_model
from hub_server import serve
from models import MODELS, DiT

NAMES = ["rose", "bird of paradise"]


def write(path, mixer="pdessm", **settings):
    model = MODELS["DiT-N/4"](**PIXELS, mixer=mixer).state_dict()
    args = dict(model="DiT-N/4", mixer=mixer, vae="none", num_classes=10, image_size=16, objective="diffusion")
    args |= dict(data_path="/home/me/flowers/train", data=dict(images=1234), class_names=NAMES)
    args |= dict(global_batch_size=16, lr=0.001, ema_warmup=True)
    save_checkpoint(path, model=model, ema=model, opt={}, step=300, args=args | settings)
    return model


@pytest.mark.parametrize("mixer", ["attention", "pdessm", "pdessm-g", "mamba"])
def test_a_folder_there_and_back_has_the_same_bits(tmp_path, mixer):
    written = write(tmp_path / "a.pt", mixer)
    write_as(tmp_path / "a.pt", "--format", "hub")
    model = DiT.from_pretrained(tmp_path / "a.hub")
    assert {name: w.tolist() for name, w in model.state_dict().items()} == {name: w.tolist() for name, w in written.items()}
    assert (model.training, model.class_names, model.trained_classes) == (False, NAMES, 2)
    model.save_pretrained(tmp_path / "b.hub")
    assert (tmp_path / "b.hub" / "config.json").read_bytes() == (tmp_path / "a.hub" / "config.json").read_bytes()
    kept, expected = (load_model(find_checkpoint(tmp_path / name), given_flags(), "ema")[1] for name in ("b.hub", "a.pt"))
    assert kept == expected


def test_every_command_reads_the_folder(tmp_path):
    write(tmp_path / "a.pt")
    write_as(tmp_path / "a.pt", "--format", "hub")
    grids = [draw(tmp_path / name, tmp_path / "a.png", "--class-labels", "rose").tolist() for name in ("a.pt", "a.hub")]
    assert grids[0] == grids[1]
    assert find_model(str(tmp_path / "a.hub")).keys() == find_model(str(tmp_path / "a.pt")).keys()
    assert initialize(MODELS["DiT-N/4"](**PIXELS), find_checkpoint(tmp_path / "a.hub"))
    write_as(tmp_path / "a.hub", "--format", "pt", "--out", tmp_path / "b.pt")
    assert find_model(tmp_path / "b.pt").keys() == find_model(tmp_path / "a.pt").keys()


def test_the_card_tells_data_steps_measures_and_commands_and_no_paths(tmp_path):
    folder = tmp_path / "000-DiT-N-4"
    (folder / "checkpoints").mkdir(parents=True)
    write(folder / "checkpoints" / "0000300.pt")
    rows = [dict(step=200, loss=0.5, held_out_loss=0.4), dict(step=300, loss=0.25, steps_per_sec=3.0), dict(step=400, loss=0.1)]
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 500, "lo')  # killed
    (tmp_path / "m.json").write_text(json.dumps(dict(fid=12.5, note="x")))
    flags = ["--format", "hub", "--out", tmp_path / "a", "--metrics", tmp_path / "m.json"]
    write_as(folder / "checkpoints" / "0000300.pt", *flags)
    text = (tmp_path / "a" / "README.md").read_text()
    for told in (
        "flowers/train, 1,234 images", "rose, bird of paradise", "300 steps of 16 images", "library_name: pde-ssm-dit",
        "| loss (train.py, step 300) | 0.25 |", "| held_out_loss (train.py, step 200) | 0.4 |", "| fid (evaluate.py) | 12.5 |",
        "--lr 0.001 --ema-warmup --data-path DATA", "python sample.py --ckpt a\n",
    ):  # fmt: skip
        assert told in text
    for file in (tmp_path / "a").iterdir():
        assert b"/home/me" not in file.read_bytes()


@pytest.mark.parametrize(
    ("settings", "told"),
    [(dict(num_classes=0, uncond=True), "--uncond"), (dict(tf32=False), "--no-tf32"), (dict(vae="a/my vae"), "a/my vae")],
    ids=str,
)
def test_the_command_of_a_card_is_one_that_trains_the_same(settings, told):
    flags = "--model DiT-N/4 --global-batch-size 8 --num-workers 0 --no-ema-warmup --ema-decay 0.9 0.5"
    of_run = vars(train.parse_args(flags.split())) | settings
    of_run |= dict(class_names=NAMES, data=dict(images=9), vae_digest="2f", bad_images=["x.png"])
    text = card(MODELS["DiT-N/4"](**PIXELS), of_run, steps=5)
    command = shlex.split(next(line for line in text.splitlines() if line.startswith("    python train.py")))
    args = vars(train.parse_args(command[2:]))
    assert {told, "--no-ema-warmup"} <= {*command}
    trained = of_run.keys() - WHEREABOUTS - NO_FLAGS - {"num_classes"}
    assert {name: args[name] for name in trained} == {name: of_run[name] for name in trained}
    assert args["num_workers"] == 4  # which is the machine's


@pytest.mark.parametrize("names", [["iris", "lily"], {"rose": "iris", NAMES[1]: "lily"}, {"rose": "iris"}])
@pytest.mark.parametrize("form", ["pt", "hub", "diffusers"])
def test_classes_get_names(tmp_path, form, names):
    write(tmp_path / "a.pt")
    (tmp_path / "names.json").write_text(json.dumps(names))
    write_as(tmp_path / "a.pt", "--format", form, "--out", tmp_path / f"b.{form}", "--class-names", tmp_path / "names.json")
    model = load_model(find_checkpoint(tmp_path / f"b.{form}"), given_flags(), "ema")[0]
    assert model.class_names == ["iris", NAMES[1] if len(names) == 1 else "lily"]
    if form == "diffusers":
        assert json.loads((tmp_path / "b.diffusers" / "model_index.json").read_text())["id2label"]["0"] == "iris"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", r"names\.json is no JSON"),
        ("3", "should hold a list of names, or a dict of new names by old ones"),
        ('["a", 3]', "should hold a list of names"),
        ('["a", "b", "c"]', "has 3 names, and the checkpoint 2 classes"),
        ('{"Rose": "a"}', "renames 'Rose', and the checkpoint has no such class"),
    ],
)
def test_names_that_do_not_fit_are_refused(tmp_path, text, message):
    write(tmp_path / "a.pt")
    (tmp_path / "names.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        write_as(tmp_path / "a.pt", "--format", "safetensors", "--class-names", tmp_path / "names.json")
    assert not (tmp_path / "a.safetensors").exists()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("DiT-N/4", {}),
        ("DiT-N/4", dict(positions="rope")),
        ("DiT-N/4", dict(mixer="s4nd")),
        ("DiT-N/4", dict(mixer="global-filter")),
        ("DiS-N/4", {}),
        ("LaMamba-N", {}),
    ],
    ids=str,
)
@torch.no_grad()
def test_a_resized_model_is_saved_as_it_is(tmp_path, name, options):
    model = MODELS[name](**PIXELS, **options).eval()
    for p in model.parameters():
        p.add_(torch.randn_like(p) / 10)
    model.resize((16, 32)).save_pretrained(tmp_path / "a")
    again = type(model).from_pretrained(tmp_path / "a")
    for size in ((16, 32), (32, 32), (16, 16)):  # as it was saved, another, and the trained one
        if size != (16, 32):
            again.resize(size), model.resize(size)
        assert again.input_size == model.input_size == size
        inputs = torch.randn(1, 3, *size), torch.tensor([0.3]), torch.tensor([3])
        torch.testing.assert_close(again(*inputs), model(*inputs), rtol=0, atol=0)


def test_what_has_no_name_is_not_saved(tmp_path):
    from mixers.mean import MIXER

    model = MODELS["DiT-N/4"](**PIXELS, mixer=MIXER.build)
    with pytest.raises(ValueError, match="parts without a name, such as a mixer given by its class"):
        model.save_pretrained(tmp_path / "a")


def test_a_folder_of_another_network_is_named(tmp_path):
    MODELS["UNet-N"](16, in_channels=3, num_classes=2).save_pretrained(tmp_path / "a")
    with pytest.raises(ValueError, match=r"a holds no DiT that save_pretrained wrote|mixer attention has no option"):
        DiT.from_pretrained(tmp_path / "a")
    assert load_model(find_checkpoint(tmp_path / "a"), given_flags(image_size=16), "ema")[1]["model"] == "UNet-N"


ONLINE = """
import sys
from checkpoints import export
from checkpoints.hub import locate
from machine.processes import launch
from models import DiT
launch(lambda args, _: export.export(**vars(args)), export.parse_args([sys.argv[1], "--format", "hub", "--push", "me/flowers"]))
print(locate("me/flowers"), locate("me/pipeline"), DiT.from_pretrained("me/flowers").class_names)
locate("me/nothing")
"""


def test_pushed_fetched_and_read_again_without_a_network(tmp_path, monkeypatch):
    written, server, cache = write(tmp_path / "a.pt"), serve(), tmp_path / "home" / "hub"
    write_as(tmp_path / "a.pt", "--format", "diffusers", "--out", tmp_path / "there")
    files = [file for file in (tmp_path / "there").rglob("*") if file.is_file()]
    server.hub.models["me/pipeline"] = {str(file.relative_to(tmp_path / "there")): file.read_bytes() for file in files}
    environment = os.environ | dict(
        HF_ENDPOINT=server.url, HF_HOME=str(tmp_path / "home"), HF_HUB_OFFLINE="0", HF_TOKEN="hf_secret", PYTHONPATH=str(ROOT),
        HF_HUB_DISABLE_PROGRESS_BARS="1", HF_HUB_DISABLE_XET="1",
    )  # fmt: skip
    command = [sys.executable, "-c", ONLINE, str(tmp_path / "a.pt")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    listed = r"README\.md \(.* MB\), config\.json .*, model\.safetensors"
    assert re.search(rf"To be uploaded to {server.url}/me/flowers: {listed}", done.stdout)
    assert f"['{NAMES[0]}', '{NAMES[1]}']" in done.stdout, done.stderr
    assert done.stderr.splitlines()[-1].startswith("OSError: no checkpoint at me/nothing, and no model of that name to be had")
    assert set(server.hub.models["me/flowers"]) >= {"README.md", "config.json", "model.safetensors"}
    assert ("POST", "/api/repos/create", "Bearer hf_secret") in server.hub.asked
    assert not (tmp_path / "a.hub").exists()
    server.shutdown()

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))  # tests are offline
    for name in ("me/flowers", "me/pipeline"):
        assert hub.locate(name).startswith(str(cache))
        assert torch.equal(find_model(name)["final_layer.linear.bias"], written["final_layer.linear.bias"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--format", "hub", "--push", "me/x"], "uploading needs a login: run `hf auth login`.* nothing was sent"),
        (["--format", "pt", "--push", "me/x", "--out", "b.pt"], "--push and --metrics go with --format hub"),
        (["--format", "hub", "--metrics", __file__, "--out", "b"], "is not the JSON of evaluate.py"),
        (["--format", "hub", "--metrics", "list.json", "--out", "b"], "is not the JSON of evaluate.py: it holds no names"),
        (["--format", "pt", "--class-names", "many.json", "--out", "b.pt"], "11 classes, its weights have num_classes=10"),
        (["--format", "pt", "--class-names", "few.json", "--out", "b.pt"], "few.json has 1 names, and the weights 10 classes"),
        (["--format", "hub", "--out", "there"], "there is there already; give another --out"),
    ],
)
def test_an_export_to_the_hub_that_cannot_be_says_why(tmp_path, monkeypatch, flags, message):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "many.json").write_text(json.dumps([str(number) for number in range(11)]))
    (tmp_path / "few.json").write_text('["a"]')
    write_checkpoint(tmp_path / "a.pt")
    with pytest.raises((ValueError, OSError), match=message):
        write_as("a.pt", *flags)
    assert sorted(os.listdir()) == ["a.pt", "few.json", "list.json", "many.json", "there"]


def test_a_name_that_is_nowhere_is_one_sentence(tmp_path):
    said = error_of(sample, "--ckpt", "nobody/nothing", "--out", tmp_path / "a.png")
    assert "no checkpoint at nobody/nothing, and no model of that name to be had from the hub" in said
    assert "no checkpoint at results/a.pt" in error_of(sample, "--ckpt", "results/a.pt", "--out", tmp_path / "a.png")
