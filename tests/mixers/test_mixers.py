"""What a mixer declares of itself, and that nothing else has to know of a new one."""

import inspect
import re
from functools import partial

import accelerate
import pytest
import torch
from timm.models.vision_transformer import Attention

import mixers
import train
from checkpoints.build import load_model
from commands import QUICK, ROOT, draw, fit
from machine.flags import positive
from mixers import KINDS, MIXERS, build_mixer, mixer_options, pde
from mixers.options import Mixer, Option
from mixers.plainmamba import PlainMamba
from mixers.ss2d import SS2D
from pde_ssm import COUPLINGS, PDESSM, PDESSMBlock


def declared_flags():
    return {kind.flag_of(option.name) for kind in KINDS for option in kind.options}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_mixer_takes_the_options_that_it_declares(kind):
    passed_on = [PDESSM] if kind is pde.MIXER else []
    parameters = set().union(*(inspect.signature(build).parameters for build in [kind.build, *passed_on]))
    assert {option.name for option in kind.options} <= parameters
    for name, preset in kind.named.items():
        assert name in MIXERS
        assert preset.keys() <= {option.name for option in kind.options}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_no_other_flag_begins_as_those_of_a_mixer_do(kind):
    """Or a checkpoint's settings would have it as an option of the mixer."""
    prefix = f"{kind.name}_".replace("-", "_")
    named = {f"--{name}".replace("_", "-") for name in vars(train.parse_args([])) if name.startswith(prefix)}
    assert named <= {kind.flag_of(option.name) for option in kind.options}


@pytest.mark.parametrize("name", MIXERS)
def test_no_images_are_no_mistake(name):
    tokens = torch.randn(0, 16, 16, requires_grad=True)
    out = build_mixer(name, 16, 4, (4, 4), 0)(tokens)
    assert out.shape == tokens.shape
    out.sum().backward()


@pytest.mark.parametrize("tokens", [torch.ones(16, 16), torch.ones(16), torch.ones(2, 0, 16), torch.ones(2, 16, 16).int()])
@pytest.mark.parametrize("name", MIXERS)
def test_what_are_no_tokens_is_named(name, tokens):
    with pytest.raises(ValueError, match=r"it got |got 0 tokens"):
        build_mixer(name, 16, 4, (4, 4), 0)(tokens)


@pytest.mark.parametrize("dim", [1, 8, 32])
@pytest.mark.parametrize("name", MIXERS)
def test_tokens_of_another_dimension_are_refused(name, dim):
    """By a mixer without a linear layer in its own words: a filter would broadcast a single channel."""
    with pytest.raises((ValueError, RuntimeError), match=rf"it got .*\b{dim}\b|mat1 and mat2 shapes cannot be multiplied"):
        build_mixer(name, 16, 4, (4, 4), 0)(torch.ones(2, 16, dim))


@pytest.mark.parametrize("tokens", [1, 9])                                 # one would be turned by all places
def test_tokens_off_the_grid_of_rotary_attention_are_named(tokens):
    with pytest.raises(ValueError, match=rf"attention with rope is on a grid of 4 x 4 = 16 tokens .*\(1, {tokens}, 16\)"):
        build_mixer("attention", 16, 4, (4, 4), 0, positions="rope")(torch.randn(1, tokens, 16))


@pytest.mark.parametrize("name", MIXERS)
def test_weights_in_half_precision_work_too(name):
    mixer, tokens = build_mixer(name, 16, 4, (4, 4), 0).bfloat16(), torch.randn(2, 16, 16, dtype=torch.bfloat16)
    out = mixer(tokens)
    out.float().square().sum().backward()
    expected = mixer.double()(tokens.double())
    assert out.dtype == torch.bfloat16
    assert (out - expected).norm() < 0.05 * expected.norm()


LAYERS = torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d


class Adapter(torch.nn.Module):
    """Adds something to the result of a layer, whose weights it also shows, as adapters for fine-tuning do."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.more = layer, torch.nn.Parameter(torch.ones(()))

    @property
    def weight(self):
        return self.layer.weight

    def forward(self, x):
        return self.layer(x) + self.more


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MIXERS)
def test_adapters_and_hooks_of_every_layer_run(name, dtype):
    mixer, tokens, called = build_mixer(name, 16, 4, (4, 4), 0).to(dtype), torch.randn(2, 16, 16, dtype=dtype), []
    expected, layers = mixer(tokens), [layer for layer in mixer.modules() if isinstance(layer, LAYERS)]
    for layer in layers:
        layer.register_forward_hook(lambda layer, inputs, out: called.append(layer))
    hooked = mixer(tokens)
    assert set(called) == set(layers)
    assert (hooked - expected).norm() <= (1e-5 if dtype == torch.float32 else 0.05) * expected.norm()
    for place, layer in [*mixer.named_modules()]:
        if layer in layers:
            mixer.set_submodule(place, Adapter(layer))
    mixer(tokens).float().square().sum().backward()
    assert all(part.more.grad for part in mixer.modules() if isinstance(part, Adapter))


@pytest.mark.parametrize("name", MIXERS)
@torch.no_grad()
def test_weights_may_come_when_their_layer_is_called(name):
    """accelerate keeps those of models that are larger than a device elsewhere."""
    mixer, tokens = build_mixer(name, 16, 4, (4, 4), 0).eval(), torch.randn(20, 16, 16)
    expected = mixer(tokens)
    offloaded = accelerate.cpu_offload(mixer, execution_device="cpu")
    assert {p.device.type for p in offloaded.parameters()} == {"meta"}
    for _ in range(2):
        torch.testing.assert_close(offloaded(tokens), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "options", "missing"),
    [
        *(("pdessm", dict(coupling=coupling), "equation") for coupling in COUPLINGS),
        *(("vim", {}, part) for part in ("conv1d.weight", "conv1d_b.bias", "A_log")),
        ("ss2d", {}, "A_logs"),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_weights_that_were_never_loaded_are_named_and_not_read(name, options, missing, training):
    tokens, weights = torch.randn(2, 16, 16), build_mixer(name, 16, 4, (4, 4), 0, **options).state_dict()
    with torch.device("meta"):
        mixer = build_mixer(name, 16, 4, (4, 4), 0, **options).train(training)
    mixer.load_state_dict({key: w for key, w in weights.items() if missing not in key}, strict=False, assign=True)
    with torch.set_grad_enabled(training), pytest.raises(ValueError, match="on meta: load the weights, or move the layer"):
        mixer(tokens)


@pytest.mark.parametrize("build", [SS2D, PlainMamba])
def test_pictures_are_scanned_in_float32_under_autocast(build):
    """With all that is computed of the tokens on the way to the scan."""
    mixer, x = build(8, grid_size=(3, 4)), torch.randn(2, 12, 16)
    expected = mixer.scan(x.bfloat16().float(), (3, 4))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(mixer.scan(x.bfloat16(), (3, 4)), expected)


def test_the_tables_in_the_docs_have_every_option():
    pages = [(ROOT / "docs" / name).read_text() for name in ("operator.md", "mixers.md")]
    rows = [line for page in pages for line in page.splitlines() if line.startswith("|")]
    named = set(re.findall(r"`(--[a-z0-9-]+)", "\n".join(rows)))
    assert declared_flags() | {"--mixer"} == named | {"--mixer"}


class Blur(Attention):
    """Attention with an option that no weight tells and one that its weights do."""

    def __init__(self, dim, num_heads=8, qkv_bias=False, times=1, wide=False):
        super().__init__(dim, num_heads=num_heads, qkv_bias=qkv_bias)
        self.times, self.extra = times, torch.nn.Linear(dim, 2 * dim if wide else dim)

    def forward(self, tokens):
        for _ in range(self.times):
            tokens = (tokens + tokens.roll(1, 1)) / 2
        return tokens + 0 * self.extra(tokens).sum()


def read(weights):
    return dict(wide=len(weights["extra.bias"]) > weights["extra.weight"].shape[1]) if "extra.weight" in weights else None


def test_options_of_a_class_are_those_that_it_names_unless_it_takes_any():
    assert build_mixer(Blur, 16, 4, (4, 4), 0, times=2).times == 2
    with pytest.raises(ValueError, match=r"has no option time$"):
        build_mixer(Blur, 16, 4, (4, 4), 0, time=2)
    assert build_mixer(PDESSMBlock, 16, 4, (2, 8), 0, gate=True).grid_size == (2, 8)
    with pytest.raises(TypeError, match="time"):
        build_mixer(PDESSMBlock, 16, 4, (4, 4), 0, time=2)


@pytest.fixture
def blur(monkeypatch):
    options = (Option("times", "how often", dict(type=positive)), Option("wide", "more", dict(action="store_true")))
    monkeypatch.setattr(mixers, "KINDS", (Mixer("blur", Blur, read, options), *KINDS))
    monkeypatch.setitem(MIXERS, "blur", Blur)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_mixer_declares_what_its_weights_do_not_tell(kind):
    """A network's other weights tell two more: DiT's table of positions, and in which blocks attention is."""
    with torch.device("meta"):
        told = kind.read(build_mixer(next(iter(kind.named)), 24, 3, (4, 4), 0).state_dict()).keys()
    told |= kind.told_as.keys() | {"positions", "attention_every"}
    assert {option.name for option in kind.options if option.told} == {option.name for option in kind.options} & told


def test_a_declaration_is_all_that_a_new_mixer_needs(tmp_path, blur):
    """From flags through training to samples; the option that weights do not tell comes from the checkpoint's settings."""
    flags = ["--max-steps", 1, "--global-batch-size", 8, "--mixer", "blur", "--blur-times", 3, "--blur-wide"]
    path = fit(tmp_path / "r", *flags) / "checkpoints" / "0000001.pt"
    model, settings = load_model(path, {}, "ema")
    assert (settings["mixer"], settings["mixer_options"]) == ("blur", dict(wide=True, times=3))
    assert model.blocks[0].attn.times == 3
    assert draw(path, tmp_path / "a.png", "--class-labels", 3).shape == (64, 64, 3)


def test_the_flags_of_another_mixer_are_named(blur):
    args = train.parse_args([*QUICK, "--mixer", "pdessm", "--blur-times", "2", "--pde-gate"])
    with pytest.raises(ValueError, match=r"^--blur-times means nothing to --mixer pdessm$"):
        mixer_options(args.mixer, vars(args))


class Ordered(Blur):
    def __init__(self, *sizes, **options):
        super().__init__(*sizes, **options)
        self.register_buffer("order", torch.arange(4))


def test_weights_that_no_command_could_read_are_refused_before_training(tmp_path, blur, monkeypatch):
    """Blur has the names of attention, too, which is asked first here."""
    train_blur = partial(fit, tmp_path / "r", "--max-steps", 1, "--global-batch-size", 8, "--mixer", "blur")
    monkeypatch.setattr(mixers, "KINDS", (*KINDS, mixers.KINDS[0]))
    with pytest.raises(ValueError, match="DiT-N/4 with the mixer blur would be taken for those of DiT-N/4 with attention: see"):
        train_blur()
    monkeypatch.setattr("models.BACKBONES", ())
    with pytest.raises(ValueError, match="would be taken for those of no network with blur: see"):
        train_blur()
    monkeypatch.setitem(MIXERS, "blur", Ordered)
    with pytest.raises(ValueError, match=r"^blocks\.0\.attn\.order is torch\.int64, .*: register .* with persistent=False$"):
        train_blur()
    assert not (tmp_path / "r").exists()
