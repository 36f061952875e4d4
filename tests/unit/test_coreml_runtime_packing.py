"""Weights that are kept are ordered once for oneDNN: the same numbers as without, in every kind of convolution."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from sfumato.coreml.program import TensorType, Value, constant
from sfumato.coreml.runtime import Predictor, predictor
from support.coreml_programs import model, operation

# Input, weight, strides, padding before and after each side.
CASES = {
    "3 × 3": ((2, 16, 9, 7), (64, 16, 3, 3), (1, 1), (1, 1, 1, 1)),
    "3 × 3, every second": ((2, 16, 9, 7), (64, 16, 3, 3), (2, 2), (1, 1, 1, 1)),
    "more rows than columns": ((2, 16, 9, 7), (64, 16, 3, 3), (1, 1), (2, 2, 0, 0)),
    "1 × 1 of an image": ((2, 128, 9, 7), (64, 128, 1, 1), (1, 1), (0, 0, 0, 0)),
    "1 × 1 of a transformer": ((2, 128, 1, 33), (64, 128, 1, 1), (1, 1), (0, 0, 0, 0)),
    "padded on one side only": ((2, 16, 9, 7), (64, 16, 3, 3), (2, 2), (0, 1, 0, 1)),
}


@pytest.mark.parametrize("precision", ["float32", "typed"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_kept_weights_compute_the_same(case, bias, precision, monkeypatch):
    shape, sides, strides, pad = CASES[case]
    rng = np.random.default_rng(0)
    weight = (rng.standard_normal(sides) / np.prod(sides[1:]) ** 0.5).astype(np.float16)
    added = rng.standard_normal(sides[0]).astype(np.float16)
    x = rng.standard_normal(shape).astype(np.float16)
    above, below, left, right = pad
    around = F.pad(torch.from_numpy(x).double(), (left, right, above, below))
    wide = torch.from_numpy(added).double() if bias else None
    expected = F.conv2d(around, torch.from_numpy(weight).double(), wide, strides)
    given = {"x": ("x",), "weight": weight, "strides": list(strides), "pad_type": "custom", "pad": list(pad)}
    out = TensorType("fp32", tuple(expected.shape))
    made = model(
        {"x": TensorType("fp16", shape)},
        {"y": out},
        operation("conv", {"y": out}, **given, dilations=[1, 1], groups=1, **({"bias": added} if bias else {})),
    )
    kept = Predictor(made, precision=precision).predict({"x": x})["y"]
    monkeypatch.setattr(predictor, "_free_memory", lambda: 0)
    widened = Predictor(made, precision=precision).predict({"x": x})["y"]
    np.testing.assert_allclose(kept, expected.numpy(), rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(widened, expected.numpy(), rtol=1e-5, atol=2e-5)


def test_a_weight_that_two_operations_read_differently():
    """Once as a filter, once as plain numbers: each gets what it needs."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((64, 16, 3, 3)).astype(np.float32)
    x = rng.standard_normal((1, 16, 8, 8)).astype(np.float32)
    types = {"y": TensorType("fp32", (1, 64, 8, 8)), "z": TensorType("fp32", weight.shape)}
    kind = {"strides": [1, 1], "pad_type": "custom", "pad": [1, 1, 1, 1], "dilations": [1, 1], "groups": 1}
    made = model(
        {"x": TensorType("fp32", x.shape), "s": TensorType("fp32", (1,))},
        types,
        constant("w", Value(TensorType("fp32", weight.shape), weight)),
        operation("conv", {"y": types["y"]}, x=("x",), weight=("w",), **kind),
        operation("mul", {"z": types["z"]}, x=("w",), y=("s",)),
    )
    out = Predictor(made).predict({"x": x, "s": np.array([2.0], np.float32)})
    np.testing.assert_array_equal(out["z"], 2 * weight)
    expected = F.conv2d(torch.from_numpy(x), torch.from_numpy(weight), padding=1)
    np.testing.assert_allclose(out["y"], expected.numpy(), rtol=1e-4, atol=1e-4)
