"""What a file and its weights say of a model, and what of it is believed."""

import argparse

import pytest
import torch

import sample
from checkpoint_files import ATTENTION, OBJECTIVE, PAPERS, PIXELS, SETTINGS, given_flags, write_as, write_checkpoint
from checkpoints.build import initialize, load_model, load_weights, save_checkpoint, settings_from_weights
from commands import draw, draw_many
from diffusion import create_sampler
from download import find_model
from machine.processes import launch
from mixers import MIXERS, kind_of
from models import MODELS, DiT, DiT_models, grid_embedding
from pde_ssm import TERMS


@pytest.mark.parametrize("mixer", ["attention", "pdessm"])
def test_a_checkpoint_says_what_it_is(tmp_path, mixer):
    path = tmp_path / "a.pt"
    written = write_checkpoint(path, mixer)
    model, settings = load_model(path, given_flags(), default_vae="mse")
    assert settings == SETTINGS | (ATTENTION if mixer == "attention" else {})
    assert not model.training
    for name, value in written.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_mixer_is_built_again_from_what_a_file_states(checkpoint, mixer):
    model, settings = load_model(checkpoint(mixer), {}, default_vae="ema")
    assert settings["mixer"] == mixer
    assert settings["mixer_options"].items() >= kind_of(mixer).named[mixer].items() - {("expand", 7 / 6)}  # told as state_dim
    assert model(torch.randn(1, 3, 8, 8), torch.ones(1), torch.zeros(1, dtype=torch.long)).any()


@pytest.mark.parametrize("mixer", ["zigzag", "ss2d-lamamba", "pdessm-g"])
def test_a_flag_names_the_mixer_of_bare_weights(tmp_path, mixer):
    network = DiT_models["DiT-N/4"](**PIXELS, mixer=mixer).requires_grad_(False)
    for weight in network.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    torch.save(network.state_dict(), tmp_path / "bare.pt")
    model, settings = load_model(tmp_path / "bare.pt", given_flags(mixer=mixer), default_vae="none")
    assert settings["mixer"] == mixer
    x, t, y = torch.randn(1, 3, 16, 16), torch.ones(1), torch.zeros(1, dtype=torch.long)
    torch.testing.assert_close(model(x, t, y), network.eval()(x, t, y))
    with pytest.raises(ValueError, match=r"--mixer ss2d-v0 contradicts .*, which has --mixer "):
        load_model(tmp_path / "bare.pt", given_flags(mixer="ss2d-v0"), default_vae="none")


UNTOLD = [("ss2d", "order", "continuous"), ("vim", "summed", True), ("mamba", "zigzag", True), ("s4nd", "bandlimit", 0.5)]


@pytest.mark.parametrize(("mixer", "option", "value"), UNTOLD)
def test_flags_set_what_bare_weights_do_not_tell(tmp_path, mixer, option, value):
    network = DiT_models["DiT-N/4"](**PIXELS, mixer=mixer, **{option: value}).requires_grad_(False)
    for weight in network.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    torch.save(network.state_dict(), tmp_path / "bare.pt")
    flag = kind_of(mixer).flag_of(option)
    flags = [flag] if value is True else [flag, str(value)]
    write_as(tmp_path / "bare.pt", "--format", "pt", "--out", tmp_path / "stated.pt", *flags)
    x, t, y = torch.randn(1, 3, 16, 16), torch.ones(1), torch.zeros(1, dtype=torch.long)
    for given, name in ((sample.parse_args(flags), "bare.pt"), (sample.parse_args([]), "stated.pt")):
        model, settings = load_model(tmp_path / name, vars(given), default_vae="none")
        assert settings["mixer_options"][option] == value
        torch.testing.assert_close(model(x, t, y), network.eval()(x, t, y))
    assert load_model(tmp_path / "stated.pt", vars(sample.parse_args(flags)), "none")[1] == settings
    write_checkpoint(tmp_path / "a.pt", mixer)
    with pytest.raises(ValueError, match=f"{flag} contradicts .*a.pt, which states its mixer and its options; leave"):
        load_model(tmp_path / "a.pt", vars(sample.parse_args(flags)), "none")
    torch.save(DiT_models["DiT-N/4"](**PIXELS).state_dict(), tmp_path / "b.pt")
    with pytest.raises(ValueError, match=f"{flag} means nothing to --mixer attention"):
        load_model(tmp_path / "b.pt", vars(sample.parse_args(flags)), "none")


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
    loaded, settings = load_model(path, given_flags(), default_vae="mse")
    here = dict(model="DiT-S/8", mlp="gelu", **ATTENTION, num_classes=5, image_size=128, in_channels=4, vae="mse", **OBJECTIVE)
    assert settings == here
    assert torch.equal(loaded.pos_embed, model.pos_embed)
    assert find_model(path).keys() == state.keys()


@pytest.mark.parametrize("mixer", ["attention", "pdessm"])
@pytest.mark.parametrize("name", ["DiT-N/1", "DiT-Ti/2", "DiT-B/4", "DiT-XL/8"])
def test_weights_tell_their_settings(name, mixer):
    with torch.device("meta"):
        state = DiT_models[name](input_size=16, in_channels=3, num_classes=7, mixer=mixer).state_dict()
    chosen = ATTENTION if mixer == "attention" else dict(mixer="pdessm", mixer_options=PAPERS)
    chosen |= dict(mlp="gelu", num_classes=7, in_channels=3, learn_sigma=True)
    assert settings_from_weights(state) == dict(model=name) | chosen


@pytest.mark.parametrize("options", [dict(coupling="coupled", groups=4, terms=("diffusion",)), dict(gate=True, state_dim=48)])
def test_the_mixers_options_are_read_off_the_weights(tmp_path, options):
    written = write_checkpoint(tmp_path / "a.pt", options=options)
    model, settings = load_model(tmp_path / "a.pt", given_flags(), "ema")
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
        (dict(mlp="swiglu"), "states mlp=swiglu, and its weights have mlp=gelu"),
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
    write_checkpoint(tmp_path / "a.pt", args=args)
    with pytest.raises(ValueError, match=message) as error:
        load_model(tmp_path / "a.pt", given_flags(), "ema")
    assert "\n" not in str(error.value)


def test_a_file_of_another_network_states_no_parts_of_dit(tmp_path):
    weights = MODELS["U-ViT-N/4"](**PIXELS).state_dict()
    save_checkpoint(tmp_path / "a.pt", ema=weights, args=dict(model="U-ViT-N/4", norm="rms", mlp="swiglu"))
    with pytest.raises(ValueError, match=r"a.pt contradicts itself: it states mlp, norm, and its weights are no DiT's$"):
        load_model(tmp_path / "a.pt", given_flags(), "ema")


def test_what_a_file_states_and_its_weights_allow_is_believed(tmp_path):
    args = dict(model="DiT-N/4", mixer="pdessm", pde_terms=list(TERMS), pde_coupling="diagonal", objective="diffusion")
    state = DiT_models["DiT-N/4"](**PIXELS, mixer="pdessm", learn_sigma=False).state_dict()
    save_checkpoint(tmp_path / "a.pt", ema=state, args=args | dict(learn_sigma=False))
    assert load_model(tmp_path / "a.pt", given_flags(), "ema")[1] == SETTINGS | dict(learn_sigma=False)
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
    assert load_model(path, given_flags(objective="flow", path="cosine"), "ema")[1]["path"] == "cosine"
    draw_many(path, tmp_path / "s", "--objective", "diffusion", "--num-fid-samples", 1)
    assert initialize(randomized(learn_sigma=False), path)  # which needs to know none
    torch.save(dict(ema=torch.load(path), args=dict(model="DiT-N/4", objective="flow")), path)
    with pytest.raises(ValueError, match=r"--path cosine contradicts .*--path linear"):  # what train.py takes without the flag
        load_model(path, given_flags(path="cosine"), "ema")


SIT = dict(model="SiT-N/4", path_type="Linear", prediction="velocity")


@pytest.mark.parametrize("learn_sigma", [True, False])
@pytest.mark.parametrize(("path_type", "path"), [("Linear", "linear"), ("GVP", "cosine")])
@torch.no_grad()
def test_sits_flows_are_sampled_in_their_own_time(tmp_path, randomized, path_type, path, learn_sigma):
    network = randomized(learn_sigma=learn_sigma)
    torch.save(dict(ema=network.state_dict(), args=argparse.Namespace(**SIT | dict(path_type=path_type))), tmp_path / "a.pt")
    model, settings = load_model(tmp_path / "a.pt", given_flags(), "ema")
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
        load_model(tmp_path / "bare.pt", given_flags(), "ema")
    for name, more in (("bare", ["--objective", "flow"]), ("named", [])):
        draw(tmp_path / f"{name}.pt", tmp_path / f"{name}.png", *more)
    assert (tmp_path / "bare.png").read_bytes() == (tmp_path / "named.png").read_bytes()


@pytest.mark.parametrize("kind", [dict(path_type=name) for name in ("VP", "linear", None)] + [dict(prediction="score")])
def test_sits_that_are_no_flow_known_here_are_refused_by_name(tmp_path, kind):
    write_checkpoint(tmp_path / "a.pt", args=SIT | kind)
    asked = SIT | kind
    with pytest.raises(ValueError, match=f"SiT's with path_type {asked['path_type']} and prediction {asked['prediction']};"):
        load_model(tmp_path / "a.pt", given_flags(), "ema")


def test_a_time_scale_that_is_no_number_counts_as_none(tmp_path):
    write_checkpoint(tmp_path / "a.pt", learn_sigma=False, args=dict(objective="flow", time_scale=None))
    assert load_model(tmp_path / "a.pt", given_flags(), "ema")[1]["time_scale"] == 1000


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
        model, settings = load_model(tmp_path / "a.pt", given_flags(vae=vae), "ema")
        assert (model.in_channels, settings["image_size"], settings["vae"]) == (channels, 32, vae)
    grid = draw(tmp_path / "a.pt", tmp_path / "a.png", "--class-labels", 3, "--vae", vae, "--image-size", "32x48")
    assert grid.shape == (64, 96, 3)
    with pytest.raises(ValueError, match=r"a\.pt has 16 channels and does not say of which autoencoder; give --vae FOLDER"):
        load_model(tmp_path / "a.pt", given_flags(), "ema")
    with pytest.raises(ValueError, match=r"--vae mse has 4 channels, and the weights in .*a\.pt are for 16"):
        load_model(tmp_path / "a.pt", given_flags(vae="mse"), "ema")


def test_an_autoencoder_that_is_elsewhere_now_is_asked_for(tmp_path):
    weights = DiT_models["DiT-N/4"](8, num_classes=3).state_dict()
    torch.save(dict(ema=weights, args=dict(vae="no/folder")), tmp_path / "a.pt")
    asked = r"a\.pt was trained with --vae no/folder: neither .*; if it is elsewhere now, give --vae FOLDER, or put a link"
    for given, message in ((None, asked), ("no/other", "^--vae no/other: neither ")):
        with pytest.raises(FileNotFoundError, match=message):
            load_model(tmp_path / "a.pt", dict(vae=given), "ema")


def test_weights_of_a_grid_that_is_no_square_ask_for_its_shape(tmp_path, randomized):
    model = randomized(input_size=(8, 16))
    torch.save(model.state_dict(), tmp_path / "a.pt")
    for wrong in (None, 16, (8, 24)):
        with pytest.raises(ValueError, match=r"a\.pt is for 8 tokens, no square; give the --image-size HxW"):
            load_model(tmp_path / "a.pt", given_flags(image_size=wrong), "ema")
    loaded, settings = load_model(tmp_path / "a.pt", given_flags(image_size=(8, 16)), "ema")
    assert settings["image_size"] == (8, 16)
    assert torch.equal(loaded.pos_embed, model.pos_embed)


def test_a_hybrid_that_contradicts_its_weights_is_refused(tmp_path):
    write_checkpoint(tmp_path / "a.pt", "pdessm-gla", args=dict(mixer="pdessm-gl", pde_attention_every=3))
    with pytest.raises(ValueError, match="states attention_every=3, and its weights have attention_every=4"):
        load_model(tmp_path / "a.pt", given_flags(), "ema")


def test_words_that_mean_nothing_here_are_passed_over(tmp_path):
    args = dict(model=["MyDiT"], mixer="hyena", vae=None, num_classes=None, image_size="64", objective="eps", path="/data")
    args |= dict(ema_decay=[[0.9]], class_names=3)
    write_checkpoint(tmp_path / "a.pt", args=argparse.Namespace(**args))
    assert load_model(tmp_path / "a.pt", given_flags(), "ema")[1] == SETTINGS


@pytest.mark.parametrize("mixer", ["pdessm-g", "pdessm-gla"])
def test_a_preset_keeps_its_name(tmp_path, mixer):
    written = write_checkpoint(tmp_path / "a.pt", mixer)
    model, settings = load_model(tmp_path / "a.pt", given_flags(mixer=mixer), "ema")
    assert settings["mixer"] == mixer
    assert str(model) == str(written)
    torch.save(written.state_dict(), tmp_path / "a.pt")  # which knows no names
    assert str(load_model(tmp_path / "a.pt", given_flags(), "ema")[0]) == str(written)


@pytest.mark.parametrize("mixer", ["attention", "pdessm"])
@pytest.mark.parametrize("size", [24, (16, 24)])
def test_a_model_runs_at_another_size(tmp_path, mixer, size):
    written = write_checkpoint(tmp_path / "a.pt", mixer)
    model, settings = load_model(tmp_path / "a.pt", given_flags(image_size=size), "ema")
    h, w = (24, 24) if size == 24 else size
    assert settings["image_size"] == size
    assert model(torch.randn(1, 3, h, w), torch.tensor([5]), torch.tensor([3])).shape == (1, 6, h, w)
    same = load_model(tmp_path / "a.pt", given_flags(image_size=16), "ema")[0]
    assert torch.equal(same.pos_embed, written.pos_embed)
    assert torch.equal(model.blocks[0].mlp.fc1.weight, written.blocks[0].mlp.fc1.weight)


@pytest.mark.parametrize("mixer", ["attention", "pdessm"])
def test_resizing_there_and_back_changes_nothing(mixer):
    model = DiT_models["DiT-N/4"](**PIXELS, mixer=mixer)
    before = model.pos_embed.clone()
    assert not torch.equal(model.resize((24, 16)).pos_embed[:, :16], before)
    assert torch.equal(model.resize(16).pos_embed, before)
    resized = model.double().resize((24, 16)).pos_embed
    assert (resized.dtype, resized.requires_grad) == (torch.float64, False)
    with pytest.raises(ValueError, match="input size 16 x 18 is not divisible by 4"):
        model.resize((16, 18))


def test_the_weights_say_which_mixer_they_are_for(tmp_path):
    state = {name: w for name, w in write_checkpoint(tmp_path / "a.pt").state_dict().items() if ".attn." not in name}
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="mix tokens in a way unknown here"):
        load_model(tmp_path / "a.pt", given_flags(), "ema")


def test_positions_keep_their_place_in_the_picture():
    trained, finer = (grid_embedding(h, 6, 16, (4, 6)).view(h, 6, 16) for h in (4, 12))
    torch.testing.assert_close(finer[1::3], trained)  # every third of three times the rows has the old row's centre
    assert torch.equal(trained, grid_embedding(4, 6, 16).view(4, 6, 16))


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
        (dict(predict="x"), "--predict x means nothing to .*diffusion"),
    ],
)
def test_flags_that_contradict_the_checkpoint_name_both_values(tmp_path, given, message):
    write_checkpoint(tmp_path / "a.pt")
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path / "a.pt", given_flags(**given), "ema")
    agreeing = SETTINGS | dict(path=None, predict=None, time_shift=None)
    load_model(tmp_path / "a.pt", given_flags(**agreeing), "ema")


def test_weights_that_do_not_fit_are_told_in_one_line(tmp_path):
    path = tmp_path / "a.pt"
    other = DiT_models["DiT-N/4"](**PIXELS, mixer="attention").state_dict()
    with pytest.raises(ValueError, match=r"attn\.pde\.equation\.g0 is missing.* and \d+ more") as error:
        load_weights(write_checkpoint(path), other, path)
    assert "\n" not in str(error.value)
    short = write_checkpoint(path).state_dict() | {"final_layer.linear.bias": torch.zeros(7)}
    write_checkpoint(path, ema=short)
    with pytest.raises(ValueError, match=r"final_layer\.linear\.bias is \(7,\), not \(96,\)"):
        load_model(path, given_flags(), "ema")


def test_a_size_without_a_name_is_refused():
    with pytest.raises(ValueError, match="no DiT is known with hidden size 32, depth 1, patch size 2"):
        settings_from_weights(DiT(8, hidden_size=32, depth=1, num_heads=1).state_dict())
