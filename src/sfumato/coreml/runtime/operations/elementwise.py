"""Elementwise operations."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from sfumato.coreml.runtime.call import Binder, Bound, Call
from sfumato.coreml.runtime.kinds import HELD, WORDS
from sfumato.errors import CheckpointError

__all__ = ["ELEMENTWISE"]


def _plain(function: Callable[..., Tensor], *names: str) -> Binder:
    return lambda call: call.bind(function, *names)


def _with_epsilon(function: Callable[[Tensor], Tensor], default: float) -> Binder:
    """Bind `function(x + epsilon)`, as Core ML defines log, rsqrt and inverse."""

    def bind(call: Call) -> Bound:
        epsilon = call.number("epsilon", default)
        return call.bind(lambda x: function(x + epsilon) if epsilon else function(x), "x")

    return bind


def _with_parameters(function: Callable[..., Tensor], *names: str) -> Binder:
    """Bind `function(x, alpha, …)` with required numeric parameters."""

    def bind(call: Call) -> Bound:
        numbers = [call.number(name) for name in names]
        return call.bind(lambda x: function(x, *numbers), "x")

    return bind


def _per_channel(function: Callable[..., Tensor], *names: str) -> Binder:
    """Bind `function(x, alpha, …)` with one parameter per channel, the second axis of x."""

    def bind(call: Call) -> Bound:
        shape = [1, -1] + [1] * (call.rank() - 2)
        return call.bind(lambda x, *vectors: function(x, *(each.reshape(shape) for each in vectors)), "x", *names)

    return bind


def _divide(x: Tensor, y: Tensor) -> Tensor:
    return torch.true_divide(x, y) if x.is_floating_point() else torch.div(x, y, rounding_mode="trunc")


_GELU: Mapping[str, Callable[[Tensor], Tensor]] = {
    "EXACT": F.gelu,
    "TANH_APPROXIMATION": lambda x: F.gelu(x, approximate="tanh"),
    "SIGMOID_APPROXIMATION": lambda x: x * torch.sigmoid(1.702 * x),
}


def _gelu(call: Call) -> Bound:
    return call.bind(_GELU[call.text("mode", "EXACT")], "x")


def _cast(call: Call) -> Bound:
    word = call.text("dtype", "fp32")
    kind = WORDS.get(word, word)
    if kind not in HELD:
        raise CheckpointError(f"the type {word!r} that it casts to is unknown")
    held = HELD[kind]
    wrapped = {"uint16": 0xFFFF, "uint32": 0xFFFFFFFF}.get(kind)
    if wrapped is None:
        return call.bind(lambda x: x.to(held), "x")
    return call.bind(lambda x: x.to(torch.int64).bitwise_and(wrapped).to(held), "x")


def _clip(call: Call) -> Bound:
    low, high = call.number("alpha"), call.number("beta")
    return call.bind(lambda x: x.clamp(low, high), "x")


def _softmax(call: Call) -> Bound:
    """Softmax, moved to the last axis: several times faster, and products put the axis to sum over last in memory."""
    axis = call.integer("axis", -1)
    return call.bind(lambda x: torch.softmax(x.movedim(axis, -1), -1).movedim(-1, axis), "x")


def _clamped_relu(x: Tensor, alpha: float, beta: float) -> Tensor:
    return torch.where(x >= 0, x, alpha * x).clamp(max=beta)


def _softplus_parametric(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    return alpha * F.softplus(beta * x)


def _tanh_scaled(x: Tensor, alpha: float, beta: float) -> Tensor:
    return alpha * torch.tanh(beta * x)


_UNARY: Mapping[str, Callable[[Tensor], Tensor]] = {
    "abs": torch.abs,
    "acos": torch.acos,
    "asin": torch.asin,
    "atan": torch.atan,
    "atanh": torch.atanh,
    "ceil": torch.ceil,
    "cos": torch.cos,
    "cosh": torch.cosh,
    "erf": torch.erf,
    "exp": torch.exp,
    "exp2": torch.exp2,
    "floor": torch.floor,
    "logical_not": torch.logical_not,
    "relu": torch.relu,
    "relu6": F.relu6,
    "round": torch.round,
    "sigmoid": torch.sigmoid,
    "sign": lambda x: torch.where(x == x, torch.sign(x), x),  # torch.sign is 0 for NaN
    "silu": F.silu,
    "sin": torch.sin,
    "sinh": torch.sinh,
    "softplus": lambda x: F.softplus(x, threshold=30.0),
    "softsign": F.softsign,
    "sqrt": torch.sqrt,
    "square": torch.square,
    "tan": torch.tan,
    "tanh": torch.tanh,
}

_BINARY: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "equal": torch.eq,
    "floor_div": torch.floor_divide,
    "greater": torch.gt,
    "greater_equal": torch.ge,
    "less": torch.lt,
    "less_equal": torch.le,
    "logical_and": torch.logical_and,
    "logical_or": torch.logical_or,
    "logical_xor": torch.logical_xor,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "mod": torch.remainder,
    "mul": torch.mul,
    "not_equal": torch.ne,
    "pow": torch.pow,
    "real_div": _divide,
    "sub": torch.sub,
}

ELEMENTWISE: Mapping[str, Binder] = {
    **{name: _plain(function, "x") for name, function in _UNARY.items()},
    **{name: _plain(function, "x", "y") for name, function in _BINARY.items()},
    "cast": _cast,
    "clamped_relu": _with_parameters(_clamped_relu, "alpha", "beta"),
    "clip": _clip,
    "elu": _with_parameters(lambda x, alpha: F.elu(x, alpha), "alpha"),
    "gelu": _gelu,
    "inverse": _with_epsilon(torch.reciprocal, 1e-4),
    "leaky_relu": _with_parameters(F.leaky_relu, "alpha"),
    "linear_activation": _with_parameters(lambda x, alpha, beta: alpha * x + beta, "alpha", "beta"),
    "log": _with_epsilon(torch.log, 1e-45),
    "prelu": _per_channel(lambda x, alpha: torch.where(x > 0, x, alpha * x), "alpha"),
    "rsqrt": _with_epsilon(torch.rsqrt, 1e-12),
    "scaled_tanh": _with_parameters(_tanh_scaled, "alpha", "beta"),
    "select": _plain(torch.where, "cond", "a", "b"),
    "sigmoid_hard": _with_parameters(lambda x, alpha, beta: (alpha * x + beta).clamp(0, 1), "alpha", "beta"),
    "softmax": _softmax,
    "softplus_parametric": _per_channel(_softplus_parametric, "alpha", "beta"),
    "threshold": _with_parameters(lambda x, alpha: x.clamp(min=alpha).to(x.dtype), "alpha"),
    "thresholded_relu": _with_parameters(lambda x, alpha: torch.where(x < alpha, 0.0, x), "alpha"),
}
