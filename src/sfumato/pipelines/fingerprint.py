"""Identifies a network's weights independently of their precision."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from sfumato.models.overlay import own_weights

if TYPE_CHECKING:
    from sfumato.models.base import Model

__all__ = ["fingerprint"]

# Values of each tensor that are looked at: enough to tell two trainings apart, few enough to cost milliseconds.
SAMPLES = 64


def fingerprint(model: Model) -> str:
    """A hash of names, shapes and the signs of a sample of all weights of a network, without what adapters change.

    Signs survive every cast between precisions, so a checkpoint has one hash in all of them; another training flips
    some of the tens of thousands that are looked at.
    """
    if model.fingerprint is not None:
        return model.fingerprint
    if model.device.type == "meta" and model.can_reload:  # of a stage that another checkpoint has taken
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
