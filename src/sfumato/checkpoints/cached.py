"""The checkpoints in the hub cache: listing them, their sizes, and removing them."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sfumato.checkpoints.locate import keep_to_itself
from sfumato.checkpoints.names import PUBLISHED, repository_of
from sfumato.errors import CheckpointError, UsageError, suggest
from sfumato.values import reason

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Cached", "cached_models", "remove_cached"]


@dataclass(frozen=True)
class Cached:
    """A repository in the cache: hub id, kind of content, size on disk in bytes, folder, and short name if any."""

    repo: str
    kind: str
    bytes: int
    folder: Path
    name: str | None = None


def cached_models() -> list[Cached]:
    """Return the cached models that Sfumato can use, sorted by id. Other repositories are skipped."""
    short = {repo: name for name, repo in PUBLISHED.items()}
    found, scanned = [], _scanned()
    for repo in () if scanned is None else scanned.repos:
        kinds = {kind for revision in repo.revisions if (kind := _kind(revision.snapshot_path))}
        if repo.repo_type == "model" and kinds:
            found.append(Cached(repo.repo_id, min(kinds), repo.size_on_disk, repo.repo_path, short.get(repo.repo_id)))
    return sorted(found, key=lambda one: one.repo.lower())


def remove_cached(name: str) -> Cached:
    """Delete a model from the cache, with all its revisions.

    Raises `UsageError` if the model is not cached and `CheckpointError` if its files cannot be deleted.
    """
    found = {one.repo: one for one in cached_models()}
    repo = repository_of(name)
    if repo not in found:
        known = [*found, *(one.name for one in found.values() if one.name)]
        raise UsageError(f"{name!r} is not in the cache{suggest(name, known)}; 'sfumato models' lists what is")
    try:
        # Delete the folder rather than single commits: another repository may have a commit with the same hash.
        shutil.rmtree(found[repo].folder)
    except OSError as error:
        raise CheckpointError(f"{repo} cannot be removed ({reason(error)}); check the cache's permissions") from error
    return found[repo]


def _scanned() -> Any:
    keep_to_itself()
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        return scan_cache_dir()
    except (CacheNotFound, ValueError):
        return None


def _kind(snapshot: Path) -> str | None:
    """Return what a snapshot contains that we can use: a checkpoint, Core ML models, or one part of a checkpoint."""
    if (snapshot / "model_index.json").is_file():
        return "checkpoint"
    models = (path for pattern in ("*.mlpackage", "*.mlmodelc") for path in snapshot.rglob(pattern))
    if next(models, None) is not None:
        return "Core ML"
    files = (path for path in snapshot.glob("*.safetensors") if (snapshot / "config.json").is_file())
    weights = next((path for path in files if path.name.startswith("diffusion_pytorch_model")), None)
    return None if weights is None else "part"
