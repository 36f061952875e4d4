"""Processes that start with torch and all of Sfumato already imported, so that a command costs what it does.

Where the system can fork, one server process imports everything once and computes nothing. Each run is a child of it: a
process of its own, with its own arguments, folder, environment, output and exit code. Elsewhere each run is a new
interpreter, which does the same and takes seconds longer.
"""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

__all__ = ["MAIN", "SCRIPT", "Done", "ForkServer"]

# The command as pip installs it.
SCRIPT = Path(sys.executable).with_name("sfumato" + (".exe" if os.name == "nt" else ""))
MAIN = "from sfumato.cli.main import main; main()"

# Each connection brings an order and the three standard streams, and is answered with the exit code.
SERVER = """
import atexit, contextlib, gc, importlib, io, json, os, pkgutil, select, signal, socket, sys, threading, traceback
import google.protobuf, numpy, PIL.Image, psutil, rich.progress, safetensors.torch, tokenizers, torch
import sfumato

for module in pkgutil.walk_packages(sfumato.__path__, "sfumato."):
    if module.name != "sfumato.kernels.gpu_code":  # needs Triton
        importlib.import_module(module.name)
PIL.Image.preinit()
with contextlib.redirect_stdout(io.StringIO()):
    sfumato.cli.main.app(["schedulers"], standalone_mode=False)
# These read the environment when they are imported, and must find that of the child.
assert not {"huggingface_hub", "diffusers", "transformers"} & sys.modules.keys()
# What is here stays for good: children need not look through it for garbage.
gc.collect()
gc.freeze()


def next_order():
    # Returns in the child only.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(sys.argv[1])
        server.listen()
        print("ready", flush=True)
        while True:
            if sys.stdin in select.select([server, sys.stdin], [], [])[0]:
                sys.exit()  # whom this serves has closed it, or is gone
            connection = server.accept()[0]
            if os.fork() == 0:
                break
            connection.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    streams = socket.recv_fds(connection, 1, 3)[1]
    order = json.load(connection.makefile())
    if child := os.fork():
        gone = select.poll()
        gone.register(connection, 0)  # tells of nothing but a client that was ended, which ends the command too
        while not (ended := os.waitpid(child, os.WNOHANG))[0]:
            if gone.poll(5):
                os.kill(child, signal.SIGTERM)
                ended = os.waitpid(child, 0)
                break
        code = os.waitstatus_to_exitcode(ended[1])
        with contextlib.suppress(BrokenPipeError):
            connection.sendall(str(code).encode())
        os._exit(0)
    connection.close()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    return order


order = next_order()
os.chdir(order["cwd"])
os.environ.clear()
os.environ.update(order["env"])
sys.argv[1:] = order["words"]
try:
    exec(order["code"], {"__name__": "__main__"})
    code = 0
except SystemExit as end:
    code = 0 if end.code is None else end.code
    if not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
except BaseException:
    traceback.print_exc()
    code = 1
# All that the end of an interpreter is seen by, without taking a million objects apart, which takes longer than a command.
threading._shutdown()
atexit._run_exitfuncs()
sys.stdout.flush()
sys.stderr.flush()
os._exit(code)
"""

# A command that has the server run `main`, with its own arguments, folder, environment and streams.
CLIENT = """
import json, os, socket, sys

with socket.socket(socket.AF_UNIX) as connection:
    connection.connect(sys.argv[1])
    order = {"code": sys.argv[2], "words": sys.argv[3:], "cwd": os.getcwd(), "env": dict(os.environ)}
    socket.send_fds(connection, [b" "], [0, 1, 2])
    connection.sendall(json.dumps(order).encode())
    connection.shutdown(socket.SHUT_WR)
    code = int(connection.recv(16))
    sys.exit(code if code >= 0 else 128 - code)
"""


@dataclass(frozen=True)
class Done:
    """How a process ended, and what it wrote."""

    code: int
    out: str
    err: str


class ForkServer:
    """Runs Python with arguments, each time in a process of its own. Close it."""

    # macOS can fork too, but its frameworks, and so torch, may not be used in the child.
    forks = sys.platform == "linux"

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = environment
        self._folder = tempfile.TemporaryDirectory(prefix="sfumato-")
        self._server: subprocess.Popen[str] | None = None

    def run(self, code: str, words: list[str], *, cwd: Path, env: dict[str, str] | None = None) -> Done:
        """Run it in a folder with additions to the environment, and wait for it (pytest's timeout covers it)."""
        environment = self.environment | (env or {})
        # A real interpreter if it is to start otherwise.
        if not self.forks or any(key.startswith("PYTHON") for key in env or {}):
            command = [sys.executable, "-c", code, *words]
            done = subprocess.run(
                command, cwd=cwd, env=environment, capture_output=True, text=True, encoding="utf-8", check=False
            )
            return Done(done.returncode, done.stdout, done.stderr)
        order = {"code": code, "words": words, "cwd": str(cwd), "env": environment}
        with (
            open(os.devnull) as nothing,
            tempfile.TemporaryFile("w+", encoding="utf-8") as out,
            tempfile.TemporaryFile("w+", encoding="utf-8") as err,
            socket.socket(socket.AF_UNIX) as connection,
        ):
            connection.connect(self._address())
            socket.send_fds(connection, [b" "], [file.fileno() for file in (nothing, out, err)])
            connection.sendall(json.dumps(order).encode())
            connection.shutdown(socket.SHUT_WR)
            ended = int(connection.recv(16))
            for file in (out, err):
                file.seek(0)
            return Done(ended, out.read(), err.read())

    @property
    def bin(self) -> Path:
        """A folder whose `sfumato` does what the installed one does."""
        if not self.forks:
            return SCRIPT.parent
        folder = Path(self._folder.name, "bin")
        folder.mkdir(exist_ok=True)
        words = [sys.executable, "-IS", "-c", CLIENT, self._address(), MAIN]
        (folder / "sfumato").write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
        (folder / "sfumato").chmod(0o755)
        return folder

    def close(self) -> None:
        """End the server, if one runs."""
        if self._server is not None:
            self._server.communicate()  # which closes its standard input
            self._server = None
        self._folder.cleanup()

    def _address(self) -> str:
        address = str(Path(self._folder.name, "socket"))
        if self._server is None:
            command = [sys.executable, "-c", SERVER, address]
            pipe = subprocess.PIPE
            self._server = subprocess.Popen(command, env=self.environment, stdin=pipe, stdout=pipe, text=True)
            assert self._server.stdout.readline() == "ready\n"
        return address
