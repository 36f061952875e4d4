"""Identifies a network's weights independently of their precision."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from sfumato.models.overlay import own_weights

if TYPE_CHECKING:
    from sfumato.models.base import Model

__all__ = ["fingerprint"]

# Number of values to read from each tensor: enough to tell two trainings apart, few enough to take only milliseconds.
SAMPLES = 64


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
    for name, tensor in sorted(own_weights(model).items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        flat = tensor.detach().flatten()
        part = flat[:: max(1, flat.numel() // SAMPLES)][:SAMPLES]
        digest.update(part.signbit().cpu().numpy().tobytes())
    return digest.hexdigest()[:32]
