"""Loads the compiled kernels from the wheel, or else compiles the C sources once with the local compiler.

They are plain C with a C interface, so that any compiler will do and builds take about a second (ADR 9).
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import signal
import subprocess
import tempfile
import time
from contextlib import suppress
from importlib.resources import files
from pathlib import Path

from sfumato.cache import is_private, private_folder, work_without
from sfumato.errors import OutputError, SfumatoError
from sfumato.files import replacing
from sfumato.kernels.variants import COMPILE, UNITS, compiler, fitting, processor_flags
from sfumato.leftovers import beside

__all__ = ["CompilerError", "compiler", "loaded", "shipped"]

log = logging.getLogger("sfumato")

SOURCES = ("vector.h", *UNITS)
SYMBOLS = ("attention", "geglu", "group_norm")
FLAGS = (*COMPILE, "-march=native", "-shared")
# A build takes a second; one that takes this long hangs. Slow failures are not repeated for a day.
SECONDS, QUICK_SECONDS, REMEMBERED_SECONDS = 20.0, 2.0, 86400.0


class CompilerError(SfumatoError):
    """The kernels could not be compiled or loaded; the message says why."""


def shipped(dtype: str) -> Path | None:
    """Return the library that the installed wheel has for this processor and dtype; None if there is none."""
    folder = Path(__file__).with_name("built")
    with suppress(OSError):
        for variant in fitting(dtype):
            library = folder / variant.file
            if library.exists() and all(map(is_private, (library, folder))):
                return library
    return None


def loaded(bfloat16: bool) -> ctypes.CDLL:
    """Return the kernel library for float32 or bfloat16, from the wheel, from the cache or built now.

    Neither is used if other users can write to it. Raises `CompilerError` if there is no compiler, compilation fails,
    or the library cannot be loaded.
    """
    brought = shipped("bfloat16" if bfloat16 else "float32")
    if brought is not None:
        with suppress(OSError, AttributeError):  # such as with a torch without OpenMP
            return _opened(brought)
    command = compiler()
    if command is None:
        raise CompilerError("there is no C compiler (cc, gcc or clang); install one for the fast kernels")
    sources = {name: files("sfumato.kernels").joinpath(name).read_bytes() for name in SOURCES}
    definitions = ("-DBFLOAT16",) if bfloat16 else ()
    key = _hash(command, FLAGS, definitions, sources, _processor())
    name = f"{'bfloat16' if bfloat16 else 'float32'}-{key}.so"
    folder = private_folder("kernels")
    kept = None if folder is None else _reopened(folder / name)
    if kept is not None:
        return kept
    failure = None if folder is None else folder / f"failed-{_hash(command, _stamp(command))}.txt"
    _raise_remembered(failure)
    log.info("building the %s kernels with %s", name.partition("-")[0], command)
    began = time.monotonic()
    try:
        with beside(Path(tempfile.gettempdir(), "sfumato-kernels"), folder=True, mode=0o700) as scratch:
            made = _build([command, *FLAGS, *definitions], sources, scratch)
            return _kept(made, None if folder is None else folder / name)
    except CompilerError as error:
        if time.monotonic() - began > QUICK_SECONDS:
            _remember(failure, error)
        raise
    except OSError as error:
        raise CompilerError(f"the fast kernels need space for temporary files ({error})") from error


def _reopened(library: Path) -> ctypes.CDLL | None:
    """Load a cached library if it is ours and undamaged; loading a damaged one would crash the process."""
    digest = library.with_suffix(".sha256")
    try:
        if not library.exists():
            return None
        if all(map(is_private, (library, digest))) and digest.read_bytes() == _digest(library.read_bytes()):
            return _opened(library)
    except (OSError, AttributeError):
        pass
    log.warning("the compiled kernels in %s are damaged and are rebuilt", library)
    return None


def _opened(library: Path) -> ctypes.CDLL:
    """Load a library. Raises `OSError` if that fails and `AttributeError` if it lacks one of `SYMBOLS`."""
    opened = ctypes.CDLL(str(library))
    for name in SYMBOLS:
        getattr(opened, name)
    return opened


def _build(command: list[str], sources: dict[str, bytes], scratch: Path) -> Path:
    """Compile in a scratch folder and return the library's path. Raises `CompilerError`, or `OSError` if it is full."""
    for source, text in sources.items():
        (scratch / source).write_bytes(text)
    made, said = scratch / "kernels.so", scratch / "errors.txt"
    units = [str(scratch / source) for source in sources if source.endswith(".c")]
    why = _run([*command, "-o", str(made), *units, "-lm"], said)
    if why is None and made.is_file():
        return made
    lines = said.read_bytes()[: 2**16].decode(errors="replace").strip().splitlines()
    first = next((line for line in lines if "error" in line), next(iter(lines), why or "it made no library"))
    raise CompilerError(f"{command[0]} could not build the fast kernels: {first}")


def _run(command: list[str], said: Path) -> str | None:
    """Run a compiler, with its temporary files next to ours. Return None on success, else a description of the failure.

    It runs in its own session, so that all its processes can be killed if it hangs or we are interrupted.
    """
    with said.open("wb") as errors:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                env=os.environ | {"TMPDIR": str(said.parent)},
                start_new_session=True,
            )
        except OSError as error:
            return str(error)
        try:
            code = process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            return f"it did not finish within {SECONDS:g} s"
        finally:
            if process.poll() is None:
                with suppress(OSError):
                    os.killpg(process.pid, signal.SIGKILL) if hasattr(os, "killpg") else process.kill()
                process.wait()
    return None if code == 0 else f"it ended with exit status {code}"


def _kept(made: Path, library: Path | None) -> ctypes.CDLL:
    """Load the compiled library, and save it to the cache for later processes."""
    copied = False
    try:
        try:
            opened = _opened(made)
        except OSError:  # the temporary folder may be mounted noexec
            if library is None or not (copied := _copy(made, library)):
                raise
            return _opened(library)
        if library is not None:
            _copy(made, library)
        return opened
    except (OSError, AttributeError) as error:
        if library is not None and copied:
            library.unlink(missing_ok=True)
        raise CompilerError(f"the fast kernels were compiled but cannot be loaded: {error}") from error


def _copy(made: Path, library: Path) -> bool:
    """Copy a library and its digest to the cache. Return whether that succeeded."""
    binary = made.read_bytes()
    try:
        for path, content in ((library.with_suffix(".sha256"), _digest(binary)), (library, binary)):
            with replacing(path, mode=0o600) as partial:
                partial.write_bytes(content)
    except OutputError as error:
        work_without(error)
        return False
    return True


def _raise_remembered(failure: Path | None) -> None:
    """Raise `CompilerError` if this compiler recently failed and was slow to do so."""
    if failure is not None:
        with suppress(OSError, ValueError):
            if 0 <= time.time() - failure.stat().st_mtime < REMEMBERED_SECONDS:
                raise CompilerError(f"{failure.read_text(encoding='utf-8')}; delete {failure} to try again")


def _remember(failure: Path | None, error: CompilerError) -> None:
    if failure is not None:
        with suppress(OutputError), replacing(failure) as partial:
            partial.write_text(str(error), encoding="utf-8")


def _stamp(command: str) -> tuple[int, int] | None:
    """Return the compiler's size and modification time, which change when it is updated."""
    with suppress(OSError):
        found = Path(command).stat()
        return found.st_size, found.st_mtime_ns
    return None


def _hash(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode(errors="surrogateescape")).hexdigest()[:16]


def _digest(binary: bytes) -> bytes:
    return hashlib.sha256(binary).hexdigest().encode()


def _processor() -> str:
    """Return what `-march=native` depends on, so that a cache shared by several machines never serves the wrong one."""
    return f"{platform.machine()} {processor_flags() or platform.processor()}"
