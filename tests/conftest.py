"""What all tests share: no network, quiet reference libraries, and tiny checkpoints that are written once."""

from __future__ import annotations

import atexit
import os
import shutil
import socket
import tempfile
from pathlib import Path

import pytest

# Nothing of the user's cache is read or written; the kernels are built once for all tests.
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
def checkpoints(tmp_path_factory: pytest.TempPathFactory):
    """`checkpoints("sd15")` is the folder of that random checkpoint, written by us; `by="reference"` by the others."""
    from support.checkpoints import write_ours, write_reference

    root = tmp_path_factory.mktemp("checkpoints")

    def get(shape: str = "sd15", by: str = "ours") -> Path:
        folder = root / by / shape
        if not folder.is_dir():
            folder.parent.mkdir(exist_ok=True)
            (write_ours if by == "ours" else write_reference)(folder, shape)
        return folder

    return get


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
            pipe = library.StableDiffusionPipeline.from_pretrained(checkpoints(shape), torch_dtype=torch.float32)
            cache[shape, which] = dict(pipe.components)
        return cache[shape, which]

    return get


@pytest.fixture
def ours(_loaded):
    """`ours("sd15")`: a fresh quiet Sfumato pipeline over shared weights (do not edit these in place)."""
    import sfumato

    def get(shape: str = "sd15", cls=sfumato.StableDiffusionPipeline):
        parts = dict(_loaded(shape, "ours"))
        parts["scheduler"] = type(parts["scheduler"]).from_config(parts["scheduler"].config)
        pipe = cls(**parts)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return get


@pytest.fixture
def theirs(_loaded):
    """`theirs("sd15")`: the same pipeline of the reference library."""
    import diffusers

    def get(shape: str = "sd15", cls=diffusers.StableDiffusionPipeline):
        parts = dict(_loaded(shape, "theirs"))
        parts["scheduler"] = type(parts["scheduler"]).from_config(parts["scheduler"].config)
        pipe = cls(**parts, requires_safety_checker=False)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return get
