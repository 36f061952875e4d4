"""The Core ML (MIL) operations that Stable Diffusion needs, with shape inference.

As in Apple's converter, all inputs are written, including those with default values. The operations are documented in
coremltools (`coremltools.converters.mil.mil.ops.defs`). All shapes are fixed; axes are counted from 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sfumato.coreml.converter.emitter import Emitter, Given, Handle
from sfumato.coreml.converter.factors import two_factors
from sfumato.coreml.program import ARRAY_DTYPES, TensorType

__all__ = ["Builder"]


class Builder(Emitter):
    """One method per operation, which takes and returns handles."""

    # Products

    def conv(
        self,
        x: Handle,
        weight: Handle,
        bias: Handle | None,
        *,
        strides: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (0, 0),
        name: str | None = None,
    ) -> Handle:
        """Convolution: x (B, C, H, W), weight (C', C, h, w), bias (C',), with symmetric padding."""
        sides = tuple(
            (side + 2 * pad - kernel) // stride + 1
            for side, pad, kernel, stride in zip(x.shape[2:], padding, weight.shape[2:], strides, strict=True)
        )
        shape = TensorType(x.dtype, (x.shape[0], weight.shape[0], *sides))
        inputs: dict[str, Given] = {
            "x": x,
            "weight": weight,
            **({} if bias is None else {"bias": bias}),
            "strides": strides,
            "pad_type": "custom" if any(padding) else "valid",
            "pad": [side for side in padding for _ in range(2)],
            "dilations": (1, 1),
            "groups": 1,
        }
        return self.emit("conv", shape, inputs, name=name)[0]

    def matmul(self, x: Handle, y: Handle, *, transpose_x: bool = False, transpose_y: bool = False) -> Handle:
        """Product over the last two axes, optionally transposed first: (…, M, K) and (…, K, N) -> (…, M, N)."""
        rows, columns = x.shape[-1 if transpose_x else -2], y.shape[-2 if transpose_y else -1]
        shape = (*np.broadcast_shapes(x.shape[:-2], y.shape[:-2]), rows, columns)
        flags = {"transpose_x": transpose_x, "transpose_y": transpose_y}
        return self.emit("matmul", TensorType(x.dtype, shape), {"x": x, "y": y, **flags})[0]

    def einsum(self, equation: str, x: Handle, y: Handle) -> Handle:
        """Sum of products over the index missing from the result; MIL supports `nchw,nwhu->nchu`, with any letters."""
        given, result = equation.split("->")
        sides = {
            letter: side
            for word, z in zip(given.split(","), (x, y), strict=True)
            for letter, side in zip(word, z.shape, strict=True)
        }
        shape = TensorType(x.dtype, tuple(sides[letter] for letter in result))
        return self.emit("einsum", shape, {"values": [x, y], "equation": equation})[0]

    # Elementwise

    def add(self, x: Handle, y: Handle | float | np.ndarray) -> Handle:
        """The sum x + y, broadcast."""
        return self._binary("add", x, y)

    def sub(self, x: Handle, y: Handle | float | np.ndarray) -> Handle:
        """The difference x - y, broadcast."""
        return self._binary("sub", x, y)

    def mul(self, x: Handle, y: Handle | float | np.ndarray) -> Handle:
        """The product x y, broadcast."""
        return self._binary("mul", x, y)

    def real_div(self, x: Handle, y: Handle | float | np.ndarray) -> Handle:
        """The quotient x / y, broadcast."""
        return self._binary("real_div", x, y)

    def maximum(self, x: Handle, y: Handle | float | np.ndarray) -> Handle:
        """The larger of x and y, broadcast."""
        return self._binary("maximum", x, y)

    def scaled(self, x: Handle, factor: float) -> Handle:
        """Multiply by a positive number, even if float16 cannot represent it: see `two_factors`."""
        first, second = two_factors(factor, x.dtype)
        x = self.mul(x, first)
        return x if second == 1 else self.mul(x, second)

    def equal(self, x: Handle, y: Handle | float | np.ndarray) -> Handle:
        """Whether x and y are equal: dtype bool, broadcast."""
        y = self._operand(x, y)
        return self.emit("equal", TensorType("bool", np.broadcast_shapes(x.shape, y.shape)), {"x": x, "y": y})[0]

    def unary(self, kind: str, x: Handle) -> Handle:
        """An operation without parameters: silu, sigmoid, relu, softplus, tanh, square, sqrt, abs, sin, cos."""
        return self.emit(kind, x.type, {"x": x})[0]

    def gelu(self, x: Handle) -> Handle:
        """The exact Gaussian error linear unit (arXiv 1606.08415)."""
        return self.emit("gelu", x.type, {"x": x, "mode": "EXACT"})[0]

    def cast(self, x: Handle, dtype: str) -> Handle:
        """Convert to another dtype; returns x itself if it has that dtype."""
        return x if x.dtype == dtype else self.emit("cast", TensorType(dtype, x.shape), {"x": x, "dtype": dtype})[0]

    # Along axes

    def softmax(self, x: Handle, axis: int) -> Handle:
        """Softmax along an axis."""
        return self.emit("softmax", x.type, {"x": x, "axis": axis})[0]

    def reduce_mean(self, x: Handle, axes: Sequence[int]) -> Handle:
        """The mean over axes, which are kept with size 1."""
        return self._reduced("reduce_mean", x, axes)

    def reduce_max(self, x: Handle, axes: Sequence[int]) -> Handle:
        """The maximum over axes, which are kept with size 1."""
        return self._reduced("reduce_max", x, axes)

    def reduce_argmax(self, x: Handle, axis: int) -> Handle:
        """The index of the maximum along an axis, which is removed; any one of several equal maxima."""
        shape = TensorType("int32", x.shape[:axis] + x.shape[axis + 1 :])
        return self.emit("reduce_argmax", shape, {"x": x, "axis": axis, "keep_dims": False})[0]

    def layer_norm(self, x: Handle, gamma: Handle, beta: Handle, axes: Sequence[int], epsilon: float) -> Handle:
        """Layer normalization over axes (arXiv 1607.06450)."""
        affine = {"gamma": gamma, "beta": beta, "epsilon": _scalar(epsilon, x.dtype)}
        return self.emit("layer_norm", x.type, {"x": x, "axes": axes, **affine})[0]

    def batch_norm(
        self, x: Handle, *, mean: np.ndarray, variance: np.ndarray, gamma: Handle, beta: Handle, epsilon: float
    ) -> Handle:
        """(x - mean) / sqrt(variance + epsilon) gamma + beta, with one value each per channel of x (B, C, H, W)."""
        dtype, small = ARRAY_DTYPES[x.dtype], _scalar(epsilon, x.dtype)
        moments = {"mean": mean.astype(dtype), "variance": variance.astype(dtype)}
        return self.emit("batch_norm", x.type, {"x": x, **moments, "gamma": gamma, "beta": beta, "epsilon": small})[0]

    # Shapes

    def reshape(self, x: Handle, shape: tuple[int, ...]) -> Handle:
        """Reshape: the same elements in the same order."""
        return self.emit("reshape", TensorType(x.dtype, shape), {"x": x, "shape": shape})[0]

    def transpose(self, x: Handle, perm: Sequence[int]) -> Handle:
        """Permute the axes."""
        return self.emit("transpose", TensorType(x.dtype, tuple(x.shape[i] for i in perm)), {"x": x, "perm": perm})[0]

    def expand_dims(self, x: Handle, axes: Sequence[int]) -> Handle:
        """Insert axes of size 1 at these positions of the result."""
        left = list(x.shape)
        shape = tuple(1 if i in axes else left.pop(0) for i in range(len(x.shape) + len(axes)))
        return self.emit("expand_dims", TensorType(x.dtype, shape), {"x": x, "axes": axes})[0]

    def squeeze(self, x: Handle, axes: Sequence[int]) -> Handle:
        """Remove these axes, which have size 1."""
        shape = tuple(side for i, side in enumerate(x.shape) if i not in axes)
        return self.emit("squeeze", TensorType(x.dtype, shape), {"x": x, "axes": axes})[0]

    def slice(self, x: Handle, axis: int, start: int, stop: int) -> Handle:
        """Elements from start to stop (exclusive) along an axis; returns x itself if these are all."""
        if (start, stop) == (0, x.shape[axis]):
            return x
        own = [i == axis for i in range(len(x.shape))]
        shape = tuple(stop - start if mine else side for mine, side in zip(own, x.shape, strict=True))
        return self.emit(
            "slice_by_index",
            TensorType(x.dtype, shape),
            {
                "x": x,
                "begin": [start if mine else 0 for mine in own],
                "end": [stop if mine else side for mine, side in zip(own, x.shape, strict=True)],
                "end_mask": [not mine for mine in own],
            },
        )[0]

    def split(self, x: Handle, parts: int, axis: int) -> tuple[Handle, ...]:
        """Split into equal parts along an axis."""
        side = x.shape[axis] // parts
        part = TensorType(x.dtype, (*x.shape[:axis], side, *x.shape[axis + 1 :]))
        return self.emit("split", [part] * parts, {"x": x, "split_sizes": [side] * parts, "axis": axis})

    def concat(self, values: Sequence[Handle], axis: int) -> Handle:
        """Concatenate along an axis; returns a single value unchanged."""
        if len(values) == 1:
            return values[0]
        first = values[0]
        side = sum(value.shape[axis] for value in values)
        shape = TensorType(first.dtype, (*first.shape[:axis], side, *first.shape[axis + 1 :]))
        return self.emit("concat", shape, {"values": values, "axis": axis, "interleave": False})[0]

    def stack(self, values: Sequence[Handle], axis: int) -> Handle:
        """Stack along a new axis."""
        shape = values[0].shape
        stacked = TensorType(values[0].dtype, (*shape[:axis], len(values), *shape[axis:]))
        return self.emit("stack", stacked, {"values": values, "axis": axis})[0]

    def pad(self, x: Handle, before_and_after: Sequence[tuple[int, int]]) -> Handle:
        """Pad with zeros before and after, per axis."""
        shape = tuple(side + sum(pair) for side, pair in zip(x.shape, before_and_after, strict=True))
        amounts, zero = [amount for pair in before_and_after for amount in pair], _scalar(0, x.dtype)
        return self.emit(
            "pad", TensorType(x.dtype, shape), {"x": x, "pad": amounts, "mode": "constant", "constant_val": zero}
        )[0]

    def upsample_nearest_neighbor(self, x: Handle) -> Handle:
        """Repeat every pixel of x (B, C, H, W) twice along both axes."""
        twice = _scalar(2, "fp32")
        shape = TensorType(x.dtype, (*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3]))
        factors = {"scale_factor_height": twice, "scale_factor_width": twice}
        return self.emit("upsample_nearest_neighbor", shape, {"x": x, **factors})[0]

    # Indexing

    def gather(self, x: Handle, indices: Handle, axis: int) -> Handle:
        """Take the entries along an axis given by int32 indices."""
        shape = TensorType(x.dtype, (*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]))
        return self.emit("gather", shape, {"x": x, "indices": indices, "axis": axis, "batch_dims": 0})[0]

    def gather_nd(self, x: Handle, indices: Handle) -> Handle:
        """Take the entries of x whose first K indices are the rows of `indices` (…, K)."""
        shape = TensorType(x.dtype, (*indices.shape[:-1], *x.shape[indices.shape[-1] :]))
        return self.emit("gather_nd", shape, {"x": x, "indices": indices, "batch_dims": 0})[0]

    def _binary(self, kind: str, x: Handle, y: Handle | float | np.ndarray) -> Handle:
        y = self._operand(x, y)
        return self.emit(kind, TensorType(x.dtype, np.broadcast_shapes(x.shape, y.shape)), {"x": x, "y": y})[0]

    def _reduced(self, kind: str, x: Handle, axes: Sequence[int]) -> Handle:
        shape = tuple(1 if i in axes else side for i, side in enumerate(x.shape))
        return self.emit(kind, TensorType(x.dtype, shape), {"x": x, "axes": axes, "keep_dims": True})[0]

    def _operand(self, x: Handle, y: Handle | float | np.ndarray) -> Handle:
        return y if isinstance(y, Handle) else self.constant("y", np.asarray(y, ARRAY_DTYPES[x.dtype]))


def _scalar(number: float, dtype: str) -> np.ndarray:
    return np.asarray(number, ARRAY_DTYPES[dtype])
