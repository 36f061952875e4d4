"""Files are whole or absent."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfumato.errors import CheckpointError, OutputError
from sfumato.files import inside, output_folder, read_json, replacing, write_json


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
