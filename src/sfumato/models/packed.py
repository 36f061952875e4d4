"""CPU layers: weights packed in oneDNN's order, with our own kernels in between.

`pack` replaces torch's layers one at a time, without a second copy of the weights, and `unpack` restores them. Inputs
and outputs are the same tensors, so that a model's code does not need to know.
"""

from __future__ import annotations

from copy import copy, deepcopy
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.kernels import LANES, Kernels
from sfumato.models.attention import sdpa
from sfumato.models.blocks import GroupNorm, Upsample2D
from sfumato.models.eight_bits import EightBit, EightBitConv2d, EightBitLinear
from sfumato.models.transformer import GEGLU, FeedForward
from sfumato.runtime.device import release_memory
from sfumato.runtime.onednn import (
    Filter,
    IntegerFilter,
    IntegerMatrix,
    Scratch,
    integers_packable,
    multiply,
    multiply_pixels,
    packable,
    packed_matrix,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from sfumato.models.attention import AttentionFunction

__all__ = [
    "Packed",
    "PackedConv2d",
    "PackedEightBit",
    "PackedGEGLU",
    "PackedGroupNorm",
    "PackedLinear",
    "PackedPointwise",
    "PackedUpsample2D",
    "is_packed",
    "kernel_attention",
    "pack",
    "packable",
    "plain",
    "unpack",
]

# Limits the intermediate tensor of a feed-forward, so that it stays in the L2 or L3 cache; or else to the size of its
# weights, which are read again for each stretch.
STRETCH_BYTES = 8 * 2**20
# Release memory each time this many bytes of layers have been replaced.
RELEASED_BYTES = 64 * 2**20
# The kernel packs the keys of every head first, which does not pay off for a few queries.
FEW_QUERIES = 16


def pack(model: nn.Module, kernels: Kernels | None) -> None:
    """Replace layers by faster ones; without kernels, only convolutions and linear layers.

    Linear layers are packed at once, convolutions for the size of their first input.
    """
    item, release = next(model.parameters()).dtype.itemsize, _Release()
    scratch = next((one.scratch for one in model.modules() if isinstance(one, PackedEightBit)), Scratch())
    for parent, name in _places(model):
        layer = getattr(parent, name)
        if type(layer) is FeedForward:
            down: Any = layer.net[2]
            weights = 3 * down.in_features * down.out_features * item
            layer.stretch = max(256, max(STRETCH_BYTES, weights) // (2 * down.in_features * item))
        faster = None if isinstance(parent, Upsample2D) else _faster(layer, kernels, release, scratch)
        if faster is None:
            continue
        setattr(parent, name, faster)
        size = faster.packed.nbytes if isinstance(faster, PackedLinear | PackedPointwise | PackedEightBit) else 0
        del layer
        release(size)


class _Release:
    """Releases memory each time so many bytes of weights have been replaced.

    The memory of the old weights lies between that of the new ones; unreleased, it would add up to the whole model.
    """

    def __init__(self) -> None:
        self.replaced = 0

    def __call__(self, size: int) -> None:
        self.replaced += size
        if self.replaced > RELEASED_BYTES:
            release_memory(torch.device("cpu"))
            self.replaced = 0


def _faster(layer: nn.Module, kernels: Kernels | None, release: _Release, scratch: Scratch) -> nn.Module | None:
    """Return a faster replacement for a layer, or None."""
    if isinstance(layer, EightBit):
        return PackedEightBit(layer, scratch, release) if integers_packable(layer.scales.dtype) else None
    if type(layer) is nn.Linear:
        return PackedLinear(layer)
    if type(layer) is nn.Conv2d and layer.groups == 1:
        return PackedPointwise(layer) if layer.kernel_size == (1, 1) else PackedConv2d(layer, release)
    if type(layer) is Upsample2D:
        light = isinstance(layer.conv, EightBit)
        if not light or integers_packable(layer.conv.scales.dtype):
            return PackedUpsample2D(layer, release, scratch)
    if kernels is not None and type(layer) is GroupNorm and layer.num_channels % LANES == 0:
        return PackedGroupNorm(layer, kernels)
    if kernels is not None and type(layer) is GEGLU and layer.proj.out_features % (2 * LANES) == 0:
        return PackedGEGLU(layer, kernels)
    return None


def unpack(model: nn.Module) -> None:
    """Restore torch's layers, with the same weights."""
    for parent, name in _places(model):
        layer = getattr(parent, name)
        if isinstance(layer, Packed):
            setattr(parent, name, layer.unpacked())
        elif isinstance(layer, FeedForward):
            layer.stretch = None


def plain(model: nn.Module, path: str) -> nn.Module:
    """Return the torch layer at a path such as "mid_block.resnets.0", unpacking it and its parents first."""
    layer = model
    for name in path.split("."):
        parent, layer = layer, getattr(layer, name)
        if isinstance(layer, Packed):
            layer = layer.unpacked()
            setattr(parent, name, layer)
    return layer


def is_packed(model: nn.Module) -> bool:
    """Return whether `pack` has replaced layers of this model."""
    return any(isinstance(layer, Packed) for layer in model.modules())


def _places(module: nn.Module) -> list[tuple[nn.Module, str]]:
    """Return the parent and name of every layer, deepest first. Holds no references to layers that may be replaced.

    Does not descend into packed layers.
    """
    places = [place for child in module.children() for place in _places(child)]
    return places if isinstance(module, Packed) else places + [(module, name) for name, _ in module.named_children()]


def kernel_attention(kernels: Kernels) -> AttentionFunction:
    """Return attention with our kernel; with torch's for other dtypes or devices, or if there are few queries."""

    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        if q.dtype != kernels.dtype or not q.is_cpu or q.shape[2] < FEW_QUERIES:
            return sdpa(q, k, v, mask)
        return kernels.attention(q, k, v, mask)

    return attention


class Packed(nn.Module):
    """A replacement for a layer. `state_dict` and deep copies are those of the original layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.training = layer.training

    def unpacked(self) -> nn.Module:
        """Return the original layer."""
        raise NotImplementedError

    def state_dict(self, *arguments: Any, **options: Any) -> Any:
        """Return the weights of the original layer, by its names."""
        return self.unpacked().state_dict(*arguments, **options)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        return deepcopy(self.unpacked(), memo)


class PackedLinear(Packed):
    """`nn.Linear` with oneDNN, whichever library torch would use."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.bias, self.trainable = layer.bias, layer.weight.requires_grad
        self.packed = packed_matrix(layer.weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C')."""
        return multiply(x, self.packed, self.bias)

    def unpacked(self) -> nn.Linear:
        """Return the original layer."""
        return _plain(nn.Linear, self, self.in_features, self.out_features, bias=self.bias is not None)


class PackedConv2d(Packed):
    """`nn.Conv2d` with oneDNN, channels last."""

    def __init__(self, layer: nn.Conv2d, on_packed: Callable[[int], object] = lambda size: None) -> None:
        super().__init__(layer)
        self.channels = (layer.in_channels, layer.out_channels)
        self.kernel_size, self.padding, self.stride = layer.kernel_size, layer.padding, layer.stride
        self.bias, self.trainable = layer.bias, layer.weight.requires_grad
        self.packed = Filter(layer.weight.detach(), layer.padding, layer.stride, on_packed)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        return self.packed(x.contiguous(memory_format=torch.channels_last), self.bias)

    def unpacked(self) -> nn.Conv2d:
        """Return the original layer."""
        options = {"padding": self.padding, "stride": self.stride, "bias": self.bias is not None}
        return _plain(nn.Conv2d, self, *self.channels, self.kernel_size, **options)


class PackedPointwise(Packed):
    """A 1 × 1 `nn.Conv2d` as a linear layer over channels-last pixels."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__(layer)
        self.channels = (layer.in_channels, layer.out_channels)
        self.bias, self.trainable = layer.bias, layer.weight.requires_grad
        self.packed = packed_matrix(layer.weight.detach().flatten(1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H, W)."""
        return multiply_pixels(x, self.packed, self.bias)

    def unpacked(self) -> nn.Conv2d:
        """Return the original layer."""
        layer = _plain(nn.Conv2d, self, *self.channels, 1, bias=self.bias is not None)
        layer.weight = nn.Parameter(layer.weight.detach()[:, :, None, None], requires_grad=self.trainable)
        return layer


class PackedEightBit(Packed):
    """A linear layer or convolution with weights in 8 bits, widened for each call in memory that all of them share."""

    def __init__(
        self, layer: EightBit, scratch: Scratch, on_packed: Callable[[int], object] = lambda size: None
    ) -> None:
        super().__init__(layer)
        self.layer, self.scratch = layer, scratch
        self.bias = layer.bias
        values = layer.values
        self.pointwise = values.shape[2:] == (1, 1)
        self.padding: Any = ()  # for seamless.py
        if isinstance(layer, EightBitConv2d):
            self.channels = (layer.in_channels, layer.out_channels)
            self.kernel_size, self.padding, self.stride = layer.kernel_size, layer.padding, layer.stride
        elif isinstance(layer, EightBitLinear):
            self.in_features, self.out_features = layer.in_features, layer.out_features
        if isinstance(layer, EightBitConv2d) and not self.pointwise:
            where = (layer.padding, layer.stride, scratch, on_packed)
            self.packed: Any = IntegerFilter(values, layer.scales, *where)
        else:
            self.packed = IntegerMatrix(values.flatten(1), layer.scales, scratch)
        layer.values = values.new_empty(0)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C'), or (B, C, H, W) -> (B, C', H', W')."""
        if self.pointwise:
            return self.packed(x.permute(0, 2, 3, 1).contiguous(), self.bias).permute(0, 3, 1, 2)
        convolves = isinstance(self.packed, IntegerFilter)
        return self.packed(x.contiguous(memory_format=torch.channels_last) if convolves else x, self.bias)

    def unpacked(self) -> EightBit:
        """Return the original layer."""
        layer, values = copy(self.layer), self.packed.plain()
        layer._buffers = self.layer._buffers | {"values": values[:, :, None, None] if self.pointwise else values}
        return layer.train(self.training)


class PackedUpsample2D(Packed):
    """`Upsample2D` without the repeated pixels.

    Of the nine taps over repeated pixels, at most four see different ones. Each of the four phases of the result is
    therefore a 2 × 2 convolution of the small image, with the taps of equal pixels summed: four ninths of the work.
    Sizes that are not exactly double are computed as usual.
    """

    def __init__(
        self, layer: Upsample2D, on_packed: Callable[[int], object] = lambda size: None, scratch: Scratch | None = None
    ) -> None:
        super().__init__(layer)
        conv, corners = layer.conv, [(top, left) for top in (0, 1) for left in (0, 1)]
        self.phases: list[Filter | IntegerFilter]
        self.plain: PackedConv2d | PackedEightBit
        if isinstance(conv, EightBitConv2d):
            scratch, wide = scratch or Scratch(), conv.values.short()  # as sums of up to four
            where = ((1, 1), (1, 1), scratch, on_packed)
            self.phases = [IntegerFilter(_merged(wide, *corner), conv.scales, *where) for corner in corners]
            self.plain = PackedEightBit(conv, scratch, on_packed)
        else:
            weight, where = conv.weight.detach(), ((1, 1), (1, 1), on_packed)
            self.phases = [Filter(_merged(weight.float(), *one).to(weight.dtype), *where) for one in corners]
            self.plain = PackedConv2d(conv, on_packed)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """(B, C, H, W) -> (B, C, 2H, 2W), or `size`."""
        height, width = x.shape[2:]
        if size is not None and size != (2 * height, 2 * width):
            return self.plain(F.interpolate(x, size=size, mode="nearest"))
        x = x.contiguous(memory_format=torch.channels_last)
        out = x.new_empty((x.shape[0], self.plain.channels[1], 2 * height, 2 * width))
        out = out.contiguous(memory_format=torch.channels_last)
        for index, phase in enumerate(self.phases):
            top, left = divmod(index, 2)
            # Padding is the same on all sides, so each phase drops the row and column that belong to another.
            part = phase(x, self.plain.bias)
            out[:, :, top::2, left::2] = part[:, :, top : top + height, left : left + width]
        return out

    def unpacked(self) -> Upsample2D:
        """Return the original layer."""
        layer = Upsample2D.__new__(Upsample2D)
        nn.Module.__init__(layer)
        conv: Any = self.plain.unpacked()
        layer.conv = conv
        return layer.train(self.training)


def _merged(weight: Tensor, top: int, left: int) -> Tensor:
    """Merge 3 × 3 taps to one phase's 2 × 2: rows (0, 1 + 2) over pixels (-1, 0), or (0 + 1, 2) over (0, 1)."""
    rows = _pairs(weight, top, 2)
    return _pairs(rows, left, 3)


def _pairs(weight: Tensor, odd: int, dim: int) -> Tensor:
    first, second, third = weight.unbind(dim)
    return torch.stack((first + second, third) if odd else (first, second + third), dim)


class PackedGroupNorm(Packed):
    """`GroupNorm` with our own kernel; with torch's for images that are not channels-last."""

    def __init__(self, layer: GroupNorm, kernels: Kernels) -> None:
        super().__init__(layer)
        self.layer = layer
        self.kernels = kernels
        self.weights = layer.weight.detach().float(), layer.bias.detach().float()

    def forward(self, x: Tensor, act: nn.Module | None = None, added: Tensor | None = None) -> Tensor:
        """Normalize x + added, then apply the activation: (B, C, H, W) -> (B, C, H, W)."""
        if x.dtype != self.kernels.dtype or not x.is_contiguous(memory_format=torch.channels_last):
            return self.layer(x, act, added)
        if added is not None:
            added = added.float().expand(x.shape[0], -1).contiguous()
        silu = isinstance(act, nn.SiLU)
        x = self.kernels.group_norm(x, self.layer.num_groups, *self.weights, self.layer.eps, added, silu=silu)
        return x if act is None or silu else act(x)

    def unpacked(self) -> GroupNorm:
        """Return the original layer."""
        return self.layer


class PackedGEGLU(Packed):
    """`GEGLU` with our own kernel for the gate."""

    def __init__(self, layer: GEGLU, kernels: Kernels) -> None:
        super().__init__(layer)
        self.layer = layer
        self.kernels = kernels

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C')."""
        return self.kernels.geglu(self.layer.proj(x)) if x.dtype == self.kernels.dtype else self.layer(x)

    def unpacked(self) -> GEGLU:
        """Return the original layer."""
        return self.layer


def _plain(kind: Any, layer: Any, *arguments: Any, **options: Any) -> Any:
    """Build a torch layer around the packed one's weights, without initializing it first."""
    plain = kind(*arguments, device="meta", dtype=layer.packed.dtype, **options)
    plain.weight = nn.Parameter(layer.packed.to_dense(), requires_grad=layer.trainable)
    if layer.bias is not None:
        plain.bias = layer.bias
    return plain.train(layer.training)
