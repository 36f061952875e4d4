"""The numeric policy: a table, and what is read out of it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from sfumato.errors import UsageError
from sfumato.runtime.numerics import POLICIES, is_emulated, policy_for, repeat_dtype, softmax_dtype, vae_dtypes

BITS = {"float16": 16, "bfloat16": 16, "float32": 32, "float64": 64}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("upcast", [False, True])
def test_metal_computes_softmax_in_float32_whatever_the_model_says(dtype, upcast):
    assert softmax_dtype("mps", dtype, upcast_attention=upcast) == "float32"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_only_models_that_ask_for_it_are_upcast_elsewhere(device):
    assert softmax_dtype(device, "float16") == "float16"
    assert softmax_dtype(device, "float16", upcast_attention=True) == "float32"
    assert softmax_dtype(device, "bfloat16", upcast_attention=True) == "bfloat16"  # has float32's range


@pytest.mark.parametrize(
    ("device", "native", "expected"),
    [
        ("cuda", True, ("bfloat16", "float32")),
        ("cuda", False, ("float32",)),  # before Ampere
        ("mps", True, ("float32",)),
        ("cpu", False, ("float32",)),
    ],
)
def test_no_autoencoder_computes_in_float16(device, native, expected):
    assert vae_dtypes(device, "float16", native_bfloat16=native) == expected


def test_an_autoencoder_made_for_float16_may_have_it():
    assert vae_dtypes("cuda", "float16", native_bfloat16=True, force_upcast=False)[0] == "float16"
    assert vae_dtypes("mps", "float16", native_bfloat16=True, force_upcast=False) == ("float16", "float32")
    assert vae_dtypes("cpu", "float16", native_bfloat16=False, force_upcast=False) == ("float32",)
    assert vae_dtypes("cuda", "bfloat16", native_bfloat16=True, force_upcast=False) == ("bfloat16",)


def test_an_autoencoder_without_bfloat16_instructions_is_float32():
    assert vae_dtypes("cpu", "bfloat16", native_bfloat16=True) == ("bfloat16",)
    assert vae_dtypes("cpu", "bfloat16", native_bfloat16=False) == ("float32",)


def test_what_is_emulated():
    assert is_emulated("cpu", "float16", native_bfloat16=True)
    assert not is_emulated("cuda", "float16", native_bfloat16=False)
    assert is_emulated("cpu", "bfloat16", native_bfloat16=False)
    assert not is_emulated("cpu", "bfloat16", native_bfloat16=True)
    assert not is_emulated("mps", "float32", native_bfloat16=False)


@pytest.mark.parametrize(("device", "dtype"), POLICIES)
def test_no_row_narrows_and_every_half_precision_can_be_repeated(device, dtype):
    policy = policy_for(device, dtype)
    for other in (policy.softmax, policy.upcast, *policy.vae):
        assert BITS[other] >= BITS[dtype]
    assert repeat_dtype(device, dtype) == ("float32" if BITS[dtype] == 16 else None)
    for native in (True, False):
        assert not any(is_emulated(device, name, native) for name in vae_dtypes(device, dtype, native_bfloat16=native))


def test_a_pair_that_does_not_exist_is_named():
    with pytest.raises(UsageError, match=r"^there is no float64 on mps; use one of .*float16 on mps"):
        policy_for("mps", "float64")


def test_the_table_needs_no_torch():
    code = "import sys, sfumato.runtime.numerics; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
