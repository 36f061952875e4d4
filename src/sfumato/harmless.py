"""Arguments of diffusers for loading and saving that ask for what Sfumato does anyway."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sfumato.errors import UsageError
from sfumato.runtime.device import check_dtype, parse_device
from sfumato.values import check_argument, shown

if TYPE_CHECKING:
    import torch

__all__ = ["asked_device", "asked_dtype", "say_safe", "without_harmless"]

log = logging.getLogger("sfumato")

# Arguments accepted with any value, and those accepted with certain values, with the reason.
ANY = ("low_cpu_mem_usage", "offload_folder", "offload_state_dict", "resume_download", "disable_mmap")
SOME: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "trust_remote_code": ((None, False), "code in a checkpoint is never run"),
    "custom_pipeline": ((None,), "custom pipelines are not supported"),
    "custom_revision": ((None,), "custom pipelines are not supported"),
    "quantization_config": ((None,), "use torch_dtype to choose the precision"),
    "max_memory": ((None,), "the plan depends on the memory that is free"),
    "mirror": ((None,), "set HF_ENDPOINT to use a mirror"),
    "proxies": ((None,), "set HTTPS_PROXY to use a proxy"),
    "output_loading_info": ((None, False), "missing and unexpected keys always raise an error"),
    "ignore_mismatched_sizes": ((None, False), "weights with another shape always raise an error"),
    "use_onnx": ((None, False), "sfumato.load chooses the fastest engine available"),
    "use_flashpack": ((None, False), "weights are read from safetensors"),
}
BEST = ("auto", "balanced", "sequential")


def without_harmless(keywords: dict[str, Any]) -> dict[str, Any]:
    """Remove arguments that ask for what Sfumato does anyway. Raises `UsageError` for unsupported values."""
    for name in keywords.keys() & SOME.keys():
        values, instead = SOME[name]
        if keywords[name] not in values:
            raise UsageError(f"{name}={shown(keywords[name])} is not supported: {instead}; omit it")
    return {name: value for name, value in keywords.items() if name not in ANY and name not in SOME}


def asked_device(keywords: dict[str, Any]) -> torch.device | None:
    """Remove `device_map` from keywords and return its device, or the best one for "auto"; None if it is not set.

    Raises `UsageError` for a map to several devices.
    """
    asked = keywords.pop("device_map", None)
    asked = asked[""] if isinstance(asked, Mapping) and [*asked] == [""] else asked
    if asked is None:
        return None
    if isinstance(asked, Mapping):
        raise UsageError(
            "device_map: a pipeline uses one device; pass its name, such as device_map='cuda', or keep one "
            "network in memory at a time with sfumato.load(…, offload='staged')"
        )
    return parse_device(None if isinstance(asked, str) and asked in BEST else str(asked))


def asked_dtype(torch_dtype: Any, dtype: Any, *, each: bool = False) -> Any:
    """Return the dtype given under either name, or None. each: also accept a dict with one for each part.

    Raises `UsageError` for anything else.
    """
    asked = dtype if torch_dtype is None else torch_dtype
    for one in asked.values() if each and isinstance(asked, Mapping) else (asked,):
        if one is not None:
            check_dtype(one)
    return asked


def say_safe(*, safe_serialization: bool) -> None:
    """Warn if weights are requested as a pickle: they are always saved as safetensors, which every loader prefers."""
    check_argument("safe_serialization", safe_serialization, bool)
    if not safe_serialization:
        log.warning("safe_serialization=False is ignored: weights are always saved as safetensors, never as pickles")
