"""`sfumato schedulers`: the short names of schedulers and what they mean."""

from __future__ import annotations

from sfumato.cli import options

__all__ = ["EXAMPLES", "schedulers"]

EXAMPLES = """\b
Examples:
  sfumato schedulers
  sfumato generate "a fox" --scheduler dpmpp_2m_karras --steps 20"""


def schedulers(as_json: options.AsJson = False) -> None:
    """List the schedulers for --scheduler."""
    from sfumato.cli.terminal import output, print_json
    from sfumato.schedulers.names import NAMES

    if as_json:
        print_json({name: {"class": a.class_name, "config": a.preset, "about": a.about} for name, a in NAMES.items()})
        return
    from rich.table import Table

    table = Table("name", "description", "class", box=None, pad_edge=False)
    for name, alias in NAMES.items():
        table.add_row(name, alias.about, alias.class_name)
    output().print(table)
