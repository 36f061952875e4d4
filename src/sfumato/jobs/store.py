"""Jobs and events in SQLite: a job is on disk before anyone is told that it was accepted."""

from __future__ import annotations

import json
import logging
import sqlite3
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sfumato.errors import OutputError
from sfumato.values import reason

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["ENDED", "Event", "Job", "Store"]

log = logging.getLogger("sfumato")

ENDED = ("done", "failed", "cancelled")
# Events that are stored for clients that reconnect.
MOST_EVENTS = 10_000
SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    number INTEGER PRIMARY KEY, id TEXT UNIQUE NOT NULL, state TEXT NOT NULL, model TEXT NOT NULL,
    request TEXT NOT NULL, client TEXT NOT NULL, options TEXT NOT NULL, created REAL NOT NULL, started REAL,
    finished REAL, attempts INTEGER NOT NULL DEFAULT 0, restarts INTEGER NOT NULL DEFAULT 0, error TEXT,
    notes TEXT NOT NULL DEFAULT '[]');
CREATE INDEX IF NOT EXISTS jobs_by_state ON jobs (state, number);
CREATE TABLE IF NOT EXISTS drawn (
    job TEXT NOT NULL, place INTEGER NOT NULL, image TEXT NOT NULL, PRIMARY KEY (job, place)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS events (seq INTEGER PRIMARY KEY AUTOINCREMENT, type TEXT NOT NULL, data TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS images (
    key TEXT PRIMARY KEY, path TEXT UNIQUE NOT NULL, bytes INTEGER NOT NULL, changed INTEGER NOT NULL,
    width INTEGER NOT NULL, height INTEGER NOT NULL, created REAL NOT NULL, prompt TEXT NOT NULL,
    negative_prompt TEXT NOT NULL, model TEXT NOT NULL, seed TEXT NOT NULL, scheduler TEXT NOT NULL,
    program TEXT NOT NULL, deleted REAL);
CREATE INDEX IF NOT EXISTS images_by_time ON images (created DESC, key);
"""


@dataclass(frozen=True)
class Event:
    """An event. seq: its number if it is stored for clients that reconnect; None if it is not stored."""

    type: str
    data: dict[str, Any]
    seq: int | None = None


@dataclass(frozen=True)
class Job:
    """A request in the queue. Its state is queued, running, done, failed or cancelled.

    request: a `GenerateRequest` as JSON, with a fixed seed; client: the sender; options: further settings for the
    worker; attempts: how often a worker has started it; restarts: how often the server has stopped while it was
    running; error: kind and message; images: keys of the finished images, by their place in the batch. Times are
    seconds since 1970.
    """

    number: int
    id: str
    state: str
    model: str
    request: dict[str, Any]
    client: str
    options: dict[str, Any]
    created: float
    started: float | None = None
    finished: float | None = None
    attempts: int = 0
    restarts: int = 0
    error: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()
    images: dict[int, str] = field(default_factory=dict)

    @property
    def ended(self) -> bool:
        """Whether the job is done, failed or cancelled."""
        return self.state in ENDED


class Store:
    """The database of a folder. Every method is one transaction and is thread-safe."""

    def __init__(self, path: Path) -> None:
        """Open or create the database. A damaged one is renamed. Raises `OutputError` if the file cannot be written."""
        self._lock = threading.RLock()
        try:
            self._open(path)
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):
                raise OutputError(f"{path} cannot be opened ({reason(error)}); choose another folder") from error
            aside = path.with_name(f"{path.name}.damaged-{int(time.time())}")
            log.warning("%s is damaged (%s); renamed to %s, and indexing the images again", path, error, aside.name)
            for ending in ("-wal", "-shm"):
                path.with_name(path.name + ending).unlink(missing_ok=True)
            path.replace(aside)
            self._open(path)

    def _open(self, path: Path) -> None:
        self._base = sqlite3.connect(path, check_same_thread=False, isolation_level=None, timeout=5)
        try:
            self._base.row_factory = sqlite3.Row
            mode = self._base.execute("PRAGMA journal_mode=WAL").fetchone()[0]
            if mode != "wal":  # on a network drive, SQLite uses its older journal, which is as safe but slower
                log.info("%s is on a file system without shared memory; SQLite uses a rollback journal", path)
            self._base.execute("PRAGMA synchronous=FULL")
            if self._base.execute("PRAGMA quick_check").fetchone()[0] != "ok":
                raise sqlite3.DatabaseError("its pages contradict each other")
            self._base.executescript(SCHEMA)
        except BaseException:
            self._base.close()
            raise

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._base.close()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Run the block as one transaction: all of its changes are stored, or none."""
        with self._lock:
            self._base.execute("BEGIN IMMEDIATE")
            try:
                yield self._base
            except BaseException:
                self._base.execute("ROLLBACK")
                raise
            self._base.execute("COMMIT")

    def rows(self, sql: str, values: tuple[Any, ...] | dict[str, Any] = ()) -> list[sqlite3.Row]:
        """Return the rows that a query finds."""
        with self._lock:
            return self._base.execute(sql, values).fetchall()

    def add(self, job: Job) -> bool:
        """Store a job. Returns False and changes nothing if its id exists."""
        with self.transaction() as base:
            names = "id, state, model, request, client, options, created"
            done = base.execute(
                f"INSERT OR IGNORE INTO jobs ({names}) VALUES (?,?,?,?,?,?,?)",
                (job.id, job.state, job.model, _text(job.request), job.client, _text(job.options), job.created),
            )
            return done.rowcount == 1

    def change(self, id: str, was: tuple[str, ...], **values: Any) -> bool:
        """Change a job if it is in one of the states `was`. Returns whether it was."""
        values = {name: _text(v) if isinstance(v, dict | list | tuple) else v for name, v in values.items()}
        sets, states = ", ".join(f"{name} = ?" for name in values), ", ".join("?" * len(was))
        with self.transaction() as base:
            sql = f"UPDATE jobs SET {sets} WHERE id = ? AND state IN ({states})"
            return base.execute(sql, (*values.values(), id, *was)).rowcount == 1

    def drawn(self, id: str, place: int, image: str) -> None:
        """Record the key of the image in one place of a job."""
        with self.transaction() as base:
            base.execute("INSERT OR REPLACE INTO drawn VALUES (?,?,?)", (id, place, image))

    def job(self, id: str) -> Job | None:
        """Return a job by its id; None if there is none."""
        return next(iter(self._jobs("WHERE id = ?", (id,))), None)

    def job_of_body(self, client: str, body: str) -> Job | None:
        """Return the newest job that a client created with the same body; None if there is none."""
        rule = "WHERE client = ? AND json_extract(options, '$.body') = ? ORDER BY number DESC LIMIT 1"
        return next(iter(self._jobs(rule, (client, body))), None)

    def jobs(self, *states: str, most: int = 100, newest: bool = True, client: str | None = None) -> list[Job]:
        """List jobs in these states (default: all states), newest or oldest first."""
        rules, values = [], [*states]
        if states:
            rules.append(f"state IN ({', '.join('?' * len(states))})")
        if client is not None:
            rules.append("client = ?")
            values.append(client)
        where = f"WHERE {' AND '.join(rules)}" if rules else ""
        return self._jobs(f"{where} ORDER BY number {'DESC' if newest else 'ASC'} LIMIT ?", (*values, most))

    def count(self, *states: str, client: str | None = None) -> int:
        """Count the jobs in these states."""
        whose, values = ("", ()) if client is None else (" AND client = ?", (client,))
        places = ", ".join("?" * len(states))
        return self.rows(f"SELECT count(*) FROM jobs WHERE state IN ({places}){whose}", (*states, *values))[0][0]

    def _jobs(self, rest: str, values: tuple[Any, ...]) -> list[Job]:
        found = []
        with self._lock:
            for row in self.rows(f"SELECT * FROM jobs {rest}", values):
                told = dict(row)
                for name in ("request", "options", "error", "notes"):
                    told[name] = None if told[name] is None else json.loads(told[name])
                drawn = self.rows("SELECT place, image FROM drawn WHERE job = ? ORDER BY place", (told["id"],))
                images = {one["place"]: one["image"] for one in drawn}
                found.append(Job(**told | {"notes": tuple(told["notes"]), "images": images}))
        return found

    def tell(self, type: str, data: dict[str, Any]) -> Event:
        """Store an event under the next number."""
        with self.transaction() as base:
            seq = base.execute("INSERT INTO events (type, data) VALUES (?,?)", (type, _text(data))).lastrowid or 0
            if seq % 1000 == 0:
                base.execute("DELETE FROM events WHERE seq <= ?", (seq - MOST_EVENTS,))
            return Event(type, data, seq)

    def events_after(self, seq: int) -> list[Event] | None:
        """Return the events after a number; None if some are no longer stored, or the number is unknown."""
        with self._lock:
            first, last = self.rows("SELECT coalesce(min(seq), 1), coalesce(max(seq), 0) FROM events")[0]
            if not first - 1 <= seq <= last:
                return None
            found = self.rows("SELECT * FROM events WHERE seq > ? ORDER BY seq", (seq,))
        return [Event(row["type"], json.loads(row["data"]), row["seq"]) for row in found]

    @property
    def last_event(self) -> int:
        """The number of the newest event, 0 if there is none."""
        return self.rows("SELECT coalesce(max(seq), 0) FROM events")[0][0]


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True)
