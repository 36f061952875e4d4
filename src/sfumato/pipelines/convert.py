"""Converts checkpoints between layouts: folder to file, file to folder, or a fresh copy of either."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sfumato.checkpoints.detect import detect
from sfumato.checkpoints.headers import read_header
from sfumato.checkpoints.write_file import write_single_file
from sfumato.errors import UsageError
from sfumato.models import AutoencoderKL
from sfumato.models.base import Model
from sfumato.pipelines.components import FLAGS, INDEX, Index, save_components
from sfumato.pipelines.pipeline import DiffusionPipeline
from sfumato.pipelines.source import load_components

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from sfumato.families import Family
    from sfumato.pipelines.source import Source

__all__ = ["convert"]

SUFFIX = ".safetensors"


def convert(
    source: Source, target: Path, *, dtype: torch.dtype | None = None, overwrite: bool = False
) -> tuple[str, ...]:
    """Write a checkpoint to one file in the original layout if `target` ends in .safetensors, else to a folder.

    Writes atomically, in layouts that the ecosystem's libraries can read. dtype: of all weights (default: each
    network's own). Returns notes on what a file cannot store. Raises `UsageError` if the checkpoint cannot be stored in
    this layout or the target exists (unless `overwrite`), and `OutputError` if it cannot be written.
    """
    family, in_file = source.family, target.suffix == SUFFIX
    there = target if in_file else target / INDEX
    if there.exists() and not overwrite:
        raise UsageError(f"{there} already exists; choose another path, or replace it with --overwrite")
    if family.more:
        raise UsageError(
            f"{source.name} is of the family {family.title}, which cannot be converted, because it has components "
            f"that are not supported here ({', '.join(family.more)})"
        )
    if in_file and source.class_of("vae") is not AutoencoderKL:
        raise UsageError(
            f"{source.name} has an AutoencoderTiny, which cannot be written to a single file; write a folder instead"
        )
    components = load_components(source, dtype, {})
    scheduler = components["scheduler"].config.to_dict() | {"_class_name": type(components["scheduler"]).__name__}
    if not in_file:
        level = family.more.get("max_noise_level")
        values = (family.absent_negative == "zeros", "aesthetic_score" in family.sizes, level)
        flags = dict(zip(FLAGS, values, strict=True)) | {key: value for key, value in source.flags.items() if value}
        kind = _index(source.class_name, family)
        parts = dict.fromkeys(kind.parts) | components
        save_components(parts, target, kind, flags | {"requires_safety_checker": False}, max_shard_size="10GB")
        return ()
    networks = {role: model for role, model in components.items() if isinstance(model, Model)}
    write_single_file(target, family, networks, scheduler)
    found = detect(read_header(target))
    notes = []
    if found.family.name != family.name:
        notes.append(f"a file cannot store its family; load it with family={family.name!r} (--family {family.name})")
    own = found.scheduler["_class_name"]
    if own != scheduler["_class_name"]:
        notes.append(f"a file cannot store a scheduler; it will be loaded with {own}, its family's default")
    return tuple(notes)


def _index(class_name: str, family: Family) -> Index:
    """Return the index for a pipeline class, including classes that Sfumato does not have."""
    known = {cls.__name__: cls.index for cls in DiffusionPipeline.__subclasses__()}
    if class_name in known:
        return known[class_name]
    like = known["StableDiffusionXLPipeline" if family.sizes else "StableDiffusionPipeline"]
    return Index(class_name, like.parts, like.absent, like.flags)
