"""Whatever is wrong with the cache, work goes on without it, and that is said once."""

from __future__ import annotations

import errno
import logging
import os
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfumato import cache
from sfumato.cache import cache_folder, is_private, keep, private_folder, read_kept
from sfumato.errors import ConfigError

NAME = "speeds/x.json"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO, "sfumato")
    cache._say_once.cache_clear()
    return lambda: caplog.messages


def anything(values: dict) -> None:
    pass


def numbers(values: dict) -> None:
    if not all(isinstance(value, int) for value in values.values()):
        raise ConfigError("not a number")


def use_all() -> None:
    """Everything that is done with a cache, twice."""
    for _ in range(2):
        assert read_kept(NAME, anything) == {}
        keep(NAME, {"a": 1})
        private_folder("kernels")


def test_what_is_kept_is_read(folder, said):
    assert read_kept(NAME, anything) == {}
    keep(NAME, {"é": [1, None]})
    assert read_kept(NAME, anything) == {"é": [1, None]}
    assert [path.name for path in folder.rglob("*")] == ["speeds", "x.json"]
    assert said() == []


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
def test_folders_are_for_this_user_only(folder):
    before = os.umask(0)
    try:
        keep(NAME, {})
        private_folder("kernels")
    finally:
        os.umask(before)
    made = (folder, folder / "speeds", folder / "kernels")
    assert [stat.S_IMODE(path.stat().st_mode) for path in made] == [0o700] * 3


@pytest.mark.skipif(os.name == "nt", reason="Windows keeps its caches elsewhere")
@pytest.mark.parametrize("chosen", [None, "~nobody-of-this-name/cache", "~"])
def test_without_a_home(monkeypatch, said, chosen):
    """As in a container with a user that is in no list of users."""

    def unknown(self):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", classmethod(unknown))
    monkeypatch.setattr(Path, "expanduser", unknown)
    for name in ("SFUMATO_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    if chosen is not None:
        monkeypatch.setenv("SFUMATO_CACHE", chosen)
    assert cache_folder() is None
    use_all()
    assert said() == ["no cache is used, because there is no home folder; set SFUMATO_CACHE to a folder of your own"]


@pytest.mark.parametrize(
    "number", [errno.EACCES, errno.EROFS, errno.EIO, errno.ELOOP, errno.ENAMETOOLONG, errno.ESTALE]
)
def test_a_cache_that_is_closed(monkeypatch, folder, said, number):
    def fails(self, *_, **__):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", fails)
        patch.setattr(Path, "mkdir", fails)
        use_all()
    why = os.strerror(number)
    assert said() == [f"the cache in {folder} cannot be used ({why}); set SFUMATO_CACHE to a folder of your own"]


def test_a_full_disk(monkeypatch, folder, said):
    def full(self, *_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    use_all()
    (only,) = said()
    assert only.startswith(f"the cache in {folder} cannot be used (No space left on device); ")
    assert list((folder / "speeds").iterdir()) == []


def test_a_file_in_the_place_of_the_folder(folder, said):
    folder.write_text("mine")
    use_all()
    assert folder.read_text() == "mine"
    assert said() == [
        f"the cache in {folder} cannot be used (it is not a folder); set SFUMATO_CACHE to a folder of your own"
    ]


def test_names_that_are_too_long(monkeypatch, tmp_path, said):
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path / ("x" * 300)))
    use_all()
    assert len(said()) == 1


def damage(path: Path, how: str) -> None:
    path.parent.mkdir(parents=True)
    if how == "folder":
        path.mkdir()
    elif how == "pipe":
        os.mkfifo(path)
    elif how == "device":
        path.symlink_to("/dev/zero")
    else:
        texts = {"nested": '{"a":' * 100_000, "list": "[]", "huge": " " * (cache.MOST_BYTES + 1), "bytes": "\udcff\udcfe", "cut": '{"a": 1'}  # fmt: skip
        path.write_text(texts.get(how, ""), errors="surrogateescape")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such files")
@pytest.mark.parametrize("how", ["nested", "list", "huge", "bytes", "cut", "", "folder", "pipe", "device"])
def test_a_damaged_file_is_made_anew(folder, said, how):
    damage(folder / NAME, how)
    assert read_kept(NAME, anything) == {}
    assert said() == [f"{folder / NAME} was damaged and is recreated"]
    if how != "folder":  # which may hold something of somebody's
        keep(NAME, {"a": 1})
        assert read_kept(NAME, anything) == {"a": 1}
        assert len(said()) == 1


@given(content=st.binary(max_size=60) | st.from_regex(r'[\[{"a:1,\]}]{0,40}', fullmatch=True).map(str.encode))
def test_whatever_is_in_a_file_is_read_or_made_anew(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SFUMATO_CACHE", str(folder))
        (folder / "x.json").write_bytes(content)
        found = read_kept("x.json", numbers)
    assert all(isinstance(value, int) for value in found.values())
    assert (folder / "x.json").exists() == (found != {} or content.strip() == b"{}")


def test_what_does_not_hold_what_it_should_is_made_anew(folder, said):
    keep(NAME, {"a": 1})
    assert read_kept(NAME, numbers) == {"a": 1}
    keep(NAME, {"a": "x"})
    assert read_kept(NAME, numbers) == {}
    assert not (folder / NAME).exists()
    assert len(said()) == 1


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="Windows has no such modes")
def test_who_may_write_what(tmp_path):
    path = tmp_path / "x"
    path.touch()
    for mode in range(0o1000):
        path.chmod(mode)
        assert is_private(path) == (mode & 0o022 == 0)
    path.chmod(0o600)
    (tmp_path / "link").symlink_to(path)
    assert not is_private(tmp_path / "link")
    with pytest.raises(FileNotFoundError):
        is_private(tmp_path / "none")
