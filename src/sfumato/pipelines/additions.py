"""The adapters and embeddings that a request adds to a checkpoint, and how recipes record them."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sfumato.adapters.adapter import read_adapter
from sfumato.adapters.embeddings import check_fits, read_embeddings
from sfumato.adapters.files import read_stored
from sfumato.adapters.outfit import Worn
from sfumato.checkpoints.builtin import builtin_name
from sfumato.errors import UsageError
from sfumato.request import AdapterFile, EmbeddingFile

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sfumato.adapters.files import Stored
    from sfumato.pipelines.parts import Parts
    from sfumato.request import GenerateRequest

__all__ = ["Added", "added", "read_adapters"]

log = logging.getLogger("sfumato")


class Added:
    """A checkpoint with a request's additions.

    parts: include the added embeddings; worn: the adapters; reports: how much of each file was applied; request: lists
    everything that is applied, with the hash of each file, for the recipe.
    """

    @property
    def hashes(self) -> dict[str, str]:
        """The hash of each adapter's weights, by which other programs identify it, by file name."""
        stored = [one.adapter.stored for one in self.worn]
        return {one.path.stem: one.weights_hash[:12] for one in stored if one.path is not None}

    def __init__(self, parts: Parts, worn: tuple[Worn, ...], reports: list[str], request: GenerateRequest) -> None:
        self.parts, self.worn, self.reports, self.request = parts, worn, reports, request


def added(parts: Parts, request: GenerateRequest) -> Added:
    """Read the files of a request.

    Raises `CheckpointError` if a file does not fit, and `UsageError` if its hash differs from the recipe's.
    """
    outfit = parts.outfit
    loaded = outfit.worn(request.adapter_scale)
    reports = [f"{one.adapter.stored.where}: {one.adapter.report}" for one in loaded]
    files = [_told(one) for one in loaded if one.adapter.stored.path is not None]
    if len(files) < len(loaded):
        reports.append("an adapter that was not loaded from a file was active; the recipe cannot reproduce it")
    own = read_adapters(request.adapters, parts.adaptable)
    words = list(outfit.embeddings)
    for file, one in zip(request.adapters, own, strict=True):
        reports.append(f"{one.adapter.stored.where}: {one.adapter.report}")
        files.append(file.replace(sha256=one.adapter.stored.sha256))
        words += one.adapter.embeddings
    embedded = [EmbeddingFile(file=builtin_name(one.path), token=one.token, sha256=one.sha256) for one in outfit.files]
    for one in request.embeddings:
        stored = _read(one.file, one.sha256)
        found = read_embeddings(stored, one.token)
        check_fits(found, [encoder.config.hidden_size for encoder in parts.encoders], stored.where)
        words += found
        embedded.append(one.replace(sha256=stored.sha256))
    told = request.replace(adapters=tuple(files), adapter_scale=1.0, embeddings=tuple(embedded))
    if words:
        parts = replace(parts, outfit=replace(outfit, embeddings=tuple(words)))
    return Added(parts, (*loaded, *own), reports, told)


def read_adapters(every: Sequence[AdapterFile], networks: Mapping[str, Any]) -> tuple[Worn, ...]:
    """Read adapters with their weights, for networks given by role. Raises the same errors as `added`."""
    worn = []
    for file in every:
        adapter = read_adapter(_read(file.file, file.sha256), networks, partial=file.partial)
        texts = {} if file.text_weight is None else {"text_encoder": file.text_weight}
        worn.append(Worn(adapter, file.weight, texts | (file.parts or {})))
    return tuple(worn)


def _read(file: str, sha256: str | None) -> Stored:
    stored = read_stored(file)
    if sha256 not in (None, stored.sha256):
        raise UsageError(f"{file} is not the file that the recipe was made with; restore the original")
    return stored


def _told(worn: Worn) -> AdapterFile:
    partial = bool(worn.adapter.unknown) or sum(map(len, worn.adapter.changes.values())) < worn.adapter.total
    parts = dict(worn.parts) | dict.fromkeys(worn.without, 0.0)
    return AdapterFile(
        file=builtin_name(worn.adapter.stored.path),
        weight=worn.weight,
        parts=parts or None,
        partial=partial,
        sha256=worn.adapter.stored.sha256,
    )
