"""The images in a folder. The folder is the source of truth; the table is an index that can be rebuilt.

An image's key is the beginning of its file's SHA-256, so a file keeps its key when it is moved or renamed. Deleted
images stay in the trash for a month, under their original path.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato.errors import SfumatoError, UsageError
from sfumato.files import output_folder, read_bytes, replacing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sfumato.jobs.store import Store

__all__ = ["HIDDEN", "SUFFIXES", "Gallery"]

# The folder for internal files: the database, the trash, input images, thumbnails.
HIDDEN = ".sfumato"
SUFFIXES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp"}
TRASH_SECONDS, THUMB, MOST_FILE = 30 * 86400, 320, 2**28
COLUMNS = ("prompt", "negative_prompt", "model", "seed", "scheduler", "program")
Known = dict[str, tuple[str, int, int]]


class Gallery:
    """The images in a folder and its subfolders.

    told: called as `told(type, data)` with type "image" for each new image and "removed" for each removed one.
    """

    def __init__(self, folder: Path, store: Store, told: Callable[[str, dict[str, Any]], None]) -> None:
        self.folder, self._store, self._told = folder, store, told
        self._trash = output_folder(folder / HIDDEN / "trash")
        self._thumbs = output_folder(folder / HIDDEN / "thumbs")
        self._seen: dict[str, int] = {}
        self._lock = threading.Lock()

    def add(self, path: Path) -> dict[str, Any] | None:
        """Index a file and return its row; None if the file is not an image."""
        name, found = path.relative_to(self.folder).as_posix(), None
        with suppress(OSError, SfumatoError):
            found = _described(path)
        if found is None:
            return None
        row = {"path": name, "deleted": None, **found}
        names = ", ".join(row)
        places = ", ".join(f":{column}" for column in row)
        with self._store.transaction() as base:
            was = base.execute("SELECT path, deleted FROM images WHERE key = ?", (row["key"],)).fetchone()
            base.execute("DELETE FROM images WHERE path = ? AND key != ?", (name, row["key"]))
            known = was["path"] if was is not None and was["deleted"] is None else None
            if known is not None and known != name and (self.folder / known).is_file():
                return self.get(row["key"])  # the same image under a second name
            base.execute(f"INSERT OR REPLACE INTO images ({names}) VALUES ({places})", row)
        if known != name:
            self._told("image", self._public(row))
        return self._public(row)

    def scan(self, *, whole: bool = False, stop: Callable[[], bool] = lambda: False) -> None:
        """Update the index from the folders that have changed since the last scan, or from all folders if `whole`."""
        with self._lock:
            folders = dict(self._folders())
            changed = {one for one, when in folders.items() if whole or self._seen.get(one) != when}
            gone = self._seen.keys() - folders.keys()
            known = self._known()
            found: dict[str, os.stat_result] = {}
            for one in changed:
                found |= self._files(one)
            fresh = [name for name, stat in found.items() if _differs(known.get(name), stat)]
            for name in sorted(fresh, key=lambda name: -found[name].st_mtime_ns):
                if stop():
                    return
                self.add(self.folder / name)
            missing = {name for name in known.keys() - found.keys() if _parent(name) in changed | gone}
            for name in missing:
                self._forget(known[name][0], name)
            self._seen = folders

    def _known(self) -> Known:
        rows = self._store.rows("SELECT key, path, bytes, changed FROM images WHERE deleted IS NULL")
        return {row["path"]: (row["key"], row["bytes"], row["changed"]) for row in rows}

    def _forget(self, key: str, name: str) -> None:
        with self._store.transaction() as base:
            gone = base.execute(
                "DELETE FROM images WHERE key = ? AND path = ? AND deleted IS NULL", (key, name)
            ).rowcount
        if gone:
            self._told("removed", {"key": key})

    def _folders(self, below: str = "") -> Iterator[tuple[str, int]]:
        place = self.folder / below
        with suppress(OSError):
            yield below, place.stat().st_mtime_ns
            with os.scandir(place) as entries:
                inner = [one.name for one in entries if one.name[0] != "." and one.is_dir(follow_symlinks=False)]
            for name in inner:
                yield from self._folders(f"{below}/{name}" if below else name)

    def _files(self, below: str) -> dict[str, os.stat_result]:
        found = {}
        with suppress(OSError), os.scandir(self.folder / below) as entries:
            for one in entries:
                ending = os.path.splitext(one.name)[1].lower()
                if one.name[0] != "." and ending in SUFFIXES and one.is_file(follow_symlinks=False):
                    found[f"{below}/{one.name}" if below else one.name] = one.stat(follow_symlinks=False)
        return found

    def find(
        self, text: str = "", *, model: str = "", cursor: str = "", most: int = 50
    ) -> tuple[list[dict[str, Any]], str | None, int]:
        """Find images whose prompt, model, seed and name together contain all words of a text, newest first.

        cursor: where to continue. Returns at most `most` rows, the cursor of the next page (None at the end), and the
        total number of matches. Raises `UsageError` for an invalid cursor.
        """
        rules, values = ["deleted IS NULL"], dict[str, Any]()
        for number, word in enumerate(text.split()[:16]):
            values[f"word{number}"] = "%" + word.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_") + "%"
            fields = " || ' ' || ".join(("prompt", "model", "seed", "path"))
            rules.append(f"({fields}) LIKE :word{number} ESCAPE '\\'")
        if model:
            values["model"] = model
            rules.append("model = :model")
        total = self._store.rows(f"SELECT count(*) FROM images WHERE {' AND '.join(rules)}", values)[0][0]
        if cursor:
            when, _, key = cursor.partition("-")
            try:
                values |= {"when": float(when), "key": key}
            except ValueError as error:
                raise UsageError("invalid cursor; use the one from the previous response") from error
            rules.append("(created < :when OR (created = :when AND key > :key))")
        where = " AND ".join(rules)
        rows = self._store.rows(
            f"SELECT * FROM images WHERE {where} ORDER BY created DESC, key LIMIT {int(most) + 1}", values
        )
        found = [self._public(dict(row)) for row in rows[:most]]
        last = found[-1] if len(rows) > most else None
        return found, None if last is None else f"{last['created']!r}-{last['key']}", total

    def get(self, key: str) -> dict[str, Any] | None:
        """Return the row of an image; None if there is none or it is in the trash."""
        row = self._row(key, "IS NULL")
        return None if row is None else self._public(row)

    def _row(self, key: str, deleted: str) -> dict[str, Any] | None:
        rows = self._store.rows(f"SELECT * FROM images WHERE key = ? AND deleted {deleted}", (key,))
        return dict(rows[0]) if rows else None

    def path_of(self, key: str) -> Path | None:
        """Return the file of an image; None if it is missing or outside the folder."""
        row = self._row(key, "IS NULL")
        path = None if row is None else self.folder / row["path"]
        if path is None or path.is_symlink() or not path.resolve().is_relative_to(self.folder.resolve()):
            return None
        return path if path.is_file() else None

    def thumbnail(self, key: str) -> Path | None:
        """Return a WebP of at most 320 pixels per side, created on first use; None if there is no such image."""
        place = self._thumbs / f"{key}.webp"
        if (path := self.path_of(key)) is None:
            return None
        if not place.is_file():
            from PIL.Image import Resampling

            from sfumato.images import open_image

            image = open_image(path)
            image.thumbnail((THUMB, THUMB), Resampling.BILINEAR)
            with replacing(place) as temporary:
                image.save(temporary, "WEBP", quality=80)
        return place

    def delete(self, key: str) -> bool:
        """Move an image to the trash. Returns whether there was one."""
        row = self._row(key, "IS NULL")
        if row is None or self.path_of(key) is None:
            return False
        place = self._trash / key / row["path"]
        output_folder(place.parent)
        with suppress(FileNotFoundError):
            (self.folder / row["path"]).replace(place)
        with self._store.transaction() as base:
            base.execute("UPDATE images SET deleted = ?, path = ? WHERE key = ?", (time.time(), f"{key}:", key))
        self._told("removed", {"key": key})
        return True

    def restore(self, key: str) -> dict[str, Any] | None:
        """Restore an image from the trash and return its row; None if it is not there."""
        home = self._trash / key
        for place in home.rglob("*") if key.isalnum() and home.is_dir() else ():
            if place.is_file():
                path = self.folder / place.relative_to(home)
                output_folder(path.parent)
                if path.exists():
                    path = path.with_name(f"{path.stem}-{key[:8]}{path.suffix}")
                place.replace(path)
                shutil.rmtree(home, ignore_errors=True)
                return self.add(path)
        return None

    def empty_trash(self) -> None:
        """Permanently remove images deleted more than a month ago, and thumbnails of images that no longer exist."""
        for home in self._trash.iterdir():
            with suppress(OSError):
                if home.stat().st_mtime < time.time() - TRASH_SECONDS:
                    shutil.rmtree(home)
                    with self._store.transaction() as base:
                        base.execute("DELETE FROM images WHERE key = ? AND deleted IS NOT NULL", (home.name,))
        keys = {row["key"] for row in self._store.rows("SELECT key FROM images")}
        for place in self._thumbs.iterdir():
            if place.stem not in keys:
                place.unlink(missing_ok=True)

    def _public(self, row: dict[str, Any]) -> dict[str, Any]:
        told = {name: row[name] for name in ("key", "bytes", "width", "height", "created", *COLUMNS)}
        return told | {"name": row["path"].rpartition("/")[2], "folder": row["path"].rpartition("/")[0]}


def _parent(name: str) -> str:
    return name.rpartition("/")[0]


def _differs(known: tuple[str, int, int] | None, stat: os.stat_result) -> bool:
    return known is None or known[1:] != (stat.st_size, stat.st_mtime_ns)


def _described(path: Path) -> dict[str, Any]:
    """Return the row of an image file: its properties, and the settings stored in it."""
    from sfumato.metadata.carriers import read_carried
    from sfumato.metadata.remember import remember

    stat, data = path.stat(), read_bytes(path, MOST_FILE)
    carried = read_carried(path, whole=False)
    told = dict.fromkeys(COLUMNS, "")
    with suppress(UsageError):  # the image contains no settings
        found = remember(path, carried)
        told["program"], told["model"] = found.program, found.fields.get("Model", "")
        for name in ("prompt", "negative_prompt", "seed", "scheduler"):
            value = getattr(found.request, name)
            told[name] = "; ".join(value) if isinstance(value, tuple) else "" if value is None else str(value)
    return told | {
        "key": hashlib.sha256(data).hexdigest()[:32], "bytes": stat.st_size, "changed": stat.st_mtime_ns,
        "width": carried.size[0], "height": carried.size[1], "created": stat.st_mtime,
    }  # fmt: skip
