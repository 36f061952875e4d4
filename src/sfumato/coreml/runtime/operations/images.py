"""Pooling and image resizing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from sfumato.coreml.runtime.call import Binder, Bound, Call
from sfumato.coreml.runtime.operations.convolution import padded, padding
from sfumato.errors import CheckpointError

__all__ = ["IMAGES"]

_AVERAGE = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_MAXIMUM = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


def _averages(x: Tensor, kernel: Sequence[int], strides: Sequence[int]) -> Tensor:
    return _AVERAGE[len(kernel)](x, tuple(kernel), tuple(strides))


def _pool(windows: Callable[[Tensor, Sequence[int], Sequence[int]], Tensor], outside: float) -> Binder:
    """Bind pooling of an image padded with `outside`: `windows` takes the image, the window sizes and the strides."""

    def bind(call: Call) -> Bound:
        kernel, strides, up = _sizes(call)

        def run(x: Tensor) -> Tensor:
            pairs = padding(call, kernel, strides, (1,) * len(kernel), x.shape[2:])
            pairs = _rounded_up(x.shape[2:], pairs, kernel, strides) if up else pairs
            return windows(padded(x, pairs, outside), kernel, strides)

        return call.bind(run, "x")

    return bind


def _avg_pool(call: Call) -> Bound:
    kernel, strides, up = _sizes(call)
    excluded = call.flag("exclude_padding_from_average")

    def run(x: Tensor) -> Tensor:
        own = padding(call, kernel, strides, (1,) * len(kernel), x.shape[2:])
        pairs = _rounded_up(x.shape[2:], own, kernel, strides) if up else own
        means = _averages(padded(x, pairs), kernel, strides)
        if not excluded and pairs == own:
            return means
        # Excluded padding does not count, nor do positions beyond the padding that only rounding up adds.
        counted = torch.ones(1, 1, *x.shape[2:], dtype=x.dtype)
        if excluded:
            counted = padded(counted, pairs)
        else:
            added = [(0, after - less) for (_, after), (_, less) in zip(pairs, own, strict=True)]
            counted = padded(padded(counted, own, 1.0), added)
        return means / _averages(counted, kernel, strides)

    return call.bind(run, "x")


def _sizes(call: Call) -> tuple[tuple[int, ...], tuple[int, ...], bool]:
    kernel = call.ints("kernel_sizes")
    return kernel, call.ints("strides", (1,) * len(kernel)), call.flag("ceil_mode")


def _rounded_up(
    sides: Sequence[int], pairs: Sequence[tuple[int, int]], kernel: Sequence[int], strides: Sequence[int]
) -> list[tuple[int, int]]:
    """Return the padding that completes a window for every started step, unless it would contain only padding."""
    result = []
    for side, (before, after), size, stride in zip(sides, pairs, kernel, strides, strict=True):
        count = (side + before + after - size + stride - 1) // stride + 1
        if (count - 1) * stride >= side + before and before + after > 0:
            count -= 1
        result.append((before, max(after, (count - 1) * stride + size - side - before)))
    return result


def _maxima(x: Tensor, kernel: Sequence[int], strides: Sequence[int]) -> Tensor:
    return _MAXIMUM[len(kernel)](x, tuple(kernel), tuple(strides))


def _lengths(x: Tensor, kernel: Sequence[int], strides: Sequence[int]) -> Tensor:
    return (_averages(x.square(), kernel, strides) * prod(kernel)).sqrt()


def _as_images(resize: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Resize the last two axes, whatever the leading axes."""
    height, width = x.shape[-2:]
    resized = resize(x.reshape(1, -1, height, width))
    return resized.reshape(*x.shape[:-2], *resized.shape[-2:])


def _upsample_nearest(call: Call) -> Bound:
    down, across = call.number("scale_factor_height", 1), call.number("scale_factor_width", 1)
    if down == int(down) and across == int(across):
        factors = (int(down), int(across))
        return call.bind(lambda x: _as_images(lambda image: _repeated(image, factors), x), "x", moves=True)

    def run(x: Tensor) -> Tensor:
        size = (int(x.shape[-2] * down), int(x.shape[-1] * across))
        return _as_images(lambda image: F.interpolate(image, size, mode="nearest"), x)

    return call.bind(run, "x", moves=True)


def _repeated(image: Tensor, factors: tuple[int, int]) -> Tensor:
    return F.interpolate(image, (image.shape[-2] * factors[0], image.shape[-1] * factors[1]), mode="nearest")


def _resize_nearest(call: Call) -> Bound:
    size = (call.integer("target_size_height"), call.integer("target_size_width"))
    return call.bind(lambda x: _as_images(lambda image: F.interpolate(image, size), x), "x", moves=True)


def _upsample_bilinear(call: Call) -> Bound:
    down, across = call.number("scale_factor_height", 1), call.number("scale_factor_width", 1)
    aligned = call.flag("align_corners", True)
    centred = call.flag("half_pixel_centers", not aligned)
    if aligned and centred:
        raise CheckpointError("align_corners and half_pixel_centers exclude each other, and both are set")
    mode = "STRICT_ALIGN_CORNERS" if aligned else "UNALIGN_CORNERS" if centred else "DEFAULT"
    return call.bind(lambda x: _bilinear(x, (int(x.shape[-2] * down), int(x.shape[-1] * across)), mode), "x")


def _grid(mode: str, side: int, wanted: int) -> Tensor:
    """Return the positions along an input axis where outputs are sampled, as defined by MIL's `resize_bilinear`."""
    steps = torch.arange(wanted, dtype=torch.float64)
    if mode == "UNALIGN_CORNERS":
        grid = (steps + 0.5) * side / wanted - 0.5
    elif mode == "OFFSET_CORNERS":
        grid = (steps + 0.5) * max(1, side - 1) / wanted
    elif mode == "DEFAULT":
        grid = steps * side / wanted
    elif mode in ("ALIGN_CORNERS", "STRICT_ALIGN_CORNERS"):
        middle = (side - 1) / 2 if mode == "ALIGN_CORNERS" else 0.0
        grid = steps * (side - 1) / (wanted - 1) if wanted > 1 else torch.full((1,), middle, dtype=torch.float64)
    else:
        raise CheckpointError(f"the sampling mode {mode!r} of a resize is unknown")
    return grid.clamp(0, side - 1)


def _resampled(x: Tensor, axis: int, grid: Tensor) -> Tensor:
    """Interpolate linearly along one axis."""
    low = grid.floor().long()
    high = (low + 1).clamp(max=x.shape[axis] - 1)
    share = (grid - low).to(x.dtype).reshape([-1] + [1] * (x.dim() - 1 - axis % x.dim()))
    return torch.lerp(x.index_select(axis, low), x.index_select(axis, high), share)


def _resize_bilinear(call: Call) -> Bound:
    size = (call.integer("target_size_height", 1), call.integer("target_size_width", 1))
    mode = call.text("sampling_mode", "DEFAULT")
    return call.bind(lambda x: _bilinear(x, size, mode), "x")


def _bilinear(x: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """Resize the last two axes, one after the other."""
    for axis, wanted in zip((-2, -1), size, strict=True):
        x = _resampled(x, axis, _grid(mode, x.shape[axis], wanted))
    return x


def _crop(call: Call) -> Bound:
    (top, bottom), (left, right) = call.ints("crop_height"), call.ints("crop_width")
    return call.bind(lambda x: x[..., top : x.shape[-2] - bottom, left : x.shape[-1] - right], "x", moves=True)


IMAGES: Mapping[str, Binder] = {
    "avg_pool": _avg_pool,
    "crop": _crop,
    "l2_pool": _pool(_lengths, 0.0),
    "max_pool": _pool(_maxima, float("-inf")),
    "resize_bilinear": _resize_bilinear,
    "resize_nearest_neighbor": _resize_nearest,
    "upsample_bilinear": _upsample_bilinear,
    "upsample_nearest_neighbor": _upsample_nearest,
}
