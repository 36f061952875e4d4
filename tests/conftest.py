"""What all tests share: one thread, no network, quiet reference libraries, and tiny checkpoints that are written once."""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from support.checkpoints import EVERY
from support.processes import ForkServer

# A worker for each core, and one thread for each worker: two threads on a core that is busy wait for each other.
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(name, "1")

# Processes that tests start would compile the package anew, each for half a second.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# Nothing of the user's cache is read or written; the kernels are built once for all tests and workers.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["SFUMATO_CACHE"] = tempfile.mkdtemp(prefix="sfumato-tests-")
    atexit.register(shutil.rmtree, os.environ["SFUMATO_CACHE"], ignore_errors=True)

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

# Warnings of the reference libraries about themselves; ours are errors (pyproject.toml).
REFERENCE_WARNINGS = (
    r"ignore::FutureWarning:diffusers",
    r"ignore::FutureWarning:transformers",
    r"ignore::DeprecationWarning:diffusers",
    r"ignore::DeprecationWarning:transformers",
    r"ignore:__array_wrap__ must accept context:DeprecationWarning",  # their KDPM2 on numpy 2
    r"ignore:Should have t[ab][<>]=t[01] but got:UserWarning",  # their Brownian tree, asked beyond its ends by rounding
)


def pytest_configure(config: pytest.Config) -> None:
    for line in REFERENCE_WARNINGS:
        config.addinivalue_line("filterwarnings", line)


def pytest_collection_finish() -> None:
    """What all tests import stays for good: it need not be looked through for garbage again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch):
    """The list of addresses somebody tried to reach; every attempt fails, and so does the test."""
    attempts: list[object] = []

    def refuse(*address: object, **_: object) -> None:
        attempts.append(address)
        raise OSError("this test has no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    yield attempts
    assert attempts == []


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """`once("name", write)` is a folder that `write(folder)` has made, for all workers; nobody may edit it."""
    root = tmp_path_factory.getbasetemp()
    root = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "once"

    def get(name: str, write: Callable[[Path], object]) -> Path:
        folder = root / name
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f"{folder.name}.lock")):
            if not folder.is_dir():
                try:
                    write(folder)
                except BaseException:
                    shutil.rmtree(folder, ignore_errors=True)
                    raise
        return folder

    return get


@pytest.fixture(scope="session")
def checkpoints(once: Callable[..., Path]) -> Callable[..., Path]:
    """`checkpoints("sd15")` is the folder of that random checkpoint, written by us; `by="reference"` by the others."""

    def get(shape: str = "sd15", by: str = "ours") -> Path:
        from support.checkpoints import write_ours, write_reference

        write = write_ours if by == "ours" else write_reference
        return once(f"checkpoints/{by}/{shape}", lambda folder: write(folder, shape))

    return get


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """`written("sdxl")`: models, their file in the original layout and their folder; not to be changed."""
    made = {}

    def get(name: str = "sd15") -> Any:
        from support.single_files import write_tiny

        if name not in made:
            made[name] = write_tiny(tmp_path_factory.mktemp(name), name)
        return made[name]

    return get


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """For processes: no network, no cache of the user's, no colours, and kernels that are built already."""
    import torch

    from sfumato.kernels import CompilerError, kernels_for

    for dtype in (torch.float32, torch.bfloat16):
        with contextlib.suppress(CompilerError):
            kernels_for(dtype)
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "COLUMNS", "SFUMATO_MODEL"))}
    return kept | {
        "HF_HOME": str(tmp_path_factory.mktemp("hub")),
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "SFUMATO_CONFIG": str(tmp_path_factory.mktemp("config") / "config.toml"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_COLOR": "1",
        "PYTHONUTF8": "1",
    }


@pytest.fixture(scope="session")
def server(environment: dict[str, str]) -> Iterator[ForkServer]:
    """Starts processes that need not import torch anew."""
    started = ForkServer(environment)
    yield started
    started.close()


@pytest.fixture(scope="session")
def _loaded(checkpoints):
    """Pipelines of both libraries over the same folder; parts are shared, so tests take fresh ones from `pipes`."""
    cache: dict[tuple[str, str], dict[str, object]] = {}

    def get(shape: str, which: str) -> dict[str, object]:
        if (shape, which) not in cache:
            import diffusers
            import torch

            import sfumato

            library = sfumato if which == "ours" else diffusers
            cls = getattr(library, EVERY[shape].pipeline)
            pipe = cls.from_pretrained(checkpoints(shape), torch_dtype=torch.float32)
            cache[shape, which] = dict(pipe.components)
        return cache[shape, which]

    return get


@pytest.fixture
def ours(_loaded):
    """`ours("sd15")`: a fresh quiet Sfumato pipeline over shared weights (do not edit these in place)."""
    import sfumato

    def get(shape: str = "sd15", cls=None):
        parts = dict(_loaded(shape, "ours"))
        parts["scheduler"] = type(parts["scheduler"]).from_config(parts["scheduler"].config)
        pipe = (cls or getattr(sfumato, EVERY[shape].pipeline))(**parts, **EVERY[shape].flags)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return get


@pytest.fixture
def theirs(_loaded):
    """`theirs("sd15")`: the same pipeline of the reference library."""
    import diffusers

    def get(shape: str = "sd15", cls=None):
        parts = dict(_loaded(shape, "theirs"))
        parts["scheduler"] = type(parts["scheduler"]).from_config(parts["scheduler"].config)
        pipe = (cls or getattr(diffusers, EVERY[shape].pipeline))(**parts, **EVERY[shape].flags)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return get
