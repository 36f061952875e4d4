"""Describes a checkpoint from its configs and headers, without loading weights."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from sfumato.checkpoints.locate import locate_folder
from sfumato.checkpoints.suggested import suggested_settings
from sfumato.checkpoints.weights import find_weights, read_headers
from sfumato.configs import parse
from sfumato.errors import VariantError
from sfumato.families import find
from sfumato.files import read_json
from sfumato.pipelines.components import COMPONENTS, ComponentFiles, component_class, read_index
from sfumato.pipelines.words import Words
from sfumato.text.tokenizer import prompt_tokens

if TYPE_CHECKING:
    from os import PathLike
    from pathlib import Path

    from sfumato.configs import UNet2DConditionConfig

__all__ = ["summarize"]

_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def summarize(name: str | PathLike[str], *, variant: str | None = None) -> dict[str, Any]:
    """Return a checkpoint's family and size, and each component's class, parameters, bytes and precision.

    Raises `CheckpointError`.
    """
    files = ComponentFiles(variant)
    folder = locate_folder(name, files.select, local_files_only=True)
    index = read_index(folder)
    if variant and not any(folder.glob(f"*/*.{variant}*.*")):
        raise VariantError(f"{folder} has no variant {variant!r}; omit variant to see the plain weights")
    classes = {part: component_class(folder, index, part) for part in COMPONENTS}
    parts = {part: _part(folder, part, cls, files) for part, cls in classes.items() if cls is not None}
    unet, vae = parts["unet"]["config"], parts["vae"]["config"]
    height, width = unet.latent_size
    scheduler = classes["scheduler"].from_pretrained(folder, subfolder="scheduler")
    prediction_type = scheduler.config.prediction_type
    words = Words.from_folder(folder)
    return {
        "name": str(name),
        "family": _family(unet, sum(part.startswith("text_encoder") for part in parts), prediction_type),
        "width": width * vae.scale_factor,
        "height": height * vae.scale_factor,
        "prediction_type": prediction_type,
        "prompt_tokens": prompt_tokens(folder),
        "parts": {
            part: {key: value for key, value in facts.items() if key != "config"} for part, facts in parts.items()
        },
        "parameters": sum(facts.get("parameters", 0) for facts in parts.values()),
        "bytes": sum(facts.get("bytes", 0) for facts in parts.values()),
        "suggested": suggested_settings(folder),
        **({} if words is None else {"words": words.names, "styles": words.styles}),
    }


def _part(folder: Path, part: str, cls: Any, files: ComponentFiles) -> dict[str, Any]:
    facts: dict[str, Any] = {"class": cls.__name__}
    if not hasattr(cls, "weights_name"):
        return facts
    found = find_weights(folder / part, cls.weights_name, variant=files.variant)
    headers = read_headers(found).values()
    dtypes = Counter({})
    for header in headers:
        dtypes[_DTYPES.get(header.dtype, header.dtype)] += header.bytes
    facts["parameters"] = sum(header.count for header in headers)
    facts["bytes"] = sum(header.bytes for header in headers)
    facts["dtype"] = dtypes.most_common(1)[0][0] if dtypes else ""
    path = folder / part / "config.json"
    facts["config"], _ = parse(cls.config_class, read_json(path), path)
    return facts


def _family(unet: UNet2DConditionConfig, encoders: int, prediction_type: str) -> str:
    """Return the title of the U-Net's family, if the prompt width matches too."""
    width = unet.per_block("cross_attention_dim")[0]
    found = find(unet.to_dict(), encoders=encoders, prediction_type=prediction_type)
    known = (row.title for row in found if row.unet.get("cross_attention_dim") == width)
    return next(known, "a custom, smaller Stable Diffusion architecture")
