"""Replaces a model's weights temporarily and restores them bit for bit.

Replacements are computed from the model's own weights, which are kept, so only replaced weights take memory twice.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sfumato.checkpoints.weights import without_weights
from sfumato.models.packed import is_packed, plain

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["Overlay", "own_weights", "put_on", "take_off", "weight_shapes"]


@dataclass
class Overlay:
    """The replaced weights of a model. `key` identifies the replacements; `own` holds the original weights by name.

    fused: whether saving the model saves the replacements.
    """

    key: Any
    fused: bool = False
    own: dict[str, Tensor] = field(default_factory=dict)


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
        weight = _weight(model, name)
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
    return {name: kept.get(name, weight) for name, weight in model.state_dict().items()}


def weight_shapes(model: Any) -> dict[str, torch.Size]:
    """Return the names and shapes of all weights in the model's order, packed or not."""
    if model.shapes is None:
        whole: nn.Module = model
        if is_packed(model):
            with without_weights():
                whole = type(model)(model.config)
        model.shapes = {name: weight.shape for name, weight in whole.named_parameters()}
    return model.shapes


def _weight(model: Any, name: str) -> Tensor:
    path, _, last = name.rpartition(".")
    return getattr(plain(model, path), last)


def _put_back(model: Any, name: str, own: Tensor) -> None:
    weight = _weight(model, name)
    weight.data = own.to(weight.device)
