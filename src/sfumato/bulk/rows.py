"""The rows of a job, from JSON Lines, CSV, Parquet or a matrix; each row holds the fields of a `GenerateRequest`."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from typing import TYPE_CHECKING, Any, get_args

from sfumato.bulk.extras import arrow
from sfumato.bulk.matrix import read_matrix
from sfumato.errors import CheckpointError, UsageError
from sfumato.files import check_file, file_hash, open_file
from sfumato.request import GenerateRequest
from sfumato.values import kinds_of, reason, shown

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["Row", "digest_of", "read_rows"]

# The number of a row, from 1 (in JSON Lines, the line number), and its fields or its error.
Row = tuple[int, "dict[str, Any] | UsageError"]
MOST_LINE = 2**24


def read_rows(path: Path) -> Iterator[Row]:
    """Yield all rows of a file, in order. Raises `UsageError` if its content does not match its file name extension."""
    readers = {".jsonl": _lines, ".ndjson": _lines, ".csv": _csv, ".parquet": _parquet, ".toml": _matrix}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UsageError(f"{path} has an unknown format; use one of {', '.join(readers)}")
    try:
        yield from reader(path)
    except CheckpointError as error:
        raise UsageError(str(error)) from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text ({reason(error)}); save it as UTF-8") from error


def digest_of(path: Path) -> str:
    """Return a hash of all input that determines a file's rows."""
    try:
        if path.suffix.lower() == ".toml":  # its lists may be in other files
            digest = hashlib.sha256()
            for _, row in read_rows(path):
                digest.update(json.dumps(row, sort_keys=True, default=str).encode())
            return digest.hexdigest()[:32]
        return file_hash(path, None)[:32]
    except CheckpointError as error:
        raise UsageError(str(error)) from error


def _lines(path: Path) -> Iterator[Row]:
    with open_file(path, None) as stream:
        number = 0
        while line := stream.readline(MOST_LINE):
            number += 1
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield number, UsageError(f"not valid JSON ({reason(error)})")
                continue
            yield number, _present(value)


def _present(value: Any) -> dict[str, Any] | UsageError:
    if not isinstance(value, dict):
        return UsageError(f"a row must be a JSON object with the fields of a request, not {shown(value)}")
    return {name: one for name, one in value.items() if one is not None}


def _csv(path: Path) -> Iterator[Row]:
    texts = {name for name, kind in kinds_of(GenerateRequest).items() if _takes_text(kind)}
    with open_file(path, None) as stream, io.TextIOWrapper(stream, "utf-8-sig", newline="") as text:
        rows = csv.DictReader(text, strict=True)
        number = 0
        while True:
            number += 1
            try:
                row = next(rows, None)
            except csv.Error as error:
                yield number, UsageError(f"not valid CSV ({reason(error)})")
                continue
            if row is None:
                return
            if row.pop(None, None) is not None:  # pyright: ignore[reportArgumentType, reportCallIssue]
                yield (
                    number,
                    UsageError(
                        "the row has more values than the first line has names; put quotes around texts with commas"
                    ),
                )
                continue
            filled = {name: value for name, value in row.items() if value}
            yield number, {name: value if name in texts else _number(value) for name, value in filled.items()}


def _takes_text(kind: Any) -> bool:
    return kind is str or any(_takes_text(one) for one in get_args(kind) if not isinstance(one, str))


def _number(text: str) -> Any:
    """Parse a cell of a field that is not text: a number, or a list of numbers. The request reports invalid cells."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _parquet(path: Path) -> Iterator[Row]:
    check_file(path)
    parquet, errors = arrow("pyarrow.parquet"), arrow("pyarrow").ArrowException
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=4096):
                for value in batch.to_pylist():
                    number += 1
                    row = _present(value)
                    yield number, {n: _present(v) if isinstance(v, dict) else v for n, v in row.items()}  # pyright: ignore
    except (errors, OSError) as error:
        raise UsageError(f"{path} cannot be read as Parquet ({reason(error)}); write it again") from error


def _matrix(path: Path) -> Iterator[Row]:
    yield from enumerate(read_matrix(path), start=1)
