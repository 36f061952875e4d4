"""A real browser for the page's tests: Debian's Chromium, or whichever is named by SFUMATO_CHROMIUM."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

__all__ = ["Visit", "browsing", "chromium"]

# Kept by the page itself, as `console` does not tell all of what a policy stops.
VIOLATIONS = """
window.violations = [];
addEventListener('securitypolicyviolation', (event) => window.violations.push(`${event.violatedDirective} ${event.blockedURI}`));
"""


def chromium() -> str:
    """The path of the browser; skips the test where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome")
    found = os.environ.get("SFUMATO_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip("no Chromium here: `make clients` installs it, or name one by SFUMATO_CHROMIUM")
    return found


@contextmanager
def browsing() -> Iterator[Any]:
    """A browser that is closed at the end."""
    path = chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Chromium's sandbox does not run for root, as which containers often run tests.
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


class Visit:
    """A page of the studio in a fresh profile.

    errors: whatever its console, its scripts and its policy complain of, except what is `expected`.
    """

    def __init__(self, browser: Any, url: str, **options: Any) -> None:
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, "locale": "en-US"} | options)
        self.context.add_init_script(VIOLATIONS)
        self.context.set_default_timeout(20_000)
        self.page, self.url, self.errors = self.context.new_page(), url, []
        self.expected: list[str] = []
        self.page.on("console", self._hear)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))

    def __enter__(self) -> Visit:
        self.open()
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        found = [*self.errors, *self.page.evaluate("window.violations")]
        self.context.close()
        if kind:
            print("the page complained:", *found, sep="\n")  # which may be why the test failed
        else:
            assert found == []

    def _hear(self, told: Any) -> None:
        where = f"{told.text} {told.location.get('url', '')}"
        if told.type in ("error", "warning") and not any(one in where for one in self.expected):
            self.errors.append(where)

    def open(self, tail: str = "/") -> None:
        """Load the page; it is ready once it knows its models and has planned."""
        self.page.goto(self.url + tail)
        self.page.wait_for_selector("#prompt")

    def generate(self, prompt: str, **fields: Any) -> dict[str, Any]:
        """Type a prompt and press the button; fields are settings by their labels. Returns the job."""
        for label, value in fields.items():
            self.page.get_by_label(label, exact=True).first.fill(str(value))
            self.page.keyboard.press("Tab")
        self.page.fill("#prompt", prompt)
        with self.page.expect_response("**/api/jobs") as sent:
            self.page.click(".generate")
        return sent.value.json()

    def shows(self, key: str) -> None:
        """Wait until a finished image is on the stage."""
        self.page.locator(f".picture:not(.drawing) img[src*='{key}']").wait_for()
