"""The portable runtime on what coremltools makes: networks of torch, compressed weights, pipelines, functions."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from sfumato.coreml.formats import read_model
from sfumato.coreml.program import Function
from sfumato.coreml.runtime import Predictor, load
from sfumato.coreml.runtime.call import Call
from sfumato.coreml.runtime.constexpr import CONSTEXPR
from sfumato.coreml.runtime.fuse import fused
from sfumato.coreml.runtime.planner import needed
from support.assets import asset
from support.coreml_programs import operation
from support.coremltools import import_coremltools, quiet


@pytest.fixture(scope="module")
def ct():
    return import_coremltools()


def package(ct, module: nn.Module, inputs: tuple[torch.Tensor, ...], path: Path, target: str, precision: str) -> Path:
    """A module as a package, exported as coremltools recommends it."""
    module.eval()
    with quiet():
        exported = torch.export.export(module, inputs).run_decompositions({})
        made = ct.convert(
            exported,
            minimum_deployment_target=getattr(ct.target, target),
            compute_precision=getattr(ct.precision, precision),
        )
        made.save(str(path))
    return path


def computed(function: Function) -> Counter[str]:
    """How often each operation is in what has to be computed."""
    pairs = zip(function.operations, needed(function), strict=True)
    return Counter(operation.type for operation, kept in pairs if kept and operation.type != "const")


def decibels(found: np.ndarray, expected: np.ndarray) -> float:
    error = np.square(found.astype(np.float64) - expected).mean()
    return float(10 * np.log10(np.abs(expected).max() ** 2 / max(error, 1e-30)))


class Normed(nn.Module):
    """A residual block of a U-Net."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(4, 8, eps=1e-5), nn.Conv2d(8, 16, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(8, 16, eps=1e-6), nn.Conv2d(16, 16, 3, stride=2, padding=1)
        self.plain = nn.GroupNorm(1, 16, affine=False)
        for norm in (self.norm1, self.norm2):
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv1(nn.functional.silu(self.norm1(x)))
        h = self.conv2(nn.functional.silu(self.norm2(h)))
        return nn.functional.interpolate(self.plain(h), scale_factor=2.0, mode="nearest")


class Attention(nn.Module):
    """Attention over (B, C, 1, S) in the forms of Apple's converter, from the equations of its attention.py."""

    def __init__(self, form: str, heads: int = 4, width: int = 6, masked: bool = False) -> None:
        super().__init__()
        self.form, self.heads, self.width = form, heads, width
        self.q, self.k, self.v = (nn.Conv2d(heads * width, heads * width, 1, bias=False) for _ in range(3))
        mask = torch.full((11, 11), -1e4).triu(1).T if masked else None
        self.register_buffer("mask", None if mask is None else mask.reshape(1, 11, 1, 11))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return getattr(self, self.form)(self.q(x), self.k(x), self.v(x))

    def original(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        batch = q.shape[0]
        q, k, v = (each.view(batch, self.heads, self.width, -1) for each in (q, k, v))
        weights = torch.einsum("bhcq,bhck->bhqk", q, k) * self.width**-0.5
        if self.mask is not None:
            weights = weights + self.mask.reshape(1, 1, 11, 11).transpose(2, 3)
        mixed = torch.einsum("bhqk,bhck->bhcq", weights.softmax(dim=3), v)
        return mixed.contiguous().view(batch, self.heads * self.width, 1, -1)

    def split(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        qs, vs = q.split(self.width, dim=1), v.split(self.width, dim=1)
        ks = k.transpose(1, 3).split(self.width, dim=3)
        mixed = []
        for q_, k_, v_ in zip(qs, ks, vs, strict=True):
            weights = torch.einsum("bchq,bkhc->bkhq", q_, k_) * self.width**-0.5
            if self.mask is not None:
                weights = weights + self.mask
            mixed.append(torch.einsum("bkhq,bchk->bchq", weights.softmax(dim=1), v_))
        return torch.cat(mixed, dim=1)

    def chunked(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k = k.transpose(1, 3)
        heads = []
        for head in range(self.heads):
            own = slice(head * self.width, (head + 1) * self.width)
            parts = []
            for start in range(0, q.shape[3], 4):
                weights = torch.einsum("bchq,bkhc->bkhq", q[:, own, :, start : start + 4], k[..., own])
                weights = (weights * self.width**-0.5).softmax(dim=1)
                parts.append(torch.einsum("bkhq,bchk->bchq", weights, v[:, own]))
            heads.append(torch.cat(parts, dim=3))
        return torch.cat(heads, dim=1)

    def batched(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        batch = q.shape[0]
        q, k, v = (
            each.squeeze(2).transpose(1, 2).reshape(batch, -1, self.heads, self.width).transpose(1, 2)
            for each in (q, k, v)
        )
        weights = (q @ k.transpose(-1, -2) * self.width**-0.5).softmax(-1)
        return (weights @ v).transpose(1, 2).reshape(batch, -1, self.heads * self.width).transpose(1, 2).unsqueeze(2)


class Text(nn.Module):
    """A layer of a text encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.norm = nn.Embedding(50, 24), nn.LayerNorm(24)
        self.qkv, self.out = nn.Linear(24, 72), nn.Linear(24, 24)
        self.up, self.down = nn.Linear(24, 96), nn.Linear(96, 24)
        self.register_buffer("mask", torch.full((7, 7), -1e4).triu(1))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.words(ids)
        q, k, v = (each.reshape(1, 7, 4, 6).transpose(1, 2) for each in self.qkv(self.norm(x)).chunk(3, -1))
        weights = (q @ k.transpose(-1, -2) * 6**-0.5 + self.mask).softmax(-1)
        x = x + self.out((weights @ v).transpose(1, 2).reshape(1, 7, 24))
        h = self.up(self.norm(x))
        return x + self.down(h * torch.sigmoid(1.702 * h))


class ChannelNorm(nn.Module):
    """Normalization over the channels of (B, C, 1, S), as Apple's layer_norm.py writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        centred = x - x.mean(dim=1, keepdim=True)
        normal = centred * (centred.pow(2).mean(dim=1, keepdim=True) + 1e-5).rsqrt()
        return (normal + self.bias.view(1, 6, 1, 1)) * self.weight.view(1, 6, 1, 1)


MODULES = {
    "residual block": (Normed, (2, 8, 6, 6)),
    "original attention": (lambda: Attention("original"), (2, 24, 1, 11)),
    "original attention with a mask": (lambda: Attention("original", masked=True), (2, 24, 1, 11)),
    "split attention": (lambda: Attention("split"), (2, 24, 1, 11)),
    "split attention with a mask": (lambda: Attention("split", masked=True), (2, 24, 1, 11)),
    "chunked attention": (lambda: Attention("chunked"), (2, 24, 1, 11)),
    "batched attention": (lambda: Attention("batched"), (2, 24, 1, 11)),
    "channel norm": (ChannelNorm, (2, 6, 1, 9)),
    "text": (Text, (1, 7)),
}
# What is left to compute of operations that are fused, and how many fused ones there are.
FUSED = {
    "residual block": {"fused group_norm": 3, "reduce_mean": 0, "batch_norm": 0},
    **{
        name: {"fused attention": 1, "softmax": 0, "einsum": 0, "matmul": 0}
        for name in MODULES
        if "attention" in name or name == "text"
    },
}


@pytest.mark.parametrize("target", ["iOS16", "iOS18"])
@pytest.mark.parametrize("name", MODULES)
def test_networks_of_torch(ct, name, target, tmp_path):
    torch.manual_seed(0)
    make, shape = MODULES[name]
    module = make()
    x = torch.randint(0, 50, shape) if name == "text" else torch.randn(shape)
    with torch.no_grad():
        expected = module(x).numpy()
    single = package(ct, module, (x,), tmp_path / "single.mlpackage", target, "FLOAT32")
    half = package(ct, module, (x,), tmp_path / "half.mlpackage", target, "FLOAT16")

    function = read_model(single).program.functions["main"]
    counts = computed(fused(function))
    assert {kind: counts[kind] for kind in FUSED.get(name, {})} == FUSED.get(name, {}), counts

    whole, plain = load(single, precision="float32"), load(single, precision="float32", fuse=False)
    (found,), (apart,) = whole.predict(_inputs(whole, x)).values(), plain.predict(_inputs(plain, x)).values()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found, apart, rtol=1e-5, atol=2e-6)

    for fuse in (False, True):
        typed = load(half, fuse=fuse)
        (rounded,) = typed.predict(_inputs(typed, x)).values()
        assert decibels(rounded, expected) > 50


def _inputs(predictor: Predictor, x: torch.Tensor) -> dict[str, np.ndarray]:
    (feature,) = predictor.interface.inputs
    return {feature.name: x.numpy()}


class TestCompressedWeights:
    """The numbers that coremltools' own decompression gives, all of them the same."""

    @pytest.fixture(scope="class")
    @staticmethod
    def packages(ct, tmp_path_factory):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Conv2d(16, 32, 3), nn.Flatten(), nn.Linear(32 * 4, 24), nn.Linear(24, 16))
        x = torch.randn(1, 16, 4, 4)
        made = {}
        for target in ("iOS16", "iOS18"):
            for precision in ("FLOAT16", "FLOAT32"):
                path = tmp_path_factory.mktemp(target) / f"{precision}.mlpackage"
                made[target, precision] = package(ct, module, (x,), path, target, precision)
        return made

    WAYS = [
        *(("iOS16", f"palette {bits}") for bits in (1, 2, 4, 6, 8)),
        *(("iOS18", f"palette {bits}") for bits in (1, 2, 3, 4, 6, 8)),
        ("iOS18", "grouped"),
        ("iOS18", "scaled"),
        *((target, way) for target in ("iOS16", "iOS18") for way in ("int8", "uint8", "asymmetric", "sparse")),
        ("iOS18", "int4 blocks"),
        ("iOS18", "uint4 blocks"),
        ("iOS18", "sparse palette"),
        ("iOS18", "sparse int8"),
    ]

    @pytest.mark.parametrize("precision", ["FLOAT16", "FLOAT32"])
    @pytest.mark.parametrize(("target", "way"), WAYS)
    def test_are_the_same(self, ct, packages, tmp_path, target, way, precision):
        with quiet():
            model = ct.models.MLModel(str(packages[target, precision]), skip_model_load=True)
            small = _compressed(ct, model, way)
            small.save(str(tmp_path / "small.mlpackage"))
            ct.optimize.coreml.decompress_weights(small).save(str(tmp_path / "plain.mlpackage"))
        compressed, plain = read_model(tmp_path / "small.mlpackage"), read_model(tmp_path / "plain.mlpackage")
        kinds = computed(compressed.program.functions["main"])
        assert any(kind.startswith("constexpr_") for kind in kinds)
        assert not any(kind.startswith("constexpr_") for kind in computed(plain.program.functions["main"]))
        x = np.random.default_rng(0).standard_normal((1, 16, 4, 4))
        name = compressed.interface.inputs[0].name
        (one,), (other,) = (Predictor(each).predict({name: x}).values() for each in (compressed, plain))
        assert np.array_equal(one, other)
        assert np.abs(one).max() > 0


@pytest.mark.parametrize("bits", [1, 3, 4, 8])
@pytest.mark.parametrize("length", [1, 2, 3])
@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("groups", [(1, 1, 1), (2, 1, 1), (1, 3, 2)])
def test_palettes_of_vectors(ct, bits, length, axis, groups):
    """In every block and along every axis, which coremltools itself makes only where it has scikit-learn."""
    from coremltools.converters.mil.mil.ops.defs.iOS18.compression import (
        constexpr_lut_to_dense,
        constexpr_lut_to_sparse,
    )

    rng = np.random.default_rng(bits)
    indices = rng.integers(0, 2**bits, (4, 6, 2)).astype(np.uint8)
    table = rng.standard_normal((*groups, 2**bits, length)).astype(np.float16)
    mask = rng.integers(0, 2, indices.shape).astype(np.uint8)
    given = {"lut": table, "vector_axis": np.int32(axis)}
    (dense,) = _decompressed("constexpr_lut_to_dense", indices=indices, **given)
    assert np.array_equal(dense, constexpr_lut_to_dense.decompress(indices, table, np.int32(axis)))
    assert dense.dtype == np.float16
    nonzero = indices[mask != 0]
    found = _decompressed("constexpr_lut_to_sparse", indices_mask=mask, indices_nonzero_data=nonzero, **given)
    expected = constexpr_lut_to_sparse.decompress(mask, nonzero, table, np.int32(axis))
    assert all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))


def _decompressed(kind: str, **inputs: np.ndarray) -> tuple[np.ndarray, ...]:
    return CONSTEXPR[kind](Call(operation(kind, {}, **inputs), {}, lambda name: None))


def _compressed(ct, model, way: str):
    cto = ct.optimize.coreml

    def configured(one, **more):
        return cto.OptimizationConfig(global_config=one(weight_threshold=10, **more))

    kind, _, rest = way.partition(" ")
    if kind == "palette":
        return cto.palettize_weights(model, configured(cto.OpPalettizerConfig, nbits=int(rest), mode="uniform"))
    if kind in ("grouped", "scaled"):
        more = {
            "grouped": {"granularity": "per_grouped_channel", "group_size": 8, "mode": "uniform"},
            "scaled": {"enable_per_channel_scale": True, "mode": "uniform"},
        }[kind]
        return cto.palettize_weights(model, configured(cto.OpPalettizerConfig, nbits=4, **more))
    if kind == "sparse":
        model = cto.prune_weights(model, configured(cto.OpMagnitudePrunerConfig, target_sparsity=0.5))
        if rest == "palette":
            config = configured(cto.OpPalettizerConfig, nbits=4, mode="uniform")
            return cto.palettize_weights(model, config, joint_compression=True)
        if rest == "int8":
            config = configured(cto.OpLinearQuantizerConfig, mode="linear_symmetric", dtype="int8")
            return cto.linear_quantize_weights(model, config, joint_compression=True)
        return model
    more = {"granularity": "per_block", "block_size": 4} if rest else {}
    mode, dtype = ("linear", "int8") if kind == "asymmetric" else ("linear_symmetric", kind)
    return cto.linear_quantize_weights(model, configured(cto.OpLinearQuantizerConfig, mode=mode, dtype=dtype, **more))


def test_a_pipeline_of_coremltools(ct, tmp_path):
    from coremltools.converters.mil.mil import Builder as mb

    first = _program(ct, "x", lambda x: mb.add(x=x, y=np.float32(1), name="h"))
    last = _program(ct, "h", lambda x: mb.square(x=x, name="y"))
    with quiet():
        ct.utils.make_pipeline(first, last).save(str(tmp_path / "both.mlpackage"))
    predictor = load(tmp_path / "both.mlpackage")
    assert isinstance(predictor.model.body, tuple)
    assert predictor.predict({"x": [1.0, 2.0, -3.0]})["y"].tolist() == [4, 9, 4]


def test_a_package_of_several_functions(ct, tmp_path):
    from coremltools.converters.mil.mil import Builder as mb

    description = ct.utils.MultiFunctionDescriptor()
    with quiet():
        for name, number in (("one", 1), ("ten", 10)):
            path = str(tmp_path / f"{name}.mlpackage")
            _program(ct, "x", lambda x, number=number: mb.add(x=x, y=np.float32(number), name="y")).save(path)
            description.add_function(path, src_function_name="main", target_function_name=name)
        description.default_function_name = "one"
        ct.utils.save_multifunction(description, str(tmp_path / "both.mlpackage"))
    both = read_model(tmp_path / "both.mlpackage")
    assert Predictor(both).predict({"x": [0, 0, 0]})["y"].tolist() == [1, 1, 1]
    assert Predictor(both, function="ten").predict({"x": [0, 0, 0]})["y"].tolist() == [10, 10, 10]


def _program(ct, name: str, build):
    """A model of iOS 18 with one input of three numbers."""
    from coremltools.converters.mil.mil import Builder as mb
    from coremltools.converters.mil.mil import Function as MilFunction
    from coremltools.converters.mil.mil import Program as MilProgram

    with quiet():
        program = MilProgram()
        with MilFunction({name: mb.placeholder(shape=(3,))}, opset_version=ct.target.iOS18) as function:
            function.set_outputs([build(function.inputs[name])])
        program.add_function("main", function)
        return ct.convert(program, minimum_deployment_target=ct.target.iOS18, compute_precision=ct.precision.FLOAT32)


def test_a_model_that_apple_compiled():
    predictor = load(asset("coreml") / "add_model.mlmodelc")
    names = [feature.name for feature in predictor.interface.inputs]
    assert len(names) == 2
    given = {name: np.full((1, 10), number) for name, number in zip(names, (3, 5), strict=True)}
    (found,) = predictor.predict(given).values()
    assert found.shape == (1, 10)
    assert np.all(found == 15)
