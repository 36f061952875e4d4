"""Access control and limits: one guard in front of every route, which denies by default.

Browsers on this machine run code from other sites, so listening on the loopback address is not enough. `Host` must name
this server (against DNS rebinding), `Origin` and `Sec-Fetch-Site` must not come from another site, and bodies must have
a type that other sites' forms cannot send. Response headers forbid framing, sniffing and reading from other sites. On
any other address, every request also needs a token.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import ipaddress
import re
import secrets
import socket
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import RedirectResponse

from sfumato.server.errors import ApiError, answer

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["MOST_BODY", "Guard", "content_policy", "is_loopback", "new_token"]

# The largest request in bytes: an image of the largest size in base64, and a mask.
MOST_BODY = 100 * 2**20
COOKIE = "sfumato"
BODIES = re.compile(r"application/json|multipart/form-data|image/(png|jpeg|webp)")
LOOPBACK = {"localhost", "127.0.0.1", "::1"}
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def new_token() -> str:
    """Create a token of 256 random bits."""
    return secrets.token_urlsafe(32)


def is_loopback(host: str) -> bool:
    """Return whether an address can be reached from this machine only."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def content_policy(page: Path) -> str:
    """Return a Content-Security-Policy that allows the page's own files and its original inline scripts."""
    html = page.read_text(encoding="utf-8") if page.is_file() else ""
    inline = re.findall(r"<script(?![^>]*\ssrc=)[^>]*>(.*?)</script>", html, re.DOTALL)
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in inline]
    scripts = " ".join(["'self'", *(f"'sha256-{one}'" for one in hashes)])
    return (
        f"default-src 'none'; script-src {scripts}; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
        "manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


class Guard:
    """ASGI middleware. host: the address the server listens on; token: the secret clients must send, if any."""

    def __init__(self, app: ASGIApp, *, host: str, token: str | None, policy: str) -> None:
        self._app, self._token, self._policy = app, token, policy
        self._alone = is_loopback(host)
        self._names = LOOPBACK if self._alone else LOOPBACK | {host.lower(), socket.gethostname().lower()}
        self._cookie = hashlib.sha256(f"cookie:{token}".encode()).hexdigest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or respond with the reason for refusing it."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            self._check_host(headers)
            self._check_origin(scope, headers)
            if self._token is not None and not self._known(headers):
                if (entered := self._entered(scope)) is not None:
                    await entered(scope, receive, self._marked(send))
                    return
                raise ApiError(401, "send the server's token, as a bearer token or as a password", code="no_token")
            self._check_body(scope, headers)
        except ApiError as error:
            found = answer(error)
            if error.status == 401:
                found.headers["WWW-Authenticate"] = 'Basic realm="Sfumato", charset="UTF-8"'
            await found(scope, receive, self._marked(send))
            return
        await self._app(scope, _counted(receive), self._marked(send))

    def _check_host(self, headers: Headers) -> None:
        """Refuse unknown host names, which DNS rebinding could point here. Numeric addresses cannot be rebound."""
        hosts = headers.getlist("host")
        if len(hosts) != 1:
            raise ApiError(400, "a request needs exactly one Host header")
        name = _name(hosts[0])
        if name in self._names or (not self._alone and _is_address(name)):
            return
        raise ApiError(403, f"{name[:100]!r} is not this server's name; use its address", code="wrong_host")

    def _check_origin(self, scope: Scope, headers: Headers) -> None:
        origin, site = headers.get("origin"), headers.get("sec-fetch-site", "none")
        visiting = scope["method"] == "GET" and headers.get("sec-fetch-mode") == "navigate"
        foreign = origin is not None and urlsplit(origin).netloc.lower() != headers["host"].lower()
        if foreign or (site not in ("none", "same-origin") and not visiting):
            raise ApiError(403, "requests from other sites are refused", code="wrong_origin")

    def _check_body(self, scope: Scope, headers: Headers) -> None:
        if scope["method"] not in ("POST", "PUT", "PATCH"):
            return
        length, kind = headers.get("content-length", "0"), headers.get("content-type", "").partition(";")[0].strip()
        if length.isdecimal() and int(length[:20]) > MOST_BODY:
            raise ApiError(413, f"the request is too large; send at most {MOST_BODY >> 20} MB")
        if (length != "0" or "transfer-encoding" in headers) and not BODIES.fullmatch(kind.lower()):
            raise ApiError(415, "send JSON (Content-Type: application/json), a multipart form, or an image")

    def _known(self, headers: Headers) -> bool:
        kind, _, word = headers.get("authorization", "").partition(" ")
        if kind.lower() == "basic":
            try:
                word = base64.b64decode(word, validate=True).decode().partition(":")[2]
            except (binascii.Error, ValueError):
                word = ""
        if kind.lower() in ("basic", "bearer"):
            return self._is(word)
        try:
            cookie = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
        except CookieError:
            return False
        return cookie is not None and hmac.compare_digest(cookie.value.encode(), self._cookie.encode())

    def _is(self, word: str) -> bool:
        return hmac.compare_digest(word.encode("utf-8", "surrogateescape"), (self._token or "").encode())

    def _entered(self, scope: Scope) -> RedirectResponse | None:
        """If the URL contains the token, set a cookie and redirect to the URL without the token."""
        words = parse_qs(scope["query_string"].decode("latin-1")).get("token", [])
        if scope["method"] != "GET" or len(words) != 1 or not self._is(words[0]):
            return None
        found = RedirectResponse("/", 303, {"Cache-Control": "no-store"})
        found.set_cookie(COOKIE, self._cookie, max_age=365 * 86400, httponly=True, samesite="strict")
        return found

    def _marked(self, send: Send) -> Send:
        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                headers["Content-Security-Policy"] = self._policy
                headers.setdefault("Cache-Control", "no-store")
                headers["x-request-id"] = secrets.token_hex(8)
            await send(message)

        return marked


def _counted(receive: Receive) -> Receive:
    """Limit the size of the body actually received, whatever Content-Length says."""
    size = 0

    async def counted() -> Any:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > MOST_BODY:
            raise ApiError(413, f"the request is too large; send at most {MOST_BODY >> 20} MB")
        return message

    return counted


def _name(host: str) -> str:
    """Return the name in a Host header, without port and brackets."""
    found = re.fullmatch(r"\[([^\[\]]+)\](:\d+)?|([^:\[\]]+)(:\d+)?", host)
    return "" if found is None else (found[1] or found[3]).lower()


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
