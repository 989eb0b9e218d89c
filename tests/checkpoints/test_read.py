"""Reading any file safely: whoever wrote it, whatever befell it."""

import os
import pathlib
import pickle
import re
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.optim.swa_utils import AveragedModel

from checkpoint_files import PIXELS, Hostile, empty, garbage, given_flags, text, truncated, write_as, write_checkpoint
from checkpoints.build import initialize, load_model, save_checkpoint
from checkpoints.read import load_checkpoint, read_checkpoint
from commands import draw, draw_many, fit
from download import find_model
from images.autoencoder import open_space
from models import DiT_models


def prefixed(prefix):
    return lambda model: {prefix + name: w for name, w in model.state_dict().items()}


def between(model):
    """As layers that were compiled or wrapped one by one have it."""
    inner = r"module.\1_orig_mod._checkpoint_wrapped_module."
    return {re.sub(r"(blocks\.\d+\.)", inner, name): w for name, w in model.state_dict().items()}


def of_two(model):
    other = {f"denoiser.{name}": w + 1 for name, w in model.state_dict().items()}
    return other | prefixed("denoiser_ema.")(model) | {"vae.encoder.weight": torch.ones(3)}


WEIGHTS = [*map(prefixed, ("module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.net."))]
WEIGHTS += [between, of_two, lambda model: AveragedModel(model).state_dict()]
FILES = [
    lambda state: state,
    lambda state: dict(state_dict=state, epoch=3),
    lambda state: dict(model_state_dict=state),
    lambda state: dict(model={"a": torch.ones(2)}, ema_model=state),
    lambda state: dict(params=dict(state), params_ema=state),
    lambda state: dict(state_dict={name: w + 1 for name, w in state.items()}, state_dict_ema=state, arch="vit"),
    lambda state: {"state_dict": state, "pytorch-lightning_version": "2.5", "hyper_parameters": dict(lr=1)},
    lambda state: dict(module=state, ds_version="0.16"),
]


@pytest.fixture(scope="module")
def small():
    return DiT_models["DiT-N/16"](**PIXELS)


@pytest.mark.parametrize(
    ("as_state", "as_file"), [(state, FILES[0]) for state in WEIGHTS] + [(WEIGHTS[0], file) for file in FILES[1:]]
)
def test_prefixes_and_containers_of_other_tools_load(tmp_path, small, as_state, as_file):
    torch.save(as_file(as_state(small)), tmp_path / "a.pt")
    weights = find_model(tmp_path / "a.pt")
    assert weights.keys() == small.state_dict().keys()
    assert all(torch.equal(weights[name], w) for name, w in small.state_dict().items())


def test_weights_with_a_prefix_serve_every_command(tmp_path, randomize):
    model = randomize(DiT_models["DiT-N/4"](**PIXELS))
    torch.save(dict(state_dict=prefixed("module._orig_mod.")(model)), tmp_path / "a.pt")
    draw(tmp_path / "a.pt", tmp_path / "a.png", "--class-labels", 3)
    write_as(tmp_path / "a.pt", "--format", "safetensors")
    assert load_checkpoint(tmp_path / "a.safetensors")[0].keys() == model.state_dict().keys()
    count = len(model.state_dict())
    assert initialize(DiT_models["DiT-N/4"](**PIXELS), tmp_path / "a.pt")[0].endswith(f"{count} of the model's {count} tensors")


def two_networks(path):
    state = DiT_models["DiT-N/16"](**PIXELS).state_dict()
    torch.save({f"{side}.{name}": w for side in ("left", "right") for name, w in state.items()}, path)


def of_diffusers(path):
    torch.save({"transformer_blocks.0.attn1.to_q.weight": torch.ones(2, 2)}, path)


def nameless_averages(path):
    torch.save(dict(decay=0.9, shadow_params=[torch.ones(2)]), path)


def of_lightning(path):
    torch.save({"state_dict": {"net.fc.weight": torch.ones(2, 2)}, "pytorch-lightning_version": "2.5"}, path)


def folder_of(*names):
    def make(path):
        path.mkdir()
        for name in names:
            (path / name).touch()

    make.__name__ = " and ".join(names) or "nothing"
    return make


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (two_networks, r"holds several networks \(left\., right\.\); save the weights of one alone"),
        (of_diffusers, "holds no DiT: .*diffusers' DiTTransformer2DModel"),
        (nameless_averages, "holds no DiT: .*diffusers' EMAModel"),
        (of_lightning, r"holds no DiT: .*Lightning's, and of net\.fc\.weight"),
        (folder_of("config.json", "diffusion_pytorch_model.safetensors"), "a folder of diffusers .*give that of a DiTPipeline"),
        (folder_of("model_index.json"), "is a pipeline of diffusers without a transformer that can be read"),
        (folder_of("latest", "zero_to_fp32.py"), r"of DeepSpeed; give the file that its zero_to_fp32\.py makes"),
        (folder_of("mp_rank_00_model_states.pt"), "of DeepSpeed"),
        (folder_of(".metadata", "__0_0.distcp"), r"without settings\.pt; give the file that PyTorch's dcp_to_torch_save makes"),
        (folder_of("checkpoints"), "the folder of a run; give one of the files in its checkpoints/"),
        (folder_of(), "a folder and no checkpoint; give a file"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_other_tools_wrote_is_named(tmp_path, make, message):
    make(tmp_path / "a.pt")
    for use in (
        lambda path: load_model(path, given_flags(), "ema"),
        lambda path: write_as(path, "--format", "pt", "--out", "b.pt"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            use(tmp_path / "a.pt")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("value", "named"),
    [
        (np.int64(3), r"numpy\._?core\.multiarray\.scalar"),
        (pathlib.PosixPath("data"), r"pathlib(\._local)?\.PosixPath"),
        (SimpleNamespace(lr=1), r"types\.SimpleNamespace"),
    ],
)
def test_a_type_that_is_not_read_is_named(tmp_path, value, named, zipped):
    torch.save(dict(ema={}, args=dict(value=value)), tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=rf"a\.pt holds .*{named}.*weights_only=False.* numbers and strings") as error:
        load_checkpoint(tmp_path / "a.pt")
    assert not re.search("damaged|cut short", str(error.value))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_leave_no_command(tmp_path, monkeypatch, bad):
    monkeypatch.chdir(tmp_path)
    model = write_checkpoint(tmp_path / "a.pt").state_dict()
    average = {name: w.clone() for name, w in model.items()}
    average["final_layer.linear.bias"][5] = bad
    args = dict(model="DiT-N/4", ema_decay=[0.9, 0.5])
    save_checkpoint(tmp_path / "a.pt", **{"model": model, "ema": model, "ema_0.5": average, "args": args})
    load_checkpoint("a.pt")
    say = r"a\.pt: final_layer\.linear\.bias is not finite; 1 of its 96 numbers"
    for use in (
        lambda: draw("a.pt", "a.png", "--ema", 0.5),
        lambda: draw_many("a.pt", "s", "--ema", 0.5),
        lambda: write_as("a.pt", "--format", "safetensors", "--ema", 0.5),
    ):
        with pytest.raises(ValueError, match=say):
            use()
    save_checkpoint(tmp_path / "a.pt", ema=average)
    with pytest.raises(ValueError, match=say):
        fit(tmp_path / "r", "--init-from", "a.pt")
    assert os.listdir() == ["a.pt"]


def storages(path):
    """Where the bytes of each tensor begin and end in a .pt file, by its record's name."""
    found = {}
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            with archive.open(entry) as record:
                found[entry.filename.partition("/")[2]] = (record._orig_compress_start, entry.file_size)
    return found


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 16
    path.write_bytes(data)


def test_a_changed_byte_of_what_is_used_is_noticed_and_nothing_else_is_read(tmp_path, small):
    path = tmp_path / "a.pt"
    state = small.state_dict()
    save_checkpoint(path, ema=state, model={name: w + 1 for name, w in state.items()}, args={})
    records = storages(path)
    numbers = sorted((int(name.removeprefix("data/")), place) for name, place in records.items() if name.startswith("data/"))
    (first, size), (last, _) = numbers[3][1], numbers[-1][1]
    flip(path, last + 1)
    load_checkpoint(path)  # of the average alone
    flip(path, first + size - 1)
    with pytest.raises(ValueError, match=rf"a\.pt is damaged \({list(state)[3]}\)"):
        load_checkpoint(path)
    flip(path, first + size - 1)
    load_checkpoint(path)
    flip(path, records["data.pkl"][0] + records["data.pkl"][1] // 2)
    with pytest.raises(ValueError, match=r"a\.pt is not a whole checkpoint"):
        load_checkpoint(path)


@pytest.mark.parametrize("form", ["older", "without checksums", "compressed"])
def test_files_of_other_writers_load(tmp_path, small, form):
    state = small.state_dict()
    try:
        torch.serialization.set_crc32_options(form != "without checksums")
        torch.save(dict(ema=state), tmp_path / "a.pt", _use_new_zipfile_serialization=form != "older")
    finally:
        torch.serialization.set_crc32_options(True)
    if form == "compressed":
        (tmp_path / "a.pt").rename(tmp_path / "b.pt")
        with zipfile.ZipFile(tmp_path / "b.pt") as old, zipfile.ZipFile(tmp_path / "a.pt", "w", zipfile.ZIP_DEFLATED) as new:
            for name in old.namelist():
                new.writestr(name, old.read(name))
    weights = load_checkpoint(tmp_path / "a.pt")[0]
    assert all(torch.equal(weights[name], w) for name, w in state.items())


def test_a_checkpoint_stays_in_its_file_until_it_is_used(tmp_path):
    def in_memory():
        return int(re.search(r"RssAnon:\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text())[1]) / 1000

    torch.save(dict(ema={"a": torch.zeros(2**24)}, opt=torch.zeros(2**24)), tmp_path / "a.pt")
    before = in_memory()
    contents = read_checkpoint(tmp_path / "a.pt")
    assert in_memory() - before < 32  # of 134 MB
    assert contents["ema"]["a"].sum() == 0


def test_weights_can_be_written_over_the_file_that_they_are_from(tmp_path, small):
    torch.save(dict(ema=small.state_dict(), opt=torch.ones(1000)), tmp_path / "a.pt")
    torch.save(find_model(tmp_path / "a.pt"), tmp_path / "a.pt")
    weights = find_model(tmp_path / "a.pt")
    assert all(torch.equal(weights[name], w) for name, w in small.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_weights_of_other_floats_are_read_as_float32(tmp_path, small, dtype, ending):
    state = {name: w.to(dtype) for name, w in small.state_dict().items()}
    torch.save(dict(ema=state, args=dict(objective="diffusion")), tmp_path / "a.pt")
    if ending == "safetensors":
        write_as(tmp_path / "a.pt", "--format", ending)
    model = load_model(tmp_path / f"a.{ending}", given_flags(), "ema")[0]
    begun = DiT_models["DiT-N/16"](**PIXELS)
    initialize(begun, tmp_path / f"a.{ending}")
    for network in (model, begun):
        assert all(torch.equal(w, state[name].float()) and w.dtype == torch.float32 for name, w in network.state_dict().items())


@pytest.mark.parametrize(
    "spoil", [lambda w: w.to(torch.int8), lambda w: w.to(torch.complex64), lambda w: w.to_sparse(), lambda w: w.to("meta")]
)
def test_weights_that_are_no_plain_floats_are_refused_by_name(tmp_path, small, spoil):
    state, name = small.state_dict(), "blocks.0.attn.qkv.weight"
    torch.save(state | {name: spoil(state[name])}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=rf"a\.pt: {name} is torch\..*; weights are floating-point numbers"):
        load_checkpoint(tmp_path / "a.pt")


def test_public_weights_that_cannot_be_fetched_say_where_to_put_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("download.PRETRAINED", f"file://{tmp_path}/nowhere/")
    with pytest.raises(OSError, match=r"put it at pretrained_models/DiT-XL-2-256x256\.pt, or give --ckpt"):
        find_model("DiT-XL-2-256x256.pt")
    (tmp_path / "nowhere").mkdir()
    served = tmp_path / "nowhere" / "DiT-XL-2-256x256.pt"
    written = write_checkpoint(served, "attention")
    whole = served.read_bytes()
    served.write_bytes(whole[:-5000])  # a connection that ends early
    with pytest.raises(OSError, match=r"could not fetch .* is not a whole checkpoint .*; put it at"):
        find_model("DiT-XL-2-256x256.pt")
    assert os.listdir("pretrained_models") == []
    served.write_bytes(whole)
    assert find_model("DiT-XL-2-256x256.pt").keys() == written.state_dict().keys()
    assert os.listdir("pretrained_models") == ["DiT-XL-2-256x256.pt"]


def test_what_killed_downloads_left_goes_with_the_next_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("download.PRETRAINED", f"file://{tmp_path}/served/")
    name = "DiT-XL-2-256x256.pt"
    (tmp_path / "served").mkdir()
    (tmp_path / "pretrained_models").mkdir()
    write_checkpoint(tmp_path / "served" / name, "attention")
    for left, when in (("h.1.partial", 0), ("h.2.partial.5e.partial", 0), ("h.3.partial", None)):
        path = tmp_path / "pretrained_models" / f"{name}.{left}"
        path.touch()
        os.utime(path, when if when is None else (when, when))
    find_model(name)
    assert sorted(os.listdir("pretrained_models")) == [name, f"{name}.h.3.partial"]  # of a download that is at work


def test_writing_is_all_or_nothing(tmp_path):
    path = tmp_path / "a.pt"
    write_checkpoint(path)
    before = path.read_bytes()
    with pytest.raises(Exception, match="pickle"):
        save_checkpoint(path, model=lambda: None)
    assert path.read_bytes() == before
    with pytest.raises(OSError, match="could not write the checkpoint /proc/version/a"):
        save_checkpoint("/proc/version/a.pt", model={})
    assert os.listdir(tmp_path) == ["a.pt"]


def test_a_hostile_pickle_does_not_run(tmp_path):
    torch.save(dict(ema={}, args=Hostile(str(tmp_path / "owned"))), tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt holds posix\.mkdir, and only tensors and plain values are read"):
        load_checkpoint(tmp_path / "a.pt")
    assert not (tmp_path / "owned").exists()


def other_network(path):
    torch.save(torch.nn.Linear(2, 2).state_dict(), path)


def list_of_numbers(path):
    torch.save([1, 2, 3], path)


def no_classes(path):
    state = write_checkpoint(path).state_dict()
    del state["y_embedder.embedding_table.weight"]
    torch.save(state, path)


def no_tensors(path):
    torch.save({"ema": {"x_embedder.proj.weight": 3}, "args": [1]}, path)


SPOILT = [truncated, text, empty, other_network, list_of_numbers, no_classes, no_tensors, garbage]


@pytest.mark.parametrize("spoil", SPOILT, ids=lambda f: f.__name__)
def test_what_is_no_checkpoint_is_named(tmp_path, spoil):
    path = tmp_path / "a.pt"
    write_checkpoint(path)
    spoil(path)
    with pytest.raises(ValueError, match=r"a\.pt (is not a whole checkpoint|holds no DiT)"):
        load_model(path, given_flags(), "ema")


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*b\.pt"):
        load_model(tmp_path / "b.pt", given_flags(), "ema")


def test_a_hostile_autoencoder_does_not_run(tmp_path):
    from diffusers.models import AutoencoderKL

    AutoencoderKL(block_out_channels=[32]).save_config(tmp_path / "vae")
    weights = tmp_path / "vae" / "diffusion_pytorch_model.bin"
    for write_to in (lambda value: torch.save(value, weights), lambda value: weights.write_bytes(pickle.dumps(value))):
        write_to(dict(a=Hostile(str(tmp_path / "owned"))))
        with pytest.raises(OSError, match=r"the VAE .* could not be loaded"):
            open_space(str(tmp_path / "vae")).load("cpu")
    assert os.listdir(tmp_path) == ["vae"]
