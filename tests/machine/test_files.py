"""Files that are whole or not there, and what is no file."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from machine.files import append_row, check_writable, make_folder, rewrite, whole_file


def write(path):
    with whole_file(path, "text") as file:
        file.write(b"new")


def write_half(path):
    with whole_file(path, "text") as file:
        file.write(b"half")
        raise OSError("no room")


def test_a_link_stays_one_and_its_file_is_new(tmp_path):
    (tmp_path / "a").write_bytes(b"old")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    write(tmp_path / "b")
    assert (tmp_path / "b").is_symlink()
    assert (tmp_path / "a").read_bytes() == b"new"
    assert len(list(tmp_path.iterdir())) == 2


def test_equal_process_ids_of_two_containers_share_no_temporary_file(tmp_path, monkeypatch):
    names = set()
    for host in ("a", "b"):
        monkeypatch.setattr(os, "uname", lambda host=host: SimpleNamespace(nodename=host))
        with whole_file(tmp_path / "x", "text") as file:
            names.add(file.name)
    assert len(names) == 2


def test_a_pipe_stays_one_and_gets_the_bytes(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write(tmp_path / "pipe")
    assert os.read(reader, 10) == b"new"
    os.close(reader)
    assert (tmp_path / "pipe").is_fifo()


def test_what_was_there_stays_when_writing_fails(tmp_path):
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(OSError, match=r"could not write the text .*a: no room"):
        write_half(tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_is_told_with_the_name_of_the_file(tmp_path, monkeypatch):
    with pytest.raises(OSError, match=r"^could not write the log /dev/full: .*No space left"):
        append_row(Path("/dev/full"), dict(step=1))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with open(tmp_path / "a", "a+") as file, pytest.raises(OSError, match=r"^could not write the index .*/a: .*No space left"):
        rewrite(file, "{}", "index")


def test_a_file_in_the_place_of_a_folder_is_named_with_its_flag(tmp_path):
    (tmp_path / "a").write_bytes(b"")
    for path in (tmp_path / "a", tmp_path / "a" / "b"):
        with pytest.raises(OSError, match=rf"^--out {path}: a file is where a folder is needed$"):
            make_folder(path, "--out")
    assert make_folder(tmp_path / "c" / "d", "--out").is_dir()


@pytest.mark.parametrize(("name", "writable"), [("a.png", True), ("a.svg", True), ("a.pt", False), ("a", False)])
@pytest.mark.parametrize("exists", [True, False])
def test_an_output_has_the_ending_of_its_format(tmp_path, name, writable, exists):
    if exists:
        (tmp_path / name).write_bytes(b"")
    if writable:
        check_writable(tmp_path / name, "--out", ".png", ".svg")
    else:
        with pytest.raises(ValueError, match=r"^--out .* should end in \.png or \.svg$"):
            check_writable(tmp_path / name, "--out", ".png", ".svg")


def test_a_pipe_needs_no_ending(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    check_writable(tmp_path / "pipe", "--json", ".json")
