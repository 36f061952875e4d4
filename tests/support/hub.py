"""A hub without a network: repositories are folders, and the cache is laid out as the real one."""

from __future__ import annotations

import fnmatch
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cache(root: Path, repo: str, folder: Path, names: list[str] | None = None) -> Path:
    """Put a repository's files (or some of them) into a cache; returns the snapshot."""
    home = root / f"models--{repo.replace('/', '--')}"
    snapshot = home / "snapshots" / COMMIT
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = file.relative_to(folder).as_posix()
        if names is None or any(fnmatch.fnmatchcase(name, pattern) for pattern in names):
            (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, snapshot / name)
    snapshot.mkdir(parents=True, exist_ok=True)
    (home / "refs").mkdir(exist_ok=True)
    (home / "refs" / "main").write_text(COMMIT)
    return snapshot


class FakeHub:
    """Stands in for the hub's listing and download; `asked` is what was asked of it."""

    def __init__(self, monkeypatch: Any, cache_dir: Path, repos: dict[str, Path]) -> None:
        self.repos, self.cache_dir, self.asked = repos, cache_dir, []
        self.tokens: list[object] = []
        self.error: Exception | None = None
        real = huggingface_hub.snapshot_download

        def model_info(api: Any, repo: str, *, revision: str | None = None, **_: Any) -> SimpleNamespace:
            self.asked.append(("list", repo, revision))
            self.tokens.append(api.token)
            if self.error is not None:
                raise self.error
            files = [path for path in repos[repo].rglob("*") if path.is_file()]
            names = [path.relative_to(repos[repo]).as_posix() for path in files]
            return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in names])

        def snapshot_download(repo: str, *, local_files_only: bool = False, **options: Any) -> str:
            if local_files_only:
                found = options.get("cache_dir") or cache_dir
                return real(repo, local_files_only=True, **(options | {"cache_dir": found}))
            self.asked.append(("download", repo, tuple(sorted(options["allow_patterns"]))))
            return str(cache(cache_dir, repo, repos[repo], options["allow_patterns"]))

        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
