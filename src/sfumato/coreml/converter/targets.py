"""Deployment targets by Apple's names, and the differences between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from sfumato.errors import UsageError, suggest

__all__ = ["DEFAULT_TARGET", "TARGETS", "Target", "target_named"]

DEFAULT_TARGET = "macOS13"

# Inputs that these operations have since iOS 17.
_SINCE_17: Mapping[str, Mapping[str, bool | str]] = {
    "gather": {"validate_indices": False},
    "gather_nd": {"validate_indices": False},
    "reduce_argmax": {"output_dtype": "int32"},
}


@dataclass(frozen=True, slots=True)
class Target:
    """The oldest system that must run a program.

    spec_version: of the file; opset: the set of operations; more_inputs: constant inputs of some operations in addition
    to those of iOS 16.
    """

    name: str
    spec_version: int
    opset: str
    more_inputs: Mapping[str, Mapping[str, bool | str]] = field(default_factory=dict)


# iOS 16 is the first to support half-precision inputs.
TARGETS: Mapping[str, Target] = {
    name: Target(name, version, opset, {} if version == 7 else _SINCE_17)
    for names, version, opset in (
        (("iOS16", "macOS13"), 7, "CoreML6"),
        (("iOS17", "macOS14"), 8, "CoreML7"),
        (("iOS18", "macOS15"), 9, "CoreML8"),
        (("iOS26", "macOS26"), 10, "CoreML9"),
    )
    for name in names
}


def target_named(name: str) -> Target:
    """Return the target of this name. Raises `UsageError` if there is none."""
    if name not in TARGETS:
        raise UsageError(
            f"{name!r} is not a deployment target{suggest(name, TARGETS)}; use one of {', '.join(TARGETS)}"
        )
    return TARGETS[name]
