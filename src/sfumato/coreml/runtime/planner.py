"""Turns a function into bound operations: known values are folded and unused ones dropped."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch

from sfumato.coreml.program import Function, Operation, TensorType
from sfumato.coreml.runtime.call import Bound, Call, Late
from sfumato.coreml.runtime.constants import SMALL, Constant, Constants
from sfumato.coreml.runtime.constexpr import CONSTEXPR
from sfumato.coreml.runtime.fuse import FUSED
from sfumato.coreml.runtime.kinds import half_rounded
from sfumato.coreml.runtime.operations import OPERATIONS
from sfumato.errors import CheckpointError, SfumatoError

__all__ = ["Planned", "needed", "place_of", "planned", "types_of"]

_TABLE = {**OPERATIONS, **FUSED}


class Planned(NamedTuple):
    """The operations of a function to compute in each run, with their indices, and its constants."""

    operations: list[tuple[int, Operation, Bound]]
    constants: Constants


def place_of(operation: Operation, index: int, function: str) -> str:
    """Describe an operation for error messages: its index, type, name and function."""
    name = f" ({operation.outputs[0].name})" if operation.outputs else ""
    return f"operation {index} {operation.type!r}{name} of function {function!r}"


def types_of(function: Function) -> dict[str, TensorType]:
    """Return the type of every value of a function, by name."""
    types = {each.name: each.type for each in function.inputs}
    for operation in function.operations:
        for output in operation.outputs:
            types[output.name] = output.type
    return types


def needed(function: Function) -> list[bool]:
    """Return, for each operation, whether the outputs of the function depend on it."""
    wanted = set(function.outputs)
    kept = [False] * len(function.operations)
    for index in range(len(kept) - 1, -1, -1):
        operation = function.operations[index]
        if any(output.name in wanted for output in operation.outputs):
            kept[index] = True
            wanted.update(operation.names)
    return kept


def _sources(function: Function, kinds: tuple[str, ...]) -> set[str]:
    """Return the outputs of operations of some types, and all values that they depend on."""
    found: set[str] = set()
    for operation in reversed(function.operations):
        if operation.type in kinds or any(output.name in found for output in operation.outputs):
            found.update(output.name for output in operation.outputs)
            found.update(operation.names)
    return found


def planned(function: Function, name: str, *, typed: bool, unrounded: tuple[str, ...] = ()) -> Planned:
    """Bind every operation that must be computed. typed: round results of type fp16.

    unrounded: types of operations whose results, and everything these depend on, are not rounded. Raises
    `CheckpointError`, which names the operation, if one is not supported, lacks a parameter, or reads a missing value.
    """
    types = types_of(function)
    wide = _sources(function, unrounded) if unrounded else set()
    known: dict[str, Constant] = {}
    constants = Constants(known)
    steps: list[tuple[int, Operation, Bound]] = []
    computed = {each.name for each in function.inputs}
    for index, (operation, wanted) in enumerate(zip(function.operations, needed(function), strict=True)):
        if not wanted:
            continue
        for entry in operation.names:
            if entry not in computed and entry not in known:
                raise CheckpointError(f"{place_of(operation, index, name)} reads {entry!r}, which nothing computes")
        call = Call(operation, types, constants.numbers_of)
        if operation.type == "const":
            _add_const(known, operation, index, name)
        elif operation.type in CONSTEXPR:
            _add_constexpr(known, call, place_of(operation, index, name))
        else:
            bound = _bound(call, constants, index, name)
            if typed and operation.outputs[0].name not in wide:
                bound = _rounding(operation, bound)
            if all(entry in constants for entry in bound.reads):
                _fold(known, operation, bound, constants, place_of(operation, index, name))
            else:
                steps.append((index, operation, bound))
                computed.update(output.name for output in operation.outputs)
    missing = [each for each in function.outputs if each not in computed and each not in known]
    if missing:
        raise CheckpointError(f"function {name!r} returns {missing[0]!r}, which nothing computes")
    return Planned(steps, constants)


def _add_const(known: dict[str, Constant], operation: Operation, index: int, function: str) -> None:
    value = operation.attributes.get("val")
    if value is None:
        raise CheckpointError(f"{place_of(operation, index, function)} has no value")
    known[operation.outputs[0].name] = Constant.of(value)


def _add_constexpr(known: dict[str, Constant], call: Call, where: str) -> None:
    decompress = CONSTEXPR[call.operation.type]
    _add(known, call.operation, lambda: decompress(call), where)


def _fold(known: dict[str, Constant], operation: Operation, bound: Bound, constants: Constants, where: str) -> None:
    def results() -> Any:
        found = bound.run(*(constants[entry].tensor() for entry in bound.reads))
        return found if len(operation.outputs) > 1 else (found,)

    _add(known, operation, results, where)


def _add(known: dict[str, Constant], operation: Operation, results: Callable[[], Any], where: str) -> None:
    """Add the outputs of an operation to the known values; errors while computing them name the operation.

    Small results are computed once and cached, as long chains of them, such as shapes, depend on each other.
    """
    shapes = [one.type.shape for one in operation.outputs]
    if all(None not in shape and prod(side or 0 for side in shape) <= SMALL for shape in shapes):
        results = cache(results)

    def result(place: int) -> Any:
        try:
            return results()[place]
        except (RuntimeError, LookupError, TypeError, ValueError) as error:
            raise CheckpointError(f"{where} could not be computed: {error}") from error

    for place, output in enumerate(operation.outputs):
        known[output.name] = Constant(output.type, partial(result, place))


def _bound(call: Call, constants: Constants, index: int, function: str) -> Bound:
    operation = call.operation
    bind = _TABLE.get(operation.type)
    if bind is None:
        raise CheckpointError(
            f"{place_of(operation, index, function)} is not supported by the portable runtime; "
            "run the model with Core ML on a Mac instead"
        )
    try:
        return bind(call)
    except Late:
        return _late(call, constants)
    except SfumatoError as error:
        raise CheckpointError(f"{place_of(operation, index, function)}: {error}") from error
    except KeyError as error:
        raise CheckpointError(f"{place_of(operation, index, function)} lacks or misuses {error.args[0]!r}") from error
    except (LookupError, TypeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(
            f"{place_of(operation, index, function)} has parameters that do not fit: {error}"
        ) from error


def _rounding(operation: Operation, bound: Bound) -> Bound:
    """Return the same operation with fp16 results rounded, unless it only moves elements."""
    halves = [output.type.dtype == "fp16" for output in operation.outputs]
    run = bound.run
    if bound.moves or not any(halves):
        return bound
    if len(halves) == 1:
        return bound._replace(run=lambda *values: half_rounded(run(*values)))

    def each(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(half_rounded(out) if half else out for out, half in zip(run(*values), halves, strict=True))

    return bound._replace(run=each)


def _late(call: Call, constants: Constants) -> Bound:
    """Bind an operation with a parameter that is only known at run time: it is bound again in each run."""
    operation = call.operation
    names = tuple(dict.fromkeys(name for name in operation.names if name not in constants))

    def run(*tensors: torch.Tensor) -> Any:
        given = dict(zip(names, tensors, strict=True))

        def numbers_of(name: str) -> np.ndarray | str | tuple[str, ...] | None:
            return given[name].numpy() if name in given else constants.numbers_of(name)

        bound = _TABLE[operation.type](Call(operation, call.types, numbers_of))
        return bound.run(
            *(
                given[each] if isinstance(each, str) and each in given else constants[each].tensor()
                for each in bound.reads
            )
        )

    return Bound(run, names)
