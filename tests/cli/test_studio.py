"""`sfumato serve` and `sfumato studio` as processes of their own."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

from support.processes import MAIN
from support.studio import Client

# Imported by every interpreter that starts with its folder on the path: whoever looks for others is written down.
WATCH = """
import os, socket
plain, find = socket.socket.connect, socket.getaddrinfo
def told(what):
    host = what[0] if isinstance(what, tuple) else what
    if host not in ("127.0.0.1", "::1", "localhost", None, "") and not isinstance(what, (bytes, str)):
        with open(os.environ["WATCHED"], "a") as file:
            print(what, file=file)
def connect(self, address):
    told(address)
    return plain(self, address)
def getaddrinfo(host, *rest, **more):
    told((host,))
    return find(host, *rest, **more)
socket.socket.connect, socket.getaddrinfo = connect, getaddrinfo
"""


@contextmanager
def started(environment, *words):
    """A server's process and the first line that it printed."""
    command = [sys.executable, "-c", MAIN, *map(str, words)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process, process.stdout.readline()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


@pytest.mark.skipif(os.name == "nt", reason="Ctrl-C cannot be sent to one process there")
def test_a_server_draws_reaches_nobody_and_ends_in_peace(environment, tmp_path):
    watch = tmp_path / "watch"
    watch.mkdir()
    (watch / "sitecustomize.py").write_text(WATCH)
    path = os.pathsep.join([str(watch), *filter(None, [environment.get("PYTHONPATH")])])
    watched = {**environment, "PYTHONPATH": path, "WATCHED": str(tmp_path / "reached")}
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "torch.py").write_text("raise SystemExit('the folder of images was imported from')")
    with started(watched, "serve", "--port", 0, "--output", tmp_path / "out", "--device", "cpu") as (process, line):
        client = Client(int(re.search(r"http://127\.0\.0\.1:(\d+) ", line)[1]))
        job = client.submit({"prompt": "a red apple, 3d", "steps": 1, "seed": 1})
        assert client.ended(job["id"])["state"] == "done"
        assert client("GET", "/")[0] == 404  # there is no page
        client.get("/api/models?look=true")
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert "no unfinished files" in process.stderr.read()
    assert not (tmp_path / "reached").exists()
    assert len(list((tmp_path / "out").glob("*.png"))) == 1


@pytest.mark.skipif(os.name == "nt", reason="Ctrl-C cannot be sent to one process there")
def test_an_open_page_and_a_waiting_client_do_not_hold_it_up(environment, tmp_path):
    words = ("studio", "--port", 0, "--output", tmp_path, "--no-browser", "--device", "cpu")
    with started(environment, *words) as (process, line):
        port = int(re.search(r"http://127\.0\.0\.1:(\d+) ", line)[1])
        page, waiting = (http.client.HTTPConnection("127.0.0.1", port, timeout=60) for _ in range(2))
        page.request("GET", "/api/events")
        stream = page.getresponse()
        body = json.dumps({"prompt": "a red apple, 3d", "num_inference_steps": 900, "seed": 1})
        waiting.request("POST", "/v1/images/generations", body, {"Content-Type": "application/json"})
        while b'"running"' not in stream.readline():
            pass
        process.send_signal(signal.SIGINT)
        answer = waiting.getresponse()
        assert (answer.status, json.loads(answer.read())["error"]["code"]) == (503, "stopping")
        assert process.wait(30) == 130
        assert process.stderr.read().splitlines() == ["sfumato: interrupted; no unfinished files were left behind"]
        page.close()
        waiting.close()


@pytest.mark.skipif(os.name == "nt", reason="the browser cannot be chosen there")
def test_the_studio_opens_its_page(environment, tmp_path):
    opened, browser = tmp_path / "opened", tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\nprintf %s "$1" > {opened}.part && mv {opened}.part {opened}\n')
    browser.chmod(0o755)
    words = ("studio", "--port", 0, "--output", tmp_path / "out", "--token", "known")
    with started({**environment, "BROWSER": str(browser)}, *words) as (_, line):
        port = re.search(r":(\d+)/\?token=known ", line)[1]
        end = time.monotonic() + 30
        while not opened.exists():
            assert time.monotonic() < end
            time.sleep(0.02)
        assert opened.read_text() == f"http://127.0.0.1:{port}/?token=known"


def test_off_the_loopback_address_a_token_is_made_and_printed(environment, tmp_path):
    words = ("studio", "--host", "0.0.0.0", "--port", 0, "--output", tmp_path, "--no-browser")
    with started(environment, *words) as (_, line):
        port, token = re.search(r":(\d+)/\?token=([\w-]{43}) ", line).groups()
        client = Client(int(port))
        assert client("GET", "/api/health")[0] == 401
        assert client("GET", "/api/health", Authorization=f"Bearer {token}")[0] == 200


def test_a_port_that_is_taken_is_said(environment, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        words = ("serve", "--port", str(taken.getsockname()[1]), "--output", str(tmp_path / "out"))
        done = subprocess.run(
            [sys.executable, "-c", MAIN, *words], env=environment, capture_output=True, text=True, check=False
        )
    assert (done.returncode, "choose another --port" in done.stderr) == (2, True)
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_device_that_is_absent_is_said_before_anything_starts(environment, tmp_path):
    words = ("serve", "--device", "cuda" if sys.platform == "darwin" else "mps", "--output", str(tmp_path / "out"))
    done = subprocess.run(
        [sys.executable, "-c", MAIN, *words], env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stdout, "is not available" in done.stderr) == (2, "", True)
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_without_the_extra_it_is_said_what_to_install(environment, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['fastapi'] = None\n")
    path = os.pathsep.join([str(tmp_path), *filter(None, [environment.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", MAIN, "serve"],
        env={**environment, "PYTHONPATH": path}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "pip install 'sfumato[studio]'" in done.stderr
