"""Matches a program's constants to the checkpoint's weights and measures how close they are.

Our own converter names each constant after its parameter. In programs from other converters, constants are identified
by their values: each is matched to the closest weight of the same shape, also transposed.
"""

from __future__ import annotations

import gc
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from sfumato.coreml.converter.emitter import identifier
from sfumato.coreml.converter.unet import frequencies
from sfumato.coreml.palettize import decompress
from sfumato.coreml.program import SUBBYTE_BITS, LazyArray, TensorType, Value, constant
from sfumato.coreml.runtime.call import Call
from sfumato.coreml.runtime.planner import types_of
from sfumato.models import UNet2DConditionModel

if TYPE_CHECKING:
    from torch import Tensor

    from sfumato.coreml.program import Function, Model, Operation
    from sfumato.models import base

__all__ = ["FREQUENCIES", "Match", "Matches", "Weights", "is_compressed", "least_db"]

# The key of the frequency table, which is computed from a U-Net's config.
FREQUENCIES = "time_proj"
# A palette that uses the nearest table entries is within this of the best its table can achieve.
BEST_WITHIN_DB = 1.0
# Numbers of elements used to estimate that optimum, and to distinguish weights of the same shape.
SAMPLE, TOLD_BY = 2**16, 2**12
# Weights with fewer elements are copied.
SMALL = 2**20
# Bytes of weights to read before their file is mapped again.
WINDOW = 2**29
_AT_ONCE = 2**22


def is_compressed(operation: Operation) -> bool:
    """Return whether an operation holds a weight that is stored in fewer bits."""
    return operation.type.startswith("constexpr_")


def least_db(bits: int) -> float:
    """Return the signal-to-noise ratio in dB that any reasonable quantization to so many bits keeps.

    The best tables for a Laplacian distribution keep about 3, 8, 18, 30 and 42 dB with 1, 2, 4, 6 and 8 bits, and even
    steps over far outliers half of that. Unrelated values have 0 dB.
    """
    return 3.0 * bits - 2


@dataclass(frozen=True)
class Match:
    """A constant of a program, by name, and the checkpoint weight that it holds.

    db: the constant's signal-to-noise ratio, infinite if it equals the weight rounded to its dtype; needed: infinite
    for constants that are not compressed, and what the bits allow for those that are.
    """

    name: str
    form: _Form
    db: float
    needed: float

    @property
    def key(self) -> str:
        """The network's name for the weight."""
        return self.form.key

    @property
    def near(self) -> bool:
        """Whether it is as close as required."""
        return self.db >= self.needed


@dataclass
class Matches:
    """Matches by constant name. unknown: compressed constants with no weight of that shape."""

    found: dict[str, Match] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)

    def worst(self, *, compressed: bool) -> Match | None:
        """Return the match farthest from what is needed, among compressed or uncompressed constants, or None."""
        some = [one for one in self.found.values() if math.isfinite(one.needed) == compressed]
        return min(some, key=lambda one: (one.near, one.db - one.needed if compressed else one.db), default=None)

    def put_into(self, model: Model, dtype: str = "fp32", *, keys: Collection[str] | None = None) -> Model:
        """Return the model uncompressed, with constants that are close enough replaced by the checkpoint's weights.

        dtype: what these are rounded to, "fp32" or "fp16". keys: the weights to replace; all if None.
        """
        near = {name: one for name, one in self.found.items() if one.near and (keys is None or one.key in keys)}

        def changed(operation: Operation) -> Operation:
            output = operation.outputs[0]
            if operation.type != "const" or output.name not in near:
                return operation
            match = near[output.name]
            type_ = TensorType("fp32" if match.key == FREQUENCIES else dtype, output.type.shape)
            return constant(output.name, Value(type_, LazyArray(partial(_numbers, match.form, type_))))

        return decompress(model).with_functions(
            lambda function: replace(function, operations=tuple(map(changed, function.operations)))
        )


class Weights:
    """The weights of a network by name and by shape, and by shape also a U-Net's frequency table for timesteps."""

    def __init__(self, load: Callable[[], base.Model]) -> None:
        """Index the weights of the network that `load` returns; it is called again to remap the weights' file."""
        network, mapped = load(), _Mapped(load)
        self._named: dict[str, _Form] = {}
        self._shaped: dict[tuple[int, ...], list[_Form]] = defaultdict(list)
        for key, tensor in network.state_dict().items():
            own = self._named[identifier(key)] = _Form(key, partial(mapped.read, key), tensor.numel())
            sides = tuple(side for side in tensor.shape if side != 1)
            self._shaped[sides].append(own)
            if len(sides) == 2:
                self._shaped[sides[::-1]].append(_Form(key, partial(mapped.read_turned, key), own.count))
        if isinstance(network, UNet2DConditionModel):
            table = frequencies(network.config)
            self._shaped[tuple(table.shape)].append(_Form(FREQUENCIES, lambda: table, len(table)))

    def find(self, models: Sequence[Model], *, named: bool) -> Matches:
        """Match constants to weights. named: whether the constants have the names of their parameters.

        Uncompressed constants that are not weights are skipped, and so are those that lost nothing in compression, such
        as masks: they are part of the graph.
        """
        matches = Matches()
        for name, value, bits in _constants(models):
            own = self._named.get(name) if named else None
            if named and bits is None and own is None:
                continue
            sides = tuple(side or 0 for side in value.type.shape)
            candidates = self._shaped.get(tuple(side for side in sides if side != 1), [])
            if own is not None and own.count == math.prod(sides):
                candidates = [own]
            numbers = np.ascontiguousarray(np.asarray(value.read())).reshape(-1)
            lossy = bits is not None and not _is_plain(numbers, bits)
            if not candidates:
                matches.unknown += [name] if lossy else []
                continue
            nearest = _nearest(numbers, candidates)
            weight = nearest.numbers().reshape(-1)
            db = _decibels(numbers, weight)
            if lossy or db == math.inf or own is not None:
                needed = _needed(numbers, weight, bits) if bits is not None and lossy else math.inf
                matches.found[name] = Match(name, nearest, db, needed)
            let_go = getattr(value.data, "let_go", None)
            if let_go is not None:
                let_go()
        return matches


class _Mapped:
    """The memory-mapped weights of a network by key; the mapping is renewed now and then to free its memory."""

    def __init__(self, load: Callable[[], base.Model]) -> None:
        self._load = load
        self._tensors: dict[str, Tensor] = {}
        self._bytes = WINDOW

    def read(self, key: str) -> Tensor:
        """Return a weight as it is stored."""
        if self._bytes >= WINDOW:
            self._tensors.clear()
            gc.collect()  # modules are in reference cycles, which keep the file mapped
            self._tensors, self._bytes = self._load().state_dict(), 0
        self._bytes += self._tensors[key].nbytes
        return self._tensors[key]

    def read_turned(self, key: str) -> Tensor:
        """Return a matrix, transposed."""
        return self.read(key).squeeze().T


@dataclass(frozen=True, eq=False)
class _Form:
    """A weight, by its key in the network, in one of the layouts that constants may use; count: number of elements."""

    key: str
    numbers: Callable[[], Tensor]
    count: int

    @cached_property
    def told_by(self) -> np.ndarray:
        """A sample of its elements."""
        return _some(self.numbers().reshape(-1), TOLD_BY)


def _constants(models: Sequence[Model]) -> Iterator[tuple[str, Value, int | None]]:
    """Yield every floating-point constant, decompressed: its name, value, and bits per element if compressed."""
    for model in models:
        for function, plain in zip(model.functions, decompress(model).functions, strict=True):
            bits = dict(_bits(function))
            for operation in plain.operations:
                if operation.type == "const" and operation.outputs[0].type.dtype in ("fp16", "fp32"):
                    name = operation.outputs[0].name
                    yield name, operation.attributes["val"], bits.get(name)


def _bits(function: Function) -> Iterator[tuple[str, int]]:
    """Yield the name of each compressed weight and its bits per element; 1 bit if most elements are omitted."""
    types = types_of(function)
    for operation in filter(is_compressed, function.operations):
        call = Call(operation, types, lambda name: None)
        data = next(iter(call.given("quantized_data", "data")), None)
        bits = SUBBYTE_BITS.get(call.type(data).dtype, 8) if data else 1
        if call.given("lut"):
            shape = call.type("lut").shape
            bits = int(math.log2(shape[-1 if len(shape) == 1 else -2] or 1))
        yield from ((output.name, bits) for output in operation.outputs)


def _is_plain(numbers: np.ndarray, bits: int) -> bool:
    """Return whether there are so few distinct values that compression loses nothing: a mask, or a mean of 0."""
    few = min(3, 2**bits)
    return len(np.unique(_some(numbers, SAMPLE))) < few and len(np.unique(numbers)) < few


def _some(numbers: np.ndarray | Tensor, count: int) -> np.ndarray:
    """Return elements sampled evenly from the whole array, float32."""
    some = numbers[:: max(1, len(numbers) // count)]
    return np.asarray(some.float() if isinstance(some, torch.Tensor) else some, np.float32)


def _nearest(numbers: np.ndarray, candidates: Sequence[_Form]) -> _Form:
    if len(candidates) == 1:
        return candidates[0]
    some = _some(numbers, TOLD_BY)

    def distance(one: _Form) -> float:
        noise, signal = float(np.square(one.told_by - some).sum()), float(np.square(one.told_by).sum())
        return noise / signal if signal else noise and math.inf

    return min(candidates, key=distance)


def _numbers(form: _Form, type_: TensorType) -> np.ndarray:
    weight = form.numbers()
    rounded = weight.half() if type_.dtype == "fp16" else weight.float()
    # The runtime keeps small constants as they are, which would keep the whole file mapped.
    rounded = rounded.clone() if rounded.numel() < SMALL else rounded
    return rounded.reshape([side or 0 for side in type_.shape]).numpy()


def _decibels(numbers: np.ndarray, weight: Tensor) -> float:
    """Return the signal-to-noise ratio of a constant against a weight; infinite if it is equal after rounding."""
    if all(_same(own, other.to(own.dtype)) for own, other in _parts(numbers, weight)):
        return math.inf
    signal = noise = 0.0
    for own, other in _parts(numbers, weight):
        wide = other.float()
        signal += float(wide.square().sum())
        noise += float((own.float() - wide).square().sum())
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal and math.isfinite(noise) else -math.inf


def _same(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are equal; the bits are compared first, which is several times faster."""
    bits = torch.int16 if one.dtype == torch.float16 else torch.int32
    return torch.equal(one.view(bits), other.view(bits)) or torch.equal(one, other)


def _parts(numbers: np.ndarray, weight: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the elements of both, in blocks."""
    for start in range(0, len(numbers), _AT_ONCE):
        # Torch warns about read-only arrays, so those are copied.
        own = np.require(numbers[start : start + _AT_ONCE], requirements="W")
        yield torch.from_numpy(own), weight[start : start + _AT_ONCE]


def _needed(numbers: np.ndarray, weight: Tensor, bits: int) -> float:
    """Return the dB a palette must keep: what its bits allow and, for a single table, what its nearest entries give."""
    own, other = _some(numbers, SAMPLE), _some(weight, SAMPLE)
    table = np.unique(own)
    if len(table) > 2**bits:
        return least_db(bits)
    nearest = table[np.searchsorted((table[:-1] + table[1:]) / 2, other)]
    noise, signal = float(np.square(other - nearest).sum()), float(np.square(other).sum())
    best = 10 * math.log10(signal / noise) if noise and signal else 0.0
    return max(least_db(bits), best - BEST_WITHIN_DB)
