"""Fetch the art: pinned packages, through npm's own client, unpacked into the downloads folder."""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
from pathlib import Path

from common import HERE, RecipeError, arguments


def packages() -> dict[str, dict[str, str]]:
    """`packages.json`: package name to version, licence, authors and what it is used for."""
    return json.loads((HERE / "packages.json").read_text())


def folder_of(downloads: Path, name: str) -> Path:
    """Where package `name` is unpacked."""
    return downloads / name.replace("@", "").replace("/", "-")


def fetch(name: str, version: str, downloads: Path) -> Path:
    """Pack `name@version` with npm and unpack it; a finished folder is left alone."""
    target = folder_of(downloads, name)
    if (target / "package.json").exists():
        found = json.loads((target / "package.json").read_text())["version"]
        if found == version:
            return target
        shutil.rmtree(target)
    command = ["npm", "pack", "--silent", "--pack-destination", str(downloads), f"{name}@{version}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise RecipeError("npm was not found; install Node.js, its client fetches the art.") from error
    if done.returncode:
        raise RecipeError(f"npm could not fetch {name} {version}; is it still published, and the registry up?")
    archive = downloads / done.stdout.split()[-1]
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with tarfile.open(archive) as tar:
        tar.extractall(partial, filter="data")
    root = next(path for path in partial.iterdir() if (path / "package.json").exists())
    root.rename(target)
    shutil.rmtree(partial)
    archive.unlink()
    return target


def main() -> None:
    args, _, _ = arguments(__doc__)
    args.downloads.mkdir(parents=True, exist_ok=True)
    for name, facts in packages().items():
        print(f"fetch: {name} {facts['version']} ({facts['license']})", flush=True)
        fetch(name, facts["version"], args.downloads)


if __name__ == "__main__":
    main()
