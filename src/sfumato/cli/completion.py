"""`sfumato completion`: shell completion for commands, options and names, generated from the parser."""

from __future__ import annotations

from typing import Annotated

import typer

from sfumato.errors import UsageError, suggest

__all__ = ["COMPLETE", "EXAMPLES", "completion"]

# The variable through which a shell requests completions.
COMPLETE = "_SFUMATO_COMPLETE"
_SHELLS = ("bash", "zsh", "fish")

EXAMPLES = """\b
Examples:
  sfumato completion bash >> ~/.bashrc
  sfumato completion zsh >> ~/.zshrc
  sfumato completion fish > ~/.config/fish/completions/sfumato.fish"""


def completion(
    shell: Annotated[
        str,
        typer.Argument(
            metavar="SHELL",
            help="bash, zsh or fish.",
            autocompletion=lambda incomplete: [name for name in _SHELLS if name.startswith(incomplete)],
        ),
    ],
) -> None:
    """Print the shell script for tab completion.

    It completes commands, options and model names.
    """
    if shell not in _SHELLS:
        raise UsageError(f"there is no completion for {shell!r}{suggest(shell, _SHELLS)}; use {', '.join(_SHELLS)}")
    from typer.completion import get_completion_script  # pyright: ignore[reportPrivateImportUsage]

    typer.echo(get_completion_script(prog_name="sfumato", complete_var=COMPLETE, shell=shell))
