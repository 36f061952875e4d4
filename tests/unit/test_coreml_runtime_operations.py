"""Every operation of the portable runtime against numpy or torch, on several shapes."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from sfumato.coreml.program import TensorType
from sfumato.coreml.runtime.operations import OPERATIONS
from sfumato.errors import CheckpointError
from support.coreml_programs import answer, answers, type_of, value

RNG = np.random.default_rng(0)


def numbers(*shape: int, low: float = -2, high: float = 2) -> np.ndarray:
    return RNG.uniform(low, high, shape).astype(np.float32)


def by_torch(function: Callable[..., torch.Tensor], *arrays: np.ndarray) -> np.ndarray:
    return function(*(torch.from_numpy(np.array(array)) for array in arrays)).numpy()


def check(kind: str, tensors: dict, expected: np.ndarray, /, atol: float = 2e-6, **parameters) -> None:
    found = answer(kind, tensors, expected, **parameters)
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=atol)


UNARY = {
    "abs": np.abs,
    "atan": np.arctan,
    "ceil": np.ceil,
    "cos": np.cos,
    "cosh": np.cosh,
    "exp": np.exp,
    "exp2": np.exp2,
    "floor": np.floor,
    "identity": lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "relu6": lambda x: np.clip(x, 0, 6),
    "round": np.round,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "sign": np.sign,
    "silu": lambda x: x / (1 + np.exp(-x)),
    "sin": np.sin,
    "sinh": np.sinh,
    "softplus": lambda x: np.log1p(np.exp(-np.abs(x))) + np.maximum(x, 0),
    "softsign": lambda x: x / (1 + np.abs(x)),
    "square": np.square,
    "tan": np.tan,
    "tanh": np.tanh,
}


@pytest.mark.parametrize("kind", UNARY)
@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4)])
def test_unary(kind, shape):
    # 40 is where a softplus with torch's own threshold would be another.
    x = np.array(40.0, np.float32) if shape == () and kind == "softplus" else numbers(*shape, low=-1.4, high=7)
    x = x if kind != "tan" else x / np.float32(8)
    check(kind, {"x": x}, np.asarray(UNARY[kind](x), np.float32), atol=1e-5)


POSITIVE = {
    "acos": np.arccos,
    "asin": np.arcsin,
    "atanh": np.arctanh,
    "sqrt": np.sqrt,
    "erf": lambda x: by_torch(torch.erf, x),
}


@pytest.mark.parametrize("kind", POSITIVE)
def test_unary_within_zero_and_one(kind):
    x = numbers(2, 5, low=0.01, high=0.9)
    check(kind, {"x": x}, POSITIVE[kind](x))


def test_rounding_is_to_even():
    check("round", {"x": np.float32([-2.5, -0.5, 0.5, 1.5, 2.5])}, np.float32([-2, -0, 0, 2, 2]))


@pytest.mark.parametrize("epsilon", [None, 0.5])
def test_unary_with_epsilon(epsilon):
    x = numbers(4, 3, low=0.1, high=3)
    given_one = {} if epsilon is None else {"epsilon": epsilon}
    shift = (
        {"log": 0, "rsqrt": 1e-12, "inverse": 1e-4}
        if epsilon is None
        else dict.fromkeys(("log", "rsqrt", "inverse"), 0.5)
    )
    check("log", {"x": x}, np.log(x + np.float32(shift["log"])), **given_one)
    check("rsqrt", {"x": x}, 1 / np.sqrt(x + np.float32(shift["rsqrt"])), **given_one)
    check("inverse", {"x": x}, 1 / (x + np.float32(shift["inverse"])), **given_one)


PARAMETERS = {
    "clamped_relu": (lambda x, a, b: np.minimum(np.where(x >= 0, x, a * x), b), ("alpha", "beta")),
    "elu": (lambda x, a: np.where(x > 0, x, a * np.expm1(x)), ("alpha",)),
    "leaky_relu": (lambda x, a: np.where(x >= 0, x, a * x), ("alpha",)),
    "linear_activation": (lambda x, a, b: a * x + b, ("alpha", "beta")),
    "scaled_tanh": (lambda x, a, b: a * np.tanh(b * x), ("alpha", "beta")),
    "sigmoid_hard": (lambda x, a, b: np.clip(a * x + b, 0, 1), ("alpha", "beta")),
    "threshold": (lambda x, a: np.maximum(x, a), ("alpha",)),
    "thresholded_relu": (lambda x, a: np.where(x >= a, x, 0), ("alpha",)),
    "clip": (lambda x, a, b: np.clip(x, a, b), ("alpha", "beta")),
}


@pytest.mark.parametrize("kind", PARAMETERS)
def test_activations_with_parameters(kind):
    function, names = PARAMETERS[kind]
    given_ones = dict(zip(names, (0.25, 0.75), strict=False))
    x = numbers(3, 4)
    check(kind, {"x": x}, function(x, *(np.float32(each) for each in given_ones.values())), **given_ones)


def test_the_changelog_counts_them_rightly():
    text = (Path(__file__).parents[2] / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f" {len(OPERATIONS)} operations," in text


ARITHMETIC = ("add", "floor_div", "maximum", "minimum", "mod", "mul", "real_div", "sub")
REDUCTIONS = tuple(kind for kind in OPERATIONS if kind.startswith("reduce_") and "arg" not in kind)


@pytest.mark.parametrize(
    "kind", [*UNARY, *POSITIVE, *PARAMETERS, "log", "rsqrt", "inverse", "round", "gelu", "prelu", "softplus_parametric"]
)
def test_what_is_not_a_number_is_not_made_one(kind):
    """A NaN that came out as a number would hide a fault from whoever looks at the end."""
    x = np.float32([[[np.nan, 0.5], [0.5, 0.5]]])
    vectors = {"prelu": ("alpha",), "softplus_parametric": ("alpha", "beta")}.get(kind, ())
    given_ones = {name: np.float32([0.25, 0.75]) for name in vectors}
    given_ones |= dict(zip(PARAMETERS[kind][1] if kind in PARAMETERS else (), (0.25, 0.75), strict=False))
    found = answer(kind, {"x": x}, x, **given_ones)
    assert np.array_equal(np.isnan(found), np.isnan(x))


@pytest.mark.parametrize("kind", [*ARITHMETIC, *REDUCTIONS])
def test_what_is_not_a_number_spreads(kind):
    x, one = np.float32([[1, np.nan]]), np.float32([[1, 1]])
    if kind in ARITHMETIC:
        for pair in ({"x": x, "y": one}, {"x": one, "y": x}):
            assert np.isnan(answer(kind, pair, x)).tolist() == [[False, True]]
    else:
        assert np.isnan(answer(kind, {"x": x}, one[:, :1], axes=np.int32([1]), keep_dims=True)).all()


@pytest.mark.parametrize("shape", [(2, 3, 4), (1, 3, 2, 2), (2, 3, 2, 1, 2)])
def test_activations_with_a_number_for_each_channel(shape):
    x, alpha, beta = numbers(*shape), numbers(3, low=0.1), numbers(3, low=0.1)
    a, b = (each.reshape(1, 3, *[1] * (len(shape) - 2)) for each in (alpha, beta))
    check("prelu", {"x": x}, np.where(x > 0, x, a * x), alpha=alpha)
    check("softplus_parametric", {"x": x}, a * np.log1p(np.exp(b * x)), alpha=alpha, beta=beta)


@pytest.mark.parametrize(
    ("mode", "function"),
    [
        (None, F.gelu),
        ("EXACT", F.gelu),
        ("TANH_APPROXIMATION", lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))),
        ("SIGMOID_APPROXIMATION", lambda x: x * torch.sigmoid(1.702 * x)),
    ],
)
def test_gelu(mode, function):
    x = numbers(3, 7, low=-4, high=4)
    check("gelu", {"x": x}, by_torch(function, x), **({} if mode is None else {"mode": mode}))


BINARY = {
    "add": np.add,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "mod": np.mod,
    "mul": np.multiply,
    "real_div": np.divide,
    "floor_div": np.floor_divide,
    "sub": np.subtract,
}
COMPARISONS = {
    "equal": np.equal,
    "greater": np.greater,
    "greater_equal": np.greater_equal,
    "less": np.less,
    "less_equal": np.less_equal,
    "not_equal": np.not_equal,
}
LOGIC = {"logical_and": np.logical_and, "logical_or": np.logical_or, "logical_xor": np.logical_xor}


@settings(max_examples=15, deadline=None)
@given(kind=st.sampled_from([*BINARY]), sides=st.lists(st.integers(1, 4), max_size=4), data=st.data())
def test_binary_with_broadcasting(kind, sides, data):
    other = [data.draw(st.sampled_from([side, 1])) for side in sides][data.draw(st.integers(0, len(sides))) :]
    x, y = numbers(*sides), numbers(*other, low=0.5, high=3)
    expected = BINARY[kind](x, y)
    check(kind, {"x": x, "y": y}, np.asarray(expected))
    check(kind, {"x": x}, np.asarray(expected), y=y)


def test_every_binary_operation():
    x, y = numbers(3, 4), numbers(1, 4, low=0.5, high=3)
    for kind, function in BINARY.items():
        check(kind, {"x": x, "y": y}, function(x, y))
    check("pow", {"x": np.abs(x), "y": y}, np.power(np.abs(x), y))
    whole, other = np.int32([[-3, 0, 3, 5]]), np.int32([[2, 2, 3, 4]])
    for kind in ("add", "sub", "mul", "maximum", "minimum", "floor_div", "mod"):
        check(kind, {"x": whole, "y": other}, BINARY[kind](whole, other))
    for kind, function in COMPARISONS.items():
        check(kind, {"x": whole, "y": other}, function(whole, other))
    for kind, function in LOGIC.items():
        check(kind, {"x": whole > 0, "y": other > 2}, function(whole > 0, other > 2))
    check("logical_not", {"x": whole > 0}, whole <= 0)
    check("select", {"cond": x > 0, "a": x, "b": y}, np.where(x > 0, x, y))


CASTS = [
    (np.float32, "int32", np.int32),
    (np.float32, "bool", np.bool_),
    (np.int32, "fp32", np.float32),
    (np.int32, "int8", np.int8),
    (np.int32, "uint8", np.uint8),
    (np.bool_, "fp32", np.float32),
    (np.bool_, "int32", np.int32),
    (np.float32, "float32", np.float32),
]


@pytest.mark.parametrize(("source", "word", "target"), CASTS)
def test_cast(source, word, target):
    x = np.array([0, 1, 2.75, 3.5, 100]).astype(source)
    check("cast", {"x": x}, x.astype(target), dtype=word)


def test_cast_to_half_rounds_and_overflows():
    x = np.float32([1 / 3, 1e-8, 65519, 65520, -1e6])
    (found,) = answers("cast", {"x": x}, [TensorType("fp16", x.shape)], dtype="fp16")
    with np.errstate(over="ignore"):
        assert np.array_equal(found, x.astype(np.float16).astype(np.float32))
    (ignored,) = answers("cast", {"x": x}, [TensorType("fp16", x.shape)], precision="float32", dtype="fp16")
    assert np.array_equal(ignored, x)


def test_results_of_type_fp16_are_rounded_and_others_are_not():
    x = numbers(50)
    (half,) = answers("exp", {"x": x}, [TensorType("fp16", x.shape)])
    (single,) = answers("exp", {"x": x}, [TensorType("fp32", x.shape)])
    assert np.array_equal(half, half.astype(np.float16).astype(np.float32))
    assert not np.array_equal(single, half)
    assert np.allclose(single, half, rtol=1e-3)


REDUCTIONS = {
    "reduce_l1_norm": lambda x, **more: np.abs(x).sum(**more),
    "reduce_l2_norm": lambda x, **more: np.sqrt(np.square(x).sum(**more)),
    "reduce_log_sum": lambda x, **more: np.log(x.sum(**more)),
    "reduce_log_sum_exp": lambda x, **more: np.log(np.exp(x).sum(**more)),
    "reduce_max": np.max,
    "reduce_mean": np.mean,
    "reduce_min": np.min,
    "reduce_prod": np.prod,
    "reduce_sum": np.sum,
    "reduce_sum_square": lambda x, **more: np.square(x).sum(**more),
}


@pytest.mark.parametrize("kind", REDUCTIONS)
@settings(max_examples=12, deadline=None)
@given(sides=st.lists(st.integers(1, 4), min_size=1, max_size=4), keep=st.booleans(), data=st.data())
def test_reductions(kind, sides, keep, data):
    axes = data.draw(st.lists(st.integers(0, len(sides) - 1), min_size=1, unique=True))
    signed = [axis - data.draw(st.sampled_from([0, len(sides)])) for axis in axes]
    x = numbers(*sides, low=0.1)
    expected = np.asarray(REDUCTIONS[kind](x, axis=tuple(axes), keepdims=keep))
    check(kind, {"x": x}, expected, atol=1e-5, axes=np.int32(signed), keep_dims=keep)
    whole = np.asarray(REDUCTIONS[kind](x, axis=tuple(range(len(sides))), keepdims=keep))
    check(kind, {"x": x}, whole, atol=1e-5, keep_dims=keep)


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("keep", [False, True])
def test_places_of_extremes(axis, keep):
    x = numbers(3, 4)
    check("reduce_argmax", {"x": x}, np.argmax(x, axis, keepdims=keep).astype(np.int32), axis=axis, keep_dims=keep)
    check("reduce_argmin", {"x": x}, np.argmin(x, axis, keepdims=keep).astype(np.int32), axis=axis, keep_dims=keep)


@pytest.mark.parametrize("ascending", [False, True])
@pytest.mark.parametrize("axis", [0, -1])
def test_order(axis, ascending):
    x = numbers(4, 5)
    order = np.argsort(x if ascending else -x, axis).astype(np.int32)
    check("argsort", {"x": x}, order, axis=axis, ascending=ascending)
    places = np.take(order, range(3), axis)
    types = [type_of(np.take(x, range(3), axis)), type_of(places)]
    values, found = answers("topk", {"x": x}, types, k=3, axis=axis, ascending=ascending)
    assert np.array_equal(values, np.take_along_axis(x, places, axis))
    assert np.array_equal(found, places)
    (alone,) = answers("topk", {"x": x}, types[:1], k=3, axis=axis, ascending=ascending, return_indices=False)
    assert np.array_equal(alone, values)


@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_running_sums(exclusive, reverse):
    x = np.int32([[1, 2, 3], [4, 5, 6]])
    ordered = x[:, ::-1] if reverse else x
    sums = np.cumsum(ordered, 1) - (ordered if exclusive else 0)
    expected = (sums[:, ::-1] if reverse else sums).astype(np.int32)
    check("cumsum", {"x": x}, expected, axis=1, exclusive=exclusive, reverse=reverse)
    check(
        "cumsum",
        {"x": x.astype(np.float32)},
        expected.astype(np.float32),
        axis=-1,
        exclusive=exclusive,
        reverse=reverse,
    )


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -3])
def test_softmax(axis):
    x = numbers(2, 3, 4)
    shifted = np.exp(x - x.max(axis, keepdims=True))
    check("softmax", {"x": x}, shifted / shifted.sum(axis, keepdims=True), axis=axis)


def test_products():
    x, weight, bias = numbers(2, 5, 3), numbers(4, 3), numbers(4)
    check("linear", {"x": x}, x @ weight.T, weight=weight)
    check("linear", {"x": x}, x @ weight.T + bias, weight=weight, bias=bias)
    y = numbers(1, 3, 6)
    check("matmul", {"x": x, "y": y}, x @ y, transpose_x=False, transpose_y=False)
    check("matmul", {"x": x.swapaxes(1, 2), "y": y}, x @ y, transpose_x=True)
    check("matmul", {"x": x, "y": y.swapaxes(1, 2)}, x @ y, transpose_y=True)
    check("matmul", {"x": x.swapaxes(1, 2), "y": y.swapaxes(1, 2)}, x @ y, transpose_x=True, transpose_y=True)
    row = numbers(3)
    check("matmul", {"x": row, "y": y}, row @ y)
    a, b = numbers(2, 3, 4, 5), numbers(2, 5, 4, 6)
    check("einsum", {"values": [a, b]}, np.einsum("nchw,nwhu->nchu", a, b), equation="nchw,nwhu->nchu")
    check("einsum", {"values": [a[:1], b]}, np.einsum("nchw,nwhu->nchu", a[[0, 0]], b), equation="nchw,nwhu->nchu")


@pytest.mark.parametrize("mask", [None, "bool", "float"])
def test_scaled_dot_product_attention(mask):
    q, k, v = numbers(2, 3, 5, 4), numbers(2, 3, 6, 4), numbers(2, 3, 6, 7)
    scores = q @ k.swapaxes(-1, -2) / 2
    tensors = {"query": q, "key": k, "value": v}
    if mask == "bool":
        tensors["attn_mask"] = np.arange(6)[None] <= np.arange(5)[:, None]
        scores = np.where(tensors["attn_mask"], scores, -np.inf)
    elif mask == "float":
        tensors["attn_mask"] = numbers(5, 6)
        scores = scores + tensors["attn_mask"]
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    check("scaled_dot_product_attention", tensors, weights / weights.sum(-1, keepdims=True) @ v)


CONVOLUTIONS = [
    {"shape": (2, 4, 9), "weight": (6, 4, 3)},
    {"shape": (2, 4, 9, 8), "weight": (6, 4, 3, 3)},
    {"shape": (1, 4, 5, 6, 7), "weight": (2, 4, 3, 2, 1)},
    {"shape": (2, 4, 9, 8), "weight": (6, 2, 3, 3), "groups": 2},
    {"shape": (2, 4, 9, 8), "weight": (8, 1, 3, 3), "groups": 4, "strides": [2, 1]},
    {"shape": (2, 4, 9, 8), "weight": (6, 4, 3, 2), "dilations": [2, 3]},
    {"shape": (1, 4, 1, 8), "weight": (6, 4, 1, 1)},
    {"shape": (1, 4, 6, 8), "weight": (6, 4, 1, 1), "strides": [2, 2]},
]


@pytest.mark.parametrize("case", CONVOLUTIONS)
@pytest.mark.parametrize("pad_type", ["valid", "custom", "uneven", "same", "same_lower"])
@pytest.mark.parametrize("biased", [False, True])
def test_conv(case, pad_type, biased):
    x, weight = numbers(*case["shape"]), numbers(*case["weight"])
    spatial = x.ndim - 2
    strides, dilations = case.get("strides", [1] * spatial), case.get("dilations", [1] * spatial)
    more = {"bias": numbers(weight.shape[0])} if biased else {}
    pairs = [(0, 0)] * spatial
    if pad_type == "custom":
        pairs = [(1, 1)] * spatial
    elif pad_type == "uneven":
        pairs = [(1, 2), (0, 1), (2, 0)][:spatial]
    elif pad_type.startswith("same"):
        pairs = []
        for side, size, stride, dilation in zip(x.shape[2:], weight.shape[2:], strides, dilations, strict=True):
            whole = max((-(-side // stride) - 1) * stride + (size - 1) * dilation + 1 - side, 0)
            pairs.append((whole // 2, whole - whole // 2)[:: -1 if pad_type == "same_lower" else 1])
    padded = np.pad(x, [(0, 0), (0, 0), *pairs])
    convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[spatial]
    expected = by_torch(
        lambda x, w, b=None: convolve(x, w, b, strides, 0, dilations, case.get("groups", 1)),
        padded,
        weight,
        *more.values(),
    )
    if pad_type.startswith("same"):
        assert expected.shape[2:] == tuple(
            -(-side // stride) for side, stride in zip(x.shape[2:], strides, strict=True)
        )
    elif pad_type in ("custom", "uneven"):
        more["pad"] = np.int32(pairs).ravel()
    if "strides" in case:
        more["strides"] = np.int32(strides)
    if "dilations" in case:
        more["dilations"] = np.int32(dilations)
    if "groups" in case:
        more["groups"] = case["groups"]
    kind = "custom" if pad_type == "uneven" else pad_type
    check("conv", {"x": x, "weight": weight}, expected, atol=1e-5, pad_type=kind, **more)
    check("conv", {"x": x}, expected, atol=1e-5, weight=weight, pad_type=kind, **more)


@pytest.mark.parametrize("spatial", [1, 2])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("biased", [False, True])
def test_conv_transpose(spatial, groups, biased):
    x, weight = numbers(2, 4, *(5, 6)[:spatial]), numbers(4, 3, *(4, 3)[:spatial])
    strides, dilations = (2, 3)[:spatial], (1, 2)[:spatial]
    bias = [numbers(3 * groups)] if biased else []
    convolve = F.conv_transpose1d if spatial == 1 else F.conv_transpose2d

    def reference(padding: tuple[int, ...]) -> np.ndarray:
        return by_torch(
            lambda x, w, b=None: convolve(x, w, b, strides, padding, 0, groups, dilations), x, weight, *bias
        )

    more = {"strides": np.int32(strides), "dilations": np.int32(dilations), "groups": groups, "weight": weight}
    more |= {"bias": bias[0]} if biased else {}
    check("conv_transpose", {"x": x}, reference((0,) * spatial), atol=1e-5, **more)
    pad = np.int32([1] * 2 * spatial)
    check("conv_transpose", {"x": x}, reference((1,) * spatial), atol=1e-5, pad_type="custom", pad=pad, **more)
    whole = reference((0,) * spatial)
    wanted = [side * stride for side, stride in zip(x.shape[2:], strides, strict=True)]
    cut = whole
    for axis, side in enumerate(wanted, 2):
        before = max(whole.shape[axis] - side, 0) // 2
        cut = cut.take(range(before, before + side), axis)
    check("conv_transpose", {"x": x}, cut, atol=1e-5, pad_type="same", **more)
    shape = np.int32([2, 3 * groups, *(side - 1 for side in whole.shape[2:])])
    shorter = whole[(slice(None), slice(None), *(slice(0, -1) for _ in range(spatial)))]
    check("conv_transpose", {"x": x}, shorter, atol=1e-5, output_shape=shape, **more)


def test_conv_transpose_with_an_output_shape_beyond_its_reach():
    x, weight = numbers(1, 2, 5), numbers(2, 3, 3)
    expected = by_torch(lambda x, w: F.conv_transpose1d(x, w, None, 2, 1, 1), x, weight)
    parameters = {"strides": np.int32([2]), "pad_type": "custom", "pad": np.int32([1, 0])}
    check("conv_transpose", {"x": x}, expected, weight=weight, output_shape=np.int32([1, 3, 10]), **parameters)


def test_normalizations():
    x, mean, variance, gamma, beta = numbers(2, 3, 4, 5), numbers(3), numbers(3, low=0.5), numbers(3), numbers(3)
    column = (1, 3, 1, 1)
    normal = (x - mean.reshape(column)) / np.sqrt(variance.reshape(column) + 1e-3)
    check("batch_norm", {"x": x}, normal.astype(np.float32), mean=mean, variance=variance, epsilon=1e-3)
    affine = (normal * gamma.reshape(column) + beta.reshape(column)).astype(np.float32)
    check("batch_norm", {"x": x}, affine, mean=mean, variance=variance, gamma=gamma, beta=beta, epsilon=1e-3)
    check("instance_norm", {"x": x}, by_torch(lambda x: F.instance_norm(x, eps=1e-2), x), epsilon=1e-2)
    expected = by_torch(lambda x, g, b: F.instance_norm(x, weight=g, bias=b), x, gamma, beta)
    check("instance_norm", {"x": x}, expected, gamma=gamma, beta=beta)
    lengths = np.sqrt(np.square(x).sum((1, 2, 3), keepdims=True) + 1e-6)
    check("l2_norm", {"x": x}, (x / lengths).astype(np.float32))
    expected = by_torch(lambda x: F.local_response_norm(x, 3, 0.5, 0.6, 2.0), x)
    check("local_response_norm", {"x": x}, expected, size=3, alpha=0.5, beta=0.6, k=2.0)


@settings(max_examples=25, deadline=None)
@given(sides=st.lists(st.integers(1, 5), min_size=1, max_size=4), affine=st.booleans(), data=st.data())
def test_layer_norm(sides, affine, data):
    axes = sorted(data.draw(st.lists(st.integers(0, len(sides) - 1), min_size=1, unique=True)))
    x = numbers(*sides)
    inner = [side if axis in axes else 1 for axis, side in enumerate(sides)]
    expected = (x - x.mean(tuple(axes), keepdims=True)) / np.sqrt(x.var(tuple(axes), keepdims=True) + np.float32(1e-2))
    more = {}
    if affine:
        more = {"gamma": numbers(*(sides[axis] for axis in axes)), "beta": numbers(*(sides[axis] for axis in axes))}
        expected = expected * more["gamma"].reshape(inner) + more["beta"].reshape(inner)
    signed = np.int32([axis - data.draw(st.sampled_from([0, len(sides)])) for axis in axes])
    check("layer_norm", {"x": x}, expected.astype(np.float32), atol=1e-5, axes=signed, epsilon=1e-2, **more)


def test_reshapes():
    x = numbers(2, 3, 4)
    check("reshape", {"x": x}, x.reshape(6, 4), shape=np.int32([6, -1]))
    check("reshape", {"x": x}, x.reshape(2, 12), shape=np.int32([2, 12]))
    check("reshape", {"x": x}, x, shape=np.int32([0, -1, 0]))
    check("reshape", {"x": x[0]}, x[0].reshape(1, 1, 3, 4), shape=np.int32([1, 0, -1, 0]))
    check("reshape", {"x": x}, x.reshape(6, 4), shape=np.int32([-1, 0]))
    check(
        "reshape_like",
        {"x": x, "ref_tensors": [numbers(6, 1), numbers(9, 2, 2)]},
        x.reshape(6, 2, 2),
        begins=(value(0), value(1)),
        ends=(value(1), value(0)),
        end_masks=(value(False), value(True)),
    )
    check("squeeze", {"x": x[:, :1]}, x[:, 0], axes=np.int32([1]))
    check("squeeze", {"x": x[:1, :1]}, x[0, 0])
    check("squeeze", {"x": x[:1]}, x[0], axes=np.int32([0, 1]))
    check("expand_dims", {"x": x}, x[:, None, ..., None], axes=np.int32([1, -1]))
    check("expand_dims", {"x": x}, x[None, None], axes=np.int32([1, 0]))
    check("flatten2d", {"x": x}, x.reshape(6, 4), axis=2)
    check("flatten2d", {"x": x}, x.reshape(2, 12), axis=-2)
    check("sliding_windows", {"x": x}, np.stack([x[:, :, :2], x[:, :, 1:3], x[:, :, 2:]], 2), axis=-1, size=2)
    check("sliding_windows", {"x": x}, np.stack([x[:, 0:1], x[:, 2:3]], 1), axis=1, size=1, stride=2)


@settings(max_examples=25, deadline=None)
@given(sides=st.lists(st.integers(1, 4), min_size=1, max_size=5), data=st.data())
def test_orders_and_repeats(sides, data):
    x = numbers(*sides)
    order = data.draw(st.permutations(range(len(sides))))
    signed = np.int32([axis - data.draw(st.sampled_from([0, len(sides)])) for axis in order])
    check("transpose", {"x": x}, x.transpose(order), perm=signed)
    axes = data.draw(st.lists(st.integers(0, len(sides) - 1), min_size=1, unique=True))
    check("reverse", {"x": x}, np.flip(x, axes), axes=np.int32(axes))
    check("reverse", {"x": x}, np.flip(x))
    repeats = data.draw(st.lists(st.integers(1, 3), min_size=len(sides), max_size=len(sides)))
    check("tile", {"x": x}, np.tile(x, repeats), reps=np.int32(repeats))


@settings(max_examples=60, deadline=None)
@given(sides=st.lists(st.integers(1, 6), min_size=1, max_size=4), data=st.data())
def test_slice_by_index(sides, data):
    x = numbers(*sides)
    begin, end, steps, from_start, to_end, squeezed, index = [], [], [], [], [], [], []
    for side in sides:
        begin.append(data.draw(st.integers(-side, side - 1)))
        end.append(data.draw(st.integers(-side, side + 1)))
        steps.append(data.draw(st.sampled_from([1, 1, 2, 3, -1, -2])))
        from_start.append(data.draw(st.booleans()))
        to_end.append(data.draw(st.booleans()))
        squeezed.append(data.draw(st.sampled_from([False, False, True])))
        first = None if from_start[-1] else begin[-1]
        part = slice(first, None if to_end[-1] else end[-1], steps[-1])
        index.append((first or 0) if squeezed[-1] else part)
    expected = x[tuple(index)]
    masks = {"begin_mask": from_start, "end_mask": to_end, "squeeze_mask": squeezed}
    more = {name: np.array(mask) for name, mask in masks.items()}
    check(
        "slice_by_index",
        {"x": x},
        np.asarray(expected),
        begin=np.int32(begin),
        end=np.int32(end),
        stride=np.int32(steps),
        **more,
    )


def test_parts_and_joins():
    x = numbers(3, 4, 5)
    check("slice_by_size", {"x": x}, x[1:3, 2:, 4:5], begin=np.int32([1, -2, 4]), size=np.int32([2, -1, 1]))
    y = numbers(3, 2, 5)
    check("concat", {"values": [x, y, x]}, np.concatenate([x, y, x], 1), axis=1)
    check("concat", {"values": [x, x]}, np.stack([x, x], 2).reshape(3, 8, 5), axis=-2, interleave=True)
    check("stack", {"values": [x, x, x]}, np.stack([x, x, x], -1), axis=-1)
    for parameters, bounds in (({"num_splits": 2}, [2]), ({"split_sizes": np.int32([1, 3])}, [1])):
        parts = np.split(x, bounds, 1)
        found = answers("split", {"x": x}, [type_of(part) for part in parts], axis=1, **parameters)
        assert all(np.array_equal(one, other) for one, other in zip(found, parts, strict=True))
    updated = x.copy()
    updated[0:2, ::-2] = y[:2]
    more = {"begin": np.int32([0, 3, 0]), "end": np.int32([2, 0, 5]), "stride": np.int32([1, -2, 1])}
    mask = {"begin_mask": np.array([False, True, True]), "end_mask": np.array([False, True, True])}
    check("slice_update", {"x": x, "update": y[:2]}, updated, **more, **mask)
    updated = x.copy()
    updated[:, 1] = y[:, 0]
    more = {"begin": np.int32([0, 1, 0]), "end": np.int32([3, 2, 5]), "squeeze_mask": np.array([False, True, False])}
    check("slice_update", {"x": x, "update": y[:, 0]}, updated, **more)


@pytest.mark.parametrize("mode", ["constant", "reflect", "replicate"])
@pytest.mark.parametrize("pad", [[1, 2], [0, 1, 2, 0], [2, 1, 0, 0, 1, 1]])
def test_pad(mode, pad):
    x = numbers(3, 4, 3)
    pairs = [(0, 0)] * (3 - len(pad) // 2) + [tuple(pad[i : i + 2]) for i in range(0, len(pad), 2)]
    if mode == "constant":
        check("pad", {"x": x}, np.pad(x, pairs, constant_values=0.5), pad=np.int32(pad), mode=mode, constant_val=0.5)
        check("pad", {"x": x}, np.pad(x, pairs), pad=np.int32(pad))
    else:
        expected = np.pad(x, pairs, "edge" if mode == "replicate" else mode)
        check("pad", {"x": x}, expected, pad=np.int32(pad), mode=mode)


def test_blocks():
    x = numbers(2, 8, 4, 6)
    check("pixel_shuffle", {"x": x}, by_torch(lambda x: F.pixel_shuffle(x, 2), x), upscale_factor=2)
    check("pixel_unshuffle", {"x": x}, by_torch(lambda x: F.pixel_unshuffle(x, 2), x), downscale_factor=np.uint32(2))
    deep = x.reshape(2, 8, 2, 2, 3, 2).transpose(0, 3, 5, 1, 2, 4).reshape(2, 32, 2, 3)
    check("space_to_depth", {"x": x}, deep, block_size=2)
    check("depth_to_space", {"x": deep}, x, block_size=2)
    padded = np.pad(x, [(0, 0), (0, 0), (1, 1), (0, 3)])
    batches = padded.reshape(2, 8, 3, 2, 3, 3).transpose(3, 5, 0, 1, 2, 4).reshape(12, 8, 3, 3)
    block, around = np.int32([2, 3]), np.int32([[1, 1], [0, 3]])
    check("space_to_batch", {"x": x}, batches, block_shape=block, paddings=around)
    check("batch_to_space", {"x": batches}, x, block_shape=block, crops=around)


@settings(max_examples=30, deadline=None)
@given(
    sides=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    places=st.lists(st.integers(1, 3), max_size=2),
    data=st.data(),
)
def test_gather(sides, places, data):
    x = numbers(*sides)
    axis = data.draw(st.integers(-len(sides), len(sides) - 1))
    indices = RNG.integers(-sides[axis], sides[axis], places).astype(np.int32)
    check("gather", {"x": x, "indices": indices}, np.asarray(np.take(x, indices, axis)), axis=axis)
    check("gather", {"x": x}, np.asarray(np.take(x, indices, axis)), indices=np.array(indices), axis=axis)
    along = RNG.integers(-sides[axis], sides[axis], sides).astype(np.int32)
    check("gather_along_axis", {"x": x, "indices": along}, np.take_along_axis(x, along, axis), axis=axis)


def test_gather_of_many_axes_and_batches():
    x = numbers(3, 4, 5, 2)
    indices = np.int32([[0, 1], [2, -1], [1, 3]])
    check("gather_nd", {"x": x, "indices": indices}, x[indices[:, 0], indices[:, 1]])
    check(
        "gather_nd", {"x": x, "indices": indices}, np.stack([x[i][tuple(indices[i])] for i in range(3)]), batch_dims=1
    )
    wanted = np.stack([np.take(x[i], indices[i], 1) for i in range(3)])
    check("gather", {"x": x, "indices": indices}, wanted, axis=2, batch_dims=1)


SCATTERED = {
    "update": lambda old, new: new,
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "max": np.maximum,
    "min": np.minimum,
}


@pytest.mark.parametrize("mode", SCATTERED)
def test_scatter(mode):
    data, join = numbers(3, 4, low=0.5), SCATTERED[mode]
    indices, updates = np.int32([2, 0]), numbers(3, 2, low=0.5)
    expected = data.copy()
    expected[:, indices] = join(data[:, indices], updates)
    check("scatter", {"data": data, "indices": indices, "updates": updates}, expected, axis=1, mode=mode)
    along = np.int32([[0, 2, 1], [3, 1, 0]]).T
    expected = data.copy()
    np.put_along_axis(expected, along, join(np.take_along_axis(data, along, 1), updates), 1)
    check("scatter_along_axis", {"data": data, "indices": along, "updates": updates}, expected, axis=-1, mode=mode)
    points = np.int32([[0, 1], [2, -1]])
    expected = data.copy()
    where = (points[:, 0], points[:, 1])
    expected[where] = join(data[where], updates[0])
    check("scatter_nd", {"data": data, "indices": points, "updates": updates[0]}, expected, mode=mode)


def test_shapes_and_counts():
    x = numbers(2, 3, 4)
    check("shape", {"x": x}, np.int32([2, 3, 4]))
    check("fill_like", {"ref_tensor": x}, np.full((2, 3, 4), 1.5, np.float32), value=1.5)
    check("band_part", {"x": x}, np.tril(x, 1), lower=-1, upper=1)
    check("band_part", {"x": x}, np.triu(x, -1), lower=1, upper=-1)
    check("band_part", {"x": x}, np.triu(np.tril(x)), lower=0, upper=0)
    indices = np.int32([[0, 2], [1, 3]])
    hot = np.where(np.arange(4) == indices[..., None], np.float32(5), np.float32(-1))
    check("one_hot", {"indices": indices}, hot, one_hot_vector_size=4, on_value=5.0, off_value=-1.0)
    check(
        "one_hot",
        {"indices": indices},
        np.moveaxis(hot, -1, 1),
        one_hot_vector_size=4,
        axis=1,
        on_value=5.0,
        off_value=-1.0,
    )
    check("non_zero", {"x": np.int32([[0, 1], [2, 0]])}, np.int32([[0, 1], [1, 0]]))


def test_what_needs_no_input_is_known_before_the_run():
    check("fill", {}, np.full((2, 3), 7.0, np.float32), shape=np.int32([2, 3]), value=7.0)
    check("fill", {}, np.full((2,), 7, np.int32), shape=np.int32([2]), value=7)
    check("range_1d", {}, np.arange(2, 9, 3, dtype=np.int32), start=2, end=9, step=3)
    check("range_1d", {}, np.arange(1, 0, -0.25, dtype=np.float32), start=1.0, end=0.0, step=-0.25)


def test_parameters_that_only_the_running_program_knows():
    x, shape = numbers(2, 6), np.int32([3, 4])
    check("reshape", {"x": x, "shape": shape}, x.reshape(3, 4))
    check("fill", {"shape": shape}, np.full((3, 4), 2.0, np.float32), value=2.0)
    check("slice_by_index", {"x": x, "begin": np.int32([0, 1])}, x[:1, 1:5], end=np.int32([1, 5]))
    check("range_1d", {"end": np.int32(4)}, np.arange(4, dtype=np.int32), start=0, step=1)
    check("tile", {"x": x, "reps": np.int32([1, 2])}, np.tile(x, (1, 2)))


POOLS = [
    {"kernel_sizes": [2, 3]},
    {"kernel_sizes": [3, 3], "strides": [2, 2]},
    {"kernel_sizes": [3, 2], "strides": [2, 1], "pad_type": "same"},
    {"kernel_sizes": [3, 2], "strides": [2, 2], "pad_type": "same_lower"},
    {"kernel_sizes": [3, 3], "pad_type": "custom", "pad": [1, 0, 0, 1]},
    {"kernel_sizes": [3, 3], "strides": [2, 2], "pad_type": "custom", "pad": [1, 1, 1, 1], "ceil_mode": True},
    {"kernel_sizes": [2, 2], "strides": [2, 2], "pad_type": "valid", "ceil_mode": True},
]


@pytest.mark.parametrize("case", POOLS)
@pytest.mark.parametrize("excluded", [False, True])
def test_pooling(case, excluded):
    x = numbers(2, 3, 7, 6)
    kernel, strides = case["kernel_sizes"], case.get("strides", [1, 1])
    windows, counts = _windows(x, case)
    more = {name: np.int32(each) if isinstance(each, list) else each for name, each in case.items()}
    more.setdefault("pad_type", "valid")
    check("max_pool", {"x": x}, np.nanmax(windows, (-2, -1)), **more)
    squares = np.nan_to_num(np.square(windows)).sum((-2, -1))
    check("l2_pool", {"x": x}, np.sqrt(squares), atol=1e-5, **more)
    if not case.get("ceil_mode"):
        counted = counts if excluded else kernel[0] * kernel[1]
        means = (np.nan_to_num(windows).sum((-2, -1)) / counted).astype(np.float32)
        check("avg_pool", {"x": x}, means, exclude_padding_from_average=excluded, **more)
    else:
        padding = tuple(case.get("pad", [0, 0, 0, 0])[::2])
        means = by_torch(lambda x: F.avg_pool2d(x, kernel, strides, padding, True, not excluded), x)
        check("avg_pool", {"x": x}, means, exclude_padding_from_average=excluded, **more)


def _windows(x: np.ndarray, case: dict) -> tuple[np.ndarray, np.ndarray]:
    """Every window of an image, NaN where it lies outside, and how many of its places lie inside."""
    kernel, strides = case["kernel_sizes"], case.get("strides", [1, 1])
    pairs = []
    for place, (side, size, stride) in enumerate(zip(x.shape[2:], kernel, strides, strict=True)):
        before, after = case.get("pad", [0] * 4)[2 * place : 2 * place + 2]
        if case.get("pad_type", "").startswith("same"):
            whole = max((-(-side // stride) - 1) * stride + size - side, 0)
            before, after = (whole // 2, whole - whole // 2)[:: -1 if case["pad_type"] == "same_lower" else 1]
        if case.get("ceil_mode"):
            after += -(side + before + after - size) % stride
        pairs.append((before, after))
    padded = np.pad(x, [(0, 0), (0, 0), *pairs], constant_values=np.nan)
    windows = np.lib.stride_tricks.sliding_window_view(padded, kernel, (2, 3))[:, :, :: strides[0], :: strides[1]]
    return windows, np.isfinite(windows).sum((-2, -1))


def test_pooling_of_one_and_three_sides():
    x = numbers(2, 3, 8)
    check(
        "max_pool",
        {"x": x},
        by_torch(lambda x: F.max_pool1d(x, 2, 2), x),
        kernel_sizes=np.int32([2]),
        strides=np.int32([2]),
        pad_type="valid",
    )
    x = numbers(1, 2, 4, 4, 4)
    check(
        "avg_pool",
        {"x": x},
        by_torch(lambda x: F.avg_pool3d(x, 2, 1), x),
        kernel_sizes=np.int32([2, 2, 2]),
        pad_type="valid",
    )


def test_nearest_resizes():
    x = numbers(2, 3, 4, 5)
    twice = x.repeat(2, 2).repeat(3, 3)
    check("upsample_nearest_neighbor", {"x": x}, twice, scale_factor_height=2, scale_factor_width=3)
    check("upsample_nearest_neighbor", {"x": x[0]}, twice[0], scale_factor_height=2.0, scale_factor_width=3.0)
    expected = by_torch(lambda x: F.interpolate(x, (6, 7)), x)
    check("upsample_nearest_neighbor", {"x": x}, expected, scale_factor_height=1.5, scale_factor_width=1.5)
    check("resize_nearest_neighbor", {"x": x}, expected, target_size_height=6, target_size_width=7)
    check("crop", {"x": x}, x[..., 1:2, 0:3], crop_height=np.int32([1, 2]), crop_width=np.int32([0, 2]))


@pytest.mark.parametrize("aligned", [False, True])
def test_upsample_bilinear(aligned):
    x = numbers(2, 3, 4, 5)
    expected = by_torch(lambda x: F.interpolate(x, (8, 15), mode="bilinear", align_corners=aligned), x)
    scales = {"scale_factor_height": 2, "scale_factor_width": 3, "align_corners": aligned}
    check("upsample_bilinear", {"x": x}, expected, **scales)
    check("upsample_bilinear", {"x": x}, expected, half_pixel_centers=not aligned, **scales)


def test_upsample_bilinear_from_the_corner_of_a_pixel():
    x = np.float32([[[[0, 1]]]])
    scales = {"scale_factor_height": 1, "scale_factor_width": 2, "half_pixel_centers": False}
    check("upsample_bilinear", {"x": x}, np.float32([[[[0, 0.5, 1, 1]]]]), align_corners=False, **scales)
    with pytest.raises(CheckpointError, match="exclude each other"):
        check("upsample_bilinear", {"x": x}, x, align_corners=True, **scales | {"half_pixel_centers": True})


def test_threshold_of_whole_numbers():
    check("threshold", {"x": np.int32([-2, 5])}, np.int32([1, 5]), alpha=1)


# The grid points that MIL's own documentation of `resize_bilinear` gives, rounded, for two numbers made five or six.
GRIDS = {
    ("UNALIGN_CORNERS", 5): [0.0, 0.1, 0.5, 0.9, 1.0],
    ("STRICT_ALIGN_CORNERS", 5): [0.0, 0.25, 0.5, 0.75, 1.0],
    ("ALIGN_CORNERS", 5): [0.0, 0.25, 0.5, 0.75, 1.0],
    ("DEFAULT", 5): [0.0, 0.4, 0.8, 1.0, 1.0],
    ("OFFSET_CORNERS", 5): [0.1, 0.3, 0.5, 0.7, 0.9],
    ("UNALIGN_CORNERS", 6): [0.0, 0.0, 0.33, 0.67, 1.0, 1.0],
    ("DEFAULT", 6): [0.0, 0.33, 0.67, 1.0, 1.0, 1.0],
    ("OFFSET_CORNERS", 6): [0.08, 0.25, 0.42, 0.58, 0.75, 0.92],
    ("ALIGN_CORNERS", 1): [0.5],
    ("STRICT_ALIGN_CORNERS", 1): [0.0],
}


@pytest.mark.parametrize(("mode", "count"), GRIDS)
def test_resize_bilinear_takes_the_documented_points(mode, count):
    x = np.float32([[[[0, 1], [0, 1]]]])
    like = np.zeros((1, 1, 1, count), np.float32)
    found = answer("resize_bilinear", {"x": x}, like, target_size_height=1, target_size_width=count, sampling_mode=mode)
    np.testing.assert_allclose(found[0, 0, 0], GRIDS[mode, count], atol=5e-3)


def test_every_operation_is_tested_here():
    words = set(re.findall(r'"(\w+)"', Path(__file__).read_text(encoding="utf-8")))
    assert not {*OPERATIONS} - words
