"""Chains that are computed as one operation give what the single operations give, and are left alone otherwise."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.coreml.measure import decibels
from sfumato.coreml.program import Feature, Function, Interface, Model, Operation, Program, TensorType
from sfumato.coreml.runtime import Predictor
from sfumato.coreml.runtime.fuse import fused
from sfumato.coreml.runtime.planner import needed
from support.coreml_programs import model, operation

RNG = np.random.default_rng(0)


class Builder:
    """Operations one after another, with their types."""

    def __init__(self, **inputs: tuple[int, ...]) -> None:
        self.inputs = {name: TensorType("fp32", shape) for name, shape in inputs.items()}
        self.types = dict(self.inputs)
        self.operations: list[Operation] = []

    def __call__(self, kind: str, sides: tuple[int, ...], /, **inputs) -> str:
        name = f"{kind}_{len(self.operations)}"
        given_ones = {
            key: (each,) if isinstance(each, str) and each in self.types else each for key, each in inputs.items()
        }
        self.types[name] = TensorType("fp32", sides)
        self.operations.append(operation(kind, {name: self.types[name]}, **given_ones))
        return name

    def parts(self, x: str, axis: int, bounds: list[int]) -> list[str]:
        """`split`, with a name for each part."""
        shape = list(self.types[x].shape)
        names = [f"part_{len(self.operations)}_{place}" for place in range(len(bounds) - 1)]
        outputs = {}
        for name, start, stop in zip(names, bounds, bounds[1:], strict=False):
            outputs[name] = TensorType("fp32", (*shape[:axis], stop - start, *shape[axis + 1 :]))
        self.types |= outputs
        sizes = np.int32(np.diff(bounds))
        self.operations.append(operation("split", outputs, x=(x,), axis=axis, split_sizes=sizes))
        return names

    def slices(self, x: str, axis: int, bounds: list[int]) -> list[str]:
        """The same as slices."""
        shape = self.types[x].shape
        names = []
        for start, stop in pairwise(bounds):
            begin, end = np.zeros(len(shape), np.int32), np.int32(shape)
            begin[axis], end[axis] = start, stop
            sides = (*shape[:axis], stop - start, *shape[axis + 1 :])
            names.append(
                self("slice_by_index", sides, x=x, begin=begin, end=end, end_mask=np.arange(len(shape)) != axis)
            )
        return names

    def model(self, *outputs: str) -> Model:
        return model(self.inputs, {name: self.types[name] for name in outputs}, *self.operations)


def kinds(made: Model) -> Counter[str]:
    function = fused(made.program.functions["main"])
    pairs = zip(function.operations, needed(function), strict=True)
    return Counter(each.type for each, kept in pairs if kept)


def with_output(made: Model, name: str) -> Model:
    """The same model, which returns another of its values too."""
    function = made.program.functions["main"]
    types = {output.name: output.type for each in function.operations for output in each.outputs}
    feature = Feature(name, types[name])
    wider = Function(function.inputs, (*function.outputs, name), function.operations, function.opset)
    interface = Interface(made.interface.inputs, (*made.interface.outputs, feature))
    return replace(made, body=Program({"main": wider}), interface=interface)


def check(made: Model, atol: float = 3e-6) -> None:
    """Fused and not, all outputs are the same."""
    given_ones = {each.name: RNG.standard_normal(each.type.shape) for each in made.interface.inputs}
    whole, apart = (Predictor(made, precision="float32", fuse=fuse).predict(given_ones) for fuse in (True, False))
    for name in apart:
        np.testing.assert_allclose(whole[name], apart[name], rtol=1e-5, atol=atol)


def group_norm(shape, groups, *, form="real_div", affine="batch_norm", axes=None) -> tuple[Model, list[str]]:
    """A normalization as programs spell it out, and the names of its inner values."""
    b = Builder(x=shape)
    inside = (shape[0], groups, shape[1] // groups, *shape[2:])
    narrow = (*inside[:2], *[1] * (len(inside) - 2))
    axes = np.int32(range(2, len(inside)) if axes is None else axes)
    grouped = b("reshape", inside, x="x", shape=np.int32(inside))
    mean = b("reduce_mean", narrow, x=grouped, axes=axes, keep_dims=True)
    centred = b("sub", inside, x=grouped, y=mean)
    squared = b("square", inside, x=centred)
    variance = b("reduce_mean", narrow, x=squared, axes=axes, keep_dims=True)
    inner = [grouped, mean, centred, squared, variance]
    if form == "real_div":
        more = b("add", narrow, x=variance, y=np.float32(1e-3))
        root = b("sqrt", narrow, x=more)
        normal = b("real_div", inside, x=centred, y=root)
        inner += [more, root, normal]
    else:
        root = b("rsqrt", narrow, x=variance, epsilon=np.float32(1e-3))
        normal = b("mul", inside, x=centred, y=root)
        inner += [root, normal]
    result = b("reshape", shape, x=normal, shape=np.int32(shape))
    gamma, beta = (RNG.standard_normal(shape[1]).astype(np.float32) for _ in range(2))
    column = (shape[1], *[1] * (len(shape) - 2))
    if affine == "batch_norm":
        mean, variance = RNG.standard_normal(shape[1]).astype(np.float32), np.full(shape[1], 2.0, np.float32)
        inner.append(result)
        result = b("batch_norm", shape, x=result, mean=mean, variance=variance, gamma=gamma, beta=beta, epsilon=1e-5)
    elif affine == "mul and add":
        scaled = b("mul", shape, x=result, y=gamma.reshape(1, *column))
        inner += [result, scaled]
        result = b("add", shape, x=beta.reshape(column), y=scaled)
    return b.model(result), inner


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 2),
    groups=st.integers(1, 4),
    each=st.integers(1, 3),
    sides=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    form=st.sampled_from(["real_div", "rsqrt"]),
    affine=st.sampled_from(["batch_norm", "mul and add", "none"]),
)
def test_group_norm(batch, groups, each, sides, form, affine):
    made, _ = group_norm((batch, groups * each, *sides), groups, form=form, affine=affine)
    found = kinds(made)
    assert found["fused group_norm"] == 1
    assert not {"reduce_mean", "sub", "reshape", "batch_norm", "mul", "add"} & {*found}
    # The variance of a group of one number is what rounding leaves of nothing.
    check(made, atol=2e-4 if each * int(np.prod(sides)) < 3 else 2e-5)


@pytest.mark.parametrize("affine", ["mul and add", "none"])
def test_group_norm_of_a_large_picture_with_channels_last_is_precise(affine):
    """As precise as it would be plane by plane, so that a right graph is not taken for a wrong one (100 dB)."""
    made, _ = group_norm((1, 8, 512, 512), 4, affine=affine)
    x = torch.randn((1, 8, 512, 512), generator=torch.Generator().manual_seed(0)) + 3
    x = x.contiguous(memory_format=torch.channels_last)
    (got,) = Predictor(made, precision="float32").run({"x": x}).values()
    wanted = torch.nn.functional.group_norm(x.double(), 4, eps=1e-3)
    constants = [one.inputs["y"][0] for one in made.program.functions["main"].operations if one.type == "mul"]
    shift = [one.inputs["x"][0] for one in made.program.functions["main"].operations if one.type == "add"][-1:]
    if affine != "none":
        wanted = wanted * torch.from_numpy(constants[0].read()) + torch.from_numpy(shift[0].read())
    assert decibels(got, wanted) > 130


@pytest.mark.parametrize("form", ["real_div", "rsqrt"])
def test_group_norm_whose_inner_values_are_read_elsewhere_is_left_alone(form):
    made, inner = group_norm((2, 6, 4, 3), 3, form=form)
    for name in inner[:-1]:
        assert kinds(with_output(made, name))["fused group_norm"] == 0
        check(with_output(made, name))
    joined = with_output(made, inner[-1])  # the end of the chain itself; the batch normalization then stands apart
    assert kinds(joined)["fused group_norm"] == kinds(joined)["batch_norm"] == 1
    check(joined)


@pytest.mark.parametrize("axes", [(2, 3), (3, 4), (2, 4), (1, 2, 3, 4)])
def test_normalization_over_other_axes_is_left_alone(axes):
    b = Builder(x=(2, 6, 4, 3))
    inside = (2, 3, 2, 4, 3)
    narrow = tuple(1 if axis in axes else side for axis, side in enumerate(inside))
    grouped = b("reshape", inside, x="x", shape=np.int32(inside))
    mean = b("reduce_mean", narrow, x=grouped, axes=np.int32(axes), keep_dims=True)
    centred = b("sub", inside, x=grouped, y=mean)
    squared = b("square", inside, x=centred)
    variance = b("reduce_mean", narrow, x=squared, axes=np.int32(axes), keep_dims=True)
    root = b("sqrt", narrow, x=b("add", narrow, x=variance, y=np.float32(1e-3)))
    normal = b("real_div", inside, x=centred, y=root)
    made = b.model(b("reshape", (2, 6, 4, 3), x=normal, shape=np.int32([2, 6, 4, 3])))
    assert kinds(made)["fused group_norm"] == 0
    check(made)


def head(b: Builder, q: str, k: str, v: str, *, scale=0.5, mask=None, inner: list[str] | None = None) -> str:
    """One head of (B, d, 1, L) queries over (B, S, 1, d) keys and (B, d, 1, S) values."""
    batch, _, _, length = b.types[q].shape
    shape = (batch, b.types[k].shape[1], 1, length)
    scores = b("einsum", shape, values=(k, q), equation="bkhc,bchq->bkhq")
    names = [scores]
    if scale is not None:
        names.append(b("mul", shape, x=names[-1], y=np.float32(scale)))
    if mask is not None:
        names.append(b("add", shape, x=names[-1], y=mask))
    names.append(b("softmax", shape, x=names[-1], axis=1))
    if inner is not None:
        inner += names
    return b("einsum", (batch, b.types[v].shape[1], 1, length), values=(v, names[-1]), equation="bchk,bkhq->bchq")


def heads_of(count, width, length, keys, *, cut="slices", chunk=None, mask=None, batch=2) -> tuple[Model, list[str]]:
    """Attention head by head, as converters for the Neural Engine write it, and the names of its inner values."""
    channels = count * width
    b = Builder(q=(batch, channels, 1, length), k=(batch, channels, 1, keys), v=(batch, channels, 1, keys))
    turned = b("transpose", (batch, keys, 1, channels), x="k", perm=np.int32([0, 3, 2, 1]))
    bounds = list(range(0, channels + 1, width))
    take = getattr(b, cut)
    operands = zip(take("q", 1, bounds), take(turned, 3, bounds), take("v", 1, bounds), strict=True)
    inner: list[str] = []
    heads = []
    for q, k, v in operands:
        if chunk is None:
            heads.append(head(b, q, k, v, mask=mask, inner=inner))
            continue
        ends = [*range(0, length, chunk), length]
        parts = [head(b, part, k, v, inner=inner) for part in take(q, 3, ends)]
        inner += parts
        heads.append(b("concat", (batch, width, 1, length), values=tuple(parts), axis=3))
    inner += heads
    return b.model(b("concat", (batch, channels, 1, length), values=tuple(heads), axis=1)), inner


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(1, 4),
    width=st.integers(1, 5),
    length=st.integers(1, 9),
    keys=st.integers(1, 7),
    cut=st.sampled_from(["slices", "parts"]),
    chunk=st.sampled_from([None, 1, 4]),
)
def test_heads_computed_apart_become_one_attention(count, width, length, keys, cut, chunk):
    made, _ = heads_of(count, width, length, keys, cut=cut, chunk=chunk)
    found = kinds(made)
    assert found["fused attention"] == 1
    assert not {"einsum", "softmax", "concat", "split", "slice_by_index"} & {*found}
    check(made)


@pytest.mark.parametrize("shape", [(1, 6, 1, 5), (2, 6, 1, 5), (6, 1, 5), (1, 6, 1, 1), (1, 1, 1, 5)])
def test_a_mask_is_added(shape):
    mask = RNG.standard_normal(shape).astype(np.float32)
    made, _ = heads_of(3, 4, 5, 6, mask=mask)
    assert kinds(made)["fused attention"] == 1
    check(made)


def test_attention_whose_inner_values_are_read_elsewhere_is_not_fused_there():
    for chunk in (None, 3):
        made, inner = heads_of(2, 3, 5, 4, chunk=chunk)
        for name in inner:
            check(with_output(made, name))
        assert kinds(with_output(made, inner[0]))["einsum"] == 2


def test_heads_in_another_order_stay_apart():
    b = Builder(q=(1, 6, 1, 5), k=(1, 4, 1, 6), v=(1, 6, 1, 4))
    bounds = [0, 3, 6]
    qs, ks, vs = b.slices("q", 1, bounds), b.slices("k", 3, bounds), b.slices("v", 1, bounds)
    heads = [head(b, q, k, v) for q, k, v in zip(qs, ks, vs[::-1], strict=True)]
    made = b.model(b("concat", (1, 6, 1, 5), values=tuple(heads), axis=1))
    assert kinds(made)["fused attention"] == 2
    check(made)


def test_heads_of_different_scales_or_widths_stay_apart():
    for bounds, scales in (([0, 3, 6], (0.5, 0.25)), ([0, 2, 6], (0.5, 0.5))):
        b = Builder(q=(1, 6, 1, 5), k=(1, 4, 1, 6), v=(1, 6, 1, 4))
        parts = zip(b.slices("q", 1, bounds), b.slices("k", 3, bounds), b.slices("v", 1, bounds), scales, strict=True)
        heads = [head(b, q, k, v, scale=scale) for q, k, v, scale in parts]
        made = b.model(b("concat", (1, 6, 1, 5), values=tuple(heads), axis=1))
        assert kinds(made)["fused attention"] == 2
        check(made)


def test_heads_with_masks_of_their_own_stay_apart():
    b = Builder(q=(1, 6, 1, 5), k=(1, 4, 1, 6), v=(1, 6, 1, 4))
    bounds = [0, 3, 6]
    parts = zip(b.slices("q", 1, bounds), b.slices("k", 3, bounds), b.slices("v", 1, bounds), strict=True)
    heads = [head(b, *each, mask=RNG.standard_normal((1, 4, 1, 5)).astype(np.float32)) for each in parts]
    made = b.model(b("concat", (1, 6, 1, 5), values=tuple(heads), axis=1))
    assert kinds(made)["fused attention"] == 2
    check(made)


def test_heads_that_leave_some_channels_out_stay_apart():
    b = Builder(q=(1, 9, 1, 5), k=(1, 4, 1, 6), v=(1, 6, 1, 4))
    parts = zip(b.slices("q", 1, [0, 3, 6]), b.slices("k", 3, [0, 3, 6]), b.slices("v", 1, [0, 3, 6]), strict=True)
    made = b.model(b("concat", (1, 6, 1, 5), values=tuple(head(b, *each) for each in parts), axis=1))
    assert kinds(made)["fused attention"] == 2
    check(made)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("scale", ["mul", "real_div", None])
@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (2, 1, 3)])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_of_matrix_products(batch, turned, scale, masked):
    b = Builder(q=(*batch, 5, 4), k=(*batch, 4, 6) if not turned else (*batch, 6, 4), v=(*batch, 6, 7))
    scores = b("matmul", (*batch, 5, 6), x="q", y="k", transpose_y=turned)
    if scale is not None:
        scores = b(scale, (*batch, 5, 6), x=scores, y=np.float32(0.5))
    if masked:
        scores = b("add", (*batch, 5, 6), x=RNG.standard_normal((5, 6)).astype(np.float32), y=scores)
    weights = b("softmax", (*batch, 5, 6), x=scores, axis=-1)
    made = b.model(b("matmul", (*batch, 5, 7), x=weights, y="v"))
    assert kinds(made) == {"fused attention": 1}
    check(made)


def test_what_only_looks_like_attention_is_left_alone():
    def products(axis=-1, number=0.5, late=False, broadcast=False):
        b = Builder(q=(2, 5, 4), k=(1 if broadcast else 2, 4, 5), v=(2, 5, 7))
        scores = b("matmul", (2, 5, 5), x="q", y="k")
        shape = np.broadcast_shapes((2, 5, 5), np.shape(number))
        if late:  # a mask before the scale
            scores = b("add", (2, 5, 5), x=scores, y=np.ones((5, 5), np.float32).cumsum(1))
        scores = b("mul", shape, x=scores, y=number)
        weights = b("softmax", shape, x=scores, axis=axis)
        return b.model(b("matmul", (*shape[:-1], 7), x=weights, y="v"))

    assert kinds(products())["fused attention"] == 1
    for made in (
        products(axis=1),  # over the queries
        products(axis=0),
        products(number=np.float32([0.5, 1, 2, 3, 4])),  # a number for each key
        products(number=np.ones((1, 1, 1, 1), np.float32)),  # one more side
        products(late=True),
        products(broadcast=True),
    ):
        assert kinds(made)["fused attention"] == 0
        check(made)


def test_in_typed_precision_a_fused_result_is_rounded_once_at_its_end():
    made, _ = heads_of(2, 4, 6, 5)
    function = made.program.functions["main"]
    operations = tuple(
        replace(each, outputs=tuple(replace(out, type=TensorType("fp16", out.type.shape)) for out in each.outputs))
        for each in function.operations
    )
    typed = replace(made, body=Program({"main": replace(function, operations=operations)}))
    given_ones = {each.name: RNG.standard_normal(each.type.shape).astype(np.float16) for each in made.interface.inputs}
    (exact,) = Predictor(made, precision="float32").predict(given_ones).values()
    (found,) = Predictor(typed).predict(given_ones).values()
    assert np.array_equal(found, exact.astype(np.float16))
