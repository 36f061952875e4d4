"""What `sfumato show` prints about a single-file checkpoint or one network, from headers and without torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sfumato.checkpoints.detect import detect, kind_of
from sfumato.checkpoints.headers import read_header
from sfumato.checkpoints.locate_file import locate_file, text_beside, vae_beside
from sfumato.errors import CheckpointError
from sfumato.files import expanded, read_json

if TYPE_CHECKING:
    from os import PathLike

    from sfumato.checkpoints.headers import Header

__all__ = ["about_file", "about_network"]

DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
DTYPES |= {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
CLASSES = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}
CLASSES |= {"text_encoder_2": "CLIPTextModelWithProjection"}


def about_file(name: str | PathLike[str], **hub: Any) -> dict[str, Any]:
    """Return the family and the evidence for it, image size, prediction type, and class, size and dtype of each part.

    For a file that is not a checkpoint, report what it is instead. Raises `CheckpointError` if it cannot be read.
    """
    header = read_header(locate_file(name, **hub))
    stored = header.tensors.values()
    whole = {"parameters": sum(one.count for one in stored), "bytes": sum(one.bytes for one in stored)}
    try:
        found = detect(header, yaml=text_beside(header.path))
    except CheckpointError as error:
        return {
            "name": str(name),
            "family": kind_of(header.tensors),
            "parts": _only(header, whole),
            "why": [str(error)],
        } | whole
    family, unet = found.family, found.parts["unet"].config
    vae = found.parts["vae"].config if "vae" in found.parts else family.vae
    beside = vae_beside(header.path)
    size, factor = unet.get("sample_size", 64), 2 ** (len(vae["block_out_channels"]) - 1)
    height, width = (size, size) if isinstance(size, int) else size
    parts: dict[str, dict[str, Any]] = {
        role: {"class": CLASSES[role], "parameters": part.parameters, "bytes": part.bytes}
        | {"dtype": DTYPES.get(part.dtype, part.dtype)}
        for role, part in found.parts.items()
    }
    return {
        "name": str(name),
        "family": family.title,
        "width": width * factor,
        "height": height * factor,
        "prediction_type": found.scheduler.get("prediction_type", "epsilon"),
        "prompt_tokens": 77,
        "parts": parts | {"scheduler": {"class": found.scheduler["_class_name"]}},
        "suggested": {"steps": found.steps, "guidance_scale": family.guidance},
        "why": [*found.reasons, *found.notes, *([f"its VAE is taken from {beside.name} next to it"] if beside else [])],
        "missing": {role: said for role, said in found.missing.items() if role != "vae" or beside is None},
    } | {key: sum(part[key] for part in parts.values()) for key in whole}


def about_network(folder: str | PathLike[str]) -> dict[str, Any]:
    """Return the name and class of the network in a folder, and its size and dtype.

    Raises `CheckpointError` if a file cannot be read.
    """
    path = expanded(folder)
    headers = [read_header(file) for file in sorted(path.glob("*.safetensors"))]
    stored = [one for header in headers for one in header.tensors.values()]
    return {
        "name": str(folder),
        "class": str(read_json(path / "config.json").get("_class_name", "")),
        "parameters": sum(one.count for one in stored),
        "bytes": sum(one.bytes for one in stored),
        "dtype": ", ".join(sorted({DTYPES.get(one.dtype, one.dtype) for one in stored})),
    }


def _only(header: Header, whole: dict[str, int]) -> dict[str, Any]:
    dtypes = {one.dtype for one in header.tensors.values()}
    return {"all": whole | {"class": "", "dtype": ", ".join(sorted(DTYPES.get(name, name) for name in dtypes))}}
