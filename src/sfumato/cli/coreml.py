"""`sfumato coreml …`: the Core ML commands."""

from __future__ import annotations

import typer

from sfumato.cli import coreml_convert, coreml_download, coreml_generate, coreml_verify

__all__ = ["app"]

app = typer.Typer(
    help="Convert, verify and run Core ML models on any system.",
    epilog="Start with: sfumato coreml convert",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("convert", epilog=coreml_convert.EXAMPLES)(coreml_convert.convert)
app.command("verify", epilog=coreml_verify.EXAMPLES)(coreml_verify.verify)
app.command("generate", epilog=coreml_generate.EXAMPLES)(coreml_generate.generate)
app.command("download", epilog=coreml_download.EXAMPLES)(coreml_download.download)
