"""Folders of converted models: the file names that Apple's runners expect, and discovery by content.

Names are those of apple/ml-stable-diffusion: packages `Stable_Diffusion_version_{model}_{part}.mlpackage`, which its
Python runner reads, and compiled `TextEncoder.mlmodelc` and so on, which Swift apps read. Nothing here relies on them:
a model is known by the inputs and outputs it has, and chunks by which needs what of which.
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
# What an image cannot be drawn without.
REQUIRED = ("text_encoder", "unet", "vae_decoder")

log = logging.getLogger("sfumato")

_WORDS = {
    "text_encoder": "text encoder",
    "unet": "U-Net",
    "vae_decoder": "VAE decoder",
    "vae_encoder": "VAE encoder",
}
_COMPILED = {"text_encoder": "TextEncoder", "unet": "Unet", "vae_decoder": "VAEDecoder", "vae_encoder": "VAEEncoder"}
# The files of a tokenizer, in either form.
_TOKENIZER = (("vocab.json", "merges.txt"), ("tokenizer.json",))
# Folders below the one that is named: "original/packages" of a repository, and what a download puts around it.
_DEPTH = 3


@dataclass(frozen=True)
class Models:
    """The converted models of one checkpoint.

    folder: where they lie; kind: "packages" or "compiled"; parts: paths by part, several for a U-Net in chunks, in the
    order in which they run; tokenizer: the folder of its files, if they are beside the models; unread: what could not
    be read beside them, and why.
    """

    folder: Path
    kind: str
    parts: Mapping[str, tuple[Path, ...]]
    tokenizer: Path | None = None
    unread: Mapping[Path, str] = field(default_factory=dict)

    @property
    def text_encoder(self) -> Path:
        """The text encoder. Raises `CheckpointError` if it is not there, as do the U-Net and the VAE decoder."""
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
        """The VAE encoder, which only image-to-image needs."""
        return next(iter(self.paths("vae_encoder")), None)

    def paths(self, part: str) -> tuple[Path, ...]:
        """The models of a part; none if it is not there."""
        return self.parts.get(part, ())

    def _needed(self, part: str) -> tuple[Path, ...]:
        if part not in self.parts:
            raise CheckpointError(f"{self.folder} has no {_WORDS[part]}; convert or download all parts")
        return self.parts[part]


def package_names(model: str, part: str, chunks: int = 1) -> tuple[str, ...]:
    """The file names of a part's packages, in order; `model` is a hub id or a path."""
    name = model
    for separator in "/\\:":
        name = name.replace(separator, "_")
    return _numbered(f"Stable_Diffusion_version_{name}_{part}", "_chunk", KINDS["packages"], chunks)


def compiled_names(part: str, chunks: int = 1) -> tuple[str, ...]:
    """The folder names of a part's compiled models, in order."""
    return _numbered(_COMPILED[part], "Chunk", KINDS["compiled"], chunks)


def _numbered(stem: str, word: str, suffix: str, chunks: int) -> tuple[str, ...]:
    if chunks == 1:
        return (stem + suffix,)
    return tuple(f"{stem}{word}{number}{suffix}" for number in range(1, chunks + 1))


def stale(folder: Path, kept: Collection[str], names: Callable[[int], Iterable[str]]) -> list[Path]:
    """Models of an earlier conversion that runners would take in place of those that are kept.

    They are of the same part in another number of chunks; `names` says what its models are called in a number of them.
    """
    others = dict.fromkeys(name for count in range(1, MAX_CHUNKS + 1) for name in names(count))
    return [folder / name for name in others if name not in kept and (folder / name).is_dir()]


def remove_stale(paths: Iterable[Path]) -> None:
    """Remove such models, and say so."""
    for path in paths:
        log.warning("%s, from an earlier conversion, is removed", path)
        shutil.rmtree(path)


def tree(root: Path, name: str, attention: str, kind: str) -> Path:
    """Where repositories on the hub have models: `<root>/<name>/<attention>/<kind>`; nothing is made."""
    if kind not in KINDS:
        raise UsageError(f"models are 'packages' or 'compiled', not {kind!r}")
    return root / name / attention / kind


def folder_bytes(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return sum(one.stat().st_size for one in (path, *path.rglob("*")) if one.is_file())


def tokenizer_folder(folder: Path, top: Path) -> Path | None:
    """The nearest folder with a tokenizer's files: this one, `tokenizer` in it, or one above it up to `top`."""
    for place in (folder, *folder.parents):
        for home in (place, place / "tokenizer"):
            if any(all((home / name).is_file() for name in names) for names in _TOKENIZER):
                return home
        if place == top:
            break
    return None


def find_models(folder: Path, *, kind: str | None = None, required: Collection[str] = REQUIRED) -> Models:
    """The models in a folder, or in one below it, such as `original/packages`, up to three levels down.

    kind: "packages" or "compiled", where only those are to be looked at; required: the parts that must be there. Raises
    `UsageError` where several folders could be meant, and `CheckpointError` where parts are missing, do not belong
    together, or cannot be read. Both a whole U-Net and its chunks: the chunks are taken, as by Apple's runners.
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
    """The models of one kind that lie side by side."""

    folder: Path
    kind: str
    candidates: Sequence[Candidate]

    @property
    def parts(self) -> set[str]:
        """Those that some model here is, or is a chunk of."""
        return {one.part for one in self.candidates if one.part}

    def has(self, required: Collection[str]) -> bool:
        """Whether every required part is here, and any part at all."""
        return bool(self.parts) and set(required) <= self.parts


def _sets(folder: Path) -> list[_Set]:
    found: dict[tuple[Path, str], list[Candidate]] = {}
    for path in _models_below(folder, _DEPTH):
        kind = "packages" if (path / MANIFEST).is_file() else "compiled"
        found.setdefault((path.parent, kind), []).append(look(path))
    return [_Set(place, kind, candidates) for (place, kind), candidates in found.items()]


def _models_below(folder: Path, depth: int) -> Iterator[Path]:
    """Models in a folder, then those in the folders in it; nothing hidden, which are half-written ones."""
    inner = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    models = [path for path in inner if is_model(path)]
    yield from models
    if depth:
        for path in inner:
            if path not in models:
                yield from _models_below(path, depth - 1)


def _nothing(folder: Path, kind: str | None) -> str:
    if (folder / "model_index.json").is_file():
        return f"{folder} is a checkpoint and no Core ML model; convert it first: sfumato coreml convert {folder}"
    wanted = f"{kind} ({KINDS[kind]} folders)" if kind else "Core ML models (.mlpackage or .mlmodelc folders)"
    return f"there are no {wanted} in {folder}, nor in folders up to three levels below it"


def _incomplete(found: _Set, required: Collection[str]) -> str:
    missing = " and no ".join(_WORDS[part] for part in PARTS if part in (required or PARTS) and part not in found.parts)
    if trouble := next((one.trouble for one in found.candidates if one.trouble), ""):
        return f"{found.folder} has no {missing} that can be read: {trouble}"
    present = ", ".join(one.path.name for one in found.candidates)
    return f"{found.folder} has no {missing}, only {present}; convert or download all parts"
