"""The layers of our torch models as Core ML operations.

Each takes the module itself; its weights are read when they are written to the package.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sfumato.coreml.converter.attention import AttentionForm
from sfumato.coreml.converter.builder import Builder
from sfumato.coreml.converter.emitter import Handle, identifier
from sfumato.coreml.program import ARRAY_DTYPES
from sfumato.errors import CheckpointError, ConfigError, UsageError
from sfumato.models.attention import SelfOrCrossAttention
from sfumato.models.base import Model
from sfumato.models.blocks import Downsample2D, ResnetBlock2D, Upsample2D
from sfumato.models.packed import is_packed

__all__ = ["EPSILON", "Layers", "check_sizes", "parts"]

# The affine part of a group normalization is written as a batch normalization, which needs an epsilon; with variances
# of 1 - epsilon they add up to 1, and both are exact in float16.
EPSILON = 2.0**-11

# The axes within a group, (B, G, C / G, H, W).
IN_GROUP = (2, 3, 4)
# Squares of values up to this are in the middle of float16's range; groups of small values are scaled up to a limit.
SQUARABLE = 2.0**7
SMALLEST_SCALE = 2.0**-8

_TORCH_DTYPES = {"fp16": torch.float16, "fp32": torch.float32}
_ACTIVATIONS: dict[type[nn.Module], Callable[[Builder, Handle], Handle]] = {
    nn.SiLU: lambda b, x: b.unary("silu", x),
    nn.ReLU: lambda b, x: b.unary("relu", x),
    nn.GELU: lambda b, x: b.gelu(x),
    nn.Mish: lambda b, x: b.mul(x, b.unary("tanh", b.unary("softplus", x))),
}


class Layers:
    """Emits the layers of one model; values are named after the modules, weights after the parameters.

    far: whether values may differ so much from their mean that the square overflows float16, as in a VAE. Raises
    `UsageError` for a model whose weights are packed for the CPU.
    """

    def __init__(self, builder: Builder, model: Model, attention: AttentionForm, *, far: bool = False) -> None:
        if is_packed(model):
            raise UsageError(
                f"this {type(model).__name__} is packed for the CPU; load it again, or unpack it, to convert it"
            )
        self.builder = builder
        self._attention = attention
        self._far = far
        self._model = type(model).__name__
        self._paths = {module: path for path, module in model.named_modules()}

    def path(self, module: nn.Module) -> str:
        """Return the module's path in the model, such as "down_blocks.0.resnets.1"."""
        return self._paths[module]

    def weight(self, module: nn.Module, name: str, shape: tuple[int, ...] | None = None) -> Handle:
        """Return a parameter of a module as a weight, optionally reshaped."""
        tensor: Tensor = getattr(module, name)
        full, shape = f"{self.path(module)}.{name}", tuple(tensor.shape) if shape is None else shape
        named = f"{full} of the {self._model}"
        return self.builder.weight(full, shape, partial(_read, named, tensor, self.builder.dtype, shape))

    def conv(self, module: nn.Linear | nn.Conv2d, x: Handle) -> Handle:
        """Convolution of x (B, C, H, W); a linear layer over channels becomes a 1 × 1 convolution."""
        path, bias = identifier(self.path(module)), None if module.bias is None else self.weight(module, "bias")
        if isinstance(module, nn.Linear):
            shape = (module.out_features, module.in_features, 1, 1)
            return self.builder.conv(x, self.weight(module, "weight", shape), bias, name=path)
        down, across = module.stride
        above, left = (int(side) for side in module.padding)
        weight = self.weight(module, "weight")
        return self.builder.conv(x, weight, bias, strides=(down, across), padding=(above, left), name=path)

    def group_norm(self, module: nn.GroupNorm, x: Handle) -> Handle:
        """Group normalization (arXiv 1803.08494, eq. 1) of x (B, C, H, W), in basic operations."""
        b, (batch, channels, height, width) = self.builder, x.shape
        with b.scope(self.path(module)):
            grouped = b.reshape(x, (batch, module.num_groups, channels // module.num_groups, height, width))
            centred = b.sub(grouped, b.reduce_mean(grouped, IN_GROUP))
            far = self._far and b.dtype == "fp16"
            deviation = _far_deviation(b, centred, module.eps) if far else _deviation(b, centred, module.eps)
            normal = b.reshape(b.real_div(centred, deviation), x.shape)
            moments = {"mean": np.zeros(channels), "variance": np.full(channels, 1 - EPSILON)}
            gamma, beta = self.weight(module, "weight"), self.weight(module, "bias")
            return b.batch_norm(normal, **moments, gamma=gamma, beta=beta, epsilon=EPSILON)

    def layer_norm(self, module: nn.LayerNorm, x: Handle) -> Handle:
        """Layer normalization over the channels of x (B, C, 1, S)."""
        with self.builder.scope(self.path(module)):
            gamma, beta = self.weight(module, "weight"), self.weight(module, "bias")
            return self.builder.layer_norm(x, gamma, beta, (1,), module.eps)

    def activation(self, module: nn.Module, x: Handle) -> Handle:
        """Apply one of the activations that configs can name."""
        return _ACTIVATIONS[type(module)](self.builder, x)

    def attend(
        self, q: Handle, k: Handle, v: Handle, heads: int, *, upcast: bool = False, mask: np.ndarray | None = None
    ) -> Handle:
        """Attention of q (B, C, 1, L) over k and v (B, C, 1, S); in float32 if `upcast`."""
        b = self.builder
        if not upcast or b.dtype == "fp32":
            return self._attention(b, q, k, v, heads, mask)
        wide = self._attention(b, b.cast(q, "fp32"), b.cast(k, "fp32"), b.cast(v, "fp32"), heads, mask)
        return b.cast(wide, b.dtype)

    def attention(self, module: SelfOrCrossAttention, x: Handle, context: Handle | None = None) -> Handle:
        """Attention of x (B, C, 1, L) over itself, or over a context (B, C', 1, S)."""
        states = x if context is None else context
        q = self.conv(module.to_q, x)
        k, v = self.conv(module.to_k, states), self.conv(module.to_v, states)
        with self.builder.scope(self.path(module)):
            mixed = self.attend(q, k, v, module.heads, upcast=module.upcast)
        return self.conv(parts(module.to_out)[0], mixed)

    def resnet(self, block: ResnetBlock2D, x: Handle, time: Handle | None = None) -> Handle:
        """Two normalized convolutions and a shortcut: x (B, C, H, W), activated time embedding (B, T, 1, 1)."""
        b = self.builder
        with b.scope(self.path(block)):
            h = self.conv(block.conv1, self.activation(block.act, self.group_norm(block.norm1, x)))
            steered = None if time is None else self.conv(block.time_emb_proj, time)
            if steered is None:
                h = self.group_norm(block.norm2, h)
            elif block.scale_shift:
                scale, shift = b.split(steered, 2, 1)
                h = b.add(b.mul(self.group_norm(block.norm2, h), b.add(scale, 1.0)), shift)
            else:
                h = self.group_norm(block.norm2, b.add(h, steered))
            h = self.conv(block.conv2, self.activation(block.act, h))
            x = x if block.conv_shortcut is None else self.conv(block.conv_shortcut, x)
            x = b.add(x, h)
            return x if block.output_scale == 1.0 else b.scaled(x, 1 / block.output_scale)

    def downsample(self, module: Downsample2D, x: Handle) -> Handle:
        """Halve the height and width of x (B, C, H, W)."""
        if module.padding == 0:
            with self.builder.scope(self.path(module)):
                x = self.builder.pad(x, ((0, 0), (0, 0), (0, 1), (0, 1)))
        return self.conv(module.conv, x)

    def upsample(self, module: Upsample2D, x: Handle, size: tuple[int, int] | None = None) -> Handle:
        """Double the height and width of x (B, C, H, W), or restore the odd size before downsampling.

        Raises `ConfigError` if the size cannot be restored.
        """
        b = self.builder
        with b.scope(self.path(module)):
            x = b.upsample_nearest_neighbor(x)
            for axis, side in zip((2, 3), size or x.shape[2:], strict=True):
                if side not in (x.shape[axis] - 1, x.shape[axis]):
                    raise ConfigError(
                        f"unet/config.json: downsample_padding = 0 halves {side} pixels to {x.shape[axis] // 2}, which "
                        f"cannot be converted; choose a size that stays even until the last level"
                    )
                # A row of 2 n - 1 pixels was halved to n: repeat each twice, but the last only once.
                x = b.slice(x, axis, 0, side)
        return self.conv(module.conv, x)


def parts(modules: nn.Module | None) -> list[Any]:
    """Return the modules of a list, or none; typed as Any because torch does not know their classes."""
    return [] if modules is None else list(modules.children())


def _deviation(b: Builder, centred: Handle, epsilon: float) -> Handle:
    """Return the root of the variance of each group of centred values: (B, G, C / G, H, W) -> (B, G, 1, 1, 1)."""
    variance = b.reduce_mean(b.unary("square", centred), IN_GROUP)
    return b.unary("sqrt", b.add(variance, epsilon))


def _far_deviation(b: Builder, centred: Handle, epsilon: float) -> Handle:
    """Like `_deviation`, but scales values to at most `SQUARABLE`, and epsilon too, so that squares do not overflow."""
    largest = b.reduce_max(b.unary("abs", centred), IN_GROUP)
    scale = b.maximum(b.mul(largest, 1 / SQUARABLE), SMALLEST_SCALE)
    variance = b.reduce_mean(b.unary("square", b.real_div(centred, scale)), IN_GROUP)
    root = b.constant("root", np.asarray(epsilon**0.5, ARRAY_DTYPES[b.dtype]))
    scaled_epsilon = b.unary("square", b.real_div(root, scale))
    return b.mul(scale, b.unary("sqrt", b.add(variance, scaled_epsilon)))


def check_sizes(**sizes: Any) -> None:
    """Raise `UsageError` unless all sizes are integers of at least 1."""
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise UsageError(f"{name} must be a whole number of at least 1, not {size!r}")


def _read(name: str, tensor: Tensor, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return a parameter's values, cast. Raises `CheckpointError` if they are missing or not finite."""
    if tensor.is_meta:
        raise CheckpointError(f"the weight {name} is not loaded; reload the model before it is written")
    source = tensor.detach().cpu()
    numbers = source.to(_TORCH_DTYPES[dtype]).reshape(shape)
    if not bool(numbers.isfinite().all()):
        if bool(source.isfinite().all()):
            raise CheckpointError(
                f"the weight {name} has values up to {source.abs().max():.3g}, but Core ML packages store weights in "
                "float16, whose maximum is 65504; use another checkpoint"
            )
        raise CheckpointError(f"the weight {name} has NaN or infinite values; download the checkpoint again")
    return numbers.numpy()
