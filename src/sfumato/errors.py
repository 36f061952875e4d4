"""Every error that Sfumato raises on purpose, in one hierarchy.

Each message is one sentence that users can act on: it names the file, key or argument, and the next step::

    SfumatoError                       failure, exit code 1
    ├── UsageError (ValueError)        a wrong argument or request, exit code 2
    │   └── UnknownArgument (TypeError)
    ├── ConfigError (ValueError)       a configuration value that is not supported
    ├── CheckpointError (OSError)      a file of a checkpoint is missing, damaged or does not fit its model
    │   ├── DownloadError              the hub could not be reached, or lacks the requested files
    │   └── VariantError (ValueError)  no weights have the requested variant
    ├── NotHere (AttributeError)       a name from diffusers that Sfumato lacks; the message says what to use instead
    ├── OutputError (OSError)          a result could not be written
    ├── MissingExtra (ImportError)     an optional dependency is not installed
    ├── MemoryPlanError (MemoryError)  a request does not fit in memory; `needed` and `free` are bytes
    └── NonFiniteError (ArithmeticError)  a stage produced NaN or infinity; `stage` names it
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DownloadError",
    "MemoryPlanError",
    "MissingExtra",
    "NonFiniteError",
    "NotHere",
    "OutputError",
    "SfumatoError",
    "UnknownArgument",
    "UsageError",
    "VariantError",
    "suggest",
]


class SfumatoError(Exception):
    """Base of every intentional error."""

    exit_code = 1


class UsageError(SfumatoError, ValueError):
    """A wrong argument, request or combination of both."""

    exit_code = 2


class UnknownArgument(UsageError, TypeError):
    """An argument or name that does not exist; the message suggests the nearest one that does."""


class ConfigError(SfumatoError, ValueError):
    """A configuration value that is not supported."""


class CheckpointError(SfumatoError, OSError):
    """A file of a checkpoint is missing, damaged, or does not fit its model."""


class DownloadError(CheckpointError):
    """The hub could not be reached, or does not have the requested files."""


class VariantError(CheckpointError, ValueError):
    """No weights have the requested variant, such as "fp16"."""


class NotHere(SfumatoError, AttributeError):
    """A name from diffusers or transformers that Sfumato lacks; the message says what to use instead, if anything."""


class OutputError(SfumatoError, OSError):
    """A result could not be written."""


class MissingExtra(SfumatoError, ImportError):
    """An optional dependency is not installed; the message says how to install it."""


class MemoryPlanError(SfumatoError, MemoryError):
    """A request does not fit in memory; detected before anything is loaded.

    `needed` and `free` are bytes; the message says what would fit.
    """

    def __init__(self, sentence: str, *, needed: int, free: int) -> None:
        super().__init__(sentence)
        self.needed, self.free = needed, free


class NonFiniteError(SfumatoError, ArithmeticError):
    """A stage produced NaN or infinity.

    `stage` names it: "text encoder", "U-Net, step 7 of 20", "VAE decoder", …
    """

    def __init__(self, stage: str, hint: str) -> None:
        super().__init__(f"{stage}: the result has NaN or infinite values; {hint}")
        self.stage = stage


def suggest(name: object, known: Iterable[str]) -> str:
    """Return `" (did you mean 'x'?)"` with the most similar known name, or an empty string if none is similar."""
    near = get_close_matches(str(name)[:100], list(known), n=1, cutoff=0.6)
    return f" (did you mean {near[0]!r}?)" if near else ""
