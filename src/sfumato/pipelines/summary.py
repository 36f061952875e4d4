"""What a checkpoint is, read from its configs and headers without loading a weight."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from sfumato.checkpoints.locate import locate_folder
from sfumato.checkpoints.suggested import suggested_settings
from sfumato.checkpoints.weights import find_weights, read_headers
from sfumato.configs import UNet2DConditionConfig, parse
from sfumato.errors import CheckpointError
from sfumato.files import read_json
from sfumato.pipelines.components import COMPONENTS, INDEX, ComponentFiles, component_class
from sfumato.pipelines.words import Words
from sfumato.text.tokenizer import prompt_length

if TYPE_CHECKING:
    from os import PathLike
    from pathlib import Path

__all__ = ["summarize"]

_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def summarize(name: str | PathLike[str], *, variant: str | None = None) -> dict[str, Any]:
    """Family, size, and for each part its class, parameters, bytes and precision. Raises `CheckpointError`."""
    files = ComponentFiles(variant)
    folder = locate_folder(name, files.select, local_files_only=True)
    index = read_json(folder / INDEX)
    if variant and not any(folder.glob(f"*/*.{variant}*.*")):
        raise CheckpointError(f"{folder} has no variant {variant!r}; leave variant out to see the plain weights")
    parts = {part: _part(folder, index, part, files) for part in COMPONENTS}
    unet, _ = parse(UNet2DConditionConfig, read_json(folder / "unet" / "config.json"))
    vae = parts["vae"].pop("config")
    size = unet.sample_size or 64
    height, width = (size, size) if isinstance(size, int) else size
    path = folder / "tokenizer" / "tokenizer_config.json"
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    words = Words.from_folder(folder)
    return {
        "name": str(name),
        "family": _family(unet),
        "width": width * vae.scale_factor,
        "height": height * vae.scale_factor,
        "prediction_type": scheduler.get("prediction_type", "epsilon"),
        "prompt_tokens": prompt_length(read_json(path) if path.is_file() else {}),
        "parts": {
            part: {key: value for key, value in facts.items() if key != "config"} for part, facts in parts.items()
        },
        "parameters": sum(facts.get("parameters", 0) for facts in parts.values()),
        "bytes": sum(facts.get("bytes", 0) for facts in parts.values()),
        "suggested": suggested_settings(folder),
        **({} if words is None else {"words": words.names, "styles": words.styles}),
    }


def _part(folder: Path, index: dict[str, Any], part: str, files: ComponentFiles) -> dict[str, Any]:
    cls = component_class(folder, index, part)
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
    facts["config"], _ = parse(cls.config_class, read_json(folder / part / "config.json"))
    return facts


def _family(unet: UNet2DConditionConfig) -> str:
    """Stable Diffusion 1.x and 2.x differ in the width of the text they read."""
    width = unet.per_block("cross_attention_dim")[0]
    known = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x"}
    return known.get(width, "a Stable Diffusion model of its own shape")
