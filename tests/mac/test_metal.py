"""SPEC A4 to A8 on Apple's GPU. Virtual Macs have none that torch can use, GitHub's among them."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch

import sfumato
from sfumato import GenerateRequest
from sfumato.images import psnr
from sfumato.models.attention import attention_for, sdpa
from sfumato.runtime.attention import padded
from sfumato.runtime.canaries import checked
from sfumato.runtime.choices import published_sizes
from sfumato.runtime.device import parse_device
from sfumato.runtime.facts import read_facts
from sfumato.runtime.faults import HEAD_WIDTHS, PASSED
from support.processes import MAIN

pytestmark = [
    pytest.mark.mac,
    pytest.mark.skipif(sys.platform != "darwin", reason="needs macOS"),
]
REQUEST = GenerateRequest(prompt=("a red apple, 3d", "a blue heart, flat style"), seed=7, steps=10, guidance_scale=3.0)


@pytest.fixture(scope="module")
def pipe():
    if parse_device(None).type != "mps":
        pytest.skip("this Mac has no GPU that torch can use, as virtual ones have not")
    return sfumato.load(device="mps", dtype=torch.float32)


@pytest.fixture(scope="module")
def drawn(pipe):
    return pipe.generate(REQUEST)


def pixels(image) -> np.ndarray:
    return np.asarray(image, dtype=np.int16)


def test_doctor_knows_this_mac(server, tmp_path):
    """A4."""
    done = server.run(MAIN, ["doctor", "--json"], cwd=tmp_path)
    assert done.code == 0, done.err
    told = json.loads(done.out)
    assert told["facts"]["accelerator"] == parse_device(None).type
    missing = [check for check in told["checks"] if check["state"] == "missing"]
    assert all(check["mend"] for check in missing)


def test_pictures_are_the_cpus(drawn):
    expected = sfumato.load(device="cpu", dtype=torch.float32).generate(REQUEST)
    assert min(psnr(a, b) for a, b in zip(drawn.images, expected.images, strict=True)) >= 40


def test_attention_never_makes_a_tensor_that_metal_refuses(pipe):
    """A5: attention over so many tokens that the scores would be more than 2**32."""
    tokens = 2**16 + 64
    q, k, v = torch.randn(3, 1, 1, tokens, 8, generator=torch.Generator().manual_seed(0))
    found = attention_for(pipe.device)(q.to("mps"), k.to("mps"), v.to("mps"), None).cpu()
    rows = [0, 12345, tokens - 1]
    expected = (q[0, 0, rows] @ k[0, 0].T / 8**0.5).softmax(-1) @ v[0, 0]
    torch.testing.assert_close(found[0, 0, rows], expected, rtol=1e-3, atol=1e-4)


def test_every_canary_passes_on_this_gpu(pipe):
    """A failure is a fault of this torch and macOS that the plan goes around, and one that quirks.py should name."""
    facts = checked(read_facts("mps"), published_sizes("sd15"), again=True)
    assert facts.refused is not None or set(facts.canaries.values()) == {PASSED}, facts.canaries


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [40, 80, 160])
def test_padded_heads_attend_like_unpadded_ones(pipe, dtype, width):
    q, k, v = torch.randn(3, 2, 4, 1024, width, generator=torch.Generator().manual_seed(0))
    found = padded(HEAD_WIDTHS, sdpa)(*(x.to("mps", dtype) for x in (q, k, v)), None).cpu().double()
    exact = sdpa(*(x.to(dtype).double() for x in (q, k, v)))
    assert float((found - exact).abs().max() / exact.abs().max()) < (1e-3 if dtype == torch.float32 else 2e-2)


def test_the_first_call_and_later_calls_are_equal(pipe, drawn):
    """A6: what the priming pass was for."""
    again = pipe.generate(REQUEST)
    assert [image.tobytes() for image in again.images] == [image.tobytes() for image in drawn.images]


def test_slicing_draws_the_same_picture(pipe, drawn):
    """A7."""
    pipe.enable_attention_slicing("max")
    try:
        sliced = pipe.generate(REQUEST)
    finally:
        pipe.disable_attention_slicing()
    for a, b in zip(sliced.images, drawn.images, strict=True):
        assert np.abs(pixels(a) - pixels(b)).max() <= 1


def test_a_picture_of_a_batch_is_the_picture_alone(pipe, drawn):
    """A8."""
    for index, recipe in enumerate(drawn.recipes):
        alone = pipe.generate(GenerateRequest.from_dict(recipe["request"]))
        assert np.abs(pixels(alone.images[0]) - pixels(drawn.images[index])).max() <= 1
