"""Mapped weights give their memory back once they were copied, and can be read again."""

from __future__ import annotations

import numpy as np
import psutil
import pytest

from sfumato.coreml.formats import read_model, write_package
from sfumato.coreml.program import TensorType, Value, constant
from sfumato.coreml.runtime import Predictor
from sfumato.coreml.runtime.constants import Constant
from support.coreml_programs import model, operation

SIZE = 16 * 2**20


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A package whose one weight takes 32 MiB."""
    type_ = TensorType("fp16", (SIZE,))
    numbers = (np.arange(SIZE) % 1000).astype(np.float16)
    out = {"y": TensorType("fp32", (SIZE,))}
    made = model(
        {"x": TensorType("fp32", (1,))},
        out,
        constant("w", Value(type_, numbers)),
        operation("mul", out, x=("w",), y=("x",)),
    )
    path = tmp_path_factory.mktemp("mapped") / "one.mlpackage"
    write_package(made, path)
    return path, numbers


def weight_of(path):
    operations = read_model(path).program.functions["main"].operations
    return operations[0].attributes["val"]


def file_bytes() -> int:
    return psutil.Process().memory_info().shared


@pytest.mark.skipif(
    not hasattr(psutil.Process().memory_info(), "shared"), reason="this system does not count mapped files"
)
def test_memory_is_given_back(package):
    path, numbers = package
    value = weight_of(path)
    before = file_bytes()
    np.testing.assert_array_equal(value.read(), numbers)
    assert file_bytes() - before > 24 * 2**20
    value.data.let_go()
    assert file_bytes() - before < 2**20


def test_views_may_be_read_on(package):
    path, numbers = package
    value = weight_of(path)
    view = value.read()
    value.data.let_go()
    np.testing.assert_array_equal(view, numbers)
    value.data.let_go()
    np.testing.assert_array_equal(value.read(), numbers)


def test_only_what_was_copied_is_let_go():
    gone = []
    whole = Constant(TensorType("fp32", (3,)), lambda: numbers, lambda: gone.append("fp32"))
    half = Constant(TensorType("fp16", (3,)), lambda: numbers.astype(np.float16), lambda: gone.append("fp16"))
    numbers = np.ones(3, np.float32)
    assert whole.tensor().tolist() == half.tensor().tolist() == [1.0, 1.0, 1.0]
    assert gone == ["fp16"]


def test_a_run_after_a_run(package):
    path, numbers = package
    predictor = Predictor(read_model(path), precision="float32")
    for factor in (2.0, 3.0):
        out = predictor.predict({"x": np.array([factor], np.float32)})["y"]
        np.testing.assert_array_equal(out, numbers.astype(np.float32) * factor)
