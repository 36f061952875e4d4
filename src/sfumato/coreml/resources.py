"""The resources folder that Swift apps read: compiled models under Apple's names, and the tokenizer.

Uses Apple's compiler (`xcrun coremlcompiler`, from Xcode) if it is installed. Otherwise the compiled form is written
here (formats/compiled.py), which is experimental, because Apple does not document the format.
"""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
from functools import partial
from typing import TYPE_CHECKING

from sfumato.coreml.formats import read_model, write_compiled
from sfumato.coreml.layout import Models, compiled_names, remove_stale, stale
from sfumato.coreml.roles import PARTS
from sfumato.errors import CheckpointError, OutputError, UsageError
from sfumato.files import output_folder, read_json, replacing
from sfumato.folders import replacing_folder
from sfumato.leftovers import beside

if TYPE_CHECKING:
    from pathlib import Path

    from sfumato.text.tokenizer import CLIPTokenizer

__all__ = ["compile_package", "resources"]

log = logging.getLogger("sfumato")

_COMPILER = ("xcrun", "coremlcompiler")


def resources(folder: Path, models: Models, tokenizer: CLIPTokenizer) -> Path:
    """Compile packages to a folder for Swift apps, with vocab.json and merges.txt, and return the folder.

    Each model is written completely or not at all and replaces one of the same name. Raises `UsageError` if the models
    are compiled already, `OutputError` if Apple's compiler or writing fails.
    """
    if models.kind != "packages":
        raise UsageError(f"the models in {models.folder} are already compiled; give the folder with their packages")
    folder = output_folder(folder)
    if not _has_compiler():
        log.warning(
            "Apple's compiler (part of Xcode) was not found, so the compiled form is Sfumato's own, which is "
            "experimental; apps can compile the packages themselves"
        )
    for part in PARTS:
        paths = models.paths(part)
        if paths:
            names = compiled_names(part, len(paths))
            for package, name in zip(paths, names, strict=True):
                compile_package(package, folder / name)
            remove_stale(stale(folder, names, partial(compiled_names, part)))
    tokenizer.save_pretrained(folder)
    _write_bpe(folder)
    return folder


def compile_package(package: Path, path: Path) -> None:
    """Compile a package to a `.mlmodelc` folder, by Apple's compiler if installed. Raises `OutputError` on failure."""
    if not _has_compiler():
        write_compiled(read_model(package), path)
        return
    with beside(path, folder=True) as place:
        command = [*_COMPILER, "compile", str(package), str(place)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        made = place / f"{package.stem}.mlmodelc"
        if done.returncode != 0 or not made.is_dir():
            said = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()[-1]
            raise OutputError(f"Apple's compiler did not compile {package} ({said}); see Xcode's message")
        with replacing_folder(path) as new:
            shutil.copytree(made, new, dirs_exist_ok=True)


def _has_compiler() -> bool:
    """Return whether Xcode's compiler is installed; the command line tools alone have only `xcrun`."""
    if shutil.which(_COMPILER[0]) is None:
        return False
    found = subprocess.run([_COMPILER[0], "--find", _COMPILER[1]], capture_output=True, check=False)
    return found.returncode == 0


def _write_bpe(folder: Path) -> None:
    """Write the two files that Swift apps read, if the checkpoint has only tokenizer.json."""
    if all((folder / name).is_file() for name in ("vocab.json", "merges.txt")):
        return
    where = folder / "tokenizer.json"
    model = read_json(where).get("model")
    if (
        not isinstance(model, dict)
        or not isinstance(model.get("vocab"), dict)
        or not isinstance(model.get("merges"), list)
    ):
        raise CheckpointError(f"{where} has no byte-pair encoding, which Swift apps need; use another checkpoint")
    merges = [one if isinstance(one, str) else " ".join(one) for one in model["merges"]]
    with replacing(folder / "vocab.json") as temporary:
        temporary.write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
    with replacing(folder / "merges.txt") as temporary:
        temporary.write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
