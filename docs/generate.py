"""Write the pages made from the code: schedulers, the command line, coming from diffusers; `--check` says if stale."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from compat import diffusers_page

from sfumato.schedulers.names import NAMES

HERE = Path(__file__).parent
COMMANDS = ("", "generate", "replay", "schedulers", "show", "plan", "convert", "doctor", "bench", "download", "models")
MORE = ("models remove", "completion")
BULK = ("bulk", "bulk plan", "bulk run", "bulk status", "bulk verify", "bulk export")
STUDIO = ("studio", "serve")
COREML = ("coreml", "coreml convert", "coreml verify", "coreml generate", "coreml download")
NOTE = "<!-- made by docs/generate.py; change the code, then run `make docs` -->\n"


def schedulers_page() -> str:
    """The table of short names."""
    rows = []
    for name, alias in NAMES.items():
        preset = ", ".join(f"`{key}={value!r}`" for key, value in alias.preset.items() if value not in (False, None))
        rows.append(f"| `{name}` | {alias.about} | `{alias.class_name}` | {preset} |")
    head = (
        "# Schedulers\n\n`--scheduler NAME` and `GenerateRequest(scheduler=NAME)` take these names,"
        " and what other programs call these samplers\n(`DPM++ 2M Karras`, `Euler a`). In Python, each class"
        " can also be used directly:\n"
        "`pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)`.\n\n"
        "| name | what it is | class | settings |\n|---|---|---|---|\n"
    )
    return NOTE + head + "\n".join(rows) + "\n"


def cli_page() -> str:
    """The help of every command."""
    parts = ["# The command line\n"]
    for command in (*COMMANDS, *MORE, *COREML, *BULK, *STUDIO):
        words = ["sfumato", *command.split(), "--help"]
        script = Path(sys.executable).with_name("sfumato")
        environment = os.environ | {"COLUMNS": "100", "TERMINAL_WIDTH": "100", "NO_COLOR": "1"}
        run = subprocess.run([script, *words[1:]], capture_output=True, text=True, env=environment, check=True)
        parts.append(f"## `{' '.join(words[:-1])}`\n\n```text\n{run.stdout.strip()}\n```\n")
    return NOTE + "\n".join(parts)


def main() -> int:
    """Write or check all pages."""
    check = "--check" in sys.argv[1:]
    stale = []
    pages = {"schedulers.md": schedulers_page(), "cli.md": cli_page(), "diffusers.md": NOTE + diffusers_page()}
    for name, text in pages.items():
        path = HERE / name
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            stale.append(name)
            if not check:
                path.write_text(text, encoding="utf-8")
    if check and stale:
        print(f"stale: {', '.join(stale)}; run 'make docs'")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
