"""Files are whole or absent."""

from __future__ import annotations

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfumato.errors import CheckpointError, OutputError, UsageError
from sfumato.files import (
    add_file,
    inside,
    output_file,
    output_folder,
    read_bytes,
    read_json,
    replacing,
    write_json,
)


def test_json_round_trip(tmp_path):
    write_json(tmp_path / "a.json", {"b": [1, None, "é"]})
    assert read_json(tmp_path / "a.json") == {"b": [1, None, "é"]}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), OSError(errno.ENOSPC, "full")])
def test_a_broken_write_leaves_the_old_file_and_nothing_else(tmp_path, error):
    target = tmp_path / "out.bin"
    target.write_text("old")

    def write() -> None:
        with replacing(target) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(OutputError if isinstance(error, OSError) else type(error)):
        write()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(
    ("number", "says"),
    [(errno.ENOSPC, "no space left"), (errno.EACCES, "no permission"), (errno.EROFS, "no permission"), (errno.EIO, "cannot be written")],
)  # fmt: skip
def test_why_a_file_cannot_be_written(tmp_path, number, says):
    with pytest.raises(OutputError, match=says) as caught, replacing(tmp_path / "x.png"):
        raise OSError(number, "reason")
    assert "x.png" in str(caught.value)


def test_output_folder_makes_parents(tmp_path):
    assert output_folder(tmp_path / "a" / "b").is_dir()


@given(
    name=st.text(max_size=12)
    | st.lists(st.sampled_from(["..", ".", "a", "/", "\\", "C:", ""]), max_size=6).map("/".join)
)
def test_a_name_never_leads_out_of_the_folder(name):  # fmt: skip
    folder = Path("/base/folder")
    try:
        path = inside(folder, name)
    except CheckpointError:
        return
    import os

    assert Path(os.path.normpath(path)).is_relative_to(folder)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes that have names")
def test_no_file_takes_the_place_of_a_device_or_a_pipe(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    link = tmp_path / "link"
    link.symlink_to(pipe)
    for path in (pipe, link):
        with pytest.raises(OutputError, match="is a device or a pipe; give the name of a file"):
            write_json(path, {})
        with pytest.raises(OutputError, match="is a device or a pipe"):
            add_file(path, lambda temporary: temporary.write_text("x"))
        with pytest.raises(OutputError, match="is a device or a pipe"):
            output_file(path)
    assert pipe.is_fifo()
    assert link.is_symlink()
    assert {entry.name for entry in tmp_path.iterdir()} == {"pipe", "link"}


def unreadable(path: Path, kind: str) -> Path:
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "dangling":
        path.symlink_to(path.parent / "gone")
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "huge":
        path.write_bytes(b"{")
        os.truncate(path, 2**36)
    elif kind == "deep":
        path.write_text('{"a":' * 100_000)
    elif kind == "nested":
        path.write_text('{"a":' + "[" * 500 + "]" * 500 + "}")
    elif kind == "digits":
        path.write_text('{"a":' + "9" * 10_000 + "}")
    elif kind == "bytes":
        path.write_bytes(b'{"a": "\xff"}')
    return path


@pytest.mark.skipif(os.name == "nt", reason="needs pipes, devices and links")
@pytest.mark.parametrize(
    "kind", ["pipe", "device", "folder", "dangling", "loop", "huge", "deep", "nested", "digits", "bytes", "absent"]
)
def test_what_is_no_json_file_is_one_error_at_once(tmp_path, kind):
    path = unreadable(tmp_path / "config.json", kind)
    with pytest.raises(CheckpointError, match=r"config\.json") as caught:
        read_json(path)
    assert "\n" not in str(caught.value)
    if kind in ("pipe", "device", "folder"):
        with pytest.raises(CheckpointError, match="is not a regular file"):
            read_bytes(path)


def test_a_link_out_of_the_folder_is_followed(tmp_path):
    """As the hub's cache has them: every file is a link to one elsewhere."""
    (tmp_path / "blob").write_text('{"a": 1}')
    (tmp_path / "config.json").symlink_to("blob")
    assert read_json(tmp_path / "config.json") == {"a": 1}


@pytest.mark.parametrize("name", [5, None, ["x"], "a\0b", "\ud800", "\x1b[2J", "n" * 300])
def test_what_is_no_name_of_a_file(name):
    with pytest.raises(CheckpointError, match="is not a valid file name"):
        inside(Path("/base"), name)


@pytest.mark.parametrize("path", [5, None, ["x"], "a\0b", b"a\0b", object()])
def test_what_is_no_path(path):
    with pytest.raises(UsageError, match="is not a path"):
        output_folder(path)


def test_a_home_that_is_not_there():
    with pytest.raises(UsageError, match="~nobody-here"):
        output_folder("~nobody-here/x")


def test_many_threads_write_one_name(tmp_path):
    def write(number: int) -> None:
        for _ in range(5):
            write_json(tmp_path / "x.json", {"number": number})

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(8)))
    assert read_json(tmp_path / "x.json")["number"] in range(8)
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_bytes_are_on_the_disk_before_the_name_is_taken(tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr(os, "fsync", lambda number: order.append(os.fstat(number).st_size))
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda self, target: order.append("renamed") or replace(self, target))
    with replacing(tmp_path / "x") as temporary:
        temporary.write_bytes(b"12345")
    assert order == [5, "renamed"]


def test_a_link_planted_under_a_temporary_name_is_not_followed(tmp_path, monkeypatch):
    (tmp_path / "theirs").write_text("untouched")
    monkeypatch.setattr("secrets.token_hex", lambda _: "guessed")
    (tmp_path / f".x.{os.getpid()}.guessed.part").symlink_to("theirs")
    with pytest.raises(OutputError, match="x cannot be written"), replacing(tmp_path / "x"):
        pass
    assert (tmp_path / "theirs").read_text() == "untouched"
