import argparse
import os
import pathlib
import pickle
import re
import resource
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.optim.swa_utils import AveragedModel

import sample
from checkpoints import export
from checkpoints.build import initialize, load_model, load_weights, save_checkpoint, settings_from_weights
from checkpoints.read import load_checkpoint, read_checkpoint
from commands import ALONE, draw, draw_many, fit
from diffusion import create_sampler
from download import find_model
from images.autoencoder import open_space
from machine.processes import launch
from models import MODELS, DiT, DiT_models, grid_embedding
from pde_ssm import TERMS

PIXELS = dict(input_size=16, in_channels=3, num_classes=10)
PAPERS = dict(
    coupling="diagonal", groups=1, state_dim=None, terms=TERMS, components=1, activation=False, gate=False, conditioned=False,
)  # fmt: skip
OBJECTIVE = dict(objective="diffusion", path="linear", time_scale=1000, learn_sigma=True)
SETTINGS = dict(
    model="DiT-N/4", mixer="pdessm", mixer_options=PAPERS, num_classes=10, image_size=16, in_channels=3, vae="none", **OBJECTIVE
)  # fmt: skip
ATTENTION = dict(mixer="attention", mixer_options={})


def flags(**given):
    return {name: given.get(name) for name in SETTINGS}


def write(path, mixer="pdessm", options=None, **changes):
    """A checkpoint as train.py writes it; returns the model."""
    model = DiT_models["DiT-N/4"](**PIXELS, mixer=mixer, **options or {})
    args = dict(model="DiT-N/4", mixer=mixer, vae="none", num_classes=10, image_size=16, objective="diffusion")
    save_checkpoint(path, **dict(model=model.state_dict(), ema=model.state_dict(), opt={}, args=args) | changes)
    return model


@pytest.mark.parametrize("mixer", ["attention", "pdessm"])
def test_a_checkpoint_says_what_it_is(tmp_path, mixer):
    path = tmp_path / "a.pt"
    written = write(path, mixer)
    model, settings = load_model(path, flags(), default_vae="mse")
    assert settings == SETTINGS | (ATTENTION if mixer == "attention" else {})
    assert not model.training
    for name, value in written.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


@pytest.mark.parametrize("style", ["namespace", "bare weights", "no ema"])
def test_files_of_the_public_code_load(tmp_path, style):
    path = tmp_path / "a.pt"
    model = DiT_models["DiT-S/8"](input_size=16, num_classes=5)
    state = model.state_dict()
    if style == "namespace":
        args = argparse.Namespace(model="DiT-S/8", image_size=128, num_classes=5, vae="ema", epochs=1400)
        torch.save(dict(model={}, ema=state, opt={}, args=args), path)
    else:
        torch.save(state if style == "bare weights" else dict(model=state, opt={}), path)
    loaded, settings = load_model(path, flags(), default_vae="mse")
    here = dict(model="DiT-S/8", **ATTENTION, num_classes=5, image_size=128, in_channels=4, vae="mse", **OBJECTIVE)
    assert settings == here
    assert torch.equal(loaded.pos_embed, model.pos_embed)
    assert find_model(path).keys() == state.keys()


@pytest.mark.parametrize("mixer", ["attention", "pdessm"])
@pytest.mark.parametrize("name", ["DiT-N/1", "DiT-Ti/2", "DiT-B/4", "DiT-XL/8"])
def test_weights_tell_their_settings(name, mixer):
    with torch.device("meta"):
        state = DiT_models[name](input_size=16, in_channels=3, num_classes=7, mixer=mixer).state_dict()
    chosen = ATTENTION if mixer == "attention" else dict(mixer="pdessm", mixer_options=PAPERS)
    assert settings_from_weights(state) == dict(model=name, **chosen, num_classes=7, in_channels=3, learn_sigma=True)


@pytest.mark.parametrize("options", [dict(coupling="coupled", groups=4, terms=("diffusion",)), dict(gate=True, state_dim=48)])
def test_the_mixers_options_are_read_off_the_weights(tmp_path, options):
    written = write(tmp_path / "a.pt", options=options)
    model, settings = load_model(tmp_path / "a.pt", flags(), "ema")
    assert settings["mixer_options"] == PAPERS | options
    assert str(model) == str(written)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (dict(model="DiT-S/4"), "states model=DiT-S/4, and its weights have model=DiT-N/4"),
        (dict(num_classes=5), "states num_classes=5, and its weights have num_classes=10"),
        (dict(image_size=64), "states image_size=64, and its weights have image_size=16"),
        (dict(in_channels=4), "states in_channels=4, and its weights have in_channels=3"),
        (dict(learn_sigma=False), "states learn_sigma=False, and its weights have learn_sigma=True"),
        (dict(objective="flow"), "states objective=flow, and its weights have learned variances"),
        (dict(vae="ema"), r"states --vae ema, which has 4 channels, and the weights in .* are for 3"),
        (dict(mixer="attention"), "states mixer=attention, and its weights have mixer=pdessm"),
        (dict(mixer="pdessm-g"), r"states gate=True, and its weights have gate=False"),
        (dict(mixer="pdessm", pde_coupling="pairwise"), "states coupling=pairwise, and its weights have coupling=diagonal"),
        (dict(mixer="pdessm", pde_terms=["reaction"]), r"states terms=\('reaction',\), and its weights have terms=\('diff"),
        (dict(mixer="pdessm", pde_expand=2.0), "states state_dim=192, and its weights have state_dim=None"),
        (dict(mixer="pdessm", pde_gate=True), "states gate=True, and its weights have gate=False"),
        (dict(mixer="pdessm", pde_components="4"), "states options that its mixer cannot have"),
        (dict(mixer="pdessm", pde_flavour=3), "states options that its mixer cannot have: .*no option flavour"),
    ],
    ids=lambda value: next(reversed(value)) if isinstance(value, dict) else "",
)
def test_a_file_that_contradicts_its_weights_is_refused_with_both_values(tmp_path, args, message):
    write(tmp_path / "a.pt", args=args)
    with pytest.raises(ValueError, match=message) as error:
        load_model(tmp_path / "a.pt", flags(), "ema")
    assert "\n" not in str(error.value)


def test_what_a_file_states_and_its_weights_allow_is_believed(tmp_path):
    args = dict(model="DiT-N/4", mixer="pdessm", pde_terms=list(TERMS), pde_coupling="diagonal", objective="diffusion")
    state = DiT_models["DiT-N/4"](**PIXELS, mixer="pdessm", learn_sigma=False).state_dict()
    save_checkpoint(tmp_path / "a.pt", ema=state, args=args | dict(learn_sigma=False))
    assert load_model(tmp_path / "a.pt", flags(), "ema")[1] == SETTINGS | dict(learn_sigma=False)
    draw(tmp_path / "a.pt", tmp_path / "a.png")


@pytest.fixture
def randomized(randomize):
    """A small DiT whose output depends on everything."""

    def build(**changes):
        return randomize(DiT_models["DiT-N/4"](**PIXELS | changes)).eval()

    return build


def test_weights_that_do_not_tell_their_objective_ask_for_it(tmp_path, randomized):
    path = tmp_path / "a.pt"
    torch.save(randomized(learn_sigma=False).state_dict(), path)
    with pytest.raises(SystemExit, match=r"a\.pt does not say for which objective .*; give --objective diffusion or flow") as e:
        launch(sample.main, sample.parse_args(["--ckpt", str(path), "--device", "cpu"]))
    assert "\n" not in str(e.value)
    asked = [["diffusion"], ["flow"], ["flow", "--sampler", "sde"], ["flow", "--sampler", "sde", "--path", "cosine"]]
    grids = [draw(path, tmp_path / "a.png", "--class-labels", 3, "--objective", *more) for more in asked]
    assert len({grid.tobytes() for grid in grids}) == len(grids)
    assert load_model(path, flags(objective="flow", path="cosine"), "ema")[1]["path"] == "cosine"
    draw_many(path, tmp_path / "s", "--objective", "diffusion", "--num-fid-samples", 1)
    assert initialize(randomized(learn_sigma=False), path)  # which needs to know none
    torch.save(dict(ema=torch.load(path), args=dict(model="DiT-N/4", objective="flow")), path)
    with pytest.raises(ValueError, match=r"--path cosine contradicts .*--path linear"):  # what train.py takes without the flag
        load_model(path, flags(path="cosine"), "ema")


SIT = dict(model="SiT-N/4", path_type="Linear", prediction="velocity")


@pytest.mark.parametrize("learn_sigma", [True, False])
@pytest.mark.parametrize(("path_type", "path"), [("Linear", "linear"), ("GVP", "cosine")])
@torch.no_grad()
def test_sits_flows_are_sampled_in_their_own_time(tmp_path, randomized, path_type, path, learn_sigma):
    network = randomized(learn_sigma=learn_sigma)
    torch.save(dict(ema=network.state_dict(), args=argparse.Namespace(**SIT | dict(path_type=path_type))), tmp_path / "a.pt")
    model, settings = load_model(tmp_path / "a.pt", flags(), "ema")
    assert (settings["objective"], settings["path"], settings["model"]) == ("flow", path, "DiT-N/4")
    objective, sampler = create_sampler("flow", steps=4, path=settings["path"], time_scale=settings["time_scale"])
    noise, y = torch.randn(2, 3, 16, 16), torch.tensor([3, 10])
    x = noise
    for t in (0, 0.25, 0.5, 0.75):  # from noise to image: the network sees t itself
        x = x + 0.25 * network(x, torch.full((2,), t), y)[:, :3]  # and begins with the velocity
    drawn = sampler(objective, model, noise, model_kwargs=dict(y=y), clip_denoised=False)
    torch.testing.assert_close(drawn, x)
    assert objective.progress(0.25) == 0.25
    draw(tmp_path / "a.pt", tmp_path / "a.png", "--class-labels", 3)


def test_bare_weights_of_sit_ask_too_and_are_sampled_as_sits(tmp_path, randomized):
    state = randomized().state_dict()
    state["final_layer.linear.weight"].unflatten(0, (16, 2, 3))[:, 1] = 0  # as they began: no loss ever saw them
    torch.save(state, tmp_path / "bare.pt")
    torch.save(dict(ema=state, args=SIT), tmp_path / "named.pt")
    with pytest.raises(ValueError, match="give --objective diffusion or flow"):
        load_model(tmp_path / "bare.pt", flags(), "ema")
    for name, more in (("bare", ["--objective", "flow"]), ("named", [])):
        draw(tmp_path / f"{name}.pt", tmp_path / f"{name}.png", *more)
    assert (tmp_path / "bare.png").read_bytes() == (tmp_path / "named.png").read_bytes()


@pytest.mark.parametrize("kind", [dict(path_type=name) for name in ("VP", "linear", None)] + [dict(prediction="score")])
def test_sits_that_are_no_flow_known_here_are_refused_by_name(tmp_path, kind):
    write(tmp_path / "a.pt", args=SIT | kind)
    asked = SIT | kind
    with pytest.raises(ValueError, match=f"SiT's with path_type {asked['path_type']} and prediction {asked['prediction']};"):
        load_model(tmp_path / "a.pt", flags(), "ema")


def autoencoder(folder, channels):
    """A small one, by which images are 2 times as large as latents."""
    from diffusers.models import AutoencoderKL

    blocks = dict(down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2, layers_per_block=1)
    vae = AutoencoderKL(latent_channels=channels, block_out_channels=[8, 8], norm_num_groups=4, **blocks)
    vae.save_pretrained(folder)
    return str(folder)


def test_bare_weights_of_any_number_of_channels_are_sampled(tmp_path, randomized):
    for channels in (3, 16):
        torch.save(randomized(in_channels=channels).state_dict(), tmp_path / "a.pt")
        vae = autoencoder(tmp_path / f"vae{channels}", channels)
        model, settings = load_model(tmp_path / "a.pt", flags(vae=vae), "ema")
        assert (model.in_channels, settings["image_size"], settings["vae"]) == (channels, 32, vae)
    grid = draw(tmp_path / "a.pt", tmp_path / "a.png", "--class-labels", 3, "--vae", vae, "--image-size", "32x48")
    assert grid.shape == (64, 96, 3)
    with pytest.raises(ValueError, match=r"a\.pt has 16 channels and does not say of which autoencoder; give --vae FOLDER"):
        load_model(tmp_path / "a.pt", flags(), "ema")
    with pytest.raises(ValueError, match=r"--vae mse has 4 channels, and the weights in .*a\.pt are for 16"):
        load_model(tmp_path / "a.pt", flags(vae="mse"), "ema")


def test_weights_of_a_grid_that_is_no_square_ask_for_its_shape(tmp_path, randomized):
    model = randomized(input_size=(8, 16))
    torch.save(model.state_dict(), tmp_path / "a.pt")
    for wrong in (None, 16, (8, 24)):
        with pytest.raises(ValueError, match=r"a\.pt is for 8 tokens, no square; give the --image-size HxW"):
            load_model(tmp_path / "a.pt", flags(image_size=wrong), "ema")
    loaded, settings = load_model(tmp_path / "a.pt", flags(image_size=(8, 16)), "ema")
    assert settings["image_size"] == (8, 16)
    assert torch.equal(loaded.pos_embed, model.pos_embed)


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


def test_weights_with_a_prefix_serve_every_command(tmp_path, randomized):
    model = randomized()
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
        (folder_of("config.json", "diffusion_pytorch_model.safetensors"), "a folder of diffusers .*DiTTransformer2DModel"),
        (folder_of("model_index.json"), "a folder of diffusers .*DiTTransformer2DModel"),
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
    for use in (lambda path: load_model(path, flags(), "ema"), lambda path: write_as(path, "--format", "pt", "--out", "b.pt")):
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
    model = write(tmp_path / "a.pt").state_dict()
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
    model = load_model(tmp_path / f"a.{ending}", flags(), "ema")[0]
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


def test_words_that_mean_nothing_here_are_passed_over(tmp_path):
    args = dict(model=["MyDiT"], mixer="mamba", vae=None, num_classes=None, image_size="64", objective="eps", path="/data")
    args |= dict(ema_decay=[[0.9]], class_names=3)
    write(tmp_path / "a.pt", args=argparse.Namespace(**args))
    assert load_model(tmp_path / "a.pt", flags(), "ema")[1] == SETTINGS


def test_a_preset_keeps_its_name(tmp_path):
    written = write(tmp_path / "a.pt", "pdessm-g")
    model, settings = load_model(tmp_path / "a.pt", flags(mixer="pdessm-g"), "ema")
    assert settings["mixer"] == "pdessm-g"
    assert str(model) == str(written)
    torch.save(written.state_dict(), tmp_path / "a.pt")  # which knows no names
    assert str(load_model(tmp_path / "a.pt", flags(), "ema")[0]) == str(written)


@pytest.mark.parametrize("mixer", ["attention", "pdessm"])
@pytest.mark.parametrize("size", [24, (16, 24)])
def test_a_model_runs_at_another_size(tmp_path, mixer, size):
    written = write(tmp_path / "a.pt", mixer)
    model, settings = load_model(tmp_path / "a.pt", flags(image_size=size), "ema")
    h, w = (24, 24) if size == 24 else size
    assert settings["image_size"] == size
    assert model(torch.randn(1, 3, h, w), torch.tensor([5]), torch.tensor([3])).shape == (1, 6, h, w)
    same = load_model(tmp_path / "a.pt", flags(image_size=16), "ema")[0]
    assert torch.equal(same.pos_embed, written.pos_embed)
    assert torch.equal(model.blocks[0].mlp.fc1.weight, written.blocks[0].mlp.fc1.weight)


@pytest.mark.parametrize("mixer", ["attention", "pdessm"])
def test_resizing_there_and_back_changes_nothing(mixer):
    model = DiT_models["DiT-N/4"](**PIXELS, mixer=mixer)
    before = model.pos_embed.clone()
    assert not torch.equal(model.resize((24, 16)).pos_embed[:, :16], before)
    assert torch.equal(model.resize(16).pos_embed, before)
    with pytest.raises(ValueError, match="input size 16 x 18 is not divisible by 4"):
        model.resize((16, 18))


def test_the_weights_say_which_mixer_they_are_for(tmp_path):
    state = {name: w for name, w in write(tmp_path / "a.pt").state_dict().items() if ".attn." not in name}
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="neither by attention nor by a PDE"):
        load_model(tmp_path / "a.pt", flags(), "ema")


def test_positions_keep_their_place_in_the_picture():
    trained, finer = (grid_embedding(h, 6, 16, (4, 6)).view(h, 6, 16) for h in (4, 12))
    torch.testing.assert_close(finer[1::3], trained)  # every third of three times the rows has the old row's centre
    assert torch.equal(trained, grid_embedding(4, 6, 16).view(4, 6, 16))


def test_public_weights_that_cannot_be_fetched_say_where_to_put_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("download.PRETRAINED", f"file://{tmp_path}/nowhere/")
    with pytest.raises(OSError, match=r"put it at pretrained_models/DiT-XL-2-256x256\.pt, or give --ckpt"):
        find_model("DiT-XL-2-256x256.pt")
    (tmp_path / "nowhere").mkdir()
    written = write(tmp_path / "nowhere" / "DiT-XL-2-256x256.pt", "attention")
    assert find_model("DiT-XL-2-256x256.pt").keys() == written.state_dict().keys()
    assert os.listdir("pretrained_models") == ["DiT-XL-2-256x256.pt"]


def test_writing_is_all_or_nothing(tmp_path):
    path = tmp_path / "a.pt"
    write(path)
    before = path.read_bytes()
    with pytest.raises(Exception, match="pickle"):
        save_checkpoint(path, model=lambda: None)
    assert path.read_bytes() == before
    with pytest.raises(OSError, match="could not write the checkpoint /proc/version/a"):
        save_checkpoint("/proc/version/a.pt", model={})
    assert os.listdir(tmp_path) == ["a.pt"]


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_hostile_pickle_does_not_run(tmp_path):
    torch.save(dict(ema={}, args=Hostile(str(tmp_path / "owned"))), tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt holds posix\.mkdir, and only tensors and plain values are read"):
        load_checkpoint(tmp_path / "a.pt")
    assert not (tmp_path / "owned").exists()


def truncated(path):
    path.write_bytes(path.read_bytes()[:-5000])


def text(path):
    path.write_text("not weights")


def empty(path):
    path.write_bytes(b"")


def other_network(path):
    torch.save(torch.nn.Linear(2, 2).state_dict(), path)


def list_of_numbers(path):
    torch.save([1, 2, 3], path)


def no_classes(path):
    state = write(path).state_dict()
    del state["y_embedder.embedding_table.weight"]
    torch.save(state, path)


def no_tensors(path):
    torch.save({"ema": {"x_embedder.proj.weight": 3}, "args": [1]}, path)


def garbage(path):
    path.write_bytes(bytes(range(256)) * 50)


SPOILT = [truncated, text, empty, other_network, list_of_numbers, no_classes, no_tensors, garbage]


@pytest.mark.parametrize("spoil", SPOILT, ids=lambda f: f.__name__)
def test_what_is_no_checkpoint_is_named(tmp_path, spoil):
    path = tmp_path / "a.pt"
    write(path)
    spoil(path)
    with pytest.raises(ValueError, match=r"a\.pt (is not a whole checkpoint|holds no DiT)"):
        load_model(path, flags(), "ema")


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*b\.pt"):
        load_model(tmp_path / "b.pt", flags(), "ema")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(mixer="attention"), "--mixer attention contradicts .*--mixer pdessm"),
        (dict(model="DiT-S/2"), "--model DiT-S/2 contradicts .*--model DiT-N/4"),
        (dict(image_size=18), r"--image-size 18x18: both must be divisible by 4"),
        (dict(image_size=(16, 22)), r"--image-size 16x22: both must be divisible by 4"),
        (dict(num_classes=1000), "--num-classes 1000 contradicts .*--num-classes 10"),
        (dict(vae="mse"), "--vae mse contradicts .*--vae none"),
        (dict(objective="flow"), "--objective flow contradicts .*--objective diffusion"),
        (dict(path="cosine"), "--path cosine means nothing to .*diffusion"),
    ],
)
def test_flags_that_contradict_the_checkpoint_name_both_values(tmp_path, given, message):
    write(tmp_path / "a.pt")
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path / "a.pt", flags(**given), "ema")
    load_model(tmp_path / "a.pt", flags(**SETTINGS | dict(path=None)), "ema")  # agreeing is no mistake


def test_weights_that_do_not_fit_are_told_in_one_line(tmp_path):
    path = tmp_path / "a.pt"
    other = DiT_models["DiT-N/4"](**PIXELS, mixer="attention").state_dict()
    with pytest.raises(ValueError, match=r"attn\.pde\.equation\.g0 is missing.* and \d+ more") as error:
        load_weights(write(path), other, path)
    assert "\n" not in str(error.value)
    short = write(path).state_dict() | {"final_layer.linear.bias": torch.zeros(7)}
    write(path, ema=short)
    with pytest.raises(ValueError, match=r"final_layer\.linear\.bias is \(7,\), not \(96,\)"):
        load_model(path, flags(), "ema")


def test_a_size_without_a_name_is_refused():
    with pytest.raises(ValueError, match="hidden size 32, depth 1 and patch size 2"):
        settings_from_weights(DiT(8, hidden_size=32, depth=1, num_heads=1).state_dict())


def write_as(path, *flags):
    export.export(export.parse_args([str(path), *map(str, flags)]), ALONE)


@pytest.mark.parametrize(
    ("mixer", "options"), [("attention", {}), ("pdessm-g", {}), ("pdessm", dict(coupling="coupled", groups=4))]
)
def test_safetensors_there_and_back(tmp_path, mixer, options):
    written = write(tmp_path / "a.pt", mixer, options).state_dict()
    write_as(tmp_path / "a.pt", "--format", "safetensors")
    write_as(tmp_path / "a.safetensors", "--format", "pt", "--out", tmp_path / "b.pt")
    expected, settings = load_model(tmp_path / "a.pt", flags(), "ema")
    for name in ("a.safetensors", "b.pt"):
        model, read = load_model(tmp_path / name, flags(), "ema")
        assert read == settings
        assert str(model) == str(expected)
        assert all(torch.equal(value, written[key]) for key, value in model.state_dict().items())
        assert find_model(tmp_path / name).keys() == written.keys()
    assert load_checkpoint(tmp_path / "b.pt")[1] == load_checkpoint(tmp_path / "a.pt")[1]
    assert torch.load(tmp_path / "b.pt")["ema"].keys() == written.keys()  # where the public code looks for them


def test_what_is_exported_is_the_average_of_weights_whoever_wrote_it(tmp_path):
    model = DiT_models["DiT-N/4"](**PIXELS).state_dict()
    average = {name: value + 1 for name, value in model.items()}
    average["final_layer.linear.bias"] = average["t_embedder.mlp.0.weight"][0, :96]  # shares its memory
    args = argparse.Namespace(model="DiT-N/4", image_size=16, num_classes=10, vae="none")
    args.path, args.odd = ("data", 3), {(1, 2): 3}
    torch.save(dict(model=model, ema=average, opt={}, args=args), tmp_path / "a.pt")
    write_as(tmp_path / "a.pt", "--format", "safetensors", "--out", tmp_path / "b.safetensors")
    weights, settings = load_checkpoint(tmp_path / "b.safetensors")
    assert all(torch.equal(weights[name], average[name]) for name in average)
    assert settings == dict(model="DiT-N/4", image_size=16, num_classes=10, vae="none", path=["data", 3], odd={})
    assert os.path.getsize(tmp_path / "b.safetensors") < 0.6 * os.path.getsize(tmp_path / "a.pt")


def test_safetensors_of_others_are_bare_weights(tmp_path):
    from safetensors.torch import save_file

    written = DiT_models["DiT-N/4"](**PIXELS, mixer="pdessm")
    save_file(written.state_dict(), tmp_path / "a.safetensors")
    assert load_model(tmp_path / "a.safetensors", flags(), "ema")[1] == SETTINGS
    for args in ("{", "[3]", "null", "[" * 100_000):
        save_file(written.state_dict(), tmp_path / "a.safetensors", dict(args=args))
        if args in ("[3]", "null"):
            assert load_model(tmp_path / "a.safetensors", flags(), "ema")[1] == SETTINGS
        else:
            with pytest.raises(ValueError, match="not a whole checkpoint"):
                load_model(tmp_path / "a.safetensors", flags(), "ema")


def half(path):
    path.write_bytes(path.read_bytes()[: os.path.getsize(path) // 2])


def no_header(path):
    path.write_bytes(path.read_bytes()[:100])


def huge_header(path):
    path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])


def a_pickle(path):
    path.write_bytes(pickle.dumps(Hostile(str(path.parent / "owned"))))


def a_torch_file(path):
    torch.save(dict(ema={}, args=Hostile(str(path.parent / "owned"))), path)


SPOILT_SAFETENSORS = [truncated, half, text, empty, garbage, no_header, huge_header, a_pickle, a_torch_file]


@pytest.mark.parametrize("spoil", SPOILT_SAFETENSORS, ids=lambda f: f.__name__)
def test_spoilt_safetensors_are_named_and_run_nothing(tmp_path, spoil):
    write(tmp_path / "a.pt")
    write_as(tmp_path / "a.pt", "--format", "safetensors")
    spoil(tmp_path / "a.safetensors")
    for use in (lambda path: load_model(path, flags(), "ema"), lambda path: write_as(path, "--format", "pt", "--out", "b.pt")):
        with pytest.raises(ValueError, match=r"a\.safetensors is not a whole checkpoint"):
            use(tmp_path / "a.safetensors")
    assert sorted(os.listdir(tmp_path)) == ["a.pt", "a.safetensors"]


def test_a_hostile_autoencoder_does_not_run(tmp_path):
    from diffusers.models import AutoencoderKL

    AutoencoderKL(block_out_channels=[32]).save_config(tmp_path / "vae")
    weights = tmp_path / "vae" / "diffusion_pytorch_model.bin"
    for write_to in (lambda value: torch.save(value, weights), lambda value: weights.write_bytes(pickle.dumps(value))):
        write_to(dict(a=Hostile(str(tmp_path / "owned"))))
        with pytest.raises(OSError, match=r"the VAE .* could not be loaded"):
            open_space(str(tmp_path / "vae")).load("cpu")
    assert os.listdir(tmp_path) == ["vae"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--format", "pt"], r"a\.pt is there already; give another --out"),
        (["--format", "safetensors", "--out", "b.pt"], r"--out b\.pt should end in \.safetensors"),
        (["--format", "pt", "--out", "b.safetensors"], r"--out b\.safetensors should end in \.pt"),
        (["--format", "pt", "--out", "/proc/b.pt"], r"could not write the checkpoint /proc/b\.pt"),
        (["--format", "safetensors", "--out", "/proc/b.safetensors"], r"could not write the checkpoint /proc/b\.safetensors"),
    ],
)
def test_an_export_that_cannot_be_says_why(tmp_path, monkeypatch, given, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.pt")
    before = (tmp_path / "a.pt").read_bytes()
    with pytest.raises((ValueError, OSError), match=message):
        write_as("a.pt", *given)
    assert os.listdir() == ["a.pt"]
    assert (tmp_path / "a.pt").read_bytes() == before


def filled(model, start):
    """Every weight another number."""
    with torch.no_grad():
        for number, value in enumerate(model.state_dict().values(), start):
            value.fill_(number)
    return model


def saved(path, model):
    torch.save(dict(model={}, ema=model.state_dict()), path)
    return path


def test_fine_tuning_with_other_classes_keeps_all_but_their_table(tmp_path):
    old = filled(DiT_models["DiT-N/4"](**PIXELS), 1000)
    new = filled(DiT_models["DiT-N/4"](**PIXELS | dict(num_classes=3)), 0)
    report = initialize(new, saved(tmp_path / "a.pt", old))
    table = "y_embedder.embedding_table.weight"
    for name, value in new.state_dict().items():
        if name != table:
            assert torch.equal(value, old.state_dict()[name]), name
    assert (new.state_dict()[table][:3] < 1000).all()
    assert torch.equal(new.state_dict()[table][3], old.state_dict()[table][10])
    assert report[1:] == [f"... not {table}, which is (11, 96) there and (4, 96) here; the null class is kept"]
    count = len(old.state_dict())
    assert report[0].endswith(f"a.pt: {count - 1} of the model's {count} tensors")


@pytest.mark.parametrize(
    ("before", "after", "options"),
    [("attention", "pdessm", {}), ("pdessm", "attention", {}), ("attention", "pdessm", dict(gate=True))],
)
def test_a_mixer_of_another_kind_is_initial_whole(tmp_path, before, after, options):
    old = filled(DiT_models["DiT-N/4"](**PIXELS, mixer=before), 1000)
    new = filled(DiT_models["DiT-N/4"](**PIXELS, mixer=after, **options), 0)
    report = initialize(new, saved(tmp_path / "a.pt", old))
    mixing = {name for name in new.state_dict() if ".attn." in name}
    for name, value in new.state_dict().items():
        assert torch.equal(value < 1000, torch.full(value.shape, name in mixing)), name
    assert len(report) == 3
    key = {"attention": "blocks.*.attn.qkv.weight (6)", "pdessm": "blocks.*.attn.pde.equation.g0 (6)"}
    assert report[1].startswith("... not there, and initial: ")
    assert key[after] in report[1]
    assert report[2].startswith("... there, and not taken: ")
    assert key[before] in report[2]


def test_an_option_more_of_the_same_mixer_leaves_the_rest_as_it_was(tmp_path):
    old = filled(DiT_models["DiT-N/4"](**PIXELS, mixer="pdessm"), 1000)
    new = filled(DiT_models["DiT-N/4"](**PIXELS, mixer="pdessm", gate=True), 0)
    initialize(new, saved(tmp_path / "a.pt", old))
    kept = {name for name, value in new.state_dict().items() if (value >= 1000).all()}
    assert kept == new.state_dict().keys() & old.state_dict().keys()


@pytest.mark.parametrize("other", ["DiT-Ti/4", "UNet-N"])
def test_a_network_of_which_nothing_fits_is_no_beginning(tmp_path, other):
    old = MODELS[other](input_size=16, in_channels=3, num_classes=10)
    new = DiT_models["DiT-N/4"](**PIXELS)
    before = {name: value.clone() for name, value in new.state_dict().items()}
    with pytest.raises(ValueError, match="is of another network or size"):
        initialize(new, saved(tmp_path / "a.pt", old))
    assert all(torch.equal(value, before[name]) for name, value in new.state_dict().items())


def test_a_unet_keeps_its_null_class(tmp_path):
    old, new = (MODELS["UNet-N"](input_size=16, in_channels=3, num_classes=n) for n in (4, 2))
    report = initialize(new, saved(tmp_path / "a.pt", old))
    assert torch.equal(new.net.class_embedding.weight[2], old.net.class_embedding.weight[4])
    assert torch.equal(new.net.conv_in.weight, old.net.conv_in.weight)
    assert len(report) == 2


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_training_begins_where_another_run_ended(tmp_path, ending):
    """From attention over ten classes to a PDE over ten: after one step at a tiny rate all else is still there."""
    quick = ["--global-batch-size", 2, "--max-steps", 1, "--log-every", 1]
    path = fit(tmp_path / "a", *quick, "--lr", 1e-2) / "checkpoints" / "0000001.pt"
    if ending == "safetensors":
        write_as(path, "--format", "safetensors")
        path = path.with_suffix(".safetensors")
    folder = fit(tmp_path / "b", *quick, "--lr", 1e-9, "--mixer", "pdessm", "--init-from", path)
    old, new = load_checkpoint(path)[0], torch.load(folder / "checkpoints" / "0000001.pt")
    for name, value in new["model"].items():
        if ".attn." not in name:
            torch.testing.assert_close(value, old[name], rtol=0, atol=1e-7)
            torch.testing.assert_close(new["ema"][name], old[name], rtol=0, atol=1e-7)
    assert old["final_layer.linear.weight"].abs().max() > 1e-3
    log = (folder / "log.txt").read_text()
    assert f"Initial weights from {path}: " in log
    assert "... not there, and initial: blocks.*.attn.pde." in log
    draw(folder / "checkpoints" / "0000001.pt", tmp_path / "a.png", "--class-labels", 1)


def test_a_beginning_that_is_none_leaves_no_folder(tmp_path):
    for name in ("nowhere.pt", "a.pt"):
        (tmp_path / "a.pt").write_text("not weights")
        with pytest.raises((ValueError, OSError), match=rf"{name}"):
            fit(tmp_path / "r", "--init-from", tmp_path / name)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("form", ["pt", "safetensors"])
def test_a_full_disk_leaves_no_half_export(tmp_path, form):
    write(tmp_path / "a.pt")
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, unlimited[1]))
    try:
        with pytest.raises(OSError, match=rf"could not write the checkpoint .*b\.{form}: .*File too large"):
            write_as(tmp_path / "a.pt", "--format", form, "--out", tmp_path / f"b.{form}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert os.listdir(tmp_path) == ["a.pt"]
