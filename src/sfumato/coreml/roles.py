"""A converted model's role, from its inputs and outputs alone, and which models belong together."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sfumato.coreml.formats import read_model
from sfumato.coreml.program import Feature
from sfumato.errors import CheckpointError, SfumatoError

__all__ = ["INPUTS", "PARTS", "Candidate", "look", "sorted_out"]

log = logging.getLogger("sfumato")

# The parts of a Core ML pipeline in order of use, and the inputs of each if it is not split.
INPUTS = {
    "text_encoder": frozenset({"input_ids"}),
    "unet": frozenset({"sample", "timestep", "encoder_hidden_states"}),
    "vae_decoder": frozenset({"z"}),
    "vae_encoder": frozenset({"x"}),
}
PARTS = tuple(INPUTS)

Sides = tuple[int | None, ...]


@dataclass(frozen=True)
class Candidate:
    """A model and the part it can be: `part` is one of `PARTS`, or empty if it is none.

    U-Net chunks other than the first have no part either: only the chunk before identifies them. trouble: why the model
    cannot be read, which matters only if no other model is that part.
    """

    path: Path
    part: str
    inputs: dict[str, Sides]
    outputs: dict[str, Sides]
    source_hash: str = ""
    chunk: str = ""
    trouble: str = ""


def look(path: Path) -> Candidate:
    """Return what part a model can be."""
    try:
        model = read_model(path)
    except SfumatoError as error:
        return Candidate(path, "", {}, {}, trouble=str(error))
    inputs, outputs = _sides(model.interface.inputs), _sides(model.interface.outputs)
    hash_, chunk = (model.metadata.get(f"sfumato.{name}", "") for name in ("source_hash", "chunk"))
    return Candidate(path, _part(inputs), inputs, outputs, hash_, chunk)


def _sides(features: Iterable[Feature]) -> dict[str, Sides]:
    """Return the shape of each feature, with None for variable sizes."""
    return {one.name: one.type.shape for one in features}


def _part(inputs: dict[str, Sides]) -> str:
    if "controlnet_cond" in inputs or any(name.startswith("additional_residual_") for name in inputs):
        return ""  # a ControlNet, or a U-Net that only runs with one
    if "input_ids" in inputs:
        return "text_encoder"
    if {"sample", "timestep"} <= inputs.keys():
        return "unet"
    return {"z": "vae_decoder", "x": "vae_encoder"}.get(next(iter(inputs)), "") if len(inputs) == 1 else ""


def sorted_out(folder: Path, candidates: Sequence[Candidate]) -> dict[str, tuple[Path, ...]]:
    """Return the models of each part, a U-Net's chunks in order of execution.

    Raises `CheckpointError` if there are two models for a part, a chunk is missing, or models do not belong together.
    """
    parts: dict[str, tuple[Candidate, ...]] = {}
    for part in PARTS:
        found = [one for one in candidates if one.part == part]
        if part == "unet":
            found = _unet(found, [one for one in candidates if not one.part])
        elif len(found) > 1:
            raise CheckpointError(_twice(folder, found))
        if found:
            parts[part] = tuple(found)
    _check_together(folder, parts)
    return {part: tuple(one.path for one in found) for part, found in parts.items()}


def _twice(folder: Path, found: Sequence[Candidate]) -> str:
    names = " and ".join(one.path.name for one in found)
    hint = "keep the models of each checkpoint in a separate folder"
    if all("input_ids" in one.inputs for one in found):
        hint += "; those of Stable Diffusion XL and 3, which have several text encoders, are not supported"
    return f"{folder} contains {names}, which are for the same part; {hint}"


def _unet(heads: list[Candidate], others: list[Candidate]) -> list[Candidate]:
    """Return the one whole U-Net, or its chunks, which take precedence."""
    chains = [_chain(head, others) for head in heads]
    whole = [chain for chain in chains if len(chain) == 1]
    cut = [chain for chain in chains if len(chain) > 1]
    for some in (cut, whole):
        if len(some) > 1:
            raise CheckpointError(_twice(some[0][0].path.parent, [chain[0] for chain in some]))
    if cut and whole:
        log.warning("the U-Net exists both whole and in chunks; the chunks are used, as Apple's runners do")
    return next(iter(cut or whole), [])


def _chain(head: Candidate, others: list[Candidate]) -> list[Candidate]:
    """Return a first chunk and the chunks that continue from its outputs, in order of execution."""
    chain, features = [head], {*head.inputs, *head.outputs, "encoder_hidden_states"}
    computed = set(head.outputs)
    while following := [one for one in others if one not in chain and _goes_on(one, features, computed)]:
        if len(following) > 1:
            raise CheckpointError(_twice(head.path.parent, following))
        chain += following
        features |= following[0].outputs.keys()
        computed |= following[0].outputs.keys()
    count = head.chunk.rpartition(" ")[2]
    if len(chain[-1].outputs) != 1 or (count.isdecimal() and len(chain) != int(count)):
        trouble = next((one.trouble for one in others if one.trouble), "")
        raise CheckpointError(
            f"{chain[-1].path} is a chunk of a U-Net, but the next chunk is missing; "
            + (trouble or "convert or download all chunks")
        )
    return chain


def _goes_on(one: Candidate, features: set[str], computed: set[str]) -> bool:
    return one.inputs.keys() <= features and bool(one.inputs.keys() & computed)


def _check_together(folder: Path, parts: dict[str, tuple[Candidate, ...]]) -> None:
    """Raise `CheckpointError` if models come from different checkpoints or their sizes do not match."""
    hashes = {one.source_hash: one for found in parts.values() for one in found if one.source_hash}
    if len(hashes) > 1:
        names = " and ".join(one.path.name for one in hashes.values())
        raise CheckpointError(f"{folder}: {names} were made from different checkpoints; convert them together")
    for part, what, feature, axis, other, other_axis in _FITTING:
        for one in parts.get(part, ()):
            for unet in parts.get("unet", ()):
                number, wanted = _side(one, feature, axis), _side(unet, other, other_axis)
                if number != wanted and None not in (number, wanted):
                    raise CheckpointError(
                        f"{folder}: {one.path.name} has {what} {number} and {unet.path.name} {wanted}, so they do not "
                        "belong together; keep the models of each checkpoint in a separate folder"
                    )


# What must agree: a part, what its axis means, its feature and axis, and the U-Net's feature and axis.
_FITTING = (
    ("text_encoder", "embeddings of width", "last_hidden_state", 2, "encoder_hidden_states", 1),
    ("text_encoder", "prompts of length", "input_ids", 1, "encoder_hidden_states", 3),
    ("vae_decoder", "latents of height", "z", 2, "sample", 2),
    ("vae_decoder", "latents of width", "z", 3, "sample", 3),
    ("vae_encoder", "latents of height", "latent", 2, "sample", 2),
    ("vae_encoder", "latents of width", "latent", 3, "sample", 3),
)


def _side(one: Candidate, feature: str, axis: int) -> int | None:
    """Return the size of one axis of a feature, or None if the file does not specify it."""
    shape = (one.inputs | one.outputs).get(feature, ())
    return shape[axis] if axis < len(shape) else None
