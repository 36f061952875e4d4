"""Splits one program into chunks that run in sequence, and merges several models into one package.

A phone may have enough memory for only one chunk at a time. A value that a later chunk needs is an output of one chunk
and an input of the same name of the other, so the caller must keep all features until the last chunk has run. Values in
half precision are passed on as fp32, as in Apple's chunks; weights used on both sides of a cut are stored in both.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np

from sfumato.coreml.program import (
    Feature,
    Function,
    Interface,
    Model,
    Operation,
    Output,
    Program,
    TensorType,
    Value,
    byte_count,
    constant,
    renamed,
)
from sfumato.errors import ConfigError, UsageError

__all__ = ["MAX_CHUNKS", "chunk", "cut", "join"]

MAX_CHUNKS = 8
# How far a chunk's size may deviate, as a fraction of an equal share, to pass less data between the chunks.
TOLERANCE = 0.1

# The dtypes in which values are passed between chunks: models support no other feature types.
CARRIED_AS = {
    "fp32": "fp32",
    "fp16": "fp32",
    "int32": "int32",
    "bool": "int32",
    "int8": "int32",
    "uint8": "int32",
    "int16": "int32",
    "uint16": "int32",
}


def chunk(model: Model, parts: int = 2) -> list[Model]:
    """Split a model into 2 to 8 chunks of about the same stored size.

    Weights count as stored, so palettized ones by their compressed size. Among the positions that split the bytes
    equally within `TOLERANCE`, each cut is made where the fewest bytes are passed on, then closest to equal. A chunk
    has those of the model's inputs that it needs, in the original order; the last one has all outputs. Raises
    `UsageError` for an impossible number of parts, `ConfigError` if the model cannot be split.
    """
    if not 2 <= parts <= MAX_CHUNKS:
        raise UsageError(f"a model can be split into 2 to {MAX_CHUNKS} chunks, not {parts}")
    graph = _Graph.of(_function(model))
    if len(graph.steps) < parts:
        raise UsageError(f"a model of {len(graph.steps)} operations cannot be split into {parts} chunks")
    return _pieces(model, graph, _best_positions(graph, parts))


def cut(model: Model, positions: Sequence[int]) -> list[Model]:
    """Split a model at given positions: the number of operations, without constants, before each cut.

    Raises `UsageError` if the positions do not ascend, `ConfigError` if the model cannot be split there.
    """
    graph = _Graph.of(_function(model))
    if any(one >= other for one, other in pairwise([0, *positions, len(graph.steps)])):
        raise UsageError(f"cuts must ascend between 1 and {len(graph.steps) - 1}, not {list(positions)}")
    return _pieces(model, graph, positions)


def join(models: Sequence[Model]) -> Model:
    """Return a pipeline that runs the models in order and passes features on by name.

    The metadata is that of the first model. Features that no earlier model computes are inputs, and those that no later
    one reads are outputs. Raises `UsageError` unless there are at least two models, all of them programs.
    """
    if len(models) < 2 or not all(isinstance(model.body, Program) for model in models):
        raise UsageError("a pipeline joins at least two models that are programs")
    inputs: dict[str, Feature] = {}
    outputs: dict[str, Feature] = {}
    computed: set[str] = set()
    for model in models:
        for feature in model.interface.inputs:
            outputs.pop(feature.name, None)
            if feature.name not in computed:
                inputs.setdefault(feature.name, feature)
        for feature in model.interface.outputs:
            outputs[feature.name] = feature
            computed.add(feature.name)
    return replace(
        models[0],
        interface=Interface(tuple(inputs.values()), tuple(outputs.values())),
        interfaces={},
        body=tuple((f"model{number}", model) for number, model in enumerate(models)),
        spec_version=max(model.spec_version for model in models),
    )


def _function(model: Model) -> Function:
    if not isinstance(model.body, Program):
        raise ConfigError("a pipeline is already split; split one of its models")
    if len(model.body.functions) != 1:
        raise ConfigError(
            f"only a model with one function can be split; this one has {', '.join(model.body.functions)}"
        )
    return model.body.functions[model.default_function]


@dataclass(frozen=True, eq=False)
class _Graph:
    """The facts about a function that splitting needs.

    steps: the operations that compute; constants: the ones that do not, by output name, in order; types: of the values
    that steps compute; made: the step that computes a value; used: the last step that reads it, or the number of steps
    for outputs.
    """

    function: Function
    steps: tuple[Operation, ...]
    constants: Mapping[str, Operation]
    types: dict[str, TensorType] = field(default_factory=dict)
    made: dict[str, int] = field(default_factory=dict)
    used: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, function: Function) -> _Graph:
        still = [one for one in function.operations if one.type == "const" or one.type.startswith("constexpr_")]
        steps = tuple(
            one for one in function.operations if one.type != "const" and not one.type.startswith("constexpr_")
        )
        graph = cls(function, steps, {output.name: one for one in still for output in one.outputs})
        for step, operation in enumerate(steps):
            graph.used.update(dict.fromkeys(operation.names, step))
            for output in operation.outputs:
                graph.made[output.name], graph.types[output.name] = step, output.type
        graph.used.update(dict.fromkeys(function.outputs, len(steps)))
        return graph

    def crossing(self) -> Iterator[tuple[str, int, int]]:
        """Yield values that later steps need: name, the step that makes it, the last step that reads it."""
        for name, made in self.made.items():
            if self.used.get(name, made) > made:
                yield name, made, self.used[name]

    def constants_of(self, names: Iterable[str]) -> set[str]:
        """Return the constants among the values, and the constants they are made from."""
        wanted, asked = set(), list(names)
        while asked:
            name = asked.pop()
            if name in self.constants and name not in wanted:
                wanted.add(name)
                asked += self.constants[name].names
        return wanted


def _best_positions(graph: _Graph, parts: int) -> list[int]:
    count = len(graph.steps)
    before, travelling = _bytes_before(graph), _bytes_travelling(graph)
    share = before[-1] / parts
    positions = [0]
    for number in range(1, parts):
        places = np.arange(positions[-1] + 1, count - (parts - number) + 1)
        places = places[np.isfinite(travelling[places])]
        if not len(places):
            raise ConfigError(
                "the model cannot be split: everywhere, a value would have to be passed on that Core ML features do "
                "not support"
            )
        away = np.abs(before[places] - number * share)
        near = away <= max(TOLERANCE * share, away.min())
        order = np.lexsort((away[near], travelling[places[near]]))
        positions.append(int(places[near][order[0]]))
    return positions[1:]


def _bytes_before(graph: _Graph) -> np.ndarray:
    """Return the stored bytes needed before each position; each step adds 1, for programs without weights."""
    seen: set[str] = set()
    own = np.ones(len(graph.steps))
    for step, operation in enumerate(graph.steps):
        fresh = graph.constants_of(operation.names) - seen
        seen |= fresh
        for one in (operation, *(graph.constants[name] for name in fresh)):
            own[step] += sum(byte_count(value.type) for value in _values(one) if value.type.dtype != "string")
    return np.concatenate([[0], np.cumsum(own)])


def _values(operation: Operation) -> Iterator[Value]:
    yield from operation.attributes.values()
    for argument in operation.inputs.values():
        yield from (entry for entry in argument if isinstance(entry, Value))


def _bytes_travelling(graph: _Graph) -> np.ndarray:
    """Return the bytes passed on at each position; infinite where a value cannot be passed on."""
    change = np.zeros(len(graph.steps) + 2)
    barred = np.zeros(len(graph.steps) + 2)
    for name, made, used in graph.crossing():
        type_ = graph.types[name]
        can = type_.dtype in CARRIED_AS and None not in type_.shape
        kind, weight = (change, byte_count(_carried(type_))) if can else (barred, 1)
        kind[made + 1] += weight
        kind[used + 1] -= weight
    return np.where(np.cumsum(barred) > 0, np.inf, np.cumsum(change))[:-1]


def _carried(type_: TensorType) -> TensorType:
    if type_.dtype not in CARRIED_AS or None in type_.shape:
        raise ConfigError(
            f"the model cannot be split here: a value of type {type_} would have to be passed on, which Core ML "
            "features do not support"
        )
    return TensorType(CARRIED_AS[type_.dtype], type_.shape)


@dataclass(frozen=True)
class _Passage:
    """How a value crosses a cut: its feature, its value inside the chunks, the step that makes it, the last reader."""

    feature: Output
    inner: Output
    made: int
    used: int
    fresh: str

    def leave(self) -> tuple[Operation, ...]:
        """Return the operations at the end of the chunk that computes the value."""
        return self._converted(self.inner, self.feature)

    def arrive(self) -> tuple[Operation, ...]:
        """Return the operations at the start of a chunk that reads the value."""
        return self._converted(self.feature, self.inner)

    def _converted(self, source: Output, target: Output) -> tuple[Operation, ...]:
        if source.name == target.name:
            return ()
        text = TensorType("string")
        name = {"name": Value(text, target.name)}
        if source.type == target.type:
            return (Operation("identity", {"x": (source.name,)}, (target,), name),)
        dtype = constant(_dtype_of(self.fresh), Value(text, target.type.dtype))
        return dtype, Operation("cast", {"x": (source.name,), "dtype": (dtype.outputs[0].name,)}, (target,), name)


def _passages(graph: _Graph, positions: Sequence[int]) -> dict[str, _Passage]:
    """Return the values that cross a cut, by their names in the whole model.

    A value that is converted on the way gives its name to the feature, as in Apple's chunks; an output of the whole
    model keeps its name for the last chunk.
    """
    taken = {*graph.made, *graph.constants, *(one.name for one in graph.function.inputs)}
    found = {}
    for name, made, used in graph.crossing():
        if not any(made < position <= used for position in positions):
            continue
        type_ = graph.types[name]
        carried = _carried(type_)
        final = name in graph.function.outputs
        fresh = name
        if final or carried != type_:
            fresh = _fresh(f"{name}_early" if final else f"{name}_{type_.dtype}", taken)
        feature, inner = (fresh, name) if final else (name, fresh)
        found[name] = _Passage(Output(feature, carried), Output(inner, type_), made, used, fresh)
    return found


def _fresh(name: str, taken: set[str]) -> str:
    """Return the name, with underscores appended while it or its dtype constant is taken; both are marked as taken."""
    while {name, _dtype_of(name)} & taken:
        name += "_"
    taken |= {name, _dtype_of(name)}
    return name


def _dtype_of(name: str) -> str:
    """Return the name of the constant that holds a cast's target dtype, as in Apple's tools."""
    return f"{name}_dtype_0"


def _pieces(model: Model, graph: _Graph, positions: Sequence[int]) -> list[Model]:
    passages = _passages(graph, positions)
    return [_piece(model, graph, passages, begin, end) for begin, end in pairwise([0, *positions, len(graph.steps)])]


def _piece(model: Model, graph: _Graph, passages: Mapping[str, _Passage], begin: int, end: int) -> Model:
    """Return a model of the steps from `begin` to `end`, with only the constants and inputs they need."""
    steps, last = graph.steps[begin:end], end == len(graph.steps)
    finals = graph.function.outputs if last else ()
    read = {name for operation in steps for name in operation.names} | set(finals)
    still = graph.constants_of(read)
    arriving = [one for name, one in passages.items() if one.made < begin and name in read]
    leaving = [] if last else [one for one in passages.values() if begin <= one.made < end <= one.used]
    inner = {name: one.inner.name for name, one in passages.items()}
    inputs = tuple(one for one in graph.function.inputs if one.name in read)
    outputs = tuple(one.feature for one in leaving)
    operations = (
        *(operation for one in arriving for operation in one.arrive()),
        *(operation for name, operation in graph.constants.items() if name in still),
        *(renamed(operation, inner) for operation in steps),
        *(operation for one in leaving for operation in one.leave()),
    )
    function = Function(
        (*inputs, *(one.feature for one in arriving)),
        finals or tuple(one.name for one in outputs),
        operations,
        graph.function.opset,
    )
    whole = {feature.name: feature for feature in model.interface.inputs}
    interface = Interface(
        (
            *(whole.get(one.name, Feature(one.name, one.type)) for one in inputs),
            *(Feature(one.feature.name, one.feature.type) for one in arriving),
        ),
        model.interface.outputs if last else tuple(Feature(one.name, one.type) for one in outputs),
    )
    return replace(model, interface=interface, interfaces={}, body=Program({model.default_function: function}))
