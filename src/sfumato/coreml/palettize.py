"""Palettization: each weight becomes an index of a few bits into a table of 2^bits values.

The table values are computed by k-means (kmeans.py). In files, a palette is the operation `constexpr_lut_to_dense`, in
iOS 16's form up to the opset "CoreML7" and in iOS 18's form from "CoreML8" on. It has the name of the constant that it
replaces, so nothing else in the program changes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from sfumato.coreml.formats.bits import pack, unpack
from sfumato.coreml.kmeans import cluster
from sfumato.coreml.program import LazyArray, Operation, Output, TensorType, Value, constant
from sfumato.coreml.runtime.call import Call
from sfumato.coreml.runtime.constexpr import CONSTEXPR
from sfumato.errors import CheckpointError, ConfigError, UsageError, suggest
from sfumato.files import read_json

if TYPE_CHECKING:
    from pathlib import Path

    from sfumato.coreml.program import Function, Model

__all__ = ["BITS", "UNCHANGED", "decompress", "palettize", "read_recipe", "recipe_for", "weights_of"]

log = logging.getLogger("sfumato")

BITS = (1, 2, 4, 6, 8)
# The number of bits in a recipe that means an unchanged weight.
UNCHANGED = 16
# Constants with up to this many elements are left unchanged, as in Apple's tools: a palette would not pay off.
SMALL = 2048
# The inputs of operations that take a weight, by name.
_FACTORS = {
    "conv": ("weight",),
    "conv_transpose": ("weight",),
    "einsum": ("values",),
    "linear": ("weight",),
    "matmul": ("x", "y"),
}

_NO_PALETTES = ("CoreML3", "CoreML4", "CoreML5")
_VECTORS = ("CoreML6", "CoreML7")
# Elements per block; a multiple of 8, so that each block fills whole bytes.
_AT_ONCE = 2**22
_ALL_CODES = 2**16


def palettize(model: Model, bits: int | Mapping[str, int]) -> Model:
    """Replace a model's weights by palettes of 1, 2, 4, 6 or 8 bits, or by as many as a recipe gives for each.

    The weights are those of `weights_of`; weights that a recipe omits or gives 16 bits stay unchanged. One weight is
    read at a time, and only its packed indices are kept. The models of a pipeline are palettized separately. Raises
    `UsageError` for an unsupported number of bits or a name that is not a weight, `CheckpointError` if a weight has NaN
    or infinity, `ConfigError` for a program older than iOS 16.
    """
    known = weights_of(model)
    _check_bits({bits} if isinstance(bits, int) else set(bits.values()))
    recipe = dict.fromkeys(known, bits) if isinstance(bits, int) else bits
    for name in recipe:
        if name not in known:
            raise UsageError(f"the recipe names {name!r}, which is not a weight of this model{suggest(name, known)}")
    chosen = {name: number for name, number in recipe.items() if number != UNCHANGED}
    if not chosen:
        log.warning("no weight of the model was compressed")
        return model
    return model.with_functions(partial(_with_palettes, bits=chosen))


def recipe_for(model: Model, target_db: float) -> dict[str, int]:
    """Return, by weight name, the fewest bits whose palette keeps the signal-to-noise ratio at or above the target.

    The ratio is 10 log10(sum w² / sum (w - palette of w)²) in decibels; weights for which no palette suffices get
    16 bits.
    """
    recipe = {}
    for name, value in weights_of(model).items():
        histogram = _Histogram.of(name, value)
        fit = (bits for bits in BITS if histogram.signal_to_noise(histogram.table(bits)) >= target_db)
        recipe[name] = next(fit, UNCHANGED)
    return recipe


def decompress(model: Model) -> Model:
    """Return the model with plain constants of the same names for all compressed ones, unpacked on every read."""
    return model.with_functions(_decompressed)


def _decompressed(function: Function) -> Function:
    types = {output.name: output.type for one in function.operations for output in one.outputs}
    values: dict[str, Value] = {}
    operations = []
    for operation in function.operations:
        if operation.type == "const":
            values[operation.outputs[0].name] = operation.attributes["val"]
        unpack_all = CONSTEXPR.get(operation.type)
        if unpack_all is None:
            operations.append(operation)
            continue
        call = Call(operation, types, lambda name: values[name].read() if name in values else None)
        for place, output in enumerate(operation.outputs):
            values[output.name] = Value(output.type, LazyArray(partial(_unpacked, unpack_all, call, place)))
            operations.append(constant(output.name, values[output.name]))
    return replace(function, operations=tuple(operations))


def _unpacked(unpack_all: Callable[[Call], tuple[np.ndarray, ...]], call: Call, place: int) -> np.ndarray:
    return unpack_all(call)[place]


def read_recipe(path: Path) -> dict[str, int]:
    """Load bits by weight name from a JSON object. Raises `CheckpointError` or `UsageError`, which name the file."""
    if not path.is_file():
        raise UsageError(f"there is no recipe {path}; give a JSON file with the bits of each weight by its name")
    recipe = read_json(path)
    for name, bits in recipe.items():
        if isinstance(bits, bool) or bits not in (*BITS, UNCHANGED):
            raise UsageError(
                f"{path}: {name!r} has {bits!r} bits; use 1, 2, 4, 6, 8, or 16 to leave the weight unchanged"
            )
    return recipe


def weights_of(model: Model) -> dict[str, Value]:
    """Return the constants that can be palettized, by name, in all functions and all models of a pipeline.

    These are floating-point constants of more than `SMALL` elements that only convolutions and matrix products use, as
    weights. Masks, lookup tables, biases and normalization factors are excluded, whatever their size: they are not
    weights, or too small to be worth an error.
    """
    found: dict[str, Value] = {}
    for function in model.functions:
        multiplied, other = _read(function)
        for operation in function.operations:
            name = operation.outputs[0].name if operation.outputs else ""
            if operation.type == "const" and name in multiplied - other and _is_large(operation.attributes["val"]):
                found[name] = operation.attributes["val"]
    return found


def _read(function: Function) -> tuple[set[str], set[str]]:
    """Return the values used as weights of products, and the values that are read in any other way or returned."""
    multiplied: set[str] = set()
    other: set[str] = set(function.outputs)
    for operation in function.operations:
        for role, argument in operation.inputs.items():
            names = multiplied if role in _FACTORS.get(operation.type, ()) else other
            names |= {entry for entry in argument if isinstance(entry, str)}
    return multiplied, other


def _is_large(value: Value) -> bool:
    return value.type.dtype in ("fp16", "fp32") and prod(side or 0 for side in value.type.shape) > SMALL


def _check_bits(numbers: set[int]) -> None:
    for bits in numbers:
        if bits not in (*BITS, UNCHANGED):
            raise UsageError(f"palettes have 1, 2, 4, 6 or 8 bits, not {bits}; 16 leaves a weight unchanged")


def _with_palettes(function: Function, bits: Mapping[str, int]) -> Function:
    if function.opset in _NO_PALETTES:
        raise ConfigError(f"programs for {function.opset} have no palettes; convert for macOS13 / iOS16 or newer")
    return replace(function, operations=tuple(_with_palette(one, bits, function.opset) for one in function.operations))


def _with_palette(operation: Operation, bits: Mapping[str, int], opset: str) -> Operation:
    name = operation.outputs[0].name if operation.outputs else ""
    if operation.type != "const" or name not in bits:
        return operation
    value = operation.attributes["val"]
    histogram = _Histogram.of(name, value)
    table = histogram.table(bits[name])
    packed = histogram.indices(table, bits[name])
    form = _vector_form if opset in _VECTORS else _tensor_form
    return form(operation.outputs[0], table.astype(np.dtype(histogram.dtype)), packed, bits[name])


def _vector_form(output: Output, table: np.ndarray, packed: np.ndarray, bits: int) -> Operation:
    """Return the operation in iOS 16's form: packed indices and table are vectors, stored as attributes."""
    shape = np.array(output.type.shape, np.uint32)
    attributes = {
        "name": Value(TensorType("string"), output.name),
        "indices": Value(TensorType("uint8", packed.shape), LazyArray(lambda: packed)),
        "lut": Value(TensorType(output.type.dtype, table.shape), LazyArray(lambda: table)),
        "shape": Value(TensorType("uint32", shape.shape), shape),
    }
    return Operation("constexpr_lut_to_dense", {}, (output,), attributes)


def _tensor_form(output: Output, table: np.ndarray, packed: np.ndarray, bits: int) -> Operation:
    """Return the operation in iOS 18's form: indices in the weight's shape, a table with two more axes, both inputs."""
    sides = tuple(side or 0 for side in output.type.shape)
    table = table.reshape((1,) * len(sides) + (2**bits, 1))
    indices = TensorType(f"uint{bits}", sides)
    inputs = {
        "indices": (Value(indices, LazyArray(partial(_spread, packed, indices))),),
        "lut": (Value(TensorType(output.type.dtype, table.shape), LazyArray(lambda: table)),),
    }
    return Operation("constexpr_lut_to_dense", inputs, (output,), {"name": Value(TensorType("string"), output.name)})


def _spread(packed: np.ndarray, type_: TensorType) -> np.ndarray:
    count = prod(side or 0 for side in type_.shape)
    numbers = packed if type_.dtype == "uint8" else unpack(packed, type_.dtype, count)
    return numbers.reshape([side or 0 for side in type_.shape])


@dataclass(frozen=True, eq=False)
class _Histogram:
    """The distinct values of a weight and their counts.

    numbers: the weight, flat, as stored; codes: the bit patterns (see `_codes`) of the distinct values, ascending by
    value; values and counts: the values (for float32, the mean of those that share a code) and how often each occurs.
    """

    numbers: np.ndarray
    scale: float
    codes: np.ndarray
    values: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, name: str, value: Value) -> _Histogram:
        """Read a weight and count its values. Raises `CheckpointError` if it has NaN or infinity."""
        numbers = np.ascontiguousarray(np.asarray(value.read())).reshape(-1)
        half = numbers.dtype == np.float16
        scale = 1.0 if half else float(np.abs(numbers).max()) or 1.0
        counts, sums = np.zeros(_ALL_CODES), np.zeros(_ALL_CODES)
        for part in _parts(numbers) if math.isfinite(scale) else ():
            codes = _codes(part, scale)
            counts += np.bincount(codes, minlength=_ALL_CODES)
            if not half:
                sums += np.bincount(codes, weights=part, minlength=_ALL_CODES)
        codes = np.flatnonzero(counts)
        counts = counts[codes]
        exact = codes.astype(np.uint16).view(np.float16).astype(np.float64)
        if not math.isfinite(scale) or not np.isfinite(exact).all():
            raise CheckpointError(f"the weight {name} has NaN or infinite values; a palette cannot hold them")
        values = exact if half else sums[codes] / counts
        order = np.argsort(values, kind="stable")
        return cls(numbers, scale, codes[order], values[order], counts[order])

    @property
    def dtype(self) -> str:
        """The dtype the values are stored as, "float16" or "float32"."""
        return self.numbers.dtype.name

    def table(self, bits: int) -> np.ndarray:
        """Return the 2^bits palette values, ascending, rounded to the stored dtype; float64."""
        centres = cluster(self.values, self.counts, 2**bits).astype(self.dtype).astype(np.float64)
        return np.concatenate([centres, np.full(2**bits - len(centres), centres[-1])])

    def nearest(self, table: np.ndarray) -> np.ndarray:
        """Return the index of the nearest table entry for each distinct value."""
        return np.searchsorted((table[:-1] + table[1:]) / 2, self.values)

    def signal_to_noise(self, table: np.ndarray) -> float:
        """Return the signal-to-noise ratio in decibels; infinite if the table contains every value."""
        signal = self.counts @ self.values**2
        noise = self.counts @ (self.values - table[self.nearest(table)]) ** 2
        return 10 * math.log10(signal / noise) if noise else math.inf

    def indices(self, table: np.ndarray, bits: int) -> np.ndarray:
        """Return the table index of every element of the weight, packed into bytes."""
        index_of = np.zeros(_ALL_CODES, np.uint8)
        index_of[self.codes] = self.nearest(table)
        packed = [
            index_of[_codes(part, self.scale)] if bits == 8 else pack(index_of[_codes(part, self.scale)], f"uint{bits}")
            for part in _parts(self.numbers)
        ]
        return np.concatenate(packed)


def _parts(numbers: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, numbers.size, _AT_ONCE):
        yield numbers[start : start + _AT_ONCE]


def _codes(numbers: np.ndarray, scale: float) -> np.ndarray:
    """Return half-precision bit patterns; for float32, those of the values divided by the largest."""
    if numbers.dtype == np.float16:
        return numbers.view(np.uint16)
    return (numbers / np.float32(scale)).astype(np.float16).view(np.uint16)
