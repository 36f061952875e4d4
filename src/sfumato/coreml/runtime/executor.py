"""Runs one function: slots instead of names, weights widened on use, values freed after their last use."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from sfumato.coreml.program import Function, Operation, Value
from sfumato.coreml.runtime.constants import SMALL, Constant, Constants
from sfumato.coreml.runtime.kinds import HELD, half_rounded
from sfumato.coreml.runtime.planner import place_of, planned
from sfumato.errors import CheckpointError

__all__ = ["Executable", "Visit"]

# Called after every operation: the operation, its index in the function, and its outputs.
Visit = Callable[[Operation, int, "tuple[torch.Tensor, ...]"], None]


class _Step(NamedTuple):
    """A step: `run` with the values of the slots `reads`, store in the slots `writes`, and clear the slots `frees`."""

    run: Callable[..., Any]
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    frees: tuple[int, ...]
    place: int


class Executable:
    """A function that is ready to run.

    typed: whether fp16 values are rounded to fp16; otherwise all floating point is float32. unrounded: types of
        operations whose results, and everything these depend on, are never rounded.
    budget: bytes that its weights may take as the float32 tensors that operations read. If they fit, all are kept from
        the first run on; otherwise each is converted (and decompressed) just before each use and released after it.
    """

    def __init__(
        self, function: Function, name: str, *, typed: bool, budget: int, unrounded: tuple[str, ...] = ()
    ) -> None:
        self.function, self.name, self.typed = function, name, typed
        steps, constants = planned(function, name, typed=typed, unrounded=unrounded)
        large = {entry for _, _, bound in steps for entry in bound.reads if entry in constants}
        large = {entry for entry in large if constants[entry].count > SMALL}
        if sum(constants[entry].byte_count for entry in large) <= budget:
            large.clear()
        self._operations = {index: operation for index, operation, _ in steps}
        self._slots: dict[str | Value, int] = {}
        self._kept: dict[int, Callable[[], torch.Tensor]] = {}
        self._base: list[torch.Tensor | None] | None = None
        self._count = 0
        for each in function.inputs:
            self._slot(each.name)
        drafts: list[_Step] = []
        for index, operation, bound in steps:
            reads = []
            for place, entry in enumerate(bound.reads):
                if entry in constants and entry not in large and place in bound.ready:
                    reads.append(self._ready_slot(constants[entry], bound.ready[place]))
                elif entry in large:
                    reads.append(self._new_slot())
                    drafts.append(_Step(constants[entry].tensor, (), (reads[-1],), (), index))
                else:
                    reads.append(self._known_slot(entry, constants))
            writes = tuple(self._slot(output.name) for output in operation.outputs)
            drafts.append(_Step(bound.run, tuple(reads), writes, (), index))
        for output in function.outputs:
            self._known_slot(output, constants)
        self._steps = self._with_frees(drafts)

    def _new_slot(self) -> int:
        self._count += 1
        return self._count - 1

    def _slot(self, entry: str | Value) -> int:
        """Return the slot of a value, creating it if necessary."""
        if entry not in self._slots:
            self._slots[entry] = self._new_slot()
        return self._slots[entry]

    def _known_slot(self, entry: str | Value, constants: Constants) -> int:
        """Return the slot of a value; a known value is stored there before the run."""
        slot = self._slot(entry)
        if entry in constants and slot not in self._kept:
            self._kept[slot] = constants[entry].tensor
        return slot

    def _ready_slot(self, constant: Constant, make: Callable[[Any], Any]) -> int:
        """Return a new slot for what one operation prepares from a constant that is kept."""
        slot = self._new_slot()
        self._kept[slot] = lambda: make(constant.tensor())
        return slot

    def _with_frees(self, drafts: Sequence[_Step]) -> list[_Step]:
        """Return the steps, each with the slots that no later step reads."""
        last: dict[int, int] = {}
        for place, step in enumerate(drafts):
            last.update(dict.fromkeys(step.writes, place))
            last.update(dict.fromkeys(step.reads, place))
        staying = {self._slots[name] for name in self.function.outputs} | set(self._kept)
        frees: list[list[int]] = [[] for _ in drafts]
        for slot, place in last.items():
            if slot not in staying:
                frees[place].append(slot)
        return [step._replace(frees=tuple(each)) for step, each in zip(drafts, frees, strict=True)]

    def _prepared(self) -> list[torch.Tensor | None]:
        """Return the initial values of a run: the kept constants, created in the first run."""
        if self._base is None:
            base: list[torch.Tensor | None] = [None] * self._count
            for slot, make in self._kept.items():
                base[slot] = make()
            self._base = base
        return list(self._base)

    def __call__(self, inputs: Mapping[str, torch.Tensor], visit: Visit | None = None) -> dict[str, torch.Tensor]:
        """Return the outputs by name, for inputs by name in the shapes of the function, which are not checked here.

        Raises `CheckpointError`, which names the operation, if one cannot be computed.
        """
        with torch.no_grad():
            values: list[Any] = self._prepared()
            for each in self.function.inputs:
                value = inputs[each.name].to(HELD[each.type.dtype])
                values[self._slots[each.name]] = half_rounded(value) if self._halves(each.type.dtype) else value
            self._run(values, visit)
        slots = {name: self._slots[name] for name in self.function.outputs}
        return {name: values[slot].clone() if slot in self._kept else values[slot] for name, slot in slots.items()}

    def _halves(self, dtype: str) -> bool:
        return self.typed and dtype == "fp16"

    def _run(self, values: list[Any], visit: Visit | None) -> None:
        for run, reads, writes, frees, index in self._steps:
            try:
                result = run(*[values[slot] for slot in reads])
                if len(writes) == 1:
                    values[writes[0]] = result
                else:
                    for slot, each in zip(writes, result, strict=True):
                        values[slot] = each
            except (RuntimeError, LookupError, TypeError, ValueError) as error:
                where = place_of(self._operations[index], index, self.name)
                raise CheckpointError(f"{where} could not be computed: {error}") from error
            if visit is not None and reads:
                visit(self._operations[index], index, tuple(values[slot] for slot in writes))
            for slot in frees:
                values[slot] = None
