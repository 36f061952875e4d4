"""Checks shared by network configs: allowed activation functions and size limits."""

from __future__ import annotations

from sfumato.errors import ConfigError

__all__ = ["ACTIVATIONS", "MOST_BLOCKS", "MOST_LAYERS", "check_count", "check_divisible"]

ACTIVATIONS = ("silu", "swish", "mish", "gelu", "relu")
# No network of these families has more, and all layers are created before any weights are read.
MOST_BLOCKS, MOST_LAYERS = 16, 500


def check_divisible(where: str, widths: tuple[int, ...], key: str, parts: tuple[int, ...]) -> None:
    """Raise `ConfigError` unless each width is a multiple of its number of parts."""
    for width, part in zip(widths, parts, strict=True):
        if width % part:
            raise ConfigError(f"{where}: block_out_channels has {width}, which is not divisible by {key} = {part}")


def check_count(where: str, key: str, count: int, most: int) -> None:
    """Raise `ConfigError` for more blocks or layers than any of these networks has."""
    if count > most:
        raise ConfigError(f"{where}: {key} makes {count}, more than the allowed {most}")
