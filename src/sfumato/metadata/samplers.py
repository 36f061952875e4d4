"""Other programs' names for samplers and schedules, and their equivalents here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from sfumato.metadata.names import names
from sfumato.schedulers.names import resolve

__all__ = ["SAMPLERS", "SPACINGS", "Sampler", "by_invoke", "by_name", "of_recipe"]


class Sampler(NamedTuple):
    """One sampler: our short name, A1111's with the schedule it takes for "Automatic", ComfyUI's and InvokeAI's.

    note: in what ours differs.
    """

    name: str
    a1111: str
    spacing: str | None
    comfyui: str = ""
    invoke: str = ""
    note: str = ""


SAMPLERS = tuple(
    Sampler(name, one, spacing or None, *more) for name, (one, spacing, *more) in names()["samplers"].items()
)
SPACINGS = names()["spacings"]
_ENDS = re.compile(rf" ({'|'.join(SPACINGS)})$")


def _found(key: str, name: str) -> Sampler | None:
    return next((one for one in SAMPLERS if name and getattr(one, key).lower() == name.lower()), None)


def by_name(name: str, schedule: str | None) -> tuple[Sampler | None, str | None]:
    """A sampler by A1111's name and its "Schedule type", or ComfyUI's for both; and the spacing.

    Before 1.9 A1111's name ended in the schedule, and without such an end it was uniform, whatever is automatic today.
    """
    if (end := _ENDS.search(name)) and _found("a1111", name) is None:
        name, schedule = name[: end.start()], end[1]
    plain = re.sub(r"^sample_|^k_|_gpu$|_cfg_pp$|_bh2$", "", name)
    sampler = _found("a1111", name) or _found("name", name) or _found("comfyui", plain)
    if sampler is None or sampler.spacing is None:
        return sampler, None
    if schedule == "Automatic":
        return sampler, sampler.spacing
    return sampler, SPACINGS.get(schedule or "Uniform")


def by_invoke(name: str) -> str | None:
    """Our short name for InvokeAI's, which ends in "_k" where its sigmas are Karras's."""
    sampler = _found("invoke", name.removeprefix("k_").removesuffix("_k"))
    karras = "_karras" if sampler and sampler.spacing and name.endswith("_k") else ""
    return sampler and sampler.name + karras


def of_recipe(class_name: str, config: Mapping[str, Any]) -> tuple[str, str]:
    """A1111's names for the sampler and schedule of a recipe; ours, where it has none."""
    presets = ((one.a1111, *resolve(one.name)) for one in SAMPLERS)
    tells = ("solver_order", "algorithm_type")
    name = next((name for name, kind, preset in presets if kind == class_name and all(
        preset[key] == config.get(key, preset[key]) for key in tells if key in preset)), None)  # fmt: skip
    kinds = {"use_karras_sigmas": "Karras", "use_exponential_sigmas": "Exponential", "use_beta_sigmas": "Beta"}
    schedule = next((kind for key, kind in kinds.items() if config.get(key)), None)
    spaced = "SGM Uniform" if config.get("timestep_spacing") == "trailing" else "Uniform"
    return name or class_name.removesuffix("Scheduler"), schedule or spaced
