"""OpenAI's own client for Node, unchanged, against a real server."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageChops

SCRIPT = Path(__file__).parents[1] / "support" / "openai.cjs"


@pytest.fixture(scope="module")
def node():
    """The environment for Node; skips the test where Node or the client is not there."""
    environment = {"NODE_PATH": str(Path(sys.prefix) / "node" / "node_modules"), **os.environ}
    if shutil.which("node") is None:
        pytest.skip("there is no Node here, for which OpenAI has a client")
    looked = subprocess.run(["node", "-e", "require('openai')"], env=environment, capture_output=True, check=False)
    if looked.returncode:
        pytest.skip("OpenAI's client for Node is not here: `make clients` installs it")
    return environment


def test_nodes_client(node, server, monkeypatch, tmp_path):
    monkeypatch.setattr("sfumato.server.waiting.GRACE", 120.0)  # however busy the machine is that tests
    image, mask = Image.new("RGB", (128, 128), "navy"), Image.new("RGBA", (128, 128), "black")
    mask.paste((0, 0, 0, 0), (32, 32, 96, 96))
    for name, one in (("image.png", image), ("mask.png", mask)):
        one.save(tmp_path / name)
    command = ["node", SCRIPT, f"{server.url}/v1", tmp_path / "image.png", tmp_path / "mask.png"]
    done = subprocess.run(command, env=node, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["one"], found["four"], found["late"]) == (1, 4, 1)
    assert "built-in" in found["models"]
    assert found["streamed"] == [
        ["image_generation.partial_image", 0],
        ["image_generation.partial_image", 1],
        ["image_generation.partial_image", 2],
        ["image_generation.completed", None],
    ]
    assert found["errors"] == [
        ["NotFoundError", 404, "model"],
        ["BadRequestError", 400, "n"],
        ["BadRequestError", 400, "size"],
        ["NotFoundError", 404, "model"],
    ]
    made = Image.open(io.BytesIO(base64.b64decode(found["edited"]))).convert("RGB")
    outside = Image.new("L", (128, 128), 255)
    outside.paste(0, (32, 32, 96, 96))
    assert ImageChops.multiply(ImageChops.difference(made, image), outside.convert("RGB")).getbbox() is None
    late = server.get("/api/jobs?client=openai:impatient")["jobs"]
    assert [job["state"] for job in late] == ["done"]  # the client ran into its own time-out, and asked again
