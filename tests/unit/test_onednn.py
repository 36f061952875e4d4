"""Torch's private operations on packed weights are tried before they are used, and done without where they fail."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from sfumato import GenerateRequest
from sfumato.errors import UsageError
from sfumato.runtime import onednn
from sfumato.runtime.checks import check_machine
from sfumato.runtime.choices import Wishes, published_sizes
from sfumato.runtime.facts import machine, read_facts
from sfumato.runtime.plan import plan

available = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this build of torch has no oneDNN")


@pytest.fixture(autouse=True)
def _tried_anew():
    onednn.packable.cache_clear()
    yield
    onednn.packable.cache_clear()


def broken(*_: object, **__: object) -> None:
    raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_linear_pointwise'")


# Operations of another release, which are not there, take other arguments, or do something else.
OTHERS = {
    "gone": ("multiply", broken),
    "other arguments": ("packed_matrix", lambda weight, more: weight),
    "an error of torch": ("convolve", lambda *_: torch.ones(2) + torch.ones(3)),
    "transposed": ("packed_matrix", lambda weight: weight.T.contiguous()),
    "no bias": ("multiply", lambda x, packed, bias: F.linear(x, packed.to_dense())),
    "other numbers": ("convolve", lambda x, packed, bias, padding, stride: F.conv2d(x, packed.to_dense(), bias, stride, padding) * 1.1),
    "other precision": ("multiply", lambda x, packed, bias: F.linear(x, packed.to_dense(), bias).double()),
    "not finite": ("multiply", lambda x, packed, bias: F.linear(x, packed.to_dense(), bias) * float("nan")),
    "other weights": ("packed_filter", lambda weight, padding, stride: (weight * 2).to_mkldnn()),
}  # fmt: skip


@available
def test_filters_are_packed_for_the_shape_of_their_input(monkeypatch):
    packed = []

    def packing(weight, padding, stride, size, pack=onednn.packed_filter):
        packed.append(tuple(size))
        return pack(weight, padding, stride, size)

    monkeypatch.setattr(onednn, "packed_filter", packing)
    own = torch.Generator().manual_seed(1)
    weight, bias = torch.randn(48, 32, 3, 3, generator=own), torch.randn(48, generator=own)
    replaced: list[int] = []
    filters = onednn.Filter(weight, (1, 1), (1, 1), replaced.append)
    assert filters.to_dense() is weight  # nothing is packed before the first input
    shapes = [(2, 32, 8, 8), (2, 32, 8, 8), (1, 32, 8, 8), (2, 32, 16, 24), (2, 32, 8, 8)]
    for shape in shapes:
        x = torch.randn(shape, generator=own).contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(filters(x, bias), F.conv2d(x, weight, bias, padding=1), rtol=1e-4, atol=1e-4)
        assert torch.equal(filters.to_dense(), weight)
    assert packed == [shapes[0], *shapes[2:]]
    assert replaced == [weight.nbytes]


@available
def test_they_are_right_here():
    before = torch.get_rng_state()
    assert onednn.packable(torch.float32)
    assert torch.equal(torch.get_rng_state(), before)
    assert not onednn.packable(torch.float16)
    assert not onednn.packable(torch.float64)
    assert read_facts("cpu").onednn


@pytest.mark.parametrize("how", OTHERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_others_are_not_used(monkeypatch, how, dtype):
    monkeypatch.setattr(onednn, *OTHERS[how])
    assert not onednn.packable(dtype)


@available
def test_pictures_are_drawn_without_them(monkeypatch, ours):
    request = GenerateRequest(prompt="a photo", steps=2, seed=0)
    packed = ours().generate(request)
    assert packed.plan.engine == ("onednn" if "avx2" in read_facts("cpu").instructions else "torch")
    monkeypatch.setattr(onednn, "multiply", broken)
    onednn.packable.cache_clear()
    plain = ours().generate(request)
    assert plain.plan.engine == "torch"
    assert any("lacks working oneDNN operations" in reason for reason in plain.plan.reasons)
    pixels = [torch.frombuffer(bytearray(one.images[0].tobytes()), dtype=torch.uint8).int() for one in (packed, plain)]
    assert (pixels[0] - pixels[1]).abs().max() <= 2


def test_plans_and_the_doctor_know(tmp_path):
    laptop = machine("laptop-8gb")
    without = dataclasses.replace(laptop, onednn=False)
    without.to_json(tmp_path / "facts.json")
    assert type(without).from_json(tmp_path / "facts.json") == without
    sizes, request = published_sizes("sd15"), GenerateRequest(prompt="fog", width=256, height=256)
    assert plan(laptop, sizes, request, Wishes()).engine == "onednn"
    assert plan(without, sizes, request, Wishes()).engine == "torch"
    with pytest.raises(UsageError, match="engine 'onednn' needs a release of torch whose oneDNN operations work here"):
        plan(without, sizes, request, Wishes(engine="onednn"))
    for facts, state in ((laptop, "good"), (without, "poor")):
        (check,) = [check for check in check_machine(facts) if check.name == "oneDNN operations"]
        assert (check.state, bool(check.mend)) == (state, state == "poor")
    assert "oneDNN operations" not in {check.name for check in check_machine(machine("m1-8gb"))}
