"""Where a checkpoint's files are: a local folder, the hub's cache, or the hub itself, in this order."""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato.checkpoints.builtin import BUILT_IN, builtin_model
from sfumato.errors import CheckpointError, DownloadError, UnknownArgument, UsageError, suggest

if TYPE_CHECKING:
    from os import PathLike

__all__ = ["HubOptions", "Select", "by_patterns", "download", "locate_folder"]

log = logging.getLogger("sfumato")

# Seconds to wait for the hub's first answer.
TIMEOUT = 20.0

# From the names of the files that exist to those that are needed. `strict` asks for the variant in every component.
# Raises CheckpointError where the files that exist do not suffice.
Select = Callable[[Sequence[str], bool], list[str]]


@dataclass(frozen=True, kw_only=True)
class HubOptions:
    """How to reach the hub; the fields are `huggingface_hub`'s own, and a token stored by its login is found."""

    cache_dir: str | Path | None = None
    revision: str | None = None
    token: str | bool | None = None
    local_files_only: bool = False
    force_download: bool = False

    @classmethod
    def of(cls, keywords: dict[str, Any]) -> HubOptions:
        """From keyword arguments; raises `UnknownArgument` for one that is none of these."""
        known = [f.name for f in fields(cls)]
        for name in keywords:
            if name not in known:
                near = suggest(name, [*known, "torch_dtype", "variant", "use_safetensors"])
                raise UnknownArgument(f"from_pretrained has no argument {name!r}{near}")
        return cls(**keywords)


def locate_folder(name: str | PathLike[str], select: Select, **hub: Any) -> Path:
    """The local folder that holds what `select` asks for, downloaded if need be.

    "built-in" is the model of the package. A folder on this machine is taken as it is and no network is touched. A hub
    id is looked up in the cache first: files already there are never asked for again. Raises `CheckpointError` or
    `DownloadError` in one sentence.
    """
    options = HubOptions.of(hub)
    if name == BUILT_IN:
        return builtin_model()
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    repo = _hub_id(name, path)
    cached = None if options.force_download else _cached_snapshot(repo, options)
    if cached is not None and _complete(cached, select, strict=True):
        return cached
    if options.local_files_only:
        if cached is not None and _complete(cached, select, strict=False):
            return cached
        raise DownloadError(
            f"{repo!r} is not completely in the local cache; fetch it with 'sfumato download {repo}' "
            "(in Python: local_files_only=False)"
        )
    try:
        return download(repo, select, options)
    except DownloadError:
        # A variant that is absent from the cache but has a full-precision twin there still draws the picture.
        if cached is not None and _complete(cached, select, strict=False):
            log.warning("the hub cannot be reached; using the files of %r that are in the cache", repo)
            return cached
        raise


def download(repo: str, select: Select, options: HubOptions, *, local_dir: Path | None = None) -> Path:
    """Fetch from the hub what `select` picks from the repository's files; only missing files travel.

    local_dir: the folder to put the files into, in place of the cache. Raises `DownloadError` or, for a name that
    cannot be a hub id, `UsageError`.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        # Asked once and not retried: a dead network is known at once, and not after half a minute.
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
            f"{repo!r} asks for its licence to be accepted: do so on its page, then run 'hf auth login'"
        ) from error
    except RepositoryNotFoundError as error:
        raise DownloadError(
            f"{repo!r} is neither a folder here nor a repository on the hub that you can read; check the name"
        ) from error
    except RevisionNotFoundError as error:
        raise DownloadError(
            f"{repo!r} has no revision {options.revision!r}; choose a branch, tag or commit it has"
        ) from error
    except HFValidationError as error:
        raise UsageError(f"{repo!r} is not a hub id such as 'owner/name'") from error
    except Exception as error:
        # The library lets the exceptions of its HTTP client through, which changes with its version.
        client = type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "requests", "urllib3")
        expected = client or isinstance(error, (HfHubHTTPError, OSError, RuntimeError))
        if isinstance(error, CheckpointError) or not expected:
            raise
        raise DownloadError(
            f"{repo!r} is not a folder here, and the hub cannot be reached ({_first_line(error)}); "
            "check the network or give a local folder"
        ) from error
    return Path(folder)


def by_patterns(*patterns: str) -> Select:
    """Pick every file that matches one of the shell-style patterns; an error if none does."""

    def select(names: Sequence[str], strict: bool) -> list[str]:
        found = [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
        if not found:
            raise CheckpointError(f"no file matches {', '.join(patterns)}; the repository has {_some(names)}")
        return found

    return select


def _cached_snapshot(repo: str, options: HubOptions) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        found = snapshot_download(
            repo,
            revision=options.revision,
            cache_dir=options.cache_dir,
            local_files_only=True,
            # No file has this name. Without a pattern, a snapshot that lacks any file of the repository is not found,
            # and ours hold only what is needed; whether that is all there, `_complete` finds out.
            allow_patterns=["//"],
        )
    except (LocalEntryNotFoundError, OSError, ValueError):
        return None
    return Path(found)


def _complete(folder: Path, select: Select, *, strict: bool) -> bool:
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    try:
        return set(select(names, strict)) <= set(names)
    except CheckpointError:
        return False


def _hub_id(name: str | PathLike[str], path: Path) -> str:
    text = str(name)
    if path.is_file():
        raise CheckpointError(f"{text} is a single file; give the folder that holds model_index.json")
    if path.is_absolute() or text.startswith((".", "~")) or text.count("/") != 1 or "\\" in text:
        raise CheckpointError(f"there is no folder {text}; give an existing folder or a hub id such as 'owner/name'")
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(text)
    except HFValidationError as error:
        raise UsageError(f"{text!r} is neither an existing folder nor a hub id such as 'owner/name'") from error
    return text


def _literal(name: str) -> str:
    """A file name as a pattern that matches only itself."""
    return "".join(f"[{char}]" if char in "*?[" else char for char in name)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]


def _some(names: Sequence[str]) -> str:
    return ", ".join(sorted(names)[:6]) + (", …" if len(names) > 6 else "")
