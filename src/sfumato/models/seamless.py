"""Seamless images: every convolution wraps around at the edges.

So a network commutes with moving its input around in a circle, and an image has no edge in that direction.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.models.blocks import Downsample2D
from sfumato.models.packed import PackedConv2d, PackedUpsample2D

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["seamless", "wrapped"]


@contextmanager
def seamless(model: nn.Module, axes: str) -> Iterator[None]:
    """Within the block, the convolutions of a model pad circularly along "x", "y" or "xy", packed ones too.

    A model that was compiled runs uncompiled for as long.
    """
    compiled, model._compiled_call_impl = model._compiled_call_impl, None
    hooks = [hook for layer in model.modules() for hook in _hooks(layer, axes)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        model._compiled_call_impl = compiled


def wrapped(x: Tensor, before: int, after: int, axes: str) -> Tensor:
    """An image (B, C, H, W) with columns ("x") and rows ("y") added that continue it at its opposite side."""
    for axis, dim in (("x", 3), ("y", 2)):
        if axis in axes and before + after:
            x = _continued(x, before, after, dim)
    return x


def _continued(x: Tensor, before: int, after: int, dim: int) -> Tensor:
    sides = (before, after, 0, 0) if dim == 3 else (0, 0, before, after)
    if max(sides) <= x.shape[dim]:
        return F.pad(x, sides, mode="circular")
    size = x.shape[dim]  # smaller than its margin, it is there several times
    rows = [i % size for i in range(-before, size + after)]
    return x[:, :, :, rows] if dim == 3 else x[:, :, rows]


def _hooks(layer: Any, axes: str) -> list[Any]:
    """The hooks that have a layer pad circularly; it pads with zeros as well, and what these made is cut off."""
    match layer:
        case nn.Conv2d() | PackedConv2d() if any(layer.padding):
            margin, stride, size = (int(one[0]) for one in (layer.padding, layer.stride, layer.kernel_size))
            around, reach = (margin * stride, margin * stride), 2 * margin - size
            return _around(layer, axes, around, margin, lambda side: (side + reach) // stride + 1)
        case Downsample2D() if layer.padding == 0:
            return _around(layer, axes, (0, 2), 0, lambda side: side // 2)
        case PackedUpsample2D():
            return _around(layer, axes, (1, 1), 2, lambda side: 2 * side)
        case _:
            return []


def _around(
    layer: nn.Module, axes: str, margins: tuple[int, int], cut: int, result_of: Callable[[int], int]
) -> list[Any]:
    """Have a layer read margins as well, and keep what it makes of its input alone: from `cut` on, and as long as
    `result_of` a side.
    """
    sides: list[tuple[int, ...]] = []

    def enlarge(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *size = given
        sides.append(tuple(map(result_of, x.shape[2:])))
        if size and size[0] is not None:  # that of an upsampling layer's result
            if tuple(size[0]) != sides[-1]:
                sides[-1] = ()
                return given  # an odd one is made by the convolution inside, which has hooks of its own
            size = [tuple(side + 2 * sum(margins) * (axis in axes) for axis, side in zip("yx", size[0], strict=True))]
        return wrapped(x, *margins, axes), *size

    def shorten(_: nn.Module, given: tuple[Any, ...], result: Tensor) -> Tensor:
        for axis, dim, side in zip("yx", (2, 3), sides.pop(), strict=False):
            result = result.narrow(dim, cut, side) if axis in axes else result
        return result

    return [layer.register_forward_pre_hook(enlarge), layer.register_forward_hook(shorten)]
