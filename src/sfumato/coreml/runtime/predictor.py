"""`Predictor`: a Core ML model that runs anywhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from sfumato.coreml.program import Feature, Function, Interface, Model
from sfumato.coreml.runtime.executor import Executable, Visit
from sfumato.coreml.runtime.features import array_of, check_names, check_tensor, default_tensor, tensor_from
from sfumato.coreml.runtime.fuse import fused
from sfumato.coreml.runtime.planner import types_of
from sfumato.errors import CheckpointError, UsageError, suggest

__all__ = ["Precision", "Predictor", "load"]

Precision = Literal["typed", "float32"]


@dataclass(frozen=True, slots=True)
class _Stage:
    """One program of a model: its interface and the function to run."""

    interface: Interface
    function: Function
    name: str
    executable: Executable


class Predictor:
    """Runs a Core ML model on the CPU with torch, without Core ML; `predict` works like that of coremltools' `MLModel`.

    precision: "typed" computes as the program specifies: every result of type fp16 is rounded to fp16, while arithmetic
        within an operation is float32, as in hardware. "float32" treats all floating point as float32 and shows what
        the graph computes without rounding.
    function: one of a program with several functions; None for the model's default function.
    unrounded: types of operations whose results, and everything they depend on, stay in float32 in any case.
    fuse: whether group normalization and attention, which programs spell out, are computed as single operations. That
        is faster, but a typed result is rounded only once, at the end of the chain, and what would overflow fp16 within
        it does not.

    Weights stay in their file until the first run. They are then kept as float32 if they take at most half of the
    memory that is free when the predictor is created; otherwise each is converted, or decompressed, just before each
    use and released after it, which is slower.

    Raises `CheckpointError`, which names the operation, if one is not supported, and `UsageError` for an unknown
    function or precision.
    """

    def __init__(
        self,
        model: Model,
        *,
        precision: Precision = "typed",
        function: str | None = None,
        fuse: bool = True,
        unrounded: tuple[str, ...] = (),
    ) -> None:
        if precision not in ("typed", "float32"):
            raise UsageError(f"precision must be 'typed' or 'float32', not {precision!r}")
        self.model, self.precision, self.fuse, self._unrounded = model, precision, fuse, unrounded
        if isinstance(model.body, tuple):
            if function is not None:
                raise UsageError(f"a pipeline has no functions; omit {function!r}")
            self.interface = model.interface
        else:
            self.interface = _interface(model, _function_name(model, function))
        programs = list(_programs(model))
        budget = _free_memory() // 2 // max(len(programs), 1)
        self._stages = [self._stage(each, function, budget) for each in programs]

    def _stage(self, model: Model, function: str | None, budget: int) -> _Stage:
        name = _function_name(model, function)
        chosen = model.program.functions[name]
        made = self._executable(fused(chosen) if self.fuse else chosen, name, budget)
        return _Stage(_interface(model, name), chosen, name, made)

    def _executable(self, function: Function, name: str, budget: int) -> Executable:
        return Executable(function, name, typed=self._typed, unrounded=self._unrounded, budget=budget)

    @property
    def _typed(self) -> bool:
        return self.precision == "typed"

    @property
    def metadata(self) -> Mapping[str, str]:
        """The model's user-defined metadata."""
        return self.model.metadata

    def predict(self, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Return outputs by name for inputs by name: arrays in the dtypes of the interface.

        Arrays of other numeric dtypes are cast, as in Core ML; images can have common formats (see `tensor_from`), and
        inputs with a default value may be omitted. Raises `UsageError`, which names the input, if one is missing,
        unknown, has the wrong shape, or is not numeric.
        """
        return self._arrays(self._compute(self._tensors(inputs)))

    def run(self, inputs: Mapping[str, torch.Tensor], visit: Visit | None = None) -> dict[str, torch.Tensor]:
        """Like `predict` for tensors; outputs are float32 for fp16 and fp32. visit: as for `observe`."""
        check_names(self.interface, inputs)
        for feature in self.interface.inputs:
            if feature.name in inputs:
                check_tensor(feature, inputs[feature.name])
        return self._compute({**inputs, **self._defaults(inputs)}, visit)

    def observe(self, inputs: Mapping[str, Any], visit: Visit) -> dict[str, np.ndarray]:
        """Like `predict`, but runs the program's operations one by one and passes each to `visit`.

        visit: called with the operation, its index in its function, and its outputs as tensors, which it must not
            change. Values known before the run (constants, and what depends only on them) and unused values are
            skipped. The operations of a pipeline come model by model.
        """
        return self._arrays(self._compute(self._tensors(inputs), visit))

    def _tensors(self, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        check_names(self.interface, inputs)
        given = [feature for feature in self.interface.inputs if feature.name in inputs]
        return {one.name: tensor_from(one, inputs[one.name]) for one in given} | self._defaults(inputs)

    def _defaults(self, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Return tensors for inputs that are not given."""
        missing = (feature for feature in self.interface.inputs if feature.name not in inputs)
        return {feature.name: default_tensor(feature) for feature in missing}

    def _arrays(self, outputs: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
        return {feature.name: array_of(feature, outputs[feature.name]) for feature in self.interface.outputs}

    def _compute(self, inputs: Mapping[str, torch.Tensor], visit: Visit | None = None) -> dict[str, torch.Tensor]:
        features = dict(inputs)
        for stage in self._stages:
            missing = [each.name for each in stage.function.inputs if each.name not in features]
            if missing:
                raise CheckpointError(f"function {stage.name!r} reads {missing[0]!r}, which the model does not provide")
            executable = stage.executable
            if visit is not None and self.fuse:
                executable = self._executable(stage.function, stage.name, 0)
            features.update(executable(features, visit))
        absent = [each.name for each in self.interface.outputs if each.name not in features]
        if absent:
            raise CheckpointError(f"the model declares the output {absent[0]!r}, which it does not compute")
        return {feature.name: features[feature.name] for feature in self.interface.outputs}


def _programs(model: Model) -> Iterator[Model]:
    """Yield the models that have programs, in order of execution."""
    if isinstance(model.body, tuple):
        for _, each in model.body:
            yield from _programs(each)
    else:
        yield model


def _function_name(model: Model, function: str | None) -> str:
    functions = model.program.functions
    name = model.default_function if function is None else function
    if name not in functions:
        names = ", ".join(repr(each) for each in functions) or "none"
        raise UsageError(f"the model has no function {name!r}{suggest(name, functions)}; it has {names}")
    return name


def _interface(model: Model, name: str) -> Interface:
    """Return the interface of a function, from the file or else from the function itself."""
    if name in model.interfaces:
        return model.interfaces[name]
    if name == model.default_function:
        return model.interface
    function = model.program.functions[name]
    types = types_of(function)
    return Interface(
        tuple(Feature(each.name, each.type) for each in function.inputs),
        tuple(Feature(each, types[each]) for each in function.outputs),
    )


def _free_memory() -> int:
    """Return the bytes that this process can still allocate."""
    import psutil

    from sfumato.runtime.limits import ControlGroups

    available, room = psutil.virtual_memory().available, ControlGroups().free_memory()
    return available if room is None else min(available, room)


def load(
    path: str | PathLike[str], *, precision: Precision = "typed", function: str | None = None, fuse: bool = True
) -> Predictor:
    """Load a package, a compiled folder or a single `.mlmodel` file as a `Predictor`, with the same options."""
    from sfumato.coreml.formats import read_model

    return Predictor(read_model(Path(path)), precision=precision, function=function, fuse=fuse)
