"""Every way of computing attention is the same attention."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.errors import UsageError
from sfumato.models import UNet2DConditionModel
from sfumato.models.attention import Context, SelfOrCrossAttention, attention_for, chunked, sdpa, sliced
from sfumato.runtime.attention import padded, split


def exact(q, k, v, mask=None):
    """softmax(q k^T / sqrt(d) + mask) v in float64."""
    q, k, v = q.double(), k.double(), v.double()
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    scores = scores if mask is None else scores + mask.double()
    return scores.softmax(-1) @ v


@st.composite
def problems(draw):
    batch, heads = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    queries, keys, width = draw(st.integers(1, 9)), draw(st.integers(1, 9)), draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    q = torch.randn(batch, heads, queries, width, generator=generator) * 3
    k, v = (torch.randn(batch, heads, keys, width, generator=generator) for _ in range(2))
    shape = draw(st.sampled_from([None, (1, 1, queries, keys), (batch, 1, 1, keys), (1, 1, 1, keys), (batch, heads, queries, keys)]))  # fmt: skip
    mask = None if shape is None else torch.randn(shape, generator=generator) * 5
    return q, k, v, mask


@settings(max_examples=200, deadline=None)
@given(problem=problems(), size=st.integers(1, 13), budget=st.integers(1, 2000))
def test_all_agree_with_a_float64_softmax(problem, size, budget):
    want = exact(*problem)
    wide = padded((2, 4), sliced(size))
    for attention in (sdpa, sliced(size), chunked(budget), chunked(budget, size), split(budget, size), wide):
        got = attention(*problem)
        assert got.shape == want.shape
        assert got.dtype == torch.float32
        assert torch.allclose(got.double(), want, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("budget", [1, 100, 4096, 10**9])
def test_scores_stay_below_the_budget(budget, monkeypatch):
    """The largest score matrix handed to torch fits the budget, or is one query of one head where nothing smaller is."""
    import sfumato.models.attention as module

    largest = []

    def watch(q, k, v, mask=None):
        pairs = q.shape[:-2].numel()
        largest.append(pairs * q.shape[-2] * k.shape[-2] * q.element_size())
        return sdpa(q, k, v, mask)

    monkeypatch.setattr(module, "sdpa", watch)
    q, k, v = (torch.randn(2, 3, length, 4) for length in (50, 20, 20))
    chunked(budget)(q, k, v, None)
    assert max(largest) <= max(budget, 20 * 4)


@pytest.mark.parametrize("make", [sliced, chunked])
@pytest.mark.parametrize("size", [0, -1])
def test_sizes_below_one_are_refused(make, size):
    with pytest.raises(UsageError, match="at least"):
        make(size)


def test_pieces_of_keys_take_masks_that_leave_nothing_and_say_nan():
    q, k, v = torch.randn(3, 2, 2, 5, 4, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(1, 1, 5, 5)
    mask[..., 1, :] = -torch.inf
    mask[..., 2, :3] = -torch.inf
    found = split(64, 2)(q, k, v, mask)
    assert torch.equal(found[:, :, 1], torch.zeros(2, 2, 4))
    rest = [0, 2, 3, 4]
    assert torch.allclose(found[:, :, rest].double(), exact(q, k, v, mask)[:, :, rest], atol=1e-6)
    k[0, 0, 3] = torch.nan
    assert split(64, 2)(q, k, v, None)[0, 0].isnan().all()
    half = split(64, 2)(*(x.half() for x in (300 * q, 300 * v, v)), None)  # scores beyond float16
    assert half.dtype == torch.float16
    assert half.isfinite().all()


@pytest.mark.parametrize("sizes", [(0, 1), (1, 0)])
def test_pieces_below_one_are_refused(sizes):
    with pytest.raises(UsageError, match="at least one byte and one key"):
        split(*sizes)


def test_long_attention_is_never_one_sum(monkeypatch):
    """Metal's sums of 32,767 products and more may be wrong (pytorch#195163)."""
    longest = []
    matmul = torch.Tensor.matmul

    def watch(self, other):
        longest.append(max(self.shape[-1], other.shape[-1]))
        return matmul(self, other)

    monkeypatch.setattr(torch.Tensor, "__matmul__", watch)
    q, k, v = (torch.randn(1, 1, length, 4) for length in (3, 36_864, 36_864))
    found = attention_for(torch.device("mps"))(q, k, v, None)
    assert 0 < max(longest) < 32_767
    assert torch.allclose(found.double(), exact(q, k, v), atol=1e-6)


def test_heads_are_padded_to_widths_that_kernels_cover(monkeypatch):
    import sfumato.runtime.attention as module

    seen = []
    fused = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        module.F, "scaled_dot_product_attention", lambda q, k, v, **o: seen.append(q.shape[-1]) or fused(q, k, v, **o)
    )
    attention = padded((32, 64, 72, 80, 96, 128, 256), lambda q, k, v, mask: seen.append("chunks") or v)
    for width, expected in ((40, 64), (80, 80), (160, 256), (64, 64), (512, "chunks")):
        q = torch.randn(1, 2, 9, width)
        out = attention(q, q, q, None)
        assert seen.pop() == expected
        assert out.shape == q.shape


def test_only_metal_needs_pieces():
    assert attention_for(torch.device("cpu")) is sdpa
    assert attention_for(torch.device("cuda")) is sdpa
    assert attention_for(torch.device("mps")) is not sdpa


def test_a_module_uses_the_function_it_was_given():
    module = SelfOrCrossAttention(8, 2, context=6)
    module.attention = lambda q, k, v, mask=None: torch.zeros_like(q)
    out = module(torch.randn(1, 5, 8), Context(torch.randn(1, 3, 6)))
    assert torch.equal(out, module.to_out[0].bias.expand_as(out))


def test_upcast_computes_in_float32_where_float16_would_overflow():
    big = SelfOrCrossAttention(4, 1, upcast=True).half()
    seen = []
    big.attention = lambda q, k, v, mask=None: seen.append(q.dtype) or v
    big(torch.randn(1, 3, 4).half())
    assert seen == [torch.float32]
    small = SelfOrCrossAttention(4, 1, upcast=False).half()
    small.attention = lambda q, k, v, mask=None: seen.append(q.dtype) or v
    small(torch.randn(1, 3, 4).half())
    assert seen[-1] == torch.float16


def test_slices_of_a_model():
    from support.checkpoints import UNET, randomize

    unet = randomize(UNet2DConditionModel(**UNET))
    x, context = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 24)
    with torch.no_grad():
        whole = unet(x, 1, context).sample
        for size in ("auto", "max", 1, 3, None):
            unet.set_attention_slice(size)
            assert torch.allclose(unet(x, 1, context).sample, whole, atol=1e-5)
    assert all(module.attention is sdpa for module in unet.attention_modules())
    for wrong in ("half", 0, 5):
        with pytest.raises(UsageError, match="slice_size"):
            unet.set_attention_slice(wrong)
