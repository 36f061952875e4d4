"""Writes a checkpoint to a single file in the original layout."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sfumato.checkpoints import rules
from sfumato.errors import OutputError, UsageError
from sfumato.files import replacing

if TYPE_CHECKING:
    from collections.abc import Mapping
    from os import PathLike

    from torch import Tensor, nn

    from sfumato.families import Family

__all__ = ["original_state", "write_single_file"]

PREFIXES = {"unet": "model.diffusion_model.", "vae": "first_stage_model."}
# Markers that other programs look for in a file, and the scheduler settings they stand for.
MARKERS = {"v_pred": ("prediction_type", "v_prediction"), "ztsnr": ("rescale_betas_zero_snr", True)}


def original_state(model: nn.Module, naming: str, prefix: str = "") -> dict[str, Tensor]:
    """Return a model's weights under their original names, in their original form."""
    table = rules.names_for(naming, model.config)
    parts: dict[str, list[tuple[int, str, Tensor]]] = {}
    for key, tensor in model.state_dict().items():
        name, form, third = rules.original_name(key, table)
        parts.setdefault(prefix + name, []).append((third, form, tensor.detach()))
    return {
        name: _joined([(form, tensor) for _, form, tensor in sorted(own, key=_third)]) for name, own in parts.items()
    }


def _third(piece: tuple[int, str, Tensor]) -> int:
    return piece[0]


def _joined(pieces: list[tuple[str, Tensor]]) -> Tensor:
    form, tensor = pieces[0]
    match form:
        case "matrix" if tensor.ndim == 2:
            return tensor[:, :, None, None]
        case "transposed":
            return tensor.t()
        case "thirds":
            return torch.cat([piece for _, piece in pieces])
    return tensor


def write_single_file(
    path: str | PathLike[str], family: Family, models: Mapping[str, Any], scheduler: Mapping[str, Any]
) -> None:
    """Write the networks of a checkpoint, given by folder name, to one safetensors file.

    The scheduler's prediction type goes into metadata and markers, so that it is detected on loading. Raises
    `UsageError` for a family without such a layout, and `OutputError` if the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    if any(kind.startswith("K") for kind in family.unet["down_block_types"]):
        raise UsageError(f"{family.title} cannot be written as a single file; write a folder")
    state: dict[str, Tensor] = {}
    for role in ("unet", "vae"):
        state |= original_state(models[role], "original", PREFIXES[role])
    for index, encoder in enumerate(family.encoders):
        stage = f"conditioner.embedders.{index}." if family.sizes else "cond_stage_model."
        prefix = stage + ("model." if encoder.naming == "open_clip" else "transformer.")
        state |= original_state(models[encoder.role], encoder.naming, prefix)
    prediction = scheduler.get("prediction_type", "epsilon")
    metadata = {"format": "pt", "modelspec.prediction_type": prediction, "modelspec.title": Path(path).stem}
    (height, width), factor = models["unet"].config.latent_size, models["vae"].config.scale_factor
    metadata["modelspec.resolution"] = f"{width * factor}x{height * factor}"
    for marker, (key, value) in MARKERS.items():
        if family.sizes and scheduler.get(key) == value:
            state[marker] = torch.zeros(0)
    try:
        with replacing(Path(path)) as temporary:
            save_file({name: tensor.cpu().contiguous() for name, tensor in state.items()}, temporary, metadata)
    except SafetensorError as error:
        reason = "no space left" if "No space left" in str(error) else str(error)
        raise OutputError(f"{path} cannot be written ({reason})") from error
