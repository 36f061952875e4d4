"""The attention processors of diffusers, as placeholders: Sfumato does not need them."""

from __future__ import annotations

from typing import Any

from sfumato.ecosystem import absent
from sfumato.errors import UsageError
from sfumato.values import shown

__all__ = ["AttnProcessor", "AttnProcessor2_0", "XFormersAttnProcessor", "check_processor"]


class AttnProcessor:
    """Attention as the plan selects it; all processors give the same results."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class AttnProcessor2_0(AttnProcessor):
    """The same, under diffusers' name for torch's fused attention."""


class XFormersAttnProcessor(AttnProcessor):
    """The same, under diffusers' name for xFormers."""


def check_processor(processor: Any) -> None:
    """Raise `UsageError` unless a processor, ours or diffusers', means plain attention."""
    if type(processor).__name__ not in ("AttnProcessor", "AttnProcessor2_0", "XFormersAttnProcessor"):
        raise UsageError(
            f"custom attention processors, such as {shown(type(processor).__name__)}, are not supported; to "
            "compute attention by a function (q, k, v, mask) -> out, use model.set_attention"
        )


def __getattr__(name: str) -> Any:
    raise absent("package", name, __name__)
