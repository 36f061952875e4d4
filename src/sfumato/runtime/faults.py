"""The consequences of a machine's canaries (canaries.py) for plans, as plain values. Does not import torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sfumato.runtime.numerics import best_dtype, softmax_dtype
from sfumato.runtime.quirks import release

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sfumato.runtime.facts import Facts

__all__ = [
    "ANSWERS",
    "HALF",
    "HEAD_WIDTHS",
    "NETWORK",
    "PASSED",
    "SPLIT_KEYS",
    "attention_for_dtypes",
    "best_for",
    "fault",
    "half_failed",
    "proved",
    "told",
    "unusable",
]

PASSED = "passed"
# The half precision that a plan may choose by itself on each type of device.
HALF = {"cpu": "bfloat16", "cuda": "float16", "mps": "bfloat16"}
# Head widths that Metal's fused attention supports, to which others are padded, and the first torch version that has it
# (pytorch#181575).
HEAD_WIDTHS, FUSED_ON_METAL = (32, 64, 72, 80, 96, 128, 256), (2, 13)
# On Metal, sums of 32,767 products or more may be wrong (pytorch#195163).
SPLIT_KEYS = 2**14

# Operations that every network needs: a failure in half precision leads to float32, one in float32 to the CPU.
NETWORK = {
    "split": "attention in pieces of its keys", "linear": "linear layers", "row": "linear layers of a single row",
    "conv": "convolution", "norm": "group normalization", "geglu": "gated feed-forward layers",
    "upsample": "enlarging", "sum": "the scheduler's sums",
}  # fmt: skip
ANSWERS = {
    "fused": ("fused attention", "attention is computed in chunks"),
    "chunks": ("attention in chunks", "attention is computed in pieces of its keys, by plain products"),
    "mask": ("masked attention", "attention is computed in pieces of its keys, by plain products"),
    "reduction": ("sums of 36,864 products", f"attention takes at most {SPLIT_KEYS:,} keys at a time"),
    "batch": ("convolution of a batch", "images and both halves of guidance are convolved one at a time"),
    "layout": ("channels-last convolution", "weights stay contiguous"),
}


def proved(facts: Facts, kind: str, name: str, dtype: str) -> bool:
    """Return whether a canary was run on this kind of device in this precision, and passed."""
    return kind == facts.accelerator and facts.canaries.get(f"{name} {dtype}") == PASSED


def fault(facts: Facts, kind: str, name: str, dtype: str) -> bool:
    """Return whether a canary failed; for a half precision that was not tried, the other one's verdict counts."""
    if kind != facts.accelerator:
        return False
    other = HALF[kind] if dtype in ("float16", "bfloat16") else dtype
    return facts.canaries.get(f"{name} {dtype}", facts.canaries.get(f"{name} {other}", PASSED)) != PASSED


def unusable(facts: Facts, kind: str) -> bool:
    """Return whether a device other than the CPU computes incorrectly even in float32."""
    return kind != "cpu" and any(fault(facts, kind, name, "float32") for name in NETWORK)


def best_for(facts: Facts, kind: str) -> str:
    """Return the fastest dtype for text encoder and U-Net that is safe on this machine.

    On Metal, half precision must have passed all canaries of a network.
    """
    half = HALF[kind]
    fine = _fused_on_metal(facts) and all(
        proved(facts, kind, name, half) for name in ("chunks", *NETWORK) if name != "sum"
    )
    best = best_dtype(kind, native_bfloat16=facts.native_bfloat16(kind), proved=fine)
    return "float32" if half_failed(facts, kind) else best


def half_failed(facts: Facts, kind: str) -> bool:
    """Return whether networks would be computed incorrectly in half precision."""
    return any(fault(facts, kind, name, HALF[kind]) for name in NETWORK)


def attention_for_dtypes(facts: Facts, kind: str, dtypes: Iterable[str]) -> str:
    """Return how networks in these dtypes compute attention: "fused", "chunked" or "split", the first for all."""
    return max((_attention(facts, kind, dtype) for dtype in dtypes), key=("fused", "chunked", "split").index)


def _attention(facts: Facts, kind: str, dtype: str) -> str:
    fused = kind == "cuda" or (kind == "mps" and _fused_on_metal(facts) and proved(facts, kind, "fused", dtype))
    if fused and not any(fault(facts, kind, name, dtype) for name in ("fused", "mask")):
        return "fused"
    wide = softmax_dtype(kind, dtype)
    # A CPU's own kernels have no chunks: without them, and without its fused attention, plain products are left.
    names = ("chunks", "mask", "fused") if kind == "cpu" else ("chunks", "mask")
    return "split" if any(fault(facts, kind, name, wide) for name in names) else "chunked"


def _fused_on_metal(facts: Facts) -> bool:
    return release(facts.libraries.get("torch", "")) >= FUSED_ON_METAL


def told(facts: Facts) -> tuple[str, ...]:
    """Return what is wrong with the accelerator and what is done instead: why it is refused, and each failed canary."""
    device, quirk = facts.accelerator_name or facts.processor, facts.refused
    sentences = [] if quirk is None else [f"{device} is not used: {quirk.trouble} ({quirk.source}); {quirk.answer}"]
    for key, verdict in facts.canaries.items():
        name, _, dtype = key.rpartition(" ")
        if verdict == PASSED or not (name in NETWORK or name in ANSWERS):
            continue
        title, answer = ANSWERS.get(name) or (NETWORK[name], _network_answer(facts.accelerator, dtype))
        sentences.append(f"{device} computes {title} in {dtype} incorrectly (canary {name!r}: {verdict}); {answer}")
    return tuple(sentences)


def _network_answer(kind: str, dtype: str) -> str:
    if dtype != "float32":
        return "float32 is chosen, unless you choose a precision"
    if kind == "cpu":
        return "do not trust its images: update torch, and check the memory of this machine"
    return "the CPU is chosen, unless you choose a device"
