"""Names of `diffusers.optimization`, such as learning-rate schedules: each raises an error that says what to use."""

from __future__ import annotations

from typing import Any

from sfumato.ecosystem import absent


def __getattr__(name: str) -> Any:
    raise absent("package", name, __name__)
