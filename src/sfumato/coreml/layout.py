"""Folders of converted models: the file names that Apple's runners expect, and discovery by content.

Names are those of apple/ml-stable-diffusion: packages `Stable_Diffusion_version_{model}_{part}.mlpackage`, which its
Python runner reads, and compiled `TextEncoder.mlmodelc` and so on, which Swift apps read. Nothing here relies on names:
models are identified by their inputs and outputs, and chunks by the features that they pass on.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sfumato.coreml.chunk import MAX_CHUNKS
from sfumato.coreml.formats import is_model
from sfumato.coreml.formats.package import MANIFEST
from sfumato.coreml.roles import PARTS, Candidate, look, sorted_out
from sfumato.errors import CheckpointError, UsageError
from sfumato.files import expanded

__all__ = [
    "KINDS",
    "REQUIRED",
    "Models",
    "compiled_names",
    "find_models",
    "folder_bytes",
    "package_names",
    "remove_stale",
    "stale",
    "tokenizer_folder",
    "tree",
]

KINDS = {"packages": ".mlpackage", "compiled": ".mlmodelc"}
# The parts that text-to-image needs.
REQUIRED = ("text_encoder", "unet", "vae_decoder")

log = logging.getLogger("sfumato")

_WORDS = {
    "text_encoder": "text encoder",
    "unet": "U-Net",
    "vae_decoder": "VAE decoder",
    "vae_encoder": "VAE encoder",
}
_COMPILED = {"text_encoder": "TextEncoder", "unet": "Unet", "vae_decoder": "VAEDecoder", "vae_encoder": "VAEEncoder"}
# The files of a tokenizer, in either format.
_TOKENIZER = (("vocab.json", "merges.txt"), ("tokenizer.json",))
# Levels to search below the given folder: "original/packages" of a repository, and one more around a download.
_DEPTH = 3


@dataclass(frozen=True)
class Models:
    """The converted models of one checkpoint.

    folder: where they are; kind: "packages" or "compiled"; parts: paths by part, several for a U-Net in chunks, in
    order of execution; tokenizer: the folder of its files, if present; unread: models that could not be read, and why.
    """

    folder: Path
    kind: str
    parts: Mapping[str, tuple[Path, ...]]
    tokenizer: Path | None = None
    unread: Mapping[Path, str] = field(default_factory=dict)

    @property
    def text_encoder(self) -> Path:
        """The text encoder. Raises `CheckpointError` if it is missing, as do `unet` and `vae_decoder`."""
        return self._needed("text_encoder")[0]

    @property
    def unet(self) -> tuple[Path, ...]:
        """The U-Net: one model, or its chunks in order."""
        return self._needed("unet")

    @property
    def vae_decoder(self) -> Path:
        """The VAE decoder."""
        return self._needed("vae_decoder")[0]

    @property
    def vae_encoder(self) -> Path | None:
        """The VAE encoder, which only image-to-image needs; None if it is missing."""
        return next(iter(self.paths("vae_encoder")), None)

    def paths(self, part: str) -> tuple[Path, ...]:
        """Return the models of a part, or an empty tuple if it is missing."""
        return self.parts.get(part, ())

    def _needed(self, part: str) -> tuple[Path, ...]:
        if part not in self.parts:
            raise CheckpointError(f"{self.folder} has no {_WORDS[part]}; convert or download all parts")
        return self.parts[part]


def package_names(model: str, part: str, chunks: int = 1) -> tuple[str, ...]:
    """Return the file names of a part's packages, in order; `model` is a hub id or a path."""
    name = model
    for separator in "/\\:":
        name = name.replace(separator, "_")
    return _numbered(f"Stable_Diffusion_version_{name}_{part}", "_chunk", KINDS["packages"], chunks)


def compiled_names(part: str, chunks: int = 1) -> tuple[str, ...]:
    """Return the folder names of a part's compiled models, in order."""
    return _numbered(_COMPILED[part], "Chunk", KINDS["compiled"], chunks)


def _numbered(stem: str, word: str, suffix: str, chunks: int) -> tuple[str, ...]:
    if chunks == 1:
        return (stem + suffix,)
    return tuple(f"{stem}{word}{number}{suffix}" for number in range(1, chunks + 1))


def stale(folder: Path, kept: Collection[str], names: Callable[[int], Iterable[str]]) -> list[Path]:
    """Return models of an earlier conversion that runners would use instead of the `kept` ones.

    They are the same part in a different number of chunks; `names` returns the model names for a number of chunks.
    """
    others = dict.fromkeys(name for count in range(1, MAX_CHUNKS + 1) for name in names(count))
    return [folder / name for name in others if name not in kept and (folder / name).is_dir()]


def remove_stale(paths: Iterable[Path]) -> None:
    """Remove these models, and log each."""
    for path in paths:
        log.warning("%s, from an earlier conversion, is removed", path)
        shutil.rmtree(path)


def tree(root: Path, name: str, attention: str, kind: str) -> Path:
    """Return the path that hub repositories use, `<root>/<name>/<attention>/<kind>`, without creating it.

    Raises `UsageError` for an unknown kind.
    """
    if kind not in KINDS:
        raise UsageError(f"models are 'packages' or 'compiled', not {kind!r}")
    return root / name / attention / kind


def folder_bytes(path: Path) -> int:
    """Return the size in bytes of a file, or of all files in a folder."""
    return sum(one.stat().st_size for one in (path, *path.rglob("*")) if one.is_file())


def tokenizer_folder(folder: Path, top: Path) -> Path | None:
    """Return the nearest folder with tokenizer files: this one, its `tokenizer` folder, or a parent's, up to `top`."""
    for place in (folder, *folder.parents):
        for home in (place, place / "tokenizer"):
            if any(all((home / name).is_file() for name in names) for names in _TOKENIZER):
                return home
        if place == top:
            break
    return None


def find_models(folder: Path, *, kind: str | None = None, required: Collection[str] = REQUIRED) -> Models:
    """Find the models in a folder or below it, such as in `original/packages`, up to three levels deep.

    kind: look only for "packages" or "compiled"; required: the parts that must be there. Raises `UsageError` if several
    folders qualify, and `CheckpointError` if parts are missing, do not belong together, or cannot be read. If there are
    both a whole U-Net and chunks, the chunks are used, as in Apple's runners.
    """
    folder = expanded(folder)
    if kind is not None and kind not in KINDS:
        raise UsageError(f"models are 'packages' or 'compiled', not {kind!r}")
    if is_model(folder):
        raise UsageError(f"{folder} is a single model; give the folder that contains all of them")
    if not os.path.isdir(folder):
        raise CheckpointError(f"there is no folder {folder}; give the one that contains the converted models")
    sets = [one for one in _sets(folder) if kind in (None, one.kind)]
    if not sets:
        raise CheckpointError(_nothing(folder, kind))
    fit = [one for one in sets if one.has(required)]
    here = [one for one in fit if one.folder == folder]
    whole = [one for one in here or fit if one.has(REQUIRED)] or here or fit
    if len(whole) > 1:
        places = " and ".join(f"{one.folder} ({one.kind})" for one in whole)
        hint = (
            "name one of these folders"
            if len({one.folder for one in whole}) > 1
            else "put each set in its own folder, or select one with --model-sources packages"
        )
        raise UsageError(f"{folder} contains several sets of models: {places}; {hint}")
    if not whole:
        raise CheckpointError(_incomplete(max(sets, key=lambda one: len(one.parts)), required))
    chosen = whole[0]
    unread = {one.path: one.trouble for one in chosen.candidates if one.trouble}
    for path, trouble in unread.items():
        log.warning("%s is ignored: %s", path.name, trouble)
    parts = sorted_out(chosen.folder, chosen.candidates)
    return Models(chosen.folder, chosen.kind, parts, tokenizer_folder(chosen.folder, folder), unread)


@dataclass(frozen=True)
class _Set:
    """The models of one kind in the same folder."""

    folder: Path
    kind: str
    candidates: Sequence[Candidate]

    @property
    def parts(self) -> set[str]:
        """The parts that these models, or chunks, belong to."""
        return {one.part for one in self.candidates if one.part}

    def has(self, required: Collection[str]) -> bool:
        """Return whether all required parts, and at least one part, are present."""
        return bool(self.parts) and set(required) <= self.parts


def _sets(folder: Path) -> list[_Set]:
    found: dict[tuple[Path, str], list[Candidate]] = {}
    for path in _models_below(folder, _DEPTH):
        kind = "packages" if (path / MANIFEST).is_file() else "compiled"
        found.setdefault((path.parent, kind), []).append(look(path))
    return [_Set(place, kind, candidates) for (place, kind), candidates in found.items()]


def _models_below(folder: Path, depth: int) -> Iterator[Path]:
    """Yield the models in a folder, then those in its subfolders; hidden folders are skipped: they are incomplete."""
    inner = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    models = [path for path in inner if is_model(path)]
    yield from models
    if depth:
        for path in inner:
            if path not in models:
                yield from _models_below(path, depth - 1)


def _nothing(folder: Path, kind: str | None) -> str:
    if (folder / "model_index.json").is_file():
        return f"{folder} is a checkpoint, not a Core ML model; convert it first: sfumato coreml convert {folder}"
    wanted = f"{kind} ({KINDS[kind]} folders)" if kind else "Core ML models (.mlpackage or .mlmodelc folders)"
    return f"there are no {wanted} in {folder}, nor in folders up to three levels below it"


def _incomplete(found: _Set, required: Collection[str]) -> str:
    missing = " and no ".join(_WORDS[part] for part in PARTS if part in (required or PARTS) and part not in found.parts)
    if trouble := next((one.trouble for one in found.candidates if one.trouble), ""):
        return f"{found.folder} has no {missing} that can be read: {trouble}"
    present = ", ".join(one.path.name for one in found.candidates)
    return f"{found.folder} has no {missing}, only {present}; convert or download all parts"
