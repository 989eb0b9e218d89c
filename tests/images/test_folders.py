"""Which files are images, which folders are classes, and what becomes of a file."""

import io
import os
import shutil
import socket
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, features
from PIL.PngImagePlugin import PngInfo
from PIL.TiffImagePlugin import IFDRational

from images import folders
from images.dataset import load_dataset
from images.folders import ENDINGS, Folder, describe_classes, read_image
from images.samples import FolderImages


def write(path, size=(6, 5), seed=0, **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))
    image.save(path, **how)
    return image


@pytest.fixture
def photos(tmp_path):
    """Two classes of two images each."""
    for number, name in enumerate(("a/0.png", "a/1.png", "b/0.png", "b/deep/er/1.png")):
        write(tmp_path / "photos" / name, seed=number)
    return tmp_path / "photos"


def images_of(folder, labelled=True):
    source = Folder(folder, labelled)
    return [os.path.relpath(path, folder) for path in source.paths], source.labels, source.classes


PLAIN = (["a/0.png", "a/1.png", "b/0.png", "b/deep/er/1.png"], [0, 0, 1, 1], ["a", "b"])


def hidden(folder):
    for name in (".ipynb_checkpoints/0.png", "__MACOSX/a/0.png", "a/@eaDir/0.png/x.png", "lost+found/1.png", "b/.hidden/1.png"):
        write(folder / name)
    for name in ("a/._0.png", "a/.DS_Store", "b/.DS_Store", "b/Thumbs.db", "desktop.ini"):
        (folder / name).write_bytes(b"x")
    return "10 hidden or of the system (2 .DS_Store, ._0.png, .hidden, ...)"


def other_endings(folder):
    for name in ("a/0.txt", "a/1.TXT", "b/0.heic", "b/deep/read.me", "labels.csv", "b/README"):
        (folder / name).write_bytes(b"x")
    return "6 with other endings (2 .txt, 1 .csv, 1 .heic, ...)"


def linked_twice(folder):
    """Loops, a link to a file and one to that link, and two to one folder, of which one is a class."""
    (folder / "a" / "up").symlink_to("..")
    (folder / "a" / "top").symlink_to("../..")
    (folder / "b" / "deep" / "er" / "self").symlink_to(".")
    (folder / "a" / "2.png").symlink_to("../b/0.png")
    (folder / "b" / "again.png").symlink_to("../a/2.png")
    (folder / "c").symlink_to("a")
    (folder / "b" / "also").symlink_to("deep")
    return "7 linked to what is there already (a/2.png, a/top, a/up, ...)"


def dangling(folder):
    (folder / "a" / "gone.png").symlink_to("nowhere.png")
    (folder / "b" / "ring").symlink_to("ring")
    return "2 linked to nothing (a/gone.png, b/ring)"


def special(folder):
    os.mkfifo(folder / "a" / "pipe.png")
    with socket.socket(socket.AF_UNIX) as listener:
        before = os.getcwd()
        os.chdir(folder / "b")  # the path of a socket is short
        listener.bind("socket.png")
        os.chdir(before)
    return "2 neither file nor folder (a/pipe.png, b/socket.png)"


def beside(folder):
    write(folder / "loose.png")
    return "1 beside the class folders (loose.png)"


@pytest.mark.parametrize("add", [hidden, other_endings, linked_twice, dangling, special, beside], ids=lambda f: f.__name__)
def test_what_is_no_image_of_its_own_is_left_out_and_counted(photos, add):
    assert Folder(photos).remarks == []
    remark = add(photos)
    assert images_of(photos) == PLAIN
    assert Folder(photos).remarks == load_dataset(str(photos), 4).remarks == [f"Left out of {photos}: {remark}"]
    paths, labels, _ = images_of(photos, labelled=False)
    assert paths == sorted(PLAIN[0] + (["loose.png"] if add is beside else []), key=os.path.split)
    assert labels == [0] * len(paths)
    seen = FolderImages(str(photos))
    assert (len(seen), seen.remarks) == (len(paths), [] if add is beside else [f"Left out of {photos}: {remark}"])


def test_links_lead_to_images_elsewhere(photos, tmp_path):
    """Every image once, though of the two links to the store one holds the other."""
    store = tmp_path / "store"
    write(store / "x" / "2.png")
    write(store / "3.png")
    (store / "blob").write_bytes((store / "3.png").read_bytes())
    (store / "x" / "back").symlink_to("..")
    (photos / "a" / "one").symlink_to(store / "x")
    (photos / "a" / "two").symlink_to(store)
    (photos / "b" / "9.png").symlink_to(store / "blob")
    (photos / "c").symlink_to(store)
    paths, labels, classes = images_of(photos)
    assert paths == ["a/0.png", "a/1.png", "a/one/2.png", "a/two/3.png", "b/0.png", "b/9.png", "b/deep/er/1.png"]
    assert (labels, classes) == ([0, 0, 0, 0, 1, 1, 1], ["a", "b"])
    (tmp_path / "linked").symlink_to(photos)
    assert images_of(tmp_path / "linked")[0] == paths


def test_the_order_of_images_is_torchvisions(tmp_path):
    from torchvision.datasets import ImageFolder

    for name in ["B/1.png", "B/10.png", "B/2.JPG", "a-b/0.png", "a/z.png", "a/b/0.png", "a/b-c/0.png", "grün/1.png"]:
        write(tmp_path / name)
    theirs, ours = ImageFolder(tmp_path), Folder(tmp_path)
    assert list(zip(ours.paths, ours.labels)) == theirs.samples
    assert ours.classes == theirs.classes


@pytest.mark.parametrize("ending", [".JPEG", ".JPG", ".apng", ".webp", ".bmp", ".tiff", ".gif", ".avif", ".jfif", ".jp2"])
def test_endings_that_are_images(tmp_path, ending):
    if ending == ".avif" and not features.check("avif"):
        assert ending not in ENDINGS
        pytest.skip("this Pillow knows no AVIF")
    image = Image.new("RGB", (32, 32), (200, 100, 50))
    image.save(tmp_path / f"x{ending}")
    (read, label), = Folder(tmp_path, labelled=False)
    assert (read.mode, label) == ("RGB", 0)
    assert np.abs(np.asarray(read).astype(int) - np.asarray(image)).max() < 8


def test_folders_that_cannot_be_classes_are_named(photos):
    (photos / "empty" / "deep").mkdir(parents=True)
    (photos / "notes").mkdir()
    (photos / "notes" / "a.txt").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match=r"the class folders empty, notes of .* hold no images; .* \(1 \.txt\)"):
        Folder(photos)
    with pytest.raises(FileNotFoundError, match=r"deep holds no images$"):
        Folder(photos / "empty" / "deep", labelled=False)


def test_a_folder_that_cannot_be_listed_is_named(photos, monkeypatch):
    def scandir(path, scan=os.scandir):
        if os.path.basename(path) == "er":
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(PermissionError, match="deep/er"):
        Folder(photos)


def test_names_of_classes_are_told(photos, tmp_path):
    assert describe_classes(Folder(photos).classes) == ["Classes: a, b"]
    for number in range(1, 13):
        write(tmp_path / "numbers" / str(number) / "0.png")
        write(tmp_path / "counted" / f"class{number}" / "0.png")
    classes = Folder(tmp_path / "numbers").classes
    assert classes == sorted(map(str, range(1, 13)))
    assert describe_classes(classes) == [
        "Classes: 1, 10, 11, ..., 9",
        "Their numbers are in the order of text: label 1 is 10, not 2",
    ]
    remark = "Their numbers are in the order of text: label 1 is class10, not class2"
    assert describe_classes(Folder(tmp_path / "counted").classes)[1:] == [remark]
    assert describe_classes([f"n{number:08d}" for number in range(1, 13)])[1:] == []
    os.mkdir(bytes(tmp_path / "numbers") + b"/gr\xfcn")  # not UTF-8
    shutil.copy(tmp_path / "numbers" / "1" / "0.png", bytes(tmp_path / "numbers") + b"/gr\xfcn/0.png")
    assert Folder(tmp_path / "numbers").classes[-1] == r"gr\xfcn"


def another(folder):
    write(folder / "a" / "2.png")


def renamed(folder):
    (folder / "b").rename(folder / "c")


def replaced(folder):
    write(folder / "b" / "0.png", size=(9, 9))


@pytest.mark.parametrize("change", [another, renamed, replaced], ids=lambda f: f.__name__)
def test_names_and_sizes_tell_images_from_others(photos, tmp_path, change):
    def known(folder):
        source = Folder(folder)
        return source.names(), source.sizes(range(len(source)))

    moved = shutil.copytree(photos, tmp_path / "elsewhere")
    os.utime(moved / "a" / "0.png", (0, 0))
    assert known(moved) == known(f"{moved}/") == known(photos)
    change(moved)
    assert (known(moved)[0] == known(photos)[0]) == (change is replaced)
    assert (known(moved)[1] == known(photos)[1]) == (change is renamed)


def test_of_many_images_some_sizes_are_looked_up(photos, monkeypatch):
    monkeypatch.setattr("images.dataset.SIZES", 2)
    looked_up, images = [], load_dataset(str(photos), 4)
    monkeypatch.setattr(os, "stat", lambda path, stat=os.stat: looked_up.append(os.path.relpath(path, photos)) or stat(path))
    assert images.fingerprint()["images"] == 4
    assert looked_up == ["a/0.png", "b/0.png"]


def png(depth, colour):
    """A file of 8 x 8 pixels, as Pillow writes none with 16 bits."""
    row = b"\0" + bytes(range(8 * {0: 1, 2: 3, 4: 2, 6: 4}[colour] * depth // 8))
    header = struct.pack(">IIBBBBB", 8, 8, depth, colour, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(8 * row)), (b"IEND", b"")]
    framed = (struct.pack(">I", len(d)) + name + d + struct.pack(">I", zlib.crc32(name + d)) for name, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def tiff(depth):
    """A file of 2 x 2 pixels of three channels, uncompressed."""
    pixels, at = bytes(12 * depth // 8), 8 + 2 + 12 * 9 + 4
    tags = [(256, 2), (257, 2), (258, at), (259, 1), (262, 2), (273, at + 6), (277, 3), (278, 2), (279, len(pixels))]
    table = b"".join(struct.pack("<HHIHH", tag, 3, 3 if tag == 258 else 1, value, 0) for tag, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, 9) + table + bytes(4) + struct.pack("<HHH", depth, depth, depth) + pixels


def saved(image, kind, **how):
    file = io.BytesIO()
    image.save(file, kind, **how)
    return file.getvalue()


def jpeg2000(depth):
    """A codestream whose header says so many bits."""
    stream = bytearray(saved(Image.new("RGB", (8, 8)), "jpeg2000", no_jp2=True))
    stream[42] = depth - 1
    return bytes(stream)


@pytest.mark.parametrize(
    ("contents", "reason"),
    [
        *[(png(16, colour), "bits a channel|mode is I") for colour in (0, 2, 4, 6)],
        (tiff(16), "it has 16 bits a channel, where 8 are needed"),
        (b"P6 1 1 65535\n" + bytes(6), "it has 16 bits a channel"),
        (jpeg2000(12), "it has 12 bits a channel"),
        (saved(Image.fromarray(np.ones((4, 4), np.float32)), "tiff"), "its mode is F, where 8 bits a channel are needed"),
        (saved(Image.fromarray(np.ones((4, 4), np.int32)), "tiff"), "its mode is I, where 8 bits"),
        (png(8, 2)[:60], "image file is truncated|broken"),
        (b"", "it is of no known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "it is of no known format"),  # a program, which never runs
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, contents, reason):
    path = tmp_path / "x.png"
    path.write_bytes(contents)
    with pytest.raises(OSError, match=rf"^cannot read the image {path} \(.*({reason})"):
        read_image(path)


@pytest.mark.parametrize("contents", [*(png(8, colour) for colour in (0, 2, 4, 6)), tiff(8), b"P6 1 1 9\n...", jpeg2000(8)])
def test_eight_bits_a_channel_are_read(contents):
    assert read_image(io.BytesIO(contents)).mode == "RGB"


def test_a_claim_of_too_many_pixels_is_refused(tmp_path, monkeypatch, recwarn):
    assert 14_000**2 < folders.LARGEST <= Image.MAX_IMAGE_PIXELS  # Pillow's default would stop at 13,377 squared
    monkeypatch.setattr(folders, "LARGEST", 90)
    assert [str(warning.message) for warning in recwarn] == []
    write(tmp_path / "large.png", (9, 10))
    write(tmp_path / "larger.png", (9, 11))
    assert read_image(tmp_path / "large.png").size == (10, 9)
    with pytest.raises(OSError, match=r"larger\.png \(it has 99 pixels, more than 90\)"):
        read_image(tmp_path / "larger.png")


HALF = np.zeros((1, 2, 4), np.uint8)
HALF[0, 0] = (200, 100, 50, 0)
HALF[0, 1] = (10, 20, 30, 255)
HALF = Image.fromarray(HALF)
FEW = HALF.convert("RGB").quantize(2)


@pytest.mark.parametrize(
    ("image", "kind", "how"),
    [
        (HALF, "png", {}),
        (HALF, "tiff", {}),
        (HALF, "webp", dict(lossless=True, exact=True)),
        (FEW, "png", dict(transparency=FEW.getpixel((0, 0)))),
        (FEW, "gif", dict(transparency=FEW.getpixel((0, 0)))),
        (FEW, "png", dict(transparency=bytes([0, 255] if FEW.getpixel((0, 0)) == 0 else [255, 0]))),
        (HALF.convert("RGB"), "png", dict(transparency=(200, 100, 50))),
        (HALF.convert("LA"), "png", {}),
    ],
)
def test_transparent_pixels_are_white(image, kind, how):
    transparent, opaque = np.asarray(read_image(io.BytesIO(saved(image, kind, **how))))[0].astype(int)
    assert transparent.tolist() == [255, 255, 255]
    assert np.abs(opaque - np.asarray(image.convert("RGB"))[0, 1]).max() < 2


def test_opaque_pixels_stay_and_half_transparent_ones_mix_with_white():
    pixels = np.full((256, 1, 4), 255, np.uint8)
    pixels[:, 0, :3] = np.arange(256)[:, None]
    assert np.array_equal(read_image(io.BytesIO(saved(Image.fromarray(pixels), "png"))), pixels[..., :3])
    pixels[..., 3] = 51
    mixed = np.asarray(read_image(io.BytesIO(saved(Image.fromarray(pixels), "png"))))
    assert np.abs(mixed - (0.2 * pixels[..., :3] + 0.8 * 255)).max() <= 1


@pytest.mark.parametrize("kind", ["gif", "webp", "png", "tiff"])
def test_an_animation_is_its_first_frame(kind):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    read = read_image(io.BytesIO(saved(frames[0], kind, save_all=True, append_images=frames[1:])))
    assert np.abs(np.asarray(read).astype(int) - (255, 0, 0)).max() < 3


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr"])
@pytest.mark.parametrize("size", [(1, 1), (3, 2)])
def test_other_kinds_of_colour_become_rgb(mode, size):
    image = Image.new("RGB", size, "white").convert(mode)
    kind = {"CMYK": "jpeg", "YCbCr": "jpeg"}.get(mode, "png")
    assert np.array_equal(read_image(io.BytesIO(saved(image, kind))), np.full((*size[::-1], 3), 255))


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    return "jpeg", dict(exif=exif)


def a_zero_denominator():
    exif = Image.Exif()
    exif[0x011A], exif[0x0128] = IFDRational(1, 0), 2
    return "jpeg", dict(exif=exif)


def broken_exif():
    return "jpeg", dict(exif=b"Exif\0\0II*\0" + b"\xff" * 4 + bytes(16))


def broken_xmp():
    packet = b"http://ns.adobe.com/xap/1.0/\0\xa8\xff<x:xmpmeta"
    return "jpeg", dict(extra=b"\xff\xe1" + struct.pack(">H", len(packet) + 2) + packet)


def a_long_text():
    info = PngInfo()
    info.add_text("c", "x" * 3_000_000, zip=True)
    return "png", dict(pnginfo=info)


def a_large_profile():
    return "png", dict(icc_profile=bytes(5_000_000))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize(
    "what", [turned, a_zero_denominator, broken_exif, broken_xmp, a_long_text, a_large_profile], ids=lambda f: f.__name__
)
def test_what_else_a_file_holds_changes_nothing(tmp_path, what):
    """The pixels are those that are stored: not turned, without profiles; training and evaluation see the same."""
    kind, how = what()
    plain = write(tmp_path / "plain" / f"x.{kind}", (12, 9))
    write(tmp_path / "more" / f"x.{kind}", (12, 9), **how)
    assert (tmp_path / "more" / f"x.{kind}").read_bytes() != (tmp_path / "plain" / f"x.{kind}").read_bytes()
    images = [read_image(tmp_path / name / f"x.{kind}") for name in ("plain", "more")]
    assert images[0].size == plain.size
    assert np.array_equal(*images)
    assert np.array_equal(next(FolderImages(str(tmp_path / "more")).read([[0]]))[0], images[0])
