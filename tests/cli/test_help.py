"""Help and lists: quick because they import nothing heavy, and with examples."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from cli.conftest import SCRIPT
from sfumato import __version__
from sfumato.schedulers.names import NAMES

COMMANDS = (
    *("generate", "replay", "schedulers", "show", "plan", "convert", "doctor", "bench", "download", "completion"),
    *("studio", "serve"),
)
GROUPS = ("models", "coreml", "bulk")
COREML = ("convert", "verify", "generate", "download")
BULK = ("plan", "run", "status", "verify", "export")
HEAVY = {
    "torch",
    "numpy",
    "PIL",
    "huggingface_hub",
    "safetensors",
    "tokenizers",
    "tqdm",
    "rich",
    "transformers",
    "diffusers",
}


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        *([command, "--help"] for command in COMMANDS),
        *(["coreml", command, "--help"] for command in COREML),
        *(["bulk", command, "--help"] for command in BULK),
        ["models", "--help"],
        ["models", "remove", "--help"],
        ["completion", "zsh"],
        ["schedulers", "--json"],
        ["generate", "x", "--stps", "1"],
    ],
)
def test_quick_commands_import_nothing_heavy(environment, words, tmp_path):
    command = [sys.executable, "-X", "importtime", SCRIPT, *words]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    imported = set(re.findall(r"^import time:[ \d|]+\| +([\w.]+)$", done.stderr, re.MULTILINE))
    assert {"typer", "sfumato.cli.main"} <= imported  # the list is really there
    assert {name for name in imported if name.partition(".")[0] in HEAVY} == set()
    if "--help" in words:
        assert done.returncode == 0
        assert done.stdout.startswith("Usage: sfumato")
        examples = re.findall(r"^ +(sfumato \w+.*)$", done.stdout.partition("Examples:")[2], re.MULTILINE)
        assert len(examples) >= 2 if len(words) > 1 else 'sfumato generate "a red apple, 3d"' in done.stdout
        assert all(
            line.split()[1 : len(words)] == words[:-1] or line.split()[1] in (*COMMANDS, *GROUPS) for line in examples
        )


def test_root(sfumato, tmp_path):
    listed = sfumato("-h", cwd=tmp_path).succeeded().out
    assert re.findall(r"^  (\w+) +[A-Z]", listed.partition("Commands:")[2], re.MULTILINE) == [*COMMANDS, *GROUPS]
    group = sfumato("coreml", "-h", cwd=tmp_path).succeeded().out
    assert re.findall(r"^  (\w+) +[A-Z]", group.partition("Commands:")[2], re.MULTILINE) == list(COREML)
    bare = sfumato(cwd=tmp_path)
    assert (bare.code, bare.out + bare.err) == (2, listed)
    assert sfumato("--version", cwd=tmp_path).succeeded().out == f"sfumato {__version__}\n"


@pytest.mark.parametrize("group", [(), *((name,) for name in GROUPS)])
def test_no_summary_of_a_command_is_cut(sfumato, group, tmp_path):
    listed = sfumato(*group, "--help", cwd=tmp_path).succeeded().out.partition("Commands:")[2]
    assert "..." not in listed.partition("\n\n")[0]


def test_schedulers(sfumato, tmp_path):
    lines = sfumato("schedulers", cwd=tmp_path).succeeded().out.splitlines()
    # Into a pipe each is one unbroken line, for grep.
    assert [line.split()[0] for line in lines[1:]] == list(NAMES)
    for line in lines[1:]:
        alias = NAMES[line.split()[0]]
        assert alias.about in line
        assert line.split()[-1] == alias.class_name
    told = json.loads(sfumato("schedulers", "--json", cwd=tmp_path).succeeded().out)
    assert {name: entry["class"] for name, entry in told.items()} == {
        name: alias.class_name for name, alias in NAMES.items()
    }
    assert told["dpmpp_2m_karras"]["config"]["use_karras_sigmas"] is True
    assert len({entry["class"] for entry in told.values()}) == 18
