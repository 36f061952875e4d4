"""Content keys: a hash of everything an image depends on, so that equal requests run once."""

from __future__ import annotations

import hashlib
import json
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sfumato.request import GenerateRequest

__all__ = ["NUMERICS", "canonical", "file_name", "image_key", "salt_of"]

_encode = json.JSONEncoder(ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode

# Increased whenever the same request with the same checkpoint starts to give different numbers.
NUMERICS = 1


def salt_of(model: str, numerics: dict[str, Any]) -> str:
    """Return the common prefix of a checkpoint's keys: its hash, and all else that determines an image's bits."""
    return f"{model}\n{json.dumps(numerics, sort_keys=True)}\n"


def canonical(request: GenerateRequest | dict[str, Any]) -> str:
    """Return the canonical text of a request, or of its JSON values."""
    return _encode(request if isinstance(request, dict) else request.to_dict())


def image_key(salt: str, source: str, text: str) -> str:
    """Return the key of one image: 32 hexadecimal digits. source: the hash of the input image, or ""."""
    return hashlib.sha256(f"{salt}{source}\n{text}".encode()).hexdigest()[:32]


def file_name(prompt: str, key: str) -> str:
    """Return a readable file name that contains enough of the key to be unique."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60].strip("-")
    return f"{words or 'image'}-{key[:12]}.png"
