"""Other programs' names for samplers and schedules, and their equivalents here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from sfumato.metadata.names import names
from sfumato.schedulers.names import resolve

__all__ = ["SAMPLERS", "SPACINGS", "Sampler", "by_invoke", "by_name", "of_recipe"]


class Sampler(NamedTuple):
    """The names of one sampler in Sfumato, A1111, ComfyUI and InvokeAI.

    spacing: the schedule that "Automatic" means in A1111; note: how ours differs.
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
    """Find a sampler and its spacing by A1111's or ComfyUI's names for sampler and schedule.

    Before version 1.9, A1111's sampler name ended in the schedule. Without this ending the schedule was uniform,
    whatever "Automatic" means today.
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
    """Return our short name for InvokeAI's, which ends in "_k" for Karras sigmas."""
    sampler = _found("invoke", name.removeprefix("k_").removesuffix("_k"))
    karras = "_karras" if sampler and sampler.spacing and name.endswith("_k") else ""
    return sampler and sampler.name + karras


def of_recipe(class_name: str, config: Mapping[str, Any]) -> tuple[str, str]:
    """Return A1111's names for the sampler and schedule of a recipe, or ours if it has none."""
    presets = ((one.a1111, *resolve(one.name)) for one in SAMPLERS)
    tells = ("solver_order", "algorithm_type")
    name = next((name for name, kind, preset in presets if kind == class_name and all(
        preset[key] == config.get(key, preset[key]) for key in tells if key in preset)), None)  # fmt: skip
    kinds = {"use_karras_sigmas": "Karras", "use_exponential_sigmas": "Exponential", "use_beta_sigmas": "Beta"}
    schedule = next((kind for key, kind in kinds.items() if config.get(key)), None)
    spaced = "SGM Uniform" if config.get("timestep_spacing") == "trailing" else "Uniform"
    return name or class_name.removesuffix("Scheduler"), schedule or spaced
