"""A save is whole or not: whenever it ends, and however, the folder holds the old one or the new one."""

from __future__ import annotations

import ctypes
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sfumato.errors import OutputError
from sfumato.files import replacing
from sfumato.folders import saving_into

FILES = ("config.json", "weights-1", "weights-2", "part/weights")


def save(folder: Path, version: str, **options) -> None:
    with saving_into(
        folder, last="config.json", own=("part",), stale=lambda name: name.startswith("weights"), **options
    ) as new:
        (new / "part").mkdir(exist_ok=True)
        for name in FILES:
            with replacing(new / name) as temporary:
                temporary.write_text(version)


def read(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


# Where a folder can be exchanged as a whole, and where there is a reason to change what is in it one by one.
PLACES = ("alone", "beside others", "worked in", "no exchange")


@pytest.fixture(params=PLACES)
def folder(request, tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "model"
    save(folder, "old")
    (folder / "weights-3").write_text("old")
    (folder / "README.md").write_text("mine")
    (folder / "part" / "other").write_text("mine")
    if request.param == "beside others":
        (folder / "logs").mkdir()
        (folder / "logs" / "x").write_text("mine")
    elif request.param == "worked in":
        monkeypatch.chdir(folder)
    elif request.param == "no exchange":
        monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    return folder


def test_what_is_saved_takes_the_place_of_what_was(folder):
    before = read(folder)
    save(folder, "new")
    assert read(folder) == {
        name: "new" if name in FILES else value for name, value in before.items() if name != "weights-3"
    }
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    assert folder.stat().st_mode & 0o777 == Path(folder / "part").stat().st_mode & 0o777


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), OSError(28, "full")])
def test_what_was_stays_when_a_save_fails(folder, error):
    before = read(folder)

    def fail() -> None:
        with saving_into(folder, last="config.json", own=("part",), stale=lambda _: True) as new:
            (new / "config.json").write_text("half")
            raise error

    with pytest.raises(OutputError if isinstance(error, OSError) else type(error)):
        fail()
    assert read(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_a_folder_that_is_a_link_stays_one(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    save(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert read(tmp_path / "real")["config.json"] == "new"


def test_files_that_are_links_stay_links_and_what_they_lead_to_is_not_written(tmp_path):
    """As in the hub's cache, whose files are links to files elsewhere."""
    (tmp_path / "blob").write_text("theirs")
    (tmp_path / "model").mkdir()
    for name in ("config.json", "README.md"):
        (tmp_path / "model" / name).symlink_to("../blob")
    save(tmp_path / "model", "new")
    assert (tmp_path / "blob").read_text() == "theirs"
    assert (tmp_path / "model" / "README.md").readlink() == Path("../blob")
    assert read(tmp_path / "model")["config.json"] == "new"


# Saves "0", "1", "2", … for ever; says when it has begun.
SAVER = """
import sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from test_folders import save
number = 0
while True:
    save(Path(sys.argv[1]), str(number))
    number += 1
    print(number, flush=True)
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows exchanges no folders, and has no SIGKILL")
def test_killed_at_any_moment_it_holds_one_save(tmp_path):
    chance = random.Random(0)
    folder = tmp_path / "model"
    for _ in range(6):
        saver = subprocess.Popen(
            [sys.executable, "-c", SAVER, str(folder), str(Path(__file__).parent)], stdout=subprocess.PIPE, text=True
        )
        saver.stdout.readline()
        for _ in range(4):
            time.sleep(chance.random() * 0.03)
            saver.send_signal(signal.SIGSTOP)
            assert len({value for name, value in read(folder).items() if name in FILES}) == 1
            saver.send_signal(signal.SIGCONT)
        saver.send_signal(signal.SIGKILL)
        saver.communicate()
        found = read(folder)
        assert set(found) == set(FILES)
        assert len(set(found.values())) == 1
    save(folder, "after")
    assert set(read(folder).values()) == {"after"}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]  # what the killed left is swept
