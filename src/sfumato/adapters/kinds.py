"""The weight change that each kind of adapter makes, in float32 (float64 for float64 models).

W (o, i[, k, k]) is the model's own weight, m the requested strength and s = alpha / rank, or 1 if no alpha is stored.
Tensors have their names in the files. Sources: LoRA arXiv 2106.09685, LoHa 2108.06098, LyCORIS (LoKr, tucker)
2309.14859, GLoRA 2306.07967, (IA)3 2205.05638, OFT 2306.07280, BOFT 2311.06243, DoRA 2402.09353.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

__all__ = ["Change", "bias_change", "is_product", "kind_of", "low_rank_factors", "rank_of", "weight_change"]

# The parts that identify each kind, in order of precedence. All other parts are optional.
_LOKR = [
    {*a, *b} for a in (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b")) for b in (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"))
]
KINDS: dict[str, list[set[str]]] = {
    "LoRA": [{"up", "down"}], "LoHa": [{"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}], "LoKr": _LOKR,
    "GLoRA": [{"a1", "a2", "b1", "b2"}], "OFT": [{"oft_blocks"}], "(IA)3": [{"ia3", "on_input"}, {"ia3_l"}],
    "set": [{"set_weight"}], "difference": [{"diff"}], "bias": [{"diff_b"}],
}  # fmt: skip
# Kinds that can be combined with dora_scale or with peft's magnitude.
DECOMPOSED = ("LoRA", "LoHa", "LoKr", "GLoRA")


@dataclass(frozen=True)
class Change:
    """The change that an adapter makes to one module. parts: tensors by part; scale: replaces alpha / rank if given."""

    parts: Mapping[str, Tensor]
    alpha: float | None = None
    scale: float | None = None

    @property
    def kind(self) -> str:
        """The name of its kind; "" if the parts do not form a change."""
        return kind_of(self.parts)

    def at(self, like: Tensor, part: str) -> Tensor:
        """Return a part on the device and in the dtype of a weight."""
        return self.parts[part].to(like.device, like.dtype)

    def scaled(self) -> float:
        """Return the factor s."""
        if self.scale is not None:
            return self.scale
        rank = rank_of(self.parts)
        return 1.0 if not self.alpha or not rank else self.alpha / rank


def kind_of(parts: Mapping[str, object]) -> str:
    """Return the kind that these parts form; "" if none."""
    return next((kind for kind, sets in KINDS.items() if any(one <= parts.keys() for one in sets)), "")


def rank_of(parts: Mapping[str, Tensor]) -> int | None:
    """Return the rank of a change; None if its kind has none."""
    for part in ("down", "hada_w1_b", "a2", "lokr_w1_b", "lokr_w2_b"):
        if part in parts:
            return min(parts[part].shape[: 2 if part == "a2" else 1], default=None)
    return None


def weight_change(change: Change, own: Tensor, strength: float) -> Tensor | None:
    """Return the difference to add to a weight at this strength, in its shape; None if only the bias changes.

    DoRA: V = W + s dW, and m (V d / ||V|| - W), with the norm over the dimensions that the shape of d lacks. With
    peft's magnitude, m scales dW within V, as in peft.
    """
    kind = change.kind
    if kind in ("", "bias"):
        return None
    if kind not in DECOMPOSED:
        return _OTHERS[kind](change, own, strength)
    dora, magnitude = "dora_scale" in change.parts, "magnitude" in change.parts
    added = _low_rank(kind, change, own, change.scaled() * (1.0 if dora else strength))
    if not (dora or magnitude):
        return added
    whole = own + added
    if magnitude:
        length = change.at(own, "magnitude").reshape(-1, *[1] * (own.ndim - 1))
        return whole * (length / _norm(whole, out=True)) - own
    length = change.at(own, "dora_scale")
    out = length.shape[0] == own.shape[0] and length.numel() == own.shape[0]
    length = length.reshape(-1, *[1] * (own.ndim - 1)) if out else length.reshape(1, -1, *[1] * (own.ndim - 2))
    return strength * (whole * (length / (_norm(whole, out=out) + torch.finfo(own.dtype).eps)) - own)


def bias_change(change: Change, strength: float) -> Tensor | None:
    """Return the difference to add to the bias; None if it does not change."""
    if "diff_b" in change.parts:
        return change.parts["diff_b"].float() * strength
    if "up_bias" in change.parts:
        return change.parts["up_bias"].float() * (strength * change.scaled())
    return None


def is_product(change: Change) -> bool:
    """Return whether a change is a plain LoRA, which adds the product of two matrices."""
    parts = change.parts
    whole = change.kind == "LoRA" and min(parts["up"].ndim, parts["down"].ndim) > 1
    return whole and not {"mid", "dora_scale", "magnitude"} & parts.keys()


def low_rank_factors(change: Change, own: Tensor, strength: float) -> tuple[Tensor, Tensor] | None:
    """Return the two matrices whose product a plain LoRA adds to the flattened weight; None for all other kinds."""
    if not is_product(change):
        return None
    dtype = torch.float64 if own.dtype == torch.float64 else torch.float32
    up, down = (change.parts[part].to(own.device, dtype).flatten(1) for part in ("up", "down"))
    return up * (strength * change.scaled()), down


def _norm(weight: Tensor, *, out: bool) -> Tensor:
    """Return the norm of each row (`out`) or each column of a matrix or filter."""
    dims = [dim for dim in range(weight.ndim) if dim != (0 if out else 1)]
    return torch.linalg.vector_norm(weight, dim=dims, keepdim=True)


def _low_rank(kind: str, change: Change, own: Tensor, factor: float) -> Tensor:
    if kind == "LoRA":
        return _lora(change, own, factor)
    if kind == "LoHa":
        first, second = _hadamard(change, own, "1"), _hadamard(change, own, "2")
        return (first.mul_(second) if factor == 1 else first.mul_(second).mul_(factor)).reshape(own.shape)
    if kind == "LoKr":
        return _kronecker(change, own, factor)
    return _glora(change, own, factor)


def _lora(change: Change, own: Tensor, factor: float) -> Tensor:
    """Up (o, r), down (r, i[, k, k]); with mid (r, r, k, k), down is (r, i): dW = up . mid . down."""
    up, down = change.at(own, "up").flatten(1) * factor, change.at(own, "down")
    if "mid" in change.parts:
        return torch.einsum("op,pqxy,qi->oixy", up, change.at(own, "mid"), down.flatten(1)).reshape(own.shape)
    return (up @ down.flatten(1)).reshape(own.shape)


def _hadamard(change: Change, own: Tensor, number: str) -> Tensor:
    a, b = change.at(own, f"hada_w{number}_a"), change.at(own, f"hada_w{number}_b")
    if f"hada_t{number}" in change.parts:
        return torch.einsum("pqxy,po,qi->oixy", change.at(own, f"hada_t{number}"), a, b)
    return a @ b.flatten(1)


def _kronecker(change: Change, own: Tensor, factor: float) -> Tensor:
    """kron(w1 (a, b), w2 (c, d[, k, k])); each is stored whole or as a product, w2 also in Tucker form."""
    first, second = (_factor(change, own, number) for number in "12")
    if own.ndim == 4 and second.ndim == 2:
        second = second.reshape(second.shape[0], -1, *own.shape[2:])
    first = first.reshape(*first.shape[:2], *[1] * (second.ndim - 2))
    return torch.kron(first * factor, second.contiguous()).reshape(own.shape)


def _factor(change: Change, own: Tensor, number: str) -> Tensor:
    if f"lokr_w{number}" in change.parts:
        return change.at(own, f"lokr_w{number}")
    a, b = change.at(own, f"lokr_w{number}_a"), change.at(own, f"lokr_w{number}_b")
    if f"lokr_t{number}" in change.parts:
        return torch.einsum("pqxy,po,qi->oixy", change.at(own, f"lokr_t{number}"), a, b)
    return a @ b.flatten(1)


def _glora(change: Change, own: Tensor, factor: float) -> Tensor:
    """W a1 a2 + b1 b2; files of the first version store b2 b1 + W a2 a1, recognized by their shapes."""
    a1, a2, b1, b2 = (change.at(own, part) for part in ("a1", "a2", "b1", "b2"))
    rank = min(a1.shape[:2])
    if a1.shape[0] == rank and a1.shape[1] != rank:
        a1, a2, b1, b2 = a2, a1, b2, b1
    mixed = torch.einsum("oi...,ir,rj->oj...", own, a1.flatten(1) * factor, a2.flatten(1))
    return mixed + (b1.flatten(1) * factor @ b2.flatten(1)).reshape(own.shape)


def _times(change: Change, own: Tensor, strength: float) -> Tensor:
    """W times a factor for each row or column. The factor for no change is 0 in LyCORIS and 1 in peft."""
    learned = change.at(own, "ia3" if "ia3" in change.parts else "ia3_l")
    if "ia3" in change.parts:
        by_column = bool(change.parts["on_input"].item())
    else:
        learned, by_column = learned - 1, learned.ndim > 1 and learned.shape[1] == own.shape[1] != 1
    shape = (1, -1) if by_column else (-1, 1)
    return own * learned.reshape(*shape, *[1] * (own.ndim - 2)) * strength


def _difference(change: Change, own: Tensor, strength: float) -> Tensor:
    return (change.at(own, "diff") * strength).reshape(own.shape)


def _instead(change: Change, own: Tensor, strength: float) -> Tensor:
    return (change.at(own, "set_weight").reshape(own.shape) - own) * strength


def _rotation(change: Change, own: Tensor, strength: float) -> Tensor:
    """R W with R = (I + Q)(I - Q)^-1 for blocks of rows, Q = B - B^T; the strength interpolates from I to R.

    Blocks (n, b, b), or (j, n, b, b) for the butterfly of BOFT; the norm of Q is at most alpha times the output size.

    `rescale` multiplies rows.
    """
    blocks = change.at(own, "oft_blocks")
    skew = blocks - blocks.transpose(-1, -2)
    bound = (change.alpha or 0.0) * own.shape[0]
    length = torch.linalg.vector_norm(skew) + 1e-8
    if bound > 0:
        skew = skew * torch.clamp(bound / length, max=1.0)
    one = torch.eye(blocks.shape[-1], dtype=own.dtype, device=own.device)
    turned = (one + skew) @ torch.linalg.inv(one - skew)
    turned = one + strength * (turned - one)
    result = own
    if blocks.ndim == 3:
        result = torch.einsum("nij,nj...->ni...", turned.transpose(1, 2), own.unflatten(0, blocks.shape[:2])).flatten(
            0, 1
        )
    for stage in range(blocks.shape[0] if blocks.ndim == 4 else 0):
        stride = 2**stage * blocks.shape[-1] // 2
        rows = result.unflatten(0, (-1, 2, stride)).transpose(1, 2).flatten(0, 2).unflatten(0, (-1, blocks.shape[-1]))
        rows = torch.einsum("nij,nj...->ni...", turned[stage], rows).flatten(0, 1)
        result = rows.unflatten(0, (-1, stride, 2)).transpose(1, 2).flatten(0, 2)
    if "rescale" in change.parts:
        factors = change.at(own, "rescale").reshape(-1, *[1] * (own.ndim - 1))
        result = result * (1 + strength * (factors - 1))
    return result - own


_OTHERS = {"OFT": _rotation, "(IA)3": _times, "set": _instead, "difference": _difference}
