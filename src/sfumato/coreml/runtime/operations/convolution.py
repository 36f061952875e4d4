"""Convolutions, and the padding rules they share with pooling."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from sfumato.coreml.runtime.call import Binder, Bound, Call
from sfumato.runtime.onednn import convolve, multiply_pixels, packable, packed_filter, packed_matrix

__all__ = ["CONVOLUTION", "padded", "padding"]

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def padding(
    call: Call, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int], sides: Sequence[int]
) -> list[tuple[int, int]]:
    """Return the padding before and after each spatial axis from `pad_type` and `pad`, for an input of size `sides`."""
    kind = call.text("pad_type", "valid").lower()
    if kind == "custom":
        pad = call.ints("pad", (0,) * 2 * len(kernel))
        return list(zip(pad[::2], pad[1::2], strict=True))
    if kind == "valid":
        return [(0, 0)] * len(kernel)
    pairs = []
    for size, stride, dilation, side in zip(kernel, strides, dilations, sides, strict=True):
        whole = max((-(-side // stride) - 1) * stride + (size - 1) * dilation + 1 - side, 0)
        less, more = whole // 2, whole - whole // 2
        pairs.append((more, less) if kind == "same_lower" else (less, more))
    return pairs


def padded(x: Tensor, pairs: Sequence[tuple[int, int]], value: float = 0.0) -> Tensor:
    """Pad the last axes of an image with `value`, before and after."""
    return F.pad(x, [each for pair in reversed(pairs) for each in pair], value=value)


def _pointwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A 1 × 1 convolution, computed as a matrix product in the layout that suits its input.

    Values of transformers, (B, C, 1, S), are returned with channels contiguous in memory, as normalization over them
    and attention need; images are returned plane by plane, or with channels last if the weights are packed.
    """
    if weight.is_mkldnn:
        return multiply_pixels(x, weight, bias)
    weight = weight.flatten(1)
    if x.shape[2] == 1:
        return F.linear(x.squeeze(2).transpose(1, 2), weight, bias).transpose(1, 2).unsqueeze(2)
    batch = x.shape[0]
    weight = weight.expand(batch, -1, -1)
    planes = x.flatten(2)
    y = torch.bmm(weight, planes) if bias is None else torch.baddbmm(bias[:, None], weight, planes)
    return y.unflatten(2, x.shape[2:])


def _conv(call: Call) -> Bound:
    """Weights that are kept are reordered once for oneDNN (models/packed.py)."""
    spatial, groups = call.rank() - 2, call.integer("groups", 1)
    strides, dilations = call.ints("strides", (1,) * spatial), call.ints("dilations", (1,) * spatial)
    names = ("x", "weight", *call.given("bias"))
    pads = _fixed_padding(call, spatial, strides)
    plain = _plain_conv(call, strides, dilations, groups, pads)
    if pads is None or spatial != 2 or {*dilations, groups} != {1}:
        return call.bind(plain, *names)
    pointwise = {*call.type("weight").shape[2:], *strides} == {1} and not any(pads)
    bound = call.bind(_pointwise if pointwise else plain, *names)
    if not packable(torch.float32):
        return bound
    size = [side for side in call.type().shape if side is not None]
    if pointwise:
        return bound._replace(ready={1: lambda weight: packed_matrix(weight.flatten(1))})

    if len(size) != 4:
        return bound  # the order of the weights depends on a size that may vary

    def run(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if not weight.is_mkldnn:
            return plain(x, weight, bias)
        return convolve(x.contiguous(memory_format=torch.channels_last), weight, bias, pads, strides)

    return bound._replace(run=run, ready={1: lambda weight: packed_filter(weight, pads, strides, size)})


def _plain_conv(
    call: Call, strides: Sequence[int], dilations: Sequence[int], groups: int, pads: Sequence[int] | None
) -> Callable[..., Tensor]:
    """Return torch's convolution; if no padding is fixed (None), it is computed from the input's size."""
    convolution = _CONV[call.rank() - 2]
    if pads is not None:
        return lambda x, weight, bias=None: convolution(x, weight, bias, strides, pads, dilations, groups)

    def run(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        around = padding(call, weight.shape[2:], strides, dilations, x.shape[2:])
        return convolution(padded(x, around), weight, bias, strides, 0, dilations, groups)

    return run


def _fixed_padding(call: Call, spatial: int, strides: Sequence[int]) -> tuple[int, ...] | None:
    """Return the padding per axis if it is symmetric and independent of the input's size, else None."""
    if call.text("pad_type", "valid").lower() not in ("valid", "custom"):
        return None
    pairs = padding(call, (0,) * spatial, strides, (1,) * spatial, ())
    return tuple(before for before, _ in pairs) if all(before == after for before, after in pairs) else None


def _conv_transpose(call: Call) -> Bound:
    spatial = call.rank() - 2
    transposed = _CONV_TRANSPOSE[spatial]
    strides = call.ints("strides", (1,) * spatial)
    dilations = call.ints("dilations", (1,) * spatial)
    groups = call.integer("groups", 1)
    shape = call.ints("output_shape", None)
    kind = call.text("pad_type", "valid").lower()
    pad = call.ints("pad", (0,) * 2 * spatial) if kind == "custom" else (0,) * 2 * spatial

    def run(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        whole = transposed(x, weight, bias, strides, 0, 0, groups, dilations)
        for axis, (side, stride, size) in enumerate(zip(x.shape[2:], strides, whole.shape[2:], strict=True)):
            if shape is not None:
                wanted = shape[2 + axis]
            elif kind.startswith("same"):
                wanted = side * stride
            else:
                wanted = size - pad[2 * axis] - pad[2 * axis + 1]
            before = pad[2 * axis]
            if kind.startswith("same"):
                surplus = max(size - wanted, 0)
                before = surplus - surplus // 2 if kind == "same_lower" else surplus // 2
            if before + wanted > size:  # the output shape is larger than the result: pad with zeros
                whole = padded(whole, [(0, before + wanted - size), *[(0, 0)] * (spatial - axis - 1)])
            whole = whole.narrow(2 + axis, before, wanted)
        return whole

    return call.bind(run, "x", "weight", *call.given("bias"))


CONVOLUTION: Mapping[str, Binder] = {"conv": _conv, "conv_transpose": _conv_transpose}
