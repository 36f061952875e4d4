"""Normalization layers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from sfumato.coreml.runtime.call import Binder, Bound, Call

__all__ = ["NORMALIZATION"]


def _batch_norm(call: Call) -> Bound:
    epsilon = call.number("epsilon", 1e-5)
    given = call.given("gamma", "beta")

    def run(x: Tensor, mean: Tensor, variance: Tensor, *affine: Tensor) -> Tensor:
        values = dict(zip(given, affine, strict=True))
        return F.batch_norm(x, mean, variance, values.get("gamma"), values.get("beta"), eps=epsilon)

    return call.bind(run, "x", "mean", "variance", *given)


def _instance_norm(call: Call) -> Bound:
    epsilon = call.number("epsilon", 1e-5)
    given = call.given("gamma", "beta")

    def run(x: Tensor, *affine: Tensor) -> Tensor:
        values = dict(zip(given, affine, strict=True))
        shape = (1, -1) + (1,) * (x.dim() - 2)
        variance, mean = torch.var_mean(x, tuple(range(2, x.dim())), correction=0, keepdim=True)
        normal = (x - mean) * torch.rsqrt(variance + epsilon)
        if "gamma" in values:
            normal = normal * values["gamma"].reshape(shape)
        return normal + values["beta"].reshape(shape) if "beta" in values else normal

    return call.bind(run, "x", *given)


def _layer_norm(call: Call) -> Bound:
    rank, epsilon = call.rank(), call.number("epsilon", 1e-5)
    axes = sorted(axis % rank for axis in call.ints("axes", tuple(range(rank))))
    given = call.given("gamma", "beta")
    if axes == list(range(rank - len(axes), rank)):

        def trailing(x: Tensor, *affine: Tensor) -> Tensor:
            values = dict(zip(given, affine, strict=True))
            sides = x.shape[rank - len(axes) :]
            return F.layer_norm(x, sides, values.get("gamma"), values.get("beta"), epsilon)

        return call.bind(trailing, "x", *given)

    order = [axis for axis in range(rank) if axis not in axes] + axes
    back = [order.index(axis) for axis in range(rank)]

    def run(x: Tensor, *affine: Tensor) -> Tensor:
        values = dict(zip(given, affine, strict=True))
        moved = x.permute(order)
        sides = moved.shape[rank - len(axes) :]
        return F.layer_norm(moved, sides, values.get("gamma"), values.get("beta"), epsilon).permute(back)

    return call.bind(run, "x", *given)


def _l2_norm(call: Call) -> Bound:
    epsilon = call.number("epsilon", 1e-6)
    return call.bind(lambda x: x * torch.rsqrt(x.square().sum((-3, -2, -1), keepdim=True) + epsilon), "x")


def _local_response_norm(call: Call) -> Bound:
    size = call.integer("size")
    alpha, beta, k = call.number("alpha", 1e-4), call.number("beta", 0.75), call.number("k", 1.0)
    return call.bind(lambda x: F.local_response_norm(x, size, alpha, beta, k), "x")


NORMALIZATION: Mapping[str, Binder] = {
    "batch_norm": _batch_norm,
    "instance_norm": _instance_norm,
    "l2_norm": _l2_norm,
    "layer_norm": _layer_norm,
    "local_response_norm": _local_response_norm,
}
