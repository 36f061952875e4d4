"""What must not be possible, each tried over a real socket: every test fails if its check is taken away."""

from __future__ import annotations

import base64
import io
import json
import socket
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image

from sfumato.errors import UsageError
from sfumato.server.app import create_app
from sfumato.server.security import content_policy, is_loopback
from support.studio import serving

JOB = {"request": {"prompt": "a red apple, 3d", "steps": 1, "seed": 1}}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("studio"), worker=False) as (client, queue):
        client.folder, client.queue = queue.folder, queue
        yield client


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """A server as it is off the loopback address, though reached by it."""
    options = {"worker": False, "host": "0.0.0.0", "token": "the token"}
    with serving(tmp_path_factory.mktemp("guarded"), **options) as (client, _):
        yield client


def url_of(image: Image.Image, kind: str = "PNG") -> str:
    image.save(stream := io.BytesIO(), kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(stream.getvalue()).decode()}"


def test_other_names_of_this_machine_are_refused(server):
    for host in ("evil.test", f"evil.test:{server.port}", "127.0.0.1.evil.test", "[::1].evil.test", "localhost.evil"):
        assert server("GET", "/api/health", Host=host)[0] == 403, host
    for host in (f"localhost:{server.port}", "127.0.0.1", f"[::1]:{server.port}", "LOCALHOST"):
        assert server("GET", "/api/health", Host=host)[0] == 200, host


@pytest.mark.parametrize("hosts", [b"", b"Host: 127.0.0.1\r\nHost: evil.test\r\n"], ids=["none", "two"])
def test_a_request_has_one_host(server, hosts):
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as raw:
        raw.sendall(b"GET /api/health HTTP/1.1\r\n" + hosts + b"Connection: close\r\n\r\n")
        assert raw.recv(100).startswith(b"HTTP/1.1 400")


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.test"}, {"Origin": "null"}, {"Origin": "http://127.0.0.1:1"},
        {"Sec_Fetch_Site": "cross-site"}, {"Sec_Fetch_Site": "same-site"},
        {"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "navigate"},
    ],
    ids=str,
)  # fmt: skip
def test_pages_of_other_sites_cannot_ask(server, headers):
    before = server.get("/api/jobs")["jobs"]
    status, body, told = server("POST", "/api/jobs", JOB, **headers)
    assert status == 403
    assert body["error"]["type"] == "permission_error"
    assert "access-control-allow-origin" not in told
    assert server.get("/api/jobs")["jobs"] == before


def test_other_sites_may_link_here_but_read_nothing(server):
    elsewhere = {"Sec_Fetch_Site": "cross-site"}
    assert server("GET", "/api/images", **elsewhere)[0] == 403
    assert server("GET", "/api/health", Sec_Fetch_Mode="navigate", **elsewhere)[0] == 200
    origin = {"Origin": f"http://127.0.0.1:{server.port}", "Sec_Fetch_Site": "same-origin"}
    assert server("GET", "/api/images", **origin)[0] == 200


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_bodies_that_any_form_can_send_are_refused(server, kind):
    assert server("POST", "/api/jobs", json.dumps(JOB).encode(), Content_Type=kind)[0] == 415


def test_no_preflight_is_granted(server):
    headers = {"Origin": "https://evil.test", "Access_Control_Request_Method": "POST"}
    status, _, told = server("OPTIONS", "/api/jobs", **headers)
    assert status == 403
    assert not any(name.startswith("access-control") for name in told)


def test_off_the_loopback_address_there_is_a_token(server):
    assert [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "127.9.9.9")] == [True] * 4
    assert [is_loopback(host) for host in ("0.0.0.0", "::", "192.168.1.5", "studio.local", "")] == [False] * 5
    for host in ("0.0.0.0", "::", "192.168.1.5"):
        with pytest.raises(UsageError, match="set a token"):
            create_app(server.queue, host=host)


def test_no_route_answers_without_the_token(guarded):
    asked = 0
    described = guarded("GET", "/openapi.json", Authorization="Bearer the token")[1]
    for route, methods in described["paths"].items():
        for method in methods:
            path = route.replace("{key}", "0" * 32).replace("{id}", "0" * 16)
            assert guarded(method.upper(), path, JOB if method == "post" else None)[0] == 401, (method, path)
            asked += 1
    assert asked > 15
    for method, path in (("GET", "/"), ("OPTIONS", "/api/jobs"), ("GET", "/openapi.json"), ("GET", "/nowhere")):
        assert guarded(method, path)[0] == 401


def test_the_token_opens_in_each_of_its_forms(guarded):
    basic = base64.b64encode(b"anybody:the token").decode()
    for told in ("Bearer the token", f"Basic {basic}"):
        assert guarded("GET", "/api/health", Authorization=told)[0] == 200
    for told in ("Bearer the tokem", "Bearer ", "Basic !", "Basic " + base64.b64encode(b"the token:x").decode(), "x"):
        assert guarded("GET", "/api/health", Authorization=told)[0] == 401


def test_the_link_becomes_a_cookie_and_leaves_the_address(guarded):
    status, _, told = guarded("GET", "/?token=the%20token")
    assert (status, told["location"]) == (303, "/")
    cookie = told["set-cookie"]
    assert {"HttpOnly", "SameSite=strict"} <= set(cookie.split("; "))
    assert "token" not in cookie  # the cookie is made of it, and does not tell it
    assert guarded("GET", "/api/health", Cookie=cookie.partition(";")[0])[0] == 200
    assert guarded("GET", "/api/health", Cookie="sfumato=the token")[0] == 401
    assert guarded("GET", "/?token=wrong")[0] == 401


def test_off_the_loopback_address_names_are_still_checked(guarded):
    known = {"Authorization": "Bearer the token"}
    assert guarded("GET", "/api/health", Host="evil.test", **known)[0] == 403
    assert guarded("GET", "/api/health", Host="192.168.1.5:7867", **known)[0] == 200


def more(text):
    """Ways to name a file within a mask and a control."""
    yield {"image": IMAGE, "mask": {"file": text}}
    yield {"controls": [{"model": text, "image": IMAGE}]}
    yield {"controls": [{"model": "built-in", "image": text}]}


IMAGE = url_of(Image.new("RGB", (8, 8)))
PATHS = [
    "/etc/passwd", "../../etc/passwd", "file:///etc/passwd", "~/.ssh/id_rsa", "C:\\Windows\\win.ini", "\\\\host\\share",
    "a.png", "./a.png", "/proc/self/environ", "http://127.0.0.1:9/a.png", "https://evil.test/a.png", "ftp://evil.test/a",
    ".sfumato/studio.db", ".sfumato/inputs/../studio.db", "data:text/html,<b>", "data:image/png,abc", "\0", "",
]  # fmt: skip


@pytest.mark.parametrize("text", PATHS, ids=ascii)
@pytest.mark.usefixtures("no_files_opened")
def test_no_path_and_no_address_of_a_request_is_opened(server, text):
    for request in (
        {"image": text},
        {"adapters": [{"file": text}]},
        {"embeddings": [{"file": text}]},
        {"refiner": text},
        {"depth": text},
        {"lora_dir": text},
        {"image_prompts": [{"model": text, "image": IMAGE, "encoder": text}]},
        *([] if not text or ":" in text else [{"prompt": f"x <lora:{text}:1>", "prompt_syntax": "a1111"}]),
        *more(text),
    ):
        status, body, _ = server("POST", "/api/jobs", {"request": {"prompt": "x", **request}})
        assert status in (400, 415), (request, body)
    status, _, _ = server("POST", "/api/jobs", {"request": {"prompt": "x"}, "model": text or "nowhere"})
    assert status == 400


@pytest.fixture
def no_files_opened(monkeypatch, server):
    """Fails a test in which the server looks into a file that is neither its own nor part of the package."""
    import sfumato_relatives

    import sfumato.files

    opened, plain, find = [], sfumato.files.os.open, socket.getaddrinfo
    packages = Path(sfumato.files.__file__).parent, Path(sfumato_relatives.__file__).parent
    own = (str(server.folder), *map(str, packages))

    def watched(path, *rest, **more):
        if not str(path).startswith(own):
            opened.append(path)
        return plain(path, *rest, **more)

    def found(host, *rest, **more):
        if host != "127.0.0.1":
            opened.append(host)
        return find(host, *rest, **more)

    monkeypatch.setattr(sfumato.files.os, "open", watched)
    monkeypatch.setattr(socket, "getaddrinfo", found)
    yield
    assert opened == []


def test_every_text_of_a_request_is_a_text_a_word_or_a_name():
    """A new field that holds a path is to be made one of `Intake`'s, or this fails."""
    from typing import get_args

    from sfumato.request import GenerateRequest
    from sfumato.server.intake import FILES
    from sfumato.values import kinds_of

    def holds_text(kind):
        return kind is str or any(holds_text(one) for one in get_args(kind) if not isinstance(one, str))

    texts = {name for name, kind in kinds_of(GenerateRequest).items() if holds_text(kind)}
    read = {"prompt", "negative_prompt", "prompt_2", "negative_prompt_2"}
    words = {"prompt_syntax", "rng", "scheduler", "spacing", "seamless", "vae_weights"}
    assert texts - read - words - FILES.keys() - {"lora_dir"} == set()
    nested = {name: set(kinds_of(kind)) for name, kind in GenerateRequest.nested.items()}
    paths = {name: fields & {"file", "image", "model", "encoder", "mask"} for name, fields in nested.items()}
    assert {name: fields for name, fields in paths.items() if fields} == {
        name: set(fields) for name, fields in FILES.items() if isinstance(fields, dict)
    }
    looked = {
        "image_prompts",
        "adapters",
        "embeddings",
        "mask",
        "controls",
        "framing",
        "negative_framing",
        "noise",
        "freeu",
        "hires",
    }
    assert nested.keys() - looked - {"guidance_interval", "fast"} == set()


@pytest.mark.parametrize("key", ["..", "%2e%2e%2f", "0" * 31, "g" * 32, "A" * 32, "0" * 33, ".sfumato", "studio.db"])
def test_images_are_asked_for_by_key_only(server, key):
    for path in (f"/api/images/{key}", f"/api/images/{key}/file", f"/api/images/{key}/thumb"):
        assert server("GET", path)[0] in (400, 404)
    assert server("DELETE", f"/api/images/{key}")[0] in (400, 404)
    assert server("POST", f"/api/images/{key}/restore")[0] in (400, 404)


def test_a_link_out_of_the_folder_is_not_followed(server, tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "secret.png")
    real = server.folder / "real.png"
    Image.new("RGB", (8, 8), "green").save(real)
    (server.folder / "link.png").symlink_to(tmp_path / "secret.png")
    (server.folder / "linked").symlink_to(tmp_path)
    server.queue.gallery.scan(whole=True)
    found = server.get("/api/images")["images"]
    assert [one["name"] for one in found] == ["real.png"]
    key = found[0]["key"]
    real.unlink()
    real.symlink_to(tmp_path / "secret.png")
    assert server("GET", f"/api/images/{key}/file")[0] == 404
    real.unlink()
    server.queue.gallery.scan(whole=True)


def bomb(width: int, height: int) -> bytes:
    """A PNG of white pixels, a thousandth of its size."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    packed, row = zlib.compressobj(9), bytes(1 + width // 8)
    data = b"".join(packed.compress(row) for _ in range(height)) + packed.flush()
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def test_large_images_are_refused_before_they_are_decoded(server, monkeypatch):
    from PIL import ImageFile

    data = bomb(19000, 19000)
    assert len(data) < 60_000
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("the image was decoded"))
    status, body, _ = server("POST", "/api/recipe", data, Content_Type="image/png")
    assert status == 413, body
    url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    assert server("POST", "/api/jobs", {"request": {"prompt": "x", "image": url}})[0] == 413
    status, body, _ = server("POST", "/api/recipe", bomb(8000, 7000), Content_Type="image/png")
    assert (status, "million" in body["error"]["message"]) == (413, True)


def test_bodies_have_an_end(server, monkeypatch):
    monkeypatch.setattr("sfumato.server.security.MOST_BODY", 2000)
    assert server("POST", "/api/recipe", bytes(3000), Content_Type="image/png")[0] == 413
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as raw:
        head = "POST /api/recipe HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: image/png\r\nTransfer-Encoding: chunked\r\n\r\n"
        raw.sendall(head.encode() + (b"3e8\r\n" + bytes(1000) + b"\r\n") * 5 + b"0\r\n\r\n")
        assert raw.recv(100).startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize(
    "data", [b"", b"PK\x03\x04pickle", b"\x80\x04}q\x00.", b"%!PS", b"<svg onload=alert(1)>"], ids=ascii
)
def test_what_is_no_image_is_refused(server, data):
    assert server("POST", "/api/recipe", data, Content_Type="image/png")[0] == 415


def test_moving_and_broken_images_are_refused(server):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    frames[0].save(stream := io.BytesIO(), "WEBP", save_all=True, append_images=frames[1:])
    assert server("POST", "/api/recipe", stream.getvalue(), Content_Type="image/webp")[0] == 400
    broken = url_of(Image.new("RGB", (64, 64), "red"))[:90]
    assert server("POST", "/api/jobs", {"request": {"prompt": "x", "image": broken}})[0] in (400, 415)


def test_pickles_are_no_models(tmp_path):
    from sfumato.jobs.models import Models

    for name in ("model.ckpt", "model.pt", "model.bin", "model.safetensors"):
        (tmp_path / name).write_bytes(b"\x80\x04}q\x00.")
    names = [one.name for one in Models(tmp_path, cached=False).all(look=True)]
    assert [name for name in names if not name.startswith("built-in/")] == ["built-in"]


def test_answers_forbid_what_browsers_would_allow(server):
    for path in ("/api/health", "/nowhere", "/openapi.json"):
        told = server("GET", path)[2]
        assert told["x-content-type-options"] == "nosniff"
        assert told["referrer-policy"] == "no-referrer"
        assert told["x-frame-options"] == "DENY"
        assert told["cross-origin-resource-policy"] == told["cross-origin-opener-policy"] == "same-origin"
        rules = dict(rule.split(" ", 1) for rule in told["content-security-policy"].split("; "))
        assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == rules["frame-ancestors"] == "'none'"
        assert rules["script-src"].split()[0] == "'self'"
        assert "unsafe" not in told["content-security-policy"]


def test_scripts_in_the_page_are_known_by_their_hash(tmp_path):
    page = tmp_path / "index.html"
    page.write_text('<script type="importmap">{"imports":{}}</script><script type="module" src="app.js"></script>')
    # printf '{"imports":{}}' | openssl dgst -sha256 -binary | base64
    assert "script-src 'self' 'sha256-URrTy+Il/Nz0lHojVUx275hWqAWhkSF0VsHbUM4/6Hw=';" in content_policy(page)
    assert "script-src 'self';" in content_policy(tmp_path / "none.html")


def test_texts_of_images_stay_texts(server):
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("parameters", "<img src=x onerror=alert(1)>\nSteps: 1, Sampler: Euler, Seed: 1, Size: 8x8")
    Image.new("RGB", (8, 8)).save(stream := io.BytesIO(), "PNG", pnginfo=info)
    status, body, told = server("POST", "/api/recipe", stream.getvalue(), Content_Type="image/png")
    assert (status, body["request"]["prompt"]) == (200, "<img src=x onerror=alert(1)>")
    assert told["content-type"] == "application/json"


def test_paths_of_this_machine_are_not_told(server):
    text = json.dumps([server.get(path) for path in ("/api/models", "/api/health", "/api/jobs", "/openapi.json")])
    assert str(server.folder) not in text
    assert str(Path(__file__).parents[2]) not in text


def test_a_flood_is_told_when_to_come_back(server, monkeypatch):
    monkeypatch.setattr("sfumato.jobs.queue.MOST_JOBS", 3)
    answers = [server("POST", "/api/jobs", JOB) for _ in range(5)]
    refused = [told for status, _, told in answers if status == 429]
    assert refused
    assert all(int(told["retry-after"]) >= 1 for told in refused)
    for job in server.get("/api/jobs")["jobs"]:
        server("DELETE", f"/api/jobs/{job['id']}")


def test_a_client_may_not_take_all_places(server, monkeypatch):
    monkeypatch.setattr("sfumato.jobs.queue.MOST_OF_CLIENT", 2)
    answers = [server("POST", "/api/jobs", {**JOB, "client": "greedy"})[0] for _ in range(3)]
    assert answers == [202, 202, 429]
    assert server("POST", "/api/jobs", {**JOB, "client": "modest"})[0] == 202
    for job in server.get("/api/jobs")["jobs"]:
        server("DELETE", f"/api/jobs/{job['id']}")
