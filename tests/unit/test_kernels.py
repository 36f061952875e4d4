"""The kernels against the same formulas in float64, for every kind of vector, and the building of them."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import subprocess
import tempfile
import time
from contextlib import contextmanager, suppress
from functools import cache
from importlib.resources import files

import psutil
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sfumato.errors import OutputError
from sfumato.kernels import LANES, CompilerError, Kernels, build, kernels_for, variants
from sfumato.models.attention import sdpa

NATIVE = torch.backends.cpu.get_cpu_capability()
# What the vectors of vector.h are as wide as; a processor runs what it is built for and everything narrower.
WIDTHS = {"x86-64-v2": ("DEFAULT", "AVX2", "AVX512"), "x86-64-v3": ("AVX2", "AVX512"), "native": (NATIVE,)}
NARROW = [name for name in ("x86-64-v2", "x86-64-v3") if NATIVE in WIDTHS[name]]
HAS_BFLOAT16 = torch.cpu._is_avx512_bf16_supported()
DTYPES = [torch.float32, *([torch.bfloat16] if HAS_BFLOAT16 else [])]
# A processor with a matrix unit multiplies bfloat16 with that; those without one, with vectors of pairs.
HAS_MATRICES = torch.cpu._is_amx_tile_supported()
KINDS = ["float32", *(["bfloat16"] if HAS_BFLOAT16 else []), *(["bfloat16 vectors"] if HAS_MATRICES else [])]

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="there is no C compiler")


@cache
def kernels_of(kind: str) -> tuple[Kernels, torch.dtype]:
    if kind != "bfloat16 vectors":
        dtype = getattr(torch, kind)
        return kernels_for(dtype), dtype
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setenv("SFUMATO_CACHE", folder)
        patch.setattr(build, "FLAGS", (*build.FLAGS, "-mno-amx-tile", "-mno-amx-bf16"))
        return Kernels(torch.bfloat16), torch.bfloat16


@pytest.fixture(scope="session")
def width_kernels(tmp_path_factory):
    """Float32 kernels for the vectors of this machine and for narrower ones, which otherwise only others would run."""
    built = {"native": kernels_for(torch.float32)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SFUMATO_CACHE", str(tmp_path_factory.mktemp("narrow")))
        for name in NARROW:
            patch.setattr(build, "FLAGS", tuple(flag.replace("native", name) for flag in build.FLAGS))
            built[name] = Kernels(torch.float32)
            patch.undo()
            patch.setenv("SFUMATO_CACHE", str(tmp_path_factory.mktemp("narrow")))
    return built


@pytest.fixture(params=["native", *NARROW])
def kernels(request, width_kernels):
    return width_kernels[request.param]


def exact(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d) + mask) v in float64."""
    q, k, v = q.double(), k.double(), v.double()
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    scores = scores if mask is None else scores + mask.double()
    return scores.softmax(-1) @ v


def distance(got: Tensor, want: Tensor) -> float:
    """The largest difference in units of the largest value."""
    return ((got.double() - want).abs().max() / want.abs().max()).item()


def draw_qkv(shape: tuple[int, int, int, int, int], seed: int = 0, *, interleaved: bool = True, dtype=torch.float32):
    batch, heads, queries, keys, depth = shape
    generator = torch.Generator().manual_seed(seed)
    if interleaved:  # as a projection leaves them
        return tuple(
            torch.randn(batch, length, heads * depth, generator=generator).to(dtype).unflatten(2, (heads, depth)).transpose(1, 2)
            for length in (queries, keys, keys)
        )  # fmt: skip
    return tuple(
        torch.randn(batch, heads, length, depth, generator=generator).to(dtype) for length in (queries, keys, keys)
    )


shapes = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 300), st.integers(1, 700), st.integers(1, 97))


class TestAttention:
    @settings(max_examples=40, deadline=None)
    @given(shape=shapes, seed=st.integers(0, 2**32), interleaved=st.booleans(), size=st.sampled_from([0.0, 1.0, 30.0]))
    @pytest.mark.parametrize("width", ["native", *NARROW])
    def test_is_a_float64_softmax(self, width_kernels, width, shape, seed, interleaved, size):
        q, k, v = draw_qkv(shape, seed, interleaved=interleaved)
        got = width_kernels[width].attention(q * size, k, v)
        # Scores are rounded in float32, the larger the coarser, in torch's own attention as well.
        assert distance(got, exact(q * size, k, v)) < 1e-5 * max(1.0, size / 3)

    @settings(max_examples=40, deadline=None)
    @given(shape=shapes, seed=st.integers(0, 2**32), wide=st.tuples(*[st.booleans()] * 4), kind=st.sampled_from(["normal", "lowest", "-inf"]))  # fmt: skip
    @pytest.mark.parametrize("width", ["native", *NARROW])
    def test_masks_broadcast_in_every_way(self, width_kernels, width, shape, seed, wide, kind):
        q, k, v = draw_qkv(shape, seed)
        whole = (shape[0], shape[1], shape[2], shape[3])
        generator = torch.Generator().manual_seed(seed)
        mask = (
            torch.randn([size if full else 1 for size, full in zip(whole, wide, strict=True)], generator=generator) * 5
        )
        if kind != "normal":
            value = float("-inf") if kind == "-inf" else torch.finfo(torch.float32).min
            mask = mask.masked_fill(torch.rand(mask.shape, generator=generator) < 0.5, value)
            mask[..., 0] = 1  # no row without a key
        assert distance(width_kernels[width].attention(q, k, v, mask), exact(q, k, v, mask)) < 1e-5

    @pytest.mark.parametrize("depth", [1, 7, 15, 16, 17, 33, 40, 64, 80, 160, 161, 512])
    def test_depths(self, kernels, depth):
        q, k, v = draw_qkv((1, 2, 20, 530, depth))
        assert distance(kernels.attention(q, k, v), exact(q, k, v)) < 1e-5

    @pytest.mark.parametrize("keys", [1, 2, 15, 16, 17, 63, 64, 65, 255, 256, 257, 511, 512, 513, 577, 1025])
    @pytest.mark.parametrize("queries", [1, 5, 6, 7, 95, 96, 97])
    def test_edges_of_tiles(self, kernels, keys, queries):
        q, k, v = draw_qkv((1, 2, queries, keys, 24))
        assert distance(kernels.attention(q, k, v), exact(q, k, v)) < 1e-5

    @pytest.mark.skipif(not HAS_BFLOAT16, reason="this processor has no bfloat16 products")
    @pytest.mark.parametrize("kind", KINDS[1:])
    @pytest.mark.parametrize(
        "shape",
        [(2, 8, 256, 256, 40), (1, 3, 97, 700, 33), (2, 2, 40, 77, 160), (1, 1, 20, 9, 7), (1, 2, 33, 257, 512)],
    )
    @pytest.mark.parametrize("masked", [False, True])
    def test_bfloat16_is_as_exact_as_torch(self, kind, shape, masked):
        kernels, _ = kernels_of(kind)
        q, k, v = draw_qkv(shape, dtype=torch.bfloat16)
        mask = (
            torch.randn(shape[2], shape[3], generator=torch.Generator().manual_seed(1)).bfloat16() if masked else None
        )
        want = exact(q, k, v, mask)
        ours = (kernels.attention(q, k, v, mask).double() - want).square().mean().sqrt()
        torchs = (sdpa(q, k, v, mask).double() - want).square().mean().sqrt()
        assert ours < 1.5 * torchs
        assert ours < 0.01 * want.square().mean().sqrt()

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("size", [1e4, -1e4, 1e15, -1e15])
    def test_huge_scores_pick_one_key(self, kind, size):
        """A score that beats all others by far takes all the weight, wherever among the keys it is."""
        kernels, dtype = kernels_of(kind)
        q, k, v = (x.contiguous() for x in draw_qkv((1, 2, 33, 600, 8), dtype=dtype))
        q, k = torch.zeros_like(q), torch.zeros_like(k)
        q[..., 0] = 100
        for at in (0, 299, 511, 512, 599):
            k[..., 0] = 0
            k[..., at, 0] = size / 100
            got = kernels.attention(q, k, v)
            assert got.isfinite().all()
            if size > 0:
                assert torch.equal(got, v[:, :, at : at + 1].expand_as(got))
            else:
                assert distance(got, exact(q, k, v)) < (1e-5 if dtype == torch.float32 else 1e-2)

    def test_scores_beyond_float32(self, kernels):
        """A score of minus infinity weighs nothing; one of plus infinity has no softmax."""
        q, k, v = (x.contiguous() for x in draw_qkv((1, 1, 20, 40, 4)))
        q[..., 0], k[:, :, 3, 0] = 1e30, -1e30
        k[:, :, [*range(3), *range(4, 40)], 0] = 0
        want = sdpa(q, k, v)
        assert want.isfinite().all()
        assert distance(kernels.attention(q, k, v), want.double()) < 1e-5
        k[:, :, 3, 0] = 1e30
        assert kernels.attention(q, k, v).isnan().all()

    @pytest.mark.parametrize("kind", KINDS)
    def test_zeros(self, kind):
        kernels, dtype = kernels_of(kind)
        _, _, v = draw_qkv((1, 2, 30, 77, 40), dtype=dtype)
        got = kernels.attention(torch.zeros(1, 2, 30, 40, dtype=dtype), torch.zeros_like(v), v)
        assert distance(got, v.double().mean(2, keepdim=True).expand_as(got)) < (
            1e-5 if dtype == torch.float32 else 1e-2
        )

    @pytest.mark.parametrize("keys", [5, 70, 600])
    def test_rows_without_a_key(self, kernels, keys):
        """Masked by -inf throughout, a row is zero; by the lowest number, the average: both as torch has it."""
        q, k, v = draw_qkv((2, 2, 20, keys, 8))
        for value in (float("-inf"), torch.finfo(torch.float32).min):
            mask = torch.zeros(2, 1, 20, keys)
            mask[1, :, 7] = value
            mask[0, :, 3, : keys // 2] = value  # and a block of keys without one, before others
            got = kernels.attention(q, k, v, mask)
            assert torch.allclose(got, sdpa(q, k, v, mask), atol=1e-5)
            assert torch.equal(got[1, :, 7], torch.zeros(2, 8)) == (value == float("-inf"))

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize("where", [0, 1, 2])
    @pytest.mark.parametrize("row", [0, 20, 518])
    @pytest.mark.parametrize("masked", [False, True])
    def test_what_is_not_finite_shows(self, kind, value, where, row, masked):
        kernels, dtype = kernels_of(kind)
        inputs = [x.contiguous() for x in draw_qkv((2, 2, 519, 519, 40), dtype=dtype)]
        inputs[where][1, 1, row, 11] = value
        mask = torch.zeros(519, 519).masked_fill(torch.ones(519, 519).tril() == 0, float("-inf")) if masked else None
        got = kernels.attention(*inputs, mask)
        reached = got[1, 1].isfinite().logical_not().any(-1)
        if where == 0:
            assert reached.nonzero().flatten().tolist() == [row]
        elif value != value or where == 2:
            assert reached[row:].all()  # also where the mask hides the key: NaN - inf and 0 NaN are NaN
        else:  # the sign of the query says whether the score is +inf, which has no softmax, or -inf, which weighs nothing
            assert torch.equal(reached[row:], sdpa(*inputs, mask)[1, 1].isfinite().logical_not().any(-1)[row:])
        assert got[0].isfinite().all()
        assert got[1, 0].isfinite().all()

    def test_nan_in_a_mask_shows(self, kernels):
        q, k, v = draw_qkv((1, 1, 20, 90, 8))
        mask = torch.zeros(20, 90)
        mask[4, 80] = float("nan")
        assert kernels.attention(q, k, v, mask).isnan().any(-1).nonzero()[:, 2].tolist() == [4]

    @pytest.mark.parametrize("kind", KINDS)
    def test_images_and_heads_are_strangers(self, kind):
        kernels, dtype = kernels_of(kind)
        q, k, v = draw_qkv((3, 4, 100, 130, 20), dtype=dtype)
        whole = kernels.attention(q, k, v)
        for image in range(3):
            for head in range(4):
                part = (slice(image, image + 1), slice(head, head + 1))
                alone = kernels.attention(*(x[part].contiguous() for x in (q, k, v)))
                assert torch.equal(alone, whole[part])

    @pytest.mark.parametrize("kind", KINDS)
    def test_heads_lie_side_by_side(self, kind):
        kernels, dtype = kernels_of(kind)
        q, k, v = draw_qkv((2, 3, 50, 20, 8), dtype=dtype)
        out = kernels.attention(q, k, v)
        assert out.shape == q.shape
        assert out.dtype == dtype
        assert out.transpose(1, 2).flatten(2).data_ptr() == out.data_ptr()

    def test_layouts_do_not_matter(self, kernels):
        q, k, v = draw_qkv((2, 3, 50, 70, 8), interleaved=False)
        want = kernels.attention(q, k, v)
        backwards = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v)]
        assert torch.equal(kernels.attention(*backwards), want)
        one = kernels.attention(q, k[:1].expand_as(k), v)  # a stride of zero
        assert torch.equal(one, kernels.attention(q, k[:1].repeat(2, 1, 1, 1), v))


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("kind", KINDS)
def test_threads_do_not_matter(kind, threads):
    kernels, dtype = kernels_of(kind)
    q, k, v = draw_qkv((2, 2, 200, 300, 40), dtype=dtype)
    x = torch.randn(2, 32, 60, 50).to(dtype).to(memory_format=torch.channels_last)
    weight, bias, gate = torch.randn(32), torch.randn(32), torch.randn(77, 64).to(dtype)
    results = []
    for count in (1, 2, 5):
        threads(count)
        norm = kernels.group_norm(x, 8, weight, bias, 1e-5, None, silu=True)
        results.append((kernels.attention(q, k, v), norm, kernels.geglu(gate)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def normalized(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, added: Tensor | None, silu: bool
) -> Tensor:
    x = x.double() if added is None else x.double() + added.double()[:, :, None, None]
    parts = x.unflatten(1, (groups, -1)).flatten(2)
    parts = (parts - parts.mean(2, keepdim=True)) / (parts.var(2, keepdim=True, correction=0) + eps).sqrt()
    x = parts.view(x.shape) * weight.double()[:, None, None] + bias.double()[:, None, None]
    return F.silu(x) if silu else x


class TestGroupNorm:
    @settings(max_examples=60, deadline=None)
    @given(
        batch=st.integers(1, 3),
        vectors=st.integers(1, 9),
        groups=st.sampled_from([1, 2, 4, 8, 16, 0]),
        size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
        steered=st.booleans(),
        silu=st.booleans(),
        seed=st.integers(0, 2**32),
    )
    @example(batch=1, vectors=1, groups=8, size=(1, 1), steered=False, silu=False, seed=10481)  # two numbers, close
    @example(batch=1, vectors=1, groups=16, size=(1, 1), steered=True, silu=False, seed=75)  # x and added cancel
    @pytest.mark.parametrize("width", ["native", *NARROW])
    def test_is_the_formula(self, width_kernels, width, batch, vectors, groups, size, steered, silu, seed):
        generator = torch.Generator().manual_seed(seed)
        channels = vectors * LANES
        x = torch.randn(batch, channels, *size, generator=generator).to(memory_format=torch.channels_last) * 3 + 1
        weight, bias = torch.randn(2, channels, generator=generator)
        added = torch.randn(batch, channels, generator=generator) * 4 if steered else None
        problem = (x, groups or channels, weight, bias, 1e-5, added)
        got = width_kernels[width].group_norm(*problem, silu=silu)
        assert got.is_contiguous(memory_format=torch.channels_last)
        want = normalized(*problem, silu)
        # One multiplication and one addition a number, x * scale + shift: each rounds by the size of what it is given, which
        # is large beside the result where numbers lie close together, or where x and added cancel.
        steer = torch.zeros(batch, channels) if added is None else added
        members = (x.double() + steer[..., None, None]).flatten(2).reshape(batch, problem[1], -1)
        given = (x.double().abs() + steer.abs()[..., None, None]).flatten(2).reshape(batch, problem[1], -1).amax(-1)
        lost = 2**-22 * given / (members.var(-1, unbiased=False) + 1e-5).sqrt() * weight.abs().max()
        lost = lost.repeat_interleave(channels // problem[1], dim=1)[..., None, None]
        assert ((got.double() - want).abs() <= 2e-5 + 1e-5 * want.abs() + lost).all()

    @pytest.mark.parametrize("size", [(1, 1), (31, 33), (64, 64)])
    @pytest.mark.parametrize("ratio", [1e3, -1e3])
    def test_a_mean_far_from_zero(self, kernels, size, ratio):
        """Naive sums of squares lose all six digits here."""
        x = (torch.randn(2, 32, *size) + ratio).to(memory_format=torch.channels_last)
        problem = (x, 4, torch.ones(32), torch.zeros(32), 1e-6, torch.full((2, 32), ratio / 2))
        # One rounding of x * scale, of the size of the mean; the statistics themselves are exact.
        assert (kernels.group_norm(*problem, silu=False).double() - normalized(*problem, False)).abs().max() < 4e-4

    @pytest.mark.parametrize("size", [10, 50, 500])
    def test_an_outlier_in_the_corner(self, kernels, size):
        x = torch.randn(1, 32, 128, 128).to(memory_format=torch.channels_last)
        x[:, :, 0, 0] = size
        problem = (x, 32, torch.ones(32), torch.zeros(32), 1e-6, None)
        # Sums around such a pixel, instead of around the mean of several, miss by 3e-5, 7e-4 and 5e-3.
        assert distance(kernels.group_norm(*problem, silu=False), normalized(*problem, False)) < (
            1e-5 if size < 500 else 5e-5
        )

    def test_means_apart_within_a_group(self, kernels):
        x = (torch.randn(1, 32, 20, 20) + torch.linspace(-300, 300, 32)[:, None, None]).to(
            memory_format=torch.channels_last
        )
        problem = (x, 2, torch.ones(32), torch.zeros(32), 1e-6, None)
        assert distance(kernels.group_norm(*problem, silu=False), normalized(*problem, False)) < 1e-5

    @pytest.mark.skipif(not HAS_BFLOAT16, reason="this processor has no bfloat16 products")
    @pytest.mark.parametrize("silu", [False, True])
    def test_bfloat16_rounds_once(self, silu):
        x = torch.randn(2, 64, 30, 30).bfloat16().to(memory_format=torch.channels_last)
        problem = (x, 8, torch.randn(64), torch.randn(64), 1e-5, torch.randn(2, 64))
        got, want = kernels_for(torch.bfloat16).group_norm(*problem, silu=silu), normalized(*problem, silu)
        assert ((got.double() - want).abs() <= want.abs() * 2**-8 + 1e-3).all()

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    @pytest.mark.parametrize("place", [(0, 0), (9, 9)])
    def test_what_is_not_finite_shows_in_its_group(self, dtype, value, place):
        x = torch.randn(2, 32, 10, 10).to(dtype).to(memory_format=torch.channels_last)
        x[1, 9, *place] = value
        got = kernels_for(dtype).group_norm(x, 4, torch.ones(32), torch.zeros(32), 1e-5, None, silu=True)
        assert got[1, 8:16].isnan().all()
        assert got[0].isfinite().all()
        assert got[1, :8].isfinite().all()
        assert got[1, 16:].isfinite().all()

    def test_silu_far_out(self, kernels):
        """The exponential leaves the range of float32; the result does not."""
        x = torch.zeros(1, 16, 1, 1)
        bias = torch.tensor([-1e30, -1e4, -200, -128, -127, -100, -89, -88, -87, -30, 30, 88, 100, 200, 1e4, 1e30])
        got = kernels.group_norm(
            x.to(memory_format=torch.channels_last), 16, torch.ones(16), bias, 1e-5, None, silu=True
        )
        assert torch.allclose(got.flatten(), F.silu(bias), rtol=1e-5, atol=1e-30)


class TestGEGLU:
    @settings(max_examples=60, deadline=None)
    @given(rows=st.integers(1, 70), vectors=st.integers(1, 20), size=st.sampled_from([0.0, 0.1, 1.0, 5.0, 100.0]), seed=st.integers(0, 2**32))  # fmt: skip
    @pytest.mark.parametrize("width", ["native", *NARROW])
    def test_is_the_formula(self, width_kernels, width, rows, vectors, size, seed):
        x = torch.randn(rows, 2 * vectors * LANES, generator=torch.Generator().manual_seed(seed)) * size
        value, gate = x.double().chunk(2, -1)
        got = width_kernels[width].geglu(x)
        assert ((got.double() - value * F.gelu(gate)).abs() <= 4e-7 * (value * gate).abs() + 1e-30).all()

    def test_every_gate(self, kernels):
        gate = torch.cat(
            [torch.linspace(-20, 20, 4096), torch.tensor([0.0, -0.0, 1e-30, 1e5, -1e5, 1e19, 1e30, -1e30])]
        )
        gate = F.pad(gate, (0, -len(gate) % LANES))
        want = F.gelu(gate.double())
        got = kernels.geglu(torch.cat([torch.ones_like(gate), gate])[None])[0]
        assert got.isfinite().all()
        assert ((got.double() - want).abs() <= 4e-7 * gate.abs().double()).all()

    @pytest.mark.skipif(not HAS_BFLOAT16, reason="this processor has no bfloat16 products")
    def test_bfloat16_rounds_once(self):
        x = torch.randn(3, 50, 128).bfloat16() * 2
        value, gate = x.double().chunk(2, -1)
        want = value * F.gelu(gate)
        got = kernels_for(torch.bfloat16).geglu(x)
        # The exponential has eight bits as well, so a result may be the next but one.
        assert ((got.double() - want).abs() <= 2**-8 * want.abs() + 2e-4).all()

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    @pytest.mark.parametrize("column", [3, 35])
    def test_what_is_not_finite_shows(self, dtype, value, column):
        x = torch.rand(5, 64).to(dtype)
        x[2, column] = value
        finite = kernels_for(dtype).geglu(x).isfinite()
        assert not finite[2, 3]
        assert finite.sum() == finite.numel() - 1

    def test_strides(self, kernels):
        x = torch.randn(8, 4, 64).transpose(0, 1)
        assert torch.equal(kernels.geglu(x), kernels.geglu(x.contiguous()))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kernels"


def fake_compiler(folder, script: str):
    path = folder / "fake-cc"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def has_ended(group: int) -> None:
    """Fail if a process of a group still runs some seconds from now."""
    for _ in range(100):
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        if not found:
            return
        time.sleep(0.1)
    pytest.fail(f"{found} still run")


def library_in(folder):
    """The path of the one library in a cache."""
    (library,) = folder.glob("*.so")
    return library


@pytest.fixture
def library(cache):
    """A library in the cache that this process has not loaded: it would not be read again, and may not be damaged."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "_opened", lambda path: None)
        build.loaded(bfloat16=False)
    return library_in(cache)


class TestBuild:
    def test_is_built_once(self, cache, caplog):
        with caplog.at_level(logging.INFO, "sfumato"):
            build.loaded(bfloat16=False)
            library = library_in(cache)
            stamp = library.stat().st_mtime_ns
            build.loaded(bfloat16=False)
        assert library.stat().st_mtime_ns == stamp
        assert sorted(path.suffix for path in cache.iterdir()) == [".sha256", ".so"]
        assert caplog.messages == [f"building the float32 kernels with {build.compiler()}"]

    @pytest.mark.parametrize("suffix", [".so", ".sha256"])
    @pytest.mark.parametrize("damage", [b"", b"\xff\xfe not what it was", None])
    def test_a_damaged_one_is_built_again(self, library, caplog, suffix, damage):
        victim = library.with_suffix(suffix)
        if damage is None:
            victim.unlink()
        else:
            victim.write_bytes(damage)
        with caplog.at_level(logging.WARNING, "sfumato"):
            again = Kernels(torch.float32)
        q = torch.ones(1, 1, 4, 8)
        assert torch.allclose(again.attention(q, q, q), q)
        # A library that is simply not there is no surprise.
        assert [str(library) in line and "damaged" in line for line in caplog.messages] == ([] if (suffix, damage) == (".so", None) else [True])  # fmt: skip

    def test_a_whole_one_that_does_not_load_is_built_again(self, library, caplog):
        library.write_bytes(b"not a library")
        library.with_suffix(".sha256").write_bytes(build._digest(b"not a library"))
        with caplog.at_level(logging.WARNING, "sfumato"):
            Kernels(torch.float32)
        assert "damaged" in caplog.text
        assert library.read_bytes() != b"not a library"

    def test_no_compiler(self, cache, monkeypatch):
        monkeypatch.setenv("PATH", "")
        monkeypatch.delenv("CC", raising=False)
        assert build.compiler() is None
        with pytest.raises(CompilerError, match=r"no C compiler \(cc, gcc or clang\); install one"):
            build.loaded(bfloat16=False)

    def test_cc_wins(self, cache, monkeypatch, tmp_path):
        mine = fake_compiler(tmp_path, "exit 1")
        monkeypatch.setenv("CC", str(mine))
        assert build.compiler() == str(mine)

    @pytest.mark.parametrize(
        ("script", "message"),
        [
            ("echo 'cc: fatal error: out of luck' >&2; echo more >&2; exit 1", "could not build the fast kernels: cc: fatal error: out of luck$"),
            ("echo 'In file x:' >&2; echo 'x:3: error: bad' >&2; exit 1", "could not build the fast kernels: x:3: error: bad$"),
            ("echo 'bad luck' >&2; exit 1", "could not build the fast kernels: bad luck$"),
            ("exit 3", "could not build the fast kernels: it ended with exit status 3$"),
            ("exit 0", "could not build the fast kernels: it made no library$"),
            ("yes 'error' | head -c 9000000 >&2; exit 1", "could not build the fast kernels: error$"),
            ("read line; echo \"error: $line.\" >&2; exit 1", "could not build the fast kernels: error: .$"),
            ('while [ "$1" != -o ]; do shift; done; echo nonsense > "$2"', "compiled but cannot be loaded: "),
            (f'while [ "$1" != -o ]; do shift; done; echo "int unknown;" | {shutil.which("cc")} -x c -shared -o "$2" -', "compiled but cannot be loaded: .*attention"),
        ],
    )  # fmt: skip
    def test_a_compiler_that_fails(self, cache, monkeypatch, tmp_path, script, message):
        monkeypatch.setenv("CC", str(fake_compiler(tmp_path, script)))
        for _ in range(2):
            with pytest.raises(CompilerError, match=message):
                build.loaded(bfloat16=False)
        assert list(cache.glob("*.so")) == []
        fake_compiler(tmp_path, f'exec {shutil.which("cc")} "$@"')  # as soon as it is mended, it is used
        build.loaded(bfloat16=False)

    def test_a_compiler_that_is_none(self, cache, monkeypatch, tmp_path):
        mine = fake_compiler(tmp_path, "")
        mine.write_bytes(b"\x7fELF, and no more")
        monkeypatch.setenv("CC", str(mine))
        with pytest.raises(CompilerError, match=r"could not build the fast kernels: .*Exec format error"):
            build.loaded(bfloat16=False)

    @pytest.mark.parametrize("way", ["exec sleep 60", "sleep 60", "sleep 60 & wait", "trap '' TERM INT; sleep 60"])
    def test_a_compiler_that_hangs_is_ended_with_all_it_started_and_remembered(self, cache, monkeypatch, tmp_path, way):
        mine = fake_compiler(tmp_path, f"echo $$ > {tmp_path}/pid; {way}")
        monkeypatch.setenv("CC", str(mine))
        monkeypatch.setattr(build, "SECONDS", 0.3)
        monkeypatch.setattr(build, "QUICK_SECONDS", 0.1)
        with pytest.raises(CompilerError, match=r"did not finish within 0\.3 s$"):
            build.loaded(bfloat16=False)
        has_ended(int((tmp_path / "pid").read_text()))
        (tmp_path / "pid").unlink()
        for bfloat16 in (False, True):
            with pytest.raises(
                CompilerError, match=rf"did not finish within 0\.3 s; delete {cache}/failed-.* to try again$"
            ):
                build.loaded(bfloat16=bfloat16)
        assert not (tmp_path / "pid").exists()
        (failure,) = cache.glob("failed-*")
        os.utime(failure, (0, time.time() - 2 * build.REMEMBERED_SECONDS))
        monkeypatch.setattr(build, "SECONDS", 60)
        fake_compiler(tmp_path, f'exec {shutil.which("cc")} "$@"')
        build.loaded(bfloat16=False)

    def test_an_interruption_ends_the_compiler(self, cache, monkeypatch, tmp_path):
        mine = fake_compiler(tmp_path, f"echo $$ > {tmp_path}/pid; sleep 60")
        monkeypatch.setenv("CC", str(mine))

        def interrupt(process, timeout=None):
            while not (tmp_path / "pid").exists():
                time.sleep(0.01)
            monkeypatch.undo()
            raise KeyboardInterrupt

        monkeypatch.setattr(subprocess.Popen, "wait", interrupt)
        monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
        with pytest.raises(KeyboardInterrupt):
            build.loaded(bfloat16=False)
        has_ended(int((tmp_path / "pid").read_text()))

    def test_the_compilers_own_temporary_files_are_ours_to_clear(self, cache, monkeypatch, tmp_path):
        temporary = tmp_path / "temporary"
        temporary.mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(temporary))
        monkeypatch.setenv(
            "CC", str(fake_compiler(tmp_path, 'touch "$TMPDIR/cc-own"; echo "error: $TMPDIR" >&2; exit 1'))
        )
        with pytest.raises(CompilerError, match=f"error: {temporary}/"):
            build.loaded(bfloat16=False)
        assert list(temporary.iterdir()) == []

    def test_what_a_killed_build_left_is_cleared_by_the_next(self, cache, monkeypatch, tmp_path):
        temporary = tmp_path / "temporary"
        left = temporary / ".sfumato-kernels.999999999.0123abcd.new"
        left.mkdir(parents=True)
        (left / "vector.h").write_text("left")
        monkeypatch.setattr(tempfile, "tempdir", str(temporary))
        build.loaded(bfloat16=False)
        assert list(temporary.iterdir()) == []

    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.ENOENT])
    @pytest.mark.parametrize("call", ["mkdir", "write_bytes"])
    def test_no_room_for_temporary_files(self, cache, monkeypatch, number, call):
        def fails(self, *_, **__):
            raise OSError(number, os.strerror(number))

        build.private_folder("kernels")
        monkeypatch.setattr(build.Path, call, fails)
        with pytest.raises(CompilerError, match=f"need space for temporary files .*{os.strerror(number)}"):
            build.loaded(bfloat16=False)

    def test_a_cache_that_cannot_be_written(self, tmp_path, monkeypatch, caplog):
        (tmp_path / "file").touch()
        monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path / "file" / "cache"))
        with caplog.at_level(logging.WARNING, "sfumato"):
            for _ in range(2):
                Kernels(torch.float32)
        assert caplog.messages == [f"the cache in {tmp_path}/file/cache cannot be used (it is not a folder); set SFUMATO_CACHE to a folder of your own"]  # fmt: skip

    def test_a_full_cache(self, cache, monkeypatch, caplog):
        @contextmanager
        def full(path, **_):
            raise OutputError("no space left") from OSError(errno.ENOSPC, "No space left on device")
            yield

        monkeypatch.setattr(build, "replacing", full)
        with caplog.at_level(logging.WARNING, "sfumato"):
            Kernels(torch.float32)
        assert caplog.messages == [f"the cache in {cache.parent} cannot be used (No space left on device); set SFUMATO_CACHE to a folder of your own"]  # fmt: skip

    def test_the_key_is_all_it_depends_on(self, cache, monkeypatch, tmp_path):
        """Another precision, source, processor, compiler or set of flags is another library."""
        monkeypatch.setattr(build, "_build", lambda command, sources, scratch: scratch)
        monkeypatch.setattr(build, "_kept", lambda made, library: paths.add(library.name))
        paths: set[str] = set()
        build.loaded(bfloat16=False)
        build.loaded(bfloat16=True)
        with monkeypatch.context() as patch:
            patch.setattr(build, "SOURCES", build.SOURCES[:2])
            build.loaded(bfloat16=False)
        with monkeypatch.context() as patch:
            patch.setattr(build, "FLAGS", (*build.FLAGS, "-g"))
            build.loaded(bfloat16=False)
        with monkeypatch.context() as patch:
            patch.setattr(build, "_processor", lambda: "another")
            build.loaded(bfloat16=False)
        with monkeypatch.context() as patch:
            patch.setenv("CC", str(fake_compiler(tmp_path, "")))
            build.loaded(bfloat16=False)
        build.loaded(bfloat16=False)
        assert len(paths) == 6
        assert {name.split("-")[0] for name in paths} == {"float32", "bfloat16"}

    @pytest.mark.parametrize("target", [["-march=native"], *([f"-march={name}"] for name in NARROW), *([["-march=native", "-DBFLOAT16"]] if HAS_BFLOAT16 else []), *([["-march=native", "-mno-amx-tile", "-mno-amx-bf16", "-DBFLOAT16"]] if HAS_MATRICES else [])], ids=" ".join)  # fmt: skip
    def test_the_compiler_has_nothing_to_say(self, target, tmp_path):
        flags = [flag for flag in build.FLAGS if flag != "-w" and not flag.startswith("-march")]
        for name in ("attention.c", "normalize.c"):
            done = subprocess.run(
                [build.compiler(), *flags, *target, "-Wall", "-Wextra", "-o", str(tmp_path / "x.so"), str(files("sfumato.kernels").joinpath(name)), "-lm"],
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ("fpu sse2", {"float32": [], "bfloat16": []}),
        ("avx2 fma f16c bmi1 bmi2 movbe abm", {"float32": ["avx2"], "bfloat16": []}),
        ("avx2 fma f16c bmi1 bmi2 movbe abm avx512f avx512bw avx512cd avx512dq avx512vl", {"float32": ["avx512", "avx2"], "bfloat16": []}),
        ("avx2 fma f16c bmi1 bmi2 movbe abm avx512f avx512bw avx512cd avx512dq avx512vl avx512_bf16", {"bfloat16": ["avx512-bf16"]}),
        ("avx2 fma f16c bmi1 bmi2 movbe abm avx512f avx512bw avx512cd avx512dq avx512vl avx512_bf16 amx_tile amx_bf16", {"bfloat16": ["amx", "avx512-bf16"]}),
    ],
)  # fmt: skip
def test_a_processor_gets_the_variants_it_can_run(monkeypatch, tmp_path, flags, names):
    (tmp_path / "cpuinfo").write_text(f"processor : 0\nflags\t\t: {flags}\n")
    monkeypatch.setattr(variants, "Path", lambda _: tmp_path / "cpuinfo")
    monkeypatch.setattr(variants.sys, "platform", "linux")
    monkeypatch.setattr(variants.platform, "machine", lambda: "x86_64")
    assert {dtype: [one.name for one in variants.fitting(dtype)] for dtype in names} == names


# What runs when a library is loaded, and says that it did.
PLANTED = '#include <stdlib.h>\n__attribute__((constructor)) static void run(void) { system("touch %s"); }\n'
STRANGER = 54321


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="Windows has no such owners")
class TestTrust:
    """A library runs as us, so one that others could have made or changed is not loaded."""

    @pytest.fixture
    def planted(self, library, tmp_path):
        """A cache in which somebody has replaced the library and its digest."""
        source, ran = tmp_path / "planted.c", tmp_path / "ran"
        source.write_text(PLANTED % ran)
        subprocess.run([build.compiler(), "-shared", "-fPIC", "-o", tmp_path / "planted.so", source], check=True)
        content = (tmp_path / "planted.so").read_bytes()
        library.write_bytes(content)
        library.with_suffix(".sha256").write_bytes(build._digest(content))
        return library, ran

    @pytest.mark.parametrize("mode", [0o777, 0o720, 0o702, 0o1777])
    @pytest.mark.parametrize("which", ["library", "digest", "kernels", "cache"])
    def test_what_others_may_write_is_not_loaded(self, planted, cache, caplog, which, mode):
        library, ran = planted
        places = {"library": library, "digest": library.with_suffix(".sha256"), "kernels": cache, "cache": cache.parent}
        places[which].chmod(mode)
        self.draws_without(library, ran, caplog, replaced=which in ("library", "digest"))

    @pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() != 0, reason="only root can give files away")
    @pytest.mark.parametrize("which", ["library", "digest", "kernels", "cache"])
    def test_what_belongs_to_others_is_not_loaded(self, planted, cache, caplog, which):
        library, ran = planted
        places = {"library": library, "digest": library.with_suffix(".sha256"), "kernels": cache, "cache": cache.parent}
        os.chown(places[which], STRANGER, STRANGER)
        self.draws_without(library, ran, caplog, replaced=which in ("library", "digest"))

    def test_a_link_is_not_loaded(self, planted, tmp_path, caplog):
        library, ran = planted
        library.unlink()
        library.symlink_to(tmp_path / "planted.so")
        self.draws_without(library, ran, caplog, replaced=True)

    def test_a_cache_that_others_may_rename_is_not_used(self, planted, cache, caplog, tmp_path, monkeypatch):
        library, ran = planted
        tmp_path.chmod(0o777)
        self.draws_without(library, ran, caplog, replaced=False)
        tmp_path.chmod(0o1777)  # as /tmp: only the owner may
        Kernels(torch.float32)
        assert ran.exists()  # that is, the cache is taken again

    def draws_without(self, library, ran, caplog, *, replaced):
        content = library.read_bytes()
        with caplog.at_level(logging.WARNING, "sfumato"):
            kernels = [Kernels(torch.float32) for _ in range(2)]
        q = torch.ones(1, 1, 20, 8)
        assert all(torch.allclose(each.attention(q, q, q), q) for each in kernels)
        assert not ran.exists()
        (said,) = caplog.messages
        assert (
            "damaged" if replaced else "because other users could change them there; set SFUMATO_CACHE to a folder"
        ) in said
        assert (library.read_bytes() != content) == replaced

    def test_folders_are_made_for_us_alone(self, monkeypatch, tmp_path):
        before = os.umask(0)
        try:
            monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path / "new" / "cache"))
            build.loaded(bfloat16=False)
        finally:
            os.umask(before)
        made = [tmp_path / "new", *sorted((tmp_path / "new").rglob("*"))]
        assert [oct(path.stat().st_mode & 0o777) for path in made] == ["0o700"] * 3 + ["0o600"] * 2
        assert build._reopened(library_in(tmp_path / "new" / "cache" / "kernels")) is not None


def test_kernels_are_loaded_once():
    assert kernels_for(torch.float32) is kernels_for(torch.float32)


def test_a_failure_is_met_once(monkeypatch):
    from sfumato.kernels import library

    def fails(bfloat16):
        tried.append(bfloat16)
        raise CompilerError("no luck")

    tried: list[bool] = []
    monkeypatch.setattr(library, "loaded", fails)
    library._attempted.cache_clear()
    for _ in range(3):
        with pytest.raises(CompilerError, match="no luck"):
            kernels_for(torch.float32)
    library._attempted.cache_clear()
    assert tried == [False]
