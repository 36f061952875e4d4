"""Identifies a network's weights independently of their precision."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from sfumato.models.eight_bits import Stored, eight_bit_layers, signs
from sfumato.models.overlay import own_weights

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from sfumato.models.base import Model

__all__ = ["fingerprint"]


def fingerprint(model: Model) -> str:
    """Hash the names, shapes, and signs of sampled values of a network's own weights, without adapters.

    Signs survive casts, so the hash does not depend on the precision. Further training flips some of the tens of
    thousands of signs.
    """
    if model.fingerprint is not None:
        return model.fingerprint
    if model.device.type == "meta" and model.can_reload:  # its weights have left memory
        model.reload()
        try:
            model.fingerprint = fingerprint(model)
        finally:
            model.forget()
        return model.fingerprint
    digest = hashlib.sha256()
    for name, weight in sorted(_own(model).items()):
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        digest.update((weight.signs if isinstance(weight, Stored) else signs(weight)).numpy().tobytes())
    return digest.hexdigest()[:32]


def _own(model: Model) -> Mapping[str, Tensor | Stored]:
    """Return a network's own weights by name. Those in 8 bits know their signs before rounding."""
    if not model.eight_bit:
        return own_weights(model)
    kept = {} if model.overlay is None else model.overlay.own
    light = {f"{path}.weight": layer.stored for path, layer in eight_bit_layers(model)}
    return {name: kept.get(name, weight) for name, weight in (dict(model.named_parameters()) | light).items()}
