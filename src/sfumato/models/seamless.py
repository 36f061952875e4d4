"""Seamless images: every convolution wraps around at the edges.

The network then commutes with circular shifts of its input, so the image has no edges along those axes.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.models.blocks import Downsample2D
from sfumato.models.packed import PackedConv2d, PackedEightBit, PackedUpsample2D

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["seamless", "wrapped"]


@contextmanager
def seamless(model: nn.Module, axes: str) -> Iterator[None]:
    """Pad a model's convolutions circularly along "x", "y" or "xy" inside this context, including packed ones.

    A compiled model runs uncompiled meanwhile.
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
    """Extend an image (B, C, H, W) circularly by columns ("x") and rows ("y")."""
    for axis, dim in (("x", 3), ("y", 2)):
        if axis in axes and before + after:
            x = _continued(x, before, after, dim)
    return x


def _continued(x: Tensor, before: int, after: int, dim: int) -> Tensor:
    sides = (before, after, 0, 0) if dim == 3 else (0, 0, before, after)
    if max(sides) <= x.shape[dim]:
        return F.pad(x, sides, mode="circular")
    size = x.shape[dim]  # smaller than its margin, so repeat it
    rows = [i % size for i in range(-before, size + after)]
    return x[:, :, :, rows] if dim == 3 else x[:, :, rows]


def _hooks(layer: Any, axes: str) -> list[Any]:
    """Return hooks that make a layer pad circularly. It still pads with zeros, but that part is cropped."""
    match layer:
        case nn.Conv2d() | PackedConv2d() | PackedEightBit() if any(layer.padding):
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
    """Return hooks that add margins to a layer's input and crop its output to `result_of(side)` from `cut` on."""
    sides: list[tuple[int, ...]] = []

    def enlarge(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *size = given
        sides.append(tuple(map(result_of, x.shape[2:])))
        if size and size[0] is not None:  # the output size of an upsampling layer
            if tuple(size[0]) != sides[-1]:
                sides[-1] = ()
                return given  # odd sizes are computed by the inner convolution, which has its own hooks
            size = [tuple(side + 2 * sum(margins) * (axis in axes) for axis, side in zip("yx", size[0], strict=True))]
        return wrapped(x, *margins, axes), *size

    def shorten(_: nn.Module, given: tuple[Any, ...], result: Tensor) -> Tensor:
        for axis, dim, side in zip("yx", (2, 3), sides.pop(), strict=False):
            result = result.narrow(dim, cut, side) if axis in axes else result
        return result

    return [layer.register_forward_pre_hook(enlarge), layer.register_forward_hook(shorten)]
