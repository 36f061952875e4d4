"""Hidden names for what is being written: nobody else's, gone afterwards, and swept where a process was killed."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfumato import leftovers
from sfumato.errors import OutputError, UsageError
from sfumato.files import add_file, check_writable, expanded, output_file, replacing
from sfumato.leftovers import beside, sweep

DEAD = 999_999_999


def listed(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("error", [None, ValueError(), KeyboardInterrupt()])
def test_a_hidden_name_is_gone_afterwards(tmp_path, folder, error):
    def use() -> None:
        with beside(tmp_path / "x.png", folder=folder) as first, beside(tmp_path / "x.png", folder=folder) as second:
            assert first != second
            assert first.parent == second.parent == tmp_path
            assert first.is_dir() == folder
            assert first.name.startswith(f".x.png.{os.getpid()}.")
            if folder:
                (first / "more").write_text("x")
            if error:
                raise error

    if error is None:
        use()
    else:
        with pytest.raises(type(error)):
            use()
    assert listed(tmp_path) == set()


def test_what_was_moved_away_stays(tmp_path):
    with beside(tmp_path / "x", folder=True) as hidden:
        hidden.rename(tmp_path / "x")
    assert listed(tmp_path) == {"x"}


@given(name=st.text(st.characters(exclude_categories=("Cs",), exclude_characters="/\0"), min_size=1, max_size=255))
def test_every_name_has_a_hidden_one(tmp_path_factory, name):
    folder = tmp_path_factory.mktemp("names")
    if name in (".", "..") or len(name.encode()) > 255:
        return
    with replacing(folder / name) as temporary:
        temporary.write_text("x")
    assert listed(folder) == {name}


def test_bytes_that_are_no_text(tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    with replacing(tmp_path / name) as temporary:
        temporary.write_text("x")
    assert listed(tmp_path) == {name}


LEFT = [f".x.png.{DEAD}.part", f".x.png.{DEAD}.0123abcd.part", f".x.png.{DEAD}.0123abcd.new", f".x.png.{DEAD}.old"]
KEPT = [
    "x.png", f"x.png.{DEAD}.part", f".y.png.{DEAD}.part", f".x.png.{DEAD}.txt", f".x.png.{DEAD}", ".x.png.part",
    f".x.png.{os.getpid()}.part", f".x.png.{os.getpid()}.0123abcd.part", f".x.png.a{DEAD}.part", f".x.png.{DEAD}.a.b.part",
]  # fmt: skip


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_dead_processes_left_is_swept_and_nothing_else(tmp_path, kind):
    for name in (*LEFT, *KEPT):
        if kind == "folder" and name != "x.png":
            (tmp_path / name / "deep").mkdir(parents=True)
            (tmp_path / name / "deep" / "file").write_text("x")
        else:
            (tmp_path / name).write_text("x")
    with replacing(tmp_path / "x.png") as temporary:
        assert listed(tmp_path) == {*KEPT, temporary.name}
    assert listed(tmp_path) == set(KEPT)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such locks")
def test_what_another_container_still_writes_is_left_alone(tmp_path, monkeypatch):
    """Its processes have numbers of their own, so that a living one looks dead from here."""
    monkeypatch.setattr(os, "getpid", lambda: DEAD)
    with beside(tmp_path / "x.png") as file, beside(tmp_path / "x.png", folder=True) as folder:
        sweep(tmp_path / "x.png")
        assert listed(tmp_path) == {file.name, folder.name}
    monkeypatch.undo()


def test_a_folder_that_was_being_replaced_is_put_back(tmp_path):
    """Killed between two renames: the old one is all there is."""
    (tmp_path / f".x.{DEAD}.0123abcd.old").mkdir()
    (tmp_path / f".x.{DEAD}.0123abcd.old" / "weights").write_text("old")
    sweep(tmp_path / "x")
    assert (tmp_path / "x" / "weights").read_text() == "old"
    assert listed(tmp_path) == {"x"}


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signal")
def test_a_killed_process_leaves_what_the_next_one_sweeps(tmp_path):
    code = f"""
import os, signal
from pathlib import Path
from sfumato.files import replacing
with replacing(Path({str(tmp_path / "x.png")!r})) as temporary:
    temporary.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    (left,) = listed(tmp_path)
    assert left.startswith(".x.png.")
    with replacing(tmp_path / "x.png") as temporary:
        temporary.write_text("whole")
    assert listed(tmp_path) == {"x.png"}


def test_a_planted_link_is_not_followed(tmp_path, monkeypatch):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    monkeypatch.setattr(leftovers.secrets, "token_hex", lambda size: "guessed")
    (tmp_path / f".x.png.{os.getpid()}.guessed.part").symlink_to(victim)
    with pytest.raises(OutputError), replacing(tmp_path / "x.png") as temporary:
        temporary.write_text("x")
    assert victim.read_text() == "precious"


# ---- names that nobody else takes -----------------------------------------------------------------------------------


def test_threads_that_write_one_name(tmp_path):
    def write(text: str) -> None:
        try:
            for _ in range(20):
                with replacing(tmp_path / "x") as temporary:
                    temporary.write_text(text)
        except OutputError as error:
            failed.append(error)

    failed: list[OutputError] = []
    threads = [threading.Thread(target=write, args=(letter * 1000,)) for letter in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert (tmp_path / "x").read_text() in {letter * 1000 for letter in "abcd"}
    assert listed(tmp_path) == {"x"}


ADD_MANY = """
import os, sys
from pathlib import Path
from sfumato.files import add_file

def refuse(*_, **__):
    raise PermissionError(1, "Operation not permitted")

if sys.argv[2] == "False":  # as on a memory stick
    os.link = refuse
for _ in range(25):
    print(add_file(Path("x.txt"), lambda path: path.write_text(sys.argv[1])))
"""


@pytest.mark.parametrize("links", [True, False])
def test_processes_that_add_files_lose_none(tmp_path, links):
    processes = {
        letter: subprocess.Popen(
            [sys.executable, "-c", ADD_MANY, letter, str(links)], cwd=tmp_path, stdout=subprocess.PIPE, text=True
        )
        for letter in "abc"
    }
    taken = {letter: process.communicate()[0].split() for letter, process in processes.items()}
    names = [name for some in taken.values() for name in some]
    assert len(set(names)) == 75
    assert listed(tmp_path) == set(names) == {"x.txt", *(f"x-{number}.txt" for number in range(2, 76))}
    for letter, some in taken.items():
        assert {(tmp_path / name).read_text() for name in some} == {letter}


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_cannot_be_added_leaves_nothing(tmp_path, monkeypatch, links):
    def fails(self: object, *_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "link", fails)
    monkeypatch.setattr(Path, "replace" if links else "open", fails)
    with pytest.raises(OutputError, match=r"x\.txt cannot be written \(Input/output error\)"):
        add_file(tmp_path / "x.txt", lambda path: None)
    assert listed(tmp_path) == set()


# ---- paths that users give ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("~nobody-of-this-name/x.png", "starts with a home folder that does not exist"),
        ("a\0b", "is not a path"),
        ("\ud800/x", "is not a path"),
        (3, "is not a path"),
        (None, "is not a path"),
    ],
)
def test_paths_that_cannot_be(path, words):
    with pytest.raises(UsageError, match=words):
        expanded(path)
    with pytest.raises(UsageError, match=words):
        output_file(path)


@given(path=st.text(max_size=400))
def test_any_text_is_a_path_or_a_sentence(path):
    try:
        found = expanded(path)
    except UsageError:
        return
    assert isinstance(found, Path)


@pytest.mark.parametrize("path", ["/", ".", "..", "", "~"])
def test_folders_are_no_files_to_write(path):
    with pytest.raises(OutputError, match="is a folder; give the name of a file in it"):
        output_file(path)
    if path in ("/", ".", ""):
        with pytest.raises(OutputError, match="is a folder; give the name of a file in it"), replacing(Path(path)):
            pass


def test_names_that_are_too_long_are_known_before(tmp_path):
    check_writable(tmp_path / "new" / "deep", "x.png")
    deep = tmp_path / ("d/" * 3000)
    for folder, name in ((tmp_path, "x" * 300), (tmp_path / "new", "x" * 300), (tmp_path / ("y" * 300) / "new", "x"), (deep, "x")):  # fmt: skip
        with pytest.raises(OutputError, match="is too long; choose a shorter one"):
            check_writable(folder, name)
        with pytest.raises(OutputError, match="is too long; choose a shorter one"):
            output_file(folder / name)
    assert listed(tmp_path) == set()


@pytest.mark.skipif(os.name == "nt", reason="Windows does not let a folder go that somebody is in")
def test_a_folder_that_is_gone(tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(OutputError, match="the current folder has been deleted; change to another one"):
        check_writable(Path(), "x.png")
    with pytest.raises(OutputError), replacing(Path("x.png")):
        pass
    os.chdir(tmp_path)
