"""`sfumato show`: describes a checkpoint from its file headers, or an image from its metadata."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from sfumato.cli import options

__all__ = ["EXAMPLES", "show"]

EXAMPLES = """\b
Examples:
  sfumato show
  sfumato show ./my-checkpoint
  sfumato show sd_xl_base_1.0.safetensors
  sfumato show fox.png
  sfumato show ./my-lora.safetensors
  sfumato show stable-diffusion-v1-5/stable-diffusion-v1-5 --variant fp16"""


def show(
    model: Annotated[
        str | None,
        typer.Argument(
            help="A checkpoint: folder, file, or a hub id or short name in the local cache; or an image. Default: your "
            "default model, or else the built-in one.",
            autocompletion=options.complete_models,
        ),
    ] = None,
    variant: options.Variant = None,
    as_json: options.AsJson = False,
) -> None:
    """Describe a checkpoint, or show how an image was generated.

    For a checkpoint: family, parameters, size, dtype and scheduler. Loads no weights and does not use the network.
    """
    from sfumato.checkpoints.builtin import relatives
    from sfumato.checkpoints.locate import is_network
    from sfumato.checkpoints.locate_file import is_single_file
    from sfumato.cli.early import check_model
    from sfumato.cli.pictures import show_picture
    from sfumato.cli.settings import chosen_model
    from sfumato.files import expanded
    from sfumato.metadata.formats import is_picture

    if model is not None and is_picture(model):
        show_picture(model, as_json=as_json)
        return
    model = str(relatives().get(name := chosen_model(model), name))
    if is_network(expanded(model)):
        _show_network(name, model, as_json=as_json)
        return
    check_model(model, downloads=False)
    facts = _of_file(model, variant) if is_single_file(model) else _of_folder(model, variant)
    if "width" not in facts and _is_adapter(model):
        _show_adapter(model, as_json=as_json)
        return
    _show_checkpoint(facts | {"name": name}, as_json=as_json)


def _show_checkpoint(facts: dict[str, Any], *, as_json: bool) -> None:
    """Print the parts of a checkpoint as a table."""
    from sfumato.cli.terminal import output, print_json

    if as_json:
        print_json(facts)
        return
    from rich.markup import escape
    from rich.table import Table

    console = output()
    console.print(
        f"[bold]{escape(facts['name'])}[/bold]: {escape(facts['family'])}{_size(facts)}",
        highlight=False,
        soft_wrap=True,
    )
    table = Table("part", "class", "parameters", "size", "dtype", box=None, pad_edge=False)
    for part, entry in facts["parts"].items():
        table.add_row(
            escape(part),
            escape(entry["class"]),
            _count(entry.get("parameters")),
            _bytes(entry.get("bytes")),
            escape(entry.get("dtype", "")),
        )
    table.add_row("total", "", _count(facts["parameters"]), _bytes(facts["bytes"]), "")
    console.print(table)
    if "prediction_type" in facts:
        console.print(f"predicts {facts['prediction_type']}, {facts['prompt_tokens']} prompt tokens", highlight=False)
    for line in [*_abilities(facts), *_reasons(facts)]:
        console.print(escape(line), highlight=False, soft_wrap=True)


def _is_adapter(path: str) -> bool:
    """Return whether a file is an adapter. Imports torch, so call it only if it is not a checkpoint."""
    from sfumato.adapters.about import is_adapter

    return is_adapter(path)


def _show_adapter(path: str, *, as_json: bool) -> None:
    """Describe an adapter or embedding file."""
    from rich.markup import escape

    from sfumato.adapters.about import about_adapter
    from sfumato.cli.terminal import output, plain, print_json

    facts = about_adapter(path)
    if as_json:
        print_json(facts)
        return
    family = f" for {facts['family']}" if facts["family"] else ""
    lines = [f"{facts['name']}: {'an' if facts['is'][0] in 'ae' else 'a'} {facts['is']}{family}"]
    if facts["is"] == "embedding":
        lines += [f"{key}: {number} vectors" for key, number in facts["vectors"].items()]
    else:
        ranks = ", ".join(map(str, facts["ranks"]))
        lines.append(", ".join(f"{kind} × {number}" for kind, number in facts["kinds"].items()) + f", rank {ranks}")
        lines.append(", ".join(f"{part}: {number} modules" for part, number in facts["modules"].items()))
        lines += [f"unknown keys: {facts['unknown']}"] if facts["unknown"] else []
        lines += [f"adds the words {', '.join(facts['embeddings'])}"] if facts["embeddings"] else []
        lines += [f"trained as {facts['trained_as']}"] if facts["trained_as"] else []
        lines += [f"trigger words: {', '.join(facts['trigger_words'])}"] if facts["trigger_words"] else []
        lines += [f"{said}: {value}" for said, value in facts["training"].items()]
    for line in lines:
        output().print(escape(plain(line)), highlight=False, soft_wrap=True)


def _show_network(name: str, folder: str, *, as_json: bool) -> None:
    """Describe a folder with one network: a ControlNet, a VAE."""
    from rich.markup import escape

    from sfumato.checkpoints.about import about_network
    from sfumato.cli.terminal import output, print_json

    facts = about_network(folder) | {"name": name}
    if as_json:
        print_json(facts)
        return
    size = f"{_count(facts['parameters'])} parameters, {_bytes(facts['bytes'])}, {facts['dtype']}"
    output().print(escape(f"{name}: a network ({facts['class']}), {size}"), highlight=False, soft_wrap=True)


def _of_file(model: str, variant: str | None) -> dict[str, Any]:
    from sfumato.checkpoints.about import about_file
    from sfumato.errors import UsageError

    if variant is not None:
        raise UsageError("a checkpoint file has no variants; drop --variant")
    return about_file(model, local_files_only=True)


def _of_folder(model: str, variant: str | None) -> dict[str, Any]:
    from sfumato.pipelines.summary import summarize

    return summarize(model, variant=variant)


def _size(facts: dict[str, Any]) -> str:
    return f", images of {facts['width']} × {facts['height']}" if "width" in facts else ""


def _reasons(facts: dict[str, Any]) -> list[str]:
    """List how a file was detected, and what it lacks."""
    return [
        *(f"- {reason}" for reason in facts.get("why", ())),
        *(f"- {said}" for said in facts.get("missing", {}).values()),
    ]


def _abilities(facts: dict[str, Any]) -> list[str]:
    """List what a model with a small vocabulary knows."""
    if "words" not in facts:
        return []
    settings = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in facts["suggested"].items())
    return [
        f"a small demo model that knows {len(facts['words'])} things and nothing else",
        f"styles: {', '.join(facts['styles'])}",
        *([f"default settings: {settings}"] if settings else []),
        f"things: {', '.join(facts['words'])}",
    ]


def _count(number: Any) -> str:
    return "" if number is None else f"{number / 1e6:,.1f} M"


def _bytes(number: Any) -> str:
    from sfumato.runtime.reasons import gigabytes

    return "" if number is None else gigabytes(number)
