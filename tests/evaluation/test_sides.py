"""What a network makes of each side: in any batches, on any number of processes, in little memory."""

import tracemalloc

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

import evaluate
from commands import Colours, in_forks
from evaluation import report, sides
from evaluation.metrics import Statistics
from evaluation.report import compare
from evaluation.sides import measure, open_source
from machine.precision import allow_tf32
from machine.processes import ALONE, Processes
from training import probe

pytestmark = pytest.mark.usefixtures("one_thread")


def in_processes(size, run, folder):
    """Calls run(processes) in so many of them."""

    def join(rank):
        if size > 1:
            dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
        run(Processes(rank, size, torch.device("cpu")))
        if size > 1:
            dist.destroy_process_group()

    assert in_forks(size, join) == [0] * size


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("batch", [1, 7, 64])
def test_batches_and_processes_change_nothing(tmp_path, random_images, batch, size):
    arrays = random_images(150), random_images(130, 0.8)
    network = Colours()

    def run(processes):
        sides = [measure(open_source(array, network), network, processes, batch) for array in arrays]
        if processes.rank == 0:
            torch.save((sides[0].pool, compare(*sides, network)), tmp_path / "results.pt")

    in_processes(size, run, tmp_path)
    pool, results = torch.load(tmp_path / "results.pt")
    whole = [measure(open_source(array, network), network, batch_size=len(array)) for array in arrays]
    torch.testing.assert_close(pool, whole[0].pool)
    assert list(results) == ["Inception Score", "FID", "sFID", "Precision", "Recall"]
    assert results == pytest.approx(compare(*whole, network), rel=1e-4)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("features", ["pool", "spatial"])
def test_features_that_are_not_finite_end_every_process(tmp_path, random_images, features, size):
    array = random_images(9)
    array[6] = 0

    class Overflowing(Colours):
        def forward(self, images):
            found = super().forward(images)
            found[features][(images == 0).flatten(1).all(1)] = torch.inf
            return found

    def run(processes):
        with pytest.raises(ValueError, match=r"memory: features of (image 6|an image) are not finite in inception"):
            measure(open_source(array, Overflowing()), Overflowing(), processes, 2)

    in_processes(size, run, tmp_path)


def test_some_of_the_images_are_evenly_spread(random_images):
    assert sides.evenly_spread(10, 4) == [0, 2, 5, 7]
    assert sides.evenly_spread(4) == [0, 1, 2, 3]
    array = random_images(10)
    side = measure(open_source(array, Colours(), num=4, part=slice(1, None, 2)), Colours())
    whole = measure(open_source(array, Colours()), Colours())
    torch.testing.assert_close(side.pool, whole.pool[[2, 7]])


def test_fewer_images_than_processes(tmp_path, random_images):
    few, many = (open_source(random_images(n), Colours()) for n in (2, 9))
    three = Processes(1, 3, torch.device("cpu"))
    with pytest.raises(ValueError, match="the 2 images of images in memory are fewer than the 3 processes"):
        report.look_ahead(many, few, Colours(), three)
    with pytest.raises(ValueError, match="takes at least 2, and 1 for each of 3 processes; images in memory holds 2 images"):
        sides.make_reference(few, tmp_path / "ref.npz", Colours(), three)


def test_one_process_opens_a_data_set_before_the_others(tmp_path, monkeypatch):
    """For it may have to join the files first, once."""
    done = []

    class Noted(Processes):
        def barrier(self):
            done.append("wait")

    monkeypatch.setattr(evaluate, "open_network", lambda *_: Colours())
    monkeypatch.setattr(evaluate, "open_source", lambda *_: done.append("open") or evaluate.Source("a", None, [], {}, None))
    monkeypatch.setattr(evaluate, "make_reference", lambda *_: None)
    args = evaluate.parse_args(["--make-ref", str(tmp_path), str(tmp_path / "a.npz")])
    for rank in range(2):
        evaluate.main(args, Noted(rank, 2, torch.device("cpu")))
    assert done == ["open", "wait", "wait", "open"]


def test_images_of_several_sizes_keep_their_order(tmp_path, random_images):
    array = random_images(7)
    for number, image in enumerate(array):
        size = (6, 6) if number % 3 else (12, 12)
        Image.fromarray(image).resize(size, Image.Resampling.NEAREST).save(tmp_path / f"{number}.png")
    side = measure(open_source(tmp_path, Colours()), Colours(), batch_size=4)
    same = measure(open_source(array, Colours()), Colours())
    torch.testing.assert_close(side.pool[:, :3], same.pool[:, :3])  # enlarging keeps the mean colour


def test_a_reference_of_an_npz_with_statistics_is_of_its_images(tmp_path, random_images):
    np.savez(tmp_path / "a.npz", arr_0=random_images(20), mu=np.zeros(6), sigma=np.eye(6))
    source = open_source(tmp_path / "a.npz", Colours())
    sides.make_reference(source, tmp_path / "ref.npz", Colours(), ALONE)
    with np.load(tmp_path / "ref.npz") as arrays:
        assert int(arrays["count"]) == 20
        assert arrays["mu"].min() > 0


class NeverAsked(Colours):
    def forward(self, images):
        raise AssertionError("the features are in the file")


def test_features_in_a_reference_are_not_computed_again(tmp_path, random_images, monkeypatch):
    monkeypatch.setattr(sides, "STORED", 10)
    source = open_source(random_images(20), Colours())
    computed = measure(source, Colours())
    sides.make_reference(source, tmp_path / "ref.npz", Colours(), ALONE)
    read = measure(open_source(tmp_path / "ref.npz", Colours()), NeverAsked())
    torch.testing.assert_close(read.pool, computed.pool[::2], rtol=0, atol=0)
    assert (read.sizes, read.counted, read.shown) == ({(6, 6)}, 20, 10)
    with pytest.raises(AssertionError, match="in the file"):  # statistics of the chosen have to be computed
        measure(open_source(tmp_path / "ref.npz", Colours(), num=4), NeverAsked())


@pytest.mark.parametrize(
    ("pool", "message"),
    [
        (np.zeros((9, 6), np.float32), r"pool of .* is float32 \(9, 6\); features of its images are float32 \(8, 6\)"),
        (np.zeros((8, 6)), r"is float64 \(8, 6\); features of its images are float32"),
        (np.full((8, 6), np.nan, np.float32), "pool of .* holds numbers that are not finite"),
        (np.array([None]), "cannot read the features .pool. in .*Python objects"),
    ],
    ids=["rows", "type", "nan", "objects"],
)
def test_other_features_in_a_reference_are_refused(tmp_path, random_images, pool, message):
    np.savez(tmp_path / "ref.npz", arr_0=random_images(8), mu=np.zeros(6), sigma=np.eye(6), pool=pool)
    with pytest.raises((ValueError, OSError), match=message):
        open_source(tmp_path / "ref.npz", Colours())


def test_memory_grows_with_features_only(tmp_path):
    """A thousand images of 64 x 64 (12 MB) pass through in far less."""
    np.savez(tmp_path / "a.npz", arr_0=np.zeros((1000, 64, 64, 3), np.uint8))
    tracemalloc.start()
    measure(open_source(tmp_path / "a.npz", Colours()), Colours(), batch_size=10)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3e6


@pytest.mark.parametrize(
    "compute",
    [
        lambda images, network: measure(open_source(images, network), network),
        lambda images, network: probe.add(Statistics(), images, network, ALONE),
    ],
    ids=["evaluation", "probe"],
)
def test_features_are_computed_without_tf32_with_which_training_goes_on(random_images, compute):
    seen = []

    class Noting(Colours):
        def forward(self, images):
            seen.append((torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()))
            return super().forward(images)

    allow_tf32(True)
    compute(random_images(3), Noting())
    assert seen == [(False, "highest")]
    assert (torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()) == (True, "high")


class WithLastLayer(Colours):
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(6, 9)


def test_a_network_is_on_the_device_of_features_that_it_need_not_compute(tmp_path, random_images):
    """Its last layer makes probabilities of them."""
    sides.make_reference(open_source(random_images(20), Colours()), tmp_path / "ref.npz", Colours(), ALONE)
    network = WithLastLayer()
    side = measure(open_source(tmp_path / "ref.npz", network), network, Processes(0, 1, torch.device("meta")))
    assert side.pool.device == network.fc.weight.device == torch.device("meta")
