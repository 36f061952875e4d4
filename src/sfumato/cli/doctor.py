"""`sfumato doctor`: this machine's hardware, its speed, and what is missing."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sfumato.cli import options

if TYPE_CHECKING:
    from sfumato.cli.terminal import Terminal
    from sfumato.runtime.facts import Facts

__all__ = ["EXAMPLES", "doctor"]

EXAMPLES = """\b
Examples:
  sfumato doctor
  sfumato doctor --again
  sfumato doctor --save-facts this-machine.json"""


def doctor(
    again: Annotated[
        bool, typer.Option("--again", help="Measure speeds and run canaries again instead of using cached results.")
    ] = False,
    facts: Annotated[
        str | None,
        typer.Option(help="Check another machine: a JSON file of facts, or a name such as m1-8gb."),
    ] = None,
    save_facts: Annotated[
        Path | None, typer.Option(help="Write the facts to this JSON file, for 'sfumato plan --facts'.")
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Check this machine, and show how to fix problems.

    Checks software, devices, memory, speed, and whether results are correct.
    """
    from sfumato.cli.terminal import Terminal, print_json
    from sfumato.files import output_file
    from sfumato.runtime.checks import check_machine, dtype_support
    from sfumato.runtime.facts import facts_named, read_facts
    from sfumato.runtime.faults import told

    if save_facts is not None:
        output_file(save_facts)  # report a bad path before measuring anything
    found = facts_named(facts) if facts else _measured(read_facts(), Terminal(quiet=False), again=again)
    found = found if facts else _checked(found, Terminal(quiet=False), again=again)
    if save_facts is not None:
        found.to_json(save_facts)
    if as_json:
        print_json(
            {
                "checks": [dataclasses.asdict(check) for check in check_machine(found)],
                "dtypes": dtype_support(found),
                "faults": told(found),
                "quirks": [dataclasses.asdict(quirk) for quirk in found.quirks],
                "facts": found.to_dict(),
            }
        )
        return
    _show(found)


def _measured(facts: Facts, terminal: Terminal, *, again: bool) -> Facts:
    """Return the facts with speeds, cached or measured now."""
    if facts.speeds and not again:
        return facts
    from sfumato.runtime.speeds import keep_speeds, measure_speeds

    with terminal.working("measuring the speed of this machine (takes a few seconds)"):
        speeds = measure_speeds(facts.accelerator, facts.free_cores)
    keep_speeds(facts, speeds)
    return dataclasses.replace(facts, speeds=speeds)


def _checked(facts: Facts, terminal: Terminal, *, again: bool) -> Facts:
    """The facts with verdicts on the operations of the default model, from the cache or found now."""
    from sfumato.checkpoints.builtin import BUILT_IN
    from sfumato.cli.settings import chosen_model
    from sfumato.errors import SfumatoError
    from sfumato.pipelines.sizes import read_sizes
    from sfumato.runtime.canaries import checked

    try:
        sizes = read_sizes(chosen_model(None))
    except SfumatoError:  # reported when that model is used
        sizes = read_sizes(BUILT_IN)
    with terminal.working("comparing this machine's operations with exact ones (takes a second)"):
        return checked(facts, sizes, run=True, again=again)


def _show(facts: Facts) -> None:
    from rich.markup import escape
    from rich.table import Table

    from sfumato.cli.terminal import output
    from sfumato.runtime.checks import check_machine, dtype_support
    from sfumato.runtime.faults import PASSED, told
    from sfumato.runtime.speeds import KINDS

    console = output()
    console.print(f"[bold]{escape(facts.name)}[/bold], {facts.system} {escape(facts.system_version)}", highlight=False)
    table = Table("", "check", "found", "what to do", box=None, pad_edge=False)
    for check in check_machine(facts):
        table.add_row(check.state, check.name, escape(check.found), escape(check.mend))
    console.print(table)
    speeds = Table("GFLOP/s", *KINDS, "support", box=None, pad_edge=False)
    for dtype, support in dtype_support(facts).items():
        rates = [facts.speeds.get(f"{kind}_{dtype}") for kind in KINDS]
        speeds.add_row(dtype, *("" if rate is None else f"{rate / 1e9:,.1f}" for rate in rates), support)
    console.print()
    console.print(speeds)
    passed = sum(verdict == PASSED for verdict in facts.canaries.values())
    if facts.canaries:
        console.print(f"\n{passed} of {len(facts.canaries)} canaries passed", highlight=False)
    for sentence in told(facts):
        console.print(f"- {escape(sentence)}", highlight=False, soft_wrap=True)
    for quirk in facts.quirks:
        console.print(
            f"- known issue: {quirk.trouble}; {quirk.answer} ({quirk.source})", highlight=False, soft_wrap=True
        )
