"""Content keys: a hash of everything an image depends on, so that equal requests run once."""

from __future__ import annotations

import hashlib
import json
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sfumato.request import GenerateRequest

__all__ = ["NUMERICS", "canonical", "file_name", "image_key", "salt_of"]

# Rises when the same request with the same checkpoint comes to give other numbers.
NUMERICS = 1


def salt_of(model: str, numerics: dict[str, Any]) -> str:
    """What all keys of a checkpoint begin with: its hash, and what else decides an image's bits."""
    return f"{model}\n{json.dumps(numerics, sort_keys=True)}\n"


def canonical(request: GenerateRequest) -> str:
    """A request as the one text that stands for it."""
    return json.dumps(request.to_dict(), ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def image_key(salt: str, source: str, text: str) -> str:
    """The key of one image: 32 hexadecimal digits. source: the hash of the image it starts from, or ""."""
    return hashlib.sha256(f"{salt}{source}\n{text}".encode()).hexdigest()[:32]


def file_name(prompt: str, key: str) -> str:
    """A name for people, with enough of the key to be no other image's."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60].strip("-")
    return f"{words or 'image'}-{key[:12]}.png"
