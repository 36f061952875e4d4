"""The image formats that can be written, by file extension."""

from __future__ import annotations

from pathlib import PurePath

from sfumato.errors import UsageError

__all__ = ["format_of", "is_picture"]

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


def format_of(path: PurePath) -> str:
    """The format that a name's ending says. Raises `UsageError` for another ending."""
    if path.suffix.lower() not in FORMATS:
        raise UsageError(
            f"images are written as PNG, JPEG or WebP, so a name must end in .png, .jpg or .webp, not {path.name}"
        )
    return FORMATS[path.suffix.lower()]


def is_picture(name: str) -> bool:
    """Whether a name is that of a picture that may say how it was drawn."""
    return PurePath(name).suffix.lower() in (*FORMATS, ".gif")
