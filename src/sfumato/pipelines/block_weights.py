"""Adapter weights by part and block, in the ecosystem's notation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from sfumato.errors import UsageError
from sfumato.values import shown

__all__ = ["weights_from"]


def weights_from(value: Any) -> tuple[float, dict[str, float]]:
    """Parse a weight in the form of the ecosystem's `set_adapters`: a number, or a dictionary by part and block.

    {"text_encoder": 0.5, "unet": {"down": 0.9, "mid": 1.0, "up": {"block_0": 0.6, "block_1": [0.4, 0.8, 1.0]}}};
    missing entries are 1. Raises `UsageError` for anything else.
    """
    if value is None:
        return 1.0, {}
    if not isinstance(value, Mapping):
        return _number(value), {}
    parts: dict[str, float] = {}
    for part, inner in value.items():
        if part not in ("unet", "text_encoder", "text_encoder_2"):
            raise UsageError(f"weights must be for unet, text_encoder or text_encoder_2, not for {shown(part)}")
        if inner is None:
            continue
        if part != "unet" or not isinstance(inner, Mapping):
            parts[part] = _number(inner)
            continue
        for way, blocks in inner.items():
            if way not in ("down", "mid", "up"):
                raise UsageError(f"U-Net weights must be for down, mid or up, not for {shown(way)}")
            parts |= _blocks(f"unet.{way}_block{'' if way == 'mid' else 's'}", blocks)
    if "text_encoder" in parts:
        parts.setdefault("text_encoder_2", 1.0)  # a request would apply the first one's weight
    return 1.0, parts


def _blocks(name: str, value: Any) -> dict[str, float]:
    if isinstance(value, Mapping):
        found: dict[str, float] = {}
        for block, inner in value.items():
            number = str(block).removeprefix("block_")
            if not number.isdigit():
                raise UsageError(f"block names must be block_0, block_1, …, not {shown(block)}")
            found |= _blocks(f"{name}.{number}", inner)
        return found
    if isinstance(value, (list, tuple)):
        return {f"{name}.attentions.{layer}": _number(one) for layer, one in enumerate(value)}
    return {name: _number(value)}


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise UsageError(f"the weight of an adapter must be a number, not {shown(value)}")
    return float(value)
