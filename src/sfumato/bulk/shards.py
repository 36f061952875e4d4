"""WebDataset shards: tar files of `key.png` and `key.json`, and reading a job's images wherever they are."""

from __future__ import annotations

import io
import tarfile
from contextlib import suppress
from typing import TYPE_CHECKING

from sfumato.files import output_folder, replacing

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

__all__ = ["MOST_BYTES", "SHARD", "image_at", "write_shard"]

# Maximum images and bytes per shard.
SHARD, MOST_BYTES = 5_000, 2**30


def write_shard(path: Path, files: Iterable[tuple[str, str, bytes]]) -> dict[str, int]:
    """Write a shard of images (key, request, PNG) atomically. Returns the offset of each PNG in bytes, by key.

    Raises `OutputError`.
    """
    offsets = {}
    output_folder(path.parent)
    with replacing(path) as temporary, tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, request, data in files:
            for name, content in ((f"{key}.png", data), (f"{key}.json", request.encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                if content is data:
                    offsets[key] = tar.offset + tarfile.BLOCKSIZE  # after its header
                tar.addfile(member, io.BytesIO(content))
    return offsets


def image_at(folder: Path, path: str, offset: int, size: int) -> bytes | None:
    """Read an image with the path, offset and size from its ledger entry; None if it is missing."""
    with suppress(OSError), (folder / path.partition("#")[0]).open("rb") as file:
        file.seek(offset)
        return file.read(size if offset else -1)
    return None
