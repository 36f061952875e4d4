"""The adapters active on a checkpoint, their weights, and merging their changes into the model.

Everything is computed from the model's own weights in float32, added up, and cast once; so the order in which adapters
were put on and taken off, and what was worn before, make no difference (models/overlay.py).
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


# Numbers of a weight that are merged at a time.
BLOCK = 2**20


@dataclass(frozen=True, eq=False)
class Worn:
    """An adapter and how strongly it is worn.

    weight: of all, but where `parts` say another: weights by the beginning of modules' names, of which the longest one
    holds, such as {"text_encoder": 0.5, "unet.up_blocks.1": 0}. without: the networks that it leaves alone.
    """

    adapter: Adapter
    weight: float = 1.0
    parts: Mapping[str, float] = field(default_factory=dict)
    without: frozenset[str] = frozenset()

    def strength(self, role: str, path: str) -> float:
        """The weight of a module."""
        if role in self.without:
            return 0.0
        names = [one for one in self.parts if f"{role}.{path}.".startswith(f"{one}.")]
        # One weight of the text encoder is that of all there are.
        names += ["text_encoder"] if not names and role == "text_encoder_2" and "text_encoder" in self.parts else []
        return self.parts[max(names, key=len)] if names else self.weight

    def scaled(self, factor: float) -> Worn:
        """The same, this many times as strong."""
        parts = {name: factor * weight for name, weight in self.parts.items()}
        return replace(self, weight=factor * self.weight, parts=parts)

    @property
    def key(self) -> tuple[Any, ...]:
        """What the weights it leads to depend on."""
        return (self.adapter.stored.sha256, self.weight, tuple(sorted(self.parts.items())), self.without)


@dataclass(frozen=True, eq=False)
class EmbeddedFile:
    """A file of embeddings that was loaded: its path, the word that was asked for, its hash, and what it held."""

    path: Path
    token: str | None
    sha256: str
    embeddings: tuple[Embedding, ...]


@dataclass(frozen=True, eq=False)
class Outfit:
    """Everything that was added to a checkpoint: adapters by name, and embeddings.

    active: the names of those that are worn, and how strongly; fused: those worn whatever else is; enabled: whether the
    active ones are worn at all; files: those that the embeddings are from.
    """

    adapters: Mapping[str, Worn] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    fused: tuple[Worn, ...] = ()
    enabled: bool = True
    embeddings: tuple[Embedding, ...] = ()
    files: tuple[EmbeddedFile, ...] = ()

    def worn(self, scale: float = 1.0) -> tuple[Worn, ...]:
        """What is worn; the scale is that of a call, which what is fused does not heed."""
        active = [self.adapters[name] for name in self.active] if self.enabled else []
        return (*self.fused, *(one if scale == 1 else one.scaled(scale) for one in active))

    @property
    def all_embeddings(self) -> tuple[Embedding, ...]:
        """Those that were loaded, and those that adapters brought along."""
        return (*(one for worn in self.adapters.values() for one in worn.adapter.embeddings), *self.embeddings)


def wear(model: Any, role: str, worn: Sequence[Worn], *, fused: bool = False) -> None:
    """Have a network wear exactly these. What is not touched stays where it is, and so does a weight whose sum is 0.

    fused: whether what is worn is the model's own from now on for whoever saves it.
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
    """The weights of a network that change, by name, and what makes each of its own."""
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
    """Bytes of a network's own weights that are kept beside those that these adapters change."""
    shapes = weight_shapes(model) if worn else {}
    return sum(shapes[name].numel() for name in _made(role, worn)) * model.dtype.itemsize


def _wide(own: Tensor) -> Tensor:
    return own if own.dtype == torch.float64 else own.float()


def _merge(every: Sequence[tuple[Change, float]], own: Tensor, into: Tensor) -> None:
    """Own weight and changes, summed up in float32."""
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
    """A few rows after the other, so that what is between stays in the cache."""
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
