"""Turns the arguments of the ecosystem's calls into a request, and rejects those that do not exist."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch

from sfumato.checkpoints.locate import HubOptions
from sfumato.ecosystem import found
from sfumato.errors import UnknownArgument, UsageError, suggest
from sfumato.harmless import without_harmless
from sfumato.pipelines.components import COMPONENTS, FLAGS, OPTIONAL
from sfumato.request import GenerateRequest
from sfumato.runtime.device import parse_device
from sfumato.values import shown

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

__all__ = ["OLDER", "not_here", "refuse", "refuse_unknown_parts", "request_from", "split_keywords", "split_places"]

# The callback arguments of older code. Newer pipelines accept them too, although their signatures do not list them.
OLDER = ("callback", "callback_steps")


def split_keywords(
    keywords: dict[str, Any], function: str = "from_pretrained"
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split keywords into replacements for stored components, and hub options. Raises `UnknownArgument` for others."""
    keywords = without_harmless(keywords)
    hub_names = [*HubOptions.__dataclass_fields__]
    told = (*COMPONENTS, *FLAGS, "add_watermarker")
    known = [*told, *OPTIONAL, "requires_safety_checker", *hub_names]
    for keyword in keywords:
        if keyword not in known:
            if found("argument", keyword):
                raise not_here(keyword)
            near = suggest(keyword, [*known, "torch_dtype", "dtype", "variant", "use_safetensors"])
            raise UnknownArgument(f"{function} has no argument {keyword!r}{near}")
    given = {key: value for key, value in keywords.items() if key in (*told, *OPTIONAL)}
    return given, {key: value for key, value in keywords.items() if key in hub_names}


def refuse_unknown_parts(given: Mapping[str, Any]) -> None:
    """Raise `UsageError` for components that Sfumato does not have, such as a safety checker; None is accepted."""
    if given.get("safety_checker") is not None:
        raise UsageError("Sfumato has no safety checker; omit it or pass None")
    if given.get("add_watermarker") or given.get("watermarker") is not None:
        raise UsageError("Sfumato adds no watermark; omit it")


def split_places(places: tuple[Any, ...], named: dict[str, Any]) -> tuple[torch.device | None, torch.dtype | None]:
    """Return the device and the precision from the arguments of `to`, in any order. Raises `UsageError` for others."""
    wanted = [*places, named.pop("device", None), named.pop("dtype", None), named.pop("torch_dtype", None)]
    named.pop("silence_dtype_warnings", None)
    if named:
        raise UnknownArgument(f"to() has no argument {next(iter(named))!r}; it takes device and dtype")
    wanted = [f"cuda:{one}" if type(one) is int else one for one in wanted]  # as torch reads a bare index
    for one in wanted:
        if not (one is None or isinstance(one, (torch.dtype, str, torch.device))):
            raise UsageError(
                f"to() takes a device such as 'cuda' and a precision such as torch.float16, not {shown(one)}"
            )
    dtype = next((place for place in wanted if isinstance(place, torch.dtype)), None)
    device = next((place for place in wanted if isinstance(place, (str, torch.device))), None)
    return None if device is None else parse_device(str(device)), dtype


def request_from(prompt: Any, prompt_embeds: Tensor | None, *, count: int | None = 1, **values: Any) -> GenerateRequest:
    """Create the request for a call. Raises `UsageError` if it has neither a prompt nor embeddings."""
    if prompt is None and prompt_embeds is None:
        raise UsageError("the prompt is missing; pass prompt or prompt_embeds")
    prompts: Any = prompt if prompt_embeds is None or prompt is not None else [""] * len(prompt_embeds)
    return GenerateRequest(prompt=prompts, count=1 if count is None else count, **values)


def not_here(name: str) -> UnknownArgument:
    """Return the error for an argument of the ecosystem's calls that Sfumato does not support."""
    what, here = found("argument", name) or ("an argument", "omit it")
    return UnknownArgument(f"{name} ({what}) is not in Sfumato; {here}")


def refuse(unknown: dict[str, Any], function: Callable[..., Any]) -> None:
    """Raise `UnknownArgument` for unknown arguments. None is accepted, because the ecosystem uses it for "not used"."""
    for name, value in unknown.items():
        if value is not None and name not in OLDER:
            if found("argument", name):
                raise not_here(name)
            known = [*inspect.signature(function).parameters][1:-1]
            raise UnknownArgument(f"the pipeline has no argument {name!r}{suggest(name, known)}")
