"""Standard streams that always exist, replace characters they cannot print, and report failed writes."""

from __future__ import annotations

import io
import os
import sys
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from sfumato.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["discard", "prepare_streams"]


def prepare_streams() -> None:
    """Make sure all three streams exist. A failed write raises `OutputError` on stdout and is ignored on stderr."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # occupies this number, which the next opened file would get otherwise
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "r" if name == "stdin" else "w", encoding="utf-8", closefd=False))
        stream = getattr(sys, name)
        if number > 0 and type(stream) is io.TextIOWrapper:  # unless somebody replaced the stream
            about = {key: getattr(stream, key) for key in ("encoding", "errors", "line_buffering", "write_through")}
            if about["errors"] == "strict":
                # Characters that cannot be encoded are replaced, but file names that are not valid text stay as they
                # are.
                utf8 = about["encoding"].lower().replace("-", "") == "utf8"
                about["errors"] = "surrogateescape" if utf8 else "replace"
            setattr(sys, name, io.TextIOWrapper(_Stream(io.FileIO(stream.fileno(), "w", closefd=False)), **about))


class _Stream(io.BufferedWriter):
    """The binary layer of a standard stream."""

    def write(self, data: Any) -> int:
        with self._watched():
            return super().write(data)
        return len(data)

    def flush(self) -> None:
        with self._watched():
            super().flush()

    @contextmanager
    def _watched(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if self.fileno() == 1 and isinstance(error, BrokenPipeError):
                raise
            discard(self)
            if self.fileno() == 1:
                why = f"standard output cannot be written ({error.strerror}); send it elsewhere"
                raise OutputError(why) from error


def discard(output: Any) -> None:
    """Redirect a stream to nowhere, including what Python flushes on exit."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), output.fileno())
