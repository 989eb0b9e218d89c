import math
import re
from pathlib import Path

import pytest
import torch

from machine import cost
from machine.cost import forward_flops, peak_flops, training_flops
from models import MODELS


@pytest.mark.parametrize(
    ("layer", "flops"),
    [
        (lambda x: x @ x, 3 * 2 * 16**3),
        (lambda x: x[0, 0] @ x[0, 0], 2 * 16**3),
        (lambda x: (x + 1j) @ (x + 1j), 4 * 3 * 2 * 16**3),
        (lambda x: torch.fft.irfft2(torch.fft.rfft2(x), s=(16, 16)), 2 * 3 * 2.5 * 256 * 8),
        (lambda x: torch.fft.irfft(torch.fft.rfft(x[..., :15]), n=15), 2 * 3 * 16 * 2.5 * 15 * math.log2(15)),
    ],
)
def test_counts_of_flops(layer, flops):
    assert forward_flops(layer, torch.randn(1, 3, 16, 16)) == pytest.approx(flops, abs=1)


def test_a_training_step_by_hand():
    """DiT of depth 6, D = 96 and 16 tokens: 24 N D^2 of a block's layers (PDE: 18), 4 N^2 D of attention, and the rest."""
    N, D, blocks, images = 16, 96, 6, 5
    whole = dict(attention=24 * N * D**2 + 4 * N**2 * D, pdessm=18 * N * D**2 + 2 * 2.5 * N * math.log2(N) * D)
    for mixer, block in whole.items():
        model = MODELS["DiT-N/2"](input_size=8, in_channels=3, num_classes=10, mixer=mixer)
        model.checkpoint_gradients()
        conditioning = 2 * (256 * D + D * D) + (blocks * 6 + 2) * 2 * D**2
        ends = 2 * N * D * 12 + 2 * N * D * 24
        assert training_flops(model, images) == pytest.approx(3 * images * (blocks * block + conditioning + ends), rel=1e-6)
        assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


@pytest.mark.parametrize("options", [dict(coupling="pairwise"), dict(coupling="coupled"), dict(gate=True, conditioned=True)])
def test_every_pde_and_the_unet_are_counted(options):
    model = MODELS["DiT-N/2"](input_size=8, in_channels=3, num_classes=10, mixer="pdessm", **options)
    assert training_flops(model, 4) > 1.5 * training_flops(model, 2) > 0
    assert training_flops(MODELS["UNet-N"](input_size=8, in_channels=3, num_classes=10), 2) > 0


@pytest.mark.parametrize(
    ("name", "peaks"),
    [
        ("NVIDIA H100 80GB HBM3", (989, 494, 67)),
        ("NVIDIA H100 PCIe", (None, None, None)),
        ("NVIDIA H200", (989, 494, 67)),
        ("NVIDIA H200 NVL", (None, None, None)),
        ("NVIDIA A100-SXM4-80GB", (312, 156, 19.5)),
        ("NVIDIA GeForce RTX 4090 D", (None, None, None)),
    ],
)
def test_what_the_maker_promises(monkeypatch, name, peaks):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    cuda = torch.device("cuda")
    found = peak_flops(cuda, "bf16", True), peak_flops(cuda, "fp32", True), peak_flops(cuda, "fp32", False)
    assert found == tuple(peak and peak * 1e12 for peak in peaks)
    assert peak_flops(cuda, "fp16", False) == found[0]
    assert peak_flops(torch.device("cpu"), "bf16", True) is None


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux has this")
def test_memory_at_its_peak_is_what_the_system_says():
    peak = cost.peak_memory(torch.device("cpu"))
    kilobytes = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]
    assert 1024 * int(kilobytes) == pytest.approx(peak, rel=0.02)
