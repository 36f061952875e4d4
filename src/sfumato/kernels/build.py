"""Compiling our C sources with the machine's own compiler, once, into the cache folder.

They are plain C with a C interface, so that a compiler is all it takes and a second is enough (ADR 9).
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from importlib.resources import files
from pathlib import Path

from sfumato.errors import SfumatoError
from sfumato.files import cache_folder, output_folder, replacing

__all__ = ["CompilerError", "compiled", "compiler"]

log = logging.getLogger("sfumato")

SOURCES = ("vector.h", "attention.c", "normalize.c")
FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-w")
SECONDS = 120


class CompilerError(SfumatoError):
    """The kernels could not be compiled; the sentence says why."""


def compiler() -> str | None:
    """The C compiler that would be used: `$CC`, or the first of cc, gcc and clang on the path."""
    names = (os.environ.get("CC"), "cc", "gcc", "clang")
    return next((found for name in names if name and (found := shutil.which(name))), None)


def compiled(bfloat16: bool) -> Path:
    """The shared library of the kernels in one precision, built first where the cache does not hold it.

    Raises `CompilerError` if there is no compiler or it fails, `OutputError` if the cache cannot be written.
    """
    command = compiler()
    if command is None:
        raise CompilerError("there is no C compiler (cc, gcc or clang); install one for the fast kernels")
    sources = {name: files("sfumato.kernels").joinpath(name).read_bytes() for name in SOURCES}
    definitions = ("-DBFLOAT16",) if bfloat16 else ()
    key = hashlib.sha256(repr((command, FLAGS, definitions, sources, _processor())).encode()).hexdigest()[:16]
    library = cache_folder() / "kernels" / f"{'bfloat16' if bfloat16 else 'float32'}-{key}.so"
    if not _whole(library):
        _build(command, definitions, sources, library)
    return library


def _whole(library: Path) -> bool:
    """Whether the library stands and is what was once built; loading a damaged one would end the process."""
    digest = library.with_suffix(".sha256")
    if not library.is_file():
        return False
    if digest.is_file() and digest.read_bytes() == _digest(library.read_bytes()):
        return True
    log.warning("the compiled kernels in %s are damaged; they are built again", library)
    return False


def _build(command: str, definitions: tuple[str, ...], sources: dict[str, bytes], library: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for source, text in sources.items():
            (folder / source).write_bytes(text)
        units = [str(folder / source) for source in sources if source.endswith(".c")]
        made = folder / "kernels.so"
        try:
            subprocess.run(
                [command, *FLAGS, *definitions, "-o", str(made), *units, "-lm"],
                check=True,
                capture_output=True,
                timeout=SECONDS,
            )
            binary = made.read_bytes()
        except subprocess.CalledProcessError as error:
            lines = error.stderr.decode(errors="replace").strip().splitlines()
            first = next((line for line in lines if "error" in line), next(iter(lines), error))
            raise CompilerError(f"{command} could not build the fast kernels: {first}") from error
        except (OSError, subprocess.TimeoutExpired) as error:
            raise CompilerError(f"{command} could not build the fast kernels: {error}") from error
    output_folder(library.parent)
    for path, content in ((library.with_suffix(".sha256"), _digest(binary)), (library, binary)):
        with replacing(path) as partial:
            partial.write_bytes(content)


def _digest(binary: bytes) -> bytes:
    return hashlib.sha256(binary).hexdigest().encode()


def _processor() -> str:
    """What `-march=native` depends on, so that a cache shared by several machines never serves the wrong one."""
    try:
        flags = next(
            line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(("flags", "Features"))
        )
    except (OSError, StopIteration):
        flags = platform.processor()
    return f"{platform.machine()} {flags}"
