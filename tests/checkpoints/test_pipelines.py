"""Folders of diffusers: the same noise gives the same images there and here."""

import ast
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, DiTPipeline, DiTTransformer2DModel
from safetensors.torch import load_file, save_file

from autoencoders import save_autoencoder
from checkpoint_files import given_flags, write_as
from checkpoints.build import load_model, save_checkpoint
from checkpoints.pipelines import is_public
from checkpoints.read import load_checkpoint
from commands import ROOT, draw
from diffusion import create_diffusion, create_flow
from diffusion.drawing import generate
from diffusion.guidance import Guidance
from diffusion.noise import PerImageNoise
from diffusion.samplers import ddim, euler
from images.autoencoder import load_trained_space
from models import MODELS

NAMES = ["rose", "bird of paradise", "tulip"]
FILE = "transformer/diffusion_pytorch_model.safetensors"
SEEDS, LABELS = [3, 4, 5], [2, 0, 4]  # 4 is none of the classes


@pytest.fixture(autouse=True)
def modules(tmp_path, monkeypatch):
    """Where diffusers copies code that it runs."""
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return save_autoencoder(tmp_path_factory.mktemp("vae"), levels=2, channels=4, scaling_factor=0.5)


@pytest.fixture
def export(tmp_path, randomize):
    """export(mixer, vae, objective): the paths of a checkpoint and of its folder of diffusers."""

    def write(mixer="attention", vae="none", objective="diffusion", options=None, **stated):
        torch.manual_seed(1)
        latent, channels = (16, 3) if vae == "none" else (8, 4)
        options = dict(options or {}, num_classes=4, learn_sigma=objective == "diffusion", mixer=mixer, depth=6)
        model = randomize(MODELS["DiT-N/4"](latent, in_channels=channels, **options)).state_dict()
        args = dict(model="DiT-N/4", mixer=mixer, vae=vae, objective=objective, image_size=16, class_names=NAMES)
        save_checkpoint(tmp_path / "a.pt", model=model, ema=model, args=args | stated)
        write_as(tmp_path / "a.pt", "--format", "diffusers")
        return tmp_path / "a.pt", tmp_path / "a.diffusers"

    return write


def drawn_here(path, scale=1.5, flow=None, channels=None):
    """Images of SEEDS and LABELS, uint8 (3, H, W, 3), by 4 steps."""
    model, settings = load_model(path, given_flags(), "ema")
    objective, sampler = (create_flow(4, **flow), euler) if flow is not None else (create_diffusion("ddim4"), ddim)
    noise, space = PerImageNoise(SEEDS, "cpu"), load_trained_space(settings["vae"], "cpu")
    given = torch.tensor(LABELS), noise, Guidance(scale, channels)
    return generate(model, space, objective, sampler, *given, progress=False).numpy()


def drawn_there(pipeline, scale=1.5, labels=LABELS, **how):
    pipeline.set_progress_bar_config(disable=True)
    noise = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    return pipeline(labels, guidance_scale=scale, generator=noise, num_inference_steps=4, output_type="np", **how).images


def assert_alike(here, there):
    assert here.std() > 5
    assert np.abs(here / 255 - there).max() <= 1 / 255


def own(folder):
    return DiffusionPipeline.from_pretrained(folder, custom_pipeline=str(folder), trust_remote_code=True)


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_dit_pipeline_draws_what_is_drawn_here(export, vae, scale):
    checkpoint, folder = export(vae=vae)
    pipeline = DiTPipeline.from_pretrained(folder)
    there = [1000 if label == 4 else label for label in LABELS]            # its null class
    assert_alike(drawn_here(folder, scale), drawn_there(pipeline, scale, there))
    assert pipeline.get_label_ids(["tulip", "rose"]) == [2, 0]
    assert_alike(drawn_here(checkpoint, scale), drawn_there(own(folder), scale, there))  # with DiT's own times


def test_diffusers_and_dit_see_other_times(export, vae):
    checkpoint, folder = export(vae=vae)
    networks = [load_model(path, given_flags(), "ema")[0] for path in (checkpoint, folder)]
    x, y, t = torch.randn(2, 4, 8, 8), torch.tensor([0, 1]), torch.tensor([999, 20])
    here, there = (network(x, t, y) for network in networks)
    theirs = DiTTransformer2DModel.from_pretrained(folder, subfolder="transformer").eval()
    with torch.no_grad():
        assert torch.allclose(theirs(x, t, y).sample, there, atol=1e-4)
    assert (here - there).abs().max() > 1e-3


def test_weights_come_back_with_the_same_bits(tmp_path, export, vae):
    checkpoint, folder = export(vae=vae)
    (weights, args), (expected, _) = load_checkpoint(folder), load_checkpoint(checkpoint)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], w) for name, w in expected.items())
    assert args == dict(objective="diffusion", time_intervals=127, class_names=NAMES, vae=str(folder))
    write_as(folder, "--format", "diffusers", "--out", tmp_path / "b")
    there, back = (load_file(place / FILE) for place in (folder, tmp_path / "b"))
    assert there.keys() == back.keys()
    assert all(torch.equal(back[name], w) for name, w in there.items())
    assert not (tmp_path / "b" / "pipeline.py").exists()                   # its times are those of diffusers
    assert draw(folder, tmp_path / "a.png", "--class-labels", "rose", "--sampler", "dpm-solver").any()


def test_classes_that_are_called_by_their_numbers_stay_apart_from_those_without_images(export, vae):
    _, folder = export(vae=vae, class_names=["0", "1", "2"])
    assert load_model(folder, given_flags(), "ema")[0].trained_classes == 3
    save_file(load_file(folder / FILE), folder / FILE)  # as an older version wrote it
    assert load_model(folder, given_flags(), "ema")[0].class_names is None


def test_other_layouts_of_the_folder_are_read(export, vae):
    """Weights in PyTorch's format, a class of an older name, and all of the table's classes."""
    _, folder = export(vae=vae)
    part = folder / "transformer"
    torch.save(load_file(folder / FILE), part / "diffusion_pytorch_model.bin")
    (folder / FILE).unlink()
    config, index = (json.loads((place).read_text()) for place in (part / "config.json", folder / "model_index.json"))
    (part / "config.json").write_text(json.dumps(config | dict(_class_name="Transformer2DModel", norm_eps=1e-5)))
    (folder / "model_index.json").write_text(json.dumps({name: index[name] for name in index if name != "id2label"}))
    assert load_model(folder, given_flags(), "ema")[0].num_classes == 1000


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"])
@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1", None], ids=["empty", "lfs", "cut"])
def test_damaged_weights_of_a_folder_are_named(export, name, content):
    _, folder = export()
    part = folder / "transformer"
    torch.save(load_file(folder / FILE), part / "diffusion_pytorch_model.bin")
    whole = (part / name).read_bytes()
    (folder / FILE).unlink()
    (part / name).write_bytes(whole[:-5000] if content is None else content)
    with pytest.raises(ValueError, match=rf"{name} is no whole file of tensors alone: it is damaged"):
        load_model(folder, given_flags(), "ema")


CASES = {
    "pde on pixels, a flow": dict(mixer="pdessm", objective="flow"),
    "pairs of channels, images predicted, shifted": dict(
        mixer="pdessm", options=dict(coupling="pairwise", groups=24), objective="flow", predict="x", time_shift=3.0
    ),
    "ours, on shifted latents, three channels guided": dict(
        mixer="pdessm-g", vae=dict(scaling_factor=0.5, shift_factor=2.0), guided=3
    ),
    "conditioned, diffusion on pixels": dict(mixer="pdessm", options=dict(conditioned=True), pde_conditioned=True),
    "attention on pixels": dict(),
}


def with_autoencoder(options, folder):
    """The options of `export`, with an autoencoder of the settings that they have in place of its path."""
    saved = dict(vae=save_autoencoder(folder, levels=2, channels=4, **options["vae"])) if "vae" in options else {}
    return options | saved


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_pipeline_of_its_own_draws_what_is_drawn_here(tmp_path, export, case):
    given, channels = {name: value for name, value in case.items() if name != "guided"}, case.get("guided")
    checkpoint, folder = export(**with_autoencoder(given, tmp_path / "vae"))
    flow = {name: case[name] for name in ("predict", "time_shift") if name in case} if "objective" in case else None
    pipeline = own(folder)
    assert_alike(drawn_here(checkpoint, flow=flow, channels=channels), drawn_there(pipeline, guidance_channels=channels))
    assert_alike(drawn_here(folder, flow=flow), drawn_there(pipeline, labels=["tulip", "rose", 4]))
    for unknown in ("daisy", 5, -1):
        with pytest.raises(ValueError, match=f"there is no class {unknown!r}; known: rose, .*, 3, 4 for none"):
            pipeline([unknown])
    assert [image.size for image in pipeline([1, 0], num_inference_steps=1).images] == [(16, 16)] * 2
    assert pipeline([1], num_inference_steps=1, output_type="pt", return_dict=False)[0].shape == (1, 3, 16, 16)


@pytest.mark.parametrize(
    ("change", "theirs"),
    [
        ({}, True), (dict(num_classes=1000), True), (dict(num_classes=1001), False), (dict(input_size=(8, 16)), False),
        (dict(objective="flow"), False), (dict(mixer="pdessm"), False), (dict(kind="VQModel"), False),
        (dict(shift_factor=0.0), True), (dict(shift_factor=0.1), False),
    ],
    ids=str,
)  # fmt: skip
def test_dit_pipeline_gets_what_it_draws_and_nothing_else(change, theirs):
    given = dict(input_size=(8, 8), num_classes=10, objective="diffusion", mixer="attention", kind="AutoencoderKL") | change
    vae = type(given["kind"], (), dict(config=given))()
    assert is_public(SimpleNamespace(**given), given, vae) == theirs


@pytest.mark.parametrize("name", ["exported_dit", "exported_network", "exported_pipeline"])
def test_code_that_is_exported_needs_no_more_than_diffusers_and_the_operator(name):
    nodes = ast.walk(ast.parse((ROOT / "checkpoints" / f"{name}.py").read_text()))
    imported = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert {module.split(".")[0] for module in imported} <= {"diffusers", "torch", "pde_ssm"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(options=dict(mlp="swiglu"), mlp="swiglu"), "mixer attention and other layers than DiT.s has no pipeline"),
        (dict(options=dict(positions="rope"), attention_positions="rope"), "mixer attention has no pipeline"),
        (dict(mixer="pdessm-gla"), "DiT-N/4 with the mixer pdessm-gla .*has no pipeline"),
        (dict(mixer="mamba"), "DiT-N/4 with the mixer mamba has no pipeline.*--format hub takes all networks"),
        (dict(mixer="pdessm", objective="flow", predict="x", path="cosine"), "images on the path cosine has no pipeline"),
        (dict(vae=dict(latents_mean=[0.0] * 4, latents_std=[2.0] * 4)), "--vae .* scales each channel by itself, which no"),
    ],
)
def test_a_network_without_a_pipeline_is_named(tmp_path, export, options, message):
    with pytest.raises(ValueError, match=message):
        export(**with_autoencoder(options, tmp_path / "vae"))


def change(path, edit):
    path.write_text(json.dumps(edit(json.loads(path.read_text()))))


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("kind", "is a pipeline of diffusers with a UNet2DModel; those with a DiTTransformer2DModel are read"),
        ("weights", r"transformer holds neither diffusion_pytorch_model\.safetensors nor"),
        ("name", r"holds no DiTTransformer2DModel: proj_out_2\.bias is missing"),
        ("block", r"block 2 has another norm1\.emb\.class_embedder"),
    ],
)
def test_a_folder_that_is_not_dits_is_named(export, vae, part, message):
    _, folder = export(vae=vae)
    file = folder / FILE
    weights = load_file(file)
    if part == "kind":
        change(folder / "transformer" / "config.json", lambda config: config | dict(_class_name="UNet2DModel"))
    elif part == "weights":
        file.unlink()
    elif part == "name":
        del weights["proj_out_2.bias"]
        save_file(weights, file)
    else:
        weights["transformer_blocks.2.norm1.emb.class_embedder.embedding_table.weight"] += 1
        save_file(weights, file)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(folder)
