"""Locates a checkpoint's files: a local folder, then the hub cache, then the hub."""

from __future__ import annotations

import fnmatch
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato.checkpoints.builtin import BUILT_IN, builtin_model, builtin_path
from sfumato.checkpoints.names import PUBLISHED, repository_of
from sfumato.errors import CheckpointError, DownloadError, SfumatoError, UnknownArgument, UsageError, suggest
from sfumato.files import expanded, read_json
from sfumato.values import reason

if TYPE_CHECKING:
    from os import PathLike

__all__ = [
    "HubOptions",
    "Select",
    "by_patterns",
    "download",
    "find_folder",
    "full_name",
    "index_of",
    "is_network",
    "keep_to_itself",
    "locate_folder",
]

log = logging.getLogger("sfumato")

# Seconds to wait for the hub's first response.
TIMEOUT = 20.0

# Picks the needed file names from the available ones. `strict` requires the variant in every component.
# Raises CheckpointError if the available files are not enough.
Select = Callable[[Sequence[str], bool], list[str]]


@dataclass(frozen=True, kw_only=True)
class HubOptions:
    """How to access the hub. Fields are those of `huggingface_hub`, which also finds the token stored at login."""

    cache_dir: str | Path | None = None
    revision: str | None = None
    token: str | bool | None = None
    local_files_only: bool = False
    force_download: bool = False

    @classmethod
    def of(cls, keywords: dict[str, Any]) -> HubOptions:
        """Build from keyword arguments. Raises `UnknownArgument` for an unknown one."""
        known = [f.name for f in fields(cls)]
        for name in keywords:
            if name not in known:
                near = suggest(name, [*known, "torch_dtype", "variant", "use_safetensors"])
                raise UnknownArgument(f"from_pretrained has no argument {name!r}{near}")
        return cls(**keywords)


def locate_folder(name: str | PathLike[str], select: Select, **hub: Any) -> Path:
    """Return the local folder that holds the files `select` picks, downloading them if necessary.

    "built-in" is the model that ships with the package, "built-in/tiny-vae" a network made for it. A local folder is
    used as it is, without network access. For a hub id, cached files are never requested again. A short name such as
    "sd15" is only looked up in the cache, never downloaded. Raises `CheckpointError` or `DownloadError`.
    """
    options = HubOptions.of(hub)
    folder = _local_folder(name)
    if folder is not None:
        return folder
    repo = _hub_id(name)
    cached = None if options.force_download else _cached_snapshot(repo, options)
    if cached is not None and _complete(cached, select, strict=True):
        return cached
    if options.local_files_only or str(name) in PUBLISHED:
        if cached is not None and _complete(cached, select, strict=False):
            return cached
        raise _not_here(str(name), repo)
    try:
        return download(repo, select, options)
    except DownloadError:
        # If the cache lacks the variant but has the full-precision files, those will do.
        if cached is not None and _complete(cached, select, strict=False):
            log.warning("the hub cannot be reached; using the cached files of %r", repo)
            return cached
        raise


def find_folder(name: str | PathLike[str], *, required: bool = False) -> Path | None:
    """Return a model's local folder, complete or not; None if it must be downloaded or is a single file.

    Quick and offline, so that a command can reject a wrong name before any heavy import. required: the model will not
    be downloaded. Raises `CheckpointError`, `DownloadError` or `UsageError`, like `locate_folder`.
    """
    folder = _local_folder(name)
    if folder is not None or os.path.isfile(expanded(name)):
        return folder
    repo = _hub_id(name)
    cached = _cached_snapshot(repo, HubOptions())
    if cached is None and (required or str(name) in PUBLISHED):
        raise _not_here(str(name), repo)
    return cached


def full_name(name: str | PathLike[str]) -> str:
    """Return a model's name for recipes: short names are expanded, so that it means the same on every machine."""
    return str(name) if os.path.isdir(expanded(name)) else repository_of(str(name))


def _local_folder(name: str | PathLike[str]) -> Path | None:
    if isinstance(name, str) and name == BUILT_IN:
        return builtin_model()
    if not str(name):
        raise UsageError("the model name is empty; give a folder or a hub id such as 'owner/name'")
    path = builtin_path(name)
    return path if os.path.isdir(path) else None


def _not_here(name: str, repo: str) -> DownloadError:
    if name != repo:
        return DownloadError(
            f"{name} ({repo}) is not in the local cache; run 'sfumato download {name}', or give the full id to "
            "download it now"
        )
    return DownloadError(
        f"{repo!r} is not completely in the local cache; run 'sfumato download {repo}' "
        "(in Python: local_files_only=False)"
    )


def download(repo: str, select: Select, options: HubOptions, *, local_dir: Path | None = None) -> Path:
    """Download the files of a repository that `select` picks; files already present are skipped.

    local_dir: a folder to download to instead of the cache. Raises `DownloadError`, or `UsageError` for an invalid hub
    id.
    """
    keep_to_itself()
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        # One request without retries, so that a dead network is noticed at once rather than after half a minute.
        info = HfApi(token=options.token).model_info(repo, revision=options.revision, timeout=TIMEOUT)
        wanted = select([file.rfilename for file in info.siblings or ()], False)
        folder = snapshot_download(
            repo,
            allow_patterns=[_literal(name) for name in wanted],
            cache_dir=options.cache_dir,
            revision=options.revision,
            token=options.token,
            force_download=options.force_download,
            local_dir=local_dir,
        )
    except GatedRepoError as error:
        raise DownloadError(
            f"{repo!r} requires you to accept its license; do so on its page, then run 'hf auth login'"
        ) from error
    except RepositoryNotFoundError as error:
        raise DownloadError(
            f"{repo!r} is neither a local folder nor a hub repository that you can access; check the name"
        ) from error
    except RevisionNotFoundError as error:
        raise DownloadError(
            f"{repo!r} has no revision {options.revision!r}; use an existing branch, tag or commit"
        ) from error
    except HFValidationError as error:
        raise UsageError(f"{repo!r} is not a hub id such as 'owner/name'") from error
    except SfumatoError:
        raise
    except Exception as error:
        raise DownloadError(_why_not(repo, error)) from error
    return Path(folder)


def _why_not(repo: str, error: Exception) -> str:
    """Describe in a sentence why a download failed."""
    from huggingface_hub.errors import HfHubHTTPError

    # The library passes on the exceptions of its HTTP client, which differs between versions.
    client = type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "requests", "urllib3")
    if client or isinstance(error, (HfHubHTTPError, OSError, RuntimeError)):
        return (
            f"{repo!r} is not a local folder, and the hub cannot be reached ({reason(error)}); "
            "check the network or give a local folder"
        )
    # File names that escape the folder, and malformed responses.
    return f"{repo!r} cannot be downloaded ({reason(error)}); do not use this repository"


def by_patterns(*patterns: str) -> Select:
    """Return a `Select` for files that match any of the shell patterns. It raises `CheckpointError` if none does."""

    def select(names: Sequence[str], strict: bool) -> list[str]:
        found = [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
        if not found:
            raise CheckpointError(f"no file matches {', '.join(patterns)}; the repository has {_some(names)}")
        return found

    return select


def _cached_snapshot(repo: str, options: HubOptions) -> Path | None:
    keep_to_itself()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        found = snapshot_download(
            repo,
            revision=options.revision,
            cache_dir=options.cache_dir,
            local_files_only=True,
            # No file has this name. Without a pattern, snapshots that lack any file of the repository are not found,
            # and ours contain only the files we need; `_complete` checks that those are all there.
            allow_patterns=["//"],
        )
    except (LocalEntryNotFoundError, OSError, TypeError, ValueError, RuntimeError):  # RuntimeError: no home folder
        return None
    return Path(found)


def keep_to_itself() -> None:
    """Disable the telemetry of `huggingface_hub`; has no effect once that is imported.

    By default it reports the programs it runs in to the hub, and fetches a list of programs to look for.
    """
    if "huggingface_hub" not in sys.modules:
        os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


def _complete(folder: Path, select: Select, *, strict: bool) -> bool:
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if os.path.isfile(path)]
    try:
        return set(select(names, strict)) <= set(names)
    except CheckpointError:
        return False


def _hub_id(name: str | PathLike[str]) -> str:
    text, path = repository_of(str(name)), expanded(name)
    if os.path.isfile(path):
        raise CheckpointError(
            f"{text} is a single file, but a folder is needed; give a folder, or use from_single_file"
        )
    if path.is_absolute() or text.startswith((".", "~")) or text.count("/") != 1 or "\\" in text:
        near = suggest(text, (BUILT_IN, *PUBLISHED))
        raise CheckpointError(
            f"there is no folder {text}{near}; give an existing folder or a hub id such as 'owner/name'"
        )
    keep_to_itself()
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(text)
    except HFValidationError as error:
        raise UsageError(f"{text!r} is neither an existing folder nor a hub id such as 'owner/name'") from error
    return text


def _literal(name: str) -> str:
    """Escape a file name as a pattern that matches only itself."""
    return "".join(f"[{char}]" if char in "*?[" else char for char in name)


def _some(names: Sequence[str]) -> str:
    return ", ".join(sorted(names)[:6]) + (", …" if len(names) > 6 else "")


def index_of(folder: Path) -> Path:
    """Return the path of a checkpoint's `model_index.json`. Raises `CheckpointError` for the folder of one network."""
    if is_network(folder):
        kind = read_json(folder / "config.json").get("_class_name", "network")
        raise CheckpointError(f"{folder} is one {kind}, not a whole checkpoint; give the folder of a checkpoint")
    return folder / "model_index.json"


def is_network(folder: Path) -> bool:
    """Return whether a folder holds one network, such as a ControlNet or a VAE, instead of a checkpoint."""
    # pathlib's `is_file` raises for long names.
    return os.path.isfile(folder / "config.json") and not os.path.isfile(folder / "model_index.json")
