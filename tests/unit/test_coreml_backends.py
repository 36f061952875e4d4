"""Who computes: the choice of an engine, Apple's framework through a stand-in for coremltools, chains of models."""

from __future__ import annotations

import enum
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from sfumato.cli import coreml_generate
from sfumato.coreml.backends import COMPUTE_UNITS, Chain, Engine, Link, engine_for, parse_compute_unit
from sfumato.coreml.program import Interface, Model, Program
from sfumato.errors import CheckpointError, MissingExtra, UsageError
from support.converted import Stub, feature

INTERFACE = Interface((feature("x", (2,), "fp16"),), (feature("y", (2,)),))
MODEL = Model(INTERFACE, Program({}), 7)


class ComputeUnit(enum.Enum):
    ALL = 1
    CPU_AND_GPU = 2
    CPU_ONLY = 3
    CPU_AND_NE = 4


@pytest.fixture
def framework(monkeypatch):
    """A coremltools whose models add one, as far as `AppleModel` asks it; `made` is what was loaded."""
    made: list[tuple[object, ...]] = []

    class Loaded:
        fails: Exception | None = None

        def predict(self, data):
            if self.fails is not None:
                raise self.fails
            for name, value in data.items():
                data[name] = value.astype(np.float32)  # coremltools does this to the caller's own dictionary
            return {"y": (data["x"] + 1).tolist()}

    class MLModel(Loaded):
        def __init__(self, path, *, compute_units):
            made.append(("package", path, compute_units))

    class CompiledMLModel(Loaded):
        def __init__(self, path, compute_units):
            made.append(("compiled", path, compute_units))
            if "broken" in path:
                raise RuntimeError("Failed to load\nthe model plan")

    models = SimpleNamespace(MLModel=MLModel, CompiledMLModel=CompiledMLModel)
    module = SimpleNamespace(ComputeUnit=ComputeUnit, models=models, made=made, Loaded=Loaded)
    monkeypatch.setitem(sys.modules, "coremltools", module)
    return module


def test_compute_units_in_every_spelling():
    assert [parse_compute_unit(unit) for unit in COMPUTE_UNITS] == list(COMPUTE_UNITS)
    swift = ["all", "cpuAndGPU", "cpuOnly", "cpuAndNeuralEngine"]
    assert [parse_compute_unit(unit) for unit in swift] == list(COMPUTE_UNITS)
    assert parse_compute_unit("cpu-and-ne") == "CPU_AND_NE"
    with pytest.raises(UsageError, match="there is no compute unit 'CPU_AND_GPUS' \\(did you mean 'CPU_AND_GPU'"):
        parse_compute_unit("CPU_AND_GPUS")


@pytest.mark.parametrize("unit", COMPUTE_UNITS)
def test_on_macos_everything_is_apples(monkeypatch, unit):
    monkeypatch.setattr(sys, "platform", "darwin")
    engine = engine_for(unit)
    assert (engine.apple, engine.note, engine.name) == (True, None, "core ml")


@pytest.mark.parametrize(("system", "portable"), [("linux", False), ("win32", False), ("darwin", True)])
def test_elsewhere_the_portable_runtime_computes_and_says_so(monkeypatch, system, portable):
    monkeypatch.setattr(sys, "platform", system)
    assert engine_for("cpuOnly", portable=portable).note is None
    for unit in ("ALL", "CPU_AND_GPU"):
        engine = engine_for(unit, portable=portable)
        assert (engine.apple, engine.name, engine.precision) == (False, "portable", "float32")
        assert f"{unit} became CPU_ONLY" in str(engine.note)
    with pytest.raises(UsageError, match="with compute unit CPU_ONLY, the portable runtime runs the same models"):
        engine_for("CPU_AND_NE", portable=portable)


@pytest.mark.parametrize(("name", "kind"), [("a.mlpackage", "package"), ("a.mlmodelc", "compiled")])
def test_apples_framework_is_asked(framework, name, kind):
    backend = Engine("CPU_AND_NE", apple=True).open(Path(name), MODEL)
    assert framework.made == [(kind, name, ComputeUnit.CPU_AND_NE)]
    assert backend.interface == INTERFACE
    inputs = {"x": np.ones(2, np.float16)}
    outputs = backend.predict(inputs)
    np.testing.assert_array_equal(outputs["y"], [2, 2])
    assert inputs["x"].dtype == np.float16  # ours were left alone


def test_apples_errors_become_sentences(framework):
    with pytest.raises(
        CheckpointError, match=r"cannot load broken.mlmodelc on ALL \(Failed to load\); try .* CPU_ONLY"
    ):
        Engine("ALL", apple=True).open(Path("x/broken.mlmodelc"), MODEL)
    backend = Engine("CPU_ONLY", apple=True).open(Path("a.mlpackage"), MODEL)
    framework.Loaded.fails = ValueError()
    with pytest.raises(CheckpointError, match=r"cannot run a.mlpackage on CPU_ONLY \(ValueError\); .* CPU_AND_GPU"):
        backend.predict({"x": np.ones(2, np.float16)})


def test_without_coremltools_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "coremltools", None)
    with pytest.raises(MissingExtra, match=r"pip install 'sfumato\[coreml\]'"):
        Engine("ALL", apple=True).open(Path("a.mlpackage"), MODEL)


def test_a_chain_hands_features_on_by_name_and_opens_its_models_when_asked():
    first = Stub(
        [feature("a", (1,)), feature("b", (1,))],
        [feature("h", (1,)), feature("k", (1,))],
        lambda a, b: {"h": a + b, "k": a * b},
    )
    second = Stub([feature("h", (1,)), feature("b", (1,))], [feature("m", (1,))], lambda h, b: {"m": h * b})
    third = Stub(
        [feature("k", (1,)), feature("m", (1,)), feature("c", (1,))],
        [feature("y", (1,))],
        lambda k, m, c: {"y": k + m + c},
    )
    opened: list[int] = []
    stubs = (first, second, third)
    chain = Chain([Link(stub.interface, lambda i=i: opened.append(i) or stubs[i]) for i, stub in enumerate(stubs)])
    assert [one.name for one in chain.interface.inputs] == ["a", "b", "c"]
    assert [one.name for one in chain.interface.outputs] == ["y"]
    assert opened == []
    inputs = {name: np.array([value], np.float32) for name, value in (("a", 2), ("b", 3), ("c", 5))}
    assert chain.predict(inputs) == {"y": np.array([2 * 3 + (2 + 3) * 3 + 5])}
    chain.predict(inputs)
    assert opened == [0, 1, 2]
    chain.release()
    chain.load()
    assert opened == [0, 1, 2] * 2


def test_a_replay_without_the_recipes_unit_is_on_the_cpu_and_says_so(monkeypatch, caplog):
    asked = {}
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(coreml_generate, "load_models", lambda terminal, folder, **options: asked.update(options))
    told = {"engine": "core ml", "kind": "packages", "compute_unit": "CPU_AND_NE"}
    coreml_generate.replay_models(None, "models", told)
    assert asked == {"portable": False, "kind": "packages", "compute_unit": "CPU_ONLY", "local_files_only": True}
    assert "the Neural Engine can only be used through Core ML" in caplog.text
