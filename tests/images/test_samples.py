"""Finished images: the .npz that ADM's evaluator reads, and folders."""

import os
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from images.numbered import gather_npz
from images.samples import ArrayImages, FolderImages, NpzImages, save_grid, write_npz


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (11, 5, 7, 3), dtype=np.uint8)


def everything(source, size):
    return np.concatenate([np.stack(list(b)) for b in source.read([range(i, min(i + size, 11)) for i in range(0, 11, size)])])


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed, lambda path, arr_0: write_npz(path, arr_0, len(arr_0))])
def test_an_npz_is_read_in_any_batches(tmp_path, pixels, save):
    save(tmp_path / "a.npz", arr_0=pixels)
    source = NpzImages(tmp_path / "a.npz")
    assert (len(source), source.shape) == (11, (11, 5, 7, 3))
    for size in (1, 4, 11):
        assert np.array_equal(everything(source, size), pixels)
        assert np.array_equal(everything(ArrayImages(pixels), size), pixels)
    some = list(source.read([[1, 2], [5, 10]]))
    assert np.array_equal(np.concatenate(some), pixels[[1, 2, 5, 10]])


@pytest.mark.parametrize("version", [(2, 0), (3, 0)])
def test_headers_of_other_versions_and_arrays_beside_are_read(tmp_path, pixels, version):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        for name, array in dict(arr_1=np.arange(11), arr_0=pixels).items():
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array(file, array, version)
    assert np.array_equal(everything(NpzImages(tmp_path / "a.npz"), 4), pixels)


def test_what_is_written_follows_adms_conventions(tmp_path, pixels):
    write_npz(tmp_path / "a.npz", iter(pixels), 11, mu=np.arange(3.0))
    with np.load(tmp_path / "a.npz") as arrays:
        assert np.array_equal(arrays["arr_0"], pixels)
        assert np.array_equal(arrays["mu"], [0, 1, 2])
    with zipfile.ZipFile(tmp_path / "a.npz") as archive, archive.open("arr_0.npy") as file:
        assert np.lib.format.read_magic(file) == (1, 0)
        assert np.lib.format.read_array_header_1_0(file) == ((11, 5, 7, 3), False, np.dtype(np.uint8))


def test_nothing_is_written_where_sizes_differ(tmp_path, pixels):
    with pytest.raises(ValueError, match="image 1 is 7 x 5, image 0 5 x 7"):
        write_npz(tmp_path / "a.npz", [pixels[0], pixels[1].transpose(1, 0, 2)], 2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("moment", ["images", "arrays", "disk"])
def test_what_is_interrupted_leaves_the_file_that_was_there(tmp_path, pixels, monkeypatch, moment):
    (tmp_path / "a.npz").write_text("older")

    def stop():
        raise KeyboardInterrupt if moment == "arrays" else OSError(28, "No space left on device")

    class Stopping:
        def __array__(self, *_, **__):
            stop()

    def images():
        yield from pixels
        if moment == "images":
            stop()

    if moment == "disk":
        monkeypatch.setattr(os, "fsync", lambda *_: stop())
    arrays = dict(mu=Stopping()) if moment == "arrays" else {}
    with pytest.raises((OSError, KeyboardInterrupt)) as end:
        write_npz(tmp_path / "a.npz", images(), 11, **arrays)
    assert moment == "arrays" or f"could not write the images {tmp_path}/a.npz: " in str(end.value)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["older"]


def test_reading_takes_the_memory_of_a_batch(tmp_path):
    images = np.zeros((2000, 32, 32, 3), np.uint8)  # 6 MB
    np.savez(tmp_path / "a.npz", arr_0=images)
    tracemalloc.start()
    for _ in NpzImages(tmp_path / "a.npz").read([range(i, i + 50) for i in range(0, 2000, 50)]):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e6


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (dict(images=np.zeros((2, 4, 4, 3), np.uint8)), "has no arr_0, only images"),
        (dict(arr_0=np.full((2, 4, 4, 3), 0.5, np.float32)), r"is float32 from 0\.5 to 0\.5; images are uint8 from 0 to 255"),
        (dict(arr_0=np.zeros((2, 4, 4, 3), np.float16)), r"is float16 from 0 to 0; images are uint8 from 0 to 255"),
        (dict(arr_0=np.zeros((2, 4, 4, 3), np.int64)), "is int64; images are uint8"),
        (dict(arr_0=np.zeros((2, 4, 4, 3), ">u2")), "is >u2; images are uint8"),
        (dict(arr_0=np.zeros((2, 4, 4, 3), bool)), "is bool; images are uint8"),
        (dict(arr_0=np.array([b"", None])), "is object; images are uint8"),
        (dict(arr_0=np.uint8(0)), r"shape \(\); images are"),
        (dict(arr_0=np.zeros((2, 4, 4, 4), np.uint8)), r"shape \(2, 4, 4, 4\); images are \(N, height, width, 3\)"),
        (dict(arr_0=np.zeros((2, 3, 4, 4), np.uint8)), r"shape \(2, 3, 4, 4\); images are \(N, height, width, 3\)"),
        (dict(arr_0=np.zeros((2, 4, 4), np.uint8)), r"shape \(2, 4, 4\)"),
        (dict(arr_0=np.zeros((0, 4, 4, 3), np.uint8)), r"shape \(0, 4, 4, 3\)"),
        (dict(arr_0=np.asfortranarray(np.zeros((2, 4, 4, 3), np.uint8))), "Fortran order"),
    ],
)
def test_an_npz_that_holds_no_images(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        NpzImages(tmp_path / "a.npz")


def test_damaged_files_are_named(tmp_path, pixels):
    np.savez(tmp_path / "a.npz", arr_0=pixels)
    whole = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "a.npz").write_bytes(whole[:600])
    with pytest.raises(OSError, match=r"a\.npz is not an \.npz, or only a part of one"):
        NpzImages(tmp_path / "a.npz")
    (tmp_path / "a.npz").write_bytes(whole[:500] + bytes(50) + whole[550:])
    with pytest.raises(OSError, match=r"arr_0 of .*a\.npz is damaged \(Bad CRC-32"):
        everything(NpzImages(tmp_path / "a.npz"), 4)
    encrypted = bytearray(whole)
    for place in (6, whole.rindex(b"PK\1\2") + 8):  # the flags of the file and of the index
        encrypted[place] |= 1
    (tmp_path / "a.npz").write_bytes(encrypted)
    with pytest.raises(OSError, match=r"arr_0 of .*a\.npz is damaged \(.*encrypted"):
        NpzImages(tmp_path / "a.npz")
    header = dict(descr="|u1", fortran_order=False, shape=(12, 5, 7, 3))  # one more than there are
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive, archive.open("arr_0.npy", "w") as file:
        np.lib.format.write_array_header_1_0(file, header)
        file.write(pixels.tobytes())
    with pytest.raises(OSError, match=r"arr_0 of .*a\.npz is damaged: it has 1,155 bytes of pixels, not 1,260"):
        NpzImages(tmp_path / "a.npz")


def test_a_folder_of_all_kinds_of_images(tmp_path, pixels):
    rgb = Image.fromarray(pixels[0])
    (tmp_path / "deep" / "er").mkdir(parents=True)
    rgb.save(tmp_path / "a.png")
    rgb.convert("L").save(tmp_path / "b.png")
    Image.fromarray(np.concatenate([pixels[0], 0 * pixels[1, ..., :1]], 2)).save(tmp_path / "c.png")  # transparent
    rgb.resize((9, 4)).save(tmp_path / "deep" / "er" / "d.png")
    source = FolderImages(tmp_path)
    (batch,) = source.read([range(4)])
    assert np.array_equal(batch[0], pixels[0])
    assert np.array_equal(batch[1], np.asarray(rgb.convert("L"))[..., None].repeat(3, 2))
    assert np.array_equal(batch[2], np.full((5, 7, 3), 255))
    assert [image.shape for image in batch] == [(5, 7, 3)] * 3 + [(4, 9, 3)]
    cropped = FolderImages(tmp_path, crop=4)
    assert [image.shape for image in next(cropped.read([range(4)]))] == [(4, 4, 3)] * 4


@pytest.mark.parametrize("kind", ["text", "16 bits"])
def test_a_bad_image_in_a_folder_is_named(tmp_path, pixels, kind):
    Image.fromarray(pixels[0]).save(tmp_path / "a.png")
    if kind == "text":
        (tmp_path / "b.png").write_text("no image")
    else:
        Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(tmp_path / "b.png")
    with pytest.raises(OSError, match=r"cannot read the image .*b\.png"):
        list(FolderImages(tmp_path).read([range(2)]))


def test_arrays_that_are_no_images(pixels):
    with pytest.raises(ValueError, match="not float64"):
        ArrayImages(pixels / 255)


def test_large_samples_are_shown_as_they_are(tmp_path):
    images = torch.randint(0, 256, (3, 64, 96, 3), dtype=torch.uint8)
    save_grid(images, tmp_path / "grid.png", columns=2)
    with Image.open(tmp_path / "grid.png") as grid:
        shown = np.asarray(grid)
    assert np.array_equal(shown[2:66, 2:98], images[0])
    assert np.array_equal(shown[68:132, 2:98], images[2])


def test_a_caption_stands_once_above_its_neighbours_and_in_its_room(tmp_path):
    images = torch.full((5, 64, 64, 3), 200, dtype=torch.uint8)
    save_grid(images, tmp_path / "grid.png", 3, ["a name that is longer than one image", *["two of them"] * 3, ""])
    with Image.open(tmp_path / "grid.png") as grid:
        shown = np.asarray(grid.convert("L"))
    assert shown.shape == (2 * (66 + 16) + 2, 3 * 66 + 2)
    dark = [[(shown[y : y + 16, x : x + 62] < 128).any() for x in (2, 68, 134)] for y in (2, 84)]
    assert dark == [[True, True, False], [True, False, False]]
    assert (shown[2:18, 64:68] > 200).all()  # the first is shortened


def test_letters_of_other_alphabets_are_told_apart(tmp_path):
    """Those that a font lacks are all the same box. A name of two lines, which Pillow cannot measure, is written as one."""
    images, names = torch.full((5, 64, 64, 3), 200, dtype=torch.uint8), ["é", "ö", "Я", "λ", "two\nlines"]
    save_grid(images, tmp_path / "grid.png", 5, names)
    with Image.open(tmp_path / "grid.png") as grid:
        shown = np.asarray(grid.convert("L"))
    strips = {shown[2:18, x : x + 62].tobytes() for x in range(2, 332, 66)}
    assert len(strips) == len(names)


def test_the_npz_takes_no_memory(tmp_path):
    """Two thousand images of 3 kB are gathered in well under their 6 MB."""
    folder = tmp_path / "images"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (2000, 32, 32, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{i:06d}.png", compress_level=0)
    tracemalloc.start()
    gather_npz(folder, 2000, (32, 32))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e6
    with np.load(f"{folder}.npz") as arrays:
        assert np.array_equal(arrays["arr_0"], pixels)
