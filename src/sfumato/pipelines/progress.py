"""The progress bar of a pipeline call."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Bar", "Progress"]


@dataclass
class Bar:
    """A progress bar, created when the number of steps is known."""

    config: Mapping[str, Any]
    bar: Any = None

    def advance(self, done: int, total: int) -> None:
        """Show that `done` of `total` U-Net calls are finished."""
        if self.bar is None:
            from tqdm.auto import tqdm

            settings: dict[str, Any] = {"total": total} | dict(self.config)
            self.bar = tqdm(**settings)
        self.bar.update(done - self.bar.n)


@dataclass(frozen=True)
class Progress:
    """The settings of progress bars, which are `tqdm`'s arguments."""

    config: Mapping[str, Any] = field(default_factory=dict)

    @contextmanager
    def bar(self) -> Iterator[Bar]:
        """Create a bar that is closed at the end of the block."""
        bar = Bar(self.config)
        try:
            yield bar
        finally:
            if bar.bar is not None:
                bar.bar.close()
