"""Downloads converted models from the hub: one variant of a repository and nothing else.

Repositories of converted models contain several variants, for different attention and runners, each with gigabytes of
weights: `original/packages`, `split_einsum/compiled` and so on.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from sfumato.checkpoints.locate import HubOptions, locate_folder
from sfumato.checkpoints.locate import download as fetch
from sfumato.coreml.layout import KINDS, find_models
from sfumato.errors import DownloadError, SfumatoError, suggest
from sfumato.files import expanded
from sfumato.text.tokenizer import FILES

__all__ = ["PREFERRED", "download", "variants"]

log = logging.getLogger("sfumato")

# All runners can read packages on all systems, and the original attention is the fastest on CPUs and GPUs.
PREFERRED = tuple(
    f"{attention}/{kind}" for kind in KINDS for attention in ("original", "split_einsum", "split_einsum_v2")
)


def download(repo: str, variant: str | None = None, *, output: Path | None = None, revision: str | None = None) -> Path:
    """Download one variant of a repository and return the folder of its models, in the hub's cache or in `output`.

    variant: a folder of the repository such as "original/packages"; None for the first of `PREFERRED` that exists, or
    the only one. Files that are already present are not downloaded again. Raises `DownloadError` if that fails.
    """
    chosen = _Choice(repo, variant)
    place = None if output is None else expanded(output)
    try:
        folder = fetch(repo, chosen.select, HubOptions(revision=revision), local_dir=place)
    except DownloadError:
        cached = None if place is not None or variant is None else _cached(repo, variant, revision)
        if cached is None:
            raise
        log.warning("the hub cannot be reached; using the cached files of %r", repo)
        return cached
    return folder / chosen.found


def _cached(repo: str, variant: str, revision: str | None) -> Path | None:
    """Return the folder of a variant in the hub's cache, or None if its models cannot be read."""
    try:
        folder = locate_folder(repo, _Choice(repo, variant).select, revision=revision, local_files_only=True) / variant
        find_models(folder, required=())
    except SfumatoError:
        return None
    return folder


def variants(names: Iterable[str]) -> list[str]:
    """Return the folders of a repository that contain models, given its file names; "." is the repository itself."""
    homes = {_home(PurePosixPath(name)) for name in names}
    return sorted(str(home) for home in homes if home is not None)


def _home(path: PurePosixPath) -> PurePosixPath | None:
    """Return the folder of the model that a file belongs to, or None."""
    models = [place for place in (path, *path.parents) if place.suffix in KINDS.values()]
    return models[-1].parent if models else None


class _Choice:
    """Selects the files of one variant, and remembers which one."""

    def __init__(self, repo: str, variant: str | None) -> None:
        self.repo, self.variant, self.found = repo, variant, ""

    def select(self, names: Sequence[str], strict: bool) -> list[str]:
        """Filter file names; a callback for `sfumato.checkpoints.locate.download`."""
        self.found = self._choose(variants(names))
        home = PurePosixPath(self.found)
        beside = {place / inner for place in (home, *home.parents) for inner in (".", "tokenizer")}
        paths = {name: PurePosixPath(name) for name in names}
        return [
            name
            for name, path in paths.items()
            if _home(path) == home or (path.name in FILES and path.parent in beside)
        ]

    def _choose(self, present: Sequence[str]) -> str:
        if not present:
            raise DownloadError(
                f"{self.repo!r} contains no Core ML models; for a checkpoint: sfumato coreml convert {self.repo}"
            )
        listed = ", ".join("the repository itself (.)" if one == "." else one for one in present)
        if self.variant is not None:
            wanted = str(PurePosixPath(self.variant.strip("/") or "."))
            if wanted not in present:
                raise DownloadError(
                    f"{self.repo!r} has no variant {self.variant!r}{suggest(wanted, present)}; it has {listed}"
                )
            return wanted
        best = next((one for one in PREFERRED if one in present), present[0])
        if best != PREFERRED[0] and len(present) > 1:
            log.warning("%r has no %s; fetching %s, of %s (--variant)", self.repo, PREFERRED[0], best, listed)
        return best
