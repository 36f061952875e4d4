"""The adapters active on a checkpoint, their weights, and merging their changes into the model.

All changes are computed from the model's own weights in float32, summed, and cast once. The result therefore does not
depend on which adapters were active before or in which order they were added (models/overlay.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from sfumato.adapters.kinds import bias_change, low_rank_factors, weight_change
from sfumato.models.overlay import put_on, take_off, weight_shapes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from torch import Tensor

    from sfumato.adapters.adapter import Adapter
    from sfumato.adapters.kinds import Change
    from sfumato.text.embeddings import Embedding

__all__ = ["EmbeddedFile", "Outfit", "Worn", "kept_bytes", "wear"]


# Number of weight elements that are merged at a time.
BLOCK = 2**20


@dataclass(frozen=True, eq=False)
class Worn:
    """An active adapter and its strength.

    weight: for all modules without an entry in `parts`; parts: weights by the beginning of module names, such as
    {"text_encoder": 0.5, "unet.up_blocks.1": 0}, of which the longest match applies; without: networks not to change.
    """

    adapter: Adapter
    weight: float = 1.0
    parts: Mapping[str, float] = field(default_factory=dict)
    without: frozenset[str] = frozenset()

    def strength(self, role: str, path: str) -> float:
        """Return the weight for a module."""
        if role in self.without:
            return 0.0
        names = [one for one in self.parts if f"{role}.{path}.".startswith(f"{one}.")]
        # A weight for the text encoder applies to all text encoders.
        names += ["text_encoder"] if not names and role == "text_encoder_2" and "text_encoder" in self.parts else []
        return self.parts[max(names, key=len)] if names else self.weight

    def scaled(self, factor: float) -> Worn:
        """Return a copy with all weights multiplied by a factor."""
        parts = {name: factor * weight for name, weight in self.parts.items()}
        return replace(self, weight=factor * self.weight, parts=parts)

    @property
    def key(self) -> tuple[Any, ...]:
        """Everything that the resulting weights depend on."""
        return (self.adapter.stored.sha256, self.weight, tuple(sorted(self.parts.items())), self.without)


@dataclass(frozen=True, eq=False)
class EmbeddedFile:
    """A loaded file of embeddings: its path, the requested word, its SHA-256, and its embeddings."""

    path: Path
    token: str | None
    sha256: str
    embeddings: tuple[Embedding, ...]


@dataclass(frozen=True, eq=False)
class Outfit:
    """The adapters, by name, and embeddings that were added to a checkpoint.

    active: names of the active adapters; fused: adapters that are always applied; enabled: whether active adapters are
    applied; files: the files of the embeddings.
    """

    adapters: Mapping[str, Worn] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    fused: tuple[Worn, ...] = ()
    enabled: bool = True
    embeddings: tuple[Embedding, ...] = ()
    files: tuple[EmbeddedFile, ...] = ()

    def worn(self, scale: float = 1.0) -> tuple[Worn, ...]:
        """Return the adapters to apply. scale: a call's factor for their weights; it does not affect fused adapters."""
        active = [self.adapters[name] for name in self.active] if self.enabled else []
        return (*self.fused, *(one if scale == 1 else one.scaled(scale) for one in active))

    @property
    def all_embeddings(self) -> tuple[Embedding, ...]:
        """The loaded embeddings, and those bundled with adapters."""
        return (*(one for worn in self.adapters.values() for one in worn.adapter.embeddings), *self.embeddings)


def wear(model: Any, role: str, worn: Sequence[Worn], *, fused: bool = False) -> None:
    """Apply exactly these adapters to a network. Weights without changes are not copied.

    fused: whether saving the model saves the changed weights.
    """
    made = _made(role, worn)
    if not made:
        take_off(model)
        return
    key = tuple(one.key for one in worn)
    if model.overlay is not None and model.overlay.key == key:
        model.overlay.fused = fused
        return
    with torch.no_grad():
        put_on(model, key, made, fused=fused)


def _made(role: str, worn: Sequence[Worn]) -> dict[str, Callable[[Tensor, Tensor], None]]:
    """Return a function for each weight that changes, by name, which computes it from the model's own weight."""
    changes: dict[str, list[tuple[Change, float]]] = {}
    for one in worn:
        for path, change in one.adapter.changes.get(role, {}).items():
            strength = one.strength(role, path)
            if strength:
                changes.setdefault(path, []).append((change, strength))
    made = {}
    for path, every in changes.items():
        if any(change.kind not in ("", "bias") for change, _ in every):
            made[f"{path}.weight"] = partial(_merge, every)
        if any(part in change.parts for change, _ in every for part in ("diff_b", "up_bias")):
            made[f"{path}.bias"] = partial(_merge_bias, every)
    return made


def kept_bytes(model: Any, role: str, worn: Sequence[Worn]) -> int:
    """Return the size in bytes of the original weights that are kept in addition to the changed ones."""
    shapes = weight_shapes(model) if worn else {}
    return sum(shapes[name].numel() for name in _made(role, worn)) * model.dtype.itemsize


def _wide(own: Tensor) -> Tensor:
    return own if own.dtype == torch.float64 else own.float()


def _merge(every: Sequence[tuple[Change, float]], own: Tensor, into: Tensor) -> None:
    """Sum a weight and its changes in float32."""
    factors = [low_rank_factors(change, own, strength) for change, strength in every]
    products = [one for one in factors if one is not None]
    if len(products) == len(every) and own.is_contiguous() and into.is_contiguous():
        _add_products(products, own.flatten(1), into.flatten(1))
        return
    wide = total = _wide(own)
    for change, strength in every:
        added = weight_change(change, wide, strength)
        total = total if added is None else total + added
    into.copy_(total)


def _add_products(products: Sequence[tuple[Tensor, Tensor]], own: Tensor, into: Tensor) -> None:
    """Process a few rows at a time, so that intermediate results stay in the cache."""
    rows = max(1, BLOCK // own.shape[1])
    for begin in range(0, own.shape[0], rows):
        here = slice(begin, begin + rows)
        total = _wide(own[here])
        for up, down in products:
            total = torch.addmm(total, up[here], down)
        into[here] = total


def _merge_bias(every: Sequence[tuple[Change, float]], own: Tensor, into: Tensor) -> None:
    total = _wide(own)
    for change, strength in every:
        added = bias_change(change, strength)
        total = total if added is None else total + added.to(own.device).reshape(own.shape)
    into.copy_(total)
