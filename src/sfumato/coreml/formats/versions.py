"""Model format versions: Apple's names for them, and the systems that support them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sfumato.errors import CheckpointError, ConfigError

__all__ = ["FIRST_1_3", "OPSETS", "SYSTEMS", "check_spec_version", "opset_of", "text_opset"]

# The opset of functions by specification version, as named in packages.
OPSETS: Mapping[int, str] = {version: f"CoreML{version - 1}" for version in range(4, 11)}

# The lowest version of each system that supports a specification version.
_ORDER = ("iOS", "macOS", "macCatalyst", "tvOS", "watchOS", "visionOS")
SYSTEMS: Mapping[int, Mapping[str, str]] = {
    6: dict(zip(_ORDER, ("15.0", "12.0", "15.0", "15.0", "8.0", "1.0"), strict=True)),
    7: dict(zip(_ORDER, ("16.0", "13.0", "16.0", "16.0", "9.0", "1.0"), strict=True)),
    8: dict(zip(_ORDER, ("17.0", "14.0", "17.0", "17.0", "10.0", "1.0"), strict=True)),
    9: dict(zip(_ORDER, ("18.0", "15.0", "18.0", "18.0", "11.0", "2.0"), strict=True)),
    10: dict(zip(_ORDER, ("26.0", "26.0", "26.0", "26.0", "26.0", "26.0"), strict=True)),
}

_WORDS = {OPSETS[version]: "ios" + systems["iOS"].removesuffix(".0") for version, systems in SYSTEMS.items()}

# From this version on, the text of compiled programs is `program(1.3)`.
FIRST_1_3 = 9


def check_spec_version(path: Path, version: int) -> None:
    """Raise `ConfigError` if a specification version is too new for Sfumato, `CheckpointError` if it is invalid."""
    if version < 1:
        raise CheckpointError(f"{path} is damaged: it has no version of the format; copy or download it again")
    if version > max(OPSETS):
        raise ConfigError(
            f"{path} is written in version {version} of the Core ML format, which is newer than {max(OPSETS)}; "
            "update Sfumato, or convert the model for an older system"
        )


def text_opset(opset: str) -> str:
    """Return the name of an opset such as "CoreML6" in the text of compiled programs: "ios16".

    Raises `ConfigError` if it is unknown.
    """
    if opset not in _WORDS:
        raise ConfigError(f"the opset {opset!r} is not known; convert the model for iOS 15 or later")
    return _WORDS[opset]


def opset_of(word: str) -> str | None:
    """Return the opset for a name such as "ios16" in the text of compiled programs, or None."""
    return next((opset for opset, known in _WORDS.items() if word == known), None)
