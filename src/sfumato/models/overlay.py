"""Replaces a model's weights temporarily and restores them bit for bit.

Replacements are computed from the model's own weights, which are kept, so only replaced weights take memory twice.
Weights in 8 bits are widened for this, and their replacements rounded to 8 bits.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sfumato.checkpoints.weights import without_weights
from sfumato.models.eight_bits import EightBit, Stored, stored
from sfumato.models.packed import is_packed, plain

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["Overlay", "own_weights", "put_on", "take_off", "weight_shapes"]


@dataclass
class Overlay:
    """The replaced weights of a model. `key` identifies the replacements; `own` holds the original weights by name, as
    tensors or `Stored`.

    fused: whether saving the model saves the replacements.
    """

    key: Any
    fused: bool = False
    own: dict[str, Any] = field(default_factory=dict)


def put_on(
    model: Any, key: Any, changed: Mapping[str, Callable[[Tensor, Tensor], None]], *, fused: bool = False
) -> None:
    """Replace weights: functions in `changed` read the original, and write the replacement to the second argument.

    Weights are replaced one at a time, and those from an earlier call that are not named are restored. Device and dtype
    do not change; on an accelerator, the originals are kept in host memory.
    """
    before = model.overlay or Overlay(())
    for name in before.own.keys() - changed.keys():
        _put_back(model, name, before.own.pop(name))
    overlay = model.overlay = Overlay(None, fused, before.own)  # set the key only after all weights are replaced
    for name, make in changed.items():
        layer, last = _layer(model, name)
        if isinstance(layer, EightBit) and last == "weight":
            _store(layer, overlay.own.setdefault(name, layer.stored), make)
            continue
        weight = getattr(layer, last)
        if name not in overlay.own:
            overlay.own[name] = weight.data.cpu()
            weight.data = torch.empty_like(weight)
        make(overlay.own[name].to(weight.device), weight.data)
    overlay.key = key
    if not overlay.own:
        model.overlay = None


def take_off(model: Any) -> None:
    """Restore the model's own weights."""
    put_on(model, (), {})


def own_weights(model: Any) -> dict[str, Tensor]:
    """Return the `state_dict` with the model's own weights."""
    kept = {} if model.overlay is None else model.overlay.own
    kept = {name: one.widened() if isinstance(one, Stored) else one for name, one in kept.items()}
    return {name: kept.get(name, weight) for name, weight in model.state_dict().items()}


def weight_shapes(model: Any) -> dict[str, torch.Size]:
    """Return the names and shapes of all weights in the model's order, packed or not."""
    if model.shapes is None:
        whole: nn.Module = model
        if is_packed(model) or model.eight_bit:
            with without_weights():
                whole = type(model)(model.config)
        model.shapes = {name: weight.shape for name, weight in whole.named_parameters()}
    return model.shapes


def _layer(model: Any, name: str) -> tuple[nn.Module, str]:
    path, _, last = name.rpartition(".")
    return plain(model, path), last


def _store(layer: EightBit, own: Any, make: Callable[[Tensor, Tensor], None]) -> None:
    wide = own.widened(torch.float32)
    changed = torch.empty_like(wide)
    make(wide, changed)
    layer.store(replace(stored(changed, layer.scales.dtype), signs=own.signs))


def _put_back(model: Any, name: str, own: Any) -> None:
    layer, last = _layer(model, name)
    if isinstance(layer, EightBit) and isinstance(own, Stored):
        layer.store(own)
    else:
        weight = getattr(layer, last)
        weight.data = own.to(weight.device)
