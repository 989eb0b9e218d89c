"""A network as samplers run it: compiled, in half precision, with the operator's kernels."""

import os
import shutil
import sys
from functools import partial

import numpy as np
import pytest
import torch

import pde_ssm
import pde_ssm_kernels
import sample
import sample_ddp
import train
from commands import FEW_STEPS, QUICK, draw, draw_many, fit
from diffusion import create_objective
from diffusion.drawing import generate
from diffusion.guidance import Guidance
from diffusion.noise import PerImageNoise
from diffusion.samplers import FLOW_SAMPLERS, SAMPLERS
from machine.precision import PRECISIONS
from machine.processes import launch
from mixers.running import prepare_to_sample
from models import MODELS, DiT_models
from on_gpu import CUDA
from pde_ssm_kernels import gpu

CPU = torch.device("cpu")
PLAIN = dict(precision="fp32", compile=False, backend="torch", deterministic=False)
INTERVAL = (0.3, 0.7)


@pytest.fixture(autouse=True)
def one_layer(monkeypatch):
    """Is enough, and compiles fast."""
    for models in (MODELS, DiT_models):
        monkeypatch.setitem(models, "DiT-N/4", partial(models["DiT-N/4"], depth=1))
    monkeypatch.setitem(MODELS, "DiS-N/4", partial(MODELS["DiS-N/4"], depth=2))
    monkeypatch.setitem(MODELS, "UNet-N", partial(MODELS["UNet-N"], channels=(32,), layers=1, attention_levels=(0,)))


class Pixels:
    """Keeps the samples as they were before they became 8-bit pixels."""

    factor = 1

    def decode(self, x):
        assert x.dtype == torch.float32
        assert not torch.is_autocast_enabled("cpu")
        self.kept = x
        return x


def build(randomize, name="DiT-N/4", learn_sigma=True, **options):
    torch.manual_seed(1)
    model = MODELS[name](input_size=8, in_channels=3, num_classes=10, learn_sigma=learn_sigma, **options)
    return randomize(model).eval().requires_grad_(False)


def test_a_network_is_where_it_warms_up(randomize):
    """Commands load it on the CPU."""
    model = build(randomize)
    prepare_to_sample(model, torch.device("meta"), **PLAIN)
    assert {p.device.type for p in model.parameters()} == {"meta"}


def samples(model, sampler, *guidance, n=2, steps=4):
    """What a sampler makes of the model, as float32."""
    objective = create_objective("flow" if sampler in FLOW_SAMPLERS else "diffusion", steps)
    device = next(model.parameters()).device
    space, labels = Pixels(), torch.arange(n, device=device) % 10
    function = (SAMPLERS | FLOW_SAMPLERS)[sampler]
    noise = PerImageNoise(range(n), device)
    generate(model, space, objective, function, labels, noise, Guidance(*guidance), progress=False)
    return space.kept


@pytest.mark.parametrize(
    ("sampler", "guidance", "model", "times"),
    [
        ("ddim", [2.0], dict(), 1),
        ("dpm-solver", [1.0], dict(mixer="pdessm"), 1),
        ("heun", [2.0, None, INTERVAL], dict(mixer="pdessm", conditioned=True), 2),
        ("ddim", [2.0], dict(name="UNet-N"), 1),
        ("heun", [1.0], dict(name="DiS-N/4"), 1),
    ],
)
def test_compiled_samples_are_the_plain_ones(randomize, compilations, sampler, guidance, model, times):
    """Guidance doubles the batch, so guidance on a part of the way takes two sizes of batches; they are compiled once."""
    model = build(randomize, learn_sigma=sampler in SAMPLERS, **model)
    plain = samples(model, sampler, *guidance)
    prepare_to_sample(model, CPU, **PLAIN | dict(compile=True))
    torch.testing.assert_close(samples(model, sampler, *guidance), plain, rtol=1e-4, atol=1e-5)
    assert compilations.frame_count == times


def test_a_smaller_last_batch_is_compiled_too(tmp_path, checkpoint, compilations):
    flags = ["--num-fid-samples", 7, "--per-proc-batch-size", 4]
    plain = draw_many(checkpoint(), tmp_path / "plain", *flags)
    compiled = draw_many(checkpoint(), tmp_path / "compiled", *flags, "--compile")
    assert np.abs(compiled.astype(int) - plain).max() <= 1
    assert compilations.frame_count == 2


@pytest.mark.parametrize("backend", ["default", "torch"])
def test_a_compiled_network_computes_symbols_once(randomize, compilations, monkeypatch, backend):
    model, calls = build(randomize, mixer="pdessm"), []
    tau = pde_ssm.Diagonal.tau
    monkeypatch.setattr(pde_ssm.Diagonal, "tau", lambda pde: calls.append(pde) or tau(pde))
    prepare_to_sample(model, CPU, **PLAIN | dict(compile=True, backend=backend))
    for _ in range(2):
        samples(model, "ddim", 2.0, None, INTERVAL)
    assert len(calls) == len(model.blocks)


@CUDA
@pytest.mark.gpu
@pytest.mark.parametrize("sampler", ["dpm-solver", "heun", "rk45"])
def test_cuda_graphs_draw_the_same(randomize, sampler):
    if sampler == "dpm-solver":
        pytest.importorskip("diffusers")
    device = torch.device("cuda", 0)
    model = build(randomize, learn_sigma=sampler in SAMPLERS, mixer="pdessm").to(device)
    plain = samples(model, sampler, 2.0, None, INTERVAL)
    prepare_to_sample(model, device, **PLAIN | dict(compile=True))
    torch.testing.assert_close(samples(model, sampler, 2.0, None, INTERVAL), plain, rtol=1e-3, atol=1e-3)
    torch.compiler.reset()


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="torch.compile needs a C++ compiler on CPUs")
@pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex operators")
@torch.no_grad()
def test_a_pde_compiled_to_the_end_is_the_same():
    """Alone, for a whole network takes half a minute."""

    class Mixer(pde_ssm.PDESSM):
        def forward(self, x, t, y):
            return super().forward(x).sin()

    model, x = Mixer(8).eval(), torch.randn(2, 8, 4, 6)
    plain = model(x, None, None)
    prepare_to_sample(model, CPU, **PLAIN | dict(compile=True))
    compiled = model(x, None, None)
    torch.compiler.reset()
    torch.testing.assert_close(compiled, plain)


@pytest.mark.parametrize(("precision", "bound"), [("bf16", 0.02), ("fp16", 0.003)])
@pytest.mark.parametrize("mixer", ["attention", "pdessm"])
@torch.no_grad()
def test_half_precision_is_near_full(randomize, mixer, precision, bound):
    """Output and guidance are float32, of half-precision products; so far off are samples after 10 steps, of a range of 2."""
    model = build(randomize, mixer=mixer)
    x, t, y = torch.randn(4, 3, 8, 8), torch.full((4,), 500), torch.tensor([1, 2, 10, 10])
    plain, drawn = (model(x, t, y), model.forward_with_cfg(x, t, y, 2.0)), samples(model, "ddim", 2.0, steps=10)
    prepare_to_sample(model, CPU, **PLAIN | dict(precision=precision))
    for out, expected in zip((model(x, t, y), model.forward_with_cfg(x, t, y, 2.0)), plain):
        assert out.dtype == torch.float32
        assert 0 < (out - expected).abs().max() < bound * expected.abs().max()
    assert not torch.equal(out, out.to(PRECISIONS[precision]).float())     # guidance is not rounded
    assert (samples(model, "ddim", 2.0, steps=10) - drawn).abs().mean() < bound
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--compile"], "--compile needs a C\\+\\+ compiler on CPUs and finds no /no/compiler"),
        (["--pde-backend", "triton"], "--pde-backend triton: its kernels are not for .* on cpu; --pde-backend auto takes"),
    ],
)
@pytest.mark.parametrize("command", [train, sample, sample_ddp])
def test_what_a_machine_cannot_do_ends_in_one_line(tmp_path, monkeypatch, checkpoint, command, flags, message):
    """Before anything is written."""
    monkeypatch.setenv("CXX", "/no/compiler")
    monkeypatch.setattr(gpu, "INTERPRETED", False)
    inputs = [*QUICK, "--mixer", "pdessm", "--max-steps", "1"] if command is train else ["--ckpt", checkpoint(), *FEW_STEPS]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message) as end:
        launch(command.main, command.parse_args([*inputs, *flags]))
    assert "\n" not in str(end.value)
    assert [path.suffix for path in tmp_path.iterdir()] == [".pt"] * (command is not train)


def test_without_triton_there_are_no_kernels(randomize, monkeypatch):
    monkeypatch.setitem(sys.modules, "pde_ssm_kernels.gpu", None)
    monkeypatch.delattr("pde_ssm_kernels.gpu")
    settings = PLAIN | dict(backend="triton")
    with pytest.raises(ValueError, match=r"--pde-backend triton: its kernels are not installed; --pde-backend auto"):
        prepare_to_sample(build(randomize, mixer="pdessm"), CPU, **settings)
    prepare_to_sample(build(randomize), CPU, **settings)  # attention needs none


def test_the_backend_is_of_the_machine_and_not_of_the_model(tmp_path, monkeypatch, checkpoint):
    """It is no option of the mixer, and a run goes on with another."""
    monkeypatch.setattr(gpu, "INTERPRETED", False)
    path = checkpoint()
    plain = draw(path, tmp_path / "a.png")
    assert np.array_equal(draw(path, tmp_path / "a.png", "--pde-backend", "auto"), plain)
    assert pde_ssm_kernels.backend() == "auto"
    flags = ["--mixer", "attention", "--global-batch-size", 8, "--resume", "auto", "--max-steps"]
    fit(tmp_path / "r", *flags, 1)
    assert pde_ssm_kernels.backend() == "default"
    folder = fit(tmp_path / "r", *flags, 2, "--pde-backend", "auto")
    assert pde_ssm_kernels.backend() == "auto"
    assert (folder / "checkpoints" / "0000002.pt").exists()
    log = (folder / "log.txt").read_text()
    assert "--pde-backend was" not in log
    assert "The last bits may differ from those of a run that was not stopped: backend default is now auto" in log
