"""Every block of every page runs as it stands; every link leads somewhere; generated pages are fresh."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

from support.converted import write_converted
from support.hub import cache
from support.single_files import write_small

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
# The hub ids that pages name, and the tiny random checkpoints that answer for them.
IDS = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd15",
    "CompVis/stable-diffusion-v1-4": "sd15",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
    "stabilityai/stable-diffusion-xl-refiner-1.0": "refiner",
}
# Converted models that pages name, as others published them: without a word of where they come from.
CONVERTED = "apple/coreml-stable-diffusion-v1-4"
# Files that lie beside a reader of a page: small ones of these families, and whether they hold the U-Net alone.
FILES = {
    "docs/guides/checkpoints.md": {
        "dreamshaper_8.safetensors": ("sd15", False),
        "sd_xl_turbo_1.0_fp16.safetensors": ("sdxl-turbo", False),
        "sdxl_lightning_4step_unet.safetensors": ("sdxl-lightning", True),
    }
}
# What no test runs, and why: (page, reason). A block is left out by `<!-- not run: reason -->` right before it.
NOT_RUN = {
    ("README.md", "these install the command that the other blocks run"),
    ("README.md", "these two set up the environment the other blocks run in"),
}
# It measures this machine and runs `sfumato bench`, which tests/cli does over less work.
LONG = {"docs/guides/memory-and-speed.md"}

# Runs the blocks of one page in order: Python in one namespace, with warnings as errors, and shell with `bash -eu`.
DRIVER = """
import json, subprocess, sys, warnings
import torch

names = {"__name__": "__main__"}
for block in json.loads(sys.argv[1]):
    print("---", block["page"], "line", block["line"], flush=True)
    if block["language"] == "python":
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            code = "\\n" * block["line"] + block["text"]
            exec(compile(code, block["page"], "exec"), names)
    else:
        subprocess.run([sys.argv[2], "-eu", "-o", "pipefail", "-c", block["text"]], check=True, stdin=subprocess.DEVNULL)
"""


@dataclass(frozen=True)
class Block:
    """A block of code on a page; `line` is the line of its fence."""

    page: str
    line: int
    language: str
    text: str
    skipped: str = ""


def blocks_of(page: str, text: str) -> list[Block]:
    """The blocks of code that a reader would run, in order."""
    found, lines = [], text.splitlines()
    start, language, skipped = 0, "", ""
    for number, line in enumerate(lines, start=1):
        fence = re.fullmatch(r"\s*```\s*(\w*).*", line)
        if fence and not start:
            start, language = number, fence[1]
            before = " ".join(part for part in lines[max(0, number - 3) : number - 1] if part.strip())
            reason = re.search(r"<!-- not run: (.+?) -->\s*$", before)
            skipped = reason[1] if reason else ""
        elif fence:
            body = lines[start : number - 1]
            if language == "console":
                body = [part.removeprefix("$ ") for part in body if part.startswith("$ ")]
            if language in ("python", "py", "bash", "sh", "shell", "console"):
                kind = "python" if language in ("python", "py") else "shell"
                found.append(Block(page, start, kind, "\n".join(body) + "\n", skipped))
            start = 0
    assert start == 0, f"{page}: the block of line {start} is not closed"
    return found


BLOCKS = {
    page.relative_to(ROOT).as_posix(): blocks_of(page.relative_to(ROOT).as_posix(), page.read_text(encoding="utf-8"))
    for page in PAGES
}


def test_blocks_are_found_as_a_reader_sees_them():
    text = "a\n```python\nx = 1\n```\n<!-- not run: why -->\n```sh\nls\n```\n```text\nno\n```\n```console\n$ pwd\n/tmp\n```\n"
    assert blocks_of("p", text) == [
        Block("p", 2, "python", "x = 1\n"),
        Block("p", 6, "shell", "ls\n", "why"),
        Block("p", 12, "shell", "pwd\n"),
    ]


def test_only_what_must_be_is_left_out():
    assert {(block.page, block.skipped) for blocks in BLOCKS.values() for block in blocks if block.skipped} == NOT_RUN
    guides = [page for page in BLOCKS if page.startswith("docs/guides/")]
    assert guides
    assert all(BLOCKS[page] for page in ["README.md", *guides])


@pytest.fixture(scope="session")
def hub(checkpoints: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home of the hub's library whose cache has the checkpoints that pages name."""
    home = tmp_path_factory.mktemp("home")
    for name, shape in IDS.items():
        cache(home / "hub", name, checkpoints(shape))
    models = home / "converted"
    write_converted(checkpoints("sd15"), models / "original" / "packages", described=False, tokenizer=False)
    cache(home / "hub", CONVERTED, models)
    return home


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=pytest.mark.long if page in LONG else ())
        for page, blocks in BLOCKS.items()
        if any(not block.skipped for block in blocks)
    ],
)
@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_page_runs(page, hub, server, tmp_path):
    blocks = [asdict(block) for block in BLOCKS[page] if not block.skipped]
    if any(CONVERTED in block["text"] for block in blocks):
        # What the page's own download would have left, so that offline the hub's library takes it as it is.
        shutil.copytree(hub / "converted", tmp_path / "models" / "coreml-stable-diffusion-v1-4_original_packages")
    for name, (family, alone) in FILES.get(page, {}).items():
        write_small(tmp_path / name, family, alone=alone)
    path = os.pathsep.join([str(server.bin), str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {"HF_HOME": str(hub), "HF_HUB_OFFLINE": "1", "PATH": path}
    done = server.run(DRIVER, [json.dumps(blocks), str(shutil.which("bash"))], cwd=tmp_path, env=env)
    assert done.code == 0, done.out[-3000:] + done.err[-3000:]
    assert done.out.count(f"--- {page} line ") == len(blocks)


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    plain = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", plain, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    plain = re.sub(r"^```.*?^```|`[^`\n]*`", "", text, flags=re.DOTALL | re.MULTILINE)
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", plain):
        name, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        file = (page.parent / name).resolve() if name else page
        if not file.exists() or (anchor and anchor not in anchors(file.read_text(encoding="utf-8"))):
            broken.append(target)
    assert broken == []


def test_generated_pages_are_fresh():
    command = [sys.executable, ROOT / "docs" / "generate.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
