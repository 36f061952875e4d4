"""`sfumato download` against a hub of our own: what is asked for, what is not, and what goes wrong."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

REPO = "owner/tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


class Hub(ThreadingHTTPServer):
    """As much of the hub as `huggingface_hub` asks for: the list of a repository's files, and the files."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.files = {
            path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
        }
        self.fetched: list[str] = []
        self.torn = ""

    @property
    def env(self) -> dict[str, str]:
        return {"HF_ENDPOINT": f"http://127.0.0.1:{self.server_address[1]}"}


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        hub, revisions = self.server, ("main", COMMIT)
        if path in (f"/api/models/{REPO}", *(f"/api/models/{REPO}/revision/{revision}" for revision in revisions)):
            siblings = [{"rfilename": name} for name in hub.files]
            self.send(
                {
                    "id": REPO,
                    "modelId": REPO,
                    "sha": COMMIT,
                    "private": False,
                    "tags": [],
                    "downloads": 0,
                    "likes": 0,
                    "siblings": siblings,
                }
            )
        elif path in [f"/api/models/{REPO}/tree/{revision}" for revision in revisions]:
            self.send(
                [
                    {"type": "file", "path": name, "size": len(content), "oid": digest(content)}
                    for name, content in hub.files.items()
                ]
            )
        elif path.startswith(f"/api/models/{REPO}/"):
            self.send({"error": "Revision not found"}, 404, {"X-Error-Code": "RevisionNotFound"})
        elif path.startswith("/api/models/"):
            self.send({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        else:
            self.send_file(path.removeprefix(f"/{REPO}/resolve/").partition("/")[2])

    def send(self, value: object, code: int = 200, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(value).encode()
        self.reply(code, content, {"Content-Type": "application/json"} | (headers or {}))

    def send_file(self, name: str) -> None:
        content = self.server.files[name]
        if self.command == "GET":
            self.server.fetched.append(name)
        if name == self.server.torn and self.command == "GET":
            self.reply(
                200,
                content[: len(content) // 2],
                {"ETag": f'"{digest(content)}"', "X-Repo-Commit": COMMIT},
                len(content),
            )
            self.close_connection = True
            return
        self.reply(200, content, {"ETag": f'"{digest(content)}"', "X-Repo-Commit": COMMIT})

    def reply(self, code: int, content: bytes, headers: dict[str, str], length: int | None = None) -> None:
        self.send_response(code)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(length or len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@contextmanager
def serving(folder: Path) -> Iterator[Hub]:
    with Hub(folder) as hub:
        thread = threading.Thread(target=hub.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


@pytest.fixture
def repository(model, tmp_path) -> Path:
    """The checkpoint as it lies on a hub: beside other things that nobody needs to draw a picture."""
    folder = Path(shutil.copytree(model, tmp_path / "repository"))
    half = {name: tensor.half() for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(half, folder / "unet/diffusion_pytorch_model.fp16.safetensors", metadata={"format": "pt"})
    for name in (
        "README.md",
        "everything.ckpt",
        "unet/diffusion_pytorch_model.bin",
        "original/packages/unet.bin",
        "original/other.txt",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"unneeded " + name.encode())
    return folder


def test_what_drawing_needs_and_only_that_and_only_once(sfumato, sfumato_each, model, repository, tmp_path):
    home = {"HF_HOME": str(tmp_path / "home")}
    with serving(repository) as hub:
        outcome = sfumato("download", REPO, cwd=tmp_path, env=home | hub.env).succeeded()
        (folder,) = outcome.paths
        needed = {path.relative_to(model).as_posix() for path in model.rglob("*") if path.is_file()}
        assert sorted(hub.fetched) == sorted(needed)
        assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == needed
        assert (folder / WEIGHTS).read_bytes() == (model / WEIGHTS).read_bytes()
        hub.fetched.clear()
        commands = [
            ["download", REPO],
            ["download", REPO, "--include", "original/packages/*"],
            ["download", REPO, "--variant", "fp16"],
            ["download", f"https://huggingface.co/{REPO}/blob/main/{WEIGHTS}"],
        ]
        again, packages, half, file = sfumato_each(commands, cwd=tmp_path, env=home | hub.env)
        assert again.succeeded().paths == packages.succeeded().paths == half.succeeded().paths == [folder]
        assert file.succeeded().paths == [folder / WEIGHTS]
        assert hub.fetched == ["original/packages/unet.bin", "unet/diffusion_pytorch_model.fp16.safetensors"]
    # The hub is gone: what is here is shown and drawn with, and not asked for again.
    commands = [
        ["show", REPO, "--json"],
        ["generate", "horse", "--model", REPO, "--steps", "1", "-o", "x.png"],
        ["download", REPO],
    ]
    shown, made, again = sfumato_each(commands, cwd=tmp_path, env=home | hub.env)
    assert shown.succeeded().json["name"] == REPO
    assert made.succeeded().out == "x.png\n"
    assert again.succeeded().paths == [folder]


def test_what_the_hub_does_not_have(sfumato_each, repository, tmp_path):
    cases = [
        (["owner/other"], 1, "'owner/other' is neither a local folder nor a hub repository", "check the name"),
        ([REPO, "--revision", "v9"], 1, "has no revision 'v9'"),
        ([REPO, "--variant", "int3"], 1, "no component has a variant 'int3'", "omit variant"),
        ([REPO, "--include", "split_einsum/*"], 1, "no file matches split_einsum/*", "the repository has"),
        (["./a/b", "--include", "x"], 2, "'./a/b' is not a hub id such as 'owner/name'"),
        (["a/b/c"], 1, "there is no folder a/b/c"),
        ([""], 2, "the model name is empty"),
        ([repository / "unet"], 1, "there is no model_index.json"),
        (["sp ace/name"], 2, "'sp ace/name' is neither an existing folder nor a hub id"),
        ([REPO], 1, "the hub cannot be reached", "check the network"),
    ]
    with serving(repository) as hub:
        hub.torn = WEIGHTS  # the connection breaks in the middle of the largest file
        outcomes = sfumato_each(
            [["download", *words] for words, *_ in cases],
            cwd=tmp_path,
            env={"HF_HOME": str(tmp_path / "home")} | hub.env,
        )
    for outcome, (_, code, *sentence) in zip(outcomes, cases, strict=True):
        outcome.failed(code, *sentence)
    # Nothing that looks like a whole file is left in place of the broken one.
    assert list((tmp_path / "home").rglob(f"snapshots/*/{WEIGHTS}")) == []


def test_dead_network(sfumato, tmp_path):
    env = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "home")}
    began = time.monotonic()
    sfumato("download", REPO, cwd=tmp_path, env=env).failed(
        1, f"{REPO!r} is not a local folder, and the hub cannot be reached", "check the network"
    )
    # Said at once, and not after the library's half minute of retries (which end at 23 s of sleep alone).
    assert time.monotonic() - began < 20
