"""The image formats that can be written, by file extension."""

from __future__ import annotations

from pathlib import PurePath

from sfumato.errors import UsageError

__all__ = ["format_of", "is_picture"]

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


def format_of(path: PurePath) -> str:
    """Return the format for a file extension. Raises `UsageError` if it is not supported."""
    if path.suffix.lower() not in FORMATS:
        raise UsageError(
            f"images are written as PNG, JPEG or WebP, so the name must end in .png, .jpg or .webp, not {path.name}"
        )
    return FORMATS[path.suffix.lower()]


def is_picture(name: str) -> bool:
    """Return whether a name is that of an image file that may contain settings."""
    return PurePath(name).suffix.lower() in (*FORMATS, ".gif")
