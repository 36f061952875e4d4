"""The family that a checkpoint belongs to."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sfumato.checkpoints.locate import index_of
from sfumato.configs import UNet2DConditionConfig, parse
from sfumato.families import distilled, find
from sfumato.files import read_json

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from sfumato.families import Family

__all__ = ["family_of", "known_family", "settings_of"]


def known_family(
    unet: Mapping[str, Any],
    vae: Mapping[str, Any],
    scheduler: Mapping[str, Any],
    *,
    encoders: int | None = None,
    called: str = "",
) -> Family:
    """Return the family that best fits a checkpoint's configs; Stable Diffusion 1.x if nothing says otherwise.

    encoders: the number of text encoders. called: the name of the folder or repository. Families with the same shapes
    are distinguished by name, then by scheduler, VAE latent statistics and sample size.
    """
    found = find({**unet, "in_channels": _as_of_four(unet, vae)}, encoders=encoders) or find({})
    name = re.sub(r"[^a-z0-9]+", "-", called.lower())
    for row in found:
        match = re.search(row.named, name) if row.named else None
        if match is not None:
            steps = next(filter(None, match.groups()), None)
            return row if steps is None else replace(row, steps=int(steps))
    own = _traits(unet, vae, scheduler)
    theirs = [_traits(row.unet, row.vae, row.scheduler) for row in found]
    alike = [[a == b for a, b in zip(own, other, strict=True)] for other in theirs]
    row = found[alike.index(max(alike))]
    reads_guidance = unet.get("time_cond_proj_dim") is not None and "time_cond_proj_dim" not in row.unet
    return distilled(row) if reads_guidance else row


def _as_of_four(unet: Mapping[str, Any], vae: Mapping[str, Any]) -> int:
    """Return how many channels the U-Net would read if the latents had four, as in every published family."""
    latents: int = vae.get("latent_channels", 4)
    more: int = unet.get("in_channels", 4) - latents
    same = {latents: 4, latents + 1: 5}  # the latents of an image once more, and a mask with them
    return 4 + same.get(more, more)


def _traits(unet: Mapping[str, Any], vae: Mapping[str, Any], scheduler: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return the traits that distinguish families of the same shape, the most significant first."""
    noise = str(scheduler.get("_class_name")).startswith("EDM")
    prediction = scheduler.get("prediction_type", "epsilon")
    return bool(vae.get("latents_mean")), noise, prediction, unet.get("sample_size")


def settings_of(family: Family) -> dict[str, Any]:
    """Return a family's default settings, as fields of a `GenerateRequest`."""
    return {"steps": family.steps, "guidance_scale": family.guidance}


def family_of(folder: Path) -> Family:
    """Return the family of the checkpoint in a folder, which may be a snapshot in the hub cache.

    Raises `ConfigError` for an invalid U-Net config.
    """
    index, unet = read_json(index_of(folder)), folder / "unet" / "config.json"
    encoders = [entry for part, entry in index.items() if part.startswith("text_encoder")]
    none = 0 if isinstance(sees := index.get("image_encoder"), list) and any(sees) else None
    return known_family(
        parse(UNet2DConditionConfig, _config(unet), unet)[0].to_dict(),
        _config(folder / "vae" / "config.json"),
        _config(folder / "scheduler" / "scheduler_config.json"),
        encoders=sum(isinstance(entry, list) and any(entry) for entry in encoders) or none,
        called=folder.parent.parent.name if folder.parent.name == "snapshots" else folder.name,
    )


def _config(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
