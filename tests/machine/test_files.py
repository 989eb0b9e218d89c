"""Files that are whole or not there, and what is no file."""

import os

import pytest

from machine.files import whole_file


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
