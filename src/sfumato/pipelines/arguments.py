"""The arguments of the ecosystem's calls, as a request; those that do not exist, as an error."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sfumato.checkpoints.locate import HubOptions
from sfumato.errors import UnknownArgument, UsageError, suggest
from sfumato.pipelines.components import COMPONENTS, OPTIONAL
from sfumato.request import GenerateRequest

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

__all__ = ["refuse", "request_from", "split_keywords"]


def split_keywords(keywords: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Components given in place of the stored ones, and options of the hub. Raises `UnknownArgument` for the rest."""
    hub_names = [*HubOptions.__dataclass_fields__]
    known = [*COMPONENTS, *OPTIONAL, "requires_safety_checker", *hub_names]
    for keyword in keywords:
        if keyword not in known:
            near = suggest(keyword, [*known, "torch_dtype", "dtype", "variant", "use_safetensors"])
            raise UnknownArgument(f"from_pretrained has no argument {keyword!r}{near}")
    given = {key: value for key, value in keywords.items() if key in (*COMPONENTS, "safety_checker")}
    return given, {key: value for key, value in keywords.items() if key in hub_names}


def request_from(prompt: Any, prompt_embeds: Tensor | None, *, count: int | None, **values: Any) -> GenerateRequest:
    """The request of a call. Raises `UsageError` if it says nothing of what to draw."""
    if prompt is None and prompt_embeds is None:
        raise UsageError("there is nothing to draw: give a prompt or prompt_embeds")
    return GenerateRequest(prompt=prompt if prompt is not None else "", count=1 if count is None else count, **values)


def refuse(unknown: dict[str, Any], function: Callable[..., Any]) -> None:
    """Arguments that do not exist are an error; None, the ecosystem's way to say "not used", is harmless."""
    for name, value in unknown.items():
        if value is not None:
            known = function.__code__.co_varnames[1 : function.__code__.co_argcount]
            raise UnknownArgument(f"the pipeline has no argument {name!r}{suggest(name, known)}")
