"""The two backends for converted models: Apple's framework on macOS, the portable runtime elsewhere."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from sfumato.coreml.program import Interface
from sfumato.errors import CheckpointError, MissingExtra, UsageError, suggest

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from sfumato.coreml.program import Feature, Model
    from sfumato.coreml.runtime import Precision

__all__ = ["COMPUTE_UNITS", "AppleModel", "Backend", "Chain", "Engine", "Link", "engine_for", "parse_compute_unit"]

COMPUTE_UNITS = ("ALL", "CPU_AND_GPU", "CPU_ONLY", "CPU_AND_NE")
# The spellings of Apple's two runners, in lower case and without underscores.
_SPELLINGS = {unit.replace("_", "").lower(): unit for unit in COMPUTE_UNITS} | {"cpuandneuralengine": "CPU_AND_NE"}


class Backend(Protocol):
    """A model that can make predictions."""

    @property
    def interface(self) -> Interface:
        """Inputs and outputs of the model."""
        ...

    def predict(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the outputs by name, given all inputs by name in the shapes of the interface."""
        ...


def parse_compute_unit(name: str) -> str:
    """Return the one of `COMPUTE_UNITS` that a name stands for, ignoring case.

    Accepts the spelling of Apple's Python runner ("CPU_AND_GPU") and that of the Swift one ("cpuAndGPU"). Raises
    `UsageError` for any other name.
    """
    key = name.replace("_", "").replace("-", "").lower()
    if key not in _SPELLINGS:
        near = suggest(name.upper(), COMPUTE_UNITS)
        raise UsageError(f"there is no compute unit {name!r}{near}; use {', '.join(COMPUTE_UNITS)}")
    return _SPELLINGS[key]


@dataclass(frozen=True)
class Engine:
    """Loads models with Apple's framework and a compute unit, or with the portable runtime.

    precision: how the portable runtime computes. "float32" ignores half-precision types, so nothing is rounded on the
    way, which is faster on CPUs. "typed" rounds wherever the program does, as hardware would.
    """

    compute_unit: str = "ALL"
    apple: bool = False
    precision: Precision = "float32"

    @property
    def name(self) -> str:
        """The engine's name in recipes."""
        return "core ml" if self.apple else "portable"

    @property
    def note(self) -> str | None:
        """A note for users who asked for more than this machine has, or None."""
        if self.apple or self.compute_unit == "CPU_ONLY":
            return None
        return f"{self.compute_unit} became CPU_ONLY: without Core ML, the portable runtime computes on the CPU"

    def open(self, path: Path, model: Model) -> Backend:
        """Load a model that was read from `path`, ready for predictions.

        Raises `CheckpointError` if it cannot be run, and `MissingExtra` if coremltools is not installed.
        """
        if self.apple:
            return AppleModel(path, model.interface, self.compute_unit)
        from sfumato.coreml.runtime import Predictor

        # Fused operations round only their result; hardware rounds intermediate values, too.
        try:
            return Predictor(model, precision=self.precision, fuse=self.precision == "float32")
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error


def engine_for(compute_unit: str | None, *, portable: bool = False, precision: Precision = "float32") -> Engine:
    """Return the engine for a compute unit (None for all units): Apple's framework on macOS, else the portable runtime.

    portable: use the portable runtime on macOS, too. Raises `UsageError` if the unit does not exist or the engine does
    not support it.
    """
    apple = sys.platform == "darwin" and not portable
    unit = parse_compute_unit(compute_unit or ("ALL" if apple else "CPU_ONLY"))
    if unit == "CPU_AND_NE" and not apple:
        raise UsageError(
            "the Neural Engine can only be used through Core ML on macOS; with compute unit CPU_ONLY, the portable "
            "runtime runs the same models"
        )
    return Engine(unit, apple=apple, precision=precision)


class AppleModel:
    """A package or a compiled model, run by Apple's framework through coremltools. macOS only."""

    def __init__(self, path: Path, interface: Interface, compute_unit: str) -> None:
        """Load the model; a package is compiled first, which can take minutes for the Neural Engine.

        Raises `MissingExtra` if coremltools is not installed, `CheckpointError` if loading fails.
        """
        self.interface = interface
        self._path, self._unit = path, compute_unit
        coremltools = _coremltools()
        unit = getattr(coremltools.ComputeUnit, compute_unit)
        try:
            if path.suffix == ".mlmodelc":
                self._model: Any = coremltools.models.CompiledMLModel(str(path), unit)
            else:
                self._model = coremltools.models.MLModel(str(path), compute_units=unit)
        except Exception as error:  # coremltools raises the framework's errors as plain exceptions
            raise self._failed("load", error) from error

    def predict(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the framework's outputs. Raises `CheckpointError` with its error message if it fails."""
        try:
            # Pass a copy, because coremltools converts half-precision arrays in the dictionary in place.
            outputs = self._model.predict(dict(inputs))
        except Exception as error:
            raise self._failed("run", error) from error
        return {name: np.asarray(value) for name, value in outputs.items()}

    def _failed(self, what: str, error: Exception) -> CheckpointError:
        words = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        other = "CPU_AND_GPU" if self._unit == "CPU_ONLY" else "CPU_ONLY"
        return CheckpointError(
            f"Core ML cannot {what} {self._path.name} on {self._unit} ({words}); try --compute-unit {other}"
        )


def _coremltools() -> Any:
    try:
        import coremltools
    except ImportError as error:
        raise MissingExtra("Apple's framework needs coremltools: pip install 'sfumato[coreml]'") from error
    return coremltools


@dataclass(frozen=True)
class Link:
    """One model of a `Chain`: its interface and a function that loads it."""

    interface: Interface
    open: Callable[[], Backend]


class Chain:
    """The models of one network, run in sequence; most networks are one model, but a U-Net may be split into chunks.

    The outputs of each model are available to all later ones by name. A model is loaded on first use, or by `load`.
    """

    def __init__(self, links: Sequence[Link]) -> None:
        self._links = tuple(links)
        self._open: dict[int, Backend] = {}
        inputs: dict[str, Feature] = {}
        given: set[str] = set()
        for link in self._links:
            inputs |= {one.name: one for one in link.interface.inputs if one.name not in given | inputs.keys()}
            given |= {one.name for one in link.interface.outputs}
        self.interface = Interface(tuple(inputs.values()), self._links[-1].interface.outputs)

    def load(self) -> None:
        """Load all models now."""
        for index in range(len(self._links)):
            self._backend(index)

    def release(self) -> None:
        """Release all models; the next prediction loads them again."""
        self._open.clear()

    def predict(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the last model's outputs by name, given the chain's inputs by name."""
        features = dict(inputs)
        outputs: dict[str, np.ndarray] = {}
        for index, link in enumerate(self._links):
            outputs = self._backend(index).predict({one.name: features[one.name] for one in link.interface.inputs})
            features |= outputs
        return outputs

    def _backend(self, index: int) -> Backend:
        if index not in self._open:
            self._open[index] = self._links[index].open()
        return self._open[index]
