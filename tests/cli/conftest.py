"""The command line as a user meets it: real processes, their output, their exit codes and what they leave behind."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from support.processes import MAIN, SCRIPT, ForkServer

# Many command lines one after the other in one process: the same `main`, and what it prints and exits with for each.
DRIVER = """
import contextlib, io, json, sys
from sfumato.cli.main import main

results = []
for words in json.loads(sys.argv[1]):
    sys.argv = ["sfumato", *words]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
    results.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(results))
"""


@dataclass(frozen=True)
class Outcome:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def paths(self) -> list[Path]:
        return [Path(line) for line in self.out.splitlines()]

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    def succeeded(self) -> Outcome:
        assert self.code == 0, self
        assert "Traceback" not in self.err
        return self

    def failed(self, code: int, *words: str) -> Outcome:
        """Misuse (2) or failure (1): nothing on standard output, one sentence on standard error that has these words."""
        assert self.code == code, self
        assert self.out == ""
        lines = self.err.splitlines()
        assert len(lines) == 1, self
        assert lines[0].startswith("sfumato: ")
        assert "unexpected" not in lines[0]
        for word in words:
            assert word in lines[0], self
        return self


@pytest.fixture(scope="session")
def sfumato(server: ForkServer) -> Callable[..., Outcome]:
    """`sfumato("show", folder, cwd=…)` runs the command in a process of its own."""

    def run(*words: object, cwd: Path, env: dict[str, str] | None = None) -> Outcome:
        done = server.run(MAIN, [str(word) for word in words], cwd=cwd, env=env)
        return Outcome(done.code, done.out, done.err)

    return run


@pytest.fixture(scope="session")
def installed(environment: dict[str, str]) -> Callable[..., Outcome]:
    """The same with the command as pip installs it, from nothing: it takes seconds where torch is needed."""

    def run(*words: object, cwd: Path, env: dict[str, str] | None = None) -> Outcome:
        # Waited for, and not killed on a timeout of its own: pytest's covers it.
        done = subprocess.run(
            [SCRIPT, *map(str, words)],
            cwd=cwd, env=environment | (env or {}), capture_output=True, text=True, encoding="utf-8", check=False,
        )  # fmt: skip
        return Outcome(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture(scope="session")
def sfumato_each(server: ForkServer) -> Callable[..., list[Outcome]]:
    """Several command lines in one process, one after the other; `before` is Python to run first."""

    def run(
        commands: Sequence[Sequence[object]], *, cwd: Path, env: dict[str, str] | None = None, before: str = ""
    ) -> list[Outcome]:
        words = json.dumps([[str(word) for word in command] for command in commands])
        done = server.run(before + DRIVER, [words], cwd=cwd, env=env)
        assert done.code == 0, done.err
        assert "Traceback" not in done.err
        results = [Outcome(*result) for result in json.loads(done.out)]
        assert len(results) == len(commands)
        return results

    return run


@pytest.fixture(scope="session")
def model(checkpoints: Callable[..., Path]) -> Path:
    """A tiny checkpoint of random weights; its own pictures are 16 × 16."""
    return checkpoints("sd15")


@dataclass(frozen=True)
class Drawn:
    """A picture that `sfumato generate` made, and what it said."""

    path: Path
    outcome: Outcome


@pytest.fixture(scope="session")
def drawn(installed: Callable[..., Outcome], model: Path, tmp_path_factory: pytest.TempPathFactory) -> Drawn:
    """A picture with seed 0, in a folder of its own, under the name that the prompt gave it."""
    folder = tmp_path_factory.mktemp("drawn")
    outcome = installed("generate", "A red heart, 3D!", "--model", model, "--steps", 2, "--seed", 0, cwd=folder)
    return Drawn(folder / "a-red-heart-3d.png", outcome)
