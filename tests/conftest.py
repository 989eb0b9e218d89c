import os

os.environ["HF_HUB_OFFLINE"] = "1"  # no test reaches for a hub; read when huggingface_hub is imported, as models.py does
# Tests run side by side, one thread each, and threads that wait leave the processor to others; read when torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import json
import logging
import signal
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import pde_ssm
from checkpoints.build import save_checkpoint
from commands import write_photos
from machine import stops
from mixers import selective_scan_cpu
from models import MODELS
from pde_ssm_kernels import cpu

# Triton's kernels run in its interpreter where there is no GPU, which is decided where they are defined: here, and not at the
# import of Triton's own.
os.environ |= {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
with suppress(ImportError):
    from pde_ssm_kernels import gpu  # noqa: F401
os.environ.pop("TRITON_INTERPRET", None)

HERE = Path(__file__).parent
signal.signal(signal.SIGINT, signal.default_int_handler)  # which shells have ignored by what they start in the background
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and nohup this


@pytest.fixture
def golden():
    """golden(name): the arrays of tests/golden/<name> as tensors, or its JSON."""

    def load(name):
        path = HERE / "golden" / name
        if path.suffix == ".json":
            return json.loads(path.read_text())
        with np.load(path) as arrays:
            return {key: torch.from_numpy(arrays[key]) if arrays[key].dtype.kind in "iuf" else arrays[key] for key in arrays}

    return load


@pytest.fixture(scope="session")
def randomize():
    """randomize(model): gives every trainable parameter that is all zeros random values, without which adaLN-Zero's
    blocks are the identity."""

    def fill(model):
        generator = torch.Generator().manual_seed(7)
        for parameter in model.parameters():
            if parameter.requires_grad and not parameter.any():
                parameter.data.normal_(std=0.1, generator=generator)
        return model

    return fill


@pytest.fixture
def checkpoint(tmp_path, randomize):
    """The path of an untrained model whose samples depend on everything."""

    def write(mixer="pdessm", num_classes=10, name="a.pt", objective="diffusion"):
        torch.manual_seed(1)
        options = dict(num_classes=num_classes, learn_sigma=objective == "diffusion", mixer=mixer)
        state = randomize(MODELS["DiT-N/4"](input_size=8, in_channels=3, **options)).state_dict()
        args = dict(model="DiT-N/4", mixer=mixer, vae="none", num_classes=num_classes, image_size=8, objective=objective)
        save_checkpoint(tmp_path / name, model=state, ema=state, opt={}, args=args)
        return str(tmp_path / name)

    return write


@pytest.fixture
def photos(tmp_path):
    return write_photos(tmp_path / "photos")


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def random_images(rng):
    """random_images(n, brightness): uint8 (n, 6, 6, 3)."""

    def draw(n, brightness=1.0):
        tints = rng.uniform(0.3, brightness, size=(n, 1, 1, 3))
        return (255 * tints * rng.uniform(0.5, 1, size=(n, 6, 6, 3))).astype(np.uint8)

    return draw


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def shallow():
    """Two layers of the smallest models are enough to stop and go on, and a kill takes no disk along."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        for name in ("DiT-N/8", "DiS-N/4"):
            patch.setitem(MODELS, name, partial(MODELS[name], depth=2))
        yield


@pytest.fixture(scope="module")
def one_thread():
    """For what is compared with a fork to the bit: a fork has one thread, and sums may depend on how many there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def threads():
    """torch.set_num_threads, for this test alone."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def compilations(monkeypatch):
    """torch.compile without its last stage, which takes most of a minute and a C++ compiler; `frame_count` is how often it
    compiled something."""
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter, fullgraph=True))
    monkeypatch.setenv("CXX", sys.executable)
    yield counter
    torch.compiler.reset()


@pytest.fixture(autouse=True, scope="session")
def kernels():
    """Built before a test names another compiler."""
    cpu.built()
    selective_scan_cpu.built()


@pytest.fixture(autouse=True)
def default_backend():
    yield
    pde_ssm.set_backend("default")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def default_signals():
    """launch() leaves them as the end of a process needs them."""
    before = {number: signal.getsignal(number) for number in [*stops.STOPS, signal.SIGCHLD]}
    with stops.postponed(wait=False):
        yield
        for number, handler in before.items():
            signal.signal(number, handler)
        stops.received.clear()


@pytest.fixture(autouse=True)
def fresh_log():
    yield
    for handler in logging.getLogger("train").handlers[:]:
        handler.close()
        logging.getLogger("train").removeHandler(handler)
