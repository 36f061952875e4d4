"""The page's files: small, in five whole languages, and of others only what they shipped."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Iterable
from html.parser import HTMLParser
from pathlib import Path

import pytest

import sfumato

STATIC = Path(sfumato.__file__).parent / "server" / "static"
SCRIPTS = sorted(STATIC.glob("*.js"))
LOCALES = {
    path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted((STATIC / "locales").glob("*.json"))
}
# What Unicode's CLDR distinguishes in whole numbers of these languages.
PLURALS = {
    "en": {"one", "other"},
    "es": {"one", "many", "other"},
    "zh": {"other"},
    "ko": {"other"},
    "ar": {"zero", "one", "two", "few", "many", "other"},
}


def zipped(paths: Iterable[Path]) -> int:
    """Bytes of all files, each compressed alone."""
    return sum(len(gzip.compress(path.read_bytes(), 9)) for path in paths)


def source(*kinds: str) -> list[Path]:
    return [path for kind in kinds for path in sorted(STATIC.glob(f"*.{kind}"))]


def test_the_page_keeps_its_budgets():
    assert zipped([*SCRIPTS, *sorted((STATIC / "vendor").glob("*.js"))]) <= 45_000
    assert zipped([STATIC / "style.css"]) <= 10_000
    assert (STATIC / "index.html").stat().st_size <= 3_000
    lines = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in source("js", "css", "html")}
    assert sum(lines.values()) <= 2_500, lines
    assert {name: count for name, count in lines.items() if count > 300} == {}


def test_lines_are_not_long():
    for path in SCRIPTS:
        assert [line for line in path.read_text(encoding="utf-8").splitlines() if len(line) > 120] == [], path


def test_parts_of_others_are_as_they_were_shipped():
    notice = (STATIC / "vendor" / "NOTICE").read_text(encoding="utf-8")
    told = {name: digest for digest, name in re.findall(r"^ +([0-9a-f]{64}) +(\S+)$", notice, re.MULTILINE)}
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (STATIC / "vendor").glob("*.js")}
    assert found == told
    for name in found:
        assert re.search(rf"^\| {re.escape(name)} +\| \S+ +\| \d+\.\d+\.\d+ +\| ", notice, re.MULTILINE)


def test_the_policy_can_be_strict():
    text = (STATIC / "index.html").read_text(encoding="utf-8")
    assert "style=" not in text
    assert not re.search(r"\son\w+=", text)
    for path in SCRIPTS:
        code = path.read_text(encoding="utf-8")
        # Text from a model, a file or a request is never read as HTML or as code.
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", code), (
            path
        )
        assert not re.search(r"https?://", code), path


@pytest.mark.parametrize("language", PLURALS)
def test_languages_are_whole(language):
    texts, english = LOCALES[language], LOCALES["en"]
    assert list(texts) == list(english)
    for key, text in texts.items():
        wanted = slots(english[key])
        if isinstance(text, dict):
            assert set(text) == PLURALS[language], key
            assert isinstance(english[key], dict), key
            # Languages that have a word for one or two of something may say that instead of the number.
            assert all(wanted - slots(one) <= {"n"} for one in text.values()), key
            assert slots(text["other"]) == wanted, key
        else:
            assert slots(text) == wanted, key
        assert all(one.strip() == one and one for one in (text.values() if isinstance(text, dict) else [text])), key


def slots(text: str | dict[str, str]) -> set[str]:
    return set(re.findall(r"\{(\w+)\}", text if isinstance(text, str) else text["other"]))


def test_other_languages_are_translated():
    # Names, and words that are the same in both.
    same = {"loras", "prompt", "grid"} | {key for key in LOCALES["en"] if key.startswith(("key_", "unit_"))}
    for language in PLURALS.keys() - {"en"}:
        equal = {key for key, text in LOCALES[language].items() if text == LOCALES["en"][key]}
        assert equal <= same, language


def test_languages_are_those_offered():
    code = (STATIC / "i18n.js").read_text(encoding="utf-8")
    offered = re.findall(r"(\w\w): '", re.search(r"LANGUAGES = \{(.*?)\}", code)[1])
    assert set(offered) == set(LOCALES) == set(PLURALS)


def test_texts_are_used_and_there():
    code = "\n".join(path.read_text(encoding="utf-8") for path in SCRIPTS)
    made = {"key_", "state_", "syntax_", "theme_", "unit_", "worker_"}
    assert set(re.findall(r"t\(`(\w+_)\$\{", code)) == made
    plain = set(re.findall(r"\bt\(\s*'(\w+)'", code))
    plain |= {key for one in re.findall(r"\bt\(\s*[^'`()]*\? '(\w+)' : '(\w+)'\)", code) for key in one}
    assert plain <= LOCALES["en"].keys()
    quoted = set(re.findall(r"['\"](\w+)['\"]", code))
    quoted |= set(re.findall(r"\b(\w+):", code)) | set(re.findall(r"\[(\w+), ", code))
    unused = {key for key in LOCALES["en"].keys() - quoted if not any(key.startswith(prefix) for prefix in made)}
    assert unused == set()


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.files: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.files += [value for name, value in attrs if name in ("src", "href") and value]


def test_every_file_of_the_page_is_there():
    page = Page()
    text = (STATIC / "index.html").read_text(encoding="utf-8")
    page.feed(text)
    mapped = json.loads(re.search(r'type="importmap">(.*?)</script>', text, re.DOTALL)[1])["imports"]
    for name in [*page.files, *mapped.values()]:
        assert (STATIC / name).is_file(), name
    scripts = {path.relative_to(STATIC).as_posix() for path in STATIC.rglob("*.js")}
    assert {name.removeprefix("./") for name in page.files if name.endswith(".js")} == scripts  # loaded all at once
    for path in SCRIPTS:
        for name in re.findall(r"from '([^']+)'", path.read_text(encoding="utf-8")):
            assert name in mapped or (path.parent / name).is_file(), (path, name)
