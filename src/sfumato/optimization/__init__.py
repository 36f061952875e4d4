"""Learning-rate schedules, which training code imports from `diffusers.optimization`: each answers with a sentence."""

from __future__ import annotations

from typing import Any

from sfumato.ecosystem import absent


def __getattr__(name: str) -> Any:
    raise absent("package", name, __name__)
