"""CPU layers: weights packed in oneDNN's order, with our own kernels in between.

`pack` puts them in the place of torch's layers, one by one and without a second copy of the weights, and `unpack` puts
torch's back. They take and give the same tensors, so that a model's own code does not know of them.
"""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.kernels import LANES, Kernels
from sfumato.models.attention import sdpa
from sfumato.models.blocks import GroupNorm, Upsample2D
from sfumato.models.transformer import GEGLU, FeedForward
from sfumato.runtime.device import release_memory
from sfumato.runtime.onednn import convolve, multiply, multiply_pixels, packable, packed_filter, packed_matrix

if TYPE_CHECKING:
    from sfumato.models.attention import AttentionFunction

__all__ = [
    "Packed",
    "PackedConv2d",
    "PackedGEGLU",
    "PackedGroupNorm",
    "PackedLinear",
    "PackedPointwise",
    "PackedUpsample2D",
    "convolve",
    "is_packed",
    "kernel_attention",
    "multiply",
    "multiply_pixels",
    "pack",
    "packable",
    "packed_filter",
    "packed_matrix",
    "plain",
    "unpack",
]

# What lies between the two layers of a feed-forward is held to this, so that it stays in the second or third cache, or
# to the size of their weights, which each stretch reads again.
STRETCH_BYTES = 8 * 2**20
# Bytes of replaced layers after which their memory is given back.
RELEASED_BYTES = 64 * 2**20
# Keys are packed for every head before the first query, which a handful of queries does not repay.
FEW_QUERIES = 16


def pack(model: nn.Module, kernels: Kernels | None) -> None:
    """Replace every layer there is a faster one for; without kernels, only the convolutions and linear layers."""
    item, replaced = next(model.parameters()).dtype.itemsize, 0
    for parent, name in _places(model):
        layer = getattr(parent, name)
        if type(layer) is FeedForward:
            down: Any = layer.net[2]
            weights = 3 * down.in_features * down.out_features * item
            layer.stretch = max(256, max(STRETCH_BYTES, weights) // (2 * down.in_features * item))
        faster = None if isinstance(parent, Upsample2D) else _faster(layer, kernels)
        if faster is None:
            continue
        replaced += sum(weight.nbytes for weight in layer.parameters())
        setattr(parent, name, faster)
        del layer
        if replaced > RELEASED_BYTES:
            # What the old layers held lies between what the new ones hold; kept, it would add up to the model again.
            release_memory(torch.device("cpu"))
            replaced = 0


def _faster(layer: nn.Module, kernels: Kernels | None) -> nn.Module | None:
    """What stands in for a layer, if anything does."""
    if type(layer) is nn.Linear:
        return PackedLinear(layer)
    if type(layer) is nn.Conv2d and layer.groups == 1:
        return PackedPointwise(layer) if layer.kernel_size == (1, 1) else PackedConv2d(layer)
    if type(layer) is Upsample2D:
        return PackedUpsample2D(layer)
    if kernels is not None and type(layer) is GroupNorm and layer.num_channels % LANES == 0:
        return PackedGroupNorm(layer, kernels)
    if kernels is not None and type(layer) is GEGLU and layer.proj.out_features % (2 * LANES) == 0:
        return PackedGEGLU(layer, kernels)
    return None


def unpack(model: nn.Module) -> None:
    """The way back: torch's layers, with the same weights."""
    for parent, name in _places(model):
        layer = getattr(parent, name)
        if isinstance(layer, Packed):
            setattr(parent, name, layer.unpacked())
        elif isinstance(layer, FeedForward):
            layer.stretch = None


def plain(model: nn.Module, path: str) -> nn.Module:
    """The layer of torch's at a path such as "mid_block.resnets.0", unpacked first with all that it stands in."""
    layer = model
    for name in path.split("."):
        parent, layer = layer, getattr(layer, name)
        if isinstance(layer, Packed):
            layer = layer.unpacked()
            setattr(parent, name, layer)
    return layer


def is_packed(model: nn.Module) -> bool:
    """Whether `pack` has replaced layers of this model."""
    return any(isinstance(layer, Packed) for layer in model.modules())


def _places(module: nn.Module) -> list[tuple[nn.Module, str]]:
    """Where every layer stands: its parent and its name, what is deepest first. Holds no layer that is replaced.

    What a packed layer itself holds is left to it.
    """
    places = [place for child in module.children() for place in _places(child)]
    return places if isinstance(module, Packed) else places + [(module, name) for name, _ in module.named_children()]


def kernel_attention(kernels: Kernels) -> AttentionFunction:
    """Attention by our own kernel; by torch's in another precision or place, and for too few queries to repay it."""

    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        if q.dtype != kernels.dtype or not q.is_cpu or q.shape[2] < FEW_QUERIES:
            return sdpa(q, k, v, mask)
        return kernels.attention(q, k, v, mask)

    return attention


class Packed(nn.Module):
    """A layer in the place of another: `state_dict` shows the weights of that other, and a deep copy is that other."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.training = layer.training

    def unpacked(self) -> nn.Module:
        """The layer it replaced."""
        raise NotImplementedError

    def state_dict(self, *arguments: Any, **options: Any) -> Any:
        """The weights of the layer it replaced, by their names there."""
        return self.unpacked().state_dict(*arguments, **options)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        return deepcopy(self.unpacked(), memo)


class PackedLinear(Packed):
    """`nn.Linear` on oneDNN, whichever library torch would have asked."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.bias, self.trainable = layer.bias, layer.weight.requires_grad
        self.packed = packed_matrix(layer.weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C')."""
        return multiply(x, self.packed, self.bias)

    def unpacked(self) -> nn.Linear:
        """The plain layer."""
        return _plain(nn.Linear, self, self.in_features, self.out_features, bias=self.bias is not None)


class PackedConv2d(Packed):
    """`nn.Conv2d` on oneDNN, channels last."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__(layer)
        self.channels = (layer.in_channels, layer.out_channels)
        self.kernel_size, self.padding, self.stride = layer.kernel_size, layer.padding, layer.stride
        self.bias, self.trainable = layer.bias, layer.weight.requires_grad
        self.packed = packed_filter(layer.weight.detach(), layer.padding, layer.stride)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        x = x.contiguous(memory_format=torch.channels_last)
        return convolve(x, self.packed, self.bias, self.padding, self.stride)

    def unpacked(self) -> nn.Conv2d:
        """The plain layer."""
        options = {"padding": self.padding, "stride": self.stride, "bias": self.bias is not None}
        return _plain(nn.Conv2d, self, *self.channels, self.kernel_size, **options)


class PackedPointwise(Packed):
    """`nn.Conv2d` of 1 x 1 as the linear layer that it is over channels-last pixels."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__(layer)
        self.channels = (layer.in_channels, layer.out_channels)
        self.bias, self.trainable = layer.bias, layer.weight.requires_grad
        self.packed = packed_matrix(layer.weight.detach().flatten(1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H, W)."""
        return multiply_pixels(x, self.packed, self.bias)

    def unpacked(self) -> nn.Conv2d:
        """The plain layer."""
        layer = _plain(nn.Conv2d, self, *self.channels, 1, bias=self.bias is not None)
        layer.weight = nn.Parameter(layer.weight.detach()[:, :, None, None], requires_grad=self.trainable)
        return layer


class PackedUpsample2D(Packed):
    """`Upsample2D` without the pixels it repeats.

    Of the nine taps over repeated pixels at most four differ, so each of the four phases of the doubled image is a
    convolution of 2 x 2 taps over the small one, with the taps that met the same pixel added up: four ninths of the
    work. A size that is not exactly double is computed as before.
    """

    def __init__(self, layer: Upsample2D) -> None:
        super().__init__(layer)
        self.plain = PackedConv2d(layer.conv)
        weight = layer.conv.weight.detach().float()
        self.phases = [
            packed_filter(_merged(weight, top, left).to(layer.conv.weight.dtype), (1, 1), (1, 1))
            for top in (0, 1)
            for left in (0, 1)
        ]

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """(B, C, H, W) -> (B, C, 2H, 2W), or the size given."""
        height, width = x.shape[2:]
        if size is not None and size != (2 * height, 2 * width):
            return self.plain(F.interpolate(x, size=size, mode="nearest"))
        x = x.contiguous(memory_format=torch.channels_last)
        out = x.new_empty((x.shape[0], self.plain.channels[1], 2 * height, 2 * width))
        out = out.contiguous(memory_format=torch.channels_last)
        for index, phase in enumerate(self.phases):
            top, left = divmod(index, 2)
            # Padding is the same on all sides, so each phase leaves out the row and column that belong to another.
            part = convolve(x, phase, self.plain.bias, (1, 1), (1, 1))
            out[:, :, top::2, left::2] = part[:, :, top : top + height, left : left + width]
        return out

    def unpacked(self) -> Upsample2D:
        """The plain layer."""
        layer = Upsample2D.__new__(Upsample2D)
        nn.Module.__init__(layer)
        layer.conv = self.plain.unpacked()
        return layer.train(self.training)


def _merged(weight: Tensor, top: int, left: int) -> Tensor:
    """The 2 x 2 taps of one phase, from 3 x 3: rows (0, 1 + 2) over the pixels (-1, 0), or (0 + 1, 2) over (0, 1)."""
    rows = _pairs(weight, top, 2)
    return _pairs(rows, left, 3)


def _pairs(weight: Tensor, odd: int, dim: int) -> Tensor:
    first, second, third = weight.unbind(dim)
    return torch.stack((first + second, third) if odd else (first, second + third), dim)


class PackedGroupNorm(Packed):
    """`GroupNorm` by our own kernel; images that are not channels-last, as torch does it."""

    def __init__(self, layer: GroupNorm, kernels: Kernels) -> None:
        super().__init__(layer)
        self.layer = layer
        self.kernels = kernels
        self.weights = layer.weight.detach().float(), layer.bias.detach().float()

    def forward(self, x: Tensor, act: nn.Module | None = None, added: Tensor | None = None) -> Tensor:
        """Normalize x + added, then the activation: (B, C, H, W) -> (B, C, H, W)."""
        if x.dtype != self.kernels.dtype or not x.is_contiguous(memory_format=torch.channels_last):
            return self.layer(x, act, added)
        if added is not None:
            added = added.float().expand(x.shape[0], -1).contiguous()
        silu = isinstance(act, nn.SiLU)
        x = self.kernels.group_norm(x, self.layer.num_groups, *self.weights, self.layer.eps, added, silu=silu)
        return x if act is None or silu else act(x)

    def unpacked(self) -> GroupNorm:
        """The plain layer."""
        return self.layer


class PackedGEGLU(Packed):
    """`GEGLU` with its gate by our own kernel."""

    def __init__(self, layer: GEGLU, kernels: Kernels) -> None:
        super().__init__(layer)
        self.layer = layer
        self.kernels = kernels

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C')."""
        return self.kernels.geglu(self.layer.proj(x)) if x.dtype == self.kernels.dtype else self.layer(x)

    def unpacked(self) -> GEGLU:
        """The plain layer."""
        return self.layer


def _plain(kind: Any, layer: Any, *arguments: Any, **options: Any) -> Any:
    """A layer of torch's around the packed one's weights, without filling it first."""
    plain = kind(*arguments, device="meta", dtype=layer.packed.dtype, **options)
    plain.weight = nn.Parameter(layer.packed.to_dense(), requires_grad=layer.trainable)
    if layer.bias is not None:
        plain.bias = layer.bias
    return plain.train(layer.training)
