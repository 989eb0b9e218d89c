"""Folders of images: which files are images, which folders are classes, and how a file becomes RGB. One rule for training,
encoding and evaluation; docs/images.md states it."""

import hashlib
import os
import re
from collections import Counter, defaultdict
from functools import lru_cache
from heapq import nsmallest
from pathlib import Path

from PIL import Image, PngImagePlugin, UnidentifiedImageError, features
from torch.utils.data import Dataset

Image.init()
FORMATS = [
    name
    for name in ("JPEG", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "AVIF", "JPEG2000", "PPM", "QOI")
    if name in Image.OPEN and (name != "JPEG2000" or features.check("jpg_2000"))
]
ENDINGS = {ending for ending, name in Image.registered_extensions().items() if name in (*FORMATS, "MPO")} - {".pfm"}
SYSTEM = {"__macosx", "@eadir", "lost+found", "$recycle.bin", "#recycle", "#snapshot", "system volume information",
          "thumbs.db", "ehthumbs.db", "desktop.ini"}  # fmt: skip
LARGEST = 2**28  # pixels of an image, which take 1 GB; a file of a few kilobytes can claim many more

# Pillow's own limits are 89 million pixels, and 1 MB of a text or colour profile, which nothing here uses.
Image.MAX_IMAGE_PIXELS = LARGEST
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY


def read_image(file, name=None):
    """Reads an image, given by its path or as an open file and its name, as RGB: its first frame, not rotated, on white.

    OSError, which names the image, if it cannot be read or has more than LARGEST pixels or 8 bits a channel.
    """
    try:
        with Image.open(file, formats=FORMATS) as image:
            if (pixels := image.width * image.height) > LARGEST:
                raise ValueError(f"it has {pixels:,} pixels, more than {LARGEST:,}")
            if image.mode[0] in "IF":  # converting would clip nearly all of it to white
                raise ValueError(f"its mode is {image.mode}, where 8 bits a channel are needed")
            if (bits := _bits(image)) > 8:  # Pillow would cut them off without a word
                raise ValueError(f"it has {bits} bits a channel, where 8 are needed")
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        reason = (str(error) or type(error).__name__).replace(repr(str(file)), "it")
        if isinstance(error, UnidentifiedImageError):
            reason = "it is of no known format"
        raise OSError(f"cannot read the image {name or printable(file)} ({reason})") from error


def _bits(image):
    """Returns how many bits a channel an open file says it has, if its format may have more than 8; else 8."""
    if image.format == "TIFF":
        return max(image.tag_v2.get(258, (1,)))
    if image.format == "JPEG2000":
        place = image.fp.tell()
        image.fp.seek(0)
        contents = image.fp.read()
        image.fp.seek(place)
        header = contents.find(b"\xff\x4f\xff\x51")  # the codestream begins here, after boxes of any length
        return (contents[header + 42] & 127) + 1 if header >= 0 else 8  # of the first channel
    if image.format in ("PNG", "PPM"):
        how = image.tile[0][3]  # a raw mode, such as RGB;16B; for PPM perhaps with the largest value
        return 16 if ";16" in how else how[-1].bit_length() if isinstance(how, tuple) else 8
    return 8


def digest(contents):
    """Returns sixteen hexadecimal digits that tell bytes from others."""
    return hashlib.sha256(contents).hexdigest()[:16]


def hidden(name):
    """Returns whether a file or folder is hidden or the system's, and so not data."""
    return name[0] == "." or name.lower() in SYSTEM


def printable(path):
    """Returns a file's name decoded as UTF-8 whatever the locale, with undecodable bytes escaped."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


class Folder(Dataset):
    """Reads the images of a folder, at any depth, as (RGB image, class). With `labelled` every folder in it is a class, in the
    order of their names as text, and images beside them are left out; without it all images are of class 0.

    Hidden and system files are left out, links are followed, every file counts once, and nothing but regular files is opened.
    remarks: lines that say what was left out. FileNotFoundError if there are no images, or a class has none.
    """

    def __init__(self, root, labelled=True):
        self.root = str(Path(root))
        found, left_out = _walk(self.root, labelled)
        self.remarks = _remarks(self.root, left_out)
        classes = sorted({label for label, _, _, _ in found if label is not None})
        if labelled and not classes:
            raise FileNotFoundError(f"{root} has no class folders; --uncond trains on images without classes")
        numbers = {label: number for number, label in enumerate(classes)}
        self.classes, self.paths, self.labels = [printable(label) for label in classes], [], []
        for label, folder, _, names in sorted(found, key=lambda item: (item[0] or "", item[1])):
            prefix = os.path.join(folder, "")
            self.paths += [prefix + name for name in sorted(names)]
            self.labels += [numbers.get(label, 0)] * len(names)
        if empty := [self.classes[number] for number in sorted({*numbers.values()} - {*self.labels})]:
            raise FileNotFoundError("; ".join([f"the class folders {listed(empty)} of {root} hold no images", *self.remarks]))
        if not self.paths:
            raise FileNotFoundError("; ".join([f"{root} holds no images", *self.remarks]))

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return read_image(self.paths[index]), self.labels[index]

    def names(self):
        """Returns a digest of the names of all images within the folder, their classes' among them."""
        return digest(os.fsencode("\0".join(path[len(self.root) :] for path in self.paths)))

    def sizes(self, numbers):
        """Returns a digest of the sizes of the files of these images."""
        return digest(b" ".join(b"%d" % os.stat(self.paths[number]).st_size for number in numbers))


def _walk(root, labelled):
    """Returns ([(class, folder, its real path, names of its images)], what was left out: {why: Counter of names}).

    Links are followed last, so that of a file and a link to it, the link is left out.
    """
    top = os.path.realpath(root)
    folders, found, seen, left_out = [(None, root, top)], [], set(), defaultdict(Counter)
    folder_links, file_links = [], []

    def leave_out(why, path):
        left_out[why][printable(os.path.relpath(path, root))] += 1

    while folders:
        label, folder, real = folders.pop()
        if real in seen:
            leave_out("linked to what is there already", folder)
        else:
            seen.add(real)
            names, outside = [], labelled and folder == root
            found.append((label, folder, real, names))
            with os.scandir(folder) as entries:  # entries know what they are, so that only links are looked up
                for entry in entries:
                    name = entry.name
                    if hidden(name):
                        left_out["hidden or of the system"][printable(name)] += 1
                    elif entry.is_symlink() and not os.path.exists(entry.path):
                        leave_out("linked to nothing", entry.path)
                    elif entry.is_file():
                        if name[name.rfind(".") :].lower() not in ENDINGS:
                            ending = os.path.splitext(name)[1].lower()
                            left_out["with other endings"][printable(ending) if ending else "without any"] += 1
                        elif outside:
                            leave_out("beside the class folders", entry.path)
                        elif entry.is_symlink():
                            file_links.append((entry.path, names))
                        else:
                            names.append(name)
                    elif entry.is_dir():
                        within = name if outside else label
                        if not entry.is_symlink():
                            folders.append((within, entry.path, os.path.join(real, name)))
                        elif _holds(target := os.path.realpath(entry.path), real) or _holds(target, top):
                            leave_out("linked to what is there already", entry.path)
                        else:
                            folder_links.append((within, entry.path, target))
                    else:
                        leave_out("neither file nor folder", entry.path)
        if not folders:
            folders, folder_links = sorted(folder_links, key=lambda link: link[1], reverse=True), []
    taken = {os.path.join(real, name) for _, _, real, names in found for name in names} if file_links else set()
    real_folder = lru_cache(1000)(os.path.realpath)
    for path, names in sorted(file_links, key=lambda link: link[0]):
        if (real := _end_of(path, real_folder)) in taken:
            leave_out("linked to what is there already", path)
        else:
            taken.add(real)
            names.append(os.path.basename(path))
    return found, left_out


def _end_of(link, real_folder):
    """Returns the real path of the file that a link leads to. That of its folder is looked up once for many links."""
    folder, name = os.path.split(os.path.join(os.path.dirname(link), os.readlink(link)))
    path = os.path.join(real_folder(folder), name)
    return os.path.realpath(path) if os.path.islink(path) else path


def _holds(folder, path):
    return os.path.join(path, "").startswith(os.path.join(folder, ""))


def _remarks(root, left_out):
    """Returns a list with one line that says what was left out, how many and why, or an empty list."""
    parts = []
    for why, names in left_out.items():
        some = nsmallest(3, names.items(), key=lambda item: (-item[1], item[0]))
        shown = [f"{count:,} {name}" if count > 1 or "ending" in why else name for name, count in some]
        parts.append(f"{names.total():,} {why} ({', '.join(shown)}{', ...' if len(names) > 3 else ''})")
    return [f"Left out of {printable(root)}: {', '.join(parts)}"] if parts else []


def listed(names):
    """Joins names for a line of text: all of them, or the first few and the last of many."""
    return ", ".join(names if len(names) <= 8 else [*names[:3], "...", names[-1]])


def describe_classes(classes):
    """Returns lines that say what the classes are called, and which is which where that may surprise."""
    lines = [f"Classes: {listed(classes)}"]
    counted = sorted(classes, key=lambda name: [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)])
    if list(classes) == sorted(classes) != counted:
        label = next(label for label, name in enumerate(classes) if counted[label] != name)
        lines.append(f"Their numbers are in the order of text: label {label} is {classes[label]}, not {counted[label]}")
    return lines
