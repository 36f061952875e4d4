"""Recipes: how an image was made, in a form that a program can repeat."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from sfumato.errors import ConfigError, UsageError
from sfumato.files import expanded, file_hash
from sfumato.pipelines.components import scheduler_from_recipe
from sfumato.pipelines.fingerprint import fingerprint
from sfumato.pipelines.result import versions
from sfumato.request import GenerateRequest
from sfumato.runtime.choices import NETWORKS
from sfumato.runtime.device import dtype_name
from sfumato.values import check_value

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from sfumato.pipelines.parts import Parts
    from sfumato.schedulers.base import Scheduler

__all__ = ["checked", "describe", "joined_hash", "model_digest", "pictures", "weights_hash"]


def describe(
    parts: Parts,
    scheduler: Scheduler,
    device: torch.device,
    request: GenerateRequest,
    notes: Sequence[str],
    refiner: Parts | None = None,
    adapters: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Return a recipe for each image: a request for this image only, and all else that determines its pixels.

    scheduler, device: those of the run; notes: the run's notes; refiner: the checkpoint that took over; adapters: the
    hashes by which other programs identify them, by name.
    """
    shared = {
        "model": _named(parts) | ({"options": parts.options} if parts.options else {}),
        "scheduler": {"class": type(scheduler).__name__, "config": scheduler.config.to_dict()},
        "device": device.type,
        "dtype": dtype_name(parts.unet.dtype),
        "versions": versions(),
        "notes": list(notes),
    }
    if refiner is not None:
        shared["refiner"] = _named(refiner)
    if adapters:
        shared["adapters"] = dict(adapters)
    shared |= {name: {"sha256": file_hash(expanded(file))} for name, file in request.pictures.items()}
    recipes = []
    for index, seed in enumerate(request.seeds):
        alone = request.alone(index // request.count).replace(seed=seed)
        recipes.append({"request": alone.to_dict(), **shared})
    return recipes


def _named(parts: Parts) -> dict[str, Any]:
    light = {"eight_bit": True} if parts.unet.eight_bit else {}
    return {"name": parts.name, "weights": weights_hash(parts), **light}


def checked(recipe: Mapping[str, Any], where: object) -> tuple[GenerateRequest, Scheduler]:
    """Return the request and the scheduler of a recipe after checking that it is complete and valid.

    Raises `UsageError`, which names the file (`where`) and the part that is wrong.
    """
    wanted: dict[str, dict[str, Any]] = {"model": {"name": str, "weights": str}}
    wanted |= {"scheduler": {"class": str, "config": dict[str, Any]}}
    if isinstance(recipe["request"].get("refiner"), str):
        wanted["refiner"] = {"name": str, "weights": str}
    wanted |= {name: {"sha256": str} for name in pictures(recipe["request"])}
    if "coreml" in recipe:
        wanted["coreml"] = {"engine": str, "kind": str, "compute_unit": str}
    for name in ("adapters", "embeddings"):
        files = recipe["request"].get(name) or ()
        for one in files if isinstance(files, list | tuple) else (files,):
            if not (isinstance(one, dict) and isinstance(one.get("sha256"), str)):
                raise UsageError(
                    f"the recipe of {where} does not identify the files of its {name}; the image may have been edited"
                )
    for control in recipe["request"].get("controls") or ():
        if not (isinstance(control, dict) and {"sha256", "weights"} <= control.keys()):
            raise UsageError(
                f"the recipe of {where} does not identify the files of its controls; the image may have been edited"
            )
    for prompt in recipe["request"].get("image_prompts") or ():
        if not (isinstance(prompt, dict) and "hashes" in prompt):
            raise UsageError(
                f"the recipe of {where} does not identify its image prompts; the image may have been edited"
            )
    if {"vae", "vae_weights"} & recipe["request"].keys() == {"vae"}:
        raise UsageError(f"the recipe of {where} does not identify its VAE; the image may have been edited")
    try:
        check_value("", "dtype", recipe.get("dtype"), str)
        for key, kinds in wanted.items():
            check_value("", key, recipe.get(key), dict[str, Any])
            for part, kind in kinds.items():
                check_value(key, part, recipe[key].get(part), kind)
    except ConfigError as error:
        raise UsageError(f"the recipe of {where} is incomplete ({error}); the PNG may have been edited") from error
    try:
        scheduler = scheduler_from_recipe(recipe["scheduler"]["class"], recipe["scheduler"]["config"])
        return GenerateRequest.from_dict(recipe["request"]), scheduler
    except (ConfigError, UsageError) as error:
        raise UsageError(f"the recipe of {where} cannot be replayed: {error}") from error


def pictures(request: Mapping[str, Any]) -> dict[str, str]:
    """Return the image files that a recipe's request names, by field. Ignores values of the wrong type."""
    mask = request.get("mask")
    named = dict(request) | {"mask": mask.get("file") if isinstance(mask, dict) else None}
    return {name: file for name in ("image", "mask", "depth") if isinstance(file := named.get(name), str)}


def weights_hash(parts: Parts) -> str:
    """Return the hash of a checkpoint, computed from its networks' fingerprints."""
    return joined_hash({part: fingerprint(network) for part, network in parts.networks.items()})


def model_digest(parts: Parts) -> str:
    """Return a hash of everything in a checkpoint that affects images: its weights and its scheduler."""
    text = json.dumps([type(parts.scheduler).__name__, parts.scheduler.config.to_dict()], sort_keys=True, default=str)
    return hashlib.sha256((weights_hash(parts) + text).encode()).hexdigest()[:32]


def joined_hash(fingerprints: Mapping[str, str]) -> str:
    """Return the hash of a checkpoint from its networks' fingerprints, given by role."""
    roles = [role for part in NETWORKS.values() for role in part if role in fingerprints]
    return hashlib.sha256("".join(fingerprints[role] for role in roles).encode()).hexdigest()[:32]
