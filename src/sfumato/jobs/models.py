"""The models that a client may choose: by name, never by a path from a request."""

from __future__ import annotations

import os
import sys
import threading
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from sfumato.checkpoints.builtin import BUILT_IN, builtin_model, relative_folders
from sfumato.checkpoints.detect import TINY, VAE
from sfumato.errors import CheckpointError, SfumatoError, UsageError, suggest
from sfumato.files import read_json

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["Model", "Models"]

# Levels of subfolders of the models folder that are searched.
DEPTH = 3
# Model kinds: of folders by the class in their config.json, of files by the family in their header.
NETWORKS = ("ControlNetModel", "ControlNetUnionModel", "T2IAdapter", "MultiAdapter")
FOLDERS: dict[str, str] = {**dict.fromkeys(NETWORKS, "controlnet"), "CLIPVisionModelWithProjection": "image-encoder"}
FOLDERS |= dict.fromkeys(("AutoencoderKL", "AutoencoderTiny"), "vae")
FILES = {
    "a LoRA": "lora", "a textual inversion": "embedding", "an IP-Adapter": "ip-adapter", "a ControlNet": "controlnet",
    "a T2I-Adapter": "controlnet", VAE: "vae", TINY: "vae",
}  # fmt: skip
UNITS = ("CPU_AND_GPU", "CPU_AND_NE", "ALL")


@dataclass(frozen=True)
class Model:
    """A checkpoint, or an adapter for checkpoints.

    kind: "checkpoint", "core-ml", "lora", "embedding", "controlnet", "ip-adapter", "image-encoder" or "vae"; family:
    as far as its header tells; suggested: recommended settings; words: what a small model knows, as suggestions for the
    page; compute_units: for Core ML models, the available compute units, if there is a choice.
    """

    name: str
    kind: str
    path: str
    family: str = ""
    width: int | None = None
    height: int | None = None
    bytes: int = 0
    suggested: dict[str, Any] = field(default_factory=dict)
    words: tuple[str, ...] = ()
    compute_units: tuple[str, ...] = ()

    def public(self) -> dict[str, Any]:
        """Return the fields that clients may see: all except the path."""
        return {key: value for key, value in asdict(self).items() if key != "path"}


class Models:
    """The built-in model, the models in a folder, and those in the hub cache. Scanned again on request."""

    def __init__(self, folder: Path | None = None, default: str = BUILT_IN, *, cached: bool = True) -> None:
        """default: the model for requests that name none. It may be a path, because the user chooses it."""
        self._folder, self._default, self._cached = folder, default, cached
        self._lock = threading.Lock()
        self._found: dict[str, Model] = {one.name: one for one in (_built_in(),)}
        self.default = default if default == BUILT_IN else self._add_default(default)

    def _add_default(self, name: str) -> str:
        place = os.path.abspath(os.path.expanduser(name)) if os.path.exists(os.path.expanduser(name)) else name
        short = os.path.basename(name.rstrip("/\\")) if place != name else name
        self._found[short] = Model(short, "checkpoint", place)
        return short

    def all(self, *, look: bool = False) -> list[Model]:
        """List all models. look: scan for new ones first."""
        if look:
            found = {one.name: one for one in self._look()}
            with self._lock:
                self._found = found | {k: one for k, one in self._found.items() if k in (BUILT_IN, self.default)}
        with self._lock:
            return sorted(self._found.values(), key=lambda one: (one.name != self.default, one.kind, one.name.lower()))

    def get(self, name: str, *kinds: str) -> Model:
        """Return a model by name. Raises `UsageError`, which suggests the most similar name."""
        found = {one.name: one for one in self.all() if not kinds or one.kind in kinds}
        if name not in found:
            found = {one.name: one for one in self.all(look=True) if not kinds or one.kind in kinds}
        if name not in found:
            raise UsageError(f"there is no model {name[:100]!r}{suggest(name, found)}; GET /api/models lists them")
        return found[name]

    def path(self, name: str) -> str:
        """Return the path of a model."""
        return self.get(name).path

    def _look(self) -> Iterator[Model]:
        for folder in relative_folders():
            for one in _below(folder, folder, 1):  # by their names, which hold on every machine
                yield replace(one, name=(name := f"{BUILT_IN}/{one.name}"), path=name)
        if self._cached:
            from sfumato.checkpoints.cached import cached_models

            for one in cached_models():
                if one.kind == "checkpoint":
                    yield Model(one.name or one.repo, "checkpoint", one.repo, bytes=one.bytes)
        if self._folder is not None:
            yield from _below(self._folder, self._folder, DEPTH)


def _built_in() -> Model:
    folder = builtin_model()
    words = read_json(folder / "words.json")
    names = tuple(names[0] for names in words["concepts"].values())
    suggested = read_json(folder / "sfumato.json")
    size = read_json(folder / "unet" / "config.json")["sample_size"] * 8
    return Model(
        BUILT_IN, "checkpoint", BUILT_IN, "built-in", size, size, _bytes(folder), suggested, (*names, *words["styles"])
    )


def _below(folder: Path, root: Path, depth: int) -> Iterator[Model]:
    try:
        entries = sorted((one for one in os.scandir(folder) if one.name[0] != "."), key=lambda one: one.name)
    except OSError:
        return
    for one in entries:
        path, name = folder / one.name, (folder / one.name).relative_to(root).as_posix()
        if one.is_dir():
            if (path / "model_index.json").is_file():
                yield Model(name, "checkpoint", str(path.absolute()), bytes=_bytes(path))
            elif (kind := FOLDERS.get(_class_of(path))) is not None:
                yield Model(name, kind, str(path.absolute()), bytes=_bytes(path))
            elif any(inner.endswith((".mlmodelc", ".mlpackage")) for inner in os.listdir(path)):
                units = UNITS if sys.platform == "darwin" else ()
                yield Model(name, "core-ml", str(path.absolute()), bytes=_bytes(path), compute_units=units)
            elif depth > 1:
                yield from _below(path, root, depth - 1)
        elif one.name.endswith(".safetensors") and not one.name.endswith(".vae.safetensors"):
            yield from _of_file(path, name.removesuffix(".safetensors"))


def _of_file(path: Path, name: str) -> Iterator[Model]:
    from sfumato.checkpoints.about import about_file

    try:
        told = about_file(path, local_files_only=True)
    except (CheckpointError, SfumatoError):
        return
    kind = "checkpoint" if "width" in told else FILES.get(told["family"])
    if kind is not None:
        yield Model(
            name, kind, str(path.absolute()), told["family"], told.get("width"), told.get("height"), told["bytes"],
            told.get("suggested", {}),
        )  # fmt: skip


def _class_of(folder: Path) -> str:
    try:
        told = read_json(folder / "config.json")
    except CheckpointError:
        return ""
    return str(told.get("_class_name") or (told.get("architectures") or [""])[0])


def _bytes(folder: Path) -> int:
    return sum(os.path.getsize(os.path.join(at, name)) for at, _, names in os.walk(folder) for name in names)
